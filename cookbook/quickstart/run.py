"""The main job on a CPU, nothing downloaded: a model's own answers become preference pairs, and DPO learns from them.

    python cookbook/quickstart/run.py             about 2 minutes on one core
    python cookbook/quickstart/run.py --toy       one event instead of two and fewer prompts, half a minute

Prints a table and writes everything under --out: model, pairs, run folder, results.json and plot.png. Exits with 1 if
DPO did not improve the model as the README says.
"""
from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import report
import task
import torch
from report import Rate
from rich.console import Console
from transformers.utils.logging import disable_progress_bar
from warmup import small_model, warm_up

from data_tools.formats import dump
from data_tools.labels import split
from prefopt import config
from prefopt.models import load_policy, load_tokenizer
from prefopt.rollout.transformers import Sampler
from prefopt.train import train

HERE = Path(__file__).parent
console = Console(highlight=False)


@dataclass(frozen=True)
class Size:
    """How large everything is; `gain` is what DPO must add to the sampled accuracy."""
    table: task.Table = task.Table()
    warmup_steps: int = 300
    warmup_batch: int = 128
    warmup_lr: float = 3e-3
    prompts: int = 1024
    held_out: int = 128
    test: int = 1000
    groups_per_step: int = 64
    gain: float = 0.15


TOY = Size(task.Table(largest=3, events=1, verbs=2), warmup_steps=150, warmup_batch=32, warmup_lr=5e-3, prompts=256,
           held_out=64, test=600, groups_per_step=32, gain=0.05)


def story(out: Path, seed: int, size: Size) -> dict:
    """The whole of it, in order; what is measured comes back."""
    torch.manual_seed(seed)
    seconds: dict[str, float] = {}
    asked = task.problems(size.prompts + size.held_out + size.test, size.table, seed)     # all different
    own, held_out, test = asked[:size.prompts], asked[size.prompts:-size.test], asked[-size.test:]

    with stage("1. a model learns to answer like a careless writer", seconds):
        tokenizer = task.tokenizer()
        model = small_model(tokenizer)
        warm_up(model, tokenizer, size.table, steps=size.warmup_steps, batch=size.warmup_batch, lr=size.warmup_lr,
                seed=seed)
        model.save_pretrained(out / "warmup")
        tokenizer.save_pretrained(out / "warmup")

    with stage("2. how good is it?", seconds):
        before = accuracy(model, tokenizer, test)

    with stage("3. its own answers become preference pairs", seconds):
        pairs = {"pairs": preferences(model, tokenizer, own), "held_out": preferences(model, tokenizer, held_out)}
        for name, groups in pairs.items():
            console.print(f"{dump(groups, out / f'{name}.jsonl')} pairs in {out / f'{name}.jsonl'}")

    with stage("4. DPO on the pairs", seconds):
        run = config.load(HERE / "dpo.yaml", [
            f"policy={out / 'warmup'}", f"data.train={out / 'pairs.jsonl'}", f"data.eval={out / 'held_out.jsonl'}",
            f"data.cache={out / 'cache'}", f"out={out / 'dpo'}", f"train.seed={seed}",
            f"train.groups_per_step={size.groups_per_step}"])
        result = train(run)

    with stage("5. how good is it now?", seconds):
        model, tokenizer = load_policy(str(out / "dpo/model")), load_tokenizer(str(out / "dpo/model"))
        after = accuracy(model, tokenizer, test)

    return {"seed": seed, "size": asdict(size), "before": before, "after": after, "expected_gain": size.gain,
            "pairs": {name: len(groups) for name, groups in pairs.items()}, "dpo": result.metrics,
            "wall_seconds": seconds, "failed": [*result.failed, *too_little(before, after, size.gain)]}


def accuracy(model, tokenizer, test: list[task.Problem]) -> dict[str, Rate]:
    """Right answers of one sample at temperature 1, and of the most likely answer."""
    found = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        groups = Sampler(model, tokenizer, batch=256)([one.prompt for one in test], n=1, max_new_tokens=24,
                                                      temperature=temperature)
        found[name] = Rate(sum(g.relevance == [1.0] for g in task.mark(test, groups)), len(test))
        console.print(f"[dim]{test[0].prompt}  [/dim]{groups[0].responses[0].text}  [dim]({name})")
    return found


def preferences(model, tokenizer, asked: list[task.Problem], n: int = 8, per_prompt: int = 2) -> list:
    """Up to `per_prompt` pairs of a right and a wrong answer among n samples of the model."""
    groups = Sampler(model, tokenizer)([one.prompt for one in asked], n=n, max_new_tokens=24)
    found = []
    for group in task.mark(asked, groups):
        right = [i for i, grade in enumerate(group.relevance) if grade == 1]
        wrong = [i for i, grade in enumerate(group.relevance) if grade == 0]
        found += split(group, list(zip(right, wrong, strict=False))[:per_prompt])
    return found


def too_little(before: dict[str, Rate], after: dict[str, Rate], gain: float) -> list[str]:
    """What the README promises and these accuracies do not keep."""
    rise = after["sampled"].share - before["sampled"].share
    return [] if rise >= gain else [f"sampled accuracy rose by {rise:.3f}, expected at least {gain}"]


@contextmanager
def stage(title: str, seconds: dict[str, float]):
    console.rule(f"[bold]{title}", align="left")
    start = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - start, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of all that is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="shorter problems and fewer prompts, for a quick check")
    options = parser.parse_args()
    disable_progress_bar()                                    # transformers' bars would break ours
    torch.set_num_threads(1)                                  # small tensors gain little from more, and may lose much
    options.out.mkdir(parents=True, exist_ok=True)
    found = story(options.out, options.seed, TOY if options.toy else Size())
    console.rule("[bold]what came of it", align="left")
    console.print(report.table(found))
    report.plot(found, options.out / "dpo/metrics.jsonl", options.out / "plot.png")
    found["cpu_seconds"] = round(time.process_time())
    (options.out / "results.json").write_text(json.dumps(found, indent=1, default=Rate.facts))
    console.print(f"results.json and plot.png are in {options.out}; {found['cpu_seconds']} CPU seconds")
    if found["failed"]:
        raise SystemExit("not as expected: " + "; ".join(found["failed"]))


if __name__ == "__main__":
    main()
