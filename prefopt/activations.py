"""MaPO's token mask: how large the activations of a model are at each response token, from hooks on its modules.

Works for decoders built like Llama (Llama, Qwen2, Qwen3, Mistral, Gemma 2 and 3, Granite): modules are found by name and
by nothing else, so that another architecture is an error that names what is missing, never a mask of fewer tensors.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from prefopt.forward import Positions, scatter
from prefopt.head import CHUNK_BYTES
from prefopt.layout import padded
from prefopt.models import Trunk
from prefopt.ops import upcast

__all__ = ["activation_mask"]

# type, module of a block, and whether its input or its output is meant
ATTENTION = [("attention", "self_attn.q_proj", "out"), ("attention", "self_attn.k_proj", "out"),
             ("attention", "self_attn.v_proj", "out"), ("attention", "self_attn.o_proj", "in")]
BLOCK = [("mlp", "mlp.down_proj", "in"), *ATTENTION,
         ("residual", "input_layernorm", "in"), ("residual", "input_layernorm", "out"), ("residual", "", "out")]
PLAIN = [("residual", "self_attn", "out"), ("residual", "post_attention_layernorm", "in"),
         ("residual", "post_attention_layernorm", "out"), ("residual", "mlp", "out")]
SANDWICH = [("residual", "post_attention_layernorm", "out"), ("residual", "pre_feedforward_layernorm", "in"),
            ("residual", "pre_feedforward_layernorm", "out"), ("residual", "post_feedforward_layernorm", "out")]


@torch.no_grad()
def activation_mask(trunk: Trunk, batch: Mapping[str, Tensor]) -> Tensor:
    """Mask in [0, 1] of every response token, (N, T), zeros elsewhere.

    mask_t = mean over types of the mean over the type's tensors and layers of (a_t - min a) / (max a - min a)

    a_t is the mean over features of a tensor at the state that predicts token t; min and max run over the masked tokens
    of the row. The types and their tensors:

    mlp         input of the down projection
    attention   outputs of the q, k and v projections, q and k after rotation, input of the output projection
    residual    embedding; per block its input, after the attention norm, what attention adds, after it is added (before
                the MLP norm), after the MLP norm, what the MLP adds, the block's output; after the final norm
    logits      their mean over the vocabulary, without building them: hidden . mean of the head's rows

    Edge        max = min (one token, say) gives 1; a row without masked tokens is 0
    Departs     gated MLPs: the product that enters the down projection; blocks with norms after the sublayers (Gemma):
                what they add is taken after those norms. The source has neither
    Raises      ValueError where a model is not built like this, naming the tensors that were not found
    Reference   Christopoulou et al., SparsePO, arXiv:2410.05102; huawei-noah/HEBO `mapo_trainer.py`
    """
    layout = padded(batch)
    at, shape = Positions.of(batch), tuple(batch["mask"].shape)
    column, place = at.column - layout.offset[at.row] - 1, layout.place(at.row, at.column - 1)
    if not trunk.checked:
        trunk.check(layout.tokens)
    found: dict[str, list[Tensor]] = {"mlp": [], "attention": [], "residual": [], "logits": []}

    def take(kind: str, x: Tensor) -> None:
        found[kind].append(rescaled(upcast(x[at.row, column]).mean(-1), at.row, shape[0]))

    with taps(trunk, take):
        hidden = trunk(layout)[place]
    found["residual"].append(rescaled(upcast(hidden).mean(-1), at.row, shape[0]))
    found["logits"].append(rescaled(mean_logit(trunk, hidden), at.row, shape[0]))
    return scatter(torch.stack([torch.stack(tensors).mean(0) for tensors in found.values()]).mean(0), at, shape)


def rescaled(a: Tensor, row: Tensor, rows: int) -> Tensor:
    """Values (M) to [0, 1] within each row; 1 where a row's values are all equal.

    >>> rescaled(torch.tensor([2., 4., 3., 7.]), torch.tensor([0, 0, 0, 1]), 2)
    tensor([0.0000, 1.0000, 0.5000, 1.0000])
    """
    low = a.new_zeros(rows).scatter_reduce(0, row, a, "amin", include_self=False)[row]
    high = a.new_zeros(rows).scatter_reduce(0, row, a, "amax", include_self=False)[row]
    return torch.where(high > low, (a - low) / (high - low), 1.0)


def mean_logit(trunk: Trunk, hidden: Tensor) -> Tensor:
    """Mean over the vocabulary of the logits of states (M, D). A capped or adapted head is applied in chunks."""
    if trunk.cap is None and type(trunk.output) is nn.Linear:
        hidden, bias = upcast(hidden), trunk.output.bias
        logit = hidden @ trunk.output.weight.mean(0, dtype=hidden.dtype)
        return (logit if bias is None else logit + bias.mean(dtype=hidden.dtype)) * trunk.scale
    chunk = max(16, CHUNK_BYTES // (4 * trunk.vocabulary))
    return torch.cat([upcast(trunk.head(h)).mean(-1) for h in hidden.split(chunk)])


# ------------------------------------------------------------------------------------------------- hooks on the modules
@contextmanager
def taps(trunk: Trunk, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `take(type, tensor)` receives the tensors (N, T, features) of one forward pass."""
    points = [("residual", trunk.body.get_input_embeddings(), "out")]
    missing, attentions = [], []
    for layer in range(trunk.layer_count):
        home = f"layers.{layer}"
        sandwich = submodule(trunk.body, f"{home}.pre_feedforward_layernorm") is not None
        for kind, path, side in BLOCK + (SANDWICH if sandwich else PLAIN):
            module = submodule(trunk.body, f"{home}.{path}".rstrip("."))
            points.append((kind, module, side))
            if module is None:
                missing.append(f"{path or home} ({side}put)")
        attentions.append(submodule(trunk.body, f"{home}.self_attn"))
    rotations = {type(a).__module__ for a in attentions if "apply_rotary_pos_emb" in vars(sys.modules[type(a).__module__])}
    if missing or not rotations:
        missing = sorted(set(missing)) + ([] if rotations else ["apply_rotary_pos_emb"])
        raise ValueError(f"activation masks (recipe mapo) read the tensors of decoders built like Llama, and {trunk.name} "
                         f"has no {', '.join(missing)}: choose a model of the families Llama, Qwen, Mistral or Gemma, or "
                         f"a recipe whose masks need no activations (sparsepo, tdpo)")
    with ExitStack() as stack:
        for kind, module, side in points:
            stack.callback(module.register_forward_hook(tap(kind, side, take)).remove)
        for name in rotations:
            stack.enter_context(rotated(sys.modules[name], take))
        yield


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def tap(kind: str, side: str, take: Callable[[str, Tensor], None]) -> Callable:
    def hook(module: nn.Module, arguments: tuple, output) -> None:
        x = arguments[0] if side == "in" else output
        take(kind, x[0] if isinstance(x, tuple) else x)
    return hook


@contextmanager
def rotated(home, take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Rotation happens in a function of the model's source file, not in a module: it is wrapped there while this is open."""
    own, calls = home.apply_rotary_pos_emb, []

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = own(q, k, cos, sin)
        for x in (q, k):                                      # (N, heads, T, features of a head)
            take("attention", x.transpose(1, 2).flatten(2))
        calls.append(q.shape)
        return q, k

    home.apply_rotary_pos_emb = apply_rotary_pos_emb
    try:
        yield
    finally:
        home.apply_rotary_pos_emb = own
    if not calls:
        raise ValueError(f"activation masks (recipe mapo) read q and k after rotation, and {home.__name__} did not rotate "
                         f"through its apply_rotary_pos_emb (a fused kernel?): load the model without kernels")
