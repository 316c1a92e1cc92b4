"""Several rewards as one: weighted sums of normalised components, gates, caps, products, ensembles, tiers.

A way to combine is a function (scores, row) -> number, with its settings bound; `Combined` computes the components, keeps
each of them in the row's `scores`, and calls it. A component that is missing leaves the combination without a score: it is
never counted as 0.

Weights may be a function of the row (Row -> {component: weight}): dynamic, constrained and prompt-aware weights go there.
"""
from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_tools.columns import nearest
from data_tools.records import Group
from prefopt.parts import checked
from rewards.base import Reward, Row, ScoringError, as_reward, rows_of, values_of

__all__ = ["Chosen", "Combined", "chosen", "constants", "ensemble", "load", "lower_bound", "mean", "minimum", "product", "save",
           "standardised", "tiers", "weighted", "weighted_sum"]

Scores = Mapping[str, float]
Weights = Mapping[str, float] | Callable[[Row], Mapping[str, float]]


# --------------------------------------------------------------------------------------------------------- normalisation
def constants(groups: Iterable[Group], names: Sequence[str]) -> dict[str, dict]:
    """Mean, standard deviation (divided by n) and number of each component on a reference set, frozen for later use.

    >>> from data_tools.records import Response
    >>> constants([Group("p", [Response("a", scores={"x": 1.0}), Response("b", scores={"x": 3.0})])], ["x"])
    {'x': {'mean': 2.0, 'std': 1.0, 'n': 2}}
    """
    rows, found = rows_of(list(groups)), {}
    for name in names:
        values = [row.response.scores[name] for row in rows if name in row.response.scores]
        if len(set(values)) < 2:
            known = sorted({n for row in rows for n in row.response.scores})
            raise ValueError(f"the reference set of {len(rows)} responses has {len(set(values))} different scores of {name!r}, "
                             f"so it has no scale{nearest(name, known)}; scores there: {', '.join(known) or 'none'}")
        found[name] = {"mean": statistics.fmean(values), "std": statistics.pstdev(values), "n": len(values)}
    return found


def save(found: Mapping[str, Mapping], path) -> None:
    Path(path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def load(path) -> dict[str, dict]:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(c, dict) and c.keys() >= {"mean", "std"} and c["std"] > 0
                                              for c in found.values()):
        raise ValueError(f"{path}: no normalisation constants, which are {{component: {{mean: ..., std: ...}}}} with std > 0; "
                         "make them with rewards.combine.constants and save")
    return found


def standardised(scores: Scores, frozen: Mapping[str, Mapping], caps: Mapping[str, float]) -> dict[str, float]:
    """(x - mean) / std with frozen constants, then at most the cap on either side.

    >>> standardised({"x": 9.0, "y": 3.0}, {"x": {"mean": 1.0, "std": 2.0}}, {"x": 3.0})
    {'x': 3.0, 'y': 3.0}
    """
    out = {}
    for name, x in scores.items():
        z = (x - frozen[name]["mean"]) / frozen[name]["std"] if name in frozen else x
        out[name] = max(-caps[name], min(caps[name], z)) if name in caps else z
    return out


# -------------------------------------------------------------------------------------------------------- ways to combine
def weighted_sum(scores: Scores, row: Row | None = None, *, weights: Weights, frozen: Mapping[str, Mapping] = {},
                 caps: Mapping[str, float] = {}, gates: Mapping[str, float] = {}, closed: float = 0.0) -> float:
    """R = g sum_k w_k z_k + (1 - g) closed

    weights     of every component, or a function of the row that gives them; 0 only logs a component
    frozen      {component: {mean, std}}: z = (x - mean) / std; components without constants stay as they are
    caps        {component: c}: z is kept in [-c, c]
    gates       {component: threshold}: g = 1 where the component (as it came) is at least its threshold, all of them, else 0
    closed      the reward where a gate is shut; 0
    Edge        one component of weight 1 is itself
    Relations   weights that are all scaled alike leave group-normalised advantages as they are
    Departs     -
    Reference   common practice: rule rewards of DeepSeek-R1 and the like, safety as a veto in RLUF (P[Love])

    >>> weighted_sum({"help": 2.0, "safe": 1.0}, weights={"help": 1.0, "safe": 0.5})
    2.5
    >>> weighted_sum({"help": 2.0, "safe": 0.1}, weights={"help": 1.0, "safe": 0.5}, gates={"safe": 0.5}, closed=-1.0)
    -1.0
    """
    share = weights(row) if callable(weights) else weights
    complete(share, scores, "weights")
    if any(scores[name] < least for name, least in gates.items()):
        return closed
    z = standardised(scores, frozen, caps)
    return math.fsum(share[name] * z[name] for name in scores)


