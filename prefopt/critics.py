"""critic losses: value and its target -> cost of each token, (..., T); 0 outside the mask."""
from __future__ import annotations

import torch

from prefopt.ops import masked
from prefopt.parts import Tokens

__all__ = ["value_loss", "value_loss_plain"]


def value_loss_plain(value, returns, mask) -> Tokens:
    """Half the squared error of the critic.

    c = (V - R)^2 / 2

    Gradient    V - R through value
    Edge        V = R gives 0
    Relations   `value_loss` with clip = inf
    Departs     -
    Reference   Schulman et al., GAE, arXiv:1506.02438

    >>> value_loss_plain(torch.tensor([3.]), torch.tensor([1.]), torch.ones(1))
    tensor([2.])
    """
    return (masked(value, mask) - masked(returns, mask)).square() / 2


def value_loss(value, returns, value_old, mask, *, clip=0.2) -> Tokens:
    """Clipped loss of the critic (PPO).

    c = max( (V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2 ) / 2

    clip        how far the value may move from where it was at the rollout; TRL 0.2, verl 0.5
    Gradient    V - R through value; 0 where the clipped error is the larger one
    Edge        V = R inside the range gives 0
    Relations   clip = inf is `value_loss_plain`
    Departs     -
    Reference   Ziegler et al., arXiv:1909.08593 (released code); TRL and verl PPO

    >>> value_loss(torch.tensor([1.]), torch.tensor([1.]), torch.tensor([0.]), torch.ones(1))         # (.2 - 1)^2 / 2
    tensor([0.3200])
    """
    old = masked(value_old, mask)
    near = torch.minimum(torch.maximum(masked(value, mask), old - clip), old + clip)
    return torch.maximum(value_loss_plain(value, returns, mask), value_loss_plain(near, returns, mask))
