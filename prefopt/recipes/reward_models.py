"""Recipes for reward models: heads on pairs, lists, grades and steps, and log-ratios as rewards."""
from __future__ import annotations

from functools import partial

from prefopt import annotations, label_rules, listwise, margins, masks, pairwise, pointwise, regularisers, scores
from prefopt.objectives import PreferenceObjective, Term
from prefopt.recipes.checks import count, not_negative, positive
from prefopt.recipes.pairs import _smoothed, dpo
from prefopt.recipes.unpaired import kto, nca
from prefopt.reductions import group_mean, group_sum, term_mean


def bradley_terry(*, label_smoothing=0.0, target=0.0, centring=0.0):
    """Bradley-Terry reward model: DPO whose score is the output of a head.

    L = -(1 - eps) log sigmoid(D) - eps log sigmoid(-D) + centring (s_w + s_l)^2,   D = s_w - s_l - target (psi_w - psi_l)

    Lists: the mean over the pairs of a prompt, in one step. Several annotators: give their votes as `wins`, P(i preferred to
    j) (data_tools.labels.vote), and the loss is weighted both ways. Labels flipped at a known rate: labels: {unflip: ...}.

    label_smoothing   eps in [0, 0.5); the optimal difference is then logit(1 - eps)
    target      reward that one unit of the label must be worth: give a pair rated 3 to 1 as relevance 3 and 1
    centring    weight of the square of the sum, usually 0.01; without it rewards are free up to a constant per prompt
    Reference   Ouyang et al., arXiv:2203.02155; Touvron et al., arXiv:2307.09288 (target); Eisenstein et al., arXiv:2312.09244
    """
    not_negative(target=target, centring=centring)
    return PreferenceObjective(
        score=scores.head, ranking=pairwise.logistic, labels=_smoothed(label_smoothing), outputs=1,
        margin=partial(margins.graded, scale=target) if target else margins.difference,
        regularisers={"centring": Term(regularisers.centring, centring)} if centring else {})


def bt_list():
    """Plackett-Luce reward model of ranked lists.

    L = -sum_k [ s_(k) - log sum_{j >= k} exp s_(j) ],   responses from the best to the worst

    Reference   Plackett 1975; Xia et al., ListMLE, 2008
    """
    return bradley_terry().with_slots(ranking=listwise.list_mle, reduce=group_sum)


def bt_ties(*, nu=1.0):
    """Bradley-Terry reward model with ties, which are responses of equal relevance, after Davidson.

    L = -log (exp(m/2) / Z), of a tie -log (nu / Z),   Z = exp(m/2) + exp(-m/2) + nu,   m = s_w - s_l

    Ties given as wins of 1/2 want `labels: as_given`; a fixed nu is `ranking: {davidson: {nu: 1.0}}`.

    nu          where it starts; it is learned with the model
    Reference   Davidson 1970
    """
    positive(nu=nu)
    return bradley_terry().with_slots(labels=label_rules.tied, ranking=pairwise.Davidson(nu=nu))


def ordinal(*, levels=5, tie=0.01):
    """Reward model of graded feedback: cumulative logits whose outputs are tied softly (relaxed proportional odds).

    L = -log (S_y - S_{y+1}) + tie sum_{k >= 2} |f_k - f_{k-1}|,   S_k = P(y >= k) = sigmoid(f_k - a_k)

    The relevance is the grade, 0 to levels - 1. The score is the expected grade.

    levels      number of grades
    tie         weight of the L1 norm; large is proportional odds, 0 a model of its own for each threshold
    Departs     the norm is of differences of outputs, and not of weights
    Reference   PRESTO, Predicting Rare Events by Shrinking Towards Proportional Odds, ICML 2023
    """
    count(2, levels=levels)
    not_negative(tie=tie)
    return PreferenceObjective(
        score=scores.expected_grade, ranking=pointwise.ordinal, reduce=term_mean, outputs=levels - 1,
        providers={"grade_logits": masks.Thresholds(levels=levels)},
        regularisers={"tie": Term(regularisers.tied_outputs, tie, term_mean)} if tie and levels > 2 else {})


