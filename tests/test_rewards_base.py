"""The seam of all rewards: rows, errors that are never a zero, comparisons as rewards, the index, the cache, time limits."""
import doctest
import importlib
import json
import math
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from slow_rows import slow

from data_tools.formats import dump, load
from data_tools.records import Group, Response
from rewards.base import MeanWin, Row, ScoringError, Unreachable, as_reward, mean_wins, rows_of, score, values_of
from rewards.cached import Store, Timed, by_length, cached, remembered, score_file, timed
from rewards.index import WHERE, describe, find
from rewards.trl import FromTRL, as_trl, groups_of

ROOT = Path(__file__).parents[1]


def length(text, *, factor=1.0):
    return factor * len(text)


def picky(text):
    if text == "bad":
        raise RuntimeError("boom")
    return len(text)


def groups(*texts, **meta):
    return [Group("q", [Response(t) for t in texts], meta={"place": "f.jsonl:1", **meta})]


class Longer:
    """A comparison: the longer wins; nothing is known of an empty response."""
    name = "longer"

    def __init__(self):
        self.calls = 0

    def settings(self):
        return {}

    def compare(self, groups):
        self.calls += len(groups)
        return [[[0.5 if i == j else None if not (a.text and b.text) else float(len(a.text) > len(b.text))
                  for j, b in enumerate(g.responses)] for i, a in enumerate(g.responses)] for g in groups]


# ------------------------------------------------------------------------------------------------------------------ base
def test_functions_and_partials_score():
    found, = score(groups("a", "bb"), {"plain": length, "twice": partial(length, factor=2.0)})
    assert [r.scores for r in found.responses] == [{"plain": 1.0, "twice": 2.0}, {"plain": 2.0, "twice": 4.0}]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_raising_row_is_named_or_marked_and_costs_the_others_nothing(count):
    for bad in range(count):
        texts = ["bad" if n == bad else "x" * n for n in range(count)]
        with pytest.raises(ScoringError, match=rf"f.jsonl:1: response {bad + 1}.*picky.*boom"):
            score(groups(*texts), [picky])
        found, = score(groups(*texts), [picky], on_error="mark")
        assert [r.scores.get("picky") for r in found.responses] == [None if t == "bad" else len(t) for t in texts]
        assert "boom" in found.responses[bad].meta["unscored"]["picky"]


def test_scoring_again_clears_the_mark():
    found = score(groups("bad"), [picky], on_error="mark")
    score(found, {"picky": length})
    assert found[0].responses[0].scores == {"picky": 3.0} and "unscored" not in found[0].responses[0].meta


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "much"])
def test_what_is_no_number_is_an_error(value):
    with pytest.raises(ScoringError, match="returned"):
        score(groups("a"), {"odd": lambda text: value})


def test_a_reward_may_hand_back_an_error_for_one_row():
    class Some:
        name = "some"
        def settings(self): return {}
        def __call__(self, rows): return [ScoringError("not this one") if r.text == "b" else 1 for r in rows]
    assert [str(v) for v in values_of(Some(), rows_of(groups("a", "b", "c")), "mark")] == ["1.0", "not this one", "1.0"]


def test_an_unreachable_service_ends_it_at_once():
    calls = []
    class Gone:
        name = "gone"
        def settings(self): return {}
        def __call__(self, rows):
            calls.append(len(rows))
            raise Unreachable("nobody there")
    with pytest.raises(Unreachable):
        score(groups("a", "b", "c"), [Gone()], on_error="mark")
    assert calls == [3]


def test_missing_fields_name_the_nearest():
    with pytest.raises(ScoringError, match="did you mean 'reference'"):
        score(groups("a", reference="x"), {"r": lambda text, referense: 0})


def test_comparisons_fill_scores_and_wins():
    found, = score(groups("aaa", "a", "aa"), [Longer()])
    assert [r.scores["longer"] for r in found.responses] == [1.0, 0.0, 0.5]
    assert found.wins == found.meta["wins"]["longer"] == [[0.5, 1.0, 1.0], [0.0, 0.5, 0.0], [0.0, 1.0, 0.5]]
    labelled = groups("aaa", "a")[0]
    labelled.relevance = [0.0, 1.0]
    score([labelled], {"mine": Longer()})
    assert labelled.wins is None and labelled.meta["wins"]["mine"][0][1] == 1.0        # labels stay what they were


