"""Scores as probabilities: temperature and isotonic calibration against labels, reliability, corrected intercepts.

A calibration is plain JSON ({"temperature": T} or {"isotonic": {"x": [...], "y": [...]}}), so it is saved beside a model.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.fields import shorten
from rewards.base import Reward, Row, ScoringError, as_reward

__all__ = ["Calibrated", "apply", "calibrated", "corrected_logit", "ece", "isotonic", "load", "p_love", "reliability", "save",
           "temperature"]


def checked(scores: Sequence[float], labels: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(scores, dtype=float), np.asarray(labels, dtype=float)
    if x.shape != y.shape or not x.size or not np.isfinite(x).all() or not ((y >= 0) & (y <= 1)).all():
        raise ValueError(f"calibration needs as many finite scores as labels in [0, 1], found {x.size} scores and {y.size} "
                         "labels")
    return x, y


def temperature(scores: Sequence[float], labels: Sequence[float]) -> dict:
    """The T that minimises the log-loss of sigmoid(score / T) against labels in [0, 1].

    scores      logits, or the margins of pairs (label 1: the first is preferred)
    Edge        labels that the scores separate, or contradict throughout, have no best T: an error
    Relations   ranks stay as they are; a score of 0 stays 1/2
    Reference   Guo et al., arXiv:1706.04599

    >>> round(temperature([2.0, 2.0, 2.0, 2.0], [1, 1, 1, 0])["temperature"], 9) == round(2 / math.log(3), 9)   # sigmoid = 3/4
    True
    """
    from scipy.optimize import brentq
    from scipy.special import expit
    x, y = checked(scores, labels)
    size = np.abs(x).max()
    slope = lambda b: float((x / size * (expit(b * x / size) - y)).sum())                        # of the log-loss in b = size/T
    why = "tell nothing" if not size else "rise against the labels" if slope(0.0) >= 0 else \
        "separate the labels" if (x * (2 * y - 1) == np.abs(x)).all() else ""
    if why:
        raise ValueError(f"no temperature fits: the {x.size} scores {why}. Calibrate on other or more data")
    high = 1.0
    while slope(high) < 0:
        high *= 2
    return {"temperature": float(size / brentq(slope, 0.0, high, xtol=1e-14))}


def isotonic(scores: Sequence[float], labels: Sequence[float]) -> dict:
    """The rising step function nearest to the labels in squares (scikit-learn), linear between its knots, flat outside.

    >>> isotonic([1.0, 2.0, 3.0], [0, 1, 0])
    {'isotonic': {'x': [1.0, 2.0, 3.0], 'y': [0.0, 0.5, 0.5]}}
    """
    from sklearn.isotonic import IsotonicRegression
    x, y = checked(scores, labels)
    fitted = IsotonicRegression(y_min=0, y_max=1).fit(x, y)
    return {"isotonic": {"x": fitted.X_thresholds_.tolist(), "y": fitted.y_thresholds_.tolist()}}


def apply(calibration: Mapping, score: float) -> float:
    """The probability that a calibration makes of a score.

    >>> apply({"temperature": 2.0}, 0.0), apply({"isotonic": {"x": [0.0, 1.0], "y": [0.2, 0.6]}}, 0.5)
    (0.5, 0.4)
    """
    if "temperature" in calibration:
        return p_love(score / calibration["temperature"])
    return float(np.interp(score, calibration["isotonic"]["x"], calibration["isotonic"]["y"]))


def reliability(probabilities: Sequence[float], labels: Sequence[float], *, bins: int = 15) -> list[dict]:
    """Mean probability, mean label and number in each of `bins` equally wide bins; empty ones are left out.

    >>> reliability([0.1, 0.3, 0.9], [0, 1, 1], bins=2)
    [{'probability': 0.2, 'label': 0.5, 'n': 2}, {'probability': 0.9, 'label': 1.0, 'n': 1}]
    """
    p, y = checked(probabilities, labels)
    place = np.minimum((p * bins).astype(int), bins - 1)
    return [{"probability": float(p[place == b].mean()), "label": float(y[place == b].mean()), "n": int((place == b).sum())}
            for b in np.unique(place)]


def ece(probabilities: Sequence[float], labels: Sequence[float], *, bins: int = 15) -> float:
    """Expected calibration error: mean |probability - label| of equally wide bins, weighted by their numbers.

    >>> round(ece([0.1, 0.3, 0.9], [0, 1, 1], bins=2), 12)               # (2 |0.2 - 0.5| + |0.9 - 1|) / 3
    0.233333333333
    """
    found = reliability(probabilities, labels, bins=bins)
    return sum(b["n"] * abs(b["probability"] - b["label"]) for b in found) / sum(b["n"] for b in found)


# ------------------------------------------------------------------------------------------------------ binary feedback
def corrected_logit(logit: float, *, rate: float) -> float:
    """The logit at the true base rate of a model that was trained on all positives and a share of the negatives.

    logit(p) = f + log rate

    rate        share of the negatives kept, in (0, 1]
    Relations   odds in training are 1 / rate times the true ones; 1 changes nothing
    Reference   P[Love], Reinforcement Learning from User Feedback, 2025 (reconstructed)

    >>> round(p_love(0.0, rate=0.25), 12)                # 1 : 1 in training was 1 : 4 in truth
    0.2
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate, the share of negatives that training kept, lies in (0, 1], found {rate}")
    return logit + math.log(rate)


def p_love(logit: float, *, rate: float = 1.0) -> float:
    """sigmoid of the corrected logit: the probability of a positive reaction."""
    z = corrected_logit(logit, rate=rate)
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


# ---------------------------------------------------------------------------------------------------------------- reward
def save(calibration: Mapping, path) -> None:
    Path(path).write_text(json.dumps(calibration), encoding="utf-8")


def load(path) -> dict:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.keys() not in ({"temperature"}, {"isotonic"}):
        raise ValueError(f"{path}: no calibration, which is {{temperature: T}} or {{isotonic: {{x: [...], y: [...]}}}}, "
                         f"found {shorten(found)}")
    return found


@dataclass(frozen=True)
class Calibrated:
    """A reward whose scores go through a calibration."""
    reward: Reward
    calibration: Mapping

    @property
    def name(self) -> str:
        return self.reward.name

    def settings(self) -> dict:
        return {"reward": self.reward.settings(), "calibration": dict(self.calibration)}

    def __call__(self, rows: Sequence[Row]) -> list[float | ScoringError]:
        return [s if isinstance(s, ScoringError) else apply(self.calibration, s) for s in self.reward(rows)]


def calibrated(*, reward: object, file: str) -> Reward:
    """A reward, as `rewards.index.find` takes it, with the calibration of a file."""
    from rewards.index import find
    return Calibrated(as_reward(find(reward)), load(file))
