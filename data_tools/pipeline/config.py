"""A pipeline file, bound to functions and checked against their signatures before anything runs.

    source: prompts.jsonl                   what data_tools.load takes, or {path: ..., format: ..., columns: ..., limit: ...}
    stages:                                 in any order, each a step over groups
      - generate: {policies: {student: {sampler: {transformers: {model: my/model}}, n: 4}}}
      - score: {rewards: [final_answer]}
      - select: {best_worst: {score: reward}}
      - write: {name: pairs, format: pair}
      - check
      - describe
    out: runs/pairs                         what comes of it
    split: {test: 0.1}                      shares of the prompts; or the field of the records that says it
    seed: 0
    shard: 256                              groups that are committed together
    cache: runs/cache/data                  what stages made, to be used again

A stage is a kind of STAGES. Behind `label`, `select` and `augment` stands a rule of their module, or 'my.module:function', with
its settings; or a list of these, one after the other. What a stage is can be read from its positional parameters:

    group               one group -> list of groups; [] removes it
    shard               a list of groups -> list of groups, for what is better done together
    groups              all groups, which can be passed over again -> iterator of groups
    groups, folder      all groups -> None or lines for the summary; files go into the folder, and the groups stay as they are
    ..., findings       and the file of what `check` or `influence` found, if the groups are still those that it saw, else None

Keyword-only parameters are settings. A setting `seed` is the pipeline's unless it is given, and a setting `generate` takes a
sampler's spec and is a function, prompts -> texts. A class is made once with its settings, and called.
"""
from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial, update_wrapper
from importlib import import_module
from pathlib import Path

from data_tools.columns import nearest
from data_tools.fields import shorten

STAGES = {
    "generate": "prefopt.rollout.generate:Generate", "search": "prefopt.rollout.search:Search", "score": "rewards.stage:Score",
    "label": "data_tools.select", "select": "data_tools.select", "augment": "data_tools.augment",
    "check": "data_tools.pipeline.stages:check", "influence": "data_tools.pipeline.stages:influence",
    "fix": "data_tools.pipeline.stages:Fix", "describe": "data_tools.pipeline.stages:describe",
    "view": "data_tools.pipeline.stages:view", "linearity": "data_tools.pipeline.stages:linearity",
    "attack_success": "data_tools.pipeline.stages:attack_success", "write": "data_tools.writers:write",
}
SHAPES = ("group", "shard", "groups", "groups findings", "groups folder", "groups folder findings")
TEXTS = "prefopt.rollout.generate:Texts"                      # makes the setting `generate` from a sampler's spec


@dataclass(frozen=True)
class Stage:
    """A function or class with settings. `name` is how a summary calls it."""
    name: str
    function: Callable
    settings: Mapping = field(default_factory=dict)

    @property
    def shape(self) -> str:
        return " ".join(positional(self.function))

    @property
    def reports(self) -> bool:
        """Whether it writes files and leaves the groups as they are."""
        return "folder" in self.shape

    @contextmanager
    def made(self) -> Iterator[Callable]:
        """What is called: the function with its settings bound (and with its own `count` and `told`, if any), or the object of a
        class. What has a `close` is closed."""
        settings = dict(self.settings)
        if "generate" in settings:
            settings["generate"] = function_named(TEXTS)(settings["generate"], seed=settings.get("seed", 0))
        bound = partial(self.function, **settings)
        call = bound() if inspect.isclass(self.function) else update_wrapper(bound, self.function)
        try:
            yield call
        finally:
            for thing in (call, settings.get("generate")):
                if hasattr(thing, "close"):
                    thing.close()


@dataclass(frozen=True)
class Plan:
    """A pipeline."""
    source: Mapping
    stages: tuple[Stage, ...]
    out: Path
    split: Mapping[str, float] | str
    seed: int = 0
    shard: int = 256
    cache: Path = Path("runs/cache/data")


# ---------------------------------------------------------------------------------------------------------- signatures
def called(function: Callable) -> list[inspect.Parameter]:
    """The parameters of a call: of a class, those of its objects' `__call__`."""
    target = function.__call__ if inspect.isclass(function) else function
    return [p for p in inspect.signature(target).parameters.values() if p.name != "self"]


def positional(function: Callable) -> list[str]:
    return [p.name for p in called(function) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def keywords(function: Callable) -> dict[str, object]:
    """Settings with their defaults; `inspect.Parameter.empty` where one must be given."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def function_named(spec: str) -> Callable:
    """What 'module:name' names."""
    home, _, name = spec.partition(":")
    try:
        module = import_module(home)
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot import {home!r} of {spec!r}: {error}") from None
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{home} has no function {name!r}{nearest(name, vars(module))}")
    return getattr(module, name)


def rule(kind: str, name: str) -> Callable:
    """A rule of the kind's module, or 'my.module:function'."""
    if ":" in name:
        return function_named(name)
    home = import_module(STAGES[kind])
    if name not in home.__all__:
        raise ValueError(f"there is no {kind} {name!r}{nearest(name, home.__all__)}; known: {', '.join(home.__all__)}, or "
                         f"'my.module:function'")
    return getattr(home, name)


def checked(name: str, function: Callable, settings: object, seed: int) -> dict:
    """The settings with the pipeline's seed, or an error that names the wrong one and the nearest that the signature has."""
    settings, known = {} if settings is None else settings, keywords(function)
    if not isinstance(settings, Mapping):
        raise ValueError(f"{name}: settings have names, {{{next(iter(known), 'setting')}: ...}}, found {shorten(settings)}")
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}{nearest(key, known)}; settings: {', '.join(known) or 'none'}")
        if type(known[key]) in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name}: {key} is a number, found {shorten(value)}")
    if missing := [k for k, v in known.items() if v is inspect.Parameter.empty and k not in settings]:
        raise ValueError(f"{name} needs {', '.join(missing)}: write {{{name.split(': ')[-1]}: {{{missing[0]}: ...}}}}")
    return ({"seed": seed} if "seed" in known else {}) | dict(settings)


