"""Recipes of the on-policy loop: rewards of sampled responses become advantages, and advantages a surrogate."""
from __future__ import annotations

import math
from functools import partial

from prefopt import (
    advantages,
    credits,
    critics,
    divergences,
    keeps,
    listwise,
    normalisers,
    penalties,
    ratios,
    scores,
    selections,
    shaping,
    surrogates,
    token_rewards,
)
from prefopt.objectives import PreferenceObjective
from prefopt.policy import Penalty, PolicyObjective
from prefopt.recipes.checks import below, count, not_negative, number, positive, share
from prefopt.recipes.pairs import dpo
from prefopt.reductions import fixed_length, group_mean, sequence_mean, sequence_sum, term_mean


def kl_term(part, beta: float) -> dict[str, Penalty]:
    """The penalty of a KL to the reference, or none (and no reference) at beta = 0."""
    not_negative(beta=beta)
    return {"kl": Penalty(part, beta)} if beta else {}


def reinforce():
    """REINFORCE with the mean reward of the rollout as baseline.

    J = mean over responses of (R_i - mean R) sum_t log pi_t

    Departs     the baseline includes the response's own reward; `rloo` leaves it out
    Reference   Williams, Simple Statistical Gradient-Following Algorithms, 1992
    """
    return PolicyObjective(advantage=advantages.batch_centre, surrogate=surrogates.likelihood, reduce=sequence_sum)


def rloo(*, low=0.2, high=0.2, beta=0.0):
    """REINFORCE leave-one-out, the ratio of whole responses clipped.

    J = mean over responses of min(r A, clip(r, 1 - low, 1 + high) A),   A_i = R_i - mean of the other R

    r = pi(y) / pi_old(y); on the rollout's first update the gradient is A grad log pi(y).

    beta        weight of the KL to the reference, taken off the reward; the source 0.05
    Reference   Ahmadian et al., Back to Basics, arXiv:2402.14740; TRL
    """
    not_negative(low=low, high=high, beta=beta)
    kl = {"kl": partial(shaping.kl_in_reward, beta=beta)} if beta else {}
    return PolicyObjective(shaping=kl, advantage=advantages.leave_one_out, ratio=ratios.sequence_sum,
                           surrogate=partial(surrogates.clip, low=low, high=high), reduce=sequence_mean)


def remax(*, beta=0.0):
    """ReMax: REINFORCE whose baseline is the reward of the greedy response.

    J = mean over responses of (R - R_greedy) sum_t log pi_t

    The source samples a greedy response beside each prompt's k, which does not train.

    beta        weight of the KL to the reference, taken off the reward
    Reference   Li et al., ReMax, arXiv:2310.10505
    """
    not_negative(beta=beta)
    kl = {"kl": partial(shaping.kl_in_reward, beta=beta)} if beta else {}
    return PolicyObjective(shaping=kl, advantage=advantages.greedy_baseline, surrogate=surrogates.likelihood,
                           reduce=sequence_sum)


def reinforce_plus_plus(*, low=0.2, high=0.2, beta=0.01, gamma=1.0):
    """REINFORCE++: token returns with a KL in the reward, whitened over the whole rollout.

    J = token mean of min(r A, clip(r, 1 - low, 1 + high) A),   A = whiten( sum_{s >= t} gamma^(s - t) r_s )

    beta        weight of log pi_old - log pi_ref in the reward of each token; 0 loads no reference
    Reference   Hu et al., REINFORCE++, arXiv:2501.03262
    """
    not_negative(low=low, high=high, beta=beta)
    share(gamma=gamma)
    paid = partial(token_rewards.at_end_with_kl, beta=beta) if beta else token_rewards.at_end
    return PolicyObjective(advantage=advantages.raw, reward_at=paid, credit=partial(credits.reward_to_go, gamma=gamma),
                           normalise=normalisers.whiten, surrogate=partial(surrogates.clip, low=low, high=high))


