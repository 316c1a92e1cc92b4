"""f-divergences as advantages: distribution matching by policy gradient (f-DPG, GDC, DPG), (B, K).

The target is p = P / Z with P = pi_ref exp(r / beta), the optimum of KL-regularised reward. The gradient of D_f(pi || p) is
E_pi[ f'(t) grad log pi ] with t = pi / p, so -f'(t) is an advantage. Z is the mean of P / pi_rollout over the group's own
responses, none left out: shared by all of them, consistent, and for finite groups slightly biased. Responses sampled by
another policy want the ratio `sequence_sum` with `truncated_sequence` (cap inf) as correction, or `logp_old` = `logp_rollout`.

`baseline` is taken from -f'. Any constant leaves the expected gradient as it is, and -f'(1) makes the advantage 0 at the target.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from prefopt.ops import masked, masked_logsumexp, masked_sum, upcast
from prefopt.parts import Rows

__all__ = ["fdpg_chi2_forward", "fdpg_chi2_reverse", "fdpg_forward", "fdpg_js", "fdpg_reverse", "fdpg_tv"]


def log_density(reward, logp_old, logp_ref, logp_rollout, mask, real, *, beta, limit=20.0):
    """log t = log pi - log P + log Z of each response, clamped to +-limit, and where it is known: Z > 0."""
    real = real.bool()
    lp, lr, lq = (masked_sum(x, mask) for x in (logp_old, logp_ref, logp_rollout))
    log_p = lr + upcast(reward) / beta
    log_z = masked_logsumexp(log_p - lq, real) - real.sum(-1).clamp(min=1).to(lp.dtype).log()
    known = real & torch.isfinite(log_z)[..., None]
    return masked(lp - log_p + log_z[..., None], known).clamp(-limit, limit), known


def fdpg_forward(reward, logp_old, logp_ref, logp_rollout, mask, real, *, beta=0.1, baseline=0.0) -> Rows:
    """Forward KL(p || pi) (DPG, GDC): covers the target.

    A = 1/t - baseline

    beta        temperature of the target
    baseline    1 makes the advantage 0 at the target; 0
    Gradient    none
    Edge        slots without a row, and groups of Z = 0, have 0; log t is clamped to +-20
    Relations   sampled by pi itself the weight 1/t of DPG
    Departs     the released baseline is a running mean over the samples before
    Reference   Parshakova et al., DPG, arXiv:1912.08517; Khalifa et al., GDC, arXiv:2012.11635; Go et al., f-DPG,
                arXiv:2302.08215

    >>> one, lp = torch.ones(1, 2), torch.tensor([[[.5], [.5]]]).log()
    >>> target = torch.tensor([[[.25], [.75]]]).log()
    >>> fdpg_forward(0 * one, lp, target, lp, one[..., None], one)                             # p / pi
    tensor([[0.5000, 1.5000]])
    """
    log_t, known = log_density(reward, logp_old, logp_ref, logp_rollout, mask, real, beta=beta)
    return masked((-log_t).exp() - baseline, known)


def fdpg_reverse(reward, logp_old, logp_ref, logp_rollout, mask, real, *, beta=0.1, baseline=0.0) -> Rows:
    """Reverse KL(pi || p): commits to a mode of the target.

    A = -(log t + 1) - baseline

    beta        temperature of the target
    baseline    -1 makes the advantage 0 at the target; 0
    Gradient    none
    Edge        slots without a row, and groups of Z = 0, have 0; log t is clamped to +-20
    Relations   1/beta times the advantage of KL-regularised REINFORCE, r - beta (log pi - log pi_ref), but for a constant
    Departs     the released baseline is a running mean over the samples before
    Reference   Go et al., f-DPG, arXiv:2302.08215

    >>> one, lp = torch.ones(1, 2), torch.tensor([[[.5], [.5]]]).log()
    >>> target = torch.tensor([[[.25], [.75]]]).log()
    >>> fdpg_reverse(0 * one, lp, target, lp, one[..., None], one, baseline=-1.)               # -log 2, log 1.5
    tensor([[-0.6931,  0.4055]])
    """
    log_t, known = log_density(reward, logp_old, logp_ref, logp_rollout, mask, real, beta=beta)
    return masked(-log_t - 1 - baseline, known)


def fdpg_js(reward, logp_old, logp_ref, logp_rollout, mask, real, *, beta=0.1, baseline=0.0) -> Rows:
    """Jensen-Shannon divergence, KL(pi || m) + KL(p || m) with m = (pi + p) / 2: bounded, the default of f-DPG.

    A = log(1 + 1/t) - log 2 - baseline

    beta        temperature of the target
    baseline    0 makes the advantage 0 at the target; 0
    Gradient    none
    Edge        slots without a row, and groups of Z = 0, have 0; at P = 0 it is -log 2
    Relations   between `fdpg_forward` and `fdpg_reverse`
    Departs     the released baseline is a running mean over the samples before
    Reference   Go et al., f-DPG, arXiv:2302.08215

    >>> one, lp = torch.ones(1, 2), torch.tensor([[[.5], [.5]]]).log()
    >>> target = torch.tensor([[[.25], [.75]]]).log()
    >>> fdpg_js(0 * one, lp, target, lp, one[..., None], one)                                  # log .75, log 1.25
    tensor([[-0.2877,  0.2231]])
    """
    log_t, known = log_density(reward, logp_old, logp_ref, logp_rollout, mask, real, beta=beta)
    return masked(-F.logsigmoid(log_t) - math.log(2) - baseline, known)


def fdpg_tv(reward, logp_old, logp_ref, logp_rollout, mask, real, *, beta=0.1, baseline=0.0) -> Rows:
    """Total variation, half of sum |pi - p|.

    A = -sign(log t) / 2 - baseline

    beta        temperature of the target
    baseline    0 makes the advantage 0 at the target; 0
    Gradient    none
    Edge        slots without a row, and groups of Z = 0, have 0; t = 1 gives 0
    Relations   which side of the target a response is on, and nothing else
    Departs     the released baseline is a running mean over the samples before
    Reference   Go et al., f-DPG, arXiv:2302.08215

    >>> one, lp = torch.ones(1, 2), torch.tensor([[[.5], [.5]]]).log()
    >>> target = torch.tensor([[[.25], [.75]]]).log()
    >>> fdpg_tv(0 * one, lp, target, lp, one[..., None], one)
    tensor([[-0.5000,  0.5000]])
    """
    log_t, known = log_density(reward, logp_old, logp_ref, logp_rollout, mask, real, beta=beta)
    return masked(-log_t.sign() / 2 - baseline, known)


def fdpg_chi2_forward(reward, logp_old, logp_ref, logp_rollout, mask, real, *, beta=0.1, baseline=0.0) -> Rows:
    """Chi-squared divergence of the target from the policy, sum (p - pi)^2 / pi.

    A = t^-2 - 1 - baseline

    beta        temperature of the target
    baseline    0 makes the advantage 0 at the target; 0
    Gradient    none
    Edge        slots without a row, and groups of Z = 0, have 0; log t is clamped to +-20
    Relations   `fdpg_forward` with heavier weights on what the policy misses
    Departs     the released baseline is a running mean over the samples before
    Reference   Go et al., f-DPG, arXiv:2302.08215

    >>> one, lp = torch.ones(1, 2), torch.tensor([[[.5], [.5]]]).log()
    >>> target = torch.tensor([[[.25], [.75]]]).log()
    >>> fdpg_chi2_forward(0 * one, lp, target, lp, one[..., None], one)                        # .25 - 1, 2.25 - 1
    tensor([[-0.7500,  1.2500]])
    """
    log_t, known = log_density(reward, logp_old, logp_ref, logp_rollout, mask, real, beta=beta)
    return masked(torch.expm1(-2 * log_t) - baseline, known)


def fdpg_chi2_reverse(reward, logp_old, logp_ref, logp_rollout, mask, real, *, beta=0.1, baseline=0.0) -> Rows:
    """Chi-squared divergence of the policy from the target, sum (pi - p)^2 / p.

    A = 2 (1 - t) - baseline

    beta        temperature of the target
    baseline    0 makes the advantage 0 at the target; 0
    Gradient    none
    Edge        slots without a row, and groups of Z = 0, have 0; log t is clamped to +-20
    Relations   `fdpg_reverse` with heavier weights on what the target misses
    Departs     the released baseline is a running mean over the samples before
    Reference   Go et al., f-DPG, arXiv:2302.08215

    >>> one, lp = torch.ones(1, 2), torch.tensor([[[.5], [.5]]]).log()
    >>> target = torch.tensor([[[.25], [.75]]]).log()
    >>> fdpg_chi2_reverse(0 * one, lp, target, lp, one[..., None], one)                        # 2 (1 - 2), 2 (1 - 2/3)
    tensor([[-2.0000,  0.6667]])
    """
    log_t, known = log_density(reward, logp_old, logp_ref, logp_rollout, mask, real, beta=beta)
    return masked(-2 * torch.expm1(log_t) - baseline, known)
