"""What augmentations share: asking a model with failures kept apart, prompts in other words, rows without a label."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from data_tools.describe import content
from data_tools.fields import FAILED
from data_tools.labels import pairs, wins_of
from data_tools.records import Group, Prompt, Response
from data_tools.rules import place

Generate = Callable[[list], Sequence[str]]


def ask(generate: Generate, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """A text for each prompt, or '' and why there is none. When a batch fails, its halves are tried.

    >>> ask(lambda prompts: [p.upper() for p in prompts], ["a", "b"]), ask(lambda prompts: [1 / 0], ["a"])
    ([('A', ''), ('B', '')], [('', 'ZeroDivisionError: division by zero')])
    """
    if not prompts:
        return []
    try:
        found = list(generate(list(prompts)))
    except Exception as error:                                # whatever a model's client raises
        if len(prompts) == 1:
            return [("", f"{type(error).__name__}: {error}")]
        half = len(prompts) // 2
        return ask(generate, prompts[:half]) + ask(generate, prompts[half:])
    if len(found) != len(prompts):
        raise ValueError(f"generate returned {len(found)} texts for {len(prompts)} prompts: it should return one for each")
    return [(text.strip(), "") if isinstance(text, str) and text.strip() else
            ("", str(text) if isinstance(text, Exception) else "the model gave no text") for text in found]


def failure(group: Group, rule: str, why: str) -> Group:
    """The group once more, saying what could not be made of it and why."""
    return replace(group, meta={**group.meta, FAILED: f"{rule}: {why}"})


def question(prompt: Prompt) -> str:
    """The text of a prompt; of messages that of the last user turn.

    >>> question([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    'Why?'
    """
    return prompt if isinstance(prompt, str) else content(prompt[_last(prompt)]["content"])


def reworded(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another text in the place of its question."""
    if isinstance(prompt, str):
        return text
    at = _last(prompt)
    return [*prompt[:at], {**prompt[at], "content": text}, *prompt[at + 1:]]


def _last(prompt: list) -> int:
    return max((k for k, turn in enumerate(prompt) if turn.get("role") == "user"), default=len(prompt) - 1)


def variant(group: Group, rule: str, text: str, responses: Sequence[Response] = (), **meta) -> Group:
    """A new group of the same source: another question, no labels, and what made it in its meta."""
    return Group(reworded(group.prompt, text), list(responses), weight=group.weight, meta={**group.meta, "rule": rule, **meta})


def compared(group: Group, rule: str) -> tuple[int, int]:
    """The two labelled responses of a pair; another group is an error."""
    found = [i for i, r in enumerate(group.responses) if r.train and (group.wins is not None or group.relevance
                                                                      and group.relevance[i] is not None)]
    if len(found) != 2:
        raise ValueError(f"{place(group)}{rule} takes pairs, and this group has {len(found)} labelled responses: make pairs "
                         "first, with best_worst or all_pairs")
    return found[0], found[1]


def preferred(group: Group, rule: str) -> tuple[int, int] | None:
    """Which of the two is preferred and which is not; None for a tie."""
    both = set(compared(group, rule))
    return next(((i, j) for i, j in pairs(wins_of(group)) if {i, j} == both), None)


def extended(group: Group, rows: Sequence[Response]) -> Group:
    """The group with further rows that have no label.

    >>> extended(Group("?", [Response("a"), Response("b")], relevance=[1.0, 0.0]), [Response("c")]).relevance
    [1.0, 0.0, None]
    """
    more = [None] * len(rows)
    wins = group.wins and [row + more for row in group.wins] + [
        [0.5 if k == len(group.wins) + n else None for k in range(len(group.wins) + len(rows))] for n in range(len(rows))]
    return replace(group, responses=[*group.responses, *rows], wins=wins, meta=dict(group.meta),
                   relevance=group.relevance and group.relevance + more)
