"""selections slot: which tokens a rule over the whole optimiser step picks, without gradient, (B, K, T) of True and False.

Parts see the groups of this process; what they compare is the step of all processes.
"""
from __future__ import annotations

import torch

from prefopt.ops import gather, masked, total
from prefopt.parts import Tokens
from prefopt.ratios import token
from prefopt.surrogates import clip, plain

__all__ = ["covariance_band", "covariance_top"]


def covariances(logp, advantage, counted):
    """Centred product of log-probability and advantage over all counted tokens of the step, and how many there are."""
    count = total(counted.sum())

    def centred(x):
        x = masked(x.double(), counted)
        return x - total(x.sum()) / count.clamp(min=1)

    return masked(centred(logp) * centred(advantage), counted), count


def lowest(values, candidates, share, count):
    """True on the max(1, floor(share count)) candidates of all processes with the lowest values; all if there are fewer."""
    everyone, start = gather(values[candidates])
    chosen = torch.zeros_like(everyone, dtype=torch.bool)
    chosen[everyone.argsort(stable=True)[:max(1, int(share * int(count)))]] = True
    return torch.zeros_like(candidates).masked_scatter(candidates, chosen[start:start + int(candidates.sum())])


def covariance_band(logp_now, logp_old, advantage, mask, real, noise, *, share=2e-4, low=1.0, high=5.0, clip_low=0.2,
                    clip_high=0.2) -> Tokens:
    """Tokens of high covariance that Clip-Cov leaves out, drawn at random.

    c_t = (log pi_t - mean log pi) (A_t - mean A);   n = max(1, floor(share N)) of the tokens with low < c_t < high

    Candidates are unclipped by PPO. Those with the smallest noise are drawn: uniform, without replacement.

    share       share of the step's N tokens that is left out; 2e-4
    low, high   band of c; 1, 5, for advantages of standard deviation 1
    clip_low, clip_high   trust region of the surrogate; 0.2, 0.2
    Edge        no candidate: nothing is selected; fewer than n: all of them
    Relations   for `surrogates.clip_except_selected`
    Departs     means over the whole step; the released code takes those of a micro-batch
    Reference   Cui et al., The Entropy Mechanism, arXiv:2505.22617; verl `clip_cov`

    >>> logp, one, three = torch.tensor([[[-4., -2., 0.]]]), torch.ones(1, 1), torch.ones(1, 1, 3)
    >>> covariance_band(logp, logp, torch.tensor([[[-1., 0., 1.]]]), three, one, torch.tensor([[[.9, 0., .1]]]))  # c = 2, 0, 2
    tensor([[[False, False,  True]]])
    """
    counted = mask.bool() & real.bool()[..., None]
    c, count = covariances(logp_now, advantage, counted)
    log_ratio, advantage = token(logp_now, logp_old, counted), masked(advantage, counted)
    unclipped = clip(log_ratio, advantage, low=clip_low, high=clip_high) == plain(log_ratio, advantage)
    return lowest(noise, counted & unclipped & (c > low) & (c < high), share, count)


def covariance_top(logp_now, advantage, mask, real, *, share=2e-4) -> Tokens:
    """Tokens of the highest covariance, which KL-Cov holds at the old policy.

    c_t = (log pi_t - mean log pi) (A_t - mean A);   the max(1, floor(share N)) tokens with the largest c_t

    share       share of the step's N tokens; 2e-4 (32B models) to 2e-3 (7B)
    Edge        equal advantages: all c are 0, and the first tokens are taken; no token at all: nothing
    Relations   for `surrogates.kl_selected`
    Departs     means over the whole step; the released code takes those of a micro-batch
    Reference   Cui et al., The Entropy Mechanism, arXiv:2505.22617; verl `kl_cov`

    >>> logp, advantage = torch.tensor([[[-4., -2., 0.]]]), torch.tensor([[[-2., 0., 2.5]]])
    >>> covariance_top(logp, advantage, torch.ones(1, 1, 3), torch.ones(1, 1))          # c = 4.33, 0, 4.67
    tensor([[[False, False,  True]]])
    """
    counted = mask.bool() & real.bool()[..., None]
    c, count = covariances(logp_now, advantage, counted)
    return lowest(-c, counted, share, count)
