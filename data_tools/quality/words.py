"""The words of many texts as 64-bit numbers, so that whole chunks are compared by numpy. Numbers are the same everywhere.

A word is a run of letters, digits and marks of a text in lower case (NFKC). Signs of mathematics and money, Chinese and
Japanese characters, Thai letters and emoji are words of their own; other punctuation is none.
"""
from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from data_tools.describe import content
from data_tools.records import Group

__all__ = ["Chunk", "Words", "chosen", "chunks", "counts", "digest", "identity", "mixed", "shingles", "words"]

BASE = 0x9E3779B97F4A7C15                                     # odd, so that it has an inverse modulo 2^64
ALONE = ((0x0E00, 0x0E80), (0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00), (0xFFFF, 0x10000))
STRIDE = np.uint64(0xC2B2AE3D27D4EB4F)


class Words(NamedTuple):
    """`number` of each word, the `text` it is in, and where the words of each text `start` (one more than texts)."""
    number: np.ndarray
    text: np.ndarray
    start: np.ndarray


class Chunk(NamedTuple):
    """Some groups that follow each other. Their texts are the prompt and then the responses of each."""
    first: int                                                # number of the first group, from 1
    groups: list[Group]
    texts: list[str]
    prompt: np.ndarray                                        # (G) which text is the prompt of a group
    group: np.ndarray                                         # (texts) which group a text belongs to, from 0
    words: Words


def chunks(groups: Iterable[Group], size: int = 1000) -> Iterator[Chunk]:
    """The groups, `size` at a time."""
    stream, first = iter(groups), 1
    while found := list(islice(stream, size)):
        texts = [content(text) for g in found for text in (g.prompt, *(r.text for r in g.responses))]
        sizes = np.array([1 + len(g.responses) for g in found])
        yield Chunk(first, found, texts, np.cumsum(sizes) - sizes, np.repeat(np.arange(len(found)), sizes), words(texts))
        first += len(found)


def words(texts: Sequence[str]) -> Words:
    """The words of the texts. The number of a word is a polynomial of its characters modulo 2^64, mixed.

    >>> found = words(["A cat, a dog", "", "CAT"])
    >>> found.text.tolist(), bool(found.number[1] == found.number[4]), found.start.tolist()
    ([0, 0, 0, 0, 2], True, [0, 4, 4, 5])
    """
    plain = [t.lower() if t.isascii() else unicodedata.normalize("NFKC", t).lower() for t in texts]
    codes = np.frombuffer("\n".join([*plain, ""]).encode("utf-32-le", "surrogatepass"), "<u4")
    kind = kinds()[np.minimum(codes, 0xFFFF)]
    inside, alone = kind == 1, kind == 2
    start = np.flatnonzero(alone | inside & ~np.roll(inside, 1))                   # the last code is a line break
    end = np.flatnonzero(alone | inside & ~np.roll(inside, -1)) + 1
    power, inverse = powers(1 << max(10, len(codes).bit_length()))
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * power[:len(codes)], dtype=np.uint64)])
    number = mixed((total[end] - total[start]) * inverse[start])
    edges = np.cumsum([0, *(len(t) + 1 for t in plain)])
    bounds = np.searchsorted(start, edges)
    return Words(number, np.repeat(np.arange(len(texts)), np.diff(bounds)), bounds)


def chosen(found: Words, texts: np.ndarray) -> Words:
    """The words of some texts alone (ascending), which are then the texts 0, 1, ..."""
    length = np.diff(found.start)[texts]
    start = np.concatenate([[0], np.cumsum(length)])
    text = np.repeat(np.arange(len(texts)), length)
    return Words(found.number[np.arange(len(text)) + (found.start[texts] - start[:-1])[text]], text, start)


@cache
def kinds() -> np.ndarray:
    """0 between words, 1 inside words, 2 a word of its own, for every character below 2^16."""
    found = np.array([unicodedata.category(chr(c))[0] in "LNM" for c in range(0x10000)], np.uint8)
    for low, high in ALONE:
        found[low:high] = 2
    for c in range(0x10000):
        if unicodedata.category(chr(c)) in ("Sm", "Sc") or chr(c) in "-*/%^":
            found[c] = 2
    return found


@cache
def powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^0, BASE^1, ... and their inverses, modulo 2^64."""
    return tuple(np.cumprod(np.array([1, *[b] * (count - 1)], np.uint64)) for b in (BASE, pow(BASE, -1, 1 << 64)))


def mixed(numbers: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers that leaves no pattern (the finaliser of splitmix64)."""
    x = numbers ^ (numbers >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shingles(found: Words, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The runs of `size` words as (numbers, text of each); of a shorter text all its words are one run, of one without words
    there is none.

    >>> shingles(words(["a b c", "b c", "z"]), 2)[1].tolist()
    [0, 0, 1, 2]
    """
    length = np.diff(found.start)
    count = np.where(length > 0, np.maximum(length - size + 1, 1), 0)
    text = np.repeat(np.arange(len(length)), count)
    first = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count) + found.start[text]
    last = found.start[text + 1]
    number = np.zeros(len(text), np.uint64)
    padded = np.concatenate([found.number, np.zeros(size, np.uint64)])
    for k in range(size):
        word = padded[first + k]
        word[first + k >= last] = 0
        number = (number + word) * np.uint64(BASE)
    return mixed(number), text


def counts(found: Words, width: int) -> csr_matrix:
    """(texts, width) how often each word and each pair of neighbours occurs, by its number modulo `width` (a power of 2)."""
    pair = mixed(found.number[:-1] * STRIDE + found.number[1:])
    same = found.text[:-1] == found.text[1:]
    column = np.concatenate([found.number, pair[same]]) & np.uint64(width - 1)
    row = np.concatenate([found.text, found.text[1:][same]])
    out = csr_matrix((np.ones(len(row), np.float32), (row, column.astype(np.int32))), (len(found.start) - 1, width))
    out.sum_duplicates()
    return out


def digest(text: str) -> int:
    """A 64-bit number of exactly this text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def identity(group: Group) -> str:
    """The group's name by its content: 16 digits from the prompt and the responses in their order."""
    said = json.dumps([group.prompt, [r.text for r in group.responses]], sort_keys=True)
    return blake2b(said.encode(), digest_size=8).hexdigest()
