"""The embedded sampler: the policy itself, tokens in and tokens out, each prompt read once for all its samples."""
from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.columns import nearest
from data_tools.encoding import Counts, Encoding, pad_token
from data_tools.records import Prompt
from prefopt.models import Trunk, is_peft
from prefopt.ops import upcast
from prefopt.rollout.base import Ask, Choice, Engine, Sample, check, decoded, end_tokens, fresh_seed, identify, noise, stop_at
from prefopt.rollout.base import prompt_ids as prompt_ids

__all__ = ["Decoder", "Sampler", "Voice", "continuations", "distribution", "drawn", "prompt_ids"]

T = TypeVar("T")
PREFILL = 16_384                                              # tokens of prompts in one forward pass


class Sampler(Engine):
    """Groups of n sampled responses for prompts of text or messages; see `Engine` for the settings of a call.

    A response keeps its sampled tokens and their log-probabilities; `meta["finished"]` says whether it ended itself,
    `meta["stopped"]` how (eos, stop, length). What the model's own generation settings say does not count, but for end
    tokens: samples are the policy's. `batch` is how many responses are sampled together, `encoding` the one that training
    uses. A seed gives the same tokens whatever the batch, except where a uniform number falls within float rounding of
    the border between two tokens: matrix products of other sizes round differently.
    """

    def __init__(self, model: nn.Module, tokenizer, *, batch: int = 64, encoding: Encoding = Encoding(),
                 others: Mapping[str, nn.Module] = MappingProxyType({})):
        self.tokenizer, self.batch, self.encoding, self.version = tokenizer, batch, encoding, None
        self.others, self.decoder = others, self.of(model)

    def of(self, *voices: nn.Module | Voice) -> Decoder:
        first = voices[0].model if isinstance(voices[0], Voice) else voices[0]
        own = first.get_base_model() if is_peft(first) else first
        return Decoder(voices, end_tokens(self.tokenizer, own.generation_config, self.encoding), pad_token(self.tokenizer),
                       self.batch, self.tokenizer)

    def playing(self, roles: Mapping[str, float]) -> Sampler:
        """The sampler of the geometric mixture, token by token: its logits are the sum of those of the roles, weighed.

        Roles are the policy and `others`; with adapters the reference may be the policy without them.
        """
        policy = self.decoder.model
        other = Sampler(policy, self.tokenizer, batch=self.batch, encoding=self.encoding, others=self.others)
        other.decoder, other.version = self.of(*(self.voice(role, share, policy) for role, share in roles.items())), self.version
        return other

    def voice(self, role: str, share: float, policy: nn.Module) -> Voice:
        known = {"policy": policy, **self.others}
        if role == "reference" and role not in known and is_peft(policy):
            return Voice(policy, share, bare=True)
        if role not in known:
            raise ValueError(f"the sampler holds no {role!r}{nearest(role, known)}; it holds: {', '.join(known)}")
        return Voice(known[role], share)

    def continued(self, asks: Sequence[Ask], choice: Choice) -> list[list[Sample]]:
        return self.decoder(asks, choice)

    def portions(self, prompts: Sequence[Prompt], n: int) -> list[list[int]]:
        """The numbers of the prompts whose n responses grow together. A call for each portion gives what one for all gives."""
        rows: dict[tuple, list[int]] = {}
        for i, ids in enumerate(prompt_ids(prompts, self.tokenizer, self.encoding, counts=Counts())):
            rows.setdefault(tuple(ids.tolist()), []).extend([i] * n)
        return [sorted({i for some in pack.values() for i in some}) for pack in packs(rows, self.batch)]

    def sync(self, model: nn.Module, version: int | None = None) -> None:
        """The sampler holds the policy itself, so it always samples from the current weights."""
        if model is not self.decoder.model:
            self.decoder = self.of(model)
        self.version = version

    def close(self) -> None:
        """There is nothing but the policy."""


