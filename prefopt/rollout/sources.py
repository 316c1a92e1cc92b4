"""Where the groups of an on-policy run come from: prompts, a sampler, a scorer, and wrappers around them.

A source of groups has `draw(count)`, the next `count` groups for this process, `feed(groups, batch)`, which is told what
was trained on, and `state_dict`. Wrappers take a source and are one. `Rollouts` turns groups into the batches of the loop.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_tools.batch import Batch
from data_tools.records import Group
from prefopt.ops import gather, total
from prefopt.rollout.orders import Order, Ordered, shuffled

__all__ = ["Dump", "Filter", "GroupSource", "Mix", "OnPolicy", "Replay", "Recorded", "Rollouts", "scored"]

T = TypeVar("T")


class GroupSource(Protocol):
    """The next groups of this process, with responses and rewards."""

    def draw(self, count: int) -> list[Group]: ...

    def feed(self, groups: Sequence[Group]) -> None: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def scored(portions: Sequence[T], sample: Callable[[T], list[Group]], score: Callable[[list[Group]], list[Group]]) -> list[Group]:
    """What is sampled for all portions, with its rewards: one is scored, in a thread, while the next is sampled, and the last one
    here. Scored they are in order, one at a time. Where something fails, those that wait are not scored."""
    pool = ThreadPoolExecutor(1)
    try:
        jobs = [pool.submit(score, sample(portion)) for portion in portions[:-1]]
        last = [sample(portion) for portion in portions[-1:]]
        return [*chain.from_iterable(job.result() for job in jobs), *chain.from_iterable(map(score, last))]
    finally:
        pool.shutdown(cancel_futures=True)


def whole(prompts: Sequence[Group]) -> list[list[int]]:
    """All prompts in one portion."""
    return [list(range(len(prompts)))]


class OnPolicy:
    """Prompts in order, responses of the current policy, rewards.

    `sample(groups, keys, version)` returns the groups with responses. A prompt's key is its place in the stream of all
    prompts ever drawn, so that noise depends neither on the number of processes nor on what is sampled beside it.
    `version` counts the rollouts that were trained on: what the sampler holds must be of that version. `portions(groups)`
    gives the numbers of the prompts that are sampled, and scored, together.
    """

    def __init__(self, prompts: Sequence[Group], sample: Callable, score: Callable[[list[Group]], list[Group]], *, seed: int = 0,
                 order: Order = shuffled, portions: Callable[[list[Group]], list[list[int]]] = whole):
        if not prompts:
            raise ValueError("there are no prompts: nothing to sample responses to")
        self.prompts, self.sample, self.score, self.portions = Ordered(prompts, order, seed), sample, score, portions
        self.position = self.version = 0
        self.latest: list[Group] = []                         # all that was sampled for this step, kept or not

    def draw(self, count: int) -> list[Group]:
        everyone, start = gather(torch.full((count,), 1))     # the processes take consecutive prompts
        first = self.position + start
        self.position += len(everyone)
        places = range(first, first + count)
        prompts = [self.prompts[place] for place in places]
        groups = [Group(p.prompt, [], meta={**p.meta, "key": place}) for p, place in zip(prompts, places, strict=True)]
        if not groups:
            return []

        def sample(portion: list[int]) -> list[Group]:
            made = self.sample([groups[i] for i in portion], [places[i] for i in portion], self.version)
            if len(made) != len(portion) or any(not g.responses for g in made):
                raise ValueError(f"the sampler returned {sum(bool(g.responses) for g in made)} groups with responses for "
                                 f"{len(portion)} prompts")
            return made

        portions = self.portions(groups)
        found = dict(zip(chain.from_iterable(portions), scored(portions, sample, self.score), strict=True))
        made = [found[i] for i in range(count)]
        self.latest += made
        return made

    def feed(self, groups: Sequence[Group]) -> None:
        self.version += 1
        self.latest = []

    def state_dict(self) -> dict:
        return {"position": self.position, "version": self.version}

    def load_state_dict(self, state: dict) -> None:
        self.position, self.version = state["position"], state["version"]


class Filter:
    """Dynamic sampling: groups that `keep` drops are made up for by further prompts, `rounds` of sampling at most, each of as
    many prompts as are missing. After the last one the gap is filled with dropped groups, which weigh nothing.
    """

    def __init__(self, source: GroupSource, keep: Callable[[list[Group]], list[bool]], *, rounds: int = 4):
        self.source, self.keep, self.rounds = source, keep, rounds

    def draw(self, count: int) -> list[Group]:
        kept, dropped = [], []
        for _ in range(self.rounds):
            missing = count - len(kept)
            if not int(total(torch.tensor(missing))):         # every process draws as often
                break
            found = self.source.draw(missing)
            for group, good in zip(found, self.keep(found) if found else [], strict=True):
                (kept if good else dropped).append(group)
        return (kept + dropped)[:count]

    def feed(self, groups: Sequence[Group]) -> None:
        self.source.feed(groups)

    def state_dict(self) -> dict:
        return {"source": self.source.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.source.load_state_dict(state["source"])


class Replay:
    """A share of each step comes from a buffer of earlier groups, the newest `size` that were trained on.

    Their responses are those of older policies: a recipe with a `correction` weighs them by what the policy thinks of them
    now, others train on them as they are.
    """

    def __init__(self, source: GroupSource, *, size: int = 256, share: float = 0.25, seed: int = 0):
        self.source, self.size, self.share, self.seed = source, size, share, seed
        self.buffer: list[Group] = []
        self.steps = 0

    def draw(self, count: int) -> list[Group]:
        old = min(round(self.share * count), len(self.buffer))
        rng = np.random.default_rng((self.seed, self.steps))
        again = [self.buffer[i] for i in sorted(rng.choice(len(self.buffer), old, replace=False))] if old else []
        return [*self.source.draw(count - old), *(replayed(g) for g in again)]

    def feed(self, groups: Sequence[Group]) -> None:
        self.steps += 1
        self.buffer = [*self.buffer, *(g for g in groups if not g.meta.get("replayed"))][-self.size:]
        self.source.feed(groups)

    def state_dict(self) -> dict:
        return {"source": self.source.state_dict(), "buffer": [g.to_json() for g in self.buffer], "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.source.load_state_dict(state["source"])
        self.buffer, self.steps = [Group.from_json(g) for g in state["buffer"]], state["steps"]


def replayed(group: Group) -> Group:
    group = deepcopy(group)
    group.meta["replayed"] = True
    return group


class Mix:
    """A share of each step comes from groups with given responses and rewards: demonstrations, older data."""

    def __init__(self, source: GroupSource, given: Sequence[Group], *, share: float = 0.25, seed: int = 0):
        if not given:
            raise ValueError("there are no given groups to mix in")
        self.source, self.given, self.share, self.position = source, Ordered(given, seed=seed), share, 0

    def draw(self, count: int) -> list[Group]:
        old = round(self.share * count)
        everyone, start = gather(torch.full((old,), 1))
        first = self.position + start
        self.position += len(everyone)
        return [*self.source.draw(count - old), *(deepcopy(self.given[place]) for place in range(first, first + old))]

    def feed(self, groups: Sequence[Group]) -> None:
        self.source.feed(groups)

    def state_dict(self) -> dict:
        return {"source": self.source.state_dict(), "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.source.load_state_dict(state["source"])
        self.position = state["position"]


class Dump:
    """Writes the groups of every so many steps to `folder`/step-00000001.jsonl (a part of each process), whole or not at
    all: when they are drawn, and once more with what training made of them."""

    def __init__(self, source: GroupSource, folder: Path, *, every: int = 1, rank: int = 0, ranks: int = 1):
        self.source, self.folder, self.every, self.steps = source, folder, every, 0
        self.end = ending(rank, ranks)

    def draw(self, count: int) -> list[Group]:
        groups = self.source.draw(count)
        self.write(groups)
        return groups

    def write(self, groups: Sequence[Group]) -> None:
        if self.steps % self.every:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{self.steps + 1:08d}{self.end}"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(g.to_json()) + "\n" for g in groups), encoding="utf-8")
        temporary.replace(path)

    def feed(self, groups: Sequence[Group]) -> None:
        self.write(groups)
        self.steps += 1
        self.source.feed(groups)

    def state_dict(self) -> dict:
        return {"source": self.source.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.source.load_state_dict(state["source"])
        self.steps = state["steps"]


def ending(rank: int, ranks: int) -> str:
    """What the file of a process ends in."""
    return f"-{rank}of{ranks}.jsonl" if ranks > 1 else ".jsonl"


class Recorded:
    """The groups that a run dumped, step by step: training is run again from them, without a sampler or a scorer."""

    def __init__(self, folder: Path, *, rank: int = 0, ranks: int = 1):
        self.folder, self.step = Path(folder), 0
        self.end = ending(rank, ranks)

    def draw(self, count: int) -> list[Group]:
        path = self.folder / f"step-{self.step + 1:08d}{self.end}"
        if not path.exists():
            raise ValueError(f"{self.folder} holds no rollouts of step {self.step + 1} ({path.name}): set train.steps to what "
                             f"was recorded, and launch as many processes as wrote it")
        with path.open(encoding="utf-8") as file:
            return [Group.from_json(json.loads(line)) for line in file]

    def feed(self, groups: Sequence[Group]) -> None:
        self.step += 1

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


class Rollouts:
    """Groups of a source as batches of the loop, with what can be said about them before training."""

    def __init__(self, source: GroupSource, encode: Callable[[list[Group]], Batch], prompts_per_step: int, *, prompts: int,
                 epochs: float = 1.0, rank: int = 0, ranks: int = 1, labels: bool = False,
                 filtered: OnPolicy | None = None, again: Callable[[list[Group], int], list[Group]] | None = None):
        self.source, self.encode, self.labels, self.filtered, self.again = source, encode, labels, filtered, again
        self.share = len(np.array_split(np.arange(prompts_per_step), ranks)[rank])
        if not self.share:
            raise ValueError(f"{ranks} processes share {prompts_per_step} prompts per step: raise train.groups_per_step to at "
                             f"least {ranks}")
        self.steps_per_epoch = max(1, -(-prompts // prompts_per_step))
        self.steps = max(1, round(self.steps_per_epoch * epochs))
        self.groups: list[Group] = []

    def __iter__(self) -> Iterator[tuple[Batch, None]]:
        while True:
            self.groups = self.source.draw(self.share)
            yield self.labelled(self.groups), None

    def labelled(self, groups: list[Group]) -> Batch:
        for group in groups if self.labels else ():
            group.relevance = [r.scores.get("reward") for r in group.responses]
        return self.encode(groups)

    def renewed(self, version: int) -> dict[str, Tensor]:
        """What the step's responses are worth against fresh opponents, drawn from weights of this version, as the columns of the
        same rows. The rewards are kept with the responses, as meta["ahead"]."""
        fresh = self.again(deepcopy(self.groups), version)
        for group, other in zip(self.groups, fresh, strict=True):
            for response, again in zip(group.responses, other.responses, strict=True):
                if "reward" in again.scores:
                    response.meta["ahead"] = again.scores["reward"]
        batch = self.labelled(fresh)
        return {c: batch[c] for c in ("reward", "relevance", "wins") if c in batch}

    def feed(self, batch: Batch) -> None:
        trace(self.groups, batch)
        self.source.feed(self.groups)

    def metrics(self) -> dict[str, float]:
        """What is trained on, over all processes; where a filter stands between, also all that was sampled (sampled/...)."""
        found = measured(self.groups)
        if self.filtered is not None:
            every = measured(self.filtered.latest)
            found |= {f"sampled/{k}": every[k] for k in ("reward", "groups/contrast", "pass@1") if k in every}
            found["sampled/groups"] = float(total(torch.tensor(len(self.filtered.latest))))
        return found

    def state_dict(self) -> dict:
        return self.source.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.source.load_state_dict(state)


def trace(groups: Sequence[Group], batch: Batch) -> None:
    """Writes beside every response what training made of its tokens, into meta["trace"]: advantage, log pi_ref, and
    log pi_old - log pi_rollout, each where the recipe has it. Rows of the batch are the responses in order."""
    found = {c: batch[c] for c in ("advantage", "logp_ref") if c in batch}
    if "logp_old" in batch and "logp_rollout" in batch:
        found["log_ratio"] = batch["logp_old"] - batch["logp_rollout"]
    place = torch.arange(batch["mask"].shape[1], device=batch["mask"].device)
    first = batch["attend"].int().argmax(1) + batch["prompt_length"]
    answer = (batch["attend"].bool() & (place >= first[:, None])).cpu()
    found = {c: v.float().cpu() for c, v in found.items()}
    for n, response in enumerate(r for g in groups for r in g.responses):
        response.meta["trace"] = {c: [round(x, 5) for x in v[n][answer[n]].tolist()] for c, v in found.items()
                                  if bool(v[n][answer[n]].isfinite().all())}


def measured(groups: Sequence[Group], *, right: float = 0.5) -> dict[str, float]:
    """Rewards and their components, lengths, how many responses were cut, and what a group's rewards differ in.

    pass@1 is the share of responses with a reward above `right`, pass@k that of prompts with one among their k. Responses
    without a reward are counted apart (unscored) and enter no other mean.
    """
    sums: dict[str, list[float]] = {}

    def add(key: str, value: float) -> None:
        place = sums.setdefault(key, [0.0, 0.0])
        place[0] += value
        place[1] += 1

    for group in groups:
        rows = [r for r in group.responses if r.train]
        known = [r.scores["reward"] for r in rows if _known(r.scores.get("reward"))]
        for r in rows:
            add("unscored", float(not _known(r.scores.get("reward"))))
            add("length", float(len(r.tokens or ())))
            add("truncated", float(not r.meta.get("finished", True)))
            for name, value in r.scores.items():
                if _known(value):
                    add("reward" if name == "reward" else f"reward/{name}", value)
                    if name == "reward":
                        add("reward/square", value * value)
                        add("pass@1", float(value > right))
        if len(known) > 1:
            add("groups/contrast", float(max(known) > min(known)))
            add(f"pass@{len(rows)}", float(max(known) > right))
    names = sorted(sums)
    everyone = sorted({n for ns in _names(names) for n in ns})
    values = total(torch.tensor([sums.get(n, [0.0, 0.0]) for n in everyone], dtype=torch.float64).reshape(-1, 2))
    out = {n: float(v[0] / v[1]) for n, v in zip(everyone, values, strict=True) if v[1] > 0}
    if "reward" in out:
        out["reward/std"] = math.sqrt(max(out.pop("reward/square") - out["reward"] ** 2, 0.0))
    return out


def _known(value) -> bool:
    return value is not None and math.isfinite(value)


def _names(names: list[str]) -> list[list[str]]:
    import torch.distributed as dist

    from prefopt.ops import processes
    if processes() == 1:
        return [names]
    found: list = [None] * processes()
    dist.all_gather_object(found, names)
    return found
