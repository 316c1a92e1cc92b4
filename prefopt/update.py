"""Update rules own the optimiser step. They receive a re-callable `gradient()`, so two gradients per step fit."""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

__all__ = ["extragradient", "plain"]


def plain(parameters: Sequence[nn.Parameter], optimizer, gradient: Callable[[], object]):
    """One gradient, one step.

    theta <- step(theta, grad L(theta))
    """
    loss = gradient()
    optimizer.step()
    return loss


def extragradient(parameters: Sequence[nn.Parameter], optimizer, gradient: Callable[[], object]):
    """Step to look ahead, return, and step with the gradient found there.

    theta' = step(theta, grad L(theta));   theta <- step(theta, grad L(theta'))

    Costs two gradients and one copy of the trainable parameters and of the optimiser state. The optimiser counts one step.
    Where the second gradient fails, the parameters are theta again.

    Relations   learning rate -> 0 is `plain`
    Reference   Korpelevich 1976; Zhou et al., EGPO, arXiv:2503.08942
    """
    here = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    loss = gradient()
    optimizer.step()
    try:
        gradient()
    finally:
        with torch.no_grad():
            for p, h in zip(parameters, here, strict=True):
                p.copy_(h)
        optimizer.load_state_dict(state)
    optimizer.step()
    return loss
