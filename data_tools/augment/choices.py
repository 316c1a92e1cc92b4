"""Multiple-choice prompts from right and wrong answers, and their inversion to questions with several right options."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from data_tools.augment.common import failure, question, variant
from data_tools.columns import nearest
from data_tools.records import Group
from data_tools.rules import generator, place

__all__ = ["inverted", "multiple_choice"]

NEGATED = {"did": "didn't", "does": "doesn't", "do": "don't", "is": "isn't", "are": "aren't", "was": "wasn't", "were": "weren't",
           "can": "can't", "will": "won't", "would": "wouldn't", "should": "shouldn't", "has": "hasn't", "have": "haven't"}
ALL_OR_NONE = re.compile(r"\b(all|none|both|neither|any) of (the|these|those)\b", re.IGNORECASE)


def rendered(text: str, options: Sequence[str]) -> str:
    """A question with lettered options.

    >>> rendered("Which is red?", ["sky", "fox"])
    'Which is red?\\nA. sky\\nB. fox\\nName the letter of every right option.'
    """
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([text, *lines, "Name the letter of every right option."])


def texts(group: Group, field: str) -> list[str]:
    """Different texts of the meta: a list, or one text that is parted by semicolons."""
    if field not in group.meta:
        raise ValueError(f"{place(group)}its meta has no {field!r}{nearest(field, group.meta)}; there: "
                         f"{', '.join(group.meta) or 'nothing'}. Name the fields of the answers with right= and wrong=")
    found = group.meta[field]
    pieces = found.split(";") if isinstance(found, str) else list(found)
    return list(dict.fromkeys(text.strip() for text in pieces if text.strip()))


def multiple_choice(group: Group, *, right="right", wrong="wrong", options=4, most_right=1, seed=0) -> list[Group]:
    """A question with options, of which at most `most_right` are right.

    right, wrong   the fields of the meta that hold right and wrong answers: lists, or texts parted by semicolons
    options     of a question; 4
    most_right  right ones among them, drawn from 1 to so many; 1
    seed        with the prompt decides which options and their order
    Edge        no right or no wrong answer, or an answer that is both: the group comes back with the reason in meta["failed"];
                fewer answers than options make fewer options
    Relations   meta has `question`, `options`, and `answer`, the letters ("A" or "A, C"), which the rewards `choice` and
                `choice_share` (partial credit) read
    Reference   TW-GRPO, longmalongma/TW-GRPO (several right options)

    >>> group = Group("Which is red?", [], meta={"right": ["fox"], "wrong": "sky; sea"})
    >>> sorted(multiple_choice(group)[0].meta["options"])
    ['fox', 'sea', 'sky']
    """
    if not 1 <= most_right < options <= len(ascii_uppercase):
        raise ValueError(f"a question has from 2 to {len(ascii_uppercase)} options, of which fewer are right, found "
                         f"options={options}, most_right={most_right}")
    good, bad = texts(group, right), texts(group, wrong)
    if not good or not bad or set(good) & set(bad):
        return [failure(group, "multiple_choice", f"it has {len(good)} right and {len(bad)} wrong answers"
                        + (f", and is both: {', '.join(sorted(set(good) & set(bad)))}" if set(good) & set(bad) else ""))]
    draw = generator(seed, "multiple_choice", group.prompt)
    chosen = draw.sample(good, draw.randint(1, min(most_right, len(good))))
    return [lettered(group, "multiple_choice", question(group.prompt), chosen,
                     draw.sample(bad, min(options - len(chosen), len(bad))), draw)]


def lettered(group: Group, rule: str, text: str, right: Sequence[str], wrong: Sequence[str], draw) -> Group:
    """The question with right and wrong options in random order."""
    options = [*right, *wrong]
    draw.shuffle(options)
    letters = ", ".join(letter for letter, option in zip(ascii_uppercase, options, strict=False) if option in right)
    return variant(group, rule, rendered(text, options), question=text, options=options, answer=letters)


def negated(text: str) -> str:
    """A question for what is not so: by its auxiliary verb in second place, else in a frame.

    >>> negated("Why did he run?"), negated("Which colour has snow?")[:41]
    ("Why didn't he run?", 'Which of these is not a correct answer to')
    """
    first, _, rest = text.partition(" ")
    verb, _, rest = rest.partition(" ")
    if verb in NEGATED and first.lower() in ("why", "what", "who", "which", "where", "when", "how") and rest:
        return f"{first} {NEGATED[verb]} {rest}"
    return f'Which of these is not a correct answer to "{text}"?'


def inverted(group: Group, *, share=0.5, seed=0) -> list[Group]:
    """Questions with one right option turned round: what was wrong is right (TW-GRPO).

    With probability `share` the question is negated; of the n wrong options k ~ Uniform{1..n} stay and are the right ones, the
    right one stays as the wrong one, and the options are shuffled.

    share       of the questions that are turned; the others stay as they are; 0.5
    seed        with the prompt decides which
    Edge        several right options, equal options, 'all of the above': it stays, and a copy says in meta["failed"] why
    Relations   reads what `multiple_choice` writes. The reward `choice_share` gives part of it for some of the right letters
    Departs     a question without an auxiliary verb in second place is framed ("Which of these is not a correct answer to ..."),
                where the released code leaves it and turns its answers all the same
    Reference   TW-GRPO, longmalongma/TW-GRPO, convert_nextgqa.py

    >>> group = Group("?", [], meta={"question": "Why did he run?", "options": ["rain", "joy"], "answer": "A"})
    >>> found, = inverted(group, share=1)
    >>> found.meta["question"], found.meta["options"]["AB".index(found.meta["answer"])]
    ("Why didn't he run?", 'joy')
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share should be between 0 and 1, found {share}")
    text, options, letter = (field(group, name) for name in ("question", "options", "answer"))
    draw = generator(seed, "inverted", group.prompt)
    if draw.random() >= share:
        return [group]
    known: Mapping[str, str] = dict(zip(ascii_uppercase, options, strict=False))
    why = f"{letter!r} is not the letter of one option" if letter not in known else "two options are equal" \
        if len(set(options)) < len(options) else "an option speaks of the others" if any(map(ALL_OR_NONE.search, options)) \
        else "there is no wrong option" if len(options) < 2 else ""
    if why:
        return [group, failure(group, "inverted", why)]
    wrong = [option for other, option in known.items() if other != letter]
    return [lettered(group, "inverted", negated(text), draw.sample(wrong, draw.randint(1, len(wrong))), [known[letter]], draw)]


def field(group: Group, name: str):
    if name not in group.meta:
        raise ValueError(f"{place(group)}its meta has no {name!r}{nearest(name, group.meta)}: inverted takes what "
                         f"multiple_choice makes. There: {', '.join(group.meta) or 'nothing'}")
    return group.meta[name]
