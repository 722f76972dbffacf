"""Prepared Amazon 2014 sequences with raw ids, joined with titles by product id (asin).

The layout of ABXI (Bian et al., WWW 2025), two services numbered 0 and 1:

- ``sequences``: a user a line, ``user item|unixtime item|unixtime ...``, oldest first;
- ``item_map``: one JSON object, ``{asin: [item, service]}``;
- ``titles``: per service, ``asin<TAB>title`` lines.

Every file may be gzipped. Users keep the number they have in the file: raw ids are not needed.
"""

import gzip
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import ibis
import pyarrow as pa
from pydantic import Field

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import TIMES, resolve


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


def logs(con: Any, config: Config, base: Path) -> ibis.Table:
    """Logs of all users; items without a title have none.

    Raises:
        CorpusError: a file is missing, is no gzip though it is named so, or ``item_map`` is not
            what it should be.
    """
    services = tuple(config.titles)
    titles: dict[str, str] = {}
    problems: list[str] = []
    for path in config.titles.values():
        for number, line in enumerate(_lines(resolve(base, path)), 1):
            asin, tab, title = line.partition("\t")
            if tab and asin:
                titles.setdefault(asin, title)
            else:
                problems.append(
                    f"{resolve(base, path)}:{number}: not 'asin<TAB>title': {line[:60]!r}"
                )
    items = _item_map(resolve(base, config.item_map), services)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("user", "service", "item", "text", "time", "position", "problem")
    }

    def add(*row: Any) -> None:
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)

    for number, line in enumerate(_lines(resolve(base, config.sequences)), 1):
        user, *entries = line.split(" ")
        for position, entry in enumerate(entries):
            try:
                item, time = (int(x) for x in entry.split("|"))
                asin, service = items[item]
                if not user:
                    raise ValueError("no user")
                if time not in TIMES:
                    raise ValueError("time out of range")
            except (ValueError, KeyError) as e:
                reason = f"unknown item {e}" if isinstance(e, KeyError) else "not 'item|unixtime'"
                problems.append(
                    f"{resolve(base, config.sequences)}:{number}: {reason}: {entry[:60]!r}"
                )
            else:
                add(user, service, asin, titles.get(asin), time, position, None)
    for problem in problems:
        add(*(None,) * 6, problem)
    types = [pa.string()] * 4 + [pa.int64()] * 2 + [pa.string()]
    arrays = [pa.array(c, t) for c, t in zip(columns.values(), types, strict=True)]
    table: ibis.Table = ibis.memtable(pa.table(arrays, names=list(columns)))
    return table


def _lines(path: Path) -> Any:
    """Lines of a text file, gzipped where its name says so; invalid UTF-8 becomes U+FFFD."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", errors="replace", newline="\n") as f:
            for line in f:
                if line := line.rstrip("\r\n"):
                    yield line
    except FileNotFoundError:
        raise CorpusError(f"{path}: no such file") from None
    except (OSError, EOFError) as e:
        raise CorpusError(f"{path}: cannot be read: {e}") from None


def _item_map(path: Path, services: tuple[str, ...]) -> dict[int, tuple[str, str]]:
    """Item number to (asin, service)."""
    try:
        raw = json.loads("\n".join(_lines(path)))
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
