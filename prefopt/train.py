"""The loop: source -> fill -> annotate -> micro-batches of forward and loss -> update. All methods, one or many processes.

Losses are plain sums weighted for the whole optimiser step, so micro-batches and processes add: gradients are summed over
processes once per step, with no averaging factor anywhere.
"""
from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_tools.batch import Batch
from data_tools.columns import nearest
from prefopt import checkpoints, folder, setup
from prefopt.config import Run, met
from prefopt.diagnose import EVALUATION_METRICS, combined
from prefopt.forward import fill, forward
from prefopt.models import Models
from prefopt.ops import processes, total
from prefopt.setup import has_adapters, load_models, load_reference, optimization, sampling, seed
from prefopt.sources import Dataset, Online


@dataclass(frozen=True)
class Result:
    """Where a run ended: last metrics (training and evaluation), the steps it took, its folder, and unmet expectations."""
    metrics: dict[str, float]
    steps: int
    out: Path
    failed: tuple[str, ...] = ()
    stopped: str = ""


def train(run: Run, *, resume: bool = False, show: bool = True) -> Result:
    """Run `run` to its end, or, with `resume`, go on from its last checkpoint exactly where it stopped.

    Writes metrics.jsonl, timing.jsonl, run.yaml, departures.yaml, versions.json, samples.jsonl, checkpoints/ and model/
    into `run.out`. Raises ValueError for settings and data that cannot work, before a model is loaded where possible.
    """
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()                                    # transformers' bars would break ours
    out, settings = Path(run.out), run.train
    checkpoint = checkpoints.latest(out / "checkpoints")
    if checkpoint and not resume:
        raise ValueError(f"{out} holds a run with a checkpoint at {checkpoint.name}: go on with it (--resume), or choose "
                         f"another folder (out=...)")
    accelerator = setup.accelerator(run)
    seed(settings.seed)
    objective = run.objective()
    reads = objective.reads()
    tokenizer = setup.tokenizer(run, objective)
    with accelerator.main_process_first():
        data, held_out = folder.datasets(run, tokenizer)
        if checkpoint:
            folder.same(run, data, held_out)
    cached = {"logp_ref"} & reads if run.data.cache_reference else set()
    if cached:
        with accelerator.main_process_first():
            data, held_out = folder.cache_reference(run, (data, held_out), partial(load_reference, run, accelerator.device),
                                                    accelerator.autocast)
    models = load_models(run, objective, tokenizer, checkpoint, accelerator.device, cached)
    source = Dataset(data, settings.groups_per_step, epochs=settings.epochs, seed=settings.seed, shuffle=settings.shuffle,
                     rank=accelerator.process_index, ranks=processes(), mismatched="mismatched" in reads,
                     columns=folder.columns(reads))
    if "online" in reads:
        source = Online(source, sampling(run, models, tokenizer))
    steps = settings.steps or source.steps
    optimizer, scheduler = optimization(run, models, objective, steps)
    optimizer = accelerator.prepare_optimizer(optimizer)
    reference = models.reference_trainable() if objective.reference.moves else None
    progress = {"step": 0, "last": {}, "stopped": "", "best": None, "best_step": 0, "evaluations_since": 0}
    saved = dict(optimizer=optimizer, scheduler=scheduler, source=source, objective=objective, reference=reference,
                 scaler=accelerator.scaler)
    if checkpoint:
        progress = checkpoints.read(checkpoint, **saved)
    if accelerator.is_main_process:
        folder.begin(run, objective, data, held_out, tokenizer, steps, progress["step"])
    if run.log:
        accelerator.init_trackers("prefopt", config={"run": json.dumps(run.model_dump())})

    update, batches, interrupted = run.update_rule(), iter(source), False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    visible = show and accelerator.is_main_process
    with (stop_signal(accelerator.device) as stopping, folder.progress_bar(steps, progress["step"], visible) as bar):
        while progress["step"] < steps and not (progress["stopped"] or interrupted):
            started, step = time.perf_counter(), progress["step"] + 1
            seed(settings.seed, step, accelerator.process_index)
            batch, other = next(batches)
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                batch = fill(models, batch, reads, tokens=settings.tokens, other=other and other.to(accelerator.device))
            batch = objective.annotate(batch)
            if step == 1 and run.reference is None and {"logp", "logp_ref"} <= reads:
                check_start(models, objective, batch, run, accelerator)

            logs = step % settings.log_every == 0 or step == steps

            def gradient(batch=batch, step=step, logs=logs) -> dict[str, float]:
                optimizer.zero_grad()
                sums: dict[str, Tensor] = {}
                for micro in batch.microbatches(settings.tokens):
                    with accelerator.autocast():
                        micro = forward(models, micro, reads)
                    loss = objective.loss(micro)
                    accelerator.backward(loss.value)
                    add(sums, {"loss": loss.value.detach(), **(loss.metrics if logs else {})})
                add_over_processes(parameters)
                accelerator.unscale_gradients(optimizer)
                sums["grad_norm"] = nn.utils.clip_grad_norm_(parameters, settings.clip or float("inf"))
                values = logged(sums)
                check_finite(values, step, out, scaled=accelerator.scaler is not None)
                return values

            lr = scheduler.get_last_lr()[0]
            values = update(parameters, optimizer, gradient)
            scheduler.step()
            source.feed(batch)
            progress["step"] = step
            progress["last"].update(values)
            if reference is not None:
                objective.reference.step(step, reference, [p for _, p in models.trainable()])
            if logs:
                line = {"step": step, "epoch": step / source.steps_per_epoch, "lr": lr, **values}
                folder.log(accelerator, out, line, step)
            tokens = int(total(batch["attend"].sum()))
            folder.timing(accelerator, out, step, tokens, time.perf_counter() - started)
            if held_out is not None and (step == steps or settings.eval_every and step % settings.eval_every == 0):
                found = evaluate(models, objective, held_out, run, accelerator)
                folder.log(accelerator, out, {"step": step, **found}, step)
                progress["last"].update(found)
                judge(progress, run, objective, models, accelerator, out)
            bar(step, tokens, progress["last"])
            done, interrupted = bool(progress["stopped"]) or step == steps, stopping()
            due = settings.save_every and (done or step % settings.save_every == 0)
            if accelerator.is_main_process and (due or interrupted and not done):
                here = out / "checkpoints" / f"step-{step:08d}"
                checkpoints.write(here, model=models.policy, tokenizer=tokenizer, progress=progress, **saved)
                checkpoints.prune(out / "checkpoints", settings.keep)
    finished = bool(progress["stopped"]) or progress["step"] >= steps
    if finished and accelerator.is_main_process:
        checkpoints.save_model(models.policy, tokenizer, out / "model", objective, folder.card(run))
    accelerator.wait_for_everyone()
    if run.log:
        accelerator.end_training()
    if not finished:
        return Result(progress["last"], progress["step"], out, stopped="interrupted")
    return Result(progress["last"], progress["step"], out, tuple(unmet(run.expect, progress["last"])), progress["stopped"])


