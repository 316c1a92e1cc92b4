import copy
import random
import warnings

import numpy as np
import pytest
import torch
from small_tokenizers import CHATML, TEXTS, Letters, assistant, fast, ids, tool, user

from data_tools.collate import collate, pad
from data_tools.columns import COLUMNS, Column
from data_tools.encoding import Counts, EncodedGroup, EncodedRow, Encoding, Spelling, encode, pad_token
from data_tools.fields import DataError
from data_tools.records import Group, Response

NAN = float("nan")


def group(prompt, *responses, **settings) -> Group:
    return Group(prompt, [r if isinstance(r, Response) else Response(r) for r in responses], **settings)


def row(batch, n: int = 0) -> tuple[list[int], list[int]]:
    """(ids, mask) of a row without its padding."""
    real = batch["attend"][n]
    return batch["tokens"][n][real].tolist(), batch["mask"][n][real].int().tolist()


def same(one, other) -> None:
    """Equal batches, bit by bit."""
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- plain text
def test_plain_pair_by_hand():
    batch = collate([group("ab", "c", "de", relevance=[1, 0])], Letters())
    # ^ a b c $ .     prompt 3, the response with its EOS trains
    # ^ a b d e $
    assert batch["tokens"].tolist() == [[1, 97, 98, 99, 2, 0], [1, 97, 98, 100, 101, 2]]
    assert batch["attend"].int().tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch["mask"].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert batch["prompt_length"].tolist() == [3, 3] and batch["group"].tolist() == [0, 0]
    assert batch["relevance"].tolist() == [1, 0]
    assert set(batch) == {"tokens", "attend", "mask", "prompt_length", "group", "relevance"}
    assert [batch[c].dtype for c in ("tokens", "attend", "mask", "relevance")] == \
        [torch.int64, torch.bool, torch.bool, torch.float32]


@pytest.mark.parametrize("bos, prompt, response, expected", [
    (True, "ab", "c", "^abc$"),
    (True, "^ab", "c$", "^abc$"),                             # neither BOS nor EOS twice
    (True, "", "c", "^c$"),
    (False, "ab", "c", "abc$"),                               # this tokenizer begins no text with BOS
    (False, "^ab", "c", "^abc$"),
    (True, "ab", "", "^ab$"),                                 # an empty response is its EOS
    (True, "ab", "$$", "^ab$$"),
])
def test_bos_and_eos(bos, prompt, response, expected):
    tokens, mask = row(collate([group(prompt, response)], Letters(bos=bos)))
    assert tokens == ids(expected)
    assert sum(mask) == len(response.rstrip("$")) + max(1, response.count("$"))


def test_without_eos():
    assert row(collate([group("ab", "c")], Letters(), Encoding(add_eos=False))) == (ids("^abc"), [0, 0, 0, 1])
    bare = Letters()
    bare.eos_token_id = None
    with pytest.raises(ValueError, match="never learn to stop: set tokenizer.eos_token, or Encoding.add_eos=False"):
        collate([group("ab", "c")], bare)
    assert row(collate([group("ab", "c")], bare, Encoding(add_eos=False)))[0] == ids("^abc")
    assert row(collate([group([user("x")], "c")], bare))[0] == ids("u:x;a:c;")      # the template ends the turn


def test_padding_id_falls_back_to_eos_and_to_0():
    tokenizer = Letters()
    assert pad_token(tokenizer) == 0
    tokenizer.pad_token_id = None
    assert pad_token(tokenizer) == 2
    assert collate([group("a", "b", "bcd")], tokenizer)["tokens"][0, -2:].tolist() == [2, 2]
    tokenizer.eos_token_id = None
    assert pad_token(tokenizer) == 0


def test_the_first_token_of_a_row_does_not_train():
    assert row(collate([group("", "bc")], Letters(bos=False))) == (ids("bc$"), [0, 1, 1])
    counts = Counts()
    with pytest.raises(ValueError, match="no group is left to collate: 1 groups read, 0 kept.*without a token"):
        collate([group("", "")], Letters(bos=False), counts=counts)         # its only token is EOS, at place 0


