"""How pages look: readable in light and dark and on paper, with nothing from outside."""
from __future__ import annotations

import math

__all__ = ["CSS", "HEAD", "short", "ticks"]

CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --line: #d5dae0; --paper: #ffffff; --panel: #f5f7f9;
  --bad: 178 50 32; --warm: 214 98 10; --cool: 29 97 176; --odd: 120 70 150;
  --c0: #1d61b0; --c1: #c95c0a; --c2: #2c7a4e; --c3: #a03a86; --c4: #7a6a00; --c5: #0b7f8c; --c6: #b23a48; --c7: #5a5fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9da8b3; --line: #39424b; --paper: #14181c;
  --panel: #1c2228; --bad: 240 128 96; --warm: 240 140 50; --cool: 90 156 245; --odd: 190 140 225;
  --c0: #6ea8f0; --c1: #f09646; --c2: #5ebe84; --c3: #dd83c6; --c4: #cdb93f; --c5: #4fc3d0; --c6: #f08290; --c7: #a3a7f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; } p { margin: .3rem 0 .8rem; max-width: 60rem; }
.soft, caption, figcaption, small { color: var(--soft); } small { font-size: .85em; } [hidden] { display: none !important; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0; font-size: .9em; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; } thead th { border-bottom: 2px solid var(--line); }
thead th.number { text-align: right; }
tbody th { font-weight: 600; white-space: nowrap; } td.text { overflow-wrap: anywhere; max-width: 34rem; }
td.other { font-weight: 700; } code { font: .92em ui-monospace, "Liberation Mono", monospace; overflow-wrap: anywhere; }
.mark { display: inline-block; width: .8em; height: .8em; border-radius: 2px; background: var(--c); margin-right: .35em; }
.findings { list-style: none; padding: 0; margin: .5rem 0; }
.findings li { border: 1px solid var(--line); border-left: 5px solid rgb(var(--warm)); border-radius: 4px; padding: .45rem .8rem;
  margin: .45rem 0; background: var(--panel); max-width: 72rem; } .findings li.error { border-left-color: rgb(var(--bad)); }
.findings strong { margin-right: .4rem; } .findings .fine { border-left-color: var(--c2); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(18.5rem, 1fr)); gap: .4rem 1rem; }
figure { margin: .5rem 0; position: relative; break-inside: avoid; } figure h4 { margin: 0; font-size: .92rem; }
figcaption { font-size: .82rem; line-height: 1.35; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; } svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .cursor { stroke: var(--soft); stroke-dasharray: 2 3; visibility: hidden; }
svg polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; } svg circle { fill: var(--c); }
svg .raw { stroke-width: 1; opacity: .38; } svg .held .line { stroke-dasharray: 5 3; stroke-width: 1.6; }
svg .band { fill: var(--c); opacity: .16; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .2rem 0; list-style: none; font-size: .84rem; }
.legend svg { display: inline-block; width: 1.8rem; height: .7rem; margin-right: .3rem; }
.point { position: absolute; z-index: 2; pointer-events: none; background: var(--paper); border: 1px solid var(--line);
  border-radius: 4px; padding: .2rem .5rem; font-size: .78rem; white-space: pre; box-shadow: 0 1px 4px rgb(0 0 0 / .2); }
.bar { position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line); padding: .5rem 0;
  display: flex; flex-wrap: wrap; gap: .4rem .9rem; align-items: end; } .bar label, .bar fieldset { font-size: .82rem; }
.bar select, .bar input { display: block; font: inherit; padding: .2rem .4rem; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: 4px; max-width: 18rem; }
fieldset { border: 0; padding: 0; margin: 0; } legend { padding: 0; }
button { font: inherit; padding: .2rem .6rem; color: inherit; background: var(--panel); border: 1px solid var(--line);
  cursor: pointer; } button:first-of-type { border-radius: 4px 0 0 4px; } button:last-of-type { border-radius: 0 4px 4px 0; }
button[aria-pressed=true] { background: var(--c0); color: var(--paper); border-color: var(--c0); }
.scale { display: flex; align-items: center; gap: .5rem; margin: .4rem 0 0; font-size: .84rem; max-width: none; }
.scale i { flex: none; width: 9rem; height: .8rem; border: 1px solid var(--line); border-radius: 3px; }
.group { border-top: 2px solid var(--line); padding: .8rem 0; }
.group header { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .86rem; } .group header b { font-size: .95rem; }
pre, .said { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font: 13px/1.7 ui-monospace, "Liberation Mono",
  monospace; } pre { padding: .4rem .6rem; background: var(--panel); border-radius: 4px; max-height: 15rem; overflow-y: auto; }
.rows { display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .6rem; }
.row { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .6rem; min-width: 0; }
.row.hit { outline: 2px solid var(--c4); } .row .head { display: flex; flex-wrap: wrap; gap: 0 .8rem; font-size: .82rem; }
.row .head b { font-size: .98rem; } .row .meter { height: 4px; background: var(--line); border-radius: 2px; margin: .2rem 0; }
.row .meter div { height: 4px; background: var(--soft); border-radius: 2px; }
.note { color: rgb(var(--bad)); font-weight: 600; } .said { max-height: 24rem; overflow-y: auto; }
.said span { border-radius: 3px; padding: .1em 0; border-bottom: 2px solid transparent; }
.said .up { border-bottom-color: rgb(var(--cool)); } .said .down { border-bottom: 2px dashed rgb(var(--warm)); }
.said .unknown { border-bottom: 2px dotted var(--soft); } .said .idle { opacity: .55; font-style: italic; }
.said .gap { color: var(--soft); font-style: italic; } .row summary { font-size: .8rem; color: var(--soft); cursor: pointer; }
.row table { font-size: .8rem; } .row td { white-space: pre; padding: .05rem .5rem; }
details > summary { cursor: pointer; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .bar { display: none; } pre, .said { max-height: none; }
  .row { break-inside: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
script-src {{ scripts | default("'unsafe-inline'") }}">
<title>{{ title }}</title><style>{{ css }}</style></head><body>
"""


def short(value: float) -> str:
    """A number in few characters.

    >>> short(0.0), short(12345.0), short(2.5e-7), short(0.30000000000000004)
    ('0', '12.3k', '2.5e-7', '0.3')
    """
    size = abs(value)
    if size < 1e-12:
        return "0"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.3g}{letter}"
    if size < 1e-3:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between `low` and `high`.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
    """
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