def product(scores: Scores, row: Row | None = None) -> float:
    """prod_k x_k.

    Edge        any component 0: 0; two negative components make a positive reward

    >>> product({"length": 0.5, "relevance": 2.0})
    1.0
    """
    return math.prod(scores.values())


def mean(scores: Scores, row: Row | None = None) -> float:
    """Mean of the members of an ensemble."""
    return statistics.fmean(scores.values())


def minimum(scores: Scores, row: Row | None = None) -> float:
    """The worst member of an ensemble: a response has to please all."""
    return min(scores.values())


def lower_bound(scores: Scores, row: Row | None = None, *, k: float = 1.0) -> float:
    """mean - k std over the members of an ensemble, std divided by n: less where they disagree.

    k           0 is the mean; 1
    Edge        members that agree: their value at any k
    Relations   two members and k = 1: the minimum
    Reference   Coste et al., arXiv:2310.02743 (who subtract the variance)

    >>> lower_bound({"a": 1.0, "b": 3.0})
    1.0
    """
    return statistics.fmean(scores.values()) - k * statistics.pstdev(scores.values())


def in_ranges(scores: Scores, row: Row | None = None, *, weights: Mapping[str, float], ranges: Mapping) -> float:
    """`weighted_sum` of components that must lie in their ranges."""
    for name, (low, high) in ranges.items():
        if not low <= scores[name] <= high:
            raise ScoringError(f"component {name!r} is {scores[name]}, outside its range [{low}, {high}]")
    return weighted_sum(scores, row, weights=weights)


def known(given: Iterable[str], names: Iterable[str], what: str) -> None:
    for name in given:
        if name not in names:
            raise ValueError(f"{what} name {name!r}, which is no component{nearest(name, names)}; components: {', '.join(names)}")


def complete(given: Iterable[str], names: Iterable[str], what: str) -> None:
    known(given, names, what)
    left = [name for name in names if name not in given]
    if left:
        raise ValueError(f"{what} leave out {', '.join(left)}: a component that should only be logged has weight 0")


# ---------------------------------------------------------------------------------------------------------------- reward
@dataclass(frozen=True)
class Combined:
    """Components and the function that makes one number of them. The components stay in the row's `scores`."""
    parts: Mapping[str, Reward]
    by: Callable[[Scores, Row], float]
    name: str = "combined"

    def settings(self) -> dict:
        bound = self.by.keywords if isinstance(self.by, partial) else {}
        return {"parts": {name: [part.name, part.settings()] for name, part in self.parts.items()},
                "by": {function_name(self.by): {k: function_name(v) if callable(v) else v for k, v in bound.items()}}}

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        columns = {name: values_of(part, rows, "mark") for name, part in self.parts.items()}
        return [self.one(row, {name: column[n] for name, column in columns.items()}) for n, row in enumerate(rows)]

    def one(self, row: Row, found: Mapping[str, float | ScoringError]) -> float | ScoringError:
        wrong = {name: x for name, x in found.items() if isinstance(x, ScoringError)}
        row.response.scores.update({name: x for name, x in found.items() if name not in wrong})
        for name in wrong:
            row.response.scores.pop(name, None)
        if wrong:
            return ScoringError("lacks its component " + "; ".join(f"{name!r}: {x}" for name, x in wrong.items()))
        return self.by(found, row)


def function_name(function: Callable) -> str:
    bare = function.func if isinstance(function, partial) else function
    return f"{bare.__module__}:{bare.__qualname__}" if hasattr(bare, "__qualname__") else type(bare).__qualname__


