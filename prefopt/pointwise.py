"""ranking slot, pointwise: score (B, K) and label of each response -> loss of each response (B, K).

A response is desirable where relevance > 1/2: a pair is 1/0, unpaired feedback is a group of one with relevance 1 or 0.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from prefopt.ops import log1mexp, masked, upcast
from prefopt.parts import Rows, Tokens

__all__ = ["aot_unpaired", "apo_zero", "aspect_error", "bco", "cross_entropy", "kto", "linearised", "nca", "ordinal",
           "squared_error", "squared_goal", "squared_reward", "step_cross_entropy", "weighted_cross_entropy"]


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


def squared_reward(score, reward, *, beta=1e-3, centre=0.5, limit=math.inf) -> Rows:
    """Squared distance of the score to a scaled reward.

    l = (s - (r - centre) / beta)^2,   the goal clamped to +-limit

    beta        inverse step size; SPPO 1e-3, with `log_ratio(beta=1)`
    centre      the mean reward, which stands for log Z: 1/2 of win rates against the policy itself, 0 of antisymmetric scores
    limit       inf; GPO 1000
    Gradient    2 (s - goal) through s only
    Edge        an unknown reward (NaN) stands as the centre: leave the row out with `rewarded_rows`
    Relations   r = 1 and 0 with centre 1/2: `squared_goal` with goal 1 / (2 beta)
    Departs     -
    Reference   Wu et al., SPPO, arXiv:2405.00675; Zhang et al., GPO, arXiv:2410.02197

    >>> squared_reward(torch.tensor([[1., 1.]]), torch.tensor([[0.75, 0.5]]), beta=0.25)
    tensor([[0., 1.]])
    """
    goal = (upcast(reward).nan_to_num(nan=centre) - centre) / beta
    return (score - goal.clamp(-limit, limit).to(score.dtype)) ** 2


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


def weighted_cross_entropy(score, relevance, *, desirable=1.0, undesirable=1.0) -> Rows:
    """Sigmoid cross-entropy with a weight for each class.

    l = -w1 psi log sigmoid(s) - w0 (1 - psi) log sigmoid(-s)

    desirable, undesirable   w1, w0; they move the intercept by log(w1 / w0): see rewards.clicks.unweighted
    Gradient    through s
    Edge        smooth at s = 0
    Relations   w1 = w0 = 1 is `cross_entropy`
    Departs     -
    Reference   Reinforcement Learning from User Feedback, 2025 (P[Love])

    >>> weighted_cross_entropy(torch.zeros(1, 2), torch.tensor([[1., 0.]]), desirable=2.)
    tensor([[1.3863, 0.6931]])
    """
    label = relevance.to(score.dtype)
    return -desirable * label * F.logsigmoid(score) - undesirable * (1 - label) * F.logsigmoid(-score)


def ordinal(grade_logits, relevance, real) -> Rows:
    """Negative log-likelihood of a grade under cumulative logits, one per threshold (relaxed proportional odds).

    l = -log (S_y - S_{y+1}),   S_k = P(y >= k) = sigmoid(g_k),   S_0 = 1, S_K = 0

    The relevance is the grade, 0..K-1, for K - 1 logits.

    Gradient    through grade_logits
    Edge        crossed thresholds (S_y <= S_{y+1}) cost a finite loss whose gradient uncrosses them; other grades are an error
    Relations   K = 2 is `cross_entropy`; equal outputs for all thresholds: proportional odds
    Departs     what is kept from 0 is 1 - exp(g_{y+1} - g_y), at 1e-6, and not the difference of probabilities
    Reference   PRESTO, Predicting Rare Events by Shrinking Towards Proportional Odds, ICML 2023; McCullagh 1980

    >>> odds = torch.tensor([[[3., 1 / 3]]]).log()                  # S = 1, 3/4, 1/4, 0
    >>> ordinal(odds, torch.tensor([[1.]]), torch.ones(1, 1).bool())        # log 2
    tensor([[0.6931]])
    """
    g, grades = masked(grade_logits, real[..., None]), grade_logits.shape[-1]
    y = torch.where(real, relevance, 0)
    wrong = (y != y.round()) | (y < 0) | (y > grades)
    if bool(wrong.any()):
        raise ValueError(f"an ordinal reward model with {grades} thresholds takes the grades 0 to {grades} as relevance, and "
                         f"{int(wrong.sum())} responses have others: the first {float(y[wrong][0]):g}. Renumber the grades "
                         f"from 0, or set `levels` to their number")
    ends = [torch.full_like(y[..., None], end, dtype=g.dtype) for end in (torch.inf, -torch.inf)]
    g = torch.cat([ends[0], g, ends[1]], -1)
    reached, passed = (g.gather(-1, (y.long() + k)[..., None]).squeeze(-1) for k in (0, 1))
    return -F.logsigmoid(reached) - F.logsigmoid(-passed) - log1mexp(passed - reached)


def aspect_error(outputs, rewards, *, aspect=0) -> Rows:
    """Regression of one output of a reward model on the labels of one aspect.

    l = (f - a)^2,   f = outputs_aspect, a = rewards_aspect

    aspect      which output and label, from 0
    Gradient    through outputs; none where the label is missing
    Edge        a missing label (NaN) gives 0 and is not counted (`observed_rows`)
    Relations   `squared_error` on the score and the relevance
    Departs     -
    Reference   Wang et al., ArmoRM, arXiv:2406.12845, stage 1

    >>> aspect_error(torch.tensor([[[1., 2.]]]), torch.tensor([[[float("nan"), 5.]]]), aspect=1)
    tensor([[9.]])
    """
    f, a = upcast(outputs)[..., aspect], rewards[..., aspect]
    return torch.where(torch.isnan(a), 0.0, f - a.to(f.dtype)) ** 2


def step_cross_entropy(token_reward, step_label, mask) -> Tokens:
    """Cross-entropy of each step, at the token that ends it.

    l_t = -a_t log sigmoid(v_t) - (1 - a_t) log sigmoid(-v_t),   v = token_reward, a = step_label

    Gradient    through token_reward at the ends of steps
    Edge        other tokens give 0 and are not counted (`step_tokens`)
    Relations   one step per response: `cross_entropy` of an outcome reward model
    Departs     -
    Reference   Sun et al., Easy-to-Hard Generalization, arXiv:2403.09472; Lightman et al., arXiv:2305.20050

    >>> step_cross_entropy(torch.zeros(1, 1, 2), torch.tensor([[[float("nan"), 1.]]]), torch.ones(1, 1, 2))
    tensor([[[0.0000, 0.6931]]])
    """
    ends = mask.bool() & ~torch.isnan(step_label)
    v = masked(token_reward, ends)
    return torch.where(ends, cross_entropy(v, torch.where(ends, step_label, 0.0)), 0.0)


def linearised(score, tangent) -> Rows:
    """A loss of the whole step that is no sum over rows (F1, Dice), as a sum of its tangent.

    l_i = L + d_i (s_i - sg(s_i)),   tangent = (d, L),   d_i = n dL/ds_i

    L and its slopes are taken over all rows of the step, before it, by an annotation; n counts the rows, so that the mean
    over rows has the value and the gradient of L.

    Gradient    d_i: exact for one update per step
    Edge        goes with `term_mean`; weights of groups scale the slopes and do not enter the sums of L
    Relations   the tangents are those of `annotations.dice`, `anyloss_f`, ...
    Departs     -
    Reference   -

    >>> linearised(torch.tensor([[7.]]), torch.tensor([[[0.5, 2.]]]))
    tensor([[2.]])
    """
    return tangent[..., 1] + tangent[..., 0] * (score - score.detach())


# ------------------------------------------------------------------ terms: which rows a loss counts
def observed_rows(rewards, real, *, aspect) -> Rows:
    """1 for compared rows that are labelled on that aspect."""
    return (real & ~torch.isnan(rewards[..., aspect])).double()


def rewarded_rows(reward, real) -> Rows:
    """1 for compared rows whose reward is known."""
    return (real & ~torch.isnan(reward)).double()


def step_tokens(step_label, mask, real) -> Tokens:
    """1 for tokens of compared rows that end a labelled step."""
    return (mask.bool() & real[..., None] & ~torch.isnan(step_label)).double()


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
