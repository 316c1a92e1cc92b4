"""Batch: named columns of one optimiser step, rows (N, ...) and groups (B, ...)."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from data_tools.columns import column


class Batch(Mapping):
    """Immutable named columns. Rows lead with N, group columns with B; `data_tools.columns` documents each.

    `group (N)` may hold any integers, in any order; group b is the b-th smallest of them, and within a group rows keep
    their order. Unknown names and shapes that disagree are errors. `width` is K, the size of the largest group of the
    optimiser step; a micro-batch inherits it so that (B, K, K) columns keep their shape when groups are split off.
    """

    def __init__(self, columns: Mapping[str, Tensor], width: int | None = None):
        columns = dict(columns)
        if "group" not in columns:
            raise KeyError("a Batch needs the column 'group' (N): which group each row belongs to")
        group = columns["group"]
        if group.ndim != 1 or group.dtype.is_floating_point:
            raise ValueError(f"column 'group' must be (N) integers, found {tuple(group.shape)} {group.dtype}")
        self.index: Tensor                                    # (N) group number 0..B-1 of each row
        ids, self.index = torch.unique(group, return_inverse=True)
        self.groups, self.N = len(ids), len(group)
        order = torch.argsort(self.index, stable=True)
        count = torch.bincount(self.index, minlength=self.groups)
        place = torch.empty_like(order)
        place[order] = torch.arange(self.N, device=group.device)
        self.slot: Tensor = place - (count.cumsum(0) - count)[self.index]      # (N) place of each row in its group
        largest = int(count.max()) if self.N else 1         # slots of nothing, but slots
        self.width = largest if width is None else width
        if largest > self.width:
            raise ValueError(f"a group of {largest} rows does not fit width {self.width}")
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
        return Batch({**self._columns, **columns}, self.width)

    def to(self, device) -> Batch:
        return Batch({k: v.to(device, non_blocking=True) for k, v in self.items()}, self.width)

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
        groups = torch.unique(self.index[rows])
        if int(torch.isin(self.index, groups).sum()) != len(rows):
            raise ValueError("select needs whole groups: some rows of a selected group are missing")
        out = {k: v[groups] if column(k).dims.startswith("B") else v[rows] for k, v in self.items()}
        return Batch(out, self.width)

    def split(self, sizes: Sequence[int]) -> Iterator[Batch]:
        """Consecutive runs of groups, `sizes` groups each."""
        start = 0
        for size in sizes:
            inside = (self.index >= start) & (self.index < start + size)
            yield self.select(inside.nonzero().squeeze(1))
            start += size

    def minibatches(self, groups: int) -> Iterator[Batch]:
        """Optimiser steps of `groups` groups each (the last may be smaller)."""
        full, rest = divmod(self.groups, groups)
        return self.split([groups] * full + [rest] * (rest > 0))

    def microbatches(self, tokens: int | None = None) -> Iterator[Batch]:
        """Whole groups, in order, filled up to a budget of `tokens` real tokens; None gives one micro-batch.

        A group larger than the budget is an error that names the smallest budget that works.
        """
        if tokens is None:
            yield self
            return
        cost = torch.zeros(self.groups, dtype=torch.long, device=self.index.device)
        lengths = self["attend" if "attend" in self else "mask"].bool().sum(1)
        cost = cost.index_add(0, self.index, lengths).tolist()
        if max(cost, default=0) > tokens:
            raise ValueError(f"a group of {max(cost)} tokens does not fit the micro-batch budget of {tokens} tokens: "
                             f"raise train.tokens to at least {max(cost)}, or truncate with data.max_length")
        sizes, filled = [0], 0
        for c in cost:
            if sizes[-1] and filled + c > tokens:
                sizes.append(0)
                filled = 0
            sizes[-1] += 1
            filled += c
        yield from self.split([s for s in sizes if s])