# ---------------------------------------------------------------------------------------------------------- one step
def add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for key, value in values.items():
        sums[key] = sums[key] + value if key in sums else value


def add_over_processes(parameters) -> None:
    """Sum gradients over processes; losses are already weighted for the whole step. What was not used has gradient 0."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if processes() > 1:
            dist.all_reduce(p.grad)


def logged(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Weighted sums -> numbers, over all processes, in one transfer. The gradient norm is already the same everywhere."""
    keys = [k for k in sums if k != "grad_norm"]
    values = total(torch.stack([sums[k].double() for k in keys])).tolist()
    return {**combined(dict(zip(keys, values, strict=True))), "grad_norm": float(sums["grad_norm"])}


def check_finite(metrics: Mapping[str, float], step: int, out: Path, *, scaled: bool) -> None:
    """Stop before the optimiser sees a gradient that is not finite. With loss scaling (fp16) it skips such a step itself."""
    for key in ("loss", *(() if scaled else ("grad_norm",))):
        if not np.isfinite(metrics[key]):
            raise FloatingPointError(f"{key} is {metrics[key]} at step {step}: the run stops before it trains on it. Lower "
                                     f"train.lr, set train.clip, or use another train.precision; the last checkpoint in "
                                     f"{out / 'checkpoints'} is whole")