# ----------------------------------------------------------------------------------------------------- conversations
def test_conversation_by_hand():
    batch = collate([group([user("hi"), assistant("yo"), user("q")], "c", "de")], Letters())
    # the earlier answer is part of the prompt and does not train; the turn's end does
    assert row(batch) == (ids("u:hi;a:yo;u:q;a:c;"), [0] * 16 + [1, 1])
    assert row(batch, 1) == (ids("u:hi;a:yo;u:q;a:de;"), [0] * 16 + [1] * 3)
    assert batch["prompt_length"].tolist() == [16, 16]


def test_several_turns_with_tools_by_hand():
    answer = [assistant("c"), tool("7"), tool("8"), assistant("d"), user("e"), assistant("f")]
    batch = collate([group([user("x")], Response(answer), meta={"tools": '["add"]'})], Letters())
    text = "Tadd;u:x;a:c;t:7,8;a:d;u:e;a:f;"
    trains = []
    for part, on in (("Tadd;u:x;a:", 0), ("c;", 1), ("t:7,8;a:", 0), ("d;", 1), ("u:e;a:", 0), ("f;", 1)):
        trains += [on] * len(part)
    assert row(batch) == (ids(text), trains)
    assert batch["prompt_length"].tolist() == [len("Tadd;u:x;a:")]


def test_trailing_tool_output_does_not_train():
    tokens, mask = row(collate([group([user("x")], Response([assistant("c"), tool("7")]))], Letters()))
    assert tokens == ids("u:x;a:c;t:7;") and mask == [0] * 6 + [1, 1] + [0] * 4


def test_system_message():
    assert row(collate([group([user("x")], "c")], Letters(), Encoding(system="s")))[0] == ids("s:s;u:x;a:c;")
    own = [{"role": "system", "content": "mine"}, user("x")]
    assert row(collate([group(own, "c")], Letters(), Encoding(system="s")))[0] == ids("s:mine;u:x;a:c;")
    with pytest.raises(DataError, match=r"group 1: Encoding\(system=...\) needs conversations"):
        collate([group("x", "c")], Letters(), Encoding(system="s"))


def test_template_that_does_not_append():
    counts, moving = Counts(), Encoding(template_settings={"mark": "!"})
    batch = collate([group([user("x")], "c", meta={"place": "f.jsonl:7"})], Letters(), moving, counts=counts)
    assert row(batch) == (ids("u:x;!a:c$"), [0] * 7 + [1, 1])               # u:x;a:c;! does not begin with u:x;!a:
    assert list(counts.notes.values()) == [[1, "f.jsonl:7"]]


def test_template_that_rewrites_turns_is_an_error_for_several():
    several = group([user("x")], Response([assistant("c"), tool("7"), assistant("d")]), meta={"place": "f.jsonl:7"})
    with pytest.raises(DataError, match="f.jsonl:7: the chat template changes earlier turns.*Encoding.chat_template="):
        collate([several], Letters(), Encoding(chat_template="rewriting"))


@pytest.mark.parametrize("one, template, message", [
    (group([user("x")], "c"), False, "no chat template: take the tokenizer of a chat model, give Encoding"),
    (group([{"role": "villain", "content": "x"}], "c"), True, "cannot render the roles villain: Only user"),
    (group("x", Response([assistant("c")])), True, "the response is a list of messages but the prompt is plain text"),
    (group([user("x")], Response([user("c")])), True, "should begin with an assistant message, found 'user'"),
    (group([user("x")], Response([])), True, "should begin with an assistant message"),
    (group([user("x")], "c", meta={"tools": "none"}), True, "'tools' should be a list, found 'none'"),
    (group("x"), True, "no responses to encode"),
    (group("x", "c", relevance=[1, 0]), True, "relevance has 2 grades for 1 responses"),
    (group("x", "c", "d", wins=[[0.5, 1.0]]), True, "wins should be 2 rows of 2"),
    (group("x", "c", weight=-1.0), True, "weight should be a number from 0, found -1.0"),
    (group("x", Response("c", logp=[0.0])), True, "need Response.tokens"),
    (group("x", Response("c", tokens=[3, 4], logp=[0.0])), True, "logp should hold one number for each of the 2"),
    (group("x", Response("c", tokens=[3, -4])), True, "list of ids from 0"),
    (group("x", Response("c", tokens=[3.5])), True, "list of ids from 0"),
    (group("x", Response("c", meta={"degree": "high"})), True, r"meta\['degree'\].*should be a number, found 'high'"),
])
def test_errors_say_where_and_what(one, template, message):
    one.meta["place"] = "data.jsonl:12"
    with pytest.raises(DataError, match=f"^data.jsonl:12: .*{message}"):
        collate([group("fine", "fine"), one], Letters(template=template))


