"""Values of raw records: checked access, messages, transcripts, and the prompt that several responses share."""
from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from data_tools.columns import nearest
from data_tools.records import Message, Prompt

PLACE = "place"                                               # the reserved key of Group.meta: "file.jsonl:12"
FAILED = "failed"                                             # key of Group.meta: why a group could not be finished, or made
MARKERS = {"Human:": re.compile(r"\n\n(Human|Assistant):"), "## Human:": re.compile(r"\n## (Human|Assistant):")}
ROLES = {"Human": "user", "Assistant": "assistant", "human": "user", "gpt": "assistant", "observation": "tool"}
FLAGS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(eq=False)
class DataError(ValueError):
    """A record that cannot be used: `problem` is the kind, `message` says what was found and how to mend it, `place`
    says where it is (`file.jsonl:12`)."""
    problem: str
    message: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


def take(record: dict, *keys: str) -> tuple:
    """The values of `keys`, then a new dict of all the other keys. A missing key is an error with the nearest one.

    >>> take({"prompt": "p", "chosen": "a", "id": 7}, "prompt", "chosen")
    ('p', 'a', {'id': 7})
    """
    if not isinstance(record, dict):
        raise DataError("wrong type", f"expected an object with the keys {', '.join(keys)}, found {shorten(record)}")
    try:
        found = [record[key] for key in keys]
    except KeyError as error:
        key, spare = error.args[0], [k for k in record if k not in keys]
        raise DataError("missing key", f"the key {key!r} is missing{near(key, spare)} Keys found: "
                        f"{', '.join(map(str, record))}. Add it, or say which column plays its part with "
                        f"columns={{{key!r}: ...}}") from None
    return *found, {k: v for k, v in record.items() if k not in keys}


def near(name: str, known) -> str:
    """', did you mean ...?' or a full stop, to end a sentence of a message.

    >>> near("choosen", ["chosen", "prompt"]), near("x", ["chosen"])
    (", did you mean 'chosen'?", '.')
    """
    return nearest(name, known) or "."


def shorten(value, width: int = 60) -> str:
    """The value and its type for a message, cut to `width` characters."""
    shown = repr(value)
    return f"{shown if len(shown) <= width else shown[:width] + '...'} ({type(value).__name__})"


def text(value, name: str) -> str:
    if not isinstance(value, str):
        raise DataError("wrong type", f"{name!r} should be text, found {shorten(value)}")
    return value


def number(value, name: str) -> float:
    """A finite number, or text that spells one (csv). Booleans are not numbers."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError("label out of range", f"{name!r} should be a finite number, found {shorten(value)}")
    return found


def flag(value, name: str) -> bool:
    """True or False, also spelt 1, 0, "true" or "false" in any case."""
    known = value if isinstance(value, bool) else FLAGS.get(str(value).lower())
    if known is None:
        raise DataError("label out of range", f"{name!r} should be true or false, found {shorten(value)}")
    return known


def choice(value, name: str, values: dict):
    """`values[value]`; a value that is not among the keys is an error which lists them."""
    if isinstance(value, (str, int, float)) and value in values and not isinstance(value, bool):
        return values[value]
    raise DataError("label out of range", f"{name!r} should be one of {', '.join(map(str, values))}, "
                                          f"found {shorten(value)}")


def listed(value, name: str) -> list:
    """A list, or text that spells one in JSON (csv cells)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError("wrong type", f"{name!r} should be a list, found {shorten(value)}") from None
    if not isinstance(value, list):
        raise DataError("wrong type", f"{name!r} should be a list, found {shorten(value)}")
    return value