def reinforce_plus_plus_baseline(*, low=0.2, high=0.2, beta=0.0):
    """REINFORCE++ with the group's mean as baseline, whitened over the whole rollout.

    J = token mean of min(r A, clip(r, 1 - low, 1 + high) A) - beta k2,   A = whiten(R_i - mean of the group)

    beta        weight of k2, whose gradient on the policy's own samples is that of the reverse KL
    Reference   Hu et al., REINFORCE++, arXiv:2501.03262
    """
    not_negative(low=low, high=high)
    return PolicyObjective(advantage=advantages.centre, normalise=normalisers.whiten,
                           surrogate=partial(surrogates.clip, low=low, high=high), penalties=kl_term(penalties.k2, beta))


def grpo(*, low=0.2, high=0.2, beta=0.0, eps=1e-6):
    """Group Relative Policy Optimization, outcome supervision.

    J = mean over responses of token mean of min(r A, clip(r, 1 - low, 1 + high) A) - beta k3,   A_i = (R_i - mean) / (std + eps)

    beta        weight of k3; the source 0.04, most runs today 0, which loads no reference
    eps         verl 1e-6, TRL 1e-4
    Departs     the mean is over the responses of the whole optimiser step, never of a micro-batch
    Reference   Shao et al., DeepSeekMath, arXiv:2402.03300
    """
    not_negative(low=low, high=high, eps=eps)
    return PolicyObjective(advantage=partial(advantages.zscore, eps=eps), surrogate=partial(surrogates.clip, low=low, high=high),
                           reduce=sequence_mean, penalties=kl_term(penalties.k3, beta))


def grpo_process(*, low=0.2, high=0.2, beta=0.0):
    """GRPO with process supervision: step rewards, normalised over all steps of the group and summed from each token on.

    A_t = sum over steps that end at or after t of (r_j - mean) / std

    Needs `step_reward` of each response: meta {step_reward: [one number per token, NaN where no step ends]}.

    Reference   Shao et al., DeepSeekMath, arXiv:2402.03300, section 4.1.3
    """
    return grpo(low=low, high=high, beta=beta).with_slots(credit=credits.grpo_process)


def dr_grpo(*, low=0.2, high=0.2, beta=0.0, length=256):
    """GRPO done right: no division by the group's standard deviation, nor by the response's length.

    J = (1 / responses) sum over responses of (1 / length) sum_t min(r A, clip(r, 1 - low, 1 + high) A),   A_i = R_i - mean

    length      a constant: rollout.max_new_tokens
    Reference   Liu et al., Understanding R1-Zero-Like Training, arXiv:2503.20783
    """
    count(1, length=length)
    return grpo(low=low, high=high, beta=beta).with_slots(advantage=advantages.centre,
                                                          reduce=partial(fixed_length, length=length))


