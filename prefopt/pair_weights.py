"""pair_weight slot: a detached weight (B, K, K) on every pair of a pairwise loss."""
from __future__ import annotations

import torch

from prefopt.margins import difference
from prefopt.ops import log_ratios, masked_mean
from prefopt.parts import Pairs

__all__ = ["gap", "lambda_ndcg", "on_policy"]


def lambda_ndcg(score, relevance, real) -> Pairs:
    """LambdaRank weight: how much DCG would change if i and j swapped places.

    D_ij = |G_i - G_j| |1/D(t_i) - 1/D(t_j)|,   G = 2^psi - 1,   D(t) = log2(1 + t),   t the rank by current score

    Gradient    none: ranks are of the current scores, recomputed every step
    Edge        only real responses are ranked; equal scores rank in the order of rows, as in RAX: at policy = reference
                (all scores equal) the weights depend on that order, and sharing ranks would make them all 0
    Relations   a constant weight gives the unweighted pair loss
    Departs     not divided by the ideal DCG (as in the paper; RAX and allRank scale it)
    Reference   Burges et al. 2006; Liu et al., LiPO-lambda, arXiv:2402.01878, eq. 10

    >>> lambda_ndcg(torch.tensor([[1., 0.]]), torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())[0, 0, 1]   # 1 - 1/log2(3)
    tensor(0.3691)
    """
    score = score.detach()
    mine, other = score[..., :, None], score[..., None, :]
    earlier = torch.ones_like(other.expand(*score.shape, score.shape[-1]), dtype=torch.bool).tril(-1)
    rank = 1 + (((other > mine) | ((other == mine) & earlier)) & real[..., None, :]).sum(-1)
    discount = 1 / torch.log2(1 + rank.to(score.dtype))
    gain = torch.where(real, torch.exp2(relevance.to(score.dtype)) - 1, 0.0)
    return difference(gain).abs() * difference(discount).abs()


def on_policy(logp, collision, mask) -> Pairs:
    """Weight of a pair by how likely both responses are under the current policy.

    w_ij = u_i u_j,   u = exp( (1/|y|) sum_t [ log pi_t - log sum_v pi(v|s_t)^2 ] )

    Gradient    none
    Edge        an empty response has u = 1
    Relations   a uniform distribution has u = 1; on-policy samples have E log-weight near 0
    Departs     -
    Reference   Zhou et al., WPO, arXiv:2406.11827, eq. 5 (sampled alignment)

    >>> uniform = torch.full((1, 2, 3), -1.)                        # log sum_v p_v^2 = log p for a uniform p
    >>> on_policy(uniform, uniform, torch.ones(1, 2, 3))[0, 0, 1]
    tensor(1.)
    """
    u = masked_mean(log_ratios(logp.detach(), collision, mask), mask).exp()
    return u[..., :, None] * u[..., None, :]


def gap(relevance) -> Pairs:
    """Weight of a pair by the distance of its labels.

    w_ij = |psi_i - psi_j|

    Gradient    none
    Edge        ties weigh 0
    Relations   labels 1/0 give the unweighted loss
    Departs     -
    Reference   -

    >>> gap(torch.tensor([[3., 1.]]))[0, 0, 1]
    tensor(2.)
    """
    return difference(relevance).abs()
