"""score slot: columns of a row -> one number per response (N). Every sum runs over trainable response tokens.

A reward model is the preference objective with another score, so ranking losses never know where scores come from.
"""
from __future__ import annotations

import math
from functools import partial  # noqa: F401  (doctests)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.ops import log1mexp, log_ratios, masked, masked_mean, masked_sum, upcast
from prefopt.parts import PartModule

__all__ = ["RewardHead", "alpha_divergence", "expected_grade", "forward_kl", "head", "jensen_shannon", "length_desensitised",
           "log_likelihood", "log_odds", "log_ratio", "lowest_step", "mean_log_ratio", "mean_logp", "mean_output",
           "output", "scaled_reference", "token_masked",
           "two_anchors"]


def log_ratio(logp, logp_ref, mask, *, beta=0.1) -> Tensor:
    """Implicit reward of DPO.

    s = beta rho,   rho = sum_t (log pi_t - log pi_ref_t)

    beta        temperature of the KL penalty whose optimum this is; DPO 0.1
    Gradient    through logp only (logp_ref is frozen)
    Edge        an empty response scores 0
    Relations   `mean_log_ratio` divides by the length; `alpha_divergence`, `forward_kl`, `jensen_shannon` bend rho
    Departs     -
    Reference   Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, eq. 5

    >>> log_ratio(torch.tensor([[-1., -2.]]), torch.tensor([[-2., -3.]]), torch.ones(1, 2), beta=0.5)
    tensor([1.])
    """
    return beta * log_ratios(logp, logp_ref, mask).sum(-1)


def mean_log_ratio(logp, logp_ref, mask, *, beta=0.1) -> Tensor:
    """Length-normalised implicit reward.

    s = beta rho / |y|

    beta        as in `log_ratio`
    Gradient    through logp only
    Edge        an empty response scores 0 (never 0/0)
    Relations   `log_ratio` when every response has one token
    Departs     -
    Reference   Azar et al., arXiv:2310.12036 (as run by its authors); TRL `ipo`, `sigmoid_norm`

    >>> mean_log_ratio(torch.tensor([[-1., -2.]]), torch.tensor([[-2., -3.]]), torch.ones(1, 2), beta=0.5)
    tensor([0.5000])
    """
    return beta * masked_mean(log_ratios(logp, logp_ref, mask), mask)


def log_likelihood(logp, mask, *, beta=1.0) -> Tensor:
    """Scaled sequence log-probability, no reference.

    s = beta sum_t log pi_t

    beta        scale; SLiC 1, RSO's hinge 0.05 (its gamma), CPL 0.1 (its alpha)
    Gradient    through logp
    Edge        an empty response scores 0
    Relations   `log_ratio` with logp_ref = 0
    Departs     -
    Reference   Zhao et al., SLiC-HF, arXiv:2305.10425

    >>> log_likelihood(torch.tensor([[-1., -2.]]), torch.ones(1, 2))
    tensor([-3.])
    """
    return beta * masked_sum(logp, mask)


def mean_logp(logp, mask, *, beta=2.0) -> Tensor:
    """Average log-probability of a response, no reference.

    s = beta (1/|y|) sum_t log pi_t

    beta        scale; SimPO 2 to 10
    Gradient    through logp
    Edge        an empty response scores 0
    Relations   `log_likelihood` divided by the length
    Departs     -
    Reference   Meng et al., SimPO, arXiv:2405.14734, eq. 4

    >>> mean_logp(torch.tensor([[-1., -2.]]), torch.ones(1, 2))
    tensor([-3.])
    """
    return beta * masked_mean(logp, mask)


def log_odds(logp, mask) -> Tensor:
    """Log-odds of the length-normalised likelihood.

    s = a - log(1 - exp a),   a = (1/|y|) sum_t log pi_t

    Gradient    through logp
    Edge        a is clamped to at most -1e-6 inside log1mexp: a certain response keeps a finite score
    Relations   for small probabilities s ~ a, that is `mean_logp` with beta = 1
    Departs     -
    Reference   Hong et al., ORPO, arXiv:2403.07691, eq. 4

    >>> log_odds(torch.tensor([[-0.6931472]]), torch.ones(1, 1)).abs() < 1e-6        # p = 1/2
    tensor([True])
    """
    a = masked_mean(logp, mask)
    return a - log1mexp(a)


