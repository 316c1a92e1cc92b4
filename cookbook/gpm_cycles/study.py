"""Cyclic preferences: a general preference model fits what no score can, and which widths find the way there.

    python -m cookbook.gpm_cycles.study [--toy]
"""
from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cookbook import tiny
from data_tools.records import Group, Response
from prefopt import margins, masks
from rewards.base import rows_of
from rewards.trained import load

SIZES = (3, 4, 5, 6, 7, 8, 9)
PROMPTS = ("plain", "mixed", "against")                       # items, others in another order, "plain" turned round
ARMS = {"GPM": ("general_preference", {"dim": 8}), "GPM, gated": ("gpm_gated", {"dim": 8}),
        "Bradley-Terry": ("bradley_terry", {})}
WIDTHS = (2, 4, 8)
TAUS, RATES = (0.1, 1.0), (3e-3, 1e-2)


# ---------------------------------------------------------------------------------------------------------- tournaments
def tournament(n: int) -> np.ndarray:
    """wins (n, n): everyone beats the next ones in a circle; of two that stand opposite (n even) the first wins.

    >>> tournament(3)
    array([[0.5, 1. , 0. ],
           [0. , 0.5, 1. ],
           [1. , 0. , 0.5]])
    """
    ahead = (np.arange(n)[None] - np.arange(n)[:, None]) % n
    wins = np.where((2 * ahead < n) | (2 * ahead == n) & (np.arange(n)[:, None] < np.arange(n)[None]), 1.0, 0.0)
    np.fill_diagonal(wins, 0.5)
    return wins


def bound(wins: np.ndarray) -> float:
    """The largest share of pairs that one order of the items gets right: what no score can exceed, by dynamic programming.

    Placing item i after the set S gets the pairs right in which a member of S beats i.

    >>> round(bound(tournament(3)), 4), bound(tournament(5))
    (0.6667, 0.7)
    """
    n = len(wins)

    @lru_cache(None)
    def best(placed: int) -> float:
        members = [i for i in range(n) if placed >> i & 1]
        return max((best(placed & ~(1 << last)) + sum(wins[i, last] for i in members if i != last) for last in members),
                   default=0.0)
    return float(best(2 ** n - 1) / (n * (n - 1) / 2))


def groups(sizes: Sequence[int]) -> list[Group]:
    """For each size the items under every prompt, as one group with its wins."""
    out = []
    for n in sizes:
        items = np.random.default_rng(n).permutation(max(SIZES))
        for prompt, chosen, wins in zip(PROMPTS, (items[:n], items[::-1][:n], items[:n]),
                                        (tournament(n), tournament(n), tournament(n).T), strict=True):
            out.append(Group(f"{prompt} n{n} ?", [Response(f" w{i}") for i in chosen], wins=wins.tolist(),
                             meta={"size": n, "prompt": prompt}))
    return out


