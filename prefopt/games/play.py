"""A game file played: which algorithms, how long, from where, and what came of it by iteration."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from data_tools.columns import nearest
from prefopt.config import Loader
from prefopt.games import game, library, solve
from prefopt.games.game import Game
from prefopt.games.tabular import play
from prefopt.parts import from_spec, hyperparameters

__all__ = ["Played", "Plan", "Run", "load", "record", "run", "shown", "table"]

USUAL = ["egpo", "omd", "nash_md", "inpo", "sppo"]


class Plan(BaseModel):
    """A game file. A game is a name of prefopt.games.library, a payoff matrix, or a CSV file of one."""
    model_config = ConfigDict(extra="forbid", frozen=True)
    game: str | dict | None = None
    payoff: list | str | None = None
    actions: list[str] | None = None
    reference: list | Literal["uniform"] | None = None        # weights; the game's own, or uniform, if left out
    start: list[float] | None = None                          # weights of the first policy; the reference if left out
    beta: float = Field(0.1, gt=0)                            # weight of the KL to the reference
    iterations: int = Field(300, ge=1, le=100_000)
    algorithms: list[str | dict] = USUAL
    samples: int | None = Field(None, ge=1)                   # groups drawn per iteration; all pairs are summed over if left out
    verdicts: bool = False                                    # the oracle answers 0 or 1
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """An algorithm's policies (T + 1, X, V) and what they are worth, means over prompts (T + 1)."""
    name: str
    policies: Tensor
    gap: Tensor                                               # duality gap with the KL
    exploitability: Tensor                                    # what the best opponent wins above 1/2, without a KL
    distance: Tensor | None                                   # KL(equilibrium || policy), where the equilibrium is known


@dataclass(frozen=True)
class Played:
    plan: Plan
    game: Game
    equilibrium: Tensor | None                                # with the KL; None where the game is too large to solve
    nash: Tensor | None                                       # without
    runs: list[Run]


def load(path: str | Path) -> Plan:
    """The game file, or a ValueError that lists every problem."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no game file {str(path)!r}: give a YAML file, for instance one with the line `game: rps`")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a game file holds keys ({', '.join(Plan.model_fields)}), found {type(raw).__name__}")
    if isinstance(raw.get("payoff"), str):
        raw["payoff"] = str(path.parent / raw["payoff"])
    try:
        return Plan(**raw)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(map(problem, error.errors()))) from None


def problem(found: Mapping) -> str:
    key = ".".join(str(k) for k in found["loc"][:1])
    if found["type"] == "extra_forbidden":
        return f"{key}: no such setting{nearest(key, Plan.model_fields)}; settings: {', '.join(Plan.model_fields)}"
    return f"{key}: {found['msg']}, found {found['input']!r}"


def game_of(plan: Plan) -> Game:
    if (plan.game is None) == (plan.payoff is None):
        raise ValueError(f"give either `game`, one of {', '.join(library.__all__)}, or `payoff`, a matrix of P(i beats j) or a "
                         f"CSV file of it")
    if plan.game is not None:
        found = from_spec(plan.game, "prefopt.games.library")()
    else:
        found = game.from_file(plan.payoff) if isinstance(plan.payoff, str) else Game(plan.payoff, name="the payoff given")
    reference = found.reference if plan.reference is None else None if plan.reference == "uniform" else plan.reference
    return Game(found.payoff, reference, actions=plan.actions or found.actions, name=found.name)


def algorithm_of(spec: str | dict, here: Game, beta: float):
    """An algorithm by name with its settings; beta is the game's unless it is set."""
    make = from_spec(spec, "prefopt.games.algorithms")
    return make(here, **({"beta": beta} if "beta" in hyperparameters(make) and "beta" not in settings_of(spec)[1] else {}))


def settings_of(spec: str | dict) -> tuple[str, dict]:
    if isinstance(spec, str):
        return spec, {}
    (name, settings), = spec.items()
    return name, settings or {}


def shown(spec: str | dict) -> str:
    """An algorithm with its settings, in words.

    >>> shown({"nash_md": {"eta": 0.1}})
    'nash_md eta=0.1'
    """
    name, settings = settings_of(spec)
    return " ".join([name, *(f"{k}={v}" for k, v in settings.items())])


def run(plan: Plan) -> Played:
    """Plays every algorithm of the plan."""
    here = game_of(plan)
    solved = plan.samples is None or here.items <= game.LARGEST
    equilibrium, nash = (solve.equilibrium(here, plan.beta), solve.nash(here)) if solved else (None, None)
    made = {shown(spec): algorithm_of(spec, here, plan.beta) for spec in plan.algorithms}
    if len(made) < len(plan.algorithms):
        raise ValueError(f"algorithms: one is named twice with the same settings: {', '.join(map(shown, plan.algorithms))}")
    start = game.checked_reference(plan.start, here.prompts, here.items) if plan.start else None
    found = []
    for name, algorithm in made.items():
        logp = play(here, algorithm, iterations=plan.iterations, start=start, samples=plan.samples, verdicts=plan.verdicts,
                    seed=plan.seed)
        policies = logp.exp()
        distance = solve.kl(equilibrium, policies).mean(-1) if solved else None
        found.append(Run(name, policies, solve.regularised_gap(here, policies, plan.beta).mean(-1),
                         solve.exploitability(here, policies).mean(-1), distance))
    return Played(plan, here, equilibrium, nash, found)


def iterations_shown(last: int) -> list[int]:
    """0, 1, 2, 5, 10, ... and the last.

    >>> iterations_shown(30)
    [0, 1, 2, 5, 10, 20, 30]
    """
    return sorted({n for n in (0, *(m * 10 ** k for k in range(6) for m in (1, 2, 5))) if n < last} | {last})


def record(played: Played) -> dict:
    """What was played, as plain JSON: every iteration of every algorithm."""
    listed = lambda tensor: None if tensor is None else tensor.tolist()
    return {"game": played.game.name, "payoff": played.game.payoff.tolist(), "actions": played.game.actions,
            "reference": played.game.reference.tolist(), "beta": played.plan.beta, "equilibrium": listed(played.equilibrium),
            "nash": listed(played.nash),
            "algorithms": {r.name: {"gap": r.gap.tolist(), "exploitability": r.exploitability.tolist(),
                                    "kl_from_equilibrium": listed(r.distance), "policies": r.policies.tolist()}
                           for r in played.runs}}


def table(runs: Sequence[Run], key: str) -> list[list[str]]:
    """A line of text cells per shown iteration."""
    rows = iterations_shown(len(runs[0].gap) - 1)
    return [[str(t), *(f"{max(float(getattr(r, key)[t]), 0.0):.3g}" for r in runs)] for t in rows]
