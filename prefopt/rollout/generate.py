"""The stage `generate` of a data pipeline: responses to every prompt, of one policy or a mixture of several.

A policy is a sampler and how it is asked: how often, at which temperatures (a ladder is gone through in turn), under which system
prompts, with which hint. The prompt of the record stays as it is: system prompts and hints are what the policy saw beside it, and
stand in the meta of the response.

A prompt that a sampler fails on is tried again by itself; what it still lacks stands in the group's meta, `unsampled`: {policy:
reason}. A group without any response leaves the pipeline with its reason, and is told.
"""
from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from data_tools import formats
from data_tools.columns import nearest
from data_tools.describe import content as said
from data_tools.fields import FAILED, PLACE
from data_tools.pipeline.config import checked
from data_tools.pipeline.identity import content
from data_tools.pipeline.provenance import COPY, PROMPT_ID, prompt_id
from data_tools.records import Group, Message, Prompt, Response
from prefopt import parts
from prefopt.findings import exists
from prefopt.rollout import programs
from prefopt.rollout.base import Choice, noise

__all__ = ["Asked", "Endpoint", "Generate", "Policy", "Recorded", "Texts", "local", "sampler", "tried", "vllm", "vllm_server"]

Answered = list[Group | Exception]                            # of each prompt, in order
UNSAMPLED = "unsampled"                                       # key of Group.meta: {policy: why responses are missing}
PATIENCE = 8                                                  # prompts that fail by themselves before a sampler counts as broken


# ------------------------------------------------------------------------------------------------------------- samplers
def local(*, model: str, dtype: str = "float32", batch: int = 64, device: str | None = None, revision: str | None = None,
          trust_remote_code: bool = False):
    """A transformers model, sampled by the embedded sampler."""
    import torch

    from prefopt.models import load_policy, load_tokenizer
    from prefopt.rollout.transformers import Sampler
    more = {"revision": revision, "trust_remote_code": trust_remote_code}
    policy = load_policy(model, dtype=dtype, **more).to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return Sampler(policy, load_tokenizer(model, **more), batch=batch)


def vllm(*, model: str, dtype: str = "bfloat16", engine: Mapping = {}):
    """vLLM in this process; `engine` holds further arguments of vllm.LLM."""
    from prefopt.models import load_tokenizer
    from prefopt.rollout.vllm import VLLMSampler
    return VLLMSampler(model, load_tokenizer(model), dtype=dtype, **engine)


def vllm_server(*, url: str, model: str, workers: int = 64, timeout: float = 600.0):
    """A server that `python -m prefopt.rollout.serve MODEL` started; `model` names its tokenizer."""
    from prefopt.models import load_tokenizer
    from prefopt.rollout.vllm import VLLMServer
    return VLLMServer(url, load_tokenizer(model), workers=workers, timeout=timeout)


class Endpoint:
    """A service that speaks the OpenAI protocol, asked once for each response, each with a seed of its own.

    url         up to and with /v1
    key         the environment variable with the key, which is neither stored nor shown
    options     further fields of the request
    concurrency requests at the same time; timeout, retries and wait are those of rewards.judge.Endpoint
    """

    def __init__(self, *, url: str, model: str, key: str = "OPENAI_API_KEY", options: Mapping = {}, timeout: float = 120.0,
                 retries: int = 4, wait: float = 1.0, concurrency: int = 8):
        service = parts.find("rewards.judge:Endpoint", "")
        self.unreachable = parts.find("rewards.base:Unreachable", "")
        self.service = service(url=url, model=model, key=key, options=options, timeout=timeout, retries=retries, wait=wait)
        self.workers = concurrency

    def __call__(self, prompts: Sequence[Prompt], *, n: int, keys: Sequence[int], seed: int, max_new_tokens: int,
                 temperature: float, top_p: float, top_k: int, stop: Sequence[str]) -> Answered:
        asked = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        asked |= {name: value for name, value in (("stop", list(stop)), ("top_k", top_k)) if value}
        jobs = [(prompt, noise(seed, key, j) % 2**31) for prompt, key in zip(prompts, keys, strict=True) for j in range(n)]
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(lambda job: self.one(*job, asked), jobs))
        return [group_of(prompt, found[i * n:(i + 1) * n]) for i, prompt in enumerate(prompts)]

    def one(self, prompt: Prompt, seed: int, asked: Mapping) -> Response | Exception:
        try:
            choice = self.service.answer(as_messages(prompt), **asked, seed=seed)
        except self.unreachable as error:
            raise ConnectionError(str(error)) from None
        except ValueError as error:
            return error
        text, reason = (choice.get("message") or {}).get("content"), choice.get("finish_reason")
        if not isinstance(text, str):
            return ValueError(f"the service answered without text: {str(choice)[:200]}")
        return Response(text, meta={"finished": reason != "length", "stopped": reason})


