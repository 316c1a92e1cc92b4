"""Tiny random models, a tokenizer for them, and ragged batches. Nothing is downloaded."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_tools.batch import Batch
from prefopt.models import LANGUAGE, Head

EXACT = {"rtol": 0, "atol": 1e-10}
VOCABULARY = 61
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SIZE, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2}
CONFIGS = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", {**SIZE, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**GROUPED, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", {**GROUPED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0,
                                "sliding_window": 4, "attn_implementation": "eager"}),     # sdpa leaves out the cap
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "sliding_window": 4}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "cohere": ("CohereConfig", {**SIZE, "num_key_value_heads": 1, "logit_scale": 0.25}),
    "phi": ("PhiConfig", {**SIZE, "partial_rotary_factor": 0.5}),                      # a head with a bias
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", SIZE),
}
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", "system", ":", *(f"w{i}" for i in range(VOCABULARY - 8))]
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}"
            "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")


def tiny(name: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, head: Head = LANGUAGE,
         **changes) -> nn.Module:
    """A random model of the architecture `name` in training mode, without dropout; `changes` go to its config."""
    import transformers
    cls, settings = CONFIGS[name]
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if name == "gpt2" else {}
    outputs = {"num_labels": head.outputs} if head.outputs else {}
    config = getattr(transformers, cls)(**{**settings, **dropout, **outputs, **changes})
    torch.manual_seed(seed)
    return spread(getattr(transformers, head.auto).from_config(config).to(dtype)).train()


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Larger weights than the usual start, biases and norms included, so that every term of a forward pass shows."""
    for p in model.parameters():
        if p.ndim > 1:
            p.copy_(torch.randn_like(p) * 1.5 / p.shape[-1] ** 0.5)
        else:
            p.add_(torch.randn_like(p) * 0.2)
    return model


def adapted(model: nn.Module, **settings) -> nn.Module:
    """The model with LoRA adapters that are not zero."""
    from peft import LoraConfig, get_peft_model
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.3)
    return model.train()


def tokenizer():
    """Words of a fixed vocabulary, apart at spaces; <bos>, <eos>, <pad> and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
                                   unk_token="<unk>", chat_template=TEMPLATE)


def saved(folder: Path, name: str = "llama", **changes) -> str:
    """A float32 model and the tokenizer in `folder`, ready for `load_policy`."""
    tiny(name, dtype=torch.float32, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def batch(rows: list[tuple[int, int, int]], *, seed: int = 0, left: int = 0, right: int = 0, padding: str = "right",
          **columns: Tensor) -> Batch:
    """A batch of random tokens from (group, prompt length, response length); `left` and `right` add columns of padding. Prompts
    of one group and length are the same."""
    generator = torch.Generator().manual_seed(seed)
    width = max(p + r for _, p, r in rows)
    tokens = torch.zeros(len(rows), left + width + right, dtype=torch.long)
    attend, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    prompts: dict[tuple[int, int], Tensor] = {}
    for n, (g, p, r) in enumerate(rows):
        start = left + (width - p - r if padding == "left" else 0)
        drawn = torch.randint(3, VOCABULARY, (p + r,), generator=generator)
        drawn[:p] = prompts.setdefault((g, p), drawn[:p].clone())
        tokens[n, start:start + p + r] = drawn
        attend[n, start:start + p + r] = 1
        mask[n, start + p:start + p + r] = 1
    return Batch({"tokens": tokens, "attend": attend, "mask": mask, "group": torch.tensor([g for g, _, _ in rows]),
                  "prompt_length": torch.tensor([p for _, p, _ in rows]), **columns})


class Float64(TorchFunctionMode):
    """Models cast norms and rotations to float32 whatever their dtype; while open, those casts are to float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made while open."""

    def __init__(self):
        TorchDispatchMode.__init__(self)
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in made)])
        return out


# ------------------------------------------------------------------------------------------------- the plain way
def logits_before(model: nn.Module, b: Batch, n: int) -> dict[int, Tensor]:
    """Logits that predict each masked token of row n, from the whole model on this row alone."""
    real = b["attend"][n].nonzero().squeeze(1).tolist()
    logits = model(input_ids=b["tokens"][n, real][None]).logits[0]
    return {column: logits[real.index(column) - 1] for column in b["mask"][n].nonzero().squeeze(1).tolist()}


def plain(model: nn.Module, b: Batch, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(N, T) of `value(log-probabilities, token)` at masked tokens."""
    out = {}
    for n in range(b.N):
        for column, logits in logits_before(model, b, n).items():
            out[n, column] = value(logits.log_softmax(-1), b["tokens"][n, column])
    index = torch.tensor(list(out)).T
    return torch.zeros(b["mask"].shape, dtype=torch.float64).index_put(tuple(index), torch.stack(list(out.values())))


def plain_logp(model: nn.Module, b: Batch) -> Tensor:
    return plain(model, b, lambda logp, token: logp[token])


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of all parameters that have one, by name."""
    module.zero_grad()
    torch.autograd.backward(loss)                             # Tensor.backward would leave Float64
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same names, and the same tensors to 1e-10."""
    assert set(a) == set(b) and a
    for key in a:
        torch.testing.assert_close(a[key], b[key], **EXACT, msg=lambda m, key=key: f"{key}: {m}")
