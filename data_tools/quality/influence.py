"""Which training pairs a reward model is wrong about, and which pull it the wrong way: a Bradley-Terry head is fitted on features
of the pairs, of a trained model's last layer or of their words, and the pairs are ranked by loss, gradients or influence.

    found = ranked(load("pairs.jsonl"), queries=load("clean.jsonl"))              # of most harm first
    findings.save(found, "influence.jsonl")
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from sklearn.decomposition import TruncatedSVD

from data_tools.columns import nearest
from data_tools.describe import content
from data_tools.labels import wins_of
from data_tools.quality.check import about
from data_tools.quality.findings import Finding
from data_tools.quality.noise import extremes, rarity, sampled, tallied, weighed
from data_tools.records import Group
from data_tools.rules import again

__all__ = ["Features", "RANKINGS", "bradley_terry", "differences", "gradient_dot", "influence", "ranked", "self_influence",
           "word_features"]

Features = Callable[[Sequence[tuple[Group, int]]], np.ndarray]          # responses by their number -> (N, D)
NOTHING = "no group has a preferred response: influence needs pairs, or responses with different labels"


# ------------------------------------------------------------------------------------------------------------ features
def word_features(groups: Iterable[Group], *, size: int = 128, sample: int = 20_000, seed: int = 0) -> Features:
    """The word model of `noise.crossfit`, in the `size` directions in which preferred and other responses differ most.

    sample      how many groups decide the directions, drawn by their content
    """
    drawn = sampled(groups, sample, seed)
    if not drawn:
        raise ValueError(NOTHING)
    found = tallied([one[side] for side in (0, 1) for one in drawn])
    idf = rarity(found)
    known = np.flatnonzero(idf)
    if not len(known):
        raise ValueError(f"no two responses of the {len(drawn):,} groups share a word, so that their words say nothing: name a "
                         "trained model")
    found = weighed(found, idf)[:, known]
    difference = found[:len(drawn)] - found[len(drawn):]
    directions = TruncatedSVD(min(size, *difference.shape), random_state=seed).fit(difference)
    return lambda rows: directions.transform(weighed(tallied([content(g.responses[k].text) for g, k in rows]), idf)[:, known])


def compared(groups: Iterable[Group]) -> Iterator[tuple[Group, int, int]]:
    """The groups in which a response is preferred, with the one that wins most and the one that wins least."""
    return ((group, i, j) for group in groups for i, j in extremes(wins_of(group)))


def differences(groups: Iterable[Group], features: Features) -> np.ndarray:
    """(N, D) features of the response that wins most less those of the one that wins least, of each group in which one is
    preferred."""
    rows = ((group, k) for group, *both in compared(groups) for k in both)
    read = map(features, iter(lambda: list(islice(rows, 512)), []))
    found = [both[::2].astype(float) - both[1::2] for both in read]
    if not found:
        raise ValueError(NOTHING)
    return np.concatenate(found)


# --------------------------------------------------------------------------------------------------------- the rankings
def bradley_terry(difference: np.ndarray, *, ridge: float = 1.0) -> np.ndarray:
    """The (D) weights w with the least sum_i -log sigma(d_i w) + ridge |w|^2 / 2, for differences d = phi_w - phi_l of the last
    layer's features of preferred and other responses (N, D)."""
    loss = lambda w: (-log_expit(difference @ w).sum() + ridge * w @ w / 2, ridge * w - difference.T @ expit(-difference @ w))
    return minimize(loss, np.zeros(difference.shape[1]), jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 1e-15}).x


def gradients(difference: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N, D) gradients of -log sigma(d w) in w: -(1 - sigma(d w)) d."""
    return -expit(-difference @ weights)[:, None] * difference


def hessian(difference: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    p = expit(difference @ weights)
    return (difference * (p * (1 - p))[:, None]).T @ difference + ridge * np.eye(difference.shape[1])


def gradient_dot(difference: np.ndarray, query: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N) harm of each training pair to the query pairs by the last layer's gradients alone: - g_query g_i.

    difference  (N, D) and query (M, D): features of the preferred response less those of the other; weights (D) the head's
    Gradient    -
    Edge        a pair without difference has 0
    Relations   `influence` with the identity for the Hessian; positive: a step on the pair raises the mean loss of the queries
    Departs     -
    Reference   Grosse et al., Studying LLM generalization with influence functions, arXiv:2308.03296

    >>> gradient_dot(np.array([[1.0], [-1.0]]), np.array([[1.0]]), np.zeros(1)).tolist()
    [-0.25, 0.25]
    """
    return -gradients(difference, weights) @ gradients(query, weights).mean(0)


