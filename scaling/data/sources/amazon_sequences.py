"""Prepared Amazon 2014 sequences with raw ids, joined with titles by product id (asin).

The layout of ABXI (Bian et al., WWW 2025), two services numbered 0 and 1:

- ``sequences``: a user a line, ``user item|unixtime item|unixtime ...``, oldest first;
- ``item_map``: one JSON object, ``{asin: [item, service]}``;
- ``titles``: per service, ``asin<TAB>title`` lines.

Every file may be gzipped. Users keep the number they have in the file: raw ids are not needed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import TIMES, UNREADABLE, Log, open_text, resolve, shown


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
    for name in config.titles.values():
        path = resolve(base, name)
        for number, line in _lines(path):
            asin, tab, title = line.partition("\t")
            if not (tab and asin):
                yield Log(problem=f"{path}:{number}: not 'asin<TAB>title'")
            elif not _sound(line):
                yield Log(problem=f"{path}:{number}: not UTF-8")
            else:
                titles.setdefault(asin, title)
    items = _item_map(resolve(base, config.item_map), services)
    path = resolve(base, config.sequences)
    for number, line in _lines(path):
        user, *entries = line.split(" ")
        for position, entry in enumerate(entries):
            try:
                item, time = (int(x) for x in entry.split("|"))
                asin, service = items[item]
            except KeyError as e:
                yield Log(problem=f"{path}:{number}: unknown item {e}")
            except ValueError:
                yield Log(problem=f"{path}:{number}: not 'item|unixtime': {shown(entry)}")
            else:
                if time not in TIMES:
                    yield Log(problem=f"{path}:{number}: not a time from 1970 to 2099: {time}")
                elif not user or not _sound(user):
                    yield Log(problem=f"{path}:{number}: no user")
                else:
                    yield Log(user, service, asin, titles.get(asin), time, position)


def _sound(text: str) -> bool:
    """Whether no byte of a text was out of its encoding."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1."""
    try:
        with open_text(path) as f:
            for number, line in enumerate(f, 1):
                if line := line.rstrip("\r\n"):
                    yield number, line
    except UNREADABLE as e:
        raise CorpusError(f"{path}: cannot be read: {e}") from None


def _item_map(path: Path, services: tuple[str, ...]) -> dict[int, tuple[str, str]]:
    """Item number to (asin, service)."""
    try:
        raw = json.loads("\n".join(line for _, line in _lines(path)))
        found = {}
        for asin, (item, service) in raw.items():
            if not (isinstance(item, int) and isinstance(service, int) and service >= 0):
                raise ValueError(f"{asin!r} is not [item, service]")
            found[item] = (asin, services[service])
        return found
    except (ValueError, TypeError, AttributeError, IndexError) as e:
        raise CorpusError(
            f"{path}: not a JSON object of asin: [item, service] "
            f"with services 0..{len(services) - 1}: {e}"
        ) from None
