"""Runs as one HTML page: what they are, what to worry about, curves, settings, rollouts token by token.

Every text of the data is hostile: it passes through jinja's or markupsafe's escaping, or sits in JSON that only `textContent`
reads.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel

from prefopt.config import Run
from prefopt.evaluation import described
from prefopt.folder import flat
from prefopt.report import checks
from prefopt.report.charts import Line, chart, logarithmic
from prefopt.report.folders import Curve, RunFolder, load
from prefopt.report.samples import MEASURES, Sizes, sample
from prefopt.report.style import CSS, HEAD, POINT, ROLLOUTS

__all__ = ["PANELS", "render", "write"]

PAGE = HEAD + """
<h1>{{ title }}</h1>
<div class="scroll"><table><thead><tr><th scope="col">run</th><th scope="col">recipe</th><th scope="col">departs from it</th>
<th scope="col">policy</th><th scope="col">data</th><th scope="col">steps</th></tr></thead><tbody>
{%- for run in runs %}
<tr><th scope="row">{{ marked(loop.index0) }}</th><td><code>{{ run.settings.recipe }}</code></td>
<td class="text">{% for slot, old, new in departures(run) %}<div><b>{{ slot }}</b>: <code>{{ new }}</code>
<span class="soft">in the place of</span> <code>{{ old }}</code></div>{% else %}nothing{% endfor %}</td>
<td class="text">{{ run.settings.policy.name }}</td><td class="text">{{ run.settings.data.train }}</td>
<td>{{ run.step }} of {{ run.facts.steps }}</td></tr>
{%- endfor %}</tbody></table></div>
<h2>Findings</h2>
<ul class="findings">
{%- for n, f in findings %}
<li class="{{ f.level }}"><strong>{% if runs | length > 1 %}{{ marked(n) }}, {% endif %}{{ f.topic }}</strong>
{{ f.text }}</li>{% else %}<li class="fine">Nothing to worry about was found.</li>{% endfor %}</ul>
<details><summary><small>what was looked for, where it was measured</small></summary><ul class="soft">
{%- for words in checked %}<li>{{ words }}</li>{% endfor %}</ul></details>
<h2>In numbers</h2>
<div class="scroll"><table><caption>Start and end are the means of the first and the last fifth of the logged steps, held out is
the last evaluation.</caption><thead><tr><td></td>
{%- for run in runs %}<th scope="colgroup" colspan="3">{{ marked(loop.index0) }}</th>{% endfor %}</tr><tr>
<th scope="col">metric</th>{% for _ in runs %}<th scope="col" class="number">start</th><th scope="col" class="number">end</th>
<th scope="col" class="number">held out</th>{% endfor %}</tr></thead><tbody>
{%- for key, cells in numbers %}<tr><th scope="row">{{ key }}</th>
{%- for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<h2>Curves</h2>
<ul class="legend">{% for run in runs if runs | length > 1 %}<li>{{ marked(loop.index0) }}</li>{% endfor %}
<li>{{ dash(false) }}training{{ ", its running mean bold" if long }}</li>
{%- if held %}<li>{{ dash(true) }}held out</li>{% endif %}</ul>
<div class="charts">
{%- for f in figures %}<figure><h4><small>{{ f.section }}</small> {{ f.title }}</h4>{{ f.svg }}
{%- if f.names %}<ul class="legend">{% for n, name in f.names %}<li>{{ mark(n) }}{{ name }}</li>{% endfor %}</ul>{% endif %}
<figcaption>{{ f.words }}</figcaption></figure>{% endfor %}</div>
{%- if still %}<p class="soft"><small>Not drawn: {{ still | join("; ") }}.</small></p>{% endif %}
<h2>Settings</h2>
<details {{ "open" if settings | length <= 12 }}><summary>{{ settings | length }} settings, those that differ from the default in
bold</summary><div class="scroll"><table><thead><tr><th scope="col">setting</th>
{%- for run in runs %}<th scope="col">{{ marked(loop.index0) }}</th>{% endfor %}</tr></thead><tbody>
{%- for key, cells, other in settings %}<tr><th scope="row">{{ key }}</th>
{%- for cell in cells %}<td class="text{{ " other" if other }}"><code>{{ cell }}</code></td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="soft"><small>{% for run in runs %}{{ run.name }}: {{ versions(run) }}. {% endfor %}</small></p></details>
{%- if rollouts.runs %}
<h2>Rollouts</h2>
<p class="soft">{{ shown }}</p>
{%- if rollouts.measures %}<p class="soft">A solid underline is above 0, a dashed one below, a dotted one not known; text in faint
italics does not train. Point at a token for its numbers.</p>{% endif %}
<div class="bar"><label>run <select id="run"></select></label><label>step <select id="view"></select></label>
<label>groups by <select id="groups"><option value="best">mean reward, best first</option><option value="worst">mean reward, worst
first</option><option value="contrast">contrast</option><option value="longest">length</option></select></label>
<label>responses by <select id="rows"><option value="reward">reward</option><option value="length">length</option>
<option value="order">order of sampling</option></select></label>
<label>search all steps <input id="search" type="search" placeholder="prompt or response"></label>
{%- if rollouts.measures %}<fieldset><legend>colour tokens by</legend>
{%- for m in rollouts.measures %}<button type="button" data-key="{{ m.key }}">{{ m.title }}</button>{% endfor %}</fieldset>
{%- endif %}
</div>
<p class="scale"{{ " hidden" if not rollouts.measures }}><small id="low"></small><i id="gradient"></i><small id="high"></small>
<span id="words" class="soft"></span></p>
<p class="soft"><output id="said"></output></p><div id="shown"></div>
<noscript><p>The rollouts are drawn by a script, which is switched off here.</p></noscript>
<script type="application/json" id="rollouts-data">{{ rollouts | tojson }}</script>
{%- endif %}
<script>{{ script }}</script></body></html>
"""


# -------------------------------------------------------------------------------------------------------------- curves
class Panel(NamedTuple):
    """Metrics drawn together. `share` starts the axis at 0; `log` allows a logarithmic one."""
    title: str
    patterns: tuple[str, ...]
    words: str = ""
    share: bool = False
    log: bool = False


PANELS = {
    "Reward": (
        Panel("reward", ("reward",)),
        Panel("pass@k", ("pass@*",), "Prompts with a reward above 1/2 among their k responses.", True),
        Panel("spread of the reward", ("reward/std",)),
        Panel("components of the reward", ("reward/*",), "Mean of each, before its weight."),
        Panel("groups with contrast", ("groups/contrast",), share=True), Panel("unscored", ("unscored",), share=True)),
    "Loss": (Panel("loss", ("loss",)), Panel("terms of the loss", ("loss/*",), "What the loss is the sum of.")),
    "Preferences": (
        Panel("accuracy", ("accuracy", "accuracy/*"), "Pairs whose preferred response has the higher score; also with longer "
                                                      "and shorter ones weighing alike."),
        Panel("margin", ("margin",)), Panel("scores", ("score/*",), "Implicit reward, or output of the head."),
        Panel("gain on the reference", ("shift/*",), "In log-probability. Below 0: less likely than before."),
        Panel("log-probability", ("logp/*",), "Of whole responses."), Panel("displaced", ("displaced",), share=True),
        Panel("ranking accuracy", ("ranking/policy*", "ranking/reference", "ranking/idealised*"),
              "Pairs that plain log-probabilities rank as labelled: the policy's, the reference's, and those of the optimum of "
              "DPO over beta (idealised)."),
        Panel("ranking gap", ("ranking/gap",))),
    "Policy": (
        Panel("entropy", ("entropy",)), Panel("KL to the reference", ("kl/ref",), "Nats per token.", log=True),
        Panel("KL to the old policy", ("kl/old",)), Panel("sampler against trainer", ("gap/rollout",), log=True),
        Panel("clipped", ("clip/*",), "Tokens whose ratio left the range upwards (high) or downwards (low).", True),
        Panel("importance ratio", ("ratio/*",), "Mean of the ratio, and effective sample size as a share of the tokens: both 1 "
                                                "on-policy."),
        Panel("size of the advantage", ("advantage/size",))),
    "Responses": (Panel("length", ("length",)), Panel("truncated", ("truncated",), share=True),
                  Panel("length of pairs", ("length/*",))),
    "Optimiser": (Panel("gradient norm", ("grad_norm*",), "Before clipping.", log=True), Panel("learning rate", ("lr",))),
    "Other": (Panel("", ("*",)),)}
SPEED = (Panel("tokens per second", ("tokens/s",), "Of prompts and responses, sampling and scoring included.", True),
         Panel("seconds per step", ("seconds",), "", True))


class Figure(NamedTuple):
    section: str
    title: str
    svg: Markup
    names: list[tuple[int, str]]
    words: str


def figures(runs: Sequence[RunFolder]) -> tuple[list[Figure], list[str]]:
    """The charts in order, and what is not drawn because it says nothing. With one run its metrics of a panel share a
    chart; with more each metric has one, and its lines are the runs."""
    every = [run.curves for run in runs]
    keys = natural({k.removeprefix("eval/") for some in every for k, c in some.items() if c.values})
    keys.sort(key=lambda k: k not in ("reward", "loss", "accuracy"))
    said, still, out, left = {}, [], [], []
    for key in keys:
        lines = [c for some in every for c in (some.get(key), some.get(f"eval/{key}")) if c and c.values]
        low, high = min(v for c in lines for v in c.values), max(v for c in lines for v in c.values)
        twin = said.setdefault(tuple((tuple(c.steps), tuple(c.values)) for c in lines), key)
        if high - low <= (1e-9 * abs(high) if key == "lr" else 1e-6 * max(1.0, abs(high))):
            still.append(f"{key}, which is {low:.4g}" + (f" to {high:.4g}" if f"{low:.4g}" != f"{high:.4g}" else ""))
        elif twin != key:
            still.append(f"{key}, which is the same as {twin}")
        else:
            left.append(key)
    for section, panels in PANELS.items():
        for panel in panels:
            mine = [k for k in left if any(fnmatch(k, p) for p in panel.patterns)]
            left = [k for k in left if k not in mine]
            parts = [mine] if len(runs) == 1 and panel.title else [[k] for k in mine]
            out += [figure(section, panel, part, every, runs) for part in parts if part]
    speeds = [run.speed for run in runs]
    return out + [figure("Speed", p, p.patterns, speeds, runs) for p in SPEED if any(speeds)], still


def figure(section: str, panel: Panel, keys: Sequence[str], every: Sequence[Mapping[str, Curve]], runs: Sequence[RunFolder]
           ) -> Figure:
    """These metrics of every run; colours tell metrics apart with one run, and runs with more."""
    lines = []
    for n, (some, run) in enumerate(zip(every, runs, strict=True)):
        for k, key in enumerate(keys):
            colour = k if len(runs) == 1 else n
            name = key if len(runs) == 1 else run.name
            lines += [Line(name, colour, some[key])] if key in some and some[key].values else []
            if (held := some.get(f"eval/{key}")) and held.values:
                lines.append(Line(f"{name} held out", colour, held, held_out=True))
    every_value = [v for line in lines for v in line.curve.values]
    log = panel.log and logarithmic(every_value)
    title = panel.title if len(keys) > 1 or panel.patterns == tuple(keys) else keys[0]
    words = (panel.words or sentence(described(keys[0]))) + f" Logarithmic axis{', zeros left out' * (0 in every_value)}." * log
    return Figure(section, title, chart(lines, label=f"{title} over the steps", share=panel.share, log=log),
                  list(enumerate(keys)) if len(keys) > 1 else [], words.strip())


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def natural(keys: set[str]) -> list[str]:
    """Names in order, pass@8 before pass@16; the sum before its parts."""
    return sorted(keys, key=lambda k: (k.rstrip("0123456789"), int("0" + k[len(k.rstrip("0123456789")):])))


# -------------------------------------------------------------------------------------------------------------- tables
NUMBERS = ("reward", "reward/*", "pass@*", "groups/contrast", "unscored", "loss", "accuracy", "accuracy/*", "margin",
           "shift/chosen", "ranking/policy", "kl/ref", "entropy", "gap/rollout", "clip/*", "length", "truncated", "grad_norm")


def numbers(runs: Sequence[RunFolder]) -> Iterator[tuple[str, list[str]]]:
    """Start, end and held-out value of the main metrics, for each run."""
    keys = natural({k.removeprefix("eval/") for run in runs for k in run.curves})
    for key in dict.fromkeys(k for pattern in NUMBERS for k in keys if fnmatch(k, pattern)):
        cells = []
        for run in runs:
            train, held = checks.get(run, key), checks.get(run, f"eval/{key}")
            cells += [f"{checks.start(train):.4g}", f"{checks.end(train):.4g}"] if train else ["", ""]
            cells.append(f"{held.values[-1]:.4g}" if held else "")
        if any(cells):
            yield key, cells


def departures(run: RunFolder) -> list[tuple[str, str, str]]:
    """Slot, what the recipe has there and what the run has."""
    flow = lambda part: yaml.safe_dump(part, default_flow_style=True, width=1000).split("\n")[0]
    said = lambda part: "none" if part in (None, {}, []) else flow(part)
    return [(slot, said(found["recipe"]), said(found["here"])) for slot, found in run.departures.items() if slot != "recipe"]


def settings(runs: Sequence[RunFolder]) -> list[tuple[str, list, bool]]:
    """Every setting with its value in each run, and whether it differs from the default or between them; those go first."""
    usual, every = defaults(Run), [flat(run.settings) for run in runs]
    keys = dict.fromkeys(k for some in every for k in some)
    rows = [(k, [some.get(k, "") for some in every], any(some.get(k) != usual.get(k) for some in every)) for k in keys]
    return sorted(rows, key=lambda row: not row[2])


def defaults(model: type[BaseModel], prefix: str = "") -> dict:
    """What settings are when nobody sets them, by dotted names."""
    out = {}
    for name, field in model.model_fields.items():
        kinds = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
        inner = next((t for t in kinds if issubclass(t, BaseModel)), None)
        if inner:
            out.update(defaults(inner, f"{prefix}{name}."))
        if not inner or field.default is None:
            out[prefix + name] = None if field.is_required() else field.get_default()
    return out


def versions(run: RunFolder) -> str:
    return ", ".join(f"{k} {v}" for k, v in run.facts.items() if not isinstance(v, dict))


# ---------------------------------------------------------------------------------------------------------------- page
def mark(colour: int) -> Markup:
    """A patch of the colour of a line."""
    return Markup('<span class="mark" style="--c:var(--c{})"></span>').format(colour % 8)


def dash(held_out: bool) -> Markup:
    return Markup('<svg viewBox="0 0 28 10" style="--c:var(--ink)" aria-hidden="true"><g class="{}"><polyline class="line" '
                  'points="0,5 28,5"/></g></svg>').format("held" if held_out else "seen")


def rollouts(runs: Sequence[RunFolder], sizes: Sizes) -> tuple[dict, str]:
    """The sample of every run that has rollouts, with the scales of the colours, and what it leaves out."""
    share = sizes._replace(steps=min(sizes.steps, max(2, sizes.steps // len(runs))))
    found = {run.name: sample(run, share) for run in runs}
    found = {name: made for name, made in found.items() if made["views"]}
    rows = [r for made in found.values() for view in made["views"] for g in view["groups"] for r in g["rows"] if "values" in r]
    measures = []
    for key, measure in MEASURES.items():
        sizes_seen = [abs(v) for r in rows if key in r["values"] for v in listed(r["values"][key]) if v is not None]
        if sizes_seen:
            scale = max(measure.least, float(np.quantile(sizes_seen, 0.98)))
            measures.append({**measure._asdict(), "key": key, "scale": scale})
    shown = "; ".join(f"{name}: {sum(bool(v['facts']) for v in made['views'])} of {made['steps']} dumped steps, and of each at "
                      f"most {share.groups} groups, from the best to the worst"
                      + ("" if made["tokens"] else " (its tokenizer is not at hand, so tokens are not shown)")
                      for name, made in found.items())
    out = [{"name": name, "views": [{"title": v["title"], "groups": v["groups"], "again": not v["facts"], "words": on_view(v)}
                                    for v in made["views"]]} for name, made in found.items()]
    return {"runs": out, "measures": measures}, f"A sample. {shown}. All are in the folder rollouts of the run."


def listed(found) -> list:
    return found if isinstance(found, list) else [found]


def on_view(view: dict) -> str:
    """What is on view, and the numbers of all groups of the step."""
    if not view["facts"]:
        return "Prompts that came up at several steps, with the responses of each."
    known = ", ".join(f"{key} {value:.4g}" for key, value in view["facts"].items())
    return f"{len(view['groups'])} of {view['of']} groups. All of them: {known}."


def environment() -> Environment:
    """Everything is escaped, and a misspelt name is an error."""
    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return found


def render(runs: Sequence[RunFolder], sizes: Sizes = Sizes()) -> str:
    """The page of these runs, in this order."""
    runs = named(runs)
    found = [(n, f) for n, run in enumerate(runs) for f in checks.findings(run)]
    drawn, still = figures(runs)
    sampled, shown = rollouts(runs, sizes)
    recipes = ", ".join(dict.fromkeys(run.settings["recipe"] for run in runs))
    marked = lambda n: (mark(n) if len(runs) > 1 else Markup()) + runs[n].name
    title = f"{recipes}: {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {recipes}"
    return environment().from_string(PAGE).render(
        title=title, css=Markup(CSS), runs=runs, mark=mark, marked=marked, dash=dash, departures=departures, versions=versions,
        findings=sorted(found, key=lambda item: item[1].level != "error"),
        checked=[check.__doc__.splitlines()[0] for check in checks.CHECKS],
        numbers=list(numbers(runs)), figures=drawn, still=still, settings=settings(runs), rollouts=sampled, shown=shown,
        long=any(len(c.values) > 40 for run in runs for c in run.curves.values()),
        held=any(k.startswith("eval/") for run in runs for k in run.curves),
        script=Markup(POINT + (ROLLOUTS if sampled["runs"] else "")))


def named(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Runs whose names tell them apart: with their parents' where folders are called the same."""
    from dataclasses import replace
    names = [run.name for run in runs]
    longer = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    return [replace(r, name=l) if names.count(r.name) > 1 else r for r, l in zip(runs, longer, strict=True)]


def write(folders: Sequence[str | Path], out: str | Path, sizes: Sizes = Sizes()) -> Path:
    """Read run folders and write their page."""
    page, out = render([load(f) for f in folders], sizes), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")
    return out
