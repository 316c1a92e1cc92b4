"""Every reward on the same held-out pairs: trained from scratch on 1,500 pairs, or not trained at all.

    python -m cookbook.rewards.hh.study [--toy] [--data FOLDER]

FOLDER holds hh_rlhf_helpful, hh_rlhf_harmless, llmbar, pandalm, webgpt_graded and gsm8k; left out, shared/data beside the
repository. The bench pages show texts of the data, so they go to runs/rewards_hh and results.json holds numbers alone.
"""
from __future__ import annotations

import argparse
import random
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cookbook import tiny
from cookbook.hh_rlhf import make_model
from data_tools import Group, load
from data_tools.encoding import Encoding
from data_tools.validate import checked
from rewards import trained
from rewards.base import rows_of
from rewards.bench import bench, write
from rewards.density_ratio import DensityRatio, likelihood, per_token
from rewards.overlap import bleu, chrf, rouge_l
from rewards.relevance import R3, Tfidf
from rewards.verifiable import final_answer

DATA = Path(__file__).parents[4] / "shared" / "data"
CUT = {"max_prompt": 4, "max_response": 256}                  # four tokens of prompt: the turn of the assistant
CUT_IMPLICIT = {"max_prompt": 8, "max_response": 96}         # every token costs a softmax over the vocabulary
SLACK = 0.03                                                  # about a standard error of an accuracy on 300 pairs
FULL = {"train": None, "test": None, "vocabulary": 4000, "epochs": (1, 2, 4), "seeds": 3, "steps": 100}
TOY = {"train": 64, "test": 30, "vocabulary": 400, "epochs": (1, 2), "seeds": 1, "steps": 4}
PAIRS = {"HH helpful": "hh_rlhf_helpful", "HH harmless": "hh_rlhf_harmless"}

HEADS = {                                                     # recipes of a head on a body of random weights
    "bradley_terry": ("bradley_terry", {"centring": 0.01}),
    "bt, smoothed .1": ("bradley_terry", {"centring": 0.01, "label_smoothing": 0.1}),
    "bt, flips .2 corrected": ("bradley_terry", {"centring": 0.01, "labels": {"unflip": {"flip": 0.2}}}),
    "gaussian": ("gaussian", {}),
    "general_preference": ("general_preference", {"dim": 8}),
    "outcome": ("outcome", {})}
IMPLICIT = {"implicit_dpo": ("implicit_dpo", {}), "implicit_ce": ("implicit_ce", {})}
GRADED = {"bradley_terry": ("bradley_terry", {"centring": 0.01}), "bt_ties": ("bt_ties", {}), "ordinal": ("ordinal", {})}


# ---------------------------------------------------------------------------------------------------------------- data
def read(*files: Path, limit: int | None = None) -> list[Group]:
    return list(checked(load([str(f) for f in files], limit=limit), on_bad="skip"))


def with_reference(group: Group) -> Group:
    """GSM8K solutions whose reference is the annotators' solution, and whose number is what follows its "A:"."""
    solution = group.meta["answer"]
    return replace(group, meta={**group.meta, "reference": solution, "number": solution.rpartition("A:")[2]})


def right_number(text, number) -> float:
    """The final answer is the annotators'."""
    return final_answer(text, number)


def graded(group: Group) -> Group:
    """WebGPT's scores 0, 1/2, ..., 2 as grades 0 to 4."""
    return replace(group, relevance=[2 * score for score in group.relevance])


def divided(groups: Sequence[Group], share: float, seed: int = 0) -> tuple[list[Group], list[Group]]:
    """The groups in two parts, of which the second has the share."""
    order = random.Random(seed).sample(list(groups), len(groups))
    cut = round(len(order) * (1 - share))
    return order[:cut], order[cut:]


def train_pairs(data: Path, name: str, size: dict) -> list[Group]:
    return read(data / PAIRS[name] / "train.jsonl.gz", limit=size["train"])


