"""Recipes for general preferences: learning towards a Nash equilibrium, where no reward explains what is preferred."""
from __future__ import annotations

from functools import partial

from prefopt import advantages, label_rules, pairwise, pointwise, regularisers, scores, shaping, surrogates
from prefopt.objectives import PreferenceObjective, Term
from prefopt.policy import PolicyObjective
from prefopt.recipes.checks import not_negative, number, positive, share
from prefopt.recipes.pairs import dpo, ipo_summed
from prefopt.reductions import sequence_sum
from prefopt.references import Extrapolated

FLAT = {"temperature": 2.0, "top_k": 10}                      # responses that stand for uniform ones
# how a recipe's responses come about and what its rewards are, where a run file says nothing else
ROLLOUTS = {
    "ipo_md": {"program": {"from_mixture": {"share": 0.125}}},
    "egpo": {"program": {"against_policy": FLAT}},
    "nash_md": {"program": {"against_mixture": {"share": 0.125, **FLAT}}},
    "nash_md_pg": {"program": {"against_mixture": {"share": 0.125}}},
    "nash_ema": {"program": {"against_average": {"follow": 0.1}}},
    "sppo": {"against": "everyone"},
    "gpo": {"against": "everyone", "payoff": "mean_score"},
    "xpo": {"program": "beside_reference"},
}
UPDATES = {"egpo": "look_ahead"}
# the rounds of a recipe that is trained on given responses (`iterate`): what is selected, its labels, the reference
ITERATIONS = {
    "inpo": {"reference": "first"},
    "dno": {"select": "everything"},
    "gpo_offline": {"select": "everything", "labels": "soft"},
    "online_ipo": {"select": "everything", "labels": "soft", "reference": "first"},
}


def online_ipo(*, beta=0.1):
    """Online IPO: pairs of the policy's own responses, labelled by an oracle; its fixed point is the regularised equilibrium.

    L = w_12 (h - 1/(2 beta))^2 + w_21 (h + 1/(2 beta))^2,   h = rho_1 - rho_2,   w_12 = P(y_1 beats y_2)

    Up to a constant (h - (w_12 - 1/2) / beta)^2. Labels are the `wins` of the group, or 1 and 0 by its rewards.

    beta        weight of the KL to the reference
    At policy = reference: 1 / (4 beta^2)
    Reference   Calandriello et al., arXiv:2403.08635; Azar et al., arXiv:2310.12036
    """
    positive(beta=beta)
    return ipo_summed(tau=beta)


def ipo_md(*, beta=0.1):
    """IPO with a mixture sampler: online IPO whose responses come from pi^(1 - c) pi_ref^c.

    L = w_12 (h - 1/(2 beta))^2 + w_21 (h + 1/(2 beta))^2,   h = rho_1 - rho_2

    The mixture is the sampler's (`rollout.program: from_mixture`): the loss stays that of the policy. c = 0 is `online_ipo`, the
    authors of EGPO use 1/8.

    beta        weight of the KL to the reference
    Edge        the fixed point is rho = (win rate against the mixture) / beta + const: its bias grows with c
    At policy = reference: 1 / (4 beta^2)
    Reference   Calandriello et al., arXiv:2403.08635
    """
    return online_ipo(beta=beta)


