"""Sources yield the groups of each optimiser step. Their position is part of a checkpoint."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from data_tools.batch import Batch
from data_tools.collate import neutral
from data_tools.columns import column
from prefopt.label_rules import relevance_of


class Dataset:
    """A prepared dataset, shuffled anew each epoch by (seed, epoch): the order needs no state but the position.

    Every process knows the whole step and takes its own consecutive share of it. A last step may be smaller.
    """

    def __init__(self, data, groups_per_step: int, *, epochs: float = 1.0, seed: int = 0, shuffle: bool = True,
                 rank: int = 0, ranks: int = 1, columns: tuple[str, ...] = (), mismatched: bool = False):
        if len(data) == 0:
            raise ValueError("the dataset holds no groups: nothing to train on")
        self.data, self.size, self.seed, self.shuffle = data, groups_per_step, seed, shuffle
        self.rank, self.ranks, self.columns, self.mismatched = rank, ranks, columns, mismatched
        self.steps_per_epoch = -(-len(data) // groups_per_step)
        self.steps = max(1, round(self.steps_per_epoch * epochs))
        self.position = 0
        self.order = (-1, np.arange(len(data)))               # (epoch, its order), so that an epoch is shuffled once

    def indices(self, step: int) -> np.ndarray:
        """Group numbers of a step, in order, for all processes."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        if self.shuffle and self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.data))
        return self.order[1][inside * self.size:(inside + 1) * self.size]

    def __iter__(self) -> Iterator[tuple[Batch, Batch | None]]:
        """This process's groups of each step, and for each of them a group of another prompt where a recipe asks for it."""
        while True:
            step = self.indices(self.position)
            self.position += 1
            yield self.take(step)

    def take(self, step: np.ndarray) -> tuple[Batch, Batch | None]:
        share = np.array_split(np.arange(len(step)), self.ranks)[self.rank]
        if not len(share):                                    # fewer groups than processes: a group that counts nothing
            batch, other = self.take_share(step, np.arange(1))
            return batch.with_columns(train=torch.zeros(batch.N, dtype=torch.bool)), other
        return self.take_share(step, share)

    def take_share(self, step: np.ndarray, share: np.ndarray) -> tuple[Batch, Batch | None]:
        batch = self.data.batch(step[share], columns=self.columns)
        if not self.mismatched or len(self.data) < 2:
            return batch, None
        after = np.roll(step, -1) if len(step) > 1 else (step + 1) % len(self.data)      # a step of one asks its neighbour
        return batch, self.data.batch(after[share], columns=self.columns)

    def feed(self, batch: Batch) -> None:
        pass

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


class Online:
    """A source whose groups also get `k` fresh responses of the current policy to their prompt: unlabelled rows that
    `online` marks (HyPO's KL to the reference is estimated on them)."""

    def __init__(self, source: Dataset, sample: Callable[[list[torch.Tensor]], list[list[torch.Tensor]]]):
        self.source, self.sample = source, sample
        self.steps, self.steps_per_epoch = source.steps, source.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Batch, Batch | None]]:
        for batch, other in self.source:
            yield self.joined(batch), other

    def indices(self, step: int) -> np.ndarray:
        return self.source.indices(step)

    def take(self, step: np.ndarray) -> tuple[Batch, Batch | None]:
        batch, other = self.source.take(step)
        return self.joined(batch), other

    def joined(self, batch: Batch) -> Batch:
        if "train" in batch and not batch["train"].any():     # groups that count nothing need no samples
            return batch.with_columns(online=torch.zeros(batch.N, dtype=torch.bool))
        return with_online(batch, self.sample(prompts(batch)))

    def feed(self, batch: Batch) -> None:
        self.source.feed(batch)

    def state_dict(self) -> dict:
        return self.source.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.source.load_state_dict(state)


def first_rows(batch: Batch) -> torch.Tensor:
    """The first row of each group, (B)."""
    return torch.stack([(batch.index == b).nonzero()[0, 0] for b in range(batch.groups)])


def prompts(batch: Batch) -> list[torch.Tensor]:
    """The prompt ids of each group's first row."""
    return [batch["tokens"][n][batch["attend"][n].bool()][:int(batch["prompt_length"][n])] for n in first_rows(batch)]


def with_online(batch: Batch, samples: list[list[torch.Tensor]]) -> Batch:
    """The batch with sampled rows added to its groups: unlabelled, `online`, every response token in the mask.

    Other columns of a row (`level`, `reward`, ...) hold what rows without them hold.
    """
    rows = [(n, prompt, response) for n, prompt, responses in
            zip(first_rows(batch), prompts(batch), samples, strict=True) for response in responses]
    width = max([batch["tokens"].shape[1], *(len(p) + len(r) for _, p, r in rows)])
    of = torch.stack([n for n, _, _ in rows])
    start = torch.tensor([len(p) for _, p, _ in rows])
    end = torch.tensor([len(p) + len(r) for _, p, r in rows])
    place = torch.arange(width)
    ones, nan = torch.ones(len(rows), dtype=torch.bool), torch.full((len(rows),), torch.nan)
    new = {"tokens": torch.stack([wide(torch.cat([p, r]), width) for _, p, r in rows]), "attend": place < end[:, None],
           "mask": (place >= start[:, None]) & (place < end[:, None]), "group": batch["group"][of], "prompt_length": start,
           "relevance": nan, "online": ones, "train": ones, **({"weight": batch["weight"][of]} if "weight" in batch else {})}
    old = {"relevance": relevance(batch), **batch, "online": torch.zeros(batch.N, dtype=torch.bool)}
    groups = Batch({"group": torch.cat([batch["group"], new["group"]])})

    def joined(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "wins":
            more = groups.width - value.shape[1]
            return torch.nn.functional.pad(value, (0, more, 0, more), value=torch.nan)
        dims = column(name).dims
        if dims not in ("N", "N T"):
            raise ValueError(f"online rows cannot be added to a batch with the column {name!r} ({dims})")
        value = wide(value, width) if dims == "N T" else value
        if name not in new:
            new[name] = value.new_full((len(rows), *value.shape[1:]), neutral(name) if dims == "N" else 0)
        return torch.cat([value, new[name].to(value.dtype)])

    return Batch({name: joined(name, value) for name, value in old.items()})


def wide(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def relevance(batch: Batch) -> torch.Tensor:
    """Labels of the rows, (N): the column, or what `wins` say."""
    if "relevance" in batch:
        return batch["relevance"]
    if "wins" in batch:
        return batch.rows(relevance_of(batch["wins"], batch.real))
    return torch.full((batch.N,), torch.nan)
