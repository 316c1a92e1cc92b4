"""The run folder: prepared data, what was run, what was measured, what the model saw. And the progress bar."""
from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import glob
from hashlib import blake2b, file_digest
from importlib import metadata
from pathlib import Path

import numpy as np
import yaml

from data_tools.columns import COLUMNS
from data_tools.fields import DataError
from prefopt.config import Model, Run, assemble, make
from prefopt.forward import FROZEN, GRADIENT, fill
from prefopt.models import Models
from prefopt.objectives import Term
from prefopt.ops import processes
from prefopt.parts import hyperparameters, kind, to_spec
from prefopt.policy import Penalty


# ------------------------------------------------------------------------------------------------------------- data
def groups(run: Run, held_out: bool):
    """The run's groups, read, checked and (on purpose, at a known rate) flipped, lazily."""
    from data_tools import labels, validate
    d, found, objective = run.data, loaded(run, held_out), run.objective()
    pairs = kind(objective.ranking) == "Pairs"
    needed = (validate.paired if pairs else validate.labelled,) if "relevance" in objective.reads() else ()
    found = validate.checked(found, on_bad=d.on_bad, checks=(*validate.CHECKS, *needed))
    return labels.flip(found, rate=d.flip, seed=run.train.seed) if d.flip and not held_out else found


def loaded(run: Run, held_out: bool):
    """The run's records as groups, as `data` says, lazily."""
    from data_tools import formats
    d = run.data
    return formats.load(d.eval if held_out else d.train, format=d.format, streaming=d.streaming, columns=d.columns,
                        split=d.eval_split if held_out else d.split, limit=d.eval_limit if held_out else d.limit)


def datasets(run: Run, tokenizer):
    """Prepared training and held-out data: tokenised once, memory-mapped, kept in data.cache under what made them; of an
    on-policy run prompts."""
    if run.rollout:
        from prefopt.online import prompts
        return tuple(prompts(run, tokenizer, held_out=h) if run.data.eval or not h else None for h in (False, True))
    return tuple(dataset(run, tokenizer, held_out) if run.data.eval or not held_out else None for held_out in (False, True))


def dataset(run: Run, tokenizer, held_out: bool):
    from data_tools.prepare import prepare, tokenizer_fingerprint
    d = run.data
    sources = d.eval if held_out else d.train
    sources = [sources] if isinstance(sources, str) else sources
    settings = {k: v for k, v in d.model_dump().items() if k not in ("train", "eval", "cache", "cache_reference",
                                                                "cache_start")}
    said = [content(s) for s in sources], settings, held_out, d.flip and run.train.seed, kind(run.objective().ranking)
    key = blake2b(repr(said).encode(), digest_size=16).hexdigest()
    mark = blake2b((key + tokenizer_fingerprint(tokenizer)).encode()).hexdigest()[:12]
    name = f"{Path(sources[0]).name.split('.')[0]}-{mark}"
    try:
        prepared = prepare(groups(run, held_out), tokenizer, Path(d.cache) / name, encoding=encoding(run), key=key)
    except DataError:                                         # says where
        raise
    except ValueError as error:
        raise ValueError(f"{', '.join(sources)}: {error}") from error
    if missing := [c for c in columns(run.objective().reads()) if c not in prepared.columns]:
        raise ValueError(f"recipe {run.recipe!r} reads the column {missing[0]!r} ({COLUMNS[missing[0]].meaning}), which no "
                         f"record of {', '.join(sources)} has: put it into the records, or choose another recipe")
    fits(prepared, run, run.train.online if "online" in run.objective().reads() else None)
    return prepared


def content(source: str) -> str:
    """What stands for a source in the cache: the hash of its files, or the name of a hub data set."""
    found = sorted(p for p in glob(source, recursive=True) if Path(p).is_file())
    if not found and Path(source).is_dir():
        found = sorted(str(p) for p in Path(source).rglob("*") if p.is_file())
    digest = blake2b(digest_size=16)
    for path in found:
        with open(path, "rb") as file:
            digest.update(file_digest(file, lambda: blake2b(digest_size=16)).digest())
    return f"{source}:{digest.hexdigest()}"


def encoding(run: Run):
    return run.data.encoded()


def columns(reads: set[str]) -> tuple[str, ...]:
    """Columns of a recipe that come from the records themselves."""
    made = {"tokens", "attend", "mask", "group", "relevance", "wins", "prompt_length", "train", "weight",
            "online"}
    return tuple(sorted({c for c in reads if c in COLUMNS and COLUMNS[c].dims in ("N", "N T", "N D")} - FROZEN - GRADIENT - made))


