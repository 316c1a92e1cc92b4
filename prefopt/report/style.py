"""How a page looks and behaves: readable in light and dark and on paper, with nothing from outside."""

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
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ title }}</title><style>{{ css }}</style></head><body>
"""

POINT = """
const nearest = (list, x) => list.reduce((best, v, n) => Math.abs(v - x) < Math.abs(list[best] - x) ? n : best, 0);
for (const svg of document.querySelectorAll("figure > svg")) {
  const [left, right] = svg.dataset.frame.split(" ").map(Number), [first, last] = svg.dataset.x.split(" ").map(Number);
  const numbers = text => text ? text.split(" ").map(Number) : [];
  const lines = [...svg.querySelectorAll("g")].map(g => ({name: g.dataset.name, x: numbers(g.dataset.steps),
    y: numbers(g.dataset.values)})).filter(line => line.x.length);
  const cursor = svg.querySelector(".cursor"), box = document.createElement("div");
  box.className = "point"; box.hidden = true; svg.parentElement.append(box);
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect(), at = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
    const step = first + (at - left) / (right - left) * (last - first);
    const found = lines.map(line => ({line, n: nearest(line.x, step)}));
    const near = found.reduce((best, f) => Math.abs(f.line.x[f.n] - step) < Math.abs(best - step) ? f.line.x[f.n] : best,
      Infinity);
    box.textContent = found.map(({line, n}) => line.name + "  " + line.y[n] + (line.x[n] === near ? "" : " (step " +
      Math.round(line.x[n]) + ")")).concat("step " + Math.round(near)).reverse().join("\\n");
    const x = left + (last > first ? (near - first) / (last - first) : .5) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible"; box.hidden = false;
    const place = x / svg.viewBox.baseVal.width * frame.width;
    box.style.top = "3.2rem"; box.style.left = place > frame.width / 2 ? "" : place + 10 + "px";
    box.style.right = place > frame.width / 2 ? frame.width - place + 10 + "px" : "";
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; box.hidden = true; });
}
"""

ROLLOUTS = """
const data = JSON.parse(document.getElementById("rollouts-data").textContent), by = id => document.getElementById(id);
const short = v => v === null ? "not known" : String(Number(v.toPrecision(3)));
const make = (tag, kind, ...inside) => { const e = document.createElement(tag); if (kind) e.className = kind; e.append(...inside);
  return e; };
const option = (text, value) => { const e = make("option", "", text); e.value = value; return e; };
let measure = data.measures.length ? data.measures[0].key : "";
const scaleOf = key => data.measures.find(m => m.key === key);
const at = (row, key, n) => { const v = row.values && row.values[key]; return Array.isArray(v) ? v[n] : v; };
function paint(span, row, n) {
  const v = at(row, measure, n), m = scaleOf(measure);
  span.className = row.mask && !row.mask[n] ? "idle" : ""; span.style.background = "";
  if (v === undefined || span.className) return;
  if (v === null) { span.className = "unknown"; return; }
  const strength = Math.min(1, Math.abs(v) / m.scale);
  if (strength < .02) return;
  span.className = m.signed ? v > 0 ? "up" : "down" : "";
  span.style.background = `rgb(var(--${m.signed ? v > 0 ? "cool" : "warm" : "odd"}) / ${(.6 * strength).toFixed(3)})`;
}
function said(row) {
  const out = make("div", "said");
  out.tabIndex = 0;
  if (!row.pieces) { out.textContent = row.text; return out; }
  row.pieces.forEach((text, n) => {
    if (row.left && n === row.head) out.append(make("span", "gap", ` [${row.left} tokens left out] `));
    const span = make("span", "", text.replaceAll("\\n", "\\u21b5\\n"));
    span.dataset.n = n; paint(span, row, n); out.append(span);
  });
  out.addEventListener("pointerover", event => {
    const n = event.target.dataset.n;
    if (n !== undefined) event.target.title = data.measures.filter(m => at(row, m.key, n) !== undefined)
      .map(m => m.title + " " + short(at(row, m.key, n))).join("\\n");
  });
  return out;
}
function listing(row) {
  const shown = data.measures.filter(m => row.values[m.key] !== undefined), table = make("table", "");
  table.append(make("tr", "", make("th", "", "token"), ...shown.map(m => make("th", "", m.title))));
  row.pieces.forEach((text, n) => table.append(make("tr", "", make("td", "", JSON.stringify(text)),
    ...shown.map(m => make("td", "", short(at(row, m.key, n)))))));
  return table;
}
function card(row, want, low, high) {
  const head = make("div", "head", make("b", "", row.reward === null ? "no reward" : "reward " + short(row.reward)));
  const scores = Object.entries(row.scores), a = row.values && row.values.advantage;
  if (scores.length !== 1 || scores[0][1] !== row.reward)
    for (const [name, v] of scores) head.append(make("span", "", `${name} ${short(v)}`));
  if (typeof a === "number") head.append(make("span", "", `advantage ${short(a)}`));
  head.append(make("span", "soft", `${row.length} tokens`));
  if (row.n.length > 1) head.append(make("span", "soft", row.n.length + " times"));
  for (const note of row.notes) if (note !== "no reward") head.append(make("span", "note", note));
  const bar = make("div", ""), out = make("div", "row", head);
  if (row.reward !== null && high > low) {
    bar.style.width = 100 * (row.reward - low) / (high - low) + "%"; out.append(make("div", "meter", bar));
  }
  out.append(said(row));
  if (want && (row.text || row.pieces.join("")).toLowerCase().includes(want)) out.classList.add("hit");
  if (row.pieces && Object.keys(row.values).length) {
    const more = make("details", "", make("summary", "", "as a table"));
    more.addEventListener("toggle", () => { if (more.children.length === 1) more.append(make("div", "scroll", listing(row))); });
    out.append(more);
  }
  return out;
}
const orders = {reward: r => r.reward === null ? -Infinity : r.reward, length: r => r.length, order: r => -r.n[0]};
const ranks = {best: g => g.mean === null ? -Infinity : g.mean, worst: g => g.mean === null ? -Infinity : -g.mean,
  contrast: g => g.spread, longest: g => Math.max(...g.rows.map(r => r.length))};
