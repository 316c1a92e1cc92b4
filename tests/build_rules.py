"""Stages for tests of the data pipeline, found by name as anybody's own are."""
from __future__ import annotations

import json
import os
from dataclasses import replace

from data_tools import labels
from data_tools.records import Group, Response


def note(line: str) -> None:
    """A line in the file that $BUILD_LOG names: what really ran."""
    if log := os.environ.get("BUILD_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def answers(shard, *, n: int = 3, word: str = "a", seed: int = 0):
    """n responses of 1, 2, ... words; the last two of every third prompt are equally long."""
    note(f"answers {len(shard)}")
    return [replace(g, responses=[Response(" ".join([word] * (j + 1 - (j == n - 1) * (len(g.prompt) % 3 == 0))))
                                  for j in range(n)]) for g in shard]


def length(shard, *, scale=1.0):
    note(f"length {len(shard)}")
    for group in shard:
        for response in group.responses:
            response.scores["length"] = scale * len(response.text.split())
    return shard


def longest(group, *, score="length", margin=0.0):
    values = labels.scores_of(group, score)
    return labels.split(group, labels.best_worst(values, margin=margin))


def top_half(groups, *, score="length"):
    """Groups whose best response is at least as good as the median one: two passes."""
    best = sorted(max(r.scores[score] for r in g.responses) for g in groups)
    note("top_half")
    return (g for g in groups if max(r.scores[score] for r in g.responses) >= best[len(best) // 2])


def twice(group):
    """The group, and one with another prompt that is made from it."""
    return [group, replace(group, prompt=f"{group.prompt} Please.", meta=dict(group.meta))]


def lost(group):
    return [Group(group.prompt, group.responses)]


def nothing(group):
    return []


def breaks(group, *, at="question 3"):
    if group.prompt == at:
        raise ValueError("no good")
    return [group]


def fails(group):
    """Every third group fails, unless $AWAKE is set."""
    bad = len(group.prompt) % 3 == 0 and "AWAKE" not in os.environ
    return [replace(group, meta={**group.meta, "failed": "the model is tired"})] if bad else [group]


def seen(groups, folder, *, title="groups"):
    note("seen")
    found = [g.prompt for g in groups]
    (folder / "pages").mkdir()
    (folder / "pages" / "seen.json").write_text(json.dumps(found))
    return [f"{len(found)} {title}"]


def odd(groups, size):
    return groups


class Half:
    """A stage with memory and an end."""

    def __init__(self, *, seed: int = 0):
        self.seed = seed
        note("made")

    def identity(self) -> dict:
        return {"half": 1}

    def __call__(self, shard):
        return shard[:len(shard) // 2]

    def count(self, groups) -> dict:
        return {"kept": len(groups)}

    def told(self, counts) -> list[str]:
        return [f"kept {counts['kept']}"]

    def close(self) -> None:
        note("closed")