def fits(data, run: Run, online=None) -> None:
    """An error, before a model is loaded, when a group does not fit a micro-batch; `online` settings add sampled rows. Of packed
    rows the responses count, and the longest prompt once."""
    tokens = run.train.tokens
    if tokens is None:
        return
    lengths = data.lengths.copy()
    if run.train.packing:
        prompts, rows = np.diff(data.arrays["prompt_at"]), np.diff(data.arrays["row_at"])
        lengths -= (rows - 1) * prompts[data.arrays["group_prompt"]]
    if online is not None:
        lengths += online.k * (np.diff(data.arrays["prompt_at"])[data.arrays["group_prompt"]] + online.max_new_tokens)
    n = int(lengths.argmax())
    if lengths[n] > tokens:
        extra = f" with {online.k} sampled responses" if online is not None else ""
        raise ValueError(f"{data[n].place or f'group {n}'}: a group of {lengths[n]} tokens{extra} does not fit the "
                         f"micro-batch budget of {tokens} tokens: raise train.tokens to at least {lengths[n]}, or truncate "
                         f"with data.max_length")


def cached(run: Run, column: str, settings: Model, prepared: tuple, load: Callable[[], Models], autocast: Callable) -> list:
    """The data with a model's log-probabilities as a column, written beside it once under what made them: the model's
    settings and weights, and the precision. `load` is called, once, only where they are not there yet."""
    models = None
    key = f"{settings.model_dump_json()} {content(settings.name)} {run.train.precision}"
    for data in prepared:
        if data is None or data.has_column(column, key):
            continue
        models = models or load()
        device = next(models.policy.parameters()).device
        with data.column_writer(column, key) as write:
            for start in range(0, len(data), 64):
                indices = range(start, min(start + 64, len(data)))
                with autocast():
                    batch = fill(models, data.batch(indices).to(device), {"logp_ref"}, tokens=run.train.tokens)
                write(indices, batch["logp_ref"])
    return [data and data.with_column(column, key) for data in prepared]


def frozen_policy(run: Run):
    """Settings of the model that is the reference: `run.reference`, or the policy without its fresh adapters."""
    return run.reference or run.policy.model_copy(update={"lora": None})


# ----------------------------------------------------------------------------------------------------------- records
def begin(run: Run, objective, data, held_out, tokenizer, steps: int, step: int) -> None:
    """Write what is run, and cut the logs back to the checkpoint that a resumed run starts from."""
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    replace(out / "run.yaml", yaml.safe_dump(json.loads(run.model_dump_json()), sort_keys=False))
    replace(out / "departures.yaml", yaml.safe_dump(departures(run), sort_keys=False))
    packages = ("prefopt", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    versions = {p: metadata.version(p) for p in packages if _installed(p)}
    facts = {"python": platform.python_version(), **versions, "processes": processes(), "steps": steps,
             "data": {"train": data.fingerprint, "train_groups": len(data),
                      **({"eval": held_out.fingerprint, "eval_groups": len(held_out)} if held_out is not None else {})}}
    replace(out / "versions.json", json.dumps(facts, indent=1))
    for log_file in (out / "metrics.jsonl", out / "timing.jsonl"):
        replace(log_file, "".join(upto(log_file, step)))
    if step == 0 and run.rollout is None:                     # what an on-policy run sees is in out/rollouts
        samples(data, tokenizer, out / "samples.jsonl")


def replace(path: Path, text: str) -> None:
    """Write a file so that there is the old or the new one at every moment."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def upto(path: Path, step: int) -> Iterator[str]:
    """The lines of a log up to a step. A last line that was cut off in the middle has no end and is left out."""
    for line in path.open() if path.exists() and step else ():
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            return
        yield line


def card(run: Run) -> dict:
    """What a saved model was trained as: recipe, departures, how text becomes tokens, and the model it started from."""
    limits = {k: v for k, v in run.data.model_dump(mode="json").items()
              if k in ("max_prompt", "max_response", "max_length", "encoding") and v}
    return {"prefopt": metadata.version("prefopt") if _installed("prefopt") else "", "recipe": run.recipe, "set": run.set,
            "data": limits, "start": run.policy.name, "reference": run.reference and run.reference.name}


FREE = {"out", "log", "expect", "rollout.dump", "train.save_every", "train.keep", "train.log_every", "train.device",
        "train.shard", "data.cache"}


def same(run: Run, data, held_out) -> None:
    """An error that names what differs between `run` and the run in its folder, which `resume` goes on with. What is FREE
    changes no weight."""
    out = Path(run.out)
    before = make(yaml.safe_load((out / "run.yaml").read_text()), str(out / "run.yaml"))
    there, here = (flat(r.model_dump()) for r in (before, run))
    differ = [f"{k} is {there.get(k)!r} there and {here.get(k)!r} here" for k in {**there, **here}
              if there.get(k) != here.get(k) and FREE.isdisjoint((k, k.split(".")[0]))]
    known = json.loads((out / "versions.json").read_text())["data"]
    differ += [f"the {name} data has changed" for name, prepared in (("train", data), ("eval", held_out))
               if known.get(name) != (prepared and prepared.fingerprint)]
    if differ:
        raise ValueError(f"{out} holds another run, and a resumed run goes on exactly as it began: {'; '.join(differ)}. Put "
                         f"that back, or start a new run from a checkpoint's weights (policy={out}/checkpoints/.../model)")


def flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings by their dotted names.

    >>> flat({"train": {"lr": 1.0}, "out": "runs"})
    {'train.lr': 1.0, 'out': 'runs'}
    """
    out = {}
    for key, value in settings.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value})
    return out


