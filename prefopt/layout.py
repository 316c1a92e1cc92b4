"""How the rows of a batch are laid out for a model, and where each of their tokens went.

Padded      one row each, padding on the right. Works with every model: nothing looks right, so nothing sees the padding
Bucketed    rows of like length in rectangles of their own, for models whose rows cannot be packed: hardly any padding
Packed      one long sequence of real tokens only. What all rows of a group begin with is computed once, and every row goes on
            from there at its own positions: P + sum R_k tokens in the place of sum (P + R_k)

In a packed sequence a token sees the beginning of its group and the tokens before it in its own row, and nothing else. Queries
are gathered into few rectangles for that (`Block`): beginnings and whole rows, which are causal, and continuations, which see
a beginning and themselves. On a GPU FlexAttention takes the whole sequence and skips what nobody sees. All else a model does,
it does to each token alone.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from data_tools.batch import Batch

__all__ = ["PRICE", "Bucketed", "Layout", "Packed", "Padded", "bucketed", "packed", "padded", "shared", "why_padded", "window"]

NAME = "prefopt_packed"                                       # of the attention that transformers calls
PRICE = 6.0                                                   # scores that a token costs outside of attention, per unit of width:
                                                              # 12 D^2 weights a layer, and D products for q k and p v each
SMALL = 2 ** 16                                               # scores that cost about as much as one more call of attention
MOST = 0.75                                                   # of the tokens are read where the last layer leaves out others
FEW = 64                                                      # tokens that cost about as much as one more call of a model
STRIPE = 64                                                   # queries of one call of attention, at least
LONG = 768                                                    # tokens of which a CPU's causal kernel skips what nobody sees


class Layout(Protocol):
    """Tokens as a model gets them, and `place(row, column)`: where a token of the batch is in the model's states (S, D).
    `offset` (N) is where rows begin in the batch, `rectangle` counts the tokens of the padded layout."""
    offset: Tensor
    rectangle: int

    def place(self, row: Tensor, column: Tensor) -> Tensor: ...


# --------------------------------------------------------------------------------------------------------------- padded
@dataclass(frozen=True)
class Padded:
    """Rows (N, T') with padding on the right only, and the offset (N) of each row in the batch."""
    tokens: Tensor
    offset: Tensor
    attend: Tensor

    order = slice(None)                                       # of rows, as in Bucketed

    @property
    def rectangle(self) -> int:
        return self.tokens.numel()

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        return row * self.tokens.shape[1] + column - self.offset[row]


def on_host(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What says which rows and positions there are, on the CPU where the batch has left it there."""
    return batch.host if isinstance(batch, Batch) else batch


def padded(batch: Mapping[str, Tensor]) -> Padded:
    """Every row of the batch, left-aligned and trimmed."""
    return moved(aligned(on_host(batch)), batch["tokens"].device)


def aligned(batch: Mapping[str, Tensor]) -> Padded:
    attend = batch["attend"].bool()
    offset, length = attend.int().argmax(1), attend.sum(1)
    width = int(length.max()) if len(length) else 0
    place = torch.arange(width, device=offset.device)
    index = (offset[:, None] + place).clamp(max=attend.shape[1] - 1)
    return Padded(batch["tokens"].gather(1, index), offset, place < length[:, None])


@dataclass(frozen=True)
class Bucketed:
    """Rectangles of rows of like length, one after the other in the model's states: row n begins at start[n], and is the one at
    `order[n]` when rectangles are joined."""
    parts: tuple[Padded, ...]
    order: Tensor                                             # (N)
    start: Tensor                                             # (N)
    offset: Tensor                                            # (N)
    rectangle: int

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        return self.start[row] + column - self.offset[row]


def bucketed(batch: Mapping[str, Tensor]) -> Bucketed:
    """The rows of a batch by length, at most a tenth of each rectangle, or FEW tokens, being padding."""
    rows = aligned(on_host(batch))
    length = rows.attend.sum(1).clamp(min=1)
    order, start, parts, at = length.argsort(descending=True, stable=True), torch.zeros_like(length), [], 0
    for run in rectangles([1] * len(length), length[order].tolist(), waste=0.1, least=FEW):
        some, width = order[run], int(length[order[run.start]])
        parts.append(Padded(rows.tokens[some, :width], rows.offset[some], rows.attend[some, :width]))
        start[some] = at + width * torch.arange(len(some))
        at += width * len(some)
    found = Bucketed(tuple(parts) or (rows,), order.argsort(), start, rows.offset, rows.rectangle)
    return moved(found, batch["tokens"].device)


# --------------------------------------------------------------------------------------------------------------- packed
@dataclass(frozen=True)
class Block:
    """One call of attention: queries (n L) and keys (n C), as places in the packed sequence; rows shorter than L or C repeat
    place 0. `real` picks queries that are no padding, in the order of the sequence. Without `mask` (n or 1, 1, L, C) queries
    are keys, and attention is causal; with it, query i of a row sees none of the keys from before + i + 1 on."""
    queries: Tensor
    keys: Tensor
    real: Tensor
    rows: int
    mask: Tensor | None
    before: int


@dataclass(frozen=True)
class Last:
    """Attention of the last layer for the tokens `read` (M), after which nothing looks at the others."""
    blocks: tuple[Block, ...]
    read: Tensor


@dataclass(frozen=True)
class Packed:
    """One sequence of S tokens at `position`s of their own. Token t of row n is at head + t, from t = shared on at tail + t."""
    tokens: Tensor                                            # (1, S)
    position: Tensor                                          # (1, S)
    blocks: tuple[Block, ...]
    offset: Tensor                                            # (N)
    shared: Tensor                                            # (N)
    head: Tensor                                              # (N)
    tail: Tensor                                              # (N)
    family: Tensor                                            # (S) number of the beginning, or whole row, that a token belongs to
    branch: Tensor                                            # (S) number of its continuation, 0 in a beginning
    rectangle: int
    flex: bool
    last: Last | None = None                                  # where few enough tokens are read for it to pay
    read: Tensor | None = None                                # what `blocks` compute, None for all

    def ended(self) -> Packed:
        """For the last layer. FlexAttention takes the whole sequence there too."""
        return self if self.flex else replace(self, blocks=self.last.blocks, read=self.last.read)

    @cached_property
    def seen(self):
        """Who sees whom, in FlexAttention's blocks; made once for all layers."""
        from torch.nn.attention.flex_attention import create_block_mask
        family, branch, count = self.family, self.branch, self.tokens.shape[1]

        def sees(b, h, q, k):
            return (q >= k) & (family[q] == family[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
        return create_block_mask(sees, None, None, count, count, device=self.tokens.device, _compile=self.tokens.is_cuda)

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        t = column - self.offset[row]
        return t + torch.where(t < self.shared[row], self.head[row], self.tail[row])


def shared(batch: Mapping[str, Tensor], price: float = 0.0) -> Tensor:
    """How many tokens all rows of a row's group begin with, (N), 0 where sharing them does not pay.

    It pays where (K - 1) P price > P^2 / 2 + sum R (P + R) - sum (P + R)^2 / 2: tokens saved, against scores that attention
    computes in vain, because it skips the upper triangle of whole rows and not of continuations. `price` is the cost of a
    token outside of attention in scores; 0 shares whatever there is to share.
    """
    batch = on_host(batch)
    rows = aligned(batch)
    length, group = rows.attend.sum(1), index_of(batch)
    groups = int(group.max()) + 1 if len(group) else 0
    number = torch.arange(len(group), device=group.device)
    first = torch.full((groups,), len(group), device=group.device).scatter_reduce(0, group, number, "amin")
    lead = first[group]
    same = (rows.tokens == rows.tokens[lead]) & rows.attend & rows.attend[lead]
    common = same.int().cumprod(1).sum(1)
    least = common.new_full((groups,), rows.tokens.shape[1]).scatter_reduce(0, group, common, "amin")
    size = torch.bincount(group, minlength=groups)
    P, whole, own = least.double(), length.double(), (length - least[group]).double()
    wasted = P ** 2 / 2 + summed(own * whole - whole ** 2 / 2, group, groups)
    pays = (size > 1) & ((price == 0) | ((size - 1) * P * price > wasted))
    return torch.where(pays, least, 0)[group]


def index_of(batch: Mapping[str, Tensor]) -> Tensor:
    """(N) the number of each row's group."""
    return torch.unique(batch["group"], return_inverse=True)[1]


def summed(x: Tensor, group: Tensor, groups: int) -> Tensor:
    return x.new_zeros(groups).index_add(0, group, x)


def packed(batch: Mapping[str, Tensor], price: float = 0.0, flex: bool = False, first: Tensor | None = None) -> Packed:
    """The batch as one sequence of real tokens. The layout is made on the CPU and moved to where the batch is.

    Of each row the states of tokens from `first` (N) on are read, or all of them.
    """
    device, batch = batch["tokens"].device, on_host(batch)
    batch = {name: batch[name].cpu() for name in ("tokens", "attend", "group")}
    rows, common = aligned(batch), shared(batch, price)
    length, group = rows.attend.sum(1), index_of(batch)
    leads: dict[int, int] = {}                                # group -> its first row, whose beginning serves all
    for n, (g, P) in enumerate(zip(group.tolist(), common.tolist(), strict=True)):
        if P:
            leads.setdefault(g, n)
    roots = [(n, L) for n, (L, P) in enumerate(zip(length.tolist(), common.tolist(), strict=True)) if not P and L]
    roots += [(n, int(common[n])) for n in leads.values()]
    roots.sort(key=lambda one: -one[1])
    branches = [(n, P, L - P) for n, (L, P) in enumerate(zip(length.tolist(), common.tolist(), strict=True)) if P and L > P]
    branches.sort(key=lambda one: (-one[1], -one[2]))
    head, tail, at = torch.zeros_like(length), torch.zeros_like(length), 0
    served = {int(group[n]): n for n in leads.values()}
    pieces, blocks, ends, begins, family, branch = [], [], [], {}, [], []
    first = torch.zeros_like(length) if first is None else first.cpu()
    least = first.scatter_reduce(0, group, first, "amin", include_self=False)[group]      # of the rows of a group
    for run in rectangles([L for _, L in roots], [L for _, L in roots]):
        chosen = roots[run]
        starts = []
        for n, L in chosen:
            starts.append(at)
            begins[n] = at
            pieces.append((n, 0, L))
            family.append(begins[n])
            branch.append(0)
            at += L
        start, own = torch.tensor(starts), torch.tensor([L for _, L in chosen])
        blocks.append(causal(start, own))
        ends.append((start, torch.zeros_like(own), start, own,
                     torch.stack([(least if common[n] else first)[n] for n, _ in chosen])))
    for n, (g, P) in enumerate(zip(group.tolist(), common.tolist(), strict=True)):
        head[n] = tail[n] = begins[served[g] if P else n] if length[n] else 0
    for run in rectangles([R for _, _, R in branches], [P + R for _, P, R in branches]):
        chosen = branches[run]
        starts = []
        for n, P, R in chosen:
            starts.append(at)
            tail[n] = at - P
            pieces.append((n, P, R))
            family.append(int(head[n]))
            branch.append(n + 1)
            at += R
        P, R = (torch.tensor([one[i] for one in chosen]) for i in (1, 2))
        rows_of = [n for n, _, _ in chosen]
        ends.append((head[rows_of], P, torch.tensor(starts), R, (first[rows_of] - P).clamp(min=0)))
        blocks.append(continuing(*ends[-1][:-1], torch.zeros_like(R)))
    where = torch.cat([torch.arange(L) + P + n * rows.tokens.shape[1] for n, P, L in pieces] or [torch.zeros(0).long()])
    position = torch.cat([torch.arange(P, P + L) for _, P, L in pieces] or [torch.zeros(0).long()])
    family, branch = (torch.tensor(x).long().repeat_interleave(torch.tensor([L for _, _, L in pieces]).long())
                      for x in (family, branch))
    found = Packed(rows.tokens.flatten()[where][None], position[None], tuple(blocks) if not flex else (), rows.offset, common,
                   head, tail, family, branch, rows.rectangle, flex, last(ends, flex))
    return moved(found, device)


def last(sequences: Sequence[tuple[Tensor, ...]], flex: bool) -> Last | None:
    """Of sequences (head, before, start, length, first), those tokens that are read."""
    some = [tuple(x[one[3] > one[4]] for x in one) for one in sequences]
    some = [one for one in some if len(one[0])]
    read, tokens = sum(int((one[3] - one[4]).sum()) for one in some), sum(int(one[3].sum()) for one in sequences)
    if not 0 < read <= MOST * tokens:
        return None
    places = (filled(start + first, length - first) for _, _, start, length, first in some)
    return Last(() if flex else tuple(continuing(*one) for one in some), torch.cat([place[real] for place, real in places]))


def causal(start: Tensor, length: Tensor) -> Block:
    """Whole sequences, each of which sees itself."""
    places, real = filled(start, length)
    return Block(places.flatten(), places.flatten(), real.flatten().nonzero().squeeze(1), len(start), None, 0)


def continuing(head: Tensor, before: Tensor, start: Tensor, length: Tensor, first: Tensor) -> Block:
    """Sequences, their tokens from `first` on, that see the `before` tokens from `head` on, and themselves."""
    queries, real = filled(start + first, length - first)
    (others, seen), (own, _) = filled(head, before), filled(start, length)
    alike = slice(1 if bool(seen.all()) and len(first.unique()) == 1 else None)
    causal = torch.arange(own.shape[1]) <= first[alike, None, None] + torch.arange(queries.shape[1])[:, None]
    mask = torch.cat([seen[alike, None].expand(-1, queries.shape[1], -1), causal], 2)[:, None]
    return Block(queries.flatten(), torch.cat([others, own], 1).flatten(), real.flatten().nonzero().squeeze(1), len(start), mask,
                 others.shape[1] + int(first.max()))


def filled(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Places (n, L) of sequences that begin at `start`, 0 behind their ends, and which of them are real."""
    place = torch.arange(int(length.max()))
    real = place < length[:, None]
    return torch.where(real, start[:, None] + place, 0), real


def rectangles(heights: Sequence[int], widths: Sequence[int], *, waste: float = 0.5, least: int = SMALL) -> Iterator[slice]:
    """Runs of sequences, sorted by size, whose common rectangle is larger by at most `waste` times what it holds, or by `least`.

    >>> [r for r in rectangles([900, 890, 10], [900, 890, 10])], [r for r in rectangles([9, 2], [9, 2])]
    ([slice(0, 2, None), slice(2, 3, None)], [slice(0, 2, None)])
    """
    start, area, high, wide = 0, 0, 0, 0
    for n, (h, w) in enumerate(zip(heights, widths, strict=True)):
        taller, wider = max(high, h), max(wide, w)
        if n > start and (n + 1 - start) * taller * wider - area - h * w > max(waste * (area + h * w), least):
            yield slice(start, n)
            start, area, taller, wider = n, 0, h, w
        area, high, wide = area + h * w, taller, wider
    if heights:
        yield slice(start, len(heights))


def moved(layout: Layout, device) -> Layout:
    """The layout on a device; from the CPU to a GPU without waiting for it."""
    if layout.offset.device == device:
        return layout

    def there(one):
        if isinstance(one, Tensor):
            return (one.pin_memory() if device.type == "cuda" and one.is_cpu else one).to(device, non_blocking=True)
        if isinstance(one, tuple):
            return tuple(there(x) for x in one)
        return replace(one, **{f.name: there(getattr(one, f.name)) for f in fields(one)}) if is_dataclass(one) else one
    return there(layout)


# ------------------------------------------------------------------------------------------------------------ attention
def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
              layout: Packed | None = None, scaling: float | None = None, dropout: float = 0.0, **others):
    """Attention of a packed sequence, (1, H, S, d) -> (1, S, H, d). Without a layout it is transformers' own sdpa."""
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    if layout.flex:
        grouped = query.shape[1] != key.shape[1]
        found = flexible(query.is_cuda)(query, key, value, block_mask=layout.seen, scale=scaling, enable_gqa=grouped)
        return found.transpose(1, 2), None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    found = torch.cat([one_block(query, key, value, block, scaling) for block in layout.blocks])
    if layout.read is not None:
        found = found.new_zeros(query.shape).index_copy(0, layout.read, found)
    return found[None], None


@cache
def flexible(compiled: bool):
    """FlexAttention, compiled once for sequences of all lengths."""
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def one_block(query: Tensor, key: Tensor, value: Tensor, block: Block, scaling: float | None) -> Tensor:
    """What the queries of a block see, without padding: (real, H, d)."""
    q = query.index_select(0, block.queries).unflatten(0, (block.rows, -1)).transpose(1, 2)
    k, v = (x.index_select(0, block.keys).unflatten(0, (block.rows, -1)).transpose(1, 2) for x in (key, value))
    shares = q.shape[1] != k.shape[1]
    if shares and q.is_cuda and block.mask is not None:       # no fast kernel takes both a mask and fewer heads of keys
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        shares = False
    if block.mask is None and (q.is_cuda or q.shape[2] > LONG):
        seen = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shares)
    else:                                                     # by stripes, none of which looks at what comes after it
        first, step = block.before, max(STRIPE, -(-q.shape[2] // 4))
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None, None] \
            if block.mask is None else block.mask
        seen = torch.cat([scaled_dot_product_attention(part, k[:, :, :first + end], v[:, :, :first + end], scale=scaling,
                                                       attn_mask=mask[:, :, end - part.shape[2]:end, :first + end],
                                                       enable_gqa=shares)
                          for part, end in zip(q.split(step, 2), ends(q.shape[2], step), strict=True)], 2)
    return seen.transpose(1, 2).flatten(0, 1).index_select(0, block.real)


def ends(count: int, step: int) -> list[int]:
    """
    >>> ends(10, 4)
    [4, 8, 10]
    """
    return [min(start + step, count) for start in range(0, count, step)]


def register(config) -> None:
    """The model of this configuration calls `attention`, which without a layout is what it called before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME


def why_padded(model: nn.Module, config) -> str | None:
    """Why rows of a model cannot be packed, None where nothing is known against it."""
    kind, layers = type(model).__name__, {*(getattr(config, "layer_types", None) or [])}
    if not getattr(model, "_supports_attention_backend", False) or layers - {"full_attention", "sliding_attention"}:
        return f"{kind} has an attention of its own"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {config._attn_implementation}, and packing is built on sdpa"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return f"{kind} routes tokens to experts"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return f"{kind} has ALiBi positions"
    if any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)) or \
            any(getattr(m, "attention_dropout", 0) for m in model.modules()):
        return "dropout is on"
    return None


def window(config) -> int | None:
    """How far the tokens of some layer see, None where all see everything. Up to that length a window changes nothing."""
    layers = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layers if layers else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None
