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
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_tools.batch import Batch
from prefopt import checkpoints, folder, online, setup
from prefopt.config import Run, met
from prefopt.diagnose import combined
from prefopt.forward import fill, forward, pieces
from prefopt.held_out import evaluate, evaluating, judge
from prefopt.models import Models
from prefopt.ops import processes, total
from prefopt.setup import follower, load_frozen, load_models, optimization, seed, source_of
from prefopt.sharding import clip
from prefopt.speed import Meter


@dataclass(frozen=True)
class Result:
    """Where a run ended: last metrics (training and evaluation), the steps it took, its folder, unmet expectations, and how fast
    it was."""
    metrics: dict[str, float]
    steps: int
    out: Path
    failed: tuple[str, ...] = ()
    stopped: str = ""
    speed: str = ""


def train(run: Run, *, resume: bool = False, show: bool = True, score: Callable | None = None) -> Result:
    """Run `run` to its end, or, with `resume`, go on from its last checkpoint exactly where it stopped.

    `score` fills in the rewards of sampled groups, in the place of what `rollout.rewards` names.

    Writes metrics.jsonl, timing.jsonl, run.yaml, departures.yaml, versions.json, samples.jsonl or rollouts/, checkpoints/
    and model/ into `run.out`. Raises ValueError for settings and data that cannot work, before a model is loaded where
    possible.
    """
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()                                    # transformers' bars would break ours
    out, settings = Path(run.out), run.train
    if run.iterate:
        raise ValueError("this run has a block iterate, whose rounds are trained one by one: call prefopt.iterate.iterate(run)")
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
    known = {"logp_ref": folder.frozen_policy(run)} if run.data.cache_reference else {}
    known |= {"logp_old": run.policy} if run.data.cache_start else {}
    cached = {column: model for column, model in known.items() if column in reads}
    for column, model in cached.items():
        load = partial(load_frozen, model, accelerator.device, packing=run.train.packing)
        with accelerator.main_process_first():
            data, held_out = folder.cached(run, column, model, (data, held_out), load, accelerator.autocast)
    scorer = online.scorer(run) if run.rollout and score is None else None
    score = score or scorer
    models = load_models(run, objective, tokenizer, checkpoint, accelerator.device, cached, online.roles(run, scorer))
    average = follower(run, models)
    engine = online.sampler(run, models, tokenizer, average and average.model) if run.rollout and online.samples(run) else None
    source = source_of(run, data, models, tokenizer, objective, accelerator, engine, score)
    steps = settings.steps or source.steps
    optimizer, scheduler = optimization(run, models, objective, steps)
    optimizer = accelerator.prepare_optimizer(optimizer)
    reference = models.reference_trainable() if objective.reference.moves else None
    progress = {"step": 0, "last": {}, "stopped": "", "best": None, "best_step": 0, "evaluations_since": 0}
    saved = dict(optimizer=optimizer, scheduler=scheduler, source=source, objective=objective, reference=reference,
                 critic=models.critic, scaler=accelerator.scaler, average=average and average.own)
    if checkpoint:
        progress = checkpoints.read(checkpoint, **saved)
    if accelerator.is_main_process:
        folder.begin(run, objective, data, held_out, tokenizer, steps, progress["step"])
    if run.log:
        accelerator.init_trackers("prefopt", config={"run": json.dumps(run.model_dump())})

    update, batches, interrupted = run.update_rule(), iter(source), False
    gradients = Gradients(run, models, objective, accelerator, optimizer)
    parameters, meter = gradients.parameters, Meter(models, accelerator.device)
    frozen = reads - ({"logp_now", "logp_old"} if run.rollout and online.at_once(run, objective) else {"logp_now"})
    sizes = dict(tokens=settings.tokens, whole_groups=objective.whole_groups)
    visible = show and accelerator.is_main_process
    with (stop_signal(accelerator.device) as stopping, folder.progress_bar(steps, progress["step"], visible) as bar):
        while progress["step"] < steps and not (progress["stopped"] or interrupted):
            started, step = time.perf_counter(), progress["step"] + 1
            seed(settings.seed, step, accelerator.process_index)
            if run.rollout and not run.rollout.recorded:
                online.sync(engine, models, step - 1)
            batch, other = next(batches)
            batch = batch.to(accelerator.device)
            wanted = frozen | ({"logp_old"} if step == 1 and run.rollout else set())      # to compare sampler and trainer
            with accelerator.autocast():
                batch = fill(models, batch, wanted, other=other and other.to(accelerator.device), **sizes)
            drawn, batch = batch, objective.estimate(batch)
            logs = step % settings.log_every == 0 or step == steps
            measured = source.metrics() if run.rollout and (logs or step == 1) else {}
            if step == 1 and run.rollout:
                online.check_rollout(run, batch, measured, exact(run))

            found: list[dict[str, float]] = []
            for part in online.updates(batch, run, step):
                if "logp_now" in reads:                       # the rollout's own on its first update
                    with accelerator.autocast():
                        part = fill(models, part, {"logp_now"} if found else set(), **sizes)
                    if "logp_now" not in part:
                        part = part.with_columns(logp_now=part["logp_old"])
                part = objective.annotate(part)
                if step == 1 and not found and run.reference is None and {"logp", "logp_ref"} <= reads:
                    check_start(models, objective, part, run, accelerator)
                if run.rollout is None or online.weighs(part):
                    found.append(update(parameters, optimizer, Step(gradients, part, step, logs, source, drawn)))
            values = {**measured, **mean(found)}
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            source.feed(batch)
            progress["step"] = step
            progress["last"].update(values)
            if average is not None:
                average.step(step)
            if reference is not None:
                objective.reference.step(step, reference, [p for _, p in models.trainable()])
            if logs:
                line = {"step": step, "epoch": step / source.steps_per_epoch, "lr": lr, **values}
                folder.log(accelerator, out, line, step)
            tokens = int(total(batch["attend"].sum()))
            folder.timing(accelerator, out, step, meter.step(tokens, time.perf_counter() - started))
            if held_out is not None and (step == steps or settings.eval_every and step % settings.eval_every == 0):
                values = online.evaluate(run, held_out, engine, score, models, accelerator, step) if run.rollout else \
                    evaluate(models, objective, held_out, run, accelerator)
                folder.log(accelerator, out, {"step": step, **values}, step)
                progress["last"].update(values)
                judge(progress, run, objective, models, accelerator, out)
            bar(step, tokens, progress["last"])
            done, interrupted = bool(progress["stopped"]) or step == steps, stopping()
            due = settings.save_every and (done or step % settings.save_every == 0)
            if due or interrupted and not done:
                here = out / "checkpoints" / f"step-{step:08d}"
                checkpoints.write(here, model=models.policy, tokenizer=tokenizer, progress=progress, **saved)
                if accelerator.is_main_process:
                    checkpoints.prune(out / "checkpoints", settings.keep)
    finished = bool(progress["stopped"]) or progress["step"] >= steps
    if finished:
        checkpoints.save_model(models.policy, tokenizer, out / "model", objective, folder.card(run))
    for helper in filter(None, (engine, scorer)):
        helper.close()
    accelerator.wait_for_everyone()
    if run.log:
        accelerator.end_training()
    if not finished:
        return Result(progress["last"], progress["step"], out, (), "interrupted", meter.summary())
    failed = tuple(unmet(run.expect, progress["last"]))
    return Result(progress["last"], progress["step"], out, failed, progress["stopped"], meter.summary())


