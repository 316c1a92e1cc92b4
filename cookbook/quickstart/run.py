"""The whole story on a CPU, nothing downloaded: pairs, a reward model, DPO, GRPO, and what a reward model is not good for.

    python cookbook/quickstart/run.py             about 4 minutes on one core
    python cookbook/quickstart/run.py --toy       one event instead of two and fewer prompts, less than a minute

Prints a table and writes everything under --out: models, pairs, run files and their folders, results.json and plot.png.
Exits with 1 if something did not come out as the README says.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import report
import task
import torch
from report import Rate
from rich.console import Console
from transformers.utils.logging import disable_progress_bar
from warmup import small_model, warm_up

from data_tools.files import write
from data_tools.formats import load
from data_tools.pipeline.driver import build
from prefopt import config
from prefopt.data_cli import pipeline, summary
from prefopt.models import load_policy, load_tokenizer
from prefopt.rollout.transformers import Sampler
from prefopt.train import Result, train

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))                         # so that cookbook.quickstart.task:right is found from anywhere
console = Console(highlight=False)


@dataclass(frozen=True)
class Size:
    """How large everything is, settings for the run files, and what is promised of the sampled accuracy."""
    table: task.Table = task.Table()
    warmup_steps: int = 300
    warmup_batch: int = 128
    warmup_lr: float = 3e-3
    prompts: int = 1024
    held_out: int = 128
    test: int = 1000
    settings: dict[str, list[str]] = field(default_factory=dict)
    gain: float = 0.15                                        # by DPO
    level: float = 0.9                                        # after GRPO with the verifier


SMALL = ["train.groups_per_step=16", "rollout.max_new_tokens=16", "expect={}"]
TOY = Size(task.Table(largest=3, events=1, verbs=2), warmup_steps=150, warmup_batch=32, warmup_lr=5e-3, prompts=256,
           held_out=64, test=600, gain=0.05, level=0.75,
           settings={"dpo": ["train.groups_per_step=32"], "reward_model": ["train.groups_per_step=32", "train.epochs=3"],
                     "grpo": ["train.steps=30", *SMALL], "grpo_proxy": ["train.steps=25", "train.lr=5e-4", *SMALL],
                     "grpo_proxy_kl": ["train.steps=15", *SMALL]})


# ------------------------------------------------------------------------------------------------------------- the story
def story(out: Path, seed: int, size: Size) -> dict:
    """The whole of it, in order; what is measured comes back."""
    asked, seconds = Problems(seed, size), {}
    results: dict[str, Result] = {}
    answers: dict[str, dict[str, Rate]] = {}

    def follow(name: str) -> None:
        """A run file, and how good the model that comes out of it is."""
        results[name] = train(run_file(name, out, seed, size))
        answers[name] = accuracy(out / name / "model", asked.test)

    with stage("A model learns to answer like a careless writer", seconds):
        learn(out, seed, size)
        answers["warmup"] = accuracy(out / "warmup", asked.test)

    with stage("Its own answers become preference pairs", seconds):
        make_pairs(out, seed)

    with stage("A reward model from the pairs", seconds):
        results["reward_model"] = train(run_file("reward_model", out, seed, size))

    with stage("DPO on the same pairs", seconds):
        follow("dpo")

    with stage("GRPO with the verifier as reward", seconds):
        follow("grpo")

    with stage("GRPO against the reward model", seconds):
        follow("grpo_proxy")

    with stage("The same, held back by a KL to the warmed-up model", seconds):
        follow("grpo_proxy_kl")

    return {"seed": seed, "size": asdict(size), "answers": answers, "cpu_seconds": seconds,
            "smaller_is_right": smaller_is_right(out / "data" / "pairs" / "held_out.jsonl"),
            "metrics": {name: result.metrics for name, result in results.items()},
            "failed": [f"{name}: {text}" for name, result in results.items() for text in result.failed]
            + broken_promises(answers, out, size)}


def broken_promises(answers: dict[str, dict[str, Rate]], out: Path, size: Size) -> list[str]:
    """What the README promises beyond the conditions of the run files, and these numbers do not keep."""
    share = {name: rates["sampled"].share for name, rates in answers.items()}
    gain = share["dpo"] - share["warmup"]
    proxy, truth = (report.curve(out / "grpo_proxy", f"reward/{name}")[1] for name in ("proxy", "truth"))
    promises = {
        f"DPO adds at least {size.gain}, found {gain:+.3f}": gain >= size.gain,
        f"GRPO reaches at least {size.level}, found {share['grpo']:.3f}": share["grpo"] >= size.level,
        f"without KL the proxy rises, found {proxy[0]:.2f} to {proxy[-1]:.2f}": proxy[-1] > proxy[0],
        f"without KL the truth falls, found {truth[0]:.2f} to {truth[-1]:.2f} in training, and {share['warmup']:.3f} to "
        f"{share['grpo_proxy']:.3f}": truth[-1] < truth[0] and share["grpo_proxy"] < share["warmup"],
        f"with KL more of the truth is left, found {share['grpo_proxy_kl']:.3f}": share["grpo_proxy_kl"] > share["grpo_proxy"],
    }
    return [promise for promise, kept in promises.items() if not kept]


# -------------------------------------------------------------------------------------------------------------- its steps
class Problems:
    """Problems to learn from, to watch and to test on, all different."""

    def __init__(self, seed: int, size: Size):
        found = task.problems(size.prompts + size.held_out + size.test, size.table, seed)
        self.own, self.held_out, self.test = (found[:size.prompts], found[size.prompts:-size.test], found[-size.test:])


def learn(out: Path, seed: int, size: Size) -> None:
    """The warmed-up model and its tokenizer in out/warmup, and prompt files for what comes."""
    torch.manual_seed(seed)
    tokenizer = task.tokenizer()
    model = small_model(tokenizer)
    warm_up(model, tokenizer, size.table, steps=size.warmup_steps, batch=size.warmup_batch, lr=size.warmup_lr, seed=seed)
    model.save_pretrained(out / "warmup")
    tokenizer.save_pretrained(out / "warmup")
    asked = Problems(seed, size)
    write(({**one.record(), "split": "train"} for one in asked.own), out / "prompts.jsonl")
    write(({**one.record(), "split": "held_out"} for one in asked.held_out), out / "held_out_prompts.jsonl")


def make_pairs(out: Path, seed: int) -> None:
    """The pipeline of pairs.yaml: out/data/pairs has train.jsonl and held_out.jsonl."""
    copied("pairs", out)
    built = build(pipeline(out / "pairs.yaml", [f"seed={seed}"]), overwrite=True)
    console.print(summary(built.steps))
    console.print(f"pairs: {built.splits}")


def smaller_is_right(pairs: Path) -> Rate:
    """Pairs that the rule "the smaller answer is right" ranks right: what there is to learn without any arithmetic."""
    groups = list(load(str(pairs)))
    answers = [[re.search(r"answer (\d+)", response.text) for response in group.responses] for group in groups]
    return Rate(sum(all(found) and int(found[0][1]) < int(found[1][1]) for found in answers), len(groups))


def copied(name: str, out: Path) -> None:
    """A file of this folder with --out in the place of runs/quickstart; the copy lies in out."""
    (out / f"{name}.yaml").write_text((HERE / f"{name}.yaml").read_text().replace("runs/quickstart", str(out)))


def run_file(name: str, out: Path, seed: int, size: Size, *settings: str) -> config.Run:
    copied(name, out)
    return config.load(out / f"{name}.yaml", [f"train.seed={seed}", *size.settings.get(name, ()), *settings])


def accuracy(folder: Path, test: list[task.Problem]) -> dict[str, Rate]:
    """Right answers of the model in a folder: of one sample at temperature 1, and of the most likely answer."""
    sampler, found = Sampler(load_policy(str(folder)), load_tokenizer(str(folder)), batch=256), {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        groups = sampler([one.prompt for one in test], n=1, max_new_tokens=24, temperature=temperature)
        found[name] = Rate(sum(g.relevance == [1.0] for g in task.mark(test, groups)), len(test))
        console.print(f"[dim]{test[0].prompt}  [/dim]{groups[0].responses[0].text}  [dim]({name}; right {found[name]})")
    return found


@contextmanager
def stage(title: str, seconds: dict[str, float]) -> Iterator[None]:
    console.rule(f"[bold]{len(seconds) + 1}. {title}", align="left")
    start = time.process_time()
    yield
    seconds[title] = round(time.process_time() - start, 1)


def small_and_quiet() -> None:
    torch.set_num_threads(1)                                  # small tensors gain little from more, and may lose much
    disable_progress_bar()                                    # transformers' bars would break ours


def options(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of all that is written")
    parser.add_argument("--toy", action="store_true", help="shorter problems and fewer prompts, for a quick check")
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    small_and_quiet()
    given.out.mkdir(parents=True, exist_ok=True)
    found = story(given.out, given.seed, TOY if given.toy else Size())
    console.rule("[bold]what came of it", align="left")
    console.print(report.table(found))
    report.plot(found, given.out)
    found["all_cpu_seconds"] = round(time.process_time())
    (given.out / "results.json").write_text(json.dumps(found, indent=1, default=Rate.facts))
    console.print(f"results.json and plot.png are in {given.out}; {found['all_cpu_seconds']} CPU seconds")
    if found["failed"]:
        raise SystemExit("not as expected: " + "; ".join(found["failed"]))


if __name__ == "__main__":
    main()
