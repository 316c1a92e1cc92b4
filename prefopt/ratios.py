"""ratio slot: log of the importance ratio that a surrogate weighs, (..., T), with gradient; 0 outside the mask."""
from __future__ import annotations

import torch

from prefopt.ops import log_ratios, masked, masked_mean
from prefopt.parts import Tokens

__all__ = ["geometric", "sequence", "sequence_sum", "sequence_token", "token"]


def token(logp, logp_old, mask, *, limit=20.0) -> Tokens:
    """Ratio of each token (PPO, GRPO).

    log r_t = log pi_t - log pi_old_t

    limit       log-ratios are clamped to +-limit; 20
    Gradient    1 through logp at each token, 0 beyond the limit
    Edge        tokens outside the mask have 0
    Relations   the sampler's policy as old one makes the surrogate correct for the sampler, without a correction
    Departs     TRL clamps nothing
    Reference   Schulman et al., PPO, arXiv:1707.06347

    >>> token(torch.tensor([[-1., -1.]]), torch.tensor([[-2., float("nan")]]), torch.tensor([[1, 0]]))
    tensor([[1., 0.]])
    """
    return log_ratios(logp, logp_old, mask).clamp(-limit, limit)


def sequence(logp, logp_old, mask) -> Tokens:
    """Geometric mean of the response's ratios at each of its tokens (GSPO).

    log r_t = (1/|y|) sum_u (log pi_u - log pi_old_u)

    Gradient    1/|y| through logp of every token of the response, at each t
    Edge        an empty response has 0
    Relations   responses of one token: `token`; with equal advantages inside a response `sequence_token` has the same
                gradient under any reduction that weighs its tokens alike
    Departs     no cap, as TRL (importance_sampling_level "sequence"); verl caps at 10, `sequence_token`
    Reference   Zheng et al., GSPO, arXiv:2507.18071, eq. 7

    >>> sequence(torch.tensor([[-1., -1., -9.]]), torch.tensor([[-2., -1., -1.]]), torch.tensor([[1, 1, 0]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    return masked(masked_mean(log_ratios(logp, logp_old, mask), mask)[..., None], mask)


def sequence_token(logp, logp_old, mask, *, limit=10.0) -> Tokens:
    """Geometric mean of the response's ratios, with the gradient of each token alone (GSPO-token).

    log r_t = sg[ (1/|y|) sum_u (log pi_u - log pi_old_u) ] + log pi_t - sg[log pi_t]

    limit       the log-ratio is capped at it from above; 10
    Gradient    1 through logp at each token, 0 beyond the limit
    Edge        an empty response has 0
    Relations   value of `sequence`; advantages may differ between the tokens of a response
    Departs     -
    Reference   Zheng et al., GSPO, arXiv:2507.18071, eq. 13-14; verl

    >>> sequence_token(torch.tensor([[-1., -1.]]), torch.tensor([[-2., -1.]]), torch.ones(1, 2))
    tensor([[0.5000, 0.5000]])
    """
    logp = masked(logp, mask)
    return (sequence(logp.detach(), logp_old, mask) + logp - logp.detach()).clamp(max=limit)


def sequence_sum(logp, logp_old, mask) -> Tokens:
    """Ratio of the whole response at each of its tokens (RLOO).

    log r_t = sum_u (log pi_u - log pi_old_u)

    Gradient    1 through logp of every token of the response, at each t
    Edge        an empty response has 0
    Relations   unbiased importance ratio of a response, of high variance; TRL's RLOO with `reductions.sequence_mean`, which
                counts each response once
    Departs     -
    Reference   Ahmadian et al., Back to Basics, arXiv:2402.14740; TRL `RLOOTrainer`

    >>> sequence_sum(torch.tensor([[-1., -1.]]), torch.tensor([[-2., -3.]]), torch.ones(1, 2))
    tensor([[3., 3.]])
    """
    return masked(log_ratios(logp, logp_old, mask).sum(-1, keepdim=True), mask)


def geometric(logp, logp_old, mask, advantage, *, low=0.4, high=0.4) -> Tokens:
    """Geometric mean of the response's clipped ratios at each of its tokens (GMPO).

    log r_t = (1/|y|) sum_u q_u,   q = sign(A) min( sign(A) d, sign(A) clip(d, -low, high) ),   d = log pi - log pi_old

    low, high   clip range of a token's log-ratio, on the side that its advantage pushes to; 0.4 each
    Gradient    1/|y| through logp of the response's unclipped tokens, at each t
    Edge        tokens of advantage 0 count as ratio 1; an empty response has 0
    Relations   the loss is `surrogates.plain` under `reductions.sequence_mean`; without bounds it is `sequence`
    Departs     -
    Reference   Zhao et al., GMPO, arXiv:2507.20673; verl `geo_mean`

    >>> geometric(torch.tensor([[-1., -1.]]), torch.tensor([[-2., 0.]]), torch.ones(1, 2), torch.ones(1, 2))  # (.4 - 1) / 2
    tensor([[-0.3000, -0.3000]])
    """
    d, sign = log_ratios(logp, logp_old, mask), masked(advantage, mask).sign()
    clipped = d.clamp(min=-low).clamp(max=high)
    return masked(masked_mean(sign * torch.minimum(sign * d, sign * clipped), mask)[..., None], mask)
