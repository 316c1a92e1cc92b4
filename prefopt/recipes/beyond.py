"""Recipes that need more than two log-probabilities per token: learned masks, online rows, rationales, several prompts."""
from __future__ import annotations

from functools import partial

from prefopt import listwise, margins, masks, pairwise, regularisers, scores
from prefopt.label_rules import as_given
from prefopt.objectives import PreferenceObjective, Term
from prefopt.recipes.checks import not_negative, positive, share
from prefopt.recipes.pairs import dpo
from prefopt.reductions import group_sum, term_mean


def tdpo(*, beta=0.1):
    """Token-level DPO (TDPO-1): DPO with the sequence KL of both responses.

    L = -log sigmoid(beta [h - (K_l - K_w)]),   K = sum_t KL(pi_ref(.|s_t) || pi(.|s_t))

    At policy = reference: log 2
    Reference   Zeng et al., arXiv:2404.11999
    """
    return dpo(beta=beta).with_slots(score=partial(scores.token_masked, beta=beta),
                                     providers={"reward_mask": masks.full_mask, "kl_mask": masks.full_mask})


def mapo(*, beta=0.8):
    """SparsePO's MaPO: token masks read off the reference's activations, one mask for reward and KL.

    L = -log sigmoid(beta [(U_w - U_l) - (D_l - D_w)]),   U = sum mu_t rho_t, D = sum mu_t KL_t

    beta        0.8 (sentiment, summarisation), 0.1 (dialogue)
    At policy = reference: log 2
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102
    """
    return tdpo(beta=beta).with_slots(providers={"reward_mask": masks.activation, "kl_mask": masks.same_mask})


def sparsepo(*, beta=0.8, l1_reward=0.0, l1_kl=0.0, dropout=0.0):
    """SparsePO with one learned mask for reward and KL.

    L = -log sigmoid(beta [(U_w - U_l) - (D_l - D_w)]) + (l1_reward + l1_kl)/2 (|mu_w|_1 + |mu_l|_1)

    l1_reward, l1_kl   0; dialogue 1e-3. Halved because both masks are the same one. Norms are sums over tokens
    dropout            of the mask; the source 0.01
    At policy = reference: log 2 plus the L1 term
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102
    """
    not_negative(l1_reward=l1_reward, l1_kl=l1_kl)
    share(dropout=dropout)
    l1 = (l1_reward + l1_kl) / 2
    return tdpo(beta=beta).with_slots(
        providers={"reward_mask": masks.TokenMask(dropout=dropout), "kl_mask": masks.same_mask},
        regularisers={"l1": Term(regularisers.l1_reward_mask, l1)} if l1 else {})


def sparsepo_independent(*, beta=0.8, l1_reward=0.0, l1_kl=0.0, dropout=0.0):
    """SparsePO with two learned masks.

    L = -log sigmoid(beta [(U_w - U_l) - (D_l - D_w)]) + l1_reward (|mu_w|_1 + |mu_l|_1) + l1_kl (|md_w|_1 + |md_l|_1)

    At policy = reference: log 2 plus the L1 terms
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102
    """
    not_negative(l1_reward=l1_reward, l1_kl=l1_kl)
    share(dropout=dropout)
    terms = {"l1_reward": Term(regularisers.l1_reward_mask, l1_reward), "l1_kl": Term(regularisers.l1_kl_mask, l1_kl)}
    return tdpo(beta=beta).with_slots(
        providers={"reward_mask": masks.TokenMask(dropout=dropout), "kl_mask": masks.TokenMask(dropout=dropout)},
        regularisers={k: t for k, t in terms.items() if t.weight})


def hypo(*, beta=0.1, kl=0.01):
    """Hybrid Preference Optimization: DPO on offline pairs, reverse KL on fresh samples.

    L = DPO(pairs) + kl mean over prompts of (1/k) sum_i sg(a_i) lp(y_i)

    a_i = kappa_i - mean of the other kappas, kappa = log pi(y_i) - log pi_ref(y_i): a leave-one-out score-function
    estimate of grad KL(pi || ref). The batch holds unlabelled rows with `online` True, sampled from the policy.

    kl          1e-4 to 1e-2 for sequences
    At policy = reference: log 2
    Departs     reconstructed from the paper's abstract and table of hyperparameters
    Reference   Song et al., arXiv:2406.01462
    """
    not_negative(kl=kl)
    online = Term(regularisers.online_kl, kl, terms=regularisers.online_groups)
    return dpo(beta=beta).with_slots(regularisers={"online_kl": online})


def hypo_optimistic(*, beta=0.1):
    """Hybrid-DPO: DPO whose reference margin is clamped at 0 (another method of the name HyPO).

    L = -log sigmoid(beta [(lp_w - lp_l) - max(0, lr_w - lr_l)])

    At policy = reference: log(1 + exp(beta max(0, lr_l - lr_w)))
    Reference   arXiv:2602.11902
    """
    return dpo(beta=beta).with_slots(margin=partial(margins.optimistic, beta=beta))


