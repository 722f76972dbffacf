"""Amazon reviews as published in 2014 and 2018: per category, a file of reviews and one of items.

Formats (McAuley et al., jmcauley.ucsd.edu/data/amazon; Ni et al., nijianmo.github.io/amazon), every
file plain or gzipped:

- ``reviews``, a JSON object a line: ``asin``, ``reviewerID``, ``overall``, ``unixReviewTime``; or,
  named ``*.csv``, the ratings alone, without a header: ``user,item,rating,time`` in the release of
  2014, ``item,user,rating,time`` in that of 2018;
- ``meta``, an item a line: ``asin``, ``title``, ``brand``, ``categories`` (2014) or ``category``
  (2018). JSON, but most files of 2014 hold Python literals, which look alike.

Reviewers' names and what they wrote are parsed as parts of a line and leave this module nowhere:
not in a log, not in a problem.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from scaling.config import Frozen, Name
from scaling.data.sources import Log, resolve, shown
from scaling.data.sources.delimited import line_rows, parsed
from scaling.data.sources.lines import read_lines
from scaling.data.sources.values import finite_number, time_in_range, valid_text, whole_number

MAX_LINE = 1 << 20
"""Longer lines are not parsed: a Python literal takes some hundred times its length in memory."""
RUBBISH = re.compile(r"<span|getTime|</?[a-z][a-z0-9]*(\s[^<>=]*=[^<>]*|\s*/?)>|^\s*title_\d+\s*$")
"""What the crawler of 2018 left where the page was another than it knew, and place holders."""
ASIN = re.compile(r"[0-9A-Z]{10}", re.ASCII)
FIELDS = {"title": ("title",), "category": ("category", "categories"), "brand": ("brand",)}
"""Keys of a field of an item in either release."""


class Service(Frozen):
    """Files of one category."""

    reviews: str
    """JSON lines, or ``.csv``: ratings only."""
    meta: str


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["amazon_reviews"]
    release: Literal[2014, 2018]
    """Decides the order of a csv's columns, and whether items may be Python literals."""
    text: Annotated[tuple[Literal["title", "category", "brand"], ...], Field(min_length=1)] = (
        "title",
    )
    """Fields whose values, joined by ``". "``, are an item's text. CLUE has titles (Shin et al.
    2023, Section 4.2), LMRec title, categories and brand."""
    services: Annotated[dict[Name, Service], Field(min_length=1)]


def files(config: Config, base: Path) -> list[Path]:
    """The files read."""
    return [resolve(base, p) for s in config.services.values() for p in (s.reviews, s.meta)]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of all services; a line of any file that cannot be read is a problem.

    Of repeated rows of an item the first one with a title counts. Titles with markup and place
    holders such as ``title_7080`` are missing ones; an item without a row or text is untitled.

    Raises:
        CorpusError: a file is missing, torn, or no gzip though it is named so.
    """
    position = count()
    for name, service in config.services.items():
        texts: dict[str, str] = {}
        yield from _items(resolve(base, service.meta), config, texts)
        path = resolve(base, service.reviews)
        parse = _review
        if Path(path.name.removesuffix(".gz")).suffix == ".csv":
            parse = _rating_2014 if config.release == 2014 else _rating_2018
        log = partial(_log, name, texts, position, parse)
        yield from parsed(path, line_rows(read_lines(path)), log)


def _log(
    service: str,
    texts: dict[str, str],
    position: Iterator[int],
    parse: Callable[[str], tuple[str, str, float, int]],
    line: int,
    text: str,
) -> Log:
    user, item, rating, time = parse(_short(text))
    return Log(user, service, item, texts.get(item), time, next(position), rating)


def _short(line: str) -> str:
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of more than {MAX_LINE:,} characters")
    return line


def _items(path: Path, config: Config, texts: dict[str, str]) -> Iterator[Log]:
    """Fill ``texts``, asin to text; yields the problems."""
    untitled: set[str] = set()

    def item(line: int, row: str) -> None:
        asin, titled, text = _item(_short(row), config)
        if text and (asin not in texts or (titled and asin in untitled)):
            texts[asin] = text
            (untitled.discard if titled else untitled.add)(asin)

    yield from parsed(path, line_rows(read_lines(path)), item)


def _item(line: str, config: Config) -> tuple[str, bool, str]:
    """The asin, whether no title is missed, and the text."""
    row = _object(line, literal=config.release == 2014)
    asin = _identity(row, "asin")
    values = {field: _value(row, field) for field in config.text}
    return asin, bool(values.get("title", True)), ". ".join(v for v in values.values() if v)


def _value(row: dict[str, Any], field: str) -> str:
    """The text of a field; '' where it is missing or rubbish."""
    value = next((row[key] for key in FIELDS[field] if row.get(key) is not None), "")
    entries = value if isinstance(value, list) else [value]  # categories: a list, 2014 of lists
    words = [w for e in entries for w in (e if isinstance(e, list) else [e])]
    if not all(isinstance(w, str) for w in words):
        raise ValueError(f"{field} is no text")
    text = " ".join(w for w in words if w.strip() and not RUBBISH.search(w))
    return valid_text(text, field)


def _review(line: str) -> tuple[str, str, float, int]:
    row = _object(line)
    user, item = _identity(row, "reviewerID"), _identity(row, "asin")
    rating, time = row.get("overall"), row.get("unixReviewTime")
    if not isinstance(rating, int | float) or isinstance(rating, bool):
        raise ValueError("overall is no number")
    if not isinstance(time, int) or isinstance(time, bool):
        raise ValueError("unixReviewTime is no whole number")
    return user, item, _rating(rating), time_in_range(time, time)


def _rating_2014(line: str) -> tuple[str, str, float, int]:
    fields = line.strip().split(",")
    if len(fields) != 4:
        raise ValueError(f"{len(fields)} fields, not user,item,rating,time")
    return _rated(*fields)


def _rating_2018(line: str) -> tuple[str, str, float, int]:
    fields = line.strip().split(",")
    if len(fields) != 4:
        raise ValueError(f"{len(fields)} fields, not item,user,rating,time")
    item, user, rating, time = fields
    return _rated(user, item, rating, time)


def _rated(user: str, item: str, rating: str, time: str) -> tuple[str, str, float, int]:
    # Nothing else would tell a csv of the other release, whose users and items are exchanged.
    if not ASIN.fullmatch(item):
        raise ValueError("the item is no asin of 10 letters and digits; is it the other release?")
    if not user:
        raise ValueError("no user")
    stars = _rating(finite_number(rating, "rating"))
    return user, item, stars, time_in_range(whole_number(time, "time"), time)


def _object(line: str, literal: bool = False) -> dict[str, Any]:
    """The object of a line. Messages of the parsers may quote it and are left out."""
    row: Any
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        if not literal:
            raise ValueError("not JSON") from None
        try:
            with warnings.catch_warnings():  # of "\\d" and the like, quoting it
                warnings.simplefilter("ignore")
                row = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise ValueError("neither JSON nor a Python literal") from None
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row


def _identity(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"no {key}")
    return valid_text(value, key)


def _rating(value: float) -> float:
    if not 1 <= value <= 5:
        raise ValueError(f"not a rating of 1 to 5: {shown(value)}")
    return float(value)
