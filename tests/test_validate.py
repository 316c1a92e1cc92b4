"""Validation: every kind of problem is found and located, good data passes, the gate stops or skips and counts."""
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.fields import DataError
from data_tools.formats import load
from data_tools.records import Group, Response
from data_tools.validate import CHECKS, Report, checked, labelled, paired, validate

DATA = Path(__file__).parents[1].parent / "shared" / "data"
NAN, INF = float("nan"), float("inf")


def group(*texts, prompt="p", **labels):
    return Group(prompt, [Response(t) for t in texts], **labels)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f"}}])

GOOD = [
    group("a", "b", relevance=[1.0, 0.0]), group("a", relevance=[0.0]), group("a"), Group("p", []),
    group("a", "b", "c", relevance=[2, None, -1.5], weight=0), group("a", "b", wins=[[0.5, 0.2], [0.8, 0.5]]),
    group("a", "b", "c", wins=[[0.5, 1 / 3, None], [2 / 3, None, 0.0], [None, 1.0, 0.0]]),    # any diagonal
    group("a", "a", relevance=[1.0, 1.0]), group("a", "a", wins=[[0.5, 0.5], [0.5, 0.5]]), group("a", "a"),
    group([CALL, turn("tool", "x")], [turn("assistant", "b")], prompt=[turn("user", "p")], relevance=[1, 0]),
    group("a", prompt=[turn("user", [{"type": "image"}])]),
]

BAD = [                                                       # kind, what the message says, the group
    ("empty prompt", "the prompt is empty", group("a", prompt=" \n")),
    ("empty prompt", "share no beginning", group("a", prompt=[])),
    ("empty prompt", "the prompt is empty", group("a", prompt=[turn("user", " ")])),
    ("empty response", "response 2 is empty", group("a", "\n\t", relevance=[1.0, 0.0])),
    ("empty response", "response 1 is empty", group([turn("assistant", "")], "b")),
    ("empty response", "response 1 is empty", group([], "b")),
    ("prompt not shared", "response 1 begins with a user turn, 'x' (str)", group([turn("user", "x"), CALL], "b")),
    ("chosen equals rejected", "responses 1 and 2 are equal, yet one is preferred",
     group("a", "a", relevance=[1.0, 0.0])),
    ("chosen equals rejected", "responses 1 and 3 are equal", group("a", "b", "a", relevance=[3, 2, 1])),
    ("chosen equals rejected", "responses 1 and 2", group("a", "a", wins=[[0.5, 0.4], [0.6, 0.5]])),
    ("label out of range", "relevance has 1 entries for 2 responses", group("a", "b", relevance=[1.0])),
    ("label out of range", "relevance nan (float) is not a finite number", group("a", "b", relevance=[1.0, NAN])),
    ("label out of range", "relevance inf (float)", group("a", relevance=[INF])),
    ("label out of range", "relevance True (bool)", group("a", relevance=[True])),
    ("label out of range", "relevance 'high' (str)", group("a", relevance=["high"])),
    ("label out of range", "weight -1 (int)", group("a", weight=-1)),
    ("label out of range", "weight nan", group("a", weight=NAN)),
    ("label out of range", "wins has rows of [1] entries for 2 responses", group("a", "b", wins=[[0.5]])),
    ("label out of range", "the win of response 1 over 2 is 1.2 (float)", group("a", "b", wins=[[0.5, 1.2], [-0.2, 0.5]])),
    ("label out of range", "the win of response 1 over 2 is nan", group("a", "b", wins=[[0.5, NAN], [1.0, 0.5]])),
    ("label out of range", "0.7 and 0.7, do not add up to 1", group("a", "b", wins=[[0.5, 0.7], [0.7, 0.5]])),
    ("label out of range", "0.7 and None", group("a", "b", wins=[[0.5, 0.7], [None, 0.5]])),
]


@pytest.mark.parametrize("good", GOOD)
def test_good_groups_pass(good):
    assert str(validate([good])) == "1 of 1 records are good"


@pytest.mark.parametrize("kind, message, bad", BAD)
def test_each_problem_is_found_once_and_located(kind, message, bad):
    report = validate([GOOD[0], bad])
    assert report.counts == {kind: 1} and (report.groups, report.good, report.skipped) == (2, 1, 1)
    (example,) = report.examples[kind]
    assert example.startswith("group 2: ") and message in example
    with pytest.raises(DataError) as caught:
        list(checked([replace(bad, meta={"place": "data.jsonl:7"})]))
    assert caught.value.place == "data.jsonl:7" and str(caught.value).startswith("data.jsonl:7: ")
    assert caught.value.problem == kind and message in str(caught.value)