# -------------------------------------------------------------------------------------------------------------- reading
def named(spec: object, where: str) -> tuple[str, object]:
    """'name' or {name: settings}, taken apart."""
    if isinstance(spec, Mapping) and len(spec) == 1:
        (name, settings), = spec.items()
        return str(name), settings
    if not isinstance(spec, str):
        raise ValueError(f"{where}: write a name or {{name: settings}}, found {shorten(spec)}")
    return spec, None


def stages_of(spec: object, seed: int, place: int) -> Iterator[Stage]:
    """The stages that one item of the list stands for."""
    kind, inside = named(spec, f"stages, number {place}")
    if kind not in STAGES and ":" not in kind:
        raise ValueError(f"stages, number {place}: there is no stage {kind!r}{nearest(kind, STAGES)}; stages: "
                         f"{', '.join(STAGES)}, or 'my.module:function'")
    if ":" in STAGES.get(kind, kind):
        found = [(kind, function_named(STAGES.get(kind, kind)), inside)]
    else:
        rules = [named(one, kind) for one in (inside if isinstance(inside, list) else [inside])]
        found = [(f"{kind}: {name}", rule(kind, name), settings) for name, settings in rules]
    for name, function, settings in found:
        if " ".join(positional(function)) not in SHAPES:
            raise ValueError(f"{name} takes ({', '.join(positional(function))}), and a stage takes one of "
                             f"{', '.join('(' + s.replace(' ', ', ') + ')' for s in SHAPES)}")
        yield Stage(name, function, checked(name, function, settings, seed))


def shares(split: object) -> Mapping[str, float] | str:
    """The split, checked."""
    if isinstance(split, str):
        return split
    if not isinstance(split, Mapping) or not all(isinstance(v, (int, float)) and 0 < v < 1 for v in split.values()) \
            or sum(split.values()) >= 1 or "train" in split:
        raise ValueError(f"split: write shares of the prompts that add up to less than 1, {{test: 0.1}} (train has the others), "
                         f"or the field of the records that names their split; found {shorten(split)}")
    return {str(k): float(v) for k, v in split.items()}


SOURCE = {"path", "format", "split", "columns", "limit", "streaming", "on_bad"}


def source(given: object) -> dict:
    """The source as a block."""
    block = dict(given) if isinstance(given, Mapping) else {"path": given}
    for key in block:
        if key not in SOURCE:
            raise ValueError(f"source has no setting {key!r}{nearest(key, SOURCE)}; settings: {', '.join(sorted(SOURCE))}")
    if not block.get("path"):
        raise ValueError("source names no data: write a file, a glob, a folder, hub:owner/name, or a list of these")
    return block


def make(raw: Mapping, where: str = "pipeline") -> Plan:
    """A pipeline from what its file says, or a ValueError that says what is wrong."""
    known = [f.name for f in fields(Plan)]
    try:
        for key in raw:
            if key not in known:
                raise ValueError(f"there is no setting {key!r}{nearest(key, known)}; settings: {', '.join(known)}")
        for key in ("source", "stages", "out"):
            if not raw.get(key):
                raise ValueError(f"{key} is missing")
        if not isinstance(raw["stages"], list):
            raise ValueError(f"stages is a list, one stage after the other, found {shorten(raw['stages'])}")
        for key, least in (("seed", 0), ("shard", 1)):
            value = raw.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{key} is a whole number from {least}, found {shorten(value)}")
        seed = raw.get("seed", 0)
        stages = [stage for place, spec in enumerate(raw["stages"], 1) for stage in stages_of(spec, seed, place)]
        written = [(s.settings.get("name", "groups"), s.settings.get("ending", ".jsonl")) for s in stages if s.name == "write"]
        if again := [name for name, count in Counter(written).items() if count > 1]:
            raise ValueError(f"two stages write {again[0][0]}/*{again[0][1]}: give each a name of its own, "
                             f"{{write: {{name: ...}}}}")
        if not written:
            stages += stages_of("write", seed, len(stages) + 1)
        return Plan(source(raw["source"]), tuple(stages), Path(raw["out"]), shares(raw.get("split", {})), seed,
                    raw.get("shard", 256), Path(raw.get("cache", "runs/cache/data")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
