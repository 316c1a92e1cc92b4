"""regularisers: extra loss terms of a preference objective, each with its own reduction (see `objectives.Term`)."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from prefopt.ops import log_ratios, masked, masked_mean, masked_sum, upcast
from prefopt.parts import Lists, Pairs, Rows, Tokens

__all__ = ["best_mean_nll", "best_nll", "centring", "interaction", "k3_old", "l1_kl_mask", "l1_reward_mask",
           "least_spread", "online_kl", "optimism", "rationale_logsigmoid", "rationale_nll", "tied_outputs", "token_nll"]


def best_share(relevance, real):
    """1 on a group's best response, shared equally by ties; 0 elsewhere."""
    best = real & (relevance == relevance.masked_fill(~real, float("-inf")).amax(-1, keepdim=True))
    return best.double() / best.sum(-1, keepdim=True).clamp(min=1)


def best_nll(logp, mask, relevance, real) -> Lists:
    """Negative log-likelihood of the best response, summed over its tokens.

    l = -sum_t log pi_t of the response with the highest relevance

    Gradient    through logp
    Edge        ties for the best share it equally
    Relations   `best_mean_nll` divides by the length
    Departs     -
    Reference   Liu et al., Regularized Preference Optimization, arXiv:2405.16436

    >>> half = torch.tensor([[[-1., -2.], [-3., -3.]]]), torch.ones(1, 2, 2), torch.tensor([[1., 0.]])
    >>> best_nll(*half, torch.ones(1, 2).bool())
    tensor([3.])
    """
    lp = masked_sum(logp, mask)
    return -(best_share(relevance, real).to(lp.dtype) * lp).sum(-1)


def best_mean_nll(logp, mask, relevance, real) -> Lists:
    """Negative log-likelihood of the best response per token.

    l = -(1/|y|) sum_t log pi_t of the response with the highest relevance

    Gradient    through logp
    Edge        ties for the best share it equally
    Relations   `best_nll` divided by the length
    Departs     mean over responses; TRL and OpenRLHF take one mean over all chosen tokens of a micro-batch
    Reference   Hong et al., ORPO, arXiv:2403.07691; Pang et al., Iterative Reasoning PO, arXiv:2404.19733

    >>> half = torch.tensor([[[-1., -2.], [-3., -3.]]]), torch.ones(1, 2, 2), torch.tensor([[1., 0.]])
    >>> best_mean_nll(*half, torch.ones(1, 2).bool())
    tensor([1.5000])
    """
    lp = masked_mean(logp, mask)
    return -(best_share(relevance, real).to(lp.dtype) * lp).sum(-1)


def token_nll(logp, mask) -> Tokens:
    """Negative log-likelihood of each response token (behaviour cloning).

    l_t = -log pi_t

    Gradient    through logp
    Edge        tokens outside the mask give 0
    Relations   with `term_mean` CPL's BC term, a mean over all tokens of all responses
    Departs     -
    Reference   Hejna et al., CPL, arXiv:2310.13639

    >>> token_nll(torch.tensor([[[-1., -2.]]]), torch.tensor([[[1, 0]]]))
    tensor([[[1., -0.]]])
    """
    return -masked(logp, mask)


def k3_old(logp, logp_old, mask, *, limit=80.0) -> Tokens:
    """Trust region: low-variance estimate of KL(old || policy) at each token.

    l = exp(d) - d - 1,   d = log pi_old_t - log pi_t

    limit       d is clamped to this before exp (no gradient beyond)
    Gradient    through logp: 1 - exp(d), which is 0 at the old policy
    Edge        d = 0 gives 0
    Relations   never negative; its mean over tokens sampled from the old policy is the KL
    Departs     -
    Reference   Su et al., TRPA, arXiv:2504.04524; Schulman, Approximating KL Divergence, 2020

    >>> k3_old(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    tensor([[[0.7183]]])
    """
    d = -log_ratios(logp, logp_old, mask).clamp(min=-limit)
    return torch.expm1(d) - d


def online_kl(logp, logp_ref, mask, online) -> Lists:
    """Score-function estimate of the reverse KL to the reference on fresh samples.

    l = (1/k) sum_i sg(a_i) log pi(y_i),   a_i = kappa_i - mean_{j != i} kappa_j,   kappa = sg(sum_t log pi_t - log ref_t)

    Gradient    through log pi only; its expectation is grad KL(pi || ref) per prompt. The value carries no meaning
    Edge        k = 1: no baseline, a = kappa; at pi = ref value and gradient are exactly 0
    Relations   `online` marks the rows sampled from the current policy; offline rows must not enter
    Departs     -
    Reference   Song et al., The Importance of Online Data (HyPO), arXiv:2406.01462; RLOO baseline

    >>> two = torch.tensor([[[-1.], [-2.]]])
    >>> online_kl(two, two - torch.tensor([[[1.], [0.]]]), torch.ones(1, 2, 1), torch.ones(1, 2).bool())   # (-1 + 2) / 2
    tensor([0.5000])
    """
    online = online.bool()
    kappa = torch.where(online, log_ratios(logp.detach(), logp_ref, mask).sum(-1), 0.0)
    k = online.sum(-1, keepdim=True)
    advantage = kappa - (kappa.sum(-1, keepdim=True) - kappa) / (k - 1).clamp(min=1)
    return torch.where(online, advantage * masked_sum(logp, mask), 0.0).sum(-1) / k.squeeze(-1).clamp(min=1)


