"""Sampling by scores: rejection sampling (RSO), differential information, policy filtration, each against exact distributions."""
import itertools
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare, kstest, norm

from data_tools import select
from data_tools.formats import dump
from data_tools.pipeline.config import make
from data_tools.pipeline.driver import build
from data_tools.records import Group, Response
from data_tools.select.sampling import accept, expected_acceptance, linearity, shares

REWARDS = {"a": 0.0, "b": 0.5, "c": 1.0, "d": 2.0}
POLICY = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}


def pool(name, texts, rewards=REWARDS):
    return Group(f"prompt {name}", [Response(t, scores={"reward": rewards[t]}) for t in texts])


def said(group):
    return tuple(r.text for r in group.responses)


def fits(counts, probabilities):
    """p-value of the counts under a distribution over all outcomes."""
    assert set(counts) <= {k for k, p in probabilities.items() if p > 0}
    assert sum(probabilities.values()) == pytest.approx(1, rel=1e-9)
    total, keys = sum(counts.values()), [k for k, p in probabilities.items() if p > 0]
    return chisquare([counts.get(k, 0) for k in keys], [total * probabilities[k] for k in keys]).pvalue


def exact(values, n, beta):
    """P(accepted, in order) of the published passes over a uniformly random order: every way is walked."""
    found = Counter()

    def walk(waiting, left, top, accepted, p):
        """`waiting` are still to be looked at in this pass, `left` were looked at and stayed."""
        if len(accepted) == n:
            found[accepted] += p
            return
        if not waiting:
            return walk(left, (), max(values[i] for i in left), accepted, p)
        i, rest = waiting[0], waiting[1:]
        yes = math.exp((values[i] - top) / beta)
        walk(rest, left, top, (*accepted, i), p * yes)
        if yes < 1:
            walk(rest, (*left, i), top, accepted, p * (1 - yes))

    orders = list(itertools.permutations(range(len(values))))
    for order in orders:
        walk(order, (), max(values), (), 1 / len(orders))
    return found


# -------------------------------------------------------------------------------------------------------------------- RSO
def test_the_published_passes_have_their_exact_distribution():
    want = {tuple("abcd"[i] for i in key): p for key, p in exact(list(REWARDS.values()), 2, 0.7).items()}
    counts = Counter(said(select.rejection(pool(k, "abcd"), n=2, beta=0.7)[0]) for k in range(8000))
    assert len(want) == 12 and fits(counts, want) > 1e-3


def test_against_a_known_bound_what_is_accepted_is_the_tilted_policy():
    """Responses drawn from an enumerable policy; pi(y) proportional to p(y) exp(r(y) / beta) by hand."""
    weight = {t: p * math.exp(REWARDS[t] / 0.8) for t, p in POLICY.items()}
    tilted = {t: w / sum(weight.values()) for t, w in weight.items()}
    r, counts, firsts, empty = random.Random(0), Counter(), Counter(), 0
    for k in range(6000):
        drawn = r.choices(list(POLICY), list(POLICY.values()), k=5)
        found = select.rejection(pool(k, drawn), n=5, beta=0.8, highest=2.0)
        empty += not found
        counts.update(t for g in found for t in said(g))
        firsts.update(said(g)[0] for g in found)
    assert fits(counts, tilted) > 1e-3 and fits(firsts, tilted) > 1e-3
    rate = sum(p * math.exp((REWARDS[t] - 2.0) / 0.8) for t, p in POLICY.items())          # of one response
    n = 6000 * 5
    assert abs(counts.total() - n * rate) < 4 * math.sqrt(n * rate * (1 - rate))
    assert abs(empty - 6000 * (1 - rate) ** 5) < 4 * math.sqrt(6000 * (1 - rate) ** 5)


