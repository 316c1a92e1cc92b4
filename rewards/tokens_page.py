"""Responses with every token or step coloured by its reward, as one HTML page.

    Path("tokens.html").write_text(render([{"prompt": "2 + 2?", "tokens": ["It", " is", " 4"], "rewards": [0.1, 0.0, 0.9]}]))

A record has `tokens` (texts) and either or both of `rewards` (one number for each token) and `steps`
([{"start": 0, "end": 3, "reward": 0.2}, ...], ends exclusive, in order, not overlapping; a step may have a `label`, true or
false). A reward of None or NaN is not known and is marked so. `prompt`, `title` and `score` (of the whole response) may be there.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from data_tools.columns import nearest
from rewards.page import CSS, HEAD, environment, number

__all__ = ["render"]

KEYS = ("tokens", "rewards", "steps", "prompt", "title", "score")
STYLE = """
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; font: 14px/2 ui-monospace, "Liberation Mono", monospace; }
.text span { border-radius: 3px; padding: .12em 0; border-bottom: 2px solid transparent; }
.text .up { border-bottom: 2px solid rgb(var(--cool)); } .text .down { border-bottom: 2px dashed rgb(var(--warm)); }
.text .unknown { border-bottom: 2px dotted var(--soft); } .scale { display: inline-flex; align-items: center; gap: .5rem; }
.scale i { display: inline-block; width: 14rem; height: .9rem; border: 1px solid var(--line); border-radius: 3px;
  background: linear-gradient(90deg, rgb(var(--warm) / .6), transparent, rgb(var(--cool) / .6)); }
