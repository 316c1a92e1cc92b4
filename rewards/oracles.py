"""Oracles of preferences by name, for rewards that are wins: `rewards: [{game: {payoff: rps, style: "my_styles:style"}}]`.

What compares responses by itself (a trained general preference model, a pairwise judge) is an oracle already.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_tools.labels import soft
from data_tools.records import Group
from prefopt import parts
from prefopt.games import library
from prefopt.games.game import Game, from_file
from prefopt.games.oracle import from_callable, from_game
from prefopt.recipes.checks import positive
from rewards.base import Comparison, Reward, ScoringError, as_reward, final_text, rows_of
from rewards.index import find

__all__ = ["WinsOf", "bradley_terry", "game", "preference"]


class WinsOf:
    """A reward as a comparison: P(i beats j) = sigmoid((r_i - r_j) / tau). Every response is graded once."""

    def __init__(self, reward: Reward, tau: float):
        self.reward, self.tau, self.name = reward, tau, reward.name

    def settings(self) -> dict:
        return {"reward": self.reward.settings(), "tau": self.tau}

    def compare(self, groups: Sequence[Group]) -> list[list[list[float | None]]]:
        values = iter([None if isinstance(v, ScoringError) else float(v) for v in self.reward(rows_of(groups))])
        return [soft([next(values) for _ in group.responses], temperature=self.tau) for group in groups]


def bradley_terry(*, reward: str | Mapping, tau: float = 1.0) -> Comparison:
    """P(y beats y') = sigmoid((r(y) - r(y')) / tau) of another reward, whatever it is."""
    positive(tau=tau)
    return WinsOf(as_reward(find(reward)), tau)


def game(*, payoff: str | Mapping | Sequence, actions: Sequence[str] | None = None, style: str | None = None) -> Comparison:
    """A game of preferences between styles of responses.

    payoff    a matrix of P(i beats j), a CSV file of one, or a name of prefopt.games.library
    actions   the names of the styles; the game's own where it has some
    style     'module:function', text -> the name of its style; left out, the text itself without spaces around it
    """
    if isinstance(payoff, str) and payoff.endswith(".csv"):
        found = from_file(payoff)
    elif isinstance(payoff, (str, Mapping)):
        found = parts.from_spec(payoff, library.__name__)()
    else:
        found = Game(payoff)
    seen = parts.find(style, "") if style else str.strip
    return from_game(Game(found.payoff, actions=actions or found.actions, name=found.name),
                     style=lambda text: seen(final_text(text)))


def preference(*, function: str) -> Comparison:
    """P(one beats the other) by 'module:function' of (prompt, one, other), asked in both orders."""
    asked, name = parts.find(function, ""), function.split(":")[-1]
    return from_callable(lambda prompt, one, other: asked(prompt, final_text(one), final_text(other)), name=name)