const sorted = (list, key) => key ? [...list].sort((a, b) => key(b) - key(a)) : list;
function block(group, want) {
  const rewards = group.rows.map(r => r.reward).filter(r => r !== null), low = Math.min(0, ...rewards);
  const head = make("header", "", make("b", "", "step " + group.step),
    make("span", "", group.mean === null ? "no reward" : "mean reward " + short(group.mean)),
    make("span", "", group.spread ? "from " + short(Math.min(...rewards)) + " to " + short(Math.max(...rewards)) :
      "no contrast"),
    make("span", "soft", `${group.of} responses, ${group.distinct} different`));
  if (group.replayed) head.append(make("span", "note", "replayed"));
  if (group.rows.length < group.distinct) head.append(make("span", "soft", `best and worst ${group.rows.length} of them`));
  return make("article", "group", head, make("pre", "", group.prompt), make("div", "rows",
    ...sorted(group.rows, orders[by("rows").value]).map(row => card(row, want, low, Math.max(...rewards)))));
}
function show() {
  const run = data.runs[by("run").value], want = by("search").value.trim().toLowerCase(), view = run.views[by("view").value];
  const holds = g => (g.prompt + "\\0" + g.rows.map(r => r.text || r.pieces.join("")).join("\\0")).toLowerCase().includes(want);
  const found = want ? run.views.filter(v => !v.again).flatMap(v => v.groups).filter(holds) : view.groups;
  const key = !want && view.again ? null : ranks[by("groups").value];
  by("shown").replaceChildren(...sorted(found, key).map(g => block(g, want)));
  by("said").textContent = want ? `${found.length} of the groups on this page hold it` : view.words;
}
function colours() {
  const m = scaleOf(measure);
  for (const b of document.querySelectorAll("button[data-key]")) b.setAttribute("aria-pressed", b.dataset.key === measure);
  if (!m) return;
  by("words").textContent = m.words;
  by("low").textContent = m.signed ? short(-m.scale) : "0"; by("high").textContent = short(m.signed ? m.scale : -m.scale);
  by("gradient").style.background = m.signed ? "linear-gradient(90deg, rgb(var(--warm) / .6), transparent, rgb(var(--cool) / .6))"
    : "linear-gradient(90deg, transparent, rgb(var(--odd) / .6))";
}
function pick() {
  by("view").replaceChildren(...data.runs[by("run").value].views.map((v, n) => option(v.title, n)));
  show();
}
data.runs.forEach((run, n) => by("run").append(option(run.name, n)));
by("run").addEventListener("input", pick);
by("run").parentElement.hidden = data.runs.length === 1;
for (const id of ["view", "groups", "rows", "search"]) by(id).addEventListener("input", show);
for (const b of document.querySelectorAll("button[data-key]"))
  b.addEventListener("click", () => { measure = b.dataset.key; colours(); show(); });
colours(); pick();
"""
