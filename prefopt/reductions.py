"""reduce slot: which terms a loss counts -> weights of the same shape, once per optimiser step over all processes.

A reduction is a weight matrix: losses are plain weighted sums, so micro-batches and processes simply add. `terms` leads
with the groups (B, ...): 1 (or a soft label) for each pair, row, token or list that counts.
"""
from __future__ import annotations

import torch

from prefopt.ops import total

__all__ = ["group_mean", "group_sum", "term_mean"]


def group_mean(terms) -> torch.Tensor:
    """Mean over a group's terms, then over the groups that have any.

    u = terms / (sum of the group's terms) / (groups with terms)

    Gradient    none
    Edge        groups without terms weigh 0 and are not counted; no term at all gives all zeros
    Relations   K = 2: the usual mean over pairs; `term_mean` when all groups have equally many terms
    Departs     -
    Reference   -

    >>> group_mean(torch.tensor([[1., 1.], [1., 0.], [0., 0.]]))
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000],
            [0.0000, 0.0000]])
    """
    inside = terms[:, None].flatten(1).sum(1)
    some = inside != 0
    share = some.to(terms.dtype) / inside.masked_fill(~some, 1.0) / total(some.sum()).clamp(min=1)
    return terms * share.reshape(-1, *[1] * (terms.ndim - 1))


def group_sum(terms, real) -> torch.Tensor:
    """Sum over a group's terms, then mean over all groups that hold a compared row.

    u = terms / (groups)

    Gradient    none
    Edge        groups without terms count as groups of loss 0
    Relations   LiPO's reduction of pairs; for lists it is the mean over lists
    Departs     -
    Reference   Liu et al., LiPO, arXiv:2402.01878

    >>> group_sum(torch.tensor([[1., 1.], [1., 0.]]), torch.ones(2, 2).bool())
    tensor([[0.5000, 0.5000],
            [0.5000, 0.0000]])
    """
    return terms / total(real.any(-1).sum()).clamp(min=1)


def term_mean(terms) -> torch.Tensor:
    """Mean over all terms of the step, whatever group they are in.

    u = terms / sum of terms

    Gradient    none
    Edge        no term at all gives all zeros
    Relations   pairs: groups with many pairs count more than in `group_mean`; tokens: the token mean
    Departs     -
    Reference   -

    >>> term_mean(torch.tensor([[1., 1.], [1., 0.]]))
    tensor([[0.3333, 0.3333],
            [0.3333, 0.0000]])
    """
    all_ = total(terms.sum())
    return terms * ((all_ != 0).to(terms.dtype) / all_.masked_fill(all_ == 0, 1.0))