def gaussian(*, entropy=0.01, least=0.3):
    """Reward model with a mean and a spread, for labels that are noisier in some places than in others.

    L = -log sigmoid( (mu_w - mu_l) / sqrt(1 + pi (s_w^2 + s_l^2) / 8) ) + entropy max(0, log least - log s)

    The head gives mu and log s. The normal link is `margin: gaussian_probit, ranking: probit`.

    entropy     weight of the term against a spread of 0
    least       spread below which it counts
    Reference   PEARL, Zero-shot Cross-task Preference Alignment and Robust Reward Learning
    """
    not_negative(entropy=entropy)
    positive(least=least)
    return bradley_terry().with_slots(
        outputs=2, margin=margins.gaussian,
        regularisers={"entropy": Term(partial(regularisers.least_spread, least=least), entropy, term_mean)} if entropy else {})


def general_preference(*, dim=4, tau=0.1):
    """General preference model: an embedding per response, compared by a skew-symmetric operator; cycles fit.

    L = -log sigmoid( s(w, l) / tau ),   s(i, j) = sum_l (v_i[2l-1] v_j[2l] - v_i[2l] v_j[2l-1]),   |v| = 1

    dim         width of the embedding, even; 2 can hold a cycle but may not find it from a random start; 4 to 8 are usual
    tau         temperature: |s| is at most 1, so log-odds are at most 1 / tau
    Reference   Zhang et al., Beyond Bradley-Terry Models (GPM), arXiv:2410.02197
    """
    positive(tau=tau)
    count(2, dim=dim)
    if dim % 2:
        raise ValueError(f"dim must be even, found {dim}: an embedding is made of blocks of two dimensions")
    return PreferenceObjective(score=None, margin=partial(margins.general_preference, tau=tau), ranking=pairwise.logistic,
                               providers={"embedding": masks.unit_embedding, "gate": masks.even_gate}, outputs=dim)


