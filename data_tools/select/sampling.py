"""Responses drawn by their scores: rejection sampling (RSO) and its pairings, filters of policy filtration (PF-PPO)."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from data_tools.records import Group
from data_tools.rules import keep, paired, place, scores, shuffled

__all__ = ["filtration", "first_round", "rejection", "tournament"]


def accept(values: Sequence[float], *, n: int, beta: float, uniform: Callable[[], float],
           highest: float | None = None) -> tuple[list[int], int]:
    """Places of the accepted values in the order of acceptance, and how many were looked at.

    Passes over what is left, in order; u < exp((r - r_max) / beta) accepts, r_max is the highest at the start of the pass. With
    `highest` there is one pass against it.

    >>> accept([1.0, 3.0, 2.0], n=2, beta=0.0, uniform=lambda: 0.5)                      # the best one of each pass
    ([1, 2], 5)
    """
    pool, accepted, looked = list(range(len(values))), [], 0
    while pool and len(accepted) < n:
        top = max(values[i] for i in pool) if highest is None else highest
        for i in pool:
            looked += 1
            if values[i] >= top or beta > 0 and uniform() < math.exp((values[i] - top) / beta):
                accepted.append(i)
            if len(accepted) == n:
                break
        taken = set(accepted)
        pool = [i for i in pool if i not in taken] if highest is None else []
    return accepted, looked


def expected_acceptance(values: Sequence[float], *, beta: float, highest: float | None = None) -> float:
    """Expected share of the first pass that is accepted: mean exp((r - r_max) / beta).

    >>> round(expected_acceptance([0.0, math.log(2)], beta=1.0), 12)                     # (1/2 + 1) / 2
    0.75
    """
    values = np.asarray(values, dtype=float)
    gap = values - (values.max() if highest is None else highest)
    return float(np.exp(gap / beta).mean() if beta > 0 else (gap >= 0).mean())


def rejection(group: Group, *, n=8, beta=0.5, score="reward", highest=None, seed=0) -> list[Group]:
    """n responses by statistical rejection sampling (RSO), in the order of acceptance.

    accept y with probability exp((r(y) - r_max) / beta);   the target is pi(y) ∝ pi_sft(y) exp(r(y) / beta)

    n           responses to accept; the paper takes 8 of 64
    beta        temperature; 0.5
    highest     a bound on every reward, known beforehand: each response is accepted or not against it, once, and those
                accepted are exact independent draws, fewer than n where luck has it. None: r_max is the highest of those not
                yet accepted, anew in each pass, until n are accepted (as published)
    seed        with the texts decides what is accepted, whatever their order
    Edge        fewer than n responses are an error without `highest`; beta = 0 takes the n best; beta = inf any n. With
                `highest`, a group of which nothing is accepted is removed
    Relations   `meta["acceptance"]` is the share of those looked at, `meta["expected_acceptance"]` what a first pass over all is
                expected to accept, mean exp((r - r_max) / beta); a build tells both. Follow with `first_round`, `tournament` or
                any rule of pairs
    Departs     responses of equal text are two responses
    Reference   Liu et al., RSO, arXiv:2309.06657, algorithm 1

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response(str(r), scores={"r": r}) for r in (1.0, 3.0, 2.0)])
    >>> [r.text for r in rejection(group, n=2, beta=0.0, score="r")[0].responses]
    ['3.0', '2.0']
    """
    values = scores(group, score)
    if not beta >= 0:
        raise ValueError(f"beta should be 0 or more, found {beta}")
    if n < 1 or (highest is None and n > len(values)):
        raise ValueError(f"{place(group)}cannot accept n={n} of {len(values)} responses: sample more, or lower n")
    if highest is not None and max(values, default=highest) > highest:
        raise ValueError(f"{place(group)}a score of {max(values)} is above highest={highest}, which should bound them all")
    order, random = shuffled(group, seed, "rejection")
    accepted, looked = accept([values[i] for i in order], n=n, beta=beta, uniform=random.random, highest=highest)
    if not accepted:
        return []
    found = keep(group, [order[i] for i in accepted])
    return [replace(found, meta={**found.meta, "acceptance": len(accepted) / looked,
                                 "expected_acceptance": expected_acceptance(values, beta=beta, highest=highest)})]


def count_acceptance(groups: Sequence[Group]) -> dict[str, float]:
    """Sums over the groups that are left."""
    return {"groups left": len(groups)} | {key: math.fsum(g.meta[key] for g in groups) for key in
                                           ("acceptance", "expected_acceptance")}


def told_acceptance(counts: Mapping[str, float]) -> list[str]:
    """What a build says of `rejection`: acceptance falls to nothing where beta is small beside the spread of the scores."""
    groups = int(counts["groups left"])
    seen, expected = (counts[key] / max(groups, 1) for key in ("acceptance", "expected_acceptance"))
    return [f"{seen:.1%} of the responses looked at were accepted, {expected:.1%} are expected of a first pass: means of "
            f"{groups:,} groups"]


rejection.count, rejection.told = count_acceptance, told_acceptance


def first_round(group: Group, *, score="reward", seed=0) -> list[Group]:
    """Disjoint random pairs, labelled by the score (RSO's first-round ranking).

    seed        with the texts decides who meets whom
    Edge        an odd response is left out; equal scores make no pair
    Relations   k responses of different scores: k // 2 pairs
    Reference   Liu et al., RSO, arXiv:2309.06657, section 3.3

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response(str(r), scores={"r": r}) for r in (1.0, 2.0, 3.0, 4.0, 5.0)])
    >>> len(first_round(group, score="r"))
    2
    """
    values = scores(group, score)
    order, _ = shuffled(group, seed, "first_round")
    return paired(group, _met(order, values)[0], values, "first_round")


def tournament(group: Group, *, score="reward", seed=0) -> list[Group]:
    """A knock-out tournament, each game a pair (RSO's tournament ranking).

    seed        with the texts decides who meets whom
    Edge        an odd response goes on without a game; of two equal scores the first drawn goes on and there is no pair
    Relations   k responses of different scores: k - 1 pairs, and all but the best lose once
    Reference   Liu et al., RSO, arXiv:2309.06657, section 3.3

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response(str(r), scores={"r": r}) for r in (1.0, 2.0, 3.0, 4.0, 5.0)])
    >>> sorted(g.responses[1].text for g in tournament(group, score="r"))
    ['1.0', '2.0', '3.0', '4.0']
    """
    values = scores(group, score)
    left, chosen = shuffled(group, seed, "tournament")[0], []
    while len(left) > 1:
        games, left = _met(left, values)
        chosen += games
    return paired(group, chosen, values, "tournament")


def _met(players: Sequence[int], values: Sequence[float]) -> tuple[list[tuple[int, int]], list[int]]:
    """The decided games of neighbours, and who goes on."""
    games = [(a, b) if values[a] >= values[b] else (b, a) for a, b in zip(players[::2], players[1::2], strict=False)]
    return [(a, b) for a, b in games if values[a] > values[b]], [a for a, _ in games] + list(players[len(games) * 2:])


# -------------------------------------------------------------------------------------------------- policy filtration
def shares(values: Sequence[float], *, best: float, others: float, worst: float) -> list[float]:
    """The probability of drawing each response.

    >>> shares([1.0, 3.0, 2.0], best=2, others=1, worst=1)
    [0.25, 0.5, 0.25]
    """
    if min(best, others, worst) < 0 or not best + worst > 0:
        raise ValueError(f"weights should be 0 or more, and best or worst positive; found best={best}, others={others}, "
                         f"worst={worst}")
    weights = [others] * len(values)
    weights[values.index(min(values))] = worst
    weights[values.index(max(values))] = best
    total = sum(weights)
    return [w / total for w in weights] if total else [1.0] * len(values)


def filtration(group: Group, *, best=0.4, others=0.1, worst=0.1, n=None, score="reward", seed=0) -> list[Group]:
    """Responses drawn with replacement by their rank: keep those whose reward can be trusted (PF-PPO).

    P(y) ∝ best for argmax r, worst for argmin r, others for the rest

    best, others, worst   0.4, 0.1, 0.1: best-random; 1, 0, 1: best-worst; 1, 0, 0: best of N; all equal: the bootstrap
    n           responses to draw; None is as many as there are
    seed        with the texts decides what is drawn, whatever their order
    Edge        the first of equally good ones is the best; one response is the best and the worst; a response may come twice
    Relations   `linearity` says which weights to take: those under which the reward explains the truth best
    Departs     the best and worst are of the prompt, as the paper says; verl's are of the whole batch
    Reference   Shen & Zhang, Policy Filtration in RLHF, arXiv:2409.06957

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response(str(r), scores={"r": r}) for r in (1.0, 3.0, 2.0)])
    >>> {r.text for r in filtration(group, best=1, others=0, worst=1, score="r", n=50)[0].responses} == {"1.0", "3.0"}
    True
    """
    values = scores(group, score)
    if not values:
        return []
    order, random = shuffled(group, seed, "filtration")
    weights = shares(values, best=best, others=others, worst=worst)
    drawn = random.choices(order, [weights[i] for i in order], k=len(values) if n is None else n)
    return [keep(group, drawn)]


def linearity(groups: Iterable[Group], *, truth, best=0.4, others=0.1, worst=0.1, score="reward", bins=None) -> float:
    """How well the reward explains the truth on what `filtration` would keep.

    R^2 = 1 - SS_res / SS_tot of the linear fit of the truth on the reward, each response weighted by its P of being drawn

    truth       the score that holds the true quality, on a held-out set
    best, others, worst   as in `filtration`
    bins        the truth is averaged in so many bins of equal weight first; None is not at all
    Edge        one response, or a truth or a reward without spread: an error
    Relations   the exact expectation over the draws; all weights equal is the R^2 of the unfiltered set
    Reference   Shen & Zhang, Policy Filtration in RLHF, arXiv:2409.06957

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response(str(r), scores={"r": r, "t": t}) for r, t in ((0.0, 0.0), (1.0, 9.0), (2.0, 2.0))])
    >>> round(linearity([group], truth="t", best=1, others=0, worst=1, score="r"), 12)        # the middle one is off the line
    1.0
    """
    rows = []
    for group in groups:
        values = scores(group, score)
        rows += zip(values, scores(group, truth), shares(values, best=best, others=others, worst=worst) if values else (),
                    strict=True)
    x, y, w = np.array(rows).reshape(-1, 3).T
    if bins is not None:
        order = np.argsort(x, kind="stable")
        bin_of = np.empty(len(x), int)
        bin_of[order] = np.minimum((np.cumsum(w[order]) - w[order] / 2) / w.sum() * bins, bins - 1)
        mass = np.bincount(bin_of, w, bins)
        x, y = (np.bincount(bin_of, w * v, bins)[mass > 0] / mass[mass > 0] for v in (x, y))
        w = mass[mass > 0]
    x, y = (v - np.average(v, weights=w) for v in (x, y)) if w.sum() else (x, y)
    spread = (w * x * x).sum() * (w * y * y).sum()
    if not spread > 0:
        raise ValueError(f"no line fits: on the {len(rows)} responses, {score!r} or {truth!r} is the same throughout")
    return float((w * x * y).sum() ** 2 / spread)
