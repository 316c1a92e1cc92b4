"""Groups -> a folder of memory-mapped arrays: encoded once, read at random by any number of processes.

A prepared folder holds `meta.json` and flat arrays, one file `NAME.bin` each:

    prompt, response      ids of all prompts and of all responses, one after the other
    prompt_at, response_at, row_at, place_at, wins_at     where item n begins; one entry more than items
    group_prompt, row_prompt                              which prompt a group and a row has
    lengths               tokens of each group, the prompt once per row
    place                 where each group came from, as text
    mask, train, relevance, wins, weight, column.*        only where a group has something to say there
    NAME.KEY.column       a column attached later, see `Prepared.column_writer`
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from data_tools.batch import Batch
from data_tools.collate import neutral, pad
from data_tools.columns import column
from data_tools.encoding import Counts, EncodedGroup, EncodedRow, Encoding, encode, pad_token
from data_tools.records import Group

FORMAT = 1
META = "meta.json"
CHARACTERS = 1 << 23                                          # a batch of groups ends here, which bounds memory
COLUMN = "column."


# ------------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Prepared:
    """Encoded groups in a folder. `prepared[n]` is an EncodedGroup, `batch(indices)` a Batch of any of them.

    Pickles as its path, so it travels to workers for nothing; the arrays are mapped, not read.
    """
    folder: Path
    attached: tuple[tuple[str, str], ...] = ()                # (column, key) of the columns that batches also hold

    @classmethod
    def open(cls, folder) -> Prepared:
        """A finished folder; anything else is an error that says what is wrong with it."""
        folder = Path(folder)
        if wrong := damage(folder):
            raise ValueError(f"{folder} is not a finished prepared data set: {wrong}. Run prepare again; it replaces "
                             "a damaged folder")
        return cls(folder)

    def __reduce__(self):
        return Prepared, (self.folder, self.attached)

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / META).read_text("utf-8"))

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: _mapped(self.folder / f"{name}.bin", dtype, size)
                for name, (dtype, size) in self.meta["arrays"].items()}

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns of rows (N) and response tokens (N T), stored and attached."""
        stored = {name.removeprefix(COLUMN): a for name, a in self.arrays.items() if name.startswith(COLUMN)}
        return stored | {name: _mapped(self._file(name, key), "float32", self._size(name))
                         for name, key in self.attached}

    @property
    def fingerprint(self) -> str:
        """Changes with the data, the tokenizer and the encoding."""
        return self.meta["fingerprint"]

    @property
    def counts(self) -> Counts:
        """What was dropped and cut when the folder was made."""
        return Counts(**self.meta["counts"])

    @property
    def lengths(self) -> np.ndarray:
        """(groups) tokens of each group, the prompt once per row: its cost in `Batch.microbatches`."""
        return self.arrays["lengths"]

    def __len__(self) -> int:
        return self.meta["arrays"]["lengths"][1]

    def __getitem__(self, n: int) -> EncodedGroup:
        if not 0 <= n < len(self):
            raise IndexError(f"there is no group {n}: {self.folder} holds {len(self)}, numbered from 0")
        a = self.arrays
        first, end = a["row_at"][n:n + 2].tolist()
        own = int(a["group_prompt"][n])
        prompts, at = a["row_prompt"][first:end].tolist(), a["response_at"][first:end + 1].tolist()
        rows = [EncodedRow(tokens=a["response"][i:j],
                           prompt=None if prompt == own else self._item("prompt", prompt),
                           mask=a["mask"][i:j] if "mask" in a else None,
                           train=bool(a["train"][row]) if "train" in a else True,
                           columns={name: self._cell(name, values, row, i, j) for name, values in self.columns.items()})
                for row, prompt, i, j in zip(range(first, end), prompts, at, at[1:], strict=False)]
        wins = self._item("wins", n) if "wins" in a else ()
        return EncodedGroup(self._item("prompt", own), rows,
                            relevance=a["relevance"][first:end] if "relevance" in a else None,
                            wins=wins.reshape(len(rows), -1) if len(wins) else None,
                            weight=float(a["weight"][n]) if "weight" in a else 1.0,
                            place=self._item("place", n).tobytes().decode())

    def _cell(self, name: str, values: np.ndarray, row: int, start: int, end: int):
        """What a row has in a column: a value for each of its tokens start..end, a vector, or a number."""
        dims = column(name).dims
        if dims == "N T":
            return values[start:end]
        rows = self.meta["arrays"]["row_prompt"][1]
        return values.reshape(rows, -1)[row] if dims == "N D" else values[row].item()

    def _item(self, name: str, n: int) -> np.ndarray:
        start, end = self.arrays[f"{name}_at"][n:n + 2].tolist()
        return self.arrays[name][start:end]

    def batch(self, indices: Sequence[int], columns: Iterable[str] = (), *, side: str = "right") -> Batch:
        """The groups `indices`, in that order, as `pad` makes it of them. Stored and attached columns are in every
        batch; it is an error when one of `columns` is not among them."""
        return pad([self[int(n)] for n in indices], pad_id=self.meta["pad_id"], side=side, columns=columns)

    # --------------------------------------------------------------------------------------------- attached columns
    def has_column(self, name: str, key: str) -> bool:
        """Was this column written to the end under this key?"""
        file = self._file(name, key)
        return file.exists() and file.stat().st_size == 4 * self._size(name)

    def with_column(self, name: str, key: str) -> Prepared:
        """The same data with the column in its batches. `key` says what made it, such as the fingerprint of the
        reference model: a column written under another key is never used."""
        if not self.has_column(name, key):
            raise KeyError(f"{self.folder} has no column {name!r} made by {key!r}: write it with column_writer")
        return replace(self, attached=(*((n, k) for n, k in self.attached if n != name), (name, key)))

    @contextmanager
    def column_writer(self, name: str, key: str) -> Iterator[Callable[[Sequence[int], torch.Tensor], None]]:
        """Write a column (N T, on response tokens, or N) for all groups, in any order, for `with_column` to attach:

            with prepared.column_writer("logp_ref", key) as write:
                for indices in ...:
                    write(indices, reference(prepared.batch(indices)))

        The column exists when the block ends; it is an error if a group was not written, and after any error there is
        nothing. One process writes a column.
        """
        target, per_token = self._file(name, key), column(name).dims == "N T"
        part, done = target.with_suffix(f".{os.getpid()}.part"), np.zeros(len(self), bool)
        at = self.arrays["response_at"] if per_token else np.arange(self._size(name) + 1)

        def write(indices: Sequence[int], values: torch.Tensor) -> None:
            indices = [int(n) for n in indices]
            values = torch.as_tensor(values).detach().float().cpu().numpy()
            groups = [self[n] for n in indices]
            if per_token:
                values = values[_answers(groups, values.shape)]
            spans = [at[self.arrays["row_at"][n:n + 2]].tolist() for n in indices]
            if values.shape != (sum(end - start for start, end in spans),):
                raise ValueError(f"column {name!r} should be ({column(name).dims}) of the batch of these groups, found "
                                 f"shape {tuple(values.shape)}")
            for n, (start, end) in zip(indices, spans, strict=True):
                stream.seek(4 * start)
                stream.write(values[:end - start].tobytes())
                values, done[n] = values[end - start:], True

        try:
            with open(part, "wb") as stream:
                yield write
                if not done.all():
                    raise ValueError(f"column {name!r} was written for {done.sum()} of {len(self)} groups, the first "
                                     f"without it is group {int(done.argmin())}")
                stream.truncate(4 * self._size(name))
                _sync(stream)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def _file(self, name: str, key: str) -> Path:
        if column(name).dims not in ("N", "N T"):
            raise ValueError(f"column {name!r} is ({column(name).dims}); only columns (N) and (N T) can be attached")
        return self.folder / f"{name}.{blake2b(key.encode(), digest_size=16).hexdigest()}.column"

    def _size(self, name: str) -> int:
        return self.meta["arrays"]["response" if column(name).dims == "N T" else "row_prompt"][1]


