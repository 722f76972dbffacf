"""Rows of delimited text, and what a source makes of them: shared by the sources of public sets."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaling.data.corpus import CorpusError
from scaling.data.sources import UNREADABLE, Log, open_text
from scaling.data.sources.values import valid_text

MOST_LINES = 20
"""Lines of a record of CSV; more are lost to a stray quote."""
Row = tuple[int, list[str] | str]
"""Line, from 1, and the row's values, or the reason why it has none."""


def find(folder: Path, *names: str) -> Path:
    """The first of some files that is in a folder, plain or with ``.gz`` behind its name.

    Raises:
        CorpusError: none is.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise CorpusError(f"{folder}: holds no {' or '.join(names)}, plain or .gz")


def csv_records(reader: Any, wrong: str) -> Iterator[tuple[int, int, list[str], str]]:
    """Records of a strict ``csv.reader``.

    Args:
        wrong: what is said of a record before the reader's own reason.

    Yields:
        Lines before it, lines of it, its fields, and what is wrong with it: '' if nothing. A stray
        quote makes one text of all lines up to the next quote, which may be somebody else's.
    """
    while True:
        line = reader.line_num
        fields, reason = [], ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            reason = f"{wrong}: {e}"
        span = reader.line_num - line
        if span > MOST_LINES:
            reason = f"in a quoted text of {span:,} lines; is a quote stray?"
        yield line, span, fields, reason


def csv_rows(path: Path, columns: Sequence[str], *, tabs: bool = False) -> Iterator[Row]:
    """Rows of a table with a header.

    Args:
        columns: whose values to give, in this order.
        tabs: separated by tabs and without quotes, else CSV.

    Raises:
        CorpusError: the file is missing or torn, or lacks a column.
    """
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    form["strict"] = True
    with open_text(path, "utf-8-sig") as f:
        reader = csv.reader(f, **form)
        try:
            header = next(reader, [])
        except csv.Error:
            header = []
        except UNREADABLE as e:
            raise CorpusError(f"{path}: cannot be read: {e}") from None
        places = column_places(path, header, columns)
        try:
            for line, span, fields, reason in csv_records(reader, "no row"):
                if reason:  # every line is lost, and each is counted
                    yield from ((line + i + 1, reason) for i in range(span))
                elif len(fields) == len(header):
                    yield line + 1, [fields[i] for i in places]
                elif fields:
                    yield line + 1, f"{len(fields)} fields, the header has {len(header)}"
        except UNREADABLE as e:
            raise CorpusError(f"{path}: cannot be read to its end: {e}") from None


def column_places(path: Path, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Where the columns are in a header.

    Raises:
        CorpusError: one is not, or is twice. The line is not shown: it may be a row of somebody's.
    """
    if missing := [c for c in columns if c not in header]:
        raise CorpusError(
            f"{path}: its first line names no column {', '.join(map(repr, missing))}; "
            f"needed: {', '.join(dict.fromkeys(columns))}"
        )
    for column in columns:
        if header.count(column) > 1:
            raise CorpusError(f"{path}: has {header.count(column)} columns {column!r}")
    return [header.index(c) for c in columns]


def line_rows(lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """Lines as rows of one value."""
    return ((line, [text]) for line, text in lines)


def parsed(
    path: Path,
    rows: Iterable[Row],
    parse: Callable[..., Log | None],
    *,
    latin_1: bool = False,
) -> Iterator[Log]:
    """The logs of rows, and a problem for each row that is none.

    Args:
        parse: of the line and the values. None is no log; a ``ValueError`` tells the problem, and
            must quote values by ``shown``.
        latin_1: read rows that are not UTF-8 as ISO-8859-1.
    """
    for line, values in rows:
        try:
            if isinstance(values, str):
                raise ValueError(values)
            log = parse(line, *_valid(values, latin_1))
        except ValueError as e:
            yield Log(problem=f"{path}:{line}: {e}")
        else:
            if log is not None:
                yield log


def _valid(values: list[str], latin_1: bool) -> list[str]:
    try:
        valid_text("".join(values), "the line")
    except ValueError:
        if not latin_1:
            raise
        return [v.encode(errors="surrogateescape").decode("latin-1") for v in values]
    return values
