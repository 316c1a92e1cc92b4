"""Rewards from a process reward model: probabilities of steps (S) -> rewards for reinforcement learning.

Aggregation over steps and choice among responses are those of `rewards.implicit`.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["on_tokens", "shaped_lowest", "shaped_product", "with_bonus"]


def shaped_lowest(p: Tensor, *, upper: float = 1.0) -> Tensor:
    """Reward of each step: how much it lowers the worst probability so far.

    r_k = m_k - m_{k-1},   m_k = min(m_{k-1}, p_k),   m_0 = upper

    Edge        they add up to min_k p_k - upper (or 0 where no step is below it); no step: none
    Reference   Sun et al., Easy-to-Hard Generalization, arXiv:2403.09472

    >>> shaped_lowest(torch.tensor([0.75, 0.875, 0.5]))
    tensor([-0.2500,  0.0000, -0.2500])
    """
    return torch.cat([p.new_full((1,), upper), p]).cummin(0).values.diff()


def shaped_product(p: Tensor, *, upper: float = 1.0) -> Tensor:
    """Reward of each step: how much it lowers the running product.

    r_k = m_k - m_{k-1},   m_k = m_{k-1} p_k,   m_0 = upper

    Edge        they add up to upper (prod_k p_k - 1)
    Reference   Sun et al., arXiv:2403.09472

    >>> shaped_product(torch.tensor([0.5, 0.5]))
    tensor([-0.5000, -0.2500])
    """
    return torch.cat([p.new_full((1,), upper), p]).cumprod(0).diff()


def with_bonus(rewards: Tensor, *, bonus: float = 0.25) -> Tensor:
    """A bonus for finishing, spread over the K steps.

    r_k + bonus / (K + 1e-6)

    Reference   Sun et al., arXiv:2403.09472 (the released code; not explained)

    >>> with_bonus(torch.tensor([-0.25, 0.0]))
    tensor([-0.1250,  0.1250])
    """
    return rewards + bonus / (len(rewards) + 1e-6)


def on_tokens(rewards: Tensor, ends: Sequence[int], length: int, *, terminal: float = 0.0, over: int = 2) -> Tensor:
    """Step rewards placed on the tokens (T) that end their steps, and the check of the answer on the last one.

    ends        one past the last token of each step
    over        how many tokens share a step's reward: 2, as a blank line is two tokens there; fewer where a step is shorter
    terminal    reward of the response
    Edge        the sum is that of the steps plus the terminal reward
    Reference   Sun et al., arXiv:2403.09472

    >>> on_tokens(torch.tensor([1., 2.]), [3, 4], 5, terminal=7.)
    tensor([0.0000, 0.5000, 0.5000, 2.0000, 7.0000])
    """
    out = rewards.new_zeros(length)
    for reward, (start, end) in zip(rewards, pairwise([0, *ends]), strict=True):
        share = min(over, end - start)
        out[end - share:end] += reward / share
    out[-1] += terminal
    return out