def gpm_gated(*, dim=4, tau=0.1):
    """General preference model whose blocks are weighted by the prompt.

    L = -log sigmoid( s(w, l) / tau ),   s(i, j) = sum_l gate_l(x) (v_i[2l-1] v_j[2l] - v_i[2l] v_j[2l-1]),   |v| = 1

    gate = k softmax(G h / sqrt(width)) of the state h at the end of the prompt, k = dim / 2 blocks.

    dim         width of the embedding, even
    tau         temperature
    Reference   Zhang et al., Beyond Bradley-Terry Models (GPM), arXiv:2410.02197
    """
    made = general_preference(dim=dim, tau=tau)
    return made.with_slots(providers={**made.providers, "gate": masks.EigenvalueGate(blocks=dim // 2)})


def _per_aspect(part, terms, aspects, reduce):
    """An objective with the part for every aspect, and the terms that are labelled on it."""
    count(1, aspects=aspects)
    first, *rest = (Term(partial(part, aspect=k), reduce=reduce, terms=partial(terms, aspect=k)) for k in range(aspects))
    return PreferenceObjective(score=scores.mean_output, ranking=first.part, ranking_terms=first.terms, reduce=reduce,
                               outputs=aspects,
                               regularisers={f"aspect{k}": term for k, term in enumerate(rest, 1)})


def multi_objective(*, aspects=2):
    """Reward model with a head per aspect, by regression; labels may be missing.

    L = sum_k mean over rows labelled on aspect k of (f_k - a_k)^2

    `rewards` holds a label for each aspect of a response, NaN where there is none. A weight per aspect is the scale of its
    labels. Gating and verbosity: rewards.multi_objective.

    aspects     number of aspects
    Reference   Wang et al., ArmoRM, arXiv:2406.12845
    """
    return _per_aspect(pointwise.aspect_error, pointwise.observed_rows, aspects, term_mean)


def multi_preference(*, aspects=2):
    """Reward model with a head per aspect, by comparing the labels of each aspect; labels may be missing.

    L = sum_k mean over pairs with a_wk > a_lk of -log sigmoid(f_wk - f_lk)

    `rewards` as in `multi_objective`.

    aspects     number of aspects
    Reference   Wang et al., ArmoRM, arXiv:2406.12845; Bradley and Terry 1952
    """
    return _per_aspect(pairwise.aspect_logistic, pairwise.aspect_pairs, aspects, group_mean)


def implicit_ce(*, beta=0.05):
    """Implicit process reward model from outcomes: cross-entropy of the log-ratio.

    L = -l log sigmoid(beta rho) - (1 - l) log sigmoid(-beta rho)

    Responses need no pairs. Rewards of steps and tokens: rewards.implicit.

    beta        0.05
    At policy = reference: log 2
    Reference   Yuan et al., Free Process Rewards without Process Labels, arXiv:2412.01981
    """
    positive(beta=beta)
    return PreferenceObjective(score=partial(scores.log_ratio, beta=beta), ranking=pointwise.cross_entropy, reduce=term_mean)


def implicit_dpo(*, beta=0.05):
    """Implicit process reward model from pairs: DPO.

    L = -log sigmoid(beta (rho_w - rho_l))

    beta        0.05
    At policy = reference: log 2
    Reference   Yuan et al., arXiv:2412.01981
    """
    return dpo(beta=beta)


def implicit_kto(*, beta=0.05, desirable=1.0, undesirable=1.0):
    """Implicit process reward model by KTO, with its reference point of mismatched responses.

    L = lambda_D (1 - sigmoid(beta (rho - z0))) or lambda_U (1 - sigmoid(beta (z0 - rho)))

    beta        0.05
    desirable, undesirable   as in `kto`
    At policy = reference: mean of lambda / 2
    Departs     the released loss takes the batch's own chosen and rejected responses: rewards.losses.implicit_kto
    Reference   Yuan et al., arXiv:2412.01981; Ethayarajh et al., arXiv:2402.01306
    """
    return kto(beta=beta, desirable=desirable, undesirable=undesirable)


def implicit_nca(*, beta=0.05):
    """Implicit process reward model by noise-contrastive alignment.

    L = -sum_i [ p_i log sigmoid(beta rho_i) + (1/K) log sigmoid(-beta rho_i) ],   p = psi / sum psi

    beta        0.05
    At policy = reference: 2 log 2
    Reference   Yuan et al., arXiv:2412.01981; Chen et al., arXiv:2402.05369
    """
    return nca(beta=beta)


def process():
    """Process reward model: a head at every token, trained where a step ends.

    L = mean over steps of -a log sigmoid(v) - (1 - a) log sigmoid(-v),   v the head's output at the end of the step

    `step_label` is 1 for a step that is right or neutral, 0 for one that is wrong. The score is that of the worst step.

    Reference   Sun et al., Easy-to-Hard Generalization, arXiv:2403.09472; Lightman et al., arXiv:2305.20050
    """
    return PreferenceObjective(score=scores.lowest_step, ranking=pointwise.step_cross_entropy, reduce=term_mean, outputs=1,
                               ranking_terms=pointwise.step_tokens)


def outcome():
    """Outcome reward model: how likely a response is right.

    L = -l log sigmoid(s) - (1 - l) log sigmoid(-s)

    Reference   Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168
    """
    return PreferenceObjective(score=scores.head, ranking=pointwise.cross_entropy, reduce=term_mean, outputs=1)


def love(*, desirable=1.0, undesirable=1.0):
    """P[Love]: how likely a user reacts to the response, from logged reactions.

    L = -w1 l log sigmoid(s) - w0 (1 - l) log sigmoid(-s)

    Weights, or keeping a share of the negatives, move the intercept: rewards.clicks.unweighted and
    rewards.calibrate.corrected_logit move it back. That nobody reacted is not that nobody liked it: rewards.clicks.mnar.

    desirable, undesirable   w1, w0
    Reference   Reinforcement Learning from User Feedback, 2025
    """
    positive(desirable=desirable, undesirable=undesirable)
    return outcome().with_slots(ranking=partial(pointwise.weighted_cross_entropy, desirable=desirable,
                                                undesirable=undesirable))


def anyloss(*, amplification=73.0, beta=1.0):
    """Outcome reward model that maximises F_beta at the threshold 1/2, for rare positives.

    L = 1 - (1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP),   TP = sum l A, ...,   A = sigmoid(amplification (p - 1/2))

    Sums run over the whole optimiser step, which should hold both classes. The outputs are no probabilities. Other metrics
    are other annotations of `tangent`: `anyloss_accuracy`, `anyloss_balanced`, `anyloss_geometric`.

    amplification   73; large values have no gradient away from p = 1/2: start from a model trained as `outcome`
    beta        b: weight of recall
    Reference   Han et al., AnyLoss, arXiv:2405.14745
    """
    positive(amplification=amplification, beta=beta)
    return outcome().with_slots(ranking=pointwise.linearised, annotations={
        "tangent": partial(annotations.anyloss_f, amplification=amplification, beta=beta)})


def dice(*, alpha=0.0, smooth=1e-4):
    """Outcome reward model with the self-adjusting Dice loss, for rare positives.

    L = 1 - (2 sum q l + g) / (sum q + sum l + g),   q = (1 - p)^alpha p,   p = sigmoid(s)

    Sums run over the whole optimiser step, as in `anyloss`.

    alpha       0 is soft F1
    smooth      g
    Reference   Li et al., Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855
    """
    not_negative(alpha=alpha)
    positive(smooth=smooth)
    return outcome().with_slots(ranking=pointwise.linearised, annotations={
        "tangent": partial(annotations.dice, alpha=alpha, smooth=smooth)})


def tool_augmented(*, alpha=1.0, beta=1.0, omega=1.0):
    """Themis: a reward model that writes a trace of tool calls and a rationale, and grades the whole text.

    L = -log sigmoid(r_w - r_l) + alpha (N_tool + beta N_observation + omega N_rationale),   r = w . h at the end

    N is the mean of -log pi over the tokens of such segments in the step, of all responses. The model stays a language model,
    the head is beside it. Traces and their two-phase use: rewards.tool_augmented.

    alpha       weight of the likelihood of the trace; 0 is `bradley_terry` on a language model's last state
    beta        weight of the observations in it
    omega       weight of the rationales in it
    Departs     each N is a mean of its own; the released code has one mean over all of them: `tool_augmented_released`
    Reference   Li et al., Tool-Augmented Reward Modeling (Themis), arXiv:2310.01045
    """
    not_negative(alpha=alpha, beta=beta, omega=omega)
    weights = {"tool": alpha, "observation": alpha * beta, "rationale": alpha * omega}
    return PreferenceObjective(
        score=scores.RewardHead(), ranking=pairwise.logistic,
        regularisers={kind: Term(regularisers.token_nll, weight, term_mean, partial(regularisers.segment_tokens, of=number))
                      for number, (kind, weight) in enumerate(weights.items(), 1) if weight})


def tool_augmented_released(*, pair=0.5):
    """Themis as its code trains it: one mean over the tokens of all traces.

    L = -pair log sigmoid(r_w - r_l) + N,   N the mean of -log pi over all tokens of the step that are not question or answer

    pair        weight of the comparison
    Departs     the mean is over the step, however it is split; there over a micro-batch
    Reference   Li et al., arXiv:2310.01045; ernie-research/Tool-Augmented-Reward-Model `main.py`
    """
    not_negative(pair=pair)
    return tool_augmented(alpha=0.0).with_slots(weight=pair, regularisers={
        "trace": Term(regularisers.token_nll, 1.0, term_mean, regularisers.trace_tokens)})
