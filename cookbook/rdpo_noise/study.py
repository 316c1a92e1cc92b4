"""Flipped labels: rDPO against DPO, on a bandit whose optimum is known and on a tiny language model.

    python -m cookbook.rdpo_noise.study [--toy]
"""
from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from cookbook import tiny
from cookbook.rdpo_noise import bandit
from data_tools.records import Group

FLIP, BETA = 0.3, 0.5
UNFLIP = {"labels": {"unflip": {"flip": FLIP}}}
LOSSES = {"logistic (DPO)": ("dpo", {"beta": BETA}), "squared (IPO)": ("ipo", {"tau": 0.5}),
          "hinge (SLiC)": ("hinge", {"beta": BETA})}
ARMS = {                                                      # recipe, its departures, share of labels flipped
    "DPO, clean labels": ("dpo", {"beta": BETA}, 0.0),
    "DPO": ("dpo", {"beta": BETA}, FLIP),
    "rDPO": ("rdpo", {"beta": BETA, "flip": FLIP}, FLIP),
    "DPO, smaller beta": ("dpo", {"beta": round(BETA * (1 - 2 * FLIP), 3)}, FLIP)}
COLOUR = {"DPO, clean labels": tiny.GREY, "DPO": tiny.BLUE, "rDPO": tiny.RED, "DPO, smaller beta": tiny.ORANGE,
          "cDPO": tiny.GREEN}


# ---------------------------------------------------------------------------------------------------------- the bandit
def rates(seeds: int, pairs: int, flips: list[float]) -> dict:
    """Slope of the implicit reward on the true one, by method and rate of flips, one number per seed."""
    found: dict = {"DPO": {}, "cDPO": {}, "rDPO": {}}
    for flip in flips:
        drawn = [bandit.draw(seed, flip=flip, pairs=pairs) for seed in range(seeds)]
        for name, recipe, noise in (("DPO", "dpo", {}), ("cDPO", "dpo", {"label_smoothing": flip}),
                                    ("rDPO", "rdpo", {"flip": flip})):
            found[name][flip] = [tiny.slope(BETA * bandit.fit(recipe, {"beta": BETA, **noise}, b.noisy, b.ref), b.reward)
                                 for b in drawn]
    return found


def losses(seeds: int, pairs: int) -> dict:
    """For each loss, the slope of its fit to flipped labels on its fit to clean ones: as it is, and corrected."""
    found: dict = {}
    for name, (recipe, departures) in LOSSES.items():
        found[name] = {"as it is": [], "corrected": []}
        for seed in range(seeds):
            b = bandit.draw(seed, flip=FLIP, pairs=pairs)
            clean = bandit.fit(recipe, departures, b.clean, b.ref)
            for key, correction in (("as it is", {}), ("corrected", UNFLIP)):
                noisy = bandit.fit(recipe, {**departures, **correction}, b.noisy, b.ref)
                found[name][key].append(tiny.slope(noisy, clean))
    return found


# --------------------------------------------------------------------------------------------------- the language model
def pairs(world: tiny.Language, n: int, *, noise: bool) -> list[Group]:
    """Pairs with Bradley-Terry labels or, without noise, with the better response preferred."""
    drawn = world.lists(n, 2)
    one, other = world.reward(drawn).T
    first = world.draw.random(n) < 1 / (1 + np.exp(other - one)) if noise else one > other
    return [world.group(rows, [1.0, 0.0] if f else [0.0, 1.0]) for rows, f in zip(drawn, first, strict=True)]


def language(folder: Path, arms: dict, warm_up: int, steps: int, lr: float, seed: int) -> dict:
    """Every arm trained on the same pairs from the same warmed-up model: name -> measurements."""
    world = tiny.Language(seed)
    reference = world.reference(folder / f"reference-{seed}", seed, warm_up)
    data = {"train": tiny.write(folder / f"pairs-{seed}.jsonl", pairs(world, 32 * steps, noise=True)),
            "eval": tiny.write(folder / f"held-out-{seed}.jsonl", pairs(world, 500, noise=False))}
    one, other = world.responses(1000), world.responses(1000)
    found = {}
    for name, (recipe, departures, flip) in arms.items():
        out = folder / f"run-{seed}-{name}"
        result = tiny.run(out, reference, recipe, departures, {**data, "flip": flip, "cache_reference": True},
                          {"lr": lr, "groups_per_step": 32, "seed": seed, "eval_every": steps})
        found[name] = {"accuracy": result.metrics["eval/accuracy"],
                       **measured(tiny.trained(out, reference), world, departures["beta"], one, other)}
    return found