# -------------------------------------------------------------------------------------------------------- truncation
@pytest.mark.parametrize("encoding, expected, notes", [
    (Encoding(max_prompt=4), "^cdeXYZ$", {"prompts cut to max_prompt=4, keep_end": [1, "g"]}),              # BOS stays
    (Encoding(max_prompt=4, long_prompt="keep_start"), "^abcXYZ$",
     {"prompts cut to max_prompt=4, keep_start": [1, "g"]}),
    (Encoding(max_prompt=1), "^XYZ$", {"prompts cut to max_prompt=1, keep_end": [1, "g"]}),
    (Encoding(max_prompt=6), "^abcdeXYZ$", {}),
    (Encoding(max_response=4), "^abcdeXYZ$", {}),
    (Encoding(max_response=3), "^abcdeXYZ", {"responses cut to max_response=3": [1, "g"]}),
    (Encoding(max_response=1), "^abcdeX", {"responses cut to max_response=1": [1, "g"]}),
    (Encoding(max_length=8), "^abcdeXY", {"responses cut to max_length=8": [1, "g"]}),
    (Encoding(max_length=8, max_response=1), "^abcdeX", {"responses cut to max_response=1": [1, "g"]}),
    (Encoding(max_length=6, max_prompt=3), "^deXYZ", {"prompts cut to max_prompt=3, keep_end": [1, "g"],
                                                      "responses cut to max_length=6": [1, "g"]}),
])
def test_truncation_by_hand(encoding, expected, notes):
    counts = Counts()
    batch = collate([group("abcde", "XYZ", meta={"place": "g"})], Letters(), encoding, counts=counts)
    tokens, mask = row(batch)
    assert tokens == ids(expected) and counts.notes == notes
    assert mask == [c in "XYZ$" for c in expected]
    assert (counts.read, counts.kept, counts.rows, counts.tokens) == (1, 1, 1, len(expected))


@pytest.mark.parametrize("encoding, reason", [
    (Encoding(max_prompt=3, long_prompt="drop"), "groups dropped, prompt longer than max_prompt=3"),
    (Encoding(max_response=3, long_response="drop"), "groups dropped, a response longer than max_response=3 allows"),
    (Encoding(max_length=7, long_response="drop"), "groups dropped, a response longer than max_length=7 allows"),
    (Encoding(max_length=6), "groups dropped, a prompt leaves no room for a response within max_length=6"),
])
def test_dropping_is_counted(encoding, reason):
    long = [group("abcde", "XYZ", "X", meta={"place": f"f:{n}"}) for n in (2, 3)]
    data = [group("a", "b"), *long, group("c", "d")]
    counts = Counts()
    kept = encode(data, Letters(), encoding, counts=counts)
    assert [g.place for g in kept] == ["group 1", "group 4"]
    (note, found), = counts.notes.items()
    assert note.startswith(reason) and found == [2, "f:2"]
    assert (counts.read, counts.kept, counts.rows, counts.tokens) == (4, 2, 2, 8)
    with pytest.warns(UserWarning, match=r"4 groups read, 2 kept with 2 rows and 8 tokens; .* 2 \(first: f:2\)"):
        encode(data, Letters(), encoding)


@pytest.mark.parametrize("encoding, message", [
    (Encoding(max_prompt=3, long_prompt="error"), "f:1: prompt longer than max_prompt=3: it has 6 tokens"),
    (Encoding(max_response=3, long_response="error"), "f:1: a response of 4 tokens is longer than max_response=3"),
])
def test_too_long_can_be_an_error(encoding, message):
    with pytest.raises(DataError, match=message):
        collate([group("abcde", "XYZ", meta={"place": "f:1"})], Letters(), encoding)


