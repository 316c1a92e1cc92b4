"""`check`: everything that is found wrong with a data set, in one pass and, for the labels, three more.

    tally = save(check(load("pairs.jsonl"), against={"gsm8k test": load("test.jsonl")}), "findings.jsonl")
"""
from __future__ import annotations

import math
import sys
import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import BinaryIO

import numpy as np

from data_tools import validate
from data_tools.columns import nearest
from data_tools.fields import PLACE, DataError
from data_tools.formats import Reader
from data_tools.labels import pairs, wins_of
from data_tools.quality import noise, texts
from data_tools.quality.duplicates import Ngrams, Twin, ngrams, overlapping, signatures, twins, verdict
from data_tools.quality.findings import Finding
from data_tools.quality.words import Chunk, chosen, chunks, digest, identity
from data_tools.records import Group

__all__ = ["CHECKS", "check", "check_labels"]

Hook = Callable[[list[str]], Sequence[float]]


def found_in(chunk: Chunk, text: int, kind: str, message: str, sure: float = 1.0, repair: str = "") -> Finding:
    """A finding about a text of the chunk: a response, or a prompt as response 0."""
    n = int(chunk.group[text])
    return about(chunk.groups[n], chunk.first + n, kind, message, sure, repair, int(text - chunk.prompt[n]))


def about(group: Group, number: int, kind: str, message: str, sure: float = 1.0, repair: str = "", response: int = 0) -> Finding:
    return Finding(kind, message, round(float(sure), 3), repair, number, response, group.meta.get(PLACE, ""), identity(group))


# ------------------------------------------------------------------------------------------------------- group by group
def records(chunk: Chunk) -> Iterator[Finding]:
    """What `data validate` refuses: empty texts, broken labels, equal responses of which one is preferred."""
    for n, group in enumerate(chunk.groups, chunk.first):
        for kind, message in (problem for test in validate.CHECKS for problem in test(group)):
            yield about(group, n, kind, message, repair="drop")


def characters(chunk: Chunk) -> Iterator[Finding]:
    """Broken characters and personal data of all texts, refusals and cut ends of responses."""
    asked = set(chunk.prompt.tolist())
    for n, text in enumerate(chunk.texts):
        for problem in (*texts.encoding(text), *texts.personal(text)):
            yield found_in(chunk, n, *problem)
        for problem in () if n in asked else (*texts.refusal(text), *texts.truncation(text)):
            yield found_in(chunk, n, *problem)
    for n, group in enumerate(chunk.groups):
        for k, response in enumerate(group.responses, 1):
            if response.meta.get("finished") is False:
                yield about(group, chunk.first + n, "truncated", "the sampler stopped it at its limit (finished is false)",
                            repair="drop response", response=k)


def hooked(chunk: Chunk, *, hooks: Mapping[str, Hook], threshold: float) -> Iterator[Finding]:
    """Numbers of callables, such as toxicity, that are `threshold` or more."""
    for name, hook in hooks.items():
        values = list(hook(chunk.texts))
        wrong = [v for v in values if not 0 <= v <= 1]
        if wrong or len(values) != len(chunk.texts):
            told = repr(wrong[0]) if wrong else f"{len(values)} numbers for {len(chunk.texts)} texts"
            raise ValueError(f"the hook {name!r} returned {told}: it should return one number from 0 to 1 for each text")
        for n, value in enumerate(values):
            if value >= threshold:
                yield found_in(chunk, n, name, f"{name} {value:.2f}", value)


def strange(chunk: Chunk, *, languages: Sequence[str]) -> Iterator[Finding]:
    """Texts in none of the wanted languages; where none is wanted, responses in another language than their prompt."""
    evidence, names = texts.language(chunk.texts, chunk.words)
    some = np.sort(evidence, axis=1)
    sure = (some[:, -1] >= 5) & (some[:, -1] >= 3 * some[:, -2])
    told, asked = evidence.argmax(1), chunk.prompt[chunk.group]
    other = ~np.isin(told, [names.index(w) for w in languages]) if languages else sure[asked] & (told != told[asked])
    for n in np.flatnonzero(sure & other):
        beside = "" if languages else f", and its prompt to be {names[told[asked[n]]]}"
        share = (evidence[n].max() + 1) / (evidence[n].sum() + 2)
        yield found_in(chunk, n, "language", f"seems to be {names[told[n]]}{beside}", share,
                       "drop response" if n != asked[n] else "drop")


