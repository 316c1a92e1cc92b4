"""Rollout programs: how the responses of a prompt come about. A program is called like a sampler, behind the sampler:
`program(sampler, prompts, n=8, ...)` gives a group per prompt.

single            n responses, one turn
conversation      turns of the model, with tools or users in between
with_greedy       any program, with the most likely response beside the samples, which is scored and does not train (ReMax)
continue_prefix   responses that begin with given tokens
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

from data_tools.encoding import Chat, Encoding, Spelling
from data_tools.fields import shorten
from data_tools.records import Group, Message, Prompt, Response
from prefopt.rollout.base import MARK, decoded, fresh_seed, identify, noise

__all__ = ["Program", "Step", "continue_prefix", "conversation", "single", "with_greedy"]

Step = Callable[[list[Message]], list[Message] | None]


class Program(Protocol):
    """A sampler, prompts and the sampler's settings -> a group per prompt."""

    def __call__(self, sampler, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]: ...


def single(sampler, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]:
    """n responses of one turn."""
    return sampler(prompts, n=n, **settings)


def with_greedy(program: Program) -> Program:
    """The most likely response of each prompt behind the samples, made by the same program. It does not train."""
    def both(sampler, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]:
        groups = program(sampler, prompts, n=n, **settings)
        probes = program(sampler, prompts, n=1, **{**settings, "temperature": 0.0})
        for group, probe in zip(groups, probes, strict=True):
            one, = probe.responses
            group.responses.append(replace(one, train=False, meta={**one.meta, "probe": "greedy"}))
        return groups
    return both


def continue_prefix(prefixes: Callable[[Sequence[Prompt]], Sequence[Sequence[int]]]) -> Program:
    """Responses that begin with the tokens that `prefixes` gives for each prompt, which do not train."""
    def continued(sampler, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]:
        return sampler(prompts, n=n, prefixes=prefixes(prompts), **settings)
    return continued


# ------------------------------------------------------------------------------------------------------- conversations
@dataclass
class Row:
    """A response that grows turn by turn. `key` names its noise."""
    prompt: list[Message]
    key: int
    said: list[Message] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    stopped: str = ""
    error: str = ""

    def hear(self, response: Response, tokenizer) -> None:
        """The model's turn; the response begins with the tokens so far."""
        start, told = len(self.tokens), len(decoded(tokenizer, self.tokens))
        self.said.append({"role": "assistant", "content": response.text[told:]})
        self.add(response.tokens[start:], response.logp[start:], 1)
        self.stopped = response.meta["stopped"]

    def add(self, tokens: list[int], logp: list[float], trains: int) -> None:
        self.tokens += tokens
        self.logp += logp
        self.mask += [trains] * len(tokens)

    def response(self) -> Response:
        meta = {"finished": self.stopped in ("eos", "stop"), "stopped": self.stopped, "mask": self.mask}
        return Response(self.said, tokens=self.tokens, logp=self.logp,
                        meta=meta | ({"error": self.error} if self.error else {}))


def conversation(step: Step, *, turns: int = 8, max_tokens: int | None = None, tools: list | None = None,
                 workers: int = 8) -> Program:
    """Turns of the model. After each, `step` gets the messages so far and gives those of tools or users that follow, or
    None (or an empty list) where the conversation ends.

    turns       of the model, at most; `max_new_tokens` limits each of them
    max_tokens  of a whole response, those of tools included
    tools       descriptions for the chat template; they are kept in Group.meta, where training finds them
    workers     rows whose steps run at the same time, in threads

    What follows a turn is encoded as the chat template puts it there; what the model said stays the tokens that were
    sampled. Tokens of the template and of tools have mask 0 and log-probability 0. `meta["stopped"]` is eos or stop (the
    conversation ended by itself), length or turns (a limit was met), or error: `step` failed, and `meta["error"]` says
    how. A turn that length cut ends its row without a call of `step`.
    """
    limit = float("inf") if max_tokens is None else max_tokens

    def rollout(sampler, prompts: Sequence[Prompt], *, n: int, max_new_tokens: int = 256, seed: int | None = None,
                keys: Sequence[int] | None = None, **settings) -> list[Group]:
        for prompt in prompts:
            if isinstance(prompt, str):
                raise ValueError(f"a conversation needs prompts of messages, found the plain text {prompt[:60]!r}: write it "
                                 f"as [{{'role': 'user', 'content': ...}}]")
        settings = {**settings, "seed": fresh_seed() if seed is None else seed, "tools": tools}
        keys = identify(prompts) if keys is None else keys
        following = Following(sampler.tokenizer, sampler.encoding, tools, limit)
        groups = sampler(prompts, n=n, max_new_tokens=int(min(max_new_tokens, limit)), keys=keys, **settings)
        rows = [[Row(list(prompt), noise(key, j)) for j in range(n)] for prompt, key in zip(prompts, keys, strict=True)]
        going, heard = [row for several in rows for row in several], [r for group in groups for r in group.responses]
        for turn in range(1, turns + 1):
            for row, response in zip(going, heard, strict=True):
                row.hear(response, sampler.tokenizer)
            going = [row for row in going if row.stopped != "length"]
            with ThreadPoolExecutor(workers) as pool:
                found = list(pool.map(lambda row: answer(step, row), going))
            going = [row for row, new in zip(going, found, strict=True) if new and following(row, new, turn == turns)]
            if not going:
                break
            heard = [one for group in sampler(
                [row.prompt for row in going], n=1, prefixes=[row.tokens for row in going],
                keys=[noise(row.key, turn) for row in going],
                max_new_tokens=[int(min(max_new_tokens, limit - len(row.tokens))) for row in going], **settings)
                     for one in group.responses]
        return [replace(group, responses=[row.response() for row in several])
                for group, several in zip(groups, rows, strict=True)]
    return rollout


def answer(step: Step, row: Row) -> list[Message] | None:
    """What follows a turn. A step that fails ends its row."""
    try:
        new = step([*row.prompt, *row.said])
    except Exception as error:
        row.stopped, row.error = "error", f"{type(error).__name__}: {error}"
        return None
    if new and not (isinstance(new, list) and all(isinstance(m, dict) and "role" in m for m in new)):
        raise TypeError(f"step should return a list of messages {{'role': ..., 'content': ...}} or None, found {shorten(new)}")
    return new


@dataclass(frozen=True)
class Following:
    """Puts messages behind a model's turn, up to the beginning of its next one, if a limit does not end the row."""
    tokenizer: object
    encoding: Encoding
    tools: list | None
    limit: float

    def __call__(self, row: Row, new: list[Message], last: bool) -> bool:
        tokens = [] if last else self.tokens(row, new)
        if last or len(row.tokens) + len(tokens) >= self.limit:
            row.stopped = "turns" if last else "length"
            return False
        row.said += new
        row.add(tokens, [0.0] * len(tokens), 0)
        return True

    def tokens(self, row: Row, new: list[Message]) -> list[int]:
        """What the template puts behind the text of the turn: its end, unless the model wrote it, and the messages."""
        chat = Chat(self.tokenizer, self.encoding)
        shown = chat.render([*chat.opening(row.prompt), *row.said[:-1], {**row.said[-1], "content": MARK}, *new], self.tools,
                            asks=True)
        tail = shown.rpartition(MARK)[2]
        if row.stopped == "eos":
            before, _, after = tail.partition(decoded(self.tokenizer, row.tokens[-1:]))
            tail = tail if before.strip() else after
        return Spelling.of(self.tokenizer).follows([tail])[tail]
