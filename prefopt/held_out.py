"""Judging a policy on held-out data while it trains: the metrics of training, early stopping, the best model."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_tools.columns import nearest
from prefopt import checkpoints, folder
from prefopt.config import Run
from prefopt.diagnose import EVALUATION_METRICS, combined
from prefopt.forward import fill, forward, pieces
from prefopt.models import Models
from prefopt.ops import processes, total
from prefopt.setup import has_adapters, sampling, seed
from prefopt.sources import Dataset, Online


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, and afterwards as they were."""
    before = [m.training for m in modules]
    try:
        for m in modules:
            m.eval()
        yield
    finally:
        for m, training in zip(modules, before, strict=True):
            m.train(training)


@torch.no_grad()
def evaluate(models: Models, objective, data, run: Run, accelerator) -> dict[str, float]:
    """Metrics on held-out groups, weighted by group; parts with memory and modules are put back as they were.

    kl/ref needs the reference itself, so it is not measured where only its cached log-probabilities are there.
    """
    seed(run.train.seed, 0, accelerator.process_index)
    memory = {k: p.state_dict() for k, p in objective.states().items()}
    reads, rank = objective.reads(), accelerator.process_index
    if "logp_ref" in reads and (models.reference is not None or has_adapters(run)):
        reads = reads | {"token_kl"}
    source = Dataset(data, run.train.groups_per_step, shuffle=False, rank=rank, ranks=processes(),
                     mismatched="mismatched" in reads, columns=folder.columns(reads))
    if "online" in reads:
        source = Online(source, sampling(run, models, models.tokenizer))
    sums: dict[str, float] = {}
    with evaluating(models.policy, *objective.modules()):
        for i in range(source.steps_per_epoch):
            batch, other = (b and b.to(accelerator.device) for b in source.take(source.indices(i)))
            with accelerator.autocast():
                batch = fill(models, batch, reads, tokens=run.train.tokens, other=other)
            batch = objective.annotate(batch)
            found: dict[str, Tensor] = {}
            for (_, micro), counts in pieces(models, batch, run.train.tokens):
                with accelerator.autocast():
                    micro = forward(models, micro, reads)
                if not counts:
                    continue
                loss = objective.loss(micro)
                for key, value in {"loss": loss.value, **loss.metrics, **objective.measure(micro, EVALUATION_METRICS)}.items():
                    found[key] = found[key] + value if key in found else value
            values = total(torch.stack([v.double() for v in found.values()])).tolist()
            for key, value in zip(found, values, strict=True):
                sums[key] = sums.get(key, 0.0) + value * len(source.indices(i)) / len(data)
            for key, part in objective.states().items():
                part.load_state_dict(memory[key])
    return {f"eval/{k}": v for k, v in combined(sums).items()}


def judge(progress: dict, run: Run, objective, models: Models, accelerator, out: Path) -> None:
    """Keep the best model by the held-out metric, and say in `progress` when to stop."""
    metric = run.train.metric or ("eval/reward" if run.rollout else "eval/loss")
    patience, last = run.train.patience, progress["last"]
    if run.train.metric is None and metric not in last:       # no response could be scored
        return
    if metric not in last:
        raise ValueError(f"train.metric {metric!r} is not measured{nearest(metric, last)}; measured: "
                         f"{', '.join(sorted(k for k in last if k.startswith('eval/')))}")
    value = -last[metric] if "loss" in metric or metric.startswith("eval/kl") else last[metric]
    if np.isfinite(value) and (progress["best"] is None or value > progress["best"]):
        progress.update(best=value, best_step=progress["step"], evaluations_since=0)
        if patience:
            checkpoints.save_model(models.policy, models.tokenizer, out / "best", objective, folder.card(run))
    else:
        progress["evaluations_since"] += 1
    if patience and progress["evaluations_since"] >= patience:
        progress["stopped"] = f"{metric} has not improved for {patience} evaluations; best at step {progress['best_step']}"
