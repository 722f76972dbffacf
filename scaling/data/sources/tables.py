"""Behaviour logs in tables: Parquet, CSV or JSON lines, with a mapping of columns.

Text formats are read line by line by Python's own parsers, so that a row that cannot be read is
told with its file and line whatever bytes it holds. Parquet goes straight into the database
(``parquet.py``): it is the format for logs that are large.
"""

import csv
import glob
import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import ibis
from pydantic import Field

from scaling.config import Frozen
from scaling.data.corpus import CorpusError
from scaling.data.engine import Engine
from scaling.data.sources import TIMES, UNREADABLE, Log, load_rows, resolve, shown
from scaling.data.sources.layout import FILE, OUTSIDE, UNITS, LogTable, require
from scaling.data.sources.parquet import parquet_rows

SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl"}
UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["tables"]
    tables: Annotated[tuple[LogTable, ...], Field(min_length=1)]


def files(config: Config, base: Path) -> list[Path]:
    """All files that are read."""
    return [path for table in config.tables for path in _files(table, base)]


def _files(table: LogTable, base: Path) -> list[Path]:
    """Files of a table, sorted by path within each pattern."""
    found = []
    for pattern in table.files:
        path = resolve(base, pattern)
        matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
        if not matches and not path.exists():
            raise CorpusError(f"{path}: no such file")
        found += [Path(m) for m in matches] or [path]
    return found


def logs(engine: Engine, config: Config, base: Path) -> ibis.Table:
    """Logs of all tables; rows that cannot be read have a ``problem``.

    Raises:
        CorpusError: a file is missing, of unknown format, not of the format it should be, or lacks
            a mapped column; or a table has no rows.
    """
    parts = []
    texts: list[tuple[int, Path, str, _Found]] = []
    number = 0
    found = [_Found(table) for table in config.tables]
    for of in found:
        table = of.table
        if (table.service is None) == (table.columns.service is None):
            raise CorpusError(f"{table.files[0]}: give either a service or a column for it")
        for path in _files(table, base):
            kind = table.format or SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix)
            if kind is None:
                raise CorpusError(f"{path}: format unknown; set format = parquet, csv or jsonl")
            if kind == "parquet":
                part, n_rows = parquet_rows(engine, path, number, table)
                parts.append(part)
                of.rows += n_rows
            else:
                texts.append((number, path, kind, of))
            number += 1
    if texts:
        parts.append(load_rows(engine, "source_texts", _texts(texts)))
    for of in found:
        where = ", ".join(of.table.files)
        if not of.rows:
            raise CorpusError(f"{where}: no rows")
        if of.unseen:
            raise CorpusError(
                f"{where}: no row has {', '.join(map(repr, sorted(of.unseen)))}; "
                "correct the table's columns or leave them out"
            )
    return ibis.union(*parts) if len(parts) > 1 else parts[0]


@dataclass
class _Found:
    """What the files of a table turned out to hold."""

    table: LogTable
    rows: int = 0
    unseen: set[str] | None = None
    """Mapped columns that no row of text files had so far; None: there was no whole row yet."""


def _texts(parts: list[tuple[int, Path, str, _Found]]) -> Iterator[Log]:
    """Rows of CSV and JSON lines files."""
    for _, path, kind, found in parts:
        _check_start(path, kind, found.table)
    for number, path, kind, found in parts:
        read = _csv if kind == "csv" else _jsonl
        yield from _parsed(number, path, found, read(path, found.table))


Raw = tuple[int, dict[str, Any] | str]
"""Line, and the row's values by column or the reason why it has none."""


def _check_start(path: Path, kind: str, table: LogTable) -> None:
    """Refuse a file that cannot be opened, is not of the table's encoding or lacks a column."""
    try:
        with _opener(path)(path, "rb") as f:
            start = f.read(2)
        header: list[str] = []
        if kind == "csv":
            with _open(path, table) as f:
                header = next(csv.reader(f, delimiter=_delimiter(path, table)), [])
    except (*UNREADABLE, csv.Error) as e:
        raise CorpusError(f"{path}: cannot be read: {e}") from None
    names = "".join(header)
    if start in UTF16 or "\0" in names or names != names.encode(errors="replace").decode():
        found = "it is UTF-16" if start in UTF16 else "its header cannot be read"
        raise CorpusError(
            f"{path}: not {table.encoding}: {found}; set the table's key encoding "
            "(valid: utf-8, latin-1) or convert the file"
        )
    if kind == "csv" and start:
        require(path, header, table)


