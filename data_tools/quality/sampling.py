"""Samples that depend on the content alone: neither on the order of the data nor on how it is cut into files."""
from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from data_tools.labels import wins_of
from data_tools.quality.noise import extremes
from data_tools.quality.words import digest, identity
from data_tools.records import Group, Response

__all__ = ["Sample", "Stratum", "maker", "outcome"]

Stratum = Callable[[Group, list], str]                        # of a group and its findings

STRATA = 40


@dataclass
class Sample:
    """The `size` groups of each stratum that a hash draws; beyond STRATA strata the rest are one."""
    size: int
    stratum: Stratum
    seed: int = 0
    heaps: dict[str, list] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)

    def see(self, number: int, group: Group, flags: list) -> None:
        name = self.stratum(group, flags)
        name = name if name in self.heaps or len(self.heaps) < STRATA else "others"
        heap = self.heaps.setdefault(name, [])
        self.counts[name] += 1
        key = -digest(f"{self.seed} {identity(group)}")
        if len(heap) < self.size:
            heapq.heappush(heap, (key, -number, group, flags))
        elif (key, -number) > heap[0][:2]:
            heapq.heapreplace(heap, (key, -number, group, flags))

    def groups(self) -> list[tuple[str, int, Group, list]]:
        """(stratum, number, group, flags), in the order of the data."""
        return sorted(((name, -n, group, flags) for name, heap in self.heaps.items() for _, n, group, flags in heap),
                      key=lambda item: item[1])


def maker(response: Response) -> str:
    """What made the response: `model` or `generator` of its meta, else nothing."""
    return str(response.meta.get("model") or response.meta.get("generator") or "")


def outcome(group: Group, flags: list) -> str:
    """The first flag, else which model is preferred, or that none is."""
    if flags:
        return f"flag: {flags[0].kind}"
    found = extremes(wins_of(group))
    if found:
        return f"preferred: {name}" if (name := maker(group.responses[found[0][0]])) else "preferred"
    labelled = group.wins is not None or any(r is not None for r in group.relevance or [])
    return "tied" if labelled and len(group.responses) > 1 else "labelled" if labelled else "unlabelled"
