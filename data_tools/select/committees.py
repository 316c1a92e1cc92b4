"""Several winners from several rankings, with every kind of response represented as it should be."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

from data_tools.columns import nearest
from data_tools.records import Group
from data_tools.rules import keep, note, place, scores

__all__ = ["VOTING", "multiwinner"]

# (m candidates, k winners) -> what each place of a ranking is worth, and how the winners' values add up, best first
VOTING: dict[str, Callable[[int, int], tuple[list[float], list[float]]]] = {
    "borda": lambda m, k: ([m - 1.0 - p for p in range(m)], [1.0] * k),
    "sntv": lambda m, k: ([float(p < 1) for p in range(m)], [1.0] * k),
    "bloc": lambda m, k: ([float(p < k) for p in range(m)], [1.0] * k),
    "chamberlin_courant": lambda m, k: ([m - 1.0 - p for p in range(m)], [1.0] + [0.0] * (k - 1)),
    "pav": lambda m, k: ([float(p < k) for p in range(m)], [1.0 / (j + 1) for j in range(k)]),
}


def place_values(values: Sequence[float | None], worth: Sequence[float]) -> list[float]:
    """What the place of each candidate is worth in one ranking; equal scores share their places, and so do the unranked, last.

    >>> place_values([0.2, 0.9, 0.2, None], [3.0, 2.0, 1.0, 0.0])
    [1.5, 3.0, 1.5, 0.0]
    """
    rank = lambda i: float("inf") if values[i] is None else -values[i]
    order, found, start = sorted(range(len(values)), key=rank), [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end < len(order) and rank(order[end]) == rank(order[start]):
            end += 1
        for i in order[start:end]:
            found[i] = sum(worth[start:end]) / (end - start)
        start = end
    return found


def committee(rankings: Sequence[Sequence[float | None]], k: int, *, by: str = "borda", kinds: Sequence[Hashable] | None = None,
              least: Mapping = {}, most: Mapping = {}) -> list[int]:
    """k candidates in the order of election: each the greatest gain of F among those that leave the bounds reachable.

    F(S) = sum over rankings of sum_j w_j (j-th highest place value in S)

    >>> committee([[3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]], 2, by="chamberlin_courant")       # one for each party
    [0, 3]
    """
    if by not in VOTING:
        raise ValueError(f"by names a way to vote, {', '.join(VOTING)}; found {by!r}{nearest(by, VOTING)}")
    if not rankings:
        raise ValueError("an election needs at least one ranking")
    size = len(rankings[0])
    kinds = [None] * size if kinds is None else kinds
    reachable(Counter(kinds), k, least, most)
    worth, weights = VOTING[by](size, k)
    ballots = [place_values(ranking, worth) for ranking in rankings]
    seats: list[list[float]] = [[] for _ in ballots]          # of each ranking, what the elected are worth, best first
    elected: list[int] = []
    needed, held = Counter(least), Counter()
    while len(elected) < k:
        free = k - len(elected) - needed.total()
        open_to = [i for i in range(size) if i not in elected and held[kinds[i]] < most.get(kinds[i], k)
                   and (free > 0 or needed[kinds[i]] > 0)]
        gains = [sum(gain(seat, ballot[i], weights) for seat, ballot in zip(seats, ballots, strict=True)) for i in open_to]
        best = open_to[gains.index(max(gains))]
        for seat, ballot in zip(seats, ballots, strict=True):
            seat.append(ballot[best])
            seat.sort(reverse=True)
        elected.append(best)
        held[kinds[best]] += 1
        needed[kinds[best]] = max(0, needed[kinds[best]] - 1)
    return elected


def gain(seat: Sequence[float], value: float, weights: Sequence[float]) -> float:
    """How much a further elected candidate of this value adds for one ranking.

    >>> gain([3.0, 1.0], 2.0, [1.0, 0.5, 0.25])               # 3 + 1 + 1/4 after, 3 + 1/2 before
    0.75
    """
    at = sum(v >= value for v in seat)
    return weights[at] * value + sum((weights[j + 1] - weights[j]) * seat[j] for j in range(at, len(seat)))


def reachable(there: Counter, k: int, least: Mapping, most: Mapping) -> None:
    """An error that names the bounds which cannot all be kept."""
    for name in {**least, **most}:
        if name not in there:
            raise ValueError(f"there is a bound on {name!r}, of which there is no candidate{nearest(name, there)}; there are: "
                             f"{', '.join(f'{n} of {kind!r}' for kind, n in there.items())}")
    for kind, n in there.items():
        if least.get(kind, 0) > min(n, most.get(kind, n)):
            raise ValueError(f"at least {least[kind]} of {kind!r} are wanted, and there are {n}"
                             f"{f', of which at most {most[kind]} may be taken' if kind in most else ''}")
    highest = sum(min(n, most.get(kind, n)) for kind, n in there.items())
    if not 1 <= k <= highest or sum(least.values()) > k:
        raise ValueError(f"k={k} winners cannot be had: {there.total()} candidates, of which the bounds allow at most {highest} "
                         f"and ask for at least {sum(least.values())}")


def multiwinner(group: Group, *, k, judges, by="borda", field=None, least: Mapping = {}, most: Mapping = {}) -> list[Group]:
    """k responses chosen by several judges, with bounds on how many of each kind (fair multiwinner voting).

    F(S) = sum over judges of sum_j w_j v(j-th best place in S), greedily,   least_g <= |S of kind g| <= most_g

    k           winners
    judges      the names of their scores: only the order counts
    by          borda (v = m - 1 - place), sntv (v = 1 for the first), bloc (v = 1 within the first k), chamberlin_courant (each
                judge's best winner, by Borda: diverse), pav (a judge's j-th winner among the first k counts 1/j: proportional)
    field       the key of a response's meta that says of which kind it is (the model, a topic)
    least, most   {kind: how many}
    Edge        equal scores share their places; of equal gains the first is elected; bounds that cannot be kept are an error
    Relations   one judge, and borda or bloc: the k best. borda, sntv and bloc are exact under bounds; the others are at least
                1 - 1/e of the best without bounds, 1/2 with upper ones
    Departs     -
    Reference   Boehmer et al., Subset Selection Based On Multiple Rankings in the Presence of Bias, arXiv:2306.09835

    >>> from data_tools.records import Response
    >>> written = [("x", 4.0), ("x", 3.0), ("y", 2.0), ("y", 1.0)]
    >>> group = Group("?", [Response(str(r), scores={"r": r}, meta={"generator": who}) for who, r in written])
    >>> chosen, = multiwinner(group, k=2, judges=["r"], field="generator", most={"x": 1})
    >>> [r.text for r in chosen.responses]
    ['4.0', '2.0']
    """
    kinds = None if field is None else [note(group, r, field) for r in group.responses]
    if kinds is None and (least or most):
        raise ValueError("bounds on kinds need field=, the key of a response's meta that says of which kind it is")
    rankings = [scores(group, judge) for judge in judges]
    try:
        return [keep(group, sorted(committee(rankings, k, by=by, kinds=kinds, least=least, most=most)))]
    except ValueError as error:
        raise ValueError(f"{place(group)}{error}") from None
