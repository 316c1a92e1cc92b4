"""Labels from scores, ranks and annotators. Lists in, lists out; None is 'not known' throughout.

A `wins` matrix holds P(i preferred to j): 1 win, 0 loss, 0.5 tie, None where nobody compared; 0.5 on the diagonal.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

from data_tools.records import Group

Scores = Sequence["float | None"]
Wins = list[list["float | None"]]
Pairs = list[tuple[int, int]]                                 # (preferred, other)


# ----------------------------------------------------------------------------------------------------------- relevance
def scores_of(group: Group, name: str) -> list[float | None]:
    """The score `name` of every response, None where it has none. A name that no response has is an error."""
    found = [r.scores.get(name) for r in group.responses]
    if found and all(s is None for s in found):
        known = sorted({key for r in group.responses for key in r.scores})
        raise KeyError(f"no response has the score {name!r}; known: {', '.join(known) or 'none'}")
    return found


def dense(scores: Scores) -> list[float | None]:
    """Scores to the grades 0, 1, 2, ... without gaps: equal scores share a grade, None stays None.

    >>> dense([0.3, 9.0, 0.3, None, -2.0])
    [1.0, 2.0, 1.0, None, 0.0]
    """
    grade = {s: float(n) for n, s in enumerate(sorted({s for s in scores if s is not None}))}
    return [grade.get(s) for s in scores]


def from_ranks(ranks: Scores) -> list[float | None]:
    """Ranks (1 is best; repeated and left-out ranks are fine) to relevance: higher is better, the worst is 0.

    >>> from_ranks([2, 1, 2, 4])
    [1.0, 2.0, 1.0, 0.0]
    """
    return dense([None if r is None else -r for r in ranks])


def lipo(wins: Wins) -> list[float]:
    """Labels of listwise preference optimisation, psi_k = (1/K) sum_i wins[k][i], in [0, 1]; the diagonal counts 0.5.

    A pair that nobody compared is an error.

    >>> lipo(hard([3, 2, 1])) == [5 / 6, 1 / 2, 1 / 6]
    True
    """
    rows = [[0.5 if i == k else w for i, w in enumerate(row)] for k, row in enumerate(wins)]
    if any(w is None for row in rows for w in row):
        raise ValueError("listwise labels need every pair compared, and wins has a None: label with scores, or drop "
                         "the responses that were not compared")
    return [sum(row) / len(row) for row in rows]


# ---------------------------------------------------------------------------------------------------------------- wins
def _matrix(scores: Scores, win: Callable[[float, float], float]) -> Wins:
    return [[0.5 if i == j else None if a is None or b is None else win(a, b) for j, b in enumerate(scores)]
            for i, a in enumerate(scores)]


def hard(scores: Scores) -> Wins:
    """The higher score wins, equal scores tie.

    >>> hard([2.0, 1.0, 2.0])
    [[0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.5, 1.0, 0.5]]
    """
    return _matrix(scores, lambda a, b: (a > b) + 0.5 * (a == b))


def soft(scores: Scores, *, temperature: float = 1.0) -> Wins:
    """Bradley-Terry: P(i preferred to j) = sigmoid((s_i - s_j) / temperature).

    >>> round(soft([math.log(3), 0.0])[0][1], 12)             # sigmoid(log 3) = 3 / 4
    0.75
    """
    if not temperature > 0:
        raise ValueError(f"temperature should be positive, found {temperature}; `hard` is the limit 0")
    return _matrix(scores, lambda a, b: _sigmoid((a - b) / temperature))


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return (1.0 if x >= 0 else small) / (1.0 + small)


def vote(annotators: Sequence[Scores]) -> Wins:
    """The share of annotators who score i above j; one who scores them equal counts half for each. An annotator who
    left out i or j (None) has no vote on them; where nobody votes the win is None.

    >>> vote([[1, 0], [1, 0], [0, 1], [5, 5]])                # 2.5 of 4 votes
    [[0.5, 0.625], [0.375, 0.5]]
    """
    ballots = [hard(scores) for scores in annotators]
    if len({len(b) for b in ballots}) != 1:
        raise ValueError("vote needs at least one annotator, and a score of each for every response (None if missing)")
    return [[_mean(w for b in ballots if (w := b[i][j]) is not None) for j in range(len(ballots[0]))]
            for i in range(len(ballots[0]))]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def wins_of(group: Group) -> Wins:
    """The group's wins, or those its relevance implies; all None (but for the diagonal) without labels."""
    return group.wins if group.wins is not None else hard(group.relevance or [None] * len(group.responses))


