"""Scores kept on disk by content, row functions under a hard time limit, batches of equal length, whole files.

A score is known again by the reward's name and settings, and by what the reward reads of the row: prompt, response,
fields. For a row function its source counts too. Code that a reward calls does not: after changing it, use another file.
"""
from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path

from data_tools.formats import dump, load
from data_tools.records import Group, Response
from rewards.base import Comparison, Reward, Row, RowReward, ScoringError, as_reward, score, values_of

__all__ = ["Cached", "CachedComparison", "Store", "Timed", "by_length", "cached", "remembered", "score_file", "timed"]

BOOKKEEPING = ("place", "unscored", "wins")                   # fields of a row that say nothing about it


# --------------------------------------------------------------------------------------------------------------- batches
def by_length(lengths: Sequence[int], budget: int, *, waste: float = 0.05) -> list[list[int]]:
    """Batches of row numbers, longest rows first: padded, none has more than `budget` tokens (but for a row that is
    longer on its own), and padding adds at most `waste` to its real tokens.

    >>> by_length([3, 10, 10, 3, 9], 20)
    [[1, 2], [4], [0, 3]]
    """
    batches: list[list[int]] = []
    width = real = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = width * (len(batches[-1]) + 1) if batches else 0
        if not batches or padded > budget or padded > (1 + waste) * (real + lengths[row]):
            batches.append([])
            width, real = lengths[row], 0
        batches[-1].append(row)
        real += lengths[row]
    return batches


# ----------------------------------------------------------------------------------------------------------------- cache
class Store:
    """JSON values by key in one sqlite file. Written in transactions, never changed: a killed process loses at most the
    batch it was at."""

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.file = sqlite3.connect(self.path, check_same_thread=False, timeout=60)
            self.file.execute("pragma journal_mode=wal")
            self.file.execute("create table if not exists scores (key blob primary key, value text not null) without rowid")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no score cache ({error}): give another file, or remove it") from None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, object]:
        found, step = {}, 500
        with self.lock:
            for n in range(0, len(keys), step):
                some = keys[n:n + step]
                found.update(self.file.execute(f"select key, value from scores where key in ({','.join('?' * len(some))})", some))
        return {key: json.loads(value) for key, value in found.items()}

    def put(self, values: Mapping[bytes, object]) -> None:
        with self.lock, self.file:
            self.file.executemany("insert or ignore into scores values (?, ?)", [(k, json.dumps(v)) for k, v in values.items()])

    def close(self) -> None:
        self.file.close()


def digest(*content) -> bytes:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).digest()


def identity(reward: Reward | Comparison) -> list:
    """What a reward is, apart from the rows."""
    function = getattr(reward, "function", None)
    bare = function.func if isinstance(function, partial) else function
    source = ""
    with suppress(OSError, TypeError):
        source = inspect.getsource(bare) if bare is not None else ""
    return [reward.name, reward.settings(), source]


def content(reward: Reward, row: Row) -> dict:
    """What a reward sees of a row."""
    fields = row.fields()
    if hasattr(reward, "reads"):
        return {name: fields[name] for name in reward.reads() if name in fields}
    return {**{k: v for k, v in fields.items() if k not in BOOKKEEPING}, "response": row.response.text}


@dataclass(frozen=True)
class Cached:
    """A reward that looks into the store first, and puts there what it computes, `chunk` rows at a time."""
    reward: Reward
    store: Store
    chunk: int = 256

    @property
    def name(self) -> str:
        return self.reward.name

    def settings(self) -> dict:
        return self.reward.settings()

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        who = identity(self.reward)
        keys = [digest(who, content(self.reward, row)) for row in rows]
        known = self.store.get(list(dict.fromkeys(keys)))
        new = list({key: row for key, row in zip(keys, rows, strict=True) if key not in known}.items())
        for n in range(0, len(new), self.chunk):
            some = new[n:n + self.chunk]
            found = dict(zip([key for key, _ in some], values_of(self.reward, [row for _, row in some], "mark"), strict=True))
            self.store.put({key: x for key, x in found.items() if not isinstance(x, ScoringError)})
            known.update(found)
        return [known[key] for key in keys]


