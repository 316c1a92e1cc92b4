"""shape slot: reward (B, K) -> the reward that advantages are made of, (B, K). No gradient.

Filters (`keeps`) look at the reward as it was scored: a penalty makes a group of equal answers look informative.
"""
from __future__ import annotations

import torch

from prefopt.ops import log_ratios, upcast
from prefopt.parts import Rows

__all__ = ["clipped", "kl_in_reward", "overlong", "scaled", "unfinished"]


def overlong(reward, length, *, limit, buffer, factor=1.0) -> Rows:
    """Soft penalty on responses that come near the limit.

    R' = R + min(0, -factor (|y| - (limit - buffer)) / buffer)

    limit       tokens at which the penalty is the whole factor; the sampler's limit
    buffer      tokens before the limit over which it grows from 0; 0 < buffer <= limit
    factor      the penalty at the limit; 1
    Edge        counts the tokens that train: tool output is free of charge
    Relations   TRL's `get_soft_overlong_punishment`, added to the reward
    Departs     the paper stays at -factor beyond the limit, here the line goes on: no response is longer than its limit
    Reference   Yu et al., DAPO, arXiv:2503.14476, eq. 13

    >>> overlong(torch.zeros(1, 3), torch.tensor([[80, 90, 100]]), limit=100, buffer=20)
    tensor([[ 0.0000, -0.5000, -1.0000]])
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong: the buffer lies before the limit, 0 < buffer <= limit, found buffer={buffer!r} and "
                         f"limit={limit!r}; DAPO has 4096 and 20480")
    reward = upcast(reward)
    return reward - factor * (length.to(reward.dtype) - (limit - buffer)).clamp(min=0) / buffer


def unfinished(reward, finished, *, penalty=1.0) -> Rows:
    """Fixed penalty on responses that the limit cut.

    R' = R - penalty [not finished]

    penalty     what a cut response loses; 1
    Edge        a response that a stop string ended is finished
    Relations   `overlong` charges long responses before the limit
    Departs     -
    Reference   TRL `missing_eos_penalty`

    >>> unfinished(torch.ones(1, 2), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    reward = upcast(reward)
    return torch.where(finished.bool(), reward, reward - penalty)


def kl_in_reward(reward, logp_old, logp_ref, mask, *, beta=0.05) -> Rows:
    """KL to the reference as a part of the response's reward.

    R' = R - beta sum_t (logp_old_t - logp_ref_t)

    beta        weight of the KL; 0.05
    Edge        an empty response keeps its reward
    Relations   its policy gradient is that of the penalty k2 on the policy's own samples; `at_end_with_kl` gives each token
                its own share
    Departs     -
    Reference   Ahmadian et al., RLOO, arXiv:2402.14740; TRL `RLOOTrainer`

    >>> kl_in_reward(torch.ones(1, 1), -torch.ones(1, 1, 2), torch.full((1, 1, 2), -3.), torch.ones(1, 1, 2), beta=0.1)
    tensor([[0.6000]])
    """
    return upcast(reward) - beta * log_ratios(logp_old, logp_ref, mask).sum(-1)


def scaled(reward, *, factor=1.0, shift=0.0) -> Rows:
    """Affine map of the reward.

    R' = factor R + shift

    factor, shift   2 and -1 turn 0/1 into -1/1
    Edge        -
    Relations   without effect on `zscore`; a shift is without effect on every advantage that subtracts a mean
    Departs     -
    Reference   -

    >>> scaled(torch.tensor([[0., 1.]]), factor=2., shift=-1.)
    tensor([[-1.,  1.]])
    """
    return factor * upcast(reward) + shift


def clipped(reward, *, low, high) -> Rows:
    """Reward between two bounds.

    R' = min(max(R, low), high)

    low, high   the bounds
    Edge        -
    Relations   TRL's `reward_clip_range`
    Departs     -
    Reference   -

    >>> clipped(torch.tensor([[-7., 0.5, 7.]]), low=-1., high=1.)
    tensor([[-1.0000,  0.5000,  1.0000]])
    """
    return upcast(reward).clamp(low, high)
