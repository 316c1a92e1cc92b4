"""weight slot: how much a token counts, over and above its reduction weight; no gradient flows through it, (..., T)."""
from __future__ import annotations

import torch  # noqa: F401  (doctests)

from prefopt.ops import masked
from prefopt.parts import Tokens

__all__ = ["selected_only", "uncertain"]


def uncertain(logp, mask) -> Tokens:
    """p (1 - p): tokens that are certain already, or hardly possible, count little.

    w = pi_t (1 - pi_t)

    Gradient    none
    Edge        at most 1/4
    Relations   with `likelihood` and demonstrations the token weights of CHORD-phi
    Departs     -
    Reference   Zhang et al., On-Policy RL Meets Off-Policy Experts (CHORD), arXiv:2508.11408

    >>> uncertain(torch.tensor([.5, .9]).log(), torch.ones(2))
    tensor([0.2500, 0.0900])
    """
    p = masked(logp.detach(), mask).exp()
    return masked(p * (1 - p), mask)


def selected_only(selected) -> Tokens:
    """1 on the tokens that a selection picked.

    w = [selected]

    Gradient    none
    Edge        denominators of the reduction count all tokens
    Relations   `clip_except_selected` leaves these out
    Departs     -
    Reference   -

    >>> selected_only(torch.tensor([True, False]))
    tensor([1., 0.])
    """
    return selected.float()
