"""An objective tried out on made-up log-probabilities: what it learns from, what it measures, with no model at all."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_tools.batch import Batch
from data_tools.columns import COLUMNS
from prefopt.diagnose import combined
from prefopt.forward import FROZEN, GRADED, GRADIENT
from prefopt.objectives import PreferenceObjective


@dataclass(frozen=True)
class Rehearsal:
    """`learns` (B) is True for groups whose ranking loss has a gradient; `metrics` are the names that are logged."""
    learns: Tensor
    metrics: tuple[str, ...]


def rehearse(objective: PreferenceObjective, batch: Batch) -> Rehearsal:
    """Annotate and differentiate the ranking loss of the batch.

    What models make is drawn at random, so only the labels and the columns of the records matter. Raises what training
    would raise: a missing column, a group of the wrong size. Memory and modules of `objective` are used up.

    >>> from prefopt import recipes
    >>> pair_and_single = example([[1.0, 0.0], [1.0]])
    >>> rehearse(recipes.dpo(), pair_and_single).learns, rehearse(recipes.kto(), pair_and_single).learns
    (tensor([ True, False]), tensor([True, True]))
    """
    objective = objective.with_slots(regularisers={})
    for module in objective.modules():
        module.setup(layers=1, width=1)
    batch = made_up(objective, batch)
    loss = objective.loss(objective.annotate(batch))
    made = [v for v in batch.values() if v.requires_grad]
    slopes = torch.autograd.grad(loss.value, made, allow_unused=True) if loss.value.requires_grad else ()
    moved = sum((s.abs().flatten(1).sum(1) for s in slopes if s is not None), torch.zeros(batch.N, dtype=torch.float64))
    learns = batch.grouped(moved)[0].sum(1) > 0
    return Rehearsal(learns, tuple(combined({k: float(v) for k, v in loss.metrics.items()})))


def made_up(objective: PreferenceObjective, batch: Batch) -> Batch:
    """The batch with the columns that models and sampling would add: log-probabilities close to -1, everything else in
    [0, 1], of one layer and one dimension."""
    sizes = {"N": batch.N, "T": batch["mask"].shape[1], "L": 1, "D": 1}
    wide = {**sizes, "D": objective.outputs or 1}
    random = torch.Generator().manual_seed(0)
    out = {"logp": -1 - 0.01 * torch.rand(batch["mask"].shape, generator=random, dtype=torch.float64)}
    for column in sorted(objective.reads() & (FROZEN | GRADIENT) - {"logp"}):
        shape = [(wide if column.startswith("outputs") else sizes)[d] for d in COLUMNS[column].dims.split()]
        out[column] = torch.rand(shape, generator=random, dtype=torch.float64)
        if column.startswith("logp"):
            out[column] = -1 - 0.01 * out[column]
    for column in {"logp", *GRADED} & set(out):
        out[column].requires_grad_()
    return batch.with_columns(**out)


def example(labels: list[list[float]]) -> Batch:
    """Groups with these relevances, and neutral values in every column that records may bring.

    >>> example([[1.0, 0.0], [1.0]])["relevance"]
    tensor([1., 0., 1.])
    """
    group = torch.arange(len(labels)).repeat_interleave(torch.tensor([len(g) for g in labels]))
    relevance = torch.tensor([value for g in labels for value in g])
    zero, place = torch.zeros_like(relevance), torch.tensor([n + 1 for g in labels for n in range(len(g))])
    return Batch({"group": group, "relevance": relevance, "mask": torch.ones(len(group), 2), "reward": relevance,
                  "position": place, "level": zero.long(), "contrast": zero, "rationale": zero.bool(),
                  "degree": zero.long() - 1, "side": zero.long() - 1, "segment": torch.ones(len(group), 2),
                  "step_label": relevance[:, None].expand(len(group), 2),
                  "rewards": relevance[:, None].expand(len(group), 64)})             # more aspects than any head has
