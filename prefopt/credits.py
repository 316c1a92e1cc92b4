"""credit slot: what each token is given of the rewards, (B, K, T), 0 outside the mask. No gradient.

Tokens outside the mask inside a response (tool output) are skipped: the next token that trains is the successor.
"""
from __future__ import annotations

import torch

from prefopt.advantages import zscore
from prefopt.ops import masked
from prefopt.parts import Tokens

__all__ = ["broadcast", "gae", "grpo_process", "returns", "reward_to_go"]


def broadcast(response_advantage, mask) -> Tokens:
    """The response's advantage for each of its tokens.

    A_t = A

    Edge        -
    Relations   `reward_to_go` of `at_end` with gamma = 1
    Departs     -
    Reference   Shao et al., GRPO, arXiv:2402.03300

    >>> broadcast(torch.tensor([[0.5]]), torch.tensor([[[1, 1, 0]]]))
    tensor([[[0.5000, 0.5000, 0.0000]]])
    """
    return masked(response_advantage[..., None].expand(mask.shape), mask)


def gae(reward_at, value_old, mask, *, gamma=1.0, lam=0.95) -> Tokens:
    """Generalised advantage estimation.

    A_t = d_t + gamma lam A_{t+1},   d_t = r_t + gamma V_{t+1} - V_t;   after the last token A = V = 0

    gamma       discount per token; 1
    lam         0 is one step of temporal difference, 1 the whole return; 0.95, and 1 for long responses
    Edge        t + 1 is the next token of the mask
    Relations   lam = gamma = 1: the sum of the rewards to come less V_t; V = 0, lam = 1: `reward_to_go`
    Departs     not whitened: `normalisers.whiten` does that, after the returns are made
    Reference   Schulman et al., arXiv:1506.02438, eq. 16

    >>> gae(torch.tensor([[[0., 0., 1.]]]), torch.full((1, 1, 3), 0.5), torch.ones(1, 1, 3), lam=1.)
    tensor([[[0.5000, 0.5000, 0.5000]]])
    """
    reward, value, mask = masked(reward_at, mask), masked(value_old, mask), mask.bool()
    out = torch.zeros_like(reward + value)
    next_value = advantage = torch.zeros_like(out.sum(-1))
    for t in reversed(range(out.shape[-1])):
        here, r, v = mask[..., t], reward[..., t], value[..., t]
        advantage = torch.where(here, r + gamma * next_value - v + gamma * lam * advantage, advantage)
        next_value = torch.where(here, v, next_value)
        out[..., t] = advantage
    return masked(out, mask)


def returns(reward_at, value_old, mask, *, gamma=1.0, lam=0.95) -> Tokens:
    """What the critic's value should be.

    ret_t = A_t + V_t,   A of `gae`

    gamma, lam      those of `gae`
    Edge        as `gae`
    Relations   lam = 1: `reward_to_go`
    Departs     -
    Reference   Schulman et al., PPO, arXiv:1707.06347; verl

    >>> returns(torch.tensor([[[0., 0., 1.]]]), torch.full((1, 1, 3), 0.5), torch.ones(1, 1, 3), lam=1.)
    tensor([[[1., 1., 1.]]])
    """
    return gae(reward_at, value_old, mask, gamma=gamma, lam=lam) + masked(value_old, mask)


def reward_to_go(reward_at, mask, *, gamma=1.0) -> Tokens:
    """Discounted sum of the rewards from this token on.

    G_t = r_t + gamma G_{t+1}

    gamma       discount per token; 1
    Edge        t + 1 is the next token of the mask
    Relations   one piece of response: verl's REINFORCE++; `gae` with V = 0 and lam = 1
    Departs     verl starts again at 0 before a gap of the mask, so that what precedes a tool call never sees the reward
    Reference   Hu et al., REINFORCE++, arXiv:2501.03262

    >>> reward_to_go(torch.tensor([[[1., 9., 2.]]]), torch.tensor([[[1, 0, 1]]]), gamma=0.5)
    tensor([[[2., 0., 2.]]])
    """
    return gae(reward_at, torch.zeros_like(reward_at), mask, gamma=gamma, lam=1.0)


def grpo_process(step_reward, mask, real, *, eps=1e-6) -> Tokens:
    """Process supervision of GRPO: the normalised rewards of the steps to come.

    A_t = sum over steps that end at or after t of (s - mean s) / (std s + eps),   over all steps of the group; unbiased std

    eps         1e-6
    Edge        NaN is no step; a step that ends outside the mask is not counted; equal step rewards, or one alone, give 0
    Relations   one step at the end of each response: `broadcast` of `zscore`
    Departs     -
    Reference   Shao et al., GRPO (DeepSeekMath), arXiv:2402.03300, section 4.1.3

    >>> grpo_process(torch.tensor([[[1., -1.]]]), torch.ones(1, 1, 2), torch.ones(1, 1).bool(), eps=0.)         # std sqrt(2)
    tensor([[[ 0.0000, -0.7071]]])
    """
    steps = mask.bool() & real[..., None] & ~torch.isnan(step_reward)
    z = zscore(step_reward.flatten(1), steps.flatten(1), eps=eps).view(steps.shape)
    return masked(z.flip(-1).cumsum(-1).flip(-1), mask.bool() & real[..., None])
