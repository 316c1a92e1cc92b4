"""surrogate slot: log_ratio and advantage -> the objective J of each token, (..., T), which is maximised.

Bounds may be numbers or tensors (..., T). A token of advantage 0, as all tokens outside the mask are, has J = 0 and no
gradient whatever its probabilities are.
"""
from __future__ import annotations

import math

import torch

from prefopt.ops import masked
from prefopt.parts import Tokens

__all__ = ["capped", "clip", "clip_except_selected", "dual_clip", "kl_selected", "likelihood", "plain", "soft_gate", "truncate"]

LARGEST = 80.0                                                # exp of more overflows in float32


def ratio(log_ratio, advantage):
    """r where the advantage is not 0, else 1; at most exp(80), without gradient beyond."""
    return masked(log_ratio, advantage != 0).clamp(max=LARGEST).exp()


def clipped(r, low, high):
    return r.clamp(min=1 - low).clamp(max=1 + high)


def plain(log_ratio, advantage) -> Tokens:
    """Importance-weighted policy gradient, without a trust region.

    J = r A

    Gradient    r A through log_ratio
    Edge        A = 0 gives 0
    Relations   at r = 1 the gradient of `clip`, `likelihood` and `truncate`; `kl_selected` with coef = 0
    Departs     -
    Reference   Kakade and Langford 2002

    >>> plain(torch.tensor([2.]).log(), torch.tensor([3.]))
    tensor([6.])
    """
    return ratio(log_ratio, advantage) * advantage


def clip(log_ratio, advantage, *, low=0.2, high=0.2) -> Tokens:
    """Clipped surrogate (PPO, GRPO; DAPO with a higher upper bound).

    J = min( r A, clip(r, 1 - low, 1 + high) A )

    low, high   trust region of the ratio; PPO 0.2, 0.2; DAPO 0.2, 0.28; GSPO 3e-4, 4e-4
    Gradient    r A; 0 where A > 0 and r > 1 + high, or A < 0 and r < 1 - low
    Edge        A = 0 gives 0; unbounded below for A < 0 and r >> 1 (`dual_clip`)
    Relations   low = high = inf is `plain`
    Departs     -
    Reference   Schulman et al., PPO, arXiv:1707.06347, eq. 7; Yu et al., DAPO, arXiv:2503.14476

    >>> clip(torch.tensor([2., 2., .5]).log(), torch.tensor([1., -1., -1.]))
    tensor([ 1.2000, -2.0000, -0.8000])
    """
    r = ratio(log_ratio, advantage)
    return torch.minimum(r * advantage, clipped(r, low, high) * advantage)


def dual_clip(log_ratio, advantage, *, low=0.2, high=0.2, floor=3.0) -> Tokens:
    """Clipped surrogate with a floor for negative advantages.

    J = max( J_clip, floor A ) where A < 0, else J_clip

    low, high   as in `clip`
    floor       the ratio beyond which a token of negative advantage is let go, > 1; verl 3, DAPO recipe 10
    Gradient    that of `clip`; 0 where A < 0 and r > floor
    Edge        A = 0 gives 0
    Relations   floor = inf is `clip`; `capped` caps r for both signs of A
    Departs     -
    Reference   Ye et al., arXiv:1912.09729; verl

    >>> dual_clip(torch.tensor([2., 4., 4.]).log(), torch.tensor([-1., -1., 1.]))
    tensor([-2.0000, -3.0000,  1.2000])
    """
    bounded = clip(log_ratio, advantage, low=low, high=high)
    return torch.where(advantage < 0, torch.maximum(bounded, floor * advantage), bounded)


def capped(log_ratio, advantage, *, low=0.2, high=0.2, delta=4.0) -> Tokens:
    """Two-sided clipping: the ratio of the unclipped branch is capped as well.

    J = min( min(r, delta) A, clip(r, 1 - low, 1 + high) A )

    low, high   as in `clip`
    delta       cap, more than 1 + high; 4
    Gradient    that of `clip`; 0 where r > delta
    Edge        A = 0 gives 0
    Relations   delta > 1 + high: `dual_clip` with floor = delta; delta = inf is `clip`
    Departs     -
    Reference   INTELLECT-2, arXiv:2505.07291; TRL `delta`

    >>> capped(torch.tensor([2., 5.]).log(), torch.tensor([-1., -1.]))
    tensor([-2., -4.])
    """
    r = ratio(log_ratio, advantage)
    return torch.minimum(r.clamp(max=delta) * advantage, clipped(r, low, high) * advantage)


