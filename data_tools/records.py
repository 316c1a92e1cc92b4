"""Groups: one prompt with K responses. Plain JSON, no torch."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

Message = dict                                                # {"role": str, "content": str, ...}
Prompt = str | list[Message]


@dataclass
class Response:
    """One response. `prompt` overrides the group's prompt for this row (multi-level prompts, rationales).

    `text` is a string, or a list of messages when the response spans turns (assistant and tool messages).
    `meta` may hold numeric columns of the column table (`degree`, `position`, `rationale`, ...).
    """
    text: str | list[Message]
    tokens: list[int] | None = None
    logp: list[float] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    train: bool = True
    prompt: Prompt | None = None
    meta: dict = field(default_factory=dict)


@dataclass
class Group:
    """One prompt with the responses that are compared. K = 2 is a pair, K = 1 unpaired feedback.

    `relevance` grades each response (higher is better; a pair is [1, 0]; None is unlabelled), or `wins[i][j]` gives
    P(i preferred to j) (None where nobody compared i with j). `weight` scales the group's loss.
    """
    prompt: Prompt
    responses: list[Response]
    relevance: list[float | None] | None = None
    wins: list[list[float | None]] | None = None
    weight: float = 1.0
    meta: dict = field(default_factory=dict)

    def to_json(self) -> dict:
        """A JSON record that `from_json` reads back without loss; defaults are left out."""
        record = {k: v for k, v in vars(self).items() if v not in (None, {}) and (k, v) != ("weight", 1.0)}
        record["responses"] = [{k: v for k, v in vars(r).items() if v not in (None, {}) and (k, v) != ("train", True)}
                               for r in self.responses]
        return record

    @classmethod
    def from_json(cls, record: dict) -> Group:
        return cls(**{**record, "responses": [Response(**r) for r in record["responses"]]})


class Scorer(Protocol):
    """Fills `scores` or `wins` and returns the groups."""

    def __call__(self, groups: Sequence[Group]) -> list[Group]: ...


class Sampler(Protocol):
    """n responses per prompt; `sync` takes over the weights of a model."""

    def __call__(self, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]: ...

    def sync(self, model) -> None: ...
