"""Oracles of preferences: P(y beats y' | x) for the responses of a group, and their rewards against opponents.

An oracle is a scorer of groups, as the source `OnPolicy` takes one, and a comparison, as rewards takes one. Whatever answers
it is made antisymmetric: both orders are averaged, (p_ij + 1 - p_ji) / 2, which gives a response 1/2 against itself.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from data_tools.columns import nearest
from data_tools.records import Group, Prompt, Response
from prefopt.games.game import Game
from prefopt.parts import name as name_of

__all__ = ["PreferenceOracle", "bradley_terry", "everyone", "from_callable", "from_comparison", "from_game", "mean_score",
           "mean_win", "opponents", "others"]

Matrix = Sequence[Sequence[float | None]]                     # K x K, row i holds P(i beats j); None where nobody knows


# ---------------------------------------------------------------------------------------------- against whom, and what counts
def opponents(group: Group, i: int) -> list[int]:
    """The group's probe rows, which do not train: responses of the policy that is played against."""
    found = [j for j, r in enumerate(group.responses) if not r.train]
    if not found:
        raise ValueError(f"{place(group)} has no opponent among its {len(group.responses)} responses: sample some from the "
                         f"policy to play against and add them with train False, or take `against=others`, which compares "
                         f"the policy's responses with each other")
    return found


def others(group: Group, i: int) -> list[int]:
    """The other responses that train, for opponents from the policy itself; of a probe row (a greedy baseline) all of them."""
    found = [j for j, r in enumerate(group.responses) if r.train and j != i]
    if not found:
        raise ValueError(f"{place(group)} has a single response that trains, and `against=others` compares at least two: raise "
                         f"rollout.k, or add opponents with train False")
    return found


def everyone(group: Group, i: int) -> list[int]:
    """All responses that train, the response itself among them with 1/2 (SPPO's table)."""
    return [j for j, r in enumerate(group.responses) if r.train]


def mean_win(wins: Sequence[float]) -> float:
    """Mean probability of winning.

    >>> mean_win([0.5, 1.0])
    0.75
    """
    return sum(wins) / len(wins)


def mean_score(wins: Sequence[float], *, limit: float = 100.0) -> float:
    """Mean log-odds of winning: the score of a general preference model. A certain win counts `limit`.

    >>> mean_score([0.5, 1.0])
    50.0
    """
    return sum(max(-limit, min(limit, math.log(p) - math.log1p(-p) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)))
               for p in wins) / len(wins)


def place(group: Group) -> str:
    return group.meta.get("place") or f"the group of prompt {str(group.prompt)[:60]!r}"


# --------------------------------------------------------------------------------------------------------------- the oracle
class PreferenceOracle:
    """Groups in, groups with `wins`, and with a reward of every response that trains, out.

    answer      groups -> for each K x K numbers in [0, 1], row i holding P(response i beats response j), or None
    against     whom the reward of a response is taken against: `opponents`, `others` or `everyone`
    reward      probabilities of winning against them -> the reward: `mean_win` or `mean_score`

    The groups' own wins are replaced. A response of which no comparison is known has no reward, and opponents have none.
    """

    def __init__(self, answer: Callable[[Sequence[Group]], Sequence[Matrix]], *, name: str = "oracle",
                 settings: dict | None = None, against: Callable[[Group, int], list[int]] = opponents,
                 reward: Callable[[Sequence[float]], float] = mean_win):
        self.answer, self.name, self.against, self.reward = answer, name, against, reward
        self._settings = settings or {}

    def settings(self) -> dict:
        return {**self._settings, "against": name_of(self.against), "reward": name_of(self.reward)}

    def compare(self, groups: Sequence[Group]) -> list[list[list[float | None]]]:
        """P(i beats j) for the responses of each group, with P(i beats j) + P(j beats i) = 1."""
        groups = list(groups)
        found = list(self.answer(groups))
        if len(found) != len(groups):
            raise ValueError(f"the oracle {self.name!r} answered {len(found)} of {len(groups)} groups")
        return [self.checked(matrix, group) for matrix, group in zip(found, groups, strict=True)]

    def checked(self, matrix: Matrix, group: Group) -> list[list[float | None]]:
        size = len(group.responses)
        if len(matrix) != size or any(len(row) != size for row in matrix):
            raise ValueError(f"{place(group)}: the oracle {self.name!r} should answer with {size} x {size} numbers, one for each "
                             f"pair of responses")
        for i, row in enumerate(matrix):
            for j, p in enumerate(row):
                if p is not None and not 0 <= p <= 1:
                    raise ValueError(f"{place(group)}: the oracle {self.name!r} says that response {i + 1} beats response "
                                     f"{j + 1} with {p}, which is no probability: it should answer in [0, 1]; of scores "
                                     f"take sigmoid(s_i - s_j)")
        return [[both(matrix[i][j], matrix[j][i]) for j in range(size)] for i in range(size)]

    def counting(self, against: Callable[[Group, int], list[int]]) -> PreferenceOracle:
        """The same oracle with rewards against others."""
        return PreferenceOracle(self.answer, name=self.name, settings=self._settings, against=against, reward=self.reward)

    def check(self, groups: Sequence[Group]) -> None:
        """An error where a response has nobody to be compared with."""
        for group in groups:
            for i, response in enumerate(group.responses):
                if self.plays(response):
                    self.against(group, i)

    def plays(self, response: Response) -> bool:
        """Whether a response has a reward: probe rows do, unless they are the opponents."""
        return response.train or self.against is not opponents

    def payoff(self, group: Group, wins: Sequence[Sequence[float | None]], i: int) -> float | None:
        """The reward of response i; None where no comparison of it is known, and of opponents."""
        against = self.against(group, i) if self.plays(group.responses[i]) else []
        known = [wins[i][j] for j in against if wins[i][j] is not None]
        return float(self.reward(known)) if known else None

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        groups = list(groups)
        for group, wins in zip(groups, self.compare(groups), strict=True):
            group.wins = wins
            for i, response in enumerate(group.responses):
                response.scores.pop("reward", None)
                if (worth := self.payoff(group, wins, i)) is not None:
                    response.scores["reward"] = worth
        return groups