# ---------------------------------------------------------------------------------------------------------- one step
@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss of an optimiser step, which an update rule may take as often as it likes."""
    run: Run
    models: Models
    objective: object
    accelerator: object
    optimizer: object

    @cached_property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @cached_property
    def owners(self) -> dict[str, list[Tensor]]:
        """What is clipped together, by the metric of its norm."""
        critic = {id(p) for p in self.models.critic.parameters()} if self.models.critic else set()
        found = {"grad_norm": [p for p in self.parameters if id(p) not in critic],
                 "grad_norm/critic": [p for p in self.parameters if id(p) in critic]}
        return {name: own for name, own in found.items() if own}

    def of(self, part: Batch, step: int, logs: bool) -> dict[str, float]:
        """Leaves the gradient in the parameters, summed over micro-batches and processes and clipped; metrics come back."""
        run, models, accelerator, sums = self.run, self.models, self.accelerator, {}
        reads = self.objective.reads() | ({"entropy"} if logs and run.rollout else set())
        self.optimizer.zero_grad()
        for (_, micro), counts in pieces(models, online.weighing(part), run.train.tokens, self.objective.whole_groups):
            with accelerator.autocast():
                micro = forward(models, micro, reads)
            loss = self.objective.loss(micro)
            accelerator.backward(loss.value if counts else 0 * loss.value)
            if counts:
                add(sums, {"loss": loss.value.detach(), **(loss.metrics if logs else {})})
        add_over_processes(self.parameters)
        accelerator.unscale_gradients(self.optimizer)
        for owner, own in self.owners.items():
            sums[owner] = clip(own, run.train.clip or float("inf"))
        values = logged(sums)
        check_finite(values, step, Path(run.out), scaled=accelerator.scaler is not None)
        return values


@dataclass
class Step:
    """An optimiser step as its update rule sees it (`prefopt.update.Gradient`). `drawn` is the rollout before advantages."""
    gradients: Gradients
    part: Batch
    step: int
    logs: bool
    source: object
    drawn: Batch

    def __call__(self) -> dict[str, float]:
        return self.gradients.of(self.part, self.step, self.logs)

    def renew(self) -> None:
        """Fresh opponents of the policy as it is now: the same responses have other rewards."""
        fresh = {c: v.to(self.drawn.index.device) for c, v in self.source.renewed(self.step).items()}
        now = {c: self.part[c] for c in ("logp_now",) if c in self.part}
        objective = self.gradients.objective
        self.part = objective.annotate(objective.estimate(self.drawn.with_columns(**fresh, **now)))


def add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for key, value in values.items():
        sums[key] = sums[key] + value if key in sums else value


def add_over_processes(parameters) -> None:
    """Sum gradients over processes, but for those of divided layers, which are summed already; losses are weighted for the
    whole step. What was not used has gradient 0."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if processes() > 1 and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)


