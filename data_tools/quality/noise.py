"""Labels that are probably wrong: by a model that has not seen them, by given scores, by annotators who disagree."""
from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import diags, vstack
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from data_tools.describe import content
from data_tools.labels import pairs, wins_of
from data_tools.quality.words import Chunk, counts, digest, identity, words
from data_tools.records import Group

__all__ = ["Flips", "Margins", "Unlearnable", "crossfit", "disagreement", "flips", "margin", "scored"]

WIDTH = 1 << 18                                               # hashed words and pairs of words

Margins = Callable[[Chunk], np.ndarray]                       # (G) how far a group's labels are right; NaN where nothing is known


# ------------------------------------------------------------------------------------------------------------- margins
def margin(group: Group, scores: Sequence[float | None]) -> float:
    """Mean of s_i - s_j over the pairs whose i is preferred, both scored; NaN where there is none. Turning the labels round
    turns its sign.

    >>> from data_tools.records import Response
    >>> margin(Group("?", [Response("a"), Response("b"), Response("c")], [2.0, 1.0, 0.0]), [5.0, 4.0, 0.0])
    3.3333333333333335
    """
    known = [scores[i] - scores[j] for i, j in pairs(wins_of(group)) if None not in (scores[i], scores[j])]
    return math.fsum(known) / len(known) if known else math.nan


def extremes(wins: list) -> list[tuple[int, int]]:
    """The response that wins most and the one that wins least, if one is preferred.

    >>> extremes([[0.5, 1.0, 0.0], [0.0, 0.5, 0.0], [1.0, 1.0, 0.5]])
    [(2, 1)]
    """
    won = [math.fsum(w - 0.5 for w in row if w is not None) for row in wins]
    if not won or max(won) == min(won):
        return []
    return [(won.index(max(won)), won.index(min(won)))]


class Unlearnable(ValueError):
    """Too few labels, or too few different prompts, to fit a model of the labels on."""


def scored(name: str) -> Margins:
    """Margins of the score `name` that the responses have."""
    return lambda chunk: np.array([margin(g, [r.scores.get(name) for r in g.responses]) for g in chunk.groups])


def crossfit(groups: Iterable[Group], *, sample: int = 20_000, folds: int = 5, regularisation: float = 1.0,
             seed: int = 0) -> Margins:
    """Margins of a Bradley-Terry model of the words (TF-IDF of hashed words and pairs of words, logistic regression), each from
    a fit that has not seen the group's prompt.

    sample          how many groups the fits see, drawn by their content
    folds           how many fits; a prompt belongs to one fold
    regularisation  scikit-learn's C
    """
    fold = lambda prompt: (digest(prompt) ^ seed) % folds
    drawn = sampled(groups, sample, seed)
    places = [fold(prompt) for _, _, prompt in drawn]
    most = max(Counter(places).values(), default=0)
    if len(drawn) - most < folds:
        raise Unlearnable(f"a model of the labels needs groups with a preferred response and different prompts; of {len(drawn)} "
                          f"groups {most} have prompts of one fold of {folds}: name a score that judges them (score=...)")
    found = tallied([one[side] for side in (0, 1) for one in drawn])
    idf = rarity(found)
    found = weighed(found, idf)
    difference, place = found[:len(drawn)] - found[len(drawn):], np.array(places)
    turned = np.where(np.arange(len(drawn)) % 2, -1.0, 1.0)   # both classes must occur: turn every other pair round
    mirrored = (diags(turned) @ difference).tocsr()
    fits = np.zeros((folds, WIDTH), np.float32)
    for k in range(folds):
        kept = place != k
        model = LogisticRegression(C=regularisation, fit_intercept=False, max_iter=200)
        fits[k] = model.fit(mirrored[kept], turned[kept]).coef_[0]

    def margins(chunk: Chunk) -> np.ndarray:
        values = weighed(counts(chunk.words, WIDTH), idf) @ fits.T
        own = values[np.arange(len(chunk.texts)), np.array([fold(content(g.prompt)) for g in chunk.groups])[chunk.group]]
        return np.array([margin(g, own[p + 1:p + 1 + len(g.responses)].tolist())
                         for g, p in zip(chunk.groups, chunk.prompt, strict=True)])
    return margins


def sampled(groups: Iterable[Group], size: int, seed: int) -> list[tuple[str, str, str]]:
    """The response that wins most, the one that wins least, and the prompt, of as many groups as that, drawn by their content."""
    return [texts for *_, texts in heapq.nsmallest(size, (
        (digest(f"{seed} {identity(g)}"), n, (content(g.responses[i].text), content(g.responses[j].text), content(g.prompt)))
        for n, g in enumerate(groups) for i, j in extremes(wins_of(g))))]


