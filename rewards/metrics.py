"""How good is a reward: pure functions on arrays. No model, no files, no page.

Pairs are written with the preferred response first. `margin` (P) says how far the model prefers it: s_1 - s_2 for
scores, log(p / (1 - p)) for a comparison that says p = P(first preferred). Positive is right, 0 is a tie, NaN is not
scored. `label` (P) is the P(first preferred) of the annotators, 1/2 where they tie. `group` (P) numbers the groups,
which is what intervals resample: the pairs of one prompt are not independent.

NaN is counted under "unscored" by everything that leaves it out. What cannot be said is None (no pair, no interval).
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, gammaln
from scipy.special import logit as log_odds
from scipy.stats import binomtest, kendalltau, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, ndcg_score

from data_tools.labels import wins_of
from data_tools.records import Group

__all__ = ["STYLE", "Pairs", "accuracy", "agreement", "best_of_n", "best_of_n_kl", "best_of_n_regret", "by_slice",
           "calibration", "consistency", "cyclic_triples", "labelled_pairs", "length_bias", "margins_of_scores",
           "margins_of_wins", "over_optimisation", "pair_margins", "position_bias", "ranking", "relevance_of",
           "relative_difference", "share", "style_control", "style_counts", "temperature", "worst"]

CERTAIN = 1e-6                                                # a comparison's p is kept this far from 0 and 1


# ------------------------------------------------------------------------------------------------------------- margins
class Pairs(NamedTuple):
    """Every compared pair of some groups once, the preferred response first; ties in the order of the rows."""
    group: np.ndarray                                         # (P) which group
    first: np.ndarray                                         # (P) which response of it
    second: np.ndarray
    label: np.ndarray                                         # (P) P(first preferred), 1/2 to 1


def labelled_pairs(groups: Sequence[Group]) -> Pairs:
    """The pairs that somebody compared.

    >>> from data_tools.records import Response
    >>> pairs = labelled_pairs([Group("?", [Response("a"), Response("b"), Response("c")], relevance=[0, 1, 0])])
    >>> [(int(i), int(j), float(p)) for i, j, p in zip(pairs.first, pairs.second, pairs.label)]
    [(1, 0, 1.0), (0, 2, 0.5), (1, 2, 1.0)]
    """
    found = [(n, i, j, w) if w >= 0.5 else (n, j, i, 1 - w)
             for n, group in enumerate(groups) for wins in [wins_of(group)]
             for i, j in combinations(range(len(wins)), 2) if (w := wins[i][j]) is not None]
    columns = zip(*found, strict=True) if found else ([], [], [], [])
    return Pairs(*(np.array(c, dtype=kind) for c, kind in zip(columns, (int, int, int, float), strict=True)))


def margins_of_scores(scores: Sequence[float]) -> np.ndarray:
    """(K) scores to (K, K) margins s_i - s_j."""
    scores = np.asarray(scores, dtype=float)
    return scores[:, None] - scores[None, :]


def margins_of_wins(wins: Sequence[Sequence[float | None]]) -> np.ndarray:
    """(K, K) probabilities P(i preferred to j), None or NaN where the model does not know, to margins log(p / (1 - p)).

    A p of 0 or 1 counts as 1e-6 away from it, which is a margin of 13.8.

    >>> margins_of_wins([[0.5, 0.75], [0.25, None]]).round(4).tolist()                  # log 3
    [[0.0, 1.0986], [-1.0986, nan]]
    """
    return log_odds(np.clip(np.array(wins, dtype=float), CERTAIN, 1 - CERTAIN))


def pair_margins(pairs: Pairs, margins: Sequence[np.ndarray]) -> np.ndarray:
    """(P) margins of the pairs, from one (K, K) matrix for each group."""
    return np.array([margins[n][i, j] for n, i, j in zip(pairs.group, pairs.first, pairs.second, strict=True)], dtype=float)


def relevance_of(group: Group) -> list[float] | None:
    """Grades for ranking metrics: the relevance, or else the mean of P(i preferred to j) over the other responses.
    None where a response has no grade."""
    grades = group.relevance
    if grades is None and group.wins is not None and len(group.wins) > 1:
        rows = [[w for j, w in enumerate(row) if i != j] for i, row in enumerate(group.wins)]
        grades = [None if None in row else sum(row) / len(row) for row in rows]
    return None if grades is None or None in grades else list(grades)


# ------------------------------------------------------------------------------------------------------------ accuracy
def share(right: float, of: int) -> dict:
    """A share with Wilson's 95 % interval.

    >>> share(50, 100)["interval"]                            # centre (50 + z^2/2) / (100 + z^2), z = 1.96
    [0.4038, 0.5962]
    """
    if not of:
        return {"right": 0, "of": 0, "share": None, "interval": None}
    low, high = binomtest(right, of).proportion_ci(method="wilson")
    return {"right": right, "of": of, "share": right / of, "interval": [round(float(low), 4), round(float(high), 4)]}


def resampled(values: Sequence[float], group: Sequence[Hashable], *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """(draws) means of the values, each of as many groups drawn with replacement (the bootstrap over groups)."""
    _, member = np.unique(np.asarray(group), return_inverse=True)
    total, count = np.bincount(member, weights=values), np.bincount(member)
    rng, block = np.random.default_rng(seed), max(1, 10 ** 6 // len(count))                # some 8 MB at a time
    picks = (rng.integers(len(count), size=(min(block, draws - done), len(count))) for done in range(0, draws, block))
    return np.concatenate([total[p].sum(1) / count[p].sum(1) for p in picks])


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 % of the samples."""
    return [float(v) for v in np.quantile(samples, [0.025, 0.975])]


