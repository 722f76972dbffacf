"""Rows of typed columns become logs: one expression, with one outcome on every engine.

Engines differ in which texts they take for numbers and times, in the text they make of a number,
and in what they do on overflow. So a text is matched before it is cast, what a cast could fail on
is taken out before it, and of wrong values only texts, whole numbers and dates are ever shown, and
never one of a user.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ibis
import pyarrow as pa
from pyarrow import types

from scaling.data.corpus import CorpusError
from scaling.data.sources import LOG, TIMES
from scaling.data.sources.layout import (
    ISO,
    NO_NUMBER,
    NUMBER,
    OUTSIDE,
    SPACE,
    UNITS,
    WHOLE,
    LogTable,
)

Types = Mapping[str, pa.DataType]
"""Arrow types of columns; of a dictionary, that of its values."""


def column_types(where: Any, schema: pa.Schema, table: LogTable) -> Types:
    """Types of the mapped columns that a schema has.

    Args:
        where: the file or table, for messages.

    Raises:
        CorpusError: a column is of a type that cannot hold what it should.
    """
    found = {}
    for role, column in table.columns.model_dump().items():
        if column is None or column not in schema.names:
            continue
        given = schema.field(column).type
        kind = given.value_type if types.is_dictionary(given) else given
        fits: tuple[Callable[[Any], bool], ...] = (types.is_null, is_text, _is_whole)
        holds = "text or whole numbers"
        if role in ("time", "rating"):
            fits += (types.is_float32, types.is_float64, _is_decimal)
            holds = "numbers of up to 64 bits, or decimals of up to 38 digits"
        if role == "time":
            fits += (types.is_date, types.is_timestamp)
            holds = f"times: {holds}, text, dates or timestamps"
        if not any(fit(kind) for fit in fits):
            raise CorpusError(
                f"{where}: column {column!r} is of type {given}; it must hold {holds}"
            )
        found[column] = kind
    return found


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of texts."""
    return any(is_(kind) for is_ in (types.is_string, types.is_large_string, types.is_string_view))