def _mapped(path: Path, dtype: str, size: int) -> np.ndarray:
    if not size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", shape=(size,)).view(np.ndarray)


def _answers(groups: Sequence[EncodedGroup], shape: tuple[int, ...]) -> np.ndarray:
    """Where the response tokens are in the padded batch of these groups."""
    prompt = np.array([len(g.prompt if r.prompt is None else r.prompt) for g in groups for r in g.rows])[:, None]
    response = np.array([len(r.tokens) for g in groups for r in g.rows])[:, None]
    if shape != (len(prompt), int((prompt + response).max())):
        raise ValueError(f"found values of shape {tuple(shape)} for a batch of {len(prompt)} rows and "
                         f"{int((prompt + response).max())} tokens")
    at = np.arange(shape[1])[None, :]
    return (at >= prompt) & (at < prompt + response)


def damage(folder: Path) -> str | None:
    """What keeps a folder from being opened, None for nothing."""
    if not (folder / META).exists():
        return f"there is no {META}" if folder.exists() else "it does not exist"
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        if meta["format"] != FORMAT:
            return f"it has format {meta['format']}, this version reads {FORMAT}"
        sizes = {f"{name}.bin": size * np.dtype(dtype).itemsize for name, (dtype, size) in meta["arrays"].items()}
    except (ValueError, KeyError, TypeError) as error:
        return f"{META} cannot be read ({error!r})"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else "no file"
        if found != size:
            return f"{name} should have {size} bytes, found {found}"
    return None


