"""Chains of sums, and the writer who makes at most one mistake, with whose result the chain goes on.

    5 ? 5 + 3 = 8 ; 8 - 2 = 6 ; 6 + 1 = 7 ;         right
    5 ? 5 + 3 = 8 ; 8 - 2 = 7 ; 7 + 1 = 8 ;         step 2 is wrong, step 3 goes on from it
"""
from __future__ import annotations

import numpy as np

from cookbook import tiny
from data_tools.records import Group, Response

LARGEST, OPERAND = 12, 6
WORDS = [*map(str, range(LARGEST + 1)), "+", "-", "=", ";", "?"]
tokenizer = tiny.tokenizer(WORDS)


def written(draw: np.random.Generator, start: int, steps: int, wrong: int | None = None) -> Response:
    """A worked chain. Step `wrong` has a result that is off by one or two. The labels of the steps after it are unknown."""
    total, lines = start, []
    for k in range(steps):
        signed = int(draw.choice([n for n in range(-OPERAND, OPERAND + 1) if n and 0 <= total + n <= LARGEST]))
        result = total + signed
        if k == wrong:
            result = int(draw.choice([r for r in range(result - 2, result + 3) if r != result and 0 <= r <= LARGEST]))
        lines.append(f"{total} {'+' if signed > 0 else '-'} {abs(signed)} = {result} ;")
        total = result
    labels = [1.0] * steps if wrong is None else [1.0] * wrong + [0.0] + [None] * (steps - wrong - 1)
    return Response("\n".join(lines), meta={"steps": lines, "step_labels": labels, "wrong": wrong})


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
    answers = [written(draw, start, steps, None if r else int(draw.integers(steps))) for r in right]
    return Group(f"{start} ?", answers, [float(r) for r in right])


def sentences(draw: np.random.Generator, n: int, steps: int, slips: float) -> list[str]:
    """What the language model learns from: worked chains, a share of them with a mistake."""
    found = [group(draw, steps, [bool(draw.random() >= slips)]) for _ in range(n)]
    return [f"{g.prompt} {g.responses[0].text}" for g in found]
