"""Rows of a block of CSV or JSON lines, by Python's own parsers: they tell each row that cannot be
read, whatever bytes it holds."""

import csv
import gc
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from scaling.data.sources import SCHEMA
from scaling.data.sources.delimited import csv_records
from scaling.data.sources.layout import LogTable, folder_values
from scaling.data.sources.values import parsers

UTF8_MARK = b"\xef\xbb\xbf"


@dataclass
class TextFile:
    """A file to parse."""

    number: int
    """Among all."""
    path: Path
    kind: str
    """``csv`` or ``jsonl``."""
    table: LogTable
    header: list[str] = field(default_factory=list)
    """Of CSV."""


@dataclass
class Block:
    """Some lines of a file, from the beginning of a row."""

    file: TextFile
    data: bytes
    first: bool = False
    last: bool = False


@dataclass
class Parsed:
    """What a block holds."""

    logs: pa.RecordBatch
    """Sound rows; positions count from the block's first row, where no column says them."""
    problems: list[tuple[int, str]]
    """Lines, from 0 at the block's first, and reasons of the others."""
    rows: int
    lines: int
    unseen: set[str] | None
    """Mapped columns that no row had; None: there was no whole row."""
    rest: bytes
    """The last row, where it goes on behind the block; not counted above."""
    foreign: int | None
    """Lines that are not UTF-8, less those beyond ASCII that are; None: all are UTF-8, some beyond
    ASCII."""


def batch_of(columns: dict[str, list[Any]]) -> pa.RecordBatch:
    n = len(next(iter(columns.values())))
    arrays = [pa.array(columns.get(f.name) or [None] * n, f.type) for f in SCHEMA]
    return pa.record_batch(arrays, schema=SCHEMA)


def delimiter(file: TextFile) -> str:
    return file.table.delimiter or ("\t" if ".tsv" in file.path.suffixes else ",")


def parse(block: Block) -> Parsed:
    """Parse a block."""
    # Python would look through the rows for circles again and again: half of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _parse(block)
    finally:
        if collecting:
            gc.enable()


def _parse(block: Block) -> Parsed:
    file, table, data = block.file, block.file.table, block.data
    if block.first and table.encoding == "utf-8":
        data = data.removeprefix(UTF8_MARK)
    lines = list(io.StringIO(data.decode(table.encoding, "surrogateescape"), newline=""))
    rows = _csv(block, lines) if file.kind == "csv" else _jsonl(file, lines)
    readers = parsers(table)
    found: dict[str, list[Any]]
    try:
        found = {role: readers[role](rows.values[role]) for role in readers}
        index = rows.index
    except ValueError:
        found, index = {role: [] for role in readers}, []
        for i, row in enumerate(zip(*(rows.values[role] for role in readers), strict=True)):
            try:
                parsed = [reader([v])[0] for reader, v in zip(readers.values(), row, strict=True)]
            except ValueError as e:
                rows.problems.append((rows.line[i], str(e)))
                continue
            index.append(rows.index[i])
            for values, value in zip(found.values(), parsed, strict=True):
                values.append(value)
    if table.service is not None:
        found["service"] = [table.service] * len(index)
    found.setdefault("position", index)
    return Parsed(
        batch_of(found),
        rows.problems,
        rows.n,
        rows.n_lines,
        rows.unseen,
        rows.rest.encode(table.encoding, "surrogateescape"),
        _foreign(data) if table.encoding == "utf-8" else 0,
    )


def _foreign(data: bytes) -> int | None:
    if data.isascii():
        return 0
    try:
        data.decode()
    except UnicodeDecodeError:
        beyond = [line for line in data.split(b"\n") if not line.isascii()]
        return sum(1 if _is_foreign(line) else -1 for line in beyond)
    return None


def _is_foreign(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return True
    return False


@dataclass
class _Rows:
    """Rows of a block, by the role of their columns."""

    values: dict[str, Sequence[Any]]
    line: list[int] = field(default_factory=list)
    """Of each row: its first line, from 0."""
    index: list[int] = field(default_factory=list)
    """Of each row: its number among all of the block, those with problems included."""
    problems: list[tuple[int, str]] = field(default_factory=list)
    n: int = 0
    """Rows, those with problems included."""
    n_lines: int = 0
    unseen: set[str] | None = None
    rest: str = ""

    def wrong(self, line: int, reason: str) -> None:
        """A row without values."""
        self.problems.append((line, reason))
        self.n += 1


def _csv(block: Block, lines: list[str]) -> _Rows:
    file, header, ended = block.file, block.file.header, False
    columns = file.table.columns

    def feed() -> Iterator[str]:
        nonlocal ended
        yield from lines
        ended = True

    reader = csv.reader(feed(), delimiter=delimiter(file), strict=True)
    if block.first:
        next(reader, None)
    found = _Rows({}, n_lines=len(lines))
    rows = []
    for line, span, fields, reason in csv_records(reader, "not CSV"):
        if ended and not block.last:  # the parser asked for more lines
            found.n_lines, found.rest = line, "".join(lines[line:])
            break
        if reason:  # every line is lost, and each is counted
            for i in range(span):
                found.wrong(line + i, reason)
        elif len(fields) == len(header):
            rows.append(fields)
            found.line.append(line)
            found.index.append(found.n)
            found.n += 1
        elif fields:
            found.wrong(line, f"{len(fields)} fields, the header has {len(header)}")
    around = folder_values(file.path, file.table, header)
    by_name: dict[str, Sequence[str]] = (
        dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    )
    for role, column in columns.model_dump(exclude_none=True).items():
        if column in around:
            found.values[role] = [around[column]] * len(rows)
        else:
            found.values[role] = by_name.get(column, [])  # an empty file has no header
    found.unseen = set() if rows else None
    return found


def _jsonl(file: TextFile, lines: list[str]) -> _Rows:
    around = folder_values(file.path, file.table, ())
    found = _Rows({}, n_lines=len(lines))
    decode = json.JSONDecoder().raw_decode
    rows = []
    for number, line in enumerate(lines):
        try:
            row, end = decode(line)
            if line[end:].strip(" \t\r\n"):
                raise ValueError
        except (ValueError, RecursionError):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                found.wrong(number, f"not JSON: {e}")
                continue
        if not isinstance(row, dict):
            found.wrong(number, "not a JSON object")
            continue
        rows.append(row)
        found.line.append(number)
        found.index.append(found.n)
        found.n += 1
    for role, column in file.table.columns.model_dump(exclude_none=True).items():
        other = around.get(column)
        found.values[role] = [row.get(column, other) for row in rows]
    if rows:
        found.unseen = set(file.table.wanted) - around.keys()
        for row in rows:
            if not found.unseen:
                break
            found.unseen -= row.keys()
    return found
