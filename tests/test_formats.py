"""General formats: detection, reading, TRL's columns back and forth, errors that say where and how to mend."""
import csv
import doctest
import json

import pytest

from data_tools import fields
from data_tools.fields import DataError, divide, shared, transcript
from data_tools.formats import FORMATS, WRITERS, detect, dump, load, to_trl
from data_tools.records import Group, Response


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def file(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(record, format=None):
    """The group of one record, found by its keys unless the format is named."""
    return FORMATS[format or detect(record)].read(record)


def texts(group):
    return [r.text for r in group.responses]


def test_doctests():
    assert doctest.testmod(fields).failed == 0


# --------------------------------------------------------------------------------------------------- TRL's data types
TRL = {
    "pair": [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        {"prompt": [{"role": "system", "content": "Be brief."}, user("Sky?"), assistant("Where?"), user("Here.")],
         "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")], "id": 7, "margin": 0.5, "system": "Be brief.",
         "tools": [{"type": "function", "function": {"name": "look"}}], "none": None},
        {"prompt": [user("Sky?")], "rejected": [assistant("Green.")],
         "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
                    {"role": "tool", "content": "blue", "name": "f"}, assistant("Blue.")]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9.5, "score_rejected": 1, "model_chosen": "x",
         "model_rejected": "y", "good_chosen": True, "good_rejected": False, "alone_chosen": 1},
    ],
    "unpaired": [
        {"prompt": "The sky is", "completion": " blue.", "label": True, "id": "a"},
        {"prompt": [user("Sky?")], "completion": [assistant("Green.")], "label": False},
    ],
    "stepwise": [
        {"prompt": "Which is larger, 9.8 or 9.11?", "completions": ["0.8 is .8", "0.11 is .11", "so 9.11"],
         "labels": [True, True, False], "id": 1},
        {"prompt": "1+1?", "completions": ["2"], "labels": [True]},
        {"prompt": "1+1?", "completions": ["one", "2"], "labels": [True, None]},
    ],
    "prompts": [
        {"prompt": "The sky is", "answer": "blue", "level": 3},
        {"prompt": [user("Sky?")], "tools": "[]"},
    ],
    "demonstration": [
        {"prompt": "The sky is", "completion": " blue.", "id": 1},
        {"prompt": [user("Sky?")], "completion": [assistant("Blue.")]},
    ],
}


@pytest.mark.parametrize("name, record", [(name, r) for name, rows in TRL.items() for r in rows])
def test_trl_records_are_found_by_their_keys_and_written_without_loss(name, record):
    assert detect(record) == name
    before = json.dumps(record)
    group = one(record)
    assert to_trl(group) == record == WRITERS[name](group)
    assert json.dumps(record) == before                       # reading leaves the record alone


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("name", TRL)
def test_trl_files_come_back(tmp_path, name, ending):
    rows = [r for r in TRL[name] if ending != ".parquet" or isinstance(r["prompt"], list)] or TRL[name]
    path = tmp_path / f"out{ending}"
    assert dump((one(r) for r in rows), path, format=name) == len(rows)
    again = [to_trl(g) for g in load(path)]
    if ending == ".parquet":                                  # a null of parquet is an absent key
        rows = [{k: v for k, v in r.items() if v is not None} for r in rows]
    assert again == rows
    assert [g.meta["place"] for g in load(path)] == [f"{path}:{n + 1}" for n in range(len(rows))]


def test_what_the_columns_become():
    pair = one(TRL["pair"][2])
    assert pair.prompt == TRL["pair"][2]["prompt"] and pair.relevance == [1.0, 0.0] and pair.wins is None
    assert texts(pair) == ["Blue.", "Green."]                 # one plain assistant message is its text
    assert pair.meta == {k: TRL["pair"][2][k] for k in ("id", "margin", "system", "tools", "none")}
    scored = one(TRL["pair"][4])
    assert [r.scores for r in scored.responses] == [{"score": 9.5}, {"score": 1}]
    assert [r.meta for r in scored.responses] == [{"model": "x", "good": True}, {"model": "y", "good": False}]
    assert scored.meta == {"alone_chosen": 1}
    assert [one(r).relevance for r in TRL["unpaired"]] == [[1.0], [0.0]]
    steps = one(TRL["stepwise"][0])
    assert steps.responses[0].text == "0.8 is .8\n0.11 is .11\nso 9.11" and steps.relevance == [0.0]
    assert one(TRL["stepwise"][2]).relevance == [1.0]         # no step is known to be wrong
    assert steps.responses[0].meta == {"steps": TRL["stepwise"][0]["completions"], "step_labels": [True, True, False]}
    assert one(TRL["prompts"][0]).responses == [] and one(TRL["prompts"][0]).meta["answer"] == "blue"
    assert one(TRL["demonstration"][0]).relevance is None


