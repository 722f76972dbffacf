"""Prepared Amazon 2014 sequences with raw ids, joined with titles by product id (asin).

The layout of ABXI (Bian et al., WWW 2025), two services numbered 0 and 1:

- ``sequences``: a user a line, ``user item|unixtime item|unixtime ...``, oldest first;
- ``item_map``: one JSON object, ``{asin: [item, service]}``;
- ``titles``: per service, ``asin<TAB>title`` lines.

Every file may be gzipped. Users keep the number they have in the file: raw ids are not needed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import Log, resolve, shown
from scaling.data.sources.delimited import line_rows, parsed
from scaling.data.sources.lines import read_lines
from scaling.data.sources.values import time_in_range, valid_text


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["amazon_sequences"]
    sequences: str
    item_map: str
    titles: Annotated[dict[Name, str], Field(min_length=1)]
    """File of titles per service, in the order of the services' numbers in ``item_map``."""


def files(config: Config, base: Path) -> list[Path]:
    """The files read."""
    return [resolve(base, p) for p in (config.sequences, config.item_map, *config.titles.values())]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of all users; items without a title have none.

    Raises:
        CorpusError: a file is missing, is no gzip though it is named so, or ``item_map`` is not
            what it should be.
    """
    services = tuple(config.titles)
    titles: dict[str, str] = {}

    def titled(line: int, text: str) -> None:
        asin, tab, title = text.partition("\t")
        if not (tab and asin):
            raise ValueError("not 'asin<TAB>title'")
        titles.setdefault(asin, title)

    for name in config.titles.values():
        path = resolve(base, name)
        yield from parsed(path, line_rows(read_lines(path)), titled)
    items = _item_map(resolve(base, config.item_map), services)
    path = resolve(base, config.sequences)
    for number, line in read_lines(path):
        user, *entries = line.split(" ")
        for position, entry in enumerate(entries):
            try:
                item, time = _entry(entry)
                if item not in items:
                    raise ValueError(f"unknown item {item}")
                if not valid_text(user, "the user"):
                    raise ValueError("no user")
            except ValueError as e:
                yield Log(problem=f"{path}:{number}: {e}")
            else:
                asin, service = items[item]
                yield Log(user, service, asin, titles.get(asin), time, position)


def _entry(entry: str) -> tuple[int, int]:
    """Item and time."""
    if not re.fullmatch(r"[0-9]{1,18}\|-?[0-9]{1,18}", entry):
        raise ValueError(f"not 'item|unixtime': {shown(entry)}")
    item, time = map(int, entry.split("|"))
    return item, time_in_range(time, time)


def _item_map(path: Path, services: tuple[str, ...]) -> dict[int, tuple[str, str]]:
    """Item number to (asin, service)."""
    try:
        raw = json.loads("\n".join(line for _, line in read_lines(path)))
        found = {}
        for asin, (item, service) in raw.items():
            if not (isinstance(item, int) and isinstance(service, int) and service >= 0):
                raise ValueError(f"{asin!r} is not [item, service]")
            found[item] = (valid_text(asin, "an asin"), services[service])
        return found
    except (ValueError, TypeError, AttributeError, IndexError) as e:
        raise CorpusError(
            f"{path}: not a JSON object of asin: [item, service] "
            f"with services 0..{len(services) - 1}: {e}"
        ) from None
