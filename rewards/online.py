"""Rewards in the on-policy loop: what a run file names, scored at once, with limits, every component kept."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from data_tools.records import Group
from rewards.base import ScoringError, as_reward, fill, rows_of, values_of
from rewards.cached import Timed
from rewards.index import find

__all__ = ["Scorer", "named_rewards"]


def named_rewards(specs: str | Mapping | Sequence) -> dict[str, tuple[Callable, float]]:
    """'name', {name: {argument: value, weight: 0.5, as: 'short'}} or a list of them -> rewards with their weights, by name.

    >>> list(named_rewards(["rouge_l", {"bleu": {"weight": 0.5, "as": "overlap"}}]))
    ['rouge_l', 'overlap']
    """
    found: dict[str, tuple[Callable, float]] = {}
    for spec in specs if isinstance(specs, Sequence) and not isinstance(specs, str) else [specs]:
        (name, arguments), = spec.items() if isinstance(spec, Mapping) else [(spec, {})]
        arguments = dict(arguments or {})
        weight, label = arguments.pop("weight", 1.0), arguments.pop("as", None)
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise ValueError(f"rollout.rewards: the weight of {name} must be a number, found {weight!r}")
        thing = find({name: arguments} if arguments else name)
        label = label or as_reward(thing).name
        if label in found or label == "reward":
            raise ValueError(f"rollout.rewards names {label!r} twice" if label in found else "a component of the reward cannot "
                             "be called reward, which is their sum: give it another name, {name: {as: ...}}")
        found[label] = thing, float(weight)
    return found


class Scorer:
    """Groups in, groups out, with `scores[name]` for every reward and their weighted sum as `scores["reward"]`.

    reward = sum_n weight_n score_n

    Rewards run beside each other, in threads. timeout: seconds for a row's reward, after which it is killed
    (`rewards.cached.Timed`); rewards of many rows (models, judges, services) have limits of their own. unscored: "raise" ends
    the run with the row's place; "mark" leaves such a row without a reward, so that it enters neither statistics nor loss,
    and counts it (metric unscored). A sum lacks a reward if a part of it does.
    """

    def __init__(self, specs: str | Mapping | Sequence, *, unscored: str = "raise", timeout: float | None = None,
                 workers: int = 2):
        self.named, self.unscored, self.timed = {}, unscored, []
        for name, (thing, weight) in named_rewards(specs).items():
            if timeout and not hasattr(thing, "settings"):
                thing = Timed(thing, seconds=timeout, workers=workers, name=name)
                self.timed.append(thing)
            self.named[name] = thing, weight

    def __call__(self, groups: list[Group]) -> list[Group]:
        rows = rows_of(groups)
        with ThreadPoolExecutor(max(1, len(self.named))) as pool:
            found = {name: pool.submit(values_of, as_reward(thing, name), rows, self.unscored)
                     for name, (thing, _) in self.named.items()}
        for name, values in found.items():
            fill(rows, name, values.result())
        for row in rows:
            scores = row.response.scores
            scores.pop("reward", None)
            if missing := sorted(self.named.keys() - scores.keys()):
                if self.unscored == "raise":
                    raise ScoringError(f"{row.place}: no score by {', '.join(missing)}")
                continue
            scores["reward"] = sum(weight * scores[name] for name, (_, weight) in self.named.items())
        return groups

    def close(self) -> None:
        """Ends the worker processes of rewards with a time limit."""
        for reward in self.timed:
            reward.close()
