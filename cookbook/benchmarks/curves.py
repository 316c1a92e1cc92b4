"""Cost of our steps against their sizes: one process per point, a line fitted where cost must grow linearly."""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import Job, Sizes, alone, at, measured
from jobs import JOBS, ours, tiny

LISTS = JOBS["lists"]
PAIRS = Job({"prefopt": partial(ours, recipe="simpo")}, Sizes(groups=4), {})         # no reference: weights, gradient, Adam


@dataclass(frozen=True)
class Curve:
    """A size that varies, in the place of `field`; what is plotted against is `times` as much."""
    title: str
    label: str
    job: Job
    side: str
    field: str
    values: tuple[int, ...]
    times: int = 1


ANSWERS = "tokens of all responses"
CURVES = (
    Curve("responses of a list, 64 tokens each", ANSWERS, LISTS, "prefopt", "rows", (4, 8, 16, 32), 64),
    Curve("responses of a list, 64 tokens each", ANSWERS, LISTS, "plain", "rows", (4, 8, 16, 32), 64),
    Curve("length of 8 responses", ANSWERS, LISTS, "prefopt", "response", (32, 64, 128, 256), 8),
    Curve("length of 8 responses", ANSWERS, LISTS, "plain", "response", (32, 64, 128, 256), 8),
    Curve("prompt of 8 responses of 64", "tokens of the prompt", LISTS, "prefopt", "prompt", (128, 256, 512, 1024)),
    Curve("prompt of 8 responses of 64", "tokens of the prompt", LISTS, "plain", "prompt", (128, 256, 512, 1024)),
    Curve("pairs of a step, 384 + 2 x 128", "pairs", PAIRS, "prefopt", "groups", (1, 2, 4, 8)),
    Curve("vocabulary, 4 pairs", "tokens of the vocabulary", PAIRS, "prefopt", "vocabulary", (32_000, 64_000, 150_000)),
)


def traced(curve: Curve, assets: Path, small: bool) -> dict:
    """{"x", "seconds", "peak_mb", "beyond_mb"} of a curve, and the line through its seconds. Beyond weights, gradient and the
    two moments of Adam is what a step itself takes: activations, logits, and what a process takes without any model."""
    import numpy as np
    points = []
    for value in (curve.values[:2] if small else curve.values):
        job = at(tiny(curve.job), **{} if curve.field == "vocabulary" else {curve.field: min(value, 16)}) if small else \
            at(curve.job, **{curve.field: value})
        one = alone(measured, job.sides[curve.side], job.sizes, assets)
        points.append({"x": curve.times * value, "seconds": one["seconds"]["step"]["s"], "peak_mb": one["peak_mb"],
                       "beyond_mb": one["peak_mb"] - 4 * one["weights_mb"]})
        print(f"{curve.title}, {curve.side}: {value} {points[-1]}", flush=True)
    x, y = (np.array([p[k] for p in points]) for k in ("x", "seconds"))
    slope, start = np.polyfit(x, y, 1)
    unexplained = ((y - start - slope * x) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-12)
    return {"title": curve.title, "label": curve.label, "side": curve.side, "points": points,
            "slope": slope, "start": start, "r2": 1 - unexplained}


def table(found: list[dict]) -> str:
    lines = ["| | | s a step = | R^2 | points: s a step, MB beyond weights, gradient and Adam |", "|---|---|---|---|---|"]
    for c in found:
        points = "; ".join(f"{p['x']:,}: {p['seconds']:.2f} s, {p['beyond_mb']:.0f}" for p in c["points"])
        line = f"{c['start']:.2f} + {1000 * c['slope']:.3f} x / 1000"
        lines.append(f"| {c['title']} | {c['side']} | {line} | {c['r2']:.4f} | {points} |")
    return "\n".join(lines)


def plot(found: list[dict], file: Path) -> None:
    """Seconds above, memory below, a column for each size that varies."""
    from matplotlib import pyplot
    titles = list(dict.fromkeys(c["title"] for c in found))
    figure, axes = pyplot.subplots(2, len(titles), figsize=(3.4 * len(titles), 6), layout="constrained", squeeze=False)
    for column, title in enumerate(titles):
        for c in (c for c in found if c["title"] == title):
            x = [p["x"] for p in c["points"]]
            for row, key in enumerate(("seconds", "beyond_mb")):
                axes[row, column].plot(x, [p[key] for p in c["points"]], "o-", label=c["side"])
                axes[row, column].set_xlabel(c["label"])
        axes[0, column].set_title(title, fontsize=10)
        axes[0, column].legend()
    axes[0, 0].set_ylabel("s a step")
    axes[1, 0].set_ylabel("MB beyond weights, gradient and Adam")
    for axis in axes.flat:
        axis.set_ylim(0, None)
    figure.savefig(file, dpi=100)
