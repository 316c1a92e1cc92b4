"""Runs a pipeline: stage after stage, shard after shard, each committed before the next; what is in the cache is not made again.

A stage of `group` or `shard` is committed shard by shard. A stage of `groups` sees everything, so that it is committed as a
whole, and begins again where it was killed. Nothing depends on time, place, or what was interrupted: the same pipeline, data
and code give the same bytes.
"""
from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_tools import formats, validate
from data_tools.fields import FAILED, PLACE, DataError
from data_tools.files import part
from data_tools.pipeline.cache import Cache, Entry, Shard, Stored, commit
from data_tools.pipeline.config import Plan, Stage
from data_tools.pipeline.identity import code, content, digest, identity
from data_tools.pipeline.provenance import PROMPT_ID, SPLIT, marked, prompt_id
from data_tools.pipeline.stages import FINDINGS
from data_tools.records import Group

STATE = "build.json"                                          # in the folder of results: what was built there
LACKING = "lacking"                                           # count of an entry: groups that go on without all they should have
SAID = 5                                                      # groups of a shard that are named for each kind of trouble
Tell = Callable[[str, int, int], None]                        # stage, shards done, shards in all


@dataclass
class Step:
    """What became of the groups in a stage; of responses and groups, how many before and after."""
    name: str
    groups: list[int] = field(default_factory=lambda: [0, 0])
    responses: list[int] = field(default_factory=lambda: [0, 0])
    counts: Counter = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)
    inputs: int = 0
    reused: int = 0                                           # of the inputs, those whose results were in the cache

    def add(self, given: Sequence[Shard], entry: Entry) -> None:
        for place, shards in enumerate((given, entry.shards)):
            self.groups[place] += sum(s.groups for s in shards)
            self.responses[place] += sum(s.responses for s in shards)
        self.counts.update(entry.counts)
        self.said += entry.said if len(self.said) < SAID else []
        self.inputs += 1


class Built(NamedTuple):
    out: Path
    steps: list[Step]
    splits: dict[str, int]
    failed: int


class NothingLeft(ValueError):
    """The stages removed everything; `steps` says which one how much."""

    def __init__(self, steps: list[Step]):
        super().__init__(f"nothing is left after {steps[-1].name!r}, which was given {steps[-1].groups[0]:,} groups: see which "
                         f"stage removed how many, and loosen it")
        self.steps = steps


# ------------------------------------------------------------------------------------------------------------ the build
def build(plan: Plan, *, resume: bool = False, overwrite: bool = False, retry: bool = False,
          tell: Tell = lambda *_: None) -> Built:
    """Run a pipeline and write its results into `plan.out`.

    resume      go on where a build of the same pipeline was stopped
    overwrite   remove what an earlier build wrote there; what did not change is taken from the cache
    retry       make those shards again in which groups failed
    tell        is told how far a stage is
    """
    record = recorded(plan)
    opened(plan.out, record, resume, overwrite)
    cache, failed, steps = Cache(plan.cache), [], [Step("source")]

    def use(key: str, given: str, shards: Sequence[Shard], make: Callable[[], Entry]) -> list[Shard]:
        """What a stage makes of an input, from the cache if it is there."""
        entry = cache.get(key, given)
        if entry is None or retry and (entry.failed or entry.counts.get(LACKING)):
            entry = cache.put(key, given, make())
        else:
            steps[-1].reused += 1
        steps[-1].add(shards, entry)
        failed.extend(filter(None, [entry.failed]))
        return entry.shards

    shards, findings = use(*source_key(plan, record), [], partial(read, plan, cache)), None
    for stage, who in zip(plan.stages, record["stages"], strict=True):
        if not shards:
            raise NothingLeft(steps)
        key, found = digest(who), []
        steps.append(Step(stage.name))
        with stage.made() as call:
            for n, (given, some) in enumerate(inputs := list(inputs_of(plan, stage, shards, findings))):
                tell(stage.name, n, len(inputs))
                with blamed(f"stage {stage.name!r}"):
                    found += use(key, given, some, partial(made, plan, cache, stage, call, key, given, some, findings))
                publish(cache.files(key, given), plan.out, record)
            tell(stage.name, len(inputs), len(inputs))
            if hasattr(call, "told"):
                steps[-1].said += call.told(steps[-1].counts)
        findings = found_by(cache.files(key, given)) or findings if stage.reports else None
        shards = found
    if not shards:
        raise NothingLeft(steps)
    if failed:
        record["files"].append("failed.jsonl")
        formats.dump(Stored(cache, failed), plan.out / "failed.jsonl")
    splits = dict(sorted(Counter(group.meta[SPLIT] for group in Stored(cache, shards)).items()))
    record |= {"finished": True, "splits": splits, "steps": [
        {"name": s.name, "groups": s.groups, "responses": s.responses, "counts": dict(sorted(s.counts.items()))} for s in steps]}
    commit(plan.out / STATE, record)
    return Built(plan.out, steps, splits, sum(s.groups for s in failed))