def contaminated(chunk: Chunk, *, known: Ngrams) -> Iterator[Finding]:
    """Runs of words of the prompts of named test sets."""
    for n, item, share in overlapping(chunk, known):
        yield about(chunk.groups[n], chunk.first + n, "contaminated", f"holds {share:.0%} of the {known.size}-grams of "
                    f"{known.names[item]}", share, "drop")


# ----------------------------------------------------------------------------------------------------- the whole data set
@dataclass
class Duplicates:
    """Groups and prompts that occurred before, and splits that share prompts. Of each group 0.5 KB is kept in a temporary file,
    and some 0.3 KB in memory."""
    near: float
    signatures: dict[str, BinaryIO] = field(default_factory=lambda: defaultdict(tempfile.TemporaryFile))
    numbers: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("Q")))
    labels: array = field(default_factory=lambda: array("q"))
    splits: list[str] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)          # (place, id)

    def see(self, chunk: Chunk) -> None:
        size = len(chunk.groups)
        asked = signatures(chosen(chunk.words, chunk.prompt), np.arange(size), size)
        answers = np.setdiff1d(np.arange(len(chunk.texts)), chunk.prompt)
        answered = signatures(chosen(chunk.words, answers), chunk.group[answers], size)
        self.signatures["prompts"].write(asked.tobytes())
        self.signatures["groups"].write(np.where(answered.any(1, keepdims=True), answered, asked).tobytes())
        numbers = [digest(t) for t in chunk.texts]
        for group, p in zip(chunk.groups, chunk.prompt.tolist(), strict=True):
            self.numbers["prompts"].append(numbers[p])
            self.numbers["groups"].append(digest(repr((numbers[p], sorted(numbers[p + 1:p + 1 + len(group.responses)])))))
            self.labels.append(verdict(group))
            self.splits.append(sys.intern(str(group.meta.get("split", ""))))
            self.names.append((group.meta.get(PLACE, ""), identity(group)))

    def end(self) -> Iterator[Finding]:
        if not self.names:
            return
        signed = {name: np.memmap(file, np.uint16, "r").reshape(len(self.names), -1) for name, file in self.signatures.items()}
        numbers = {name: np.frombuffer(found, np.uint64) for name, found in self.numbers.items()}
        for twin in twins(numbers["groups"], signed["groups"], near=self.near, asked=signed["prompts"]):
            labels = self.labels[twin.later], self.labels[twin.earlier]
            if twin.similarity < 1:
                yield self.told(twin.later, "near duplicate", f"like {self.name(twin.earlier)}: the pairs of words of the "
                                f"responses overlap by {twin.similarity:.0%}", twin.similarity)
            elif all(labels) and labels[0] != labels[1]:
                yield self.told(twin.later, "contradictory duplicate", "the same prompt and responses as "
                                f"{self.name(twin.earlier)}, with other labels")
            else:
                yield self.told(twin.later, "duplicate", f"the same prompt and responses as {self.name(twin.earlier)}")
        again = twins(numbers["prompts"], signed["prompts"], near=self.near)
        yield from self.shared(again)
        if again:
            same = sum(t.similarity == 1 for t in again)
            yield Finding("repeated prompts", f"{len(again):,} of {len(self.names):,} groups have the prompt of an earlier one, "
                          f"{same:,} exactly and {len(again) - same:,} nearly: split by prompt, not by group")

    def shared(self, again: list[Twin]) -> Iterator[Finding]:
        """Prompts of several splits: all groups but those of the smallest split are named."""
        sizes, crowds = Counter(self.splits), defaultdict(list)
        for twin in again:
            crowds[twin.earlier].append(twin)
        for first, crowd in crowds.items():
            members = {first: 1.0, **{t.later: t.similarity for t in crowd}}
            kept = min(members, key=lambda n: (sizes[self.splits[n]], n))
            for n, similarity in members.items():
                if self.splits[n] != self.splits[kept]:
                    yield self.told(n, "prompt in two splits", f"the prompt, of split {self.splits[n]!r}, is also that of "
                                    f"{self.name(kept)}, of split {self.splits[kept]!r}", min(similarity, members[kept]))

    def name(self, n: int) -> str:
        return self.names[n][0] or f"group {n + 1}"

    def told(self, n: int, kind: str, message: str, sure: float = 1.0) -> Finding:
        return Finding(kind, message, round(sure, 3), "drop", n + 1, 0, *self.names[n])


