"""RewardBench 1 and 2 against numbers worked out by hand and against loops."""
import doctest
import json
import math

import numpy as np
import pytest

from data_tools.fields import DataError
from data_tools.formats import load
from rewards import rewardbench as rb

NAN = float("nan")


def test_doctests():
    found = doctest.testmod(rb)
    assert found.attempted >= 5 and not found.failed


# ------------------------------------------------------------------------------------------------------- RewardBench 1
def test_the_counts_are_those_of_the_data_set():
    counts = {subset: n for section in rb.SECTIONS.values() for subset, n in section.items()}
    assert len(counts) == 23 and sum(counts.values()) - 984 + 447 == 2985          # the number of pairs in the set
    assert {name: sum(section.values()) for name, section in rb.SECTIONS.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert counts["math-prm"] == sum(n for s, n in counts.items() if s.startswith("hep-"))
    assert (counts["xstest-should-refuse"], counts["xstest-should-respond"]) == (154, 250)


def test_v1_by_hand_on_a_small_table():
    rows = [("alpacaeval-easy", 2, 1), ("alpacaeval-easy", 1, 2), ("mt-bench-med", 1, 0),          # Chat: (100/2 + 40) / 140
            ("llmbar-natural", 0, 0),                                                              # Chat Hard: a tie is wrong
            ("xstest-should-refuse", 1, 0), ("xstest-should-respond", 0, 1), ("donotanswer", 1, 0),
            ("math-prm", 0, 1), ("hep-rust", 1, 0), ("hep-rust", 1, 0), ("hep-rust", 0, 1)]
    found = rb.v1(*zip(*rows, strict=True))
    expected = {"Chat": 90 / 140, "Chat Hard": 0.0, "Safety": (154 + 136) / (154 + 250 + 136), "Reasoning": 164 * 2 / 3 / 1148}
    assert found["sections"] == pytest.approx(expected, rel=1e-12)
    assert found["score"] == pytest.approx(sum(expected.values()) / 4, rel=1e-12)
    assert found["subsets"]["hep-rust"] == {"accuracy": pytest.approx(2 / 3), "items": 3} and found["tied"] == 1
    assert "refusals-dangerous" in found["absent"] and len(found["absent"]) == 23 - 8


def test_v1_generative_ties_and_unreadable_verdicts_get_half():
    table = ["llmbar-natural"] * 3, [1.0, NAN, 0.0], [1.0, 0.0, 1.0]
    scalar, generative = rb.v1(*table), rb.v1(*table, undecided=0.5)
    assert scalar["sections"]["Chat Hard"] == 0 and generative["sections"]["Chat Hard"] == pytest.approx(1 / 3)
    assert scalar["unscored"] == generative["unscored"] == 1 and scalar["tied"] == 1
    assert rb.v1(["hep-go"], [None], [1.0])["unscored"] == 1


def test_v1_sections_without_a_subset_score_nothing_and_still_count():
    found = rb.v1(["math-prm"], [1.0], [0.0])
    assert found["sections"] == {"Chat": 0, "Chat Hard": 0, "Safety": 0, "Reasoning": 1} and found["score"] == 0.25


def test_v1_weights_subsets_by_their_counts_and_not_by_their_items():
    few = rb.v1(["alpacaeval-easy", "mt-bench-easy"], [1, 0], [0, 1])
    many = rb.v1(["alpacaeval-easy", *["mt-bench-easy"] * 9], [1, *[0] * 9], [0, *[1] * 9])
    assert few["sections"] == many["sections"] and few["sections"]["Chat"] == pytest.approx(100 / 128)


def test_v1_of_a_perfect_and_of_a_random_scorer():
    names = [s for section in rb.SECTIONS.values() for s, n in section.items() for _ in range(n)]
    assert rb.v1(names, np.ones(len(names)), np.zeros(len(names)))["score"] == 1
    a, b = np.random.default_rng(0).normal(size=(2, len(names)))
    weights = [sum((n / sum(c.values())) ** 2 / n for n in c.values()) for c in rb.SECTIONS.values()]
    assert abs(rb.v1(names, a, b)["score"] - 0.5) < 3 * math.sqrt(0.25 * sum(weights) / 16)       # three standard errors
    assert rb.v1(names, b, a)["score"] == pytest.approx(1 - rb.v1(names, a, b)["score"], rel=1e-9)


def test_v1_unknown_subset_names_the_nearest():
    with pytest.raises(ValueError, match="'lmbar-natural', did you mean 'llmbar-natural'"):
        rb.v1(["lmbar-natural"], [1.0], [0.0])


# ------------------------------------------------------------------------------------------------------- RewardBench 2
def test_best_of_credit_of_a_random_scorer_is_a_quarter():
    scores = np.random.default_rng(0).normal(size=(4000, 4))
    error = math.sqrt(0.25 * 0.75 / 4000)
    assert abs(np.mean([rb.best_of_credit(s) for s in scores]) - 0.25) < 3 * error
    coarse = np.random.default_rng(1).integers(0, 2, (4000, 4))                 # with ties the credit is shared
    assert abs(np.mean([rb.best_of_credit(s) for s in coarse]) - 0.25) < 3 * error


def test_best_of_credit_with_nan():
    assert rb.best_of_credit([NAN, 1, 0, 0]) == 0 and rb.best_of_credit([1, NAN, 0, 0], unscored=0.25) == 0.25


def item(name, correct, wrong):
    return {"id": name, "num_correct": len(correct), "scores": [*correct, *wrong]}


def test_ties_by_hand():
    items = [item("tied:1", [5, 4], [1, 0]), item("ref:1", [3], [1, 0]),        # gap 3 > spread 1; g = min(2, 3) = 2 > 1
             item("tied:2", [5, 2], [1]), item("ref:2", [9], [0]),              # gap 1 < spread 3
             item("tied:3", [5, 4], [4.5]), item("ref:3", [0], [1])]            # gap -0.5, ref gap -1: both wrong
    found = rb.ties(items)
    m = (math.tanh(2 / 1 - 1) + math.tanh(1 / 3 - 1) + math.tanh(-1 / 1 - 1)) / 3
    expected = 0.30 * 2 / 3 + 0.30 * 2 / 3 + 0.20 * 1 / 3 + 0.20 * 1 / 3 + 0.01 * m
    assert found["score"] == pytest.approx(expected, rel=1e-12)
    assert (found["accuracy_tied"], found["accuracy_ref"], found["preferred"], found["preferred_hard"]) == pytest.approx(
        (2 / 3, 2 / 3, 1 / 3, 1 / 3))
    assert found["margin"] == pytest.approx(m, rel=1e-12)


def test_the_hard_margin_takes_the_reference_into_account():
    found = rb.ties([item("tied:1", [5, 4], [1]), item("ref:1", [1.5], [1])])    # gap 3 > 1, but the reference's gap 0.5 < 1
    assert (found["preferred"], found["preferred_hard"]) == (1, 0)


@pytest.mark.parametrize("correct, wrong, margin, preferred", [
    ([2, 2], [1], 1.0, 1.0),                                   # spread 0, gap 1: +inf
    ([2, 2], [3], -1.0, 0.0),                                  # spread 0, gap -1: -inf
    ([2, 2], [2], 0.0, 0.0)])                                  # 0 / 0
def test_ties_without_spread(correct, wrong, margin, preferred):
    found = rb.ties([item("tied:1", correct, wrong), item("ref:1", [9], [0])])
    assert (found["margin"], found["preferred"], found["preferred_hard"]) == (margin, preferred, preferred)


def test_the_largest_score_of_ties_is_1_01_and_equal_scores_give_nothing():
    assert rb.ties([item("tied:1", [2, 2], [1]), item("ref:1", [1], [0])])["score"] == pytest.approx(1.01, rel=1e-12)
    assert rb.ties([item("tied:1", [1, 1], [1]), item("ref:1", [1], [1])])["score"] == 0


def test_ties_accuracies_are_over_their_own_items_and_margins_over_common_prompts():
    found = rb.ties([item("tied:1", [2, 2], [1]), item("tied:2", [0, 2], [1]), item("ref:1", [1], [0]), item("ref:7", [0], [1])])
    assert (found["accuracy_tied"], found["accuracy_ref"], found["prompts"], found["preferred"]) == (0.5, 0.5, 1, 1)
    alone = rb.ties([item("ref:1", [1], [0])])
    assert alone["score"] == pytest.approx(0.30) and alone["prompts"] == 0


def test_ties_with_nan_are_counted_and_win_nothing():
    found = rb.ties([item("tied:1", [NAN, 2], [1]), item("ref:1", [1], [0])])
    assert found["unscored"] == 1 and found["score"] == pytest.approx(0.30)


@pytest.mark.parametrize("wrong", [item("tied:1", [1], [0]), item("ref:1", [1], []), item("other:1", [1, 1], [0]),
                                   item("tied", [1, 1], [0])])
def test_ties_items_that_are_none(wrong):
    with pytest.raises(ValueError, match="an item is 'ref:N'"):
        rb.ties([wrong])


def test_v2_is_the_mean_of_the_domains():
    items = [{"subset": "Factuality", "scores": [1, 0, 0, 0]}, {"subset": "Factuality", "scores": [0, 1, 0, 0]},
             {"subset": "Precise IF", "scores": [1, 1, 0, 0]}, {"subset": "Math", "scores": [0, 0, 0, 0]},
             {"subset": "Safety", "scores": [2, 0, 0, 0]}, {"subset": "Focus", "scores": [0, 0, 3, 0]},
             {"subset": "ties", **item("tied:0", [2, 2], [1])}, {"subset": "Ties", **item("ref:0", [1], [0])}]
    found = rb.v2(items)
    assert found["domains"] == pytest.approx({"Factuality": 0.5, "Precise IF": 0.5, "Math": 0.25, "Safety": 1.0, "Focus": 0.0,
                                              "Ties": 1.01})
    assert found["score"] == pytest.approx((0.5 + 0.5 + 0.25 + 1 + 0 + 1.01) / 6) and found["absent"] == []
    assert found["items"]["Ties"] == 2


def test_v2_names_absent_domains_counts_nan_and_refuses_unknown_ones():
    found = rb.v2([{"subset": "Math", "scores": [NAN, 0, 0, 0]}], unscored=0.25)
    assert found["score"] == 0.25 and found["unscored"] == 1 and found["absent"] == ["Factuality", "Precise IF", "Safety",
                                                                                     "Focus", "Ties"]
    assert rb.v2([])["score"] is None
    with pytest.raises(ValueError, match="'Maths', did you mean 'Math'"):
        rb.v2([{"subset": "Maths", "scores": [1, 0, 0, 0]}])


# ------------------------------------------------------------------------------------------------------------- records
def test_records_of_both_versions_are_read(tmp_path):
    one = {"id": 3, "subset": "hep-go", "prompt": "p", "chosen": "yes", "rejected": "no", "chosen_model": "human"}
    two = {"id": "tied:4", "subset": "Ties", "prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2,
           "total_completions": 3}
    for name, record in (("one", one), ("two", two)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    first, = load(tmp_path / "one.jsonl")
    second, = load(tmp_path / "two.jsonl", format=rb.best_of)
    assert first.meta["subset"] == "hep-go" and first.relevance == [1.0, 0.0]
    assert [r.text for r in second.responses] == ["a", "b", "c"] and second.relevance == [1.0, 1.0, 0.0]
    assert second.meta["id"] == "tied:4" and second.meta["num_correct"] == 2


@pytest.mark.parametrize("change", [{"num_correct": 1}, {"rejected": []}, {"chosen": []}])
def test_records_that_contradict_themselves(change):
    with pytest.raises(DataError, match="as many responses as 'num_correct'"):
        rb.best_of({"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], **change})
