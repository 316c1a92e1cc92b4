"""Preference data in and out: `load` reads any known shape as groups, `dump` writes groups.

A format is one function, record -> Group. `FORMATS` is the table of all: the reader, and the keys that give it away.
"""
from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from data_tools import corpora, files, shapes
from data_tools.fields import PLACE, DataError, near, take
from data_tools.records import Group
from data_tools.shapes import to_trl

__all__ = ["FORMATS", "WRITERS", "Reader", "detect", "dump", "load", "lookup", "to_trl"]


class Format(NamedTuple):
    """`read` makes a Group of a record; `keys` are the alternative sets of keys that give the format away; with
    `merge`, groups that follow each other and have the same prompt become one."""
    read: Callable[[dict], Group]
    keys: tuple[str, ...]
    merge: bool = False


FORMATS: dict[str, Format] = {
    "group": Format(shapes.group, ("prompt responses", shapes.JSON_COLUMN)),
    "pair": Format(shapes.pair, ("prompt chosen rejected",)),
    "implicit": Format(shapes.implicit, ("chosen rejected",)),
    "ranked": Format(shapes.ranked, ("prompt responses ranks", "prompt completions ranks", "prompt responses scores",
                                     "prompt completions scores")),
    "unpaired": Format(shapes.unpaired, ("prompt completion label",)),
    "stepwise": Format(shapes.stepwise, ("prompt completions labels",)),
    "prompts": Format(shapes.prompts, ("prompt", "question answer", "prompt answer")),
    "demonstration": Format(shapes.demonstration, ("prompt completion", "prompt response")),
    "dialogue": Format(shapes.dialogue, ("messages", "conversations", "prompt messages")),
    "alpaca": Format(corpora.alpaca, ("instruction output",)),
    "sharegpt_pair": Format(corpora.sharegpt_pair, ("conversations chosen rejected",)),
    "rated_conversation": Format(corpora.rated_conversation, ("messages label",)),
    "text_score": Format(corpora.text_score, ("text score",)),
    "pandalm": Format(corpora.pandalm, ("instruction response1 response2 annotator1 annotator2 annotator3",)),
    "alpaca_eval": Format(corpora.alpaca_eval, ("instruction output_1 output_2 preference",)),
    "llmbar": Format(corpora.llmbar, ("input output_1 output_2 label",)),
    "gsm8k_solutions": Format(corpora.gsm8k_solutions, ("question ground_truth",)),
    "themis": Format(corpora.themis, ("question pos_answer neg_answer",)),
    "finegrained_qa": Format(corpora.finegrained_qa, ("question passages feedback preference",)),
    "bigbench_mistake": Format(corpora.bigbench_mistake, ("input steps target answer mistake_index",)),
    "domains": Format(corpora.domains, ("query responses",)),
    "ultrafeedback": Format(corpora.ultrafeedback, ("instruction completions",)),
    "helpsteer": Format(corpora.helpsteer, ("prompt response helpfulness",), merge=True),
    "shp": Format(corpora.shp, ("history human_ref_A human_ref_B labels",)),
    "nectar": Format(corpora.nectar, ("prompt answers",)),
}


def lookup(name: str, known: Mapping):
    """`known[name]`, or an error with the nearest name."""
    if name not in known:
        raise ValueError(f"unknown format {name!r}{near(name, known)} Known: {', '.join(known)}")
    return known[name]


def detect(record: dict) -> str:
    """The name of the format with the most keys in the record.

    No format, or a key which looks like a misspelt one of a larger format, is an error that lists what is known.
    """
    keys = set(record)
    fits = [(len(alternative.split()), name) for name, form in FORMATS.items() for alternative in form.keys
            if keys.issuperset(alternative.split())]
    size, name = max(fits, key=lambda fit: fit[0], default=(0, None))
    doubt = _misspelt(keys, size) or (_dangling(keys) if name in (None, "prompts") else "")
    if name and not doubt:
        return name
    table = "; ".join(f"{n} ({' or '.join(a.replace(' ', ', ') for a in f.keys)})" for n, f in FORMATS.items())
    raise ValueError(f"cannot tell the format from the keys {', '.join(record)}.{doubt} Name it with format=..., or "
                     f"rename columns with columns={{'chosen': 'your column', ...}}."
                     + ("" if doubt else f" Known formats with their keys: {table}"))


def _misspelt(keys: set[str], size: int) -> str:
    """A hint when a format of more than `size` keys fits but for keys that have a near neighbour in the record."""
    for wanted in (a.split() for form in FORMATS.values() for a in form.keys):
        missing, spare = [k for k in wanted if k not in keys], keys.difference(wanted)
        typos = [difflib.get_close_matches(k, spare, n=1, cutoff=0.85) for k in missing]
        if size < len(wanted) and all(typos):
            return "".join(f" The key {k!r} is missing, did you mean {typo!r}?"
                           for k, (typo,) in zip(missing, typos, strict=True))
    return ""


