"""Findings: what a check says, as data. And errors as sentences."""
from __future__ import annotations

import os
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_tools.columns import nearest


class Finding(NamedTuple):
    """`level` is ok, missing (and not needed), warning or error."""
    level: str
    topic: str
    text: str


ok, missing, warning, error = (partial(Finding, level) for level in ("ok", "missing", "warning", "error"))
TELLING = (ValueError, OSError, KeyError, ImportError, FloatingPointError)      # whose messages are sentences


def sentence(problem: BaseException) -> str:
    """An exception as one paragraph; its kind goes in front where the message alone would not be understood.

    >>> sentence(ValueError("no run\\n  file")), sentence(IndexError("7")), sentence(KeyError("logp"))
    ('no run file', 'IndexError: 7', 'KeyError: logp')
    """
    text = " ".join(str(problem.args[0] if isinstance(problem, KeyError) and problem.args else problem).split())
    return text if isinstance(problem, TELLING) and " " in text else f"{type(problem).__name__}: {text}"


def attempt(topic: str, examine: Callable, *arguments) -> Generator[Finding, None, object]:
    """The findings of the generator `examine` and what it returns. What it raises is a finding, and then None is
    returned: the other checks go on, whatever goes wrong in one."""
    try:
        return (yield from examine(*arguments))
    except Exception as problem:
        yield error(topic, sentence(problem))
        return None


def exists(setting: str, name: str) -> None:
    """An error when the name of a model reads like a folder, or nearly like one that is here, and there is none."""
    path = Path(name)
    near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
    inside = path.parent.is_dir() and path.parent != Path()
    if not path.exists() and (inside or near or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{setting}: there is no folder {name!r}{near}{'' if near else '.'} Hub models are written "
                         f"owner/name, for instance Qwen/Qwen2.5-0.5B-Instruct")