@dataclass
class Biases:
    """Preferred responses that are longer, or stand first, more often than chance would have it. The pairs of a group are one
    draw: the standard error is that of its excess of such pairs, so that a long list is not taken for many groups."""
    count: Counter = field(default_factory=Counter)
    squares: Counter = field(default_factory=Counter)

    def see(self, chunk: Chunk) -> None:
        for group, p in zip(chunk.groups, chunk.prompt.tolist(), strict=True):
            size = [len(t) for t in chunk.texts[p + 1:p + 1 + len(group.responses)]]
            found = pairs(wins_of(group))
            for what, facts in (("first", [i < j for i, j in found]),
                                ("longer", [size[i] > size[j] for i, j in found if size[i] != size[j]])):
                self.count[what] += sum(facts)
                self.count[f"of {what}"] += len(facts)
                self.squares[what] += (sum(facts) - len(facts) / 2) ** 2

    def end(self) -> Iterator[Finding]:
        yield from self.lopsided("first", "position bias", "stands first", "shuffle the responses, for a model or a judge that "
                                 "looks at the place alone would seem right", "shuffle")
        yield from self.lopsided("longer", "length bias", "is the longer", "balance the lengths, or judge rewards on longer and "
                                 "shorter ones apart: counting characters would seem to be a good reward")

    def lopsided(self, fact: str, kind: str, what: str, advice: str, repair: str = "") -> Iterator[Finding]:
        """A finding where a share is more than three standard errors and 5 points from a half.

        z = sum_g d_g / sqrt(sum_g d_g^2),   d_g = how many of the pairs of group g are so, less a half of them
        """
        count, of = self.count[fact], self.count[f"of {fact}"]
        z = abs(count - of / 2) / math.sqrt(self.squares[fact] or 1)
        if z > 3 and abs(count / of - 0.5) > 0.05:
            yield Finding(kind, f"the preferred response {what} in {count / of:.1%} of {of:,} pairs ({z:.0f} standard errors "
                          f"from a half): {advice}", repair=repair)


# --------------------------------------------------------------------------------------------------------------- check
CHECKS = ("records", "texts", "hooks", "language", "contamination", "duplicates", "bias", "labels")


def check(groups: Iterable[Group], *, skip: Sequence[str] = (), near: float = 0.7,
          against: Mapping[str, Iterable[Group]] | None = None, ngram: int = 13, hooks: Mapping[str, Hook] | None = None,
          hook_threshold: float = 0.5, languages: Sequence[str] = (), score: str | None = None, sample: int = 20_000,
          seed: int = 0) -> Iterator[Finding]:
    """All findings about the groups: first those of single groups as they come, then those about all of them.

    skip            names of CHECKS that are left out
    near            Jaccard similarity of pairs of words from which on groups (their responses) or prompts are near duplicates
    against         named test sets, {"gsm8k test": groups}: runs of words that they share with the groups
    ngram           words of such a run
    hooks           {"toxicity": callable}: a callable takes texts and returns one number from 0 to 1 for each
    hook_threshold  from which number on it is a finding
    languages       the wanted ones, such as ("en", "de"); none: responses should have the language of their prompts
    score           the score of the responses that judges the labels; None: a model of the words is fitted (`noise.crossfit`)
    sample          how many groups that model sees
    seed            of that model

    Groups whose meta has a `split` are also told when a prompt is in several. Memory: 0.3 KB of each group, and 0.5 KB in a
    temporary file; texts are held by the thousand. The labels need more passes, so `groups` must be something that can be read
    again (`load(...)`, a list) unless they are skipped.
    """
    for name in skip:
        if name not in CHECKS:
            raise ValueError(f"skip names {name!r}, which is no check{nearest(name, CHECKS)}; known: {', '.join(CHECKS)}")
    if "labels" not in skip and iter(groups) is groups:
        raise ValueError("the check of the labels reads the groups several times, and this is an iterator that ends: give a list "
                         "or `load(...)`, or leave the check out with skip=['labels']")
    known = [*texts.LANGUAGES, *texts.SCRIPTS]
    for name in languages:
        if name not in known:
            raise ValueError(f"languages names {name!r}, which is not known{nearest(name, known)}; known: {', '.join(known)}")
    each = {"records": records, "texts": characters, "hooks": partial(hooked, hooks=hooks or {}, threshold=hook_threshold),
            "language": partial(strange, languages=languages),
            "contamination": partial(contaminated, known=ngrams(against or {}, size=ngram))}
    whole = {"duplicates": Duplicates(near), "bias": Biases()}
    labels = None if "labels" in skip else partial(check_labels, score=score, sample=sample, seed=seed)
    return _found(groups, [each[name] for name in each if name not in skip], [whole[n] for n in whole if n not in skip], labels)


