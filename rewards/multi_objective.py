"""Several aspects made into one reward: regression on frozen features, verbosity taken out, a gate on the prompt (ArmoRM)."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Gate", "debiased", "ridge", "ridge_by_validation", "train_gate", "verbosity_penalties"]

ALPHAS = tuple(10.0 ** k for k in range(-4, 5))
PENALTIES = (0, .01, .025, .05, .075, .1, .125, .15, *(round(.2 + .05 * i, 2) for i in range(16)))


# ------------------------------------------------------------------------------------------------- regression
def ridge(features: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Weights of one aspect, without an intercept.

    w = (X^T X + alpha I)^-1 X^T y

    Reference   Wang et al., ArmoRM, arXiv:2406.12845

    >>> ridge(torch.eye(2), torch.tensor([2., 4.]), 1.0)
    tensor([1., 2.])
    """
    gram = features.mT @ features + alpha * torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    return torch.linalg.solve(gram, features.mT @ labels)


def ridge_by_validation(features: Tensor, labels: Tensor, *, alphas: Sequence[float] = ALPHAS, held_out: float = 0.2,
                        seed: int = 0) -> tuple[Tensor, list[float]]:
    """Weights (M, D) of every aspect of labels (N, M) with NaN where one is missing, and the alpha chosen for each.

    alpha minimises the squared error on a share of the aspect's rows; the weights are those of the other rows.

    Edge        an aspect with fewer than two labels is an error
    Reference   Wang et al., ArmoRM, arXiv:2406.12845, stage 1
    """
    weights, chosen = [], []
    for aspect in range(labels.shape[1]):
        rows = (~torch.isnan(labels[:, aspect])).nonzero().squeeze(1)
        if len(rows) < 2:
            raise ValueError(f"aspect {aspect} has {len(rows)} labels, and its regression needs two at least: leave the aspect "
                             f"out, or label more responses")
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)]
        cut = max(1, round(held_out * len(rows)))
        (x, y), (test, truth) = ((features[part], labels[part, aspect]) for part in (rows[cut:], rows[:cut]))
        fits = [ridge(x, y, alpha) for alpha in alphas]
        errors = [float(((test @ w - truth) ** 2).mean()) for w in fits]
        best = int(np.argmin(errors))
        weights.append(fits[best])
        chosen.append(alphas[best])
    return torch.stack(weights), chosen


# ------------------------------------------------------------------------------------------------- verbosity
def verbosity_penalties(rewards: np.ndarray, verbosity: int, *, threshold: float = 0.03,
                        candidates: Sequence[float] = PENALTIES) -> np.ndarray:
    """How much of the verbosity reward to take from each aspect, (M), from rewards (N, M) of a reference set.

    p_k = the smallest p with Spearman(r_k - p r_v, r_v) <= threshold,   1 where none does;   p_v = 1

    verbosity   v, which aspect it is
    Reference   Wang et al., ArmoRM, arXiv:2406.12845

    >>> r = np.arange(5.)
    >>> verbosity_penalties(np.stack([r, 0.5 * r, r], 1), 2)       # r - 0.95 r still grows with r; 0.5 r - 0.5 r does not
    array([1. , 0.5, 1. ])
    """
    from scipy.stats import rankdata
    verbose = rewards[:, verbosity]
    place = rankdata(verbose)

    def correlation(x: np.ndarray) -> float:
        """Spearman's, 0 for a constant."""
        ranks = rankdata(x)
        return 0.0 if np.ptp(ranks) == 0 or np.ptp(place) == 0 else float(np.corrcoef(ranks, place)[0, 1])

    out = np.ones(rewards.shape[1])
    for k in range(len(out)):
        if k != verbosity:
            out[k] = next((p for p in candidates if correlation(rewards[:, k] - p * verbose) <= threshold), 1.0)
    return out


def debiased(rewards: Tensor, penalties: Tensor, verbosity: int) -> Tensor:
    """Rewards (..., M) without what verbosity explains; the aspect of verbosity itself becomes 0.

    r'_k = r_k - p_k r_v

    Reference   Wang et al., ArmoRM, arXiv:2406.12845

    >>> debiased(torch.tensor([[3., 2.]]), torch.tensor([0.5, 1.]), 1)
    tensor([[2., 0.]])
    """
    return rewards - penalties * rewards[..., verbosity, None]


# ------------------------------------------------------------------------------------------------- gate
class Gate(nn.Module):
    """Weights of the aspects from the prompt (N, D) -> (N, M).

    g(u) = s softmax( MLP(u) / T )

    hidden, layers   units and number of hidden layers
    temperature      T; large gives all aspects the same weight
    The scale s is learned, from 1.

    Reference   Wang et al., ArmoRM, arXiv:2406.12845, stage 2
    """

    def __init__(self, width: int, aspects: int, *, hidden: int = 1024, layers: int = 3, dropout: float = 0.2,
                 temperature: float = 10.0):
        super().__init__()
        sizes = [width, *[hidden] * layers]
        inner = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout))]
        self.mlp = nn.Sequential(*inner, nn.Linear(sizes[-1], aspects))
        self.scale, self.temperature = nn.Parameter(torch.ones(())), temperature

    def forward(self, prompts: Tensor) -> Tensor:
        return self.scale * (self.mlp(prompts) / self.temperature).softmax(-1)


def train_gate(gate: Gate, prompts: Tensor, chosen: Tensor, rejected: Tensor, *, steps: int = 2000, batch: int = 1024,
               lr: float = 1e-3, seed: int = 0) -> Gate:
    """The gate fitted to preferences on the (debiased) rewards (N, M) of both responses.

    L = mean of -log sigmoid( sum_k g_k(u) (r_wk - r_lk) )

    AdamW with a cosine schedule; features and rewards are given, so only the gate moves.

    Departs     the rewards are the debiased ones; the released training computes them and then takes the raw ones
    Reference   Wang et al., ArmoRM, arXiv:2406.12845, stage 2
    """
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random, gap = torch.Generator().manual_seed(seed), chosen - rejected
    gate.train()
    for _ in range(steps):
        rows = torch.randint(len(gap), (min(batch, len(gap)),), generator=random).to(gap.device)
        loss = -F.logsigmoid((gate(prompts[rows]) * gap[rows]).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return gate.eval()
