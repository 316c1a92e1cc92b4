"""Labels: doctests hold the hand values; here are independent versions, identities and limits."""
import doctest
import math
import random

import numpy as np
import pytest

from data_tools import labels
from data_tools.labels import (
    apart,
    best_worst,
    dense,
    flip,
    from_ranks,
    hard,
    lipo,
    pairs,
    scores_of,
    singles,
    soft,
    split,
    vote,
    wins_of,
)
from data_tools.records import Group, Response

SCORES = [2.0, -1.0, 2.0, 0.5, 7.25]


def group(**labels):
    size = len(labels.get("relevance") or labels.get("wins"))
    return Group("?", [Response("abcdefgh"[i]) for i in range(size)], **labels)


def many(count, start=0):
    return [Group(f"prompt {n}", [Response("a"), Response("b")], relevance=[1.0, 0.0]) for n in range(start, count)]


def test_doctests():
    found = doctest.testmod(labels)
    assert found.failed == 0 and found.attempted >= 12


def test_dense_is_the_index_among_the_distinct_values():
    _, index = np.unique(SCORES, return_inverse=True)
    assert dense(SCORES) == index.tolist()
    assert dense([]) == [] and dense([None, None]) == [None, None]


def test_from_ranks_reverses_the_order_and_keeps_ties():
    assert from_ranks([1, 2, 3]) == [2.0, 1.0, 0.0]
    assert from_ranks([3, None, 1, 1]) == [0.0, None, 1.0, 1.0]


def test_hard_wins_equal_a_row_loop():
    wins = hard(SCORES)
    for i, a in enumerate(SCORES):
        for j, b in enumerate(SCORES):
            assert wins[i][j] == (0.5 if a == b else 1.0 if a > b else 0.0)


def test_unknown_scores_are_not_compared_but_for_themselves():
    assert hard([1.0, None]) == [[0.5, None], [None, 0.5]]
    assert soft([1.0, None]) == [[0.5, None], [None, 0.5]]


def test_soft_wins_are_the_sigmoid_of_the_difference_and_add_up_to_one():
    wins = np.array(soft(SCORES, temperature=0.7))
    s = np.array(SCORES)
    assert np.allclose(wins, 1 / (1 + np.exp(-(s[:, None] - s[None]) / 0.7)), rtol=1e-12, atol=0)
    assert np.allclose(wins + wins.T, 1, rtol=1e-15)


def test_soft_wins_become_hard_as_the_temperature_falls_and_ties_as_it_rises():
    assert soft(SCORES, temperature=1e-9) == hard(SCORES)
    assert np.allclose(soft(SCORES, temperature=1e12), 0.5, atol=1e-11)
    assert soft([1e308, -1e308], temperature=1e-3)[0][1] == 1.0
    with pytest.raises(ValueError, match="positive"):
        soft(SCORES, temperature=0)


def test_vote_of_one_annotator_is_hard_and_of_several_their_mean():
    ballots = [[3, 1, 2], [1, 1, 5], [0, 2, 2]]
    assert vote(ballots[:1]) == hard(ballots[0])
    assert np.allclose(vote(ballots), np.mean([hard(b) for b in ballots], axis=0), rtol=1e-15)


def test_an_annotator_who_left_a_response_out_has_no_vote_on_it():
    wins = vote([[1, 0, None], [0, 1, None], [1, 0, 0]])
    assert wins[0][1] == pytest.approx(2 / 3) and wins[0][2] == 1.0 and wins[1][2] == 0.5      # 1 vote: a tie of 0, 0
    assert vote([[1, None], [None, 1]]) == [[0.5, None], [None, 0.5]]
    for ballots in ([], [[1, 0], [1, 0, 2]]):
        with pytest.raises(ValueError, match="annotator"):
            vote(ballots)


def test_lipo_labels_of_a_ranking_are_evenly_spaced():
    size = 8                                                  # rank k from the top beats size - 1 - k others, plus 1/2
    assert lipo(hard(range(size))) == [(k + 0.5) / size for k in range(size)]
    assert lipo(hard([1.0] * 5)) == [0.5] * 5
    assert sum(lipo(soft(SCORES))) == pytest.approx(len(SCORES) / 2, rel=1e-12)               # sum of all wins / K


def test_lipo_ignores_the_given_diagonal_and_refuses_gaps():
    assert lipo([[None, 1.0], [0.0, 0.0]]) == [0.75, 0.25]
    with pytest.raises(ValueError, match="every pair compared"):
        lipo([[0.5, None], [None, 0.5]])


def test_pairs_of_hard_wins_are_the_pairs_apart_in_score():
    assert pairs(hard(SCORES)) == apart(SCORES)
    assert apart(SCORES, margin=5.25) == [(4, 0), (4, 1), (4, 2), (4, 3)]
    assert apart(SCORES, margin=5.26) == [(4, 1), (4, 3)]
    assert apart([1.0, None, 1.0]) == []


