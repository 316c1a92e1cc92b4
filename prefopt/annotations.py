"""annotations slot: columns computed once per optimiser step, without gradient, over all groups of all processes.

Parts see groups (B, K, ...) and return (B) or (B, K); every row gets its value. They see the policy as it is before the
step: `logp`, and a `score` made from it, are those of `logp_old`. They may join groups, which losses must not.
"""
from __future__ import annotations

import torch

from prefopt.ops import gather, masked, masked_sum, total

__all__ = ["RunningShift", "kl_baseline", "match_margins", "match_scores", "shortest"]


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
