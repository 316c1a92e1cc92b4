"""Keys and values that grow in place: a cache of transformers copies all that it holds whenever a token comes."""
from __future__ import annotations

import sys

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Growing", "empty", "is_growing"]

ROOM = 64                                                     # tokens, or an eighth of what is held where that is more


class Growing(DynamicSlidingWindowLayer):
    """The keys and values of one layer, in blocks of memory with room behind them. A layer that sees everything has a window
    without end."""

    def __init__(self, window: int | None):
        DynamicSlidingWindowLayer.__init__(self, window or sys.maxsize)
        self.is_sliding, self.blocks, self.end = window is not None, None, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What the new tokens may see, themselves included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states, value_states
        held, more = min(self.cumulative_length, self.sliding_window - 1), key_states.shape[2]
        seen = held + more
        if self.blocks is None or self.end + more > self.blocks[0].shape[2]:
            self.blocks = [x.new_empty(*x.shape[:2], seen + max(ROOM, seen // 8), x.shape[3]) for x in new]
            if held:
                for block, old in zip(self.blocks, (self.keys, self.values), strict=True):
                    block[:, :, :held] = old
            self.end = held
        for block, x in zip(self.blocks, new, strict=True):
            block.narrow(2, self.end, more).copy_(x)
        self.end += more
        self.cumulative_length += more
        kept = min(seen, self.sliding_window - 1)
        self.keys, self.values = (block.narrow(2, self.end - kept, kept) for block in self.blocks)
        return tuple(block.narrow(2, self.end - seen, seen) for block in self.blocks)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Leaves these rows, in this order, and makes room again when the next token comes."""
        DynamicSlidingWindowLayer.reorder_cache(self, beam_idx)
        self.blocks = None


def empty(config) -> DynamicCache:
    """A cache for a model, which grows in place unless the model keeps other states than keys and values."""
    cache = DynamicCache(config=config)
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        cache.layers = [Growing(layer.sliding_window if layer.is_sliding else None) for layer in cache.layers]
    return cache


def is_growing(cache: DynamicCache) -> bool:
    return all(isinstance(layer, Growing) for layer in cache.layers)