def test_nothing_dropped_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate([group("ab", "c")], Letters())


def test_a_prompt_cut_in_a_conversation_keeps_no_bos_it_does_not_have():
    tokens, _ = row(collate([group([user("abcdef")], "c")], Letters(), Encoding(max_prompt=4), counts=Counts()))
    assert tokens == ids("f;a:c;")


@pytest.mark.parametrize("settings, message", [
    ({"max_prompt": 0}, "max_prompt should be a number of tokens, at least 1, or None, found 0"),
    ({"max_response": True}, "max_response should be a number of tokens"),
    ({"max_length": 1}, "max_length should be a number of tokens, at least 2"),
    ({"max_length": 8.0}, "found 8.0"),
    ({"max_prompt": 8, "max_length": 8}, "max_prompt=8 leaves no room for a response within max_length=8"),
    ({"long_prompt": "keep_ends"}, "keep_start, drop, error, found 'keep_ends', did you mean 'keep_end'?"),
    ({"long_response": "keep_end"}, "long_response should be one of keep_start, drop, error"),
])
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        Encoding(**settings)


# ------------------------------------------------------------------------------------------------- rows of a group
def test_prompt_overrides():
    batch = collate([group("ab", Response("X"), Response("X", prompt="c"), Response("X", prompt="ab"))], Letters())
    assert [row(batch, n)[0] for n in range(3)] == [ids("^abX$"), ids("^cX$"), ids("^abX$")]
    assert batch["prompt_length"].tolist() == [3, 2, 3]
    encoded, = encode([group("ab", Response("X", prompt="ab"), Response("X", prompt=[user("b")]))], Letters())
    assert encoded.rows[0].prompt is None                     # an override that says the same is none
    assert encoded.rows[1].prompt.tolist() == ids("u:b;a:") and encoded.rows[1].tokens.tolist() == ids("X;")


def test_given_tokens_are_taken_as_they_are():
    tokenizer = Letters()
    given = Response("never read", tokens=[7, 8, 9], logp=[-0.5, -1.0, -1.5], meta={"mask": [1, 0, 1]})
    batch = collate([group("ab", given, Response("c", tokens=[5]))], tokenizer)
    assert row(batch) == ([1, 97, 98, 7, 8, 9], [0, 0, 0, 1, 0, 1])         # no EOS is added
    assert row(batch, 1) == ([1, 97, 98, 5], [0, 0, 0, 1])
    assert "never read" not in tokenizer.seen and "c" not in tokenizer.seen
    np.testing.assert_array_equal(batch["logp_rollout"].numpy(),
                                  np.array([[0, 0, 0, -0.5, -1, -1.5], [0, 0, 0, NAN, 0, 0]], np.float32))
    assert batch["mask"].dtype == torch.bool


def test_given_tokens_are_cut_with_all_that_belongs_to_them():
    given = Response("", tokens=[7, 8, 9], logp=[-0.5, -1.0, -1.5], meta={"mask": [1, 0, 1]})
    batch = collate([group("ab", given)], Letters(), Encoding(max_response=2), counts=Counts())
    assert row(batch) == ([1, 97, 98, 7, 8], [0, 0, 0, 1, 0])
    assert batch["logp_rollout"].tolist() == [[0, 0, 0, -0.5, -1.0]]


def test_given_tokens_that_cannot_train():
    masked = group("ab", Response("", tokens=[7, 8], meta={"mask": [0, 0]}), "c", meta={"place": "f:1"})
    counts = Counts()
    assert encode([masked, group("ab", Response("", tokens=[]))], Letters(), counts=counts) == []
    assert counts.notes == {"groups dropped, a response without a token that trains": [2, "f:1"]}
    masked.responses[0].train = False                         # a probe row need not train
    assert len(encode([masked], Letters())) == 1


