"""What came of it: accuracies with intervals, a table and a plot."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from scipy.stats import binomtest

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#8a8f98"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9,
         "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False}
STAGES = {"warmup": ("warm-up", GREY), "dpo": ("DPO", PURPLE), "grpo": ("GRPO, verifier", GREEN),
          "grpo_proxy": ("GRPO, reward model, no KL", ORANGE), "grpo_proxy_kl": ("GRPO, reward model, KL", BLUE)}


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
    of, ranked = found["answers"]["warmup"]["sampled"].of, found["metrics"]["reward_model"]["eval/accuracy"]
    out = Table(title=f"right answers of {of} (95 % interval)", title_justify="left", caption_justify="left",
                caption=f"held-out pairs ranked right: {ranked:.3f} by the reward model, {found['smaller_is_right'].share:.3f} "
                        f"by the rule that the smaller answer is right")
    for title in ("", "sampled", "greedy"):
        out.add_column(title, no_wrap=True)
    for name, (title, _) in STAGES.items():
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
        steps(verified, out / "grpo", "reward", GREEN, "samples in training")
        verified.plot(*curve(out / "grpo", "eval/reward"), color="black", lw=0, marker="o", ms=4, label="held-out problems")
        verified.axhline(found["size"]["level"], color=GREY, lw=1, ls=":", label="promised")
        verified.set_title("GRPO with the verifier: right answers")
        for axes, key in ((proxy, "proxy"), (truth, "truth")):
            for run, label in (("grpo_proxy", "no KL"), ("grpo_proxy_kl", "KL to the warm-up")):
                steps(axes, out / run, f"reward/{key}", STAGES[run][1], label)
        truth.axhline(found["answers"]["warmup"]["sampled"].share, color=GREY, lw=1, ls=":", label="warm-up")
        proxy.set_title("GRPO against the reward model: what it is paid (proxy)")
        truth.set_title("the same runs: what it is worth (right answers)")
        for axes in (verified, truth):
            axes.set_ylim(0, 1.02)
        for axes in (verified, proxy, truth):
            axes.set_xlabel("step")
            axes.legend()
        figure.savefig(out / "plot.png", dpi=150)
        plt.close(figure)


def accuracies(axes, found: dict) -> None:
    """Two bars for each stage, in its colour: samples full, the greedy answers pale."""
    for shift, how, strength in ((-0.2, "sampled", 1.0), (0.2, "greedy", 0.4)):
        for place, (name, (_, color)) in enumerate(STAGES.items()):
            rate = found["answers"][name][how]
            low, high = rate.interval()
            axes.bar(place + shift, rate.share, 0.38, yerr=[[rate.share - low], [high - rate.share]], color=color, alpha=strength,
                     error_kw={"lw": 1, "capsize": 2})
            axes.text(place + shift, high + 0.015, f"{rate.share:.2f}", ha="center", va="bottom", fontsize=8)
        axes.bar(0, 0, color=GREY, alpha=strength, label=how)
    axes.set_xticks(range(len(STAGES)), [title.replace(", ", "\n") for title, _ in STAGES.values()], fontsize=8)
    axes.set_ylim(0, 1.24)
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
