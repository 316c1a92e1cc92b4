"""Styles that beat each other in a circle: self-play with a general preference model against methods of one score per answer.

    python -m cookbook.nash.study [--toy]
"""
from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from cookbook import tiny
from cookbook.nash.styles import FIRST, LENGTH, PAYOFF, STYLES, WORDS, prefers, style, texts
from data_tools.records import Group, Response
from prefopt import config
from prefopt.games import solve
from prefopt.games.game import Game
from prefopt.iterate import iterate
from prefopt.models import load_policy, load_tokenizer
from prefopt.train import train
from rewards.trained import load

BETA = 0.1                                                    # weight of the KL to the first policy, beside win rates
SCORES = 4                                                    # times as much beside scores: d score / d P = 4 at P = 1/2
EVERY = [word for words in WORDS.values() for word in words]
STEADY = {"AdamW": {"betas": [0.0, 0.95]}}                    # momentum runs in circles where preferences do


# -------------------------------------------------------------------------------------------------- the policy and the judges
def first_policy(folder: Path, seed: int) -> Path:
    """A model that answers in three words, mostly tersely."""
    words = tiny.tokenizer([*EVERY, "?"])
    model = tiny.language_model(len(words), width=32, seed=seed)
    tiny.warm_up(model, [f"? {text}" for text in texts(4000, np.random.default_rng(seed))], words, steps=400, seed=seed)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def pairs(path: Path, n: int, seed: int) -> str:
    """Pairs of such answers as one annotator judges them."""
    draw, groups = np.random.default_rng(seed + 1000), []
    for one, other in zip(texts(n, draw), texts(n, draw), strict=True):
        if one != other:
            best = [one, other] if prefers(one, other, draw) else [other, one]
            groups.append(Group("?", [Response(f" {text}") for text in best], relevance=[1.0, 0.0]))
    return tiny.write(path, groups)


@torch.no_grad()
def spoken(folder: Path) -> np.ndarray:
    """The probability of every answer of known words, exact, and of all others together."""
    model, words = load_policy(str(folder)).eval(), load_tokenizer(str(folder))
    ids = torch.tensor(words([f"? {text}" for text in answers()])["input_ids"])
    logp = model(ids).logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(-1).sum(1)
    found = logp.exp().numpy()
    return np.append(found, 1 - found.sum())


def answers() -> list[str]:
    return [" ".join(words) for words in product(EVERY, repeat=LENGTH)]


def by_style(answer: np.ndarray) -> np.ndarray:
    """Probabilities of styles."""
    out = np.zeros(len(STYLES))
    np.add.at(out, [STYLES.index(style(text)) for text in [*answers(), ""]], answer)
    return out


def judged(model, graded: bool) -> list[list[float]]:
    """What a trained judge says of three plain answers, P(row beats column)."""
    asked = Group("?", [Response(" " + " ".join(words[:LENGTH])) for words in WORDS.values()])
    if not graded:
        return model.compare([asked])[0]
    from rewards.base import rows_of
    r = np.array(model(rows_of([asked])))
    return (1 / (1 + np.exp(r[None] - r[:, None]))).tolist()


# -------------------------------------------------------------------------------------------------------------------- methods
def methods(data: str, prompts: str, gpm: str, bt: str, size: Mapping) -> dict[str, dict]:
    """Run files, but for what all share. A row of the table each; those that know a score alone first."""
    def sampled(*rewards, k=8):
        return {"k": k, "rewards": list(rewards), "max_new_tokens": LENGTH, "batch": 1024, "dump": 0}
    loop = {"data": {"train": prompts}, "train": {"steps": size["steps"], "lr": 3e-3, "optimizer": STEADY}}
    return {
        "DPO": {"recipe": "dpo", "set": {"beta": BETA}, "data": {"train": data}, "train": {"epochs": 2, "lr": 3e-3}},
        "online DPO, Bradley-Terry": {"recipe": "online_dpo", "set": {"beta": BETA},
                                      "rollout": sampled({"bradley_terry": {"reward": bt}}, k=4), **loop},
        "RLOO, Bradley-Terry": {"recipe": "rloo", "set": {"beta": SCORES * BETA}, "rollout": sampled(bt), **loop},
        "EGPO, GPM": {"recipe": "egpo", "set": {"beta": BETA}, "rollout": sampled(gpm, k=4), **loop},
        "Nash-MD-PG, GPM": {"recipe": "nash_md_pg", "set": {"beta": BETA}, "rollout": sampled(gpm), **loop},
        "GPO, GPM": {"recipe": "gpo", "set": {"beta": SCORES * BETA}, "rollout": sampled(gpm), **loop},
        "INPO, GPM": {"recipe": "inpo", "set": {"beta": 0.5, "anchor": BETA / 0.5}, "data": {"train": prompts},
                      "rollout": {**sampled(gpm), "dump": 1}, "iterate": {"rounds": size["rounds"], "select": "everything",
                                                                          "labels": "soft", "prompts": 128},
                      "train": {"epochs": 4, "lr": 3e-3, "optimizer": STEADY}},
    }