def _opener(path: Path) -> Any:
    return gzip.open if path.suffix == ".gz" else open


def _open(path: Path, table: LogTable) -> Any:
    # Bytes that are not of the encoding become lone surrogates, which mark the row later.
    encoding = "utf-8-sig" if table.encoding == "utf-8" else table.encoding
    return _opener(path)(path, "rt", encoding=encoding, errors="surrogateescape", newline="")


def _delimiter(path: Path, table: LogTable) -> str:
    return table.delimiter or ("\t" if ".tsv" in path.suffixes else ",")


def _csv(path: Path, table: LogTable) -> Iterator[Raw]:
    line = 1
    try:
        with _open(path, table) as f:
            reader = csv.reader(f, delimiter=_delimiter(path, table))
            header = next(reader, [])
            while True:
                line = reader.line_num + 1
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as e:
                    yield line, f"not CSV: {e}"
                    continue
                if len(fields) == len(header):
                    yield line, dict(zip(header, fields, strict=True))
                elif fields:
                    yield line, f"{len(fields)} fields, the header has {len(header)}"
    except UNREADABLE as e:
        yield line, f"cannot be read further: {e}"


def _jsonl(path: Path, table: LogTable) -> Iterator[Raw]:
    number = 0
    try:
        with _open(path, table) as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    yield number, f"not JSON: {e}"
                    continue
                yield number, row if isinstance(row, dict) else "not a JSON object"
    except UNREADABLE as e:
        yield number + 1, f"cannot be read further: {e}"


def _parsed(number: int, path: Path, found: _Found, raw: Iterator[Raw]) -> Iterator[Log]:
    for index, (line, values) in enumerate(raw):
        found.rows += 1
        try:
            if isinstance(values, str):
                raise ValueError(values)
            if found.unseen is None:
                found.unseen = set(found.table.wanted)
            if found.unseen:
                found.unseen -= values.keys()
            yield _row(values, found.table)._replace(position=number * FILE + index)
        except ValueError as e:
            yield Log(problem=f"{path}:{line}: {e}")


def _row(values: dict[str, Any], table: LogTable) -> Log:
    c = table.columns
    return Log(
        user=_text(values, c.user, "user"),
        service=_text(values, c.service, "service") if c.service else table.service,
        item=_text(values, c.item, "item") if c.item else None,
        text=_text(values, c.text),
        time=_time(values.get(c.time), table.time_unit) if c.time else None,
        rating=_rating(values.get(c.rating)) if c.rating else None,
        category=_text(values, c.category) if c.category else None,
    )


def _text(values: dict[str, Any], column: str, required: str = "") -> str | None:
    value = values.get(column)
    if value is None or value == "":
        if required:
            raise ValueError(f"no {required} ({column!r} is empty)")
        return None
    if isinstance(value, dict | list | bool | float):
        raise ValueError(f"{column!r} is no text or whole number: {shown(value)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column!r} is not valid text") from None
    return text


def _time(value: Any, time_unit: str) -> int:
    """Unix time in whole seconds of a number, or of a text that is a number or ISO 8601."""
    unit = UNITS[time_unit]
    try:
        try:
            time = int(value) // unit
        except ValueError:
            try:
                time = int(float(value) // unit)
            except ValueError:
                moment = datetime.fromisoformat(value)
                moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
                time = int(moment.timestamp() // 1)
        if isinstance(value, bool):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a time: {shown(value)}") from None
    if time not in TIMES:
        raise ValueError(f"{OUTSIDE} (time_unit = {time_unit!r}): {shown(value)}")
    return time


def _rating(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        rating = float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a rating: {shown(value)}") from None
    return rating if math.isfinite(rating) else None
