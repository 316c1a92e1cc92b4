"""A data set from other people's solutions, by one pipeline file: killed half way, resumed, changed, and checked.

    python cookbook/build_dataset/run.py --data FOLDER       GSM8K's example_model_solutions and test, as they are published
    python cookbook/build_dataset/run.py --toy               sums made on the spot

Exits with 1 if something did not come out as the README says.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from data_tools.files import write
from data_tools.formats import load

HERE = Path(__file__).parent
SYSTEMS = {"6b_finetuning": 0.3, "6b_verification": 0.5, "175b_finetuning": 0.6, "175b_verification": 0.8}


# ------------------------------------------------------------------------------------------------------------------ data
def sums(count: int, seed: int) -> list[dict]:
    """Sums in words with a worked solution and what four systems answer, each right as often as SYSTEMS says."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        name, thing = rng.choice(["Ada", "Ben", "Cleo", "Dan"]), rng.choice(["apples", "books", "coins", "pens"])
        a, b, c = (rng.randint(2, 30) for _ in range(3))
        question = f"{name} has {a} {thing}, finds {b} more and gives away half of {2 * c}. How many {thing} are left?"
        found[question] = {"question": question, "ground_truth": worked(name, thing, a, b, c), **{
            system: {"is_correct": right, "solution": worked(name, thing, a, b, c, 0 if right else rng.choice([-2, -1, 1, 2]))}
            for system, share in SYSTEMS.items() for right in [rng.random() < share]}}
    return list(found.values())


def worked(name: str, thing: str, a: int, b: int, c: int, slip: int = 0) -> str:
    return (f"{name} has {a} + {b} = {a + b} {thing} after the find.\nHalf of {2 * c} is {c}, so {a + b} - {c} = "
            f"{a + b - c + slip} {thing} are left.\nA: {a + b - c + slip}")


def put_data(folder: Path | None, out: Path) -> None:
    """The two files that the pipeline reads."""
    if folder is None:
        found = sums(400, 0)
        write(found, out / "solutions.jsonl.gz")
        write(({"question": r["question"], "answer": r["ground_truth"]} for r in found[:40]), out / "test.jsonl.gz")
        return
    for name, target in (("example_model_solutions", "solutions"), ("test", "test")):
        source = next((p for p in (folder / f"{name}.jsonl.gz", folder / f"{name}.jsonl") if p.exists()), None)
        if source is None:
            raise SystemExit(f"{folder} has no {name}.jsonl or {name}.jsonl.gz of github.com/openai/grade-school-math: give "
                             "another --data, or run with --toy")
        if source.suffix == ".gz":
            shutil.copyfile(source, out / f"{target}.jsonl.gz")
        else:
            write((json.loads(line) for line in source.open(encoding="utf-8")), out / f"{target}.jsonl.gz")


# ----------------------------------------------------------------------------------------------------------------- builds
def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "prefopt", "data", "build", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "COLUMNS": "110",
               "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}


def built(*arguments) -> str:
    """What a build says; it has to succeed."""
    done = subprocess.run(command(*arguments), text=True, capture_output=True, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"not as expected: exit code {done.returncode} of {done.args}: {done.stdout}{done.stderr}")
    return done.stdout


def killed(file: Path, cache: Path) -> int:
    """Starts a build and kills it (SIGKILL) as soon as something is committed; how many entries there are then."""
    process = subprocess.Popen(command(file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None and len(list(cache.glob("made/*/*.json"))) < 12:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list(cache.glob("made/*/*.json")))


def contents(folder: Path) -> dict[str, bytes]:
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith(".part"))     # of what was killed
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


# -------------------------------------------------------------------------------------------------------------- the story
def story(out: Path) -> dict:
    file, data = out / "build.yaml", out / "data"
    file.write_text((HERE / "build.yaml").read_text().replace("runs/build_dataset", str(out)))
    print(f"killed after {killed(file, out / 'cache')} commits; resumed:\n")
    print(built(file, "--resume"))
    again = contents(data)
    built(file, f"out={out / 'whole'}", f"cache={out / 'cache2'}")

    changed = out / "changed.yaml"
    changed.write_text(file.read_text().replace("most: 2", "most: 1"))
    print("with one pair of a question at most, --dry:\n")
    print(built(changed, "--dry"))

    lists = list(load(str(data / "lists")))
    pairs = {name: list(load(str(data / "pairs" / f"{name}.parquet"))) for name in ("train", "test")}
    rows = [r for g in lists for r in g.responses]
    agree = sum(r.scores["verifier"] == r.meta["published"] for r in rows) / len(rows)
    kinds = Counter(json.loads(line)["kind"] for line in (data / "findings.jsonl").read_text().splitlines())
    leaked = {g.meta["prompt_id"] for g in pairs["train"]} & {g.meta["prompt_id"] for g in pairs["test"]}
    state = json.loads((data / "build.json").read_text())
    promises = {
        "a killed build that is resumed has the bytes of one that was not": again == contents(out / "whole"),
        f"the verifier agrees with the published marks in at least 99 %, found {agree:.1%}": agree >= 0.99,
        "no prompt is in train and in test": not leaked,
        "in every pair a right solution is preferred to a wrong one": all(
            [r.scores["verifier"] for r in g.responses] == [1.0, 0.0] for some in pairs.values() for g in some),
        "card, page and view are there": {"README.md", "index.html", "view.html"} <= again.keys(),
        "the questions that a test set has, too, are found": kinds["contaminated"] > 0,
    }
    return {"stages": state["steps"], "lists": len(lists), "pairs": {k: len(v) for k, v in pairs.items()},
            "verifier agrees": agree, "findings": dict(kinds), "failed": [text for text, kept in promises.items() if not kept]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of GSM8K's files")
    parser.add_argument("--toy", action="store_true", help="sums made on the spot instead")
    parser.add_argument("--out", type=Path, default=Path("runs/build_dataset"), help="folder of all that is written")
    given = parser.parse_args()
    if (given.data is None) != given.toy:
        parser.error("give --data FOLDER, or --toy")
    given.out.mkdir(parents=True, exist_ok=True)
    for folder in ("data", "whole", "cache", "cache2"):
        shutil.rmtree(given.out / folder, ignore_errors=True)
    put_data(given.data, given.out)
    found = story(given.out)
    (given.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['lists']} lists, {found['pairs']} pairs; the verifier agrees with {found['verifier agrees']:.1%} of the "
          f"published marks; findings: {found['findings']}")
    if found["failed"]:
        raise SystemExit("not as expected: " + "; ".join(found["failed"]))


if __name__ == "__main__":
    main()
