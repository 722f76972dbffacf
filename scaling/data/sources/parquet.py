"""Rows of Parquet files: the database reads them itself, so that any number of them will do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from scaling.data.corpus import CorpusError
from scaling.data.engine import Engine
from scaling.data.sources import LOG, TIMES
from scaling.data.sources.layout import FILE, OUTSIDE, UNITS, LogTable, require

ROW = "#row"
"""Column of a row's number in its file, from 0; beside those of the file."""
WHOLE = r"^\s*[+-]?\d+\s*$"


def parquet_rows(engine: Engine, path: Path, number: int, table: LogTable) -> tuple[Any, int]:
    """The logs of a file and their number.

    Args:
        number: of the file among all.

    Raises:
        CorpusError: it is not Parquet, or a mapped column is missing or of a type that cannot hold
            what it should.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
        require(path, schema.names, table)
        _check_types(path, schema, table)
        found = engine.read(path, ROW)
    except (OSError, pa.ArrowException, duckdb.Error) as e:
        reason = str(e).partition("\n")[0]
        raise CorpusError(f"{path}: cannot be read as Parquet: {reason}") from None
    rows = found.select(*dict.fromkeys(table.wanted), ROW)
    c = table.columns

    def text(column: str | None) -> Any:
        value = rows[column].cast("string") if column else ibis.null("string")
        return value.nullif("")

    user, item = text(c.user), text(c.item)
    service = text(c.service) if c.service else ibis.literal(table.service)
    time = _time(rows[c.time], UNITS[table.time_unit]) if c.time else ibis.null("int64")
    rating = rows[c.rating].try_cast("float64") if c.rating else ibis.null("float64")
    cases = [(user.isnull(), "no user"), (service.isnull(), "no service")]
    if c.item:
        cases.append((item.isnull(), "no item"))
    if c.time:
        given = text(c.time)
        outside = f"{OUTSIDE} (time_unit = {table.time_unit!r}): "
        cases.append((given.isnull(), "no time"))
        cases.append((time.isnull(), ibis.literal(outside).concat(given.left(60))))
    if c.rating:
        given = text(c.rating)
        wrong = rating.isnull() & given.notnull()
        cases.append((wrong, ibis.literal("not a rating: ").concat(given.left(60))))
    where = ibis.literal(f"{path}:").concat((rows[ROW] + 1).cast("string"), ": ")
    logs = rows.select(
        user=user,
        service=service,
        item=item,
        text=text(c.text),
        time=time,
        position=ibis.literal(number * FILE) + rows[ROW],
        # NaN would pass every lower bound: the database holds it to be the largest number.
        rating=_finite(rating),
        category=text(c.category),
        problem=ibis.cases(*((when, where.concat(reason)) for when, reason in cases)),
    )
    return logs.select(*LOG), n_rows


def _check_types(path: Path, schema: Any, table: LogTable) -> None:
    for role, column in table.columns.model_dump().items():
        if column is None:
            continue
        found = schema.field(column).type
        kind = found.value_type if types.is_dictionary(found) else found
        fits: tuple[Callable[[Any], bool], ...] = (
            types.is_null,
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_integer,
        )
        holds = "text or whole numbers"
        if role in ("time", "rating"):
            fits += (types.is_floating, types.is_decimal)
            holds = "numbers"
        if role == "time":
            fits += (types.is_date, types.is_timestamp)
            holds = "times: numbers, text, dates or timestamps"
        if not any(fit(kind) for fit in fits):
            raise CorpusError(f"{path}: column {column!r} is of type {found}; it must hold {holds}")


def _time(raw: Any, unit: int) -> Any:
    """Unix time in whole seconds; null where it is none or not in ``TIMES``."""
    kind = raw.type()
    if kind.is_date() or kind.is_timestamp():
        return _of_moment(raw.cast("timestamp") if kind.is_date() else raw)
    if kind.is_numeric():
        return _of_number(raw, unit)
    text = raw.cast("string")
    # As in text files: a number, else ISO 8601. The database rounds where it casts 1.5 to a whole,
    # and a plain timestamp would lose its offset from UTC.
    whole = ibis.ifelse(text.re_search(WHOLE), text.try_cast("int64"), ibis.null("int64"))
    return ibis.coalesce(
        _of_number(whole, unit),
        _of_number(text.try_cast("float64"), unit),
        _of_moment(text.try_cast("timestamp('UTC')")),
    )


def _of_moment(moment: Any) -> Any:
    seconds = moment.epoch_seconds()
    inside = (seconds >= TIMES.start) & (seconds < TIMES.stop)
    return ibis.ifelse(inside, seconds, ibis.null()).cast("int64")


def _of_number(raw: Any, unit: int) -> Any:
    # What is outside goes first: the casts would fail on it.
    raw = _finite(raw) if raw.type().is_floating() else raw
    inside = (raw >= TIMES.start * unit) & (raw < TIMES.stop * unit)
    held = ibis.ifelse(inside, raw, ibis.null(raw.type()))
    if raw.type().is_integer():
        # The database divides in floating point: exact only for multiples of the unit.
        return ((held - held % unit) / unit).round().cast("int64")
    return (held.cast("float64") / unit).floor().cast("int64")


def _finite(raw: Any) -> Any:
    """Floating-point numbers, null where they are NaN or infinite.

    The text of a value tells. The statistics of a file leave NaN out, and the database believes
    them: it decides ``isnan`` and comparisons by them, without a look at the values.
    """
    return ibis.ifelse(raw.cast("string").contains("n"), ibis.null(raw.type()), raw)
