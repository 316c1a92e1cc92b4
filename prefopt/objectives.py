"""Objectives: slots filled with parts. `annotate` sees the whole optimiser step without gradient, `loss` a micro-batch."""
from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from data_tools.batch import Batch
from prefopt import label_rules
from prefopt.diagnose import MARGIN_METRICS, PAIR_METRICS, ROW_METRICS
from prefopt.margins import difference
from prefopt.parts import Columns, Part, Stateful, bind, columns_read, finite, kind, name, needs
from prefopt.reductions import group_mean, term_mean
from prefopt.references import Frozen


@dataclass(frozen=True)
class Loss:
    """`value` to minimise and detached metrics: plain weighted sums over rows, so that micro-batches add.

    Metrics are measured when they are first asked for: a step that is not logged does not pay for them.
    """
    value: Tensor
    measure: Callable[[], dict[str, Tensor]]

    @cached_property
    def metrics(self) -> dict[str, Tensor]:
        return self.measure()


@dataclass(frozen=True)
class Term:
    """An extra loss term: weight * sum(unit * part).

    `part` says what it returns (`-> Pairs | Rows | Lists | Tokens`); `reduce` makes `unit` of that shape from `terms`,
    which entries count. By default all labelled pairs, compared rows, their tokens, or groups with compared rows.
    """
    part: Part
    weight: float = 1.0
    reduce: Part = group_mean
    terms: Part | None = None


class Grouped(Mapping):
    """Row columns seen as (B, K, ...) with zeros in empty slots; group columns as they are.

    `label` is the column without which a row takes no part: it is NaN there, and seen as 0.
    """

    def __init__(self, rows: Mapping[str, Tensor], batch: Batch, label: str = "relevance"):
        self.rows, self.batch, self.label, self.seen = rows, batch, label, {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.seen:
            value = self.real() if key == "real" else self.probe() if key == "probe" else self.rows[key]
            if key not in ("real", "probe", "wins", "labels", "unit"):
                value = self.batch.grouped(value)[0]
            if key == self.label:
                value = torch.where(self["real"] | self["probe"], value, 0.0)
            if key == "wins":
                real, others = self["real"], ~torch.eye(value.shape[-1], dtype=torch.bool, device=value.device)
                value = torch.where(real[:, :, None] & real[:, None, :] & others, value, torch.nan)
            self.seen[key] = value
        return self.seen[key]

    def real(self) -> Tensor:
        """Slots that take part in the comparison: a row is there, trains, and is labelled."""
        real = self.batch.real
        for column, absent in (("train", lambda x: x == 0), (self.label, torch.isnan)):
            if column in self.rows:
                real = real & ~self.batch.grouped(absent(self.rows[column].float()))[0]
        return real

    def probe(self) -> Tensor:
        """Slots that hold a probe row with a label: parts read it, but it does not train."""
        if "train" not in self.rows:
            return torch.zeros_like(self.batch.real)
        probe = ~self.rows["train"].bool()
        if self.label in self.rows:
            probe = probe & ~self.rows[self.label].isnan()
        return self.batch.grouped(probe)[0]

    def __contains__(self, key: object) -> bool:
        return key in ("real", "probe") or key in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self.rows), "real": None, "probe": None})

    def __len__(self) -> int:
        return len(set(self.rows) | {"real", "probe"})


# what counts as a term of each kind, unless a Term says otherwise
def labelled_pairs(labels):
    return labels


def compared_rows(real):
    return real.double()


def compared_lists(real):
    return real.any(-1).double()


def compared_tokens(mask, real):
    return (mask.bool() & real[..., None]).double()


OLD = {"logp": "logp_old", "outputs": "outputs_old"}          # what annotations see in the place of what has a gradient
TERMS = {"Pairs": labelled_pairs, "Rows": compared_rows, "Lists": compared_lists, "Tokens": compared_tokens}