def departures(run: Run) -> dict:
    """Slots and their arguments that differ from the vetted recipe."""
    plain, own = assemble(run.recipe, {}), run.objective()
    out = {"recipe": run.recipe}
    for slot in own.home:
        a, b = (_shown(getattr(objective, slot)) for objective in (plain, own))
        if a != b:
            out[slot] = {"recipe": a, "here": b}
    return out


def _shown(part) -> object:
    if part is None:
        return None
    if isinstance(part, Mapping):
        return {k: _shown(p) for k, p in part.items()}
    if isinstance(part, (Term, Penalty)):
        return [_shown(part.part), part.weight]
    spec = to_spec(part)
    if hasattr(part, "spec"):                                 # an object with settings of its own
        return spec
    name = next(iter(spec)) if isinstance(spec, dict) else spec
    return {name: hyperparameters(part)} if hyperparameters(part) else name


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def samples(data, tokenizer, path: Path, count: int = 8) -> None:
    """The first groups exactly as the model sees them, special tokens included, with what trains marked."""
    batch = data.batch(range(min(count, len(data))))
    with path.open("w") as file:
        for n in range(batch.N):
            ids, mask = batch["tokens"][n], batch["mask"][n].bool()
            start = int(batch["prompt_length"][n])
            record = {"group": int(batch["group"][n]), "prompt": tokenizer.decode(ids[:start]),
                      "response": tokenizer.decode(ids[start:][batch["attend"][n].bool()[start:]]),
                      "trained_tokens": int(mask.sum()), "prompt_tokens": start}
            if "relevance" in batch:
                record["relevance"] = float(batch["relevance"][n])
            file.write(json.dumps(record) + "\n")


def log(accelerator, out: Path, line: dict, step: int) -> None:
    """Append a line to metrics.jsonl, null for what is not finite, and tell the trackers."""
    line = {k: v if math.isfinite(v) else None for k, v in line.items()}
    if accelerator.is_main_process:
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    if accelerator.trackers:
        accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)


def timing(accelerator, out: Path, step: int, measured: Mapping[str, float]) -> None:
    """Speed has a file of its own: metrics.jsonl is the same, byte for byte, however often a run was interrupted."""
    if accelerator.is_main_process:
        with (out / "timing.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **measured}) + "\n")


# ---------------------------------------------------------------------------------------------------------- progress
@contextmanager
def progress_bar(steps: int, start: int, show: bool) -> Iterator[Callable]:
    """A bar with tokens/s, time left, loss and accuracy; nothing where there is nobody to look."""
    if not show:
        yield lambda step, tokens, metrics: None
        return
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    bar = Progress(TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[note]}"))
    with bar:
        task = bar.add_task("train", total=steps, completed=start, note="")
        since, seen = time.perf_counter(), 0

        def report(step: int, tokens: int, metrics: dict) -> None:
            nonlocal seen
            seen += tokens
            speed = seen / max(time.perf_counter() - since, 1e-9)
            shown = "  ".join(f"{k} {metrics[k]:.3f}" for k in ("reward", "loss", "accuracy", "eval/loss", "eval/reward")
                              if k in metrics)
            bar.update(task, completed=step, note=f"{speed:,.0f} tokens/s  {shown}")

        yield report