def egpo(*, beta=0.1):
    """Extragradient preference optimization: log-ratios regress on win rates against the policy one step ahead.

    L = (rho_1 - rho_2 - (q_1 - q_2) / beta)^2,   q_i = P(y_i beats y''), y'' an opponent that both responses share

    Its update is `look_ahead`: two gradients, two rounds of opponents and one copy of what trains. The rewards of the responses
    are their win rates against the group's opponents, rows with train False of the policy; the responses should be as good as
    uniform (the authors: temperature 2, top-k 10). A run on its own samples has all of that unless it says otherwise.

    beta        weight of the KL to the reference
    Departs     log-probabilities are summed, as in the theory; the authors' trainer divides them by the length
    At policy = reference: the mean over pairs of ((q_1 - q_2) / beta)^2
    Reference   Zhou et al., EGPO, arXiv:2503.08942
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=1.0), labels=label_rules.by_reward,
                               ranking=partial(pairwise.squared_rewards, beta=beta))


def nash_md(*, beta=0.1):
    """Nash-MD as a regression: EGPO's loss against opponents of the geometric mixture of policy and reference.

    L = (rho_1 - rho_2 - (q_1 - q_2) / beta)^2,   q_i = P(y_i beats y''),   y'' ~ pi^(1 - c) pi_ref^c

    c is the step size times beta: with c = 2 / (t + 2) the last iterate converges like 1 / t. With a constant c the fixed point
    is pi = softmax(log pi_ref + P pi_mix / beta), away from the equilibrium in proportion to c: on small cyclic games with
    beta 0.1 a probability is off by 0.01 at c = 0.05, by 0.03 at 1/8 and by 0.15 at 1/2 (`python -m prefopt.games.study`).

    beta        weight of the KL to the reference
    At policy = reference: the mean over pairs of ((q_1 - q_2) / beta)^2
    Reference   Munos et al., Nash Learning from Human Feedback, arXiv:2312.00886
    """
    return egpo(beta=beta)


def nash_md_pg(*, beta=0.1):
    """Nash-MD as policy gradient, against opponents of the geometric mixture of policy and reference.

    J = sg(P(y beats y'') - 1/2 - beta rho) log pi(y),   y'' ~ pi^(1 - c) pi_ref^c, token by token

    The reward is the response's win rate against its opponents. c = 0 is self-play, c = 1 plays against the reference; TRL
    had 0.5, the authors of EGPO 1/8.

    beta        weight of the KL to the reference
    Departs     rho is that of the whole response; TRL's trainer gave each token its own share of it only
    Reference   Munos et al., Nash Learning from Human Feedback, arXiv:2312.00886, section 7
    """
    positive(beta=beta)
    return PolicyObjective(shaping={"half": partial(shaping.scaled, shift=-0.5), "kl": partial(shaping.kl_in_reward, beta=beta)},
                           advantage=advantages.raw, surrogate=surrogates.likelihood, reduce=sequence_sum)


def nash_ema(*, beta=0.1):
    """Nash-EMA as policy gradient: the opponent's parameters are a moving average of the policy's.

    J = sg(P(y beats y'') - 1/2 - beta rho) log pi(y),   y'' ~ pi_avg,   theta_avg <- (1 - r) theta_avg + r theta

    beta        weight of the KL to the reference
    Reference   Munos et al., Nash Learning from Human Feedback, arXiv:2312.00886, section 7
    """
    return nash_md_pg(beta=beta)


def inpo(*, beta=0.0075, anchor=1 / 3):
    """Iterative Nash policy optimization: IPO against two anchors, the reference and the policy of the last iteration.

    L = (h - 1/(2 beta))^2,   h = the difference of log pi - anchor log pi_ref - (1 - anchor) log pi_old

    pi_old is the policy that sampled the responses (`logp_old`). Minimised on pairs of pi_old with Bernoulli or soft labels,
    log pi = (1 - anchor) log pi_old + anchor log pi_ref + (P pi_old) / beta + const: mirror descent with step 1 / beta on
    the game whose KL has weight beta times anchor.

    beta        the paper's eta, an inverse step size; 0.005 to 0.0075
    anchor      the paper's tau / eta; 1/3
    Edge        anchor = 0 has no reference and only averages converge, anchor = 1 is `ipo_summed`; on given data attach
                `logp_old`, or the policy before each step stands for the one that sampled
    At policy = reference: 1 / (4 beta^2)
    Reference   Zhang et al., Iterative Nash Policy Optimization, arXiv:2407.00617
    """
    positive(beta=beta)
    share(anchor=anchor)
    return ipo_summed(tau=beta).with_slots(score=partial(scores.two_anchors, anchor=anchor))


def dno(*, beta=0.1):
    """Direct Nash optimization: DPO with soft labels of win rates, and the last iteration's policy as reference.

    L = -sigmoid(q_1 - q_2) log sigmoid(beta h) - sigmoid(q_2 - q_1) log sigmoid(-beta h),   q_i = P(y_i beats the policy's)

    The rewards are win rates against the policy of the last iteration, which is the reference. Its minimiser is
    pi_ref exp(q / beta) / Z. What was trained, DNO-Prct, is `dpo` on pairs whose scores differ by a margin.

    beta        inverse step size
    At policy = reference: log 2
    Reference   Rosset et al., Direct Nash Optimization, arXiv:2404.03715
    """
    return dpo(beta=beta).with_slots(labels=label_rules.by_reward)


def sppo(*, beta=1e-3):
    """Self-play preference optimization: log-ratios to the last iteration's policy regress on win rates.

    L = (rho - (q - 1/2) / beta)^2,   q = P(y beats the policy's responses)

    The rewards are win rates against samples of the last iteration's policy, which is the reference; 1/2 stands for log Z.
    `sppo_hard` has labels in their place.

    beta        inverse step size: targets reach 500 nats at 1e-3, which a run never meets
    Departs     all scored responses count, the source takes the best and the worst
    At policy = reference: the mean of ((q - 1/2) / beta)^2
    Reference   Wu et al., SPPO, arXiv:2405.00675
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=1.0), ranking=partial(pointwise.squared_reward, beta=beta),
                               ranking_terms=pointwise.rewarded_rows)


