"""What a reward is, and how groups are scored: batched, cached by content, with errors that are never a silent zero.

Two ways to write a reward:

a function of one row    `def length(text, *, limit=100): ...` returns a number. Its positional parameters name fields of the
                         row (`prompt`, `messages`, `text`, or any key of the response's or the group's meta), its
                         keyword-only parameters are settings. The same convention as parts.
a reward of many rows    an object with `name`, `settings()` and `__call__(rows) -> numbers` (models, judges): a `Reward`.

What compares responses instead of grading them (general preference models, pairwise judges) is a `Comparison`: it has
`name`, `settings()` and `compare(groups) -> list of K x K matrices`, P(i preferred to j), None where it does not know.

A reward that computes many rows at once may put a ScoringError in the place of a number, so that one bad row does not
cost the others.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

from data_tools.columns import nearest
from data_tools.records import Group, Message, Prompt, Response

__all__ = ["Comparison", "MeanWin", "MissingField", "Reward", "Row", "RowReward", "ScoringError", "Unreachable", "as_reward",
           "fill", "final_text", "mean_wins", "rows_of", "score", "user_text", "values_of"]


@dataclass(frozen=True)
class Row:
    """One response with its prompt, as rewards see it."""
    group: Group
    response: Response

    @property
    def messages(self) -> list[Message]:
        """The prompt as messages."""
        prompt = self.group.prompt if self.response.prompt is None else self.response.prompt
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    @property
    def prompt(self) -> str:
        """The prompt's last user turn."""
        return user_text(self.group.prompt if self.response.prompt is None else self.response.prompt)

    @property
    def text(self) -> str:
        """The response; of several turns the last assistant message."""
        return final_text(self.response.text)

    def fields(self) -> dict:
        """Everything a row function may ask for."""
        return {**self.group.meta, **self.response.meta, "prompt": self.prompt, "messages": self.messages, "text": self.text}

    @property
    def place(self) -> str:
        """Where the row comes from, for errors."""
        where = self.group.meta.get("place", "")
        return f"{where}: response {index_of(self) + 1}".lstrip(": ")


def index_of(row: Row) -> int:
    """The position of the row's response in its group."""
    return [r is row.response for r in row.group.responses].index(True)


class Reward(Protocol):
    """Numbers for many rows. `settings()` is plain JSON: with `name` it says all that decides a score (the cache's key).

    A reward may also have `reads()`, the fields that it looks at: then a change in another field keeps its cached scores.
    """
    name: str

    def settings(self) -> dict: ...

    def __call__(self, rows: Sequence[Row]) -> Sequence[float]: ...


class Comparison(Protocol):
    """P(i preferred to j) for the responses of each group, (K, K) with wins[i][j] + wins[j][i] = 1."""
    name: str

    def settings(self) -> dict: ...

    def compare(self, groups: Sequence[Group]) -> list[list[list[float | None]]]: ...


class ScoringError(ValueError):
    """A reward that raised, timed out or returned something that is no number, with the row it happened at."""


class Unreachable(ScoringError):
    """A service that does not answer, however often it is asked. It ends the scoring even where rows may be marked."""


class MissingField(ScoringError):
    """A row lacks a field that the reward reads."""


@cache
def fields_read(function: Callable) -> list[str]:
    """The positional parameters, read once for each function."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


@dataclass(frozen=True)
class RowReward:
    """A function of one row as a reward of many rows. Raises MissingField where a row lacks what it reads."""
    function: Callable[..., float]
    label: str | None = None

    @property
    def name(self) -> str:
        bare = self.function.func if isinstance(self.function, partial) else self.function
        return self.label or bare.__name__

    def settings(self) -> dict:
        return dict(self.function.keywords) if isinstance(self.function, partial) else {}

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        return [self.one(row) for row in rows]

    def one(self, row: Row) -> float:
        return self.function(*self.arguments(row))

    def reads(self) -> list[str]:
        """The fields of a row that the function reads."""
        return fields_read(self.function)

    def arguments(self, row: Row) -> list:
        fields, wanted = row.fields(), self.reads()
        for name in wanted:
            if name not in fields:
                raise MissingField(f"reward {self.name!r} reads the field {name!r}, which the row lacks"
                                   f"{nearest(name, fields)}; fields: {', '.join(sorted(fields))}")
        return [fields[name] for name in wanted]


@dataclass(frozen=True)
class MeanWin:
    """A comparison as a reward: the mean probability of beating the other responses of the same group that it was
    compared with. A number of a response on its own does not exist: it moves with the group.

    The matrix itself stays in `group.meta["wins"][name]`, and becomes the `wins` of a group without any label.
    """
    comparison: Comparison
    label: str | None = None

    @property
    def name(self) -> str:
        return self.label or self.comparison.name

    def settings(self) -> dict:
        return self.comparison.settings()

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        groups = list({id(row.group): row.group for row in rows}.values())
        means = {}
        for group, wins in zip(groups, self.comparison.compare(groups), strict=True):
            group.meta["wins"] = {**group.meta.get("wins", {}), self.name: wins}
            if group.relevance is None and group.wins is None:
                group.wins = wins
            means[id(group)] = [ScoringError("no comparison with another response of the group is known") if m is None else m
                                for m in mean_wins(wins)]
        return [means[id(row.group)][index_of(row)] for row in rows]


def mean_wins(wins: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean probability of beating the others, over those that are known; None where none is.

    >>> mean_wins([[0.5, 1.0, None], [0.0, 0.5, 0.5], [None, 0.5, 0.5]])
    [1.0, 0.25, 0.5]
    """
    others = [[w for j, w in enumerate(row) if j != i and w is not None] for i, row in enumerate(wins)]
    return [sum(row) / len(row) if row else None for row in others]


