"""ranking slot, pointwise: score (B, K) and label of each response -> loss of each response (B, K).

A response is desirable where relevance > 1/2: a pair is 1/0, unpaired feedback is a group of one with relevance 1 or 0.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from prefopt.ops import masked
from prefopt.parts import Rows

__all__ = ["aot_unpaired", "apo_zero", "bco", "kto", "nca", "squared_error", "squared_goal", "cross_entropy"]


def kto(score, relevance, baseline, *, desirable=1.0, undesirable=1.0) -> Rows:
    """Kahneman-Tversky value of gains and losses against a reference point.

    l = lambda_D (1 - sigmoid(s - z0)) if desirable else lambda_U (1 - sigmoid(z0 - s))

    desirable, undesirable   lambda_D, lambda_U; choose lambda_D n_D / (lambda_U n_U) in [1, 4/3]
    Gradient    through s only, bounded by lambda / 4 per unit of s; baseline z0 carries none
    Edge        s = z0 gives lambda / 2
    Relations   `bco` is the same with -log sigmoid and another reference point
    Departs     -
    Reference   Ethayarajh et al., KTO, arXiv:2402.01306, eq. 8

    >>> kto(torch.tensor([[1., 1.]]), torch.tensor([[1., 0.]]), torch.tensor([[1., 1.]]))
    tensor([[0.5000, 0.5000]])
    """
    gain = desirable * torch.sigmoid(baseline - score)
    loss = undesirable * torch.sigmoid(score - baseline)
    return torch.where(relevance > 0.5, gain, loss)


def bco(score, relevance, baseline) -> Rows:
    """Binary classifier of desirable against undesirable responses.

    l = -log sigmoid(s - delta) if desirable else -log sigmoid(delta - s)

    Gradient    through s only; the shift delta (baseline) carries none
    Edge        s = delta gives log 2
    Relations   delta = 0 and pairs summed is TRL's `bco_pair`; the mean over a pair bounds DPO from above
    Departs     -
    Reference   Jung et al., Binary Classifier Optimization, arXiv:2404.04656, eq. 9

    >>> bco(torch.tensor([[1., 0.]]), torch.tensor([[1., 0.]]), torch.tensor([[0., 0.]]))
    tensor([[0.3133, 0.6931]])
    """
    return -F.logsigmoid(torch.where(relevance > 0.5, 1.0, -1.0).to(score.dtype) * (score - baseline))


def apo_zero(score, relevance) -> Rows:
    """Anchored preference optimisation that raises the chosen and lowers the rejected response.

    l = 1 - sigmoid(s) if desirable else sigmoid(s)

    Gradient    through s
    Edge        s = 0 gives 1/2
    Relations   `kto` with reference point 0
    Departs     -
    Reference   D'Oosterlinck et al., APO, arXiv:2408.06266; TRL `apo_zero`

    >>> apo_zero(torch.tensor([[0., 0.]]), torch.tensor([[1., 0.]]))
    tensor([[0.5000, 0.5000]])
    """
    return torch.sigmoid(torch.where(relevance > 0.5, -1.0, 1.0).to(score.dtype) * score)


def nca(score, relevance, real) -> Rows:
    """Noise-contrastive alignment: absolute rewards instead of relative ones.

    l_i = -p_i log sigmoid(s_i) - (1/K) log sigmoid(-s_i),   p = relevance / sum of relevance over the group

    Gradient    through s
    Edge        all relevances 0: only the second term is left
    Relations   a pair: -log sigmoid(s_w) - (1/2) log sigmoid(-s_w) - (1/2) log sigmoid(-s_l)
    Departs     p is the given label; the paper's is softmax(reward / alpha): use that as relevance
    Reference   Chen et al., Noise Contrastive Alignment, arXiv:2402.05369, eq. 12; TRL `nca_pair`

    >>> nca(torch.zeros(1, 2), torch.tensor([[1., 0.]]), torch.ones(1, 2, dtype=torch.bool))    # log 2 (3/2, 1/2)
    tensor([[1.0397, 0.3466]])
    """
    score, label = masked(score, real), torch.where(real, relevance, 0.0).to(score.dtype)
    share = label / label.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return -share * F.logsigmoid(score) - F.logsigmoid(-score) / real.sum(-1, keepdim=True).clamp(min=1)


def squared_goal(score, relevance, *, goal) -> Rows:
    """Squared distance to +goal for the winner and -goal for the loser.

    l = (s - goal)^2 if desirable else (s + goal)^2

    goal        SPPO 1 / (2 beta), with `log_ratio(beta=1)`
    Gradient    through s
    Edge        a pair at policy = reference: 2 goal^2
    Relations   `pairwise.squared` acts on the difference only
    Departs     -
    Reference   Wu et al., SPPO, arXiv:2405.00675; TRL `sppo_hard`

    >>> squared_goal(torch.tensor([[1., 1.]]), torch.tensor([[1., 0.]]), goal=1.)
    tensor([[0., 4.]])
    """
    return (score - goal * torch.where(relevance > 0.5, 1.0, -1.0).to(score.dtype)) ** 2


def squared_error(score, relevance) -> Rows:
    """Regression of the score on the label.

    l = (psi - s)^2

    Gradient    through s
    Edge        -
    Relations   `cross_entropy` for labels in [0, 1]
    Departs     -
    Reference   Liu et al., LiPO, arXiv:2402.01878 (point MSE)

    >>> squared_error(torch.tensor([[1.]]), torch.tensor([[0.5]]))
    tensor([[0.2500]])
    """
    return (relevance.to(score.dtype) - score) ** 2


def cross_entropy(score, relevance) -> Rows:
    """Sigmoid cross-entropy of the score against a label in [0, 1].

    l = -psi log sigmoid(s) - (1 - psi) log sigmoid(-s)

    Gradient    sigmoid(s) - psi
    Edge        smooth at s = 0
    Relations   `bco` with hard labels and no shift
    Departs     -
    Reference   Liu et al., LiPO, arXiv:2402.01878 (point sigmoid)

    >>> cross_entropy(torch.tensor([[0.]]), torch.tensor([[1.]]))
    tensor([[0.6931]])
    """
    label = relevance.to(score.dtype)
    return -label * F.logsigmoid(score) - (1 - label) * F.logsigmoid(-score)


def aot_unpaired(score, relevance, transported, *, label_smoothing=0.0) -> Rows:
    """Optimal transport between the desirable and the undesirable scores of the batch.

    l_(k) = -(1 - eps) log sigmoid(z_k) - eps log sigmoid(-z_k),   z_k = s_w(k) - s_l(k)

    s_w(k), s_l(k) are the k-th smallest desirable and undesirable scores.

    Each row takes half of the pair it forms with `transported`, the score of the row that sorting pairs it with, held
    fixed: the sum over rows has the loss's value and, at the parameters of the step, its gradient.

    label_smoothing   eps in [0, 0.5)
    Gradient    through the row's own score
    Edge        equal numbers of both kinds are required
    Relations   `transported_difference` (aot) sorts margins of pairs instead
    Departs     -
    Reference   Melnyk et al., arXiv:2406.05882; TRL `aot_unpaired`

    >>> aot_unpaired(torch.tensor([[1., 0.]]), torch.tensor([[1., 0.]]), torch.tensor([[0., 1.]]))    # two halves
    tensor([[0.1566, 0.1566]])
    """
    sign = torch.where(relevance > 0.5, 1.0, -1.0).to(score.dtype)
    z = sign * (score - transported)
    loss = label_smoothing * z - F.logsigmoid(z)
    return loss - 0.5 * loss.detach()


# ------------------------------------------------------------------ terms: which rows a loss counts
def opposed_rows(relevance, real) -> Rows:
    """1 for compared rows. Labels that tell a pair apart on the same side of 1/2 are an error, as both rows would win."""
    low, high = (relevance.masked_fill(~real, fill) for fill in (float("inf"), float("-inf")))
    low, high = low.amin(-1), high.amax(-1)
    wrong = (low < high) & ((low > 0.5) == (high > 0.5))
    if bool(wrong.any()):
        first = wrong.nonzero()[0]
        raise ValueError(f"this loss takes one response of a pair as desirable (relevance above 1/2) and the other as not, "
                         f"and {int(wrong.sum())} groups have both on one side: the first has relevance "
                         f"{float(high[first]):g} and {float(low[first]):g}. Give the better response 1 and the worse 0")
    return real.double()