def forward_kl(logp, logp_ref, mask, *, beta=0.1, limit=80.0) -> Tensor:
    """Implicit reward under a forward KL penalty.

    s = beta (1 - exp(-rho))

    beta        weight of the divergence
    limit       the exponent -rho is clamped to this before exp (no gradient beyond)
    Gradient    through logp only; factor exp(-rho)
    Edge        rho = 0 gives 0
    Relations   `alpha_divergence(alpha=0)`
    Departs     -
    Reference   Wang et al., Beyond Reverse KL, arXiv:2309.16240, table 1

    >>> forward_kl(torch.tensor([[0.]]), torch.tensor([[1.]]), torch.ones(1, 1), beta=1.)       # 1 - e
    tensor([-1.7183])
    """
    return -beta * torch.expm1(-log_ratios(logp, logp_ref, mask).sum(-1).clamp(min=-limit))


def jensen_shannon(logp, logp_ref, mask, *, beta=0.1) -> Tensor:
    """Implicit reward under a Jensen-Shannon penalty.

    s = beta (log 2 + log sigmoid(rho))

    beta        weight of the divergence
    Gradient    through logp only; factor sigmoid(-rho): it saturates for rho >> 0
    Edge        rho = 0 gives 0, with slope 1/2 (the other divergences have slope 1)
    Relations   bounded above by beta log 2
    Departs     -
    Reference   Wang et al., arXiv:2309.16240, table 1

    >>> jensen_shannon(torch.tensor([[0.]]), torch.tensor([[0.]]), torch.ones(1, 1))
    tensor([0.])
    """
    return beta * (math.log(2) + F.logsigmoid(log_ratios(logp, logp_ref, mask).sum(-1)))


def alpha_divergence(logp, logp_ref, mask, *, beta=0.1, alpha=0.5, limit=80.0) -> Tensor:
    """Implicit reward under an alpha-divergence penalty.

    s = beta (exp((alpha - 1) rho) - 1) / (alpha - 1),   s = beta rho where |alpha - 1| < 1e-6

    alpha       0 is forward KL, 1 reverse KL (DPO); 0.5 default. The first f-DPO code calls 1 - alpha alpha
    limit       the exponent is clamped to this before exp (no gradient beyond)
    Gradient    through logp only; factor exp((alpha - 1) rho)
    Edge        rho = 0 gives 0
    Relations   `forward_kl` at 0, `log_ratio` at 1
    Departs     computed with expm1 in the input's dtype; TRL 1.16 computes this branch in float32
    Reference   Wang et al., arXiv:2309.16240; TRL `f_divergence_type="alpha_divergence"`

    >>> alpha_divergence(torch.tensor([[0.]]), torch.tensor([[1.]]), torch.ones(1, 1), beta=1., alpha=0.5)   # 2 (1 - e^.5)
    tensor([-1.2974])
    """
    rho = log_ratios(logp, logp_ref, mask).sum(-1)
    if abs(alpha - 1) < 1e-6:
        return beta * rho
    return beta * torch.expm1(((alpha - 1) * rho).clamp(max=limit)) / (alpha - 1)


def scaled_reference(logp, logp_ref, mask, *, beta=0.1, gamma=1.0) -> Tensor:
    """Implicit reward with the reference counted gamma times.

    s = beta sum_t (log pi_t - gamma log pi_ref_t)

    gamma       1 is DPO, 0 ignores the reference, 2 counts it twice
    Gradient    through logp only
    Edge        an empty response scores 0
    Relations   gamma = 1 is `log_ratio`, gamma = 0 is `log_likelihood`
    Departs     -
    Reference   Chen et al., Preference Learning Algorithms Do Not Learn Preference Rankings, arXiv:2405.19534

    >>> scaled_reference(torch.tensor([[-1.]]), torch.tensor([[-2.]]), torch.ones(1, 1), beta=1., gamma=2.)
    tensor([3.])
    """
    return beta * (masked_sum(logp, mask) - gamma * masked_sum(logp_ref.detach(), mask))