def inputs_of(plan: Plan, stage: Stage, shards: list[Shard], findings: Path | None) -> Iterator[tuple[str, list[Shard]]]:
    """What a stage is given at a time, with a name of it: a shard, or everything."""
    if stage.shape in ("group", "shard"):
        for shard in shards:
            yield shard.digest, [shard]
    else:
        known = content(str(findings)) if findings and "findings" in stage.shape else None
        yield digest(plan.shard, [s.digest for s in shards], known), shards


def found_by(files: Path) -> Path | None:
    return files / FINDINGS if (files / FINDINGS).exists() else None


def made(plan: Plan, cache: Cache, stage: Stage, call: Callable, key: str, given: str, shards: list[Shard],
         findings: Path | None) -> Entry:
    """What a stage makes of an input."""
    groups, more, entry, apart = Stored(cache, shards), [findings] * ("findings" in stage.shape), Entry(), []
    if stage.reports:
        said, names = cache.fill(key, given, lambda folder: call(groups, folder, *more))
        return Entry(shards, said=list(said or []), files=names)
    if stage.shape.startswith("groups"):
        entry.shards = list(cache.cut(sound(stage, call(groups, *more), apart), plan.shard))
        entry.counts |= getattr(call, "counts", {})
    else:
        found = list(sound(stage, call(list(groups)) if stage.shape == "shard" else one_by_one(call, groups, entry), apart))
        entry.shards = [cache.write(found)] if found else []
        if hasattr(call, "count"):
            entry.counts |= call.count(found)
        if hasattr(call, "lacking"):
            lacking = list(call.lacking(found))
            entry.counts[LACKING] = len(lacking)
            entry.said = lacking[:SAID]
    if apart:
        entry.failed = cache.write(apart)
        entry.counts["failed"] = len(apart)
        entry.said += [f"{g.meta.get(PLACE, g.meta[PROMPT_ID])}: {g.meta[FAILED]}" for g in apart[:SAID]]
    return entry


def one_by_one(call: Callable, groups: Iterable[Group], entry: Entry) -> Iterator[Group]:
    """What becomes of each group. An error says which one it was."""
    entry.counts["removed"] = 0
    for group in groups:
        with blamed(group.meta.get(PLACE, "")):
            found = list(call(group))
        entry.counts["removed"] += not found
        yield from found