def _dangling(keys: set[str]) -> str:
    """A hint when half of a pair or a list stands alone: it would be read as a prompt with a note."""
    for key in ("chosen", "rejected", "completions", "responses", "ranks", "labels"):
        if key in keys:
            return f" There is {key!r}, but not what belongs to it."
    return ""


# ------------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Reader:
    """The groups of a source, read anew on every pass and never held. `load` makes it."""
    sources: tuple[files.Source, ...]
    format: str | Callable[[dict], Group] | None = None
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    on_error: Callable[[DataError], None] | None = None

    def __iter__(self) -> Iterator[Group]:
        return islice((found for source in self.sources for found in self._groups(source)), self.limit)

    def _groups(self, source: files.Source) -> Iterator[Group]:
        form = Format(self.format, ()) if callable(self.format) else self.format and FORMATS[self.format]
        waiting = None                                        # a group that the next record may still belong to
        for place, record in _guarded(source.records()):
            try:
                if isinstance(record, DataError):
                    raise record
                record = self._renamed(record)
                form = form or FORMATS[_detected(record, place)]
                found = _group(form, record)
            except DataError as error:
                error.place = error.place or place
                if self.on_error is None:
                    raise
                self.on_error(error)
                continue
            found.meta[PLACE] = place
            if not form.merge:
                yield found
            elif waiting and waiting.prompt == found.prompt:
                _join(waiting, found)
            else:
                if waiting:
                    yield waiting
                waiting = found
        if waiting:
            yield waiting

    def _renamed(self, record: dict) -> dict:
        if not self.columns:
            return record
        *values, rest = take(record, *self.columns.values())
        return {**rest, **dict(zip(self.columns, values, strict=True))}


def _guarded(records: Iterable[files.Located]) -> Iterator[files.Located]:
    """The records; an error that ends the file comes last, as a record."""
    try:
        yield from records
    except DataError as error:
        yield error.place, error


def _detected(record: dict, place: str) -> str:
    try:
        return detect(record)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _group(form: Format, record: dict) -> Group:
    try:
        return form.read(record)
    except (TypeError, AttributeError, LookupError) as error:
        raise DataError("wrong type", f"the record does not have the inner shape of its format ({form.read.__name__}): "
                                      f"{type(error).__name__} {error}") from error


def _join(first: Group, other: Group) -> None:
    first.responses += other.responses
    first.relevance += other.relevance
    name, lines = first.meta[PLACE].rsplit(":", 1)
    first.meta[PLACE] = f"{name}:{lines.split('-')[0]}-{other.meta[PLACE].rsplit(':', 1)[1]}"


def load(source, *, format: str | Callable[[dict], Group] | None = None, split: str | None = None,
         streaming: bool = False, limit: int | None = None, columns: Mapping[str, str] | None = None,
         on_error: Callable[[DataError], None] | None = None) -> Reader:
    """Groups of files, folders or hub data sets, one at a time: `for group in load("pairs.jsonl")`.

    source      a path, a glob, a folder, `hub:owner/name[/config]`, or a list of these; .jsonl, .json, .csv, .parquet,
                each also .gz. A json list is decoded in pieces, so it may be larger than memory
    format      a name of `FORMATS`, or a function record -> Group of your own; found by the first record's keys if None
    split       split of a hub data set; or the files of a folder that have this word in their names
    streaming   read a hub data set over the network instead of storing it first
    limit       stop after this many groups
    columns     {key of the format: column of the data}, for data that names its columns otherwise
    on_error    called with the DataError of a record that cannot be read, which is then left out; None raises it

    Every group says where it comes from in `meta["place"]` ("file.jsonl:12"). A missing source and an unknown format
    are errors at once, keys that fit no format are one at the first record; a record that cannot be read raises
    `DataError`. Groups are not checked beyond what reading needs: see `data_tools.validate`. The reader can be passed
    over again.
    """
    if isinstance(format, str):
        lookup(format, FORMATS)
    return Reader(tuple(files.resolve(source, split, streaming)), format, columns, limit, on_error)


# ------------------------------------------------------------------------------------------------------------- writing
WRITERS: dict[str, Callable[[Group], dict]] = {
    "group": shapes.group_record, "pair": shapes.pair_record, "unpaired": shapes.unpaired_record,
    "stepwise": shapes.step_record, "demonstration": shapes.demonstration_record, "prompts": shapes.prompt_record}


def dump(groups: Iterable[Group], path, *, format: str = "group") -> int:
    """Write groups to .jsonl, .jsonl.gz or .parquet and return how many; the file appears only when it is complete.

    `group` keeps everything but `place`, which the next reading sets anew. The other formats are TRL's columns: `pair`,
    `unpaired`, `stepwise`, `demonstration` (prompt, completion) and `prompts`; a group that does not fit is an error.
    Parquet holds a `group` as one column of JSON text.
    """
    writer = lookup(format, WRITERS)
    records = map(writer, groups)
    if writer is shapes.group_record and files.kind(str(path)) == ".parquet":
        records = ({shapes.JSON_COLUMN: json.dumps(record)} for record in records)
    return files.write(records, path)
