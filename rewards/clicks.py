"""Rewards from what users did: clicks with position bias, reactions that are missing not at random, P[Love]."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.ops import upcast

__all__ = ["balanced", "biased_clicks", "dla", "log_losses", "mnar", "mnar_non_negative", "popularity", "propensities",
           "squared_losses", "unweighted"]


# ------------------------------------------------------------------------------------------------- position bias
def dla(scores: Tensor, examination: Tensor, clicks: Tensor, shown: Tensor | None = None, *,
        limit: float = math.inf) -> tuple[Tensor, Tensor]:
    """Dual learning of a ranker and of position bias: (loss of the ranker, loss of the propensities); train on their sum.

    L_rank = SL(f; w),   L_exam = SL(g; u),   SL(z; v) = sum v c (-log softmax(z)) / sum v c   over the batch

    w_i = min(limit, softmax(g)_1 / softmax(g)_i) and u_i = min(limit, softmax(f)_1 / softmax(f)_i) carry no gradient, so
    that each loss moves its own model. Items are in the order in which they were shown: in a chat, the order of the replies.

    scores      f (B, M) of the items at positions 1..M
    examination g (M) or (B, M), logits of the propensities, functions of the position alone
    clicks      c (B, M), 0 or 1
    shown       False where a list is shorter than M; position 1 is always shown
    limit       largest weight
    Edge        a list without a click adds nothing; no click at all: both losses are 0
    Departs     no 1e-7 added to clicks, as ULTRA has
    Reference   Ai et al., Unbiased Learning to Rank with Unbiased Propensity Estimation, arXiv:1804.05938

    >>> f, g, c = torch.tensor([[0., 1.]]), torch.tensor([1., 0.]), torch.tensor([[1., 1.]])
    >>> dla(f, g, c)[0]                                 # w = 1, e: (1.3133 + e 0.3133) / (1 + e)
    tensor(0.5822)
    """
    f, g = torch.broadcast_tensors(upcast(scores), upcast(examination))
    shown = torch.ones_like(f, dtype=torch.bool) if shown is None else shown

    def weighted(z: Tensor, other: Tensor) -> Tensor:
        other = torch.where(shown, other.detach(), 0.0)
        weight = torch.where(shown, clicks * torch.exp(other[:, :1] - other).clamp(max=limit), 0.0)
        surprise = -torch.where(shown, z.masked_fill(~shown, -math.inf).log_softmax(-1), 0.0)
        return (weight * surprise).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)

    return weighted(f, g), weighted(g, f)


def propensities(examination: Tensor) -> Tensor:
    """How likely each position is looked at, relative to the first.

    theta_i / theta_1 = softmax(g)_i / softmax(g)_1

    >>> propensities(torch.tensor([0., -math.log(2)]))
    tensor([1.0000, 0.5000])
    """
    return torch.exp(examination - examination[..., :1])


def biased_clicks(attraction: Tensor, *, eta: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Clicks of users who look at position i with probability (1/i)^eta and click what attracts them, (B, M).

    P(click) = (1/i)^eta gamma_i

    attraction  gamma (B, M) of the items in the order they are shown

    >>> biased_clicks(torch.tensor([[1., 0.]]))
    tensor([[1., 0.]])
    """
    place = torch.arange(1, attraction.shape[-1] + 1, dtype=attraction.dtype, device=attraction.device)
    return torch.bernoulli(attraction / place ** eta, generator=generator)