@dataclass(frozen=True)
class CachedComparison:
    """The same for comparisons, group by group; the order of the responses counts."""
    comparison: Comparison
    store: Store
    chunk: int = 16

    @property
    def name(self) -> str:
        return self.comparison.name

    def settings(self) -> dict:
        return self.comparison.settings()

    def compare(self, groups: Sequence[Group]) -> list:
        who = identity(self.comparison)
        keys = [digest(who, [content(self.comparison, Row(g, r)) for r in g.responses]) for g in groups]
        known = self.store.get(list(dict.fromkeys(keys)))
        new = list({key: g for key, g in zip(keys, groups, strict=True) if key not in known}.items())
        for n in range(0, len(new), self.chunk):
            some = new[n:n + self.chunk]
            found = dict(zip([key for key, _ in some], self.comparison.compare([g for _, g in some]), strict=True))
            self.store.put({key: wins for key, wins in found.items() if not any(None in row for row in wins)})
            known.update(found)
        return [known[key] for key in keys]


def cached(thing: Callable, store: Store, name: str | None = None) -> Reward | Comparison:
    """A reward, function or comparison with a memory; of a combination the components remember."""
    if hasattr(thing, "compare"):
        return CachedComparison(thing, store)
    if hasattr(thing, "comparison"):
        return replace(thing, comparison=cached(thing.comparison, store))
    if hasattr(thing, "parts"):
        return replace(thing, parts={part: cached(reward, store, part) for part, reward in thing.parts.items()})
    return Cached(as_reward(thing, name), store)


def remembered(chat: Callable[[list], str], store: Store, who: object) -> Callable[[list], str]:
    """A judge's back end with a memory: an answer that was paid for is kept, whatever happens to the others.

    who         what makes two back ends different, such as `Endpoint.settings()`; for judges that answer alike each time
    """
    def ask(messages: list) -> str:
        key = digest("chat", who, messages)
        known = store.get([key])
        if key not in known:
            known = {key: chat(messages)}
            store.put(known)
        return known[key]
    return ask


# ----------------------------------------------------------------------------------------------------------- time limits
def work(pipe, function: Callable) -> None:
    """A worker process: arguments in, (worked, value or reason) out, until the pipe is closed."""
    os.setsid()                                               # so that it ends together with all that it starts
    pipe.send("ready")
    with suppress(EOFError, OSError):
        while True:
            arguments = pipe.recv()
            try:
                answer = (True, function(*arguments))
            except BaseException as error:
                answer = (False, f"{type(error).__name__}: {error}")
            pipe.send(answer)


class Timed:
    """A row function in worker processes, with a hard limit: one that hangs or dies is killed, with all that it started, and
    its row gets an error.

    function    importable by name, since another process has to find it
    seconds     for each row
    workers     rows at a time
    """

    def __init__(self, function: Callable, *, seconds: float, workers: int = 2, name: str | None = None):
        self.reward, self.seconds, self.workers = RowReward(function, name), seconds, workers
        self.idle: list = []

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def function(self) -> Callable:
        return self.reward.function

    def settings(self) -> dict:
        return self.reward.settings()

    def reads(self) -> list[str]:
        return self.reward.reads()

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        out: list = [None] * len(rows)
        todo, busy = deque(range(len(rows))), {}
        try:
            while todo or busy:
                while todo and len(busy) < self.workers:
                    i = todo.popleft()
                    try:
                        arguments = self.reward.arguments(rows[i])
                    except ScoringError as error:
                        out[i] = error
                        continue
                    worker = self.idle.pop() if self.idle else start(self.function)
                    worker[1].send(arguments)
                    busy[worker[1]] = (i, worker, time.monotonic() + self.seconds)
                first = min((until for _, _, until in busy.values()), default=0.0)
                ready = set(wait(list(busy), max(0.0, first - time.monotonic())))
                for pipe, (i, worker, until) in list(busy.items()):
                    if pipe in ready:
                        out[i], alive = received(worker)
                    elif time.monotonic() >= until:
                        out[i], alive = ScoringError(f"took more than {self.seconds:g} s and was killed"), False
                    else:
                        continue
                    del busy[pipe]
                    if alive:
                        self.idle.append(worker)
                    else:
                        kill(worker)
        finally:
            for _, worker, _ in busy.values():
                kill(worker)
        return out

    def close(self) -> None:
        while self.idle:
            kill(self.idle.pop())

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def timed(*, reward: object, seconds: float, workers: int = 2) -> Reward:
    """A row function, as `rewards.index.find` takes it, under a time limit."""
    from rewards.index import find
    function = find(reward)
    if hasattr(function, "settings"):
        raise ValueError(f"a time limit is for functions of one row, and {reward!r} is a reward of many rows")
    return Timed(function, seconds=seconds, workers=workers)


