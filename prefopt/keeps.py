"""keep slot: rewards of a group (B, K) -> whether the group is trained on (B), bool. The source refills what is dropped."""
from __future__ import annotations

import torch

from prefopt.advantages import centre
from prefopt.parts import Lists

__all__ = ["contrast", "everything", "share_between"]


def contrast(reward, real, *, least=0.0) -> Lists:
    """Groups whose rewards differ (dynamic sampling).

    keep = std(R) > least,   the biased std over the group

    least       0 drops groups of equal rewards alone
    Edge        a group of one is kept, one without a scored response is not; equal rewards have std 0 exactly
    Relations   binary rewards, least = 0: `share_between` any two shares strictly inside (0, 1)
    Departs     -
    Reference   Yu et al., DAPO, arXiv:2503.14476, eq. 11; verl's DAPO recipe

    >>> contrast(torch.tensor([[1., 0.], [1., 1.]]), torch.ones(2, 2).bool())
    tensor([ True, False])
    """
    n = real.sum(-1)
    std = torch.sqrt((centre(reward, real) ** 2).sum(-1) / n.clamp(min=1))
    return (std > least) | (n == 1)


def share_between(reward, real, *, low, high, threshold=0.5) -> Lists:
    """Groups that are neither too hard nor too easy.

    keep = low <= share of rewards above the threshold <= high

    low, high   bounds of the share, both included
    threshold   a response with a higher reward is correct; 0.5
    Edge        a group without a scored response is dropped
    Relations   `contrast` for binary rewards when low and high leave out 0 and 1 alone
    Departs     -
    Reference   -

    >>> share_between(torch.tensor([[1., 0.], [1., 1.]]), torch.ones(2, 2).bool(), low=0.2, high=0.8)
    tensor([ True, False])
    """
    n = real.sum(-1)
    share = (real & (reward > threshold)).sum(-1).double() / n.clamp(min=1)
    return (share >= low) & (share <= high) & (n > 0)


def everything(real) -> Lists:
    """Every group that holds a scored response.

    keep = [some response is real]

    Edge        a group without a scored response is dropped
    Relations   -
    Departs     -
    Reference   -

    >>> everything(torch.tensor([[True, False], [False, False]]))
    tensor([ True, False])
    """
    return real.any(-1)
