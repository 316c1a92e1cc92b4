"""Tables of abilities and difficulties, with 95 % intervals, from a file: a response matrix, or games.

A response matrix has a row for each subject: its name, then the share of right answers to each item, a number in [0, 1], or
nothing. Games have the columns player, opponent, score (the player's, in [0, 1]) and, where there are several, period.
"""
from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools import files
from data_tools.columns import nearest
from data_tools.difficulty import WIDTH, Fit, glicko, one_parameter, ratings, two_parameter
from data_tools.fields import DataError

__all__ = ["BY", "Matrix", "load", "save", "table", "told"]

GAME = ("player", "opponent", "score")
Row = dict[str, object]


class Matrix(NamedTuple):
    """Shares of right answers (subjects, items), NaN where there is none."""
    subjects: list[str]
    items: list[str]
    responses: np.ndarray


# -------------------------------------------------------------------------------------------------------------- reading
def load(path: str | Path, *, transpose: bool = False) -> Matrix | list[list[tuple[str, str, float]]]:
    """A response matrix or, where the columns are those of games, the games of each period in order.

    transpose   the rows of the matrix are items, and its columns subjects
    """
    found = [one for source in files.resolve(path) for one in source.records()]
    for _, record in found:
        if isinstance(record, DataError):
            raise record
    columns = list(dict.fromkeys(key for _, record in found for key in record))
    if set(GAME) <= set(columns):
        return periods(found)
    if len(columns) < 2:
        raise ValueError(f"{path} holds no numbers: a response matrix has a row for each subject and, behind its name, a column "
                         f"for each item; games have the columns {', '.join(GAME)}")
    first, *items = columns
    cells = [[np.nan if record.get(item) in ("", None) else number(place, record, item) for item in items]
             for place, record in found]
    subjects: dict[str, None] = {}
    for place, record in found:
        name = str(record.get(first, ""))
        if name in subjects or not name:
            raise ValueError(f"{place}: the name {name!r} (column {first!r}) {'comes twice' if name else 'is empty'}: each row "
                             "is a subject of its own")
        subjects[name] = None
    responses = np.array(cells)
    return Matrix(items, list(subjects), responses.T) if transpose else Matrix(list(subjects), items, responses)


def periods(found: Sequence[files.Located]) -> list[list[tuple[str, str, float]]]:
    """The games of each period."""
    out: dict[float, list] = defaultdict(list)
    for place, record in found:
        if lost := [key for key in GAME if record.get(key) in ("", None)]:
            raise ValueError(f"{place}: the game has no {lost[0]}; a game has {', '.join(GAME)}")
        period = number(place, record, "period", share=False) if record.get("period") not in ("", None) else 0.0
        out[period].append((str(record["player"]), str(record["opponent"]), number(place, record, "score")))
    return [games for _, games in sorted(out.items())]


def number(place: str, record: Mapping, column: str, *, share: bool = True) -> float:
    try:
        found = float(record[column])
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found) or share and not 0 <= found <= 1:
        raise ValueError(f"{place}: {column} is {str(record[column])[:40]!r}, and should be a number{' from 0 to 1' * share}")
    return found


# ------------------------------------------------------------------------------------------------------------ the table
def rows_of(kind: str, names: Sequence[str], estimates: Sequence[float], errors: Sequence[float], answers: Sequence[float],
            shares: Sequence[float]) -> list[Row]:
    """The strongest, or hardest, first."""
    found = [{"kind": kind, "name": name, "estimate": float(x), "low": float(x - WIDTH * e), "high": float(x + WIDTH * e),
              "answers": int(n), "share": float(s) if n else None}
             for name, x, e, n, s in zip(names, estimates, errors, answers, shares, strict=True)]
    return sorted(found, key=lambda row: -row["estimate"])


def both(data: Matrix, able: Sequence[Sequence[float]], hard: Sequence[Sequence[float]]) -> list[Row]:
    """Rows of the subjects, then of the items, from estimates with their standard errors."""
    known, right = ~np.isnan(data.responses), np.nan_to_num(data.responses)
    out = []
    for kind, names, found, axis in (("subject", data.subjects, able, 1), ("item", data.items, hard, 0)):
        answers = known.sum(axis)
        out += rows_of(kind, names, *found, answers, right.sum(axis) / np.maximum(answers, 1))
    return out


def fitted(data: Matrix, fit: Fit) -> list[Row]:
    return both(data, (fit.ability, fit.ability_error), (fit.difficulty, fit.difficulty_error))


def by_irt(data: Matrix) -> list[Row]:
    return fitted(data, one_parameter(data.responses))


def by_irt_2pl(data: Matrix) -> list[Row]:
    fit = two_parameter(data.responses)
    slopes = {name: {key: float(np.exp(s + k * WIDTH * e)) for key, k in (("slope", 0), ("slope_low", -1), ("slope_high", 1))}
              for name, s, e in zip(data.items, fit.log_slope, fit.log_slope_error, strict=True)}
    return [row | slopes[row["name"]] if row["kind"] == "item" else row for row in fitted(data, fit)]


def by_glicko(data: Matrix | list) -> list[Row]:
    if isinstance(data, Matrix):
        return both(data, *(list(zip(*side, strict=True))[:2] for side in glicko(data.responses)))
    found, scores = ratings(data), {}
    for player, other, score in (game for games in data for game in games):
        scores.setdefault(player, []).append(score)
        scores.setdefault(other, []).append(1 - score)
    return rows_of("player", list(found), [r.rating for r in found.values()], [r.deviation for r in found.values()],
                   [len(scores[name]) for name in found], [np.mean(scores[name]) for name in found])


BY: dict[str, Callable[..., list[Row]]] = {"irt": by_irt, "irt_2pl": by_irt_2pl, "glicko": by_glicko}


def table(data: Matrix | list, *, by: str | None = None) -> list[Row]:
    """A row for each subject and item, or player: estimate with its 95 % interval, answers and share of right ones.

    by      "irt" (`difficulty.one_parameter`), "irt_2pl" (`two_parameter`, with slopes) or "glicko" (`glicko`, `ratings`); None:
            irt of a matrix, glicko of games
    """
    matrix = isinstance(data, Matrix)
    by = by or ("irt" if matrix else "glicko")
    if by not in BY:
        raise ValueError(f"by is one of {', '.join(BY)}, found {by!r}{nearest(by, BY)}")
    if not matrix and by != "glicko":
        raise ValueError(f"games have players and no items, so that {by!r} cannot be fitted: leave it out, or give a response "
                         "matrix")
    return BY[by](data)


def told(rows: Sequence[Row]) -> list[str]:
    """What a table says at a glance: of each kind how many, from where to where, and how far their differences are real.

    reliability = V / (V + mean error^2),   V the variance of the estimates
    """
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        spread = np.var([row["estimate"] for row in own])
        error = np.mean([((row["high"] - row["low"]) / 2 / WIDTH) ** 2 for row in own])
        lines.append(f"{len(own):,} {kind}s from {own[-1]['estimate']:.4g} to {own[0]['estimate']:.4g}, reliability "
                     f"{spread / (spread + error):.2f}")
    return lines


def save(rows: Sequence[Row], path: str | Path) -> None:
    """Write a table: .csv, or what `data_tools.files.write` takes."""
    path = Path(path)
    if path.suffix != ".csv":
        files.write(rows, path)
        return
    with files.part(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