def test_a_large_pool_without_a_bound_comes_near_the_tilted_policy():
    weight = {t: p * math.exp(REWARDS[t] / 0.8) for t, p in POLICY.items()}
    r, counts = random.Random(1), Counter()
    for _ in range(4000):
        drawn = r.choices(list(POLICY), list(POLICY.values()), k=64)
        counts[drawn[accept([REWARDS[t] for t in drawn], n=1, beta=0.8, uniform=r.random)[0][0]]] += 1
    assert fits(counts, {t: w / sum(weight.values()) for t, w in weight.items()}) > 1e-3


def test_expected_acceptance_is_that_of_the_first_pass():
    values = list(REWARDS.values())
    want = expected_acceptance(values, beta=0.7)
    assert want == pytest.approx(sum(math.exp((v - 2.0) / 0.7) for v in values) / 4, rel=1e-12)
    r, accepted = random.Random(0), 0
    for _ in range(5000):
        accepted += len(accept(values, n=4, beta=0.7, uniform=r.random, highest=2.0)[0])
    assert abs(accepted / 20000 - want) < 4 * math.sqrt(want * (1 - want) / 20000)
    assert expected_acceptance(values, beta=0) == 0.25 and expected_acceptance(values, beta=math.inf) == 1.0


def test_a_build_tells_the_expected_acceptance_beside_the_observed(tmp_path, monkeypatch):
    """Against a bound there is one pass over all, so that the two agree within chance."""
    monkeypatch.chdir(tmp_path)
    r = random.Random(0)
    groups = [Group(f"q{k}", [Response(f"{k} {j}", scores={"r": r.uniform(0, 2)}) for j in range(40)]) for k in range(60)]
    dump(groups, "groups.jsonl")
    settings = {"score": "r", "beta": 0.7, "seed": 0}

    def told(**more):
        step = build(make({"source": "groups.jsonl", "out": "out", "cache": "cache", "shard": 9, "stages": [
            {"select": {"rejection": {**settings, **more}}}]}), overwrite=True).steps[1]
        assert "means of 60 groups" in step.said[-1]
        return [float(x) / 100 for x in re.findall(r"([0-9.]+)%", step.said[-1])]

    seen, expected = told(n=40, highest=2.0)
    exact = [expected_acceptance([x.scores["r"] for x in g.responses], beta=0.7, highest=2.0) for g in groups]
    assert expected == pytest.approx(sum(exact) / 60, abs=5e-4)
    assert abs(seen - expected) < 4 * math.sqrt(expected * (1 - expected) / 2400)
    seen, _ = told(n=30)
    mine = [select.rejection(g, n=30, **settings)[0].meta["acceptance"] for g in groups]
    assert seen == pytest.approx(sum(mine) / 60, abs=5e-4)


def test_limits_of_beta():
    for k in range(30):
        assert said(select.rejection(pool(k, "abcd"), n=3, beta=0.0)[0]) == ("d", "c", "b")
    counts = Counter(said(select.rejection(pool(k, "abcd"), n=2, beta=math.inf)[0]) for k in range(3000))
    assert fits(counts, dict.fromkeys(itertools.permutations("abcd", 2), 1 / 12)) > 1e-3
    assert said(select.rejection(pool(0, "ad"), n=1, beta=1e-300)[0]) == ("d",)            # no overflow
    assert {said(select.rejection(pool(0, "abcd"), n=4, beta=b)[0])[0] for b in (0.0, 1e-3)} == {"d"}


def test_all_are_accepted_where_as_many_are_wanted_and_the_share_looked_at_is_told():
    found, = select.rejection(pool(0, "abcd"), n=4, beta=0.2)
    assert sorted(said(found)) == list("abcd") and 0 < found.meta["acceptance"] < 1
    assert select.rejection(pool(0, "abcd"), n=2, beta=math.inf)[0].meta["acceptance"] == 1.0


def test_equal_texts_are_several_responses():
    assert said(select.rejection(pool(0, "aad"), n=3)[0]).count("a") == 2


@pytest.mark.parametrize("settings, said", [
    (dict(n=5), "cannot accept n=5 of 4 responses: sample more"), (dict(n=0), "cannot accept n=0"),
    (dict(n=1, beta=-1), "beta should be 0 or more"), (dict(n=1, beta=math.nan), "beta should be 0 or more"),
    (dict(n=1, highest=1.5), "a score of 2.0 is above highest=1.5")])
