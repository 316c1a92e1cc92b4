"""`view`: the groups of a data set on a page, for a person to read, compare and label; and the labels back into the data.

    write_page(view(load("pairs.jsonl")), "view.html")        # open it, label with keys, export labels.jsonl
    dump(apply_labels(load("pairs.jsonl"), "labels.jsonl"), "relabelled.jsonl")
"""
from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from data_tools.describe import content
from data_tools.fields import PLACE, DataError
from data_tools.files import exists
from data_tools.quality.findings import Finding, by_group, of_group
from data_tools.quality.sampling import Sample, Stratum, maker, outcome
from data_tools.quality.words import digest, identity
from data_tools.records import Group

__all__ = ["apply_labels", "payload", "read_labels", "view"]

SHOWN = 12_000                                                # characters of a text on a page


def payload(stratum: str, number: int, group: Group, flags: list[Finding]) -> dict:
    """A group as the page reads it."""
    known = [r for r in group.relevance or [] if r is not None]
    margin = max(known) - min(known) if len(known) > 1 else None
    if group.wins is not None:
        margin = max((abs(2 * w - 1) for row in group.wins for w in row if w is not None), default=None)
    return {"id": identity(group), "n": number, "place": group.meta.get(PLACE, ""), "stratum": stratum, "margin": margin,
            "prompt": told(group.prompt), "relevance": group.relevance or [None] * len(group.responses), "wins": group.wins,
            "rows": [{"text": told(r.text), "size": len(content(r.text)), "model": maker(r), "scores": r.scores}
                     for r in group.responses],
            "flags": [{"kind": f.kind, "message": f.message, "sure": f.sure, "response": f.response} for f in flags[:20]]}


def told(text) -> str:
    said = text if isinstance(text, str) else "\n\n".join(f"{m.get('role', '')}: {content([m])}" for m in text)
    return said if len(said) <= SHOWN else f"{said[:SHOWN]} [... {len(said) - SHOWN:,} more characters]"


def view(groups: Iterable[Group], *, findings: Iterable[Finding] = (), title: str = "Groups", sample: int = 500,
         stratum: Stratum = outcome, seed: int = 0) -> dict:
    """A report of the groups alone, for `page.render`: all of them up to `sample`, else a sample of about that many, with the
    same number from every stratum that has enough."""
    flags, drawn, total = by_group(findings), Sample(sample, stratum, seed), 0
    for total, group in enumerate(groups, 1):
        drawn.see(total, group, of_group(flags, total, group))
    found, counts = drawn.groups(), drawn.counts
    share = even(sorted(counts.values()), sample)
    taken = Counter()
    kept = []
    for item in sorted(found, key=lambda item: digest(f"{seed} {identity(item[2])}")):
        if taken[item[0]] < share:
            taken[item[0]] += 1
            kept.append(item)
    return {"title": title, "total": total, "strata": dict(counts.most_common()),
            "groups": [payload(*item) for item in sorted(kept, key=lambda item: item[1])]}


def even(counts: Sequence[int], total: int) -> int:
    """How many each may have, at most, so that together they have no more than `total`, and at least one.

    >>> even([1, 3, 10], 9), even([1, 3], 100)
    (5, 3)
    """
    left, share = total, 0
    for n, count in enumerate(counts):
        share = min(count, left // (len(counts) - n))
        left -= share
        if share < count:
            break
    return max(1, share)


# --------------------------------------------------------------------------------------------------------------- labels
def read_labels(path) -> Iterator[dict]:
    """The lines that the page exported."""
    exists(path)
    with open(path, encoding="utf-8") as lines:
        for n, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                graded = found.get("drop") is True or all(v is None or math.isfinite(v) for v in found["relevance"])
                if not isinstance(found["id"], str) or not graded:
                    raise TypeError("id is text, and relevance numbers or drop is true")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DataError("not a label", f"this line is no label ({type(error).__name__}: {error}): give the file that "
                                "the page exported", f"{path}:{n}") from error
            yield found


def apply_labels(groups: Iterable[Group], labels: Iterable[Mapping] | str) -> Iterator[Group]:
    """The groups with the labels of a person: `relevance` is theirs and `wins` gone, meta["relabelled"] is true, and what they
    rejected is left out. The groups without a label are as they were.

    labels   the file that the page exported, or its records. Of several labels of a group the last counts

    At the end, labels that no group has are an error: they were made for other data.
    """
    labels = read_labels(labels) if isinstance(labels, (str, os.PathLike)) else labels
    wanted = {label["id"]: label for label in labels}
    unused = set(wanted)
    for group in groups:
        label = wanted.get(name := identity(group))
        unused.discard(name)
        if label is None:
            yield group
        elif not label.get("drop"):
            if len(label["relevance"]) != len(group.responses):
                raise DataError("does not fit", f"the label has {len(label['relevance'])} grades for {len(group.responses)} "
                                "responses", group.meta.get(PLACE, name))
            yield replace(group, relevance=label["relevance"], wins=None, meta={**group.meta, "relabelled": True})
    if unused:
        known = [wanted[name].get("place") or name for name in list(wanted) if name in unused]
        raise DataError("labels left over", f"{len(unused)} of {len(wanted)} labels belong to no group, for example that of "
                        f"{known[0]}: they were made for other data, or the prompt or a response has changed since")