def test_a_response_that_nobody_compared_has_no_score():
    found, = score(groups("aaa", "", "aa"), [Longer()], on_error="mark")
    assert [r.scores.get("longer") for r in found.responses] == [1.0, None, 0.0]
    assert mean_wins([[0.5]]) == [None]


def test_mean_win_of_rows_of_many_groups():
    both = groups("a", "bb") + groups("ccc", "d")
    shuffled = rows_of(both)[::-1]
    assert MeanWin(Longer())(shuffled) == [0.0, 1.0, 1.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------- index
def test_find():
    assert find("bleu").__name__ == "bleu"
    assert find({"chrf": {"order": 3}}).keywords == {"order": 3}
    assert find({f"{__name__}:length": {"factor": 2.0}})("abc") == 6.0
    assert find({"r3": {"corpus": ["red fox"]}}).name == "r3"
    assert find({"weighted": {"parts": {"bleu": None, "rouge_l": None}, "weights": {"bleu": 1, "rouge_l": 1}}}).name == "combined"


def test_a_folder_is_a_trained_reward_model(tmp_path):
    (tmp_path / "rm").mkdir()
    with pytest.raises((OSError, ValueError), match="rm"):                  # an empty folder holds none, and it says so
        find(str(tmp_path / "rm"))


@pytest.mark.parametrize("spec, message", [
    ("bleuu", "no reward 'bleuu', did you mean 'bleu'"), ({"bleu": {"smoth_from": 1}}, "did you mean 'smooth_from'"),
    ({"r3": {"corpos": []}}, "did you mean 'corpus'"), ({"calibrated": {"reward": "bleu"}}, "needs file"),
    ({"a": {}, "b": {}}, "a reward is written as"), (3, "a reward is written as"),
    ("rewards.overlap:blue", "did you mean 'bleu'"), ("no.such:thing", "cannot import")])
def test_find_says_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        find(spec)


@pytest.mark.parametrize("name", WHERE)
def test_every_name_is_there_and_says_what_it_is(name):
    found = describe(name)
    assert found["summary"] and (found["reads"] or found["kind"] != "row function")


# --------------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("draw", [lambda r: r.randint(1, 2000), lambda r: int(r.lognormvariate(5, 1)), lambda r: r.randint(0, 8)])
def test_batches_of_equal_length_pad_at_most_5_percent(draw):
    r = random.Random(0)
    lengths = [draw(r) for _ in range(10_000)]
    batches = by_length(lengths, 16_384)
    assert sorted(i for b in batches for i in b) == list(range(10_000))
    padded = [len(b) * max(lengths[i] for i in b) for b in batches]
    assert sum(padded) <= 1.05 * sum(lengths)
    assert all(p <= 16_384 or len(b) == 1 for p, b in zip(padded, batches, strict=True))
    assert len(batches) < 2 * sum(lengths) / 16_384 + 150


def test_batches_of_nothing_and_of_rows_beyond_the_budget():
    assert by_length([], 10) == []
    assert by_length([50, 5, 5], 10) == [[0], [1, 2]]


# ----------------------------------------------------------------------------------------------------------------- cache
class Counted:
    name = "counted"

    def __init__(self, **settings):
        self.seen, self.own = [], settings

    def settings(self):
        return self.own

    def __call__(self, rows):
        self.seen += [r.text for r in rows]
        return [ScoringError("no") if r.text == "no" else len(r.text) for r in rows]


def test_the_cache_computes_each_content_once(tmp_path):
    reward, store = Counted(), Store(tmp_path / "s.sqlite")
    rows = rows_of(groups("a", "bb", "a", "no"))
    assert [str(x) for x in cached(reward, store)(rows)] == ["1.0", "2.0", "1.0", "no"]
    assert [str(x) for x in cached(reward, Store(tmp_path / "s.sqlite"))(rows)] == ["1.0", "2.0", "1.0", "no"]
    assert reward.seen == ["a", "bb", "no", "no"]                          # errors are tried again
    other = Counted(level=2)
    cached(other, store)(rows)
    assert other.seen == ["a", "bb", "no"]                                 # other settings are another reward


def test_what_the_reward_reads_is_the_key(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    seen = []
    def exact(text, reference):
        seen.append((text, reference))
        return float(text == reference)
    reward = cached(exact, store)
    for group in (groups("a", reference="a"), groups("a", reference="b"), groups("a", reference="a", other=1)):
        reward(rows_of(group))
    assert seen == [("a", "a"), ("a", "b")]
    whole = Counted()                                                       # does not say what it reads: everything counts
    other_prompt = [Group("p", [Response("a")], meta={"x": 2})]
    for group in (groups("a", x=1), groups("a", x=2), groups("a", x=2, wins={"w": 1}), other_prompt):
        cached(whole, store)(rows_of(group))
    assert len(whole.seen) == 3


def test_comparisons_remember_groups_in_order(tmp_path):
    store, judge = Store(tmp_path / "s.sqlite"), Longer()
    for texts in (("a", "bb"), ("a", "bb"), ("bb", "a"), ("a", ""), ("a", "")):
        cached(judge, store).compare(groups(*texts))
    assert judge.calls == 4                                                 # what is not known is asked again


def test_answers_of_a_chat_are_remembered(tmp_path):
    asked = []
    ask = remembered(lambda m: asked.append(m) or f"answer {len(asked)}", Store(tmp_path / "s.sqlite"), {"model": "m"})
    message = [{"role": "user", "content": "x"}]
    assert [ask(message), ask(message), ask([])] == ["answer 1", "answer 1", "answer 2"]


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "s").write_text("nothing of the kind " * 100)
    with pytest.raises(ValueError, match="is no score cache"):
        Store(tmp_path / "s")


def test_a_killed_process_keeps_what_was_scored(tmp_path):
    dump([Group(f"p{i}", [Response("x" * (i % 7))]) for i in range(40)], tmp_path / "in.jsonl")
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from rewards.cached import score_file
class Dies:
    name = "dies"
    def settings(self): return {{}}
    def reads(self): return ["prompt", "text"]
    def __call__(self, rows):
        with open({str(tmp_path / "log")!r}, "a") as log: log.write("".join(r.prompt + "\\n" for r in rows))
        if len(sys.argv) > 1 and rows[0].prompt == "p20": os.kill(os.getpid(), 9)
        return [len(r.text) for r in rows]
print(score_file({str(tmp_path / "in.jsonl")!r}, [Dies()], {str(tmp_path / "out.jsonl")!r}, step=5))
"""
    first = subprocess.run([sys.executable, "-c", program, "die"], capture_output=True, text=True)
    assert first.returncode == -9 and not (tmp_path / "out.jsonl").exists()
    second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'groups': 40" in second.stdout
    log = (tmp_path / "log").read_text().split()
    assert sorted(log, key=lambda p: int(p[1:])) == sorted([f"p{i}" for i in range(40)] + [f"p{i}" for i in range(20, 25)],
                                                           key=lambda p: int(p[1:]))
    assert [g.responses[0].scores["dies"] for g in load(tmp_path / "out.jsonl")] == [i % 7 for i in range(40)]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith((".scores", "-wal", "-shm"))] == []


def test_scoring_a_file_counts_what_is_left_out(tmp_path):
    dump(groups("a", "bad") + groups("bad", "ccc"), tmp_path / "in.jsonl")
    counts = score_file(tmp_path / "in.jsonl", [picky, length], tmp_path / "out.jsonl.gz", on_error="mark", progress=True)
    assert set(counts.pop("scores")) == {"picky", "length"}
    assert counts == {"groups": 2, "responses": 4, "scored": {"picky": 2, "length": 4}, "unscored": {"picky": 2},
                      "reasons": {"picky": ["RuntimeError: boom"]}}
    with pytest.raises(ScoringError, match="in.jsonl:1: response 2"):
        score_file(tmp_path / "in.jsonl", [picky], tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------- time limits
def test_a_row_that_hangs_or_dies_is_killed_and_the_others_are_scored():
    begun = time.monotonic()
    with Timed(slow, seconds=0.5, workers=2) as reward:
        found = reward(rows_of(groups("a", "hang", "bb", "exit", "child", "ccc")))
        processes = [p for p, _ in reward.idle]
    assert [str(x) for x in found] == ["1", "took more than 0.5 s and was killed", "2", "its process ended with exit code 3",
                                       "took more than 0.5 s and was killed", "3"]
    assert time.monotonic() - begun < 20 and not any(p.is_alive() for p in processes)
    left = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout
    assert not [line for line in left.splitlines() if "time.sleep(60)" in line and line.split()[0] == "1"]


def test_only_functions_that_another_process_finds_have_a_limit():
    with pytest.raises(ScoringError, match="top of a module"):
        Timed(lambda text: 1, seconds=1)(rows_of(groups("a")))
    with pytest.raises(ValueError, match="reward of many rows"):
        timed(reward={"r3": {"corpus": ["red fox"]}}, seconds=1)


def test_timed_and_plain_are_the_same_to_the_cache(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    assert cached(slow, store)(rows_of(groups("a"))) == [1.0]
    assert cached(Timed(slow, seconds=1), store)(rows_of(groups("a"))) == [1.0]


# ------------------------------------------------------------------------------------------------------------------- TRL
def test_there_and_back_through_trl():
    there = as_trl(partial(length, factor=0.5))
    assert there.__name__ == "length"
    again = FromTRL(there)
    rows = rows_of(groups("a", "bb") + [Group([{"role": "user", "content": "q"}], [Response("ccc")])])
    assert again(rows) == [0.5, 1.0, 1.5]


def test_columns_reach_the_function_and_the_trainers_state_does_not():
    def matches(text, answer):
        return float(text == answer)
    ask = as_trl(matches)
    conversation = [{"role": "user", "content": "1+1?"}]
    found = ask(prompts=[conversation] * 2, completions=[[{"role": "assistant", "content": t}] for t in ("2", "3")],
                completion_ids=[[1], [2]], answer=["2", "2"], trainer_state=object(), log_extra=print)
    assert found == [1.0, 0.0]
    with pytest.raises(ScoringError, match="group 1: response 1.*'answer'"):
        ask(["p"], ["c"])
    assert as_trl(matches, on_error="mark")(["p"], ["c"]) == [None]
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        ask(["p", "p"], ["c"])


def test_comparisons_compare_neighbours_of_one_prompt():
    assert as_trl(Longer())(["p", "p", "q", "q"], ["a", "bb", "ccc", "d"]) == [0.0, 1.0, 1.0, 0.0]
    assert [len(g.responses) for g in groups_of(["p", "q", "p"], ["a", "b", "c"])] == [1, 1, 1]


def test_a_trl_function_gets_what_it_names_and_none_is_an_error():
    def named(prompts, completions, answer):
        assert (prompts, completions) == (["q", "q"], ["a", "b"])
        return [1.0 if a == "a" else None for a in answer]
    some = groups("a", "b")
    some[0].responses[0].meta["answer"] = "a"
    found, = score(some, [FromTRL(named)], on_error="mark")
    assert [r.scores.get("named") for r in found.responses] == [1.0, None]
    assert "returned None" in found.responses[1].meta["unscored"]["named"]


def test_rows_survive_json():
    group = score(groups("a"), [length])[0]
    assert Group.from_json(json.loads(json.dumps(group.to_json()))).responses[0].scores == {"length": 1.0}
    assert as_reward(length).settings() == {} and Row(group, group.responses[0]).prompt == "q"


@pytest.mark.parametrize("module", ["base", "cached", "calibrate", "combine", "index", "judge", "overlap", "persona", "relevance",
                                    "trl"])
def test_doctests(module):
    failed, tried = doctest.testmod(importlib.import_module(f"rewards.{module}"))
    assert failed == 0 < tried