def test_wrong_settings_of_rejection(settings, said):
    with pytest.raises(ValueError, match=said):
        select.rejection(pool(0, "abcd"), **settings)


def test_pairings():
    for k in range(50):
        group = pool(k, "abcd")
        pairs, games = select.first_round(group), select.tournament(group)
        assert len(pairs) == 2 and sorted(t for g in pairs for t in said(g)) == list("abcd")
        assert sorted(said(g)[1] for g in games) == ["a", "b", "c"] and len(games) == 3
    opponents = Counter(next(said(g)[1] for g in select.first_round(pool(k, "abcd")) if said(g)[0] == "d") for k in range(1500))
    assert fits(opponents, dict.fromkeys("abc", 1 / 3)) > 1e-3
    assert [len(select.tournament(pool(0, "abcd"[:size]))) for size in range(5)] == [0, 0, 1, 2, 3]


# ------------------------------------------------------------------------------------------- differential information
def test_the_rejected_response_has_its_exact_distribution():
    """y_w is uniform over the group; y_l of the other three by the sampler for rewards -a and temperature 1 / beta."""
    want, beta = {}, 0.9
    for w in "abcd":
        others = [t for t in "abcd" if t != w]
        for (i,), p in exact([-REWARDS[t] for t in others], 1, 1 / beta).items():
            want[w, others[i]] = p / 4
    counts = Counter(said(select.differential_information(pool(k, "abcd"), log_ratio="reward", beta=beta)[0])
                     for k in range(6000))
    assert fits(counts, want) > 1e-3


def test_differential_information_of_equal_texts_and_small_groups():
    assert select.differential_information(pool(0, "aa"), log_ratio="reward") == []
    assert select.differential_information(pool(0, "a"), log_ratio="reward") == []
    with pytest.raises(ValueError, match="beta should be positive"):
        select.differential_information(pool(0, "ab"), log_ratio="reward", beta=0)


@pytest.mark.slow
def test_dpo_on_such_pairs_recovers_the_wanted_policy():
    """The claim small: 12 arms, y_w ~ pi_ref always preferred; the optimum of DPO (a Bradley-Terry fit) is pi*."""
    from scipy.optimize import minimize
    r, beta, arms = np.random.default_rng(0), 0.5, 12
    reference, wanted = r.dirichlet(np.full(arms, 3.0)), r.dirichlet(np.full(arms, 1.5))
    a, c = np.log(wanted / reference), random.Random(0)
    rewards = dict(zip(range(arms), a, strict=True))
    wins, control = np.zeros((2, arms, arms))
    for k in range(12000):
        drawn = c.choices(range(arms), reference, k=48)
        group = Group(str(k), [Response(str(y), scores={"reward": rewards[y]}) for y in drawn])
        for pair in select.differential_information(group, log_ratio="reward", beta=beta):
            wins[tuple(int(t) for t in said(pair))] += 1
        control[drawn[0], c.randrange(arms)] += 1

    def divergence(counts):
        def loss(x):
            gap = beta * (x[:, None] - x)
            e = counts * -1 / (1 + np.exp(gap))
            return (counts * np.logaddexp(0, -gap)).sum(), beta * (e.sum(1) - e.sum(0))
        x = minimize(loss, np.zeros(arms), jac=True).x
        policy = reference * np.exp(x - x.max())
        return float((wanted * np.log(wanted / (policy / policy.sum()))).sum())
    assert divergence(wins) < 0.03 and divergence(control) > 0.2


