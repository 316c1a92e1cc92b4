"""Small games with known equilibria. `game: rps`, or `game: {random: {items: 10, seed: 3}}` in a game file."""
from __future__ import annotations

import torch

from prefopt.games.game import Game

__all__ = ["bradley_terry", "bt3", "cycle", "five_cycle", "random", "rps", "rps_plus_dominated", "weighted_rps"]


def rps() -> Game:
    """Rock, paper, scissors; each beats the next. Equilibrium (1/3, 1/3, 1/3)."""
    return Game([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], actions=["rock", "scissors", "paper"], name="rps")


def cycle(*, a=0.5, b=0.5, c=0.5) -> Game:
    """A cycle of three: 0 beats 1 with 1/2 + a, 2 beats 0 with 1/2 + b, 1 beats 2 with 1/2 + c. Equilibrium (c, b, a) / (a + b +
    c)."""
    return Game([[0.5, 0.5 + a, 0.5 - b], [0.5 - a, 0.5, 0.5 + c], [0.5 + b, 0.5 - c, 0.5]], name="cycle")


def weighted_rps() -> Game:
    """An uneven cycle of three. Equilibrium (1/8, 3/8, 1/2)."""
    return Game([[0.5, 0.9, 0.2], [0.1, 0.5, 0.6], [0.8, 0.4, 0.5]], name="weighted_rps")


def rps_plus_dominated() -> Game:
    """A cycle of three and a response that loses to each. Equilibrium (1/3, 1/3, 1/3, 0)."""
    return Game([[0.5, 0.9, 0.1, 0.8], [0.1, 0.5, 0.9, 0.8], [0.9, 0.1, 0.5, 0.8], [0.2, 0.2, 0.2, 0.5]],
                name="rps_plus_dominated")


def five_cycle() -> Game:
    """Each of five beats the next two with 3/4. Equilibrium uniform."""
    step = (torch.arange(5)[None, :] - torch.arange(5)[:, None]) % 5
    return Game(torch.where(step == 0, 0.5, torch.where(step <= 2, 0.75, 0.25)), name="five_cycle")


def bradley_terry(*, rewards=(2.0, 1.0, 0.0)) -> Game:
    """P(i beats j) = sigmoid(r_i - r_j): no cycle. Equilibrium: the best response."""
    r = torch.as_tensor(rewards, dtype=torch.float64)
    return Game(torch.sigmoid(r[:, None] - r[None, :]), name="bradley_terry")


def bt3() -> Game:
    """Bradley-Terry with rewards 2, 1, 0. Equilibrium (1, 0, 0)."""
    return Game(bradley_terry().payoff, name="bt3")


def random(*, items=10, prompts=1, seed=0) -> Game:
    """Uniform probabilities above the diagonal, and a reference of normal logits."""
    g = torch.Generator().manual_seed(seed)
    upper = torch.rand(prompts, items, items, generator=g, dtype=torch.float64).triu(1)
    lower = torch.tril(1 - upper.mT, -1)
    logits = torch.randn(prompts, items, generator=g, dtype=torch.float64)
    return Game(upper + lower + torch.eye(items, dtype=torch.float64) / 2, logits.softmax(-1), name=f"random{items}")
