"""Prints for commands: data on stdout, messages on stderr, progress only on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Task

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def say(text: str) -> None:
    """Print one line of text on stderr."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def print_table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print aligned columns; None is shown as a dash."""
    cells = [[str(cell) for cell in heading], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    for row in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def print_fields(fields: dict[str, Any]) -> None:
    """Print one ``name  value`` line per field."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name.ljust(width)}  {_cell(value)}")


class Bar:
    """Progress bar; call it with the amount done. Shows nothing unless stderr is a terminal."""

    def __init__(self, show: Callable[..., None] | None = None) -> None:
        self._show = show
        self._waits = ""

    def __call__(self, done: float) -> None:
        if self._show is not None:
            self._show(completed=done)

    def waiting(self, what: str) -> None:
        """Show the reason for waiting and its duration; an empty reason resumes the bar."""
        if self._show is not None and what != self._waits:
            self._waits = what
            self._show(waits=what, since=time.monotonic())


@contextmanager
def progress(label: str, total: float | None, *, unit: str = "") -> Iterator[Bar]:
    """Show a bar on stderr if that is a terminal; the block calls the yielded bar with the amount done."""
    if not sys.stderr.isatty():
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Waits(TextColumn):
        def render(self, task: Task) -> Text:
            what, seconds = task.fields["waits"], time.monotonic() - task.fields["since"]
            return Text(f"{what[:100]} ... {seconds:.0f} s" if what else "")

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    counted = (BarColumn(), count, TimeRemainingColumn()) if unit or total is not None else ()
    columns = (TextColumn("{task.description}"), *counted, Waits(""))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, waits="", since=0.0)
        yield Bar(partial(bar.update, task))