@pytest.mark.slow
@pytest.mark.parametrize("record", TRL["pair"][:4] + [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."}, {"chosen": "Q:\n\nyes", "rejected": "Q:\n\nno"},
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
    {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c"), user("d")]}])
def test_prompts_are_those_of_trl(record):
    data_utils = pytest.importorskip("trl.data_utils")
    want, found = data_utils.maybe_extract_prompt(record), to_trl(one(record))
    assert {k: found[k] for k in ("prompt", "chosen", "rejected")} == {
        k: want[k] for k in ("prompt", "chosen", "rejected")}


# ----------------------------------------------------------------------------------------------------- implicit prompts
def test_shared_equals_a_loop():
    for a, b in (("", ""), ("a", ""), ("abc", "abc"), ("abcdef", "abcxef"), ("xa", "ya"), ("aaaa", "aa")):
        want = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert shared(a, b) == shared(list(a), list(b)) == want


def test_raw_texts_are_cut_between_words():
    assert divide(["A: 12", "A: 13"], ["", ""]) == ("A:", [" 12", " 13"])
    assert divide(["Q\n\nyes", "Q\n\nno"], ["", ""]) == ("Q\n\n", ["yes", "no"])
    assert divide(["one", "only"], ["", ""]) == ("", ["one", "only"])
    assert divide(["say hello", "say hello there"], ["", ""]) == ("say", [" hello", " hello there"])
    for a, b in (("A: 12", "A: 13"), ("x", "y"), ("say hello", "say hello"), ("é é", "é è")):
        head, (left, right) = divide([a, b], ["", ""])
        assert (head + left, head + right) == (a, b)          # nothing is lost


def test_conversations_share_turns_and_each_keeps_one():
    start = [user("a"), assistant("b"), user("c")]
    assert divide([start + [assistant("d")], start + [assistant("e")]], ["", ""]) == (start, ["d", "e"])
    longer = [*start, assistant("d"), user("e"), assistant("f")]
    assert divide([start + [assistant("d")], longer], ["", ""]) == (start, ["d", longer[3:]])
    assert divide([[assistant("a")], [assistant("b")]], ["", ""]) == ([], ["a", "b"])


def test_hh_transcripts():
    hh = one({"chosen": "\n\nHuman: Hi there\n\nAssistant: Hello\n\nHuman: Name\n\ntwo?\n\nAssistant: Ada. Human: no turn",
              "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello\n\nHuman: Name\n\ntwo?\n\nAssistant: "})
    assert hh.prompt == [user("Hi there"), assistant("Hello"), user("Name\n\ntwo?")]
    assert texts(hh) == ["Ada. Human: no turn", ""]
    assert transcript("Human: no answer") is None and transcript("So Human: hi\n\nAssistant: b") is None
    assert transcript("## Human:\na\n\n\n## Assistant:\n b ## Human: c") == [user("a"), assistant("b ## Human: c")]


def test_transcripts_whose_users_differ_leave_the_users_turn_to_the_response():
    hh = one({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
              "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: x\n\nAssistant: y"})
    assert hh.prompt == [user("a"), assistant("b")]
    assert texts(hh) == [[user("c"), assistant("d")], [user("x"), assistant("y")]]


def test_a_plain_prompt_beside_whole_conversations_must_be_in_them():
    record = {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    assert (one(record).prompt, texts(one(record))) == ([user("a")], ["b", "c"])
    with pytest.raises(DataError, match="'prompt' is 'z' \\(str\\), but 'chosen' and 'rejected' share no message"):
        one({**record, "prompt": "z"})


def test_a_prompt_that_the_answers_repeat_is_cut_from_them():
    turns = [user("a"), assistant("b"), user("c")]
    record = {"prompt": turns, "chosen": [*turns, assistant("d")], "rejected": [*turns, assistant("e")]}
    assert (one(record).prompt, texts(one(record))) == (turns, ["d", "e"])


# --------------------------------------------------------------------------------------------------------- other shapes
def test_ranked_and_scored_lists():
    for key in ("responses", "completions"):
        ranked = one({"prompt": "p", key: ["a", "b", "c", "d"], "ranks": [2, 1, 4, 2], "id": 1})
        assert (ranked.relevance, ranked.meta) == ([1.0, 2.0, 0.0, 1.0], {"id": 1})
        scored = one({"prompt": [user("p")], key: [[assistant("a")], "b"], "scores": [0.5, None]})
        assert (texts(scored), scored.relevance) == (["a", "b"], [0.5, None])
        assert [r.scores for r in scored.responses] == [{"score": 0.5}, {}]


def test_prompts_questions_and_demonstrations():
    assert one({"question": "2+2?", "answer": "#### 4", "id": 3}) == Group("2+2?", [], meta={"answer": "#### 4", "id": 3})
    assert one({"prompt": "2+2?", "answer": "4"}) == Group("2+2?", [], meta={"answer": "4"})
    assert one({"messages": [user("a"), assistant("b")]}) == Group([user("a")], [Response("b")])
    assert one({"prompt": "a", "prompt_id": 3, "messages": [user("a"), assistant("b")]}).responses == [Response("b")]


def test_tool_calls_of_sharegpt_become_chat_messages():
    found = one({"tools": "[]", "conversations": [
        {"from": "human", "value": "Weather?"}, {"from": "function_call", "value": '{"name": "w", "arguments": {}}'},
        {"from": "observation", "value": "sun"}, {"from": "gpt", "value": "Sunny."}]})
    assert found.prompt == [user("Weather?"), {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "w", "arguments": {}}}]}, {"role": "tool", "content": "sun"}]
    assert (texts(found), found.meta) == (["Sunny."], {"tools": "[]"})


def test_csv_cells_hold_numbers_truth_and_lists(tmp_path):
    rows = [{"prompt": "p, \"q\"", "responses": json.dumps(["a", "b"]), "scores": "[1, 2.5]"}]
    for name, record in (("ranked", rows[0]), ("unpaired", {"prompt": "p", "completion": "c", "label": "False"})):
        with open(tmp_path / f"{name}.csv", "w", newline="") as stream:
            table = csv.DictWriter(stream, list(record))
            table.writeheader()
            table.writerow(record)
    assert next(iter(load(tmp_path / "ranked.csv"))).relevance == [1.0, 2.5]
    assert next(iter(load(tmp_path / "unpaired.csv"))).relevance == [0.0]


# ---------------------------------------------------------------------------------------------------------- our own json
FULL = Group([user("p")], [Response("a", tokens=[1, 2], logp=[-0.5, -1.0], scores={"x": 1.5}, meta={"degree": 1}),
                           Response([{**assistant("b"), "name": None}], train=False, prompt="own")],
             relevance=[2.5, None], wins=[[0.5, 0.7], [0.3, 0.5]], weight=0.25, meta={"id": 3, "deep": {"a": [None]}})


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_groups_survive_writing_and_reading(tmp_path, ending):
    groups, path = [FULL, Group("p", []), Group("é", [Response("")])], tmp_path / f"groups{ending}"
    dump(groups, path)
    found = list(load(path))
    assert [g.meta.pop("place") for g in found] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert found == groups
    dump(load(path), path)                                    # reads while it writes: the new file comes last
    assert [{**g.meta, "place": 0} for g in load(path)] == [{**g.meta, "place": 0} for g in groups]


def test_groups_may_list_plain_texts():
    assert one({"prompt": "p", "responses": ["a", {"text": "b"}, [assistant("c")]], "relevance": [0, 1, 2]}) == Group(
        "p", [Response("a"), Response("b"), Response([assistant("c")])], [0, 1, 2])


@pytest.mark.parametrize("record, message", [
    ({"prompt": "p", "responses": [], "relevence": []}, "a group has no key 'relevence', did you mean 'relevance'?"),
    ({"prompt": "p", "responses": [{"text": "a", "score": 1}]}, "a response has no key 'score', did you mean 'scores'?"),
    ({"prompt": "p", "responses": [{"txt": "a"}]}, "the key 'text' is missing, did you mean 'txt'?"),
    ({"prompt": "p", "responses": [3]}, "expected an object with the keys text, found 3 (int)")])
def test_groups_with_other_keys(record, message):
    with pytest.raises(DataError) as caught:
        one(record, "group")
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- detection
def test_every_set_of_keys_leads_to_its_format():
    for name, form in FORMATS.items():
        for keys in form.keys:
            assert detect(dict.fromkeys([*keys.split(), "id", "source"])) == name


@pytest.mark.parametrize("keys, message", [
    ("prompt choosen rejected", "The key 'chosen' is missing, did you mean 'choosen'?"),
    ("promt choosen rejectd", "'prompt' is missing, did you mean 'promt'? The key 'chosen' is missing"),
    ("message", "The key 'messages' is missing, did you mean 'message'?"),
    ("promt chosen rejected", "The key 'prompt' is missing, did you mean 'promt'?"),
    ("prompt chosen rejcted", "did you mean 'rejcted'?"),
    ("prompt completion lable_x labels", "did you mean 'labels'?"),
    ("prompt rejected good", "There is 'rejected', but not what belongs to it."),
    ("text scores", "The key 'score' is missing, did you mean 'scores'?"),
    ("foo bar", "cannot tell the format from the keys foo, bar."),
    ("foo bar", "pair (prompt, chosen, rejected);")])
def test_keys_that_fit_no_format(tmp_path, keys, message):
    path = file(tmp_path, dict.fromkeys(keys.split(), "x"))
    with pytest.raises(ValueError) as caught:
        list(load(path))
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize("keys, name", [("id prompt type label focus note", "prompts"), ("prompt answer", "prompts"),
                                        ("task_id prompt entry_point test", "prompts"),
                                        ("chosen rejected prompt_id", "implicit"), ("prompt response", "demonstration")])
def test_further_keys_do_not_confuse(keys, name):
    assert detect(dict.fromkeys(keys.split())) == name


def test_formats_by_name_and_own_formats(tmp_path):
    path = file(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert next(iter(load(path, format="prompts"))).meta["chosen"] == "a"
    assert texts(next(iter(load(path, format=lambda r: Group(r["prompt"], [Response(r["rejected"])]))))) == ["b"]
    with pytest.raises(ValueError, match="unknown format 'pairs', did you mean 'pair'\\? Known: group, pair"):
        load(path, format="pairs")
    with pytest.raises(ValueError, match="unknown format 'trl'. Known: group, pair"):
        dump([], tmp_path / "x.jsonl", format="trl")


def test_columns_are_renamed(tmp_path):
    path = file(tmp_path, {"q": "p", "good": "a", "bad": "b", "id": 1})
    names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    group = next(iter(load(path, columns=names)))
    assert (group.prompt, texts(group), group.meta) == ("p", ["a", "b"], {"id": 1, "place": f"{path}:1"})
    with pytest.raises(DataError, match=r"data.jsonl:1: the key 'goood' is missing, did you mean 'good'\?"):
        list(load(path, columns={**names, "chosen": "goood"}))


def test_limit_and_several_files_of_different_formats(tmp_path):
    a = file(tmp_path, *TRL["pair"][:2], name="a.jsonl")
    b = file(tmp_path, *TRL["unpaired"], name="b.jsonl")
    assert [len(g.responses) for g in load([a, b])] == [2, 2, 1, 1]
    assert [g.meta["place"] for g in load([a, b], limit=3)] == [f"{a}:1", f"{a}:2", f"{b}:1"]
    assert list(load(a, limit=0)) == []


# ---------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("record, message", [
    ({"prompt": "p", "chosen": "a", "rejectd": "b"}, "the key 'rejected' is missing, did you mean 'rejectd'?"),
    ({"prompt": "p", "chosen": 3, "rejected": "b"}, "'chosen' should be text or a list of messages, found 3 (int)"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "'prompt' should be text or a list of messages, found None"),
    ({"prompt": ["p"], "chosen": "a", "rejected": "b"}, "a message of 'prompt' should be an object with 'role'"),
    ({"prompt": [{"role": "user", "contents": "p"}], "chosen": "a", "rejected": "b"},
     "the key 'content' is missing, did you mean 'contents'?"),
    ({"prompt": "p", "completion": "a", "label": 2}, "'label' should be true or false, found 2 (int)"),
    ({"prompt": "p", "completion": "a", "label": None}, "'label' should be true or false, found None"),
    ({"prompt": "p", "completion": "a", "label": 0.5}, "'label' should be true or false, found 0.5 (float)"),
    ({"prompt": "p", "completions": ["a", "b"], "labels": [True]}, "'completions' has 2 steps and 'labels' has 1"),
    ({"prompt": "p", "completions": ["a"], "labels": ["good"]}, "'labels' should be true or false, found 'good' (str)"),
    ({"prompt": "p", "responses": ["a"], "scores": [True]}, "'scores' should be a finite number, found True (bool)"),
    ({"prompt": "p", "responses": ["a"], "scores": [float("nan")]}, "'scores' should be a finite number, found nan"),
    ({"prompt": "p", "responses": ["a"], "ranks": [1, 2]}, "'responses' has 1 entries and 'ranks' has 2"),
    ({"prompt": "p", "responses": "a", "ranks": [1]}, "'responses' should be a list, found 'a' (str)"),
    ({"messages": [user("a")]}, "'messages' should end with an assistant message, it ends with 'user'"),
    ({"messages": []}, "should end with an assistant message, it ends with nothing"),
    ({"conversations": [{"from": "function_call", "value": "look()"}, {"from": "gpt", "value": "x"}]},
     "a function_call of 'conversations' should be JSON, found 'look()' (str)")])
