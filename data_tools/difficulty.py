"""How hard each prompt is and how able each model, with intervals: item response theory and Glicko-2.

Both read a response matrix (subjects, items): the share of right answers in [0, 1], NaN where a subject did not answer.
`by_irt`, `by_irt_2pl` and `by_glicko` make it from scored groups and write `meta["difficulty"]`, `["difficulty_low"]` and
`["difficulty_high"]` (95 %) of each group. For a curriculum, a run file then says
`rollout: {order: {by_field: {field: difficulty}}}`; for a band of difficulty there is `data_tools.select.between`.
"""
from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from data_tools.records import Group
from data_tools.rules import again, note, scores

__all__ = ["by_glicko", "by_irt", "by_irt_2pl"]

WIDTH = 1.959963984540054                                     # standard errors on either side of a 95 % interval
LARGEST = 20_000_000                                          # numbers in one array of the fit: 160 MB


class Fit(NamedTuple):
    """Estimates with their standard errors; one entry for each subject or item."""
    ability: np.ndarray
    ability_error: np.ndarray
    difficulty: np.ndarray
    difficulty_error: np.ndarray
    log_slope: np.ndarray
    log_slope_error: np.ndarray


# -------------------------------------------------------------------------------------------------- item response theory
def one_parameter(responses, *, counts=None) -> Fit:
    """Rasch model (1PL): items differ in difficulty alone.

    P(right) = sigmoid(theta - b),   theta ~ N(0, 1),   b ~ N(0, 1)

    counts      (subjects, items) answers behind each share; 1
    Edge        an item that all or none solved stays finite; one that nobody answered has the prior, 0 +- 1; so has a subject
    Relations   among fully observed items the number of solvers decides b; `two_parameter` with spread -> 0
    Departs     abilities are integrated out, so that items are no worse for having few subjects
    Reference   Rasch 1960; Bock & Aitkin 1981 (marginal likelihood)

    >>> fit = one_parameter([[1, 0], [1, 0], [1, 1]])
    >>> bool(fit.difficulty[0] < fit.difficulty[1]), bool(fit.ability[0] < fit.ability[2])
    (True, True)
    """
    return _marginal(responses, counts, 0.0)


def two_parameter(responses, *, counts=None, spread=0.5) -> Fit:
    """Two-parameter logistic model (2PL): items also differ in how sharply they separate subjects.

    P(right) = sigmoid(a (theta - b)),   theta ~ N(0, 1),   b ~ N(0, 1),   log a ~ N(0, spread^2)

    counts      (subjects, items) answers behind each share; 1
    spread      of log a; 0.5
    Edge        as `one_parameter`
    Relations   spread -> 0 is `one_parameter`
    Departs     abilities are integrated out and the mode of the items is taken in (log a, -a b): the joint mode overstates a,
                and its 95 % intervals hold 19 to 91 % of the difficulties where these hold 92 to 96 %
    Reference   Birnbaum 1968; Bock & Aitkin 1981

    >>> fit = two_parameter([[0, 1], [0, 0], [1, 1], [1, 0]] * 5)              # the first item follows ability no more than
    >>> bool(abs(fit.log_slope[0] - fit.log_slope[1]) < 1e-6)                  # the second
    True
    """
    if not spread > 0:
        raise ValueError(f"spread, the standard deviation of log a, should be positive, found {spread}; 0 is one_parameter")
    return _marginal(responses, counts, spread)