def _found(groups, each, whole, labels) -> Iterator[Finding]:
    broken: list[DataError] = []
    count = 0
    for chunk in chunks(replace(groups, on_error=broken.append) if isinstance(groups, Reader) else groups):
        count += len(chunk.groups)
        for one in each:
            yield from one(chunk)
        for one in whole:
            one.see(chunk)
    for error in broken:
        yield Finding("unreadable", error.message, place=error.place)
    for one in whole:
        yield from one.end()
    if not count:
        yield Finding("no groups", "there is not a single group in the data")
    elif labels:
        yield from labels(replace(groups, on_error=lambda error: None) if isinstance(groups, Reader) else groups)


def check_labels(groups: Iterable[Group], *, score: str | None = None, sample: int = 20_000, seed: int = 0) -> Iterator[Finding]:
    """How many labels seem turned round, which, and where annotators differ.

    score   the score that judges the labels; None: a model of the words that has not seen them (`noise.crossfit`)
    """
    some = len(list(islice((g for g in groups if pairs(wins_of(g))), 50)))
    judge, margins, ballots = "a model of the words", None, []
    if score is not None:
        check_score(groups, score)
        judge, margins = f"the score {score!r}", noise.scored(score)
    elif 0 < some < 50:
        yield Finding("label noise", f"{some} groups with a preferred response are too few to learn what is preferred: name a "
                      "score that judges them")
    elif some:
        try:
            margins = noise.crossfit(groups, sample=sample, seed=seed)
        except noise.Unlearnable as error:
            yield Finding("label noise", str(error))
    values = np.concatenate([np.zeros(0), *(margins(chunk) for chunk in chunks(groups))]) if margins else np.zeros(0)
    estimate = noise.flips(values)
    if margins:
        yield noise_found(estimate, judge)
    turned = np.interp(values, estimate.margins, estimate.turned) if estimate.knows else np.zeros(0)
    for n, group in enumerate(groups, 1):
        if n <= len(turned) and turned[n - 1] > 0.5:
            yield about(group, n, "suspected flip", f"{judge} prefers the other response by {-values[n - 1]:.3g}", turned[n - 1],
                        "flip")
        if votes := group.meta.get("votes"):
            ballots.append(tuple(votes))
            if len(set(votes)) > 1:
                share = max(votes.count(v) for v in votes) / len(votes)
                yield about(group, n, "annotators differ", f"the votes are {', '.join(f'{v:g}' for v in votes)}", 1 - share)
    told = noise.disagreement(ballots)
    if told["items"]:
        yield Finding("annotator noise", f"two annotators differ on {told['disagree']:.1%} of {told['items']:,} items, as if "
                      f"each erred in {told['error rate']:.0%}")


def check_score(groups: Iterable[Group], score: str) -> None:
    """An error if none of the first 1000 groups has the score."""
    known = {name for group in islice(groups, 1000) for r in group.responses for name in r.scores}
    if score not in known:
        raise ValueError(f"no response of the first 1,000 groups has the score {score!r}{nearest(score, known)}; known: "
                         f"{', '.join(sorted(known)) or 'none'}")


def noise_found(estimate: noise.Flips, judge: str) -> Finding:
    low, high = estimate.interval
    if not estimate.knows:
        return Finding("label noise", f"{judge} agrees with {estimate.agree:.1%} of {estimate.groups:,} labels, no more than "
                       "chance: it says nothing of wrong labels")
    return Finding("label noise", f"{judge} agrees with {estimate.agree:.1%} of {estimate.groups:,} labels, which is as if "
                   f"{estimate.rate:.0%} ({low:.0%} to {high:.0%}) of them were turned round")
