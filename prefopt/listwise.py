"""ranking slot, listwise: score (B, K) and relevance (B, K) -> loss of each list (B)."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from prefopt.margins import difference
from prefopt.ops import masked_logsumexp
from prefopt.parts import Lists

__all__ = ["copg", "in_context", "list_mle", "list_net", "softmax"]


def list_mle(score, relevance, real) -> Lists:
    """Plackett-Luce negative log-likelihood of the labelled order.

    l = -sum_i [ s_i - log (exp s_i + sum over j with relevance_j < relevance_i of exp s_j) ]

    Gradient    through the scores
    Edge        all labels equal, or one response: 0
    Relations   K = 2 is `logistic`; without ties the ListMLE of Xia et al.
    Departs     tied responses are not compared with each other: no random order, so the loss keeps symmetry
    Reference   Xia et al. 2008; Liu et al., LiPO, arXiv:2402.01878

    >>> list_mle(torch.tensor([[1., 0.]]), torch.tensor([[1., 0.]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([0.3133])
    """
    worse = (relevance[..., :, None] > relevance[..., None, :]) & real[..., None, :]
    own = torch.eye(score.shape[-1], dtype=torch.bool, device=score.device)
    rivals = (worse | own) & real[..., :, None]
    terms = masked_logsumexp(score[..., None, :].expand(rivals.shape), rivals) - score
    return torch.where(real, terms, 0.0).sum(-1)


def softmax(score, relevance, real) -> Lists:
    """Cross-entropy between the labels' shares and the scores' softmax.

    l = -sum_i (psi_i / sum psi) log softmax(s)_i

    Gradient    softmax(s) - psi / sum psi
    Edge        all labels 0: 0
    Relations   K = 2 with labels 1/0 is `logistic`; `list_net` takes the softmax of the labels
    Departs     -
    Reference   Cao et al. 2007; Liu et al., LiPO, arXiv:2402.01878

    >>> softmax(torch.tensor([[1., 0.]]), torch.tensor([[1., 0.]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([0.3133])
    """
    label = torch.where(real, relevance, 0.0).to(score.dtype)
    sum_ = label.sum(-1, keepdim=True)
    share = torch.where(sum_ > 0, label / torch.where(sum_ > 0, sum_, 1.0), 0.0)
    log_p = score - masked_logsumexp(score, real)[..., None]
    return -(share * torch.where(real, log_p, 0.0)).sum(-1)


def list_net(score, relevance, real) -> Lists:
    """Cross-entropy between the softmax of the labels and the softmax of the scores.

    l = -sum_i softmax(psi)_i log softmax(s)_i

    Gradient    softmax(s) - softmax(psi)
    Edge        one response: 0
    Relations   `softmax` divides labels by their sum instead
    Departs     no 1e-10 inside the logarithm, as allRank has
    Reference   Cao et al., ListNet, 2007

    >>> list_net(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    tensor([0.6931])
    """
    label = relevance.to(score.dtype)
    share = torch.where(real, (label - masked_logsumexp(label, real)[..., None]).exp(), 0.0)
    log_p = score - masked_logsumexp(score, real)[..., None]
    return -(share * torch.where(real, log_p, 0.0)).sum(-1)


def in_context(score, relevance, position, real) -> Lists:
    """Ranking of the items inside one generated list, weighted by gain and position.

    l = (1/n) sum_i w_i softplus(q_i),   q_i = log mean_{j != i} exp(s_j - s_i),   w_i = (2^y_i - 1) / log2(1 + p_i)

    Rows are items: logp holds the item's tokens given the prompt and the items before it; p is its 1-based position.

    Gradient    through the scores
    Edge        one item: 0; relevance 0 everywhere: 0; items without relevance still compete
    Relations   n = 2 is `logistic` weighted by w_i; used with `mean_log_ratio`
    Departs     the item itself is left out of q_i exactly (the source subtracts 100 before scaling by beta)
    Reference   Wu et al., In-context Ranking Preference Optimization, arXiv:2504.15477

    >>> args = torch.tensor([[1., 0.]]), torch.tensor([[1., 0.]]), torch.tensor([[1, 2]]), torch.ones(1, 2).bool()
    >>> in_context(*args)                                           # (1/2) 1 softplus(-1)
    tensor([0.1566])
    """
    n = real.sum(-1)
    own = torch.eye(score.shape[-1], dtype=torch.bool, device=score.device)
    rivals = real[..., :, None] & real[..., None, :] & ~own
    q = masked_logsumexp(-difference(score), rivals) - (n - 1).clamp(min=1).to(score.dtype).log()[..., None]
    gain = torch.expm1(relevance.to(score.dtype) * math.log(2)) / torch.log2(1 + position.to(score.dtype))
    terms = torch.where(rivals.any(-1), gain, 0.0) * -F.logsigmoid(-q)
    return torch.where(real, terms, 0.0).sum(-1) / n.clamp(min=1)


def copg(score, relevance, real) -> Lists:
    """Contrastive policy gradient: regression of reward differences, from responses of any policy.

    l = 1/(n - 1) sum over pairs of ( (R_i - s_i) - (R_j - s_j) )^2 = n/(n - 1) sum_i (d_i - mean d)^2,   d = R - s

    The reward R is the relevance, in its own units, and the score is `log_ratio(beta)`, in units of the reward.

    Gradient    -2 n/(n - 1) (d_i - mean d) through the scores
    Edge        one response: 0. Equal rewards still pull the scores together
    Relations   n = 2 is `squared` with the goal R_1 - R_2: rewards +-1/2 are IPO with tau = beta / 2. The gradient is that of
                leave-one-out REINFORCE with the rewards R - s, summed over the responses, times 2 beta
    Departs     the pair form of the paper is divided by 2 beta
    Reference   Flet-Berliac et al., Contrastive Policy Gradient, arXiv:2406.19185; Command A, arXiv:2504.00698

    >>> copg(torch.tensor([[1., 0.]]), torch.tensor([[3., 0.]]), torch.ones(1, 2, dtype=torch.bool))     # (3 - 1)^2
    tensor([4.])
    """
    n = real.sum(-1, keepdim=True)
    d = torch.where(real, relevance.to(score.dtype) - score, 0.0)
    centred = torch.where(real, d - d.sum(-1, keepdim=True) / n.clamp(min=1), 0.0)
    return (centred.square() * n / (n - 1).clamp(min=1)).sum(-1)
