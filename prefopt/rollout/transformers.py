"""The embedded sampler: transformers' own generation, tokens in and tokens out."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data_tools.encoding import Encoding, encode
from data_tools.records import Group, Prompt, Response
from prefopt.models import is_peft

__all__ = ["Sampler", "continuations", "prompt_ids"]


@torch.no_grad()
def continuations(model: nn.Module, prompts: Sequence[Tensor], *, n: int, max_new_tokens: int, pad: int,
                  eos: int | Sequence[int] | None, temperature: float = 1.0, top_p: float = 1.0,
                  top_k: int = 0) -> list[list[Tensor]]:
    """n continuations of each prompt (1-D ids), each cut after its end token. temperature 0 takes the most likely token.

    All prompts are generated together, padded on the left, and each is read once for its n continuations. What the
    model's own generation_config says (repetition penalties, top-k) does not count: samples are the policy's. torch's
    global generator decides, so a seed or a checkpoint of it repeats them exactly.
    """
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    lengths = torch.tensor([len(p) for p in prompts])
    if not len(lengths) or int(lengths.min()) < 1 or n < 1:
        raise ValueError(f"sampling needs prompts of at least one token and n >= 1, found {len(prompts)} prompts, the "
                         f"shortest of {int(lengths.min()) if len(lengths) else 0} tokens, and n = {n}")
    ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=pad, padding_side="left")
    width = ids.shape[1]
    attend = (torch.arange(width) >= width - lengths[:, None]).long().to(ids.device)
    choice = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature else \
        dict(do_sample=False)
    with undisturbed(model) as base:
        made = base.generate(input_ids=ids.repeat_interleave(n, 0), attention_mask=attend.repeat_interleave(n, 0),
                             past_key_values=prefilled(base, ids, attend, n), max_new_tokens=max_new_tokens,
                             pad_token_id=pad, eos_token_id=ends or None, use_cache=True, **choice)[:, width:]
    cut = [tokens[:next((k + 1 for k, t in enumerate(tokens.tolist()) if t in ends), None)] for tokens in made]
    return [cut[i:i + n] for i in range(0, len(cut), n)]


def prefilled(model: nn.Module, ids: Tensor, attend: Tensor, n: int):
    """The cache of all prompt tokens but the last, n times each; None where that cannot be had or saves nothing."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    if n == 1 or ids.shape[1] == 1:
        return None
    cache = model.generate(input_ids=ids[:, :-1], attention_mask=attend[:, :-1], max_new_tokens=1, do_sample=False,
                           return_dict_in_generate=True, use_cache=True).past_key_values
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None                                           # states of linear attention are not repeated
    cache.batch_repeat_interleave(n)
    return cache


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """The model (adapters inside) in evaluation mode and without its own generation settings; put back at the end."""
    from transformers import GenerationConfig
    base = model.get_base_model() if is_peft(model) else model
    training, settings = model.training, base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        yield base
    finally:
        base.generation_config = settings
        model.train(training)


def prompt_ids(prompts: Sequence[Prompt], tokenizer, encoding: Encoding = Encoding()) -> list[Tensor]:
    """The ids of prompts as training sees them: chat template, BOS and limits. A prompt that is dropped is an error."""
    groups = encode([Group(p, [Response("", tokens=[0])]) for p in prompts], tokenizer, encoding)
    if len(groups) < len(prompts):
        raise ValueError(f"{len(prompts) - len(groups)} of {len(prompts)} prompts are longer than the encoding allows: "
                         f"cut them with long_prompt='keep_end', or leave them out")
    return [torch.from_numpy(g.prompt.astype("int64")) for g in groups]


class Sampler:
    """Groups of n sampled responses for prompts of text or messages.

    A response keeps its sampled tokens, so it is never tokenised again; `meta['finished']` says whether it ended itself.
    `batch` prompts are sampled together. `encoding` is the one that training uses.
    """

    def __init__(self, model: nn.Module, tokenizer, *, batch: int = 64, encoding: Encoding = Encoding()):
        self.model, self.tokenizer, self.batch, self.encoding = model, tokenizer, batch, encoding

    def __call__(self, prompts: Sequence[Prompt], *, n: int, max_new_tokens: int = 256, temperature: float = 1.0,
                 top_p: float = 1.0, top_k: int = 0) -> list[Group]:
        device = next(self.model.parameters()).device
        eos = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos or 0
        out = []
        for start in range(0, len(prompts), self.batch):
            some = prompts[start:start + self.batch]
            ids = [i.to(device) for i in prompt_ids(some, self.tokenizer, self.encoding)]
            made = continuations(self.model, ids, n=n, max_new_tokens=max_new_tokens, pad=pad, eos=eos,
                                 temperature=temperature, top_p=top_p, top_k=top_k)
            for prompt, tokens in zip(some, made, strict=True):
                out.append(Group(prompt, [self.response(t.tolist(), eos) for t in tokens]))
        return out

    def response(self, tokens: list[int], eos: int | None) -> Response:
        finished = bool(tokens) and tokens[-1] == eos
        text = self.tokenizer.decode(tokens[:-1] if finished else tokens)
        return Response(text, tokens=tokens, meta={"finished": finished})

    def sync(self, model: nn.Module) -> None:
        """The sampler holds the policy itself, so it always samples from the current weights."""
        self.model = model