def length_desensitised(logp, logp_ref, mask, shared_length, *, beta=0.1, alpha=0.5) -> Tensor:
    """Implicit reward that discounts the tokens beyond the group's shortest response.

    s = beta [ sum_{t <= l} rho_t + alpha sum_{t > l} rho_t ],   l = shared_length

    alpha       1 is DPO; 0 compares only the first l tokens
    Gradient    through logp only
    Edge        t counts trainable response tokens; an empty response scores 0
    Relations   `log_ratio` at alpha = 1 or equal lengths
    Departs     -
    Reference   Liu et al., Length Desensitization in DPO (LD-DPO), arXiv:2409.06411

    >>> ld = partial(length_desensitised, beta=1., alpha=0.5)
    >>> ld(torch.zeros(1, 2), -torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1]))
    tensor([1.5000])
    """
    rho = log_ratios(logp, logp_ref, mask)
    inside = mask.bool().cumsum(-1) <= shared_length[:, None]
    return beta * torch.where(inside, rho, alpha * rho).sum(-1)


def token_masked(logp, logp_ref, mask, reward_mask, kl_mask, token_kl, *, beta=0.1) -> Tensor:
    """Implicit reward with token weights on the log-ratio and on the token KL.

    s = beta sum_t (mu_t rho_t + md_t k_t),   k_t = KL(pi_ref(.|s_t) || pi(.|s_t))

    A pair's margin is then beta [(U_w - U_l) - (D_l - D_w)], U = sum mu_t rho_t, D = sum md_t k_t.

    beta        SparsePO 0.8 (sentiment, summarisation), 0.1 (dialogue)
    Gradient    through logp and token_kl to the policy, and through both masks
    Edge        both masks are multiplied by the response mask: padding gets exactly zero gradient
    Relations   md = 0, mu = 1 is `log_ratio`; mu = md = 1 is token-level DPO (TDPO-1)
    Departs     -
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102; Zeng et al., TDPO, arXiv:2404.11999

    >>> one, half = torch.ones(1, 2), torch.full((1, 2), 0.5)
    >>> token_masked(one, 0 * one, one, half, 0 * one, one, beta=1.)
    tensor([1.])
    """
    rho, kl = log_ratios(logp, logp_ref, mask), masked(token_kl, mask)
    return beta * (masked(reward_mask, mask) * rho + masked(kl_mask, mask) * kl).sum(-1)


def two_anchors(logp, logp_ref, logp_old, mask, *, beta=1.0, anchor=1 / 3) -> Tensor:
    """Log-ratio to the geometric mixture of the reference and the policy that the responses were sampled from.

    s = beta sum_t [log pi_t - anchor log pi_ref_t - (1 - anchor) log pi_old_t]

    beta        scale; 1 for a squared loss
    anchor      weight of the reference; INPO's tau / eta, 1/3
    Gradient    through logp only
    Edge        an empty response scores 0
    Relations   anchor = 1 is `log_ratio`; so is pi_old = pi_ref
    Departs     -
    Reference   Zhang et al., Iterative Nash Policy Optimization, arXiv:2407.00617

    >>> two_anchors(torch.tensor([[-1.]]), torch.tensor([[-4.]]), torch.tensor([[-2.]]), torch.ones(1, 1), anchor=0.5)
    tensor([2.])
    """
    to_ref, to_old = (log_ratios(logp, other, mask).sum(-1) for other in (logp_ref, logp_old))
    return beta * (anchor * to_ref + (1 - anchor) * to_old)


