"""What values must be to be text, numbers and times of a log: one rule for all that Python parses.
It is that of ``layout``, by which engines read, too."""

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


def valid_text(text: str, what: str) -> str:
    """The text, if it is of whole characters: lone surrogates come of bytes of another encoding,
    and of JSON that has cut a pair.

    Raises:
        ValueError: it is not; ``what`` names it.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} is not valid text") from None
    return text


def known(value: str, name: str) -> str:
    """A text that must be there."""
    if not value.strip():
        raise ValueError(f"no {name}")
    return value


def number_id(value: str, name: str) -> str:
    """An id that is a number."""
    if not re.fullmatch(r"[0-9]{1,20}", value):
        raise ValueError(f"{name} is no number: {shown(value)}" if value else f"no {name}")
    return value


def user_id(value: str) -> str:
    """A user's id that is a number. It is not shown."""
    if not re.fullmatch(r"[0-9]{1,20}", value):
        raise ValueError("user is no number" if value else "no user")
    return value


def whole_number(value: str, name: str) -> int:
    """A whole number."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        raise ValueError(f"{name} is no whole number: {shown(value)}")
    return int(value)


def finite_number(value: str, name: str) -> float:
    """A finite number."""
    try:
        found: float = _number(value, float)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} is no number: {shown(value)}")
    return found


def time_in_range(time: float, value: object) -> int:
    """A time in whole seconds, if it is in ``TIMES``; ``value`` is what it was read from."""
    seconds = int(time // 1)
    if seconds not in TIMES:
        raise ValueError(f"{OUTSIDE}: {shown(value)}")
    return seconds


def unix_time(value: str) -> int:
    """A time given in Unix seconds, or by ISO 8601 (UTC where it says no zone). [Unix s]"""
    try:
        time = int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else _iso(value)
    except (ValueError, OverflowError):
        raise ValueError(f"not a time: {shown(value)}") from None
    return time_in_range(time, value)


def _iso(value: str) -> int:
    if not re.fullmatch(ISO, value):
        raise ValueError
    moment = datetime.fromisoformat(value)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return int(moment.timestamp() // 1)


def _text(column: str | None, required: str, value: Any) -> str | None:
    if value is None or value == "":
        if required:
            raise ValueError(f"no {required} ({column!r} is empty)")
        return None
    if isinstance(value, dict | list | bool | float):
        told = "" if required == "user" else f": {shown(value)}"
        raise ValueError(f"{column!r} is no text or whole number{told}")
    return valid_text(str(value), repr(column))


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
                time = _iso(value)
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