@contextmanager
def blamed(where: str) -> Iterator[None]:
    """Puts a place in front of an error that a person can mend, unless it names the place already."""
    try:
        yield
    except (ValueError, KeyError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        if " " not in text or not where or text.startswith(where):
            raise
        raise ValueError(f"{where}: {text}") from error


def sound(stage: Stage, groups: Iterable[Group], apart: list[Group]) -> Iterator[Group]:
    """The groups that go on; those that the stage could not finish go to `apart`."""
    for group in groups:
        if lost := [key for key in (PROMPT_ID, SPLIT) if key not in group.meta]:
            raise ValueError(f"a group that stage {stage.name!r} made has no {lost[0]!r} in its meta, which says where it comes "
                             f"from: make new groups from the meta of the old one, replace(group, ..., meta=dict(group.meta))")
        if FAILED in group.meta:
            apart.append(group)
        else:
            yield group


# ----------------------------------------------------------------------------------------------------------- the source
def source_key(plan: Plan, record: Mapping) -> tuple[str, str]:
    return digest("source", record["source"], record["split"]), str(plan.shard)


def read(plan: Plan, cache: Cache) -> Entry:
    """The source as shards, each group with the id and the split of its prompt."""
    block = dict(plan.source)
    on_bad, path = block.pop("on_bad", "error"), block.pop("path")
    groups = validate.checked(formats.load(path, **block), on_bad=on_bad, checks=(asked, validate.labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                       # what is skipped goes into the summary
        try:
            shards = list(cache.cut(placed(groups, plan.split), plan.shard))
        except DataError as broken:
            raise ValueError(f"{broken}. Mend it, or leave out what cannot be read, and count it, with "
                             f"'source={{path: ..., on_bad: skip}}'") from None
    report = groups.report
    return Entry(shards, {"skipped": report.skipped}, str(report).splitlines()[1:] if report.skipped else [])


def asked(group: Group) -> Iterator[validate.Problem]:
    """An empty prompt."""
    yield from validate.texts(Group(group.prompt, []))


def placed(groups: Iterable[Group], split: Mapping[str, float] | str) -> Iterator[Group]:
    seen: dict[str, tuple[int, str]] = {}
    for group in groups:
        name = group.meta.get(PROMPT_ID) or prompt_id(group.prompt)
        copies, where = seen.get(name, (0, ""))
        group = marked(group, copies, split)
        if where not in ("", group.meta[SPLIT]):
            raise ValueError(f"{group.meta.get(PLACE, '')}: the prompt is in split {group.meta[SPLIT]!r} here, and was in "
                             f"{where!r} before: one prompt belongs to one split")
        seen[name] = copies + 1, group.meta[SPLIT]
        yield group


# ------------------------------------------------------------------------------------------------------ folder of results
def recorded(plan: Plan) -> dict:
    """What the folder of results says about its pipeline: all that decides the results."""
    paths = plan.source["path"] if isinstance(plan.source["path"], list) else [plan.source["path"]]
    stages = [{"name": stage.name, **identity(stage.function, stage.settings)} for stage in plan.stages]
    source = {**plan.source, "content": {str(p): content(os.path.expanduser(str(p))) for p in paths},
              "code": code("data_tools.pipeline.provenance")}
    record = {"source": source, "split": plan.split, "seed": plan.seed, "shard": plan.shard, "stages": stages, "finished": False,
              "files": []}
    return json.loads(json.dumps(record, default=str))        # as it is read again


def opened(out: Path, record: Mapping, resume: bool, overwrite: bool) -> None:
    """The folder of results, made ready; an error where something stands in the way."""
    state = out / STATE
    there = out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir())
    if there and not state.exists():
        raise ValueError(f"{out} holds files, and no {STATE} of a build: give another folder as out")
    if there:
        before = json.loads(state.read_text(encoding="utf-8"))
        if before["files"] and not resume and not overwrite:
            raise ValueError(f"{out} is there already: go on with --resume, replace it with --overwrite, or give another folder "
                             f"as out")
        if resume and (changes := differences(before, record)):
            raise ValueError(f"{out} is a build of another pipeline, so it cannot be resumed: {'; '.join(changes)}. Change it "
                             f"back, or build anew with --overwrite: what does not depend on the change is taken from the cache")
        for name in before["files"]:
            (out / name).unlink(missing_ok=True)
    commit(state, record)


def publish(files: Path, out: Path, record: dict) -> None:
    """Files that a stage wrote, in the folder of results; each appears as a whole."""
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        name = path.relative_to(files)
        record["files"] = sorted({*record["files"], str(name)})
        commit(out / STATE, record)
        with part(out / name) as temporary:
            shutil.copyfile(path, temporary)
            os.replace(temporary, out / name)


# -------------------------------------------------------------------------------------------------------- what has changed
def differences(before: Mapping, now: Mapping) -> list[str]:
    """What two pipelines differ in, in words."""
    return [change for name, old, new in paired(before, now) for change in changes(name, old, new)]


def paired(before: Mapping, now: Mapping) -> Iterator[tuple[str, object, object]]:
    """The parts of two pipelines side by side; stages by their names, the second of a name as `name (2)`."""
    for name in ("source", "split", "seed", "shard"):
        yield name, before[name], now[name]
    old, new = (numbered(record["stages"]) for record in (before, now))
    for name in dict.fromkeys([*new, *old]):
        yield name, old.get(name), new.get(name)
    if list(old) != list(new) and sorted(old) == sorted(new):
        yield "the order of the stages", ", ".join(old), ", ".join(new)


def numbered(stages: Iterable[Mapping]) -> dict[str, Mapping]:
    counts, found = Counter(), {}
    for stage in stages:
        name = stage["name"]
        counts[name] += 1
        found[f"{name} ({counts[name]})" if counts[name] > 1 else name] = {k: v for k, v in stage.items() if k != "name"}
    return found


def changes(name: str, old: object, new: object) -> Iterator[str]:
    if old == new:
        return
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        yield f"{name} is new" if isinstance(new, Mapping) else f"{name} is gone" if isinstance(old, Mapping) else \
            f"{name}: {'left out' if old is None else old} -> {'left out' if new is None else new}"
    else:
        for key in dict.fromkeys([*old, *new]):
            if key == "code" and old.get(key) != new.get(key):
                yield f"{name}: its code changed"
            elif key in ("named", "content", "own"):
                there, here = old.get(key, {}), new.get(key, {})
                yield from (f"{name}: what {k} holds changed" for k in sorted({*there, *here}) if there.get(k) != here.get(k))
            else:
                yield from changes(name if key == "settings" else f"{name}.{key}", old.get(key), new.get(key))


# ------------------------------------------------------------------------------------------------------------------- dry
def survey(plan: Plan) -> Iterator[tuple[str, str]]:
    """(stage, what a build would do there and why), without doing it."""
    record, cache = recorded(plan), Cache(plan.cache)
    state = plan.out / STATE
    before = json.loads(state.read_text(encoding="utf-8")) if state.exists() else None
    why = {name: list(changes(name, old, new)) for name, old, new in paired(before, record)} if before else {}
    entry = cache.get(*source_key(plan, record))
    yield "source", "in the cache" if entry else f"is read{reason(why, 'source', before)}"
    shards, findings = entry.shards if entry else None, None
    for (name, _), stage, who in zip(numbered(record["stages"]).items(), plan.stages, record["stages"], strict=True):
        if shards is None:
            yield name, "runs, since what it is given is made anew"
            continue
        keys = [(digest(who), given) for given, _ in inputs_of(plan, stage, shards, findings)]
        found = [cache.get(*key) for key in keys]
        missing = sum(entry is None for entry in found)
        yield name, "in the cache" if not missing else f"runs on {missing} of {len(found)} shards" * (len(found) > 1) \
            + "runs" * (len(found) == 1) + reason(why, name, before)
        shards = None if missing else [s for entry in found for s in entry.shards]
        findings = found_by(cache.files(*keys[-1])) or findings if stage.reports else None


def reason(why: Mapping[str, list[str]], name: str, before: object) -> str:
    if not before:
        return ", since nothing was built here yet"
    return f", since {'; '.join(why[name])}" if why.get(name) else ", since it was not done yet"