# ------------------------------------------------------------------------------------------------- the collapsed optimum
def loss_near(embedding: Tensor, tau: float) -> Tensor:
    """The loss of the cycle of n = len(embedding) items, whose embeddings are these, brought to length 1."""
    made = masks.unit_embedding(embedding)
    gate = torch.ones(1, len(made), made.shape[1] // 2, dtype=made.dtype)
    margin = margins.general_preference(made[None], gate, tau=tau)[0]
    return -F.logsigmoid(margin[torch.from_numpy(tournament(len(made))) == 1]).mean()


def curvature(n: int, dim: int, tau: float) -> float:
    """Smallest eigenvalue of the loss's second derivatives where all embeddings are equal: below 0 there is a way out.

    >>> abs(curvature(3, 2, 0.1)) < 1e-6, round(curvature(3, 4, 0.1), 3)
    (True, -2.887)
    """
    start = torch.zeros(n, dim, dtype=torch.float64)
    start[:, 0] = 1
    second = torch.autograd.functional.hessian(lambda x: loss_near(x.view(n, dim), tau), start.flatten())
    return float(torch.linalg.eigvalsh(second)[0])


# -------------------------------------------------------------------------------------------------------------- training
def base(folder: Path, seed: int) -> Path:
    """An untrained model and its tokenizer, saved."""
    words = tiny.tokenizer([*(f"w{i}" for i in range(max(SIZES))), *(f"n{i}" for i in SIZES), *PROMPTS, "?"])
    tiny.language_model(len(words), width=32, seed=seed).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def right(found: np.ndarray, wins: np.ndarray) -> float:
    """Share of labelled pairs whose preference has the right sign; an indifferent one counts half.

    >>> right(np.array([[0.0, 1.0], [-1.0, 0.0]]), tournament(2))
    1.0
    """
    return float((np.sign(found)[wins == 1] / 2 + 0.5).mean())


def preferences(model, asked: list[Group]) -> list[np.ndarray]:
    """Log-odds of every pair: a comparison's margin, or the differences of a reward's scores."""
    if not hasattr(model, "compare"):
        scores = iter(model(rows_of(asked)))
        vectors = [np.array([next(scores) for _ in g.responses]) for g in asked]
        return [v[:, None] - v[None] for v in vectors]
    encoded, _ = model.encoded(asked)
    out = {}
    for numbers, batch in model.batches(encoded):
        for n, margin in zip(numbers, model.part(batch, "margin").detach().numpy(), strict=True):
            k = len(asked[n].responses)
            out[n] = margin[:k, :k]
    return [out[n] for n in range(len(asked))]


def fitted(out: Path, start: Path, recipe: str, departures: dict, sizes: Sequence[int], steps: int, lr: float, seed: int):
    """The trained reward model, the preferences it has and the groups it was trained on."""
    asked = groups(sizes)
    out.parent.mkdir(exist_ok=True)
    data = {"train": tiny.write(out.parent / f"{out.name}.jsonl", asked)}
    tiny.run(out, start, recipe, departures, data,
             {"lr": lr, "steps": steps, "epochs": steps, "groups_per_step": len(asked), "seed": seed})
    model = load(str(out))
    return model, preferences(model, asked), asked


def families(folder: Path, start: Path, sizes: Sequence[int], steps: int, seed: int) -> dict:
    """Every arm on all families: accuracy by size and on the reversed prompts, symmetry, and what comparing costs."""
    table = {}
    for name, (recipe, departures) in ARMS.items():
        model, found, asked = fitted(folder / recipe, start, recipe, departures, sizes, steps, 3e-3, seed)
        accuracy = [right(f, np.array(g.wins)) for f, g in zip(found, asked, strict=True)]

        def mean(key, value, accuracy=accuracy, asked=asked):
            return float(np.mean([a for a, g in zip(accuracy, asked, strict=True) if g.meta[key] == value]))

        table[name] = {
            "by size": {n: mean("size", n) for n in sizes}, "reversed": mean("prompt", "against"),
            "asymmetry": max(float(np.abs(f + f.T).max()) for f in found),
            "passes": model.models.policy_model().calls["positions"], "responses": sum(len(g.responses) for g in asked)}
    return table


def widths(folder: Path, start: Path, steps: int, seed: int) -> dict:
    """Cycles of 3 and 5: accuracy by width, temperature and learning rate."""
    return {f"dim {dim}, tau {tau}": [
        float(np.mean([right(f, np.array(g.wins)) for f, g in zip(*fitted(
            folder / f"{dim}-{tau}-{lr}", start, "general_preference", {"tau": tau, "dim": dim}, (3, 5), steps, lr, seed)[1:],
            strict=True)])) for lr in RATES] for dim in WIDTHS for tau in TAUS}


def study(folder: Path, sizes: Sequence[int], steps: int, grid_steps: int, seed: int) -> tuple[dict, dict]:
    start = base(folder / f"base-{seed}", seed)
    grid = widths(folder / f"widths-{seed}", start, grid_steps, seed) if grid_steps else {}
    return families(folder / f"families-{seed}", start, sizes, steps, seed), grid


# --------------------------------------------------------------------------------------------------------------- claims
def shares(grids: list[dict]) -> dict[str, float]:
    """Share of runs (seeds and learning rates) that fit at 99 %, by width and temperature."""
    return {name: float(np.mean([a >= 0.99 for grid in grids for a in grid[name]])) for name in grids[0]}


def claims(tables: list[dict], bounds: dict[int, float], curves: dict[str, float], share: dict[str, float]) -> dict[str, bool]:
    out = {}
    for name in ("GPM", "GPM, gated"):
        out[f"{name}: at least 99 % of the preferences of every family, all seeds"] = \
            all(a >= 0.99 for t in tables for a in t[name]["by size"].values())
        out[f"{name}: prompts that turn the preferences of another prompt round are fitted too, all seeds"] = \
            all(t[name]["reversed"] >= 0.99 for t in tables)
        out[f"{name}: log-odds are exactly antisymmetric, and K responses cost K passes"] = \
            all(t[name]["asymmetry"] == 0 and t[name]["passes"] == t[name]["responses"] for t in tables)
    out["Bradley-Terry stays at or below the exact bound of every family, all seeds"] = \
        all(t["Bradley-Terry"]["by size"][n] <= bounds[n] + 1e-9 for t in tables for n in bounds)
    out["equal embeddings are a minimum in two dimensions and a saddle in four"] = \
        all((abs(value) < 1e-6) == ("dim 2" in name) and value < 1e-6 for name, value in curves.items())
    if share:
        by_width = {dim: np.mean([share[f"dim {dim}, tau {tau}"] for tau in TAUS]) for dim in WIDTHS}
        out["fewer than half of the runs with two dimensions fit, at least three quarters of those with four and with eight"] = \
            by_width[2] < 0.5 and min(by_width[4], by_width[8]) >= 0.75
    return out


def report(tables: list[dict], bounds: dict, curves: dict, share: dict) -> None:
    print(f"\n{'accuracy':>14}", *(f"{n:>6} items" for n in bounds), "    reversed")
    print(f"{'bound':>14}", *(f"{b:>12.3f}" for b in bounds.values()))
    for name in ARMS:
        print(f"{name:>14}", *(f"{np.mean([t[name]['by size'][n] for t in tables]):>12.3f}" for n in bounds),
              f"{np.mean([t[name]['reversed'] for t in tables]):>12.3f}")
    print("\nsmallest curvature at equal embeddings:", *(f"{k}: {v:.3f};" for k, v in curves.items()))
    print("share of runs that fit at 99 %:", *(f"{k}: {v:.2f};" for k, v in share.items()), "\n")


def figure(path: Path, tables: list[dict], bounds: dict, share: dict) -> None:
    plt = tiny.pyplot()
    page, (left, right_side) = plt.subplots(1, 2, figsize=(8.6, 3.3), width_ratios=[1.25, 1])
    for name, colour, marker in (("GPM", tiny.RED, "o"), ("GPM, gated", tiny.ORANGE, "x"), ("Bradley-Terry", tiny.BLUE, "o")):
        for t in tables:
            left.plot(list(bounds), list(t[name]["by size"].values()), marker, color=colour, ms=6, alpha=0.7,
                      label=name if t is tables[0] else None)
    left.step(list(bounds), list(bounds.values()), where="mid", color="black", lw=1, ls=":", label="bound of any score")
    left.set(xlabel="items in the circle", ylabel="preferences with the right sign", ylim=(0.25, 1.03),
             title="One score per response cannot")
    left.legend(loc="lower left", ncols=2)
    place = np.arange(len(WIDTHS))
    for shift, tau, colour in ((-0.2, TAUS[0], tiny.RED), (0.2, TAUS[1], tiny.GREEN)):
        heights = [share.get(f"dim {dim}, tau {tau}", 0) for dim in WIDTHS]
        right_side.bar(place + shift, heights, 0.38, color=colour, label=f"tau {tau}")
    right_side.set_xticks(place, WIDTHS)
    right_side.set(xlabel="dim", ylabel="share of runs that fit at 99 %", ylim=(0, 1.25),
                   title="Unit vectors in two dimensions get stuck")
    right_side.legend(loc="upper left", ncols=2)
    page.tight_layout()
    page.savefig(path)


def main() -> int:
    options = tiny.options("gpm_cycles", __doc__)
    settings = {"seeds": 1, "sizes": [3, 4, 5], "steps": 300, "grid_steps": 0} if options.toy else \
        {"seeds": 3, "sizes": SIZES, "steps": 400, "grid_steps": 250}
    with tempfile.TemporaryDirectory() as folder:
        found = tiny.over_seeds(partial(study, Path(folder), settings["sizes"], settings["steps"], settings["grid_steps"]),
                                settings["seeds"])
    tables, grids = map(list, zip(*found, strict=True))
    bounds = {n: bound(tournament(n)) for n in settings["sizes"]}
    curves = {f"{n} items, dim {dim}": curvature(n, dim, 0.1) for n in (3, 5, 9) for dim in (2, 4)}
    share = shares(grids)
    report(tables, bounds, curves, share)
    figure(options.out / "figure.png", tables, bounds, share)
    return tiny.conclude(options.out, {"settings": settings, "bounds": bounds, "families": tables, "curvature": curves,
                                       "share of runs that fit": share, "widths": grids}, claims(tables, bounds, curves, share))


if __name__ == "__main__":
    raise SystemExit(main())
