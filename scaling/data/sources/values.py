"""Values of text files become those of a log."""

import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from scaling.data.sources import TIMES, shown
from scaling.data.sources.layout import ISO, OUTSIDE, UNITS, LogTable

LARGE = 1 << 63
"""Whole numbers that a column holds are below."""


def parsers(table: LogTable) -> dict[str, Callable[[Sequence[Any]], list[Any]]]:
    """What reads the values of each role. A ``ValueError`` tells what is wrong with one."""
    c, unit = table.columns, table.time_unit
    texts = {"user": c.user, "service": c.service, "item": c.item, "text": c.text}
    readers = {
        role: partial(_column, _plain_texts, partial(_text, column, role if role != "text" else ""))
        for role, column in texts.items()
    }
    readers["time"] = partial(
        _column, partial(_plain_times, UNITS[unit]), partial(_time, c.time, unit)
    )
    readers["rating"] = partial(_column, _plain_ratings, _rating)
    readers["position"] = partial(
        _column, lambda values, joined: None, partial(_position, "" if c.time else c.position)
    )
    readers["category"] = partial(_column, _plain_texts, partial(_text, c.category, ""))
    return {role: reader for role, reader in readers.items() if getattr(c, role)}


def _column(
    plain: Callable[[Sequence[str], str], list[Any] | None],
    one: Callable[[Any], Any],
    values: Sequence[Any],
) -> list[Any]:
    """Read values: all at once, where they are texts and there is nothing to look at in any."""
    try:
        found = plain(values, "".join(values)) if "" not in values else None
    except (TypeError, ValueError):  # not all are texts, or one is wrong
        found = None
    return list(map(one, values)) if found is None else found


def _plain_texts(values: Sequence[str], joined: str) -> list[Any] | None:
    joined.encode()
    return list(values)


def _plain_times(unit: int, values: Sequence[str], joined: str) -> list[Any] | None:
    if not (joined.isascii() and joined.isdigit()):
        return None
    numbers = list(map(int, values))
    if max(numbers) >= TIMES.stop * unit:
        return None
    return numbers if unit == 1 else [number // unit for number in numbers]


def _plain_ratings(values: Sequence[str], joined: str) -> list[Any] | None:
    if not joined.isascii() or "_" in joined:
        return None
    numbers = list(map(float, values))
    return numbers if all(map(math.isfinite, numbers)) else None


def _text(column: str | None, required: str, value: Any) -> str | None:
    if value is None or value == "":
        if required:
            raise ValueError(f"no {required} ({column!r} is empty)")
        return None
    if isinstance(value, dict | list | bool | float):
        told = "" if required == "user" else f": {shown(value)}"
        raise ValueError(f"{column!r} is no text or whole number{told}")
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{column!r} is not valid text") from None
    return text


def _number(value: Any, kind: Callable[[Any], Any]) -> Any:
    """A number of a kind; texts as ``layout`` has them, without what Python takes beyond that."""
    if isinstance(value, bool) or (
        isinstance(value, str) and (not value.isascii() or "_" in value)
    ):
        raise ValueError
    return kind(value)


def _time(column: str | None, time_unit: str, value: Any) -> int:
    """Unix time in whole seconds of a number, or of a text that is a number or ISO 8601."""
    if value is None or value == "":
        raise ValueError(f"no time ({column!r} is empty)")
    unit = UNITS[time_unit]
    try:
        try:
            time: int = _number(value, int) // unit
        except ValueError:
            try:
                number = _number(value, float)
                if math.isfinite(number):
                    time = int(number // unit)
                elif isinstance(value, str) and re.search("[0-9]", value):
                    time = -1  # more than a float holds
                else:
                    raise TypeError
            except ValueError:
                if not re.fullmatch(ISO, value):
                    raise
                moment = datetime.fromisoformat(value)
                moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
                time = int(moment.timestamp() // 1)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a time: {shown(value)}") from None
    if time not in TIMES:
        raise ValueError(f"{OUTSIDE} (time_unit = {time_unit!r}): {shown(value)}")
    return time


def _rating(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        rating: float = _number(value, float)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a rating: {shown(value)}") from None
    return rating if math.isfinite(rating) else None


def _position(required: str | None, value: Any) -> int | None:
    if value is None or value == "":
        if required:
            raise ValueError(f"no position ({required!r} is empty)")
        return None
    try:
        position = int(_number(value, int))
        if (isinstance(value, float) and value != position) or not -LARGE <= position < LARGE:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a position: {shown(value)}") from None
    return position