@dataclass(frozen=True)
class PreferenceObjective:
    """score -> margin -> ranking, weighted by labels, pair weights and the reduction.

    loss = weight * sum(unit * pair_weight * ranking) + sum over regularisers of weight * sum(unit * part)

    `score` and `providers` see rows (N, ...); every other part sees groups (B, K, ...), where `real` marks the rows that
    are compared. Probe rows (`train` False) and unlabelled rows (`relevance` NaN) are in no term but may be read.
    `annotations` fill columns before the step; `providers` make columns with gradient (learned masks).
    `score` is None where a margin compares responses that have no grades (general preferences). `bounded` is False where
    the loss has no lower bound, so that a run can warn. `outputs` is the width of the head of a reward model, 0 for a
    policy, which is a language model.
    """
    score: Part | None
    ranking: Part
    margin: Part = difference
    labels: Part = label_rules.as_given
    pair_weight: Part | None = None
    reduce: Part = group_mean
    regularisers: Mapping[str, Term] = field(default_factory=dict)
    annotations: Mapping[str, Part] = field(default_factory=dict)
    providers: Mapping[str, Part] = field(default_factory=dict)
    reference: object = Frozen()
    ranking_terms: Part | None = None
    weight: float = 1.0
    bounded: bool = True
    outputs: int = 0

    whole_groups = True                                       # a micro-batch holds whole groups
    home = {"score": ("prefopt.scores",), "margin": ("prefopt.margins",),
            "ranking": ("prefopt.pairwise", "prefopt.pointwise", "prefopt.listwise"), "labels": ("prefopt.label_rules",),
            "pair_weight": ("prefopt.pair_weights",), "regularisers": ("prefopt.regularisers",),
            "reduce": ("prefopt.reductions",), "reference": ("prefopt.references",),
            "annotations": ("prefopt.annotations",), "providers": ("prefopt.masks",)}      # where the parts of a slot are

    def __post_init__(self):
        for part, reduce in ((self.ranking, self.reduce), *((t.part, t.reduce) for t in self.regularisers.values())):
            kind(part)
            columns_read(reduce)
        if self.pair_weight is not None and kind(self.ranking) != "Pairs":
            raise ValueError(f"pair_weight {name(self.pair_weight)!r} needs a pairwise ranking, and "
                             f"{name(self.ranking)!r} is one of {kind(self.ranking).lower()}: choose a part of "
                             f"prefopt.pairwise, or leave pair_weight out")

    def with_slots(self, **slots) -> PreferenceObjective:
        return replace(self, **slots)

    # ------------------------------------------------------------------------------------------ what it reads
    def loss_parts(self) -> list[Part]:
        extra = [self.pair_weight] if self.pair_weight is not None else []
        return [self.ranking, *extra, *(t.part for t in self.regularisers.values())]

    def unit_parts(self) -> list[Part]:
        pairs = [(self.ranking, self.reduce, self.ranking_terms)]
        pairs += [(t.part, t.reduce, t.terms) for t in self.regularisers.values()]
        return [p for part, reduce, terms in pairs for p in (reduce, terms or TERMS[kind(part)])]

    def made(self) -> dict[str, Part]:
        """Columns that parts of this objective make for other parts."""
        score = {"score": self.score} if self.score is not None else {}
        return {**score, "margin": self.margin, "labels": self.labels, **self.providers}

    def reads(self) -> set[str]:
        """Columns that must be in the batch before `annotate` or made by the forward pass before `loss`."""
        return self.reads_before() | self.reads_forward()

    def reads_before(self) -> set[str]:
        """Columns that `annotate` needs; the policy is then the one before the step, so `logp` is `logp_old`."""
        made = {k: v for k, v in self.made().items() if k not in self.annotations}
        before = needs([*self.annotations.values(), *self.unit_parts()], made)
        before = {OLD.get(c, c) for c in before} - set(self.annotations)
        return self._from_labels(before)

    def reads_forward(self) -> set[str]:
        return self._from_labels(needs(self.loss_parts(), self.made()) - set(self.annotations))

    @staticmethod
    def _from_labels(columns: set[str]) -> set[str]:
        made = {"real", "terms", "labels"}
        return {"relevance" if c == "wins" else c for c in columns} - made

    def estimate(self, batch: Batch) -> Batch:
        """What sees all groups that were sampled together: nothing here, where every step stands for itself."""
        return batch

    def modules(self) -> list[nn.Module]:
        parts = [*self.loss_parts(), *self.made().values(), *self.annotations.values()]
        return list({id(p): p for p in parts if isinstance(p, nn.Module)}.values())

    def states(self) -> dict[str, object]:
        """Parts with memory that are not modules, by the column they make."""
        return {c: p for c, p in self.annotations.items() if isinstance(p, Stateful)}

    # ------------------------------------------------------------------------------------------ the two phases
    def columns(self, batch: Mapping[str, Tensor], made: Mapping[str, Part]) -> tuple[Columns, Columns]:
        """The batch seen as rows and as groups, with what parts make. Row columns are made from rows."""
        grouped_only = {"margin", "labels", "wins"}
        row_made = {k: p for k, p in made.items() if k not in grouped_only}
        rows = Columns(batch, row_made)
        labels = {"labels": self.labels, "margin": self.margin}
        if "wins" not in batch:
            labels["wins"] = label_rules.from_relevance
        if "relevance" not in batch and "wins" in batch:
            labels["relevance"] = label_rules.relevance_of
        return rows, Columns(Grouped(rows, batch), labels)

    @torch.no_grad()
    def annotate(self, batch: Batch) -> Batch:
        """Fill the columns of `annotations` and the reduction weights `unit`, over all groups of the optimiser step.

        Every process calls it once per step, also when it has no group of its own.
        """
        before = dict(batch)
        for now, old in OLD.items():
            if old in before or now in before:
                before[old] = before[now] = before.get(old, before.get(now)).detach()
        before = Batch(before, batch.width)
        out: dict[str, Tensor] = {}
        for column, part in self.annotations.items():
            if column in batch:                               # given: a reference point of one's own, say
                continue
            _, groups = self.columns(before, {k: v for k, v in self.made().items() if k != column})
            out[column] = batch.rows(finite(f"{name(part)} ({column})", bind(part, groups)))
            before = before.with_columns(**{column: out[column]})
        _, groups = self.columns(before, self.made())
        out["unit"] = self._unit(self.ranking, self.reduce, self.ranking_terms, groups, batch)
        for key, term in self.regularisers.items():
            out[f"unit@{key}"] = self._unit(term.part, term.reduce, term.terms, groups, batch)
        some = "wins" in batch or "relevance" in batch
        none = torch.zeros(batch.groups, batch.width, batch.width, dtype=torch.float64, device=batch.index.device)
        out["unit@pairs"] = group_mean(hard_pairs(groups["wins"]) if some else none)
        out["unit@rows"] = term_mean(compared_rows(groups["real"]))
        if "logp_old" in self.reads_forward() and "logp_old" in before:
            out["logp_old"] = before["logp_old"]
        return batch.with_columns(**out)

    @staticmethod
    def _unit(part: Part, reduce: Part, terms: Part | None, groups: Columns, batch: Batch) -> Tensor:
        counted = bind(terms or TERMS[kind(part)], groups).double()
        unit = bind(reduce, ChainMap({"terms": counted}, groups))
        if "weight" in batch:
            weight = batch.grouped("weight")[0].amax(1).double()
            unit = unit * weight.reshape(-1, *[1] * (unit.ndim - 1))
        return unit

    def loss(self, batch: Batch) -> Loss:
        """Weighted sum over the micro-batch. `annotate` must have run on the whole step."""
        if "unit" not in batch:
            raise KeyError("the batch has no column 'unit': call objective.annotate(batch) on the whole step first")
        made = {k: v for k, v in self.made().items() if k not in self.annotations}
        rows, groups = self.columns(batch, made)
        value = bind(self.ranking, groups)
        if self.pair_weight is not None:
            value = value * bind(self.pair_weight, groups).detach()
        total = self.weight * weighted(batch["unit"], value, self.ranking)
        metrics = {"loss/ranking": total.detach()}
        for key, term in self.regularisers.items():
            extra = term.weight * weighted(batch[f"unit@{key}"], bind(term.part, groups), term.part)
            metrics[f"loss/{key}"] = extra.detach()
            total = total + extra
        wanted = {**PAIR_METRICS, **ROW_METRICS, **({} if self.score is not None else MARGIN_METRICS)}
        return Loss(total, lambda: {**metrics, **measured(wanted, batch, groups)})

    def measure(self, batch: Batch, metrics: Mapping[str, Part]) -> dict[str, Tensor]:
        """Diagnostics (`prefopt.diagnose`) as weighted sums over labelled pairs or compared rows; micro-batches add."""
        made = {k: v for k, v in self.made().items() if k not in self.annotations}
        return measured(metrics, batch, self.columns(batch, made)[1])


def weighted(unit: Tensor, value: Tensor, part: Part) -> Tensor:
    """sum(unit * value); entries of weight 0 do not enter, whatever they hold."""
    if unit.shape != value.shape:
        raise ValueError(f"part {name(part)!r} returned {tuple(value.shape)} where its reduction has {tuple(unit.shape)}: "
                         f"its return annotation says {kind(part)}")
    return torch.where(unit != 0, unit.to(value.dtype) * value, 0.0).sum()


def hard_pairs(wins: Tensor) -> Tensor:
    """1 where i is preferred to j by more than half."""
    return (torch.nan_to_num(wins, nan=0.0) > 0.5).double()


@torch.no_grad()
def measured(metrics: Mapping[str, Part], batch: Batch, groups: Columns) -> dict[str, Tensor]:
    """Those metrics whose columns are there. Each is averaged over the labelled pairs, or the compared rows, of the step."""
    units = {"Pairs": batch["unit@pairs"], "Rows": batch["unit@rows"]}
    return {key: weighted(units[kind(part)], bind(part, groups).double(), part) for key, part in metrics.items()
            if all(column in groups for column in columns_read(part))}