def measured(models, world: tiny.Language, beta: float, one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Slope and calibration of the implicit reward on held-out responses; true reward and KL of the policy's samples."""
    a, b = (beta * tiny.log_ratios(models, [world.group(rows)]) for rows in (one, other))
    right = 1 / (1 + np.exp(world.reward(other) - world.reward(one)))
    samples, words = world.sampled(models, 2000)
    moved = tiny.log_ratios(models, [world.group(samples)])
    return {"slope": tiny.slope(a, world.reward(one)),
            "excess_nll": float(np.mean(right * np.logaddexp(0, b - a) + (1 - right) * np.logaddexp(0, a - b)
                                        + right * np.log(right) + (1 - right) * np.log(1 - right))),
            "reward": float(world.reward(samples).mean()), "kl": float(moved.mean()), "words": words}


# --------------------------------------------------------------------------------------------------------------- claims
def claims(slopes: dict, recovered: dict, tables: list[dict]) -> dict[str, bool]:
    def mean(name: str, flip: float) -> float:
        return float(np.mean(slopes[name][flip]))

    out = {}
    for flip in (f for f in slopes["DPO"] if f in (0.2, 0.3)):
        out[f"bandit, {flip:.0%} flips: rDPO's slope on the true reward is within 0.15 of 1"] = \
            abs(mean("rDPO", flip) - 1) < 0.15
        out[f"bandit, {flip:.0%} flips: DPO's slope is below 0.6 and cDPO's below DPO's"] = \
            mean("cDPO", flip) < mean("DPO", flip) < 0.6
    for name, found in recovered.items():
        out[f"bandit, {FLIP:.0%} flips, {name}: the correction brings back the fit to clean labels (slope within 0.15 of "
            f"1; below 0.6 without it)"] = abs(np.mean(found["corrected"]) - 1) < 0.15 and np.mean(found["as it is"]) < 0.6
    if len(tables) == 1:
        t = tables[0]
        out["language model: rDPO's slope and true reward are above DPO's"] = \
            t["rDPO"]["slope"] > t["DPO"]["slope"] and t["rDPO"]["reward"] > t["DPO"]["reward"]
        return out
    for metric, sign, text in (("reward", 1, "true reward of the policy's samples is higher"),
                               ("slope", 1, "implicit reward is closer to the true one (slope)"),
                               ("excess_nll", -1, "clean preferences are predicted better (excess NLL)")):
        value, half = tiny.interval([sign * x for x in gains(tables, "DPO", metric)])
        out[f"language model: rDPO's {text}, 95 % interval of the paired difference above 0"] = value - half > 0
    return out


def gains(tables: list[dict], other: str, metric: str) -> list[float]:
    """rDPO minus another arm, seed by seed."""
    return [t["rDPO"][metric] - t[other][metric] for t in tables]


def report(slopes: dict, recovered: dict, tables: list[dict]) -> None:
    print(f"\nbandit: slope of the implicit on the true reward\n{'flips':>20}", *(f"{f:>14.0%}" for f in slopes["DPO"]))
    for name, found in slopes.items():
        print(f"{name:>20}", *(f"{tiny.shown(v):>14}" for v in found.values()))
    print(f"\nbandit, {FLIP:.0%} flips: slope of the fit on the fit to clean labels")
    for name, found in recovered.items():
        print(f"{name:>20}", *(f"{key}: {tiny.shown(v):14}" for key, v in found.items()))
    print(f"\nlanguage model, {len(tables)} seeds")
    for name in tables[0]:
        print(f"{name:>20}", *(f"{m}: {tiny.shown([t[name][m] for t in tables], 3):18}" for m in tables[0][name]))
    for other in (name for name in tables[0] if name != "rDPO"):
        print(f"rDPO minus {other}:", *(f"{m}: {tiny.shown(gains(tables, other, m), 3)};" for m in tables[0][other]))
    print()


def figure(path: Path, slopes: dict, recovered: dict, tables: list[dict]) -> None:
    plt = tiny.pyplot()
    page, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), width_ratios=[1.1, 1, 1.1])
    for name, found in slopes.items():
        mean, half = np.array([tiny.interval(v) for v in found.values()]).T
        left.errorbar(np.array(list(found)) * 100, mean, half, marker="o", ms=4, capsize=3, label=name, color=COLOUR[name])
    left.axhline(1, color="black", lw=0.8, ls=":")
    left.set(xlabel="labels flipped, %", ylabel="slope of implicit on true reward", ylim=(0, 1.6),
             title="Bandit: only rDPO keeps the scale")
    left.legend(loc="upper left", ncols=3, columnspacing=1, handlelength=1.4)
    place = np.arange(len(recovered))
    for shift, key, colour in ((-0.2, "as it is", tiny.BLUE), (0.2, "corrected", tiny.RED)):
        mean, half = np.array([tiny.interval(found[key]) for found in recovered.values()]).T
        middle.bar(place + shift, mean, 0.38, yerr=half, capsize=3, color=colour, label=key)
    middle.axhline(1, color="black", lw=0.8, ls=":")
    middle.set_xticks(place, [name.replace(" ", "\n", 1) for name in recovered])
    middle.set(ylabel="slope on the fit to clean labels", ylim=(0, 1.6), title=f"Bandit: any loss, {FLIP:.0%} flips")
    middle.legend(loc="upper left", ncols=2)
    for name in tables[0]:
        kl, reward = np.array([[t[name]["kl"], t[name]["reward"]] for t in tables]).T
        right.scatter(kl, reward, s=16, alpha=0.45, color=COLOUR[name], lw=0)
        right.scatter(kl.mean(), reward.mean(), s=90, color=COLOUR[name], edgecolor="black", lw=0.8, label=name)
    right.scatter(0, 0, marker="x", color="black", label="reference")
    right.set(xlabel="KL(policy || reference), nats", ylabel="true reward of samples",
              title=f"Language model, {FLIP:.0%} flips")
    right.legend(loc="lower right")
    page.tight_layout()
    page.savefig(path)


