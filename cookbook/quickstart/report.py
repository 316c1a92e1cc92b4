"""What came of it: accuracies with intervals, a table and a plot."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from scipy.stats import binomtest

BLUE, ORANGE, GREY, LIGHT = "#2b6cb0", "#dd6b20", "#8a8f98", "#c9cdd3"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
         "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False}
STAGES = {"warmup": "warm-up", "dpo": "DPO", "grpo": "GRPO, verifier", "grpo_proxy": "GRPO, reward model",
          "grpo_proxy_kl": "GRPO, reward model, KL"}


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


def curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric in a run's metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps, values = zip(*((line["step"], line[key]) for line in lines if key in line), strict=True)
    return list(steps), list(values)


def table(found: dict) -> Table:
    """The accuracy after every stage."""
    of = found["answers"]["warmup"]["sampled"].of
    out = Table(title=f"right answers of {of} (95 % interval)", title_justify="left", caption_justify="left",
                caption=f"reward model: {found['metrics']['reward_model']['eval/accuracy']:.3f} of held-out pairs ranked right")
    for title in ("", "sampled", "greedy"):
        out.add_column(title, no_wrap=True)
    for name, title in STAGES.items():
        out.add_row(title, *(str(found["answers"][name][how]) for how in ("sampled", "greedy")))
    return out


def plot(found: dict, out: Path) -> None:
    """Four panels: accuracies, GRPO's curve, and proxy and true reward of the runs against the reward model."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.style.context(STYLE):
        figure, ((bars, verified), (proxy, truth)) = plt.subplots(2, 2, figsize=(10, 6.8), layout="constrained")
        accuracies(bars, found)
        steps(verified, out / "grpo", "reward", BLUE, "training, temperature 1")
        verified.plot(*curve(out / "grpo", "eval/reward"), color="black", lw=0, marker="o", ms=4, label="held-out problems")
        verified.axhline(found["size"]["level"], color=GREY, lw=1, ls=":")
        verified.set_title("GRPO with the verifier: right answers")
        for axes, key in ((proxy, "proxy"), (truth, "truth")):
            for run, color, label in (("grpo_proxy", ORANGE, "no KL"), ("grpo_proxy_kl", BLUE, "KL to the warm-up")):
                steps(axes, out / run, f"reward/{key}", color, label)
        proxy.set_title("GRPO against the reward model: what it is given (proxy reward)")
        truth.set_title("the same runs: what it is worth (right answers)")
        for axes in (verified, truth):
            axes.set_ylim(0, 1.02)
        for axes in (verified, proxy, truth):
            axes.set_xlabel("step")
            axes.legend()
        figure.savefig(out / "plot.png", dpi=150)
        plt.close(figure)


def accuracies(axes, found: dict) -> None:
    for shift, how, color in ((-0.2, "sampled", BLUE), (0.2, "greedy", LIGHT)):
        rates = [found["answers"][name][how] for name in STAGES]
        shares, places = [rate.share for rate in rates], [place + shift for place in range(len(rates))]
        ends = [[abs(end - rate.share) for rate, end in zip(rates, side, strict=True)]
                for side in zip(*(rate.interval() for rate in rates), strict=True)]
        axes.bar(places, shares, 0.38, yerr=ends, color=color, label=how, error_kw={"lw": 1, "capsize": 2})
        for place, rate in zip(places, rates, strict=True):
            axes.text(place, rate.interval()[1] + 0.015, f"{rate.share:.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(STAGES)), [title.replace(", ", "\n") for title in STAGES.values()], fontsize=8)
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title("right answers (95 % intervals)")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", ncols=2)


def steps(axes, run: Path, key: str, color: str, label: str, window: int = 5) -> None:
    """Every step thin, the mean of `window` steps around it thick."""
    at, values = curve(run, key)
    half = window // 2
    near = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    axes.plot(at, values, color=color, lw=0.8, alpha=0.4)
    axes.plot(at, [sum(some) / len(some) for some in near], color=color, lw=1.8, label=label)
