"""Every reward by name: where it lives, and how a name with arguments becomes a reward.

Three kinds of thing are named: a function of one row, a class of rewards, and a function that builds a reward from plain
settings. What a function is can be read from what it says it returns: `-> Reward` or `-> Comparison` builds one. A folder
or a hub id is a trained reward model.
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from data_tools.columns import nearest
from prefopt import parts

__all__ = ["WHERE", "describe", "find"]

WHERE = {
    "trained": "rewards.trained:load", "tool_augmented": "rewards.tool_augmented:load",
    "final_answer": "rewards.verifiable:final_answer", "math_equal": "rewards.verifiable:math_equal",
    "choice": "rewards.verifiable:choice", "choice_share": "rewards.verifiable:choice_share",
    "has_boxed": "rewards.verifiable:has_boxed", "tags_once": "rewards.verifiable:tags_once",
    "is_json": "rewards.verifiable:is_json", "is_tool_call": "rewards.verifiable:is_tool_call",
    "unit_tests": "rewards.verifiable:unit_tests", "passed_share": "rewards.verifiable:passed_share",
    "bleu": "rewards.overlap:bleu", "rouge_1": "rewards.overlap:rouge_1", "rouge_2": "rewards.overlap:rouge_2",
    "rouge_l": "rewards.overlap:rouge_l", "bleu_rouge": "rewards.overlap:bleu_rouge", "chrf": "rewards.overlap:chrf",
    "density_ratio": "rewards.density_ratio:density_ratio",
    "r3": "rewards.relevance:R3", "apc": "rewards.persona:APC",
    "judge": "rewards.judge:judge", "panel": "rewards.judge:panel", "rating": "rewards.judge:rating",
    "weighted": "rewards.combine:weighted", "tiers": "rewards.combine:tiers", "ensemble": "rewards.combine:ensemble",
    "chosen": "rewards.combine:chosen",
    "calibrated": "rewards.calibrate:calibrated", "timed": "rewards.cached:timed", "remote": "rewards.serve:remote",
    "trl": "rewards.trl:from_trl",
    "bradley_terry": "rewards.oracles:bradley_terry", "game": "rewards.oracles:game",
    "preference": "rewards.oracles:preference",
}


def find(spec: object) -> Callable:
    """A reward, comparison or row function from 'name', 'module:attribute', folder, hub id, or {one of these: {argument: value}}.

    >>> find({"bleu": {"smooth_from": None}}).keywords
    {'smooth_from': None}
    """
    name, thing, arguments = resolved(spec)
    if hasattr(thing, "settings") and not inspect.isclass(thing):                # a reward that is made already
        return thing
    if kind(thing) != "row function":
        return thing(**arguments)
    return partial(thing, **arguments) if arguments else thing


def resolved(spec: object) -> tuple[str, Callable, Mapping]:
    """Name, function or class, and arguments of a spec, checked against the signature; nothing is made."""
    if isinstance(spec, Mapping) and len(spec) == 1:
        (name, arguments), = spec.items()
    else:
        name, arguments = spec, None
    if not isinstance(name, str) or not isinstance(arguments, (Mapping, type(None))):
        raise ValueError(f"a reward is written as 'name', 'module:name' or {{name: {{argument: value}}}}, found {spec!r}")
    if name not in WHERE and (Path(name).is_dir() or "/" in name and ":" not in name):
        return resolved({"trained": {"name": name, **(arguments or {})}})
    if ":" not in name and name not in WHERE:
        raise ValueError(f"there is no reward {name!r}{nearest(name, WHERE)}; rewards: {', '.join(WHERE)}, or 'module:name'")
    thing = parts.find(WHERE.get(name, name), "")
    if not callable(thing) and not hasattr(thing, "compare"):
        raise ValueError(f"{name!r} is neither a function nor a reward, but {thing!r:.80}")
    if hasattr(thing, "settings") and not inspect.isclass(thing):                # a reward that is made already
        if arguments:
            raise ValueError(f"{name!r} is a reward that is made already, so it takes no arguments, found {dict(arguments)}")
        return name, thing, {}
    accepts, arguments = signature(thing), arguments or {}
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(thing).parameters.values()):
        for argument in arguments:
            if argument not in accepts:
                raise ValueError(f"reward {name!r} has no argument {argument!r}{nearest(argument, accepts)}; "
                                 f"arguments: {', '.join(accepts) or 'none'}")
    missing = [k for k, default in accepts.items() if default is inspect.Parameter.empty and k not in arguments]
    if missing:
        raise ValueError(f"reward {name!r} needs {', '.join(missing)}: write {{{name}: {{{missing[0]}: ...}}}}")
    return name, thing, arguments


def kind(thing: Callable) -> str:
    """'class', 'builder' or 'row function'."""
    if inspect.isclass(thing):
        return "class"
    returns = inspect.get_annotations(thing).get("return", "") if inspect.isroutine(thing) else ""
    return "builder" if re.search(r"(Reward|Comparison)\b", str(returns)) else "row function"


def signature(thing: Callable) -> dict[str, object]:
    """The arguments that may be given, with their defaults."""
    found = inspect.signature(thing).parameters.values()
    wanted = [p for p in found if p.kind is not p.VAR_KEYWORD and (kind(thing) != "row function" or p.kind is p.KEYWORD_ONLY)]
    return {p.name: p.default for p in wanted}


def describe(name: str) -> dict:
    """What a reward is, reads and takes, for listings: {"name", "kind", "summary", "reads", "arguments"}."""
    thing = parts.find(WHERE[name], "")
    row = kind(thing) == "row function"
    reads = [p.name for p in inspect.signature(thing).parameters.values() if row and p.kind is not p.KEYWORD_ONLY]
    return {"name": name, "kind": kind(thing), "summary": (inspect.getdoc(thing) or "").split("\n")[0], "reads": reads,
            "arguments": {k: None if v is inspect.Parameter.empty else v for k, v in signature(thing).items()}}
