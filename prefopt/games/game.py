"""Symmetric preference games: P(i beats j) between the responses to a prompt, and the policy that a KL is measured from."""
from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Game", "LARGEST", "beyond", "from_file"]

LARGEST = 512                                                 # items that solvers of dense systems take
TOLERANCE = 1e-6                                              # of P + P^T = 1, which figures of a file round


class Game:
    """P(i beats j), (X, V, V), for X prompts with V responses each, and a reference policy, (X, V).

    payoff      one matrix (V, V) or one for each prompt (X, V, V); P + P^T = 1, so that its diagonal is 1/2
    reference   positive weights, (V) or (X, V), which are normalised; uniform if left out
    actions     names of the responses

    >>> Game([[0.5, 0.7], [0.3, 0.5]], [3, 1]).reference
    tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """

    def __init__(self, payoff, reference=None, *, actions: Sequence[str] | None = None, name: str = "game"):
        self.name = name
        self.payoff = checked_payoff(payoff)
        self.prompts, self.items = self.payoff.shape[:2]
        self.reference = checked_reference(reference, self.prompts, self.items)
        self.actions = [str(n) for n in range(self.items)] if actions is None else [str(a) for a in actions]
        if len(set(self.actions)) != self.items:
            raise ValueError(f"actions: {self.items} different names are needed, one for each row of the payoff, found "
                             f"{self.actions}")

    def with_reference(self, reference) -> Game:
        return Game(self.payoff, reference, actions=self.actions, name=self.name)


def checked_payoff(payoff) -> Tensor:
    try:
        P = torch.as_tensor(payoff, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"payoff: a square table of numbers is needed, row i holding P(i beats j): {error}") from None
    P = P[None] if P.ndim == 2 else P
    if P.ndim != 3 or P.shape[1] != P.shape[2] or not P.numel():
        raise ValueError(f"payoff: a square matrix (V, V), or one for each prompt (X, V, V), is needed, found {tuple(P.shape)}")
    where = lambda x: f" of prompt {x}" if len(P) > 1 else ""
    for x, i, j in (~((P >= 0) & (P <= 1))).nonzero()[:1].tolist():
        raise ValueError(f"payoff{where(x)}: P({i} beats {j}) = {P[x, i, j]:g} is no probability: numbers are from 0 to 1; of "
                         f"scores take sigmoid(s_i - s_j)")
    for x, i, j in ((P + P.mT - 1).abs() > TOLERANCE).nonzero()[:1].tolist():
        if i == j:
            raise ValueError(f"payoff{where(x)}: P({i} beats {i}) = {P[x, i, i]:g}, and a response beats itself with 1/2: set "
                             f"the diagonal to 0.5")
        raise ValueError(f"payoff{where(x)}: P({i} beats {j}) = {P[x, i, j]:g} and P({j} beats {i}) = {P[x, j, i]:g} do not sum "
                         f"to 1: a game of preferences has P + P^T = 1; mend one of them, or average both orders, "
                         f"(P + 1 - P^T) / 2")
    return (P + 1 - P.mT) / 2


def checked_reference(reference, prompts: int, items: int) -> Tensor:
    if reference is None:
        return torch.full((prompts, items), 1 / items, dtype=torch.float64)
    try:
        weights = torch.as_tensor(reference, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reference: a weight for each response is needed: {error}") from None
    weights = weights.expand(prompts, -1) if weights.ndim == 1 else weights
    if weights.shape != (prompts, items):
        raise ValueError(f"reference: a weight for each of {items} responses is needed, found shape {tuple(weights.shape)}")
    for x, i in (~((weights > 0) & (weights < math.inf))).nonzero()[:1].tolist():
        raise ValueError(f"reference: weight {i} is {weights[x, i]:g}, and the KL to a reference is finite only where it is "
                         f"positive: give every response a weight above 0")
    return weights / weights.sum(-1, keepdim=True)


def beyond(items: int, largest: int, what: str) -> None:
    """An error where an exact computation would not end soon."""
    if items > largest:
        raise ValueError(f"{what} takes up to {largest} responses, found {items}: draw them instead of summing over all of them, "
                         f"with `samples: 100` in the game file (play(..., samples=100))")


def from_file(path: str | Path) -> Game:
    """A payoff matrix from a CSV file: a row of numbers for each response, with a row and a column of names if there are
    any."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no payoff file {str(path)!r}: give a CSV file of P(i beats j)")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    names = None
    if rows and not all(map(_number, rows[0][1:])):
        names, rows = rows[0], rows[1:]
    if rows and not _number(rows[0][0]):
        rows = [row[1:] for row in rows]
        names = names[1:] if names and len(names) > len(rows) else names
    for n, row in enumerate(rows, 1):
        if len(row) != len(rows) or not all(map(_number, row)):
            raise ValueError(f"{path}: row {n} of the payoff should hold {len(rows)} numbers, one for each response, found "
                             f"{', '.join(row)!r}")
    try:
        return Game([[float(cell) for cell in row] for row in rows], actions=names, name=path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
