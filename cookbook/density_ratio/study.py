"""Density ratio as a reward: the further a model is trained on good text, the better its ratio to where it started ranks.

    python -m cookbook.density_ratio.study [--toy]
"""
from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from cookbook import tiny
from data_tools.encoding import Encoding
from data_tools.records import Group, Response
from rewards.base import Row, rows_of
from rewards.density_ratio import DensityRatio, likelihood, per_token

WORDS, SHORT, LONG, CONTRAST = 16, 4, 12, 0.6
RUNGS = (2, 2, 4, 8, 16, 32, 64)                              # further steps on good text, rung by rung
FORMS = {"sum": sum, "mean": lambda logp: sum(logp) / len(logp)}


# ----------------------------------------------------------------------------------------------------------------- text
class World:
    """Two ways to go from word to word, good and bad, which differ a little everywhere. Mixed text is half of each."""

    def __init__(self, seed: int):
        self.draw = np.random.default_rng(seed)
        usual, taste = self.draw.normal(size=(2, WORDS, WORDS))
        self.chains = {name: self.cumulative(usual + sign * CONTRAST * taste) for name, sign in (("good", 1), ("bad", -1))}
        self.tokenizer = tiny.tokenizer([*(f"w{i}" for i in range(WORDS)), "?"])

    @staticmethod
    def cumulative(logits: np.ndarray) -> np.ndarray:
        odds = np.exp(logits)
        return (odds / odds.sum(1, keepdims=True)).cumsum(1)

    def text(self, kind: str, length: int) -> str:
        word, out = int(self.draw.integers(WORDS)), []
        for _ in range(length):
            word = min(int((self.draw.random() > self.chains[kind][word]).sum()), WORDS - 1)
            out.append(f"w{word}")
        return " ".join(out)

    def texts(self, n: int, share: float) -> list[str]:
        """Texts of full length for training, a share of them good."""
        return ["? " + self.text("good" if self.draw.random() < share else "bad", LONG) for _ in range(n)]

    def pairs(self, n: int) -> list[Group]:
        """A good and a bad response, each of a length of its own."""
        lengths = self.draw.integers(SHORT, LONG + 1, (n, 2))
        return [Group("?", [Response(self.text("good", a)), Response(self.text("bad", b))], [1.0, 0.0]) for a, b in lengths]


# --------------------------------------------------------------------------------------------------------------- ladder
def accuracy(scores: list[float]) -> float:
    """Share of pairs (good, bad, good, bad, ...) whose good response scores higher; equal scores count half.

    >>> accuracy([1.0, 0.0, 0.5, 0.5])
    0.75
    """
    good, bad = np.array(scores).reshape(-1, 2).T
    return float((np.sign(good - bad) / 2 + 0.5).mean())


def study(folder: Path, warm_up: int, rungs: tuple[int, ...], pairs: int, seed: int) -> dict[str, list[float]]:
    """By rung: the gap (nats per token by which the strong model is better on held-out good text) and accuracies."""
    world = World(seed)
    held, good_text = rows_of(world.pairs(pairs)), world.texts(200, 1.0)
    fresh = rows_of([Group("?", [Response(text.removeprefix("? "))]) for text in good_text])
    model = tiny.language_model(len(world.tokenizer), width=32, seed=seed)
    tiny.warm_up(model, world.texts(min(4000, 64 * warm_up), 0.5), world.tokenizer, steps=warm_up, seed=seed)

    def saved(name: str):
        model.save_pretrained(folder / name)
        world.tokenizer.save_pretrained(folder / name)
        return likelihood(str(folder / name), encoding=Encoding(add_eos=False))

    weak = saved(f"weak-{seed}")
    good = world.texts(min(4000, 64 * sum(rungs)), 1.0)
    found: dict[str, list[float]] = {}
    for rung, steps in enumerate((0, *rungs)):
        if steps:
            tiny.warm_up(model, good, world.tokenizer, steps=steps, lr=1e-3, seed=seed + rung)
        strong = saved(f"strong-{seed}-{rung}")
        alone = strong(held)
        row = {"gap": mean_logp(strong, fresh) - mean_logp(weak, fresh),
               "density ratio": accuracy(DensityRatio(strong, weak)(held)),
               "density ratio per token": accuracy(DensityRatio(strong, weak, per_token)(held)),
               **{f"strong model alone, {name}": accuracy([form(x) for x in alone]) for name, form in FORMS.items()}}
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


def mean_logp(model, rows: list[Row]) -> float:
    return float(np.mean(np.concatenate(model(rows))))


# --------------------------------------------------------------------------------------------------------------- claims
def correlations(tables: list[dict]) -> list[float]:
    """Spearman's correlation of gap and accuracy over the rungs above the start, seed by seed."""
    return [float(spearmanr(t["gap"][1:], t["density ratio"][1:]).statistic) for t in tables]


def claims(tables: list[dict]) -> dict[str, bool]:
    rank = correlations(tables)
    mean, half = tiny.interval(rank)
    low = mean - half if len(rank) > 1 else mean
    return {f"{len(tables[0]['gap']) - 1} rungs: ranking accuracy grows with the gap (Spearman above 0.8, its 95 % interval too)":
            low > 0.8,
            "a model over itself ranks nothing: 50 %": all(t["density ratio"][0] == 0.5 for t in tables),
            "at the largest gap the density ratio is right in more than 90 % of pairs":
            np.mean([t["density ratio"][-1] for t in tables]) > 0.9,
            "log-probabilities of the strong model alone are confounded by length: below 70 % at every rung":
            all(max(t["strong model alone, sum"]) < 0.7 for t in tables)}


def report(tables: list[dict]) -> None:
    print(f"\n{len(tables)} seeds, by rung")
    for name in tables[0]:
        print(f"{name:>26}", *(f"{tiny.shown(values, 3):>16}" for values in zip(*(t[name] for t in tables), strict=True)))
    print(f"Spearman of gap and accuracy: {tiny.shown(correlations(tables), 3)}\n")


def figure(path: Path, tables: list[dict]) -> None:
    plt = tiny.pyplot()
    page, axes = plt.subplots(figsize=(5.4, 3.5))
    for name, colour in (("density ratio", tiny.RED), ("density ratio per token", tiny.ORANGE),
                         ("strong model alone, sum", tiny.BLUE), ("strong model alone, mean", tiny.GREY)):
        for t in tables:
            axes.plot(t["gap"], t[name], "o-", color=colour, ms=3, lw=0.8, alpha=0.6, label=name if t is tables[0] else None)
    axes.set(xlabel="gap: nats per token on good text", ylabel="ranking accuracy", ylim=(0.4, 1.02),
             title="The larger the gap, the better the reward")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    page.tight_layout()
    page.savefig(path)


def main() -> int:
    options = tiny.options("density_ratio", __doc__)
    settings = {"seeds": 1, "warm_up": 150, "pairs": 300} if options.toy else {"seeds": 5, "warm_up": 300, "pairs": 1000}
    with tempfile.TemporaryDirectory() as folder:
        tables = tiny.over_seeds(partial(study, Path(folder), settings["warm_up"], RUNGS, settings["pairs"]), settings["seeds"])
    report(tables)
    figure(options.out / "figure.png", tables)
    return tiny.conclude(options.out, {"settings": settings, "rungs": RUNGS, "ladder": tables,
                                       "Spearman": correlations(tables)}, claims(tables))


if __name__ == "__main__":
    raise SystemExit(main())
