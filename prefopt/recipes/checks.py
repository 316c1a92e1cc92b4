"""Ranges of hyperparameters: errors that say what was found and what is allowed."""
from __future__ import annotations

from numbers import Real


def number(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or value != value:
            raise ValueError(f"{name} must be a number, found {value!r}")


def positive(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{name} must be a number greater than 0, found {value!r}")


def not_negative(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not value >= 0:
            raise ValueError(f"{name} must be a number of at least 0, found {value!r}")


def below(**values) -> None:
    """Of two values the first is the smaller one."""
    number(**values)
    (lower, low), (upper, high) = values.items()
    if not low < high:
        raise ValueError(f"{lower} must be below {upper}={high!r}, found {low!r}")


def below_half(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 0.5:
            raise ValueError(f"{name} must be in [0, 0.5), found {value!r}: at 0.5 the labels say nothing")


def share(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], found {value!r}")


def count(least: int, **values) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, found {value!r}")
