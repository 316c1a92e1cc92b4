"""Line charts as inline SVG in the colours of the page. The numbers that are drawn stand in the markup, for the script that
shows them where one points."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from data_tools.page import short, ticks
from prefopt.report.folders import Curve, thinned

__all__ = ["Line", "chart", "logarithmic", "short", "ticks"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 220, 50, 18, 10, 34
PALETTE = 8


class Line(NamedTuple):
    name: str
    colour: int
    curve: Curve
    held_out: bool = False


def logarithmic(values: Sequence[float]) -> bool:
    """Whether a curve is read better on a logarithmic axis: positive over more than two decades."""
    some = [v for v in values if v > 0]
    return len(some) > 0.9 * len(values) and min(values) >= 0 and max(some, default=1) > 100 * min(some, default=1)


def decades(low: float, high: float) -> list[float]:
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0 ** p for p in powers][::max(1, len(powers) // 5)]


def chart(lines: Sequence[Line], *, label: str, share: bool = False, log: bool = False) -> Markup:
    """The lines over the steps. `share` starts the axis at 0; `log` leaves out what is not positive."""
    drawn = [(line, *made(line, log)) for line in lines if line.curve.values]
    every = [v for _, thin, _ in drawn for v in (*thin.low, *thin.high) if not log or v > 0]
    steps = [s for line, *_ in drawn for s in line.curve.steps]
    low, high = min(every), max(every)
    if share:
        low = min(low, 0.0)
    if log:
        low, high = low / 1.2, high * 1.2
        marks, place = decades(low, high) or [low, high], math.log10
    else:
        room = (high - low or abs(high) or 1.0) * 0.06
        low, high = low - (0 if share and low == 0 else room), high + room
        marks, place = ticks(low, high), float
    first, final = min(steps), max(steps)
    across = lambda s: LEFT + ((s - first) / (final - first) if final > first else 0.5) * (WIDTH - LEFT - RIGHT)
    up = lambda v: HEIGHT - BOTTOM - (place(v) - place(low)) / (place(high) - place(low)) * (HEIGHT - TOP - BOTTOM)
    base, text = HEIGHT - BOTTOM, Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    rule = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    out = [Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}" data-frame="{} {} {} {}" data-x="{} {}">').format(
        label, WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, base, first, final)]
    for value in marks:
        out += [rule.format("grid", LEFT, WIDTH - RIGHT, up(value), up(value)),
                text.format(LEFT - 6, up(value) + 4, "end", short(value))]
    for value in ticks(first, final, 5) if final > first else [first]:
        if value == int(value):
            out += [rule.format("axis", across(value), across(value), base, base + 4),
                    text.format(across(value), base + 16, "middle", short(value))]
    out += [rule.format("axis", LEFT, WIDTH - RIGHT, base, base),
            text.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "middle", "step")]
    for line, thin, smooth in drawn:
        kept = [n for n, v in enumerate(thin.values) if not log or thin.low[n] > 0]
        xs, ys = [across(thin.steps[n]) for n in kept], [up(thin.values[n]) for n in kept]
        points = lambda xs, ys: " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        out.append(Markup('<g class="{}" style="--c:var(--c{})" data-name="{}" data-steps="{}" data-values="{}">').format(
            "held" if line.held_out else "seen", line.colour % PALETTE, line.name,
            " ".join(f"{thin.steps[n]:.10g}" for n in kept), " ".join(f"{thin.values[n]:.5g}" for n in kept)))
        if thin.stretch > 1:
            out.append(Markup('<polygon class="band" points="{} {}"/>').format(
                points(xs, [up(thin.high[n]) for n in kept]), points(xs[::-1], [up(thin.low[n]) for n in kept][::-1])))
        if smooth:
            out.append(Markup('<polyline class="raw" points="{}"/>').format(points(xs, ys)))
            ys = [up(smooth[n]) for n in kept]
        out.append(Markup('<polyline class="line" points="{}"/>').format(points(xs, ys)))
        if line.held_out or len(kept) <= 12:
            out += [Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(x, y, 2.8 if line.held_out else 2)
                    for x, y in zip(xs, ys, strict=True)]
        out.append(Markup("</g>"))
    return Markup("").join([*out, Markup('<line class="cursor" y1="{}" y2="{}"/></svg>').format(TOP, base)])


def made(line: Line, log: bool):
    """A line's few points and, of a long one that is not held out, their running mean."""
    thin = thinned(line.curve)
    count = len(thin.values)
    if line.held_out or count <= 40:
        return thin, None
    half = max(2, count // 40)
    value, back = (lambda v: math.log(max(v, 1e-300)), math.exp) if log else (float, float)
    window = [thin.values[max(0, n - half):n + half + 1] for n in range(count)]
    return thin, [back(math.fsum(map(value, w)) / len(w)) for w in window]
