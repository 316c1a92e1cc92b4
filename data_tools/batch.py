"""Batch: named columns of one optimiser step, rows (N, ...) and groups (B, ...)."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from data_tools.columns import column

STRUCTURE = {"tokens", "attend", "mask", "group", "prompt_length"}      # columns that say which rows and positions there are


class Batch(Mapping):
    """Immutable named columns. Rows lead with N, group columns with B; `data_tools.columns` documents each.

    `group (N)` may hold any integers, in any order; group b is the b-th smallest of them, and within a group rows keep
    their order. Unknown names and shapes that disagree are errors. `width` is K, the size of the largest group of the
    optimiser step; a micro-batch inherits it so that (B, K, K) columns keep their shape when groups are split off.

    `host` is the batch itself, or, of one on a GPU, the columns that say which rows and positions there are, on the CPU:
    whoever asks there waits for nothing.
    """

    def __init__(self, columns: Mapping[str, Tensor], width: int | None = None, host: Batch | None = None):
        columns = dict(columns)
        if "group" not in columns:
            raise KeyError("a Batch needs the column 'group' (N): which group each row belongs to")
        group = columns["group"]
        if group.ndim != 1 or group.dtype.is_floating_point:
            raise ValueError(f"column 'group' must be (N) integers, found {tuple(group.shape)} {group.dtype}")
        self.index: Tensor                                    # (N) group number 0..B-1 of each row
        self.slot: Tensor                                     # (N) place of each row in its group
        self._host, self.N = host, len(group)
        if host is None:
            ids, self.index = torch.unique(group, return_inverse=True)
            self.groups = len(ids)
            order = torch.argsort(self.index, stable=True)
            count = torch.bincount(self.index, minlength=self.groups)
            place = torch.empty_like(order)
            place[order] = torch.arange(self.N, device=group.device)
            self.slot = place - (count.cumsum(0) - count)[self.index]
            self.largest = int(count.max()) if self.N else 1  # slots of nothing, but slots
        else:
            self.groups, self.largest = host.groups, host.largest
            self.index, self.slot = (x.to(group.device, non_blocking=True) for x in (host.index, host.slot))
        self.width = self.largest if width is None else width
        if self.largest > self.width:
            raise ValueError(f"a group of {self.largest} rows does not fit width {self.width}")
        self._columns = columns
        for name, value in columns.items():
            self._check(name, value)

    def _check(self, name: str, value: Tensor) -> None:
        dims = column(name).dims.split()
        if dims[1:] != ["..."] and value.ndim != len(dims):
            raise ValueError(f"column {name!r} should be ({' '.join(dims)}), found shape {tuple(value.shape)}")
        for dim, size in zip(dims, value.shape, strict=False):
            want = {"N": self.N, "B": self.groups, "K": self.width}.get(dim)
            if dim == "T" and "mask" in self._columns:
                want = self._columns["mask"].shape[1]
            if want is not None and size != want:
                raise ValueError(f"column {name!r} should be ({' '.join(dims)}) with {dim} = {want}, "
                                 f"found shape {tuple(value.shape)}")

    @property
    def host(self) -> Batch:                                  # no attribute: a batch that held itself would keep its graph until
        return self._host or self                             # garbage is collected

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self.items())
        return f"Batch({self.groups} groups, {self.N} rows: {shapes})"

    def with_columns(self, **columns: Tensor) -> Batch:
        """A new batch with these columns added or replaced; names with '@' go through a dict: `**{'unit@sft': u}`."""
        host = None if STRUCTURE & columns.keys() else self._host
        return Batch({**self._columns, **columns}, self.width, host)

    def to(self, device) -> Batch:
        """The batch on a device; from the CPU it leaves behind what says which rows and positions there are."""
        columns, away = {k: v.to(device, non_blocking=True) for k, v in self.items()}, torch.device(device).type != "cpu"
        left = Batch({k: v for k, v in self.items() if k in STRUCTURE}, self.width) if away and self.index.is_cpu else None
        return Batch(columns, self.width, left)

    @property
    def real(self) -> Tensor:
        """(B, K), True where a slot holds a row."""
        real = torch.zeros(self.groups, self.width, dtype=torch.bool, device=self.index.device)
        return real.index_put((self.index, self.slot), torch.ones((), dtype=torch.bool, device=real.device))

    def grouped(self, value: str | Tensor) -> tuple[Tensor, Tensor]:
        """(N, ...) -> (B, K, ...) with zeros in empty slots, and real (B, K). Differentiable."""
        value = self[value] if isinstance(value, str) else value
        out = value.new_zeros(self.groups, self.width, *value.shape[1:])
        return out.index_put((self.index, self.slot), value), self.real

    def rows(self, grouped: Tensor) -> Tensor:
        """(B, K, ...) -> (N, ...), the inverse of `grouped`; (B) -> (N), each row its group's value."""
        return grouped[self.index] if grouped.ndim == 1 else grouped[self.index, self.slot]

    def select(self, rows: Tensor) -> Batch:
        """The batch of these rows, which must be whole groups; group columns are cut to the groups present."""
        index = self.host.index
        groups = torch.unique(index[rows.to(index.device)])
        if int(torch.isin(index, groups).sum()) != len(rows):
            raise ValueError("select needs whole groups: some rows of a selected group are missing")
        host = self._host and self._host.select(rows)
        rows, groups = (x.to(self.index.device, non_blocking=True) for x in (rows, groups))
        out = {k: v[groups] if column(k).dims.startswith("B") else v[rows] for k, v in self.items()}
        return Batch(out, self.width, host)

    def alone(self, rows: Tensor) -> Batch:
        """The batch of these rows of any groups, without the columns that lead with B."""
        host = self._host and self._host.alone(rows)
        rows = rows.to(self.index.device, non_blocking=True)
        return Batch({k: v[rows] for k, v in self.items() if not column(k).dims.startswith("B")}, host=host)

    def split(self, sizes: Sequence[int]) -> Iterator[Batch]:
        """Consecutive runs of groups, `sizes` groups each."""
        start = 0
        for size in sizes:
            inside = (self.host.index >= start) & (self.host.index < start + size)
            yield self.select(inside.nonzero().squeeze(1))
            start += size

    def minibatches(self, groups: int) -> Iterator[Batch]:
        """Optimiser steps of `groups` groups each (the last may be smaller)."""
        full, rest = divmod(self.groups, groups)
        return self.split([groups] * full + [rest] * (rest > 0))

    def microbatches(self, tokens: int | None = None, whole_groups: bool = True, shared: Tensor | None = None,
                     strict: bool = True) -> Iterator[Batch]:
        """Micro-batches of up to `tokens` real tokens; None gives one.

        Whole groups whose longest rows are alike, so that little padding is computed; or, where a loss needs no whole groups,
        rows of like length, without the columns that lead with B. With `shared` (N), the first tokens of each row that its
        group has in common and that count once for those of a group that are together, there is no padding, and groups, or
        rows by their groups, stay in order. A group (or row) larger than the budget is an error that names the smallest budget
        that works; where the budget is not `strict` it is a micro-batch of its own.
        """
        for _, part in self.pieces(tokens, whole_groups, shared, strict):
            yield part

    def pieces(self, tokens: int | None = None, whole_groups: bool = True, shared: Tensor | None = None,
               strict: bool = True) -> Iterator[tuple[Tensor, Batch]]:
        """`microbatches`, each with the numbers of its rows in this batch."""
        if tokens is None:
            yield torch.arange(self.N), self
            return
        host = self.host
        lengths = host["attend" if "attend" in host else "mask"].bool().sum(1)
        common = torch.zeros_like(lengths) if shared is None else shared
        by_group = torch.argsort(host.index, stable=True)
        order = by_group if whole_groups or shared is not None else lengths.argsort(descending=True, stable=True)
        length, group, once = lengths[order].tolist(), host.index[order].tolist(), common[order].tolist()
        if whole_groups:                                      # cost of each group
            cost = [0] * self.groups
            for n, g, P in zip(length, group, once, strict=True):
                cost[g] += n - P if cost[g] else n
        largest = max(cost if whole_groups else length, default=0)
        if strict and largest > tokens:
            raise ValueError(f"a {'group' if whole_groups else 'response with its prompt'} of {largest} tokens does not fit "
                             f"the micro-batch budget of {tokens} tokens: raise train.tokens to at least {largest}, or "
                             f"truncate with data.max_length")
        if whole_groups:
            longest = lengths.new_zeros(self.groups).scatter_reduce(0, host.index, lengths, "amax")
            chosen = longest.argsort(descending=True, stable=True) if shared is None else torch.arange(self.groups)
            for run in runs([cost[g] for g in chosen.tolist()], tokens):
                rows = torch.isin(host.index, chosen[run]).nonzero().squeeze(1)
                yield rows, self.select(rows)
            return
        for run in together(length, group, once, tokens):
            rows = order[run].sort().values
            yield rows, self.alone(rows)


def together(length: Sequence[int], group: Sequence[int], once: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive runs of rows within the budget, where rows of a group pay for what they have in common once.

    >>> list(together([5, 5, 5], [0, 0, 1], [3, 3, 0], 7)), list(together([5, 5, 5], [0, 0, 1], [0, 0, 0], 7))
    ([slice(0, 2, None), slice(2, 3, None)], [slice(0, 1, None), slice(1, 2, None), slice(2, 3, None)])
    """
    start = filled = 0
    for n, (size, g, P) in enumerate(zip(length, group, once, strict=True)):
        more = size - P if n > start and group[n - 1] == g else size
        if n > start and filled + more > budget:
            yield slice(start, n)
            start, filled, more = n, 0, size
        filled += more
    if len(length):
        yield slice(start, len(length))


def runs(cost: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive runs whose costs stay within the budget.

    >>> [cost[run] for cost in [[3, 2, 4, 1]] for run in runs(cost, 5)]
    [[3, 2], [4, 1]]
    """
    start = filled = 0
    for n, c in enumerate(cost):
        if n > start and filled + c > budget:
            yield slice(start, n)
            start, filled = n, 0
        filled += c
    if len(cost):
        yield slice(start, len(cost))
