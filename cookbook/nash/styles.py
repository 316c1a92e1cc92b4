"""Three styles of answer that beat each other in a circle: what style a text has, who prefers which, texts in a style."""
from __future__ import annotations

import numpy as np

WORDS = {"terse": ("yes", "no", "done", "fine"), "warm": ("dear", "friend", "thanks", "sunny"),
         "formal": ("hereby", "pursuant", "sir", "madam")}
STYLES = (*WORDS, "none")
# P(row beats column): terse over warm over formal over terse, nine times in ten, and anything over nothing
PAYOFF = [[0.5, 0.9, 0.1, 0.9], [0.1, 0.5, 0.9, 0.9], [0.9, 0.1, 0.5, 0.9], [0.1, 0.1, 0.1, 0.5]]
LENGTH = 3                                                    # words of an answer
FIRST = (0.6, 0.2, 0.2)                                       # how often the first policy has each style


def style(text: str) -> str:
    """The style that most words of a text have, of several the one that comes first in it; 'none' without any.

    >>> style("yes dear friend"), style("sir yes dear"), style("hm")
    ('warm', 'formal', 'none')
    """
    found = [name for word in text.split() for name, words in WORDS.items() if word in words]
    return max(found, key=found.count) if found else "none"


def texts(n: int, draw: np.random.Generator) -> list[str]:
    """Answers of the first policy: a style, and words of it nine times in ten."""
    every = [word for words in WORDS.values() for word in words]
    out = []
    for words in draw.choice(len(FIRST), size=n, p=FIRST):
        own = list(WORDS.values())[words]
        out.append(" ".join(str(draw.choice(own if draw.random() < 0.9 else every)) for _ in range(LENGTH)))
    return out


def prefers(one: str, other: str, draw: np.random.Generator) -> bool:
    """Whether an annotator prefers the first text, by chance."""
    return bool(draw.random() < PAYOFF[STYLES.index(style(one))][STYLES.index(style(other))])


def is_warm(text: str) -> float:
    """1 for a warm answer, to watch what becomes of the style that the first policy hardly has."""
    return float(style(text) == "warm")
