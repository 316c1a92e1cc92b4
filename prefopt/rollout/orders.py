"""In which order an on-policy run goes through its prompts: (prompts, epoch, seed) -> their numbers, each once."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data_tools.records import Group

__all__ = ["by_field", "shuffled"]

Order = Callable[[Sequence[Group], int, int], np.ndarray]


def shuffled(prompts: Sequence[Group], epoch: int, seed: int) -> np.ndarray:
    """All prompts in an order of (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(len(prompts))


def by_field(*, field: str, descending: bool = False) -> Order:
    """A curriculum: the first epoch goes through the prompts by a number in their meta, ties and later epochs shuffled."""
    def order(prompts: Sequence[Group], epoch: int, seed: int) -> np.ndarray:
        missing = next((g for g in prompts if not isinstance(g.meta.get(field), (int, float))), None)
        if missing is not None:
            raise ValueError(f"{missing.meta.get('place', 'a prompt')} has no number {field!r}, by which rollout.order sorts: "
                             f"its fields are {', '.join(missing.meta) or 'none'}")
        found = shuffled(prompts, epoch, seed)
        values = np.array([prompts[i].meta[field] for i in found])
        return found if epoch else found[np.argsort(-values if descending else values, kind="stable")]
    return order


class Ordered:
    """Groups by their place in the stream of all epochs; an epoch is ordered once."""

    def __init__(self, groups: Sequence[Group], order: Order = shuffled, seed: int = 0):
        self.groups, self.order, self.seed, self.known = groups, order, seed, (-1, np.arange(0))

    def __getitem__(self, place: int) -> Group:
        epoch, inside = divmod(place, len(self.groups))
        if self.known[0] != epoch:
            self.known = epoch, self.order(self.groups, epoch, self.seed)
        return self.groups[int(self.known[1][inside])]
