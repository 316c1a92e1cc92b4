"""GSM8K with a model made on the spot: the whole path of run.yaml in a minute on a CPU, nothing downloaded.

    python -m cookbook.gsm8k_grpo.toy --train train.jsonl.gz --test test.jsonl.gz

The model has read 200 answers to short questions, three of ten of them boxed. It cannot solve a problem and does not learn
to; its share of boxed answers rises, because they are rewarded. Exits with 1 if it does not.
"""
from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from cookbook.gsm8k_grpo.prepare import prompts
from cookbook.hh_rlhf.make_model import byte_pairs, chosen, decoder, warm_start
from data_tools import Group, Response
from data_tools.files import write
from prefopt import config
from prefopt.train import Result, train

HERE = Path(__file__).parent


def short(file: str, letters: int = 200) -> list[dict]:
    """The prompts of short questions: a minute is not long."""
    return [record for record in prompts(file) if len(record["prompt"][0]["content"]) < letters]


def answers(records: list[dict], *, boxed: float = 0.3, seed: int = 0) -> list[Group]:
    """Each prompt with a short right answer, a share of them boxed."""
    rng, found = random.Random(seed), []
    for record in records:
        number = record["reference"].split("####")[1].strip()
        said = f"\\boxed{{{number}}}" if rng.random() < boxed else number
        found.append(Group(record["prompt"], [Response(f"The answer is {said}.")], [1.0]))
    return found


def start(records: list[dict], out: Path, *, steps: int = 300) -> None:
    """A small decoder that answers in these words, and its tokenizer."""
    torch.manual_seed(0)
    groups = answers(records)
    tokenizer = byte_pairs(groups, 1024)
    model, rows = decoder(tokenizer, width=96, layers=2), chosen(groups, tokenizer)
    loss = warm_start(model, rows, steps=steps, batch=8, length=128, lr=4e-3)
    print(f"{model.num_parameters():,} parameters, {loss:.2f} nats per token after the warm start")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def run(out: Path, files: dict[str, str]) -> Result:
    out.mkdir(parents=True, exist_ok=True)
    records = {name: short(file) for name, file in files.items()}
    for name, some in records.items():
        write(some, out / f"{name}.jsonl")
    start(records["train"], out / "start")
    (out / "toy.yaml").write_text((HERE / "toy.yaml").read_text().replace("runs/gsm8k_toy", str(out)))
    return train(config.load(out / "toy.yaml"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="train.jsonl of GSM8K, as it is published")
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k_toy"))
    given = parser.parse_args()
    disable_progress_bar()                                    # transformers' bars would break ours
    torch.set_num_threads(1)
    result = run(given.out, {"train": given.train, "test": given.test})
    for name in ("has_boxed", "final_answer"):
        print(f"{name}: {result.metrics[f'eval/reward/{name}']:.2f} of held-out responses")
    if result.failed:
        raise SystemExit("not as expected: " + "; ".join(result.failed))


if __name__ == "__main__":
    main()