def group_of(prompt: Prompt, found: Sequence[Response | Exception]) -> Group | Exception:
    """The responses that came; why others did not stands in `unsampled`. Without any it is the error."""
    errors, responses = ([x for x in found if isinstance(x, Exception) is wrong] for wrong in (True, False))
    if not responses:
        return errors[0]
    return Group(prompt, responses, meta={UNSAMPLED: str(errors[0])} if errors else {})


class Recorded:
    """Responses from files, found by what the prompt says; the first n of them. They are kept in a temporary file, not in memory.

    path        what data_tools.load takes; `format` and `columns` are load's
    """

    def __init__(self, *, path: str | list, format: str | None = None, columns: Mapping | None = None):
        self.path, self.store = path, sqlite3.connect("")
        self.store.execute("create table responses (prompt text, response text)")
        with self.store:
            self.store.executemany("insert into responses values (?, ?)", (
                (prompt_id(group.prompt), json.dumps(asdict(response)))
                for group in formats.load(path, format=format, columns=columns) for response in group.responses))
        self.store.execute("create index by_prompt on responses (prompt)")

    def __call__(self, prompts: Sequence[Prompt], *, n: int, **settings) -> Answered:
        wanted = "select response from responses where prompt = ? order by rowid limit ?"
        return [Group(prompt, [Response(**json.loads(text)) for text, in self.store.execute(wanted, (prompt_id(prompt), n))])
                for prompt in prompts]

    def close(self) -> None:
        self.store.close()


SAMPLERS = {"transformers": local, "vllm": vllm, "vllm_server": vllm_server, "endpoint": Endpoint, "recorded": Recorded}


def sampler(spec: object, where: str, seed: int) -> tuple[Callable, dict]:
    """What makes a sampler, and its settings, from {name: settings}: a name of SAMPLERS, or 'my.module:function', which returns
    something that is called like `prefopt.rollout.base.Engine`."""
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(f"{where}: write a sampler with its settings, such as {{transformers: {{model: my/model}}}}, found "
                         f"{spec!r}; samplers: {', '.join(SAMPLERS)}, or 'my.module:function'")
    (name, settings), = spec.items()
    if name not in SAMPLERS and ":" not in name:
        raise ValueError(f"{where}: there is no sampler {name!r}{nearest(name, SAMPLERS)}; samplers: {', '.join(SAMPLERS)}, or "
                         f"'my.module:function'")
    make = SAMPLERS.get(name) or parts.find(name, "")
    return make, checked(f"{where}: {name}", make, settings, seed)


