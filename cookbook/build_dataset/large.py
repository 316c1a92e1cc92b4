"""How long a build of many groups takes and how much memory: select, label, check, describe.

    python -m cookbook.build_dataset.large [--groups 200000] [--out FOLDER]

Groups of four responses of 20 to 100 words, drawn word by word after the word before, from the sources of Python's library;
a score from a normal distribution for each. One process, one thread.
"""
from __future__ import annotations

import argparse
import json
import random
import sysconfig
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from cookbook.benchmarks.bench import peak_mb
from data_tools.pipeline import driver
from data_tools.pipeline.config import make


def written(folder: Path, groups: int) -> Path:
    """The file of groups."""
    words = " ".join(p.read_text(encoding="utf-8") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))).split()
    following = defaultdict(list)
    for a, b in zip(words, words[1:], strict=False):
        following[a].append(b)
    random_ = random.Random(0)

    def text(count: int) -> str:
        said = [random_.choice(words)]
        while len(said) < count:
            said.append(random_.choice(following[said[-1]] or words))
        return " ".join(said)

    file = folder / "groups.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        for _ in range(groups):
            responses = [{"text": text(random_.randint(20, 100)), "scores": {"rm": random_.gauss(0, 1)},
                          "meta": {"generator": f"model {k}"}} for k in range(4)]
            out.write(json.dumps({"prompt": text(random_.randint(8, 40)), "responses": responses}) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cookbook.build_dataset.large", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=200_000)
    parser.add_argument("--out", type=Path, help="keep what is made in this folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = given.out or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        file = written(folder, given.groups)
        plan = make({"source": str(file), "split": {"test": 0.1}, "cache": str(folder / "cache"), "out": str(folder / "built"),
                     "stages": [{"select": [{"scored": {"score": "rm"}}, {"spread": {"score": "rm", "least": 0.1}}]},
                                {"label": {"graded": {"score": "rm"}}}, "check", "describe"]}, "large.py")
        wall, cpu = time.perf_counter(), time.process_time()
        found = driver.build(plan)
        print(f"{given.groups:,} groups, {file.stat().st_size / 1e6:,.0f} MB: {time.perf_counter() - wall:,.0f} s, "
              f"{time.process_time() - cpu:,.0f} CPU s, at most {peak_mb():,.0f} MB; {sum(found.splits.values()):,} groups left")


if __name__ == "__main__":
    main()