def test_best_worst_spans_the_largest_gap():
    i, j = best_worst(SCORES)[0]
    assert (SCORES[i], SCORES[j]) == (max(SCORES), min(SCORES))
    assert best_worst(SCORES, margin=8.25) == [(4, 1)] and best_worst(SCORES, margin=8.26) == []
    assert best_worst([None, None]) == best_worst([3.0]) == best_worst([]) == []


def test_wins_of_prefers_wins_and_falls_back_on_relevance():
    assert wins_of(group(wins=[[0.5, 0.3], [0.7, 0.5]])) == [[0.5, 0.3], [0.7, 0.5]]
    assert wins_of(group(relevance=[2.0, 1.0])) == [[0.5, 1.0], [0.0, 0.5]]
    assert wins_of(Group("?", [Response("a"), Response("b")])) == [[0.5, None], [None, 0.5]]


def test_scores_of_reads_one_score_and_names_the_known_ones():
    found = Group("?", [Response("a", scores={"help": 1.0}), Response("b")])
    assert scores_of(found, "help") == [1.0, None]
    with pytest.raises(KeyError, match="known: help"):
        scores_of(found, "halp")


def test_split_keeps_soft_wins_and_turns_the_preferred_to_the_front():
    listed = group(wins=[[0.5, 0.2, None], [0.8, 0.5, 0.6], [None, 0.4, 0.5]])
    listed.meta["id"] = 3
    first, second = split(listed, pairs(listed.wins))
    assert ([r.text for r in first.responses], first.wins) == (["b", "a"], [[0.5, 0.8], [0.2, 0.5]])
    assert ([r.text for r in second.responses], second.wins) == (["b", "c"], [[0.5, 0.6], [0.4, 0.5]])
    assert first.meta == {"id": 3} and first.meta is not listed.meta
    (graded,) = split(group(relevance=[1.0, 4.0]), [(1, 0)])
    assert (graded.relevance, graded.wins) == ([1.0, 0.0], None)


def test_singles_keep_labels_and_leave_unlabelled_out():
    assert [(g.responses[0].text, g.relevance) for g in singles(group(relevance=[1.0, None, 0.0]))] == [
        ("a", [1.0]), ("c", [0.0])]


# ---------------------------------------------------------------------------------------------------------------- flips
def test_flips_happen_at_the_given_rate():
    flipped = sum(g.meta["flipped"] for g in flip(many(4000), rate=0.3))
    assert abs(flipped - 1200) < 5 * math.sqrt(4000 * 0.3 * 0.7)                              # five standard deviations


def test_flips_depend_on_content_and_seed_only():
    groups = many(400)
    by_prompt = {g.prompt: g.relevance for g in flip(groups, rate=0.5, seed=1)}
    shuffled = random.Random(0).sample(groups, len(groups))[:250]
    assert all(by_prompt[g.prompt] == g.relevance for g in flip(shuffled, rate=0.5, seed=1))
    assert any(by_prompt[g.prompt] != g.relevance for g in flip(groups, rate=0.5, seed=2))


def test_flips_of_a_lower_rate_are_among_those_of_a_higher():
    low, high = ({g.prompt for g in flip(many(300), rate=rate) if g.meta["flipped"]} for rate in (0.2, 0.6))
    assert low < high


def test_rates_zero_and_one_and_the_input_stay():
    groups = many(50)
    assert [g.relevance for g in flip(groups, rate=0.0)] == [[1.0, 0.0]] * 50
    assert [g.relevance for g in flip(groups, rate=1.0)] == [[0.0, 1.0]] * 50
    assert all(g.relevance == [1.0, 0.0] and g.meta == {} for g in groups)
    with pytest.raises(ValueError, match="between 0 and 1"):
        list(flip(groups, rate=1.5))


def test_flipping_lists_soft_labels_and_single_responses():
    cases = [group(relevance=[5.0, 1.0, None, 2.0]), group(wins=[[0.5, 0.8], [0.2, 0.5]]), group(relevance=[1.0])]
    listed, soft_pair, single = flip(cases, rate=1.0)
    assert listed.relevance == [1.0, 5.0, None, 4.0]          # mirrored between 1 and 5
    assert np.allclose(soft_pair.wins, [[0.5, 0.2], [0.8, 0.5]], rtol=1e-12)
    assert single.relevance == [0.0]
    assert [g.relevance for g in flip([listed], rate=1.0)] == [[5.0, 1.0, None, 2.0]]


@pytest.mark.parametrize("relevance", [None, [None, None]])
def test_flipping_needs_labels(relevance):
    with pytest.raises(ValueError, match="data.jsonl:3 has no labels"):
        list(flip([Group("?", [Response("a"), Response("b")], relevance, meta={"place": "data.jsonl:3"})], rate=0.5))
