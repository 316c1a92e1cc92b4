"""reduce slot: which terms a loss counts -> weights of the same shape, once per optimiser step over all processes.

A reduction is a weight matrix: losses are plain weighted sums, so micro-batches and processes simply add. `terms` leads
with the groups (B, ...): 1 (or a soft label) for each pair, row, token or list that counts.
"""
from __future__ import annotations

import torch

from prefopt.ops import total

__all__ = ["fixed_length", "fixed_total", "group_mean", "group_sum", "sequence_mean", "sequence_sum", "term_mean"]


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


# ------------------------------------------------------------------------------------------ tokens, terms (B, K, T)
def rows_with(terms):
    """How many rows of the step have a term, at least 1."""
    return total((terms.sum(-1) != 0).sum()).clamp(min=1)


def sequence_mean(terms) -> torch.Tensor:
    """Mean over a response's tokens, then over the responses that have any (GRPO, GSPO).

    u = terms / (sum of the response's terms) / (responses with terms)

    Gradient    none
    Edge        empty responses weigh 0 and are not counted; no term at all gives all zeros
    Relations   `term_mean` when all responses have equally many terms; verl's seq-mean-token-mean
    Departs     TRL counts empty responses
    Reference   Shao et al., DeepSeekMath, arXiv:2402.03300, eq. 3

    >>> sequence_mean(torch.tensor([[[1., 1.], [1., 0.], [0., 0.]]]))
    tensor([[[0.2500, 0.2500],
             [0.5000, 0.0000],
             [0.0000, 0.0000]]])
    """
    inside = terms.sum(-1, keepdim=True)
    return terms / inside.masked_fill(inside == 0, 1.0) / rows_with(terms)


def sequence_sum(terms) -> torch.Tensor:
    """Sum over a response's tokens, then mean over the responses that have any (RLOO).

    u = terms / (responses with terms)

    Gradient    none
    Edge        empty responses weigh 0 and are not counted; no term at all gives all zeros
    Relations   `fixed_length` times the length; verl's seq-mean-token-sum
    Departs     -
    Reference   -

    >>> sequence_sum(torch.tensor([[[1., 1.], [1., 0.]]]))
    tensor([[[0.5000, 0.5000],
             [0.5000, 0.0000]]])
    """
    return terms / rows_with(terms)


def fixed_length(terms, *, length) -> torch.Tensor:
    """Sum over a response's tokens divided by a constant, then mean over the responses that have any (Dr. GRPO).

    u = terms / length / (responses with terms)

    length      the same through all of training: the longest response there may be
    Gradient    none
    Edge        empty responses weigh 0 and are not counted; no term at all gives all zeros
    Relations   `sequence_mean` when all responses have that length; `fixed_total` does not divide by the responses
    Departs     TRL's dr_grpo counts empty responses
    Reference   Liu et al., Understanding R1-Zero-Like Training, arXiv:2503.20783

    >>> fixed_length(torch.tensor([[[1., 1.], [1., 0.]]]), length=2)
    tensor([[[0.2500, 0.2500],
             [0.2500, 0.0000]]])
    """
    return terms / length / rows_with(terms)


def fixed_total(terms, *, length) -> torch.Tensor:
    """Sum over all tokens of the step, divided by a constant.

    u = terms / length

    length      the same through all of training
    Gradient    none
    Edge        the gradient grows with the number of responses
    Relations   `fixed_length` times the responses; verl's seq-mean-token-sum-norm, in spite of its name
    Departs     -
    Reference   verl

    >>> fixed_total(torch.tensor([[[1., 1.], [1., 0.]]]), length=2)
    tensor([[[0.5000, 0.5000],
             [0.5000, 0.0000]]])
    """
    return terms / length
