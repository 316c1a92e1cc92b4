"""What the page of groups does: filters, differences, labels by keys, export. No text of the data is ever read as HTML."""

CSS = """
.view { display: grid; gap: .6rem; } .view .rows { grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.view .row { position: relative; cursor: default; } .view .said { max-height: 60vh; white-space: pre-wrap; }
.view .row.best { border-color: rgb(var(--cool)); box-shadow: inset 0 3px 0 rgb(var(--cool)); }
.view .row.base { border-style: dashed; } .view pre { font: inherit; max-height: 12rem; }
.view .said { font: inherit; } mark { background: rgb(var(--warm) / .28); color: inherit; border-radius: 2px; }
mark.hit { background: rgb(var(--odd) / .35); } .view .head button { padding: 0 .5rem; border-radius: 4px; font-weight: 700; }
.view .head { align-items: center; gap: .1rem .7rem; }
.flags { list-style: none; padding: 0; margin: .2rem 0; font-size: .84rem; }
.flags li::before { content: "\\26a0\\fe0e\\a0"; color: rgb(var(--bad)); } .bar input[type=number] { width: 5.5rem; }
.bar .tick input { display: inline-block; margin-right: .3rem; } .bar .moves button { min-width: 2.4rem; border-radius: 4px; }
kbd { font: .85em ui-monospace, monospace; border: 1px solid var(--line); border-radius: 3px; padding: 0 .3em; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .84rem; padding: 0; margin: .3rem 0; list-style: none; }
table.heat td { text-align: center; } .mine { color: rgb(var(--cool)); font-weight: 600; }
pre, .said, td.text { unicode-bidi: plaintext; text-align: start; } figure h4 { overflow-wrap: anywhere; }
.view .said:empty::before, .view pre:empty::before { content: "empty"; color: var(--soft); font-style: italic; }
@media (max-width: 45rem), (max-height: 30rem) { .bar { position: static; } }
@media (max-width: 45rem) { .bar { display: grid; grid-template-columns: 1fr 1fr; } .bar > span { grid-column: 1 / -1; }
  .bar select, .bar input:not([type=checkbox]) { width: 100%; } tbody th { white-space: normal; } }
"""