def _is_whole(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or (_is_decimal(kind) and kind.scale == 0)


def _is_decimal(kind: pa.DataType) -> bool:
    return bool(types.is_decimal(kind) and kind.precision <= 38)


def to_logs(rows: Any, kinds: Types, table: LogTable, where: Any, position: Any) -> Any:
    """The logs of rows.

    Args:
        rows: table with the mapped columns.
        kinds: their types in the source. An engine may read them as others.
        where: text before the reason in a problem.
        position: of each row, where no column says it.
    """
    c = table.columns

    def text(column: str | None) -> Any:
        return rows[column].cast("string").nullif("") if column else ibis.null("string")

    def empty(role: str, column: str) -> tuple[Any, str]:
        # DuckDB fails on the text of the farthest timestamps, and NaN is null to Spark.
        given = rows[column] if types.is_timestamp(kinds[column]) else text(column)
        return given.isnull(), f"no {role} ({column!r} is empty)"

    service = text(c.service) if c.service else ibis.literal(table.service)
    wrong = [
        empty(role, column)
        for role, column in (("user", c.user), ("service", c.service), ("item", c.item))
        if column
    ]
    time, rating = ibis.null("int64"), ibis.null("float64")
    if c.time:
        time, of_time = _time(rows[c.time], kinds[c.time], table.time_unit)
        wrong += [empty("time", c.time), *of_time]
    if c.rating:
        rating, of_rating = _rating(rows[c.rating], kinds[c.rating])
        wrong += of_rating
    if c.position:
        given = text(c.position)
        position = _held(fits(given, WHOLE), given).try_cast("int64")
        reason = "not a position: " + _shown(given)
        wrong.append((given.notnull() & position.isnull(), reason))
        if c.time is None:
            wrong.append(empty("position", c.position))
    logs = rows.select(
        user=text(c.user),
        service=service,
        item=text(c.item),
        text=text(c.text),
        time=time,
        position=position,
        rating=rating,
        category=text(c.category),
        problem=ibis.cases(*((when, where + reason) for when, reason in wrong)),
    )
    return logs.select(*LOG)


def fits(text: Any, pattern: str) -> Any:
    """Whether all of a text is of a pattern, white space around it left out."""
    return text.re_search(rf"^{SPACE}({pattern}){SPACE}\z")


def _held(when: Any, value: Any) -> Any:
    return ibis.ifelse(when, value, ibis.null(value.type()))


def _shown(text: Any) -> Any:
    """``sources.shown`` of texts."""
    n = text.length()

    def digits(thousands: int) -> Any:
        return (n // 1_000**thousands % 1_000).cast("string").lpad(3, "0")

    many = ibis.cases(
        (n < 1_000, n.cast("string")),
        (n < 1_000_000, (n // 1_000).cast("string") + "," + digits(0)),
        else_=(n // 1_000_000).cast("string") + "," + digits(1) + "," + digits(0),
    )
    plain = text.re_search(r"^[0-9.:+\-/TZeE, ]{0,30}\z")
    return ibis.ifelse(
        plain, ibis.literal("'") + text + "'", ibis.literal("text of ") + many + " characters"
    )


def _rating(raw: Any, kind: pa.DataType) -> tuple[Any, list[tuple[Any, Any]]]:
    """Ratings, null where they are none, and what is wrong with them."""
    text = raw.cast("string").nullif("")
    if is_text(kind):
        number = _held(fits(text, NUMBER), text).try_cast("float64")
        wrong = text.notnull() & ~fits(text, f"{NUMBER}|{NO_NUMBER}")
        return _finite(number), [(wrong, ibis.literal("not a rating: ") + _shown(text))]
    if _is_decimal(kind):  # engines divide by its power of ten, and not all round right
        return text.try_cast("float64"), []
    return _finite(raw.cast("float64")), []


def _time(raw: Any, kind: pa.DataType, unit: str) -> tuple[Any, list[tuple[Any, Any]]]:
    """Unix time in whole seconds, null where it is none or not in ``TIMES``; and what is wrong."""
    text = raw.cast("string")
    outside = ibis.literal(f"{OUTSIDE} (time_unit = {unit!r})")
    told = outside + ": " + _shown(text)
    if types.is_date(kind):
        within = (raw >= ibis.date(1970, 1, 1)) & (raw < ibis.date(2100, 1, 1))
        time = _seconds(_held(within, raw).cast("timestamp"))
        # Beyond four digits, engines write years in their ways.
        plain = (raw >= ibis.date(1000, 1, 1)) & (raw <= ibis.date(9999, 12, 31))
        return time, [(plain & time.isnull(), told), (time.isnull(), outside)]
    if types.is_timestamp(kind):
        if raw.type().is_integer():  # nanoseconds, as Spark reads them
            time = _of_number(raw, UNITS["ns"])
        elif kind.unit == "ns":  # DuckDB's, whose casts round
            time = _inside(_seconds(text.left(19).try_cast("timestamp")))
        else:
            first, end = (ibis.literal(t, raw.type()) for t in ("1970-01-01", "2100-01-01"))
            time = _seconds(_held((raw >= first) & (raw < end), raw).truncate("s"))
        return time, [(time.isnull(), outside)]
    if not is_text(kind):
        time = _of_number(raw, UNITS[unit])
        return time, [(time.isnull(), told if _is_whole(kind) else outside)]
    # As in text files: a number, else ISO 8601. An engine rounds where it casts 1.5 to a whole.
    number = fits(text, NUMBER)
    day = _held(text.re_search(rf"^{ISO}\z"), text.left(10)).try_cast("date")
    time = ibis.coalesce(
        _of_number(_held(fits(text, WHOLE), text).try_cast("int64"), UNITS[unit]),
        _of_number(_held(number, text).try_cast("float64"), UNITS[unit]),
        _inside(_seconds(day.cast("timestamp")) + _clock(text)),
    )
    none = ibis.literal("not a time: ") + _shown(text)
    return time, [(~number & day.isnull(), none), (time.isnull(), told)]


def _clock(text: Any) -> Any:
    """Seconds of a day in UTC, of a text in ISO 8601; its time and its offset may be missing."""

    def whole(digits: Any) -> Any:
        return digits.try_cast("int64").coalesce(0)

    seconds = ibis.ifelse(text.substr(16, 1) == ":", whole(text.substr(17, 2)), 0)
    zone = text.substr(16).re_extract("[+-].*", 0)
    offset = whole(zone.substr(1, 2)) * 3_600
    offset += ibis.ifelse(zone.length() > 3, whole(zone.right(2)), 0) * 60
    local = whole(text.substr(11, 2)) * 3_600 + whole(text.substr(14, 2)) * 60 + seconds
    return local + ibis.ifelse(zone.left(1) == "-", offset, -offset)


def _seconds(moment: Any) -> Any:
    # DuckDB's are no whole numbers, whatever Ibis says: the first cast is there for the second.
    return moment.epoch_seconds().cast("float64").cast("int64")


def _inside(seconds: Any) -> Any:
    return _held((seconds >= TIMES.start) & (seconds < TIMES.stop), seconds)


def _of_number(raw: Any, unit: int) -> Any:
    # What is outside goes first: the casts would fail on it.
    raw = _finite(raw) if raw.type().is_floating() else raw
    number = raw.cast("float64") if raw.type().is_decimal() else raw
    held = _held((number >= TIMES.start * unit) & (number < TIMES.stop * unit), raw)
    whole = held if raw.type().is_integer() else held.floor().cast("int64")
    # An engine divides in floating point: exact only for multiples of the unit.
    return ((whole - whole % unit) / unit).round().cast("int64")


def _finite(raw: Any) -> Any:
    """Floating-point numbers, null where they are NaN or infinite.

    The text of a value tells. The statistics of a Parquet file leave NaN out, and DuckDB believes
    them: it decides ``isnan`` and comparisons by them, without a look at the values. It also holds
    NaN to be the largest number, which would pass every lower bound.
    """
    return _held(~raw.cast("string").lower().contains("n"), raw)