def truncate(logp, log_ratio, advantage, *, low=math.inf, high=0.28) -> Tokens:
    """Likelihood weighted by a truncated ratio (CISPO): no token loses its gradient.

    J = sg[ clip(r, 1 - low, 1 + high) ] A log pi

    low         1 - low is the least weight; inf: no bound below, as in TRL
    high        1 + high is the largest weight; 0.28. TRL's epsilon_high is this weight itself: its 5.0 is high = 4
    Gradient    clip(r) A through logp, none through the ratio
    Edge        A = 0 gives 0; the value says nothing
    Relations   without bounds the gradient of `plain`; low = high = 0 is `likelihood`
    Departs     -
    Reference   MiniMax-M1, arXiv:2506.13585; verl and TRL `cispo`

    >>> truncate(torch.tensor([-1., -1.]), torch.tensor([2., .5]).log(), torch.tensor([1., 1.]))
    tensor([-1.2800, -0.5000])
    """
    weight = clipped(ratio(log_ratio.detach(), advantage), low, high)
    return weight * advantage * masked(logp, advantage != 0)


def likelihood(logp, advantage) -> Tokens:
    """Policy gradient without importance weights (REINFORCE, GPG).

    J = A log pi

    Gradient    A through logp
    Edge        A = 0 gives 0; the value says nothing
    Relations   the gradient of `plain` at r = 1
    Departs     -
    Reference   Williams 1992; Chu et al., GPG, arXiv:2504.02546

    >>> likelihood(torch.tensor([-2., -float("inf")]), torch.tensor([3., 0.]))
    tensor([-6.,  0.])
    """
    return advantage * masked(logp, advantage != 0)


def soft_gate(log_ratio, advantage, *, tau_positive=1.0, tau_negative=1.05) -> Tokens:
    """Clipping by a sigmoid gate (SAPO).

    J = (4 / tau) sigmoid( tau (r - 1) ) A

    tau_positive   temperature where A > 0: more narrows the gate; 1
    tau_negative   temperature where A <= 0; 1.05, as steps away from a token are the less stable ones
    Gradient    4 sigmoid' r A with sigmoid' in (0, 1/4]: that of `plain` at r = 1, fading on both sides
    Edge        A = 0 gives 0; at r = 1 the value is 2 A / tau
    Relations   tau -> 0 is `plain` but for a constant
    Departs     -
    Reference   Gao et al., SAPO, arXiv:2511.20347, eq. 5-6; TRL and verl `sapo`

    >>> soft_gate(torch.tensor([0.]), torch.tensor([1.]))
    tensor([2.])
    """
    r = ratio(log_ratio, advantage)
    tau = torch.where(advantage > 0, r.new_tensor(tau_positive), r.new_tensor(tau_negative))
    return 4 / tau * torch.sigmoid(tau * (r - 1)) * advantage


def clip_except_selected(log_ratio, advantage, selected, *, low=0.2, high=0.2) -> Tokens:
    """Clipped surrogate that leaves out selected tokens (Clip-Cov).

    J = 0 on selected tokens, else J_clip

    low, high   as in `clip`
    Gradient    that of `clip`, none on selected tokens
    Edge        selected tokens stay in the denominators of the reduction
    Relations   `selections.covariance_band` selects; nothing selected is `clip`
    Departs     -
    Reference   Cui et al., The Entropy Mechanism, arXiv:2505.22617; verl `clip_cov`

    >>> clip_except_selected(torch.zeros(2), torch.ones(2), torch.tensor([True, False]))
    tensor([0., 1.])
    """
    return masked(clip(log_ratio, advantage, low=low, high=high), ~selected.bool())


def kl_selected(log_ratio, advantage, selected, *, coef=1.0) -> Tokens:
    """Importance-weighted policy gradient that holds selected tokens at the old policy (KL-Cov).

    J = r A - coef |log r| on selected tokens, else r A

    coef        weight of the penalty; 1
    Gradient    r A, less coef sign(log r) on selected tokens
    Edge        at r = 1 the penalty has no gradient: it needs several updates per rollout. No clipping at all
    Relations   `selections.covariance_top` selects; coef = 0 is `plain`
    Departs     -
    Reference   Cui et al., The Entropy Mechanism, arXiv:2505.22617; verl `kl_cov`

    >>> kl_selected(torch.tensor([.5, .5]), torch.zeros(2), torch.tensor([True, False]))
    tensor([-0.5000,  0.0000])
    """
    return plain(log_ratio, advantage) - coef * masked(log_ratio, selected).abs()
