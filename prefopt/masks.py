"""providers of token masks, and heads: columns of a row made by modules that train with the policy."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.ops import upcast
from prefopt.parts import PartModule, Rows

__all__ = ["DegreeHead", "EigenvalueGate", "Thresholds", "TokenMask", "activation", "even_gate", "full_mask", "no_mask",
           "raw_embedding", "same_mask", "unit_embedding"]


def activation(activation_mask) -> Tensor:
    """MaPO's mask: the reference's activations rescaled to [0, 1] per response; no gradient.

    mu_t = md_t = mean over tensors of (a_t - min a) / (max a - min a)

    Gradient    none
    Edge        where max a = min a (one token, say) the mask is 1
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102

    >>> activation(torch.tensor([[0.5]]))
    tensor([[0.5000]])
    """
    return activation_mask.detach()


def same_mask(reward_mask) -> Tensor:
    """One mask for both (SparsePO's common mask).

    md_t = mu_t

    Edge        its L1 norm is that of the one network, counted once
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102

    >>> same_mask(torch.tensor([[0.5]]))
    tensor([[0.5000]])
    """
    return reward_mask


def full_mask(mask) -> Tensor:
    """1 on every response token.

    mu_t = m_t

    Edge        0 elsewhere
    Reference   Zeng et al., TDPO, arXiv:2404.11999 (both masks full)

    >>> full_mask(torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    return mask.to(torch.get_default_dtype())


def no_mask(mask) -> Tensor:
    """0 everywhere.

    mu_t = 0

    Edge        as `kl_mask` it leaves the log-ratio alone: DPO
    Reference   -

    >>> no_mask(torch.tensor([[True, False]]))
    tensor([[0., 0.]])
    """
    return torch.zeros_like(mask, dtype=torch.get_default_dtype())


class TokenMask(PartModule):
    """Mask learned from the reference's hidden states of layers 1..L, (N, T), not negative.

    m_t = relu( sum_l w_l relu( a_l . LayerNorm(h_t^l) + b_l ) ) * mask_t,   one LayerNorm shared by all layers

    dropout     on both relu outputs; the source trains with 0.01, here 0 so that micro-batches agree exactly
    Gradient    into the mask's parameters only; the reference is frozen
    Edge        weights start positive and the inner bias at 1, so that no token starts dead
    Departs     that start; the source keeps torch's defaults, which leave about half of all masks dead
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102; huawei-noah/HEBO `simple_all`

    >>> mask = TokenMask(); mask.setup(layers=1, width=2)
    >>> mask(torch.zeros(1, 1, 1, 2), torch.ones(1, 1)).shape
    torch.Size([1, 1])
    """

    def __init__(self, *, dropout=0.0):
        nn.Module.__init__(self)
        self.dropout = dropout

    def setup(self, *, layers: int, width: int) -> None:
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Parameter(torch.randn(layers, width) * 0.1 / width ** 0.5)
        self.bias = nn.Parameter(torch.ones(layers))
        self.outer = nn.Parameter(torch.full((layers,), 1.0 / layers))

    def forward(self, states_ref, mask) -> Tensor:
        self.check_setup()
        states = torch.where(mask.bool()[..., None, None], states_ref.detach().to(self.inner.dtype), 0.0)
        layer = F.dropout((self.norm(states) * self.inner).sum(-1).add(self.bias).relu(), self.dropout, self.training)
        out = F.dropout((layer * self.outer).sum(-1).relu(), self.dropout, self.training)
        return torch.where(mask.bool(), out, 0.0)

    def spec(self) -> dict:
        return {"dropout": self.dropout}


class DegreeHead(PartModule):
    """Classifier of the preference degree of a thinned variant, from the policy's last hidden state.

    l = -log softmax(W h + b)_degree

    degrees     M, the number of degrees; 3
    Gradient    through the head and the policy
    Edge        rows with degree -1 count 0; W = 0 at the start, so the loss starts at log M
    Reference   Li et al., Self-supervised Preference Optimization, arXiv:2409.17791 (definition ours: no code released)

    >>> head = DegreeHead(degrees=3); head.setup(layers=1, width=2)
    >>> head(torch.zeros(1, 1, 2), torch.tensor([[2]]))             # log 3
    tensor([[1.0986]], grad_fn=<ViewBackward0>)
    """

    def __init__(self, *, degrees=3):
        nn.Module.__init__(self)
        self.degrees = degrees

    def setup(self, *, layers: int, width: int) -> None:
        self.weight = nn.Parameter(torch.zeros(self.degrees, width))
        self.bias = nn.Parameter(torch.zeros(self.degrees))

    def forward(self, last_state, degree) -> Rows:
        self.check_setup()
        logits = last_state.to(self.weight.dtype) @ self.weight.T + self.bias
        target = degree.clamp(min=0).reshape(-1).long()
        return F.cross_entropy(logits.reshape(-1, self.degrees), target, reduction="none").view(degree.shape)

    def spec(self) -> dict:
        return {"degrees": self.degrees}


def raw_embedding(outputs) -> Tensor:
    """Preference embedding as the head gives it.

    v = outputs

    Edge        its length scales all preferences
    Reference   Zhang et al., GPM, arXiv:2410.02197 (the released trainer)

    >>> raw_embedding(torch.tensor([[3., 4.]]))
    tensor([[3., 4.]])
    """
    return upcast(outputs)


def unit_embedding(outputs) -> Tensor:
    """Preference embedding of length 1, so that |s| is at most the largest gate.

    v = outputs / |outputs|

    Edge        lengths below 1e-6 count as 1e-6: a zero vector stays zero
    Reference   Zhang et al., GPM, arXiv:2410.02197 (the released models)

    >>> unit_embedding(torch.tensor([[3., 4.]]))
    tensor([[0.6000, 0.8000]])
    """
    return F.normalize(upcast(outputs), dim=-1, eps=1e-6)


def even_gate(outputs) -> Tensor:
    """No gate: every block of two dimensions weighs 1.

    lambda_l = 1

    Edge        -
    Reference   Zhang et al., GPM, arXiv:2410.02197

    >>> even_gate(torch.zeros(1, 4))
    tensor([[1., 1.]])
    """
    return torch.ones_like(upcast(outputs)[..., ::2])


class EigenvalueGate(PartModule):
    """Weights of the blocks of a general preference that depend on the prompt, (N, k).

    lambda = k softmax(G h / sqrt(width)),   h the state at the end of the prompt

    blocks      k, half the width of the embedding
    Gradient    through G and the model
    Edge        G = 0 at the start, so that training begins without a gate; the mean gate is 1
    Departs     the released inference code has softmax(G h), without the factors: G here is G sqrt(width) there, tau k times
    Reference   Zhang et al., GPM, arXiv:2410.02197 (the released trainer)

    >>> gate = EigenvalueGate(blocks=2); gate.setup(layers=1, width=3)
    >>> gate(torch.ones(1, 3)).detach()
    tensor([[1., 1.]])
    """

    def __init__(self, *, blocks=1):
        nn.Module.__init__(self)
        self.blocks = blocks

    def setup(self, *, layers: int, width: int) -> None:
        self.weight = nn.Parameter(torch.zeros(self.blocks, width))

    def forward(self, prompt_state) -> Tensor:
        self.check_setup()
        state = prompt_state.to(self.weight.dtype)
        return self.blocks * (state @ self.weight.T / state.shape[-1] ** 0.5).softmax(-1)

    def spec(self) -> dict:
        return {"blocks": self.blocks}


class Thresholds(PartModule):
    """Cumulative logits of an ordinal reward model, (N, K - 1).

    g_k = logit P(y >= k) = f_k - a_k,   f = outputs, k = 1..K-1

    levels      K, the number of grades
    Gradient    through outputs and the thresholds a
    Edge        a_k starts at logit(k / K): outputs of 0 make all grades equally likely
    Reference   PRESTO, Predicting Rare Events by Shrinking Towards Proportional Odds, ICML 2023

    >>> grades = Thresholds(levels=4); grades.setup(layers=1, width=1)
    >>> grades(torch.zeros(1, 3)).sigmoid().detach()
    tensor([[0.7500, 0.5000, 0.2500]])
    """

    def __init__(self, *, levels=5):
        nn.Module.__init__(self)
        self.levels = levels

    def setup(self, *, layers: int, width: int) -> None:
        self.thresholds = nn.Parameter(torch.logit(torch.arange(1, self.levels) / self.levels))

    def forward(self, outputs) -> Tensor:
        self.check_setup()
        return outputs.to(self.thresholds.dtype) - self.thresholds

    def spec(self) -> dict:
        return {"levels": self.levels}
