"""Preferences between the arms of a bandit: one-token responses whose log-probabilities are the parameters."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.batch import Batch
from prefopt.config import assemble


class Bandit(NamedTuple):
    reward: Tensor                                            # (V) true rewards
    ref: Tensor                                               # (V) log-probabilities of the reference
    clean: Tensor                                             # (V, V) how often i was preferred to j
    noisy: Tensor                                             # the same after flipping a share of the labels


def draw(seed: int, *, flip: float, pairs: int, arms: int = 20) -> Bandit:
    """Pairs of different arms, drawn uniformly, with Bradley-Terry labels."""
    source = torch.Generator().manual_seed(seed)
    reward = torch.randn(arms, generator=source, dtype=torch.float64)
    ref = torch.randn(arms, generator=source, dtype=torch.float64).log_softmax(0)
    one = torch.randint(arms, (pairs,), generator=source)
    other = (one + torch.randint(1, arms, (pairs,), generator=source)) % arms
    wins = torch.rand(pairs, generator=source) < torch.sigmoid(reward[one] - reward[other])
    flipped = torch.rand(pairs, generator=source) < flip
    return Bandit(reward, ref, counts(one, other, wins, arms), counts(one, other, wins ^ flipped, arms))


def counts(one: Tensor, other: Tensor, wins: Tensor, arms: int) -> Tensor:
    """(V, V), how often i was preferred to j."""
    winner, loser = torch.where(wins, one, other), torch.where(wins, other, one)
    return torch.bincount(winner * arms + loser, minlength=arms * arms).view(arms, arms).double()


def pairs_of(preferred: Tensor, ref: Tensor) -> tuple[Batch, Tensor]:
    """One group for each ordered pair of arms that was seen, weighted by how often; and the arm of each row."""
    winner, loser = preferred.nonzero(as_tuple=True)
    times, n = preferred[winner, loser], len(winner)
    arm = torch.stack([winner, loser], 1).flatten()
    return Batch({"group": torch.arange(n).repeat_interleave(2), "mask": torch.ones(2 * n, 1),
                  "relevance": torch.tensor([1.0, 0.0]).repeat(n), "logp_ref": ref[arm, None],
                  "weight": (times * n / times.sum()).repeat_interleave(2)}), arm


def fit(recipe: str, departures: dict, preferred: Tensor, ref: Tensor) -> Tensor:
    """log pi - log pi_ref of every arm at the optimum of a recipe (L-BFGS in float64)."""
    objective = assemble(recipe, departures)
    batch, arm = pairs_of(preferred, ref)
    batch = objective.annotate(batch)
    theta = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=40, tolerance_grad=1e-9, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = objective.loss(batch.with_columns(logp=theta.log_softmax(0)[arm, None])).value
        value.backward()
        return value

    optimizer.step(loss)
    return theta.detach().log_softmax(0) - ref
