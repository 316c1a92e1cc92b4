"""What the methods claim, measured on small games: `python -m prefopt.games.study` prints the tables, in a minute.

Long runs take the updates in policy space, which the losses follow to rounding (tests/test_nash.py); noise and online IPO, whose
pairs are the policy's own, take the losses.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from prefopt.games import algorithms, exact, library, solve
from prefopt.games.game import Game
from prefopt.games.tabular import play

__all__ = ["RACES", "bias", "biased", "first_below", "noise", "path", "races", "rates", "skewed"]

RACES = (("rps", 0.1), ("weighted_rps", 0.1), ("rps", 0.01), ("weighted_rps", 0.01), ("rps_plus_dominated", 0.01))


def skewed(name: str) -> Game:
    """A game of the library with a reference whose weights fall, (3, 2, 1) / 6."""
    found = getattr(library, name)()
    return found.with_reference(list(range(found.items, 0, -1)))


def path(here: Game, update: str, iterations: int, **settings) -> Tensor:
    """Policies (iterations + 1, V) of an update in policy space, from the reference."""
    P, ref = here.payoff[0].numpy(), here.reference[0].numpy()
    found = [np.log(ref)]
    for _ in range(iterations):
        found.append(getattr(exact, update)(found[-1], P, ref, **settings))
    return torch.from_numpy(np.stack(found)).softmax(-1)


def first_below(gap: Tensor, limit: float = 1e-6) -> int | None:
    """How many updates until the gap is below the limit for the first time."""
    return next((t for t, g in enumerate(gap.tolist()) if g < limit), None)


def races(iterations: int = 4000, eta: float = 0.5) -> Iterator[tuple[str, float, dict[str, tuple[int | None, float]]]]:
    """Game, beta, and for each algorithm the updates to a gap of 1e-6 (None: never) and the last gap."""
    for name, beta in RACES:
        here = skewed(name)
        gaps = {a: solve.regularised_gap(here, path(here, a, iterations, beta=beta, eta=eta)[:, None], beta)[:, 0]
                for a in ("omd", "nash_md", "egpo")}
        own = play(here, algorithms.online_ipo(here, beta=beta), iterations=min(iterations, 1000)).exp()
        gaps["online_ipo"] = solve.regularised_gap(here, own, beta)[:, 0]
        yield name, beta, {a: (first_below(gap), float(gap[-1])) for a, gap in gaps.items()}


def rates(beta: float = 0.1, etas: Iterable[float] = (0.2, 0.5, 0.8)) -> Iterator[tuple[str, float, float, float]]:
    """Game, eta, log(1 - eta beta) as the theory has it, and the slope of EGPO's log KL from the equilibrium, fitted."""
    for name in ("rps", "weighted_rps", "rps_plus_dominated"):
        here = skewed(name)
        for eta in etas:
            distance = solve.kl(solve.equilibrium(here, beta), path(here, "egpo", 400, beta=beta, eta=eta)[:, None])[:, 0].numpy()
            inside = np.flatnonzero(distance > 1e-11)[20:]
            yield name, eta, float(np.log1p(-eta * beta)), float(np.polyfit(inside, np.log(distance[inside]), 1)[0])


def biased(here: Game, beta: float, c: float) -> Tensor:
    """Where Nash-MD stays with a constant eta beta = c: pi = softmax(log ref + P mix / beta), by damped iteration, (V)."""
    P, ref = here.payoff[0].numpy(), here.reference[0].numpy()
    theta = np.log(ref)
    for _ in range(4000):
        theta = theta + 0.05 * (np.log(ref) + P @ exact.mixed(theta, ref, c) / beta - theta)
    return torch.from_numpy(exact.policy(theta))


def bias(beta: float = 0.1, shares: Iterable[float] = (0.005, 0.01, 0.02, 0.05, 0.125, 0.5)) -> Iterator[tuple]:
    """Game, c, the largest error of a probability, the gap with the KL and the exploitability that it leaves."""
    for name in ("rps", "weighted_rps", "rps_plus_dominated"):
        here = skewed(name)
        for c in shares:
            found = biased(here, beta, c)
            yield (name, c, float((found - solve.equilibrium(here, beta)[0]).abs().max()),
                   float(solve.regularised_gap(here, found, beta)), float(solve.exploitability(here, found)))


def noise(samples: Iterable[int] = (30, 100, 300, 1000), iterations: int = 400) -> Iterator[tuple[str, int, float]]:
    """Algorithm, groups drawn per step, and the mean gap over the last third of 16 runs whose oracle answers 0 or 1."""
    one, beta = skewed("rps"), 0.1
    here = Game(one.payoff.expand(16, -1, -1), one.reference[0], name=one.name)          # prompts are runs of their own
    for name in ("egpo", "omd"):
        for count in samples:
            made = getattr(algorithms, name)(here, beta=beta, eta=0.2)
            logp = play(here, made, iterations=iterations, samples=count, verdicts=True)
            yield name, count, float(solve.regularised_gap(here, logp[-iterations // 3:].exp(), beta).mean())


def lines(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A Markdown table."""
    head = list(head)
    cells = [head, ["---"] * len(head), *([f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> None:
    print("Updates until the duality gap is below 1e-6, or the gap after 4000 (online_ipo: 1000):\n")
    order = ("omd", "online_ipo", "nash_md", "egpo")
    print(lines(["game", "beta", *order], ([name, beta, *(found[a][1] if found[a][0] is None else found[a][0] for a in order)]
                                           for name, beta, found in races())))
    print("\nSlope of log KL per update, beta 0.1:\n")
    print(lines(["game", "eta", "log(1 - eta beta)", "measured"], rates()))
    print("\nBias of Nash-MD with a constant step, beta 0.1:\n")
    print(lines(["game", "c = eta beta", "largest error", "gap", "exploitability"], bias()))
    print("\nAn oracle that answers 0 or 1, rps, beta 0.1, eta 0.2: mean gap over the last third of 16 runs:\n")
    print(lines(["algorithm", "groups per step", "gap"], noise()))


if __name__ == "__main__":
    main()
