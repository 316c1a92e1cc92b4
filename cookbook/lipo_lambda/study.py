"""Lists of eight: what LiPO-lambda sees that other list losses do not, and whether a tiny language model gains from it.

    python -m cookbook.lipo_lambda.study [--toy]
"""
from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cookbook import tiny
from data_tools import labels
from data_tools.batch import Batch
from data_tools.records import Group
from prefopt.config import assemble

K, BETA, TOP = 8, 0.5, 3
WIDE, NARROW = (0.99, 0.50, 0.01), (0.51, 0.50, 0.49)         # the same order, decided clearly and barely
LOSSES = ("lipo", "lipo_hinge", "lipo_list_mle", "lipo_lambda", "lipo_softmax", "lipo_point_mse")
ARMS = {"DPO, best and worst": "dpo", "LiPO, all pairs": "lipo", "LiPO, ListMLE": "lipo_list_mle",
        "LiPO-lambda": "lipo_lambda"}
COLOUR = dict(zip(ARMS, (tiny.BLUE, tiny.ORANGE, tiny.GREEN, tiny.RED), strict=True))
METRICS = ("ndcg", "best", "accuracy", "reward", "kl")


# ------------------------------------------------------------------------------------------------------------ gradients
def gradient(recipe: str, logp: Tensor, relevance: tuple[float, ...]) -> Tensor:
    """d loss / d log pi of one list of one-token responses."""
    objective, n = assemble(recipe, {"beta": 0.05}), len(relevance)
    batch = objective.annotate(Batch({"group": torch.zeros(n, dtype=torch.long), "mask": torch.ones(n, 1),
                                      "relevance": torch.tensor(relevance), "logp_ref": torch.zeros(n, 1).double()}))
    logp = logp.clone().requires_grad_()
    objective.loss(batch.with_columns(logp=logp[:, None])).value.backward()
    return logp.grad


def gradients(draws: int = 10) -> dict:
    """By loss: the norms of the gradient for both label sets, and their largest difference, at random policies."""
    source, found = torch.Generator().manual_seed(0), {name: {"wide": [], "narrow": [], "gap": []} for name in LOSSES}
    for _ in range(draws):
        logp = 5 * torch.randn(3, generator=source, dtype=torch.float64)
        for name, row in found.items():
            wide, narrow = gradient(name, logp, WIDE), gradient(name, logp, NARROW)
            row["wide"].append(float(wide.norm()))
            row["narrow"].append(float(narrow.norm()))
            row["gap"].append(float((wide - narrow).abs().max()))
    return found


# --------------------------------------------------------------------------------------------------- the language model
def lists(world: tiny.Language, n: int) -> list[Group]:
    """Lists of eight, ranked with Gumbel noise (Plackett-Luce in the true reward) and labelled as LiPO labels ranks."""
    responses = world.lists(n, K)
    noisy = world.reward(responses) + world.draw.gumbel(size=(n, K))
    return [world.group(rows, labels.lipo(labels.hard(scores)))
            for rows, scores in zip(responses, noisy.tolist(), strict=True)]


def language(folder: Path, warm_up: int, steps: int, lr: float, seed: int) -> dict:
    """Every arm trained on the same lists from the same warmed-up model: name -> measurements."""
    world = tiny.Language(seed, words=24)
    reference = world.reference(folder / f"reference-{seed}", seed, warm_up)
    ranked = lists(world, 8 * steps)
    pairs = [pair for group in ranked for pair in labels.split(group, labels.best_worst(group.relevance))]
    data = {"lists": tiny.write(folder / f"lists-{seed}.jsonl", ranked),
            "pairs": tiny.write(folder / f"pairs-{seed}.jsonl", pairs)}
    held_out = world.lists(500, K)
    found = {"random order": quality(world.draw.random((500, K)), world.reward(held_out))}
    for name, recipe in ARMS.items():
        out = folder / f"run-{seed}-{name}"
        tiny.run(out, reference, recipe, {"beta": BETA},
                 {"train": data["pairs" if recipe == "dpo" else "lists"], "cache_reference": True},
                 {"lr": lr, "groups_per_step": 8, "seed": seed})
        models = tiny.trained(out, reference)
        score = tiny.log_ratios(models, map(world.group, held_out)).reshape(-1, K)
        samples, words = world.sampled(models, 2000)
        found[name] = {**quality(score, world.reward(held_out)), "reward": float(world.reward(samples).mean()),
                       "kl": float(tiny.log_ratios(models, [world.group(samples)]).mean()), "words": words}
    return found


def quality(score: np.ndarray, reward: np.ndarray) -> dict[str, float]:
    """How well scores (n, K) order lists by their true reward: NDCG@3 with LiPO's gains, best found, pairs in order.

    >>> quality(np.array([[3.0, 2.0, 1.0]]), np.array([[0.3, 0.2, 0.1]]))
    {'ndcg': 1.0, 'best': 1.0, 'accuracy': 1.0}
    """
    k = score.shape[1]
    gain = 2 ** ((reward.argsort(1).argsort(1) + 0.5) / k) - 1
    discount = (1 / np.log2(2 + np.arange(k)))[:TOP]
    dcg, ideal = ((np.take_along_axis(gain, (-x).argsort(1), 1)[:, :TOP] * discount).sum(1) for x in (score, reward))
    i, j = np.triu_indices(k, 1)
    same = (score[:, i] > score[:, j]) == (reward[:, i] > reward[:, j])
    return {"ndcg": float((dcg / ideal).mean()), "best": float((score.argmax(1) == reward.argmax(1)).mean()),
            "accuracy": float(same.mean())}