def accuracy(margin, group=None, *, draws: int = 1000, seed: int = 0) -> dict:
    """The share of pairs whose preferred response has the strictly higher score.

    accuracy = #(m > 0) / #scored

    draws, seed   resamples of the bootstrap over groups
    Edge        m = 0 is wrong and counted under "tied"; NaN is left out of `share` and counted under "unscored";
                `of_all` counts it as wrong, so a model that abstains on what is hard does not gain
    Relations   `interval` is Wilson's, for independent pairs; `interval_groups` resamples groups and is the one to trust
                when groups have several pairs
    Departs     -
    Reference   Lambert et al., RewardBench, arXiv:2403.13787 (strict ties); Wilson 1927

    >>> found = accuracy([1.0, -2.0, 0.0, float("nan")])
    >>> found["share"], found["of_all"], found["tied"], found["unscored"]
    (0.3333333333333333, 0.25, 1, 1)
    """
    margin = np.asarray(margin, dtype=float)
    scored = ~np.isnan(margin)
    right = margin[scored] > 0
    found = {**share(int(right.sum()), int(scored.sum())), "of_all": float((margin > 0).mean()) if len(margin) else None,
             "pairs": len(margin), "tied": int((margin == 0).sum()), "unscored": int((~scored).sum()), "interval_groups": None}
    if right.size:
        group = np.arange(len(margin)) if group is None else np.asarray(group)
        found["interval_groups"] = interval(resampled(right, group[scored], draws=draws, seed=seed))
    return found


def by_slice(margin, keys: Sequence[Hashable], group=None, **settings) -> dict:
    """`accuracy` of the pairs of each key, in the order of the names.

    >>> {key: found["right"] for key, found in by_slice([1.0, -1.0, 1.0], ["b", "a", "b"]).items()}
    {'a': 0, 'b': 2}
    """
    margin, group = np.asarray(margin, dtype=float), np.arange(len(margin)) if group is None else np.asarray(group)
    rows = {key: [n for n, k in enumerate(keys) if k == key] for key in sorted(set(keys), key=str)}
    return {key: accuracy(margin[row], group[row], **settings) for key, row in rows.items()}


