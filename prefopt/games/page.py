"""A played game as one HTML page: gaps by iteration, and where policies of three responses go on the simplex."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from markupsafe import Markup
from torch import Tensor

from prefopt.games.play import Played, Run, table
from prefopt.report.charts import Line, chart, logarithmic
from prefopt.report.folders import Curve
from prefopt.report.page import environment, mark
from prefopt.report.style import CSS, HEAD, POINT

__all__ = ["render", "write"]

FLOOR = 1e-16                                                 # below it a gap is rounding
CORNERS = ((20.0, 330.0), (380.0, 330.0), (200.0, 18.0))
OWN = """
.simplex { max-width: 46rem; } .simplex polyline { stroke-width: 1.4; opacity: .85; }
.simplex .edge { fill: none; stroke: var(--soft); } .simplex .start { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.simplex .star { fill: var(--ink); stroke: var(--paper); } .simplex text { font-size: 11px; fill: var(--ink); }
.wide { grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); }
"""
PAGE = HEAD + """
<h1>{{ title }}</h1>
<p class="soft">{{ words }}</p>
<ul class="legend">{% for run in runs %}<li>{{ mark(loop.index0) }}{{ run.name }}</li>{% endfor %}
{% if long %}<li>bold: the running mean</li>{% endif %}</ul>
<h2>Gaps</h2>
<div class="charts wide">
{%- for title, svg, said in figures %}<figure><h4>{{ title }}</h4>{{ svg }}<figcaption>{{ said }}</figcaption></figure>
{%- endfor %}</div>
{%- if simplex %}
<h2>On the simplex</h2>
<figure class="simplex">{{ simplex }}<figcaption>Each corner is a response that is always given. Circle: where all start; star:
the equilibrium with the KL; square: one without.</figcaption></figure>
{%- endif %}
{%- for title, rows in tables %}
<h2>{{ title }}</h2>
<div class="scroll"><table><thead><tr><th scope="col" class="number">iteration</th>{% for run in runs %}<th scope="col"
class="number">{{ run.name }}</th>{% endfor %}</tr></thead><tbody>
{%- for row in rows %}<tr>{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{%- endfor %}
{%- if payoffs %}
<h2>Game</h2>{% endif %}
{%- for rows in payoffs %}
<div class="scroll"><table><caption>P(row beats column), the reference, and both equilibria
{{- " of prompt " ~ loop.index if payoffs | length > 1 }}</caption><thead><tr><td></td>{% for name in actions %}<th scope="col"
class="number">{{ name }}</th>{% endfor %}<th scope="col" class="number">reference</th><th scope="col" class="number">with the
KL</th><th scope="col" class="number">without</th></tr></thead><tbody>
{%- for row in rows %}<tr><th scope="row">{{ actions[loop.index0] }}</th>{% for cell in row %}<td
class="number">{{ "%.3g" | format(cell) }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
{%- endfor %}
<script>{{ script }}</script></body></html>
"""


FIGURES = (
    ("gap", "duality gap with the KL", "What both players may gain under the KL; 0 at the equilibrium with the KL alone."),
    ("exploitability", "exploitability", "What the best opponent wins above 1/2, without a KL; 0 at an equilibrium without one, "
     "so that a KL keeps it from 0."),
    ("distance", "distance from the equilibrium", "KL(equilibrium with the KL || policy). A line that falls straight converges "
     "linearly."))


def payoffs(played: Played) -> list[list[list[float]]]:
    """Rows of P, the reference and both equilibria for the first prompts; nothing of a game too large to read."""
    here = played.game
    if here.items > 20:
        return []
    beside = zip(here.payoff, here.reference, played.equilibrium, played.nash, strict=True)
    return [torch.cat([P, torch.stack([*policies], 1)], 1).tolist() for P, *policies in beside][:4]


def drawn(runs: Sequence[Run], key: str, label: str) -> Markup:
    values = [[max(v, FLOOR) for v in getattr(run, key).tolist()] for run in runs]
    lines = [Line(run.name, n, Curve(list(range(len(v))), v, [])) for n, (run, v) in enumerate(zip(runs, values, strict=True))]
    return chart(lines, label=label, log=any(map(logarithmic, values)))


def place(policy: Tensor) -> tuple[float, float]:
    return tuple(sum(float(p) * corner[axis] for p, corner in zip(policy, CORNERS, strict=True)) for axis in (0, 1))


def simplex(played: Played) -> Markup:
    """The first prompt's policies of three responses in a triangle."""
    said = Markup('<svg role="img" aria-label="policies on the simplex" viewBox="0 0 400 360">')
    corners = " ".join(f"{x},{y}" for x, y in CORNERS)
    out = [said, Markup('<polygon class="edge" points="{}"/>').format(corners)]
    for (x, y), name, down, side in zip(CORNERS, played.game.actions, (16, 16, -6), ("start", "end", "middle"), strict=True):
        out.append(Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y + down, side, name))
    for n, run in enumerate(played.runs):
        points = " ".join("{:.1f},{:.1f}".format(*place(p)) for p in run.policies[:, 0])
        x, y = place(run.policies[-1, 0])
        out.append(Markup('<g style="--c:var(--c{})"><polyline points="{}"/><circle cx="{:.1f}" cy="{:.1f}" r="3.2"/></g>')
                   .format(n % 8, points, x, y))
    x, y = place(played.runs[0].policies[0, 0])
    out.append(Markup('<circle class="start" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(x, y))
    x, y = place(played.nash[0])
    out.append(Markup('<rect class="star" x="{:.1f}" y="{:.1f}" width="8" height="8"/>').format(x - 4, y - 4))
    x, y = place(played.equilibrium[0])
    out.append(Markup('<path class="star" transform="translate({:.1f} {:.1f})" d="M0-8 2-2.6 7.6-2.5 3.2 1 4.7 6.5 0 3.3-4.7 '
                      '6.5-3.2 1-7.6-2.5-2-2.6Z"/>').format(x, y))
    return Markup("").join([*out, Markup("</svg>")])


def render(played: Played) -> str:
    here, plan, runs = played.game, played.plan, played.runs
    how = "summed over all pairs" if plan.samples is None else f"{plan.samples} groups drawn per iteration" + (
        ", an oracle that answers 0 or 1" if plan.verdicts else "")
    words = (f"{here.items} responses, {here.prompts} prompt{'s' * (here.prompts > 1)}, KL weight {plan.beta:g}, "
             f"{plan.iterations} iterations, {how}. Gaps and exploitability are means over prompts.")
    figures = [(title, drawn(runs, key, title), said) for key, title, said in FIGURES if getattr(runs[0], key) is not None]
    return environment().from_string(PAGE).render(
        title=f"Game of {here.name}", css=Markup(CSS + OWN), words=words, runs=runs, mark=mark, figures=figures,
        simplex=simplex(played) if here.items == 3 else None, actions=here.actions, payoffs=payoffs(played),
        tables=[("Duality gap with the KL", table(runs, "gap")), ("Exploitability", table(runs, "exploitability"))],
        long=plan.iterations > 40, script=Markup(POINT))


def write(played: Played, out: str | Path) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(played), encoding="utf-8")
    return out