def rationale(*, beta=0.1, gamma=0.001):
    """Preference learning with rationales: DPO plus the likelihood of why.

    L = DPO - gamma log pi(z | x, y_w > y_l)

    Rationales are unlabelled rows with `rationale` True and a prompt of their own; a group without one has DPO alone.
    At policy = reference: log 2 - gamma lp_z
    Reference   Just et al., arXiv:2407.14477
    """
    not_negative(gamma=gamma)
    term = Term(regularisers.rationale_nll, gamma, reduce=group_sum, terms=regularisers.rationale_rows)
    return dpo(beta=beta).with_slots(regularisers={"rationale": term})


def rationale_released(*, beta=0.1, gamma=0.001):
    """The released code's form of `rationale`, -log sigmoid(gamma log pi(z)).

    L = DPO - log sigmoid(gamma lp_z)

    Relations   gamma = 0 is DPO + log 2
    At policy = reference: log 2 - log sigmoid(gamma lp_z)
    Reference   reds-lab/preference-learning-with-rationales
    """
    not_negative(gamma=gamma)
    term = Term(partial(regularisers.rationale_logsigmoid, gamma=gamma), reduce=group_sum,
                terms=regularisers.rationale_rows)
    return dpo(beta=beta).with_slots(regularisers={"rationale": term})


def mapl(*, beta=0.1, intra=1.0, inter=1.0):
    """Multi-level aware preference learning: the same response under two prompts, and a gap that must widen.

    L = L_base + intra L_intra + inter L_inter

    Rows carry `level`: 0 for ordinary pairs, 1 for a pair of prompts with one response, 2 for four rows whose `contrast`
    signs are (+, -, -, +): (x', y_w), (x', y_l), (x, y_w), (x, y_l). Level 2 rows are unlabelled.

    At policy = reference: log 2 (1 + intra + inter)
    Departs     for a policy log Z does not cancel between prompts: heuristic. L_inter is our reading
    Reference   arXiv:2505.12845
    """
    not_negative(intra=intra, inter=inter)
    levels = [partial(regularisers.pairs_of_level, of=level) for level in (0, 1)]
    return dpo(beta=beta).with_slots(ranking_terms=levels[0], regularisers={
        "intra": Term(pairwise.logistic, intra, terms=levels[1]),
        "inter": Term(regularisers.interaction, inter, terms=regularisers.contrast_groups)})


def spo_degree(*, beta=0.1, gamma=0.1, degrees=3):
    """Self-supervised preference optimisation: DPO plus recognising how much of a response was removed.

    L = DPO + gamma (L_deg of variants of y_w + L_deg of variants of y_l),   L_deg = mean cross-entropy

    Variants are unlabelled rows with `degree` 0..M-1 and `side` 1 (of the chosen) or 0 (of the rejected response).

    At policy = reference: log 2 + 2 gamma log M
    Departs     definition ours: no code was released
    Reference   Li et al., arXiv:2409.17791
    """
    not_negative(gamma=gamma)
    positive(degrees=degrees)
    head = masks.DegreeHead(degrees=degrees)
    return dpo(beta=beta).with_slots(regularisers={
        key: Term(head, gamma, reduce=term_mean, terms=partial(regularisers.degree_rows, of=of))
        for key, of in (("degree_chosen", 1), ("degree_rejected", 0))})


def irpo_ranking(*, beta=1.0):
    """In-context Ranking Preference Optimization: the items of one generated list, ranked by gain and position.

    L = (1/n) sum_i (2^y_i - 1)/log2(1 + p_i) softplus(q_i),   q_i = log mean over j != i of exp(beta (r_j - r_i))

    r = rho / |y|; rows are items with a 1-based `position`.

    At policy = reference: log 2 times the mean of (2^y_i - 1)/log2(1 + p_i)
    Departs     mean over lists; the source sums over the lists of a batch
    Reference   Wu et al., arXiv:2504.15477
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.mean_log_ratio, beta=beta), ranking=listwise.in_context,
                               reduce=group_sum)


def trpa(*, beta=0.1, factor=2.5, kappa=0.001):
    """Trust Region Preference Approximation: rule-based levels, all pairs of unequal level, KL to the old policy.

    L = mean over pairs softplus(-c beta (u_i - u_j)) + kappa mean over tokens (exp d - d - 1)

    u = rho / |y|, c = factor where response i is of level 1 (relevance -1) else 1, d = log pi_old - log pi.

    Relevance is minus the level: -1 correct, -2 well-formed but wrong, -3 unparsable, -4 format error.

    At policy = old = reference: log 2
    Departs     one mean over all pairs of the step, not of a micro-batch; a step without pairs has loss 0
    Reference   Su et al., arXiv:2504.04524
    """
    positive(beta=beta, factor=factor)
    not_negative(kappa=kappa)
    return PreferenceObjective(
        score=partial(scores.mean_log_ratio, beta=beta), ranking=pairwise.logistic, labels=as_given,
        margin=partial(margins.anisotropic, factor=factor), reduce=term_mean,
        regularisers={"trust": Term(regularisers.k3_old, kappa, reduce=term_mean)} if kappa else {})


