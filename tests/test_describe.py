"""Descriptions: hand counts, independent versions, and facts of real files."""
import doctest
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools import describe as module
from data_tools.describe import agreement, describe, render
from data_tools.formats import load
from data_tools.records import Group, Response

DATA = Path(__file__).parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the data subsets are not beside the repository")


def group(*texts, prompt="p", **labels):
    return Group(prompt, [Response(t) for t in texts], **labels)


GROUPS = [
    group("long", "no", relevance=[1.0, 0.0]),                # the earlier and longer one wins
    group("a", "bb", relevance=[0.5, 2.5], prompt="pp"),      # the later and longer one wins
    group("xx", "yy", relevance=[1.0, 1.0], prompt="ppp"),    # a tie
    group("abc", "d", "d", wins=[[0.5, 0.3, None], [0.7, 0.5, 0.5], [None, 0.5, 0.5]]),       # the later, shorter; a tie
    group("solo", relevance=[1.0]), Group("nothing", []), group("a", "b")]


def words(texts, add_special_tokens):
    """A tokenizer of words, called as those of transformers are."""
    assert add_special_tokens is False
    return {"input_ids": [text.split() for text in texts]}


def test_doctests():
    assert doctest.testmod(module).failed == 0


def test_sizes_and_labels_by_hand():
    report = describe(iter(GROUPS))
    assert report["size"] == {"groups": 7, "responses": 12, "responses per group": {"0": 1, "1": 1, "2": 4, "3": 1}}
    assert report["labels"] == {"labelled groups": 5, "best minus worst": {"0": 1, "1": 1, "2": 1},
                                "relevance": {"0": 1, "0.5": 1, "1": 4, "2.5": 1}}
    assert "agreement" not in report


def test_biases_by_hand():
    pairs = describe(GROUPS)["pairs"]
    assert pairs["compared"] == 5 and pairs["ties"] == 0.4
    assert pairs["earlier is preferred"] == pytest.approx(1 / 3)                               # decided: 3 pairs
    assert pairs["longer is preferred"] == pytest.approx(2 / 3) and pairs["equally long"] == 0
    assert pairs["characters longer (mean)"] == pytest.approx((2 + 1 - 2) / 3)
    turned = [Group(g.prompt, g.responses[::-1], g.relevance and g.relevance[::-1],
                    g.wins and [row[::-1] for row in g.wins[::-1]]) for g in GROUPS]
    other = describe(turned)["pairs"]                         # turning every group round turns position bias only
    assert other.pop("earlier is preferred") == pytest.approx(2 / 3) and pairs.pop("earlier is preferred")
    assert other == pairs


def test_lengths_are_quantiles_of_characters_and_tokens():
    texts = [f"{'word ' * n}end" for n in range(40)]
    report = describe([group(t, prompt="two words") for t in texts], words)["length"]
    assert set(report) == {"prompt characters", "response characters", "prompt tokens", "response tokens"}
    assert report["prompt tokens"]["min"] == report["prompt tokens"]["max"] == 2
    sizes = sorted(map(len, texts))
    assert (report["response characters"]["min"], report["response characters"]["max"]) == (sizes[0], sizes[-1])
    assert report["response characters"]["mean"] == pytest.approx(sum(sizes) / 40)
    assert report["response tokens"]["median"] == 20.5 and report["response tokens"]["95%"] == pytest.approx(38.05)


def test_tokens_that_are_given_are_counted_and_messages_by_their_contents():
    chat = Group([{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}],
                 [Response([{"role": "assistant", "content": None}, {"role": "assistant", "content": "d e"}]),
                  Response("f g h", tokens=[1, 2, 3, 4, 5])])
    length = describe([chat], words)["length"]
    assert length["prompt tokens"]["mean"] == 3 and length["response tokens"]["mean"] == (2 + 5) / 2


def test_duplicates_are_what_occurred_before():
    groups = [group("a", "b"), group("b", "a"), group("a", "c"), group("x", "x", prompt="q"), group("a", "b", prompt="q")]
    assert describe(groups)["duplicates"] == {
        "prompts": 3, "responses": 6, "groups": 1, "groups of equal responses": 1}             # 10 texts, 4 distinct
    texts = [str(n * n % 97) for n in range(300)]
    assert describe([group(t) for t in texts])["duplicates"]["responses"] == 300 - len(set(texts))


def test_many_grades_are_shown_as_quantiles():
    relevance = describe([group("a", relevance=[n / 7]) for n in range(30)])["labels"]["relevance"]
    assert relevance["max"] == pytest.approx(29 / 7) and relevance["median"] == pytest.approx(14.5 / 7)


def test_nothing_and_prompts_alone():
    assert describe([]) == {"size": {"groups": 0}} and render(describe([])) == "size\n  groups                      0"
    report = describe([Group("p", []), Group("pp", [])])
    assert report["size"] == {"groups": 2, "responses": 0, "responses per group": {"0": 2}} and "pairs" not in report


