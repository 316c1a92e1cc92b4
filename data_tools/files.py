"""Raw records of files: jsonl, json, csv and parquet, each also .gz; folders of them; data sets of the hub."""
from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from data_tools.fields import DataError, near, shorten

Located = tuple[str, "dict | DataError"]                      # (place, record), or what is wrong there
KINDS = (".jsonl", ".json", ".csv", ".parquet")


class Source(NamedTuple):
    name: str
    records: Callable[[], Iterator[Located]]


# ---------------------------------------------------------------------------------------------------- finding sources
def resolve(source, split: str | None = None, streaming: bool = False) -> list[Source]:
    """The files or data sets that `source` names: a path, a glob, a folder, a hub id, or a list of these.

    `hub:owner/name` or `hub:owner/name/config` always means the hub; a bare `owner/name` that is no path here and has
    no file ending does too. `split` picks a split of the hub, or the files of a folder with that word in their names.
    Nothing found, an ending that is not known, or a split where there are none is an error.
    """
    if isinstance(source, (list, tuple)):
        return [found for one in source for found in resolve(one, split, streaming)]
    name = os.path.expanduser(str(source))
    if name.startswith("hub:"):
        return [_hub(name.removeprefix("hub:"), split, streaming)]
    path = Path(name)
    if path.is_dir():
        return _folder(path, split)
    if not path.exists() and kind(name) is None and re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", name):
        return [_hub(name, split, streaming)]
    if split is not None:
        raise ValueError(f"split={split!r} picks from a hub data set or a folder, but {name} is a file: leave it out")
    found = [name] if path.exists() else sorted(glob(name, recursive=True))
    if not found:
        exists(name)
    return [_file(one) for one in found if has_magic(name) is False or Path(one).is_file()]


def kind(name: str) -> str | None:
    """The file ending that says how to read a file, without `.gz`; None when it is not one of KINDS."""
    ending = Path(name.removesuffix(".gz")).suffix
    return ending if ending in KINDS else None


def _file(name: str) -> Source:
    ending = kind(name)
    if ending is None:
        raise ValueError(f"{name}: unknown file ending{near(Path(name).suffix, KINDS)} "
                         f"Known: {', '.join(KINDS)}, each also with .gz")
    return Source(name, partial(READERS[ending], name))


def _folder(path: Path, split: str | None) -> list[Source]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        import datasets
        return [_rows(datasets.load_from_disk(str(path)), str(path), split)]
    files = sorted(str(p) for p in path.rglob("*") if p.is_file() and kind(p.name))
    chosen = [f for f in files if split is None or split in re.split(r"[\W_]+", os.path.relpath(f, path))]
    if not chosen:
        raise FileNotFoundError(f"{path}: no file ends in {', '.join(KINDS)} (or .gz)" if not files else
                                f"{path}: no file has {split!r} in its name; files: {', '.join(files[:8])}")
    return [_file(f) for f in chosen]


def _hub(name: str, split: str | None, streaming: bool) -> Source:
    import datasets
    path, config = name, None
    if not os.path.exists(name) and name.count("/") == 2:
        path, config = name.rsplit("/", 1)
    try:
        data = datasets.load_dataset(path, config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name}: no such file or folder here, and as a hub data set it cannot be loaded: "
                                f"{error}") from error
    return _rows(data, name, split)


def _rows(data, name: str, split: str | None) -> Source:
    if isinstance(data, dict):                                # several splits
        if split is None and len(data) > 1 or split is not None and split not in data:
            raise ValueError(f"{name} has the splits {', '.join(data)}: name one with split=...")
        split, data = next((s, d) for s, d in data.items() if split in (None, s))
    return Source(name, partial(_numbered, data, f"{name}[{split}]" if split else name))


def _numbered(rows: Iterable[dict], name: str) -> Iterator[Located]:
    for n, row in enumerate(rows, 1):
        yield f"{name}:{n}", {k: v for k, v in row.items() if v is not None}


# ------------------------------------------------------------------------------------------------------- reading files
@contextmanager
def _open(name: str):
    """The bytes of a file, unpacked. A damaged archive is a DataError that names the file."""
    with gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb") as stream:
        try:
            yield stream
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError("unreadable", f"the gzip archive is damaged or cut short ({error})", name) from error


@contextmanager
def _text(name: str):
    """The characters of a file. A byte that is not UTF-8 is a DataError that names line and byte."""
    try:
        with _open(name) as stream:
            yield io.TextIOWrapper(stream, "utf-8-sig", newline="")
    except UnicodeDecodeError:
        for place, start, raw in _lines(name):
            _decode(raw, place, start)
        raise


def _lines(name: str) -> Iterator[tuple[str, int, bytes]]:
    """(place, offset in the file, bytes) of each line."""
    with _open(name) as stream:
        start = 0
        for number, raw in enumerate(stream, 1):
            yield f"{name}:{number}", start, raw
            start += len(raw)


def _decode(raw: bytes, place: str, start: int) -> str:
    try:
        return raw.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not utf-8", f"byte {error.start + 1} of the line (byte {start + error.start + 1} of the file) "
                        f"is 0x{raw[error.start]:02x}, which is not UTF-8: convert the file, for example with "
                        "iconv -f latin1 -t utf-8", place) from error


def _malformed(error: json.JSONDecodeError, place: str) -> DataError:
    return DataError("malformed json", f"malformed json: {error.msg}, near "
                     f"{error.doc[max(0, error.pos - 20):error.pos + 20]!r}", place)


def _object(value, place: str) -> Located:
    if isinstance(value, dict):
        return place, value
    return place, DataError("malformed json", f"a record should be an object, found {shorten(value)}", place)