def test_columns_of_rows():
    numbers = {"degree": 2, "contrast": -1, "rationale": True, "note": "mine"}
    rows = [Response("a", meta=numbers, scores={"reward": 0.25}), Response("b", train=False, meta={"online": 1})]
    batch = collate([group("x", *rows, weight=2.0), group("y", "c")], Letters())
    got = {name: batch[name].tolist() for name in ("degree", "contrast", "rationale", "online", "train", "weight")}
    assert got == {"degree": [2, -1, -1], "contrast": [-1, 0, 0], "rationale": [True, False, False],
                   "online": [False, True, False], "train": [True, False, True], "weight": [2, 2, 1]}
    assert batch["reward"][0] == 0.25 and batch["reward"][1:].isnan().all()
    assert [batch[n].dtype for n in ("degree", "contrast", "rationale")] == [torch.int64, torch.float32, torch.bool]
    assert "note" not in batch and "position" not in batch


def test_columns_asked_for():
    data = [group("x", Response("a", meta={"degree": 2}))]
    assert collate(data, Letters(), columns=("degree", "mask"))["degree"].tolist() == [2]
    with pytest.raises(KeyError, match="no row has the column 'rationale'"):
        collate(data, Letters(), columns=("rationale",))
    with pytest.raises(KeyError, match="no row has the column 'degre', did you mean 'degree'?"):
        collate(data, Letters(), columns=("degre",))


def test_columns_of_your_own(monkeypatch):
    monkeypatch.setitem(COLUMNS, "step_reward", Column("N T", "reward of each token", "user"))
    monkeypatch.setitem(COLUMNS, "noise", Column("N", "a number", "user"))
    rows = [Response("", tokens=[5, 6], meta={"step_reward": [0.5, 1.5], "noise": 0.5}), Response("c")]
    batch = collate([group("x", *rows)], Letters())
    np.testing.assert_array_equal(batch["step_reward"], np.array([[0, 0, 0.5, 1.5], [0, 0, NAN, NAN]], np.float32))
    np.testing.assert_array_equal(batch["noise"], np.array([0.5, NAN], np.float32))
    with pytest.raises(DataError, match="step_reward should hold one number for each of the 2 tokens"):
        collate([group("x", Response("a", meta={"step_reward": [1.0]}))], Letters())


def test_results_of_objectives_are_not_read_from_the_data():
    """A field of the data that happens to be called like a column that training makes does not get in its way."""
    batch = collate([group("x", Response("a", meta={"score": 5, "advantage": 3, "group": 9}))], Letters())
    assert set(batch) == {"tokens", "attend", "mask", "prompt_length", "group"} and batch["group"].tolist() == [0]


# ------------------------------------------------------------------------------------------------------------ labels
def test_labels_that_say_nothing_are_no_columns():
    silent = group("x", "a", "b", relevance=[None, None], wins=[[None, None], [None, None]])
    assert not {"relevance", "wins", "weight", "train"} & set(collate([silent, group("y", "c")], Letters()))


def test_ragged_labels():
    wins = [[0.5, 0.75], [0.25, None]]
    batch = collate([group("x", "a", "b", "c", relevance=[2, None, 0]), group("y", "d"),
                     group("z", "e", "f", relevance=[1, 0])], Letters())
    np.testing.assert_array_equal(batch["relevance"], np.array([2, NAN, 0, NAN, 1, 0], np.float32))
    assert batch["group"].tolist() == [0, 0, 0, 1, 2, 2] and batch.width == 3
    assert batch.real.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    batch = collate([group("x", "a", "b", wins=wins), group("y", "d", "e", "f")], Letters())
    expected = np.full((2, 3, 3), NAN, np.float32)
    expected[0, :2, :2] = [[0.5, 0.75], [0.25, NAN]]
    np.testing.assert_array_equal(batch["wins"], expected)


