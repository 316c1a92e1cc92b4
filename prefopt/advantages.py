"""advantage slot: rewards of the groups (B, K) -> advantage of each response (B, K), 0 where not real. No gradient.

Parts see the whole rollout; statistics over the batch are those of all processes. Where a group has equal rewards, the
advantages that subtract its mean are exactly 0. A group of one has no siblings to be compared with: `single` is the factor
on its reward, 0 by default; 1 is verl's choice, the raw reward.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributions import Beta

from prefopt.ops import masked, total, upcast
from prefopt.parts import Rows

__all__ = ["above", "batch_centre", "best_minus_second", "best_minus_second_scaled", "best_of_n", "beta_normalised", "centre",
           "gpg", "greedy_baseline", "leave_one_out", "length_weighted", "negative", "positive", "raw", "weighted_signs",
           "zscore", "zscore_biased"]


# ------------------------------------------------------------------ a mean of the group
def baseline(reward, weight, real, single):
    """Weighted mean of the group's rewards, (B, 1): exact for equal rewards, (1 - single) R for a group of one."""
    r, w = masked(reward, real), masked(weight, real)
    mean = (w * r).sum(-1, keepdim=True) / w.sum(-1, keepdim=True).clamp(min=1)
    low, high = (F.pad(r.masked_fill(~real, end), (0, 1), value=end) for end in (torch.inf, -torch.inf))
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    mean = torch.where(low == high, low, mean)                # rounding of a mean would be noise for a std to blow up
    return torch.where(real.sum(-1, keepdim=True) == 1, (1 - single) * mean, mean)


def spread(centred, real, less=1):
    """Standard deviation of the group with `less` degrees of freedom less, (B, 1); 1 where there is none."""
    n = real.sum(-1, keepdim=True)
    std = ((centred ** 2).sum(-1, keepdim=True) / (n - less).clamp(min=1)).sqrt()
    return std.masked_fill((std == 0) | (n == 1), 1.0)


def zscore(reward, real, *, eps=1e-6, single=0.0) -> Rows:
    """Reward in units of the group's spread.

    A_i = (R_i - mean R) / (std R + eps),   the unbiased std

    eps         1e-6 in verl, 1e-4 in TRL; the larger, the less do tiny differences count
    single      factor on the reward of a group of one; 1 gives R / (1 + eps)
    Edge        equal rewards give exactly 0; rewards 1e-7 apart still count, as eps is the only floor of the std
    Relations   invariant to a R + b up to eps; sum of squares G - 1; k right of G: sqrt((1 - p)/p (G - 1)/G) for p = k/G
    Departs     -
    Reference   Shao et al., GRPO (DeepSeekMath), arXiv:2402.03300; verl, TRL

    >>> zscore(torch.tensor([[1., 1., 0., 0.]]), torch.ones(1, 4).bool())           # sqrt(3) / 2
    tensor([[ 0.8660,  0.8660, -0.8660, -0.8660]])
    """
    centred = centre(reward, real, single=single)
    return centred / (spread(centred, real) + eps)


def zscore_biased(reward, real, *, eps=1e-6, single=0.0) -> Rows:
    """Reward in units of the group's spread, with the biased std.

    A_i = (R_i - mean R) / (std R + eps),   the std with 1/G

    eps, single     as in `zscore`
    Edge        equal rewards give exactly 0
    Relations   `zscore` times sqrt(G / (G - 1)); two different rewards give 1 and -1
    Departs     -
    Reference   -

    >>> zscore_biased(torch.tensor([[1., 1., 0., 0.]]), torch.ones(1, 4).bool(), eps=0.)
    tensor([[ 1.,  1., -1., -1.]])
    """
    centred = centre(reward, real, single=single)
    return centred / (spread(centred, real, less=0) + eps)


