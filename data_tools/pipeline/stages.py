"""The checks and pages of data_tools.quality as stages of a pipeline."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_tools.formats import load
from data_tools.pipeline.config import function_named
from data_tools.records import Group

__all__ = ["FINDINGS", "Fix", "attack_success", "check", "describe", "influence", "linearity", "view"]

FINDINGS = "findings.jsonl"                                   # the file of a stage that later ones are given as `findings`


def check(groups: Iterable[Group], folder: Path, *, against: Mapping[str, str] | None = None,
          hooks: Mapping[str, str] | None = None, skip: Sequence[str] = (), near: float = 0.7, ngram: int = 13,
          hook_threshold: float = 0.5, languages: Sequence[str] = (), score: str | None = None, sample: int = 20_000,
          seed: int = 0) -> list[str]:
    """What is found wrong, in findings.jsonl; see data_tools.quality.check for the settings.

    against     {name: file} of test sets
    hooks       {name: 'module:function'}
    """
    from data_tools.quality import check, findings
    sets = {name: load(path) for name, path in (against or {}).items()}
    functions = {name: function_named(spec) for name, spec in (hooks or {}).items()}
    found = check.check(groups, against=sets, hooks=functions, skip=skip, near=near, ngram=ngram, hook_threshold=hook_threshold,
                        languages=languages, score=score, sample=sample, seed=seed)
    return str(findings.save(found, folder / FINDINGS)).splitlines()


def influence(groups: Iterable[Group], folder: Path, *, queries: str | None = None, model: str | None = None,
              by: str | None = None, ridge: float = 1.0, most: int = 100, seed: int = 0) -> list[str]:
    """Which groups pull a reward model the wrong way, in findings.jsonl; see data_tools.quality.influence for the settings.

    queries     a file of trusted pairs
    model       the folder of a trained reward model; left out: a model of the words
    """
    from data_tools.quality import findings
    from data_tools.quality.influence import ranked
    features = function_named("rewards.trained:features")(model) if model else None
    trusted = load(queries) if queries else None
    found = ranked(groups, queries=trusted, features=features, by=by, ridge=ridge, most=most, seed=seed)
    return str(findings.save(found, folder / FINDINGS)).splitlines()


class Fix:
    """Repairs of what the `check` or `influence` before it found; see data_tools.quality.fix for the settings. What was repaired
    is counted."""

    def __init__(self, *, repairs: Mapping[str, str] | Sequence[str], sure: float = 0.8):
        self.repairs, self.sure, self.counts = repairs, sure, Counter()

    def __call__(self, groups: Iterable[Group], findings: Path | None) -> Iterator[Group]:
        from data_tools.quality import findings as found
        from data_tools.quality.fix import fix
        if findings is None:
            raise ValueError("fix repairs what check or influence found: put one of these stages right before it")
        return fix(groups, found.load(findings), repairs=self.repairs, sure=self.sure,
                   log=lambda entry: self.counts.update([f"repaired: {entry['repair']}"]))

    def told(self, counts: Mapping[str, int]) -> list[str]:
        return [f"{name.removeprefix('repaired: ')}: {count:,} groups" for name, count in sorted(counts.items())
                if name.startswith("repaired: ")]


def describe(groups: Iterable[Group], folder: Path, findings: Path | None, *, title: str = "Preference data", sample: int = 5,
             topics: int = 12, seed: int = 0, metadata: Mapping | None = None) -> list[str]:
    """The card README.md and the page index.html, with the warnings of the `check` before it; see data_tools.quality.describe."""
    from data_tools.quality import describe
    report = describe.describe(groups, findings=found_in(findings), title=title, sample=sample, topics=topics, seed=seed)
    return [f"wrote {path.name}" for path in describe.write(report, folder, metadata=metadata)]


def view(groups: Iterable[Group], folder: Path, findings: Path | None, *, title: str = "Groups", sample: int = 500,
         seed: int = 0) -> list[str]:
    """The page view.html to read, compare and label; see data_tools.quality.view."""
    from data_tools.quality.page import write_page
    from data_tools.quality.view import view
    write_page(view(groups, findings=found_in(findings), title=title, sample=sample, seed=seed), folder / "view.html")
    return ["wrote view.html"]


def linearity(groups: Iterable[Group], folder: Path, *, truth: str, score: str = "reward", bins: int | None = None) -> list[str]:
    """Which weights `filtration` should have (PF-PPO): R^2 of the truth on the score under each of the published filters.

    truth       the score that holds the true quality
    bins        as in data_tools.select.sampling.linearity
    """
    from data_tools.select.sampling import linearity
    names = ("best", "others", "worst")
    filters = [dict(zip(names, w, strict=True)) for w in ((1, 0, 0), (1, 0, 1), (0.4, 0.1, 0.1), (1, 1, 1))]

    def told(weights: Mapping) -> str:
        try:
            return f"R^2 {linearity(groups, truth=truth, score=score, bins=bins, **weights):.3f} by {weights}"
        except ValueError as problem:                         # what this filter keeps is all the same
            return f"no R^2 by {weights}: {problem}"

    return [told(weights) for weights in filters]


def attack_success(groups: Iterable[Group], folder: Path, *, score: str = "safe", unsafe: float = 0.5,
                   topic: str = "topic") -> list[str]:
    """Shares of unsafe responses, topics x styles (Egida); put it between the `score` of attacks and `safety_pairs`.

    score, unsafe, topic   as in data_tools.augment.safety.attack_success
    """
    from data_tools.augment.safety import attack_success
    found = attack_success(groups, score=score, unsafe=unsafe, topic=topic)
    topics, styles = (sorted({cell[place] for cell in found}) for place in (0, 1))
    shares = [[f"{found[t, s]:.0%}" if (t, s) in found else "" for s in styles] for t in topics]
    rows = [["", *styles], *([t, *cells] for t, cells in zip(topics, shares, strict=True))]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]


def found_in(findings: Path | None) -> Iterable:
    from data_tools.quality.findings import load
    return load(findings) if findings else ()
