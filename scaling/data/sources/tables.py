"""Behaviour logs in tables: Parquet, CSV or JSON lines, with a mapping of columns.

Text formats are read line by line by Python's own parsers, so that a row that cannot be read is
told with its file and line whatever bytes it holds. Parquet goes straight into the database: it is
the format for logs that are large.
"""

import csv
import glob
import gzip
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import ibis
import pyarrow as pa
from pydantic import Field

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import LOG, resolve

CHUNK = 65_536
FILE = 1 << 40
"""Positions of a file's rows start at this times the file's number: rows of one file are fewer."""
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl"}
TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
SCHEMA = pa.schema([(c, TYPES[t.lstrip("!")]) for c, t in LOG.items()])


class Columns(Frozen):
    """Which column of the files holds what."""

    user: str
    service: str | None = None
    """None: the table's ``service``."""
    text: str
    """Item text."""
    item: str | None = None
    """Id of the item; None: its text is its identity."""
    time: str | None = None
    """Unix time, or ISO 8601 (UTC where it says no zone); None: the rows are in order."""
    rating: str | None = None
    """Number; NaN and infinity count as no rating."""
    category: str | None = None


class LogTable(Frozen):
    """Files of one layout."""

    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs."""
    columns: Columns
    service: Name | None = None
    """Service of all logs, where no column says it."""
    format: Literal["parquet", "csv", "jsonl"] | None = None
    """None: by the suffix of the file, before any ``.gz``."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Of CSV; None: a tab in ``.tsv`` files, else a comma."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of times that are numbers; they are cut to whole seconds."""


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


def logs(con: Any, config: Config, base: Path) -> ibis.Table:
    """Logs of all tables; rows that cannot be read have a ``problem``.

    Raises:
        CorpusError: a file is missing, of unknown format, or lacks a mapped column.
    """
    parts = []
    texts: list[tuple[int, Path, str, LogTable]] = []
    number = 0
    for table in config.tables:
        if (table.service is None) == (table.columns.service is None):
            raise CorpusError(f"{table.files[0]}: give either a service or a column for it")
        for path in _files(table, base):
            kind = table.format or SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix)
            if kind is None:
                raise CorpusError(f"{path}: format unknown; set format = parquet, csv or jsonl")
            if kind == "parquet":
                parts.append(_parquet(con, path, number, table))
            else:
                texts.append((number, path, kind, table))
            number += 1
    if texts:
        parts.append(_texts(con, texts))
    return ibis.union(*parts) if len(parts) > 1 else parts[0]


def _parquet(con: Any, path: Path, number: int, table: LogTable) -> Any:
    rows = con.read_parquet(path, file_row_number=True)
    _require(path, set(rows.columns), table)
    c = table.columns

    def text(column: str | None) -> Any:
        value = rows[column].cast("string") if column else ibis.null("string")
        return value.nullif("")

    time = ibis.null("int64")
    if c.time:
        raw = rows[c.time]
        if raw.type().is_date() or raw.type().is_timestamp():
            time = raw.cast("timestamp").epoch_seconds().cast("int64")
        elif raw.type().is_numeric():
            time = (raw.cast("float64") / UNITS[table.time_unit]).floor().cast("int64")
            if raw.type().is_integer():
                time = (raw // UNITS[table.time_unit]).cast("int64")
        else:
            time = raw.try_cast("timestamp").epoch_seconds().cast("int64")
    rating = rows[c.rating].cast("float64") if c.rating else ibis.null("float64")
    user, item = text(c.user), text(c.item)
    service = text(c.service) if c.service else ibis.literal(table.service)
    cases = [(user.isnull(), "no user"), (service.isnull(), "no service")]
    if c.item:
        cases.append((item.isnull(), "no item"))
    if c.time:
        cases.append((time.isnull(), "no time"))
    where = ibis.literal(f"{path}:").concat((rows.file_row_number + 1).cast("string"), ": ")
    return rows.select(
        user=user,
        service=service,
        item=item,
        text=text(c.text),
        time=time,
        position=ibis.literal(number * FILE) + rows.file_row_number,
        # The database holds NaN to be larger than any number: it would pass every lower bound.
        rating=ibis.ifelse(rating.isnan() | rating.isinf(), ibis.null("float64"), rating),
        category=text(c.category),
        problem=ibis.cases(*((when, where.concat(reason)) for when, reason in cases)),
    ).select(*LOG)


def _require(path: Path, there: set[str], table: LogTable) -> None:
    wanted = [v for v in table.columns.model_dump().values() if v is not None]
    if missing := [w for w in wanted if w not in there]:
        raise CorpusError(
            f"{path}: has no column {', '.join(map(repr, missing))}; "
            f"its columns: {', '.join(sorted(there))}"
        )


def _texts(con: Any, parts: list[tuple[int, Path, str, LogTable]]) -> Any:
    """Rows of CSV and JSON lines files, streamed into the database."""
    for _, path, kind, table in parts:
        if kind == "csv":
            with _open(path, table) as f:
                _require(
                    path, set(next(csv.reader(f, delimiter=_delimiter(path, table)), [])), table
                )

    def rows() -> Iterator[dict[str, Any]]:
        for number, path, kind, table in parts:
            read = _csv if kind == "csv" else _jsonl
            yield from _parsed(number, path, table, read(path, table))

    def batches() -> Iterator[pa.RecordBatch]:
        iterator = rows()
        while chunk := list(islice(iterator, CHUNK)):
            yield pa.RecordBatch.from_pylist(chunk, schema=SCHEMA)

    con.con.register("text_rows", pa.RecordBatchReader.from_batches(SCHEMA, batches()))
    con.raw_sql("CREATE TABLE source_tables AS SELECT * FROM text_rows")
    con.con.unregister("text_rows")
    return con.table("source_tables")


Raw = tuple[int, dict[str, Any] | str]
"""Line, and the row's values by column or the reason why it has none."""


