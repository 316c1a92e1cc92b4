"""Algorithms by name, for games. `algorithms: [egpo, {nash_md: {eta: 0.1}}]` in a game file.

beta is the weight of the KL to the reference, eta the step of mirror descent:
log pi <- (1 - eta beta) log pi + eta beta log pi_ref + eta P pi_opponent. Where a loss is a mean over uniform pairs of n
responses, a step of gradient descent with rate lr is that step with eta beta = 4 lr / n. Each takes the objective of the
recipe of its name.

Losses on the policy's own responses go down by plain gradient descent, whose rate 1 is close to the largest that is stable.
Adam's momentum is not: where gradients vanish its steps grow again, and a cyclic game leaves the equilibrium it had reached.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prefopt import recipes
from prefopt.games.game import Game
from prefopt.games.tabular import Algorithm, averaged, mixture, reference, scores, uniform
from prefopt.recipes.checks import not_negative, positive, share
from prefopt.references import Moving
from prefopt.update import look_ahead

__all__ = ["apo_accel", "dno", "egpo", "gpo", "inpo", "ipo_md", "iterative_dpo", "nash_ema", "nash_md", "nash_md_decaying",
           "nash_md_pg", "omd", "online_dpo", "online_ipo", "sppo", "xpo"]

EVERY = Moving(alpha=1.0, every=1)                            # the reference is the policy of the last iteration


def constant(value: float) -> Callable[[int], float]:
    return lambda t: value


def stable(beta: float) -> float:
    """A rate of the policy gradient, whose Jacobian turns with about 1/4 and damps with about beta / 3."""
    return beta / (beta ** 2 + 0.1)


def mirror(game: Game, objective, share_of_step: Callable[[int], float], **settings) -> Algorithm:
    """Steps of mirror descent, by gradient descent on uniform pairs; share_of_step is eta beta at each iteration."""
    return Algorithm(objective, first=uniform, second=uniform, **settings,
                     rate=lambda t: share_of_step(t) * game.items * game.prompts / 4)


def omd(game: Game, *, beta=0.1, eta=0.5) -> Algorithm:
    """Online mirror descent: online IPO on uniform pairs, against opponents of the policy."""
    positive(beta=beta, eta=eta)
    return mirror(game, recipes.egpo(beta=beta), constant(eta * beta))


def egpo(game: Game, *, beta=0.1, eta=0.5) -> Algorithm:
    """Mirror descent against opponents of the policy one step ahead."""
    positive(beta=beta, eta=eta)
    return mirror(game, recipes.egpo(beta=beta), constant(eta * beta), update=look_ahead)


def nash_md(game: Game, *, beta=0.1, eta=0.5) -> Algorithm:
    """Mirror descent against opponents of the mixture pi^(1 - eta beta) pi_ref^(eta beta), with a constant step."""
    positive(beta=beta, eta=eta)
    step = constant(eta * beta)
    return mirror(game, recipes.nash_md(beta=beta), step, opponent=partial(mixture, share=step))


def nash_md_decaying(game: Game, *, beta=0.1) -> Algorithm:
    """Nash-MD with steps eta beta = 2 / (t + 2)."""
    positive(beta=beta)
    step = lambda t: 2 / (t + 2)
    return mirror(game, recipes.nash_md(beta=beta), step, opponent=partial(mixture, share=step))


def online_ipo(game: Game, *, beta=0.1, rate=1.0) -> Algorithm:
    """Pairs of the policy's own responses with soft labels."""
    positive(beta=beta, rate=rate)
    return Algorithm(recipes.online_ipo(beta=beta), rate=constant(game.prompts * rate * stable(beta) * beta / 4))


def ipo_md(game: Game, *, beta=0.1, c=0.125, rate=1.0) -> Algorithm:
    """Online IPO on pairs of the mixture pi^(1 - c) pi_ref^c."""
    positive(beta=beta, rate=rate)
    share(c=c)
    mixed = partial(mixture, share=constant(c))
    return Algorithm(recipes.ipo_md(beta=beta), first=mixed, second=mixed,
                     rate=constant(game.prompts * rate * stable(beta) * beta / 4))


def nash_md_pg(game: Game, *, beta=0.1, c=0.125, rate=1.0) -> Algorithm:
    """Policy gradient against the mixture pi^(1 - c) pi_ref^c."""
    positive(beta=beta, rate=rate)
    share(c=c)
    return Algorithm(recipes.nash_md_pg(beta=beta), opponent=partial(mixture, share=constant(c)),
                     rate=constant(game.prompts * rate * stable(beta)))


def nash_ema(game: Game, *, beta=0.1, follow=0.1, rate=1.0) -> Algorithm:
    """Policy gradient against a moving average of the parameters."""
    positive(beta=beta, follow=follow, rate=rate)
    return Algorithm(recipes.nash_ema(beta=beta), opponent=averaged, average=Moving(alpha=follow, every=1),
                     rate=constant(game.prompts * rate * stable(beta)))


def inpo(game: Game, *, beta=0.1, eta=0.5) -> Algorithm:
    """INPO, each iteration solved: mirror descent."""
    positive(beta=beta, eta=eta)
    return Algorithm(recipes.inpo(beta=1 / eta, anchor=eta * beta), steps=0)


def dno(game: Game, *, eta=0.5) -> Algorithm:
    """DNO, each iteration solved: multiplicative weights, without a KL."""
    positive(eta=eta)
    return Algorithm(recipes.dno(beta=1 / eta).with_slots(reference=EVERY), steps=0)


def sppo(game: Game, *, eta=0.5) -> Algorithm:
    """SPPO, each iteration solved: multiplicative weights up to log Z, without a KL."""
    positive(eta=eta)
    return Algorithm(recipes.sppo(beta=1 / eta).with_slots(reference=EVERY), steps=0)


def gpo(game: Game, *, eta=0.5) -> Algorithm:
    """GPO with the game's own log-odds as scores, each iteration solved, without a KL."""
    positive(eta=eta)
    return Algorithm(recipes.gpo(beta=1 / eta).with_slots(reference=EVERY), reward=scores, steps=0)


def online_dpo(game: Game, *, beta=0.1, rate=1.0) -> Algorithm:
    """DPO on pairs of the policy's own responses with soft labels."""
    positive(beta=beta, rate=rate)
    return Algorithm(recipes.online_dpo(beta=beta), rate=constant(game.prompts * rate / beta ** 2))


def xpo(game: Game, *, beta=0.1, alpha=1e-5, rate=1.0) -> Algorithm:
    """DPO between a response of the policy and one of the reference, with optimism."""
    positive(beta=beta, rate=rate)
    not_negative(alpha=alpha)
    return Algorithm(recipes.xpo(beta=beta, alpha=alpha), second=reference,
                     rate=constant(game.prompts * rate / beta ** 2))


def iterative_dpo(game: Game, *, eta=0.5) -> Algorithm:
    """DPO with soft labels and the last iteration's policy as reference, each iteration solved."""
    positive(eta=eta)
    return Algorithm(recipes.dpo(beta=1 / eta).with_slots(reference=EVERY), steps=0)


def apo_accel(game: Game, *, eta=0.5, alpha=0.3) -> Algorithm:
    """Iterative DPO with momentum over its solutions."""
    positive(eta=eta)
    return Algorithm(recipes.apo_accel(beta=1 / eta, alpha=alpha, every=1), steps=0)
