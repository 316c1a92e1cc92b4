"""Instructions that code can check, and prompts with more and more of them (MAPL)."""
from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from data_tools.augment.common import compared, preferred, question, reworded
from data_tools.describe import content
from data_tools.records import Group, Response
from data_tools.rules import generator

__all__ = ["mapl"]

COMMON = ("however", "because", "example", "important", "first", "usually", "together", "simple")


@lru_cache(maxsize=16)                                        # the same two texts come again and again
def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)*", text)


def sentences(text: str) -> list[str]:
    r"""Pieces that end with . ! or ? before a blank or the end; line breaks end one too.

    >>> sentences("It is 3.5 m. Really?\nYes")
    ['It is 3.5 m.', 'Really?', 'Yes']
    """
    return [s for s in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if s]


class Constraint(NamedTuple):
    """An instruction with a value: what it says, whether a text keeps it, and values which a text keeps and breaks (None
    where there is none). At most one of a topic goes into a prompt, so that no two contradict each other."""
    topic: str
    say: Callable[[object], str]
    holds: Callable[[str, object], bool]
    values: Callable[[str, random.Random], tuple[object, object]]


def _switch(topic: str, yes: str, no: str, has: Callable[[str], bool]) -> Constraint:
    """A property that is asked for or forbidden."""
    return Constraint(topic, lambda wanted: yes if wanted else no, lambda text, wanted: has(text) == wanted,
                      lambda text, _: (has(text), not has(text)))


def _count(topic: str, unit: str, most: bool, of: Callable[[str], list]) -> Constraint:
    """At most or at least so many."""
    def values(text, draw):
        n = len(of(text))
        step = max(1, round(draw.uniform(0.2, 0.5) * n))
        low, high = (n - step if n > step else None), n + step
        return (high, low) if most else (low, high)
    return Constraint(topic, lambda n: f"Use at {'most' if most else 'least'} {n} {unit if n > 1 else unit[:-1]}.",
                      lambda text, n: len(of(text)) <= n if most else len(of(text)) >= n, values)


@lru_cache(maxsize=16)
def _used(text: str) -> set[str]:
    return set(map(str.lower, words(text)))


def _word(most: bool) -> Constraint:
    """A word to use or to avoid."""
    def values(text, draw):
        there = sorted(w for w in _used(text) if len(w) > 3 and w.isalpha())
        absent = sorted(set(COMMON) - _used(text))
        inside, outside = (draw.choice(some) if some else None for some in (there, absent))
        return (inside, outside) if most else (outside, inside)
    return Constraint("word", lambda w: f'{"Use" if most else "Do not use"} the word "{w}".',
                      lambda text, w: (w in _used(text)) == most, values)


CONSTRAINTS: dict[str, Constraint] = {
    "words_at_most": _count("words", "words", True, words),
    "words_at_least": _count("words", "words", False, words),
    "sentences_at_most": _count("sentences", "sentences", True, sentences),
    "sentences_at_least": _count("sentences", "sentences", False, sentences),
    "word_used": _word(True),
    "word_avoided": _word(False),
    "capitals": _switch("capitals", "Use at least one capital letter.", "Write everything in lower case.",
                        lambda text: text != text.lower()),
    "digits": _switch("digits", "Use at least one digit.", "Do not use any digits.", lambda text: bool(re.search(r"\d", text))),
    "commas": _switch("commas", "Use at least one comma.", "Do not use any commas.", lambda text: "," in text),
    "question": _switch("question", "Ask a question in your answer.", "Do not use any question marks.", lambda text: "?" in text),
    "bullets": _switch("bullets", 'Use a list whose lines begin with "- ".', 'Do not begin any line with "- ".',
                       lambda text: bool(re.search(r"^- ", text, re.MULTILINE))),
    "lines": _switch("lines", "Use more than one line.", "Write everything in one line.", lambda text: "\n" in text.strip()),
    "stop": _switch("end", "End with a full stop.", "Do not end with a full stop.", lambda text: text.rstrip().endswith(".")),
    "quotes": _switch("quotes", "Use double quotation marks.", "Do not use double quotation marks.", lambda text: '"' in text),
}


