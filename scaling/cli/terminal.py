"""What people see: tables, progress and JSON, rich on a terminal and plain text anywhere else."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import typer

Update = Callable[..., None]
"""Called with (done, total) and, optionally, a word or number about it."""


PROSE_WIDTH = 12
"""Least width of a column of sentences, which may be folded; numbers and names never are."""


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


TRANSFER_COLUMNS = (
    "task", "system", "segment", "hr_1", "hr_10", "ndcg_10", "mrr", "loss", "n_users",
)  # fmt: skip
"""Of downstream evaluations, for people."""


def with_intervals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of downstream evaluations, each metric in a word with half its interval's width."""
    found = []
    for row in rows:
        words = dict(row)
        for name in TRANSFER_COLUMNS:
            if row.get(f"{name}_low") is not None:
                half = (row[f"{name}_high"] - row[f"{name}_low"]) / 2
                words[name] = f"{row[name]:.4f} ±{half:.4f}"
        found.append(words)
    return found


def print_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, drop: Sequence[str] = ()
) -> None:
    """Rows under their columns' names; numbers to the right.

    Args:
        drop: columns that a narrow terminal does without, the least important first; after them
            the last ones go. The first column always stays.
    """
    if sys.stdout.isatty():
        _print_rich(rows, columns, drop)
        return
    cells = [[cell(row.get(c)) for c in columns] for row in rows]
    number = [_is_number(rows, c) for c in columns]
    width = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [list(columns), *cells]:
        padded = [
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(line, width, number, strict=True)
        ]
        typer.echo("  ".join(padded).rstrip())


def _is_number(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return any(isinstance(row.get(column), int | float) for row in rows)


def _print_rich(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], drop: Sequence[str]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = {c: [cell(row.get(c)) for row in rows] for c in columns}
    prose = {c: any(" " in text for text in cells[c]) for c in columns}

    def least(column: str) -> int:
        """Width below which the column's numbers, names or words would be folded."""
        header = max(map(len, column.replace("_", "_ ").split()))
        whole = max((len(text) for text in cells[column]), default=0)
        return max(header, min(whole, PROSE_WIDTH) if prose[column] else whole)

    # NO_COLOR is about all styles here, bold too
    console = Console(color_system=None if os.environ.get("NO_COLOR") else "auto")
    shown = list(columns)
    last_first = [c for c in reversed(columns[1:]) if c not in drop]
    for column in [*(c for c in drop if c in columns[1:]), *last_first]:
        if sum(map(least, shown)) + 2 * len(shown) <= console.width:
            break
        shown.remove(column)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in shown:
        table.add_column(
            Text(column.replace("_", "_\n")),
            justify="right" if _is_number(rows, column) else "left",
            no_wrap=not prose[column],
            overflow="fold",
            min_width=least(column),
        )
    for i in range(len(rows)):
        table.add_row(*(Text(cells[c][i]) for c in shown))
    console.print(table)
    if hidden := [c for c in columns if c not in shown]:
        console.print(
            f"hidden at this width: {len(hidden)} of {len(columns)} columns ({', '.join(hidden)}); "
            "--json, or a pipe such as | cat, has all",
            highlight=False,
            markup=False,
        )


@contextlib.contextmanager
def progress(title: str) -> Iterator[Update]:
    """A progress bar on a terminal; elsewhere a line when a tenth more is done or the note changes.

    Everything goes to stderr, so that a pipe gets results only.
    """
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
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
