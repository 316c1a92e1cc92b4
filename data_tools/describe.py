"""What a preference data set is like, found in one pass: sizes, lengths, labels, biases, duplicates, agreement."""
from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from data_tools.labels import wins_of
from data_tools.records import Group, Message

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
DISTINCT = 20                                                 # up to so many distinct values are counted one by one

Measure = tuple[str, float]


def describe(groups: Iterable[Group], tokenizer: Callable | None = None) -> dict:
    """Sections of plain numbers about the groups, for `render` or JSON. Without groups only `size` is there.

    size                    how many groups and responses, and the histogram of responses per group
    length                  characters (and, with a tokenizer, tokens) of prompts and responses. A conversation has the
                            length of its contents, without the chat template
    duplicates              prompts, responses and groups (their responses in any order) that occurred before; groups
                            with two equal responses
    labels                  groups with labels; the distribution of relevance; the gap between the best and the worst
                            response of a group
    pairs                   compared pairs and the share of ties; and of the decided ones the share where the earlier
                            response is preferred (position bias) or the longer one is (length bias)
    agreement               where groups have `meta["votes"]`, each annotator's P(first preferred): see `agreement`

    Memory: 8 bytes per measured number, some 100 MB for a million pairs; texts are not held.
    """
    numbers: dict[str, array] = defaultdict(lambda: array("d"))
    hashes: dict[str, array] = defaultdict(lambda: array("q"))
    ballots = []
    for group in groups:
        for name, value in _measures(group, tokenizer):
            numbers[name].append(value)
        for name, value in _hashes(group):
            hashes[name].append(value)
        if votes := group.meta.get("votes"):
            ballots.append(tuple(votes))
    found = {name: np.frombuffer(values) for name, values in numbers.items()}
    if not found:
        return {"size": {"groups": 0}}
    report = {
        "size": {"groups": len(found["size"]), "responses": int(found["size"].sum()),
                 "responses per group": _counts(found["size"])},
        "length": {name.removeprefix("length "): _quantiles(values) for name, values in found.items()
                   if name.startswith("length ")},
        "duplicates": {**{name: len(values) - len(np.unique(np.frombuffer(values, np.int64)))
                          for name, values in hashes.items()}, "groups of equal responses": int(found["equal"].sum())},
        "labels": {"labelled groups": int(found["labelled"].sum())}}
    if "relevance" in found:
        report["labels"]["relevance"] = _distribution(found["relevance"])
    if "gap" in found:
        report["labels"]["best minus worst"] = _distribution(found["gap"])
    if "tie" in found:
        report["pairs"] = {"compared": len(found["tie"]), "ties": float(found["tie"].mean())}
    if "first" in found:
        report["pairs"] |= {"earlier is preferred": float(found["first"].mean()),
                            "longer is preferred": float((found["longer"] > 0).mean()),
                            "equally long": float((found["longer"] == 0).mean()),
                            "characters longer (mean)": float(found["longer"].mean())}
    if ballots:
        report["agreement"] = agreement(ballots)
    return report


# ------------------------------------------------------------------------------------------------------------ measuring
def _measures(group: Group, tokenizer: Callable | None) -> Iterator[Measure]:
    texts = [content(r.text) for r in group.responses]
    yield "size", len(texts)
    yield "length prompt characters", len(content(group.prompt))
    for text in texts:
        yield "length response characters", len(text)
    if tokenizer is not None:
        sizes = [len(ids) for ids in tokenizer([content(group.prompt), *texts], add_special_tokens=False)["input_ids"]]
        yield "length prompt tokens", sizes[0]
        for response, size in zip(group.responses, sizes[1:], strict=True):
            yield "length response tokens", size if response.tokens is None else len(response.tokens)
    yield "equal", len(set(texts)) < len(texts)
    known = [r for r in group.relevance or [] if r is not None]
    yield "labelled", bool(known) or group.wins is not None
    for value in known:
        yield "relevance", value
    if len(known) > 1:
        yield "gap", max(known) - min(known)
    yield from _comparisons(group, [len(text) for text in texts])


def _comparisons(group: Group, lengths: Sequence[int]) -> Iterator[Measure]:
    if group.relevance is None and group.wins is None:
        return
    for j, row in enumerate(wins_of(group)):
        for i, back in enumerate(row[:j]):
            if back is not None:
                yield "tie", back == 0.5
            if back is not None and back != 0.5:
                yield "first", back < 0.5
                yield "longer", (lengths[i] - lengths[j]) * (1 if back < 0.5 else -1)


def _hashes(group: Group) -> Iterator[tuple[str, int]]:
    prompt, answers = hash(repr(group.prompt)), [hash(repr(r.text)) for r in group.responses]
    yield "prompts", prompt
    for answer in answers:
        yield "responses", answer
    yield "groups", hash((prompt, *sorted(answers)))


def content(text: str | list[Message]) -> str:
    """The text, or the contents of the messages one after the other."""
    if isinstance(text, str):
        return text
    return "\n".join(m["content"] if isinstance(m.get("content"), str) else str(m.get("content") or "") for m in text)


# ---------------------------------------------------------------------------------------------------------- summarising
def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()),
            **{name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}}


def _counts(values: np.ndarray) -> dict[str, int]:
    return {f"{value:g}": int(count) for value, count in zip(*np.unique(values, return_counts=True), strict=True)}


def _distribution(values: np.ndarray) -> dict:
    return _counts(values) if len(np.unique(values)) <= DISTINCT else _quantiles(values)


def agreement(ballots: Sequence[Sequence[float]]) -> dict[str, float]:
    """How far annotators agree. A ballot holds the votes of one item's annotators; any values, any number of them.

    items               ballots of two votes or more; the others say nothing
    unanimous           share of items on which all agree
    agreeing pairs      mean over items of the share of annotator pairs that agree, P
    fleiss kappa        (P - E) / (1 - E), E = sum_c p_c^2 with p_c the share of votes for c; 1 when there is one c only

    >>> agreement([(1, 1), (0, 1)])                           # P = 1/2, p = (3/4, 1/4): (1/2 - 5/8) / (3/8) = -1/3
    {'items': 2, 'unanimous': 0.5, 'agreeing pairs': 0.5, 'fleiss kappa': -0.3333333333333333}
    """
    ballots = [b for b in ballots if len(b) > 1]
    if not ballots:
        return {"items": 0}
    agreed, total = 0.0, defaultdict(int)
    for ballot in ballots:
        counts = [ballot.count(vote) for vote in set(ballot)]
        agreed += sum(c * (c - 1) for c in counts) / (len(ballot) * (len(ballot) - 1))
        for vote in ballot:
            total[vote] += 1
    votes = sum(total.values())
    observed, chance = agreed / len(ballots), sum((count / votes) ** 2 for count in total.values())
    return {"items": len(ballots), "unanimous": sum(len(set(b)) == 1 for b in ballots) / len(ballots),
            "agreeing pairs": observed, "fleiss kappa": 1.0 if chance == 1 else (observed - chance) / (1 - chance)}


# ------------------------------------------------------------------------------------------------------------ rendering
def render(report: dict) -> str:
    """The report as text, one line per entry of a section."""
    return "\n".join(line for section, rows in report.items()
                     for line in (section, *(f"  {name:28}{_cell(value)}" for name, value in rows.items())))


def _cell(value) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key}: {_cell(v)}" for key, v in value.items())
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
