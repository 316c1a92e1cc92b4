"""The algorithms in policy space, in numpy: what their losses should do, without the losses. Logits (n,), one prompt.

Each function makes one update; `P` is P(i beats j), `ref` the reference's probabilities.
"""
from __future__ import annotations

import numpy as np

__all__ = ["egpo", "mixed", "mwu", "nash_md", "omd", "policy"]


def policy(theta: np.ndarray) -> np.ndarray:
    """softmax(theta)."""
    p = np.exp(theta - theta.max())
    return p / p.sum()


def towards(theta, P, ref, opponent, beta, eta):
    return (1 - eta * beta) * theta + eta * beta * np.log(ref) + eta * P @ opponent


def omd(theta, P, ref, *, beta, eta):
    """Mirror descent: theta <- (1 - eta beta) theta + eta beta log ref + eta P pi."""
    return towards(theta, P, ref, policy(theta), beta, eta)


def egpo(theta, P, ref, *, beta, eta):
    """Extragradient: theta' by `omd`, then the same step from theta against pi'. beta = 0 has no KL."""
    ahead = towards(theta, P, ref, policy(theta), beta, eta)
    return towards(theta, P, ref, policy(ahead), beta, eta)


def mixed(theta, ref, c):
    """pi^(1 - c) ref^c, normalised."""
    return policy((1 - c) * theta + c * np.log(ref))


def nash_md(theta, P, ref, *, beta, eta):
    """argmax over pi of eta pi P mix - KL(pi || mix) with mix = pi^(1 - eta beta) ref^(eta beta)."""
    return towards(theta, P, ref, mixed(theta, ref, eta * beta), beta, eta)


def mwu(theta, P, *, eta):
    """Multiplicative weights: theta <- theta + eta P pi."""
    return theta + eta * P @ policy(theta)
