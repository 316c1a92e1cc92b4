"""Rollouts in the terminal: the groups of a step, best and worst, with rewards and coloured tokens."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.console import Group as Block
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from data_tools.columns import nearest
from data_tools.records import Group
from prefopt.report.folders import RunFolder, decoder, load, rollout_files, rollouts
from prefopt.report.samples import MEASURES, Sizes, at, facts, mean_reward, prompt_text, shown, spread

__all__ = ["COLOURS", "SORTS", "show"]

SORTS: dict[str, Callable[[Group], float | None]] = {
    "reward": mean_reward, "contrast": spread,
    "length": lambda group: sum(len(r.tokens or ()) for r in group.responses) / len(group.responses)}
COLOURS = (*MEASURES, "none")
PICTURES = {n: 0x2400 + n for n in range(32) if chr(n) not in "\n\t"} | dict.fromkeys(range(127, 160), 0xFFFD)


def show(console: Console, folder: str | Path, *, step: int | None = None, sort: str = "reward", count: int = 4,
         colour: str = "advantage", search: str = "", sizes: Sizes = Sizes()) -> int:
    """Print a step of a run folder, the last that was dumped if none is given. Returns the step."""
    for option, value, known in (("--sort", sort, SORTS), ("--colour", colour, COLOURS)):
        if value not in known:
            raise ValueError(f"{option} {value!r} is not known{nearest(value, known)}; known: {', '.join(known)}")
    run = load(folder)
    files = rollout_files(run.path)
    if not files:
        raise ValueError(f"{run.path} holds no rollouts: it is no on-policy run, has not sampled yet, or rollout.dump is 0")
    step = max(files) if step is None else step
    if step not in files:
        near = ", ".join(map(str, sorted(sorted(files, key=lambda s: abs(s - step))[:3])))
        raise ValueError(f"{run.path} holds no rollouts of step {step}: the nearest are {near}, of {len(files)} from "
                         f"{min(files)} to {max(files)}")
    groups = rollouts(files[step])
    console.print(header(run, step, groups))
    held = [g for g in groups if search.lower() in said(g).lower()]
    value = lambda group: -math.inf if SORTS[sort](group) is None else SORTS[sort](group)
    ordered = sorted(held, key=value, reverse=True)
    top = ordered if len(ordered) <= count else ordered[:-(-count // 2)]
    end = ordered[len(ordered) - (count - len(top)):] if len(ordered) > count else []
    decode = decoder(run) if colour != "none" else None
    for n, group in enumerate((*top, *end)):
        if end and n == len(top):
            console.print(f"... {len(ordered) - len(top) - len(end)} groups between ...", style="dim")
        console.print(block(shown(group, step, decode, sizes), colour))
    if search and not held:
        console.print(f"no group of this step holds {search!r}", style="dim")
    return step


def said(group: Group) -> str:
    """Prompt and responses."""
    return "\n".join(map(prompt_text, (group.prompt, *(r.text for r in group.responses))))


def visible(text: str) -> str:
    """Text that a terminal only shows: control characters as pictures, halves of characters as question marks.

    >>> visible("a\\x1b[2Jb\\n\\ud800")
    'a␛[2Jb\\n?'
    """
    return text.encode("utf-8", "replace").decode().translate(PICTURES)


def header(run: RunFolder, step: int, groups: Sequence[Group]) -> Text:
    """The step and the metrics of all its groups."""
    found = facts(groups)
    line = Text(f"{run.name}", style="bold").append(f"  {run.settings['recipe']}, step {step}: {len(groups)} groups, "
                                                    f"{sum(len(g.responses) for g in groups)} responses\n", style="default")
    return line.append("  ".join(f"{k} {v:.4g}" for k, v in found.items()), style="not bold cyan")


def block(group: dict, colour: str) -> Block:
    """A group with its responses, best first."""
    mean = "no reward" if group["mean"] is None else f"mean reward {group['mean']:.3g}"
    apart = f"spread {group['spread']:.3g}" if group["spread"] else "no contrast"
    title = f"{mean}, {apart}, {group['distinct']} different of {group['of']} responses"
    found = [abs(v) for row in group["rows"] for v in numbers(row, colour)]
    scale = max([MEASURES[colour].least, *found]) if colour in MEASURES else 1.0
    parts: list = [Rule(title, align="left", style="dim"), Padding(Text(visible(group["prompt"]), style="bold"), (0, 0, 0, 2))]
    for row in group["rows"]:
        parts += [head(row, group), Padding(body(row, colour, scale), (0, 0, 0, 6))]
    if len(group["rows"]) < group["distinct"]:
        parts.append(Text(f"  {group['distinct'] - len(group['rows'])} further responses between these", style="dim"))
    return Block(*parts)


def numbers(row: dict, colour: str) -> list[float]:
    return [v for n in range(len(row.get("pieces", ()))) if (v := at(row, colour, n)) is not None]


def head(row: dict, group: dict) -> Text:
    """Reward, components, length and what is amiss."""
    value = row["reward"]
    good = value is not None and group["mean"] is not None and value >= group["mean"]
    style = "red" if value is None else "" if not group["spread"] else "green" if good else "yellow"
    line = Text("  ").append(" none" if value is None else f"{value:5.3g}", style=f"bold {style}".strip())
    parts = [f"{k} {v:.3g}" for k, v in row["scores"].items() if v != value or len(row["scores"]) > 1]
    advantage = row.get("values", {}).get("advantage")
    parts += [f"advantage {advantage:.3g}"] if isinstance(advantage, float) else []
    parts += [f"{row['length']} tokens"] + ([f"{len(row['n'])} times"] if len(row["n"]) > 1 else [])
    line.append("  " + visible(", ".join(parts)), style="dim")
    return line.append("".join(f"  [{visible(note)}]" for note in row["notes"]), style="bold red")


def body(row: dict, colour: str, scale: float) -> Text:
    """The response; tokens above 0 on blue and below on orange, the stronger the larger."""
    if "pieces" not in row:
        return Text(visible(row["text"]))
    line = Text()
    for n, piece in enumerate(row["pieces"]):
        if row["left"] and n == row["head"]:
            line.append(f" [{row['left']} tokens left out] ", style="dim")
        idle = "mask" in row and not row["mask"][n]
        line.append(visible(piece), style="dim italic" if idle else shade(at(row, colour, n), colour, scale))
    return line


def shade(value: float | None, colour: str, scale: float) -> str:
    """A background between black and the full colour, with text that can be read on it."""
    if value is None or colour not in MEASURES or abs(value) < 0.1 * scale:
        return ""
    full = (40, 110, 210) if value > 0 else (205, 95, 15)
    if not MEASURES[colour].signed:
        full = (130, 75, 165)
    strength = 0.25 + 0.75 * min(1.0, abs(value) / scale)
    red, green, blue = (round(strength * c) for c in full)
    return f"bright_white on rgb({red},{green},{blue})"
