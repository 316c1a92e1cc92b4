"""Rollouts for people: a bounded sample of steps and groups, every response with its tokens and what is known of each."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.records import Group, Response
from prefopt.report.folders import RunFolder, decoder, pieces, rollout_files, rollouts

__all__ = ["MEASURES", "Measure", "Sizes", "at", "facts", "mean_reward", "prompt_text", "response", "sample", "shown", "spread",
           "values"]


class Measure(NamedTuple):
    title: str
    words: str
    least: float                                              # distance from 0 at which the colour is full, at least
    signed: bool = True


MEASURES = {
    "advantage": Measure("advantage", "What the update pushes a token up (blue) or down (orange) by.", 1e-3),
    "log_ratio": Measure("trainer against sampler", "Log-ratio of what trainer and sampler think of a token; 0 where they agree.",
                         1e-2),
    "reference": Measure("against the reference", "Log-ratio of sampler and reference: where the policy has moved, up (blue) or "
                                                  "down (orange).", 0.05),
    "logp": Measure("log-probability", "Of the sampler: the less likely a token was, the darker.", 1.0, signed=False)}


class Sizes(NamedTuple):
    """How much is shown: steps, groups of a step, responses of a group (best and worst), tokens of a response (its beginning
    and end), prompts that are followed over steps, and bytes that are read to find those."""
    steps: int = 6
    groups: int = 6
    responses: int = 8
    tokens: int = 300
    followed: int = 4
    read: int = 256 * 2 ** 20


# ------------------------------------------------------------------------------------------------------------- numbers
def reward(row: Response) -> float | None:
    value = row.scores.get("reward")
    return value if value is not None and math.isfinite(value) else None


def known_rewards(group: Group) -> list[float]:
    return [reward(r) for r in group.responses if r.train and reward(r) is not None]


def mean_reward(group: Group) -> float | None:
    known = known_rewards(group)
    return math.fsum(known) / len(known) if known else None


def spread(group: Group) -> float:
    """Largest less smallest reward."""
    known = known_rewards(group) or [0.0]
    return max(known) - min(known)


def values(row: Response, place: str = "") -> dict[str, list[float | None]]:
    """What is known of each token, by the keys of MEASURES."""
    count, trace = len(row.tokens or ()), row.meta.get("trace") or {}
    found = {"advantage": trace.get("advantage"), "log_ratio": trace.get("log_ratio"), "logp": row.logp}
    if trace.get("logp_ref") and row.logp:
        both = zip(row.logp, trace["logp_ref"], strict=False)
        found["reference"] = [None if a is None or b is None else a - b for a, b in both]
    for key, numbers in found.items():
        if numbers is not None and len(numbers) != count:
            raise ValueError(f"{place}: a response has {count} tokens and {len(numbers)} numbers of {key}: this dump is broken, "
                             f"delete it or copy it again")
    finite = lambda v: None if v is None or not math.isfinite(v) else v
    return {key: [finite(v) for v in found[key]] for key in MEASURES if found.get(key)}


def facts(groups: Sequence[Group]) -> dict[str, float]:
    """The metrics of all these groups, as training measures them."""
    from prefopt.rollout.sources import measured
    return measured(groups)


def prompt_text(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    said = lambda m: m["content"] if isinstance(m.get("content"), str) else json.dumps(m)
    return "\n".join(f"{m.get('role', '')}: {said(m)}" for m in prompt)


# -------------------------------------------------------------------------------------------------------------- sample
def sample(run: RunFolder, sizes: Sizes = Sizes()) -> dict:
    """{"steps": how many were dumped, "views": [{"title", "facts", "groups", "of"}]}: steps from the first to the last, and
    some prompts at all the steps that met them."""
    files = rollout_files(run.path)
    decode = decoder(run) if files else None
    views = []
    for step in evenly(list(files), sizes.steps):
        groups = rollouts(files[step])
        chosen = [groups[n] for n in evenly(ranked(groups), sizes.groups)]
        views.append({"title": f"step {step}", "facts": facts(groups), "of": len(groups),
                      "groups": [shown(g, step, decode, sizes) for g in chosen]})
    again = [shown(g, step, decode, sizes) for step, g in followed(files, sizes)]
    if again:
        views.append({"title": "the same prompts over time", "facts": {}, "of": len(again), "groups": again})
    return {"steps": len(files), "views": views, "tokens": decode is not None}


def evenly(things: Sequence, count: int) -> list:
    """At most `count` of them, the first and the last included.

    >>> evenly([1, 2, 3, 4, 5], 3), evenly([1, 2], 3), evenly([1, 2], 1)
    ([1, 3, 5], [1, 2], [2])
    """
    if len(things) <= count:
        return list(things)
    return [things[round((k + 1) * (len(things) - 1) / count)] if count == 1 else
            things[round(k * (len(things) - 1) / (count - 1))] for k in range(count)]


def ranked(groups: Sequence[Group]) -> list[int]:
    """Places of the groups by mean reward, the best first; those without one are last."""
    return sorted(range(len(groups)), key=lambda n: -math.inf if mean_reward(groups[n]) is None else mean_reward(groups[n]),
                  reverse=True)


def followed(files: dict[int, list[Path]], sizes: Sizes) -> list[tuple[int, Group]]:
    """The prompts that most steps met, at as many of these as there is place for, among evenly spaced steps whose files
    `sizes.read` bytes hold."""
    total = sum(f.stat().st_size for some in files.values() for f in some)
    seen: dict[str, dict[int, tuple[Path, int]]] = {}
    for step in evenly(list(files), max(2, int(len(files) * min(1.0, sizes.read / max(total, 1))))):
        for file in files[step]:
            at = 0
            with file.open("rb") as opened:
                for line in opened:
                    seen.setdefault(prompt_of(line.decode("utf-8")), {})[step] = file, at
                    at += len(line)
    often = sorted((p for p in seen if len(seen[p]) > 1), key=lambda p: -len(seen[p]))[:sizes.followed]
    found = []
    for prompt in often:
        for step in evenly(sorted(seen[prompt]), 4):
            file, at = seen[prompt][step]
            with file.open("rb") as opened:
                opened.seek(at)
                found.append((step, Group.from_json(json.loads(opened.readline()))))
    return found


def prompt_of(line: str) -> str:
    """The prompt of a dumped group, without reading all of it."""
    start = '{"prompt": '
    prompt = json.JSONDecoder().raw_decode(line, len(start))[0] if line.startswith(start) else json.loads(line)["prompt"]
    return prompt_text(prompt)


def shown(group: Group, step: int, decode: Callable | None, sizes: Sizes) -> dict:
    """A group, with what was sampled several times in one place."""
    same: dict[str, list[int]] = {}
    for n, r in enumerate(group.responses):
        same.setdefault(repr((r.tokens, r.text, r.scores, r.train)), []).append(n)
    rows = [(group.responses[ns[0]], ns) for ns in same.values()]
    rows.sort(key=lambda item: -math.inf if reward(item[0]) is None else reward(item[0]), reverse=True)
    kept = rows if len(rows) <= sizes.responses else [*rows[:-(-sizes.responses // 2)], *rows[-(sizes.responses // 2):]]
    prompt = prompt_text(group.prompt)
    prompt = prompt if len(prompt) <= 6000 else f"{prompt[:3000]} [...] {prompt[-3000:]}"
    return {"step": step, "prompt": prompt,
            "mean": mean_reward(group), "spread": spread(group), "of": len(group.responses), "distinct": len(rows),
            "replayed": bool(group.meta.get("replayed")),
            "rows": [{"n": ns, **response(r, decode, sizes.tokens, f"step {step}")} for r, ns in kept]}


def response(row: Response, decode: Callable | None, limit: int, place: str = "") -> dict:
    """A response with texts of tokens and rounded numbers; of a long one its beginning and its end."""
    ids, notes = row.tokens or [], []
    if not row.meta.get("finished", True):
        notes.append({"length": "truncated"}.get(row.meta.get("stopped"), f"not finished: {row.meta.get('stopped', 'cut')}"))
    notes += ["no reward"] * (reward(row) is None)
    notes += [str(row.meta["error"])] if row.meta.get("error") else []
    notes += [f"{row.meta.get('probe', 'probe')} probe, does not train"] if not row.train else []
    out = {"reward": reward(row), "length": len(ids), "notes": notes,
           "scores": {k: v for k, v in row.scores.items() if k != "reward"}}
    if decode is None or not ids:
        text = prompt_text(row.text)
        return out | {"text": text if len(text) <= 6 * limit else f"{text[:4 * limit]} [...] {text[-2 * limit:]}"}
    head = len(ids) if len(ids) <= limit else 2 * limit // 3
    tail = max(head, len(ids) - (limit - head)) if head < len(ids) else head
    places = [*range(head), *range(tail, len(ids))]
    out |= {"pieces": pieces(ids[:head], decode) + pieces(ids[tail:], decode), "head": head, "left": tail - head,
            "values": {key: compact([found[n] for n in places]) for key, found in values(row, place).items()}}
    mask = row.meta.get("mask")
    return out | ({"mask": [mask[n] for n in places]} if mask and not all(mask) else {})


def at(row: dict, key: str, n: int) -> float | None:
    """The number of token n in a record of `response`; None where there is none."""
    found = row.get("values", {}).get(key)
    return found[n] if isinstance(found, list) else found


def compact(numbers: Iterable[float | None]) -> list | float | None:
    """Numbers to three digits; one where all are the same."""
    found = [None if v is None else float(f"{v:.3g}") for v in numbers]
    return found[0] if len(set(found)) == 1 else found
