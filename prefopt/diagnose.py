"""Diagnostics: parts that read columns like any other and are averaged over labelled pairs."""
from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from prefopt.margins import difference
from prefopt.ops import log_ratios, masked, masked_mean, masked_sum
from prefopt.parts import Pairs, Part, Rows, Tokens


def _chosen(x):
    return x[..., :, None].expand(*x.shape, x.shape[-1])


def _rejected(x):
    return x[..., None, :].expand(*x.shape[:-1], x.shape[-1], x.shape[-1])


def pairs(score) -> Pairs:
    """1: the share of the step's weight that is on labelled pairs, which is 1 or, for unpaired feedback, 0."""
    return torch.ones_like(difference(score))


def margin_mean(score) -> Pairs:
    """s_w - s_l."""
    return difference(score)


def accuracy(score) -> Pairs:
    """1 where s_w > s_l, 1/2 where equal: implicit-reward accuracy for log-ratios."""
    return (torch.sign(difference(score)) + 1) / 2


def score_chosen(score) -> Pairs:
    return _chosen(score)


def score_rejected(score) -> Pairs:
    return _rejected(score)


def logp_chosen(logp, mask) -> Pairs:
    return _chosen(masked_sum(logp, mask))


def logp_rejected(logp, mask) -> Pairs:
    return _rejected(masked_sum(logp, mask))


def shift_chosen(logp, logp_ref, mask) -> Pairs:
    """log pi(y_w) - log pi_ref(y_w): negative where the chosen response has become less likely."""
    return _chosen(log_ratios(logp, logp_ref, mask).sum(-1))


def shift_rejected(logp, logp_ref, mask) -> Pairs:
    return _rejected(log_ratios(logp, logp_ref, mask).sum(-1))


def displaced(logp, logp_ref, mask) -> Pairs:
    """1 where the margin over the reference grew although the chosen response became less likely."""
    rho = log_ratios(logp, logp_ref, mask).sum(-1)
    return ((_chosen(rho) < 0) & (difference(rho) > 0)).double()


def ranking_policy(logp, mask) -> Pairs:
    """1 where log pi(y_w) >= log pi(y_l). Not the implicit-reward accuracy."""
    return (difference(masked_sum(logp, mask)) >= 0).double()


def ranking_policy_mean(logp, mask) -> Pairs:
    """The same with log-probabilities per token."""
    return (difference(masked_mean(logp, mask)) >= 0).double()


def ranking_reference(logp_ref, mask) -> Pairs:
    return (difference(masked_sum(logp_ref, mask)) >= 0).double()


def longer_chosen(mask) -> Pairs:
    """1 where the chosen response is longer, 1/2 where equally long."""
    return (torch.sign(difference(mask.bool().sum(-1).double())) + 1) / 2


def correct_and_longer(score, mask) -> Pairs:
    """Accuracy times 1[chosen longer], which `combined` turns into a length-controlled accuracy."""
    return accuracy(score) * longer_chosen(mask)


def correct_and_shorter(score, mask) -> Pairs:
    return accuracy(score) * (1 - longer_chosen(mask))


def kl_reference(token_kl, mask) -> Pairs:
    """Mean over the response tokens of both responses of KL(reference || policy), exact over the vocabulary."""
    kl = masked_mean(token_kl, mask)
    return (_chosen(kl) + _rejected(kl)) / 2


def idealised(logp_ref, mask, wins, *, beta) -> Pairs:
    """1 where the optimum of DPO would rank the pair as labelled.

    1[ (lr_w - lr_l) + (1 / beta) log(alpha / (1 - alpha)) > 0 ],   alpha = P(w beats l), 1 - alpha at least 1e-3

    Reference   Chen et al., Preference Learning Algorithms Do Not Learn Preference Rankings, arXiv:2405.19534, eq. 3
    """
    alpha = torch.nan_to_num(wins, nan=0.5).double()
    odds = alpha.clamp(min=1e-3).log() - (1 - alpha).clamp(min=1e-3).log()
    return (difference(masked_sum(logp_ref, mask)).double() + odds / beta > 0).double()


def desirable(relevance) -> Rows:
    return (relevance > 0.5).double()


def score_desirable(score, relevance) -> Rows:
    """Score times 1[desirable]; `combined` divides by the share of desirable responses."""
    return torch.where(relevance > 0.5, score, 0.0)


def score_undesirable(score, relevance) -> Rows:
    return torch.where(relevance > 0.5, 0.0, score)


def compared(margin) -> Pairs:
    """1, as `pairs` where there are no scores."""
    return torch.ones_like(margin)


def margin_of(margin) -> Pairs:
    """The margin itself, where no score stands behind it."""
    return margin


def margin_accuracy(margin) -> Pairs:
    """1 where the margin is positive, 1/2 where it is 0."""
    return (torch.sign(margin) + 1) / 2


# ------------------------------------------------------------------ of policies: tokens (N, T), averaged over the step's
def entropy_mean(entropy, mask) -> Tokens:
    """Entropy of the next-token distribution."""
    return masked(entropy, mask)


