"""Recipes for preference pairs (and lists, where every pair of unequal label counts)."""
from __future__ import annotations

from functools import partial

from prefopt import annotations, label_rules, margins, pair_weights, pairwise, regularisers, scores
from prefopt.objectives import PreferenceObjective, Term
from prefopt.recipes.checks import below_half, not_negative, number, positive, share
from prefopt.reductions import term_mean
from prefopt.references import Moving


def _smoothed(label_smoothing: float):
    below_half(label_smoothing=label_smoothing)
    return partial(label_rules.smooth, label_smoothing=label_smoothing) if label_smoothing else label_rules.as_given


def dpo(*, beta=0.1, label_smoothing=0.0):
    """Direct Preference Optimization; with label smoothing, conservative DPO.

    L = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h),   h = rho_w - rho_l

    beta              0.1 to 0.5 in the paper; strong chat recipes 0.01
    label_smoothing   eps in [0, 0.5); cDPO 0.1 to 0.2. TRL 1.16 ignores it for this loss
    At policy = reference: log 2
    Reference   Rafailov et al., arXiv:2305.18290; Mitchell 2023 (cDPO)
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), ranking=pairwise.logistic,
                               labels=_smoothed(label_smoothing))


def dpo_forward_kl(*, beta=0.1, label_smoothing=0.0):
    """DPO under a forward KL penalty.

    L = -log sigmoid(beta (g_w - g_l)),   g = 1 - exp(-rho)

    At policy = reference: log 2
    Reference   Wang et al., Beyond Reverse KL, arXiv:2309.16240
    """
    return dpo(beta=beta, label_smoothing=label_smoothing).with_slots(score=partial(scores.forward_kl, beta=beta))


def dpo_js(*, beta=0.1, label_smoothing=0.0):
    """DPO under a Jensen-Shannon penalty.

    L = -log sigmoid(beta (g_w - g_l)),   g = log 2 + log sigmoid(rho)

    At policy = reference: log 2
    Reference   Wang et al., arXiv:2309.16240
    """
    return dpo(beta=beta, label_smoothing=label_smoothing).with_slots(score=partial(scores.jensen_shannon, beta=beta))


def dpo_alpha(*, beta=0.1, alpha=0.5, label_smoothing=0.0):
    """DPO under an alpha-divergence penalty.

    L = -log sigmoid(beta (g_w - g_l)),   g = (exp((alpha - 1) rho) - 1) / (alpha - 1)

    alpha       0 is `dpo_forward_kl`, 1 is `dpo`
    At policy = reference: log 2
    Reference   Wang et al., arXiv:2309.16240
    """
    number(alpha=alpha)
    return dpo(beta=beta, label_smoothing=label_smoothing).with_slots(
        score=partial(scores.alpha_divergence, beta=beta, alpha=alpha))


def dpo_norm(*, beta=0.1, label_smoothing=0.0):
    """DPO on log-ratios per token (TRL's `sigmoid_norm`, which is not RSO's).

    L = -log sigmoid(beta (rho_w / |y_w| - rho_l / |y_l|))

    At policy = reference: log 2
    Reference   TRL 1.16 `sigmoid_norm`
    """
    return dpo(beta=beta, label_smoothing=label_smoothing).with_slots(score=partial(scores.mean_log_ratio, beta=beta))


def dpo_gamma(*, beta=0.1, gamma=1.0):
    """DPO with the reference counted gamma times.

    L = -log sigmoid(beta [(lp_w - lp_l) - gamma (lr_w - lr_l)])

    gamma       0 to 2; 1 is `dpo`
    At policy = reference: log(1 + exp(beta (gamma - 1) (lr_w - lr_l)))
    Reference   Chen et al., arXiv:2405.19534
    """
    number(gamma=gamma)
    return dpo(beta=beta).with_slots(score=partial(scores.scaled_reference, beta=beta, gamma=gamma))


def ipo(*, tau=0.1):
    """Identity Preference Optimisation, length-normalised as its authors ran it (TRL `ipo`, where tau is called beta).

    L = (rho_w / |y_w| - rho_l / |y_l| - 1 / (2 tau))^2

    tau         0.1: target margin 5 nats per token
    At policy = reference: 1 / (4 tau^2)
    Reference   Azar et al., arXiv:2310.12036, eq. 17
    """
    positive(tau=tau)
    return PreferenceObjective(score=partial(scores.mean_log_ratio, beta=1.0),
                               ranking=partial(pairwise.squared, goal=1 / (2 * tau)))


def ipo_summed(*, tau=0.1):
    """Identity Preference Optimisation with summed log-ratios, as the paper writes it.

    L = (rho_w - rho_l - 1 / (2 tau))^2

    tau         0.1: target margin 5 nats
    At policy = reference: 1 / (4 tau^2)
    Reference   Azar et al., arXiv:2310.12036, eq. 17
    """
    return ipo(tau=tau).with_slots(score=partial(scores.log_ratio, beta=1.0))


def rdpo(*, beta=0.1, flip=0.1):
    """Robust DPO: unbiased when labels are flipped at a known rate (TRL `robust`).

    L = [-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps)

    flip        eps in [0, 0.5). The loss has no lower bound for eps > 0: small learning rate, early stopping
    At policy = reference: log 2
    Reference   Chowdhury et al., arXiv:2403.00409
    """
    below_half(flip=flip)
    return dpo(beta=beta).with_slots(labels=partial(label_rules.unflip, flip=flip), bounded=flip == 0)


def hinge(*, beta=0.1):
    """Hinge loss on log-ratios (TRL `hinge`, RSO's hinge-norm).

    L = max(0, 1 - beta h)

    At policy = reference: 1
    Reference   Liu et al., RSO, arXiv:2309.06657, eq. 10
    """
    return dpo(beta=beta).with_slots(ranking=pairwise.hinge)


def slic(*, delta=1.0, sft=0.1):
    """SLiC-HF: hinge on log-probabilities plus likelihood of the chosen response.

    L = max(0, delta - lp_w + lp_l) - sft lp_w

    delta, sft  HALOs 1.0 and 0.1. Summed log-probabilities; no reference
    Departs     the SFT target is the chosen response, as in HALOs
    Reference   Zhao et al., arXiv:2305.10425
    """
    positive(delta=delta)
    not_negative(sft=sft)
    return PreferenceObjective(score=scores.log_likelihood, ranking=partial(pairwise.hinge, delta=delta),
                               regularisers={"sft": Term(regularisers.best_nll, sft)} if sft else {})


def rso(*, gamma=0.05):
    """RSO's sigmoid-norm: DPO whose temperature gamma is apart from the sampler's beta.

    L = -log sigmoid(gamma h)

    gamma       0.05. The rejection sampler is in data_tools.select
    At policy = reference: log 2
    Reference   Liu et al., arXiv:2309.06657, eq. 9
    """
    positive(gamma=gamma)
    return dpo(beta=gamma)


def rso_hinge_norm(*, gamma=0.05):
    """RSO's hinge-norm.

    L = max(0, 1 - gamma h)

    At policy = reference: 1
    Reference   Liu et al., arXiv:2309.06657, eq. 10
    """
    positive(gamma=gamma)
    return hinge(beta=gamma)


def rso_hinge(*, gamma=0.05):
    """RSO's hinge on log-probabilities, without a reference.

    L = max(0, 1 - gamma (lp_w - lp_l))

    Reference   Liu et al., arXiv:2309.06657
    """
    positive(gamma=gamma)
    return hinge(beta=gamma).with_slots(score=partial(scores.log_likelihood, beta=gamma))


def rpo(*, beta=0.01, eta=0.005):
    """Regularized Preference Optimization: DPO plus the chosen response's summed likelihood.

    L = -log sigmoid(beta h) - eta beta lp_w

    eta         0.005. The paper's coefficient multiplies beta
    At policy = reference: log 2 - eta beta lp_w
    Reference   Liu et al., arXiv:2405.16436
    """
    not_negative(eta=eta)
    return dpo(beta=beta).with_slots(regularisers={"sft": Term(regularisers.best_nll, eta * beta)} if eta else {})


def rpo_mean(*, beta=0.1, alpha=1.0):
    """Iterative Reasoning PO's loss: DPO plus the chosen response's likelihood per token (TRL `rpo_alpha`).

    L = -log sigmoid(beta h) - alpha lp_w / |y_w|

    At policy = reference: log 2 - alpha lp_w / |y_w|
    Reference   Pang et al., arXiv:2404.19733
    """
    not_negative(alpha=alpha)
    return dpo(beta=beta).with_slots(regularisers={"sft": Term(regularisers.best_mean_nll, alpha)} if alpha else {})


def simpo(*, beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.0, sft=0.0):
    """SimPO: average log-probability with a target margin, no reference.

    L = -log sigmoid(beta (alp_w - alp_l) - gamma),   gamma = beta * gamma_beta_ratio

    beta                2.0 (up to 10)
    gamma_beta_ratio    0.5 recommended; the code's default is 0.25
    sft                 weight of the chosen response's NLL per token
    Edge                a pair with an empty response is left out
    Reference   Meng et al., arXiv:2405.14734
    """
    positive(beta=beta)
    number(gamma_beta_ratio=gamma_beta_ratio)
    not_negative(sft=sft)
    return PreferenceObjective(score=partial(scores.mean_logp, beta=beta), ranking=pairwise.logistic,
                               margin=partial(margins.shifted, gamma=beta * gamma_beta_ratio),
                               labels=_smoothed(label_smoothing), ranking_terms=regularisers.nonempty_pairs,
                               regularisers={"sft": Term(regularisers.best_mean_nll, sft)} if sft else {})


def orpo(*, weight=0.1):
    """ORPO: SFT on the chosen response plus a log-odds ratio, no reference.

    L = -lp_w / |y_w| - weight log sigmoid(logodds_w - logodds_l)

    weight      lambda of the paper, beta in TRL; 0.1 to 1.0
    Departs     the NLL is a mean over responses (implementations differ)
    Reference   Hong et al., arXiv:2403.07691
    """
    not_negative(weight=weight)
    return PreferenceObjective(score=scores.log_odds, ranking=pairwise.logistic, weight=weight,
                               regularisers={"sft": Term(regularisers.best_mean_nll)})


def cpl(*, alpha=0.1, bias=0.5, bc=0.0):
    """Contrastive Preference Learning: regret preferences on log-probabilities, no reference.

    L = -log sigmoid(alpha (lp_w - bias lp_l)) - bc mean of lp_t over all tokens of all responses

    bias        lambda in (0, 1]; below 1 log-probabilities cannot drift down together. 0.5
    bc          weight of behaviour cloning
    Reference   Hejna et al., arXiv:2310.13639
    """
    positive(alpha=alpha, bias=bias)
    share(bias=bias)
    not_negative(bc=bc)
    return PreferenceObjective(score=partial(scores.log_likelihood, beta=alpha), ranking=pairwise.logistic,
                               margin=partial(margins.biased, bias=bias),
                               regularisers={"bc": Term(regularisers.token_nll, bc, reduce=term_mean)} if bc else {})


def cpl_kl(*, alpha=0.2, bias=0.75, bc=0.0):
    """CPL with a reference.

    L = -log sigmoid(alpha (rho_w - bias rho_l)) - bc mean of lp_t over all tokens of all responses

    bias        1 is `dpo` with beta = alpha
    At policy = reference: log 2 plus the bc term
    Reference   Hejna et al., arXiv:2310.13639
    """
    return cpl(alpha=alpha, bias=bias, bc=bc).with_slots(score=partial(scores.log_ratio, beta=alpha))


def exo(*, beta=0.1, label_smoothing=1e-3):
    """EXO on pairs: reverse KL to the smoothed label (TRL `exo_pair`).

    L = sigmoid(z)(log sigmoid(z) - log(1 - eps)) + sigmoid(-z)(log sigmoid(-z) - log eps),   z = beta h

    label_smoothing   eps > 0; 0.001
    At policy = reference: log(1/2) - log((1 - eps) eps) / 2
    Reference   Ji et al., arXiv:2402.00856
    """
    positive(label_smoothing=label_smoothing)
    below_half(label_smoothing=label_smoothing)
    return dpo(beta=beta).with_slots(ranking=partial(pairwise.exo, label_smoothing=label_smoothing))


def discopop(*, beta=0.05, tau=0.05):
    """DiscoPOP: log-ratio modulated loss.

    L = (1 - g) softplus(-z) + g exp(-z),   g = sigmoid(z / tau),   z = beta h

    Edge        at tau = 0.05 the slope at h = 0 is positive: from the reference, h first falls to -2.37
    At policy = reference: (1 + log 2) / 2
    Reference   Lu et al., arXiv:2406.08414
    """
    positive(tau=tau)
    return dpo(beta=beta).with_slots(ranking=partial(pairwise.discopop, tau=tau))


def apo_down(*, beta=0.1):
    """Anchored preference optimisation for chosen responses worse than the policy's own.

    L = sigmoid(beta rho_w) + 1 - sigmoid(beta h)

    At policy = reference: 1
    Reference   D'Oosterlinck et al., arXiv:2408.06266
    """
    return dpo(beta=beta).with_slots(ranking=pairwise.apo_down)


def aot(*, beta=0.1, label_smoothing=0.0):
    """Alignment via optimal transport: the policy's margins against the reference's, both sorted over the step.

    L_(k) = -log sigmoid(beta [sorted_k(lp_w - lp_l) - sorted_k(lr_w - lr_l)])

    Pairs only. Needs one more pass of the policy per step, so that the sort does not depend on micro-batches.
    At policy = reference: log 2
    Reference   Melnyk et al., arXiv:2406.05882; TRL `aot`
    """
    return dpo(beta=beta, label_smoothing=label_smoothing).with_slots(
        score=partial(scores.log_likelihood, beta=beta), margin=margins.transported_difference,
        annotations={"transported": partial(annotations.match_margins, beta=beta)})


def smpo(*, beta=0.1, tau=1.0, scale=1.0):
    """Smoothed preference distribution: margins weighted by a reward model's confidence. Needs a `reward` column.

    L = -log sigmoid(scale (2 p - 1) beta h),   p = sigmoid((r_w - r_l) / tau)

    At policy = reference: log 2
    Departs     adapted from diffusion models
    Reference   arXiv:2506.02698
    """
    positive(tau=tau, scale=scale)
    return dpo(beta=beta).with_slots(margin=partial(margins.smoothed, tau=tau, scale=scale))


def ld_dpo(*, beta=0.1, alpha=0.5):
    """Length-desensitised DPO: tokens beyond the shorter response count alpha.

    L = -log sigmoid(beta h'),   lp' = lp_shared + alpha lp_tail

    alpha       in [0, 1]; 1 is `dpo`
    At policy = reference: log 2
    Reference   Liu et al., arXiv:2409.06411
    """
    share(alpha=alpha)
    return dpo(beta=beta).with_slots(score=partial(scores.length_desensitised, beta=beta, alpha=alpha),
                                     annotations={"shared_length": annotations.shortest})


def wpo(*, beta=0.01, label_smoothing=0.0):
    """Weighted preference optimisation: pairs count by how on-policy they are.

    L = -sg(u_w u_l) log sigmoid(beta h),   u = exp(mean_t [lp_t - log sum_v p_v^2])

    At policy = reference: log 2 times the mean of u_w u_l
    Reference   Zhou et al., arXiv:2406.11827
    """
    return dpo(beta=beta, label_smoothing=label_smoothing).with_slots(pair_weight=pair_weights.on_policy)


def tr_dpo(*, beta=0.1, alpha=0.6, every=512):
    """Trust-region DPO: the reference follows the policy.

    ref <- alpha policy + (1 - alpha) ref every `every` steps;   L as in `dpo`

    alpha, every   soft updates 0.5 to 0.6; alpha = 1 copies (hard updates)
    At policy = reference: log 2
    Reference   Gorbatovski et al., arXiv:2404.09656
    """
    positive(alpha=alpha, every=every)
    share(alpha=alpha)
    return dpo(beta=beta).with_slots(reference=Moving(alpha=alpha, every=every))