def run(out: Path, policy: Path, seed: int, settings: dict) -> Path:
    """The run of a method; the folder of its last policy."""
    made = config.make({"policy": str(policy), "out": str(out), **settings,
                        "data": {"cache": str(out.parent / "cache"), "encoding": {"add_eos": False}, **settings["data"]},
                        "train": {"device": "cpu", "tokens": None, "warmup": 0.05, "groups_per_step": 32, "seed": seed,
                                  **settings["train"]}})
    (iterate if made.iterate else train)(made, show=False)
    return out / "model"


def study(home: Path, size: Mapping, seed: int) -> dict:
    """Every method from one first policy: probabilities of styles, exact, and KL to the first policy."""
    home = home / str(seed)
    home.mkdir(parents=True)
    first, data = first_policy(home / "first", seed), pairs(home / "pairs.jsonl", size["pairs"], seed)
    prompts = tiny.write(home / "prompts.jsonl", [Group("?", [])] * 32)
    judge = {"data": {"train": data, "encoding": {}}, "train": {"epochs": 3, "groups_per_step": 64, "lr": 3e-3}}
    gpm = run(home / "gpm", first, seed, {"recipe": "general_preference", "set": {"dim": 4, "tau": 0.3}, **judge})
    bt = run(home / "bt", first, seed, {"recipe": "bradley_terry", **judge})
    start = spoken(first)
    found = {"first policy": {"styles": by_style(start).tolist(), "kl": 0.0}}
    for name, settings in methods(data, prompts, str(gpm), str(bt), size).items():
        said = spoken(run(home / settings["recipe"], first, seed, settings))
        found[name] = {"styles": by_style(said).tolist(), "kl": float((said * np.log(said / start)).sum())}
    return {"methods": found, "GPM": judged(load(str(gpm)), False), "Bradley-Terry": judged(load(str(bt)), True)}


# --------------------------------------------------------------------------------------------------------------------- results
def exploitability(styles) -> float:
    """What the best answer wins above one half."""
    return float((np.array(PAYOFF) @ np.array(styles)).max() - 0.5)


def fitted(styles: np.ndarray) -> np.ndarray:
    """Rewards of styles that Bradley-Terry fits to infinitely many pairs of a policy."""
    P, r = np.array(PAYOFF), np.zeros(len(styles))
    for _ in range(20_000):
        r += (np.outer(styles, styles) * (P - 1 / (1 + np.exp(r[None] - r[:, None])))).sum(1)
    return r - styles @ r


def best_tilt(styles: np.ndarray) -> float:
    """The least exploitability of ref exp(r / beta) / Z over all beta."""
    r, out = fitted(styles), []
    for scale in np.linspace(0, 50, 2001):
        tilted = np.log(styles) + scale * r
        tilted = np.exp(tilted - tilted.max())
        out.append(exploitability(tilted / tilted.sum()))
    return min(out)


def summary(one: dict) -> dict:
    """A seed's exploitabilities, the largest distance of a style from the equilibrium with the KL, and win rates."""
    start = np.array(one["methods"]["first policy"]["styles"])
    game = Game(PAYOFF, start)
    equilibrium = solve.equilibrium(game, BETA)[0]
    styles = {name: np.array(m["styles"]) for name, m in one["methods"].items()}
    return {"exploitability": {name: exploitability(p) for name, p in styles.items()},
            "from the equilibrium": {name: float(np.abs(p - equilibrium.numpy()).max()) for name, p in styles.items()},
            "equilibrium": float(solve.exploitability(game, equilibrium)), "any temperature": best_tilt(start),
            "wins": [[float(p @ np.array(PAYOFF) @ q) for q in styles.values()] for p in styles.values()]}