def as_reward(thing: Callable, name: str | None = None) -> Reward:
    """A plain function of one row becomes a reward, a comparison its `MeanWin`; a reward stays what it is.

    >>> def shout(text, *, factor=1.0): return factor * text.count("!")
    >>> as_reward(partial(shout, factor=2.0))([Row(Group("a", []), Response("b!!"))])
    [4.0]
    """
    if not hasattr(thing, "settings"):
        return RowReward(thing, name)
    return MeanWin(thing, name) if hasattr(thing, "compare") else thing


def rows_of(groups: Sequence[Group]) -> list[Row]:
    return [Row(group, response) for group in groups for response in group.responses]


def score(groups: Sequence[Group], rewards: Mapping[str, Callable] | Sequence[Callable], *,
          on_error: str = "raise") -> list[Group]:
    """The groups with `scores[name]` of every response filled in by every reward; the groups themselves are changed.

    on_error    "raise": a row that cannot be scored ends with ScoringError, which names the reward and the row's place.
                "mark": the row gets no score; why stands in its meta under "unscored" ({reward: reason}). A NaN or infinite
                score is such an error. A score is never made up.

    A comparison fills in what `MeanWin` says.
    """
    if on_error not in ("raise", "mark"):
        raise ValueError(f"on_error is 'raise' or 'mark', found {on_error!r}")
    named = rewards if isinstance(rewards, Mapping) else {as_reward(r).name: r for r in rewards}
    rows = rows_of(groups)
    for name, thing in named.items():
        fill(rows, name, values_of(as_reward(thing, name), rows, on_error))
    return list(groups)


def fill(rows: Sequence[Row], name: str, values: Sequence[float | ScoringError]) -> None:
    """Write a reward's numbers into `scores`, and why there is none into meta under "unscored"."""
    for row, value in zip(rows, values, strict=True):
        row.response.scores.pop(name, None)
        unscored = {k: why for k, why in row.response.meta.pop("unscored", {}).items() if k != name}
        if isinstance(value, ScoringError):
            unscored[name] = str(value)
        else:
            row.response.scores[name] = value
        if unscored:
            row.response.meta["unscored"] = unscored


def values_of(reward: Reward, rows: Sequence[Row], on_error: str = "raise") -> list[float | ScoringError]:
    """A number for each row; with on_error="mark" an error in its place where there is none."""
    try:
        found = list(reward(rows))
    except Unreachable:
        raise
    except Exception as error:
        if on_error == "raise" and len(rows) <= 1:
            where = rows[0].place if rows else ""
            kind = type(error) if isinstance(error, ScoringError) else ScoringError
            raise kind(f"{where}{': ' if where else ''}reward {reward.name!r} failed: {type(error).__name__}: {error}") \
                from error
        if len(rows) <= 1:
            return [ScoringError(f"{type(error).__name__}: {error}")]
        half = len(rows) // 2                                                     # to find the row that it is
        return values_of(reward, rows[:half], on_error) + values_of(reward, rows[half:], on_error)
    if len(found) != len(rows):
        raise ScoringError(f"reward {reward.name!r} returned {len(found)} scores for {len(rows)} rows")
    out: list[float | ScoringError] = []
    for row, value in zip(rows, found, strict=True):
        wrong = ""
        if isinstance(value, ScoringError):
            wrong = str(value)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            try:
                value = float(value)
            except (TypeError, ValueError):
                wrong = f"returned {value!r}, which is no number"
        if not wrong and not math.isfinite(value):
            wrong = f"returned {value}"
        if wrong and on_error == "raise":
            raise ScoringError(f"{row.place}{': ' if row.place else ''}reward {reward.name!r} {wrong}")
        out.append(ScoringError(wrong) if wrong else float(value))
    return out


# ---------------------------------------------------------------------------------------------------------- plain text
def user_text(prompt: Prompt) -> str:
    """The last user turn of a prompt.

    >>> user_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}])
    'c'
    """
    if isinstance(prompt, str):
        return prompt
    turns = [m["content"] for m in prompt if m.get("role") == "user"]
    return turns[-1] if turns else "\n".join(str(m["content"]) for m in prompt)


def final_text(text: str | list[Message]) -> str:
    """The text of a response; of several turns the last assistant message.

    >>> final_text([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "c"}])
    'c'
    """
    if isinstance(text, str):
        return text
    turns = [m["content"] for m in text if m.get("role") == "assistant"]
    return turns[-1] if turns else ""