def _jsonl(name: str) -> Iterator[Located]:
    for place, start, raw in _lines(name):
        if raw.isspace():
            continue
        try:
            value = json.loads(_decode(raw, place, start))
        except json.JSONDecodeError as error:
            yield place, _malformed(error, place)
        except DataError as error:
            yield place, error
        else:
            yield _object(value, place)


def _json(name: str, chunk: int = 1 << 20) -> Iterator[Located]:
    """The records of one JSON list, or of JSON objects one after the other, decoded chunk by chunk."""
    between, decode = re.compile(r"[\s,\[\]]*"), json.JSONDecoder().raw_decode
    buffer, at, line, brackets, more = "", 0, 1, "", True
    with _text(name) as stream:
        while True:
            skipped = between.match(buffer, at).group()
            brackets += "".join(c for c in skipped if c in "[]")
            line, at = line + skipped.count("\n"), at + len(skipped)
            try:
                value, end = decode(buffer, at)
            except json.JSONDecodeError as error:
                if more and (error.pos >= len(buffer) - 16 or error.msg.startswith("Unterminated")):
                    text = stream.read(max(chunk, len(buffer) - at))
                    buffer, at, more = buffer[at:] + text, 0, bool(text)
                    continue
                if at == len(buffer) and brackets.count("[") == brackets.count("]"):
                    return
                line += buffer.count("\n", at, error.pos)
                if at == len(buffer):
                    raise DataError("malformed json", "malformed json: the file ends before its list does",
                                    f"{name}:{line}") from None
                raise _malformed(error, f"{name}:{line}") from error
            yield _object(value if brackets in ("", "[") else [value], f"{name}:{line}")
            line, at = line + buffer.count("\n", at, end), end


def _csv(name: str) -> Iterator[Located]:
    csv.field_size_limit(2 ** 31 - 1)
    with _text(name) as stream:
        rows = csv.DictReader(stream, strict=True)
        header = rows.fieldnames or []
        if len(set(header)) < len(header):
            raise DataError("malformed csv", f"the header names a column twice: {', '.join(header)}", f"{name}:1")
        while True:
            place = f"{name}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError("malformed csv", f"malformed csv: {error}", place) from error
            if row is None:
                return
            whole = None not in row and None not in row.values()
            yield place, row if whole else DataError(
                "malformed csv", f"the row does not have the {len(header)} cells of the header: "
                f"{shorten([v for v in row.values() if v is not None])}", place)


def _parquet(name: str) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    with _open(name) as stream, tempfile.TemporaryFile() as spool:
        if name.endswith(".gz"):                              # parquet needs to seek, cheaply
            shutil.copyfileobj(stream, spool)
            stream = spool
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise DataError("unreadable", f"not a parquet file: {error}", name) from error
        yield from _numbered((row for batch in file.iter_batches(1000) for row in batch.to_pylist()), name)


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


# ------------------------------------------------------------------------------------------------------- writing files
def write(records: Iterable[dict], path) -> int:
    """Write records to a .jsonl, .jsonl.gz or .parquet file and return how many.

    The file appears under its name only when it is complete; until then a file that was there stays. What JSON or the
    parquet columns cannot hold is an error, and nothing is left behind.
    """
    path = Path(path)
    ending = kind(path.name)
    if ending not in WRITERS or ending == ".parquet" and path.name.endswith(".gz"):
        raise ValueError(f"{path}: cannot write this file ending; known: .jsonl, .jsonl.gz, .parquet")
    with part(path) as temporary:
        with open(temporary, "wb") as stream:
            if path.name.endswith(".gz"):
                with gzip.GzipFile("", "wb", 6, stream, mtime=0) as packed:
                    count = WRITERS[ending](records, packed)
            else:
                count = WRITERS[ending](records, stream)
        os.replace(temporary, path)
    return count


def exists(name: str | Path) -> None:
    """An error with the nearest name, where there is no such file."""
    path = Path(name)
    if not path.exists():
        parent = path.parent if path.parent.is_dir() else Path()
        raise FileNotFoundError(f"{name} does not exist{near(path.name, os.listdir(parent))}")


@contextmanager
def part(path: Path) -> Iterator[Path]:
    """A name to write a file under; afterwards it is gone, unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_jsonl(records: Iterable[dict], stream) -> int:
    count = 0
    for count, record in enumerate(records, 1):
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError("not json", f"record {count} cannot be written as JSON: {error}") from error
        try:
            raw = line.encode()
        except UnicodeEncodeError:                            # half a surrogate pair: JSON has it as an escape only
            raw = json.dumps(record).encode()
        stream.write(raw + b"\n")
    return count


def _write_parquet(records: Iterable[dict], stream) -> int:
    """Two passes over a temporary copy: the first finds the columns and types of all records, the second writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with tempfile.TemporaryFile() as spool:
        count = _write_jsonl(records, spool)
        try:
            schema = pa.schema([])
            for rows in _batches(spool):
                names = dict.fromkeys(key for row in rows for key in row)
                table = pa.table({name: [row.get(name) for row in rows] for name in names})
                schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
            with pq.ParquetWriter(stream, schema) as writer:
                for rows in _batches(spool):
                    writer.write_table(pa.Table.from_pylist(rows, schema))
        except (pa.ArrowException, TypeError) as error:
            raise DataError("not parquet", f"the records do not fit common parquet columns ({error}): write .jsonl, "
                            "which takes records of any shape") from error
    return count


def _batches(spool, size: int = 1000) -> Iterator[list[dict]]:
    spool.seek(0)
    lines = map(json.loads, spool)
    return iter(lambda: list(islice(lines, size)), [])


WRITERS = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
