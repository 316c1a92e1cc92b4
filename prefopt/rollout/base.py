"""What all samplers share: prompts in, groups of sampled tokens with their log-probabilities out.

A sampler is an `Engine`: prompts become ids as in training, an engine continues ids, and tokens are never tokenised again.
Noise has no state. Sample j of a prompt draws from a generator that is keyed by (seed, key of the prompt, j), so that a
result depends neither on the other prompts, nor on batches, nor on how many processes share the work.
"""
from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.encoding import Chat, Counts, Encoding, encode
from data_tools.fields import DataError
from data_tools.records import Group, Prompt, Response

__all__ = ["Ask", "Choice", "Engine", "Sample", "StaleSampler", "end_tokens", "identify", "noise", "prompt_ids", "stop_at"]


class StaleSampler(RuntimeError):
    """A sampler does not hold the weights that it should sample from."""


@dataclass(frozen=True)
class Choice:
    """How a token is chosen. temperature 0 takes the most likely one; top_p and top_k do not count then.

    Temperature comes first, then top_k (0 is all), then top_p of what is left.

    >>> Choice(top_p=0)
    Traceback (most recent call last):
    ValueError: top_p should be above 0 and at most 1, found 0
    """
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature should be a number from 0, found {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p should be above 0 and at most 1, found {self.top_p!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k should be a number of tokens, or 0 for all, found {self.top_k!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop should be a list of strings that are not empty, found {self.stop!r}")


class Ask(NamedTuple):
    """n continuations of ids, of at most `limit` tokens; continuation j draws from the noise of number `noise` + j."""
    ids: list[int]
    noise: int
    n: int
    limit: int


class Sample(NamedTuple):
    """Sampled tokens with the log-probability of each under the distribution that it was drawn from; at temperature 0, where
    nothing is drawn, under the model's. `stopped` says what ended it: eos, stop (a stop string) or length."""
    tokens: list[int]
    logp: list[float]
    stopped: str


class Engine(ABC):
    """A callable sampler. `sync` hands it weights with their version, and a call may name the version that it expects.

    Concrete engines set `tokenizer`, `encoding` and `version` (None until the first sync).
    """
    tokenizer: object
    encoding: Encoding
    version: int | None

    @abstractmethod
    def continued(self, asks: Sequence[Ask], choice: Choice) -> list[list[Sample]]:
        """The samples of each ask, in order."""

    @abstractmethod
    def sync(self, model, version: int | None = None) -> None:
        """Samples from the weights of `model` from now on."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the engine holds."""

    def playing(self, roles: Mapping[str, float]) -> Engine:
        """The sampler that plays other roles than the policy, {"reference": 1.0}, or mixes several by their weights."""
        raise ValueError(f"{type(self).__name__} holds the policy alone and cannot play {' and '.join(roles)}: set "
                         f"rollout.sampler to transformers, or take opponents of the policy (rollout.program: against_policy)")

    def __call__(self, prompts: Sequence[Prompt], *, n: int, max_new_tokens: int | Sequence[int] = 256,
                 temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, stop: Sequence[str] = (),
                 seed: int | None = None, keys: Sequence[int] | None = None, version: int | None = None,
                 prefixes: Sequence[Sequence[int]] | None = None, tools: list | None = None) -> list[Group]:
        """A group of n responses for each prompt, in order.

        max_new_tokens  of all responses, or a list of limits, one per prompt
        stop       strings that end a response; its tokens go up to the one that completes the string, its text ends before
        seed       None takes a number from torch's global generator
        keys       integers that name the prompts for the noise. By default a prompt is named by what it says and by how
                   many equal ones come before it in the call; with more than one process give keys of your own
        version    of the weights; it is an error when the sampler holds another
        prefixes   token ids that the responses of each prompt begin with: not sampled, not trained
        tools      descriptions of tools for the chat template, kept in Group.meta
        """
        held = self.version
        if version is not None and version != held:
            raise StaleSampler(f"version {version} of the weights was asked for, and the sampler holds "
                               f"{'none' if held is None else held}: call sync(model, version) after each update")
        choice = Choice(temperature, top_p, top_k, (stop,) if isinstance(stop, str) else tuple(stop))
        seed = fresh_seed() if seed is None else seed
        keys = identify(prompts) if keys is None else keys
        prefixes = [()] * len(prompts) if prefixes is None else prefixes
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        found = prompt_ids(prompts, self.tokenizer, self.encoding, tools, counts=Counts())
        asks = [Ask([*ids.tolist(), *prefix], noise(seed, key), n, limit) for ids, prefix, key, limit in
                zip(found, prefixes, keys, limits, strict=True)]
        check(asks)
        made = self.continued(asks, choice)
        sizes = [len(samples) for samples in made]
        if sizes != [n] * len(prompts):
            raise RuntimeError(f"{n} responses were asked for each of {len(prompts)} prompts, and the engine returned "
                               f"{sorted(set(sizes))} for {len(sizes)}")
        if self.version != held:
            raise StaleSampler(f"the weights of the sampler changed while it sampled, from version {held} to {self.version}")
        told = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "version": held, "seed": seed}
        return [Group(prompt, [self.response(list(prefix), sample, choice.stop) for sample in samples],
                      meta={"sampler": told} | ({"tools": tools} if tools else {}))
                for prompt, prefix, samples in zip(prompts, prefixes, made, strict=True)]

    def response(self, prefix: list[int], sample: Sample, stop: Sequence[str]) -> Response:
        """A sample as a response, its text without the end token and without the stop string."""
        kept = sample.tokens[:-1] if sample.stopped == "eos" else sample.tokens
        text = decoded(self.tokenizer, prefix + kept)
        if sample.stopped == "stop":
            text = text[:stop_at(text, stop, len(decoded(self.tokenizer, prefix)))]
        meta = {"finished": sample.stopped != "length", "stopped": sample.stopped}
        if prefix:
            meta["mask"] = [0] * len(prefix) + [1] * len(sample.tokens)
        return Response(text, tokens=prefix + sample.tokens, logp=[0.0] * len(prefix) + sample.logp, meta=meta)


# -------------------------------------------------------------------------------------------------------------- noise
def noise(*names: int | str) -> int:
    """The number of a stream of noise, below 2^62, made from what names it. Streams of one prompt are consecutive."""
    names = tuple(name if isinstance(name, str) else int(name) for name in names)         # numpy's integers look otherwise
    return int.from_bytes(blake2b(repr(names).encode(), digest_size=8).digest(), "big") >> 2


def identify(prompts: Sequence) -> list[int]:
    """Numbers that tell prompts apart: of what they say, and of how many equal ones come before."""
    before: Counter[str] = Counter()
    out = []
    for prompt in prompts:
        said = json.dumps(prompt, sort_keys=True)
        out.append(noise(said, before[said]))
        before[said] += 1
    return out


def fresh_seed() -> int:
    return int(torch.randint(2**62, ()))


# ---------------------------------------------------------------------------------------------------------------- text
def prompt_ids(prompts: Sequence[Prompt], tokenizer, encoding: Encoding = Encoding(), tools: list | None = None, *,
               counts: Counts | None = None) -> list[Tensor]:
    """The ids of prompts as training sees them: chat template, BOS and limits. A prompt that is dropped is an error; of cut
    ones there is a warning, or a note in `counts`."""
    meta = {"tools": tools} if tools else {}
    groups = encode([Group(p, [Response("", tokens=[0])], meta=meta) for p in prompts], tokenizer, encoding,
                    counts=counts)
    if len(groups) < len(prompts):
        raise ValueError(f"{len(prompts) - len(groups)} of {len(prompts)} prompts are longer than the encoding allows: "
                         f"cut them with long_prompt='keep_end', or leave them out")
    return [torch.from_numpy(g.prompt.astype("int64")) for g in groups]


def check(asks: Sequence[Ask]) -> None:
    """An error where there is nothing to sample."""
    sizes = [(len(ask.ids), ask.n, ask.limit) for ask in asks] or [(0, 0, 0)]
    shortest, n, limit = map(min, zip(*sizes, strict=True))
    if shortest < 1 or n < 1 or limit < 1:
        raise ValueError(f"sampling needs prompts of at least one token, n >= 1 and max_new_tokens >= 1, found {len(asks)} "
                         f"prompts, the shortest of {shortest} tokens, n = {n} and max_new_tokens = {limit}")


def decoded(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def stop_at(text: str, stop: Sequence[str], start: int = 0) -> int | None:
    """Where the first of the stop strings begins, None without one.

    >>> stop_at("a. b", ["b", "."]), stop_at("a", ["b"])
    (1, None)
    """
    return min((at for at in (text.find(s, start) for s in stop) if at >= 0), default=None)


MARK = "Zq7vAnsweredZq7v"                                     # stands for an assistant's text; templates keep words as they are


def end_tokens(tokenizer, settings=None, encoding: Encoding = Encoding()) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS, those of the model's generation settings, and the one with which the
    chat template closes the assistant's turn. Only special tokens count: settings that are left from another tokenizer
    may name a word.

    A base model's tokenizer often has `<|endoftext|>` as EOS and a template that closes turns with `<|im_end|>`; a model
    of such a chat ends with either.
    """
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    named = settings.eos_token_id if settings is not None else None
    found = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.chat_template is not None or encoding.chat_template is not None:
        found += tokenizer(closing(tokenizer, encoding), add_special_tokens=False)["input_ids"][:1]
    found = {i for i in found if i in special}
    return sorted(found if tokenizer.eos_token_id is None else {*found, tokenizer.eos_token_id})


def closing(tokenizer, encoding: Encoding) -> str:
    """What the chat template puts behind an assistant's text, spaces aside; nothing where it refuses a plain exchange."""
    try:
        shown = Chat(tokenizer, encoding).render([{"role": "user", "content": "Asked"}, {"role": "assistant", "content": MARK}],
                                                 None, asks=False)
    except DataError:
        return ""
    return shown.rpartition(MARK)[2].strip()