def continuations(model: nn.Module, prompts: Sequence[Tensor], *, n: int, max_new_tokens: int, pad: int,
                  eos: int | Sequence[int] | None, temperature: float = 1.0, top_p: float = 1.0,
                  top_k: int = 0) -> list[list[Tensor]]:
    """n continuations of each prompt (1-D ids), each cut after its end token. temperature 0 takes the most likely token.

    torch's global generator decides, so that a seed or a checkpoint of it repeats them exactly.
    """
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ids, seed = [p.tolist() for p in prompts], fresh_seed()
    asks = [Ask(i, noise(seed, key), n, max_new_tokens) for i, key in zip(ids, identify(ids), strict=True)]
    check(asks)
    made = Decoder([model], ends, pad, len(ids) * n)(asks, Choice(temperature, top_p, top_k))
    return [[torch.tensor(s.tokens, device=p.device) for s in samples] for p, samples in zip(prompts, made, strict=True)]


# -------------------------------------------------------------------------------------------------------- distributions
def distribution(logits: Tensor, choice: Choice) -> Tensor:
    """Log-probabilities (..., V) that a token is drawn from: logits / temperature, cut by top_k, then by top_p, normalised.

    top_k keeps ties with the k-th. top_p keeps the most likely tokens until their sum reaches top_p. At temperature 0 the
    model's own.

    >>> distribution(torch.tensor([0.5, 0.3, 0.2]).log(), Choice(top_p=0.6)).exp()
    tensor([0.6250, 0.3750, 0.0000])
    """
    logits = upcast(logits)
    if not choice.temperature:
        return logits.log_softmax(-1)
    logits = logits if choice.temperature == 1 else logits / choice.temperature
    if 0 < choice.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(choice.top_k).values[..., -1:], -torch.inf)
    if choice.top_p < 1:
        ordered, order = logits.double().softmax(-1).sort(stable=True, dim=-1, descending=True)
        cut = ordered.cumsum(-1) - ordered >= choice.top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -torch.inf)
    return logits.log_softmax(-1)


def drawn(logp: Tensor, uniform: Tensor) -> Tensor:
    """The token (N) at which the cumulative probability passes a uniform number in [0, 1).

    >>> drawn(torch.tensor([[0.5, 0.0, 0.5]] * 3).log(), torch.tensor([0.0, 0.499, 0.5], dtype=torch.float64))
    tensor([0, 0, 2])
    """
    below = logp.to(torch.float64, copy=True).exp_().cumsum_(-1)
    return torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True).squeeze(-1)


def uniforms(stream: int, count: int) -> np.ndarray:
    """The first numbers of a stream, multiples of 2^-32: none rounds to 1 in products. More of them begin with the same."""
    return np.random.Generator(np.random.Philox(key=stream)).integers(2**32, size=count, dtype=np.uint64) / 2.0**32


# ------------------------------------------------------------------------------------------------------------- decoding
@dataclass
class Row:
    """A response that grows. `home` is which sample of which ask it is."""
    home: tuple[int, int]
    stream: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    stopped: str = ""

    def grow(self, token: int, logp: float, ends: set[int], stopping: Stopping) -> None:
        self.tokens.append(token)
        self.logp.append(logp)
        if token in ends:
            self.stopped = "eos"
        elif stopping(self.tokens):
            self.stopped = "stop"
        elif len(self.tokens) == self.limit:
            self.stopped = "length"


@dataclass(frozen=True)
class Stopping:
    """Whether tokens end in a stop string. Only as many are decoded as a string may span, since a character is up to four
    tokens of bytes."""
    stop: tuple[str, ...]
    tokenizer: object

    def __call__(self, tokens: list[int]) -> bool:
        if not self.stop:
            return False
        tail = tokens[-4 * max(map(len, self.stop)) - 8:]
        return stop_at(decoded(self.tokenizer, tail), self.stop) is not None


