"""Recipes whose loss looks at one response at a time: unpaired feedback, and pairs taken apart."""
from __future__ import annotations

from functools import partial

from prefopt import annotations, pointwise, scores
from prefopt.objectives import PreferenceObjective
from prefopt.recipes.checks import below_half, not_negative, positive
from prefopt.reductions import group_sum, term_mean


def kto(*, beta=0.1, desirable=1.0, undesirable=1.0):
    """Kahneman-Tversky Optimization, mean over all responses.

    L = lambda_D (1 - sigmoid(beta (rho - z0))) or lambda_U (1 - sigmoid(beta (z0 - rho)))

    z0 = max(0, mean of rho(x, y')) over mismatched responses y' of the whole step, without gradient.

    desirable, undesirable   choose lambda_D n_D / (lambda_U n_U) in [1, 4/3]
    At policy = reference: mean of lambda / 2
    Reference   Ethayarajh et al., arXiv:2402.01306
    """
    positive(beta=beta)
    not_negative(desirable=desirable, undesirable=undesirable)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), reduce=term_mean,
                               ranking=partial(pointwise.kto, desirable=desirable, undesirable=undesirable),
                               annotations={"baseline": partial(annotations.kl_baseline, beta=beta)})


def bco(*, beta=0.1):
    """Binary Classifier Optimization with its running reward shift, mean over all responses.

    L = -log sigmoid(beta rho - delta) or -log sigmoid(delta - beta rho),   delta = running mean of beta rho

    At policy = reference: log 2
    Reference   Jung et al., arXiv:2404.04656
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), ranking=pointwise.bco, reduce=term_mean,
                               annotations={"baseline": annotations.RunningShift()})


def bco_pair(*, beta=0.1):
    """BCO on pairs without a shift, as TRL's `bco_pair`.

    L = -log sigmoid(beta rho_w) - log sigmoid(-beta rho_l)

    At policy = reference: 2 log 2
    Reference   Jung et al., arXiv:2404.04656; TRL `bco_pair`
    """
    return bco(beta=beta).with_slots(annotations={}, reduce=group_sum, ranking=pointwise.cross_entropy,
                                     ranking_terms=pointwise.opposed_rows)


def nca(*, beta=0.1):
    """Noise-contrastive alignment.

    L = -sum_i [ p_i log sigmoid(beta rho_i) + (1/K) log sigmoid(-beta rho_i) ],   p = psi / sum psi

    A pair: -log sigmoid(r_w) - (1/2) log sigmoid(-r_w) - (1/2) log sigmoid(-r_l), r = beta rho (TRL `nca_pair`).
    At policy = reference: 2 log 2
    Reference   Chen et al., arXiv:2402.05369
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), ranking=pointwise.nca, reduce=group_sum)


def sppo_hard(*, beta=0.1):
    """SPPO with hard labels: the winner's log-ratio to 1/(2 beta), the loser's to -1/(2 beta) (TRL `sppo_hard`).

    L = (rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2

    At policy = reference: 1 / (2 beta^2)
    Reference   Wu et al., arXiv:2405.00675
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=1.0), reduce=group_sum,
                               ranking=partial(pointwise.squared_goal, goal=1 / (2 * beta)),
                               ranking_terms=pointwise.opposed_rows)


def apo_zero(*, beta=0.1):
    """Anchored preference optimisation for chosen responses better than the policy's own.

    L = 1 - sigmoid(beta rho_w) + sigmoid(beta rho_l)

    At policy = reference: 1
    Reference   D'Oosterlinck et al., arXiv:2408.06266
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), ranking=pointwise.apo_zero, reduce=group_sum,
                               ranking_terms=pointwise.opposed_rows)


def aot_unpaired(*, beta=0.1, label_smoothing=0.0):
    """Alignment via optimal transport on desirable and undesirable responses sorted apart.

    L = mean_k [-(1 - eps) log sigmoid(z_k) - eps log sigmoid(-z_k)],   z_k = beta [sorted_k(rho_w) - sorted_k(rho_l)]

    Needs as many desirable as undesirable responses in a step, and one more pass of the policy.
    At policy = reference: log 2
    Reference   Melnyk et al., arXiv:2406.05882; TRL `aot_unpaired`
    """
    positive(beta=beta)
    below_half(label_smoothing=label_smoothing)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), reduce=term_mean, weight=2.0,
                               ranking=partial(pointwise.aot_unpaired, label_smoothing=label_smoothing),
                               annotations={"transported": annotations.match_scores})