@torch.no_grad()
def check_start(models: Models, objective, batch: Batch, run: Run, accelerator) -> None:
    """At the first step the policy is the reference, so the loss must be the recipe's constant. Anything else is a bug."""
    micro = next(batch.microbatches(run.train.tokens))
    with evaluating(*objective.modules()):                    # their dropout is no mistake
        with accelerator.autocast():
            micro = forward(models, micro, objective.reads())
        value, expected = (float(objective.loss(m).value) for m in (micro, micro.with_columns(logp=micro["logp_ref"])))
    gap = float((micro["logp"] - micro["logp_ref"])[micro["mask"].bool()].abs().max())
    exact = run.policy.dtype in ("float32", "float64") and run.train.precision == "no" and not run.policy.quantize
    if gap > (1e-3 if exact else 0.5) or (exact and abs(value - expected) > 1e-2 * max(abs(expected), 1e-3)):
        raise ValueError(f"at the start the policy differs from its reference: largest gap of a token's log-probability "
                         f"{gap:.2g}, loss {value:.6g} instead of {expected:.6g}. Check dropout, the cached "
                         f"reference (data.cache_reference) and policy.name")


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
            for micro in batch.microbatches(run.train.tokens):
                with accelerator.autocast():
                    micro = forward(models, micro, reads)
                loss = objective.loss(micro)
                add(found, {"loss": loss.value, **loss.metrics, **objective.measure(micro, EVALUATION_METRICS)})
            values = total(torch.stack([v.double() for v in found.values()])).tolist()
            for key, value in zip(found, values, strict=True):
                sums[key] = sums.get(key, 0.0) + value * len(source.indices(i)) / len(data)
            for key, part in objective.states().items():
                part.load_state_dict(memory[key])
    return {f"eval/{k}": v for k, v in combined(sums).items()}


def judge(progress: dict, run: Run, objective, models: Models, accelerator, out: Path) -> None:
    """Keep the best model by the held-out metric, and say in `progress` when to stop."""
    metric, patience, last = run.train.metric, run.train.patience, progress["last"]
    if metric not in last:
        raise ValueError(f"train.metric {metric!r} is not measured{nearest(metric, last)}; measured: "
                         f"{', '.join(sorted(k for k in last if k.startswith('eval/')))}")
    value = -last[metric] if "loss" in metric or metric.startswith("eval/kl") else last[metric]
    if np.isfinite(value) and (progress["best"] is None or value > progress["best"]):
        progress.update(best=value, best_step=progress["step"], evaluations_since=0)
        if patience and accelerator.is_main_process:
            checkpoints.save_model(models.policy, models.tokenizer, out / "best", objective, folder.card(run))
    else:
        progress["evaluations_since"] += 1
    if patience and progress["evaluations_since"] >= patience:
        progress["stopped"] = f"{metric} has not improved for {patience} evaluations; best at step {progress['best_step']}"


def unmet(expect: Mapping[str, str], last: Mapping[str, float]) -> Iterator[str]:
    for metric, condition in expect.items():
        if metric not in last:
            yield f"{metric} was not measured"
        elif not met(condition, last[metric], metric):
            yield f"{metric} = {last[metric]:.4g}, expected {condition}"


@contextmanager
def stop_signal(device) -> Iterator[Callable[[], bool]]:
    """Ctrl-C finishes the step and saves; a second one stops at once. All processes agree on it."""
    caught = []

    def handler(signum, frame):
        caught.append(signum)
        if len(caught) > 1:
            raise KeyboardInterrupt
        print("\nstopping after this step and saving; press Ctrl-C again to stop at once", flush=True)

    try:
        before = [(s, signal.signal(s, handler)) for s in (signal.SIGINT, signal.SIGTERM)]
    except ValueError:                                        # not in the main thread: whoever runs us handles signals
        before = []
    try:
        yield lambda: bool(total(torch.tensor(float(len(caught)), device=device)) > 0)
    finally:
        for number, old in before:
            signal.signal(number, old)