VIEWER = r"""
const data = JSON.parse(document.getElementById("groups-data").textContent), by = id => document.getElementById(id);
const make = (tag, kind, ...inside) => { const e = document.createElement(tag); if (kind) e.className = kind; e.append(...inside);
  return e; };
const short = v => v === null ? "not known" : String(Number(v.toPrecision(4)));
const key = "prefopt labels " + data.key;
let labels = {}, at = 0, found = [], base = null;
try { labels = JSON.parse(localStorage.getItem(key)) || {}; } catch { labels = {}; }
const store = () => { try { localStorage.setItem(key, JSON.stringify(labels)); } catch { } };
const words = text => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];

// The longest common subsequence of two lists of words: which words of each are in it. Beyond 4 million cells, none.
function common(a, b) {
  const inA = new Uint8Array(a.length), inB = new Uint8Array(b.length);
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) { inA[head] = inB[head] = 1; head++; }
  while (tail < Math.min(a.length, b.length) - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) {
    inA[a.length - 1 - tail] = inB[b.length - 1 - tail] = 1; tail++; }
  const n = a.length - head - tail, m = b.length - head - tail, wide = m + 1;
  if (n * m > 4e6) return null;
  const best = new Uint16Array((n + 1) * wide);
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--)
    best[i * wide + j] = a[head + i] === b[head + j] ? best[(i + 1) * wide + j + 1] + 1
      : Math.max(best[(i + 1) * wide + j], best[i * wide + j + 1]);
  for (let i = 0, j = 0; i < n && j < m;)
    if (a[head + i] === b[head + j]) { inA[head + i++] = 1; inB[head + j++] = 1; }
    else if (best[(i + 1) * wide + j] >= best[i * wide + j + 1]) i++; else j++;
  return [inA, inB];
}
function pieces(list, keep) {                       // runs of words, marked where keep is 0
  const out = [];
  for (let n = 0; n < list.length;) {
    let end = n;
    while (end < list.length && keep[end] === keep[n]) end++;
    const text = list.slice(n, end).join("");
    out.push(keep[n] || !text.trim() ? text : make("mark", "", text));
    n = end;
  }
  return out;
}
function hits(text, want) {                         // the searched text, marked
  if (!want) return [text];
  const out = [], low = text.toLowerCase();
  let from = 0;
  if (low.length !== text.length) return [text];
  for (let n = low.indexOf(want); n >= 0; n = low.indexOf(want, from)) {
    out.push(text.slice(from, n), make("mark", "hit", text.slice(n, n + want.length)));
    from = n + want.length;
  }
  return [...out, text.slice(from)];
}
const mine = g => labels[g.id];
const scrambled = text => { let h = 7; for (const c of text) h = Math.imul(h ^ c.codePointAt(0), 2654435761) >>> 0; return h; };
const placed = g => {                               // the responses as they are shown: blind, in an order of no meaning
  const all = [...g.rows.keys()];
  return by("blind").checked ? all.sort((a, b) => scrambled(g.id + a) - scrambled(g.id + b)) : all;
};
const grades = g => mine(g) ? mine(g).relevance : g.relevance;
function bestOf(g) {
  const known = mine(g) && !mine(g).relevance ? [] : mine(g) || !g.wins ? grades(g)
    : g.wins.map(row => row.reduce((sum, w) => sum + (w === null ? 0 : w - .5), 0));
  const values = known.filter(v => v !== null), top = Math.max(...values);
  return values.length && top > Math.min(...values) ? known.indexOf(top) : -1;
}
function said(g, row, n, want) {
  const out = make("div", "said");
  out.tabIndex = 0;
  const other = n === base ? (g.rows.length === 2 ? 1 - n : -1) : base;
  const shared = by("differ").checked && other >= 0 && !want ? common(words(row.text), words(g.rows[other].text)) : null;
  out.append(...(shared ? pieces(words(row.text), shared[0]) : hits(row.text, want)));
  return out;
}
function labelled(g) {
  const label = mine(g);
  if (!label) return "";
  if (label.drop) return "your label: left out";
  const top = Math.max(...label.relevance);
  return top === Math.min(...label.relevance) ? "your label: tied"
    : "your label: " + label.relevance.map((v, n) => [v, placed(g).indexOf(n) + 1]).sort((a, b) => b[0] - a[0])
      .filter(x => x[0] > 0).map(x => x[1]).join(" > ");
}
function card(g, row, n, want) {
  const blind = by("blind").checked, pick = make("button", "", String(placed(g).indexOf(n) + 1));
  const head = make("div", "head", pick);
  pick.type = "button"; pick.title = "prefer this one"; pick.addEventListener("click", () => prefer(n));
  if (!blind) {
    if (row.model) head.append(make("b", "", row.model));
    if (g.relevance[n] !== null) head.append(make("span", "", "label " + short(g.relevance[n])));
    for (const [name, v] of Object.entries(row.scores)) head.append(make("span", "soft", `${name} ${short(v)}`));
  }
  head.append(make("span", "soft", `${row.size.toLocaleString("en")} characters`));
  const out = make("div", "row", head);
  for (const flag of g.flags) if (!blind && flag.response === n + 1) head.append(make("span", "note", flag.kind));
  if ((!blind || mine(g)) && bestOf(g) === n) out.classList.add("best");
  if (by("differ").checked && n === base && g.rows.length > 2) {
    out.classList.add("base"); head.append(make("span", "soft", "the others are compared with this one")); }
  else if (g.rows.length > 2 && by("differ").checked) {
    const compare = make("button", "", "compare with this"); compare.type = "button"; compare.style.fontWeight = 400;
    compare.addEventListener("click", () => { base = n; draw(); }); head.append(compare); }
  out.append(said(g, row, n, want));
  return out;
}
function draw() {
  const g = found[at], want = by("search").value.trim().toLowerCase(), count = Object.keys(labels).length;
  by("count").textContent = found.length ? `${at + 1} of ${found.length}` : "no group fits";
  by("done").textContent = count ? `${count} labelled` : "";
  by("export").disabled = !count;
  by("lines").textContent = exported();
  if (!g) { by("shown").replaceChildren(); return; }
  if (base === null || base >= g.rows.length) base = by("blind").checked ? placed(g)[0] : Math.max(0, bestOf(g));
  const blind = by("blind").checked, head = make("header", "", make("b", "", "group " + g.n));
  if (g.place) head.append(make("span", "soft", g.place));
  if (!blind) head.append(make("span", "soft", g.stratum));
  if (!blind && g.margin !== null) head.append(make("span", "soft", "margin " + short(g.margin)));
  if (mine(g)) head.append(make("span", "mine", labelled(g)));
  const flags = make("ul", "flags", ...g.flags.map(f => make("li", "", f.kind + (f.response ? ` (response ${f.response})` : "") +
    ": " + f.message + (f.sure < 1 ? ` (sure: ${f.sure})` : ""))));
  by("shown").replaceChildren(make("article", "group view", head, ...(g.flags.length && !blind ? [flags] : []),
    make("pre", "", ...hits(g.prompt, want)), make("div", "rows", ...placed(g).map(n => card(g, g.rows[n], n, want)))));
}
const number = (id, empty) => by(id).value === "" ? empty : Number(by(id).value);
const orders = {data: (a, b) => a.n - b.n, narrow: (a, b) => (a.margin ?? Infinity) - (b.margin ?? Infinity),
  wide: (a, b) => (b.margin ?? -Infinity) - (a.margin ?? -Infinity), flags: (a, b) => b.flags.length - a.flags.length,
  sure: (a, b) => Math.max(0, ...b.flags.map(f => f.sure)) - Math.max(0, ...a.flags.map(f => f.sure))};
function filter() {
  const want = by("search").value.trim().toLowerCase(), low = number("low", -Infinity), high = number("high", Infinity);
  const bounded = by("low").value !== "" || by("high").value !== "", state = by("state").value;
  found = data.groups.filter(g => (!by("stratum").value || g.stratum === by("stratum").value)
    && (!by("flag").value || g.flags.some(f => f.kind === by("flag").value))
    && (!by("model").value || g.rows.some(r => r.model === by("model").value))
    && (!bounded || g.margin !== null && g.margin >= low && g.margin <= high)
    && (!state || (state === "labelled") === Boolean(mine(g)))
    && (!want || (g.prompt + "\0" + g.place + "\0" + g.rows.map(r => r.text).join("\0")).toLowerCase().includes(want)))
    .sort(orders[by("order").value]);
  at = 0; base = null; draw();
}
function move(step) { if (!found.length) return; at = Math.min(found.length - 1, Math.max(0, at + step)); base = null; draw();
  scrollTo({top: by("bar").offsetTop}); }
function set(g, label) { if (label) labels[g.id] = {id: g.id, group: g.n, place: g.place, ...label}; else delete labels[g.id];
  store(); base = null; if (label && by("onward").checked && at < found.length - 1) move(1); else draw(); }
// The response pressed first is the best, the next one the second best, and so on; those never pressed share the last place.
function prefer(n) {
  const g = found[at], size = g.rows.length, now = mine(g) && mine(g).relevance;
  let order = now ? now.map((v, k) => [v, k]).filter(x => x[0] > 0).sort((a, b) => b[0] - a[0]).map(x => x[1]) : [];
  order = order.includes(n) ? order.filter(k => k !== n) : order.length >= size - 1 ? [n] : [...order, n];
  if (!order.length) { set(g, null); return; }
  set(g, {relevance: g.rows.map((_, k) => order.includes(k) ? order.length - order.indexOf(k) : 0)});
}
const exported = () => Object.values(labels).sort((a, b) => a.group - b.group).map(l => JSON.stringify(l)).join("\n");
const keys = {ArrowRight: () => move(1), j: () => move(1), ArrowLeft: () => move(-1), k: () => move(-1),
  t: () => set(found[at], {relevance: found[at].rows.map(() => 0)}), x: () => set(found[at], {drop: true}),
  u: () => set(found[at], null), d: () => { by("differ").checked = !by("differ").checked; draw(); },
  b: () => { by("blind").checked = !by("blind").checked; base = null; draw(); }, "/": () => by("search").focus()};
addEventListener("keydown", event => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (event.key === "Escape") { document.activeElement.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !found.length) return;
  const digit = Number(event.key);
  if (digit >= 1 && digit <= found[at].rows.length) prefer(placed(found[at])[digit - 1]);
  else if (Object.hasOwn(keys, event.key)) keys[event.key]();
  else return;
  event.preventDefault();
});
const fill = (id, names) => { for (const name of names) by(id).append(new Option(name, name));
  by(id).parentElement.hidden = !names.length; };
const distinct = list => [...new Set(list)].filter(Boolean).sort();
fill("stratum", distinct(data.groups.map(g => g.stratum)));
fill("flag", distinct(data.groups.flatMap(g => g.flags.map(f => f.kind))));
fill("model", distinct(data.groups.flatMap(g => g.rows.map(r => r.model))));
const listen = (ids, act) => { for (const id of ids) by(id).addEventListener("input", act); };
listen(["search", "stratum", "flag", "model", "low", "high", "state", "order"], filter);
listen(["differ", "blind"], () => { base = null; draw(); });
by("back").addEventListener("click", () => move(-1)); by("next").addEventListener("click", () => move(1));
by("export").addEventListener("click", () => {
  const link = make("a", ""); link.href = URL.createObjectURL(new Blob([exported() + "\n"], {type: "application/jsonl"}));
  link.download = "labels.jsonl"; link.click(); URL.revokeObjectURL(link.href);
});
by("forget").addEventListener("click", () => { if (confirm("Forget all your labels?")) { labels = {}; store(); draw(); } });
filter();
"""
