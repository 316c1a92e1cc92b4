"""Rewards in the on-policy loop: what a run file names, scored at once, with limits, every component kept."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from data_tools.records import Group
from rewards.base import ScoringError, as_reward, rows_of, score
from rewards.cached import timed
from rewards.index import find

__all__ = ["named_rewards", "scorer"]


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


def scorer(specs: str | Mapping | Sequence, *, unscored: str = "raise", timeout: float | None = None,
           workers: int = 8) -> Callable[[list[Group]], list[Group]]:
    """Groups in, groups out, with `scores[name]` for every reward and their weighted sum as `scores["reward"]`.

    reward = sum_n weight_n score_n

    Rewards run beside each other, in threads. timeout: seconds for a row's reward, after which it is stopped
    (`rewards.cached.timed`). unscored: "raise" ends the run with the row's place; "mark" leaves such a row without a reward,
    so that it enters neither statistics nor loss, and counts it (metric unscored). A sum lacks a reward if a part of it does.
    """
    named = {name: (timed(thing, seconds=timeout) if timeout else thing, weight)
             for name, (thing, weight) in named_rewards(specs).items()}

    def fill(groups: list[Group]) -> list[Group]:
        with ThreadPoolExecutor(max(1, min(workers, len(named)))) as pool:
            done = [pool.submit(score, groups, {name: thing}, on_error=unscored) for name, (thing, _) in named.items()]
            for one in done:
                one.result()
        for row in rows_of(groups):
            scores = row.response.scores
            scores.pop("reward", None)
            if named.keys() <= scores.keys():
                scores["reward"] = sum(weight * scores[name] for name, (_, weight) in named.items())
            elif unscored == "raise":
                missing = sorted(named.keys() - scores.keys())
                raise ScoringError(f"{row.place}: no score by {', '.join(missing)}")
        return groups

    return fill