def start(function: Callable) -> tuple:
    """A worker process, and the pipe to it, ready for its first row."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, function), daemon=True)
    try:
        process.start()
        there.close()
        if not here.poll(60):
            raise TimeoutError("it takes more than 60 s to start")
        here.recv()
    except Exception as error:                                # not picklable, not importable, ended at once
        raise ScoringError(f"{function!r} cannot run in a process of its own ({type(error).__name__}: {error}): define it at the "
                           "top of a module that another process can import") from None
    return process, here


def received(worker: tuple) -> tuple[float | ScoringError, bool]:
    """The answer of a worker, and whether it is still there."""
    process, pipe = worker
    try:
        worked, value = pipe.recv()
    except (EOFError, OSError):
        process.join(5)
        return ScoringError(f"its process ended with exit code {process.exitcode}"), False
    return (value if worked else ScoringError(value)), True


def kill(worker: tuple) -> None:
    process, pipe = worker
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    pipe.close()


# ----------------------------------------------------------------------------------------------------------------- files
def score_file(source, rewards: Mapping[str, Callable] | Sequence[Callable], out, *, cache=None, on_error: str = "raise",
               step: int = 256, progress: bool = False, format: str | None = None, limit: int | None = None) -> dict:
    """Score a file of groups into another, step by step, and count: {"groups", "responses", "scored", "unscored", "reasons",
    "scores"}; the last holds mean, least and largest score of each reward.

    source      what `data_tools.load` takes
    rewards     {name: reward, function or comparison}, or a list of them
    out         .jsonl, .jsonl.gz or .parquet; there only when it is complete
    cache       a file of scores to keep and to use again. Without one, scores are kept beside `out` until it is complete, so
                that the same command goes on where it was stopped
    on_error    as in `rewards.score`
    step        groups that are scored at a time
    progress    show a bar
    """
    named = rewards if isinstance(rewards, Mapping) else {as_reward(r).name: r for r in rewards}
    path = Path(cache) if cache else Path(out).with_name(f".{Path(out).name}.scores")
    store = Store(path)
    counts = {"groups": 0, "responses": 0, "scored": Counter(), "unscored": Counter(), "reasons": {}, "scores": {}}
    try:
        remembering = {name: cached(thing, store, name) for name, thing in named.items()}
        dump(scored(load(source, format=format, limit=limit), remembering, counts, on_error, step, progress), out)
    finally:
        store.close()
    if cache is None:
        for end in ("", "-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
    return {**counts, "scored": dict(counts["scored"]), "unscored": dict(counts["unscored"])}


def scored(groups, rewards: Mapping[str, Callable], counts: dict, on_error: str, step: int, progress: bool) -> Iterator[Group]:
    source = iter(groups)
    with bar(progress) as advance:
        while some := list(islice(source, step)):
            score(some, rewards, on_error=on_error)
            for group in some:
                counts["groups"] += 1
                for response in group.responses:
                    count(response, rewards, counts)
                yield group
            advance(len(some))


def count(response: Response, rewards: Mapping[str, Callable], counts: dict) -> None:
    counts["responses"] += 1
    reasons = response.meta.get("unscored", {})
    for name in rewards:
        if name in response.scores:
            value, known = response.scores[name], counts["scores"].get(name)
            counts["scored"][name] += 1
            mean, least, most = known or (0.0, value, value)
            counts["scores"][name] = mean + (value - mean) / counts["scored"][name], min(least, value), max(most, value)
        else:
            counts["unscored"][name] += 1
            shown = counts["reasons"].setdefault(name, [])
            if len(shown) < 5 and reasons[name] not in shown:
                shown.append(reasons[name])


class bar:
    """Groups done and groups per second, where somebody looks."""

    def __init__(self, show: bool):
        from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        self.bar = Progress(SpinnerColumn(), TextColumn("score"), MofNCompleteColumn(), TextColumn("groups"), TimeElapsedColumn(),
                            disable=not show)

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        return partial(self.bar.advance, self.bar.add_task("score", total=None))

    def __exit__(self, *_) -> None:
        self.bar.stop()
