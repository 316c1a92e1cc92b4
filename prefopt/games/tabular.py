"""Tables that learn: policies of one token, on which objectives and update rules are those of language models.

A policy is logits (X, V) in float64. What a run would sample is either summed over, every pair with its probability as the
weight of its group, or drawn. There is no loss here.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_tools.batch import Batch
from prefopt.games.game import Game, beyond
from prefopt.objectives import PreferenceObjective
from prefopt.parts import kind
from prefopt.policy import PolicyObjective
from prefopt.references import Moving
from prefopt.update import plain

__all__ = ["Algorithm", "Draws", "Policies", "Table", "averaged", "itself", "mixture", "play", "reference", "scores", "uniform",
           "wins"]

PAIRS = 64                                                    # responses whose pairs are summed over


# ------------------------------------------------------------------------------------------------------------- policies
class Policies(NamedTuple):
    """Log-probabilities (X, V): the policy as it is, the reference, and the policy whose parameters are averaged."""
    now: Tensor
    reference: Tensor
    averaged: Tensor


Chosen = Callable[[Policies, int], Tensor]                    # which policy to sample from in iteration t, log-probabilities


def itself(policies: Policies, t: int) -> Tensor:
    return policies.now


def reference(policies: Policies, t: int) -> Tensor:
    return policies.reference


def averaged(policies: Policies, t: int) -> Tensor:
    return policies.averaged


def uniform(policies: Policies, t: int) -> Tensor:
    return torch.zeros_like(policies.now).log_softmax(-1)


def mixture(policies: Policies, t: int, *, share: Callable[[int], float]) -> Tensor:
    """The geometric mixture pi^(1 - c) pi_ref^c, c = share(t). Of one token it is the mixture of logits as well."""
    c = share(t)
    return ((1 - c) * policies.now + c * policies.reference).log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------ algorithms
def wins(game: Game) -> Tensor:
    """What a reward averages over opponents: probabilities of winning."""
    return game.payoff


def scores(game: Game, *, limit=100.0) -> Tensor:
    """What a reward averages over opponents: log-odds of winning, the score of a general preference model."""
    return torch.logit(game.payoff).clamp(-limit, limit)


@dataclass(frozen=True)
class Algorithm:
    """An objective, whom its responses come from and play against, and how it is minimised.

    first, second   whom the responses of a pair come from; of losses of single responses `first` counts
    opponent        whom rewards are taken against
    reward          game -> (X, V, V), what a response gets against an opponent
    update, optimizer, rate   the update rule, what makes an optimiser of parameters, and its learning rate at iteration t
    steps           updates of an iteration, on what was sampled at its start; 0 goes on to the minimum, by L-BFGS
    average         how the parameters of `averaged` follow the policy's
    """
    objective: PreferenceObjective | PolicyObjective
    rate: Callable[[int], float] = lambda t: 0.0
    first: Chosen = itself
    second: Chosen = itself
    opponent: Chosen = itself
    reward: Callable[[Game], Tensor] = wins
    update: Callable = plain
    optimizer: Callable = partial(torch.optim.SGD, lr=0.0)
    steps: int = 1
    average: Moving = Moving(alpha=1.0, every=1)

    @property
    def compares(self) -> bool:
        """Whether the loss is one of pairs."""
        return isinstance(self.objective, PreferenceObjective) and kind(self.objective.ranking) == "Pairs"


class Draws(NamedTuple):
    """How responses are drawn: groups per prompt, and whether an oracle answers by 0 or 1 instead of a probability."""
    groups: int
    verdicts: bool
    generator: torch.Generator


# -------------------------------------------------------------------------------------------------------------- the table
class Table:
    """The parameters of a run and the gradient of its loss at them, as update rules call it (`prefopt.update.Gradient`).

    `renew` samples, or sums over, responses of the policy as it is; the log-probability of these is `logp_old`.
    """

    def __init__(self, game: Game, algorithm: Algorithm, *, start: Tensor | None = None, draws: Draws | None = None):
        if draws is None and algorithm.compares:
            beyond(game.items, PAIRS, "summing over all pairs")
        self.game, self.algorithm, self.draws, self.t = game, algorithm, draws, 0
        logits = (game.reference if start is None else start.expand_as(game.reference)).log()
        self.theta = nn.Parameter(logits.clone())
        self.reference = (logits if algorithm.objective.reference.moves else game.reference.log()).clone()
        self.averaged = logits.clone()
        self.reward = algorithm.reward(game)
        self.rows: tuple[Tensor, Tensor] = ()                 # prompt and response of each row
        self.batch: Batch | None = None                       # one optimiser step, annotated

    def policies(self) -> Policies:
        return Policies(*(x.detach().log_softmax(-1) for x in (self.theta, self.reference, self.averaged)))

    @torch.no_grad()
    def renew(self) -> None:
        policies = self.policies()
        first, second, opponent = (choose(policies, self.t).exp() for choose in (
            self.algorithm.first, self.algorithm.second, self.algorithm.opponent))
        made = self.summed if self.draws is None else self.drawn
        (x, y), columns = made(first, second, opponent)
        columns |= {"logp_old": policies.now[x, y, None], "logp_ref": policies.reference[x, y, None],
                    "mask": torch.ones(len(x), 1, dtype=torch.bool)}
        objective = self.algorithm.objective
        self.rows, self.batch = (x, y), objective.annotate(objective.estimate(Batch(columns)))

    def loss(self) -> Tensor:
        x, y = self.rows
        return self.algorithm.objective.loss(self.batch.with_columns(logp=self.theta.log_softmax(-1)[x, y, None])).value

    def __call__(self) -> Tensor:
        self.theta.grad = None
        value = self.loss()
        value.backward()
        return value.detach()

    # -------------------------------------------------------------------------------------- every response, or some of them
    def summed(self, first: Tensor, second: Tensor, opponent: Tensor) -> tuple[tuple, dict]:
        """Every response, or every ordered pair, as a group whose weight is its probability."""
        prompts, items = first.shape
        reward = (self.reward @ opponent[..., None]).squeeze(-1)
        if not self.algorithm.compares:
            x, y = (i.flatten() for i in torch.meshgrid(torch.arange(prompts), torch.arange(items), indexing="ij"))
            return (x, y), {"group": torch.arange(len(x)), "reward": reward[x, y], "weight": items * first[x, y]}
        x, i, j = (k.flatten() for k in torch.meshgrid(torch.arange(prompts), torch.arange(items), torch.arange(items),
                                                      indexing="ij"))
        weight = items ** 2 * first[x, i] * second[x, j]
        rows = x.repeat_interleave(2), torch.stack([i, j], 1).flatten()
        return rows, {**self.pairs(x, i, j), "reward": reward[rows], "weight": weight.repeat_interleave(2)}

    def drawn(self, first: Tensor, second: Tensor, opponent: Tensor) -> tuple[tuple, dict]:
        """Groups of responses with their opponent as a probe row behind them."""
        count, verdicts, g = self.draws
        pick = lambda p: torch.multinomial(p, count, replacement=True, generator=g).flatten()
        x = torch.arange(len(first)).repeat_interleave(count)
        mine = [pick(first), pick(second)] if self.algorithm.compares else [pick(first)]
        other = pick(opponent)
        said = [self.reward[x, y, other] for y in mine]
        if verdicts:
            said = [torch.bernoulli(p, generator=g) for p in said]
        size = len(mine) + 1
        rows = x.repeat_interleave(size), torch.stack([*mine, other], 1).flatten()
        out = self.pairs(x, *mine) if len(mine) == 2 else {}
        if len(mine) == 2:
            wins = torch.full((len(x), 3, 3), torch.nan, dtype=torch.float64)
            wins[:, :2, :2] = out["wins"]
            if verdicts:
                wins[:, 0, 1] = torch.bernoulli(wins[:, 0, 1], generator=g)
                wins[:, 1, 0] = 1 - wins[:, 0, 1]
            out["wins"] = wins
            out["from_reference"] = torch.tensor([False, True, False]).repeat(len(x))
        unknown = torch.full_like(said[0], torch.nan)
        return rows, {**out, "group": torch.arange(len(x)).repeat_interleave(size),
                      "reward": torch.stack([*said, unknown], 1).flatten(),
                      "train": torch.tensor([True] * len(mine) + [False]).repeat(len(x))}

    def pairs(self, x: Tensor, i: Tensor, j: Tensor) -> dict[str, Tensor]:
        nothing = torch.full((len(x),), torch.nan, dtype=torch.float64)
        P = self.game.payoff
        return {"group": torch.arange(len(x)).repeat_interleave(2),
                "wins": torch.stack([nothing, P[x, i, j], P[x, j, i], nothing], 1).view(-1, 2, 2),
                "from_reference": torch.tensor([False, True]).repeat(len(x))}


def play(game: Game, algorithm: Algorithm, *, iterations: int, start: Tensor | None = None, samples: int | None = None,
         verdicts: bool = False, seed: int = 0) -> Tensor:
    """The policies of a run, (iterations + 1, X, V) as log-probabilities, from `start` (the reference) on.

    samples     groups drawn for each prompt and iteration; None sums over all of them
    verdicts    the oracle answers 0 or 1 (of samples only)
    """
    if samples is None and verdicts:
        raise ValueError("verdicts of 0 or 1 are drawn, and without samples nothing is: set samples, for instance to 100")
    if verdicts and algorithm.reward is not wins:
        raise ValueError("verdicts of 0 or 1 have no log-odds, which this algorithm takes as rewards (gpo): leave verdicts out")
    draws = Draws(samples, verdicts, torch.Generator().manual_seed(seed)) if samples is not None else None
    table = Table(game, algorithm, start=start, draws=draws)
    parameters = [table.theta]
    optimizer, follow = algorithm.optimizer(parameters), copy.deepcopy(algorithm.objective.reference)      # it may have memory
    found = [table.policies().now]
    for t in range(iterations):
        table.t = t
        table.renew()
        for group in optimizer.param_groups:
            group["lr"] = algorithm.rate(t)
        for _ in range(algorithm.steps):
            algorithm.update(parameters, optimizer, table)
        if not algorithm.steps:
            minimise(parameters, table)
        follow.step(t + 1, [table.reference], parameters)
        algorithm.average.step(t + 1, [table.averaged], parameters)
        found.append(table.policies().now)
    return torch.stack(found)


def minimise(parameters: list[nn.Parameter], gradient: Callable[[], Tensor]) -> None:
    """Goes to the minimum of the loss on what was sampled."""
    solver = torch.optim.LBFGS(parameters, max_iter=1000, tolerance_grad=1e-14, tolerance_change=0.0, history_size=50,
                               line_search_fn="strong_wolfe")
    solver.step(gradient)
