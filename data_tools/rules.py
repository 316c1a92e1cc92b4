"""What the rules share: scores that are there, randomness that depends on content alone, pairs with where they come from."""
from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b

from data_tools.columns import nearest
from data_tools.fields import PLACE, shorten
from data_tools.labels import Pairs, split
from data_tools.records import Group, Response


def place(group: Group) -> str:
    """Where a group comes from, to begin a message with."""
    return f"{group.meta.get(PLACE) or 'the group ' + shorten(group.prompt)}: "


def scores(group: Group, name: str) -> list[float]:
    """The score `name` of every response. One that is missing or not finite is an error."""
    found = [r.scores.get(name) for r in group.responses]
    for k, value in enumerate(found):
        if value is None or not math.isfinite(value):
            raise _unscored(group, name, k)
    return found


def _unscored(group: Group, name: str, k: int) -> ValueError:
    response = group.responses[k]
    where, value = f"{place(group)}response {k + 1}", response.scores.get(name)
    if value is not None:
        return ValueError(f"{where} has the score {name} = {value}, which cannot be compared: score it anew, or drop such "
                          "responses with the rule `scored` first")
    if why := response.meta.get("unscored", {}).get(name):
        return ValueError(f"{where} could not be scored by {name!r}: {why}. Score it anew, or drop such responses with the rule "
                          "`scored` first")
    known = list(dict.fromkeys(key for r in group.responses for key in r.scores))
    hint = ", which others have" if name in known else nearest(name, known)
    return KeyError(f"{where} has no score {name!r}{hint}; scores of the group: {', '.join(known) or 'none'}. Name one of "
                    "them with score=, or score the responses first")


def note(group: Group, response: Response, field: str):
    """What a response's meta says under `field`; an error where it says nothing."""
    if field not in response.meta:
        raise KeyError(f"{place(group)}response {_index(group, response) + 1} has no {field!r} in its meta"
                       f"{nearest(field, response.meta)}; there: {', '.join(response.meta) or 'nothing'}")
    return response.meta[field]


def _index(group: Group, response: Response) -> int:
    return [r is response for r in group.responses].index(True)


def number(group: Group, field: str) -> float:
    """A finite number in the group's meta."""
    value = group.meta.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        found = f"{field} = {shorten(value)}, which is no finite number" if field in group.meta else \
            f"no {field!r}{nearest(field, group.meta)}"
        raise ValueError(f"{place(group)}its meta has {found}; there: {', '.join(group.meta) or 'nothing'}")
    return value


def again(groups: Iterable[Group]) -> Iterable[Group]:
    """Groups that can be read more than once; a generator is an error."""
    if iter(groups) is groups:
        raise TypeError("this rule reads the groups twice, and an iterator can be read only once: give a list, or what "
                        "data_tools.load returns")
    return groups


# ------------------------------------------------------------------------------------------------------------ randomness
def generator(seed: int, rule: str, *content) -> random.Random:
    """Random numbers of (seed, rule, content): neither order nor company of the groups matters.

    >>> generator(0, "sample", "a prompt").random() == generator(0, "sample", "a prompt").random()
    True
    """
    return random.Random(_hash(seed, rule, *content).digest())


def shuffled(group: Group, seed: int, rule: str) -> tuple[list[int], random.Random]:
    """The responses in random order, which depends on their texts and not on the order they come in, and a generator for
    what is drawn along it. Equal texts are told apart by their number, or they would stay together."""
    head, keys, copies = _hash(seed, rule, group.prompt), [], Counter()
    for response in group.responses:
        one, text = head.copy(), json.dumps(response.text)
        one.update(f"{text}{copies[text]}".encode())
        copies[text] += 1
        keys.append(one.digest())
    return sorted(range(len(keys)), key=keys.__getitem__), random.Random(head.digest())


def draw(group: Group, seed: int, rule: str) -> float:
    """A number in [0, 1) of the group's prompt and responses."""
    key = _hash(seed, rule, group.prompt, [r.text for r in group.responses]).digest()
    return int.from_bytes(key[:6]) / 2 ** 48


def _hash(*content):
    return blake2b(json.dumps(content).encode(), digest_size=16)


# ----------------------------------------------------------------------------------------------------------------- pairs
def paired(group: Group, chosen: Pairs, values: Sequence[float], rule: str) -> list[Group]:
    """A group for each pair, the preferred response first, with the rule, the margin and both ranks in its meta. Equal texts
    are no pair."""
    kept = [(i, j) for i, j in chosen if group.responses[i].text != group.responses[j].text]
    rank = {value: 1 + sum(v > value for v in values) for value in set(values)} if kept else {}
    return [replace(one, meta={**one.meta, "rule": rule, "margin": values[i] - values[j],
                               "ranks": [rank[values[i]], rank[values[j]]]})
            for one, (i, j) in zip(split(replace(group, wins=None), kept), kept, strict=True)]


def widest(chosen: Pairs, values: Sequence[float], *, most: int | None, each: int | None) -> Pairs:
    """The pairs by falling margin, at most `most`, no response in more than `each`."""
    for name, limit in (("most", most), ("each", each)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} should be at least 1, or None for no limit, found {limit}")
    used = dict.fromkeys(range(len(values)), 0)
    kept: Pairs = []
    for i, j in sorted(chosen, key=lambda pair: values[pair[1]] - values[pair[0]]):
        if len(kept) == most:
            break
        if each is None or max(used[i], used[j]) < each:
            kept.append((i, j))
            used[i] += 1
            used[j] += 1
    return kept


def keep(group: Group, chosen: Iterable[int]) -> Group:
    """The group with only some of its responses, in this order, and their labels.

    >>> keep(Group("?", [Response("a"), Response("b"), Response("c")], [2.0, 1.0, 0.0]), [2, 0]).relevance
    [0.0, 2.0]
    """
    chosen = list(chosen)
    if not chosen:
        return replace(group, responses=[], relevance=None, wins=None, meta=dict(group.meta))
    pick: Callable = lambda row: [row[i] for i in chosen]
    return replace(group, responses=pick(group.responses), relevance=group.relevance and pick(group.relevance),
                   wins=group.wins and [pick(row) for row in pick(group.wins)], meta=dict(group.meta))