def test_bad_records_say_where_and_how_to_mend(tmp_path, record, message):
    path = file(tmp_path, record)
    with pytest.raises(DataError) as caught:
        list(load(path, format="pair" if "chosen" in record else None))
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}:1: ")


def test_on_error_collects_and_reading_goes_on(tmp_path):
    path = file(tmp_path, {"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "a"},
                {"prompt": "q", "completion": "a", "label": "perhaps"}, {"prompt": "r", "completion": "a", "label": 0})
    path.write_text(path.read_text().replace('"p", "completion": "a"}', '"p", "completion"'))
    errors = []
    assert [g.prompt for g in load(path, on_error=errors.append)] == ["p", "r"]
    assert [(e.place, e.problem) for e in errors] == [(f"{path}:2", "malformed json"), (f"{path}:3", "label out of range")]


def test_an_inner_shape_that_no_check_foresaw_is_located(tmp_path):
    path = file(tmp_path, {"instruction": "i", "completions": [{"response": "a", "annotations": ["none"]}]})
    with pytest.raises(DataError, match=r"data.jsonl:1: the record does not have the inner shape .*\(ultrafeedback\)"):
        list(load(path))


@pytest.mark.parametrize("group, name, message", [
    (Group("p", [Response("a"), Response("b")], [1.0, 1.0], meta={"place": "f:9"}), "pair", "f:9: .*neither is preferred"),
    (Group("p", [Response("a"), Response("b")]), "pair", "neither is preferred"),
    (Group("p", [Response(t) for t in "abc"], [3, 2, 1]), "pair", "needs 2, lists become pairs with .*split"),
    (Group("p", [Response("a", train=False), Response("b")], [1, 0]), "pair", "probe rows"),
    (Group("p", [Response("a", prompt="own"), Response("b")], [1, 0]), "pair", "prompts of their own"),
    (Group("p", [Response("a"), Response("b")], [1, 0], meta={"chosen": 1}), "pair", "two things are called 'chosen'"),
    (Group("p", [Response("a", scores={"x": 1}, meta={"x": 2}), Response("b")], [1, 0]), "pair", "called 'x_chosen'"),
    (Group("p", [Response("a", scores={"x": 1})], [1.0], meta={"x": 2}), "unpaired", "two things are called 'x'"),
    (Group("p", [Response("a")], [0.7]), "unpaired", r"relevance \[0.7\] is not 1"),
    (Group("p", [Response("a")]), "unpaired", "relevance None is not 1"),
    (Group("p", [Response("a")], [1.0]), "stepwise", "the key 'steps' is missing"),
    (Group("p", [Response("a")]), "prompts", "a group of 1 responses: this format needs 0")])
def test_groups_that_a_format_cannot_hold(tmp_path, group, name, message):
    with pytest.raises(DataError, match=message):
        dump([group], tmp_path / "out.jsonl", format=name)
    assert list(tmp_path.iterdir()) == []


def test_soft_and_graded_pairs_are_written_in_their_order():
    soft = Group("p", [Response("a"), Response("b")], wins=[[0.5, 0.2], [0.8, 0.5]])
    assert to_trl(soft) == {"prompt": "p", "chosen": "b", "rejected": "a"}
    mixed = Group("p", [Response("a"), Response([assistant("b"), assistant("c")])], relevance=[4.0, 2.0])
    assert to_trl(mixed) == {"prompt": [user("p")], "chosen": [assistant("a")],
                             "rejected": [assistant("b"), assistant("c")]}
    with pytest.raises(DataError, match="lists become pairs"):
        to_trl(Group("p", [Response(t) for t in "abc"], [3, 2, 1]))
