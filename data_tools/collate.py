"""Encoded groups -> a padded Batch."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch

from data_tools.batch import Batch
from data_tools.columns import column, nearest
from data_tools.encoding import Counts, EncodedGroup, EncodedRow, Encoding, encode, pad_token
from data_tools.records import Group

__all__ = ["Counts", "EncodedGroup", "EncodedRow", "Encoding", "collate", "encode", "neutral", "pad", "pad_token"]

NEUTRAL = {"degree": -1, "side": -1, "level": 0, "position": 0, "contrast": 0.0, "rationale": False, "online": False,
           "from_reference": False, "finished": True}
DTYPE = {bool: torch.bool, int: torch.int64, float: torch.float32}


def pad(groups: Sequence[EncodedGroup], *, pad_id: int = 0, side: str = "right", columns: Iterable[str] = ()) -> Batch:
    """One Batch of encoded groups, as wide as the longest row.

    `mask` is aligned with `tokens`: 1 where the log-probability of that token given those before it trains. There are
    `relevance`, `wins`, `weight` and `train` only when they say something: a label is known, a weight is not 1, a row
    does not train. Columns of the rows are there when any row has them, NEUTRAL (else NaN) where a row has none; it is
    an error when one of `columns` is not among them. `side` is where the padding goes, "right" or "left".

    >>> a, b = EncodedRow(np.array([3])), EncodedRow(np.array([4, 5]))
    >>> batch = pad([EncodedGroup(np.array([1, 2]), [a, b])], pad_id=9)
    >>> batch["tokens"].tolist(), batch["mask"].int().tolist()
    ([[1, 2, 3, 9], [1, 2, 4, 5]], [[0, 0, 1, 0], [0, 0, 1, 1]])
    """
    if not groups:
        raise ValueError("there are no groups to pad: a batch needs at least one")
    if side not in ("right", "left"):
        raise ValueError(f"side should be right or left, found {side!r}{nearest(side, ('right', 'left'))}")
    rows = [row for group in groups for row in group.rows]
    prompts = [group.prompt if row.prompt is None else row.prompt for group in groups for row in group.rows]
    sizes = np.array([len(group.rows) for group in groups])
    prompt, response = (np.array([len(x) for x in ids]) for ids in (prompts, [row.tokens for row in rows]))
    width = int((prompt + response).max())
    start = np.zeros_like(prompt) if side == "right" else width - prompt - response
    at = np.arange(width)[None, :] - start[:, None]           # place of a column within its row's tokens
    attend = (at >= 0) & (at < (prompt + response)[:, None])
    answer = attend & (at >= prompt[:, None])

    def filled(where, values, empty, dtype):
        out = np.full(where.shape, empty, dtype)
        out[where] = np.concatenate(values)
        return torch.from_numpy(out)

    ids = chain.from_iterable((p, row.tokens) for p, row in zip(prompts, rows, strict=True))
    masks = [np.ones(len(row.tokens), bool) if row.mask is None else row.mask for row in rows]
    out = {"tokens": filled(attend, list(ids), pad_id, np.int64), "attend": torch.from_numpy(attend),
           "mask": filled(answer, masks, False, bool), "prompt_length": torch.from_numpy(prompt.astype(np.int64)),
           "group": torch.arange(len(groups)).repeat_interleave(torch.from_numpy(sizes)), **_labels(groups, sizes)}
    if not all(row.train for row in rows):
        out["train"] = torch.tensor([row.train for row in rows])
    for name in dict.fromkeys(name for row in rows for name in row.columns):
        values = [row.columns.get(name, neutral(name)) for row in rows]
        if column(name).dims == "N T":
            values = [np.full(n, v, np.float32) if np.ndim(v) == 0 else v
                      for v, n in zip(values, response, strict=True)]
            out[name] = filled(answer, values, 0.0, np.float32)
        elif column(name).dims == "N D":
            width = max(np.size(v) for v in values)
            out[name] = torch.from_numpy(np.stack([np.broadcast_to(np.float32(v), width) for v in values]))
        else:
            out[name] = torch.tensor(values, dtype=DTYPE[type(neutral(name))])
    for name in columns:
        if name not in out:
            raise KeyError(f"no row has the column {name!r}{nearest(name, out)}; columns here: {', '.join(out)}")
    return Batch(out)


def neutral(name: str) -> bool | int | float:
    """What a row without the column holds; its type is the column's."""
    return NEUTRAL.get(name, float("nan"))


def _labels(groups: Sequence[EncodedGroup], sizes: np.ndarray) -> dict[str, torch.Tensor]:
    """relevance (N), wins (B, K, K) and weight (N), those that say something.

    Where some groups have wins and others relevance alone, each gets the other label too, as it would if it were
    alone in the batch: no group loses its label by the company it is in.
    """
    nan, largest = np.float32("nan"), int(sizes.max())
    relevance = [g.relevance for g in groups]
    wins = [g.wins for g in groups]
    if any(_known(w) for w in wins) and any(_known(r) for r in relevance):
        trains = [np.array([row.train for row in g.rows]) for g in groups]
        wins, relevance = ([w if _known(w) or not _known(r) else _wins(r, t) for w, r, t in
                            zip(wins, relevance, trains, strict=True)],
                           [r if _known(r) or not _known(w) else _relevance(w, t) for w, r, t in
                            zip(wins, relevance, trains, strict=True)])
    out = {}
    if any(map(_known, relevance)):
        out["relevance"] = torch.from_numpy(np.concatenate(
            [np.full(n, nan) if r is None else r for r, n in zip(relevance, sizes, strict=True)]))
    if any(map(_known, wins)):
        table = np.full((len(groups), largest, largest), nan)
        for place, w in zip(table, wins, strict=True):
            if w is not None:
                place[:len(w), :len(w)] = w
        out["wins"] = torch.from_numpy(table)
    weight = np.array([g.weight for g in groups], np.float32)
    if (weight != 1).any():
        out["weight"] = torch.from_numpy(weight.repeat(sizes))
    return out


def _known(label: np.ndarray | None) -> bool:
    return label is not None and not np.isnan(label).all()


def _wins(relevance: np.ndarray, trains: np.ndarray) -> np.ndarray:
    """1 and 0 where the relevance of rows that train differs, NaN for ties and what is not labelled."""
    i, j = (np.where(trains, relevance, np.nan)[place] for place in (np.s_[:, None], np.s_[None, :]))
    return np.where((i > j) | (i < j), i > j, np.nan).astype(np.float32)


def _relevance(wins: np.ndarray, trains: np.ndarray) -> np.ndarray:
    """(1/K) sum_j P(i beats j) over the K rows that train, with P(i beats i) = 1/2 and 0 where nobody compared."""
    table = np.where(np.eye(len(wins), dtype=bool), 0.5, np.nan_to_num(wins)) * trains[None, :]
    return (table.sum(1) / max(trains.sum(), 1) * trains).astype(np.float32)


def collate(groups: Iterable[Group], tokenizer, encoding: Encoding = Encoding(), *, side: str = "right",
            columns: Iterable[str] = (), counts: Counts | None = None) -> Batch:
    """`pad(encode(groups))`: one Batch. An error when every group is dropped."""
    known = Counts() if counts is None else counts
    encoded = encode(groups, tokenizer, encoding, counts=known)
    if not encoded:
        raise ValueError(f"no group is left to collate: {known}")
    if counts is None:
        known.warn()
    return pad(encoded, pad_id=pad_token(tokenizer), side=side, columns=columns)
