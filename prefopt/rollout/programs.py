"""Rollout programs: how the responses of a prompt come about. A program is called like a sampler, behind the sampler:
`program(sampler, prompts, n=8, ...)` gives a group per prompt.

single            n responses, one turn
conversation      turns of the model, with tools or users in between
with_greedy       any program, with the most likely response beside the samples, which is scored and does not train (ReMax)
continue_prefix   responses that begin with given tokens
against_policy, against_reference, against_average, against_mixture
                  any program, with opponents behind the samples, which do not train: what wins are counted against
from_mixture      responses of the geometric mixture of policy and reference (IPO-MD)
beside_reference  responses of the policy and as many of the reference, which train too (XPO)

Who speaks is a mapping from roles (policy, reference, average) to weights of their logits, which the sampler plays.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from typing import Protocol

from data_tools.columns import nearest
from data_tools.encoding import Chat, Encoding, Spelling
from data_tools.fields import shorten
from data_tools.records import Group, Message, Prompt, Response
from prefopt import parts
from prefopt.recipes.checks import positive, share
from prefopt.references import Moving
from prefopt.rollout.base import MARK, decoded, fresh_seed, identify, noise

__all__ = ["Against", "FromMixture", "Program", "Step", "against_average", "against_mixture", "against_policy",
           "against_reference", "beside_reference", "continue_prefix", "conversation", "from_mixture", "named", "single",
           "with_greedy"]

Step = Callable[[list[Message]], list[Message] | None]


class Program(Protocol):
    """A sampler, prompts and the sampler's settings -> a group per prompt."""

    def __call__(self, sampler, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]: ...


def single(sampler, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]:
    """n responses of one turn."""
    return sampler(prompts, n=n, **settings)


def named(spec: str | Mapping) -> Program:
    """A program from YAML: 'name' or {name: {argument: value}}, of this module or 'module:name'. What takes a sampler is a
    program, what does not makes one from its arguments."""
    (name, given), = spec.items() if isinstance(spec, Mapping) and len(spec) == 1 else [(spec, None)]
    if not isinstance(name, str) or not isinstance(given, (Mapping, type(None))):
        raise ValueError(f"rollout.program is written as 'name' or {{name: {{argument: value}}}}, found {spec!r}")
    found = parts.find(name, __name__)
    allowed = {} if "sampler" in signature(found).parameters else signature(found).parameters
    if wrong := [k for k in given or () if k not in allowed]:
        raise ValueError(f"rollout.program: {name} has no argument {wrong[0]!r}{nearest(wrong[0], allowed)}; arguments: "
                         f"{', '.join(allowed) or 'none'}")
    if missing := [k for k, p in allowed.items() if p.default is Parameter.empty and k not in (given or ())]:
        raise ValueError(f"rollout.program: {name} needs {', '.join(missing)}: write {{{name}: {{{missing[0]}: ...}}}}")
    arguments = {k: named(v) if k == "program" else parts.find(v, "") if isinstance(v, str) and ":" in v else v
                 for k, v in (given or {}).items()}
    return found(**arguments) if allowed else found


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


# --------------------------------------------------------------------------------------------------------------- opponents
POLICY = {"policy": 1.0}


def speaker(sampler, roles: Mapping[str, float]):
    return sampler if roles == POLICY else sampler.playing(roles)


def mixture(c: float) -> dict[str, float]:
    """Roles of pi^(1 - c) pi_ref^c, without those of weight 0: c = 0 and 1 cost one model.

    >>> mixture(0.125), mixture(1)
    ({'policy': 0.875, 'reference': 0.125}, {'reference': 1})
    """
    share(share=c)
    return {role: weight for role, weight in (("policy", 1 - c), ("reference", c)) if weight}


@dataclass(frozen=True)
class Against:
    """The responses of a program, and behind them `count` opponents, drawn from `roles`, which do not train.

    differ      settings of the responses that are not the run's, such as their temperature; opponents have the run's
    follow      how the role `average` follows the policy, where it plays
    """
    roles: Mapping[str, float]
    count: int = 1
    differ: Mapping[str, float] = field(default_factory=dict)
    program: Program = single
    follow: Moving | None = None

    def __call__(self, sampler, prompts: Sequence[Prompt], *, n: int, keys: Sequence[int] | None = None,
                 **settings) -> list[Group]:
        keys = identify(prompts) if keys is None else keys
        groups = self.program(sampler, prompts, n=n, keys=keys, **{**settings, **self.differ})
        return self.met(sampler, groups, keys=keys, **settings)

    def met(self, sampler, groups: Sequence[Group], *, keys: Sequence[int], **settings) -> list[Group]:
        """The groups with fresh opponents in the place of those that they may have."""
        prompts, own = [g.prompt for g in groups], [noise(key, "opponent") for key in keys]
        drawn = self.program(speaker(sampler, self.roles), prompts, n=self.count, keys=own, **settings)
        probes = [[replace(r, train=False, meta={**r.meta, "probe": "opponent"}) for r in new.responses] for new in drawn]
        return [replace(group, responses=[*(r for r in group.responses if r.train), *rows])
                for group, rows in zip(groups, probes, strict=True)]


