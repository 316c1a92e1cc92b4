"""What a run starts from: processes, seeds, models, the optimiser with its schedule, the source of its groups."""
from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prefopt import folder, online
from prefopt.config import Model, Run
from prefopt.forward import frozen_models, needs_critic
from prefopt.models import Head, Models, Trunk, frozen_copy, head_of, load_policy, load_tokenizer, prepare_padding
from prefopt.ops import processes
from prefopt.references import Moving
from prefopt.sharding import check_launch, shard
from prefopt.sources import Dataset, Online


def accelerator(run: Run):
    """Accelerate's view of the machine: device, processes, precision, trackers. May be asked for again by a later run.

    Several processes are those of `torchrun --nproc_per_node 2 -m prefopt train run.yaml`; without a GPU they talk over
    gloo. `accelerate launch --multi_gpu` does as well, but `accelerate launch --cpu --num_processes 2` starts only one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
    check_launch(run.train.shard)
    AcceleratorState._reset_state(reset_partial_state=True)   # an earlier run may have had another precision or device
    if absent := [tracker for tracker in run.log if find_spec(tracker) is None]:
        raise ImportError(f"log asks for {absent[0]}, which is not installed: pip install {absent[0]}, or leave it out")
    cpu = run.train.device == "cpu" or not torch.accelerator.is_available()
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))          # while one prepares data, writes, or samples
    found = Accelerator(mixed_precision=run.train.precision, cpu=cpu, log_with=run.log or None, project_dir=run.out,
                        kwargs_handlers=[patient, AutocastKwargs(cache_enabled=not run.train.shard)])      # of whole copies
    if run.train.precision == "fp16" and found.scaler is None:
        raise ValueError(f"train.precision=fp16 needs a GPU, and this is {found.device.type}: set it to bf16 or no")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if found.num_processes != launched:                       # each would train alone and write over the others
        raise ValueError(f"{launched} processes were launched (WORLD_SIZE), but they form {found.num_processes} group on "
                         f"{found.device}: launch them with torchrun or accelerate launch, or set train.device=cpu")
    if found.device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    return found


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the kernel when they are freed, and faults them in again page by page when the next step
    asks for them: a tenth of a step on a CPU. From now on the process keeps what it has had."""
    trim_threshold, mmap_threshold = -1, -3                   # malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):                              # musl has none
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def seed(*numbers: int) -> None:
    """Seed all generators from (seed, step, process), once per step: noise has no state, so that a resumed run draws what
    it would have drawn, and an evaluation takes nothing from training. Step 0 is the start, and every evaluation."""
    from accelerate.utils import set_seed
    set_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def tokenizer(run: Run, objective):
    """The run's tokenizer, or the policy's; for a reward model with padding that its saved folder can be used with."""
    found = load_tokenizer(run.tokenizer or run.policy.name, trust_remote_code=run.policy.trust_remote_code,
                           revision=None if run.tokenizer else run.policy.revision)
    if objective.outputs:
        prepare_padding(found)
    return found


def load_models(run: Run, objective, tokenizer, checkpoint: Path | None, device, cached: Collection[str] = (),
                roles: Collection[str] = ()) -> Models:
    """The policy (from the checkpoint when resuming), and the reference where a column that is not `cached` needs it, or where
    responses are drawn from it (`roles`).

    Sharded models are read on the CPU, and go to the device share by share.
    """
    place = "cpu" if run.train.shard else device
    own, moves = run.policy.model_dump(), objective.reference.moves
    head = head_of(objective)
    policy = load_policy(**{**own, "name": str(checkpoint / "model"), "revision": None, "lora": None} if checkpoint else own,
                         head=head)
    if head.outputs:
        prepare_padding(tokenizer, policy)
    policy.to(place)
    needed = frozen_models(objective.reads().difference(cached)) or "reference" in roles
    if not needed or (has_adapters(run) and not moves):
        reference = None                                      # the policy with its fresh adapters off, where it has them
    elif run.reference is None and (moves or not checkpoint):
        reference = frozen_copy(policy)                       # a checkpoint knows where it has moved to
    else:
        reference = load_frozen(folder.frozen_policy(run), place).policy
    critic = load_critic(run, checkpoint, place) if needs_critic(objective.reads()) else None
    if run.train.shard:
        for model in filter(None, (policy, reference, critic)):
            shard(model, device)
    models = Models(policy, reference, tokenizer, critic, run.rollout.temperature if run.rollout else 1.0, run.train.shard,
                    run.train.packing)
    for module in objective.modules():
        module.setup(layers=models.policy_model().layer_count, width=models.policy_model().width)
        module.to(device)
    return models


