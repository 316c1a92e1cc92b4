"""Losses of reward models as functions of plain tensors, without a batch or a model: the parts of `prefopt`, averaged.

Scores are (B) or (B, K), embeddings (B, D) or (B, K, D); every loss is the mean over the batch unless it says otherwise.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefopt import annotations, listwise, margins, masks, pairwise, pointwise
from prefopt.ops import upcast
from rewards.clicks import dla, mnar, mnar_non_negative

__all__ = ["anyloss", "bradley_terry", "davidson", "dice", "dla", "gaussian", "general_preference", "general_preference_scores",
           "implicit_ce", "implicit_dpo", "implicit_kto", "implicit_kto_canonical", "implicit_nca", "mnar",
           "mnar_non_negative", "ordinal", "ordinal_penalty", "plackett_luce", "probit"]


def everywhere(x: Tensor) -> Tensor:
    """All slots of (B, K) scores hold a response."""
    return torch.ones(x.shape, dtype=torch.bool, device=x.device)


# ------------------------------------------------------------------------------------------------- pairs and lists
def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, label: Tensor | float = 1.0,
                  tau: float = 1.0, centring: float = 0.0) -> Tensor:
    """Bradley-Terry loss of pairs.

    L = mean of -p log sigmoid(D) - (1 - p) log sigmoid(-D) + centring (c + r)^2,   D = (c - r - margin) / tau

    label       p, the probability that `chosen` is the better one; 1 - eps smooths labels
    Edge        c = r gives log 2; finite at any difference
    Reference   Ouyang et al., arXiv:2203.02155; TRL RewardTrainer; GPM's `PairWiseLoss` (tau)

    >>> bradley_terry(torch.tensor([1.]), torch.tensor([0.]))
    tensor(0.3133)
    """
    chosen, rejected = upcast(chosen), upcast(rejected)
    gap = (chosen - rejected - margin) / tau
    loss = label * pairwise.logistic(gap) + (1 - label) * pairwise.logistic(-gap)
    return (loss + centring * (chosen + rejected) ** 2).mean()


def plackett_luce(scores: Tensor, relevance: Tensor) -> Tensor:
    """Plackett-Luce loss of lists (B, K), ordered by relevance; equal relevances are not compared.

    L = mean over lists of -sum_k [ s_(k) - log sum_{j >= k} exp s_(j) ]

    Edge        K = 2 is `bradley_terry`
    Reference   Plackett 1975

    >>> plackett_luce(torch.tensor([[0., 1.]]), torch.tensor([[0., 1.]]))
    tensor(0.3133)
    """
    return listwise.list_mle(upcast(scores), relevance, everywhere(scores)).mean()


def davidson(first: Tensor, second: Tensor, label: Tensor, *, nu: Tensor | float = 1.0) -> Tensor:
    """Bradley-Terry loss with ties: label 1 where the first is better, 0 where the second is, 1/2 for a tie.

    P(tie) = nu sqrt(e^a e^b) / (e^a + e^b + nu sqrt(e^a e^b))

    Edge        nu -> 0 without ties is `bradley_terry`
    Reference   Davidson 1970

    >>> davidson(torch.zeros(2), torch.zeros(2), torch.tensor([1., .5]))        # log 3 for both
    tensor(1.0986)
    """
    wins = torch.stack([torch.stack([torch.zeros_like(label), label], -1),
                        torch.stack([1 - label, torch.zeros_like(label)], -1)], -2)
    margin = margins.difference(torch.stack([upcast(first), upcast(second)], -1))
    return (wins * pairwise.davidson(margin, wins, nu=nu)).sum((-1, -2)).mean()


def gaussian(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Logistic loss of uncertain rewards (B, 2): mu and log s of both responses.

    L = mean of -log sigmoid( (mu_w - mu_l) / sqrt(1 + pi (s_w^2 + s_l^2) / 8) )

    Edge        log s is clamped to [-5, 2]
    Reference   PEARL, Zero-shot Cross-task Preference Alignment

    >>> gaussian(torch.tensor([[1., -9.]]), torch.tensor([[0., -9.]]))
    tensor(0.3133)
    """
    return pairwise.logistic(margins.gaussian(torch.stack([chosen, rejected], -2))[..., 0, 1]).mean()


