"""annotations slot: columns computed once per optimiser step, without gradient, over all groups of all processes.

Parts see groups (B, K, ...) and return (B) or (B, K); every row gets its value. They see the policy as it is before the
step: `logp`, and a `score` made from it, are those of `logp_old`. They may join groups, which losses must not.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from prefopt.ops import gather, masked, masked_sum, total

__all__ = ["RunningShift", "anyloss_accuracy", "anyloss_balanced", "anyloss_f", "anyloss_geometric", "dice", "kl_baseline",
           "match_margins", "match_scores", "shortest"]


def shortest(mask, real):
    """Tokens of the group's shortest compared response (LD-DPO), (B).

    l = min_i |y_i|

    Edge        a group without rows has 0
    Reference   Liu et al., LD-DPO, arXiv:2409.06411

    >>> shortest(torch.tensor([[[1, 1], [1, 0]]]), torch.ones(1, 2).bool())
    tensor([1])
    """
    length = mask.bool().sum(-1).masked_fill(~real, mask.shape[-1])
    return torch.where(real.any(-1), length.amin(-1), 0)


def kl_baseline(mismatched, real, *, beta=0.1):
    """KTO's reference point over all processes, (B).

    beta z0,   z0 = max(0, mean over rows of rho(x, y')),   y' the response of another prompt

    beta        the score's beta, so that the point is in units of the score
    Edge        rows without a mismatched response hold NaN and are left out; none at all gives 0
    Departs     -
    Reference   Ethayarajh et al., KTO, arXiv:2402.01306, eq. 7

    >>> kl_baseline(torch.tensor([[2.], [4.]]), torch.ones(2, 1).bool(), beta=0.5)
    tensor([1.5000, 1.5000])
    """
    known = real & ~torch.isnan(mismatched)
    mean = total(masked(mismatched, known).sum()) / total(known.sum()).clamp(min=1)
    return (beta * mean.clamp(min=0)).expand(len(mismatched))


def match_margins(score, logp_ref, mask, relevance, real, *, beta=0.1):
    """Reference margin of the same rank as each pair's policy margin (AOT), (B).

    q_(k) = beta * (k-th smallest of lr_w - lr_l)   for the pair with the k-th smallest policy margin

    beta        the score's beta
    Edge        pairs only: a group with other than two labelled responses is an error; a tied pair is left out and gets 0
    Departs     -
    Reference   Melnyk et al., arXiv:2406.05882; TRL `aot`

    >>> score, ref = torch.tensor([[3., 0.], [1., 0.]]), torch.tensor([[[5.], [0.]], [[7.], [0.]]])
    >>> match_margins(score, ref, torch.ones(2, 2, 1), torch.tensor([[1., 0.], [1., 0.]]), torch.ones(2, 2).bool(), beta=1.)
    tensor([7., 5.])
    """
    if bool((real.sum(-1)[real.any(-1)] != 2).any()):
        raise ValueError("aot compares margins of pairs: every group needs exactly two labelled responses")
    best = relevance.masked_fill(~real, float("-inf")).amax(-1, keepdim=True)
    sign = torch.where(real, torch.where(relevance == best, 1.0, -1.0), 0.0).to(score.dtype)
    pairs = real.any(-1) & (sign.sum(-1) == 0)                # a tie has two best responses
    reference = beta * masked_sum(logp_ref, mask)
    policy, start = gather((sign * masked(score, real)).sum(-1)[pairs])
    target, _ = gather((sign * masked(reference, real)).sum(-1)[pairs])
    matched = torch.empty_like(target)
    matched[policy.argsort(stable=True)] = target.sort().values
    out = torch.zeros_like(reference[:, 0])
    out[pairs] = matched[start:start + int(pairs.sum())]
    return out


def match_scores(score, relevance, real):
    """Score of the opposite label that sorting pairs with each response (AOT, unpaired), (B, K).

    q of the k-th smallest desirable score = the k-th smallest undesirable score, and the reverse

    Edge        unequal numbers of desirable and undesirable responses are an error
    Departs     -
    Reference   Melnyk et al., arXiv:2406.05882; TRL `aot_unpaired`

    >>> match_scores(torch.tensor([[3., 0.], [1., 2.]]), torch.tensor([[1., 0.], [1., 0.]]), torch.ones(2, 2).bool())
    tensor([[2., 1.],
            [0., 3.]])
    """
    good, bad = real & (relevance > 0.5), real & ~(relevance > 0.5)
    (w, w_start), (lo, l_start) = gather(score[good]), gather(score[bad])
    if len(w) != len(lo):
        raise ValueError(f"aot_unpaired pairs desirable with undesirable responses by rank: found {len(w)} and {len(lo)}")
    w_match, l_match = torch.empty_like(w), torch.empty_like(lo)
    w_match[w.argsort(stable=True)], l_match[lo.argsort(stable=True)] = lo.sort().values, w.sort().values
    out = torch.zeros_like(score)
    out[good], out[bad] = w_match[w_start:w_start + int(good.sum())], l_match[l_start:l_start + int(bad.sum())]
    return out


class RunningShift:
    """Mean score of all responses seen so far, this step included (BCO's reward shift), (B).

    delta = running mean of s over desirable and undesirable responses

    Edge        before the first response it is 0
    Departs     plain mean over responses, as in the authors' code; the paper averages the means of both kinds
    Reference   Jung et al., BCO, arXiv:2404.04656, section 4; the BCO trainer of older TRL

    >>> shift = RunningShift()
    >>> [float(shift(torch.tensor([[a, b]]), torch.ones(1, 2).bool())[0]) for a, b in [(1., 3.), (4., 4.)]]
    [2.0, 3.0]
    """

    def __init__(self):
        self.sum, self.count = 0.0, 0

    def __call__(self, score, real):
        self.sum += float(total(masked(score.double(), real).sum()))
        self.count += int(total(real.sum()))
        return torch.full((len(score),), self.sum / max(self.count, 1), dtype=score.dtype, device=score.device)

    def spec(self) -> dict:
        return {}

    def state_dict(self) -> dict:
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.sum, self.count = state["sum"], state["count"]


# ------------------------------------------------------------------ losses of sums over the whole step
def dice_sums(score, relevance, real, alpha, power):
    """Sums of q y, q^power and y^power over the rows, (3)."""
    q = torch.exp(alpha * F.logsigmoid(-score) + F.logsigmoid(score))
    return torch.stack([(real * x).sum() for x in (q * relevance, q ** power, relevance ** power)])


def dice_loss(sums, smooth):
    return 1 - (2 * sums[0] + smooth) / (sums[1] + sums[2] + smooth)


def confusion(score, relevance, real, amplification):
    """Soft true positives, false negatives, false positives and true negatives, (4)."""
    a = amplification * (torch.sigmoid(score) - 0.5)
    return torch.stack([(real * x).sum() for x in (relevance * torch.sigmoid(a), relevance * torch.sigmoid(-a),
                                                   (1 - relevance) * torch.sigmoid(a), (1 - relevance) * torch.sigmoid(-a))])


def accuracy_loss(counts):
    return (counts[1] + counts[2]) / counts.sum().clamp(min=1)


def f_loss(counts, beta=1.0):
    tp, fn, fp, _ = counts
    return (beta ** 2 * fn + fp) / ((1 + beta ** 2) * tp + beta ** 2 * fn + fp).clamp(min=torch.finfo(torch.float32).tiny)


def rates(counts):
    """True positive and true negative rate, 1 where a class is absent, and which of the classes are there."""
    hits, misses = counts[[0, 3]], counts[[1, 2]]
    there = hits + misses > 0
    return torch.where(there, hits / torch.where(there, hits + misses, 1.0), 1.0), there


def balanced_loss(counts):
    rate, there = rates(counts)
    return (1 - rate).sum() / there.sum().clamp(min=1)


def geometric_loss(counts):
    rate, there = rates(counts)
    return 1 - (rate.log().sum() / there.sum().clamp(min=1)).exp()


def tangent(loss, sums, score, relevance, real):
    """(d, L) of each row, (B, K, 2), for `pointwise.linearised`: L = loss(sums over all rows), d_i = n dL/ds_i."""
    score, relevance = masked(score.detach(), real), masked(relevance, real)
    with torch.enable_grad():
        score = score.requires_grad_()
        own = sums(score, relevance.to(score.dtype), real)
        value = loss(own + (total(own.detach()) - own.detach()))
        slope, = torch.autograd.grad(value, score)
    return torch.stack([total(real.sum()) * slope, value.detach().expand_as(slope)], -1)


def dice(score, relevance, real, *, alpha=0.0, smooth=1e-4, power=1.0):
    """Tangent of the self-adjusting Dice loss of the whole step, (B, K, 2).

    L = 1 - (2 sum q y + g) / (sum q^power + sum y^power + g),   q = (1 - p)^alpha p,   p = sigmoid(s)

    alpha       0 is soft F1; more takes weight from easy positives
    smooth      g; 1e-4 as released, 1 in the paper
    power       2 is the option with squares in the denominator
    Edge        no positive in the step: L is near 1
    Departs     -
    Reference   Li et al., Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855; ShannonAI/dice_loss_for_NLP

    >>> two = torch.zeros(1, 2), torch.tensor([[1., 0.]]), torch.ones(1, 2).bool()
    >>> dice(*two, smooth=0.0)[0, 0]                                # n dL/dq dq/ds = 2 (-3/4) (1/4), and 1 - 1/2
    tensor([-0.3750,  0.5000])
    """
    return tangent(lambda sums: dice_loss(sums, smooth), lambda *x: dice_sums(*x, alpha, power), score, relevance, real)


def anyloss_f(score, relevance, real, *, amplification=73.0, beta=1.0):
    """Tangent of 1 - F_beta of the whole step, (B, K, 2).

    L = 1 - (1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP),   TP = sum y A, ...,   A = sigmoid(amplification (p - 1/2))

    amplification   73: A is 0 or 1 but for p near 1/2
    beta        b: recall counts b times as much as precision
    Edge        no positive in the step: L = 1
    Departs     -
    Reference   Han et al., AnyLoss, arXiv:2405.14745

    >>> two = torch.zeros(1, 2), torch.tensor([[1., 0.]]), torch.ones(1, 2).bool()
    >>> anyloss_f(*two)[0, 0, 1]                                    # TP = FN = FP = 1/2
    tensor(0.5000)
    """
    return tangent(lambda counts: f_loss(counts, beta), lambda *x: confusion(*x, amplification), score, relevance, real)


def anyloss_accuracy(score, relevance, real, *, amplification=73.0):
    """Tangent of 1 - accuracy of the whole step, (B, K, 2).

    L = (FN + FP) / n

    amplification   as in `anyloss_f`
    Edge        no row: 0
    Departs     -
    Reference   Han et al., AnyLoss, arXiv:2405.14745

    >>> anyloss_accuracy(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1).bool())[0, 0, 1]
    tensor(0.5000)
    """
    return tangent(accuracy_loss, lambda *x: confusion(*x, amplification), score, relevance, real)


def anyloss_balanced(score, relevance, real, *, amplification=73.0):
    """Tangent of 1 - balanced accuracy of the whole step, (B, K, 2).

    L = 1 - (TP / (TP + FN) + TN / (TN + FP)) / 2

    amplification   as in `anyloss_f`
    Edge        a class that is absent is left out
    Departs     -
    Reference   Han et al., AnyLoss, arXiv:2405.14745

    >>> three = torch.tensor([[9., 9., 9.]]), torch.tensor([[1., 1., 0.]]), torch.ones(1, 3).bool()
    >>> anyloss_balanced(*three)[0, 0, 1]                           # all positives right, the negative wrong
    tensor(0.5000)
    """
    return tangent(balanced_loss, lambda *x: confusion(*x, amplification), score, relevance, real)


def anyloss_geometric(score, relevance, real, *, amplification=73.0):
    """Tangent of 1 - the geometric mean of both classes' accuracies in the whole step, (B, K, 2).

    L = 1 - sqrt( TP / (TP + FN) TN / (TN + FP) )

    amplification   as in `anyloss_f`
    Edge        a class that is absent is left out
    Departs     -
    Reference   Han et al., AnyLoss, arXiv:2405.14745

    >>> anyloss_geometric(torch.zeros(1, 2), torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())[0, 0, 1]
    tensor(0.5000)
    """
    return tangent(geometric_loss, lambda *x: confusion(*x, amplification), score, relevance, real)
