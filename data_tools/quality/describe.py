"""`describe`: what a data set is like, for people: a dataset card and one page.

    report = describe(load("pairs.jsonl"), findings=findings.load("findings.jsonl"), title="My pairs")
    write(report, "out")                                      # out/README.md and out/index.html
"""
from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import yaml
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from data_tools import describe as numbers
from data_tools.describe import content
from data_tools.labels import wins_of
from data_tools.quality.findings import Finding, Tally, by_group, of_group
from data_tools.quality.page import write_page
from data_tools.quality.sampling import Sample, Stratum, maker, outcome
from data_tools.quality.texts import language
from data_tools.quality.view import payload
from data_tools.quality.words import digest, words
from data_tools.records import Group

__all__ = ["card", "describe", "write"]

LABELS = "labels"                                             # the labels among the scores


# ---------------------------------------------------------------------------------------------------------- one pass
@dataclass
class Measures:
    """Numbers of every group, 8 bytes each."""
    length: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    score: dict[str, dict[str, array]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(lambda: array("d"))))
    margin: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    model: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    agree: Counter = field(default_factory=Counter)           # ((name, name), "same" or "of")
    flag: Counter = field(default_factory=Counter)

    def see(self, group: Group) -> None:
        wins = wins_of(group)
        made = [maker(r) for r in group.responses]
        self.length["prompt"].append(len(content(group.prompt)))
        for name, response in zip(made, group.responses, strict=True):
            self.length["response"].append(size := len(content(response.text)))
            self.model[name]["responses"] += 1
            self.model[name]["characters"] += size
            for key, value in response.scores.items():
                if value is not None and math.isfinite(value):
                    self.score[key][name].append(value)
        orders = {LABELS: [[0.0 if w is None else w - 0.5 for w in row] for row in wins]}
        for key in {key for r in group.responses for key in r.scores}:
            values = [r.scores.get(key) for r in group.responses]
            known = [v for v in values if v is not None and math.isfinite(v)]
            if len(known) > 1:
                self.margin[key].append(max(known) - min(known))
            orders[key] = [[0.0 if a is None or b is None else a - b for b in values] for a in values]
        known = [r for r in group.relevance or [] if r is not None]
        if len(known) > 1:
            self.margin[LABELS].append(max(known) - min(known))
        for i, j in combinations(range(len(made)), 2):
            if orders[LABELS][i][j]:
                for a, b in ((i, j), (j, i)):
                    self.model[made[a]]["compared"] += 1
                    self.model[made[a]]["won"] += orders[LABELS][a][b] > 0
            for one, other in combinations(sorted(orders), 2):
                product = orders[one][i][j] * orders[other][i][j]
                self.agree[one, other, "of"] += product != 0
                self.agree[one, other, "same"] += product > 0
        votes = group.meta.get("votes") or []
        for (a, one), (b, other) in combinations(enumerate(votes, 1), 2):
            self.agree[f"annotator {a}", f"annotator {b}", "of"] += 1
            self.agree[f"annotator {a}", f"annotator {b}", "same"] += one == other


@dataclass
class Drawn:
    """The texts of the `size` prompts that a hash draws."""
    size: int
    heap: list[tuple[int, str]] = field(default_factory=list)

    def see(self, text: str) -> None:
        (heapq.heappush if len(self.heap) < self.size else heapq.heappushpop)(self.heap, (-digest(text), text))


