"""People who swap things, told as BIG-Bench-Mistake's tracking of shuffled objects is, and its traces in the same words.

    first, alice and bob swap books. then, ... finally, ... at the end of the semester, alice has
    at the start: alice: a, bob: b, claire: c.
    alice and bob swap books: alice: b, bob: a, claire: c.
    bob and claire swap books: alice: b, bob: a, claire: c.                     a slip: nothing is swapped
    ...
    at the end of the semester, alice has b. so the answer is (b)

Things have the letters of their options, initials are names, all is in lower case, the opening sentence is left out.
"""
from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from data_tools.records import Group, Response

PEOPLE = ["Alice", "Bob", "Claire", "Dave", "Eve"]
STORIES = [("swap balls", "game, {} has the", "{} ball"), ("swap their gifts", "event, {} has the", "{} present"),
           ("swap books", "semester, {} has", "{}"), ("switch partners", "dance, {} is dancing with", "{}"),
           ("trade positions", "match, {} is playing", "{}")]


# -------------------------------------------------------------------------------------------------------------- synthetic
def swapped(state: list[str], a: int, b: int) -> list[str]:
    """
    >>> swapped(["a", "b", "c"], 0, 2)
    ['c', 'b', 'a']
    """
    state = state.copy()
    state[a], state[b] = state[b], state[a]
    return state


def slipped(draw: np.random.Generator, state: list[str], a: int, b: int) -> list[str]:
    """What a careless writer has after a swap of a and b: anything but what is right, for one of them at least."""
    while True:
        one, other = draw.permutation([a, b]).tolist()
        third = int(draw.integers(len(state)))
        copied, random = state.copy(), state.copy()
        copied[one] = state[other]
        random[one] = "abcde"[draw.integers(len(state))]
        wrong = [state, copied, random, swapped(state, one, third), swapped(swapped(state, a, b), one, third)][draw.integers(5)]
        if wrong[one] != state[other] or wrong[other] != state[one]:
            return wrong


def told(draw: np.random.Generator, people: int, slips: Collection[int] = ()) -> Group:
    """A story with as many swaps as people and one answer to it, marked by its outcome alone; the swaps of `slips` are
    wrong, and so is the answer if `people` is among them. What follows the first slip has no step label."""
    names, start = PEOPLE[:people], list("abcde"[:people])
    swap, end, thing = STORIES[draw.integers(len(STORIES) if people == 3 else 1)]
    pairs, asked = [draw.choice(people, 2, replace=False).tolist() for _ in names], int(draw.integers(people))
    style = draw.choice(["all", "states alone", "those who swap"], p=[0.7, 0.15, 0.15])
    verb = swap if draw.random() < 0.6 else swap.split()[0]
    question = f"At the end of the {end.format(names[asked])}"

    def said(state, who):
        return ", ".join(f"{names[k]}: {state[k]}" for k in who) + ("" if style == "states alone" else ".")

    lines, wrong, state, truth = [], [], start, start
    if style != "those who swap" and draw.random() < 0.85:
        lines.append(("At the start: " if style == "all" else "") + said(state, range(people)))
    for k, (a, b) in enumerate(pairs):
        truth = swapped(truth, a, b)
        state = slipped(draw, state, a, b) if k in slips else swapped(state, a, b)
        wrong += [len(lines)] * (k in slips)
        lines.append(("" if style == "states alone" else f"{names[a]} and {names[b]} {verb}: ")
                     + said(state, [a, b] if style == "those who swap" else range(people)))
    answer = state[asked]
    if people in slips:
        answer = str(draw.choice([letter for letter in start if letter != answer]))
        wrong.append(len(lines))
    lines.append((f"{question} {thing.format(answer)}. " if draw.random() < 0.8 else "") + f"So the answer is ({answer})")
    if draw.random() < 0.1:                                   # the answer goes with the last swap
        lines[-2:], wrong = [" ".join(lines[-2:])], [min(k, len(lines) - 2) for k in wrong]
    lines, first = [line.lower() for line in lines], min(wrong, default=None)
    labels = [1.0] * len(lines) if first is None else [1.0] * first + [0.0] + [None] * (len(lines) - first - 1)
    order = ["First,", *["Then,"] * (people - 2), "Finally,"]
    prompt = " ".join(f"{o} {names[a]} and {names[b]} {swap}." for o, (a, b) in zip(order, pairs, strict=True)) + f" {question}"
    return Group(prompt.lower(), [Response("\n".join(lines), meta={"steps": lines, "step_labels": labels, "wrong": first})],
                 [float(answer == truth[asked])])


def careless(draw: np.random.Generator, n: int, slip: float, five: float = 0.3) -> list[Group]:
    """What the language model learns from: every step is wrong with this probability; `five` is the share of five people."""
    out = []
    for people in draw.choice([3, 5], n, p=[1 - five, five]).tolist():
        out.append(told(draw, people, np.flatnonzero(draw.random(people + 1) < slip).tolist()))
    return out


def outcomes(draw: np.random.Generator, n: int) -> list[Group]:
    """What reward models learn from: half without a slip, half with one at a random place."""
    return [told(draw, people, [int(draw.integers(people + 1))] if draw.random() < 0.5 else [])
            for people in draw.choice([3, 5], n, p=[0.7, 0.3]).tolist()]


# ------------------------------------------------------------------------------------------------------------------- real
def forms(thing: str) -> list[str]:
    """How traces name a thing, longest first.

    >>> forms("The Great Gatsby"), forms("green ball"), forms("center midfielder")
    (['The Great Gatsby', 'Great Gatsby', 'Gatsby', 'Great'], ['green'], ['center midfielder'])
    """
    thing = re.sub(r" (ball|present)$", "", thing)
    names = {thing, thing.removeprefix("The "), thing.split("-")[0]}
    names |= {word for word in thing.split() if word[0].isupper() and word != "The"}
    return sorted(names, key=lambda name: (-len(name), name))


def retold(g: Group) -> Group:
    """A trace of BIG-Bench-Mistake in the words of `told`; `meta["mistake_index"]` stays."""
    options = re.findall(r"\((\w)\) (.*?)\.?(?:\n|$)", g.prompt)
    things = sorted([(form, letter.lower()) for letter, thing in options for form in forms(thing)], key=lambda it: -len(it[0]))

    def plain(step):
        step = re.sub(r"(?<!\()\b[A-E]\b(?!\))", lambda m: PEOPLE["ABCDE".index(m[0])], step)
        for form, letter in things:
            step = re.sub(rf"\b{re.escape(form)}\b", letter, step, flags=re.IGNORECASE)
        return step.lower()

    lines = [plain(step) for step in g.responses[0].meta["steps"]]
    prompt = re.search(r"First, .*?(?=\s*\nOptions)", g.prompt, re.DOTALL)[0].lower()
    return Group(prompt, [Response("\n".join(lines), meta={"steps": lines})], meta=g.meta)