def _marginal(responses, counts, spread: float) -> Fit:
    """Items at the mode of their posterior, abilities integrated out; then the abilities' posteriors given the items."""
    from scipy.optimize import minimize
    share, n = _matrix(responses, counts)
    right, size = n * share, share.shape[1]
    x = np.linspace(-6, 6, max(145, 5 * math.isqrt(size)) | 1)[:, None]        # closer than a subject's standard error
    if x.size * size > LARGEST:
        raise ValueError(f"{size:,} items at {x.size} abilities need arrays of {x.size * size * 8 / 2**30:.1f} GB each: fit a "
                         "sample of the items, or use Glicko-2")
    precision = 1 / spread ** 2 if spread else 0.0

    def objective(both):
        log_a, d = both.reshape(2, -1)
        weight, total, p = _posterior(log_a, d, x, right, n)
        error, b2 = (weight.T @ n) * p - weight.T @ right, (d * np.exp(-log_a)) ** 2
        value = -total + (b2 + precision * log_a ** 2).sum() / 2 + log_a.sum()              # the last: of b -> -a b
        return value, np.concatenate([(error * np.exp(log_a) * x).sum(0) - b2 + precision * log_a + 1,
                                      error.sum(0) + d * np.exp(-2 * log_a)])

    bounds = [(None, None) if spread else (0, 0)] * size + [(None, None)] * size
    found = minimize(objective, np.zeros(2 * size), jac=True, method="L-BFGS-B", bounds=bounds,
                     options={"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-6, "maxcor": 30})
    if found.status == 1:
        raise ValueError(f"the fit of {share.shape[0]} subjects and {size} items did not settle: {found.message}")
    log_a, d = found.x.reshape(2, -1)
    weight, _, p = _posterior(log_a, d, x, right, n)
    ability = (weight @ x)[:, 0]
    deviation = np.sqrt(np.einsum("sq,sq->s", weight, (x.T - ability[:, None]) ** 2))
    errors = _errors(log_a, d, x, weight, p, right, n, spread)
    return Fit(ability, deviation, -d * np.exp(-log_a), errors[0], log_a, errors[1])


def _posterior(log_a, d, x, right, n) -> tuple[np.ndarray, float, np.ndarray]:
    """Each subject's posterior over the abilities x, the log-likelihood of all, and P(right) of each item at each ability."""
    from scipy.special import expit, log_expit, logsumexp
    z = np.exp(log_a) * x + d
    joint = -x.T ** 2 / 2 - logsumexp(-x ** 2 / 2) + right @ log_expit(z).T + (n - right) @ log_expit(-z).T
    total = logsumexp(joint, axis=1, keepdims=True)
    return np.exp(joint - total), total.sum(), expit(z)


def _errors(log_a, d, x, weight, p, right, n, spread) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of b and log a: the inverse of each item's curvature in (log a, d), and d b = -d d / a - b d log a."""
    a, b = np.exp(log_a), -d * np.exp(-log_a)

    def information(left, other):                             # each is dz / d parameter; complete minus missing information
        complete = ((weight.T @ n) * p * (1 - p) * left * other).sum(0)
        mean = [n * (weight @ (p * s)) - right * (weight @ s) for s in (left, other)]
        product = n ** 2 * (weight @ (p * p * left * other)) - 2 * n * right * (weight @ (p * left * other)) \
            + right ** 2 * (weight @ (left * other))
        return complete - (product - mean[0] * mean[1]).sum(0)

    slope, one = a * x, np.ones_like(p)
    dd = information(one, one) + 1 / a ** 2
    if not spread:
        return 1 / np.sqrt(dd), np.zeros_like(d)
    curved = (((weight.T @ n) * p - weight.T @ right) * slope).sum(0)                      # d2z / (d log a)2 is not 0
    aa = information(slope, slope) + curved + 2 * b ** 2 + 1 / spread ** 2
    ad = information(slope, one) + 2 * b / a
    determinant = aa * dd - ad ** 2
    return np.sqrt((aa / a ** 2 + b ** 2 * dd - 2 * b * ad / a) / determinant), np.sqrt(dd / determinant)


def _matrix(responses, counts=None) -> tuple[np.ndarray, np.ndarray]:
    """Shares with 0 where missing, and the number of answers behind each."""
    y = np.asarray(responses, dtype=float)
    if y.ndim != 2 or not y.size:
        raise ValueError(f"a response matrix has the shape (subjects, items), found {y.shape}")
    if bad := np.argwhere(~(np.isnan(y) | ((y >= 0) & (y <= 1)))).tolist():
        s, i = bad[0]
        raise ValueError(f"responses are shares of right answers in [0, 1], or NaN where there is none, found {y[s, i]} of "
                         f"subject {s} on item {i}: threshold or rescale the scores first")
    n = np.where(np.isnan(y), 0.0, 1.0 if counts is None else np.asarray(counts, dtype=float))
    return np.nan_to_num(y), n


# -------------------------------------------------------------------------------------------------------------- Glicko-2
class Rating(NamedTuple):
    """A strength on the scale of chess, its standard deviation, and how much it fluctuates."""
    rating: float = 1500.0
    deviation: float = 350.0
    volatility: float = 0.06


SCALE = 173.7178


def glicko2(player: Rating, games: Iterable[tuple[Rating, float]], *, tau=0.5) -> Rating:
    """One rating period of one player.

    mu' = mu + phi'^2 sum_j g(phi_j) (s_j - E_j),   1/phi'^2 = 1/(phi^2 + sigma'^2) + 1/v,   1/v = sum_j g_j^2 E_j (1 - E_j)

    games       (opponent before the period, score in [0, 1])
    tau         how fast volatility may change, 0.3 to 1.2; 0.5
    Edge        no games: the deviation alone grows; a draw scores 1/2
    Departs     -
    Reference   Glickman, Example of the Glicko-2 system, 2013

    >>> played = [(Rating(1400, 30), 1), (Rating(1550, 100), 0), (Rating(1700, 300), 0)]
    >>> [round(x, 2) for x in glicko2(Rating(1500, 200), played)[:2]]                     # the published example
    [1464.05, 151.52]
    """
    mu, phi = (player.rating - 1500) / SCALE, player.deviation / SCALE
    information = gain = 0.0
    for other, score in games:
        g = 1 / math.sqrt(1 + 3 * (other.deviation / SCALE / math.pi) ** 2)
        lead = g * (mu - (other.rating - 1500) / SCALE)
        small = math.exp(-abs(lead))
        information += g * g * small / (1 + small) ** 2       # E (1 - E), without cancellation
        gain += g * (score - (1 / (1 + small) if lead >= 0 else small / (1 + small)))
    if not information:
        return player._replace(deviation=SCALE * math.hypot(phi, player.volatility))
    volatility = _volatility(player.volatility, phi ** 2, 1 / information, gain / information, tau)
    phi2 = 1 / (1 / (phi ** 2 + volatility ** 2) + information)
    return Rating(1500 + SCALE * (mu + phi2 * gain), SCALE * math.sqrt(phi2), volatility)


def _volatility(sigma: float, phi2: float, v: float, delta: float, tau: float) -> float:
    """Step 5 of the note: the root of f by the Illinois method."""
    start = math.log(sigma ** 2)

    def f(x):
        e = math.exp(x)
        return e * (delta ** 2 - phi2 - v - e) / (2 * (phi2 + v + e) ** 2) - (x - start) / tau ** 2

    a, b = start, math.log(delta ** 2 - phi2 - v) if delta ** 2 > phi2 + v else start - tau
    while delta ** 2 <= phi2 + v and f(b) < 0:
        b -= tau
    fa, fb = f(a), f(b)
    while abs(b - a) > 1e-6:
        c = a + (a - b) * fa / (fb - fa)
        fc = f(c)
        a, fa = (b, fb) if fc * fb <= 0 else (a, fa / 2)
        b, fb = c, fc
    return math.exp(a / 2)


def ratings(periods: Iterable[Iterable[tuple]], *, tau=0.5, start: Rating = Rating()) -> dict:
    """Ratings of all players after periods of games (player, opponent, the player's score); within a period everybody plays
    the ratings from before it.

    >>> found = ratings([[("a", "b", 1.0)], [("a", "c", 0.5)]])
    >>> found["a"].rating > 1500 > found["b"].rating, round(found["b"].rating)
    (True, 1338)
    """
    known: dict = {}
    for games in periods:
        played: dict = {}
        for player, other, score in games:
            played.setdefault(player, []).append((known.get(other, start), score))
            played.setdefault(other, []).append((known.get(player, start), 1 - score))
        known |= {name: glicko2(known.get(name, start), played.get(name, ()), tau=tau) for name in known.keys() | played}
    return known


def glicko(responses, *, counts=None, tau=0.5, periods=1) -> tuple[list[Rating], list[Rating]]:
    """Subjects and items of a response matrix as players: an item wins where the subject fails.

    counts      (subjects, items) answers behind each share, each a game; 1
    periods     the subjects are taken in so many blocks of rows, one after the other; 1
    Edge        who played nobody keeps the start, 1500 +- 350
    Relations   one period: an item's rating depends on its games' number and mean score alone

    >>> subjects, items = glicko([[1, 0], [1, 0], [1, 1]])
    >>> items[0].rating < items[1].rating, subjects[0] == subjects[1]
    (True, True)
    """
    share, n = _matrix(responses, counts)

    def games(block):
        for s in block.tolist():
            for i in np.flatnonzero(n[s]).tolist():
                yield from [(("item", i), ("subject", s), 1 - float(share[s, i]))] * int(n[s, i])

    found = ratings(map(games, np.array_split(np.arange(len(share)), periods)), tau=tau)
    return tuple([found.get((kind, k), Rating()) for k in range(size)]
                 for kind, size in zip(("subject", "item"), share.shape, strict=True))


# ------------------------------------------------------------------------------------------------------ groups' difficulty
def response_matrix(groups: Iterable[Group], *, score: str, subject: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Shares (subjects, groups), NaN where a subject has no response; the number of responses; the subjects' names."""
    names: dict[str, int] = {}
    row, column, values, size = array("q"), array("q"), array("d"), 0
    for size, group in enumerate(groups, 1):
        for response, value in zip(group.responses, scores(group, score), strict=True):
            row.append(names.setdefault(str(note(group, response, subject)), len(names)))
            column.append(size - 1)
            values.append(value)
    if not values:
        raise ValueError("there are no responses to learn difficulty from")
    total, n = np.zeros((2, len(names), size))
    np.add.at(total, (row, column), values)
    np.add.at(n, (row, column), 1)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan), n, list(names)


def by_irt(groups: Iterable[Group], *, score="reward", subject="generator") -> Iterator[Group]:
    """Difficulty by the Rasch model, `one_parameter`, from the responses of several models.

    score       in [0, 1], 1 for a right response
    subject     the key of a response's meta that says who wrote it; "generator"
    Edge        a group without responses has the prior, 0 +- 1.96; passes twice
    Reference   Easy2Hard-Bench, arXiv:2409.18433
    """
    y, n, _ = response_matrix(again(groups), score=score, subject=subject)
    fit = one_parameter(y, counts=n)
    return _marked(groups, fit.difficulty, fit.difficulty_error)


def by_irt_2pl(groups: Iterable[Group], *, score="reward", subject="generator", spread=0.5) -> Iterator[Group]:
    """Difficulty by the two-parameter logistic model, `two_parameter`; `meta["discrimination"]` is the slope.

    score       in [0, 1], 1 for a right response
    subject     the key of a response's meta that says who wrote it; "generator"
    spread      of log a; 0.5
    Edge        as `by_irt`; passes twice
    Reference   Easy2Hard-Bench, arXiv:2409.18433
    """
    y, n, _ = response_matrix(again(groups), score=score, subject=subject)
    fit = two_parameter(y, counts=n, spread=spread)
    marked = _marked(groups, fit.difficulty, fit.difficulty_error)
    return (replace(g, meta={**g.meta, "discrimination": float(np.exp(s))}) for g, s in zip(marked, fit.log_slope, strict=True))


def by_glicko(groups: Iterable[Group], *, score="reward", subject="generator", tau=0.5, periods=1) -> Iterator[Group]:
    """Difficulty by Glicko-2: prompts play the models that answer them.

    score       in [0, 1], 1 for a right response
    subject     the key of a response's meta that says who wrote it; "generator"
    tau         how fast volatility may change; 0.5
    periods     the models play in so many blocks, in the order in which they appear; 1
    Edge        a group without responses has the start, 1500 +- 686; passes twice
    Reference   Easy2Hard-Bench, arXiv:2409.18433; Glickman 2013
    """
    y, n, _ = response_matrix(again(groups), score=score, subject=subject)
    items = glicko(y, counts=n, tau=tau, periods=periods)[1]
    return _marked(groups, [r.rating for r in items], [r.deviation for r in items])


def _marked(groups: Iterable[Group], values: Sequence[float], errors: Sequence[float]) -> Iterator[Group]:
    for group, value, error in zip(groups, values, errors, strict=True):
        yield replace(group, meta={**group.meta, "difficulty": float(value), "difficulty_low": float(value - WIDTH * error),
                                   "difficulty_high": float(value + WIDTH * error)})