.step { padding: .15rem .7rem; margin: .25rem 0; border-left: 5px solid var(--line); border-radius: 3px; }
.step small { color: var(--ink); } .step.up { border-left-color: rgb(var(--cool)); }
.step.down { border-left-color: rgb(var(--warm)); } .step.unknown { border-left-style: dotted; }
.record { border-top: 1px solid var(--line); padding: .9rem 0; break-inside: avoid; }
"""
PAGE = HEAD + """
<h1>{{ title }}</h1>
<p class="soft">{{ records | length }} response{{ "s" if records | length != 1 }}. A solid underline is above
{{ number(centre) }}, a dashed one below, a dotted one not known; the colour is full at a distance of {{ number(scale) }}.
Point at a token for its reward.</p>
<p class="scale"><small>{{ number(centre - scale) }}</small><i></i><small>{{ number(centre + scale) }}</small></p>
{%- for record in records %}
<section class="record"><h2>{{ record.title }}</h2><p class="soft">{{ record.facts }}</p>
{%- if record.prompt %}<pre>{{ record.prompt }}</pre>{% endif %}
{{ record.body }}
<details><summary><small>as a table</small></summary>{{ record.table }}</details></section>
{%- endfor %}
</body></html>
"""


def render(records: Sequence[Mapping], *, title: str = "Rewards by token", centre: float = 0.0) -> str:
    """The page. `centre` is the reward without colour: 0 for log-ratios, 1/2 for probabilities."""
    records = [checked(record, n) for n, record in enumerate(records)]
    distances = [abs(v - centre) for r in records for v in (*r["rewards"], *(s["reward"] for s in r["steps"])) if v is not None]
    scale = float(np.quantile(distances, 0.98)) if distances else 1.0
    scale = scale or 1.0
    return environment().from_string(PAGE).render(
        title=title, css=Markup(CSS + STYLE), centre=centre, scale=scale, number=number,
        records=[{"title": r["title"], "prompt": r["prompt"], "facts": facts(r), "body": body(r, centre, scale),
                  "table": listing(r)} for r in records])


def checked(record: Mapping, n: int) -> dict:
    """The record with every key, rewards that are not finite as None; or an error that says what is wrong with it."""
    where = f"record {n + 1}"
    for key in record:
        if key not in KEYS:
            raise ValueError(f"{where} has an unknown key {key!r}{nearest(key, KEYS)}; keys: {', '.join(KEYS)}")
    if "tokens" not in record or not ("rewards" in record or "steps" in record):
        raise ValueError(f"{where} needs 'tokens', and 'rewards' or 'steps'; it has {', '.join(record) or 'nothing'}")
    tokens, steps = list(record["tokens"]), [dict(step) for step in record.get("steps") or []]
    rewards = [known(v) for v in record.get("rewards") or []]
    if rewards and len(rewards) != len(tokens):
        raise ValueError(f"{where} has {len(tokens)} tokens and {len(rewards)} rewards; there is one reward for each token, None "
                         f"where it is not known")
    end = 0
    for k, step in enumerate(steps):
        if not end <= step["start"] <= step["end"] <= len(tokens):
            raise ValueError(f"step {k + 1} of {where} goes from {step['start']} to {step['end']}, after {end} and of "
                             f"{len(tokens)} tokens; steps are in order, do not overlap and end within the tokens")
        end, step["reward"] = step["end"], known(step.get("reward"))
    return {"tokens": tokens, "rewards": rewards, "steps": steps, "prompt": record.get("prompt"), "score": record.get("score"),
            "title": record.get("title") or f"Response {n + 1}"}


def known(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def facts(record: Mapping) -> str:
    values = [v for v in record["rewards"] if v is not None]
    lost = len(record["rewards"]) - len(values) + sum(s["reward"] is None for s in record["steps"])
    parts = [f"{len(record['tokens'])} tokens", f"{len(record['steps'])} steps" if record["steps"] else "",
             f"score {number(record['score'])}" if record["score"] is not None else "",
             f"sum of rewards {number(sum(values))}" if values else "", f"rewards not known: {lost}" if lost else ""]
    return ", ".join(part for part in parts if part)


def shade(value: float | None, centre: float, scale: float) -> tuple[str, str]:
    """Class and background of a reward."""
    if value is None:
        return "unknown", ""
    if value == centre:
        return "", ""
    side, colour = ("up", "cool") if value > centre else ("down", "warm")
    return side, f"background:rgb(var(--{colour}) / {0.6 * min(1.0, abs(value - centre) / scale):.3f})"


def spans(record: Mapping, start: int, end: int, centre: float, scale: float) -> Markup:
    """The tokens of a stretch, coloured if they have rewards; a line break is shown where a token holds one."""
    if not record["rewards"]:
        return Markup.escape("".join(record["tokens"][start:end]).strip("\n"))
    out = []
    for token, value in zip(record["tokens"][start:end], record["rewards"][start:end], strict=True):
        side, style = shade(value, centre, scale)
        out.append(Markup('<span class="{}" style="{}" title="{}">{}</span>').format(
            side, style, "not known" if value is None else number(value), token.replace("\n", "\u21b5\n")))
    return Markup("").join(out)


def body(record: Mapping, centre: float, scale: float) -> Markup:
    """The text; in blocks with their rewards beside them where there are steps."""
    out, end = [], 0
    for k, step in enumerate(record["steps"]):
        if step["start"] > end:
            out.append(Markup('<div class="text">{}</div>').format(spans(record, end, step["start"], centre, scale)))
        side, style = shade(step["reward"], centre, scale)
        words = [f"step {k + 1}", "not known" if step["reward"] is None else number(step["reward"]),
                 {True: "labelled right", False: "labelled wrong"}.get(step.get("label"))]
        out.append(Markup('<div class="step {}" style="{}"><small>{}</small><div class="text">{}</div></div>').format(
            side, "" if record["rewards"] else style, ", ".join(filter(None, words)),
            spans(record, step["start"], step["end"], centre, scale)))
        end = step["end"]
    if end < len(record["tokens"]):
        out.append(Markup('<div class="text">{}</div>').format(spans(record, end, len(record["tokens"]), centre, scale)))
    return Markup("").join(out)


def listing(record: Mapping) -> Markup:
    """The rewards as a table, for those who cannot see the colours."""
    rows = [(repr(t), v) for t, v in zip(record["tokens"], record["rewards"], strict=False)] + [
        (f"step {k + 1}", s["reward"]) for k, s in enumerate(record["steps"])]
    return Markup('<table><thead><tr><th scope="col">token</th><th scope="col">reward</th></tr></thead><tbody>{}</tbody></table>'
                  ).format(Markup("").join(Markup('<tr><th scope="row">{}</th><td>{}</td></tr>').format(
                      name, "not known" if value is None else number(value)) for name, value in rows))