def message(value, name: str) -> Message:
    """A chat message. ShareGPT's `from`/`value` become `role`/`content`, its `function_call` becomes `tool_calls`."""
    if not isinstance(value, dict):
        raise DataError("wrong type", f"a message of {name!r} should be an object with 'role' and 'content', "
                                      f"found {shorten(value)}")
    if "role" in value:
        if "content" not in value and "tool_calls" not in value:
            take(value, "content")
        absent = [k for k, v in value.items() if v is None and k != "content"]      # parquet fills keys with null
        return {k: v for k, v in value.items() if k not in absent} if absent else value
    if "from" not in value:
        take(value, "role", "content")
    role, content, rest = take(value, "from", "value")
    if role != "function_call":
        return {"role": ROLES.get(role, role), "content": content, **rest}
    try:
        calls = json.loads(content)
    except (TypeError, json.JSONDecodeError):
        raise DataError("wrong type", f"a function_call of {name!r} should be JSON, found {shorten(content)}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": "assistant", "content": "", **rest,
            "tool_calls": [{"type": "function", "function": call} for call in calls]}


def messages(value, name: str) -> list[Message]:
    """A list of messages (in csv as JSON text); one message alone counts as a list of one."""
    if not isinstance(value, (dict, list, str)):
        raise DataError("wrong type", f"{name!r} should be text or a list of messages, found {shorten(value)}")
    return [message(m, name) for m in ([value] if isinstance(value, dict) else listed(value, name))]


def transcript(value: str) -> list[Message] | None:
    r"""The turns of `\n\nHuman: ...\n\nAssistant: ...` or `## Human:\n...\n\n## Assistant:\n...`, stripped.

    None when the text does not start with a human turn or has no assistant turn.

    >>> transcript("\n\nHuman: Hi\n\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    start = value[:40].lstrip()
    for marker, pattern in MARKERS.items():
        if start.startswith(marker):
            _, *parts = pattern.split("\n\n" + value.lstrip())
            turns = [{"role": ROLES[role], "content": content.strip()}
                     for role, content in zip(parts[::2], parts[1::2], strict=True)]
            return turns if any(turn["role"] == "assistant" for turn in turns) else None
    return None


def prompt(value, name: str = "prompt") -> Prompt:
    """Text or a list of messages."""
    return value if isinstance(value, str) else messages(value, name)


def plain(turns: list[Message]) -> str | list[Message]:
    """The text of one assistant message that holds nothing else, otherwise the messages themselves."""
    if len(turns) == 1 and turns[0].keys() == {"role", "content"} and turns[0]["role"] == "assistant" \
            and isinstance(turns[0]["content"], str):
        return turns[0]["content"]
    return turns


def completion(value, name: str) -> str | list[Message]:
    """A response: text, a message or a list of messages."""
    return value if isinstance(value, str) else plain(messages(value, name))


def conversation(value, name: str) -> tuple[list[Message], str | list[Message]]:
    """Prompt and response of a conversation that ends with the assistant's response."""
    turns = messages(value, name)
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError("empty response", f"{name!r} should end with an assistant message, it ends with "
                                          f"{shorten(turns[-1]['role']) if turns else 'nothing'}")
    return turns[:-1], plain(turns[-1:])


def shared(first, second) -> int:
    """How many characters (or turns) two texts (or conversations) have in common at their beginning.

    >>> shared("abcd", "abxd"), shared("", "a"), shared([1, 2], [1, 2, 3])
    (2, 0, 2)
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def divide(values: list, names: list[str]) -> tuple[Prompt, list[str | list[Message]]]:
    """The prompt that whole conversations (messages, transcripts or raw texts) share, and what is left of each.

    At least one turn is left to every response. Raw texts are cut between words, where the words begin to differ, and
    the space goes with the response.

    >>> divide(["The sky is blue.", "The sky is black."], ["chosen", "rejected"])
    ('The sky is', [' blue.', ' black.'])
    """
    turns = [transcript(v) if isinstance(v, str) else messages(v, n) for v, n in zip(values, names, strict=True)]
    if all(turns):
        same = min(min(shared(turns[0], other) for other in turns), min(map(len, turns)) - 1)
        return turns[0][:same], [plain(t[same:]) for t in turns]
    for value, name in zip(values, names, strict=True):
        text(value, name)
    same = min(shared(values[0], other) for other in values)
    head = values[0][:same]
    word = max(head.rfind(blank) for blank in " \n\t") + 1
    word -= head[word - 1:word] == " "
    return head[:word], [value[word:] for value in values]