# ------------------------------------------------------------------------------------------------- policy filtration
def test_filtration_draws_by_its_shares():
    by = {"best": 0.4, "others": 0.1, "worst": 0.1}
    want = {"d": 0.4 / 0.7, "c": 0.1 / 0.7, "b": 0.1 / 0.7, "a": 0.1 / 0.7}
    counts = Counter(t for k in range(1500) for t in said(select.filtration(pool(k, "abcd"), **by)[0]))
    assert counts.total() == 6000 and fits(counts, want) > 1e-3
    counts = Counter(t for k in range(1000) for t in said(select.filtration(pool(k, "abcd"), best=1, others=0, worst=1)[0]))
    assert fits(counts, {"a": 0.5, "d": 0.5}) > 1e-3
    assert said(select.filtration(pool(0, "abcd"), best=1, others=0, worst=0, n=3)[0]) == ("d",) * 3


def test_shares():
    assert shares([1.0], best=0.4, others=0.1, worst=0.1) == [1.0]
    assert shares([2.0, 2.0, 1.0], best=3, others=1, worst=0) == [0.75, 0.25, 0.0]
    assert shares([5.0, 1.0, 2.0], best=1, others=1, worst=1) == [1 / 3] * 3
    for bad in (dict(best=0, others=1, worst=0), dict(best=1, others=-1, worst=0)):
        with pytest.raises(ValueError, match="weights should be"):
            shares([1.0, 2.0], **bad)


def noisy(seed, count=300, size=7):
    """Rewards that are wrong in the middle of each group: the truth is lost there."""
    r, groups = np.random.default_rng(seed), []
    for _ in range(count):
        x = np.sort(r.normal(size=size))
        noise = r.normal(size=size) * np.where(np.isin(np.arange(size), (0, size - 1)), 0.1, 2.0)
        groups.append(Group("?", [Response("", scores={"reward": a, "truth": a + b}) for a, b in zip(x, noise, strict=True)]))
    return groups


def test_linearity_is_the_weighted_r2_of_scikit_learn():
    from sklearn.linear_model import LinearRegression
    groups = noisy(0, 40)
    x, y = (np.array([r.scores[s] for g in groups for r in g.responses]) for s in ("reward", "truth"))
    for by in (dict(best=0.4, others=0.1, worst=0.1), dict(best=1, others=0, worst=1), dict(best=1, others=1, worst=1)):
        w = np.concatenate([shares([r.scores["reward"] for r in g.responses], **by) for g in groups])
        fit = LinearRegression().fit(x[:, None], y, w)
        assert linearity(groups, truth="truth", **by) == pytest.approx(fit.score(x[:, None], y, w), rel=1e-9)


def test_linearity_prefers_the_filter_that_leaves_out_where_rewards_are_wrong():
    groups = noisy(1)
    best_worst = linearity(groups, truth="truth", best=1, others=0, worst=1)
    best_random = linearity(groups, truth="truth")
    everything = linearity(groups, truth="truth", best=1, others=1, worst=1)
    assert best_worst > 0.95 > best_random > everything
    assert everything < linearity(groups, truth="truth", best=1, others=1, worst=1, bins=10) <= 1


def test_linearity_without_spread_is_an_error():
    with pytest.raises(ValueError, match="no line fits: on the 3 responses"):
        linearity([Group("?", [Response("", scores={"reward": 1.0, "truth": t}) for t in (0.0, 1.0, 2.0)])], truth="truth")
    with pytest.raises(ValueError, match="no line fits"):
        linearity([], truth="truth")


def test_the_random_order_counts_equal_texts_as_often_as_they_come():
    from data_tools.rules import shuffled
    firsts = Counter()
    for k in range(2000):
        group = pool(k, "aaab")
        firsts[group.responses[shuffled(group, 0, "x")[0][0]].text] += 1
    assert fits(firsts, {"a": 0.75, "b": 0.25}) > 1e-3


def test_uniforms_are_uniform_over_prompts():
    """What chance rests on: the generator of a prompt, over many prompts."""
    from data_tools.rules import shuffled
    drawn = [shuffled(pool(k, "ab"), 0, "rejection")[1].random() for k in range(2000)]
    assert kstest(drawn, "uniform").pvalue > 1e-3 and abs(norm.ppf(np.mean(np.array(drawn) < 0.5))) < 0.1
