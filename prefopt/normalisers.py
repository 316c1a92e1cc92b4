"""normalise slot: advantages of tokens (B, K, T) in units of the batch, over all processes; 0 elsewhere. No gradient."""
from __future__ import annotations

import torch

from prefopt.ops import masked, masked_mean, total
from prefopt.parts import Tokens

__all__ = ["whiten", "whiten_rows"]


def moments(x, counted):
    """Number, mean and unbiased variance of x where counted, over all processes, in float64; the variance of one is 0."""
    x = masked(x, counted).double()
    n, sum_ = total(torch.stack([counted.sum(), x.sum()]))
    mean = sum_ / n.clamp(min=1)
    return n, mean, total(masked((x - mean) ** 2, counted).sum()) / (n - 1).clamp(min=1)


def whiten(advantage, mask, real, *, eps=1e-8) -> Tokens:
    """Mean 0 and variance 1 over the tokens of the batch.

    A'_t = (A_t - mean A) / sqrt(var A + eps),   over all tokens; the unbiased variance

    eps         1e-8, inside the root
    Edge        equal advantages give 0; a single token is left as it is
    Relations   long responses weigh more; each response once: `whiten_rows`
    Departs     verl raises on a single token
    Reference   Schulman et al., PPO, arXiv:1707.06347; Hu et al., REINFORCE++, arXiv:2501.03262; verl `masked_whiten`

    >>> whiten(torch.tensor([[[1., -1.]]]), torch.ones(1, 1, 2), torch.ones(1, 1).bool())                    # variance 2
    tensor([[[ 0.7071, -0.7071]]])
    """
    counted = mask.bool() & real[..., None]
    a = masked(advantage, counted)
    n, mean, variance = moments(a, counted)
    return masked(torch.where(n > 1, (a - mean) * (variance + eps).rsqrt(), a), counted).to(a.dtype)


def whiten_rows(advantage, mask, real, *, eps=1e-4) -> Tokens:
    """Mean 0 and standard deviation 1 over the responses of the batch, each counted once whatever its length.

    A'_t = (A_t - mean a) / (std a + eps),   a the mean of A over a response's tokens; the unbiased std

    eps         1e-4, outside the root
    Edge        equal advantages give 0; a single response is left as it is; empty responses are not counted
    Relations   equal lengths, one advantage per response: `whiten`, but for eps and the count in the unbiased variance
    Departs     -
    Reference   TRL `RLOOTrainer`, normalize_advantages

    >>> whiten_rows(torch.tensor([[[1., 1.], [-1., 0.]]]), torch.tensor([[[1, 1], [1, 0]]]), torch.ones(1, 2).bool(), eps=0.)
    tensor([[[ 0.7071,  0.7071],
             [-0.7071,  0.0000]]])
    """
    counted = mask.bool() & real[..., None]
    a = masked(advantage, counted)
    n, mean, variance = moments(masked_mean(a.double(), counted), counted.any(-1))
    return masked(torch.where(n > 1, (a - mean) / (variance.sqrt() + eps), a), counted).to(a.dtype)