def optimism(logp, mask, from_reference) -> Rows:
    """Log-likelihood of the reference's own responses, which exploration lowers.

    l = sum_t log pi_t of rows that the reference sampled

    Gradient    1 through logp of these rows
    Edge        no lower bound: keep its weight tiny. Other rows give 0 and are not counted (`reference_rows`)
    Relations   minus the negative log-likelihood, whoever won the pair
    Departs     -
    Reference   Xie et al., Exploratory Preference Optimization, arXiv:2405.21046; TRL 0.x `xpo`

    >>> optimism(torch.tensor([[[-1., -2.], [-3., -3.]]]), torch.ones(1, 2, 2), torch.tensor([[True, False]]))
    tensor([[-3.,  0.]])
    """
    return torch.where(from_reference.bool(), masked_sum(logp, mask), 0.0)


def rationale_nll(logp, mask, rationale) -> Rows:
    """Negative log-likelihood of the rationales, summed over tokens.

    l = -sum_t log pi(z_t | x, y_w > y_l)

    Gradient    through logp
    Edge        only rows marked `rationale` count
    Relations   `rationale_logsigmoid` is what the released code does
    Departs     -
    Reference   Just et al., Data-Centric Human Preference with Rationales, arXiv:2407.14477

    >>> rationale_nll(torch.tensor([[[-1., -2.]]]), torch.ones(1, 1, 2), torch.ones(1, 1).bool())
    tensor([[3.]])
    """
    return torch.where(rationale.bool(), -masked_sum(logp, mask), 0.0)


def rationale_logsigmoid(logp, mask, rationale, *, gamma=1e-3) -> Rows:
    """The released code's rationale term.

    l = -log sigmoid(gamma log pi(z))

    gamma       weight inside the logistic; 0.001 in the recommended command
    Gradient    gamma sigmoid(-gamma log pi(z)), between gamma/2 and gamma
    Edge        gamma = 0 is the constant log 2
    Relations   for gamma log pi << 0 it approaches gamma times `rationale_nll`
    Departs     -
    Reference   reds-lab/preference-learning-with-rationales (RDPO)

    >>> rationale_logsigmoid(torch.tensor([[[-1.]]]), torch.ones(1, 1, 1), torch.ones(1, 1).bool(), gamma=1.)
    tensor([[1.3133]])
    """
    return torch.where(rationale.bool(), -F.logsigmoid(gamma * masked_sum(logp, mask)), 0.0)


def l1_reward_mask(reward_mask, mask, real) -> Lists:
    """L1 norm of the reward mask over the tokens of a group's compared responses.

    l = sum_i sum_t m_t |mu_t|

    Gradient    through the mask's parameters
    Edge        a sum, not a mean: longer responses weigh more
    Relations   `l1_kl_mask` for the other mask
    Departs     -
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102

    >>> l1_reward_mask(torch.tensor([[[1., -2.]]]), torch.tensor([[[1, 1]]]), torch.ones(1, 1).bool())
    tensor([3.])
    """
    return masked(reward_mask, mask.bool() & real[..., None]).abs().sum((-1, -2))


def l1_kl_mask(kl_mask, mask, real) -> Lists:
    """L1 norm of the KL mask over the tokens of a group's compared responses.

    l = sum_i sum_t m_t |md_t|

    Gradient    through the mask's parameters
    Edge        a sum, not a mean
    Relations   `l1_reward_mask` for the other mask
    Departs     -
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102

    >>> l1_kl_mask(torch.tensor([[[1., -2.]]]), torch.tensor([[[1, 0]]]), torch.ones(1, 1).bool())
    tensor([1.])
    """
    return masked(kl_mask, mask.bool() & real[..., None]).abs().sum((-1, -2))


