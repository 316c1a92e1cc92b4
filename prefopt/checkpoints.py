"""Checkpoints: everything that a run needs to go on bit for bit. No pickles: safetensors and JSON.

A checkpoint is written into a temporary folder and renamed, so that a full disk, Ctrl-C or kill leaves the last good one.
The state of random generators is not among it: every step seeds them anew (`prefopt.setup.seed`).
"""
from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from prefopt import sharding
from prefopt.ops import is_first
from prefopt.parts import Stateful
from prefopt.sharding import collected, divided


def write(folder: Path, *, model: nn.Module, tokenizer, optimizer, scheduler, source, objective, reference: list | None,
          progress: dict, critic: nn.Module | None = None, scaler=None, average: list | None = None) -> None:
    """Write a checkpoint to `folder`, atomically. All processes call it, the first one writes."""
    tensors, plain = flat_optimizer(optimizer.state_dict())
    for i, module in enumerate(objective.modules()):
        tensors.update({f"module.{i}.{k}": v for k, v in module.state_dict().items()})
    if reference is not None:
        tensors.update({f"reference.{i}": t for i, t in enumerate(reference)})
    tensors.update({f"average.{i}": t for i, t in enumerate(average or ())})
    if isinstance(objective.reference, Stateful):             # tensors that a rule remembers
        tensors.update({f"rule.{i}": t for i, t in enumerate(objective.reference.state_dict()["before"])})
    state = {"optimizer": plain, "scheduler": scheduler.state_dict(), "source": source.state_dict(),
             "parts": {k: p.state_dict() for k, p in objective.states().items()}, "progress": progress,
             "scaler": scaler.state_dict() if scaler else None}
    with whole(folder) as temporary:
        sharding.save(model, temporary / "model")
        if critic is not None:
            sharding.save(critic, temporary / "critic")
        tensors = collected(tensors.items())
        if is_first():
            tokenizer.save_pretrained(temporary / "model")
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary / "state.safetensors")
            (temporary / "state.json").write_text(json.dumps(state))


def save_model(model: nn.Module, tokenizer, folder: Path, objective, card: dict) -> None:
    """An ordinary transformers (or PEFT adapter) folder, safetensors only, atomically; learned parts (token masks, heads)
    beside it in objective.safetensors, and in prefopt.json what the model was trained as (`card`) and parts with memory. All
    processes call it, the first one writes."""
    learned = {f"{i}.{k}": v.detach().cpu().contiguous() for i, m in enumerate(objective.modules())
               for k, v in m.state_dict().items()}
    with whole(folder) as temporary:
        sharding.save(model, temporary)
        if not is_first():
            return
        tokenizer.save_pretrained(temporary)
        if learned:
            save_file(learned, temporary / "objective.safetensors")
        memory = {key: part.state_dict() for key, part in objective.states().items()}
        (temporary / "prefopt.json").write_text(json.dumps({**card, "memory": memory}, indent=1))


def read_parts(folder: Path, objective) -> None:
    """Put learned parts and parts with memory back that `save_model` wrote; what is not there starts anew, with a warning."""
    modules, learned, card = objective.modules(), folder / "objective.safetensors", folder / "prefopt.json"
    if modules and not learned.exists():
        warnings.warn(f"{folder} holds no objective.safetensors: the learned parts of the recipe start anew, so that its "
                      f"loss and scores mean nothing", stacklevel=2)
    elif modules:
        tensors = load_file(learned)
        for n, module in enumerate(modules):
            module.load_state_dict({k.removeprefix(f"{n}."): v for k, v in tensors.items() if k.startswith(f"{n}.")})
    memory = json.loads(card.read_text()).get("memory", {}) if card.exists() else {}
    for key, part in objective.states().items():
        if key in memory:
            part.load_state_dict(memory[key])


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends, and vanishes when the block fails. Processes
    but the first one get a name alone."""
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    if not is_first():
        yield temporary
        return
    for left in (temporary, old):                             # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file or folder on disk, not only in the system's memory."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read(folder: Path, *, optimizer, scheduler, source, objective, reference: list | None, critic=None,
         scaler=None, average: list | None = None) -> dict:
    """Put everything but the models' weights back, and return the progress. The weights are in `folder / 'model'` and, of a
    critic, in `folder / 'critic'`."""
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "state.safetensors")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {n: value if not n.startswith("optimizer.") else divided(value, parameters[int(n.split(".")[1])])
            for n, value in tensors.items()}
    optimizer.load_state_dict(full_optimizer(kept, state["optimizer"]))
    scheduler.load_state_dict(state["scheduler"])
    source.load_state_dict(state["source"])
    for i, module in enumerate(objective.modules()):
        prefix = f"module.{i}."
        module.load_state_dict({k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)})
    for key, part in objective.states().items():
        part.load_state_dict(state["parts"][key])
    if isinstance(objective.reference, Stateful):
        before = [tensors[f"rule.{i}"] for i in range(sum(n.startswith("rule.") for n in tensors))]
        like = reference or before
        objective.reference.load_state_dict({"before": [divided(t, r).to(r.device) for t, r in zip(before, like, strict=True)]
                                             if before else []})
    with torch.no_grad():
        for name, moved in (("reference", reference), ("average", average)):
            for i, t in enumerate(moved or ()):
                t.copy_(divided(tensors[f"{name}.{i}"], t))
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state["progress"]


def flat_optimizer(state: Mapping) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimiser's state as tensors by name and the plain rest."""
    tensors, numbers = {}, {}
    for i, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{i}.{key}"] = value
            else:
                numbers[f"{i}.{key}"] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def full_optimizer(tensors: Mapping[str, torch.Tensor], plain: dict) -> dict:
    state: dict = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            state.setdefault(int(i), {})[key] = value
    for name, value in plain["numbers"].items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = value
    return {"state": state, "param_groups": plain["groups"]}


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none; a warning names damaged ones that are passed over.

    Raises ValueError when there are only damaged ones: starting anew would throw the run away.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    wrong = {}
    for checkpoint in found:
        if not (problem := damage(checkpoint)):
            break
        wrong[checkpoint.name] = problem
    said = "; ".join(f"{name}: {problem}" for name, problem in wrong.items())
    if wrong and len(wrong) == len(found):
        raise ValueError(f"no checkpoint in {folder} is whole ({said}): delete the folder to start the run anew")
    if wrong:
        warnings.warn(f"damaged checkpoints in {folder} are passed over: {said}", stacklevel=2)
    return found[len(wrong)] if found else None


def damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being read, None for nothing. Looks at sizes and headers, not at every byte."""
    if not any((checkpoint / "model").glob("*.safetensors")):
        return "it has no model"
    try:
        json.loads((checkpoint / "state.json").read_text())
        for path in (checkpoint / "state.safetensors", *(checkpoint / "model").glob("*.safetensors")):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return f"{error}"
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed processes left half-written."""
    for old in (*sorted(folder.glob("step-*"))[:-keep], *folder.glob(".step-*")):
        shutil.rmtree(old)
