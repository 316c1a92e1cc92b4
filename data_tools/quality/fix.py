"""`fix`: repair what `check` found, and write down what was done. Groups in, other groups out; nothing is changed in place."""
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from data_tools.columns import nearest
from data_tools.fields import PLACE
from data_tools.files import part
from data_tools.formats import dump
from data_tools.labels import flip
from data_tools.quality.findings import Finding, by_group, of_group
from data_tools.quality.texts import cleaned, redacted
from data_tools.quality.words import digest
from data_tools.records import Group, Prompt
from data_tools.rules import keep

__all__ = ["REPAIRS", "fix", "fixed", "shuffled"]

Repair = Callable[[Group, list[Finding]], "Group | None"]


# ------------------------------------------------------------------------------------------------------------- repairs
def drop(group: Group, findings: list[Finding]) -> None:
    """The group is left out."""


def drop_response(group: Group, findings: list[Finding]) -> Group | None:
    """The responses that were found are left out; of a group that was compared, all of it when fewer than two remain."""
    gone = {f.response - 1 for f in findings}
    kept = [n for n in range(len(group.responses)) if n not in gone]
    return None if len(kept) < min(2, len(group.responses)) else keep(group, kept)


def clean(group: Group, findings: list[Finding]) -> Group:
    """Texts without control and invisible characters, mojibake put right."""
    return rewritten(group, cleaned)


def redact(group: Group, findings: list[Finding]) -> Group:
    """Personal data replaced by their kind in brackets."""
    return rewritten(group, redacted)


def rewritten(group: Group, change: Callable[[str], str]) -> Group:
    """The group with other texts. Tokens and log-probabilities of a response whose text changes are gone."""
    def changed(text: Prompt) -> Prompt:
        if isinstance(text, str):
            return change(text)
        return [{**m, "content": change(m["content"])} if isinstance(m.get("content"), str) else m for m in text]

    responses = [r if changed(r.text) == r.text else replace(r, text=changed(r.text), tokens=None, logp=None)
                 for r in group.responses]
    return replace(group, prompt=changed(group.prompt), responses=responses)


def turned(group: Group, findings: list[Finding]) -> Group:
    """The labels turned round (`labels.flip`); meta["flipped"] says so."""
    return next(flip([group], rate=1.0))


def unlabel(group: Group, findings: list[Finding]) -> Group:
    """The group without labels."""
    return replace(group, relevance=None, wins=None)


def shuffled(group: Group, findings: list[Finding] = ()) -> Group:
    """The responses in an order drawn from their texts."""
    keys = [digest(repr((group.prompt, r.text))) for r in group.responses]
    return keep(group, sorted(range(len(keys)), key=keys.__getitem__))


REPAIRS: dict[str, Repair] = {"drop": drop, "drop response": drop_response, "flip": turned, "unlabel": unlabel, "clean": clean,
                              "redact": redact, "shuffle": shuffled}


# ----------------------------------------------------------------------------------------------------------------- fix
def fix(groups: Iterable[Group], findings: Iterable[Finding], *, repairs: Mapping[str, str] | Iterable[str], sure: float = 0.8,
        log: Callable[[dict], None] = lambda entry: None) -> Iterator[Group]:
    """The groups with the chosen repairs made.

    repairs   the kinds of findings to repair, as proposed; or {kind: a name of REPAIRS}, such as {"duplicate": "drop",
              "suspected flip": "unlabel"}
    sure      findings less sure than this are left alone
    log       called with what was done to each group: place, repair, the findings that are the reason, before and after

    Repairs are made in the order of REPAIRS, so that responses are dropped by number before anything else changes. A kind that
    was not found, a name that is no repair, and findings about other data are errors.
    """
    findings = list(findings)
    plan = planned(findings, repairs)
    chosen = by_group(f for f in findings if f.kind in plan and f.sure >= sure)
    return _fixed(groups, chosen, plan, log)


def planned(findings: list[Finding], repairs: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    """The repair of each chosen kind."""
    proposed, whole = {f.kind: f.repair for f in findings}, {f.kind for f in findings if not f.group}
    plan = dict(repairs) if isinstance(repairs, Mapping) else {kind: proposed.get(kind, "") for kind in repairs}
    for kind, repair in plan.items():
        if kind not in proposed:
            raise ValueError(f"nothing of the kind {kind!r} was found{nearest(kind, proposed)}; found: "
                             f"{', '.join(proposed) or 'nothing'}")
        if repair not in REPAIRS:
            told = f"the repair {repair!r}, which there is not{nearest(repair, REPAIRS)}" if repair else "no repair of its own"
            raise ValueError(f"{kind!r} has {told}: write {{{kind!r}: NAME}} with one of {', '.join(REPAIRS)}")
        if kind in whole and repair != "shuffle":
            raise ValueError(f"{kind!r} is about the whole data set, which {repair!r} cannot mend; only 'shuffle' goes over all "
                             "groups")
    return plan


def _fixed(groups, chosen, plan, log) -> Iterator[Group]:
    for number, group in enumerate(groups, 1):
        mine = of_group(chosen, number, group)
        reasons = [*mine, *chosen.get(0, [])]
        for name, repair in REPAIRS.items():
            why = [f for f in reasons if plan[f.kind] == name]
            after = repair(group, why) if why else group
            if after != group:
                log({"group": number, "place": group.meta.get(PLACE, ""), "repair": name, "because": [str(f) for f in why],
                     **difference(group, after)})
            group = after
            if group is None:
                break
        else:
            yield group


def difference(before: Group, after: Group | None) -> dict:
    """What a repair changed, so that it can be undone by hand."""
    was, now = before.to_json(), {} if after is None else after.to_json()
    changed = [key for key in ("prompt", "responses", "relevance", "wins") if was.get(key) != now.get(key)]
    return {"before": {k: was.get(k) for k in changed}, "after": {k: now.get(k) for k in changed} if now else None}


def fixed(groups: Iterable[Group], findings: Iterable[Finding], out, *, repairs: Mapping[str, str] | Iterable[str],
          sure: float = 0.8) -> dict[str, int]:
    """`fix` to a new file, with what was done in `OUT.log.jsonl` beside it: how many groups there are then, and how often each
    repair was made. A file that exists is an error."""
    out = Path(out)
    record = out.with_name(out.name + ".log.jsonl")
    for path in (out, record):
        if path.exists():
            raise FileExistsError(f"{path} exists, and repairs never overwrite: name another file")
    counts: Counter = Counter()
    with part(record) as temporary:                           # neither file is there when something goes wrong
        with open(temporary, "w", encoding="utf-8") as stream:
            def log(entry: dict) -> None:
                counts[entry["repair"]] += 1
                stream.write(json.dumps(entry) + "\n")

            written = dump(fix(groups, findings, repairs=repairs, sure=sure, log=log), out)
        os.replace(temporary, record)
    return {"groups": written, **counts}
