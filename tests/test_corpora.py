"""Public corpora: facts looked up in the raw files by hand, and small records in the shape of those not at hand."""
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from data_tools.fields import DataError
from data_tools.formats import FORMATS, detect, dump, load
from data_tools.records import Group, Response
from data_tools.validate import CHECKS, paired, validate

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the data subsets are not beside the repository")


def groups(name, **settings):
    return list(load(DATA / name, **settings))


def raw(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def roles(prompt):
    return [m["role"] for m in prompt]


def texts(group):
    return [r.text for r in group.responses]


def one(record):
    return FORMATS[detect(record)].read(record)


# ------------------------------------------------------------------------------------------------------ every real file
FILES = {                                                     # file: groups, responses per group, bad groups
    "alpaca_eval/alpaca-7b.annotations.jsonl.gz": (200, 2, 0), "alpaca_eval/claude-2.1.annotations.jsonl.gz": (200, 2, 0),
    "alpaca_eval/gemma-7b-it.annotations.jsonl.gz": (200, 2, 0),
    "alpaca_eval/gpt4_1106_preview.annotations.jsonl.gz": (200, 2, 0),
    "alpaca_eval/vicuna-13b-v1.5.annotations.jsonl.gz": (200, 2, 0), "alpaca_eval/alpaca-7b.outputs.jsonl.gz": (200, 1, 0),
    "alpaca_eval/llama-2-70b-chat-hf.outputs.jsonl.gz": (200, 1, 0),
    "bigbench_mistake/logical_deduction.jsonl.gz": (200, 1, 0),
    "bigbench_mistake/multistep_arithmetic.jsonl.gz": (200, 1, 0),
    "bigbench_mistake/tracking_shuffled_objects.jsonl.gz": (200, 1, 0),
    "bigbench_mistake/word_sorting.jsonl.gz": (200, 1, 0), "domain_preferences/train.jsonl.gz": (400, 5, 1),
    "finegrained_qa/dev_feedback.jsonl.gz": (350, 4, 0), "gsm8k/train.jsonl.gz": (1500, 0, 0),
    "gsm8k/test.jsonl.gz": (300, 0, 0), "gsm8k/example_model_solutions.jsonl.gz": (400, 4, 0),
    "hh_rlhf_harmless/train.jsonl.gz": (1500, 2, 4), "hh_rlhf_harmless/test.jsonl.gz": (300, 2, 0),
    "hh_rlhf_helpful/train.jsonl.gz": (1500, 2, 3), "hh_rlhf_helpful/test.jsonl.gz": (350, 2, 0),
    "humaneval/HumanEval.jsonl.gz": (100, 0, 0), "llamafactory_demo/alpaca_en_demo.jsonl.gz": (999, 1, 0),
    "llamafactory_demo/dpo_en_demo.jsonl.gz": (200, 2, 0), "llamafactory_demo/kto_en_demo.jsonl.gz": (200, 1, 0),
    "llamafactory_demo/glaive_toolcall_en_demo.jsonl.gz": (150, 1, 0), "llmbar/adv_gptinst.jsonl.gz": (46, 2, 0),
    "llmbar/adv_gptout.jsonl.gz": (24, 2, 0), "llmbar/adv_manual.jsonl.gz": (23, 2, 0),
    "llmbar/adv_neighbor.jsonl.gz": (67, 2, 0), "llmbar/mtbench_human.jsonl.gz": (101, 2, 0),
    "llmbar/natural.jsonl.gz": (50, 2, 0), "mbpp/mbpp_sanitized.jsonl.gz": (220, 0, 0),
    "pandalm/testset_3annotators.jsonl.gz": (700, 2, 14), "themis/calculator.jsonl.gz": (190, 2, 0),
    "themis/calendar.jsonl.gz": (150, 2, 0), "themis/code.jsonl.gz": (109, 2, 0), "themis/hh_rlhf.jsonl.gz": (193, 2, 0),
    "themis/multi_tools.jsonl.gz": (150, 2, 1), "themis/translator.jsonl.gz": (100, 2, 3),
    "themis/weather.jsonl.gz": (150, 2, 0), "themis/wikisearch.jsonl.gz": (100, 2, 0),
    "webgpt_graded/train.jsonl.gz": (500, 2, 0), "xstest/xstest_prompts.csv": (300, 0, 0)}


@real
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_recognised_read_whole_and_written_without_loss(name, tmp_path):
    count, size, bad = FILES[name]
    found = groups(name)
    assert len(found) == count and {len(g.responses) for g in found} == {size}
    assert found[0].meta["place"] == f"{DATA / name}:{2 if name.endswith('csv') else 1}"
    assert validate(found).skipped == bad
    dump(found[:20], tmp_path / "out.jsonl")
    again = list(load(tmp_path / "out.jsonl"))
    assert [{**vars(g), "meta": {**g.meta, "place": ""}} for g in again] == [
        {**vars(g), "meta": {**g.meta, "place": ""}} for g in found[:20]]


# ------------------------------------------------------------------------------------------------------------------- HH
@real
def test_harmless_dialogues():
    found = groups("hh_rlhf_harmless/train.jsonl.gz")
    first = found[0]
    assert roles(first.prompt) == ["user", "assistant", "user", "assistant", "user"]
    assert first.prompt[0]["content"] == "what are some pranks with a pen i can do?"
    assert texts(first)[0].startswith("No, sorry!  All of these involve a pen") and first.relevance == [1.0, 0.0]
    odd = [n for n, g in enumerate(found) if not all(isinstance(t, str) for t in texts(g))]
    assert odd == [1254]                                      # the one pair that differs before the last turn
    assert [m["content"] for m in found[1254].prompt][::2] == ["Are drag queens men?", "Isn't that drag kings?"]
    assert roles(texts(found[1254])[0]) == ["assistant", "assistant"]
    assert texts(found[1254])[1].startswith("A drag king is the opposite")
    report = validate(found)
    assert report.counts == {"empty response": 4}
    assert report.examples["empty response"][0].endswith("train.jsonl.gz:87: response 1 is empty")


@real
@pytest.mark.parametrize("name", ["hh_rlhf_harmless/train", "hh_rlhf_harmless/test", "hh_rlhf_helpful/train",
                                  "hh_rlhf_helpful/test", "webgpt_graded/train"])
def test_dialogues_lose_no_words(name):
    for record, group in zip(raw(f"{name}.jsonl.gz"), groups(f"{name}.jsonl.gz"), strict=True):
        sides = record["text"] if "text" in record else [record["chosen"], record["rejected"]]
        for whole, answer in zip(sides, texts(group), strict=True):
            turns = group.prompt + ([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)
            names = {"user": "Human:", "assistant": "Assistant:"}
            want = whole.replace("## ", "") if name.startswith("webgpt") else whole
            assert " ".join(f"{names[m['role']]} {m['content']}" for m in turns).split() == want.split()


@real
def test_helpful_pairs_are_read_by_score():
    found = groups("hh_rlhf_helpful/test.jsonl.gz")
    assert all(g.relevance == [1.0, 0.0] for g in found)      # the first is always preferred in this file
    assert found[0].prompt[0]["content"] == "Why aren't governments run by Kings or Queens anymore?"
    turned = one({"text": ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"], "score": [0.0, 1.0]})
    assert (texts(turned), turned.relevance, turned.responses[1].scores) == (["b", "c"], [0.0, 1.0], {"score": 1.0})


@real
def test_webgpt_grades_and_ties():
    found = groups("webgpt_graded/train.jsonl.gz")
    grades = Counter(tuple(g.relevance) for g in found)
    assert grades == {(1.0, 1.0): 145, (0.5, 1.5): 144, (1.5, 0.5): 132, (2.0, 0.0): 44, (0.0, 2.0): 35}
    assert all(roles(g.prompt) == ["user"] for g in found)
    assert found[0].prompt[0]["content"].endswith("Why, then, do rivers and oceans freeze?")
    assert texts(found[0])[1].startswith("It is possible for large rivers to freeze completely")
    assert found[0].relevance == [1.5, 0.5]


# ------------------------------------------------------------------------------------------------ annotators and judges
@real
def test_pandalm_votes():
    found = groups("pandalm/testset_3annotators.jsonl.gz")
    wins = Counter(round(g.wins[0][1], 3) for g in found)     # of the raw triples: (2,2,2) 270, (1,1,1) 242, (0,0,0) 84
    assert (wins[0.0], wins[1.0], wins[0.5]) == (270, 242, 84)
    assert all(g.relevance is None and g.wins[1][0] + g.wins[0][1] == pytest.approx(1, rel=1e-12) for g in found)
    mixed = next(g for g, r in zip(found, raw("pandalm/testset_3annotators.jsonl.gz"), strict=True)
                 if [r[f"annotator{n}"] for n in (1, 2, 3)] == [1, 0, 1])
    assert mixed.meta["votes"] == [1.0, 0.5, 1.0] and mixed.wins[0][1] == pytest.approx(2.5 / 3)
    assert texts(found[157]) == ["True", "True."]             # a boolean in the file
    assert [r.meta["generator"] for r in found[0].responses] == ["bloom-7b", "llama-7b"]
    assert found[0].prompt.endswith("eliminate unnecessary words.\n\nIf you have any questions about my rate or if you "
                                    "find it necessary to increase or decrease the scope for this project, please let me "
                                    "know.")


@real
def test_alpaca_eval_preferences():
    first, *rest = groups("alpaca_eval/alpaca-7b.annotations.jsonl.gz")
    assert first.wins[0][1] == pytest.approx(0.9999998173, rel=1e-12)                          # preference 1.0000001827
    assert [r.meta["generator"] for r in first.responses] == ["gpt4_1106_preview", "alpaca-7b"]
    assert all(g.wins == [[0.5, 0.5], [0.5, 0.5]]
               for g in groups("alpaca_eval/gpt4_1106_preview.annotations.jsonl.gz"))
    assert sum(g.wins[1][0] > 0.5 for g in groups("alpaca_eval/claude-2.1.annotations.jsonl.gz")) == 25


@real
@pytest.mark.parametrize("name, second", [("natural", 25), ("adv_neighbor", 31), ("adv_gptinst", 25), ("adv_gptout", 14),
                                          ("adv_manual", 13), ("mtbench_human", 46)])
def test_llmbar_labels(name, second):
    assert sum(g.relevance == [0.0, 1.0] for g in groups(f"llmbar/{name}.jsonl.gz")) == second


@real
def test_finegrained_preferences():
    first, *rest = groups("finegrained_qa/dev_feedback.jsonl.gz")
    assert first.wins == [[0.5, 0.5, 1.0, 0.0],               # preferences 0, 1, 2, 1, 0, 2 of (1,2) (1,3) (1,4) (2,3)
                          [0.5, 0.5, 1.0, 0.5],               # (2,4) (3,4)
                          [0.0, 0.0, 0.5, 0.0],
                          [1.0, 0.5, 1.0, 0.5]]
    found = [first, *rest]
    upper = Counter(g.wins[i][j] for g in found for i in range(4) for j in range(i + 1, 4))
    assert upper == {1.0: 1144, 0.0: 696, 0.5: 260}
    assert first.prompt.startswith("Bloom (Troye Sivan album)\n") and first.prompt.endswith(
        "\n\nWhen does bloom by troye sivan come out?")
    spans = [(e["end"], len(texts(g)[0])) for g in found for e in g.meta["feedback"]["errors"]]
    assert len(spans) == 958 and all(end <= size for end, size in spans)                       # of the first prediction
    assert first.meta["answer"].startswith("Bloom is the second studio album")


# ---------------------------------------------------------------------------------------------------- tools, steps, maths
@real
def test_themis_answers_and_actions():
    calendar = groups("themis/calendar.jsonl.gz")[0]
    assert texts(calendar)[0] == "The difference between 2015-11-05 and 2011-01-11 is 1759"
    assert calendar.responses[0].meta["actions"]["Observation"] == "1759" and calendar.relevance == [1.0, 0.0]
    assert [r.scores["score"] for r in calendar.responses] == [1.0, -1.0]
    translated = groups("themis/translator.jsonl.gz")[0]
    assert translated.prompt.startswith("Semerkhet's burial site") and translated.prompt.endswith("\n\nCái gì bị phá hủy? ")
    code = groups("themis/code.jsonl.gz")
    assert len(code[0].meta["test_list"]) == 3
    assert Counter(round(g.responses[1].scores["score"], 3) for g in code) == {-1.0: 91, -0.333: 10, 0.333: 8}


@real
@pytest.mark.parametrize("name, clean, correct", [("logical_deduction", 2, 28), ("tracking_shuffled_objects", 28, 27),
                                                  ("multistep_arithmetic", 44, 35), ("word_sorting", 21, 28)])
def test_first_mistakes(name, clean, correct):
    found = groups(f"bigbench_mistake/{name}.jsonl.gz")
    assert sum(g.relevance == [1.0] for g in found) == clean
    assert sum(g.responses[0].scores["correct"] for g in found) == correct
    for group in found:
        marks, at = group.responses[0].meta["step_labels"], group.meta["mistake_index"]
        assert len(marks) == len(group.responses[0].meta["steps"])
        assert (False not in marks) if at is None else marks.index(False) == at == marks.count(True)


@real
def test_a_trace_by_hand():
    group = groups("bigbench_mistake/tracking_shuffled_objects.jsonl.gz")[0]
    assert group.responses[0].meta["step_labels"] == [True, True, True, False, None] and group.meta["answer"] == "(B)"
    assert texts(group)[0].startswith("At the start: Alice: Gatsby, Bob: Ulysses, Claire: Moby Dick.\nAlice and Claire")


@real
def test_gsm8k():
    first = groups("gsm8k/train.jsonl.gz")[0]
    assert first.prompt.startswith("Natalia sold clips to 48 of her friends") and first.meta["answer"].endswith("#### 72")
    solved = groups("gsm8k/example_model_solutions.jsonl.gz")
    names = [r.meta["generator"] for r in solved[0].responses]
    assert names == ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    assert [sum(g.relevance[k] for g in solved) for k in range(4)] == [89, 156, 146, 224]
    assert solved[0].relevance == [0, 0, 0, 1] and solved[0].meta["answer"].endswith("A: 18")


# -------------------------------------------------------------------------------------------------- conversations, SFT
@real
def test_llamafactory_demos():
    pairs = groups("llamafactory_demo/dpo_en_demo.jsonl.gz")
    assert Counter(roles(g.prompt)[0] for g in pairs) == {"user": 150, "system": 50}
    assert texts(pairs[0])[0].startswith("That sounds like a fun and engaging idea!")
    rated = groups("llamafactory_demo/kto_en_demo.jsonl.gz")
    assert Counter(g.relevance[0] for g in rated) == {1.0: 107, 0.0: 93}
    assert rated[0].relevance == [1.0] and texts(rated[0])[0].startswith("Ooh ooh ah ah!")
    calls = groups("llamafactory_demo/glaive_toolcall_en_demo.jsonl.gz")
    made = [c["function"]["name"] for g in calls for m in g.prompt for c in m.get("tool_calls", [])]
    assert len(made) == 108 and made[0] == "search_recipes"
    assert json.loads(calls[0].meta["tools"])[0]["name"] == "search_recipes"
    shown = groups("llamafactory_demo/alpaca_en_demo.jsonl.gz")
    assert shown[0].prompt == "Describe a process of making crepes." and shown[0].relevance is None
    assert sum("\n\n" in g.prompt for g in shown) >= 412      # 412 have an input


@real
def test_domains_and_outputs():
    first = groups("domain_preferences/train.jsonl.gz")[0]
    assert [r.meta["domain"] for r in first.responses] == ["academy", "business", "entertainment", "literature", "normal"]
    assert first.relevance is None and first.prompt == "Name three methods to reduce greenhouse gas emissions."
    shown = groups("alpaca_eval/vicuna-13b-v1.5.outputs.jsonl.gz")
    assert {g.meta["generator"] for g in shown} == {"vicuna-13b-v1.5"}


@real
def test_truthful_questions_by_renamed_columns():
    found = groups("truthfulqa/TruthfulQA.csv", columns={"question": "Question", "answer": "Best Answer"})
    assert len(found) == 817 and found[0].prompt == "What happens to you if you eat watermelon seeds?"
    assert found[0].meta["answer"] == "The watermelon seeds pass through your digestive system"
    assert found[0].meta["Type"] == "Adversarial"             # the first column, behind the byte-order mark


# ---------------------------------------------------------------------------------------- shapes of corpora not at hand
def test_ultrafeedback():
    record = {"source": "evol_instruct", "instruction": "Why?", "models": ["m1", "m2"], "correct_answers": ["None"],
              "completions": [
                  {"model": "m1", "response": "a", "critique": "Good.", "overall_score": 8.5, "fine-grained_score": 4.5,
                   "annotations": {"helpfulness": {"Rating": "5", "Rationale": "r"}, "honesty": {"Rating": "4"}}},
                  {"model": "m2", "response": "b", "critique": "Bad.", "overall_score": 3.0, "fine-grained_score": 2.0,
                   "annotations": {"helpfulness": {"Rating": "2"}, "honesty": {"Rating": "N/A"}}}]}
    group = one(record)
    assert (group.prompt, texts(group), group.relevance) == ("Why?", ["a", "b"], [8.5, 3.0])
    assert group.responses[0].scores == {"overall_score": 8.5, "fine-grained_score": 4.5, "helpfulness": 5.0, "honesty": 4.0}
    assert group.responses[1].scores == {"overall_score": 3.0, "fine-grained_score": 2.0, "helpfulness": 2.0}
    assert group.responses[1].meta["model"] == "m2" and group.meta["source"] == "evol_instruct"
    for answer in record["completions"]:
        del answer["overall_score"], answer["fine-grained_score"]
    assert one(record).relevance == [4.5, 2.0]                # mean rating: (5 + 4) / 2 and 2
    record["completions"][1]["annotations"] = {}
    assert one(record).relevance == [4.5, None]


def test_helpsteer_records_of_a_prompt_are_joined(tmp_path):
    path = tmp_path / "help-steer.jsonl"
    grades = [("p", "a", 4), ("p", "b", 1), ("q", "c", 3), ("p", "d", 2)]
    path.write_text("".join(json.dumps({
        "prompt": p, "response": r, "helpfulness": h, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1,
        "domain": r.upper()}) + "\n" for p, r, h in grades))
    first, second, third = load(path)
    assert (first.prompt, texts(first), first.relevance) == ("p", ["a", "b"], [4.0, 1.0])
    assert first.meta == {"place": f"{path}:1-2"} and [r.meta for r in first.responses] == [{"domain": "A"}, {"domain": "B"}]
    assert first.responses[1].scores == {"helpfulness": 1.0, "correctness": 3.0, "coherence": 4.0, "complexity": 1.0,
                                         "verbosity": 1.0}
    assert (texts(second), texts(third)) == (["c"], ["d"])    # not next to each other: not joined
    assert len(list(load(path, limit=1))) == 1
    report = validate(load(path), checks=(*CHECKS, paired))
    assert report.counts == {"too few responses": 2}


def test_shp():
    record = {"post_id": "x", "domain": "askculinary_train", "history": "How to keep basil?", "human_ref_A": "In water.",
              "human_ref_B": "Frozen.", "labels": 0, "score_A": 3, "score_B": 11, "seconds_difference": 9.0}
    group = one(record)
    assert (group.relevance, texts(group)) == ([0.0, 1.0], ["In water.", "Frozen."])
    assert [r.scores for r in group.responses] == [{"score": 3.0}, {"score": 11.0}]
    assert group.meta == {"post_id": "x", "domain": "askculinary_train", "seconds_difference": 9.0}
    assert one({**record, "labels": 1}).relevance == [1.0, 0.0]


def test_nectar():
    group = one({"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who?\n\nAssistant: ", "turns": 2, "answers": [
        {"answer": "a", "model": "m1", "rank": 2.0}, {"answer": "b", "model": "m2", "rank": 1.0},
        {"answer": "c", "model": "m3", "rank": 2.0}], "num_responses": 3, "source": ["x"]})
    assert group.relevance == [0.0, 1.0, 0.0] and roles(group.prompt) == ["user", "assistant", "user"]
    assert group.responses[2].meta == {"model": "m3"} and group.meta["source"] == ["x"]


def test_ultrafeedback_binarised():
    group = one({"prompt": "Why?", "prompt_id": "1", "score_chosen": 9.0, "score_rejected": 4.5,
                 "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "a"}],
                 "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "a"}],
                 "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "b"}]})
    assert (group.prompt, texts(group)) == ([{"role": "user", "content": "Why?"}], ["a", "b"])
    assert [r.scores for r in group.responses] == [{"score": 9.0}, {"score": 4.5}]


@pytest.mark.parametrize("record, message", [
    ({"text": ["a", "b"], "score": [1.0]}, "'text' has 2 entries and 'score' has 1"),
    ({"instruction": "i", "response1": "a", "response2": "b", "annotator1": 3, "annotator2": 1, "annotator3": 1},
     "'annotator' should be one of 0, 1, 2, found 3"),
    ({"input": "i", "output_1": "a", "output_2": "b", "label": 0}, "'label' should be one of 1, 2, found 0"),
    ({"input": "i", "steps": ["s"], "target": "t", "answer": "t", "mistake_index": 1}, "should be null or 0 to 0, found 1"),
    ({"question": "q", "ground_truth": "g"}, "no system with a 'solution' among the keys question, ground_truth"),
    ({"question": "q", "pos_answer": "a", "neg_answer": "b"}, "expected an object with the keys answer, score, found 'a'"),
    ({"query": "q", "responses": ["a"]}, "should be an object with one response per domain"),
    ({"prompt": "p", "answers": [{"answer": "a", "ranks": 1}]}, "the key 'rank' is missing, did you mean 'ranks'?"),
    ({"instruction": "i", "completions": [{"response": "a", "overall_score": "high"}]},
     "'overall_score' should be a finite number, found 'high'"),
    ({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "'labels' should be true or false, found 2")])
def test_bad_records(record, message):
    with pytest.raises(DataError) as caught:
        one(record)
    assert message in str(caught.value)


def test_plain_groups_are_what_readers_make():
    assert one({"instruction": "i", "input": "", "output": "o"}) == Group("i", [Response("o")])
    assert one({"instruction": "i", "input": "x", "output": "o", "id": 1}) == Group("i\n\nx", [Response("o")],
                                                                                    meta={"id": 1})
