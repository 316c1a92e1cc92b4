"""The stage `score` of a data pipeline: every response scored by one reward or several."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from data_tools.pipeline.config import named
from data_tools.pipeline.identity import code, content, texts
from data_tools.records import Group, Response
from rewards.index import WHERE, resolved
from rewards.online import Scorer

__all__ = ["Score"]


class Score:
    """`scores[name]` of every response by each reward, and their weighted sum as `scores["reward"]`. What made a score stands in
    the group's meta, `scored_by`.

    rewards     as in a run file: names with arguments, a `weight` and a name of their own, {bleu: {weight: 0.5, as: overlap}}
    unscored    "raise": a response that cannot be scored ends the build, with its place; "mark": it has no score, and says why
    timeout     seconds for a function of one row
    """

    def __init__(self, *, rewards: str | Mapping | Sequence, unscored: str = "raise", timeout: float | None = None):
        if unscored not in ("raise", "mark"):
            raise ValueError(f"unscored is 'raise' or 'mark', found {unscored!r}")
        self.specs = [{k: v} for k, v in rewards.items()] if isinstance(rewards, Mapping) else \
            [rewards] if isinstance(rewards, str) else list(rewards)
        self.unscored, self.timeout, self.scorer = unscored, timeout, None

    def identity(self) -> dict:
        """The code of rewards that have a name, and models in folders of this one."""
        for spec in self.specs:                               # an error, before anything is sampled, where one is misspelt
            arguments = {k: v for k, v in settings_of(spec).items() if k != "weight"}
            resolved({arguments.pop("reward"): arguments})
        said = sorted(set(texts(self.specs)))
        folders = [text for text in said if text not in WHERE and "/" not in text and Path(text).is_dir()]
        return {text: code(WHERE[text].partition(":")[0]) for text in said if text in WHERE} | {f: content(f) for f in folders}

    def __call__(self, shard: list[Group]) -> list[Group]:
        if self.scorer is None:
            self.scorer = Scorer(self.specs, unscored=self.unscored, timeout=self.timeout)
        known = {name: settings_of(spec) for name, spec in zip(self.scorer.named, self.specs, strict=True)}
        for group in self.scorer(shard):
            group.meta["scored_by"] = {**group.meta.get("scored_by", {}), **known}
            for response in group.responses:
                noted(response)
        return shard

    def count(self, groups: Sequence[Group]) -> dict[str, float]:
        """Responses with and without a score, sums, groups of equal scores, pairs without a verdict, pairs that two rewards order
        alike."""
        found: Counter = Counter()
        for group in groups:
            names = list(group.meta["scored_by"])
            for name in names:
                values = [r.scores.get(name) for r in group.responses]
                known = [v for v in values if v is not None]
                found[f"scored {name}"] += len(known)
                found[f"unscored {name}"] += len(values) - len(known)
                found[f"sum {name}"] += sum(known)
                found[f"compared {name}"] += len(known) > 1
                found[f"flat {name}"] += len(known) > 1 and len(set(known)) == 1
            for name, wins in group.meta.get("wins", {}).items():
                known = [w for i, row in enumerate(wins) for w in row[:i]]
                found[f"judged {name}"] += len(known)
                found[f"unknown {name}"] += known.count(None)
            for pair in combinations(names, 2):
                signs = agreements(group, *pair)
                found[f"ordered {' and '.join(pair)}"] += sum(s != 0 for s in signs)
                found[f"alike {' and '.join(pair)}"] += sum(s > 0 for s in signs)
        return dict(found)

    def told(self, counts: Mapping[str, float]) -> list[str]:
        lines = []
        for name in (key.removeprefix("scored ") for key in sorted(counts) if key.startswith("scored ")):
            scored, missing, flat = (int(counts[f"{what} {name}"]) for what in ("scored", "unscored", "flat"))
            lines.append(f"{name}: mean {counts[f'sum {name}'] / scored:.4g} of {scored:,} responses" if scored else
                         f"{name}: no response has a score")
            lines[-1] += f", {missing:,} without a score" * (missing > 0)
            if unknown := int(counts.get(f"unknown {name}", 0)):
                lines[-1] += f"; {unknown:,} of {int(counts[f'judged {name}']):,} pairs have no verdict"
            lines[-1] += f"; all responses are equal in {flat:,} of {int(counts[f'compared {name}']):,} groups" * (flat > 0)
        for key in sorted(counts):
            if key.startswith("ordered ") and counts[key]:
                pair = key.removeprefix("ordered ")
                alike = counts[f"alike {pair}"] / counts[key]
                lines.append(f"{pair} order {alike:.1%} of {int(counts[key]):,} pairs of responses alike")
        return lines

    def close(self) -> None:
        if self.scorer is not None:
            self.scorer.close()


def noted(response: Response) -> None:
    """Says why a response has no sum where a part of it is missing, so that the rule `scored` knows."""
    why = {name: said for name, said in response.meta.pop("unscored", {}).items() if name != "reward"}
    if why and "reward" not in response.scores:
        why["reward"] = "; ".join(f"{name}: {said}" for name, said in why.items())
    if why:
        response.meta["unscored"] = why


def agreements(group: Group, one: str, other: str) -> list[float]:
    """For each pair of responses a number: above 0 where two rewards order it alike, below where not, 0 where one has a tie."""
    values = [(r.scores[one], r.scores[other]) for r in group.responses if one in r.scores and other in r.scores]
    return [(a - c) * (b - d) for (a, b), (c, d) in combinations(values, 2)]


def settings_of(spec: str | Mapping) -> dict:
    """A reward's name and arguments in one dict.

    >>> settings_of({"bleu": {"weight": 0.5}}), settings_of("bleu")
    ({'reward': 'bleu', 'weight': 0.5}, {'reward': 'bleu'})
    """
    name, arguments = named(spec, "score: rewards")
    return {"reward": name, **{k: v for k, v in (arguments or {}).items() if k != "as"}}