def told(prompt, instructions: list[str]):
    """The prompt with instructions after its question."""
    return reworded(prompt, "\n\n".join([question(prompt), " ".join(instructions)]))


def drawn(text: str, prompt, count: int, draw: random.Random) -> list[tuple[Constraint, object, object]]:
    """Constraints of different topics, with a value that the text keeps and one that it breaks; what the prompt says already
    is left out."""
    found: dict[str, tuple] = {}
    for constraint in draw.sample(list(CONSTRAINTS.values()), len(CONSTRAINTS)):
        if len(found) == count:
            break
        kept, broken = constraint.values(text, draw)
        if kept is not None and broken is not None and not any(constraint.say(v) in question(prompt) for v in (kept, broken)):
            found.setdefault(constraint.topic, (constraint, kept, broken))
    return list(found.values())


def mapl(group: Group, *, count=2, seed=0) -> list[Group]:
    """Pairs with multi-level prompts beside them, for the recipe `mapl`: instructions that code has checked.

    level 1     one response y under two prompts with as many instructions: it keeps all of x_w, and not all of x_l; for
                both responses of the pair
    level 2     x' is x with an instruction that y_w keeps and y_l breaks: the rows (x', y_w), (x', y_l), (x, y_w), (x, y_l)
                with contrast +, -, -, +; and with the signs turned for one that y_l keeps and y_w breaks

    count       instructions in a prompt of level 1; 2
    seed        with the texts decides which
    Edge        no instruction tells the responses apart in one direction: no level 2 group of it; a tie has level 1 alone
    Relations   both prompts of level 1 are equally demanding, so that "more instructions" says nothing
    Departs     level 2 is our reading
    Reference   Multi-level Aware Preference Learning, arXiv:2505.12845

    >>> pair = Group("Why?", [Response("Because."), Response("It is so, I think")], relevance=[1.0, 0.0])
    >>> [[r.meta for r in g.responses] for g in mapl(pair)][1:2]
    [[{'level': 1}, {'level': 1}]]
    """
    if count < 1:
        raise ValueError(f"count, the number of instructions, should be at least 1, found {count}")
    pair = preferred(group, "mapl")
    draw = generator(seed, "mapl", group.prompt, [r.text for r in group.responses])
    both = [group.responses[i] for i in pair or compared(group, "mapl")]
    made = [inside(group, response, count, draw) for response in both]
    if pair is not None:
        made += [across(group, *both, sign, draw) for sign in (1, -1)]
    return [group, *(found for found in made if found is not None)]


def inside(group: Group, response: Response, count: int, draw: random.Random) -> Group:
    """Level 1: one response under a prompt that it keeps and one that it breaks."""
    text = content(response.text)
    chosen = drawn(text, group.prompt, count, draw)
    broken = set(draw.sample(range(len(chosen)), draw.randint(1, len(chosen))))
    kept = told(group.prompt, [c.say(good) for c, good, _ in chosen])
    other = told(group.prompt, [c.say(bad if k in broken else good) for k, (c, good, bad) in enumerate(chosen)])
    rows = [Response(response.text, prompt=prompt, meta={"level": 1}) for prompt in (kept, other)]
    return Group(group.prompt, rows, relevance=[1.0, 0.0], weight=group.weight, meta={**group.meta, "rule": "mapl"})


def across(group: Group, best: Response, worst: Response, sign: int, draw: random.Random) -> Group | None:
    """Level 2: an instruction that widens (sign 1) or narrows (-1) the gap between the two responses."""
    keeps, breaks = (content(r.text) for r in ((best, worst) if sign > 0 else (worst, best)))
    found = next((c.say(kept) for c in draw.sample(list(CONSTRAINTS.values()), len(CONSTRAINTS))
                  if (kept := c.values(keeps, draw)[0]) is not None and not c.holds(breaks, kept)
                  and c.say(kept) not in question(group.prompt)), None)
    if found is None:
        return None
    rows = [Response(response.text, prompt=prompt, meta={"level": 2, "contrast": s * sign})
            for prompt, signs in ((told(group.prompt, [found]), (1, -1)), (group.prompt, (-1, 1)))
            for response, s in zip((best, worst), signs, strict=True)]
    return Group(group.prompt, rows, weight=group.weight, meta={**group.meta, "rule": "mapl"})