def probit(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Normal-link loss of uncertain rewards (B, 2): mu and log s of both responses.

    L = mean of -log Phi( (mu_w - mu_l) / sqrt(s_w^2 + s_l^2) )

    Edge        log s is clamped to [-5, 2]
    Reference   PEARL, Zero-shot Cross-task Preference Alignment

    >>> probit(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(0.6931)
    """
    return pairwise.probit(margins.gaussian_probit(torch.stack([chosen, rejected], -2))[..., 0, 1]).mean()


# ------------------------------------------------------------------------------------------------- general preference
def general_preference_scores(embeddings: Tensor, gate: Tensor | None = None, *, normalise: bool = False) -> Tensor:
    """Scores s(i > j) of all pairs of K embeddings (..., K, 2k), (..., K, K); the gate is (..., k), one for a prompt.

    s(i > j) = sum_l gate_l (v_i[2l-1] v_j[2l] - v_i[2l] v_j[2l-1])

    Edge        exactly antisymmetric; `normalise` gives every embedding length 1
    Reference   Zhang et al., GPM, arXiv:2410.02197

    >>> general_preference_scores(torch.tensor([[2., 1.], [0., 1.]]))
    tensor([[ 0.,  2.],
            [-2.,  0.]])
    """
    v = (masks.unit_embedding if normalise else masks.raw_embedding)(embeddings)
    gate = masks.even_gate(v) if gate is None else gate[..., None, :].expand(*v.shape[:-1], -1)
    return margins.general_preference(v, gate, tau=1.0)


def general_preference(chosen: Tensor, rejected: Tensor, gate: Tensor | None = None, margin: Tensor | float = 0.0, *,
                       tau: float = 0.1, normalise: bool = False) -> Tensor:
    """General preference loss of pairs of embeddings (B, 2k).

    L = mean of -log sigmoid( (s(w > l) - margin) / tau )

    Edge        v = (r, 1), tau = 1 is `bradley_terry`
    Reference   Zhang et al., GPM, arXiv:2410.02197

    >>> general_preference(torch.tensor([[1., 1.]]), torch.tensor([[0., 1.]]), tau=1.)
    tensor(0.3133)
    """
    scores = general_preference_scores(torch.stack([chosen, rejected], -2), gate, normalise=normalise)[..., 0, 1]
    return pairwise.logistic((scores - margin) / tau).mean()


# ------------------------------------------------------------------------------------------------- implicit rewards
def implicit_ce(log_ratio: Tensor, label: Tensor, *, beta: float = 0.05) -> Tensor:
    """Cross-entropy of an implicit reward; `log_ratio` is that of the whole response.

    L = mean of -l log sigmoid(beta rho) - (1 - l) log sigmoid(-beta rho)

    Reference   Yuan et al., arXiv:2412.01981

    >>> implicit_ce(torch.zeros(2), torch.tensor([1., 0.]))
    tensor(0.6931)
    """
    return pointwise.cross_entropy(beta * upcast(log_ratio), label).mean()


def implicit_dpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.05) -> Tensor:
    """DPO on log-ratios.

    L = mean of -log sigmoid(beta (rho_w - rho_l))

    Reference   Yuan et al., arXiv:2412.01981

    >>> implicit_dpo(torch.tensor([20.]), torch.tensor([0.]))
    tensor(0.3133)
    """
    return pairwise.logistic(beta * (upcast(chosen) - upcast(rejected))).mean()


def implicit_kto(chosen: Tensor, rejected: Tensor, *, beta: float = 0.05) -> Tensor:
    """KTO as released with implicit process rewards: reference points are the batch's own means, with gradient.

    L = mean over all 2 B of 1 - sigmoid(beta (rho_w - z_l)) and 1 - sigmoid(beta (z_w - rho_l)),   z = max(0, mean rho)

    Reference   Yuan et al., arXiv:2412.01981; PRIME-RL/ImplicitPRM

    >>> implicit_kto(torch.zeros(2), torch.zeros(2))
    tensor(0.5000)
    """
    chosen, rejected = upcast(chosen), upcast(rejected)
    z_w, z_l = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
    return torch.cat([torch.sigmoid(beta * (z_l - chosen)), torch.sigmoid(beta * (rejected - z_w))]).mean()


def implicit_kto_canonical(log_ratio: Tensor, label: Tensor, baseline: Tensor | float, *, beta: float = 0.05,
                           desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    """KTO with one reference point, without gradient: z0 = max(0, mean rho of mismatched responses).

    L = mean of lambda_D (1 - sigmoid(beta (rho - z0))) or lambda_U (1 - sigmoid(beta (z0 - rho)))

    Reference   Ethayarajh et al., KTO, arXiv:2402.01306

    >>> implicit_kto_canonical(torch.zeros(2), torch.tensor([1., 0.]), 0.)
    tensor(0.5000)
    """
    score = beta * upcast(log_ratio)
    point = torch.as_tensor(beta * baseline, dtype=score.dtype, device=score.device).detach()
    return pointwise.kto(score, label, point, desirable=desirable, undesirable=undesirable).mean()


def implicit_nca(chosen: Tensor, rejected: Tensor, *, beta: float = 0.05) -> Tensor:
    """Noise-contrastive alignment on pairs.

    L = mean of -log sigmoid(R_w) - (1/2) log sigmoid(-R_w) - (1/2) log sigmoid(-R_l),   R = beta rho

    Reference   Chen et al., arXiv:2402.05369

    >>> implicit_nca(torch.zeros(1), torch.zeros(1))                # 2 log 2
    tensor(1.3863)
    """
    score = beta * torch.stack([upcast(chosen), upcast(rejected)], -1)
    return pointwise.nca(score, torch.tensor([1.0, 0.0], device=score.device), everywhere(score)).sum(-1).mean()


# ------------------------------------------------------------------------------------------------- grades
def ordinal(features: Tensor, weights: Tensor, thresholds: Tensor, label: Tensor) -> Tensor:
    """Cumulative-logit loss of grades 1..K, with weights (K - 1, d) of their own for every threshold (K - 1).

    L = mean of -log (F_y - F_{y-1}),   logit F_k = logit P(y <= k) = a_k + b_k z

    Edge        equal rows of weights: proportional odds; K = 2: logistic regression with the sign turned
    Reference   PRESTO, ICML 2023

    >>> ordinal(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1 / 3, 3.]).log(), torch.tensor([1, 2]))    # 1/4, 1/2
    tensor(1.0397)
    """
    logits = upcast(thresholds + features @ weights.mT)
    return pointwise.ordinal(-logits, label - 1, everywhere(label)).mean()


def ordinal_penalty(weights: Tensor) -> Tensor:
    """L1 norm of the first threshold's weights and of the steps between neighbours.

    sum_j |b_1j| + sum_{k >= 2} sum_j |b_kj - b_{k-1,j}|

    Reference   PRESTO, ICML 2023

    >>> ordinal_penalty(torch.tensor([[1., -2.], [1., 0.]]))
    tensor(5.)
    """
    return weights[0].abs().sum() + weights.diff(dim=0).abs().sum()


# ------------------------------------------------------------------------------------------------- rare positives
def dice(logits: Tensor, label: Tensor, *, alpha: float = 0.0, smooth: float = 1e-4, power: float = 1.0) -> Tensor:
    """Self-adjusting Dice loss of a whole batch (N).

    L = 1 - (2 sum q y + g) / (sum q^power + sum y^power + g),   q = (1 - p)^alpha p

    Reference   Li et al., arXiv:1911.02855

    >>> dice(torch.zeros(2), torch.tensor([1., 0.]), smooth=0.)
    tensor(0.5000)
    """
    return annotations.dice_loss(annotations.dice_sums(upcast(logits), label, everywhere(label), alpha, power), smooth)


def anyloss(logits: Tensor, label: Tensor, metric: Callable[[Tensor], Tensor] = annotations.f_loss, *,
            amplification: float = 73.0) -> Tensor:
    """AnyLoss of a whole batch (N): 1 - a metric of its soft confusion counts (TP, FN, FP, TN).

    A = sigmoid(amplification (p - 1/2)),   TP = sum y A,   FN = sum y (1 - A),   FP = sum (1 - y) A, ...

    metric      counts (4) -> loss: `prefopt.annotations.f_loss` (F1; partial(f_loss, beta=2)), `accuracy_loss`,
                `balanced_loss`, `geometric_loss`
    Reference   Han et al., AnyLoss, arXiv:2405.14745

    >>> anyloss(torch.tensor([9., -9., 9.]), torch.tensor([1., 0., 0.]))        # precision 1/2, recall 1: F1 = 2/3
    tensor(0.3333)
    """
    return metric(annotations.confusion(upcast(logits), label, everywhere(label), amplification))


