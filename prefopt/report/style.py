"""How a page behaves: what it does where one points and clicks. How it looks is in data_tools.page."""

from data_tools.page import CSS, HEAD

__all__ = ["CSS", "HEAD", "POINT", "ROLLOUTS"]

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
