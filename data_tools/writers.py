"""Data sets as files: one folder per name, one file or several per split, and from there to the hub."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from data_tools import files
from data_tools.fields import PLACE, DataError, near
from data_tools.formats import WRITERS, lookup
from data_tools.records import Group
from data_tools.shapes import JSON_COLUMN, to_trl

__all__ = ["FORMATS", "push", "write"]

FORMATS = {**WRITERS, "trl": to_trl}
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def write(groups: Iterable[Group], folder: Path, *, name: str = "groups", format: str = "group", ending: str = ".jsonl",
          rows: int | None = None) -> list[str]:
    """Write groups to `folder`/`name`/`split`.jsonl, one file for each `meta["split"]` (train where there is none).

    format      of data_tools.formats.dump: group keeps everything; pair, unpaired, stepwise, demonstration and prompts have
                TRL's columns, and trl those of these that fit
    ending      .jsonl, .jsonl.gz or .parquet
    rows        of one file: more make split-00000-of-00003.parquet and so on

    A group that does not fit the format is an error. Returns what was written, in words.
    """
    record = lookup(format, FORMATS)
    if ending not in ENDINGS:
        raise ValueError(f"cannot write files that end in {ending!r}{near(ending, ENDINGS)} Known: {', '.join(ENDINGS)}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows of one file should be at least 1, found {rows}")
    home = Path(folder) / name
    counts = spooled(groups, home, record)
    for split, count in counts.items():
        spool, most = home / f".{split}.spool", rows or count
        if ending == ".jsonl" and not rows:
            spool.replace(home / f"{split}.jsonl")
            continue
        pieces = -(-count // most)
        with spool.open("rb") as stream:
            for n in range(pieces):
                part = f"-{n:05d}-of-{pieces:05d}" if rows else ""
                lines = (json.loads(line) for line in islice(stream, most))
                files.write(texts(lines) if (format, ending) == ("group", ".parquet") else lines, home / f"{split}{part}{ending}")
        spool.unlink()
    return [f"{name}: {count:,} records of format {format} in {name}/{split}{ending}" for split, count in counts.items()]


def spooled(groups: Iterable[Group], home: Path, record) -> dict[str, int]:
    """One temporary file of records for each split; how many records it has."""
    home.mkdir(parents=True, exist_ok=True)
    streams, counts = {}, {}
    try:
        for group in groups:
            split = group.meta.get("split", "train")
            if split not in streams:
                streams[split], counts[split] = (home / f".{split}.spool").open("wb"), 0
            try:
                counts[split] += files.WRITERS[".jsonl"]([record(group)], streams[split])
            except DataError as error:
                error.place = error.place or group.meta.get(PLACE, "")
                raise
    finally:
        for stream in streams.values():
            stream.close()
    return dict(sorted(counts.items()))


def texts(records: Iterable[Mapping]) -> Iterator[dict]:
    """Groups as one column of JSON text, which any of them fits."""
    return ({JSON_COLUMN: json.dumps(record)} for record in records)


def push(folder: Path, repository: str, *, private: bool = True, message: str = "Data set") -> str:
    """Upload a folder that a build wrote as a data set of the hub; returns its address. Needs `hf auth login`.

    repository  owner/name; it is made if it is not there, private unless that is switched off
    """
    from huggingface_hub import HfApi
    hub = HfApi()
    try:
        hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        return str(hub.upload_folder(folder_path=str(folder), repo_id=repository, repo_type="dataset", commit_message=message,
                                     allow_patterns=uploaded(folder)))
    except Exception as error:                                # whatever the hub's client raises
        raise ConnectionError(f"{folder} is not on the hub ({type(error).__name__}: {error}): see that huggingface.co can be "
                              f"reached, that `hf auth login` was done, and that {repository!r} may be written") from error


def uploaded(folder: Path) -> list[str]:
    """What `push` uploads: every file of the folder but hidden ones, which a build that was killed may have left."""
    found = (p.relative_to(folder) for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return [p.as_posix() for p in found if not any(piece.startswith(".") for piece in p.parts)]