# ------------------------------------------------------------------------------------------------- missing not at random
def squared_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - p)^2 if relevant and p^2 if not, p = sigmoid(logit)."""
    p = torch.sigmoid(logits)
    return (1 - p) ** 2, p ** 2


def log_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """-log p if relevant and -log(1 - p) if not."""
    return -F.logsigmoid(logits), -F.logsigmoid(-logits)


def _parts(logits, clicks, propensity, floor, losses):
    inverse = clicks / propensity.detach().clamp(min=floor)
    d1, d0 = losses(upcast(logits))
    return (inverse * d1).mean(), ((1 - inverse) * d0).mean()


def mnar(logits: Tensor, clicks: Tensor, propensity: Tensor, *, floor: float = 0.1,
         losses: Callable[[Tensor], tuple[Tensor, Tensor]] = squared_losses) -> Tensor:
    """Unbiased loss of relevance from positive feedback alone, with clipped propensities.

    L = mean of (Y / t) d1 + (1 - Y / t) d0,   t = max(theta, floor)

    E over Y of the loss with floor 0 is the loss of the true relevance, gamma d1 + (1 - gamma) d0. Where theta < floor the
    bias is (theta / floor - 1) gamma (d1 - d0), and the variance is bounded.

    clicks      Y, 1 where there was feedback; P(Y = 1) = theta gamma
    propensity  theta in (0, 1], how likely the response was considered; no gradient
    floor       0 is unbiased, 1 takes what is missing for negative
    losses      d1 and d0; `log_losses` has no lower bound here: use `mnar_non_negative`
    Edge        the weight of d0 is negative where Y = 1 and theta < 1
    Reference   Saito et al., Unbiased Recommender Learning from Missing-Not-At-Random Implicit Feedback, arXiv:1909.03601

    >>> mnar(torch.zeros(2), torch.tensor([1., 0.]), torch.tensor([.5, .5]))        # (2 - 1 + 1) / 4 / 2
    tensor(0.2500)
    """
    relevant, other = _parts(logits, clicks, propensity, floor, losses)
    return relevant + other


def mnar_non_negative(logits: Tensor, clicks: Tensor, propensity: Tensor, *, floor: float = 0.1,
                      losses: Callable[[Tensor], tuple[Tensor, Tensor]] = log_losses) -> Tensor:
    """`mnar` whose part of the irrelevant is kept from going below 0, so that the logarithmic loss is bounded.

    L = mean of (Y / t) d1 + max(0, mean of (1 - Y / t) d0)

    Reference   Saito et al., arXiv:1909.03601; Kiryo et al., Non-negative PU Learning, arXiv:1703.00593

    >>> mnar_non_negative(torch.zeros(1), torch.ones(1), torch.tensor([.5]))        # 2 log 2
    tensor(1.3863)
    """
    relevant, other = _parts(logits, clicks, propensity, floor, losses)
    return relevant + other.clamp(min=0)


def popularity(positives: Tensor, *, power: float = 0.5) -> Tensor:
    """Propensity of each item from how much positive feedback it got.

    theta_i = (n_i / max n)^power

    Reference   Saito et al., arXiv:1909.03601

    >>> popularity(torch.tensor([4, 1]))
    tensor([1.0000, 0.5000])
    """
    return (positives / positives.max()) ** power


# ------------------------------------------------------------------------------------------------- P[Love]
def balanced(label: Tensor) -> tuple[float, float]:
    """Weights (w1, w0) of the recipe `love` with which both classes count the same, and n in all.

    w_c = n / (2 n_c)

    >>> balanced(torch.tensor([1., 0., 0., 0.]))
    (2.0, 0.6666666666666666)
    """
    n, ones = len(label), int((label > 0.5).sum())
    if ones in (0, n):
        raise ValueError(f"both classes are needed to balance them: {ones} of {n} labels are positive")
    return n / (2 * ones), n / (2 * (n - ones))


def unweighted(logit: Tensor, *, desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    """Log-odds of the population, from a model trained with class weights.

    logit P = f - log(w1 / w0)

    desirable, undesirable   w1 and w0 of the loss
    Relations   `calibrate.corrected_logit` undoes the loss of negatives that were not kept

    >>> unweighted(torch.tensor(0.), desirable=2., undesirable=0.5).sigmoid()       # 1 : 1 at weights 4 : 1 was 1 : 4
    tensor(0.2000)
    """
    return logit - math.log(desirable / undesirable)