@dataclass
class Voice:
    """A model that takes part in what is sampled: its logits count `share`. `bare` leaves its adapters off.

    Reads and continues ids by the model's own body, head and cache.
    """
    model: nn.Module
    share: float = 1.0
    bare: bool = False
    forwards: int = 0

    def __post_init__(self):
        self.trunk = Trunk(self.model, packing=False)
        base = self.model.get_base_model() if is_peft(self.model) else self.model
        self.config = base.config
        known = signature(self.trunk.body.forward).parameters
        self.cache = next((name for name in ("past_key_values", "cache_params") if name in known), None)
        if self.cache is None:
            raise ValueError(f"{self.trunk.name} has no cache that prefopt knows (its forward takes neither past_key_values "
                             f"nor cache_params), so that the embedded sampler cannot run it: sample with vLLM")
        self.positions = "position_ids" in known
        self.places = getattr(base.config.get_text_config(), "max_position_embeddings", None) or float("inf")

    def speaking(self):
        return self.model.disable_adapter() if self.bare else nullcontext()

    def read(self, ids: Tensor, attend: Tensor, width: int) -> tuple[Tensor, object]:
        """Last states (N, D) of the prompts and the cache of all their tokens, made `width` columns at a time."""
        from prefopt.rollout.cache import empty, is_growing
        if not self.trunk.checked:
            self.trunk.check(ids[:1, attend[0].argmax():])
        cache = empty(self.config)
        width = width if is_growing(cache) else ids.shape[1]              # other states are made in one piece
        position = (attend.cumsum(1) - 1).clamp(min=0)
        for start in range(0, ids.shape[1], width):
            part = slice(start, start + width)
            hidden = self.forward(ids[:, part], attend[:, :start + width], position[:, part], cache)
        return hidden, cache

    def forward(self, ids: Tensor, attend: Tensor, position: Tensor, cache) -> Tensor:
        """The state after the last of these tokens, (N, D). States of other caches than of keys have no padding left."""
        self.forwards += 1
        more = {"position_ids": position} if self.positions else {}
        seen = attend if self.cache == "past_key_values" or ids.shape[1] > 1 else None
        with self.speaking():
            return self.trunk.body(input_ids=ids, attention_mask=seen, use_cache=True, **{self.cache: cache},
                                   **more).last_hidden_state[:, -1]

    def logits(self, state: Tensor) -> Tensor:
        with self.speaking():
            logits = upcast(self.trunk.head(state))
        return logits if self.share == 1 else self.share * logits


