"""Dates: the day of the week, days between, the date so many days later."""
from __future__ import annotations

import re
from datetime import date, timedelta

from rewards.tools import Tool, ToolError

__all__ = ["TOOLS", "day_difference", "target_day", "week_day"]

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def day(text: str) -> date:
    try:
        return date(*map(int, re.fullmatch(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})", text.strip()).groups()))
    except (AttributeError, ValueError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise ToolError(f"{text.strip()[:40]!r} is no date of the form 2024-02-29{why}") from None


def two(text: str) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) != 2:
        raise ToolError(f"two things with a comma between them are needed, found {len(parts)}")
    return parts[0], parts[1]


def week_day(text: str) -> str:
    """
    >>> week_day("2024-02-29")
    'Thursday'
    """
    return DAYS[day(text).weekday()]


def day_difference(text: str) -> str:
    """Days between two dates, whichever is the first.

    >>> day_difference("2024-03-01, 2024-02-28"), day_difference("2023-02-28, 2023-03-01")
    ('2', '1')
    """
    first, second = two(text)
    return str(abs((day(first) - day(second)).days))


def target_day(text: str) -> str:
    """The date n days after a date; before it where n is negative.

    >>> target_day("2024-02-28, 2"), target_day("2024-03-01, -1")
    ('2024-03-01', '2024-02-29')
    """
    start, days = two(text)
    if not re.fullmatch(r"\s*[-+]?\d{1,7}\s*", days):
        raise ToolError(f"{days.strip()[:40]!r} is no number of days")
    try:
        return str(day(start) + timedelta(int(days)))
    except OverflowError:
        raise ToolError("the calendar goes from year 1 to 9999") from None


TOOLS = (Tool("Calendar.week_day", "The day of the week of a date.", "a date, as in 2024-02-29", week_day),
         Tool("Calendar.day_difference", "The number of days between two dates.", "two dates, as in 2024-01-01, 2024-02-29",
              day_difference),
         Tool("Calendar.target_day", "The date a number of days after another (before it, if negative).",
              "a date and a number of days, as in 2024-02-29, -30", target_day))
