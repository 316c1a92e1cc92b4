"""Shards on disk by content, and what a stage made of each of its inputs.

    shards/DIGEST.jsonl       groups; the name is the digest of the bytes
    made/STAGE/INPUT.json     an entry: the shards that a stage made of an input, and what it counted
    files/STAGE/INPUT/        files that a stage wrote about its input

Whatever has its final name is complete: it was written under another one, synced, and renamed. An entry comes after all that
it names. Any of it may be removed: what is missing is made again.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_tools.files import WRITERS, part
from data_tools.records import Group


class Shard(NamedTuple):
    """Groups on disk: the digest of their bytes, and how many groups and responses."""
    digest: str
    groups: int
    responses: int


@dataclass
class Entry:
    """What a stage made of an input.

    counts      numbers that add up over inputs
    said        words for the summary
    failed      groups that the stage could not finish, apart from the others
    files       names of the files that it wrote
    """
    shards: list[Shard] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    failed: Shard | None = None
    files: list[str] = field(default_factory=list)


class Hashed:
    """A file that is being written, with the digest of what was written so far."""

    def __init__(self, stream):
        self.stream, self.hash = stream, blake2b(digest_size=16)

    def write(self, raw: bytes) -> None:
        self.hash.update(raw)
        self.stream.write(raw)


def sync(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def commit(path: Path, value) -> None:
    """JSON in a file that is there as a whole or not at all."""
    with part(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(value, stream, ensure_ascii=True, indent=1)
            stream.write("\n")
            sync(stream)
        os.replace(temporary, path)


@dataclass(frozen=True)
class Cache:
    folder: Path

    def path(self, shard: Shard) -> Path:
        return self.folder / "shards" / f"{shard.digest}.jsonl"

    def write(self, groups: Iterable[Group]) -> Shard:
        """Groups as a shard. The same groups are the same file."""
        responses = 0

        def records() -> Iterator[dict]:
            nonlocal responses
            for group in groups:
                responses += len(group.responses)
                yield group.to_json()

        with part(self.folder / "shards" / "open") as temporary:
            with open(temporary, "wb") as stream:
                hashed = Hashed(stream)
                count = WRITERS[".jsonl"](records(), hashed)
                sync(stream)
            shard = Shard(hashed.hash.hexdigest(), count, responses)
            os.replace(temporary, self.path(shard))
        return shard

    def cut(self, groups: Iterable[Group], size: int) -> Iterator[Shard]:
        """Groups as shards of `size`."""
        source = iter(groups)
        while some := list(islice(source, size)):
            yield self.write(some)

    def read(self, *shards: Shard) -> Iterator[Group]:
        for shard in shards:
            with open(self.path(shard), "rb") as stream:
                for line in stream:
                    yield Group.from_json(json.loads(line))

    # ------------------------------------------------------------------------------------------------------- entries
    def entry(self, stage: str, given: str) -> Path:
        return self.folder / "made" / stage / f"{given}.json"

    def get(self, stage: str, given: str) -> Entry | None:
        """What the stage made of the input, if all of it is there."""
        try:
            held = json.loads(self.entry(stage, given).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        held |= {"shards": [Shard(*s) for s in held["shards"]], "failed": held["failed"] and Shard(*held["failed"])}
        found = Entry(**held)
        needed = [self.path(s) for s in (*found.shards, *filter(None, [found.failed]))]
        needed += [self.files(stage, given) / name for name in found.files]
        return found if all(path.exists() for path in needed) else None

    def put(self, stage: str, given: str, entry: Entry) -> Entry:
        commit(self.entry(stage, given), asdict(entry))
        return entry

    # --------------------------------------------------------------------------------------------------------- files
    def files(self, stage: str, given: str) -> Path:
        return self.folder / "files" / stage / given

    def fill(self, stage: str, given: str, write: Callable[[Path], object]) -> tuple[object, list[str]]:
        """Calls `write` with an empty folder, which is `files` afterwards; what it returns, and the names of the files."""
        final = self.files(stage, given)
        temporary = final.with_name(f".{given}.{os.getpid()}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            said = write(temporary)
            for path in temporary.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as stream:
                        os.fsync(stream.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return said, sorted(str(p.relative_to(final)) for p in final.rglob("*") if p.is_file())


@dataclass(frozen=True)
class Stored:
    """The groups of shards, read anew on every pass and never held."""
    cache: Cache
    shards: Sequence[Shard]

    def __iter__(self) -> Iterator[Group]:
        return self.cache.read(*self.shards)

    def __len__(self) -> int:
        return sum(s.groups for s in self.shards)