def tallied(texts: Sequence[str]):
    """(texts, WIDTH) how often each word and each pair of words occurs."""
    return vstack([counts(words(texts[s:s + 2000]), WIDTH) for s in range(0, len(texts), 2000)], format="csr")


def rarity(found) -> np.ndarray:
    """(WIDTH) 1 + log((1 + texts) / (1 + texts with the word)), as in scikit-learn; 0 for a word of one text."""
    seen = np.bincount(found.indices, minlength=WIDTH)
    return np.where(seen > 1, 1 + np.log((1 + found.shape[0]) / (1 + seen)), 0.0).astype(np.float32)


def weighed(found, idf: np.ndarray):
    """Rows of length 1 of (1 + log tf) idf."""
    found.data = (1 + np.log(found.data)) * idf[found.indices]
    norm = np.sqrt(np.bincount(np.repeat(np.arange(found.shape[0]), np.diff(found.indptr)), found.data ** 2, found.shape[0]))
    return (diags(1 / np.maximum(norm, 1e-12).astype(np.float32)) @ found).tocsr()


# --------------------------------------------------------------------------------------------------------------- flips
class Flips(NamedTuple):
    """What all margins together say: the share of turned labels with its 90 % interval, the share of labels that the margins'
    signs agree with, how many groups have a margin, and P(turned) at some margins, between which one interpolates."""
    rate: float
    interval: tuple[float, float]
    agree: float
    groups: int
    margins: np.ndarray
    turned: np.ndarray

    @property
    def knows(self) -> bool:
        """Whether the margins agree with the labels by more than chance, at three standard errors."""
        return (self.agree - 0.5) * 2 * math.sqrt(self.groups) > 3


def flips(margins: np.ndarray) -> Flips:
    """The model P(label | m) = (1 - e) sigma(a m) + e sigma(-a m) with a flat prior on the rate e in [0, 0.45] and on the log of
    the scale a, on a grid; P(turned | m) = e sigma(-a m) / P(label | m), averaged over what e and a may be.

    Edge        e is what even the widest margins get wrong: margins that are never wide leave a wide interval. Where annotators
                differ in earnest, that is in e too
    """
    m = np.sort(margins[~np.isnan(margins)])
    if not m.any():
        return Flips(0.0, (0.0, 0.45), 0.5, len(m), np.zeros(1), np.zeros(1))
    parts = np.array_split(m, min(len(m), 500))
    knots, weight = np.array([p.mean() for p in parts]), np.array([len(p) for p in parts])
    e = np.linspace(0, 0.45, 91)[:, None, None]
    a = np.geomspace(0.05, 100, 60)[:, None] / np.abs(m).mean()
    right, wrong = (1 - e) * expit(a * knots), e * expit(-a * knots)
    fit = np.log(right + wrong + 1e-300) @ weight
    fit = np.exp(fit - fit.max())
    fit /= fit.sum()
    total = fit.sum(1).cumsum()
    low, high = (float(e[np.searchsorted(total, q), 0, 0]) for q in (0.05, 0.95))
    turned = np.einsum("ea,eak->k", fit, wrong / (right + wrong + 1e-300))
    return Flips(float(fit.sum(1) @ e.ravel()), (low, high), float((m > 0).mean()), len(m), knots, turned)


def disagreement(ballots: Iterable[Sequence[float]]) -> dict[str, float]:
    """Annotators' error rate from their disagreement: two who each err with probability e, independently, disagree with
    probability 2 e (1 - e), so e = (1 - sqrt(1 - 2 d)) / 2.

    Edge        d >= 1/2, as guessing gives: e = 1/2. Ballots of one vote say nothing

    >>> disagreement([(1, 1, 0)])                             # 2 of 3 pairs of annotators disagree
    {'items': 1, 'disagree': 0.6666666666666666, 'error rate': 0.5}
    """
    shares = [sum(a != b for n, a in enumerate(votes) for b in votes[:n]) / (len(votes) * (len(votes) - 1) / 2)
              for votes in ballots if len(votes) > 1]
    if not shares:
        return {"items": 0}
    d = math.fsum(shares) / len(shares)
    return {"items": len(shares), "disagree": d, "error rate": (1 - math.sqrt(max(0.0, 1 - 2 * d))) / 2}