def _open(path: Path, table: LogTable) -> Any:
    # Bytes that are not of the encoding become lone surrogates, which mark the row later.
    encoding = "utf-8-sig" if table.encoding == "utf-8" else table.encoding
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding=encoding, errors="surrogateescape", newline="")


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
    except (OSError, EOFError) as e:
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
    except (OSError, EOFError) as e:
        yield number + 1, f"cannot be read further: {e}"


def _parsed(
    number: int, path: Path, table: LogTable, raw: Iterator[Raw]
) -> Iterator[dict[str, Any]]:
    for index, (line, values) in enumerate(raw):
        try:
            if isinstance(values, str):
                raise ValueError(values)
            row = _row(values, table)
            row["position"] = number * FILE + index
            yield row
        except ValueError as e:
            yield {"problem": f"{path}:{line}: {e}".encode(errors="replace").decode()}


def _row(values: dict[str, Any], table: LogTable) -> dict[str, Any]:
    c = table.columns
    row: dict[str, Any] = {
        "user": _text(values, c.user, "user"),
        "service": _text(values, c.service, "service") if c.service else table.service,
        "text": _text(values, c.text),
    }
    if c.item:
        row["item"] = _text(values, c.item, "item")
    if c.time:
        row["time"] = _time(values.get(c.time), UNITS[table.time_unit])
    if c.rating:
        row["rating"] = _rating(values.get(c.rating))
    if c.category:
        row["category"] = _text(values, c.category)
    return row


def _text(values: dict[str, Any], column: str, required: str = "") -> str | None:
    value = values.get(column)
    if value is None or value == "":
        if required:
            raise ValueError(f"no {required} ({column!r} is empty)")
        return None
    if isinstance(value, dict | list | bool | float):
        raise ValueError(f"{column!r} is no text or whole number: {value!r:.60}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column!r} is not valid text: {text!a:.60}") from None
    return text


def _time(value: Any, unit: int) -> int:
    """Unix time in whole seconds of a number, or of a text that is a number or ISO 8601."""
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
        if isinstance(value, bool) or not -(2**63) <= time < 2**63:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a time: {value!r:.60}") from None
    return time


def _rating(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        rating = float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a rating: {value!r:.60}") from None
    return rating if math.isfinite(rating) else None
