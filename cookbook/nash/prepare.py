"""The first policy, judged pairs and prompts of the study as files, for the run files beside this one.

    python cookbook/nash/prepare.py [--out runs/nash] [--seed 0]
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cookbook import tiny
from cookbook.nash.study import first_policy, pairs
from data_tools.records import Group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/nash"))
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    first_policy(found.out / "first", found.seed)
    pairs(found.out / "pairs.jsonl", 3000, found.seed)
    tiny.write(found.out / "prompts.jsonl", [Group("?", [])] * 32)
    print(f"first policy, pairs.jsonl and prompts.jsonl are in {found.out}")


if __name__ == "__main__":
    main()
