"""The checks and pages of data_tools.quality as stages of a pipeline."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_tools.formats import load
from data_tools.pipeline.config import function_named
from data_tools.records import Group

__all__ = ["FINDINGS", "Fix", "check", "describe", "view"]

FINDINGS = "findings.jsonl"                                   # the file of a stage that later ones are given as `findings`


def check(groups: Iterable[Group], folder: Path, *, against: Mapping[str, str] | None = None,
          hooks: Mapping[str, str] | None = None, skip: Sequence[str] = (), near: float = 0.8, ngram: int = 13,
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


class Fix:
    """Repairs of what the `check` before it found; see data_tools.quality.fix for the settings. What was repaired is counted."""

    def __init__(self, *, repairs: Mapping[str, str] | Sequence[str], sure: float = 0.8):
        self.repairs, self.sure, self.counts = repairs, sure, Counter()

    def __call__(self, groups: Iterable[Group], findings: Path | None) -> Iterator[Group]:
        from data_tools.quality import findings as found
        from data_tools.quality.fix import fix
        if findings is None:
            raise ValueError("fix repairs what check found: put the stage check right before it")
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


def found_in(findings: Path | None) -> Iterable:
    from data_tools.quality.findings import load
    return load(findings) if findings else ()
