"""A run folder read back: settings, curves, timing, rollouts. Whatever is missing or broken in it is said with its place."""
from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import yaml

from data_tools.columns import nearest
from data_tools.records import Group

__all__ = ["Curve", "RunFolder", "Thinned", "decoder", "load", "pieces", "rollout_files", "rollouts", "thinned"]


class Curve(NamedTuple):
    """A metric over the steps at which it was measured and finite, and the steps at which it was not finite."""
    steps: list[int]
    values: list[float]
    lost: list[int]


@dataclass(frozen=True)
class RunFolder:
    name: str
    path: Path
    settings: dict                                            # run.yaml
    departures: dict                                          # departures.yaml
    facts: dict                                               # versions.json
    curves: dict[str, Curve]
    speed: dict[str, Curve]                                   # seconds, and tokens per second

    @property
    def step(self) -> int:
        """The last logged step."""
        return max(max(c.steps + c.lost) for c in self.curves.values())


def load(path: str | Path) -> RunFolder:
    """A run folder. What is still being written may end in half a line, which is left out."""
    path = Path(path)
    if not path.is_dir():
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise ValueError(f"there is no run folder {str(path)!r}{near or '.'} A run folder is what the setting out names, where "
                         f"`prefopt train` writes run.yaml and metrics.jsonl")
    if not (path / "run.yaml").exists():
        inside = sorted(p.parent.name for p in path.glob("*/run.yaml"))
        hint = f", but these in it do: {', '.join(inside[:5])}" if inside else ""
        raise ValueError(f"{path} holds no run (no run.yaml){hint}. Give the folder that the setting out of a run names")
    settings = parsed(path / "run.yaml", yaml.safe_load)
    if missing := [k for k in ("recipe", "policy", "data") if k not in settings]:
        raise ValueError(f"{path / 'run.yaml'} has no {missing[0]!r}: it is not what a run writes. Copy the run folder again")
    return RunFolder(path.resolve().name, path, settings, parsed(path / "departures.yaml", yaml.safe_load),
                     parsed(path / "versions.json", json.loads), curves(path / "metrics.jsonl"), speed(path / "timing.jsonl"))


def parsed(path: Path, read: Callable[[str], object]) -> dict:
    try:
        found = read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is not complete. Copy the whole run folder") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold settings by name, found {type(found).__name__}")
    return found


def lines(path: Path) -> Iterator[dict]:
    """The records of a log, each with its step."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):                       # being written
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}): mend or delete this line") from None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(f"{path}:{number} should be an object with a number step, found {line.strip()[:60]!r}")
            yield record


def curves(path: Path) -> dict[str, Curve]:
    """Every metric by its name. `epoch` says no more than `step` and is left out."""
    if not path.exists():
        raise ValueError(f"{path} is missing: this run has logged no step. Wait for its first, or copy the whole folder")
    found: dict[str, Curve] = {}
    for record in lines(path):
        step = record["step"]
        for key, value in record.items():
            if key in ("step", "epoch"):
                continue
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"{path}: {key} at step {step} should be a number or null, found {value!r}")
            curve = found.setdefault(key, Curve([], [], []))
            if value is None or not math.isfinite(value):
                curve.lost.append(step)
            else:
                curve.steps.append(step)
                curve.values.append(float(value))
    if not found:
        raise ValueError(f"{path} is empty: this run has logged no step yet. Wait for its first")
    return found


def speed(path: Path) -> dict[str, Curve]:
    records = list(lines(path)) if path.exists() else []
    steps = [r["step"] for r in records]
    if not records:
        return {}
    return {"seconds": Curve(steps, [r["seconds"] for r in records], []),
            "tokens/s": Curve(steps, [r["tokens"] / max(r["seconds"], 1e-9) for r in records], [])}


class Thinned(NamedTuple):
    """A curve with few points: the means of stretches of it, and what their values lie between."""
    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    stretch: int                                              # points that one stands for, at most


def thinned(curve: Curve, points: int = 200) -> Thinned:
    """At most `points` points.

    >>> thinned(Curve([1, 2, 3, 4], [0.0, 2.0, 5.0, 5.0], []), 2)
    Thinned(steps=[1.5, 3.5], values=[1.0, 5.0], low=[0.0, 5.0], high=[2.0, 5.0], stretch=2)
    """
    size = max(1, -(-len(curve.steps) // points))
    mean = lambda x: x[0] if len(x) == 1 else math.fsum(x) / len(x)
    cut = lambda x: [x[n:n + size] for n in range(0, len(x), size)]
    values = cut(curve.values)
    return Thinned([mean(s) for s in cut(curve.steps)], [mean(v) for v in values], [min(v) for v in values],
                   [max(v) for v in values], size)


# ------------------------------------------------------------------------------------------------------------ rollouts
def rollout_files(path: Path) -> dict[int, list[Path]]:
    """The files of each step that was dumped: one of each process."""
    found: dict[int, list[Path]] = {}
    for file in sorted((Path(path) / "rollouts").glob("step-*.jsonl")):
        if match := re.fullmatch(r"step-(\d+)(-\d+of\d+)?\.jsonl", file.name):
            found.setdefault(int(match[1]), []).append(file)
    return dict(sorted(found.items()))


def rollouts(files: Sequence[Path]) -> list[Group]:
    """The groups of a step."""
    found = []
    for file in files:
        with file.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                try:
                    found.append(Group.from_json(json.loads(line)))
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{file}:{number} is no group of responses ({error}): delete this file, or copy it "
                                     f"again") from None
    return found


# ---------------------------------------------------------------------------------------------------------- token texts
def decoder(run: RunFolder) -> Callable[[tuple[int, ...]], str] | None:
    """Token ids -> text, with the tokenizer that the run saved, else the one that it loaded, if that is on this machine; None
    where neither is at hand."""
    saved = [run.path / "model", *sorted(run.path.glob("checkpoints/*/model"), reverse=True)]
    named = [n for n in (run.settings.get("tokenizer"), (run.settings.get("policy") or {}).get("name")) if n]
    found = next((f for f in (p / "tokenizer.json" for p in (*saved, *map(Path, named))) if f.exists()), None)
    found = found or next(filter(None, map(downloaded, named)), None)
    if found is None:
        return None
    from tokenizers import Tokenizer
    return lru_cache(2 ** 16)(partial(Tokenizer.from_file(str(found)).decode, skip_special_tokens=False))


def downloaded(name: str) -> str | None:
    """The tokenizer's file of a hub model, if it was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    with suppress(ValueError):                                # a folder is no hub id
        found = try_to_load_from_cache(name, "tokenizer.json")
        return found if isinstance(found, str) else None


def pieces(ids: Sequence[int], decode: Callable[[tuple[int, ...]], str], patience: int = 4) -> list[str]:
    """The text that each token adds. A character made of several tokens stands at the last of them.

    >>> pieces([0, 1, 2], lambda ids: " ".join("abc"[i] for i in ids))
    ['a', ' b', ' c']
    """
    out, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = decode(tuple(ids[start:read])), decode(tuple(ids[start:end]))
        if now.endswith("\ufffd") and end < len(ids) and end - read < patience:
            out.append("")
            continue
        out.append(now[len(before):])
        start, read = read, end
    return out
