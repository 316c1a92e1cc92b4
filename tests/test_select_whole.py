"""Rules over all groups, and elections: against brute force, with their guarantees."""
import copy
import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

from data_tools import select
from data_tools.records import Group, Response
from data_tools.select.committees import VOTING, committee, place_values
from data_tools.select.whole import centres, length_step


def scored(values):
    return [Group(f"prompt {k}", [Response("x", scores={"reward": v})]) for k, v in enumerate(values)]


def prompts(groups):
    return [g.prompt for g in groups]


# --------------------------------------------------------------------------------------------------------------- by score
def test_selection_by_hardness_is_a_slice_of_the_sorted_scores():
    r = random.Random(0)
    values = [r.choice([0.0, 0.25, 0.5]) for _ in range(40)]
    groups = scored(values)
    ranked = sorted(range(40), key=values.__getitem__)
    for n in (1, 7, 40):
        cuts = {"hardest": slice(n), "easiest": slice(40 - n, 40), "middle": slice((40 - n) // 2, (40 - n) // 2 + n)}
        for name in cuts:
            assert prompts(getattr(select, name)(groups, n=n)) == [f"prompt {k}" for k in sorted(ranked[cuts[name]])]
    assert not set(prompts(select.hardest(groups, n=15))) & set(prompts(select.easiest(groups, n=25)))


def test_hardness_is_the_mean_of_all_responses():
    groups = [Group(str(v), [Response("", scores={"reward": x}) for x in v]) for v in ((0.0, 1.0), (0.4,), (0.6, 0.6))]
    assert prompts(select.hardest(groups, n=1)) == ["(0.4,)"] and prompts(select.easiest(groups, n=1)) == ["(0.6, 0.6)"]


def test_errors_of_rules_over_all_groups():
    groups = scored([0.1, 0.2])
    for n in (0, 3):
        for rule in (select.hardest, select.sample, select.coverage):
            with pytest.raises(ValueError, match=f"cannot take n={n} of 2 groups"):
                rule(groups, n=n)
    with pytest.raises(ValueError, match="no responses, so nothing says how hard"):
        select.hardest([Group("?", [])], n=1)
    with pytest.raises(KeyError, match="did you mean 'reward'"):
        select.hardest(groups, n=1, score="rewart")
    with pytest.raises(ValueError, match="cannot be compared"):
        select.hardest(scored([math.nan]), n=1)
    for rule in (select.hardest, select.sample, select.coverage):
        with pytest.raises(TypeError, match="reads the groups twice"):
            rule(iter(groups), n=1)


def test_rules_over_all_groups_change_nothing_and_keep_the_order():
    groups = scored(np.random.default_rng(0).random(30).tolist())
    before = copy.deepcopy(groups)
    for rule in (select.hardest, select.easiest, select.middle, select.sample, select.coverage):
        found = prompts(rule(groups, n=9))
        assert groups == before and len(found) == 9 and found == sorted(found, key=lambda p: int(p.split()[1]))


def test_a_sample_does_not_depend_on_the_others():
    groups = scored(range(50))
    some = set(prompts(select.sample(groups, n=10)))
    turned = groups[::-1]
    assert set(prompts(select.sample(turned, n=10))) == some != set(prompts(select.sample(groups, n=10, seed=1)))
    inside = [g for g in groups if g.prompt in some or g.prompt.endswith("3")]             # the others leave, the same stay
    assert set(prompts(select.sample(inside, n=10))) == some
    assert len(prompts(select.sample([groups[0]] * 4, n=2))) == 2


# --------------------------------------------------------------------------------------------------------------- coverage
def words(seed, count):
    r, known = random.Random(seed), ["red", "blue", "fox", "sky", "sea", "dog", "cat", "sun", "moon", "tree"]
    return [" ".join(r.choices(known, k=r.randint(1, 4))) for _ in range(count)]


def test_centres_are_within_twice_the_best_radius():
    """Against every choice of n of them; distances by a dense formula of their own."""
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfVectorizer
    for seed in range(12):
        x = TfidfVectorizer().fit_transform(words(seed, 11))
        distance = np.linalg.norm(x.toarray()[:, None] - x.toarray()[None], axis=-1)
        radius = lambda chosen, distance=distance: distance[:, list(chosen)].min(1).max()
        chosen = centres(csr_array(x), 3, seed % 11)
        assert len(set(chosen)) == 3 and chosen[0] == seed % 11
        best = min(radius(c) for c in itertools.combinations(range(11), 3))
        assert radius(chosen) <= 2 * best + 1e-9


def test_copies_and_blank_prompts_come_last():
    different = ["red fox", "blue sky", "green tree", ""]
    groups = [Group(t, []) for t in different * 3]
    assert sorted(prompts(select.coverage(groups, n=4))) == sorted(different)
    assert len(prompts(select.coverage(groups, n=12))) == 12


def test_coverage_reaches_a_rare_topic_that_a_sample_misses():
    groups = [Group(f"add {k} apples and pears", []) for k in range(200)] + [Group("name a volcano in Iceland", [])]
    assert "name a volcano in Iceland" in prompts(select.coverage(groups, n=2))


# ---------------------------------------------------------------------------------------------------------- length balance
def pairs_of_lengths(seed, count=400):
    r = random.Random(seed)
    groups = []
    for k in range(count):
        a, b = r.randint(1, 60), r.randint(1, 60)
        longer_wins = r.random() < 0.8
        groups.append(Group(str(k), [Response("x" * a), Response("y" * b)],
                            [float((a > b) == longer_wins), float((a > b) != longer_wins)]))
    return groups


def test_longer_and_shorter_are_preferred_equally_often_at_every_ratio():
    groups = pairs_of_lengths(0)
    kept = list(select.length_balanced(groups))
    steps = Counter(length_step(g, 0.25) for g in kept)
    assert all(steps[s] == steps[-s] for s in steps) and len(steps) > 10
    assert steps[0] == sum(len(g.responses[0].text) == len(g.responses[1].text) for g in groups)
    before = Counter(length_step(g, 0.25) for g in groups)
    assert all(steps[s] == min(before[s], before[-s]) for s in before if s)                # no more go than have to
    longer = [len(g.responses[0].text) > len(g.responses[1].text) for g in groups]
    assert np.mean([a == (g.relevance[0] > 0.5) for a, g in zip(longer, groups, strict=True)]) > 0.7


def test_the_balance_does_not_depend_on_order_or_on_which_response_comes_first():
    groups = pairs_of_lengths(1, 100)
    kept = set(prompts(select.length_balanced(groups)))
    assert set(prompts(select.length_balanced(groups[::-1]))) == kept
    swapped = [Group(g.prompt, g.responses[::-1], g.relevance[::-1]) for g in groups]
    assert [length_step(a, 0.25) for a in swapped] == [length_step(a, 0.25) for a in groups]


@pytest.mark.parametrize("a, b, relevance, step", [
    (4, 4, [1.0, 0.0], 0), (4, 2, [1.0, 1.0], 0), (4, 2, [1.0, 0.0], 3), (4, 2, [0.0, 1.0], -3), (0, 1, [1.0, 0.0], -1)])
def test_steps_of_length(a, b, relevance, step):
    """log 2 / 0.25 = 2.77: the third step."""
    assert length_step(Group("?", [Response("x" * a), Response("x" * b)], relevance), 0.25) == step


def test_length_balance_takes_labelled_pairs():
    for group, said in ((scored([1.0])[0], "a group of 1: make pairs first"),
                        (Group("?", [Response("a"), Response("b")]), "a group of 2 without a label")):
        with pytest.raises(ValueError, match=said):
            list(select.length_balanced([group]))
    with pytest.raises(ValueError, match="width should be positive"):
        select.length_balanced([], width=0)


# ------------------------------------------------------------------------------------------------------------- elections
def brute(rankings, k, by, kinds=None, least: Mapping = {}, most: Mapping = {}):
    """The highest F over all committees within bounds, and F as the definition has it."""
    m = len(rankings[0])
    worth, weights = VOTING[by](m, k)

    def f(chosen):
        total = 0.0
        for ranking in rankings:
            place = {i: p for p, i in enumerate(sorted(range(m), key=lambda i: -ranking[i]))}
            total += sum(w * v for w, v in zip(weights, sorted((worth[place[i]] for i in chosen), reverse=True), strict=True))
        return total

    def fair(chosen):
        count = Counter(kinds[i] for i in chosen) if kinds else Counter()
        return all(count[g] >= n for g, n in least.items()) and all(count[g] <= n for g, n in most.items())
    return f, max(f(c) for c in itertools.combinations(range(m), k) if fair(c)), fair


@pytest.mark.parametrize("by", VOTING)
def test_elections_against_every_committee(by):
    r = np.random.default_rng(0)
    for trial in range(15):
        rankings, k = r.random((3, 7)).tolist(), 1 + trial % 4
        f, best, _ = brute(rankings, k, by)
        chosen = committee(rankings, k, by=by)
        assert len(set(chosen)) == k
        modular = by in ("borda", "sntv", "bloc")
        assert f(chosen) == pytest.approx(best, rel=1e-9) if modular else f(chosen) >= (1 - 1 / math.e) * best


@pytest.mark.parametrize("by", VOTING)
def test_elections_under_bounds(by):
    r = np.random.default_rng(1)
    for _ in range(15):
        rankings, kinds = r.random((3, 7)).tolist(), list("aaaabbc")
        least, most = {"b": 1, "c": 1}, {"a": 2}
        f, best, fair = brute(rankings, 4, by, kinds, least, most)
        chosen = committee(rankings, 4, by=by, kinds=kinds, least=least, most=most)
        assert fair(chosen)
        assert f(chosen) == pytest.approx(best, rel=1e-9) if by in ("borda", "sntv", "bloc") else f(chosen) >= best / 2


def test_gains_fall_along_the_election():
    r = np.random.default_rng(2)
    for by in VOTING:
        rankings = r.random((4, 8)).tolist()
        f, _, _ = brute(rankings, 5, by)
        chosen = committee(rankings, 5, by=by)
        padded = lambda some, by=by, rankings=rankings: value(rankings, some, 5, by)
        gains = [padded(chosen[:n + 1]) - padded(chosen[:n]) for n in range(5)]
        assert all(a >= b - 1e-9 for a, b in itertools.pairwise(gains)) and math.isclose(sum(gains), f(chosen))


def value(rankings, some, k, by):
    worth, weights = VOTING[by](len(rankings[0]), k)
    return sum(sum(w * v for w, v in zip(weights, sorted((place_values(ranking, worth)[i] for i in some), reverse=True),
                                         strict=False)) for ranking in rankings)


def test_one_judge_elects_the_k_best_and_diversity_serves_every_judge():
    values = [0.1, 0.9, 0.5, 0.7]
    for by in ("borda", "bloc", "pav"):
        assert sorted(committee([values], 2, by=by)) == [1, 3]
    assert committee([values, values[::-1]], 1, by="chamberlin_courant") == committee([values, values[::-1]], 1, by="borda")
    for k in range(1, 5):
        assert len(committee([values], k)) == k


def test_ties_and_missing_ranks_share_their_places():
    assert place_values([None, 1.0, None, 2.0], [3.0, 2.0, 1.0, 0.0]) == [0.5, 2.0, 0.5, 3.0]
    assert place_values([1.0, 1.0, 1.0], [2.0, 1.0, 0.0]) == [1.0] * 3


def test_fair_bounds_make_up_for_biased_judges():
    """The paper's message, small: 2 kinds, one of which is seen at half its worth; 20 rankings, 20 of 100 chosen."""
    ratios = {"borda": [], "without": [], "sntv": []}
    for seed in range(5):
        r = np.random.default_rng(seed)
        worth, kinds = r.random(100), [k % 2 for k in range(100)]
        seen = worth * np.where(np.array(kinds) == 1, 0.5, 1.0)
        rankings = (seen * (1 + 0.3 * r.normal(size=(20, 100)))).tolist()
        best = np.sort(worth)[-20:].sum()
        for name, by, most in (("borda", "borda", {0: 10}), ("without", "borda", {}), ("sntv", "sntv", {0: 10})):
            ratios[name].append(worth[committee(rankings, 20, by=by, kinds=kinds, most=most)].sum() / best)
    mean = {name: np.mean(found) for name, found in ratios.items()}
    assert mean["borda"] > 0.95 > mean["without"] and mean["sntv"] < mean["borda"]


@pytest.mark.parametrize("settings, said", [
    (dict(by="bordo"), "did you mean 'borda'"), (dict(k=5), "k=5 winners cannot be had: 4 candidates"),
    (dict(k=0), "k=0 winners"),
    (dict(least={"x": 3}), "at least 3 of 'x' are wanted, and there are 2"),
    (dict(least={"x": 2}, most={"x": 1}), "of which at most 1 may be taken"), (dict(least={"z": 1}), "no candidate"),
    (dict(k=3, most={"x": 1, "y": 1}), "the bounds allow at most 2"), (dict(k=1, least={"x": 1, "y": 1}), "ask for at least 2"),
    (dict(field=None, most={"x": 1}), "need field="), (dict(judges=[]), "at least one ranking")])
def test_impossible_elections(settings, said):
    group = Group("?", [Response(str(k), scores={"reward": k}, meta={"kind": "xxyy"[k]}) for k in range(4)])
    with pytest.raises(ValueError, match=said):
        select.multiwinner(group, **{"k": 2, "judges": ["reward"], "field": "kind", **settings})


def test_winners_stay_in_their_order_with_their_labels():
    group = Group("?", [Response(str(k), scores={"reward": k}) for k in (2, 9, 1, 7)], relevance=[0.0, 1.0, 2.0, 3.0])
    found, = select.multiwinner(group, k=3, judges=["reward"])
    assert [r.text for r in found.responses] == ["2", "9", "7"] and found.relevance == [0.0, 1.0, 3.0]