def centre(reward, real, *, single=0.0) -> Rows:
    """Reward less the group's mean.

    A_i = R_i - mean R

    single      factor on the reward of a group of one; 1 gives R
    Edge        equal rewards give exactly 0
    Relations   its expected gradient is (G - 1)/G of the true one: `leave_one_out` times (G - 1)/G
    Departs     -
    Reference   Liu et al., Dr. GRPO, arXiv:2503.20783

    >>> centre(torch.tensor([[1., 0., 0., 0.]]), torch.ones(1, 4).bool())
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    return masked(upcast(reward) - baseline(reward, real, real, single), real)


def leave_one_out(reward, real, *, single=0.0) -> Rows:
    """Reward less the mean of the others.

    A_i = R_i - 1/(G - 1) sum over j != i of R_j = G/(G - 1) (R_i - mean R)

    single      factor on the reward of a group of one; 1 gives R
    Edge        G counts the scored responses of the row's own group
    Relations   unbiased: the baseline does not depend on the response
    Departs     -
    Reference   Ahmadian et al., RLOO, arXiv:2402.14740; Kool et al. 2019

    >>> leave_one_out(torch.tensor([[1., 0., 0., 0.]]), torch.ones(1, 4).bool())
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    n = real.sum(-1, keepdim=True)
    return centre(reward, real, single=single) * n / (n - 1).clamp(min=1)


def length_weighted(reward, length, real, *, single=0.0) -> Rows:
    """Reward less the length-weighted mean, which has the least variance where a gradient's square grows with length.

    A_i = R_i - sum_j |y_j| R_j / sum_j |y_j|

    single      factor on the reward of a group of one; 1 gives R
    Edge        in a group without a token the baseline is 0, and no token sees it
    Relations   equal lengths: `centre`; the sum over all tokens of the group is 0
    Departs     -
    Reference   Hao et al., OPO, arXiv:2505.23585

    >>> length_weighted(torch.tensor([[1., 0.]]), torch.tensor([[3, 1]]), torch.ones(1, 2).bool())
    tensor([[ 0.2500, -0.7500]])
    """
    return masked(upcast(reward) - baseline(reward, length, real, single), real)


def gpg(reward, real, *, norm=1.0, single=0.0) -> Rows:
    """Centred reward, scaled up for the rows that teach nothing.

    A_i = alpha (R_i - mean R) / norm,   alpha = rows / max(1, rows with R != 0), over the whole batch

    norm        divisor; 1
    single      factor on the reward of a group of one
    Edge        no row with a reward: 0
    Relations   `centre` where all rewards differ from 0: with rewards of -1 and 1 alpha is 1
    Departs     -
    Reference   Chu et al., GPG, arXiv:2504.02546; verl

    >>> gpg(torch.tensor([[1., 0.], [0., 0.]]), torch.ones(2, 2).bool())            # alpha = 4
    tensor([[ 2., -2.],
            [ 0.,  0.]])
    """
    centred = centre(reward, real, single=single)
    rows, rewarded = total(torch.stack([real.sum(), (masked(reward, real) != 0).sum()])).to(centred.dtype)
    return rows / rewarded.clamp(min=1) * centred / norm


