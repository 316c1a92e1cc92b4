"""What the commands share: where they print, and tables."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLOURS = {"ok": "green", "missing": "dim", "warning": "yellow", "error": "red"}
console, stderr = Console(highlight=False), Console(highlight=False, stderr=True)


def say(level: str, text: str) -> None:
    stderr.print(Text(f"{level}: ", style=COLOURS[level]).append(text, style="default"))


def argument(metavar: str, text: str):
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def grid(rows: Iterable[Sequence[str]], *, head: Sequence[str] = ()) -> Table:
    """Rows of text in columns. With a head, the columns between the first and the last hold numbers."""
    rows = list(rows)
    table = Table(box=None, show_header=bool(head), padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for place in range(len(rows[0]) if rows else 0):
        numeric = head and 0 < place < len(head) - 1
        table.add_column(head[place] if head else "", style="" if place else "cyan", no_wrap=place == 0,
                         justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
