"""Labels from scores: graded lists, rankings, degrees of preference, ties, votes of several judges, majority answers.

The responses stay as they are; a group gets `relevance` or `wins`.
"""
from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation

from data_tools import labels
from data_tools.describe import content
from data_tools.records import Group
from data_tools.rules import scores

__all__ = ["degree", "graded", "majority", "ranking", "ties", "votes"]

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"                              # its last match is the answer


def graded(group: Group, *, levels=5, low=None, high=None, score="reward") -> list[Group]:
    """A list with graded relevance: scores in `levels` steps of equal width.

    relevance = min(levels - 1, floor(levels (r - low) / (high - low)))

    levels      grades 0 .. levels - 1; 5
    low, high   the range of scores, beyond which the lowest and the highest grade are given; None is the group's own
    Edge        a list of one grade says nothing and is removed
    Relations   many levels order as `ranking` does; the grades keep distances, which lambda weights read
    Departs     -
    Reference   Liu et al., LiPO, arXiv:2402.01878

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response("", scores={"r": r}) for r in (0.0, 0.1, 0.5, 1.0)])
    >>> graded(group, score="r", levels=4)[0].relevance
    [0.0, 0.0, 2.0, 3.0]
    """
    values = scores(group, score)
    if not values:
        return []
    low, high = (min(values) if low is None else low), (max(values) if high is None else high)
    if levels < 2 or low > high:
        raise ValueError(f"grades need at least 2 levels and low < high, found levels={levels}, low={low}, high={high}")
    width = (high - low) or 1.0
    grades = [float(min(levels - 1, max(0, math.floor(levels * (r - low) / width)))) for r in values]
    return [replace(group, relevance=grades, wins=None, meta=dict(group.meta))] if len(set(grades)) > 1 else []


def ranking(group: Group, *, score="reward") -> list[Group]:
    """A whole ranking: relevance 0, 1, 2, ... by rising score, equal scores alike.

    Edge        a list of equal scores says nothing and is removed
    Relations   `graded` keeps distances

    >>> from data_tools.records import Response
    >>> ranking(Group("?", [Response("", scores={"r": r}) for r in (3.0, -1.0, 7.5, 3.0)]), score="r")[0].relevance
    [1.0, 0.0, 2.0, 1.0]
    """
    grades = labels.dense(scores(group, score))
    return [replace(group, relevance=grades, wins=None, meta=dict(group.meta))] if len(set(grades)) > 1 else []


def degree(group: Group, *, temperature=1.0, score="reward") -> list[Group]:
    """How much one response is preferred to another: soft wins.

    P(i preferred to j) = sigmoid((r_i - r_j) / temperature)

    temperature   1: the score is the reward of a Bradley-Terry model
    Edge        equal scores are even
    Relations   temperature -> 0: hard wins, equal scores tie. Take pairs of it with a rule of pairs first

    >>> from data_tools.records import Response
    >>> group, = degree(Group("?", [Response("", scores={"r": r}) for r in (math.log(3), 0.0)]), score="r")
    >>> [[round(w, 12) for w in row] for row in group.wins]
    [[0.5, 0.75], [0.25, 0.5]]
    """
    wins = labels.soft(scores(group, score), temperature=temperature)
    return [replace(group, wins=wins, relevance=None, meta=dict(group.meta))]


def ties(group: Group, *, within, score="reward") -> list[Group]:
    """Wins with ties: who is close counts as equal.

    w_ij = 1/2 if |r_i - r_j| <= within, else 1[r_i > r_j]

    within      the largest difference that is a tie
    Edge        ties need not be transitive, which is why they are wins and not grades
    Relations   within = 0: equal scores tie

    >>> from data_tools.records import Response
    >>> ties(Group("?", [Response("", scores={"r": r}) for r in (0.0, 0.4, 0.8)]), score="r", within=0.5)[0].wins
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.5], [1.0, 0.5, 0.5]]
    """
    if not within >= 0:
        raise ValueError(f"within should be 0 or more, found {within}")
    values = scores(group, score)
    wins = [[0.5 if abs(a - b) <= within else float(a > b) for b in values] for a in values]
    return [replace(group, wins=wins, relevance=None, meta=dict(group.meta))]


def votes(group: Group, *, judges: Sequence[str]) -> list[Group]:
    """Wins by the votes of several judges, each a score.

    w_ij = share of the judges with r_i > r_j, equal scores half a vote

    judges      the names of their scores
    Relations   one judge: hard wins; scales of the judges do not matter

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response("", scores={"x": 1.0, "y": 5.0}), Response("", scores={"x": 0.0, "y": 5.0})])
    >>> votes(group, judges=["x", "y"])[0].wins
    [[0.5, 0.75], [0.25, 0.5]]
    """
    wins = labels.vote([scores(group, judge) for judge in judges])
    return [replace(group, wins=wins, relevance=None, meta=dict(group.meta))]


def answer(text: str, pattern: str = NUMBER) -> str | None:
    """The last match of a pattern in a text (its first bracket, if it has one); numbers in their shortest form.

    >>> answer("16 - 3 - 4 = 9, so $18.00."), answer("A: (b)", r"[(](.)[)]"), answer("no idea")
    ('18', 'b', None)
    """
    found = None
    for found in re.finditer(pattern, text):                  # noqa: B007 - the last one
        pass
    if found is None:
        return None
    said = (found[1] if found.re.groups else found[0]).strip()
    try:
        value = Decimal(said.replace(",", ""))
        return format(value.normalize() + 0, "f") if value.is_finite() else said
    except InvalidOperation:
        return said


def majority(group: Group, *, pattern=NUMBER, least=0.0) -> list[Group]:
    """Pseudo-labels by self-consistency: the answer that most responses give is taken for right.

    relevance_i = 1[answer_i = argmax_a #{j: answer_j = a}]

    pattern     its last match in a response is the answer (its first bracket, if it has one); the last number
    least       the share of all responses that the majority needs; 0
    Edge        two answers equally frequent, no answer at all, or too small a majority: the group is removed; a response
                without an answer has relevance 0
    Relations   `meta["answer"]` becomes the majority's answer, `meta["majority"]` its share: a verifier reads it as a reference
    Departs     -
    Reference   Wang et al., Self-Consistency, arXiv:2203.11171; Prasad et al., ScPO, arXiv:2411.04109

    >>> from data_tools.records import Response
    >>> group, = majority(Group("?", [Response(t) for t in ("it is 18", "so 18.0", "17!", "unsure")]))
    >>> group.relevance, group.meta
    ([1.0, 1.0, 0.0, 0.0], {'answer': '18', 'majority': 0.5})
    """
    said = [answer(content(r.text), pattern) for r in group.responses]
    ranked = Counter(a for a in said if a is not None).most_common(2)
    best, count = ranked[0] if ranked else (None, 0)
    if not count or ranked[1:] and ranked[1][1] == count or count < least * len(said):
        return []
    return [replace(group, relevance=[float(a == best) for a in said], wins=None,
                    meta={**group.meta, "answer": best, "majority": count / len(said)})]