# ------------------------------------------------------------------------------------------------------------ agreement
def test_kappa_of_the_textbook_table():
    # Fleiss' own example (1971): 14 raters, 10 subjects, 5 categories; kappa 0.210
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
             [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    ballots = [tuple(itertools.chain(*([c] * n for c, n in enumerate(row)))) for row in table]
    assert agreement(ballots)["fleiss kappa"] == pytest.approx(0.20993, abs=5e-6)
    assert agreement(ballots)["agreeing pairs"] == pytest.approx(0.378, abs=5e-4)


@pytest.mark.slow
def test_kappa_of_two_annotators_with_equal_margins_is_cohens():
    metrics = pytest.importorskip("sklearn.metrics")
    first = [0, 0, 1, 1, 2, 2, 0, 1, 2, 0]
    second = [0, 1, 0, 1, 2, 2, 0, 2, 1, 0]                   # the same number of each vote: both chance terms are equal
    assert Counter(first) == Counter(second)
    kappa = metrics.cohen_kappa_score(first, second)
    assert agreement(list(zip(first, second, strict=True)))["fleiss kappa"] == pytest.approx(kappa, rel=1e-12)


def test_agreement_in_the_limits():
    assert agreement([(1, 1, 1), (0, 0, 0)]) == {"items": 2, "unanimous": 1, "agreeing pairs": 1, "fleiss kappa": 1}
    assert agreement([(1, 1), (1, 1)])["fleiss kappa"] == 1.0                                   # one category only
    assert agreement([(1,), ()]) == agreement([]) == {"items": 0}
    rng = np.random.default_rng(0)
    assert abs(agreement([tuple(v) for v in rng.integers(0, 3, (4000, 3)).tolist()])["fleiss kappa"]) < 0.03


# ----------------------------------------------------------------------------------------------------------- rendering
def test_every_number_is_rendered():
    report = describe(GROUPS, words)
    text = render(report)
    names = [name for rows in report.values() for name in rows]
    assert all(name in text for name in names) and len(text.splitlines()) == len(report) + len(names)
    assert "  ties                        0.4" in text.splitlines()
    json.dumps(report, allow_nan=False)


def test_numbers_are_readable():
    report = {"size": {"groups": 1234567}, "length": {"x": {"mean": 12345.6, "min": 0.123456}}}
    assert render(report).splitlines() == ["size", "  groups                      1,234,567", "length",
                                           "  x                           mean: 12,346  min: 0.1235"]


# ------------------------------------------------------------------------------------------------------------ real data
@real
def test_pandalm():
    report = describe(load(DATA / "pandalm/testset_3annotators.jsonl.gz"))
    found = report["agreement"]
    assert found["items"] == 700 and found["unanimous"] == pytest.approx(596 / 700)            # 270 + 242 + 84
    assert report["pairs"]["ties"] == pytest.approx(84 / 700)
    votes = [g.meta["votes"] for g in load(DATA / "pandalm/testset_3annotators.jsonl.gz")]
    same = sum(sum(a == b for a, b in itertools.combinations(v, 2)) / 3 for v in votes) / 700
    share = Counter(itertools.chain(*votes))
    chance = sum((n / 2100) ** 2 for n in share.values())
    assert found["fleiss kappa"] == pytest.approx((same - chance) / (1 - chance), rel=1e-12)


@real
def test_webgpt_and_duplicates():
    pairs = describe(load(DATA / "webgpt_graded/train.jsonl.gz"))["pairs"]
    assert pairs["ties"] == 145 / 500 and pairs["earlier is preferred"] == pytest.approx(176 / 355)        # 132 + 44
    assert describe(load(DATA / "hh_rlhf_helpful/train.jsonl.gz"))["pairs"]["earlier is preferred"] == 1.0
    assert describe(load(DATA / "llamafactory_demo/dpo_en_demo.jsonl.gz"))["duplicates"]["groups"] == 2
    assert describe(load(DATA / "llamafactory_demo/alpaca_en_demo.jsonl.gz"))["duplicates"]["groups"] == 999 - 985


@real
def test_length_bias_equals_a_row_loop():
    found, longer = list(load(DATA / "hh_rlhf_harmless/train.jsonl.gz")), []
    for g in found:
        size = [len(r.text) if isinstance(r.text, str) else len("\n".join(m["content"] for m in r.text))
                for r in g.responses]
        longer.append(size[0] - size[1])
    pairs = describe(found)["pairs"]
    assert pairs["longer is preferred"] == pytest.approx(sum(d > 0 for d in longer) / 1500)
    assert math.isclose(pairs["characters longer (mean)"], sum(longer) / 1500, rel_tol=1e-12)