# ------------------------------------------------------------------------------------------------------------- writing
def prepare(groups: Iterable[Group], tokenizer, folder, *, encoding: Encoding = Encoding(), batch: int = 1000,
            key: str | None = None, progress: Callable[[int], None] | None = None) -> Prepared:
    """Encode groups into `folder`, in one pass and in memory for `batch` groups; an up-to-date folder is used as it is.

    groups      any iterable. One that can be passed over again (a list, `load(...)`) is first compared with a folder
                that is there, which is much faster than encoding; a generator is always encoded
    key         says what the groups are, such as a hash of their files: a folder made with the same key, tokenizer and
                encoding is used without reading them at all
    progress    called with the number of groups read so far

    The folder appears under its name when it is complete and on disk; until then, and after an error, a full disk or
    Ctrl-C, what was there stays. A damaged or outdated folder is replaced; a folder with files of other kinds is an
    error. Whatever was dropped or cut is in `counts` of the result, and a warning.
    """
    folder = Path(folder)
    wanted = json.loads(json.dumps({"format": FORMAT, "tokenizer": tokenizer_fingerprint(tokenizer),
                                    "encoding": asdict(encoding), "pad_id": pad_token(tokenizer)}))
    if not damage(folder) and _current(json.loads((folder / META).read_text("utf-8")), wanted, groups, key):
        done = Prepared(folder)
    else:
        _replaceable(folder)
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            _fill(part, groups, tokenizer, encoding, batch, {**wanted, "key": key}, progress)
            _install(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        done = Prepared(folder)
    done.counts.warn()
    return done


def tokenizer_fingerprint(tokenizer) -> str:
    """Changes with anything of a tokenizer that changes ids: vocabulary, merges, special tokens, chat template."""
    if tokenizer.is_fast:
        tokenizer("a")                                        # resets truncation and padding, which are part of to_str
        model = tokenizer.backend_tokenizer.to_str()
    else:
        model = f"{type(tokenizer).__qualname__} {sorted(tokenizer.get_vocab().items())}"
    return _digest(model, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template)


def _digest(*parts) -> str:
    return blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _current(meta: dict, wanted: dict, groups: Iterable[Group], key: str | None) -> bool:
    """Is the folder with this meta what encoding the groups would give?"""
    if any(meta.get(name) != value for name, value in wanted.items()):
        return False
    if key is not None:
        return meta["key"] == key
    if iter(groups) is groups:
        return False
    content = blake2b(digest_size=16)
    for group in groups:
        content.update(_content(group))
    return meta["data"] == content.hexdigest()


def _content(group: Group) -> bytes:
    """All of a group that can change its encoding: how it prints, with lengths in place of texts, then the texts."""
    parts = [group.prompt, group.relevance, group.wins, group.weight, group.meta.get("tools")]
    parts += [x for r in group.responses for x in (r.text, r.tokens, r.logp, r.scores, r.train, r.prompt, r.meta)]
    shape = repr([len(x) if isinstance(x, str) else [x] for x in parts])
    return "".join([shape, *(x for x in parts if isinstance(x, str))]).encode("utf-8", "surrogatepass")


def _fill(part: Path, groups, tokenizer, encoding: Encoding, size: int, meta: dict, progress) -> None:
    counts, content = Counts(), blake2b(digest_size=16)
    with ExitStack() as stack:
        files = _Files(part, stack)
        for some in _batches(groups, size, content):
            files.add(encode(some, tokenizer, encoding, counts=counts))
            if progress is not None:
                progress(counts.read)
        if not counts.kept:
            raise ValueError(f"no group is left to prepare: {counts}")
        for stream in files.streams.values():
            _sync(stream)
    data = content.hexdigest()
    made_of = _digest(data, meta["tokenizer"], sorted(meta["encoding"].items()), FORMAT)
    with open(part / META, "w", encoding="utf-8") as stream:
        json.dump({**meta, "data": data, "fingerprint": made_of, "counts": asdict(counts),
                   "arrays": {n: [dtype.name, size] for n, (dtype, size) in files.arrays.items()}}, stream, indent=1)
        _sync(stream)


def _batches(groups: Iterable[Group], size: int, content) -> Iterator[list[Group]]:
    """Lists of up to `size` groups and about CHARACTERS characters; their content goes into the digest."""
    some, characters = [], 0
    for group in groups:
        raw = _content(group)
        content.update(raw)
        some.append(group)
        characters += len(raw)
        if len(some) >= size or characters >= CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _replaceable(folder: Path) -> None:
    if folder.exists():
        others = [p.name for p in folder.iterdir() if p.name != META and p.suffix not in (".bin", ".column", ".part")] \
            if folder.is_dir() else ["it is a file"]
        if others:
            raise ValueError(f"{folder} exists and is no prepared data set ({', '.join(sorted(others)[:5])}): give the "
                             "name of a new folder")


def _install(part: Path, folder: Path) -> None:
    """Give a finished folder its name, in place of one that may be there."""
    old = part.with_suffix(".old")
    try:
        os.rename(part, folder)
    except OSError:
        if not folder.exists():
            raise
        _replaceable(folder)                                  # there is one that is not empty
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(folder.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def _sync(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())


class _Files:
    """The arrays of a folder, each a file that grows; `stack` closes them."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.stack, self.streams, self.arrays = folder, stack, {}, {}     # arrays: name -> (dtype, size)

    def append(self, name: str, values, dtype) -> None:
        values, dtype = np.ascontiguousarray(values, dtype), np.dtype(dtype)
        if name not in self.streams:
            self.streams[name] = self.stack.enter_context(open(self.folder / f"{name}.bin", "wb"))  # noqa: SIM115
            self.arrays[name] = dtype, 0
        self.streams[name].write(values.data)
        self.arrays[name] = dtype, self.arrays[name][1] + len(values)

    def ragged(self, name: str, values: Sequence[np.ndarray], dtype, before: int = 0) -> None:
        """Append items of several sizes; `before` empty items go first in a new array."""
        at = f"{name}_at"
        if at not in self.arrays:
            self.append(at, np.zeros(before + 1), np.int64)
        self.append(at, self.size(name) + np.cumsum([len(v) for v in values]), np.int64)
        self.append(name, np.concatenate(values), dtype)

    def size(self, name: str) -> int:
        return self.arrays[name][1] if name in self.arrays else 0

    def optional(self, name: str, said: bool, values: Callable[[], object], empty, count: int, dtype) -> None:
        """Append values if they say something, or did before; the `count` items before the first get `empty`."""
        if said and name not in self.arrays:
            for start in range(0, count, 1 << 20):
                self.append(name, np.full(min(1 << 20, count - start), empty), dtype)
        if said or name in self.arrays:
            self.append(name, values(), dtype)

    def add(self, groups: list[EncodedGroup]) -> None:
        if not groups:
            return
        self.add_optional(groups, [row for group in groups for row in group.rows])
        prompts, group_prompt, row_prompt, first = [], [], [], max(self.size("prompt_at") - 1, 0)
        for group in groups:
            group_prompt.append(first + len(prompts))
            prompts.append(group.prompt)
            for row in group.rows:
                row_prompt.append(group_prompt[-1] if row.prompt is None else first + len(prompts))
                prompts += [] if row.prompt is None else [row.prompt]
        self.ragged("prompt", prompts, np.int32)
        self.ragged("response", [row.tokens for group in groups for row in group.rows], np.int32)
        self.ragged("place", [np.frombuffer(group.place.encode(), np.uint8) for group in groups], np.uint8)
        if "row_at" not in self.arrays:
            self.append("row_at", [0], np.int64)
        self.append("row_at", self.size("row_prompt") + np.cumsum([len(group.rows) for group in groups]), np.int64)
        self.append("row_prompt", row_prompt, np.int64)
        self.append("group_prompt", group_prompt, np.int64)
        self.append("lengths", [group.length for group in groups], np.int64)

    def add_optional(self, groups: list[EncodedGroup], rows: list[EncodedRow]) -> None:
        """What is only stored when some group says something. Comes before `add` counts the new groups and rows."""
        n_groups, n_rows, n_tokens = (self.size(name) for name in ("lengths", "row_prompt", "response"))

        def tokenwise(values, empty):
            return np.concatenate([np.full(len(row.tokens), empty) if v is None or np.ndim(v) == 0 else v
                                   for v, row in zip(values, rows, strict=True)])

        masks = [row.mask for row in rows]
        self.optional("mask", any(m is not None and not m.all() for m in masks), lambda: tokenwise(masks, True), True,
                      n_tokens, bool)
        self.optional("train", not all(row.train for row in rows), lambda: [row.train for row in rows], True, n_rows,
                      bool)
        self.optional("weight", any(g.weight != 1 for g in groups), lambda: [g.weight for g in groups], 1.0, n_groups,
                      np.float32)
        self.optional("relevance", any(g.relevance is not None for g in groups), lambda: np.concatenate(
            [np.full(len(g.rows), np.nan) if g.relevance is None else g.relevance for g in groups]), np.nan, n_rows,
            np.float32)
        if "wins" in self.arrays or any(g.wins is not None for g in groups):
            self.ragged("wins", [np.empty(0) if g.wins is None else g.wins.ravel() for g in groups], np.float32,
                        before=n_groups)
        known = {n.removeprefix(COLUMN) for n in self.arrays if n.startswith(COLUMN)}
        for name in sorted(known.union(*(row.columns for row in rows))):
            empty, dims = neutral(name), column(name).dims
            values = [row.columns.get(name, empty) for row in rows]
            values = {"N T": lambda v: tokenwise(v, empty), "N D": np.concatenate}.get(dims, list)(values)   # noqa: B023
            before = {"N T": n_tokens, "N D": n_rows * (len(values) // len(rows))}.get(dims, n_rows)
            self.optional(COLUMN + name, True, lambda made=values: made, empty, before,
                          np.float32 if isinstance(empty, float) else type(empty))
