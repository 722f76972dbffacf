"""Values of text files become those of a log, one by one."""

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from scaling.data.sources import TIMES, shown
from scaling.data.sources.layout import ISO, OUTSIDE, UNITS, LogTable

LARGE = 1 << 63
"""Whole numbers that a column holds are below."""


def parsers(table: LogTable) -> dict[str, Callable[[Any], Any]]:
    """What reads the values of each role. A ``ValueError`` tells what is wrong with one."""
    c = table.columns
    readers: dict[str, Callable[[Any], Any]] = {
        "user": partial(_text, c.user, "user"),
        "service": partial(_text, c.service, "service"),
        "item": partial(_text, c.item, "item"),
        "text": partial(_text, c.text, ""),
        "time": partial(_time, c.time, table.time_unit),
        "rating": _rating,
        "position": _position,
        "category": partial(_text, c.category, ""),
    }
    return {role: reader for role, reader in readers.items() if getattr(c, role)}


def _text(column: str | None, required: str, value: Any) -> str | None:
    if value is None or value == "":
        if required:
            raise ValueError(f"no {required} ({column!r} is empty)")
        return None
    if isinstance(value, dict | list | bool | float):
        raise ValueError(f"{column!r} is no text or whole number: {shown(value)}")
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


def _position(value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        position = int(_number(value, int))
        if (isinstance(value, float) and value != position) or not -LARGE <= position < LARGE:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"not a position: {shown(value)}") from None
    return position