def claims(found: list[dict], summaries: list[dict]) -> dict[str, bool]:
    names = list(found[0]["methods"])[1:]
    scores, games = ([n for n in names if ("GPM" in n) == inside] for inside in (False, True))
    out = {"the general preference model has the circle: each of the three wins within .1 of .9, all seeds":
           all(abs(f["GPM"][i][(i + 1) % 3] - 0.9) < 0.1 for f in found for i in range(3)),
           "Bradley-Terry says that one of them loses, all seeds":
           all(min(f["Bradley-Terry"][i][(i + 1) % 3] for i in range(3)) < 0.5 for f in found)}
    for name in games:
        out[f"{name} is less exploitable than every method of one score, all seeds"] = \
            all(s["exploitability"][name] < min(s["exploitability"][n] for n in scores) for s in summaries)
        out[f"{name} is less exploitable than Bradley-Terry's optimum at any temperature, all seeds"] = \
            all(s["exploitability"][name] < s["any temperature"] for s in summaries)
    for name in ("EGPO, GPM", "GPO, GPM"):
        out[f"{name}: every style within .1 of the equilibrium, all seeds"] = \
            all(s["from the equilibrium"][name] < 0.1 for s in summaries)
    return out


def report(found: list[dict], summaries: list[dict]) -> None:
    print(f"\n{'':>28}{'exploitability':>24}{'from equilibrium':>20}{'KL':>8}   {', '.join(STYLES[:3])}")
    for name in found[0]["methods"]:
        values = ", ".join(f"{s['exploitability'][name]:.3f}" for s in summaries)
        off, kl = (np.mean(x) for x in ([s["from the equilibrium"][name] for s in summaries],
                                        [f["methods"][name]["kl"] for f in found]))
        styles = ", ".join(f"{p:.2f}" for p in np.mean([f["methods"][name]["styles"] for f in found], 0)[:3])
        print(f"{name:>28}{values:>24}{off:>20.3f}{kl:>8.2f}   {styles}")
    for key, said in (("equilibrium", "of the equilibrium"), ("any temperature", "Bradley-Terry, any temperature")):
        values = ", ".join(f"{s[key]:.3f}" for s in summaries)
        print(f"{said:>28}{values:>24}")
    print("\nmean win rate of row against column:")
    for name, row in zip(found[0]["methods"], np.mean([s["wins"] for s in summaries], 0), strict=True):
        print(f"{name:>28}", *(f"{v:6.3f}" for v in row))


def figure(path: Path, found: list[dict], summaries: list[dict]) -> None:
    plt = tiny.pyplot()
    page, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1.15, 1])
    names = list(found[0]["methods"])
    colours = [tiny.GREY if n == "first policy" else tiny.RED if "GPM" in n else tiny.BLUE for n in names]
    for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
        left.plot([s["exploitability"][name] for s in summaries], [place] * len(summaries), "o", color=colour, alpha=0.7)
    for key, colour, said in (("any temperature", tiny.BLUE, "Bradley-Terry, best temperature"),
                              ("equilibrium", "black", "equilibrium with the KL")):
        left.axvline(np.mean([s[key] for s in summaries]), color=colour, ls=":", label=said)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel="what the best answer wins above 1/2", title="Exploitability, every seed", xlim=(0, 0.42))
    left.legend(loc="lower right", fontsize=7)
    corners = np.array([[0, 0], [1, 0], [0.5, 0.75 ** 0.5]])
    right.plot(*corners[[0, 1, 2, 0]].T, color="black", lw=0.8)
    for name, colour in zip(names, colours, strict=True):
        for f in found:
            p = np.array(f["methods"][name]["styles"])[:3]
            right.plot(*(p / p.sum() @ corners), "o", color=colour, ms=5, alpha=0.7)
    for text, corner in zip(STYLES, corners, strict=False):
        right.annotate(text, corner, xytext=(0, 6 if corner[1] else -12), textcoords="offset points", ha="center")
    right.set(title="Where the policies went", aspect="equal")
    right.axis("off")
    page.tight_layout()
    page.savefig(path)


def main() -> int:
    options = tiny.options("nash", __doc__)
    size = {"seeds": 1, "pairs": 2000, "steps": 60, "rounds": 4} if options.toy else \
        {"seeds": 3, "pairs": 3000, "steps": 120, "rounds": 8}
    with tempfile.TemporaryDirectory() as home:
        found = tiny.over_seeds(partial(study, Path(home), size), size["seeds"])
    summaries = [summary(one) for one in found]
    report(found, summaries)
    figure(options.out / "figure.png", found, summaries)
    results = {"settings": {**size, "beta": BETA, "first": FIRST, "payoff": PAYOFF}, "seeds": found, "summaries": summaries}
    return tiny.conclude(options.out, json.loads(json.dumps(results)), claims(found, summaries))


if __name__ == "__main__":
    raise SystemExit(main())
