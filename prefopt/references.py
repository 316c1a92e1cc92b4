"""reference slot: what the reference policy does after each optimiser step."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

__all__ = ["Frozen", "Moving"]


@dataclass(frozen=True)
class Frozen:
    """The reference stays the initial policy. Its log-probabilities may be cached."""

    moves = False

    def step(self, step: int, reference: Iterable[Tensor], policy: Iterable[Tensor]) -> None:
        pass

    def spec(self) -> dict:
        return {}


@dataclass(frozen=True)
class Moving:
    """Every `every` optimiser steps the reference moves towards the policy.

    ref <- alpha policy + (1 - alpha) ref

    alpha       1 copies the policy (hard update); TR-DPO soft 0.5 to 0.6; with every = 1 it is an EMA of decay 1 - alpha
    every       steps between updates; TR-DPO 512
    Edge        in the parameter's own dtype: a bfloat16 reference with a small alpha loses updates, load it in float32;
                saved in checkpoints
    Reference   Gorbatovski et al., Learn Your Reference Model (TR-DPO), arXiv:2404.09656

    >>> ref, policy = torch.zeros(1), torch.ones(1)
    >>> Moving(alpha=0.25, every=2).step(2, [ref], [policy]); ref
    tensor([0.2500])
    """
    alpha: float = 0.6
    every: int = 512

    moves = True

    def __post_init__(self):
        if not 0 < self.alpha <= 1:
            raise ValueError(f"Moving: alpha must be in (0, 1], found {self.alpha}")
        if self.every < 1:
            raise ValueError(f"Moving: every must be at least 1 step, found {self.every}")

    @torch.no_grad()
    def step(self, step: int, reference: Iterable[Tensor], policy: Iterable[Tensor]) -> None:
        if step % self.every == 0:
            for r, p in zip(reference, policy, strict=True):
                r.lerp_(p.to(r.dtype), self.alpha)

    def spec(self) -> dict:
        return asdict(self)
