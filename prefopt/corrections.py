"""correction slot: weights for the gap between the policy that sampled and the one that trains, no gradient, (..., T).

w = pi_old / pi_rollout, of the same weights in two programs: the trainer's `logp_old` and the sampler's `logp_rollout`. The
weight multiplies the surrogate after its clipping and is 0 outside the mask. The accept slot removes tokens from numerators
and denominators alike. The measures at the end are per token; their mean over tokens is what each says.
"""
from __future__ import annotations

import math

import torch

from prefopt.ops import log_ratios, masked
from prefopt.parts import Tokens

__all__ = ["exact", "masked_out", "masked_ratio", "truncated", "truncated_sequence"]


def log_weight(logp_old, logp_rollout, mask, limit=20.0):
    return log_ratios(logp_old.detach(), logp_rollout, mask).clamp(-limit, limit)


def between(log_w, low, high):
    return (log_w >= (math.log(low) if low > 0 else -math.inf)) & (log_w <= math.log(high))


def exact(logp_old, logp_rollout, mask, *, limit=20.0) -> Tokens:
    """Importance weight of each token, as it is.

    w = pi_old / pi_rollout

    limit       log w is clamped to +-limit; 20
    Gradient    none
    Edge        equal probabilities give 1
    Relations   for top-p or top-k sampling, whose renormalised probabilities are never smaller: w <= 1, and E[w] is the mass
                that was kept
    Departs     -
    Reference   Kahn and Marshall 1953

    >>> exact(torch.tensor([.6, .9]).log(), torch.tensor([.8, .3]).log(), torch.tensor([1, 0]))
    tensor([0.7500, 0.0000])
    """
    return masked(log_weight(logp_old, logp_rollout, mask, limit).exp(), mask)


def truncated(logp_old, logp_rollout, mask, *, cap=2.0) -> Tokens:
    """Truncated importance weight of each token (TIS).

    w = min( pi_old / pi_rollout, cap )

    cap         the largest weight; 2
    Gradient    none
    Edge        equal probabilities give 1
    Relations   cap = inf is `exact`
    Departs     the weights are not divided by their mean
    Reference   Ionides 2008; Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training; verl, TRL

    >>> truncated(torch.tensor([.9, .3]).log(), torch.tensor([.3, .6]).log(), torch.ones(2))
    tensor([2.0000, 0.5000])
    """
    return exact(logp_old, logp_rollout, mask).clamp(max=cap)


def truncated_sequence(logp_old, logp_rollout, mask, *, cap=2.0) -> Tokens:
    """Truncated importance weight of the whole response, at each of its tokens.

    w = min( prod_t pi_old_t / pi_rollout_t, cap )

    cap         the largest weight; 2. With inf the weight is unbiased, of high variance
    Gradient    none
    Edge        the log of the product is clamped to +-20
    Relations   responses of one token: `truncated`
    Departs     the weights are not divided by their mean
    Reference   verl and TRL `sequence`

    >>> truncated_sequence(torch.tensor([[.9, .3]]).log(), torch.tensor([[.6, .6]]).log(), torch.ones(1, 2))
    tensor([[0.7500, 0.7500]])
    """
    weight = log_weight(logp_old, logp_rollout, mask).sum(-1, keepdim=True).clamp(-20, 20).exp().clamp(max=cap)
    return masked(weight, mask)


def masked_ratio(logp_old, logp_rollout, mask, *, low=0.0, high=2.0) -> Tokens:
    """Importance weight of each token inside bounds, 0 outside (masked importance sampling).

    w = pi_old / pi_rollout where low <= w <= high, else 0

    low, high   0, 2: no bound below. IcePop 0.5, 5
    Gradient    none
    Edge        equal probabilities give 1
    Relations   `masked_out` has 1 in the place of the weight; `truncated` keeps the tokens beyond the bound
    Departs     -
    Reference   TRL `token_mask`; Ling Team, IcePop, arXiv:2510.18855

    >>> masked_ratio(torch.tensor([.9, .3]).log(), torch.tensor([.3, .6]).log(), torch.ones(2))
    tensor([0.0000, 0.5000])
    """
    return masked(exact(logp_old, logp_rollout, mask), between(log_weight(logp_old, logp_rollout, mask), low, high))


def masked_out(logp_old, logp_rollout, mask, *, low=0.5, high=2.0) -> Tokens:
    """1 on tokens whose importance weight is inside bounds, 0 outside.

    w = 1 where low <= pi_old / pi_rollout <= high, else 0

    low, high   0.5, 2
    Gradient    none
    Edge        what is out stays in the denominators of the reduction
    Relations   `accept_token` removes it there as well; `masked_ratio` keeps the weight
    Departs     bounds are on old / rollout; verl puts those of its k1 test on rollout / old
    Reference   verl, rejection sampling

    >>> masked_out(torch.tensor([.9, .4]).log(), torch.tensor([.3, .6]).log(), torch.ones(2))
    tensor([0., 1.])
    """
    weight = log_weight(logp_old, logp_rollout, mask)
    return masked(torch.ones_like(weight), between(weight, low, high) & mask.bool())


# ------------------------------------------------------------------------------------------ measures
def rollout_kl(logp_old, logp_rollout, mask) -> Tokens:
    """w - 1 - log w: the mean over tokens estimates KL(rollout || old), never negative."""
    log_w = log_weight(logp_old, logp_rollout, mask)
    return log_w.expm1() - log_w


def squared_weight(correction, mask) -> Tokens:
    """w^2: with m the mean weight and s the mean of this, the effective share of tokens is m^2 / s."""
    return masked(correction, mask).square()


def beyond(logp_old, logp_rollout, mask, *, cap=2.0) -> Tokens:
    """1 where pi_old / pi_rollout is more than the cap: the mean is the share of truncated tokens."""
    weight = exact(logp_old, logp_rollout, mask)
    return (weight > cap).to(weight.dtype)
