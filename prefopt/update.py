"""Update rules own the optimiser step. They receive a re-callable `gradient()`, so two gradients per step fit."""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

__all__ = ["extragradient", "look_ahead", "plain"]


class Gradient(Protocol):
    """The gradient of the step's loss at the parameters as they are, whenever it is called.

    `renew()` draws what the loss is made of (responses, opponents, their rewards) anew from the policy as it is now.
    """

    def __call__(self) -> object: ...

    def renew(self) -> None: ...


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

    Relations   learning rate -> 0 is `plain`; `look_ahead` moves the opponents alone
    Reference   Korpelevich 1976
    """
    here = snapshot(parameters, optimizer)
    loss = gradient()
    optimizer.step()
    try:
        gradient()
    finally:
        restore(parameters, optimizer, here)
    optimizer.step()
    return loss


def look_ahead(parameters: Sequence[nn.Parameter], optimizer, gradient: Gradient):
    """Step to look ahead, meet the opponents of there, return, and step with the gradient of here against them (EGPO).

    theta' = step(theta, grad L(theta; pi_theta));   theta <- step(theta, grad L(theta; pi_theta'))

    Both gradients are taken at theta; what changes is whom the responses are compared with. Costs two gradients, two rounds
    of sampling and one copy of the trainable parameters and of the optimiser state. The optimiser counts one step. Where
    sampling fails, the parameters are theta again.

    Relations   without `renew` between the two it is `plain`; `extragradient` takes the second gradient at theta'
    Reference   Zhou et al., EGPO, arXiv:2503.08942
    """
    here = snapshot(parameters, optimizer)
    loss = gradient()
    optimizer.step()
    try:
        gradient.renew()
    finally:
        restore(parameters, optimizer, here)
    gradient()
    optimizer.step()
    return loss


def snapshot(parameters: Sequence[nn.Parameter], optimizer) -> tuple:
    return [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], optimizer, here: tuple) -> None:
    values, state = here
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
    optimizer.load_state_dict(state)