def against(roles: Mapping[str, float], count: int, temperature: float | None, top_k: int | None, program: Program,
            follow: Moving | None = None) -> Against:
    positive(count=count)
    given = {"temperature": temperature, "top_k": top_k}
    return Against(roles, count, {k: v for k, v in given.items() if v is not None}, program, follow)


def against_policy(*, count=1, temperature=None, top_k=None, program=single) -> Against:
    """Opponents of the policy as it is.

    count                 opponents of a prompt
    temperature, top_k    of the responses, where they should be flatter than the policy (EGPO: 2 and 10)
    program               how responses and opponents come about
    """
    return against(POLICY, count, temperature, top_k, program)


def against_reference(*, count=1, temperature=None, top_k=None, program=single) -> Against:
    """Opponents of the reference; the rest as in `against_policy`."""
    return against({"reference": 1.0}, count, temperature, top_k, program)


def against_mixture(*, share=0.125, count=1, temperature=None, top_k=None, program=single) -> Against:
    """Opponents of the geometric mixture pi^(1 - share) pi_ref^share, token by token; the rest as in `against_policy`."""
    return against(mixture(share), count, temperature, top_k, program)


def against_average(*, follow=0.1, every=1, count=1, temperature=None, top_k=None, program=single) -> Against:
    """Opponents of a moving average of the policy's weights; the rest as in `against_policy`.

    follow, every    every so many steps average <- follow policy + (1 - follow) average; follow = 1 is the policy of `every` to
                     2 every - 1 steps ago
    """
    return against({"average": 1.0}, count, temperature, top_k, program, Moving(alpha=follow, every=every))


@dataclass(frozen=True)
class FromMixture:
    """The responses of a program, drawn from `roles`."""
    roles: Mapping[str, float]
    program: Program = single

    def __call__(self, sampler, prompts: Sequence[Prompt], *, n: int, **settings) -> list[Group]:
        return self.program(speaker(sampler, self.roles), prompts, n=n, **settings)


def from_mixture(*, share=0.125, program=single) -> FromMixture:
    """Responses of the geometric mixture pi^(1 - share) pi_ref^share, with its log-probabilities."""
    return FromMixture(mixture(share), program)


@dataclass(frozen=True)
class BesideReference:
    """Of n responses the larger half from the policy, and the others from the reference, marked by `from_reference`."""
    program: Program = single
    roles = {"reference": 1.0}

    def __call__(self, sampler, prompts: Sequence[Prompt], *, n: int, keys: Sequence[int] | None = None,
                 **settings) -> list[Group]:
        if n < 2:
            raise ValueError(f"beside_reference divides the responses of a prompt between policy and reference: set rollout.k to "
                             f"at least 2, found {n}")
        keys = identify(prompts) if keys is None else keys
        own = self.program(sampler, prompts, n=n - n // 2, keys=keys, **settings)
        other = self.program(speaker(sampler, self.roles), prompts, n=n // 2, keys=[noise(key, "reference") for key in keys],
                             **settings)
        marked = [[replace(r, meta={**r.meta, "from_reference": True}) for r in group.responses] for group in other]
        return [replace(group, responses=[*group.responses, *rows]) for group, rows in zip(own, marked, strict=True)]


def beside_reference(*, program=single) -> BesideReference:
    """Responses of the policy and as many of the reference; both train."""
    return BesideReference(program)


Playing = (Against, FromMixture, BesideReference)             # programs that know whom they let speak


def roles_of(program: Program) -> set[str]:
    """Whom a program lets speak beside the policy."""
    return set(program.roles) - {"policy"} if isinstance(program, Playing) else set()


def plain(program: Program) -> Program:
    """The program without opponents and mixtures: responses of the policy."""
    return program.program if isinstance(program, Playing) else program


def of_policy(program: Program) -> bool:
    """Whether what trains is drawn from the policy, with the run's own settings."""
    return not isinstance(program, Playing) or isinstance(program, Against) and not program.differ


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
        return Spelling.of(self.tokenizer).follows([tail])[tail].tolist()