def test_labels_do_not_depend_on_the_company():
    """Groups labelled by wins and by relevance in one batch: each is labelled as it would be alone."""
    from prefopt.label_rules import from_relevance, relevance_of
    by_grade = group("x", "a", "b", "c", "d", relevance=[2, None, 0, 2])
    by_wins = group("y", "e", "f", "g", wins=[[0.5, 0.75, None], [0.25, 0.5, 1.0], [None, 0.0, 0.5]])
    probe = group("z", "h", "i", Response("j", train=False), wins=[[0.5, 1, 1], [0, 0.5, 0], [0, 1, 0.5]])
    batch = collate([by_grade, by_wins, probe], Letters())
    alone = collate([by_grade], Letters())
    real = alone.real & ~alone["relevance"].isnan()[None]
    wins = from_relevance(alone.grouped("relevance")[0].nan_to_num(), real)
    torch.testing.assert_close(batch["wins"][0], wins[0].float(), rtol=0, atol=0, equal_nan=True)
    for n, one in ((1, by_wins), (2, probe)):
        alone = collate([one], Letters())
        trains = alone.grouped("train")[0] if "train" in alone else alone.real
        expected = relevance_of(alone["wins"].double(), trains)[0].float()
        torch.testing.assert_close(batch["relevance"][batch["group"] == n], expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(batch["wins"][n, :3, :3], alone["wins"][0], rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------- padding
def encoded(rng: random.Random) -> EncodedGroup:
    def some(low, high):
        return np.array([rng.randrange(3, 99) for _ in range(rng.randint(low, high))], np.int32)
    rows = [EncodedRow(some(1, 6), some(0, 5) if rng.random() < 0.3 else None) for _ in range(rng.randint(1, 4))]
    return EncodedGroup(some(0, 5), rows)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_by_row_loop(side):
    rng = random.Random(0)
    for _ in range(20):
        groups = [encoded(rng) for _ in range(rng.randint(1, 4))]
        batch = pad(groups, pad_id=0, side=side)
        lines = [((g.prompt if r.prompt is None else r.prompt).tolist(), r.tokens.tolist())
                 for g in groups for r in g.rows]
        width = max(len(p) + len(r) for p, r in lines)
        assert batch["tokens"].shape == (len(lines), width)   # as wide as the longest row, no wider
        for n, (prompt, response) in enumerate(lines):
            empty = [0] * (width - len(prompt) - len(response))
            line = prompt + response + empty if side == "right" else empty + prompt + response
            trains = [0] * len(prompt) + [1] * len(response)
            assert batch["tokens"][n].tolist() == line
            assert batch["mask"][n].int().tolist() == (trains + empty if side == "right" else empty + trains)
            assert batch["prompt_length"][n] == len(prompt)
        assert batch["attend"].sum().item() == sum(len(p) + len(r) for p, r in lines) == sum(g.length for g in groups)


def test_padding_errors():
    with pytest.raises(ValueError, match="no groups to pad"):
        pad([])
    with pytest.raises(ValueError, match="side should be right or left, found 'lef', did you mean 'left'?"):
        pad([encoded(random.Random(0))], side="lef")


def test_single_responses():
    batch = collate([group("ab", "c", relevance=[1]), group("d", "e", relevance=[0])], Letters())
    assert batch.width == 1 and batch["relevance"].tolist() == [1, 0] and len(batch["tokens"]) == 2


# -------------------------------------------------------------------------------------------------------- tokenizers
def test_each_text_is_encoded_once():
    tokenizer = Letters()
    data = [group("a shared prompt", *(f"answer {n}" for n in range(8))) for _ in range(3)]
    encode(data, tokenizer)
    assert tokenizer.seen.count("a shared prompt") == 1
    assert all(tokenizer.seen.count(f"answer {n}") == 1 for n in range(8))
    conversation = [user("hello")]
    encode([group(conversation, "x", "y", "z")], tokenizer)
    assert tokenizer.seen.count("u:hello;a:") == 1


@pytest.mark.parametrize("bos", [False, True])
def test_fast_tokenizer_agrees_with_its_slow_call(bos):
    tokenizer = fast(bos=bos)
    data = [group(prompt, *TEXTS) for prompt in TEXTS]
    for one, found in zip(data, encode(data, tokenizer), strict=True):
        assert found.prompt.tolist() == tokenizer(one.prompt)["input_ids"]
        for response, line in zip(one.responses, found.rows, strict=True):
            assert line.tokens.tolist() == tokenizer(response.text, add_special_tokens=False)["input_ids"] + \
                [tokenizer.eos_token_id]


def test_state_left_in_a_fast_tokenizer_does_not_matter():
    tokenizer = fast()
    expected = collate([group(TEXTS[0], TEXTS[1])], tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    same(collate([group(TEXTS[0], TEXTS[1])], tokenizer), expected)


def test_conversation_with_a_fast_tokenizer():
    tokenizer = fast(bos=True)
    prompt = [user("what is 2 + 2?"), assistant("4"), user("and 3 + 3?")]
    batch = collate([group(prompt, "It is 6.")], tokenizer)
    tokens, mask = row(batch)
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, assistant("It is 6.")], tokenize=False)
    assert tokenizer.decode(tokens) == whole and tokenizer.bos_token_id not in tokens
    trained = tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    assert trained == whole[len(start):] == "It is 6.<|im_end|>\n"
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"][0] in tokens[-2:]


@pytest.mark.parametrize("kind", ["always", "first"])
@pytest.mark.parametrize("prompt, response", [
    ("Question: what is 2 + 2?\nAnswer:", " It is 4, of course."), ("The quick brown", " fox"), ("x\n", "\nreturn x"),
    ("It is (", "12345)"), ("The", ". dog"), ("a", "a fox"),
])
def test_no_space_comes_between_with_sentencepiece(kind, prompt, response):
    """These tokenizers put a space in front of a text; a response that continues a prompt must not get one."""
    tokenizer = fast(kind, bos=True)
    assert Spelling.of(tokenizer).spaced and not Spelling.of(fast()).spaced
    found, = encode([group(prompt, response)], tokenizer)
    joined = [*found.prompt.tolist(), *found.rows[0].tokens.tolist()]
    assert tokenizer.decode(joined, skip_special_tokens=True) == " " + prompt + response
    assert joined == tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]