def dapo(*, low=0.2, high=0.28, limit=256, buffer=None, floor=math.inf):
    """DAPO: clip higher, dynamic sampling, token mean, soft overlong punishment.

    J = token mean of min(r A, clip(r, 1 - low, 1 + high) A),   R <- R + min(0, (limit - buffer - |y|) / buffer)

    Groups without contrast are dropped and sampled anew (rollout.refill rounds at most), judged by the reward before the
    punishment.

    limit       rollout.max_new_tokens
    buffer      tokens before the limit over which the punishment grows to 1; a fifth of the limit when left out
    floor       of dual clipping, 10 in the authors' runs; off
    Reference   Yu et al., DAPO, arXiv:2503.14476
    """
    not_negative(low=low, high=high)
    count(2, limit=limit)
    buffer = max(1, limit // 5) if buffer is None else buffer
    positive(buffer=buffer, floor=floor)
    surrogate = partial(surrogates.clip, low=low, high=high) if floor == math.inf else \
        partial(surrogates.dual_clip, low=low, high=high, floor=floor)
    return PolicyObjective(advantage=advantages.zscore, surrogate=surrogate, keep=keeps.contrast, reduce=term_mean,
                           shaping={"overlong": partial(shaping.overlong, limit=limit, buffer=buffer)})


def gspo(*, low=3e-4, high=4e-4, beta=0.0):
    """Group Sequence Policy Optimization: the ratio of a response is the geometric mean of its tokens' ratios.

    J = mean over responses of min(s A, clip(s, 1 - low, 1 + high) A),   s = exp( mean_t log r_t )

    Reference   Zheng et al., GSPO, arXiv:2507.18071
    """
    return grpo(low=low, high=high, beta=beta).with_slots(ratio=ratios.sequence_token)


def cispo(*, low=math.inf, high=0.28):
    """Clipped importance-sampling policy optimization: the weight is clipped, no token loses its gradient.

    J = token mean of sg(clip(r, 1 - low, 1 + high)) A log pi

    low, high   the lower bound is off; high 0.28 as in verl (TRL names 1 + high)
    Reference   MiniMax-M1, arXiv:2506.13585
    """
    not_negative(low=low, high=high)
    return PolicyObjective(advantage=advantages.zscore, surrogate=partial(surrogates.truncate, low=low, high=high))


def sapo(*, tau_positive=1.0, tau_negative=1.05):
    """Soft adaptive policy optimization: a smooth gate in the place of clipping.

    J = mean over responses of token mean of (4 / tau) sigmoid(tau (r - 1)) A

    tau_positive, tau_negative   for A > 0 and for the others
    Reference   Gao et al., Soft Adaptive Policy Optimization, arXiv:2511.20347
    """
    positive(tau_positive=tau_positive, tau_negative=tau_negative)
    gate = partial(surrogates.soft_gate, tau_positive=tau_positive, tau_negative=tau_negative)
    return PolicyObjective(advantage=advantages.zscore, surrogate=gate, reduce=sequence_mean)


def opo():
    """On-policy RL with the optimal baseline: rewards weighted by length.

    J = token mean of (R_i - b) log pi,   b = sum |y_i| R_i / sum |y_i|

    Departs     strictly on-policy, as the source: no ratio; the reduction is a constant of the rollout
    Reference   Hao et al., On-Policy RL with Optimal Reward Baseline, arXiv:2505.23585
    """
    return PolicyObjective(advantage=advantages.length_weighted, surrogate=surrogates.likelihood)


def gpg(*, norm=1.0):
    """Group policy gradient: no ratio, no clipping, no reference; groups without signal are made up for.

    J = token mean of A log pi,   A_i = alpha (R_i - mean) / norm,   alpha = responses / responses with R other than 0

    Reference   Chu et al., GPG, arXiv:2504.02546
    """
    positive(norm=norm)
    return PolicyObjective(advantage=partial(advantages.gpg, norm=norm), surrogate=surrogates.likelihood)


def bnpo(*, low=0.2, high=0.28, floor=10.0, least=0.0, most=1.0):
    """Beta normalization policy optimization: groups weighted by the inverse of a beta density of their accuracy.

    A_i = w (R_i - p),   w = 1 / Beta(p; alpha, beta) with moments of the rollout's accuracies p

    least, most   range of the reward
    Reference   Xiao et al., BNPO, arXiv:2506.02864. TRL's loss type of this name is the token mean of a micro-batch
    """
    not_negative(low=low, high=high)
    positive(floor=floor)
    below(least=least, most=most)
    return PolicyObjective(advantage=partial(advantages.beta_normalised, low=least, high=most), reduce=sequence_sum,
                           surrogate=partial(surrogates.dual_clip, low=low, high=high, floor=floor))


def gmpo(*, low=0.4, high=0.4):
    """Geometric-mean policy optimization: token log-ratios clipped before their mean.

    J = mean over responses of s A,   log s = mean_t of log r_t, clipped to [-low, high] on the side that A pushes to

    low, high   in log space
    Reference   Zhao et al., Geometric-Mean Policy Optimization, arXiv:2507.20673
    """
    positive(low=low, high=high)
    return PolicyObjective(advantage=advantages.zscore, ratio=partial(ratios.geometric, low=low, high=high),
                           surrogate=surrogates.plain, reduce=sequence_mean)


def pass_at_k(*, low=0.2, high=0.2):
    """Pass@k policy optimization: only the best response of a group counts, by what it is better than the second.

    A = (R_max - R_second) / std for the first best response, 0 for the others

    Reference   Walder & Karkhanis, Pass@K Policy Optimization; verl `pass@k`, arXiv:2503.19595
    """
    not_negative(low=low, high=high)
    return PolicyObjective(advantage=advantages.best_minus_second_scaled,
                           surrogate=partial(surrogates.clip, low=low, high=high))


def clip_cov(*, low=0.2, high=0.2, share=2e-4, least=1.0, most=5.0):
    """Clip-Cov: a few tokens of high covariance between advantage and log-probability lose their gradient.

    J = token mean of min(r A, clip(r, 1 - low, 1 + high) A) where not chosen, 0 where chosen

    Chosen at random: a share of all tokens among those not clipped with least < (A - mean A)(log pi - mean log pi) < most.

    share       of the tokens; the source 2e-4
    Reference   Cui et al., The Entropy Mechanism of RL for Reasoning Language Models, arXiv:2505.22617
    """
    not_negative(low=low, high=high, share=share)
    below(least=least, most=most)
    chosen = partial(selections.covariance_band, share=share, low=least, high=most, clip_low=low, clip_high=high)
    return PolicyObjective(advantage=advantages.zscore, selections={"selected": chosen},
                           surrogate=partial(surrogates.clip_except_selected, low=low, high=high))


def kl_cov(*, share=2e-3, coef=1.0):
    """KL-Cov: the tokens of highest covariance are held back by a penalty; no clipping.

    J = token mean of r A - coef |log r| on the share of tokens of highest (A - mean A)(log pi - mean log pi)

    share       of the tokens; the source 2e-3 (7B) and 2e-4 (32B)
    coef        1
    Edge        the rollout's first update has r = 1, where the penalty has no gradient: take several updates a rollout
                (rollout.samples_per_update)
    Reference   Cui et al., The Entropy Mechanism of RL for Reasoning Language Models, arXiv:2505.22617
    """
    not_negative(share=share, coef=coef)
    return PolicyObjective(advantage=advantages.zscore, selections={"selected": partial(selections.covariance_top, share=share)},
                           surrogate=partial(surrogates.kl_selected, coef=coef))


def ppo(*, low=0.2, high=0.2, gamma=1.0, lam=0.95, beta=0.05, value_clip=0.2, value_weight=0.5):
    """Proximal policy optimization with a critic: GAE, the KL to the reference in the reward of each token.

    J = token mean of min(r A, clip(r, 1 - low, 1 + high) A),   A = whiten(GAE of r_t = [t last] R - beta (lp_old - lp_ref)_t)

    The critic, a model of its own, learns (1/2) max((V - G)^2, (clip(V, V_old +- value_clip) - G)^2), G = GAE + V_old.

    lam         0.95; 1 for long chains of thought
    beta        0 loads no reference
    value_weight   of the critic's loss, which only matters beside a gradient clip: its optimiser group is its own
    Reference   Schulman et al., arXiv:1707.06347 and 1506.02438; Ziegler et al., arXiv:1909.08593
    """
    not_negative(low=low, high=high, beta=beta, value_weight=value_weight)
    share(gamma=gamma, lam=lam)
    positive(value_clip=value_clip)
    paid = partial(token_rewards.at_end_with_kl, beta=beta) if beta else token_rewards.at_end
    return PolicyObjective(
        advantage=advantages.raw, reward_at=paid, credit=partial(credits.gae, gamma=gamma, lam=lam), normalise=normalisers.whiten,
        surrogate=partial(surrogates.clip, low=low, high=high),
        annotations={"returns": partial(credits.returns, gamma=gamma, lam=lam)},
        penalties={"value": Penalty(partial(critics.value_loss, clip=value_clip), value_weight)})


def ppo_adaptive(*, start=0.2, target=6.0, horizon=10000, low=0.2, high=0.2, gamma=1.0, lam=0.95, value_clip=0.2,
                 value_weight=0.5):
    """PPO whose KL coefficient follows a target.

    coefficient *= 1 + clip(KL / target - 1, -0.2, 0.2) responses / horizon

    start, target, horizon   of the controller: the first coefficient, nats per response, responses
    Reference   Ziegler et al., arXiv:1909.08593, section 2.2
    """
    not_negative(start=start)
    positive(target=target, horizon=horizon)
    base = ppo(low=low, high=high, gamma=gamma, lam=lam, beta=0.0, value_clip=value_clip, value_weight=value_weight)
    control = penalties.AdaptiveKL(start=start, target=target, horizon=horizon)
    return base.with_slots(reward_at=token_rewards.at_end_with_coefficient,
                           annotations={"coefficient": control, **base.annotations})


def fdpg(*, beta=0.1):
    """f-DPG: matching the distribution pi_ref exp(R / beta) / Z, by the Jensen-Shannon divergence.

    J = mean over responses of A sum_t log pi_t,   A = -f'(pi / p)

    `set: {advantage: fdpg_forward}` and the other parts of prefopt.divergences are the other divergences.

    beta        temperature of the target
    Departs     Z from the group's own responses
    Reference   Go et al., Aligning Language Models with Preferences through f-divergence Minimization, arXiv:2302.08215
    """
    positive(beta=beta)
    return PolicyObjective(advantage=partial(divergences.fdpg_js, beta=beta), ratio=ratios.sequence_sum,
                           surrogate=surrogates.plain, reduce=sequence_mean)


def best_of_n():
    """Best-of-n distillation: the likelihood of each prompt's best response.

    J = token mean of [best of its group] log pi

    Edge        a group whose rewards are all equal still teaches its first response; `set: {keep: contrast}` leaves it out
    Reference   Stiennon et al., arXiv:2009.01325; BOND, arXiv:2407.14622
    """
    return PolicyObjective(advantage=advantages.best_of_n, surrogate=surrogates.likelihood)


def rejection(*, threshold=0.5):
    """Rejection fine-tuning: the likelihood of every response whose reward is above a threshold.

    J = token mean of [R > threshold] log pi

    Reference   Yuan et al., Scaling Relationship (RFT), arXiv:2308.01825; RAFT, arXiv:2304.06767
    """
    number(threshold=threshold)
    return PolicyObjective(advantage=partial(advantages.above, threshold=threshold), surrogate=surrogates.likelihood)


def online_dpo(*, beta=0.1):
    """DPO on pairs of the policy's own responses, ordered by their reward.

    L = -log sigmoid(beta (rho_w - rho_l)) over all pairs of a prompt whose rewards differ

    Any recipe of pairs or lists works like this with a block rollout.

    At policy = reference: log 2
    Reference   Guo et al., Direct Language Model Alignment from Online AI Feedback, arXiv:2402.04792
    """
    return dpo(beta=beta)


def copg(*, beta=0.1):
    """Contrastive policy gradient: regression of reward differences, from responses of any policy.

    L = (1 / (k - 1)) sum over pairs of (R_i - beta rho_i - R_j + beta rho_j)^2

    No importance weights: responses may be old, or another model's. Rewards come from rollout, or from records as relevance.

    At policy = reference: the variance of the rewards, times k
    Reference   Flet-Berliac et al., Contrastive Policy Gradient, arXiv:2406.19185
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), ranking=listwise.copg, reduce=group_mean)