# --------------------------------------------------------------------------------------------------------------- lists
def ranking(scores: Sequence[Sequence[float]], relevance: Sequence[Sequence[float]]) -> dict:
    """Rank correlation and nDCG of lists, the mean over lists with its bootstrap interval.

    kendall = tau-b,   spearman = correlation of mean ranks,   ndcg = DCG / ideal DCG,   G = 2^(psi - min psi) - 1

    Edge        lists whose grades are all equal say nothing and are counted under "flat"; lists with a NaN under
                "unscored"; a model that scores a list all equal has correlation 0 there, and the mean DCG over the orders
    Relations   for K = 2 kendall is 2 accuracy - 1
    Departs     gains start at 0 in every list, so that grades may be negative
    Reference   Kendall 1945; Jarvelin and Kekalainen 2002

    >>> round(ranking([[3.0, 2.0, 1.0]], [[2.0, 0.0, 1.0]])["kendall"]["mean"], 4)      # two of three pairs agree
    0.3333
    """
    rows, unscored, flat = [], 0, 0
    for s, grades in zip(scores, relevance, strict=True):
        s, grades = np.asarray(s, dtype=float), np.asarray(grades, dtype=float)
        if np.isnan(s).any():
            unscored += 1
        elif np.ptp(grades) == 0:
            flat += 1
        else:
            even = np.ptp(s) == 0
            gains = np.exp2(grades - grades.min()) - 1
            rows.append((0.0 if even else kendalltau(s, grades).statistic, 0.0 if even else spearmanr(s, grades).statistic,
                         ndcg_score([gains], [s])))
    found = {"lists": len(rows), "unscored": unscored, "flat": flat}
    for name, values in zip(("kendall", "spearman", "ndcg"), np.array(rows).reshape(-1, 3).T, strict=True):
        found[name] = mean(values)
    return found


def mean(values: Sequence[float]) -> dict:
    """The mean with its bootstrap interval."""
    if not len(values):
        return {"mean": None, "interval": None}
    return {"mean": float(np.mean(values)), "interval": interval(resampled(values, range(len(values))))}


def best_of_n_regret(scores: Sequence[float], gold: Sequence[float]) -> float:
    """What picking the best by score loses: max gold - gold of the pick; equal best scores are picked equally often.

    >>> best_of_n_regret([1.0, 3.0, 3.0], [5.0, 4.0, 2.0])                              # 5 - (4 + 2) / 2
    2.0
    """
    scores, gold = np.asarray(scores, dtype=float), np.asarray(gold, dtype=float)
    return float(gold.max() - gold[scores == scores.max()].mean())