# ------------------------------------------------------------------------------------------------------------- policies
@dataclass(frozen=True, kw_only=True)
class Policy:
    """A sampler and how it is asked.

    sampler         {transformers: {model: ...}}, {vllm: ...}, {vllm_server: ...}, {endpoint: {url: ..., model: ...}},
                    {recorded: {path: ...}} or {'my.module:function': ...}
    n               responses to a prompt
    temperature     or a ladder of them, which the responses take in turn
    system          a system prompt, or several, which the responses take in turn after each round of temperatures; null is none
    hint            put behind the prompt; {name} is a field of the record
    share           of the prompts that are asked at all
    program         how a response comes about, as in prefopt.rollout.programs: several turns, tools, ...; single
    tokens          whether responses keep their tokens and, where the policy saw the prompt as it is, their log-probabilities
    """
    sampler: Mapping
    n: int = 1
    temperature: float | Sequence[float] = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    system: str | Sequence[str | None] | None = None
    hint: str | None = None
    share: float = 1.0
    program: str | Mapping = "single"
    tokens: bool = False

    def __post_init__(self):
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"n, the responses to a prompt, is a whole number from 1, found {self.n!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share, of the prompts, is above 0 and at most 1, found {self.share!r}")
        for heat in listed(self.temperature):
            Choice(heat, self.top_p, self.top_k, tuple(self.stop))

    def variants(self) -> Counter:
        """(temperature, system prompt) -> how many responses."""
        heats, systems = listed(self.temperature), listed(self.system)
        return Counter((heats[j % len(heats)], systems[j // len(heats) % len(systems)]) for j in range(self.n))


def listed(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class Asked:
    """A policy that is asked. The sampler is made when the first prompts come."""

    def __init__(self, name: str, settings: object, seed: int, retries: int = 2):
        if not isinstance(settings, Mapping) or "sampler" not in settings:
            raise ValueError(f"policy {name!r} needs a sampler, {{sampler: {{transformers: {{model: my/model}}}}, n: 4}}, found "
                             f"{settings!r}")
        self.name, self.seed, self.retries = name, seed, retries
        self.policy = Policy(**parts.checked(f"policy {name}", Policy, settings))
        self.make, self.settings = sampler(self.policy.sampler, f"policy {name!r}", seed)
        if self.make in (local, vllm):
            exists(f"policy {name!r}", self.settings.get("model", ""))
        self.program, self.made = programs.named(self.policy.program), None

    @property
    def sampler(self):
        if self.made is None:
            self.made = self.make(**self.settings)
        return self.made

    def identity(self) -> dict:
        """A model in a folder of this one, whose name does not look like a path."""
        name = self.settings.get("model", "")
        return {name: content(name)} if name and "/" not in name and Path(name).is_dir() else {}

    @cached_property
    def label(self) -> dict:
        """What sampled, for the record: model with the digest of its files, or its revision; or the file of responses. Read it
        after the first sample, when a model of the hub is here."""
        model = self.settings.get("model")
        if model is None:
            return {key: self.settings[key] for key in ("path", "url") if key in self.settings}
        version = content(model)[:16] if Path(model).is_dir() else revision_of(model, self.settings.get("revision")) \
            if self.make in (local, vllm) else None
        return {"model": model} | ({"version": version} if version else {})

    def answers(self, groups: Sequence[Group]) -> list[tuple[list[Response], str]]:
        """The responses to each group's prompt, and why some are missing (or nothing)."""
        places = [i for i, group in enumerate(groups) if uniform("share", self.name, key(group)) < self.policy.share]
        found: list[tuple[list[Response], str]] = [([], "") for _ in groups]
        if not places:
            return found
        for (heat, system), n in self.policy.variants().items():
            prompts = [shown(groups[i], system, self.policy.hint) for i in places]
            keys = [noise(key(groups[i]), self.name, repr(heat), system or "") for i in places]
            ask = partial(self.ask, prompts, keys, n=n, temperature=heat)
            for i, answer in zip(places, tried(ask, range(len(places)), self.retries), strict=True):
                responses, why = found[i]
                if isinstance(answer, Exception):
                    found[i] = responses, why or f"{type(answer).__name__}: {answer}"
                else:
                    few = f"it gave {len(answer.responses)} of {n} responses" if len(answer.responses) < n else ""
                    found[i] = [*responses, *(self.noted(r, heat, system) for r in answer.responses)], \
                        why or answer.meta.get(UNSAMPLED, few)
        return found

    def ask(self, prompts: Sequence[Prompt], keys: Sequence[int], places: Sequence[int], **more) -> Answered:
        p = self.policy
        return self.program(self.sampler, [prompts[i] for i in places], keys=[keys[i] for i in places], seed=self.seed,
                            max_new_tokens=p.max_new_tokens, top_p=p.top_p, top_k=p.top_k, stop=tuple(p.stop), **more)

    def noted(self, response: Response, heat: float, system: str | None) -> Response:
        """The response with where it comes from."""
        p, plain = self.policy, system is None and self.policy.hint is None
        how = {"top_p": p.top_p, "top_k": p.top_k, "system": system, "hint": p.hint, "program": p.program}
        usual = {"top_p": 1.0, "top_k": 0, "program": "single"}
        sampled = {**self.label, "max_new_tokens": p.max_new_tokens, "temperature": heat, "seed": self.seed,
                   **{k: v for k, v in how.items() if v != usual.get(k)}}
        if "path" in self.settings:                           # recorded: sampled by others, with settings of theirs
            sampled = self.label
        meta = {"generator": self.name, **response.meta, "sampled": sampled}
        if not p.tokens:
            meta.pop("mask", None)
        return replace(response, tokens=response.tokens if p.tokens else None,
                       logp=response.logp if p.tokens and plain else None, meta=meta)

    def close(self) -> None:
        if hasattr(self.made, "close"):
            self.made.close()


def revision_of(model: str, revision: str | None) -> str | None:
    """The commit of the hub that a model was loaded from."""
    from huggingface_hub import try_to_load_from_cache
    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else revision


def key(group: Group) -> str:
    """What names the group for the noise."""
    return f"{group.meta[PROMPT_ID]} {group.meta.get(COPY, 0)}"


def uniform(*names: str) -> float:
    return noise(*names) / 2**62


def as_messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def shown(group: Group, system: str | None, hint: str | None) -> Prompt:
    """The prompt as the policy sees it."""
    prompt = group.prompt
    if hint is not None:
        try:
            hint = hint.format(**group.meta)
        except (KeyError, IndexError) as missing:
            raise ValueError(f"{group.meta.get(PLACE, 'a record')}: the hint names the field {missing.args[0]!r}, which the "
                             f"record lacks{nearest(missing.args[0], group.meta)}; fields: {', '.join(group.meta)}") from None
        if isinstance(prompt, str):
            prompt = f"{prompt}\n\n{hint}"
        else:
            prompt = [*prompt[:-1], {**prompt[-1], "content": f"{said(prompt[-1:])}\n\n{hint}"}]
    return prompt if system is None else [{"role": "system", "content": system}, *as_messages(prompt)]


def tried(ask: Callable[[Sequence[int]], Answered], places: Sequence[int], retries: int, seen: Counter | None = None) -> Answered:
    """What `ask` answers for each place. Where it fails it is asked for halves, down to the place that it is, which is asked
    `retries` times more and then has its error. What cannot be reached at all (OSError), and PATIENCE failures before the first
    success, end the build."""
    seen = Counter() if seen is None else seen
    try:
        found = list(ask(places))
    except OSError:
        raise
    except Exception as error:
        if len(places) > 1:
            half = len(places) // 2
            return tried(ask, places[:half], retries, seen) + tried(ask, places[half:], retries, seen)
        found = [error]
    for n, answer in enumerate(found):
        if isinstance(answer, Exception) and retries:
            found[n], = tried(ask, places[n:n + 1], retries - 1, seen)
        else:
            seen[isinstance(answer, Exception)] += 1
        if seen[True] >= PATIENCE and not seen[False]:
            raise ValueError(f"the sampler failed on each of the first {PATIENCE} prompts, the last time with {found[n]}")
    return found


def unlabelled(group: Group, more: int) -> Group:
    """The group with room in its labels for `more` responses that nobody has compared."""
    wide, none = len(group.responses) + more, [None] * more
    return replace(group, relevance=group.relevance and [*group.relevance, *none],
                   wins=group.wins and [*([*row, *none] for row in group.wins), *([None] * wide for _ in none)])


# ---------------------------------------------------------------------------------------------------------------- stages
class Generate:
    """Responses to every prompt; those that a group has stay in front.

    policies    {name: settings}: sampler, n, temperature, top_p, top_k, max_new_tokens, stop, system, hint, share, program,
                tokens, as of a `Policy`; the name stands in the meta of a response as `generator`
    seed        of all noise; sample j of a prompt does not depend on the other prompts
    retries     how often a prompt that failed is asked again
    """

    def __init__(self, *, policies: Mapping[str, Mapping], seed: int = 0, retries: int = 2):
        if not isinstance(policies, Mapping) or not policies:
            raise ValueError(f"policies has names, {{student: {{sampler: ..., n: 4}}}}, found {policies!r}")
        self.policies = [Asked(str(name), settings, seed, retries) for name, settings in policies.items()]

    def identity(self) -> dict:
        return {name: held for asked in self.policies for name, held in asked.identity().items()}

    def __call__(self, shard: list[Group]) -> list[Group]:
        made = [(asked.name, asked.answers(shard)) for asked in self.policies]
        names, out = {name for name, _ in made}, []
        for n, group in enumerate(shard):
            responses = [r for _, answers in made for r in answers[n][0]]
            missing = {name: answers[n][1] for name, answers in made if answers[n][1]}
            meta = {k: v for k, v in group.meta.items() if k != UNSAMPLED}
            others = {name: why for name, why in group.meta.get(UNSAMPLED, {}).items() if name not in names}
            meta |= {UNSAMPLED: others | missing} if others or missing else {}
            if missing and not group.responses and not responses:
                meta[FAILED] = "; ".join(f"{name}: {why}" for name, why in missing.items())
            out.append(replace(unlabelled(group, len(responses)), responses=[*group.responses, *responses], meta=meta))
        return out

    def count(self, groups: Sequence[Group]) -> dict[str, int]:
        """Responses by generator, and prompts that lack some."""
        found = Counter(f"responses of {r.meta.get('generator', 'the source')}" for g in groups for r in g.responses)
        found.update(f"prompts lack responses of {name}" for _, name, _ in self.missing(groups))
        return dict(found)

    def lacking(self, groups: Sequence[Group]) -> list[str]:
        """Where a policy of this stage did not answer, and why."""
        return [f"{group.meta.get(PLACE, group.meta[PROMPT_ID])}: {name}: {why}" for group, name, why in self.missing(groups)]

    def missing(self, groups: Sequence[Group]) -> list[tuple[Group, str, str]]:
        own = {asked.name for asked in self.policies}
        return [(g, name, why) for g in groups for name, why in g.meta.get(UNSAMPLED, {}).items() if name in own]

    def told(self, counts: Mapping[str, int]) -> list[str]:
        return [f"{count:,} {what}" + ": ask again with --resume --retry" * what.startswith("prompts")
                for what, count in sorted(counts.items()) if what.startswith(("responses of", "prompts lack"))]

    def close(self) -> None:
        for asked in self.policies:
            asked.close()


class Texts:
    """Prompts -> texts, for rules that need a model: the settings of a `Policy`. An error stands where there is no text."""

    def __init__(self, settings: Mapping, *, seed: int = 0):
        self.asked = Asked("generate", settings, seed)

    def __call__(self, prompts: Sequence[Prompt]) -> list[str | Exception]:
        names, before = [prompt_id(p) for p in prompts], Counter()
        groups = [Group(p, [], meta={PROMPT_ID: name, COPY: before.update([name]) or before[name]})
                  for p, name in zip(prompts, names, strict=True)]
        return [said(responses[0].text) if responses else ValueError(why) for responses, why in self.asked.answers(groups)]

    def close(self) -> None:
        self.asked.close()
