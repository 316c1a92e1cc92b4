"""The bench report as one HTML page: no network, no other files, readable in light and dark and on paper.

Every text of the data is hostile: it passes through jinja's or markupsafe's escaping, never through string formatting.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from data_tools.page import HEAD

__all__ = ["CSS", "HEAD", "Series", "chart", "environment", "render"]

CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --line: #d5dae0; --paper: #ffffff; --panel: #f5f7f9;
  --good: 44 122 78; --bad: 178 64 32; --warm: 201 92 10; --cool: 29 97 176;
  --c0: #1d61b0; --c1: #c95c0a; --c2: #2c7a4e; --c3: #a03a86; --c4: #7a6a00; --c5: #0b7f8c; --c6: #b23a48; --c7: #5a5fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9da8b3; --line: #39424b; --paper: #14181c;
  --panel: #1c2228; --good: 94 190 132; --bad: 240 128 96; --warm: 240 150 70; --cool: 110 168 240;
  --c0: #6ea8f0; --c1: #f09646; --c2: #5ebe84; --c3: #dd83c6; --c4: #cdb93f; --c5: #4fc3d0; --c6: #f08290; --c7: #a3a7f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; } p { margin: .3rem 0 .8rem; max-width: 60rem; }
.soft, caption, figcaption, small { color: var(--soft); } small { font-size: .8em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0; font-size: .9em; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td, tbody th { white-space: nowrap; } th:first-child { text-align: left; } tbody th { font-weight: 600; }
tbody th, th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; font-weight: 600; max-width: 8rem; }
td small { display: block; line-height: 1.2; } .warn { color: rgb(var(--bad)); }
details > summary { cursor: pointer; } details.set { border-top: 1px solid var(--line); padding: .6rem 0; }
details.set > summary { font-weight: 600; font-size: 1.1rem; } details.set > summary span { font-weight: 400; font-size: .85rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1.25rem; } figure { margin: .5rem 0; }
figcaption { font-size: .85rem; max-width: 21.5rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .6rem 0; list-style: none; font-size: .88rem; }
svg text { fill: var(--soft); font-size: 11px; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; } svg .guide { stroke: var(--soft); stroke-dasharray: 4 3; fill: none; }
.faint { opacity: .1; } svg .series { fill: none; stroke-width: 2; } svg .whisker { stroke-width: 1; opacity: .7; }
.error { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .7rem 0; break-inside: avoid; }
.error header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .88rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem; }
@media (max-width: 46rem) { .sides { grid-template-columns: 1fr; } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; padding: .5rem .6rem; background: var(--panel);
  border-radius: 4px; max-height: 17rem; overflow-y: auto; font: 13px/1.45 ui-monospace, "Liberation Mono", monospace; }
pre.chosen { border-left: 3px solid rgb(var(--good)); } pre.rejected { border-left: 3px solid rgb(var(--bad)); }
.filter { display: flex; flex-wrap: wrap; gap: .7rem; align-items: end; margin: .6rem 0; } .filter label { font-size: .85rem; }
.filter select, .filter input { display: block; font: inherit; padding: .25rem .4rem; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: 4px; max-width: 20rem; }
.filter .tick input { display: inline; } [hidden] { display: none !important; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } pre { max-height: none; overflow: visible; }
  .scroll { overflow: visible; } table { font-size: 9px; } th, td { padding: .15rem .35rem; }
  .filter { display: none; } figure, tr { break-inside: avoid; } @page { size: A4 landscape; margin: 12mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
PAGE = HEAD + """
<h1>Reward bench</h1>
<p class="soft">{{ names | length }} models and baselines, {{ report.sets | length }} test
set{{ "s" if report.sets | length > 1 }}, {{ pairs }} pairs with a preferred response. A pair is right when that response has
the strictly higher score, so a tie is wrong. Intervals hold 95 %, from resampling groups; the overall column is the plain
mean over sets.</p>
<h2>Accuracy</h2>{{ summary }}
{%- if protocols %}<h2>RewardBench</h2>{{ protocols }}{% endif %}
{%- if report.sets | length > 1 %}<h2>Over all sets</h2>{{ heat(report.agreement, names) }}{% endif %}
<h2>Set by set</h2>
{%- for section in sections %}
<details class="set" {{ "open" if loop.first }}>
<summary>{{ section.title }} <span class="soft">{{ section.size }}</span></summary>
<ul class="legend" title="point at a name to see it alone">
{%- for name in names %}<li data-series="{{ loop.index0 }}">{{ mark(name) }} {{ name }}</li>{% endfor %}</ul><div class="charts">
{%- for chart, words in section.charts %}<figure>{{ chart }}<figcaption>{{ words }}</figcaption></figure>{% endfor %}</div>
{{ section.tables }}
{%- for line in section.unscored %}<p class="warn">{{ line }}</p>{% endfor %}</details>
{%- endfor %}
<h2>Most confidently wrong</h2>
<p class="soft">Pairs that a model gets wrong, the widest margin first, ties last.</p>
<form class="filter"><label>model <select id="model">
{%- for name in names %}<option>{{ name }}</option>{% endfor %}</select></label>
<label>set <select id="set"><option value="">all</option>
{%- for title in report.sets %}<option>{{ title }}</option>{% endfor %}</select></label>
<label>text <input id="text" type="search" placeholder="in prompt or responses"></label>
<label class="tick"><input id="alone" type="checkbox"> only what every other model gets right</label>
<output id="count" class="soft"></output></form>
{%- for name, title, e in errors %}
<article class="error" data-model="{{ name }}" data-set="{{ title }}" data-alone="{{ 0 if e.also_wrong else 1 }}">
<header><strong>{{ name }}</strong><span>{{ title }}</span><span>margin {{ signed(e.margin) }}</span>
<span>label {{ number(e.label) }}</span><span class="soft">{{ e.place }}</span></header>
<pre class="prompt">{{ e.prompt }}</pre><div class="sides">
<div><small>preferred by the annotators, score {{ number(e.scores[0]) }}</small><pre class="chosen">{{ e.chosen }}</pre></div>
<div><small>{{ "tied with it" if e.margin == 0 else "preferred by the model" }}, score {{ number(e.scores[1]) }}</small>
<pre class="rejected">{{ e.rejected }}</pre></div></div>
{%- if e.also_wrong %}<small>also wrong: {{ e.also_wrong | join(", ") }}</small>{% endif %}</article>
{%- endfor %}
<p class="soft">Settings: {{ report.settings | tojson }}</p>
<script>
const by = id => document.getElementById(id), cards = [...document.querySelectorAll(".error")];
function filter() {
  const want = by("text").value.toLowerCase();
  let count = 0;
  for (const card of cards) {
    const keep = card.dataset.model === by("model").value && (!by("set").value || card.dataset.set === by("set").value)
      && (!by("alone").checked || card.dataset.alone === "1") && card.textContent.toLowerCase().includes(want);
    card.hidden = !keep;
    count += keep;
  }
  by("count").textContent = count + (count === 1 ? " pair" : " pairs");
}
for (const id of ["model", "set", "text", "alone"]) by(id).addEventListener("input", filter);
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
const alone = (item, on) => {
  for (const g of item.closest("details").querySelectorAll("g[data-series]"))
    g.classList.toggle("faint", on && g.dataset.series !== item.dataset.series);
};
for (const item of document.querySelectorAll(".legend li")) {
  item.addEventListener("pointerenter", () => alone(item, true));
  item.addEventListener("pointerleave", () => alone(item, false));
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => d.open = true));
filter();
</script></body></html>
"""


# -------------------------------------------------------------------------------------------------------------- charts
class Series(NamedTuple):
    """A line of a chart: points (x, y), and beside each its size (0 to 1) or its whisker (low, high)."""
    colour: int | None                                        # of the palette; None is a dashed guide
    points: Sequence[tuple[float, float]]
    sizes: Sequence[float] | None = None
    whiskers: Sequence[tuple[float, float]] | None = None


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 350, 260, 56, 12, 10, 40
SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.6-3.6h7.2v7.2h-7.2z", "M0-4.6L4.4 3.6H-4.4z", "M0-5L5 0 0 5-5 0z")


def marker(x: float, y: float, colour: int, scale: float = 1.0) -> Markup:
    return Markup('<path transform="translate({:.1f} {:.1f}) scale({:.2f})" d="{}" fill="var(--c{})"/>').format(
        x, y, scale, SHAPES[(colour + colour // 8) % 4], colour % 8)


def chart(series: Iterable[Series], *, x: tuple[float, float], y: tuple[float, float], xticks: Sequence[tuple[float, str]],
          yticks: Sequence[tuple[float, str]], xlabel: str, ylabel: str) -> Markup:
    """Lines with markers as SVG whose colours are those of the page."""
    across = lambda v: LEFT + (v - x[0]) / ((x[1] - x[0]) or 1.0) * (WIDTH - LEFT - RIGHT)
    up = lambda v: HEIGHT - BOTTOM - (v - y[0]) / ((y[1] - y[0]) or 1.0) * (HEIGHT - TOP - BOTTOM)
    out = [Markup('<svg role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">').format(
        f"{ylabel} against {xlabel}", WIDTH, HEIGHT, WIDTH, HEIGHT)]
    base, text = HEIGHT - BOTTOM, Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    rule = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    for value, word in yticks:
        out += [rule.format("grid", LEFT, WIDTH - RIGHT, up(value), up(value)), text.format(LEFT - 6, up(value) + 4, "end", word)]
    for value, word in xticks:
        out += [rule.format("axis", across(value), across(value), base, base + 4),
                text.format(across(value), base + 16, "middle", word)]
    out += [rule.format("axis", LEFT, WIDTH - RIGHT, base, base),
            text.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", xlabel),
            Markup('<text transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
                (TOP + base) / 2, ylabel)]
    for line in series:
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line.points)
        if line.colour is None:
            out.append(Markup('<polyline class="guide" points="{}"/>').format(path))
            continue
        stroke = f"stroke:var(--c{line.colour % 8})"
        out.append(Markup('<g data-series="{}"><polyline class="series" style="{}" points="{}"/>').format(
            line.colour, stroke, path))
        for n, (a, b) in enumerate(line.points):
            if line.whiskers:
                low, high = line.whiskers[n]
                out.append(Markup('<line class="whisker" style="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                    stroke, across(a), across(a), up(low), up(high)))
            out.append(marker(across(a), up(b), line.colour, 0.5 + 1.3 * line.sizes[n] ** 0.5 if line.sizes else 1.0))
        out.append(Markup("</g>"))
    return Markup("").join([*out, Markup("</svg>")])


def even(low: float, high: float, parts: int, form: str = "{:.0%}") -> list[tuple[float, str]]:
    return [(v, form.format(v)) for v in (low + (high - low) * k / parts for k in range(parts + 1))]


def solid(found: Mapping) -> list[Mapping]:
    """The bins of a calibration curve that have pairs enough to be drawn."""
    return [c for c in found["calibration"]["curve"] if c["pairs"] >= 5]


def floor_tenth(values: Iterable[float], ceiling: float) -> float:
    """The lowest value rounded down to a tenth, at most `ceiling`."""
    return min([ceiling, *(int(v * 10) / 10 for v in values)])


def calibration_chart(found: dict, colours: dict[str, int]) -> Markup:
    curves = {name: solid(m) for name, m in found["models"].items()}
    low = floor_tenth((c["outcome"] for curve in curves.values() for c in curve), 0.4)
    lines = [Series(colours[name], [(c["confidence"], c["outcome"]) for c in curve],
                    sizes=[c["pairs"] / sum(c["pairs"] for c in curve) for c in curve]) for name, curve in curves.items()]
    return chart([Series(None, [(0.5, 0.5), (1, 1)]), *lines], x=(0.49, 1.01), y=(low, 1.02), xticks=even(0.5, 1, 5),
                 yticks=even(low, 1, round((1 - low) * 10)), xlabel="confidence", ylabel="right")


def length_chart(found: dict, colours: dict[str, int]) -> Markup:
    curves = {name: m["length"]["curve"] for name, m in found["models"].items()}
    widest = max([c["difference"] for curve in curves.values() for c in curve], default=1.0)
    lines = [Series(colours[name], [(c["difference"], c["model"]) for c in curve]) for name, curve in curves.items()]
    step = 0.2 if widest > 0.4 else 0.1 if widest > 0.2 else 0.05
    steps = int(widest / step + 1e-9)
    fullest = max(curves.values(), key=lambda curve: sum(c["pairs"] for c in curve))
    labels = Series(None, [(c["difference"], c["labels"]) for c in fullest])
    return chart([labels, *lines], x=(0, widest * 1.03), y=(-0.02, 1.02), xticks=even(0, steps * step, max(1, steps), "{:.2g}"),
                 yticks=even(0, 1, 5), xlabel="relative difference in length", ylabel="longer preferred")


def best_of_n_chart(found: dict, colours: dict[str, int]) -> Markup:
    curves = {name: m["best_of_n"]["curve"] for name, m in found["models"].items() if "best_of_n" in m}
    lines = [Series(colours[name], [(c["kl"] + 0.01 * k, c["gold"]["mean"]) for c in curve],        # apart, for the whiskers
                    whiskers=[c["gold"]["interval"] for c in curve]) for k, (name, curve) in enumerate(curves.items())]
    values = [v for line in lines for pair in line.whiskers for v in pair]
    longest = max(curves.values(), key=len)
    low, high = min(values), max(values)
    return chart(lines, x=(-0.03, longest[-1]["kl"] * 1.05), y=(low, high), xticks=[(c["kl"], str(c["n"])) for c in longest],
                 yticks=even(low, high, 5, "{:.2f}"), xlabel="n", ylabel="gold reward")


def strip(value: float, interval: Sequence[float], span: Sequence[float], colour: int) -> Markup:
    """A dot with its interval on an axis from `span[0]` to `span[1]`, and a line at chance."""
    chance, low, high, at = (4 + 132 * (v - span[0]) / (span[1] - span[0]) for v in (0.5, *interval, value))
    return Markup('<svg role="img" aria-label="{}" width="140" height="22"><line class="guide" x1="{:.1f}" x2="{:.1f}" y1="1" '
                  'y2="21"/><line style="stroke:var(--c{});stroke-width:2" x1="{:.1f}" x2="{:.1f}" y1="11" y2="11"/>{}</svg>'
                  ).format(f"{percent(value)} %", chance, chance, colour % 8, low, high, marker(at, 11, colour))


# -------------------------------------------------------------------------------------------------------------- values
def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def signed(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 4):+.3g}"


def decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def tint(value: float | None, middle: float) -> str:
    """A background: green above the middle, red below."""
    if value is None:
        return ""
    strength = min(0.45, abs(value - middle) / max(middle, 1 - middle) * 0.5)
    return f"background:rgb(var(--{'good' if value >= middle else 'bad'}) / {strength:.2f})"


# -------------------------------------------------------------------------------------------------------------- tables
def cell(text: object, *below: object, style: str = "") -> Markup:
    """A cell with small lines below its text."""
    small = Markup("").join(Markup("<small>{}</small>").format(line) for line in below if line)
    return Markup('<td style="{}">{}{}</td>').format(style, text, small) if style else Markup("<td>{}{}</td>").format(text, small)


NOTHING = cell("-")


def share_cell(found: Mapping | None, style: str = "") -> Markup:
    """A share in percent with its interval, and how many are unscored or, of more than one in twenty, tied."""
    if not found:
        return NOTHING
    lost, tied = found.get("unscored"), found.get("tied", 0)
    notes = [Markup('<span class="warn">{} unscored</span>').format(lost) if lost else "",
             f"{tied} tied" if tied > 0.05 * found["of"] else ""]
    if found["share"] is None:
        return cell("-", *notes) if any(notes) else NOTHING
    low, high = found.get("interval_groups") or found["interval"]
    return cell(percent(found["share"]), f"{100 * low:.1f} to {100 * high:.1f}", *notes, style=style)


def mean_cell(found: Mapping | None) -> Markup:
    if not found or found["mean"] is None:
        return NOTHING
    return cell(number(found["mean"]), f"{found['interval'][0]:.2f} to {found['interval'][1]:.2f}")


def table(caption: str, head: Sequence[object], rows: Iterable[tuple[object, Sequence[Markup]]]) -> Markup:
    """Column headers, and rows of a header and its cells. A row or a column that says nothing is left out."""
    rows = [(name, cells) for name, cells in rows if any(c != NOTHING for c in cells)]
    kept = [k for k in range(len(head) - 1) if any(cells[k] != NOTHING for _, cells in rows)]
    join = Markup("").join
    return Markup('<div class="scroll" tabindex="0"><table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody>'
                  '</table></div>').format(
        caption, join(Markup('<th scope="col">{}</th>').format(head[k]) for k in [0, *(k + 1 for k in kept)]),
        join(Markup('<tr><th scope="row">{}</th>{}</tr>').format(name, join(cells[k] for k in kept)) for name, cells in rows))


def heat(found: Mapping, names: Sequence[str]) -> Markup:
    """Agreement of every two models; kappa gives the colour."""
    at = [found["models"].index(name) for name in names]
    return table(
        "Agreement: percent of pairs with the same verdict; kappa (κ) of right and wrong, the colour; tau-b (τ) of the margins",
        ["model", *(name.replace("_", "_\u200b") for name in names)],                   # a long name may break there
        [(name, [cell("") if x == y else
                 cell(percent(found["verdicts"][x][y]), f"κ {decimals(found['kappa'][x][y])}",
                      f"τ {decimals(found['kendall'][x][y])}", style=tint(found["kappa"][x][y], 0.0))
                 for y in at]) for name, x in zip(names, at, strict=True)])


def summary(report: Mapping, names: Sequence[str], mark: Callable[[str], Markup], colours: Mapping[str, int]) -> Markup:
    """Accuracy overall and of each set."""
    rows, ends = [], [end for whole in report["overall"].values() for end in whole["interval"]]
    span = floor_tenth(ends, 0.4), 1 - floor_tenth([1 - end for end in ends], 0.4)
    for name in names:
        whole, cells = report["overall"].get(name), [cell("-"), cell("")]
        if whole:
            low, high = whole["interval"]
            part = f"{whole['sets']} of {len(report['sets'])} sets" if whole["sets"] < len(report["sets"]) else ""
            cells = [cell(percent(whole["accuracy"]), f"{100 * low:.1f} to {100 * high:.1f}", part,
                          style=tint(whole["accuracy"], 0.5)),
                     cell(strip(whole["accuracy"], whole["interval"], span, colours[name]))]
        found = [s["models"][name]["accuracy"] for s in report["sets"].values()]
        rows.append((mark(name) + " " + name, [*cells, *(share_cell(f, tint(f["share"], 0.5)) for f in found)]))
    titles = [Markup("{}<br><small>{} pairs</small>").format(title, s["pairs"] - s["tied_labels"])
              for title, s in report["sets"].items()]
    axis = Markup("<small>{:.0f} to {:.0f} %</small>").format(*(100 * end for end in span))
    return table("Percent of pairs right", ["model", "overall", axis, *titles], rows)


def protocols(report: Mapping, names: Sequence[str]) -> Markup:
    """A table for each set that is RewardBench 1 or 2."""
    out = []
    for title, found in report["sets"].items():
        scored = {name: found["models"][name]["rewardbench"] for name in names if "rewardbench" in found["models"][name]}
        if scored:
            version = next(iter(scored.values()))["version"]
            part = "sections" if version == 1 else "domains"
            columns = list(next(iter(scored.values()))[part])
            out.append(table(f"{title}: RewardBench {version}, percent", ["model", "score", *columns, "unscored"], [
                (name, [cell(percent(f["score"])), *(cell(percent(f[part][c])) for c in columns), cell(f["unscored"])])
                for name, f in scored.items()]))
    return Markup("").join(out)


CALIBRATION = ("ece", "brier", "log_loss", "temperature", "log_loss_at_temperature")


def details(found: Mapping, names: Sequence[str], slices: Sequence[str]) -> Markup:
    """The tables of one set: margins and biases, lists and robustness, slices, agreement."""
    each = {name: found["models"][name] for name in names}
    wanted = next((m["length"]["longer_is_better"] for m in each.values() if "longer_is_better" in m["length"]), None)
    out = [table("Calibration and biases", [
        "model", "tied", "ECE", "Brier", "log loss", "temperature", "log loss at it", "prefers longer", "right if chosen longer",
        "right if chosen shorter", "length bias", "right without style"], [
        (name, [cell(m["accuracy"]["tied"]),
                *(cell(number(m["calibration"][k])) for k in CALIBRATION),
                cell(percent(m["length"].get("longer_preferred"))), share_cell(m["length"].get("chosen_longer")),
                share_cell(m["length"].get("chosen_shorter")), cell(signed(m["length"].get("bias"))),
                share_cell(m["style"].get("style_free"))]) for name, m in each.items()]),
        Markup('<p class="soft">The annotators prefer the longer response in {} % of pairs. Length bias is the coefficient of '
               "the model's verdicts on the scaled difference in length less that of the labels. Without style is the accuracy "
               "of what least squares on length, lists, headers and bold leaves of the margin. The temperature is fitted on "
               "these pairs; there is none where the margins say nothing.</p>").format(percent(wanted))]
    if any(set(m) & {"lists", "best_of_n", "cycles", "position", "paraphrase"} for m in each.values()):
        out.append(table("Lists and robustness", [
            "model", "Kendall", "Spearman", "nDCG", "regret of the best", "cyclic triples", "position bias",
            "same verdict swapped", "same verdict reworded"], [
            (name, [*(mean_cell(m.get("lists", {}).get(k)) for k in ("kendall", "spearman", "ndcg")),
                    mean_cell(m.get("best_of_n", {}).get("regret")), share_cell(m.get("cycles")),
                    cell(signed(m.get("position", {}).get("bias"))), share_cell(m.get("position", {}).get("consistency")),
                    share_cell(m.get("paraphrase", {}).get("agree"))]) for name, m in each.items()]))
    for key in (k for k in slices if k in each[names[0]]["slices"]):
        rows = [(value, [m["slices"][key][value] for m in each.values()]) for value in each[names[0]]["slices"][key]]
        out.append(table(f"Percent right by {key}", [key, "pairs", *names], [
            (value, [cell(row[0]["pairs"]), *(share_cell(f, tint(f["share"], 0.5)) for f in row)]) for value, row in rows]))
    return Markup("").join([*out, heat(found["agreement"], names)])


def charts(found: Mapping, colours: Mapping[str, int]) -> list[tuple[Markup, str]]:
    """The plots of one set, with what to read in them."""
    out = [(calibration_chart(found, colours), "Calibration: how often the preferred side is right, against confidence, "
            "sigmoid(|margin|). A mark is as large as its share of the pairs; bins below 5 pairs are left out. Dashed: perfect."),
           (length_chart(found, colours), "Length: how often the longer response is preferred, by how much longer it is, "
            "(a - b) / (a + b). The dashed line is the annotators.")]
    if any(m.get("best_of_n", {}).get("curve") for m in found["models"].values()):
        out.append((best_of_n_chart(found, colours), "Over-optimisation: gold reward of the best of n by score. n stands at its "
                    "KL from the base, log n - (n - 1) / n."))
    return out


# ---------------------------------------------------------------------------------------------------------------- page
def environment() -> Environment:
    """Everything is escaped, and a misspelt name is an error."""
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def render(report: Mapping) -> str:
    """The page of a report of `rewards.bench.bench`."""
    baseline = lambda name: name.startswith("baseline: ")
    names = sorted(report["models"], key=lambda n: (baseline(n), -report["overall"].get(n, {"accuracy": 0.0})["accuracy"]))
    colours = {name: n for n, name in enumerate(names)}
    mark = lambda name: Markup('<svg width="12" height="12" aria-hidden="true">{}</svg>').format(marker(6, 6, colours[name]))
    sections = [{
        "title": title, "charts": charts(found, colours), "tables": details(found, names, report["settings"]["slices"]),
        "size": f"{found['groups']} groups, {found['responses']} responses, {found['pairs']} pairs"
                + (f", {found['tied_labels']} of them tied by the annotators" if found["tied_labels"] else ""),
        "unscored": [f"{name}: {m['unscored']['responses']} responses unscored, for example: {m['unscored']['reasons'][0]}"
                     for name, m in found["models"].items() if m["unscored"]["reasons"]]}
        for title, found in report["sets"].items()]
    errors = [(name, title, e) for name in names for title, s in report["sets"].items() for e in s["models"][name]["errors"]]
    return environment().from_string(PAGE).render(
        title="Reward bench", css=Markup(CSS), report=report, names=names, mark=mark, heat=heat, signed=signed, number=number,
        pairs=sum(s["pairs"] - s["tied_labels"] for s in report["sets"].values()), sections=sections, errors=errors,
        summary=summary(report, names, mark, colours), protocols=protocols(report, names))