def head(outputs) -> Tensor:
    """Reward model: the first output of its head.

    s = outputs_1

    Gradient    through outputs
    Edge        in float32 or better, so that half precision does not quantise differences
    Relations   `log_ratio` is the implicit reward in its place
    Departs     -
    Reference   Ouyang et al., InstructGPT, arXiv:2203.02155

    >>> head(torch.tensor([[2., 5.]]))
    tensor([2.])
    """
    return upcast(outputs)[..., 0]


class RewardHead(PartModule):
    """Reward head beside a language model, which goes on to generate: linear in its last hidden state.

    s = w . h

    Gradient    through w and the model
    Edge        w starts normal with a spread of 0.02, as heads of transformers' classes do
    Relations   `head` is the same on a model that ends in a head and has lost its vocabulary
    Departs     -
    Reference   Li et al., Tool-Augmented Reward Modeling (Themis), arXiv:2310.01045

    >>> reward = RewardHead(); reward.setup(layers=1, width=2)
    >>> reward.weight.data = torch.tensor([[1., 2.]])
    >>> reward(torch.tensor([[3., 4.]])).detach()
    tensor([11.])
    """

    def __init__(self):
        nn.Module.__init__(self)

    def setup(self, *, layers: int, width: int) -> None:
        self.weight = nn.Parameter(0.02 * torch.randn(1, width))

    def forward(self, last_state) -> Tensor:
        self.check_setup()
        return (last_state.to(self.weight.dtype) @ self.weight.T).squeeze(-1)

    def spec(self) -> dict:
        return {}


def mean_output(outputs) -> Tensor:
    """Reward model with an output per aspect: their mean.

    s = (1/M) sum_k outputs_k

    Gradient    through outputs
    Edge        one output is `head`
    Relations   `output` takes one aspect
    Departs     -
    Reference   Wang et al., ArmoRM, arXiv:2406.12845 (fixed, even weights)

    >>> mean_output(torch.tensor([[2., 5.]]))
    tensor([3.5000])
    """
    return upcast(outputs).mean(-1)


def output(outputs, *, aspect=0) -> Tensor:
    """Reward model with an output per aspect: one of them.

    s = outputs_aspect

    aspect      its number, from 0
    Gradient    through outputs
    Edge        aspect 0 is `head`
    Relations   `mean_output` takes all
    Departs     -
    Reference   Wang et al., ArmoRM, arXiv:2406.12845

    >>> output(torch.tensor([[2., 5.]]), aspect=1)
    tensor([5.])
    """
    return upcast(outputs)[..., aspect]


def expected_grade(grade_logits) -> Tensor:
    """Mean of an ordinal reward model's distribution over the grades 0..K-1.

    s = sum_k P(y >= k) = sum_k sigmoid(g_k),   k = 1..K-1

    Gradient    through grade_logits
    Edge        between 0 and K - 1
    Relations   K = 2 is the probability of the upper grade
    Departs     -
    Reference   PRESTO, Predicting Rare Events by Shrinking Towards Proportional Odds, ICML 2023

    >>> expected_grade(torch.zeros(1, 4))
    tensor([2.])
    """
    return torch.sigmoid(upcast(grade_logits)).sum(-1)


def lowest_step(token_reward, step_label, mask) -> Tensor:
    """Process reward model: the logit of the worst step.

    s = min over the tokens that end a step of token_reward_t

    Gradient    through that token
    Edge        a response without steps scores 0
    Relations   one step: the reward at its end
    Departs     -
    Reference   Lightman et al., Let's Verify Step by Step, arXiv:2305.20050; Sun et al., arXiv:2403.09472

    >>> lowest_step(torch.tensor([[1., 9., -2.]]), torch.tensor([[1., float("nan"), 0.]]), torch.ones(1, 3))
    tensor([-2.])
    """
    ends = mask.bool() & ~torch.isnan(step_label)
    lowest = F.pad(upcast(token_reward).masked_fill(~ends, math.inf), (0, 1), value=math.inf).amin(-1)
    return torch.where(ends.any(-1), lowest, 0.0)