def logged(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Weighted sums -> numbers, over all processes, in one transfer. Gradient norms are already the same everywhere."""
    norms = {k: float(v) for k, v in sums.items() if k.startswith("grad_norm")}
    keys = [k for k in sums if k not in norms]
    values = total(torch.stack([sums[k].double() for k in keys])).tolist()
    return {**combined(dict(zip(keys, values, strict=True))), **norms}


def mean(found: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the updates of a step."""
    return {k: sum(f[k] for f in found) / len(found) for k in (found[0] if found else {})}


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
    (_, micro), _ = next(pieces(models, batch, run.train.tokens, objective.whole_groups))
    with evaluating(*objective.modules()):                    # their dropout is no mistake
        with accelerator.autocast():
            micro = forward(models, micro, objective.reads())
        value, expected = (float(objective.loss(m).value) for m in (micro, micro.with_columns(logp=micro["logp_ref"])))
    gap = float((micro["logp"] - micro["logp_ref"])[micro["mask"].bool()].abs().max())
    if gap > (1e-3 if exact(run) else 0.5) or (exact(run) and abs(value - expected) > 1e-2 * max(abs(expected), 1e-3)):
        raise ValueError(f"at the start the policy differs from its reference: largest gap of a token's log-probability "
                         f"{gap:.2g}, loss {value:.6g} instead of {expected:.6g}. Check dropout, the cached "
                         f"reference (data.cache_reference) and policy.name")


def exact(run: Run) -> bool:
    """Whether the policy computes in float32 or better."""
    return run.policy.dtype in ("float32", "float64") and run.train.precision == "no" and not run.policy.quantize


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