def gpo(*, beta=1e-3, limit=1000.0):
    """General preference optimization: SPPO with the scores of a general preference model for win rates.

    L = (rho - s / beta)^2,   s = mean score of y against the policy's responses, clamped: |s / beta| <= limit

    The rewards are mean scores (log-odds of winning), whose mean under the policy is 0, as scores are antisymmetric.

    beta        inverse step size
    limit       1000, the source's switch
    Departs     scores as they are: the source's table doubles them
    At policy = reference: the mean of (s / beta)^2
    Reference   Zhang et al., Beyond Bradley-Terry Models, arXiv:2410.02197
    """
    positive(beta=beta, limit=limit)
    return sppo(beta=beta).with_slots(ranking=partial(pointwise.squared_reward, beta=beta, centre=0.0, limit=limit))


def gpo_offline(*, beta=0.1, limit=1000.0):
    """General preference optimization on given pairs: the margin regresses on the score of the pair.

    L = (rho_1 - rho_2 - s_12 / beta)^2,   s_12 = log P(y_1 beats y_2) - log P(y_2 beats y_1)

    Needs `wins` that are probabilities, for instance those of a trained general preference model.

    beta        temperature
    limit       of |s / beta|
    At policy = reference: the mean over pairs of (s_12 / beta)^2
    Reference   Zhang et al., Beyond Bradley-Terry Models, arXiv:2410.02197
    """
    positive(beta=beta, limit=limit)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=1.0),
                               ranking=partial(pairwise.squared_logits, beta=beta, limit=limit))


def xpo(*, beta=0.1, alpha=1e-5):
    """Exploratory preference optimization: online DPO between the policy and the reference, with optimism.

    L = -log sigmoid(beta h) + alpha log pi(y_ref),   y_ref the response that the reference sampled, whoever won

    beta        as in `dpo`
    alpha       1e-5; the loss has no lower bound for alpha > 0
    At policy = reference: log 2 + alpha lp_ref
    Reference   Xie et al., Exploratory Preference Optimization, arXiv:2405.21046
    """
    not_negative(alpha=alpha)
    term = Term(regularisers.optimism, alpha, terms=regularisers.reference_rows)
    return dpo(beta=beta).with_slots(regularisers={"optimism": term} if alpha else {}, bounded=alpha == 0)


def apo_accel(*, beta=0.1, alpha=0.3, every=512):
    """Accelerated preference optimization: iterations of DPO with momentum over their solutions.

    pi_hat = argmin of L as in `dpo` with reference pi_t;   log pi_(t+1) = log pi_hat + alpha (log pi_hat - log pi_hat_before)

    The reference rule fits other recipes as well: `set: {reference: {Extrapolated: {alpha: 0.3, every: 512}}}`.

    alpha       momentum in [0, 1); 0 is iterative DPO. With a fixed reward the speed-up tends to 1 / (1 - alpha)
    every       optimiser steps of an iteration
    Edge        on cyclic preferences momentum without a KL diverges faster
    At policy = reference: log 2
    Reference   He et al., Accelerated Preference Optimization, arXiv:2410.06293
    """
    number(alpha=alpha)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), found {alpha!r}")
    positive(every=every)
    return dpo(beta=beta).with_slots(reference=Extrapolated(alpha=alpha, every=every))