@dataclass(frozen=True)
class Follower:
    """A model that starts as the policy and follows its weights. What does not train is shared with it."""
    model: nn.Module
    rule: Moving
    own: list[Tensor]
    leading: list[Tensor]

    def step(self, step: int) -> None:
        self.rule.step(step, self.own, self.leading)


def follower(run: Run, models: Models) -> Follower | None:
    """The averaged policy that the run's program lets play, None without one."""
    if "average" not in online.roles(run):
        return None
    model, leading = frozen_copy(models.policy), models.trainable()
    own = dict(model.named_parameters())
    return Follower(model, run.program().follow, [own[name] for name, _ in leading], [p for _, p in leading])


def load_frozen(settings: Model, device, *, packing: bool = True) -> Models:
    """A model alone, as policy and as reference."""
    model = load_policy(**settings.model_dump()).requires_grad_(False).eval().to(device)
    return Models(model, model, packing=packing)


def load_critic(run: Run, checkpoint: Path | None, device):
    """A model with one output per token: the run's critic, or the policy's body under a new head, or the checkpoint's.

    A new head starts at 0, so that all values do.
    """
    own = (run.critic or run.policy.model_copy(update={"lora": None})).model_dump()
    critic = load_policy(**{**own, "name": str(checkpoint / "critic"), "revision": None, "lora": None} if checkpoint else own,
                         head=Head("AutoModelForTokenClassification", "TOKEN_CLS", 1)).to(device)
    if run.critic is None and not checkpoint:
        for p in Trunk(critic).output.parameters():
            nn.init.zeros_(p)
    return critic


def has_adapters(run: Run) -> bool:
    """Whether the policy with its adapters off is the reference."""
    return run.reference is None and run.policy.lora is not None


def optimization(run: Run, models: Models, objective, steps: int):
    """The optimiser (policy with and without weight decay, learned parts and the critic apart) and the schedule."""
    t = run.train
    named = models.trainable()
    groups = [{"params": [p for _, p in named if p.ndim >= 2], "weight_decay": t.weight_decay},
              {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}]
    modules = [p for m in objective.modules() for p in m.parameters()]
    groups.append({"params": modules, "weight_decay": t.modules.weight_decay, "lr": t.modules.lr or t.lr})
    critic = [p for p in models.critic.parameters() if p.requires_grad] if models.critic else []
    groups.append({"params": critic, "weight_decay": t.critic.weight_decay, "lr": t.critic.lr or t.lr})
    optimizer = run.make_optimizer()([g for g in groups if g["params"]])
    from transformers import get_scheduler
    warmup = round(t.warmup * steps) if t.warmup < 1 else int(t.warmup)
    kind = "constant_with_warmup" if t.schedule == "constant" else t.schedule
    return optimizer, get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def sampling(run: Run, models: Models, tokenizer) -> Callable:
    """Fresh responses of the current policy for recipes that read online rows."""
    from prefopt.rollout.transformers import continuations
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos or 0
    settings = dict(n=run.train.online.k, max_new_tokens=run.train.online.max_new_tokens, pad=pad, eos=eos,
                    temperature=run.train.online.temperature)
    device = next(models.policy.parameters()).device
    return lambda prompts: [[r.cpu() for r in rows] for rows in
                            continuations(models.policy, [p.to(device) for p in prompts], **settings)]


def source_of(run: Run, data, models: Models, tokenizer, objective, accelerator, engine, score):
    """The groups of each step: a prepared data set, with fresh responses beside it where a recipe reads them, or rollouts."""
    if run.rollout:
        return online.rollouts(run, data, engine, score, models, tokenizer, objective, accelerator)
    t, reads = run.train, objective.reads()
    found = Dataset(data, t.groups_per_step, epochs=t.epochs, seed=t.seed, shuffle=t.shuffle, rank=accelerator.process_index,
                    ranks=processes(), mismatched="mismatched" in reads, columns=folder.columns(reads))
    return Online(found, sampling(run, models, tokenizer)) if "online" in reads else found