def test_sets(data: Path, limit: int | None) -> dict[str, list[Group]]:
    adversarial = [data / "llmbar" / f"adv_{name}.jsonl.gz" for name in ("gptinst", "gptout", "manual", "neighbor")]
    return {"HH helpful": read(data / "hh_rlhf_helpful" / "test.jsonl.gz", limit=limit),
            "HH harmless": read(data / "hh_rlhf_harmless" / "test.jsonl.gz", limit=limit),
            "LLMBar natural": read(data / "llmbar" / "natural.jsonl.gz", limit=limit),
            "LLMBar adversarial": read(*adversarial, limit=limit),
            "PandaLM": read(data / "pandalm" / "testset_3annotators.jsonl.gz", limit=limit),
            "WebGPT": read(data / "webgpt_graded" / "train.jsonl.gz", limit=limit)}


# -------------------------------------------------------------------------------------------------------------- models
def body(folder: Path, tokenizer, seed: int = 0) -> Path:
    """A decoder of one layer with random weights."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(out: Path, start: Path, recipe: str, departures: dict, train: str, *, cut: dict = CUT, epochs: float,
        lr: float = 1e-3, seed: int = 0) -> trained.TrainedReward | trained.TrainedComparison:
    """prefopt.train on a file of groups, and the reward that comes out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cut to max_")            # on purpose
        tiny.run(out, start, recipe, departures, {"train": train, "encoding": {}, **cut},
                 {"epochs": epochs, "groups_per_step": 32, "lr": lr, "tokens": 8192, "seed": seed})
    return trained.load(str(out))


