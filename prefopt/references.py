"""reference slot: what the reference policy does after each optimiser step."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import final

import torch
from torch import Tensor

from prefopt.ops import upcast

__all__ = ["Extrapolated", "Frozen", "Moving"]


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


@final
class Extrapolated:
    """Every `every` optimiser steps policy and reference jump ahead, in the direction of the last two solutions (APO).

    hat = policy;   policy, ref <- hat + alpha (hat - hat_before);   hat_before starts as the reference

    alpha       momentum in [0, 1); APO 0.3. 0 copies the policy, as Moving(alpha=1)
    every       optimiser steps of an iteration, which solves for `hat` against the reference
    Edge        exact for log-linear policies, whose log-probabilities extrapolate with the parameters. Adapters do not
                (products of matrices): merge them first. The last policy is extrapolated too; with alpha = 0 it is not.
                Keeps one more copy of what trains
    Reference   He et al., Accelerated Preference Optimization, arXiv:2410.06293

    >>> ref, policy, rule = torch.zeros(1), torch.ones(1), Extrapolated(alpha=0.5, every=1)
    >>> rule.step(1, [ref], [policy]); policy += 1; rule.step(2, [ref], [policy]); ref                  # 2.5 + (2.5 - 1) / 2
    tensor([3.2500])
    """

    moves = True

    def __init__(self, *, alpha=0.3, every=512):
        if not 0 <= alpha < 1:
            raise ValueError(f"Extrapolated: alpha must be in [0, 1), found {alpha}")
        if every < 1:
            raise ValueError(f"Extrapolated: every must be at least 1 step, found {every}")
        self.alpha, self.every = alpha, every
        self.before: list[Tensor] = []

    @torch.no_grad()
    def step(self, step: int, reference: Iterable[Tensor], policy: Iterable[Tensor]) -> None:
        reference = list(reference)
        self.before = self.before or [r.clone() for r in reference]
        if step % self.every == 0:
            for r, p, before in zip(reference, policy, self.before, strict=True):
                solved = p.clone()
                p.copy_(upcast(p) + self.alpha * (upcast(p) - upcast(before)))
                before.copy_(solved)
                r.copy_(p)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.spec() == other.spec()

    def spec(self) -> dict:
        return {"alpha": self.alpha, "every": self.every}

    def state_dict(self) -> dict:
        return {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        self.before = state["before"]
