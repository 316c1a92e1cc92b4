"""Chains of sums, and a careless writer whose slips are as likely as what is right: only outcomes tell them apart.

    5 ? 5 + 3 = 8 ; 8 - 2 = 6 ; 6 + 1 = 7 ;         right
    5 ? 5 + 3 = 8 ; 8 - 2 = 7 ; 7 + 1 = 8 ;         step 2 is one off, and step 3 goes on from it
"""
from __future__ import annotations

from collections.abc import Collection

import numpy as np

from cookbook import tiny
from data_tools.records import Group, Response

LARGEST, OPERAND = 12, 6
WORDS = [*map(str, range(LARGEST + 1)), "+", "-", "=", ";", "?"]
tokenizer = tiny.tokenizer(WORDS)


def written(draw: np.random.Generator, start: int, steps: int, wrong: Collection[int] = ()) -> Response:
    """A worked chain whose steps `wrong` have a result that is one off. What follows the first of them has no label."""
    total, lines = start, []
    for k in range(steps):
        signed = int(draw.choice([n for n in range(-OPERAND, OPERAND + 1) if n and 0 <= total + n <= LARGEST]))
        result = total + signed
        if k in wrong:
            result += 1 if result < LARGEST else -1
        lines.append(f"{total} {'+' if signed > 0 else '-'} {abs(signed)} = {result} ;")
        total = result
    first = min(wrong, default=None)
    labels = [1.0] * steps if first is None else [1.0] * first + [0.0] + [None] * (steps - first - 1)
    return Response("\n".join(lines), meta={"steps": lines, "step_labels": labels, "wrong": first})


def first_wrong(text: str) -> int | None:
    """The verifier: the first step that is wrong, None where all are right.

    >>> first_wrong("5 + 3 = 8 ; 8 - 2 = 7 ; 7 + 1 = 8 ;")
    1
    """
    for k, step in enumerate(text.split(";")[:-1]):
        left, sign, right, _, result = step.split()
        if int(left) + int(sign + right) != int(result):
            return k
    return None


def group(draw: np.random.Generator, steps: int, right: list[bool]) -> Group:
    """A prompt with right and wrong answers, marked by their outcome alone."""
    start = int(draw.integers(LARGEST + 1))
    answers = [written(draw, start, steps, () if r else [int(draw.integers(steps))]) for r in right]
    return Group(f"{start} ?", answers, [float(r) for r in right])


def sentences(draw: np.random.Generator, n: int, steps: int) -> list[str]:
    """What the language model learns from: worked chains in which every step is wrong half of the time."""
    starts = draw.integers(LARGEST + 1, size=n).tolist()
    slips = (draw.random((n, steps)) < 0.5).tolist()
    return [f"{start} ? {written(draw, start, steps, [k for k, slip in enumerate(row) if slip]).text}"
            for start, row in zip(starts, slips, strict=True)]
