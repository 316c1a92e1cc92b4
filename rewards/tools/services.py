"""Weather and translation, asked of a service over HTTP: a JSON question posted to an address, a JSON answer.

The service is the user's; a table of recorded answers stands for it in tests (`recorded`).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

from rewards.base import ScoringError
from rewards.tools import Tool, ToolError
from rewards.tools.calendar import day, two
from rewards.web import post

__all__ = ["history_weather", "http", "recorded", "translate"]

Ask = Callable[[dict], dict]


def http(url: str, *, secret: Mapping[str, str] | None = None, timeout: float = 10.0, retries: int = 2) -> Ask:
    """Questions to a service; one that cannot be reached is `Unreachable`."""
    return lambda question: post(url, question, secret=secret, timeout=timeout, retries=retries)


def recorded(answers: Mapping[tuple, str]) -> Ask:
    """Answers by the values of the question, {("Riyadh", "2023-05-07"): "Sunny"}."""
    def ask(question: dict) -> dict:
        key = tuple(question.values())
        return {"text": answers[key]} if key in answers else {"error": f"nothing is known of {', '.join(key)}"}
    return ask


def text_of(answer: object) -> str:
    """The service's text, or its error as the model's."""
    if isinstance(answer, Mapping) and isinstance(answer.get("text"), str):
        return answer["text"]
    if isinstance(answer, Mapping) and isinstance(answer.get("error"), str):
        raise ToolError(answer["error"])
    raise ScoringError(f"the service answers {str(answer)[:100]!r}: it should be {{\"text\": ...}} or {{\"error\": ...}}")


def history_weather(ask: Ask) -> Tool:
    """
    >>> history_weather(recorded({("Riyadh", "2023-05-07"): "Partly cloudy"})).function("Riyadh, 2023-05-07")
    'Partly cloudy'
    """
    def weather(text: str) -> str:
        place, when = two(text)
        if not place.strip():
            raise ToolError("the place is missing")
        return text_of(ask({"place": place.strip(), "date": str(day(when))}))
    return Tool("history_weather", "The weather at a place on a day.", "a place and a date, as in Riyadh, 2023-05-07", weather)


def translate(ask: Ask, *, target: str = "en") -> Tool:
    """
    >>> translate(recorded({("Hallo", "en"): "Hello"})).function("Hallo")
    'Hello'
    """
    def translator(text: str) -> str:
        if not text:
            raise ToolError("there is nothing to translate")
        return text_of(ask({"text": text, "target": target}))
    return Tool("translate", "Translates a text into English." if target == "en" else f"Translates a text into {target}.",
                "a text", translator)