def main() -> int:
    options = tiny.options("rdpo_noise", __doc__)
    settings = {"seeds": 2, "pairs": 9000, "flips": [0.0, 0.3], "language_seeds": 1, "warm_up": 100, "steps": 40, "lr": 3e-3} \
        if options.toy else {"seeds": 5, "pairs": 9000, "flips": [0.0, 0.1, 0.2, 0.3, 0.4], "language_seeds": 4,
                             "warm_up": 300, "steps": 150, "lr": 1.5e-3}
    arms = {name: arm for name, arm in ARMS.items() if not options.toy or name in ("DPO", "rDPO")}
    slopes = rates(settings["seeds"], settings["pairs"], settings["flips"])
    few = rates(settings["seeds"], settings["pairs"] * 4 // 9, settings["flips"][-1:])["rDPO"]
    recovered = losses(settings["seeds"], settings["pairs"])
    with tempfile.TemporaryDirectory() as folder:
        study = partial(language, Path(folder), arms, settings["warm_up"], settings["steps"], settings["lr"])
        tables = tiny.over_seeds(study, settings["language_seeds"])
    report(slopes, recovered, tables)
    figure(options.out / "figure.png", slopes, recovered, tables)
    results = {"settings": settings, "slopes": slopes, "recovered": recovered, "language": tables,
               "differences": {f"rDPO minus {other}": {m: tiny.interval(gains(tables, other, m)) for m in tables[0][other]}
                               for other in tables[0] if other != "rDPO"},
               "4000 pairs: slopes of rDPO": few}
    return tiny.conclude(options.out, results, claims(slopes, recovered, tables))


if __name__ == "__main__":
    raise SystemExit(main())