def language_model(folder: Path, groups: list[Group], tokenizer, steps: int) -> Path:
    """make_model's decoder after so many steps on the chosen responses."""
    torch.manual_seed(0)
    model = make_model.decoder(tokenizer, 96, 1)
    make_model.warm_start(model, make_model.chosen(groups, tokenizer), steps=steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def untrained(groups: list[Group]) -> dict:
    """Rewards that read no label. R3 has no query types here, so every row takes its open-ended form."""
    texts = [text for row in rows_of(groups) for text in (row.prompt, row.text)]
    return {"R3 (TF-IDF)": R3(Tfidf(texts), branching=False)}


# --------------------------------------------------------------------------------------------------------------- tables
def own_accuracy(model, groups: list[Group]) -> float:
    return bench({"it": model}, {"it": groups}, errors=0)["sets"]["it"]["models"]["it"]["accuracy"]["share"]


def by_epochs(folder: Path, train: list[Group], size: dict) -> dict[int, float]:
    """Accuracy of Bradley-Terry on a fifth of the training pairs, by epochs on the others; the mean over two divisions."""
    found = {epochs: [] for epochs in size["epochs"]}
    for seed in range(2):
        (here := folder / f"division-{seed}").mkdir(parents=True)
        some, others = divided(train, 0.2, seed)
        file = tiny.write(here / "train.jsonl", some)
        start = body(here / "body", make_model.byte_pairs(some, size["vocabulary"]), seed)
        for epochs in size["epochs"]:
            model = run(here / f"{epochs}", start, *HEADS["bradley_terry"], file, epochs=epochs, seed=seed)
            found[epochs].append(own_accuracy(model, others))
    return {epochs: float(np.mean(shares)) for epochs, shares in found.items()}


def models_of(folder: Path, train: list[Group], size: dict, epochs: int) -> tuple[dict, list]:
    """Every reward that learns from these pairs, and Bradley-Terry from each seed."""
    file, tokenizer = tiny.write(folder / "train.jsonl", train), make_model.byte_pairs(train, size["vocabulary"])
    starts = [body(folder / f"body-{seed}", tokenizer, seed) for seed in range(size["seeds"])]
    heads = {name: run(folder / name, starts[0], *recipe, file, epochs=epochs) for name, recipe in HEADS.items()}
    seeds = [run(folder / f"seed-{seed}", start, *HEADS["bradley_terry"], file, epochs=epochs, seed=seed)
             for seed, start in enumerate(starts) if seed]
    smaller = make_model.byte_pairs(train, size["vocabulary"] // 4)
    strong, weak = (language_model(folder / f"lm-{steps}", train, smaller, steps)
                    for steps in (size["steps"], size["steps"] // 4))
    implicit = {name: run(folder / name, strong, *recipe, file, cut=CUT_IMPLICIT, epochs=1, lr=5e-4)
                for name, recipe in IMPLICIT.items()}
    reading = [likelihood(str(lm), encoding=Encoding(**CUT_IMPLICIT)) for lm in (strong, weak)]
    return ({**heads, **implicit, "density ratio per token": DensityRatio(*reading, per_token), **untrained(train)},
            [heads["bradley_terry"], *seeds])


def shares(report: dict) -> dict:
    """{set: {"pairs": ..., model: {accuracy, interval}}} of a report, tied and unscored pairs where there are any."""
    def row(found: dict) -> dict:
        return {"accuracy": round(found["share"], 4), "interval": [round(x, 4) for x in found["interval_groups"]],
                **{k: found[k] for k in ("tied", "unscored") if found[k]}}
    return {title: {"pairs": s["pairs"] - s["tied_labels"], **{name: row(m["accuracy"]) for name, m in s["models"].items()}}
            for title, s in report["sets"].items()}


def half_width(share: float, of: int) -> float:
    return 1.96 * (share * (1 - share) / of) ** 0.5


def on_pairs(folder: Path, data: Path, size: dict, which: int) -> tuple[dict, dict]:
    """The bench of all rewards that learn from one set of pairs, and Bradley-Terry by seed beside the floor."""
    name = list(PAIRS)[which]
    train, sets = train_pairs(data, name, size), test_sets(data, size["test"])
    choice = by_epochs(folder / name, train, size)
    epochs = max(choice, key=choice.get)
    models, seeds = models_of(folder / name, train, size, epochs)
    report = bench(models, sets, train=train, errors=10)
    own = [own_accuracy(model, sets[name]) for model in seeds]
    mean, half = tiny.interval(own)
    return report, {"accuracy on held-out training pairs by epochs": choice, "epochs": epochs, "accuracy": own,
                    "mean": mean, "half width over seeds": half if np.isfinite(half) else None,
                    "half width from the test pairs": half_width(mean, len(sets[name])),
                    "TF-IDF floor": report["sets"][name]["models"]["baseline: TF-IDF"]["accuracy"]["share"]}


def on_grades(folder: Path, data: Path, size: dict) -> dict:
    """The bench of what learns for two epochs from 70 % of WebGPT's grades, on the others."""
    folder.mkdir()
    groups = [graded(g) for g in read(data / "webgpt_graded" / "train.jsonl.gz", limit=size["train"])]
    train, test = divided(groups, 0.3)
    file, tokenizer = tiny.write(folder / "train.jsonl", train), make_model.byte_pairs(train, size["vocabulary"])
    start = body(folder / "body", tokenizer)
    models = {name: run(folder / name, start, *recipe, file, epochs=2) for name, recipe in GRADED.items()}
    return bench({**models, **untrained(train)}, {"WebGPT held out": test}, train=train, errors=10)


def on_solutions(data: Path, size: dict) -> tuple[dict, dict]:
    """The bench of rewards with a reference on GSM8K solutions; and how often the final answer says what `is_correct` says."""
    groups = [with_reference(g) for g in read(data / "gsm8k" / "example_model_solutions.jsonl.gz", limit=size["train"])]
    report = bench({"final answer": right_number, "BLEU": bleu, "chrF": chrf, "ROUGE-L": rouge_l},
                   {"GSM8K solutions": groups}, errors=10)
    same = [right_number(r.text, g.meta["number"]) == label for g in groups
            for r, label in zip(g.responses, g.relevance, strict=True)]
    return report, {"solutions": len(same), "disagree": same.count(False)}


# --------------------------------------------------------------------------------------------------------------- claims
def claims(tables: dict, seeds: dict, solutions: dict) -> dict[str, bool]:
    out = {}
    for name, found in seeds.items():
        out[f"{name}: Bradley-Terry from scratch, mean over seeds, is at least the TF-IDF floor less 3 points"] = \
            found["mean"] >= found["TF-IDF floor"] - SLACK
        out[f"{name}: it is better than chance, over the noise of the test pairs"] = \
            found["mean"] - found["half width from the test pairs"] > 0.5
    if seeds.keys() == PAIRS.keys():
        for name, other in zip(PAIRS, reversed(PAIRS), strict=True):
            found = tables[name]
            out[f"trained on {name}: every head is right at least 10 points more often there than on {other}"] = \
                all(found[name][head]["accuracy"] - found[other][head]["accuracy"] >= 0.1 for head in HEADS)
    out["GSM8K: the final answer agrees with is_correct on 99 % of solutions"] = \
        solutions["disagree"] <= 0.01 * solutions["solutions"]
    found = tables["GSM8K"]["GSM8K solutions"]
    out["GSM8K: no overlap with the reference solution orders solutions as well as the final answer"] = \
        all(found[name]["interval"][1] < found["final answer"]["interval"][0] for name in ("BLEU", "chrF", "ROUGE-L"))
    return out


def report_in_words(tables: dict, seeds: dict, solutions: dict) -> None:
    for title, table in tables.items():
        columns = list(table)
        print(f"\n{title}\n{'':>24}", *(f"{c + ' ' + str(table[c]['pairs']):>24}" for c in columns))
        for model in (m for m in table[columns[0]] if m != "pairs"):
            cells = [table[c][model] for c in columns]
            print(f"{model:>24}", *(f"{c['accuracy']:>9.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]" for c in cells))
    for name, found in seeds.items():
        print(f"{name}: Bradley-Terry {found['mean']:.3f} (seeds {', '.join(f'{x:.3f}' for x in found['accuracy'])}), "
              f"floor {found['TF-IDF floor']:.3f}")
    print(f"final answer: {solutions['disagree']} of {solutions['solutions']} solutions disagree with is_correct\n")


def figure(path: Path, tables: dict) -> None:
    """Accuracy with its interval, a row for each reward and a panel for each test set; the training pairs are the colour."""
    plt = tiny.pyplot()
    sides = [(title, tiny.BLUE if title.endswith("helpful") else tiny.ORANGE) for title in tables if title.startswith("HH")]
    sets = list(tables[sides[0][0]])
    rows = [m for m in tables[sides[0][0]][sets[0]] if m != "pairs"]
    page, panels = plt.subplots(1, len(sets), figsize=(11, 4.2), sharex=True, sharey=True)
    for panel, test in zip(panels, sets, strict=True):
        for shift, (title, colour) in zip((-0.16, 0.16), sides, strict=True):
            found = [tables[title][test][m] for m in rows]
            share = np.array([f["accuracy"] for f in found])
            low, high = np.array([f["interval"] for f in found]).T
            panel.errorbar(100 * share, np.arange(len(rows)) + shift, xerr=100 * np.array([share - low, high - share]), fmt="o",
                           ms=3.5, lw=1, color=colour, label=f"trained on {title}")
        panel.axvline(50, color="black", lw=0.8, ls=":")
        panel.set_title(test, fontsize=9)
    panels[0].set_yticks(np.arange(len(rows)), rows)
    panels[0].invert_yaxis()
    page.supxlabel("percent of held-out pairs ranked right", fontsize=9)
    page.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.06))
    page.tight_layout()
    page.savefig(path)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cookbook.rewards.hh.study", description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="seconds instead of minutes, on a few pairs: shows the path only")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, help="folder of results.json and figure.png")
    parser.add_argument("--pages", type=Path, help="folder of the bench pages")
    found = parser.parse_args()
    if not (found.data / "hh_rlhf_helpful").is_dir():
        parser.error(f"there is no hh_rlhf_helpful in {found.data}: name the folder of the data sets with --data")
    found.out = found.out or (Path("runs/rewards_hh/toy") if found.toy else Path(__file__).parent)
    found.pages = found.pages or Path("runs/rewards_hh") / ("toy" if found.toy else "full")
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def main() -> int:
    given = options()
    size = TOY if given.toy else FULL
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = tiny.over_seeds(partial(on_pairs, folder, given.data, size), len(PAIRS))
        reports = {name: report for name, (report, _) in zip(PAIRS, found, strict=True)}
        seeds = {name: by_seed for name, (_, by_seed) in zip(PAIRS, found, strict=True)}
        reports["WebGPT"] = on_grades(folder / "WebGPT", given.data, size)
        reports["GSM8K"], solutions = on_solutions(given.data, size)
        for name, report in reports.items():
            write(report, given.pages / name.replace(" ", "_"))
    tables = {name: shares(report) for name, report in reports.items()}
    report_in_words(tables, seeds, solutions)
    figure(given.out / "figure.png", tables)
    results = {"settings": size, "Bradley-Terry by seed": seeds, "final answer": solutions, "tables": tables}
    print(f"the bench pages are in {given.pages}")
    return tiny.conclude(given.out, results, claims(tables, {} if given.toy else seeds, solutions))


if __name__ == "__main__":
    raise SystemExit(main())