def beta_normalised(reward, real, *, low=0.0, high=1.0, largest=1e6, single=0.0) -> Rows:
    """Centred reward with a weight of the prompt, read off a Beta distribution of the accuracies of all prompts.

    A_i = min(1 / Beta(p; alpha, beta), largest) (r_i - p),   r = (R - low) / (high - low),   p = mean r of the group
    M, V = mean and unbiased variance of p over prompts;   k = M (1 - M) / V - 1
    alpha = max(1, 1 + k M / 3),   beta = max(1, 1 + k (1 - M) / 3)

    low, high   range of the reward; one outside of it is an error
    largest     bound on the weight; 1e6
    single      factor on the reward of a group of one, whose p is (1 - single) r; 1 is the released code
    Edge        V below 1e-12 (one prompt, or equal accuracies): weight 1; p of 0 or 1: exactly 0
    Relations   alpha = beta = 1: `centre`; 3/2: pi/8 `zscore_biased`; depends on the other prompts of the batch
    Departs     the released code divides by V = 0
    Reference   Xiao et al., BNPO, arXiv:2506.02864; changyi7231/BNPO

    >>> beta_normalised(torch.tensor([[1., 0., 0., 0.]]), torch.ones(1, 4).bool())  # one prompt: weight 1
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    if not low < high:
        raise ValueError(f"beta_normalised: low is below high, found low={low!r} and high={high!r}")
    r = (masked(reward, real).double() - low) / (high - low)
    outside = real & ((r < 0) | (r > 1))
    if bool(outside.any()):
        raise ValueError(f"beta_normalised takes rewards between low={low!r} and high={high!r}, and {int(outside.sum())} are "
                         f"outside: the first is {float(reward[outside][0]):g}. Set low and high to the range of the reward, "
                         f"or shape it with `clipped`")
    p, some = baseline(r, real, real, single), real.any(-1, keepdim=True)
    prompts, sum_ = total(torch.stack([some.sum(), (some * p).sum()]))
    mean = sum_ / prompts.clamp(min=1)
    variance = total((some * (p - mean) ** 2).sum()) / (prompts - 1).clamp(min=1)
    k = torch.where(variance > 1e-12, mean * (1 - mean) / variance.clamp(min=1e-12) - 1, 0.0)
    law = Beta((1 + k * mean / 3).clamp(min=1), (1 + k * (1 - mean) / 3).clamp(min=1), validate_args=False)
    weight = (-law.log_prob(p)).exp().clamp(max=largest)
    return masked(weight * (r - p), real).to(upcast(reward).dtype)


# ------------------------------------------------------------------ another baseline, or none
def raw(reward, real) -> Rows:
    """The reward itself.

    A_i = R_i

    Edge        -
    Relations   REINFORCE without a baseline
    Departs     -
    Reference   Williams 1992

    >>> raw(torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())
    tensor([[1., 0.]])
    """
    return masked(reward, real)


def batch_centre(reward, real) -> Rows:
    """Reward less the mean over all responses of the batch.

    A_i = R_i - mean over the batch of R

    Edge        equal rewards give 0
    Relations   one group: `centre`
    Departs     -
    Reference   Williams 1992

    >>> batch_centre(torch.tensor([[1.], [0.]]), torch.ones(2, 1).bool())
    tensor([[ 0.5000],
            [-0.5000]])
    """
    r = masked(reward, real)
    rows, sum_ = total(torch.stack([real.sum(), r.double().sum()]))
    return masked(r - (sum_ / rows.clamp(min=1)).to(r.dtype), real)


def greedy_baseline(reward, real, probe) -> Rows:
    """Reward less that of the greedy response, a probe row of the group.

    A_i = R_i - mean R of the group's probe rows

    Edge        0 where no probe row of the group has a known reward: a guess of the baseline would be a guess of its sign
    Relations   -
    Departs     -
    Reference   Li et al., ReMax, arXiv:2310.10505

    >>> sampled = torch.tensor([[True, True, False]])
    >>> greedy_baseline(torch.tensor([[1., 0., 0.25]]), sampled, ~sampled)
    tensor([[ 0.7500, -0.2500,  0.0000]])
    """
    return masked(upcast(reward) - baseline(reward, probe, probe, 0.0), real & probe.any(-1, keepdim=True))


# ------------------------------------------------------------------ the best of the group
def best_minus_second(reward, real) -> Rows:
    """The best response by its lead over the second, all others 0.

    A_i = R_i - (second highest R) for the best response, 0 for the others

    Edge        a tie at the top gives 0; a group of one gives 0, where verl raises
    Relations   the gradient of the expected best reward of the group (pass@k)
    Departs     -
    Reference   Tang et al., arXiv:2503.19595; verl `grpo_passk`

    >>> best_minus_second(torch.tensor([[0.25, 1., 0.]]), torch.ones(1, 3).bool())
    tensor([[0.0000, 0.7500, 0.0000]])
    """
    r = masked(reward, real).masked_fill(~real, -torch.inf)
    top = r.topk(min(2, r.shape[-1]), -1).values
    lead = (top[..., :1] - top[..., -1:]).masked_fill(real.sum(-1, keepdim=True) < 2, 0.0)
    return torch.where(real & (r == top[..., :1]), lead, 0.0)


def best_minus_second_scaled(reward, real, *, eps=1e-6) -> Rows:
    """`best_minus_second` in units of the group's spread.

    A_i = (R_i - second highest R) / (std R + eps) for the best response, 0 for the others; the unbiased std

    eps         1e-6
    Edge        as `best_minus_second`
    Relations   invariant to a R + b up to eps
    Departs     -
    Reference   Tang et al., arXiv:2503.19595; verl `grpo_passk`, whose default this is

    >>> best_minus_second_scaled(torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())                 # 1 / sqrt(1/2)
    tensor([[1.4142, 0.0000]])
    """
    return best_minus_second(reward, real) / (spread(centre(reward, real), real) + eps)


def best_of_n(reward, real) -> Rows:
    """1 on the best response of the group.

    A_i = 1 for the first response with the highest R, 0 for the others

    Edge        of several best responses the first counts; a group of one has its only one
    Relations   with the surrogate `likelihood`: best-of-n distillation
    Departs     -
    Reference   Dong et al., RAFT, arXiv:2304.06767

    >>> best_of_n(torch.tensor([[0., 1., 1.]]), torch.ones(1, 3).bool())
    tensor([[0., 1., 0.]])
    """
    r = masked(reward, real)
    best = real & (r == r.masked_fill(~real, -torch.inf).amax(-1, keepdim=True))
    return (best & (best.cumsum(-1) == 1)).to(r.dtype)


# ------------------------------------------------------------------ each response by itself
def above(reward, real, *, threshold=0.5) -> Rows:
    """1 on every response with a reward above a threshold.

    A_i = [R_i > threshold]

    threshold   0.5
    Edge        -
    Relations   with the surrogate `likelihood`: rejection fine-tuning on all correct responses
    Departs     -
    Reference   Yuan et al., RFT, arXiv:2308.01825

    >>> above(torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())
    tensor([[1., 0.]])
    """
    r = masked(reward, real)
    return ((r > threshold) & real).to(r.dtype)


def positive(reward, real) -> Rows:
    """Correct responses alone.

    A_i = max(R_i, 0)

    Edge        rewards are 0/1; of rewards of -1 and 1 the negative ones give 0
    Relations   0/1: `raw`; together with `negative` 2 R - 1
    Departs     -
    Reference   Zhu et al., RLVR-Decomposed (PSR), arXiv:2506.01347

    >>> positive(torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())
    tensor([[1., 0.]])
    """
    return masked(reward, real).clamp(min=0)


def negative(reward, real) -> Rows:
    """Wrong responses alone.

    A_i = min(R_i - 1, 0)

    Edge        rewards are 0/1
    Relations   together with `positive` 2 R - 1
    Departs     -
    Reference   Zhu et al., RLVR-Decomposed (NSR), arXiv:2506.01347

    >>> negative(torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())
    tensor([[ 0., -1.]])
    """
    return masked(upcast(reward) - 1, real).clamp(max=0)


def weighted_signs(reward, real, *, positive=0.1) -> Rows:
    """Wrong responses in full, correct ones a little.

    A_i = positive R_i where R_i > 0, -1 elsewhere

    positive    weight of correct responses; 0.1
    Edge        rewards are 0/1
    Relations   positive = 1: 2 R - 1; positive = 0: `negative`
    Departs     -
    Reference   Zhu et al., RLVR-Decomposed (W-REINFORCE), arXiv:2506.01347

    >>> weighted_signs(torch.tensor([[1., 0.]]), torch.ones(1, 2).bool())
    tensor([[ 0.1000, -1.0000]])
    """
    r = masked(reward, real)
    return masked(torch.where(r > 0, positive * r, -1.0), real)