def pairs() -> dict[str, list[str]]:
    """Pairs whose prompts end where no token goes on."""
    prompts = [f"{text.strip()}\n" for text in TEXTS]
    return {"prompt": prompts, "chosen": TEXTS, "rejected": ["It is not 5.", *TEXTS[:-1]]}


@pytest.mark.slow                                             # importing TRL's trainer takes seconds
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("conversational", [False, True])
def test_same_ids_as_trl(bos, conversational, tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    tokenizer, data = fast(bos=bos), pairs()
    if conversational:
        data = {"prompt": [[user(x)] for x in data["prompt"]],
                **{side: [[assistant(x)] for x in data[side]] for side in ("chosen", "rejected")}}
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer
    arguments = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    theirs = trainer._prepare_dataset(datasets.Dataset.from_dict(data), tokenizer, arguments, "train")
    ours = encode([group(p, c, r) for p, c, r in zip(*data.values(), strict=True)], tokenizer)
    for one, row_ in zip(ours, theirs, strict=True):
        assert one.prompt.tolist() == row_["prompt_ids"]
        assert [r.tokens.tolist() for r in one.rows] == [row_["chosen_ids"], row_["rejected_ids"]]


@pytest.mark.parametrize("bos", [False, True])
def test_same_ids_as_encoding_the_joined_text(bos):
    tokenizer, data = fast(bos=bos, template=None), pairs()
    for prompt, chosen in zip(data["prompt"], data["chosen"], strict=True):
        tokens, _ = row(collate([group(prompt, chosen)], tokenizer))
        assert tokens == tokenizer(prompt + chosen + tokenizer.eos_token)["input_ids"]


def test_encoding_leaves_the_groups_alone():
    data = [group([user("x")], Response([assistant("c"), tool("7")]), Response("", tokens=[3]), relevance=[1, None])]
    before = copy.deepcopy(data)
    collate(data, fast(template=CHATML))
    assert data == before


def test_any_iterable_and_nothing():
    assert len(encode((group("a", "b") for _ in range(3)), Letters())) == 3
    assert encode([], Letters()) == []
    with pytest.raises(ValueError, match="no group is left to collate: 0 groups read"):
        collate([], Letters())