def interaction(score, contrast) -> Lists:
    """The preference gap must widen under the prompt with added instructions.

    l = -log sigmoid( [s(x', y_w) - s(x', y_l)] - [s(x, y_w) - s(x, y_l)] )

    `contrast` holds the signs of the four rows: +1 (x', y_w), -1 (x', y_l), -1 (x, y_w), +1 (x, y_l).

    Gradient    through the scores
    Edge        equal gaps give log 2
    Relations   MAPL's inter-sample term; its intra-sample term is an ordinary pair of prompts
    Departs     our reading of the inter-sample term
    Reference   Multi-level Aware Preference Learning, arXiv:2505.12845

    >>> interaction(torch.tensor([[2., 0., 1., 0.]]), torch.tensor([[1., -1., -1., 1.]]))   # gap 2 against 1
    tensor([0.3133])
    """
    return -F.logsigmoid(torch.where(contrast != 0, contrast.to(score.dtype) * score, 0.0).sum(-1))


def centring(score) -> Pairs:
    """Rewards of a compared pair sum to 0, which pairs alone leave open.

    l_ij = (s_i + s_j)^2

    Gradient    2 (s_i + s_j) to both
    Edge        symmetric, so that the labels only say which pairs count
    Relations   TRL's `center_rewards_coefficient` is its weight, usually 0.01
    Departs     -
    Reference   Eisenstein et al., Helping or Herding?, arXiv:2312.09244

    >>> centring(torch.tensor([[2., 1.]]))[0, 0, 1]
    tensor(9.)
    """
    return (score[..., :, None] + score[..., None, :]) ** 2


def least_spread(outputs, *, least=0.3) -> Rows:
    """The entropy of a Gaussian reward stays above that of a given spread.

    l = max(0, H(least) - H(s)) = max(0, log least - log s),   outputs = (mu, log s)

    least       spread below which it costs something
    Gradient    -1 to log s below, 0 above
    Edge        s = least gives 0
    Relations   H = log(2 pi e s^2) / 2, whose constants cancel
    Departs     -
    Reference   PEARL, Zero-shot Cross-task Preference Alignment

    >>> least_spread(torch.tensor([[[0., -1.], [0., 1.]]]), least=1.)
    tensor([[1., 0.]])
    """
    return (math.log(least) - upcast(outputs)[..., 1]).relu()


def tied_outputs(outputs) -> Rows:
    """The thresholds of an ordinal reward model share one output as far as the data allow.

    l = sum_{k >= 2} |f_k - f_{k-1}|

    Gradient    signs, through outputs
    Edge        one output: 0
    Relations   weight -> infinity is proportional odds; weight 0 is a model of its own for each threshold
    Departs     differences of outputs and not of weights, whose coordinates mean nothing on a network's hidden state; the
                penalty of the paper, for given features, is rewards.losses.ordinal_penalty
    Reference   PRESTO, Predicting Rare Events by Shrinking Towards Proportional Odds, ICML 2023

    >>> tied_outputs(torch.tensor([[[1., 3., 2.]]]))
    tensor([[3.]])
    """
    return upcast(outputs).diff(dim=-1).abs().sum(-1)


# ------------------------------------------------------------------ terms: which entries a regulariser counts
def online_groups(online) -> Lists:
    """1 for groups that hold online rows.

    >>> online_groups(torch.tensor([[True, False], [False, False]]))
    tensor([1., 0.], dtype=torch.float64)
    """
    return online.bool().any(-1).double()


def rationale_rows(rationale) -> Rows:
    """1 for rows that hold a rationale."""
    return rationale.bool().double()


def reference_rows(from_reference, real) -> Rows:
    """1 for compared rows that the reference sampled."""
    return (from_reference.bool() & real).double()


def contrast_groups(contrast) -> Lists:
    """1 for groups of four rows with signs (+, -, -, +)."""
    return (contrast != 0).any(-1).double()


def nonempty_pairs(labels, mask) -> Pairs:
    """The labelled pairs of which neither response is empty."""
    some = mask.bool().any(-1)
    return labels * (some[..., :, None] & some[..., None, :])


def pairs_of_level(labels, level, *, of) -> Pairs:
    """The labelled pairs whose rows both belong to comparison level `of`."""
    inside = level == of
    return labels * (inside[..., :, None] & inside[..., None, :])


def degree_rows(degree, side, mask, *, of) -> Rows:
    """1 for thinned variants, not empty ones, of a chosen (of = 1) or rejected (of = 0) response."""
    return ((degree >= 0) & (side == of) & mask.bool().any(-1)).double()


def segment_tokens(mask, segment, real, *, of) -> Tokens:
    """1 on the tokens of one kind of segment: 1 tool use, 2 observations, 3 rationales, as `rewards.tool_augmented` numbers."""
    return (mask.bool() & real[..., None] & (segment == of)).double()


def trace_tokens(mask, segment, real) -> Tokens:
    """1 on the tokens of all segments but the answer, which is 0."""
    return (mask.bool() & real[..., None] & (segment > 0)).double()
