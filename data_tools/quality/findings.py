"""What a check found, in a file and in words."""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from data_tools import files
from data_tools.fields import PLACE, DataError
from data_tools.quality.words import identity
from data_tools.records import Group

__all__ = ["Finding", "Tally", "by_group", "flagged", "load", "of_group", "save"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    kind        what, in few words; all findings of a kind have the same nature
    message     what was found, with its numbers
    sure        how sure, from 0 to 1
    repair      what mends it, a name of `fix.REPAIRS`; nothing where a person has to decide
    group       number of the group in the data, from 1; 0 for the whole data set
    response    number of the response in the group, from 1; 0 for the prompt or the group
    place       `file.jsonl:12`
    id          the group's `words.identity`, so that a repair cannot hit another group
    """
    kind: str
    message: str
    sure: float = 1.0
    repair: str = ""
    group: int = 0
    response: int = 0
    place: str = ""
    id: str = ""

    def __str__(self) -> str:
        where = self.place or f"group {self.group}" * bool(self.group)
        where += f" response {self.response}" * bool(self.response)
        told = f"{where}: {self.message}" if where else self.message
        return told + (f" (sure: {self.sure:.2f})" if self.sure < 1 else "")


@dataclass
class Tally:
    """How many findings of each kind there are, in how many groups (those of a kind come group by group), and the first few."""
    counts: Counter = field(default_factory=Counter)
    groups: Counter = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    keep: int = 3
    last: dict[str, int] = field(default_factory=dict)

    def note(self, found: Finding) -> None:
        self.counts[found.kind] += 1
        self.groups[found.kind] += self.last.get(found.kind) != found.group
        self.last[found.kind] = found.group
        known = self.examples.setdefault(found.kind, [])
        if len(known) < self.keep:
            known.append(found)

    def __str__(self) -> str:
        lines = [f"{self.counts.total():,} findings of {len(self.counts)} kinds" if self.counts else "nothing was found"]
        for kind, count in self.counts.most_common():
            repair = self.examples[kind][0].repair
            lines += [f"  {kind}: {count:,}" + (f" (repair: {repair})" if repair else "")]
            lines += [f"    {found}" for found in self.examples[kind]]
            lines += [f"    and {count - self.keep:,} more"] if count > self.keep else []
        return "\n".join(lines)


def save(findings: Iterable[Finding], path) -> Tally:
    """Write them as jsonl and count them."""
    tally = Tally()

    def records() -> Iterator[dict]:
        for found in findings:
            tally.note(found)
            yield {key: value for key, value in asdict(found).items() if value not in ("", 0)}

    files.write(records(), path)
    return tally


def load(path) -> Iterator[Finding]:
    """The findings that `save` wrote."""
    files.exists(path)
    with open(path, encoding="utf-8") as lines:
        for n, line in enumerate(lines, 1):
            try:
                yield Finding(**{"sure": 0.0, **json.loads(line)})
            except (TypeError, json.JSONDecodeError) as error:
                raise DataError("not a finding", f"this line is no finding of `prefopt data check` ({error}): give the file that "
                                "the check wrote", f"{path}:{n}") from error


def by_group(findings: Iterable[Finding]) -> dict[int, list[Finding]]:
    """The findings of each group; those about the whole data set are under 0."""
    found: dict[int, list[Finding]] = {}
    for one in findings:
        found.setdefault(one.group, []).append(one)
    return found


def of_group(found: Mapping[int, list[Finding]], number: int, group: Group) -> list[Finding]:
    """What was found in a group, of what `by_group` gives; findings about another text are an error."""
    mine = found.get(number, [])
    if any(f.id != identity(group) for f in mine):
        raise DataError("other data", f"the check found {mine[0].kind!r} in another text of this number: the findings are of "
                        "other data, or it has changed since. Run the check again", group.meta.get(PLACE, f"group {number}"))
    return mine


def flagged(groups: Iterable[Group], findings: Iterable[Finding]) -> Iterator[Group]:
    """The groups with what was found in each in meta["flags"], a list of {"kind", "message", "sure", "response"}; groups in which
    nothing was found have an empty list."""
    found = by_group(findings)
    for n, group in enumerate(groups, 1):
        mine = of_group(found, n, group)
        flags = [{"kind": f.kind, "message": f.message, "sure": f.sure, "response": f.response} for f in mine]
        yield replace(group, meta={**group.meta, "flags": flags})