def named(parts: Mapping[str, object]) -> dict[str, Reward]:
    """Components from rewards, functions or what `rewards.index.find` takes; null is the reward of that name."""
    from rewards.index import find
    return {name: as_reward(find(name if part is None else part) if isinstance(part, (str, Mapping, type(None))) else part, name)
            for name, part in parts.items()}


def weighted(*, parts: Mapping[str, object], weights: Weights, normalise: Mapping | str | None = None,
             caps: Mapping[str, float] = {}, gates: Mapping[str, float] = {}, closed: float = 0.0) -> Reward:
    """`weighted_sum` of rewards; `normalise` is a file of frozen constants, or the constants.

    parts       {component: reward}, a reward as in `rewards.index.find`
    """
    frozen = load(normalise) if isinstance(normalise, (str, Path)) else normalise or {}
    if not callable(weights):
        complete(weights, parts, "weights")
    for what, given in (("constants", frozen), ("caps", caps), ("gates", gates)):
        known(given, parts, what)
    return Combined(named(parts), partial(weighted_sum, weights=weights, frozen=frozen, caps=caps, gates=gates, closed=closed))


def tiers(*, parts: Mapping[str, object], weights: Mapping[str, float], steps: Mapping[str, float],
          ranges: Mapping[str, Sequence[float]]) -> Reward:
    """A weighted sum in which no later component can overturn an earlier one; an error where the weights would let it.

    w_k step_k > sum_{j > k} w_j (high_j - low_j)

    weights     positive, the most important component first
    steps       {component: the smallest difference that counts}, for all but the last
    ranges      {component: [low, high]}; a score outside is an error of its row
    """
    for what, given in (("weights", weights), ("ranges", ranges)):
        complete(given, parts, what)
    order = list(weights)
    complete(steps, order[:-1], "steps")
    for n, name in enumerate(order[:-1]):
        rest = sum(weights[later] * (ranges[later][1] - ranges[later][0]) for later in order[n + 1:])
        if not weights[name] * steps[name] > rest:
            raise ValueError(f"a step of {name!r} is worth {weights[name] * steps[name]:g}, what comes after it up to {rest:g}, "
                             f"which could overturn it: lower the weights of {', '.join(order[n + 1:])}, or use `weighted`")
    return Combined(named(parts), partial(in_ranges, weights=weights, ranges=ranges))


WAYS = {"mean": mean, "minimum": minimum, "lower_bound": lower_bound, "product": product}


def ensemble(*, parts: Mapping[str, object], by: str = "mean", k: float | None = None) -> Reward:
    """Members of an ensemble, or factors, by `mean`, `minimum`, `lower_bound` (its k) or `product`."""
    if by not in WAYS:
        raise ValueError(f"an ensemble is combined by one of {', '.join(WAYS)}, found {by!r}{nearest(by, WAYS)}")
    return Combined(named(parts), WAYS[by] if k is None else partial(WAYS[by], **checked(by, WAYS[by], {"k": k})))


@dataclass(frozen=True)
class Chosen:
    """Each row is scored by the reward that one of its fields names."""
    field: str
    rewards: Mapping[str, Reward]
    name: str = "chosen"

    def settings(self) -> dict:
        return {"field": self.field, "rewards": {k: {r.name: r.settings()} for k, r in self.rewards.items()}}

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        out: list = [None] * len(rows)
        of: dict[str, list[int]] = {}
        for n, row in enumerate(rows):
            which = row.fields().get(self.field)
            if which in self.rewards:
                of.setdefault(which, []).append(n)
            else:
                out[n] = ScoringError(f"the field {self.field!r} is {which!r}{nearest(str(which), self.rewards)}, which names "
                                      f"none of the rewards {', '.join(self.rewards)}")
        for which, places in of.items():
            for n, value in zip(places, values_of(self.rewards[which], [rows[n] for n in places], "mark"), strict=True):
                out[n] = value
        return out


def chosen(*, field: str, parts: Mapping[str, object]) -> Reward:
    """A reward for each row, chosen by a field of its record: {"verifier": "math"} beside {"verifier": "code"}.

    field       whose value names the part
    parts       {value: reward}, a reward as in `rewards.index.find`
    Edge        a value that names no part is an error of the row
    """
    return Chosen(field, named(parts))
