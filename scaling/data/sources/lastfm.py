"""Last.fm 2K of HetRec 2011: artists listened to, and tags given to artists, by the same users
(Cantador, Brusilovsky and Kuflik 2011, https://grouplens.org/datasets/hetrec-2011).

A folder as it is unpacked: ``user_artists.dat``, ``user_taggedartists.dat``, ``artists.dat`` and
``tags.dat``, parted by tabs, with a header. Artists listened to have no times, and their order says
nothing; tags have days.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from scaling.config import Frozen, Name
from scaling.data.sources import Log, resolve
from scaling.data.sources.delimited import csv_rows, find, parsed
from scaling.data.sources.values import number_id, unix_time, user_id, whole_number

BEGAN = 2002
"""Year in which Last.fm began (https://en.wikipedia.org/wiki/Last.fm); earlier dates are wrong."""


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["lastfm"]
    path: str
    """Folder of the files, each plain or ``.gz``."""
    listened: Name = "listened"
    """Service of the artists a user listened to."""
    tagged: Name = "tagged"
    """Service of the tags a user gave. The tag is the item: one is given to many artists."""


def files(config: Config, base: Path) -> list[Path]:
    """The files read."""
    folder = resolve(base, config.path)
    names = ("user_artists.dat", "artists.dat", "user_taggedartists.dat", "tags.dat")
    return [find(folder, name) for name in names]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of what was listened to, then of the tags; what has no name is untitled.

    Raises:
        CorpusError: a file is missing, torn or no table of this format.
    """
    listened, artists, tagged, tags = files(config, base)
    yield from _logs(config.listened, listened, ("artistID",), artists, ("id", "name"))
    columns = ("tagID", "day", "month", "year")
    yield from _logs(config.tagged, tagged, columns, tags, ("tagID", "tagValue"))


def _logs(
    service: str, path: Path, columns: tuple[str, ...], items: Path, named: tuple[str, ...]
) -> Iterator[Log]:
    names: dict[str, str] = {}

    def name(line: int, item: str, text: str) -> None:
        names[number_id(item, "id")] = text

    def log(line: int, user: str, item: str, *day: str) -> Log:
        item = number_id(item, "id")
        time = _time(*day) if day else None
        return Log(user_id(user), service, item, names.get(item), time, line)

    yield from parsed(items, csv_rows(items, named, tabs=True), name)
    yield from parsed(path, csv_rows(path, ("userID", *columns), tabs=True), log)


def _time(day: str, month: str, year: str) -> int:
    if whole_number(year, "year") < BEGAN:
        raise ValueError(f"dated {year}, before Last.fm began ({BEGAN})")
    return unix_time(f"{year:0>4}-{month:0>2}-{day:0>2}")
