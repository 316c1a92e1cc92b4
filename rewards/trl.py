"""Reward functions of TRL, f(prompts, completions, **columns) -> numbers or None, both ways."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_tools.records import Group, Response
from rewards.base import Comparison, Reward, Row, RowReward, ScoringError, as_reward, rows_of, values_of

__all__ = ["FromTRL", "as_trl", "groups_of"]


def as_trl(reward: Callable | Reward | Comparison, *, on_error: str = "raise") -> Callable:
    """A reward as TRL calls it, for `GRPOTrainer(reward_funcs=[...])`.

    Columns become fields of the rows. Completions that follow each other and answer the same prompt are a group, which
    is what comparisons compare.

    on_error    "raise", or "mark": None where a row cannot be scored, which TRL leaves out

    >>> from rewards.overlap import rouge_1
    >>> as_trl(rouge_1)(["q", "q"], ["a b", "c"], reference=["a b", "a b"])
    [1.0, 0.0]
    """
    known = as_reward(reward)

    def function(prompts: Sequence, completions: Sequence, **columns) -> list[float | None]:
        rows = rows_of(groups_of(prompts, completions, **columns))
        return [None if isinstance(v, ScoringError) else v for v in values_of(known, rows, on_error)]
    function.__name__ = known.name
    return function


def groups_of(prompts: Sequence, completions: Sequence, **columns) -> list[Group]:
    """Groups of TRL's columns. What is not a list with an entry for each completion (the trainer's state) is left out.

    >>> [len(g.responses) for g in groups_of(["a", "a", "b"], ["1", "2", "3"])]
    [2, 1]
    """
    if len(prompts) != len(completions):
        raise ValueError(f"there are {len(prompts)} prompts and {len(completions)} completions: one prompt for each completion")
    fields = {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and len(v) == len(prompts)}
    groups: list[Group] = []
    for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not groups or groups[-1].prompt != prompt:
            groups.append(Group(prompt, [], meta={"place": f"group {len(groups) + 1}"}))
        groups[-1].responses.append(Response(completion, meta={k: v[n] for k, v in fields.items()}))
    return groups


@dataclass(frozen=True)
class FromTRL:
    """A TRL reward function as a reward. It is called with the columns it names, or with all where it takes **kwargs.

    Prompts and completions are conversations if any prompt is one, otherwise texts. None, by which TRL leaves a row out,
    is an error of the row here.

    >>> def length(completions, **kwargs): return [len(c) for c in completions]
    >>> FromTRL(length)([Row(Group("a", []), Response("four"))])
    [4]
    """
    trl: Callable
    label: str | None = None

    @property
    def name(self) -> str:
        return self.label or RowReward(self.trl).name

    def settings(self) -> dict:
        return RowReward(self.trl).settings()

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        if not rows:
            return []
        prompts = [row.group.prompt if row.response.prompt is None else row.response.prompt for row in rows]
        completions = [row.response.text for row in rows]
        if not all(isinstance(p, str) for p in prompts):
            prompts = [row.messages for row in rows]
            completions = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
        metas = [{**row.group.meta, **row.response.meta} for row in rows]
        columns = {k: [m.get(k) for m in metas] for k in dict.fromkeys(k for m in metas for k in m)}
        columns.update(prompts=prompts, completions=completions, completion_ids=[row.response.tokens for row in rows])
        accepted = inspect.signature(self.trl).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in accepted):
            columns = {p.name: columns[p.name] for p in accepted if p.name in columns}
        return [ScoringError("returned None: the reward does not apply to this row") if x is None else x
                for x in self.trl(**columns)]


def from_trl(*, function: str) -> Reward:
    """A reward function written for TRL, f(prompts, completions, **columns) -> numbers, named as 'module:function'.

    Raises ValueError where there is none of that name.
    """
    from prefopt import parts
    return FromTRL(parts.find(function, ""), function.rpartition(":")[2])