def describe(groups: Iterable[Group], *, findings: Iterable[Finding] = (), title: str = "Preference data", sample: int = 5,
             stratum: Stratum = outcome, topics: int = 12, seed: int = 0) -> dict:
    """A report of plain JSON for `write`, in one pass.

    findings   what `check` found: they are the warnings, and flags on the samples
    title      of card and page
    sample     how many groups of each stratum are shown
    stratum    function of a group and its findings; `outcome`: the first finding, or the model that is preferred
    topics     how many clusters the prompts are put into (a sample of 4,000 of them)
    seed       of the samples and the clusters

    Memory: 8 bytes of each length, score and margin, and what was found.
    """
    tally, told = Tally(keep=3), []
    for one in findings:
        tally.note(one)
        told.append(one)
    flags, measures, drawn, shown = by_group(told), Measures(), Drawn(4000), Sample(sample, stratum, seed)

    def seen() -> Iterator[Group]:
        for n, group in enumerate(groups, 1):
            measures.see(group)
            drawn.see(content(group.prompt))
            shown.see(n, group, of_group(flags, n, group))
            yield group

    sections = numbers.describe(seen())
    return {"title": title, "sections": sections, "warnings": warnings(tally, sections["size"]["groups"]),
            "models": {name: dict(m) for name, m in sorted(measures.model.items()) if name},
            "lengths": {name: histogram({"": values}) for name, values in measures.length.items()},
            "margins": {name: histogram({"": values}) for name, values in sorted(measures.margin.items())},
            "scores": {name: histogram(by) | {"of": sum(map(len, by.values()))} for name, by in sorted(measures.score.items())},
            "agreement": agreements(measures.agree), "topics": topics_of([t for _, t in sorted(drawn.heap)], topics, seed),
            "languages": languages([t for _, t in drawn.heap]), "strata": dict(shown.counts.most_common()),
            "total": sections["size"]["groups"], "groups": [payload(*item) for item in shown.groups()]}


def languages(texts: list[str]) -> list[str]:
    """The languages of at least a twentieth of the texts, as far as a few words tell."""
    evidence, names = language(texts, words(texts))
    found = Counter(names[k] for k, e in zip(evidence.argmax(1), evidence.max(1), strict=True) if e >= 2)
    return [name for name, count in found.most_common() if count >= 0.05 * found.total()]


def warnings(tally: Tally, groups: int) -> list[dict]:
    """The kinds of findings, those about all groups first, then by the share of groups."""
    kinds = sorted(tally.counts, key=lambda k: (bool(tally.examples[k][0].group), -tally.groups[k]))
    return [{"kind": kind, "count": tally.counts[kind], "groups": tally.groups[kind],
             "share": tally.groups[kind] / max(groups, 1), "whole": not tally.examples[kind][0].group,
             "repair": tally.examples[kind][0].repair,
             "examples": [str(f) for f in tally.examples[kind]]} for kind in kinds]


def histogram(series: dict[str, Sequence[float]], *, bins: int = 40, largest: int = 8) -> dict:
    """Counts of each series between common edges that hold 99 % of the values, the outer bins holding the rest. Few different
    values have a bin each. Of many series the largest are shown."""
    every_series, series = len(series), dict(sorted(series.items(), key=lambda item: -len(item[1]))[:largest])
    arrays = {name: np.frombuffer(values) if isinstance(values, array) else np.array(values) for name, values in series.items()}
    every = np.concatenate([np.zeros(0), *arrays.values()])
    if not len(every):
        return {"edges": [], "series": {}, "middle": {}, "all": every_series}
    values = np.unique(every)
    low, high = np.quantile(every, [0.005, 0.995])
    if len(values) <= bins // 2:
        gap = np.diff(values).min(initial=1.0) / 2
        edges = np.unique(np.concatenate([values - gap, values + gap]))
    else:
        edges = np.linspace(low, high, bins + 1) if high > low else np.array([values[0], low, values[-1]])
    return {"edges": edges.tolist(), "series": {name: np.histogram(np.clip(found, edges[0], edges[-1]), edges)[0].tolist()
                                                for name, found in sorted(arrays.items())},
            "middle": {name: float(np.median(found)) for name, found in arrays.items()}, "all": every_series}


def agreements(counts: Counter) -> list[dict]:
    """Matrices of the share of pairs that two orders put the same way: of labels and scores, and of annotators."""
    out = []
    for what, keep in (("labels and scores", lambda n: not n.startswith("annotator ")), ("annotators", lambda n: n.startswith(
            "annotator "))):
        names = sorted({name for *both, _ in counts for name in both if keep(name)})
        if len(names) > 1:
            cell = lambda a, b: counts[min(a, b), max(a, b), "same"] / of if (of := counts[min(a, b), max(a, b), "of"]) else None
            out.append({"what": what, "names": names, "share": [[None if a == b else cell(a, b) for b in names] for a in names]})
    return out


