"""Several recipes on the same pairs and the same small model: how often is the better response of a held-out pair ranked
first?

    python cookbook/hh_rlhf/compare.py FOLDER [FOLDER ...] --model runs/hh_rlhf/model

A folder holds train.jsonl.gz and test.jsonl.gz. Every run is `prefopt train cookbook/hh_rlhf/local.yaml` with the paths
and the recipe given on the command line. Prints a table and writes compare.json under --out.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from prefopt import config
from prefopt.train import train

HERE = Path(__file__).parent
RECIPES = {"dpo": {}, "ipo": {}, "rdpo": {"flip": 0.1}, "hinge": {}, "kto": {}, "simpo": {}, "orpo": {}}
BASELINES = {"longer is better": "eval/length/chosen_longer", "the model before training": "eval/ranking/reference"}


def trained(folder: Path, model: Path, recipe: str, departures: dict, out: Path, lr: float) -> dict:
    """Held-out metrics of a recipe, and how many pairs they are of."""
    here = out / folder.name / recipe
    run = config.load(HERE / "local.yaml", [
        f"recipe={recipe}", f"set={json.dumps(departures)}", f"policy={model}", f"out={here}", f"train.lr={lr:.8f}",
        f"data.train={folder / 'train.jsonl.gz'}", f"data.eval={folder / 'test.jsonl.gz'}", f"data.cache={out / 'cache'}"])
    metrics = train(run).metrics
    return {**metrics, "pairs": json.loads((here / "versions.json").read_text())["data"]["eval_groups"]}


def interval(share: float, pairs: int) -> tuple[float, float]:
    """Wilson's 95 % interval; a tie counts as half a pair, and half pairs are rounded.

    >>> [round(end, 3) for end in interval(0.6, 350)]
    [0.548, 0.65]
    """
    found = binomtest(round(share * pairs), pairs).proportion_ci(method="wilson")
    return found.low, found.high


def accuracies(metrics: dict[str, dict]) -> dict[str, dict]:
    """Accuracy and interval of the baselines (the same for all recipes, where measured) and of every recipe."""
    pairs = {found["pairs"] for found in metrics.values()}
    if len(pairs) > 1:
        raise ValueError(f"the recipes were evaluated on different numbers of pairs: {sorted(pairs)}")
    (pairs,), first = pairs, {key: found[key] for found in metrics.values() for key in BASELINES.values() if key in found}
    shares = {name: first[key] for name, key in BASELINES.items() if key in first}
    shares.update({recipe: found["eval/accuracy"] for recipe, found in metrics.items()})
    return {name: {"accuracy": share, "pairs": pairs, "interval": interval(share, pairs)} for name, share in shares.items()}


def table(found: dict[str, dict[str, dict]]) -> Table:
    out = Table(title="held-out pairs ranked right (95 % interval)", title_justify="left")
    for title in ("", *(f"{name} ({next(iter(rows.values()))['pairs']} pairs)" for name, rows in found.items())):
        out.add_column(title)
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        cells = [rows.get(name) for rows in found.values()]
        out.add_row(name, *("" if c is None else f"{c['accuracy']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]"
                            for c in cells))
    return out


def beside() -> list[Path]:
    """Folders of pairs beside the repository, where there are any."""
    shared = HERE.parents[1].parent / "shared" / "data"
    return [folder for folder in (shared / "hh_rlhf_helpful", shared / "hh_rlhf_harmless") if folder.is_dir()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=beside(), help="with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--model", type=Path, default=Path("runs/hh_rlhf/model"), help="folder of make_model.py")
    parser.add_argument("--out", type=Path, default=Path("runs/hh_rlhf/compare"))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    if not options.folders:
        parser.error("name a folder with train.jsonl.gz and test.jsonl.gz")
    metrics = {folder.name: {recipe: trained(folder, options.model, recipe, RECIPES[recipe], options.out, options.lr)
                             for recipe in options.recipes} for folder in options.folders}
    found = {name: accuracies(rows) for name, rows in metrics.items()}
    Console().print(table(found))
    (options.out / "compare.json").write_text(json.dumps({"accuracy": found, "metrics": metrics}, indent=1))


if __name__ == "__main__":
    main()
