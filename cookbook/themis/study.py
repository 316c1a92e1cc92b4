"""Themis: does a reward model that asks a calculator and a calendar beat the same model without them?

    python -m cookbook.themis.study [--toy]
"""
from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta

from data_tools.records import Group
from rewards.tool_augmented import answered, question, trace
from rewards.tools import Tools, calculator, calendar

TOOLS = Tools([calculator.TOOL, *calendar.TOOLS])
Problem = tuple[str, Callable[[object], str], object, Callable[[random.Random], object], str, str]


# ------------------------------------------------------------------------------------------------------------ problems
def some_day(rng: random.Random) -> date:
    return date(2000, 1, 1) + timedelta(rng.randrange(8766))


def off(number: int, rng: random.Random) -> int:
    """Another number: near, or anywhere below 6000."""
    return max(0, number + rng.choice([-1, 1]) * rng.randint(1, 99)) if rng.random() < 0.5 else rng.randrange(6000)


def difference(rng: random.Random) -> tuple:
    one, other = some_day(rng), some_day(rng)
    right = abs((one - other).days)
    told = (f"The difference between {one} and {other} is {n}" for n in (right, off(right, rng)))
    return f"How many days are between {one} and {other}?", *told, "Calendar.day_difference", f"{one}, {other}"


def weekday(rng: random.Random) -> tuple:
    day = some_day(rng)
    right = day.weekday()
    told = (f"{day} is {calendar.DAYS[n]}" for n in (right, (right + rng.randint(1, 6)) % 7))
    return f"What day of the week is {day}?", *told, "Calendar.week_day", str(day)


def target(rng: random.Random) -> tuple:
    day, days = some_day(rng), rng.randint(1, 400)
    right = day + timedelta(days)
    wrong = some_day(rng) if rng.random() < 0.5 else right + timedelta(rng.choice([-1, 1]) * rng.randint(1, 30))
    told = (f"The day after {day} {days} days is {d}" for d in (right, wrong))
    return f"What day is {days} days after {day}?", *told, "Calendar.target_day", f"{day}, {days}"


def arithmetic(rng: random.Random) -> tuple:
    """Two or three steps on the last result; in the wrong answer one result is off, and later ones follow from it."""
    start = rng.randint(2, 99)
    steps = [(rng.choice("+-*"), rng.randint(2, 99)) for _ in range(rng.randint(1, 3))]

    def worked(wrong: int | None) -> str:
        value, lines = start, []
        for n, (sign, number) in enumerate(steps):
            left = f"{value}{sign}{number}"
            value = int(calculator.value(left)) + (rng.choice([-10, -1, 1, 10]) if n == wrong else 0)
            lines.append(f"{left} = <<{left}={value}>>{value}")
        return "\n".join([*lines, f"#### {value}"])

    asked = f"What is {start}, then {', then '.join(sign + ' ' + str(number) for sign, number in steps)}?"
    return asked, worked(None), worked(rng.randrange(len(steps))), "calculator", "Same as the answer"


KINDS = {"difference": difference, "weekday": weekday, "target": target, "arithmetic": arithmetic}


def pair(rng: random.Random, kind: str, tools: bool) -> Group:
    asked, right, wrong, action, given = KINDS[kind](rng)
    if not tools:
        return Group(question(asked), [answered(right), answered(wrong)], [1.0, 0.0])
    responses = []
    for answer, verdict in ((right, "right"), (wrong, "wrong")):
        seen = TOOLS.call(action, answer if given == "Same as the answer" else given)
        responses.append(answered(answer, trace({"Thought": "I need to check it.", "Action": action, "Action Input": given,
                                                 "Observation": seen.text}, f"The answer is {verdict}.")))
    return Group(question(asked), responses, [1.0, 0.0])