def influence(difference: np.ndarray, query: np.ndarray, weights: np.ndarray, *, ridge: float = 1.0) -> np.ndarray:
    """(N) change of the mean query loss when a training pair counts once more: - g_query H^-1 g_i, with the exact Hessian
    H = sum sigma (1 - sigma) d d^T + ridge I of the head.

    ridge       of the fit (`bradley_terry`); more of it damps
    Edge        ridge = 0 needs N pairs of full rank
    Relations   leaving the pair out changes the loss by about minus this
    Departs     -
    Reference   Grosse et al., arXiv:2308.03296, eq. 5, for the last layer alone
    """
    back = np.linalg.solve(hessian(difference, weights, ridge), gradients(query, weights).mean(0))
    return -gradients(difference, weights) @ back


def self_influence(difference: np.ndarray, weights: np.ndarray, *, ridge: float = 1.0) -> np.ndarray:
    """(N) g_i H^-1 g_i: how much a pair's own loss hangs on its presence; outliers and flips have much of it."""
    g = gradients(difference, weights)
    return (g * np.linalg.solve(hessian(difference, weights, ridge), g.T).T).sum(1)


# ------------------------------------------------------------------------------------------------------------- findings
RANKINGS: dict[str, tuple[Callable[..., np.ndarray], str]] = {
    "influence": (lambda d, q, w, ridge: influence(d, q, w, ridge=ridge),
                  "counted once more, the pair changes the mean loss of the queries by {:+.3g}"),
    "gradient_dot": (lambda d, q, w, ridge: gradient_dot(d, q, w),
                     "a step on the pair changes the mean loss of the queries by {:+.3g} times its size"),
    "self_influence": (lambda d, q, w, ridge: self_influence(d, w, ridge=ridge),
                       "counted once more, the pair changes its own loss by -{:.3g}"),
    "loss": (lambda d, q, w, ridge: -log_expit(d @ w), "its loss is {:.3g}")}
NEED_QUERIES = ("influence", "gradient_dot")


def ranked(groups: Iterable[Group], *, queries: Iterable[Group] | None = None, features: Features | None = None,
           by: str | None = None, ridge: float = 1.0, most: int = 100, seed: int = 0) -> Iterator[Finding]:
    """The groups whose labels do most harm, the worst first; before them how well the head knows the labels.

    queries     trusted pairs: the harm is what they suffer; those that the model gets wrong are the most telling
    features    of the last layer of a model (`rewards.trained.features`); None: `word_features`
    by          a name of RANKINGS; None: influence where there are queries, else loss
    ridge       of the head, which is fitted anew on the groups
    most        how many are listed
    seed        of `word_features`

    A finding is `sure` by the share of the groups that do less harm, which is no probability. Its kind is the name of the ranking
    and its repair to drop the group; {"influence": "flip"} turns it round. A group counts as one pair, of the response that wins
    most and the one that wins least. Memory: the features of all pairs, some 24 bytes each.
    """
    by = by or ("loss" if queries is None else "influence")
    if by not in RANKINGS:
        raise ValueError(f"there is no ranking {by!r}{nearest(by, RANKINGS)}; known: {', '.join(RANKINGS)}")
    if queries is None and by in NEED_QUERIES:
        raise ValueError(f"the ranking by {by} says which groups hurt other pairs: name these (queries), or rank by loss")
    if not ridge > 0:
        raise ValueError(f"ridge should be above 0, or nothing may decide between heads; found {ridge}")
    return _ranked(again(groups), queries, features, by, ridge, most, seed)


def _ranked(groups, queries, features, by, ridge, most, seed) -> Iterator[Finding]:
    features = features or word_features(groups, seed=seed)
    difference, query = differences(groups, features), None if queries is None else differences(queries, features)
    head = bradley_terry(difference, ridge=ridge)
    score, message = RANKINGS[by]
    harm = score(difference, query, head, ridge)
    order = [int(k) for k in np.argsort(-harm, kind="stable")[:most] if harm[k] > 0]
    knows = f"{(difference @ head > 0).mean():.1%} of the {len(difference):,} groups with a preferred response"
    knows += "" if query is None else f" and {(query @ head > 0).mean():.1%} of {len(query):,} queries"
    yield Finding("ranking", f"a head on {len(head)} features orders {knows} as their labels do; {len(order):,} groups are "
                  f"listed, by {by}")
    place, wanted, found = 0, {k: rank for rank, k in enumerate(order)}, {}
    for number, group in enumerate(groups, 1):
        for _ in compared([group]):
            if place in wanted:
                found[wanted[place]] = about(group, number, by.replace("_", " "), message.format(harm[place]),
                                             1 - wanted[place] / len(harm), "drop")
            place += 1
    yield from (found[rank] for rank in sorted(found))
