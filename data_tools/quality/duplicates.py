"""Groups and prompts that occur twice, exactly or nearly (MinHash), and test questions inside training data (n-grams)."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data_tools.labels import wins_of
from data_tools.quality.words import Chunk, Words, chunks, shingles
from data_tools.records import Group

__all__ = ["Ngrams", "Twin", "ngrams", "overlapping", "signatures", "twins", "verdict"]

PERMUTATIONS = 128                                            # 32 bands of four 16-bit minima: one 64-bit key a band
RUN = 2                                                       # words of a shingle


# ------------------------------------------------------------------------------------------------------------- digests
def signatures(found: Words, owner: np.ndarray, count: int) -> np.ndarray:
    """(count, 128) 16 bits of the smallest hash, under each of 128 hash functions, of the word pairs of the texts that belong
    to each owner (ascending). Two owners agree in a share of places that estimates the Jaccard similarity of their pairs,
    with a standard error of 0.04 at 0.7. An owner without words has zeros."""
    number, text = shingles(found, RUN)
    owner = owner[text]
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    out = np.zeros((count, PERMUTATIONS), np.uint16)
    if len(number):
        random = np.random.default_rng(0).integers(1 << 63, size=(PERMUTATIONS, 2), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        for k, (a, b) in enumerate(random):
            out[owner[start], k] = np.minimum.reduceat(number * a + b, start) >> np.uint64(16)
    return out


def verdict(group: Group) -> int:
    """A number of what the group prefers, whatever the order of its responses: 0 without labels."""
    names = [str(r.text) for r in group.responses]
    wins = wins_of(group)
    order = sorted(range(len(names)), key=names.__getitem__)
    told = tuple(wins[i][j] for i in order for j in order if i != j)
    return hash(tuple(-1.0 if w is None else w for w in told)) if any(w is not None for w in told) else 0


# --------------------------------------------------------------------------------------------------------------- twins
class Twin(NamedTuple):
    """Item `later` repeats item `earlier`, the first of its kind."""
    later: int
    earlier: int
    similarity: float                                         # 1.0 only for exact ones


def agreement(signature: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of places in which items agree."""
    return np.concatenate([np.zeros(0), *((signature[one[k:k + 65536]] == signature[other[k:k + 65536]]).mean(1)
                                          for k in range(0, len(one), 65536))])


def candidates(signature: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(later, earlier) of pairs of the items `among` (ascending) that agree in one of 32 bands of four places: P(found) = 1 -
    (1 - s^4)^32, above 0.9998 for a similarity s of 0.7. In a band each item meets the first and the previous one with its key,
    so that a crowd of n is 2 n pairs."""
    bands, found = np.ascontiguousarray(signature).view(np.uint64), []
    for band in range(bands.shape[1]):
        keys = bands[among, band]
        order = np.argsort(keys, kind="stable")               # equal keys stay in the order of the items
        same = keys[order[1:]] == keys[order[:-1]]
        first = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        later = np.flatnonzero(same) + 1
        found += [order[later] * len(keys) + order[later - 1], order[later] * len(keys) + order[first[later]]]
    later, earlier = np.divmod(np.unique(np.concatenate(found)), len(among))
    return among[later], among[earlier]


def twins(number: np.ndarray, signature: np.ndarray, *, near: float = 0.7, asked: np.ndarray | None = None) -> list[Twin]:
    """Items that repeat an earlier one, in order: exactly (equal `number`), or nearly, with word pairs whose Jaccard similarity
    is estimated at `near` or more, and half of that for `asked`, the signatures of their prompts, if given. A near one is
    compared with an item that repeats none, so a chain of small changes ends where it has gone too far."""
    _, where, back = np.unique(number, return_index=True, return_inverse=True)
    said = np.concatenate([signature[k:k + 65536].any(1) for k in range(0, len(signature), 65536)])
    later, earlier = candidates(signature, np.sort(where[said[where]]))      # without words nothing is alike
    agree = agreement(signature, later, earlier)
    like = lambda a, b: asked is None or (asked[a] == asked[b]).mean() >= near / 2
    kept: dict[int, Twin] = {}
    for a, b, similarity in zip(*(x[agree >= near].tolist() for x in (later, earlier, agree)), strict=True):
        if b in kept:
            b = kept[b].earlier
            similarity = float((signature[a] == signature[b]).mean())
        if a not in kept and similarity >= near and like(a, b):
            kept[a] = Twin(a, b, min(similarity, 0.999))
    return sorted([*kept.values(), *(Twin(n, int(where[k]), 1.0) for n, k in enumerate(back.tolist()) if where[k] != n)])


# ------------------------------------------------------------------------------------------------------------- n-grams
class Ngrams(NamedTuple):
    """The runs of words of named test sets, sorted, with the item each comes from."""
    number: np.ndarray
    item: np.ndarray
    names: list[str]                                          # of each item: "gsm8k test.jsonl:12"
    total: np.ndarray                                         # different runs of each item
    size: int


def ngrams(sets: Mapping[str, Iterable[Group]], *, size: int = 13, common: int = 10) -> Ngrams:
    """Of the prompts of test sets all runs of `size` words (a shorter prompt is one run), without those that more than
    `common` prompts share, which are templates."""
    numbers, items, names = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], []
    for name, groups in sets.items():
        for chunk in chunks(groups):
            number, text = shingles(chunk.words, size)
            asked = np.isin(text, chunk.prompt)
            numbers.append(number[asked])
            items.append(chunk.group[text[asked]] + len(names))
            names += [f"{name} {g.meta.get('place', chunk.first + n)}" for n, g in enumerate(chunk.groups)]
    both = np.unique(np.array(list(zip(np.concatenate(numbers), np.concatenate(items), strict=True)),
                              dtype=[("number", np.uint64), ("item", np.int64)]))
    _, back, often = np.unique(both["number"], return_inverse=True, return_counts=True)
    both = both[often[back] <= common]
    return Ngrams(both["number"], both["item"], names, np.bincount(both["item"], minlength=len(names)), size)


def overlapping(chunk: Chunk, known: Ngrams) -> Iterator[tuple[int, int, float]]:
    """(group of the chunk, item, share of the item's runs that the group has), the item with the largest share."""
    number, text = shingles(chunk.words, known.size)
    low, high = (np.searchsorted(known.number, number, side) for side in ("left", "right"))
    hit = np.flatnonzero(high > low)
    seen: dict[int, dict[int, set[int]]] = {}
    for n in hit:
        items = seen.setdefault(int(chunk.group[text[n]]), {})
        for at in range(low[n], high[n]):
            items.setdefault(int(known.item[at]), set()).add(int(at))
    for group, items in sorted(seen.items()):
        item = max(items, key=lambda i: (len(items[i]) / known.total[i], -i))
        yield group, item, len(items[item]) / known.total[item]