def topics_of(texts: Sequence[str], count: int, seed: int) -> list[dict]:
    """Topics: k-means on TF-IDF of the texts; of each its share, its words and two texts near its middle. None where there are
    fewer than 20 different texts."""
    texts = [t[:2000] for t in dict.fromkeys(texts)]
    if len(texts) < 20:
        return []
    vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True, min_df=2, max_df=0.5, max_features=5000)
    try:
        found = vectorizer.fit_transform(texts)
    except ValueError:                                        # no word is in two texts
        return []
    count = min(count, max(2, len(texts) // 40))
    model = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=1024).fit(found)
    names, middle = vectorizer.get_feature_names_out(), np.asarray(found.mean(0)).ravel()
    near = np.asarray(found @ model.cluster_centers_.T)[np.arange(len(texts)), model.labels_]
    out = []
    for k in np.argsort(-np.bincount(model.labels_, minlength=count)):
        mine = np.flatnonzero(model.labels_ == k)
        if len(mine):
            best = np.argsort(-(model.cluster_centers_[k] - middle))[:6]
            out.append({"share": len(mine) / len(texts), "words": [str(names[w]) for w in best],
                        "examples": [" ".join(texts[n].split())[:140] for n in mine[np.argsort(-near[mine])[:2]]]})
    return out


# --------------------------------------------------------------------------------------------------------------- card
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))


def card(report: dict, *, metadata: Mapping | None = None) -> str:
    """The dataset card: markdown under the hub's metadata in YAML.

    metadata   what only its maker knows, such as {"license": "mit"}; it goes over what is found here
    """
    groups = report["sections"]["size"]["groups"]
    found = {"pretty_name": report["title"], "language": report["languages"], "task_categories": ["text-generation"],
             "size_categories": [next((name for size, name in SIZES if groups < size), "n>10M")],
             "tags": ["preference", "prefopt"], **(metadata or {})}
    lines = ["---", yaml.safe_dump({k: v for k, v in found.items() if v}, sort_keys=False, allow_unicode=True).strip(), "---",
             f"# {line(report['title'])}", "", "## Warnings", ""]
    lines += [f"- **{line(w['kind'])}**: {told(w)}" for w in report["warnings"]] or ["No check was made, or it found nothing."]
    for section, rows in report["sections"].items():
        lines += ["", f"## {section.capitalize()}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {numbers.render({'': {'': value}}).strip()} |" for name, value in rows.items()]
    if report["models"]:
        lines += ["", "## Models", "", "| model | responses | comparisons won | characters (mean) |", "|---|---|---|---|"]
        lines += [f"| {line(name)} | {m['responses']:,} | {percent(m.get('won', 0), m.get('compared', 0))} | "
                  f"{m['characters'] / m['responses']:,.0f} |" for name, m in report["models"].items()]
    if report["topics"]:
        lines += ["", "## Topics of the prompts", "", "| share | words |", "|---|---|"]
        lines += [f"| {t['share']:.0%} | {line(', '.join(t['words']))} |" for t in report["topics"]]
    return "\n".join([*lines, "", "Made by `prefopt data describe`."]) + "\n"


def told(warning: dict) -> str:
    """A warning in a line of a card."""
    if warning["whole"]:
        return line(warning["examples"][0])
    return f"{warning['count']:,} in {warning['groups']:,} group{'s' * (warning['groups'] > 1)} ({warning['share']:.1%})" + (
        f"; repair: {warning['repair']}" if warning["repair"] else "")


def line(text: str) -> str:
    """Text that cannot break a table, begin a heading or be HTML.

    >>> line("a | b <script>")
    'a \\\\| b &lt;script&gt;'
    """
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")


def percent(part: int, of: int) -> str:
    return f"{part / of:.0%}" if of else "-"


def write(report: dict, out, *, metadata: Mapping | None = None) -> list[Path]:
    """The card as README.md and the page as index.html in a folder."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(card(report, metadata=metadata).encode("utf-8", "replace").decode(), encoding="utf-8")
    write_page(report, out / "index.html")
    return [out / "README.md", out / "index.html"]
