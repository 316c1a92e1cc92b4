"""Win rates, gaps and equilibria of a game. Policies are probabilities (..., V), in float64.

Regularised payoff of a player: J(pi, pi') = pi P pi' - beta KL(pi || ref) + beta KL(pi' || ref).
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefopt.games.game import LARGEST, Game, beyond

__all__ = ["best_response", "duality_gap", "equilibrium", "exploitability", "kl", "nash", "regularised_gap", "residual",
           "win_rates"]


def win_rates(game: Game, policy: Tensor) -> Tensor:
    """Of each response against the policy, q = P pi.

    >>> from prefopt.games.library import weighted_rps
    >>> win_rates(weighted_rps(), torch.tensor([1.0, 0.0, 0.0]))
    tensor([[0.5000, 0.1000, 0.8000]], dtype=torch.float64)
    """
    return (game.payoff @ policy.double()[..., None]).squeeze(-1)


def duality_gap(game: Game, policy: Tensor) -> Tensor:
    """What both players may gain: max_y q_y - min_y (1 - q_y) = 2 max_y q_y - 1. 0 at an equilibrium alone."""
    return 2 * win_rates(game, policy).amax(-1) - 1


def exploitability(game: Game, policy: Tensor) -> Tensor:
    """What the best opponent wins above 1/2: half the duality gap."""
    return win_rates(game, policy).amax(-1) - 0.5


def kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) of probabilities; a response that left never gives adds nothing."""
    return torch.where(left > 0, left * (left.log() - right.log()), 0.0).sum(-1)


def best_response(game: Game, policy: Tensor, beta: float) -> Tensor:
    """argmax over pi of pi P policy - beta KL(pi || ref) = softmax(log ref + q / beta)."""
    return (game.reference.log() + win_rates(game, policy) / beta).softmax(-1)


def regularised_gap(game: Game, policy: Tensor, beta: float) -> Tensor:
    """J(BR, pi) - J(pi, BR) = 2 [beta logsumexp(log ref + q / beta) + beta KL(pi || ref)] - 1. 0 at the equilibrium alone."""
    reference = game.reference
    free = beta * (reference.log() + win_rates(game, policy) / beta).logsumexp(-1)
    return 2 * (free + beta * kl(policy, reference)) - 1


def residual(game: Game, logp: Tensor, beta: float) -> Tensor:
    """Largest deviation of log pi - log ref - q / beta from its mean: 0 at the regularised equilibrium."""
    e = logp - game.reference.log() - win_rates(game, logp.exp()) / beta
    return (e - e.mean(-1, keepdim=True)).abs().amax(-1)


def equilibrium(game: Game, beta: float) -> Tensor:
    """The regularised equilibrium, pi = softmax(log ref + P pi / beta), as probabilities (X, V).

    Newton's method on the residual of its logarithm, going down from a large beta. The derivative is never singular: P - 1/2
    is antisymmetric, so that its eigenvalues in the metric of pi are imaginary, and those of the derivative are 1 - i w / beta.
    """
    if not beta > 0:
        raise ValueError(f"beta must be a number greater than 0, found {beta!r}: without a KL take `nash`, the linear program")
    beyond(game.items, LARGEST, "the exact equilibrium")
    return torch.stack([torch.from_numpy(_newton(P.numpy() - 0.5, r.log().numpy(), beta)) for P, r in
                        zip(game.payoff, game.reference, strict=True)])


def _newton(A: np.ndarray, log_ref: np.ndarray, beta: float) -> np.ndarray:
    n, u, now = len(A), log_ref, max(beta, 1.0)
    mean = np.full((n, n), 1 / n)

    def policy(u):
        pi = np.exp(u - u.max())
        return pi / pi.sum()

    def off(u):
        e = u - log_ref - A @ policy(u) / now
        return e - e.mean()

    while True:
        for _ in range(100):
            pi, e = policy(u), off(u)
            slope = np.eye(n) - A @ (np.diag(pi) - np.outer(pi, pi)) / now
            step, share = np.linalg.solve(slope - mean @ slope + mean, -e), 1.0
            while np.linalg.norm(off(u + share * step)) > (1 - share / 4) * np.linalg.norm(e) and share > 1e-8:
                share /= 2
            if share <= 1e-8:                                 # rounding: no step makes it smaller
                break
            u = u + share * step
        if np.abs(off(u)).max() > 1e-11 * max(1.0, 1 / now):
            raise ArithmeticError(f"Newton's method stopped at a residual of {np.abs(off(u)).max():.2g} for beta={now:g}")
        if now == beta:
            return policy(u)
        now = max(beta, now / 2)


def nash(game: Game) -> Tensor:
    """An equilibrium without a KL, (X, V): maximise v subject to pi (P - 1/2) >= v; the optimum has v = 0."""
    beyond(game.items, LARGEST, "the linear program")
    from scipy.optimize import linprog
    n, found = game.items, []
    for P in game.payoff.numpy():
        bounds = [(0, None)] * n + [(None, None)]
        solved = linprog(np.append(np.zeros(n), -1.0), A_ub=np.hstack([-(P - 0.5).T, np.ones((n, 1))]), b_ub=np.zeros(n),
                         A_eq=np.append(np.ones(n), 0.0)[None], b_eq=[1.0], bounds=bounds)
        if not solved.success:
            raise ArithmeticError(f"the linear program of the game {game.name!r} failed: {solved.message}")
        found.append(solved.x[:n])
    return torch.from_numpy(np.stack(found))
