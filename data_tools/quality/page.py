"""The page of `describe` and `view`: one file, no network, readable in light and dark and on paper.

Every text of the data is hostile: jinja and markupsafe escape it, and the script puts it into text nodes only. The page's policy
allows that one script, by its hash, and nothing else.
"""
from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from data_tools.describe import render as rendered
from data_tools.page import CSS, HEAD, short, ticks
from data_tools.quality import viewer
from data_tools.quality.words import digest

__all__ = ["bars", "render", "write_page"]

PAGE = HEAD + """
<h1>{{ title }}</h1>
<p class="soft">{{ "{:,}".format(total) }} groups
{%- if sections is defined %}, {{ "{:,}".format(sections["size"].get("responses", 0)) }} responses
{%- if languages %}; prompts in {{ languages | join(", ") }}{% endif %}{% endif %}.</p>
{%- if sections is defined %}
<h2>Warnings</h2>
<ul class="findings">
{%- for w in warnings %}<li class="{{ "error" if w.share > 0.05 or w.whole }}"><strong>{{ w.kind }}</strong>
{%- if w.whole %} {{ w.examples[0] }}
{%- else %} {{ "{:,}".format(w.count) }} in {{ "{:,}".format(w.groups) }} group{{ "s" if w.groups > 1 }}
({{ "{:.1%}".format(w.share) }})
{%- if w.repair %}, repair: {{ w.repair }}{% endif %}
<details><summary>for example</summary>{% for e in w.examples %}<p><small>{{ e }}</small></p>{% endfor %}
</details>{% endif %}</li>
{%- else %}<li class="fine">No check was made, or it found nothing.</li>{% endfor %}</ul>
<h2>Distributions</h2>
<div class="charts">
{%- for name, words, svg, names in charts %}<figure><h4>{{ name }}</h4>{{ svg }}
{%- if names | length > 1 %}<ul class="legend">{% for n in names %}<li>
<span class="mark" style="--c:var(--c{{ loop.index0 % 8 }})"></span>{{ n or "no model named" }}</li>{% endfor %}</ul>{% endif %}
<figcaption>{{ words }}</figcaption></figure>{% endfor %}</div>
{%- if models %}
<h2>Models</h2>
<div class="scroll"><table><thead><tr><th scope="col">model</th><th scope="col" class="number">responses</th>
<th scope="col" class="number">comparisons won</th><th scope="col" class="number">characters, mean</th></tr></thead><tbody>
{%- for name, m in models.items() %}<tr><th scope="row">{{ name }}</th><td class="number">{{ "{:,}".format(m.responses) }}</td>
<td class="number">{{ "{:.1%} of {:,}".format(m.won / m.compared, m.compared) if m.compared else "-" }}</td>
<td class="number">{{ "{:,.0f}".format(m.characters / m.responses) }}</td></tr>{% endfor %}</tbody></table></div>{% endif %}
{%- for a in agreement %}
<h2>Agreement of {{ a.what }}</h2>
<p class="soft">Percent of {{ "items on which two give the same vote" if a.what == "annotators" else
"pairs that two put in the same order; ties of either left out" }}.</p>
<div class="scroll"><table class="heat"><thead><tr><td></td>
{%- for n in a.names %}<th scope="col">{{ n }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in a.share %}{% set mine = loop.index0 %}<tr><th scope="row">{{ a.names[mine] }}</th>
{%- for v in row %}<td style="{{ tint(v) }}">
{{- "" if loop.index0 == mine else "-" if v is none else "{:.1f}".format(100 * v) }}</td>
{%- endfor %}</tr>{% endfor %}</tbody></table></div>{% endfor %}
{%- if topics %}
<h2>Topics of the prompts</h2>
<div class="scroll"><table><thead><tr><th scope="col" class="number">share</th><th scope="col">words</th><th scope="col">near its
middle</th></tr></thead><tbody>
{%- for t in topics %}<tr><td class="number">{{ "{:.0%}".format(t.share) }}</td><td class="text">{{ t.words | join(", ") }}</td>
<td class="text">{% for e in t.examples %}<div class="soft"><small>{{ e }}</small></div>{% endfor %}</td></tr>
{%- endfor %}</tbody></table></div>{% endif %}
<h2>In numbers</h2>
<div class="scroll"><table><tbody>
{%- for section, rows in sections.items() %}{% for name, value in rows.items() %}<tr>
<td class="soft">{{ section if loop.first }}</td><th scope="row">{{ name }}</th><td class="text">{{ cell(value) }}</td></tr>
{%- endfor %}{% endfor %}</tbody></table></div>
<h2>Groups</h2>{% endif %}
<p class="soft">{% if total > groups | length %}
{{ "{:,}".format(groups | length) }} of {{ "{:,}".format(total) }} groups are on this page, drawn
from every stratum; the strata: {% for name, n in strata.items() %}{{ name }} ({{ "{:,}".format(n) }}){{ ", " if not loop.last }}
{%- endfor %}.{% else %}All {{ "{:,}".format(total) }} groups are on this page.{% endif %} What only one side has is marked.</p>
<div class="bar" id="bar"><label>search <input id="search" type="search" placeholder="prompt, response, place"></label>
<label>stratum <select id="stratum"><option value="">all</option></select></label>
<label>finding <select id="flag"><option value="">all</option></select></label>
<label>model <select id="model"><option value="">all</option></select></label>
<label>margin from <input id="low" type="number" step="any"></label><label>to <input id="high" type="number" step="any"></label>
<label>labels <select id="state"><option value="">all</option><option value="labelled">labelled by me</option>
<option value="open">not yet</option></select></label>
<label>order <select id="order"><option value="data">of the data</option><option value="narrow">narrow margins first</option>
<option value="wide">wide margins first</option><option value="flags">most findings first</option>
<option value="sure">surest finding first</option></select></label>
<span><label class="tick"><input id="differ" type="checkbox" checked>differences</label>
<label class="tick"><input id="blind" type="checkbox">blind</label>
<label class="tick"><input id="onward" type="checkbox">go on after a label</label></span>
<span class="moves"><button type="button" id="back" aria-label="previous">&larr;</button> <output id="count"></output>
<button type="button" id="next" aria-label="next">&rarr;</button></span>
<span class="moves"><button type="button" id="export" disabled>export labels</button> <output id="done" class="mine"></output>
</span></div>
<ul class="keys soft"><li><kbd>1</kbd> ... <kbd>9</kbd> best, then second best</li><li><kbd>t</kbd> tie</li>
<li><kbd>x</kbd> leave the group out</li><li><kbd>u</kbd> no label</li><li><kbd>&larr;</kbd> <kbd>&rarr;</kbd> groups</li>
<li><kbd>d</kbd> differences</li><li><kbd>b</kbd> blind</li><li><kbd>/</kbd> search, <kbd>Esc</kbd> out of it</li></ul>
<div id="shown"></div>
<details><summary class="soft">My labels as text</summary><pre id="lines"></pre>
<button type="button" id="forget">forget them</button></details>
<noscript><p>The groups are drawn by a script, which is switched off here.</p></noscript>
<script type="application/json" id="groups-data">{{ {"key": key, "groups": groups} | tojson }}</script>
<script>{{ script }}</script></body></html>
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 190, 40, 12, 8, 30


def bars(histogram: dict, label: str) -> Markup:
    """The shares of a histogram: filled bars for one series, outlines for several."""
    edges, series = histogram["edges"], histogram["series"]
    shares = {name: [c / max(sum(counts), 1) for c in counts] for name, counts in series.items()}
    top = max((v for values in shares.values() for v in values), default=0.0) or 1.0
    across = lambda x: LEFT + (x - edges[0]) / (edges[-1] - edges[0]) * (WIDTH - LEFT - RIGHT)
    up = lambda v: HEIGHT - BOTTOM - v / (1.05 * top) * (HEIGHT - TOP - BOTTOM)
    out = [Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">').format(label, WIDTH, HEIGHT)]
    line, text = (Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'),
                  Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'))
    for value in ticks(0.0, top, 4):
        out += [line.format("grid", LEFT, WIDTH - RIGHT, up(value), up(value)),
                text.format(LEFT - 5, up(value) + 4, "end", f"{value:.2g}")]
    for value in ticks(edges[0], edges[-1], 6):
        out += [line.format("axis", across(value), across(value), up(0), up(0) + 4),
                text.format(across(value), up(0) + 16, "middle", short(value))]
    for n, values in enumerate(shares.values()):
        points = [(across(x), up(v)) for v, a, b in zip(values, edges, edges[1:], strict=False) for x in (a, b)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(points[0][0], up(0)), *points, (points[-1][0], up(0))])
        out.append(Markup('<g style="--c:var(--c{})"><polygon points="{}" style="fill:var(--c);opacity:{}"/>'
                          '<polyline points="{}"/></g>').format(n % 8, drawn, 0.35 if len(shares) == 1 else 0.07, drawn))
    return Markup("").join([*out, line.format("axis", LEFT, WIDTH - RIGHT, up(0), up(0)), Markup("</svg>")])


def charts(report: dict) -> list[tuple]:
    """(title, words, picture, names of the series) of every distribution that has a value."""
    said = [(f"length of a {name}", "Characters.", found) for name, found in report["lengths"].items()]
    said += [(f"margin: {name}", "Best less worst response of a group.", found) for name, found in report["margins"].items()]
    said += [(f"score: {name}", "Median " + ", ".join(f"{n} {short(v)}" if n else short(v) for n, v in sorted(
        found["middle"].items())) + ".", found) for name, found in report["scores"].items()]
    fewer = lambda found: f" The {len(found['series'])} largest of {found['all']:,}." * (found["all"] > len(found["series"]))
    return [(title, words + fewer(found) + " The outer bins hold what is beyond.", bars(found, title), list(found["series"]))
            for title, words, found in said if found["edges"]]


def tint(value: float | None) -> str:
    """Blue above one half, orange below."""
    if value is None:
        return ""
    return f"background:rgb(var(--{'cool' if value >= 0.5 else 'warm'}) / {min(0.5, abs(value - 0.5)):.2f})"


def render(report: dict) -> str:
    """The page of a report of `describe` or `view`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    hashed = base64.b64encode(hashlib.sha256(viewer.VIEWER.encode()).digest()).decode()
    key = f"{digest(' '.join(g['id'] for g in report['groups'])):016x}"
    return environment.from_string(PAGE).render(
        css=Markup(CSS + viewer.CSS), script=Markup(viewer.VIEWER), scripts=f"'sha256-{hashed}'", key=key, tint=tint,
        cell=lambda value: rendered({"": {"": value}}).strip().replace("  ", ", "),
        charts=charts(report) if "sections" in report else [], **report)


def write_page(report: dict, path) -> None:
    """The page of a report in a file."""
    Path(path).write_text(render(report).encode("utf-8", "replace").decode(), encoding="utf-8")
