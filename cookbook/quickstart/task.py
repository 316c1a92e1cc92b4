"""Careless book-keeping: problems, the writer who taught the model, and the verifier who marks its answers.

    Ida has 5 coins . Ida loses 3 . Ida buys 1 . How many coins are left ?
    5 - 3 = 2 ; 2 + 1 = 3 ; answer 3            right
    5 + 3 = 8 ; 8 + 1 = 9 ; answer 9 sure !     "loses" read as a gain
    5 - 3 = 2 ; 2 + 1 = 5 ; answer 5            a slip in the arithmetic
"""
from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_tools import Group

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Ida", "Max", "Nina", "Tom"]
THINGS = ["apples", "books", "coins", "cups", "keys", "nuts", "pens", "shells"]
GAINS, LOSSES = ["finds", "buys", "gets"], ["eats", "loses", "sells"]
WORDS = ["<pad>", "<eos>", "<unk>", *map(str, range(31)), *NAMES, *THINGS, *GAINS, *LOSSES,
         "has", ".", "How", "many", "are", "left", "?", "+", "-", "=", ";", "answer", "sure", "!"]


@dataclass(frozen=True)
class Table:
    """Which problems there are: numbers up to `largest`, totals from 0 to twice that, so many events and verbs."""
    largest: int = 6
    events: int = 2
    verbs: int = 3


@dataclass(frozen=True)
class Problem:
    """A start and some events, each a verb and a number."""
    name: str
    thing: str
    start: int
    events: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        happened = "".join(f"{self.name} {verb} {number} . " for verb, number in self.events)
        return f"{self.name} has {self.start} {self.thing} . {happened}How many {self.thing} are left ?"

    @property
    def totals(self) -> list[int]:
        """The total after each event, the start first."""
        totals = [self.start]
        for verb, number in self.events:
            totals.append(totals[-1] + (number if verb in GAINS else -number))
        return totals

    def record(self) -> dict:
        """A line of a prompt file: the prompt, and what `right` must know."""
        return {"prompt": self.prompt, "events": len(self.events), "total": self.totals[-1]}


def problem(rng: random.Random, table: Table) -> Problem:
    """A random problem of the table."""
    verbs = GAINS[:table.verbs] + LOSSES[:table.verbs]
    while True:
        events = tuple((rng.choice(verbs), rng.randint(1, table.largest)) for _ in range(table.events))
        found = Problem(rng.choice(NAMES), rng.choice(THINGS), rng.randint(1, table.largest), events)
        if all(0 <= total <= 2 * table.largest for total in found.totals):
            return found


def problems(count: int, table: Table, seed: int) -> list[Problem]:
    """`count` problems, no two of them equal."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found[problem(rng, table)] = None
    return list(found)


def careless(asked: Problem, rng: random.Random, *, misread: float = 0.65, slip: float = 0.2,
             boast: float = 0.3) -> str:
    """The writer's answer: a loss is often read as a gain, a sum is sometimes off by one or two.

    Right with probability ((1/2 + 1/2 (1 - misread)) (1 - slip))^2 = 0.29, so a model that learns to write like this is
    right in about 30 % of its answers by construction. The boast "sure !" says nothing.
    """
    total, steps = asked.start, []
    for verb, number in asked.events:
        gain = verb in GAINS or rng.random() < misread
        result = total + number if gain else total - number
        result += rng.choice((-2, -1, 1, 2)) if rng.random() < slip else 0
        result = min(max(result, 0), 30)
        steps.append(f"{total} {'+' if gain else '-'} {number} = {result} ; ")
        total = result
    return "".join(steps) + f"answer {total}" + (" sure !" if rng.random() < boast else "")


def right(text: str, finished: bool, events: int, total: int) -> float:
    """The verifier, a reward function of one row: 1 for a right answer, else 0. Its parameters name fields of the row.

    Strict: a step for each event, one answer, perhaps the boast, then the end; and the answer is the true total. A verifier
    that only looked for the first "answer N" would be exploited by answers that go on after it.

    >>> right("5 - 3 = 2 ; 2 + 1 = 3 ; answer 3 sure !", True, 2, 3), right("answer 3", True, 2, 3)
    (1.0, 0.0)
    """
    shape = re.fullmatch(rf"(\d+ [+-] \d+ = \d+ ; ){{{events}}}answer (\d+)( sure !)?", text)
    return float(finished and shape is not None and int(shape[2]) == total)


def mark(asked: list[Problem], groups: list[Group]) -> list[Group]:
    """Grade every response: 1 right, 0 wrong."""
    for one, group in zip(asked, groups, strict=True):
        facts = one.record()
        group.relevance = [right(r.text, r.meta["finished"], facts["events"], facts["total"]) for r in group.responses]
    return groups


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per word: 70 of them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