# ---------------------------------------------------------------------------------------------------------- best of n
def best_of_n(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Unbiased estimate of the gold reward of the best of n by proxy, from a pool of M >= n responses.

    sum_i g_(i) C(i-1, n-1) / C(M, n),   g_(i) the gold reward of the i-th lowest proxy

    n           1 to M
    Edge        n = 1 is the mean, n = M the gold reward of the best; equal proxies share the mean of their gold rewards,
                as if ties were broken at random
    Relations   the mean over all subsets of size n; with gold = proxy never falls with n
    Departs     -
    Reference   order statistics; binomials in logs, so M may be large

    >>> round(best_of_n([1.0, 2.0, 3.0], [0.0, 6.0, 3.0], 2), 6)                        # picks 6, 3, 3 of the three pairs
    4.0
    """
    proxy, gold = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float)
    if not 1 <= n <= len(proxy):
        raise ValueError(f"best_of_n has a pool of {len(proxy)} responses and n = {n}; n is between 1 and the size of the pool")
    _, level = np.unique(proxy, return_inverse=True)          # levels are in ascending order of the proxy
    shared = (np.bincount(level, weights=gold) / np.bincount(level))[np.sort(level)]
    i = np.arange(n, len(proxy) + 1)
    chosen = gammaln(i) - gammaln(n) - gammaln(i - n + 1)
    total = gammaln(len(proxy) + 1) - gammaln(n + 1) - gammaln(len(proxy) - n + 1)
    return float(np.exp(chosen - total) @ shared[n - 1:])


def best_of_n_kl(n: int) -> float:
    """KL(best of n || base) = log n - (n - 1) / n: exact for a continuous reward, an upper bound with ties.

    >>> best_of_n_kl(1), round(best_of_n_kl(4), 4)
    (0.0, 0.6363)
    """
    return math.log(n) - (n - 1) / n


def over_optimisation(proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]],
                      sizes: Sequence[int] | None = None) -> dict:
    """Gold and proxy reward of best of n against the KL that n costs, the mean over pools.

    sizes       which n; by default 1, 2, 4, ... and the size of the smallest pool
    Edge        pools with a NaN are counted under "unscored"; all others must hold the largest n
    Relations   a proxy that ranks as gold does gives the highest curve; a random one a flat curve
    Departs     -
    Reference   Gao et al., Scaling Laws for Reward Model Overoptimization, arXiv:2210.10760; KL as `best_of_n_kl`
    """
    pools = [(p, g) for p, g in zip(proxy, gold, strict=True) if not np.isnan(np.asarray([p, g], dtype=float)).any()]
    smallest = min((len(p) for p, _ in pools), default=0)
    sizes = sizes or sorted({2 ** k for k in range(smallest.bit_length())} | {smallest}) if smallest else []
    curve = [{"n": n, "kl": best_of_n_kl(n), "gold": mean([best_of_n(p, g, n) for p, g in pools]),
              "proxy": float(np.mean([best_of_n(p, p, n) for p, _ in pools]))} for n in sizes]
    return {"pools": len(pools), "unscored": len(proxy) - len(pools), "curve": curve,
            "regret": mean([best_of_n_regret(p, g) for p, g in pools])}


# --------------------------------------------------------------------------------------------------------- calibration
def temperature(margin, label) -> float:
    """T that makes sigmoid(m / T) most likely: the root of sum_i m_i (sigmoid(m_i / T) - p_i), which is unique.

    Edge        inf where the margins say nothing or the wrong thing; 0 where they separate the labels

    >>> round(temperature([2.0, 2.0, 2.0, -2.0], [1.0, 1.0, 1.0, 1.0]), 4)              # sigmoid(2 / T) = 3/4: T = 2 / log 3
    1.8205
    """
    margin, label = np.asarray(margin, dtype=float), np.asarray(label, dtype=float)
    scale = np.abs(margin).mean() if len(margin) else 0.0
    slope: Callable = lambda a: (margin / scale) @ (expit(a * margin / scale) - label)
    if scale == 0 or slope(0.0) >= 0:
        return math.inf
    high = next((a for a in 2.0 ** np.arange(40) if slope(a) > 0), None)
    return 0.0 if high is None else float(scale / brentq(slope, 0.0, high))


def calibration(margin, label, *, bins: int = 10) -> dict:
    """Does sigmoid(margin) mean what it says: reliability curve, expected calibration error, Brier score, log loss.

    confidence = max(q, 1 - q),  q = sigmoid(m);   ECE = sum_b n_b / P |mean confidence - mean label of the preferred side|
    brier = mean (q - p)^2;   log_loss = mean -p log q - (1 - p) log(1 - q)

    bins        equal widths over confidences 1/2 to 1
    Edge        a tied margin has confidence 1/2 and is right half the time
    Relations   a model that always ties has log loss log 2 and Brier 1/4 on hard labels; `temperature` minimises the log loss;
                `log_loss_at_temperature` is fitted on these very pairs
    Departs     folded at 1/2: which response of a pair comes first means nothing
    Reference   Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599

    >>> calibration([0.0, 0.0], [1.0, 1.0])["log_loss"] == math.log(2)
    True
    """
    margin, label = np.asarray(margin, dtype=float), np.asarray(label, dtype=float)
    scored = ~np.isnan(margin)
    m, p = margin[scored], label[scored]
    found = {"pairs": len(m), "unscored": int((~scored).sum()), "curve": [], "ece": None, "brier": None, "log_loss": None,
             "temperature": None, "log_loss_at_temperature": None}
    if not len(m):
        return found
    confidence, outcome = expit(np.abs(m)), np.where(m > 0, p, np.where(m < 0, 1 - p, 0.5))
    bin_of = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    for b in np.unique(bin_of):
        inside = bin_of == b
        found["curve"].append({"pairs": int(inside.sum()), "confidence": float(confidence[inside].mean()),
                               "outcome": float(outcome[inside].mean())})
    t = temperature(m, p)
    return found | {"ece": sum(c["pairs"] * abs(c["confidence"] - c["outcome"]) for c in found["curve"]) / len(m),
                    "brier": float(((expit(m) - p) ** 2).mean()), "log_loss": cross_entropy(m, p), "temperature": t,
                    "log_loss_at_temperature": cross_entropy(m / t, p) if t > 0 else 0.0}


def cross_entropy(margin: np.ndarray, label: np.ndarray) -> float:
    """mean -p log sigmoid(m) - (1 - p) log sigmoid(-m)."""
    return float((np.logaddexp(0, -margin) + (1 - label) * margin).mean())


# --------------------------------------------------------------------------------------------------- length and style
def relative_difference(first, second) -> np.ndarray:
    """(a - b) / (a + b), and 0 where both are 0.

    >>> relative_difference([3.0, 0.0], [1.0, 0.0]).tolist()
    [0.5, 0.0]
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    total = first + second
    return np.divide(first - second, total, out=np.zeros_like(total), where=total > 0)


def logistic_coefficients(features: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(F) b of P(first preferred) = sigmoid(b^T x) without intercept, so that the order within a pair does not matter;
    a ridge of |b|^2 / 2000 keeps it finite where the labels can be separated."""
    rows, targets = np.concatenate([features, features]), np.repeat([1, 0], len(features))
    weights = np.concatenate([label, 1 - label])
    return LogisticRegression(C=1e3, fit_intercept=False, tol=1e-8, max_iter=1000).fit(rows, targets, weights).coef_[0]


def scaled(x: np.ndarray) -> np.ndarray:
    """Each column divided by its root mean square (a column of zeros stays): standardised about 0, the order within a
    pair being arbitrary."""
    size = np.sqrt((x ** 2).mean(0))
    return x / np.where(size > 0, size, 1.0)


def verdicts(margin: np.ndarray) -> np.ndarray:
    """1 where the first is preferred, 0 where the second is, 1/2 for a tie."""
    return (np.sign(margin) + 1) / 2


def length_bias(margin, label, first, second, *, bins: int = 5) -> dict:
    """Does the model prefer the longer response, and more often than the labels do?

    d = (len_1 - len_2) / (len_1 + len_2);   P(first preferred) = sigmoid(b d / rms d), fitted to verdicts and to labels

    first, second   (P) lengths of the two responses
    bins        of the curve: quantiles of |d|
    Edge        equally long pairs and tied labels are left out and counted; ties of the model are half a preference
    Relations   `length_only` is the accuracy of preferring the longer one; bias is b of the verdicts less b of the labels
    Departs     -
    Reference   Zheng et al., arXiv:2306.05685 (verbosity bias); Dubois et al., AlpacaEval-LC, arXiv:2404.04475

    >>> found = length_bias([1.0, -1.0], [1.0, 1.0], [30, 10], [10, 30])                # always prefers the longer one
    >>> found["longer_preferred"], found["chosen_longer"]["share"], found["chosen_shorter"]["share"]
    (1.0, 1.0, 0.0)
    """
    margin, label = np.asarray(margin, dtype=float), np.asarray(label, dtype=float)
    d, decided = relative_difference(first, second), np.asarray(label) != 0.5
    use = ~np.isnan(margin) & (d != 0) & decided
    found = {"pairs": int(use.sum()), "unscored": int(np.isnan(margin).sum()), "equally_long": int((d == 0).sum()),
             "tied_labels": int((~decided).sum()), "curve": []}
    if not use.any():
        return found
    m, p, d = margin[use], label[use], d[use]
    longer, wanted = np.where(d > 0, verdicts(m), 1 - verdicts(m)), np.where(d > 0, p, 1 - p)
    edges = np.quantile(np.abs(d), np.linspace(0, 1, bins + 1)[1:-1])
    bin_of = np.searchsorted(edges, np.abs(d))
    for b in np.unique(bin_of):
        inside = bin_of == b
        found["curve"].append({"pairs": int(inside.sum()), "difference": float(np.abs(d[inside]).mean()),
                               "model": float(longer[inside].mean()), "labels": float(wanted[inside].mean())})
    x = scaled(d[:, None])
    model, labels = (float(logistic_coefficients(x, y)[0]) for y in (verdicts(m), p))
    return found | {
        "longer_preferred": float(longer.mean()), "longer_is_better": float(wanted.mean()),
        "chosen_longer": share(int((m[d > 0] > 0).sum()), int((d > 0).sum())),
        "chosen_shorter": share(int((m[d < 0] > 0).sum()), int((d < 0).sum())),
        "length_only": share(int((d > 0).sum()), len(d)),
        "coefficient": model, "coefficient_of_labels": labels, "bias": model - labels}


STYLE: Mapping[str, Callable[[str], int]] = {                 # what style control counts
    "length": len,
    "lists": lambda text: len(re.findall(r"^\s*(?:[-*+]|\d+[.)])\s", text, re.MULTILINE)),
    "headers": lambda text: len(re.findall(r"^#{1,6}\s", text, re.MULTILINE)),
    "bold": lambda text: len(re.findall(r"\*\*[^*\n]+\*\*|__[^_\n]+__", text))}


def style_counts(texts: Sequence[str]) -> np.ndarray:
    """(N, 4) characters, list items, headers and bold spans of markdown.

    >>> style_counts(["# A\\n- **b**\\n- c"]).tolist()
    [[15.0, 2.0, 1.0, 1.0]]
    """
    return np.array([[count(text) for count in STYLE.values()] for text in texts], dtype=float).reshape(-1, len(STYLE))


def style_control(margin, label, style: np.ndarray, names: Sequence[str] = tuple(STYLE)) -> dict:
    """What is left of a score without style.

    x = style / rms style,   m = a^T x + r  (least squares);   style-free accuracy = #(r > 0) / #scored
    P(first preferred) = sigmoid(g m / rms m + b^T x)  fitted to the labels

    style       (P, F) `relative_difference` of the counts of the two responses
    Edge        a style that never differs has coefficient 0; tied labels are left out; r within 1e-9 rms of 0 is a tie
    Relations   a = 0 gives the plain accuracy; a score that is style alone has style-free accuracy 0 (ties throughout)
    Departs     the card calls g m the style-free part, whose accuracy is the plain one for every g > 0; here it is r, and
                g is reported with style (`score_given_style`) and without it (`score_alone`)
    Reference   WorldPM, arXiv:2505.10527; Li et al., Chatbot Arena style control (2024)

    >>> style_control([1.0, -1.0], [1.0, 1.0], np.array([[0.5], [-0.5]]), ["length"])["style_free"]["share"]
    0.0
    """
    margin, label = np.asarray(margin, dtype=float), np.asarray(label, dtype=float)
    use = ~np.isnan(margin) & (label != 0.5)
    found = {"pairs": int(use.sum()), "unscored": int(np.isnan(margin).sum()), "tied_labels": int((label == 0.5).sum())}
    if not use.any():
        return found
    m, p, x = margin[use], label[use], scaled(style[use])
    a = np.linalg.lstsq(x, m, rcond=None)[0]
    r = m - x @ a
    r[np.abs(r) < 1e-9 * np.sqrt((m ** 2).mean())] = 0.0
    s = scaled(m[:, None])
    given, *b = logistic_coefficients(np.hstack([s, x]), p)
    return found | {"raw": share(int((m > 0).sum()), len(m)), "style_free": share(int((r > 0).sum()), len(m)),
                    "score_on_style": dict(zip(names, map(float, a), strict=True)),
                    "labels_on_style": dict(zip(names, map(float, b), strict=True)),
                    "score_given_style": float(given), "score_alone": float(logistic_coefficients(s, p)[0])}


# ---------------------------------------------------------------------------------------------------------- robustness
def position_bias(first, swapped, label=None) -> dict:
    """Does a judge prefer what it sees first?

    bias = mean over both orders of P(shown first wins) - 1/2;   consistency = share of items with one verdict in both orders

    first, swapped   (P) P(shown first wins) in the given order and with the two responses swapped
    label       (P) P(the response shown first in the given order is preferred), for accuracies; ties count for none
    Edge        an item that lacks one of the orders is counted under "unscored"; a tie agrees with a tie only
    Relations   a judge that always says "first" has bias 1/2, consistency 0 and, averaged, p = 1/2 throughout
    Departs     -
    Reference   Zheng et al., arXiv:2306.05685

    >>> found = position_bias([1.0, 1.0], [1.0, 0.0])
    >>> found["bias"], found["consistency"]["share"]
    (0.25, 0.5)
    """
    first, swapped = np.asarray(first, dtype=float), np.asarray(swapped, dtype=float)
    both = ~np.isnan(first) & ~np.isnan(swapped)
    a, b = first[both], swapped[both]
    found = {"pairs": len(a), "unscored": int((~both).sum()), "bias": None, "consistency": share(0, 0)}
    if not len(a):
        return found
    found |= {"bias": float((a + b).mean() / 2 - 0.5),
              "consistency": share(int((np.sign(a - 0.5) == -np.sign(b - 0.5)).sum()), len(a))}
    if label is not None:
        label = np.asarray(label, dtype=float)[both]
        decided = np.sign(label - 0.5)
        right = lambda p: share(int(((p - 0.5) * decided > 0).sum()), int((decided != 0).sum()))
        found |= {"given_order": right(a), "swapped_order": right(1 - b), "averaged": right((a + 1 - b) / 2)}
    return found


def consistency(margin, other) -> dict:
    """Does the verdict survive a paraphrase? `margin` and `other` (P) are the margins of the same pairs under two wordings.

    >>> consistency([1.0, -1.0, 2.0], [0.5, 1.0, float("nan")])["agree"]["share"]
    0.5
    """
    margin, other = np.asarray(margin, dtype=float), np.asarray(other, dtype=float)
    both = ~np.isnan(margin) & ~np.isnan(other)
    a, b = margin[both], other[both]
    return {"pairs": len(a), "unscored": int((~both).sum()), "agree": share(int((np.sign(a) == np.sign(b)).sum()), len(a)),
            "mean_change": float(np.abs(a - b).mean()) if len(a) else None}


def cyclic_triples(margins: Sequence[np.ndarray]) -> dict:
    """The share of triples i > j > k > i among the decided triples of (K, K) margins.

    Edge        a triple with a tie or an unknown pair is undecided; 0 for scores, 1/4 for random verdicts

    >>> beats = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    >>> cyclic_triples([beats])["share"], cyclic_triples([margins_of_scores([3, 2, 1])])["share"]
    (1.0, 0.0)
    """
    cyclic = decided = undecided = 0
    for m in margins:
        for i, j, k in combinations(range(len(m)), 3):
            round_trip = np.sign([m[i, j], m[j, k], m[k, i]])
            known = bool((round_trip != 0).all() and not np.isnan(round_trip).any())
            decided, undecided = decided + known, undecided + (not known)
            cyclic += int(known and abs(round_trip.sum()) == 3)
    return {**share(cyclic, decided), "undecided": undecided}


def agreement(margins: Mapping[str, Sequence[float]]) -> dict:
    """How alike models are on the same decided pairs: for every two of them, on the pairs both have scored.

    verdicts    share of pairs with the same verdict (which is: both right, both wrong or both tied)
    kappa       Cohen's kappa of right and wrong: shared errors beyond what the two accuracies make likely; 1 for equal verdicts
    kendall     tau-b of the margins; None where a model's margins are all equal

    >>> found = agreement({"a": [1.0, -1.0, 2.0], "b": [2.0, -1.0, -1.0]})
    >>> found["verdicts"][0][1]
    0.6666666666666666
    """
    names = list(margins)
    found = {"models": names, **{key: [[None] * len(names) for _ in names] for key in ("pairs", "verdicts", "kappa", "kendall")}}
    for x, y in ((x, y) for x in range(len(names)) for y in range(len(names))):
        a, b = (np.asarray(margins[names[n]], dtype=float) for n in (x, y))
        both = ~np.isnan(a) & ~np.isnan(b)
        a, b = a[both], b[both]
        found["pairs"][x][y] = len(a)
        if len(a):
            same, tau = np.sign(a) == np.sign(b), kendalltau(a, b).statistic if len(a) > 1 else math.nan
            found["verdicts"][x][y] = float(same.mean())
            found["kappa"][x][y] = 1.0 if same.all() else float(cohen_kappa_score(np.sign(a), np.sign(b)))
            found["kendall"][x][y] = None if np.isnan(tau) else float(tau)
    return found


def worst(margin) -> list[int]:
    """The pairs a model gets wrong, most confidently wrong first, ties last.

    >>> worst([1.0, 0.0, -0.5, float("nan"), -2.0])
    [4, 2, 1]
    """
    margin = np.asarray(margin, dtype=float)
    wrong = np.flatnonzero(margin <= 0)
    return [int(n) for n in wrong[np.argsort(margin[wrong], kind="stable")]]