# --------------------------------------------------------------------------------------------------------------- pairs
def pairs(wins: Wins, *, above: float = 0.5) -> Pairs:
    """Pairs (i, j) with P(i preferred to j) > `above`; ties are no pairs.

    >>> pairs([[0.5, 0.7, None], [0.3, 0.5, 0.0], [None, 1.0, 0.5]])
    [(0, 1), (2, 1)]
    >>> pairs([[0.5, 0.7], [0.3, 0.5]], above=0.8)
    []
    """
    return [(i, j) for i, row in enumerate(wins) for j, w in enumerate(row) if i != j and w is not None and w > above]


def apart(scores: Scores, *, margin: float = 0.0) -> Pairs:
    """Pairs (i, j) with s_i - s_j >= margin, and s_i > s_j.

    >>> apart([3.0, 2.5, 1.0], margin=1.0)
    [(0, 2), (1, 2)]
    """
    return [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores)
            if a is not None and b is not None and a > b and a - b >= margin]


def best_worst(scores: Scores, *, margin: float = 0.0) -> Pairs:
    """The pair of the first highest and the first lowest score, or nothing when they are equal or closer than margin.

    >>> best_worst([1.0, 4.0, None, 1.0, 4.0]), best_worst([2.0, 2.0])
    ([(1, 0)], [])
    """
    known = [i for i, s in enumerate(scores) if s is not None]
    if not known:
        return []
    best, worst = max(known, key=scores.__getitem__), min(known, key=scores.__getitem__)
    return [(best, worst)] if scores[best] > scores[worst] and scores[best] - scores[worst] >= margin else []


def split(group: Group, chosen: Pairs) -> list[Group]:
    """One group of two responses per pair, the preferred one first. Soft wins are kept; grades become 1 and 0.

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response("a"), Response("b"), Response("c")], relevance=[0.0, 5.0, 2.0])
    >>> [[r.text for r in g.responses] for g in split(group, best_worst(group.relevance))]
    [['b', 'a']]
    """
    found = []
    for i, j in chosen:
        wins = None if group.wins is None else [[group.wins[a][b] for b in (i, j)] for a in (i, j)]
        found.append(replace(group, responses=[group.responses[i], group.responses[j]], wins=wins,
                             relevance=[1.0, 0.0] if wins is None else None, meta=dict(group.meta)))
    return found


def singles(group: Group) -> list[Group]:
    """One group per labelled response, for losses on single responses; its relevance is kept.

    >>> from data_tools.records import Response
    >>> [g.relevance for g in singles(Group("?", [Response("a"), Response("b"), Response("c")], [1.0, None, 0.0]))]
    [[1.0], [0.0]]
    """
    return [replace(group, responses=[response], relevance=[label], wins=None, meta=dict(group.meta))
            for response, label in zip(group.responses, group.relevance or [], strict=False) if label is not None]


# --------------------------------------------------------------------------------------------------------------- noise
def flip(groups: Iterable[Group], *, rate: float, seed: int = 0) -> Iterator[Group]:
    """Turn the labels of a share `rate` of the groups round and note `meta["flipped"]` on every group.

    Which groups depends on the seed and the texts alone, so shuffling, cutting or joining data changes nothing.
    A turned group has wins 1 - w, and relevance mirrored between its largest and smallest value (0 and 1 for a single
    response). A group without labels is an error.

    >>> from data_tools.records import Response
    >>> pair = Group("?", [Response("a"), Response("b")], relevance=[1.0, 0.0])
    >>> [(g.relevance, g.meta) for g in flip([pair], rate=1.0)]
    [([0.0, 1.0], {'flipped': True})]
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate should be between 0 and 1, found {rate}")
    for group in groups:
        if group.wins is None and all(r is None for r in group.relevance or []):
            raise ValueError(f"{group.meta.get('place', 'a group')} has no labels to flip")
        yield _flipped(group) if _draw(group, seed) < rate else replace(group, meta={**group.meta, "flipped": False})


def _draw(group: Group, seed: int) -> float:
    """A number in [0, 1) from the seed and the texts."""
    key = json.dumps([seed, group.prompt, [r.text for r in group.responses]], sort_keys=True)
    return int.from_bytes(blake2b(key.encode(), digest_size=6).digest()) / 2 ** 48


def _flipped(group: Group) -> Group:
    wins = group.wins and [[None if w is None else 1 - w for w in row] for row in group.wins]
    known = [r for r in group.relevance or [] if r is not None] if len(group.responses) > 1 else [0.0, 1.0]
    mirror = max(known, default=0.0) + min(known, default=0.0)
    relevance = group.relevance and [None if r is None else mirror - r for r in group.relevance]
    return replace(group, relevance=relevance, wins=wins, meta={**group.meta, "flipped": True})
