"""What came of it: accuracies with intervals, a table and a plot."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from scipy.stats import binomtest

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#8a8f98"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
         "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False}


@dataclass(frozen=True)
class Rate:
    """`right` of `of` answers.

    >>> low, high = Rate(50, 100).interval()
    >>> round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    right: int
    of: int

    @property
    def share(self) -> float:
        return self.right / self.of

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval."""
        found = binomtest(self.right, self.of).proportion_ci(method="wilson")
        return found.low, found.high

    def facts(self) -> dict:
        return {"right": self.right, "of": self.of, "share": self.share, "interval": self.interval()}

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.3f} [{low:.3f}, {high:.3f}]"


def table(found: dict) -> Table:
    """Accuracy before and after."""
    out = Table(title=f"right answers of {found['before']['sampled'].of} (95 % interval)", title_justify="left")
    for title in ("", "warm-up", "after DPO", "gain"):
        out.add_column(title)
    for name in ("sampled", "greedy"):
        before, after = found["before"][name], found["after"][name]
        out.add_row(name, str(before), str(after), f"{after.share - before.share:+.3f}")
    return out


def plot(found: dict, metrics: Path, path: Path) -> None:
    """Four panels: the bar chart, and the learning curves of DPO on training and held-out pairs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    with plt.style.context(STYLE):
        figure, ((bars, loss), (ranked, logp)) = plt.subplots(2, 2, figsize=(9.5, 6.6), layout="constrained")
        accuracies(bars, found)
        curve(loss, lines, "loss", "DPO loss", BLUE)
        loss.axhline(0.6931, color=GREY, lw=1, ls=":", label="log 2, the start")
        curve(ranked, lines, "accuracy", "pairs the implicit reward ranks right", BLUE)
        ranked.set_ylim(0.4, 1.02)
        for side, color in (("chosen", BLUE), ("rejected", ORANGE)):
            curve(logp, lines, f"logp/{side}", "log-probability of the answers", color, side)
        for axes in (loss, ranked, logp):
            axes.set_xlabel("DPO step")
            axes.legend()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def accuracies(axes, found: dict) -> None:
    names = ("sampled", "greedy")
    for shift, when, label, color in ((-0.19, "before", "warm-up", GREY), (0.19, "after", "after DPO", BLUE)):
        rates = [found[when][name] for name in names]
        shares, places = [rate.share for rate in rates], [place + shift for place in range(len(names))]
        ends = [[abs(end - rate.share) for rate, end in zip(rates, side, strict=True)]
                for side in zip(*(rate.interval() for rate in rates), strict=True)]
        axes.bar(places, shares, 0.34, yerr=ends, color=color, label=label, error_kw={"lw": 1, "capsize": 3})
        for place, rate in zip(places, rates, strict=True):
            axes.text(place, rate.interval()[1] + 0.015, f"{rate.share:.2f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.15)
    axes.set_title("right answers (95 % intervals)")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", ncols=2)


def curve(axes, lines: list[dict], key: str, title: str, color: str, name: str = "") -> None:
    """Every training step thin, held-out evaluations as dots on a line."""
    axes.set_title(title)
    training = [(line["step"], line[key]) for line in lines if key in line]
    held_out = [(line["step"], line[f"eval/{key}"]) for line in lines if f"eval/{key}" in line]
    axes.plot(*zip(*training, strict=True), color=color, lw=1, alpha=0.45, label=f"{name} training".strip())
    axes.plot(*zip(*held_out, strict=True), color=color, lw=1.6, marker="o", ms=4, label=f"{name} held out".strip())
