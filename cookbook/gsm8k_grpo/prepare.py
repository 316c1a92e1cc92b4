"""GSM8K as prompts for a chat model: each question with an instruction, and the solution that its answer is checked against.

    python -m cookbook.gsm8k_grpo.prepare                                            from the hub, openai/gsm8k
    python -m cookbook.gsm8k_grpo.prepare --train train.jsonl.gz --test test.jsonl.gz       files as they are published
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from data_tools import load
from data_tools.files import write

INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."
HUB = "hub:openai/gsm8k/main"


def prompts(source: str, split: str | None = None) -> Iterator[dict]:
    """{"prompt", "reference"}: the reference is the worked solution, whose answer stands behind its ####."""
    for group in load(source, split=split):
        yield {"prompt": [{"role": "user", "content": f"{group.prompt}\n{INSTRUCTION}"}], "reference": group.meta["answer"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default=HUB, help="a file, or a hub id")
    parser.add_argument("--test", default=HUB)
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        source = getattr(given, split)
        count = write(prompts(source, split if source.startswith("hub:") else None), given.out / f"{split}.jsonl")
        print(f"{count:,} prompts in {given.out / f'{split}.jsonl'}")


if __name__ == "__main__":
    main()