# --------------------------------------------------------------------------------------------------------------- claims
def claims(found: dict, tables: list[dict]) -> dict[str, bool]:
    def ratio(name: str) -> float:
        return min(w / n for w, n in zip(found[name]["wide"], found[name]["narrow"], strict=True))

    out = {f"{name}: labels {WIDE} and {NARROW} give the identical gradient":
           max(found[name]["gap"]) == 0 for name in ("lipo", "lipo_hinge", "lipo_list_mle")}
    out["lipo_lambda: the norms of the two gradients differ more than 20 times"] = ratio("lipo_lambda") > 20
    for name in ARMS:
        gain = [t[name]["ndcg"] - t["random order"]["ndcg"] for t in tables]
        out[f"language model, {name}: held-out NDCG@{TOP} is at least 0.1 above that of random order"] = min(gain) > 0.1
    if len(tables) > 1:
        def lead(name: str, other: str) -> tuple[float, float]:
            return tiny.interval([t[name]["ndcg"] - t[other]["ndcg"] for t in tables])

        mean, half = lead("LiPO, all pairs", "DPO, best and worst")
        out[f"language model: all pairs order better than best and worst alone (NDCG@{TOP}, paired 95 % interval above 0)"] \
            = mean - half > 0
        out[f"language model: the paper's order is not reproduced, LiPO-lambda's NDCG@{TOP} is not above that of all pairs"] \
            = lead("LiPO-lambda", "LiPO, all pairs")[0] < 0
    return out


def versus(tables: list[dict], metric: str) -> dict[str, str]:
    """LiPO-lambda minus each other arm, paired over seeds."""
    return {name: tiny.shown([t["LiPO-lambda"][metric] - t[name][metric] for t in tables], 4)
            for name in ARMS if name != "LiPO-lambda"}


def report(found: dict, tables: list[dict]) -> None:
    print("\ngradient norms, clear and close labels")
    for name, row in found.items():
        ratio = np.array(row["wide"]) / np.array(row["narrow"])
        print(f"{name:>20} ratio {ratio.min():.1f} to {ratio.max():.1f}, largest difference {max(row['gap']):.2g}")
    print(f"\nlanguage model, lists of {K}, {len(tables)} seeds")
    for name in tables[0]:
        print(f"{name:>20}", *(f"{m}: {tiny.shown([t[name][m] for t in tables], 3):16}" for m in tables[0][name]))
    print("\nLiPO-lambda minus the others, paired")
    for metric in METRICS:
        print(f"{metric:>20}", *(f"{name}: {value};" for name, value in versus(tables, metric).items()))
    print()


def figure(path: Path, found: dict, tables: list[dict]) -> None:
    plt = tiny.pyplot()
    page, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.5), width_ratios=[1.15, 1, 1])
    for place, row in enumerate(found.values()):
        for shift, key, colour in ((-0.16, "wide", tiny.RED), (0.16, "narrow", tiny.BLUE)):
            left.scatter(row[key], [place + shift] * len(row[key]), s=14, color=colour, zorder=3, lw=0)
    left.scatter([], [], color=tiny.RED, s=20, label="labels .99 .50 .01")
    left.scatter([], [], color=tiny.BLUE, s=20, label="labels .51 .50 .49")
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.set(xscale="log", xlabel="norm of the gradient, ten random policies", title="Who sees how far labels are apart")
    left.legend(loc="upper left", handletextpad=0.1)
    for place, name in enumerate(ARMS):
        values = [t[name]["ndcg"] for t in tables]
        mean, half = tiny.interval(values)
        middle.scatter(values, [place] * len(values), s=16, alpha=0.5, color=COLOUR[name], lw=0)
        middle.errorbar(mean, place, xerr=half if np.isfinite(half) else 0, marker="D", ms=6, capsize=3, color=COLOUR[name])
        kl, reward = np.array([[t[name]["kl"], t[name]["reward"]] for t in tables]).T
        right.scatter(kl, reward, s=16, alpha=0.45, color=COLOUR[name], lw=0)
        right.scatter(kl.mean(), reward.mean(), s=80, color=COLOUR[name], edgecolor="black", lw=0.8, label=name)
    middle.set_yticks(range(len(ARMS)), [name.replace(", ", ",\n") for name in ARMS])
    random = np.mean([t["random order"]["ndcg"] for t in tables])
    middle.set(title=f"Held-out NDCG@{TOP} (random order {random:.2f})", ylim=(len(ARMS) - 0.5, -0.5))
    right.set(xlabel="KL(policy || reference), nats", ylabel="true reward of samples", title="Policies, same beta")
    right.legend(loc="lower right")
    page.tight_layout()
    page.savefig(path)


def main() -> int:
    options = tiny.options("lipo_lambda", __doc__)
    settings = {"seeds": 1, "warm_up": 100, "steps": 20, "lr": 3e-3} if options.toy else \
        {"seeds": 4, "warm_up": 300, "steps": 100, "lr": 1e-3}
    found = gradients()
    with tempfile.TemporaryDirectory() as folder:
        study = partial(language, Path(folder), settings["warm_up"], settings["steps"], settings["lr"])
        tables = tiny.over_seeds(study, settings["seeds"])
    report(found, tables)
    figure(options.out / "figure.png", found, tables)
    results = {"settings": settings, "gradients": found, "language": tables,
               "lambda_minus_others": {metric: versus(tables, metric) for metric in METRICS}}
    return tiny.conclude(options.out, results, claims(found, tables))


if __name__ == "__main__":
    raise SystemExit(main())
