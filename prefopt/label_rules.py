"""labels slot: `wins` (B, K, K) -> the weight of 'i beats j' in a pairwise loss. Linear, so that it fits every loss."""
from __future__ import annotations

import torch

from prefopt.ops import upcast
from prefopt.parts import Pairs

__all__ = ["as_given", "by_reward", "ordered", "smooth", "tied", "unflip"]


def as_given(wins) -> Pairs:
    """Labels as they are.

    w_ij = P(i beats j), 0 where nobody compared

    Gradient    none
    Edge        without a `wins` column, wins_ij = 1 where relevance_i > relevance_j, and ties are not compared
    Relations   `smooth` and `unflip` mix w_ij with w_ji
    Departs     -
    Reference   -

    >>> as_given(torch.tensor([[[float("nan"), 1.], [0., float("nan")]]]))
    tensor([[[0., 1.],
             [0., 0.]]])
    """
    return torch.nan_to_num(wins, nan=0.0)


def by_reward(reward, real, *, scale=1.0) -> Pairs:
    """Soft labels from the difference of rewards.

    w_ij = sigmoid(scale (r_i - r_j))

    scale       1: DNO, whose rewards are win rates
    Gradient    none
    Edge        pairs of which a reward is unknown (NaN) are not compared, nor a response with itself
    Relations   scale -> inf is `as_given` with the rewards as relevance; scale = 0 compares all pairs evenly. With a symmetric
                loss (`squared_rewards`) the scale does not matter
    Departs     -
    Reference   Rosset et al., Direct Nash Optimization, arXiv:2404.03715, eq. 9

    >>> by_reward(torch.tensor([[3., 1., 1.]]).log(), torch.ones(1, 3).bool())[0]
    tensor([[0.0000, 0.7500, 0.7500],
            [0.2500, 0.0000, 0.5000],
            [0.2500, 0.5000, 0.0000]])
    """
    known = real & ~torch.isnan(reward)
    others = ~torch.eye(reward.shape[-1], dtype=torch.bool, device=reward.device)
    r = torch.where(known, upcast(reward), 0.0)
    wins = torch.sigmoid(scale * (r[..., :, None] - r[..., None, :]))
    return torch.where(known[..., :, None] & known[..., None, :] & others, wins, 0.0)


def ordered(relevance, real) -> Pairs:
    """Every pair of unequal relevance, whatever the distance.

    w_ij = 1 where relevance_i > relevance_j, else 0

    Gradient    none
    Edge        ties are not compared; with a `wins` column alone the order is that of psi_i = (1/K) sum_j P(i beats j)
    Relations   `as_given` where `wins` is made from relevance
    Departs     -
    Reference   Liu et al., LiPO, arXiv:2402.01878

    >>> ordered(torch.tensor([[0.2, 0.7]]), torch.ones(1, 2).bool())
    tensor([[[0., 0.],
             [1., 0.]]], dtype=torch.float64)
    """
    higher = relevance[..., :, None] > relevance[..., None, :]
    return (higher & real[..., :, None] & real[..., None, :]).double()


def tied(relevance, real) -> Pairs:
    """Every pair, with ties: half a win for both where the relevance is equal.

    w_ij = 1 where relevance_i > relevance_j, 1/2 where equal, else 0

    Gradient    none
    Edge        a response is not compared with itself; a `wins` column that says ties with 1/2 fits `as_given`
    Relations   `ordered` leaves ties out; for `davidson`
    Departs     -
    Reference   Davidson 1970

    >>> tied(torch.tensor([[1., 1., 0.]]), torch.ones(1, 3).bool())[0]
    tensor([[0.0000, 0.5000, 1.0000],
            [0.5000, 0.0000, 1.0000],
            [0.0000, 0.0000, 0.0000]], dtype=torch.float64)
    """
    i, j = relevance[..., :, None], relevance[..., None, :]
    others = ~torch.eye(relevance.shape[-1], dtype=torch.bool, device=relevance.device)
    return ((i > j).double() + 0.5 * (i == j)) * (real[..., :, None] & real[..., None, :] & others)


def smooth(wins, *, label_smoothing) -> Pairs:
    """Conservative labels.

    w'_ij = (1 - eps) w_ij + eps w_ji

    label_smoothing   eps in [0, 0.5): the assumed share of wrong labels
    Gradient    none
    Edge        eps = 0 is `as_given`; the logistic loss is then stationary at margin logit(1 - eps)
    Relations   with `logistic`: DPO + eps * margin (cDPO)
    Departs     -
    Reference   Mitchell, A note on DPO with noisy preferences, 2023

    >>> smooth(torch.tensor([[[0., 1.], [0., 0.]]]), label_smoothing=0.25)
    tensor([[[0.0000, 0.7500],
             [0.2500, 0.0000]]])
    """
    wins = as_given(wins)
    return (1 - label_smoothing) * wins + label_smoothing * wins.transpose(-1, -2)


def unflip(wins, *, flip) -> Pairs:
    """Labels whose loss is unbiased although a share of them is flipped.

    w'_ij = [(1 - eps) w_ij - eps w_ji] / (1 - 2 eps)

    flip        eps in [0, 0.5): the rate at which labels are flipped
    Gradient    none
    Edge        eps = 0 is `as_given`; weights are negative, so the loss is unbounded below for eps > 0
    Relations   E over flips of the corrected loss = the clean loss, for any pairwise loss; with `logistic` it is rDPO
    Departs     -
    Reference   Chowdhury et al., Provably Robust DPO, arXiv:2403.00409; Natarajan et al. 2013, lemma 1

    >>> unflip(torch.tensor([[[0., 1.], [0., 0.]]]), flip=0.25)
    tensor([[[ 0.0000,  1.5000],
             [-0.5000,  0.0000]]])
    """
    wins = as_given(wins)
    return ((1 - flip) * wins - flip * wins.transpose(-1, -2)) / (1 - 2 * flip)


def from_relevance(relevance, real) -> Pairs:
    """`wins` where there is no such column: 1 and 0 where relevance differs, NaN for ties and absent rows."""
    i, j = relevance[..., :, None], relevance[..., None, :]
    compared = real[..., :, None] & real[..., None, :] & (i != j)
    return torch.where(compared, (i > j).double(), torch.nan)


def relevance_of(wins, real):
    """`relevance` where there is no such column: psi_i = (1/K) sum_j P(i beats j), with P(i beats i) = 1/2 (LiPO)."""
    wins = torch.where(torch.eye(wins.shape[-1], dtype=torch.bool, device=wins.device), 0.5, as_given(wins))
    pairs = real[..., :, None] & real[..., None, :]
    return torch.where(pairs, wins, 0.0).sum(-1) / real.sum(-1, keepdim=True).clamp(min=1)
