"""Rewards in the on-policy loop: what a run file names, scored at once, with limits, every component kept."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace

from data_tools.records import Group
from prefopt.games import oracle
from prefopt.games.oracle import PreferenceOracle, from_comparison
from rewards.base import Row, ScoringError, as_reward, fill, index_of, rows_of, values_of
from rewards.cached import Timed
from rewards.index import find

__all__ = ["Scorer", "Wins", "named_rewards"]


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


@dataclass(frozen=True)
class Wins:
    """An oracle of preferences as a reward: what each response that trains wins against others of its group.

    The probabilities of the whole group stay in `group.meta["wins"][name]`. Opponents get no reward.
    """
    oracle: PreferenceOracle
    name: str

    def settings(self) -> dict:
        return self.oracle.settings()

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        groups, found = list({id(row.group): row.group for row in rows}.values()), {}
        for group, wins in zip(groups, self.oracle.compare(groups), strict=True):
            group.meta["wins"] = {**group.meta.get("wins", {}), self.name: wins}
            found[id(group)] = [self.oracle.payoff(group, wins, i) for i in range(len(wins))]
        values = [found[id(row.group)][index_of(row)] for row in rows]
        return [ScoringError("no comparison with those that it plays against is known (`unread: 0.5` of a judge makes ties of "
                             "what it does not say)") if v is None else v for v in values]


class Scorer:
    """Groups in, groups out, with `scores[name]` for every reward and their weighted sum as `scores["reward"]`.

    reward = sum_n weight_n score_n

    Rewards run beside each other, in threads. timeout: seconds for a row's reward, after which it is killed
    (`rewards.cached.Timed`); rewards of many rows (models, judges, services) have limits of their own. unscored: "raise" ends
    the run with the row's place; "mark" leaves such a row without a reward, so that it enters neither statistics nor loss,
    and counts it (metric unscored). A sum lacks a reward if a part of it does.

    What compares (general preference models, judges, games) rewards wins: `against` says whose (opponents, others, everyone)
    and `payoff` how they count (mean_win, mean_score). Where a single reward counts and it compares, the groups get `wins`,
    labels for losses of pairs; opponents get no reward.
    """
    apart = True                                              # no group's rewards depend on another group

    def __init__(self, specs: str | Mapping | Sequence, *, unscored: str = "raise", timeout: float | None = None,
                 workers: int = 2, against: str = "others", payoff: str = "mean_win"):
        self.named, self.unscored, self.timed = {}, unscored, []
        for name, (thing, weight) in named_rewards(specs).items():
            if hasattr(thing, "compare"):
                made = from_comparison(thing, against=getattr(oracle, against), reward=getattr(oracle, payoff))
                self.named[name] = Wins(made, name), weight
                continue
            if timeout and not hasattr(thing, "settings"):
                thing = Timed(thing, seconds=timeout, workers=workers, name=name)
                self.timed.append(thing)
            self.named[name] = thing, weight

    @property
    def compares(self) -> bool:
        """Whether a reward counts wins against other responses."""
        return any(isinstance(thing, Wins) for thing, _ in self.named.values())

    def counting(self, against: str) -> Scorer:
        """The same rewards with wins against others."""
        other = copy(self)
        other.named = {name: (replace(thing, oracle=thing.oracle.counting(getattr(oracle, against))) if isinstance(thing, Wins)
                              else thing, weight) for name, (thing, weight) in self.named.items()}
        return other

    def __call__(self, groups: list[Group]) -> list[Group]:
        oracles = [thing.oracle for thing, _ in self.named.values() if isinstance(thing, Wins)]
        for one in oracles:
            one.check(groups)
        rows = [row for row in rows_of(groups) if all(one.plays(row.response) for one in oracles)]
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
        counted = [(name, thing) for name, (thing, weight) in self.named.items() if weight]
        for group in groups if len(counted) == 1 and isinstance(counted[0][1], Wins) else ():
            group.wins = group.meta.get("wins", {}).get(counted[0][0])
        return groups

    def close(self) -> None:
        """Ends the worker processes of rewards with a time limit."""
        for reward in self.timed:
            reward.close()