def both(p: float | None, q: float | None) -> float | None:
    """P(i beats j) from the answers in both orders; one of them is enough."""
    known = [float(x) for x in (p, None if q is None else 1 - q) if x is not None]
    return sum(known) / len(known) if known else None


# ------------------------------------------------------------------------------------------------------------------ makers
def from_callable(probability: Callable[[Prompt, object, object], float], **settings) -> PreferenceOracle:
    """Of `probability(prompt, one, other)`, which is asked in both orders.

    >>> oracle = from_callable(lambda prompt, one, other: 0.8, against=others)               # prefers what comes first
    >>> from data_tools.records import Response
    >>> oracle.compare([Group("x", [Response("a"), Response("b")])])
    [[[0.5, 0.5], [0.5, 0.5]]]
    """
    def answer(groups: Sequence[Group]) -> list[Matrix]:
        return [[[probability(g.prompt, one.text, other.text) for other in g.responses] for one in g.responses] for g in groups]
    return PreferenceOracle(answer, **{"name": getattr(probability, "__name__", "callable"), **settings})


def from_game(game: Game, style: Callable[[object], str] = lambda text: text, **settings) -> PreferenceOracle:
    """Of a game whose actions are the texts of responses, or what `style` sees in them. Of several prompts the meta of a group
    says which: `game`, a number."""
    where = {action: n for n, action in enumerate(game.actions)}

    def action(text: object) -> int:
        seen = style(text)
        if seen not in where:
            raise ValueError(f"the game {game.name!r} has no action {seen!r}{nearest(str(seen), where)}; actions: "
                             f"{', '.join(game.actions)}")
        return where[seen]

    def answer(groups: Sequence[Group]) -> list[Matrix]:
        found = [([action(r.text) for r in g.responses], game.payoff[int(g.meta.get("game", 0))]) for g in groups]
        return [payoff[chosen][:, chosen].tolist() for chosen, payoff in found]
    return PreferenceOracle(answer, **{"name": game.name, **settings})


def bradley_terry(reward: Callable[[Prompt, object], float], /, *, tau: float = 1.0, **settings) -> PreferenceOracle:
    """Of a reward: P(y beats y') = sigmoid((r(x, y) - r(x, y')) / tau).

    >>> from data_tools.records import Response
    >>> bradley_terry(lambda prompt, text: len(text) * math.log(3), against=others).compare(
    ...     [Group("x", [Response("ab"), Response("a")])])[0][0][1]
    0.75
    """
    if not tau > 0:
        raise ValueError(f"tau must be a number greater than 0, found {tau!r}")

    def chance(gap: float) -> float:
        return 1 / (1 + math.exp(-gap)) if gap >= 0 else 1 - 1 / (1 + math.exp(gap))

    def answer(groups: Sequence[Group]) -> list[Matrix]:
        rewards = [[reward(g.prompt, r.text) for r in g.responses] for g in groups]
        return [[[chance((a - b) / tau) for b in row] for a in row] for row in rewards]
    return PreferenceOracle(answer, **{"name": getattr(reward, "__name__", "reward"), "settings": {"tau": tau}, **settings})


def from_comparison(comparison, **settings) -> PreferenceOracle:
    """Of a comparison of rewards, with `name`, `settings()` and `compare(groups)`: a trained general preference model, a pairwise
    judge."""
    return PreferenceOracle(comparison.compare, **{"name": comparison.name, "settings": comparison.settings(), **settings})