def test_a_group_may_have_several_problems():
    report = validate([group("", "", prompt="", relevance=[1.0, 0.0])])
    assert report.counts == {"empty prompt": 1, "empty response": 2, "chosen equals rejected": 1}
    assert report.skipped == 1


@pytest.mark.parametrize("check, kind, bad", [
    (paired, "too few responses", group("a", relevance=[1.0])), (paired, "too few responses", Group("p", [])),
    (paired, "no labels", group("a", "b")), (paired, "no labels", group("a", "b", relevance=[None, 1.0])),
    (paired, "no labels", group("a", "b", wins=[[0.5, None], [None, 0.5]])),
    (labelled, "no labels", group("a")), (labelled, "no labels", group("a", relevance=[None])),
    (labelled, "no labels", Group("p", []))])
def test_further_checks(check, kind, bad):
    assert validate([bad]).counts == {}
    assert validate([bad], checks=(*CHECKS, check)).counts == {kind: 1}
    assert validate([GOOD[0], GOOD[5]], checks=[check]).counts == {}


def test_checks_of_your_own():
    def short(group):
        if len(group.prompt) > 3:
            yield "long prompt", f"{len(group.prompt)} characters"

    assert validate([group("a", prompt="long")], checks=[short]).examples == {"long prompt": ["group 1: 4 characters"]}


def test_report_keeps_the_first_examples_and_counts_all():
    report = validate([BAD[3][2]] * 8)
    assert report.counts["empty response"] == 8 and len(report.examples["empty response"]) == 5
    assert str(report).splitlines() == [
        "0 of 8 records are good, problems:", "  empty response: 8",
        *(f"    group {n}: response 2 is empty" for n in range(1, 6)), "    and 3 more"]
    assert str(Report()) == "0 of 0 records are good"


# ------------------------------------------------------------------------------------------------------------- the gate
def test_skipping_counts_and_warns_at_the_end():
    gate = checked([GOOD[0], BAD[0][2], GOOD[1], BAD[3][2]], on_bad="skip")
    with pytest.warns(UserWarning, match="skipped: 2 of 4 records are good, problems:\n  empty prompt: 1\n"):
        assert list(gate) == [GOOD[0], GOOD[1]]
    assert gate.report.counts == {"empty prompt": 1, "empty response": 1}


def test_every_pass_starts_anew_and_good_data_does_not_warn():
    gate = checked(GOOD, on_bad="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(gate) == GOOD == list(gate)
    assert gate.report.groups == len(GOOD)


def test_stopping_is_lazy_and_counts_what_was_seen():
    gate = checked(iter([GOOD[0], BAD[0][2], GOOD[1]]))
    found = iter(gate)
    assert next(found) == GOOD[0]
    with pytest.raises(DataError, match="group 2: the prompt is empty"):
        next(found)
    assert (gate.report.groups, gate.report.good) == (2, 1)


def test_on_bad_has_two_settings():
    with pytest.raises(ValueError, match="on_bad should be 'error' or 'skip', found 'ignore'"):
        checked(GOOD, on_bad="ignore")


def test_records_that_cannot_be_read_count_too(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}), "{broken", json.dumps({"prompt": "p", "chosen": 1}),
            json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"})]
    path.write_text("\n".join(rows))
    report = validate(load(path))
    assert report.counts == {"malformed json": 1, "missing key": 1, "chosen equals rejected": 1}
    assert (report.groups, report.good) == (4, 1)
    assert [e[0].split(": ")[0] for e in report.examples.values()] == [f"{path}:{n}" for n in (2, 3, 4)]
    with pytest.warns(UserWarning, match="1 of 4 records are good"):
        assert len(list(checked(load(path), on_bad="skip"))) == 1
    with pytest.raises(DataError, match="data.jsonl:2: malformed json"):
        list(checked(load(path)))


def test_a_file_that_breaks_off_counts_what_came_before(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3)[:-20])
    assert (validate(load(path)).good, validate(load(path)).counts) == (2, {"malformed json": 1})


@pytest.mark.skipif(not DATA.is_dir(), reason="the data subsets are not beside the repository")
def test_real_problems():
    found = {name: validate(load(DATA / name), checks=(*CHECKS, paired)) for name in (
        "themis/translator.jsonl.gz", "pandalm/testset_3annotators.jsonl.gz", "llamafactory_demo/kto_en_demo.jsonl.gz")}
    equal, empty, single = found.values()
    assert equal.counts == {"chosen equals rejected": 3} and ":17: " in equal.examples["chosen equals rejected"][0]
    assert empty.counts == {"empty response": 14} and single.counts == Counter({"too few responses": 200})
