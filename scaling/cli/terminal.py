"""What people see: tables, progress and JSON, rich on a terminal and plain text anywhere else."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import typer

Update = Callable[..., None]
"""Called with (done, total) and, optionally, a word or number about it."""


def print_json(value: Any) -> None:
    """A value as JSON; NaN is refused, for a missing number is null."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def cell(value: Any) -> str:
    """A value for people: four digits of a float, ``-`` for what is missing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows under their columns' names; numbers to the right."""
    cells = [[cell(row.get(c)) for c in columns] for row in rows]
    number = [any(isinstance(row.get(c), int | float) for row in rows) for c in columns]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold")
        for name, right in zip(columns, number, strict=True):
            header = Text(name.replace("_", "_\n"))
            table.add_column(header, justify="right" if right else "left", overflow="fold")
        for line in cells:
            table.add_row(*map(Text, line))
        Console().print(table)
        return
    width = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [list(columns), *cells]:
        padded = [
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(line, width, number, strict=True)
        ]
        typer.echo("  ".join(padded).rstrip())


@contextlib.contextmanager
def progress(title: str) -> Iterator[Update]:
    """A progress bar on a terminal; elsewhere a line when a tenth more is done or the note changes.

    Everything goes to stderr, so that a pipe gets results only.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        layout = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*layout, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)

            def draw(done: int, total: int, note: object = None) -> None:
                text = title if note is None else f"{title}: {cell(note)}"
                bar.update(task, completed=done, total=total, description=text)

            yield draw
        return
    told: object = None

    def tell(done: int, total: int, note: object = None) -> None:
        nonlocal told
        word = note if isinstance(note, str) else None
        now = (word, 10 * done // max(total, 1))
        if now != told:
            told = now
            typer.echo(f"{title}: {done}/{total} {'' if note is None else cell(note)}", err=True)

    yield tell
