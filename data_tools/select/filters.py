"""Which responses, and which groups, are worth keeping: one group at a time."""
from __future__ import annotations

import json

from data_tools.records import Group
from data_tools.rules import keep, number, place, scores

__all__ = ["at_least", "between", "distinct", "pass_rate", "scored", "spread"]


def scored(group: Group, *, score="reward") -> list[Group]:
    """Only the responses that could be scored.

    Edge        a score that is missing is dropped where the response's meta says under "unscored" why there is none, or where
                it is NaN or infinite; where nobody says why, it is an error. A group without a response left is removed
    Relations   other rules take a missing score for an error: this one first lets them go on

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response("a", scores={"r": 1.0}), Response("b", meta={"unscored": {"r": "timed out"}})])
    >>> [r.text for r in scored(group, score="r")[0].responses]
    ['a']
    """
    absent = [k for k, r in enumerate(group.responses)
              if score in r.meta.get("unscored", {}) or not abs(r.scores.get(score, 0.0)) < float("inf")]
    left = keep(group, [k for k in range(len(group.responses)) if k not in absent])
    scores(left, score)
    return [left] if left.responses else []


def distinct(group: Group) -> list[Group]:
    """Responses whose text has not occurred before in the group.

    Edge        a list of messages is compared as a whole

    >>> from data_tools.records import Response
    >>> [r.text for r in distinct(Group("?", [Response("a"), Response("b"), Response("a")]))[0].responses]
    ['a', 'b']
    """
    first: dict[str, int] = {}
    for k, response in enumerate(group.responses):
        first.setdefault(json.dumps(response.text, sort_keys=True), k)
    return [keep(group, first.values())]


def at_least(group: Group, *, least, score="reward") -> list[Group]:
    """Only the responses with a score of at least `least`: a verifier's, a likelihood under the policy, a judge's.

    least       the lowest score that stays
    Edge        a group without a response left is removed

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response("a", scores={"r": 1.0}), Response("b", scores={"r": 2.0})])
    >>> [r.text for r in at_least(group, score="r", least=2)[0].responses]
    ['b']
    """
    chosen = [k for k, value in enumerate(scores(group, score)) if value >= least]
    return [keep(group, chosen)] if chosen else []


def spread(group: Group, *, least=0.0, score="reward") -> list[Group]:
    """Groups whose scores differ: max r - min r > least.

    least       0 removes groups of equal scores alone
    Edge        no response or one: removed

    >>> from data_tools.records import Response
    >>> spread(Group("?", [Response("a", scores={"r": 1.0}), Response("b", scores={"r": 1.0})]), score="r")
    []
    """
    values = scores(group, score)
    return [group] if values and max(values) - min(values) > least else []


def pass_rate(group: Group, *, low, high, threshold=0.5, score="reward") -> list[Group]:
    """Prompts of the right difficulty: a share of the responses passes.

    keep = low <= share of r > threshold <= high

    low, high   bounds of the share, both included
    threshold   a response with a higher score passes; 0.5
    Edge        no responses: an error, for nothing is known of the prompt
    Relations   `between` for a difficulty in the meta; `meta["pass_rate"]` is the share

    >>> from data_tools.records import Response
    >>> group = Group("?", [Response("", scores={"r": r}) for r in (1.0, 0.0, 0.0, 0.0)])
    >>> len(pass_rate(group, low=0.25, high=0.75, score="r")), len(pass_rate(group, low=0.5, high=0.75, score="r"))
    (1, 0)
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"a share lies in [0, 1] and low <= high, found low={low}, high={high}")
    values = scores(group, score)
    if not values:
        raise ValueError(f"{place(group)}there are no responses, so it has no pass rate: generate and score first")
    found = keep(group, range(len(values)))
    found.meta["pass_rate"] = sum(value > threshold for value in values) / len(values)
    return [found] if low <= found.meta["pass_rate"] <= high else []


def between(group: Group, *, field="difficulty", low=float("-inf"), high=float("inf")) -> list[Group]:
    """Groups with a number of their meta in a range, both ends included.

    field       "difficulty", as data_tools.difficulty writes it
    low, high   bounds of the number, both included; none
    Edge        a group without the number is an error

    >>> between(Group("?", [], meta={"difficulty": 0.3}), low=0.5)
    []
    """
    return [group] if low <= number(group, field) <= high else []