@dataclass
class Decoder:
    """Continues ids by one model, or by several whose logits are summed.

    Every different prompt is read once, and its cache is repeated for its rows; `batch` rows grow together, those of long
    prompts first, and the cache drops rows that ended when they are a quarter. Padding is on the left. `counts` holds
    forward passes, prompt tokens read, padding among them, and tokens that rows fed back, ended rows included; all of one model.
    """
    voices: Sequence[nn.Module | Voice]
    ends: Sequence[int]
    pad: int
    batch: int
    tokenizer: object = None
    prefill: int = PREFILL
    counts: dict = field(default_factory=lambda: {"forwards": 0, "prompt": 0, "padding": 0, "decoded": 0})

    def __post_init__(self):
        self.voices = [v if isinstance(v, Voice) else Voice(v) for v in self.voices]
        if len(sizes := {v.trunk.vocabulary for v in self.voices}) > 1:
            raise ValueError(f"a mixture needs models of one vocabulary, and these know {' and '.join(map(str, sorted(sizes)))} "
                             f"tokens: take a reference that was built like the policy")
        self.trunk, self.places = self.voices[0].trunk, min(v.places for v in self.voices)

    @property
    def model(self) -> nn.Module:
        """The first of the models."""
        return self.voices[0].model

    @torch.no_grad()
    def __call__(self, asks: Sequence[Ask], choice: Choice) -> list[list[Sample]]:
        """The samples of each ask. A row also ends, by length, where the model has no more positions."""
        longest = max(len(ask.ids) for ask in asks)
        if longest >= self.places:
            raise ValueError(f"a prompt has {longest} tokens, and the model has {self.places} positions for a prompt and its "
                             f"response: cut prompts with max_prompt of the encoding")
        if (largest := max(max(ask.ids) for ask in asks)) >= self.trunk.vocabulary:
            raise ValueError(f"a prompt holds token {largest}, and the model knows {self.trunk.vocabulary}: the tokenizer is "
                             f"another model's")
        prompts: dict[tuple, list[Row]] = {}
        for a, ask in enumerate(asks):
            limit = int(min(ask.limit, self.places - len(ask.ids)))
            prompts.setdefault(tuple(ask.ids), []).extend(Row((a, j), ask.noise + j, limit) for j in range(ask.n))
        stopping = Stopping(choice.stop, self.tokenizer)
        with ExitStack() as modes:
            for voice in self.voices:
                modes.enter_context(evaluation(voice.model))
            try:
                for pack in packs(prompts, self.batch):
                    self.sample(pack, choice, stopping)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(f"the sampler ran out of memory with {self.batch} responses at a time: lower its batch "
                                   f"({str(error).splitlines()[0]})") from error
        self.counts["forwards"] = self.voices[0].forwards
        made = {row.home: Sample(row.tokens, row.logp, row.stopped) for rows in prompts.values() for row in rows}
        return [[made[a, j] for j in range(ask.n)] for a, ask in enumerate(asks)]

    def sample(self, pack: Mapping[tuple, list[Row]], choice: Choice, stopping: Stopping) -> None:
        """All rows of some prompts, `batch` at a time."""
        device = next(self.model.parameters()).device
        ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in pack], batch_first=True, padding_value=self.pad,
                                        padding_side="left").to(device)
        length = torch.tensor([len(p) for p in pack], device=device)
        attend = (torch.arange(ids.shape[1], device=device) >= ids.shape[1] - length[:, None]).long()
        read = [voice.read(ids, attend, max(1, self.prefill // len(ids))) for voice in self.voices]
        self.counts["prompt"] += int(attend.sum())
        self.counts["padding"] += int((1 - attend).sum())
        rows = [(n, row) for n, rows in enumerate(pack.values()) for row in rows]
        for start in range(0, len(rows), self.batch):
            places, some = zip(*rows[start:start + self.batch], strict=True)
            of, last = torch.tensor(places, device=device), start + self.batch >= len(rows)
            caches = [cache if last else copy.deepcopy(cache) for _, cache in read]
            for cache in caches:
                cache.reorder_cache(of)
            self.grow(list(some), caches, [state[of] for state, _ in read], attend[of], choice, stopping)

    def grow(self, rows: list[Row], caches: list, states: list[Tensor], attend: Tensor, choice: Choice,
             stopping: Stopping) -> None:
        """Rows token by token until all have ended; a cache and a state of each model."""
        device, ends, width = attend.device, set(self.ends), attend.shape[1]
        most = max(row.limit for row in rows)
        uniform = torch.from_numpy(np.stack([uniforms(row.stream, most) for row in rows])).to(device)
        attend, position = nn.functional.pad(attend, (0, most), value=1), attend.sum(1)
        for step in range(most):
            logits = [voice.logits(state) for voice, state in zip(self.voices, states, strict=True)]
            logp = distribution(sum(logits[1:], logits[0]), choice)
            if bool(logp[:, 0].isnan().any()):                # one number that is not finite makes them all NaN
                raise RuntimeError(f"{self.trunk.name} gives logits that are not finite after {step} sampled tokens: its "
                                   f"weights are broken, or its dtype is too narrow")
            token = drawn(logp, uniform[:, step]) if choice.temperature else logp.argmax(-1)
            for row, t, value in zip(rows, token.tolist(), logp.gather(1, token[:, None])[:, 0].tolist(), strict=True):
                if not row.stopped:
                    row.grow(t, value, ends, stopping)
            left = [k for k, row in enumerate(rows) if not row.stopped]
            if not left:
                return
            if 4 * len(left) <= 3 * len(rows):
                keep = torch.tensor(left, device=device)
                for cache in caches:
                    cache.reorder_cache(keep)
                rows = [rows[k] for k in left]
                uniform, attend, position, token = uniform[keep], attend[keep], position[keep], token[keep]
            seen, at = attend[:, :width + step + 1], (position + step)[:, None]
            states = [voice.forward(token[:, None], seen, at, cache) for voice, cache in zip(self.voices, caches, strict=True)]
            self.counts["decoded"] += len(rows)


def packs(prompts: Mapping[tuple, list[T]], batch: int) -> Iterator[dict[tuple, list[T]]]:
    """Prompts in packs of at most `batch` rows, or of one prompt: long ones first, so that little padding is read and what
    does not fit fails at once."""
    pack: dict[tuple, list[T]] = {}
    size = 0
    for ids in sorted(prompts, key=len, reverse=True):
        if pack and size + len(prompts[ids]) > batch:
            yield pack
            pack, size = {}, 0
        pack[ids], size = prompts[ids], size + len(prompts[ids])
    yield pack


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module is put back into its own."""
    training: Iterable[nn.Module] = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
