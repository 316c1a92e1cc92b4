"""What is wrong with groups, where, and how often; and the same checks as a gate in front of training."""
from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from data_tools.fields import PLACE, DataError, shorten
from data_tools.formats import Reader
from data_tools.labels import wins_of
from data_tools.records import Group, Message

Problem = tuple[str, str]                                     # (kind, what was found and how to mend it)
Check = Callable[[Group], Iterator[Problem]]


# -------------------------------------------------------------------------------------------------------------- checks
def texts(group: Group) -> Iterator[Problem]:
    """Empty prompts and responses, and responses that begin with somebody else's turn."""
    if _empty(group.prompt):
        yield "empty prompt", ("the prompt is empty; for chosen and rejected without a prompt: they share no beginning")
    for n, response in enumerate(group.responses, 1):
        if _empty(response.text) and not response.tokens:     # a sampled one may be an end token alone
            yield "empty response", f"response {n} is empty"
        elif isinstance(response.text, list) and response.text[0].get("role") in ("user", "system"):
            yield "prompt not shared", (f"response {n} begins with a {response.text[0]['role']} turn, "
                                        f"{shorten(response.text[0].get('content'))}: the conversations differ before "
                                        "the assistant answers, so the responses have different prompts")


def _empty(text: str | list[Message]) -> bool:
    if isinstance(text, str):
        return not text or text.isspace()
    return not text or not any(m.get("tool_calls") or not _blank(m.get("content")) for m in text)


def _blank(content) -> bool:
    return not content or isinstance(content, str) and content.isspace()


def labels(group: Group) -> Iterator[Problem]:
    """Labels of the wrong size, labels that are no finite numbers, wins that are no probabilities or contradict."""
    size = len(group.responses)
    if group.relevance is not None:
        if len(group.relevance) != size:
            yield "label out of range", f"relevance has {len(group.relevance)} entries for {size} responses"
        for value in group.relevance:
            if value is not None and not _finite(value):
                yield "label out of range", f"relevance {shorten(value)} is not a finite number; unlabelled is null"
    if not _finite(group.weight) or group.weight < 0:
        yield "label out of range", f"weight {shorten(group.weight)} is not a number from 0 up"
    if group.wins is not None:
        yield from _wins(group.wins, size)


def _wins(wins: list, size: int) -> Iterator[Problem]:
    if len(wins) != size or any(len(row) != size for row in wins):
        yield "label out of range", f"wins has rows of {[len(row) for row in wins]} entries for {size} responses"
        return
    for i in range(size):
        for j in range(i + 1, size):                          # nobody reads the diagonal
            there, back = wins[i][j], wins[j][i]
            wrong = [w for w in (there, back) if w is not None and not (_finite(w) and 0 <= w <= 1)]
            if wrong:
                yield "label out of range", (f"the win of response {i + 1} over {j + 1} is {shorten(wrong[0])}, not a "
                                             "probability in [0, 1]; not compared is null")
            elif (there is None) != (back is None) or there is not None and abs(there + back - 1) > 1e-6:
                yield "label out of range", (f"the wins of responses {i + 1} and {j + 1} over each other, {there} and "
                                             f"{back}, do not add up to 1")


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def contradiction(group: Group) -> Iterator[Problem]:
    """Equal responses, one of which is preferred."""
    found = [r.text for r in group.responses]
    if all(a != b for n, a in enumerate(found) for b in found[:n]):
        return
    wins = wins_of(group)
    for n, text in enumerate(found):
        for m in range(n):
            if text == found[m] and wins[n][m] not in (None, 0.5):
                yield "chosen equals rejected", f"responses {m + 1} and {n + 1} are equal, yet one is preferred"


def paired(group: Group) -> Iterator[Problem]:
    """Fewer than two responses, or none compared, where pairs are needed."""
    if len(group.responses) < 2:
        yield "too few responses", (f"{len(group.responses)} response, and pairs need two: use a method for unpaired "
                                    "feedback, or sample more responses")
    elif all(w is None for n, row in enumerate(wins_of(group)) for w in row[:n]):
        yield "no labels", "no two responses are compared: score them, or give relevance or wins"


def labelled(group: Group) -> Iterator[Problem]:
    """No response with a label."""
    if not group.responses or group.wins is None and all(r is None for r in group.relevance or []):
        yield "no labels", f"none of {len(group.responses)} responses has a label"


CHECKS: tuple[Check, ...] = (texts, labels, contradiction)


# ------------------------------------------------------------------------------------------------------------- reports
@dataclass
class Report:
    """How many groups were seen and were good, how often each kind of problem occurred, and the first places."""
    groups: int = 0
    good: int = 0
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    keep: int = 5

    def note(self, error: DataError) -> None:
        """Count one problem."""
        self.counts[error.problem] += 1
        known = self.examples.setdefault(error.problem, [])
        if len(known) < self.keep:
            known.append(str(error))

    @property
    def skipped(self) -> int:
        return self.groups - self.good

    def __str__(self) -> str:
        lines = [f"{self.good} of {self.groups} records are good" + (", problems:" if self.counts else "")]
        for kind, count in self.counts.most_common():
            lines += [f"  {kind}: {count}", *(f"    {example}" for example in self.examples[kind])]
            lines += [f"    and {count - self.keep} more"] if count > self.keep else []
        return "\n".join(lines)


def _sift(groups: Iterable[Group], checks: Iterable[Check], report: Report, bad: Callable[[DataError], None]):
    """The good groups; `bad` is called with everything that is wrong with the others."""
    def unread(error: DataError) -> None:
        report.groups += 1
        bad(error)

    checks = tuple(checks)
    for number, group in enumerate(replace(groups, on_error=unread) if isinstance(groups, Reader) else groups, 1):
        report.groups += 1
        problems = [problem for check in checks for problem in check(group)]
        for kind, message in problems:
            bad(DataError(kind, message, group.meta.get(PLACE, f"group {number}")))
        if not problems:
            report.good += 1
            yield group


def validate(groups: Iterable[Group], *, checks: Iterable[Check] = CHECKS) -> Report:
    """All problems of the groups, and of the records of `load` that cannot be read.

    checks   functions of a group that yield (kind, message); `paired` and `labelled` ask for more than CHECKS:
             print(validate(load("pairs.jsonl"), checks=(*CHECKS, paired)))
    """
    report = Report()
    for _ in _sift(groups, checks, report, report.note):
        pass
    return report


@dataclass
class Checked:
    """The good ones of `groups`. `checked` makes it."""
    groups: Iterable[Group]
    on_bad: str
    checks: tuple[Check, ...]
    report: Report = field(default_factory=Report)

    def __iter__(self) -> Iterator[Group]:
        self.report = report = Report()
        if self.on_bad == "error":
            yield from _sift(self.groups, self.checks, report, _fail)
            return
        try:
            yield from _sift(self.groups, self.checks, report, report.note)
        finally:
            if report.counts:
                warnings.warn(f"skipped: {report}", stacklevel=2)


def _fail(error: DataError) -> None:
    raise error


def checked(groups: Iterable[Group], *, on_bad: str = "error", checks: Iterable[Check] = CHECKS) -> Checked:
    """The groups, on guard: with `on_bad="error"` the first problem is raised as a DataError that says where it is,
    with "skip" bad groups and records are left out, and at the end of a pass a warning counts them by kind.

    What a pass has seen so far is in `.report`; every pass starts a new one. `checks` are those of `validate`.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad should be 'error' or 'skip', found {on_bad!r}")
    return Checked(groups, on_bad, tuple(checks))