def kl_to_reference(logp, logp_ref, mask) -> Tokens:
    """exp(-d) - 1 + d, d = log pi - log pi_ref: KL(pi || pi_ref) on tokens of the policy, never negative."""
    d = log_ratios(logp, logp_ref, mask).clamp(-20, 20)
    return torch.expm1(-d) + d


def kl_to_old(logp, logp_old, mask) -> Tokens:
    """log pi_old - log pi: estimates KL(pi_old || pi); may be negative."""
    return -log_ratios(logp, logp_old, mask)


def rollout_gap(logp_old, logp_rollout, mask) -> Tokens:
    """|log pi_old - log pi_rollout|: what the sampler and the trainer think of the same token."""
    return log_ratios(logp_old, logp_rollout, mask).abs()


def ratio_mean(log_ratio, mask) -> Tokens:
    return masked(log_ratio, mask).exp() * mask.bool()


def ratio_square(log_ratio, mask) -> Tokens:
    return (2 * masked(log_ratio, mask)).exp() * mask.bool()


def advantage_size(advantage, mask) -> Tokens:
    """|A|."""
    return masked(advantage, mask).abs()


def above_range(log_ratio, advantage, mask, *, high) -> Tokens:
    """1 where A > 0 and the ratio is above 1 + high, so that clipping takes the gradient away."""
    return (mask.bool() & (advantage > 0) & (log_ratio.exp() > 1 + high)).double()


def below_range(log_ratio, advantage, mask, *, low) -> Tokens:
    """1 where A < 0 and the ratio is below 1 - low."""
    return (mask.bool() & (advantage < 0) & (log_ratio.exp() < 1 - low)).double()


POLICY_METRICS = {"entropy": entropy_mean, "kl/ref": kl_to_reference, "kl/old": kl_to_old, "gap/rollout": rollout_gap,
                  "ratio/mean": ratio_mean, "ratio/square": ratio_square, "advantage/size": advantage_size}


def policy_metrics(bounds: Mapping[str, object]) -> dict[str, Part]:
    """What is measured of a policy; of a surrogate that clips also how often it does."""
    sides = {"clip/high": (above_range, "high"), "clip/low": (below_range, "low")}
    return POLICY_METRICS | {key: partial(part, **{side: bounds[side]}) for key, (part, side) in sides.items() if side in bounds}


MARGIN_METRICS = {"pairs": compared, "accuracy": margin_accuracy, "margin": margin_of}
PAIR_METRICS = {"pairs": pairs, "accuracy": accuracy, "margin": margin_mean, "score/chosen": score_chosen,
                "score/rejected": score_rejected, "logp/chosen": logp_chosen, "logp/rejected": logp_rejected,
                "shift/chosen": shift_chosen, "shift/rejected": shift_rejected, "displaced": displaced,
                "ranking/policy": ranking_policy, "ranking/policy_per_token": ranking_policy_mean,
                "ranking/reference": ranking_reference, "length/chosen_longer": longer_chosen,
                "length/correct_and_longer": correct_and_longer, "length/correct_and_shorter": correct_and_shorter}
ROW_METRICS = {"rows/desirable": desirable, "rows/score_desirable": score_desirable,
               "rows/score_undesirable": score_undesirable}
BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)
EVALUATION_METRICS = {"kl/ref": kl_reference, **{f"ranking/idealised@{b:g}": partial(idealised, beta=b) for b in BETAS}}


def combined(sums: dict[str, float]) -> dict[str, float]:
    """Metrics that are ratios of weighted sums, and spreads over betas; the sums they are made of are dropped.

    >>> combined({"length/chosen_longer": .75, "length/correct_and_longer": .75, "length/correct_and_shorter": 0.})
    {'length/chosen_longer': 0.75, 'accuracy/length_controlled': 0.5}
    """
    paired = sums.get("pairs", 1.0) > 0
    if "ratio/square" in sums:                                # effective sample size, as a share of the tokens
        sums = {**sums, "ratio/effective": sums["ratio/mean"] ** 2 / max(sums["ratio/square"], 1e-30)}
    about_pairs = () if paired else (*PAIR_METRICS, *EVALUATION_METRICS)
    helpers = ("pairs", "length/correct", "rows/", "ranking/idealised@", "ratio/square")
    out = {k: v for k, v in sums.items() if not k.startswith(helpers) and k not in about_pairs}
    if paired and "length/correct_and_longer" in sums:
        longer = sums["length/chosen_longer"]
        sides = [sums[f"length/correct_and_{side}"] / share for side, share in
                 (("longer", longer), ("shorter", 1 - longer)) if share > 1e-9]
        out["accuracy/length_controlled"] = sum(sides) / len(sides) if sides else 0.0
    if not paired and "rows/score_desirable" in sums:
        share = sums["rows/desirable"]
        for name, part in (("desirable", share), ("undesirable", 1 - share)):
            if part > 1e-9:
                out[f"score/{name}"] = sums[f"rows/score_{name}"] / part
    ideal = sorted(v for k, v in sums.items() if k.startswith("ranking/idealised@"))
    if paired and ideal:
        out.update({"ranking/idealised_min": ideal[0], "ranking/idealised_median": ideal[len(ideal) // 2],
                    "ranking/idealised_max": ideal[-1]})
        out["ranking/gap"] = out["ranking/idealised_median"] - out.get("ranking/policy", 0.0)
    return out
