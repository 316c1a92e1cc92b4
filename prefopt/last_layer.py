"""The last layer, for no more tokens than whose states are read.

Nothing comes after it that looks at the other tokens, which are most of them where prompts are long and nearly all in a reward
model: of those it only needs keys and values. Queries, the projection of what attention gives, and the MLP are left out,
and their states are of no meaning.
"""
from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LastLayer"]

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")       # each maps tokens one by one, of decoders built like Llama


class LastLayer:
    """Hooks on a layer and its parts. They ask for the layout at each of its calls, gradient checkpointing's included, and do
    nothing where all tokens are read or rows are not packed."""

    def __init__(self, layer: nn.Module):
        self.read: Tensor | None = None
        layer.register_forward_pre_hook(self.begin, with_kwargs=True)
        layer.register_forward_hook(self.end)
        for part in parts(layer):
            part.register_forward_pre_hook(self.narrow)
            part.register_forward_hook(self.widen)

    @classmethod
    def of(cls, body: nn.Module) -> int:
        """Put on the last layer of a model, once; the number of its weights that a token meets only where it is read."""
        layers = getattr(body, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return 0
        if not hasattr(layers[-1], "prefopt_last"):
            layers[-1].prefopt_last = cls(layers[-1])
        return sum(p.numel() for part in parts(layers[-1]) for p in part.parameters())

    def begin(self, layer, arguments, named):
        layout = named.get("layout")
        self.read = layout.last.read if layout is not None and layout.last is not None else None
        return (arguments, named | {"layout": layout.ended()}) if self.read is not None else None

    def end(self, *_):
        self.read = None

    def narrow(self, part, arguments):
        if self.read is not None:
            self.shape = arguments[0].shape
            return arguments[0].index_select(1, self.read), *arguments[1:]

    def widen(self, part, arguments, found):
        if self.read is not None:
            return found.new_zeros(*self.shape[:-1], found.shape[-1]).index_copy(1, self.read, found)


def parts(layer: nn.Module) -> list[nn.Module]:
    names = dict(layer.named_modules())
    return [names[name] for name in PARTS if name in names]
