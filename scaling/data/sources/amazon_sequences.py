"""Prepared Amazon 2014 sequences with raw ids, joined with titles by product id (asin).

The layout of ABXI (Bian et al., WWW 2025), two services numbered 0 and 1:

- ``sequences``: a user a line, ``user item|unixtime item|unixtime ...``, oldest first;
- ``item_map``: one JSON object, ``{asin: [item, service]}``;
- ``titles``: per service, ``asin<TAB>title`` lines;
- ``user_map``: one JSON object, ``{raw id: user}``.

Every file may be gzipped. Without a ``user_map`` users keep the number they have in the file. Sets
of different services are joined by the users' raw ids.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import Log, resolve, shown
from scaling.data.sources.delimited import line_rows, parsed
from scaling.data.sources.lines import read_lines
from scaling.data.sources.values import time_in_range, valid_text


class SequenceSet(Frozen):
    """Files of one set."""

    sequences: str
    item_map: str
    titles: Annotated[dict[Name, str], Field(min_length=1)]
    """File of titles per service, in the order of the services' numbers in ``item_map``."""
    user_map: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the set."""
        users = () if self.user_map is None else (self.user_map,)
        return (self.sequences, self.item_map, *self.titles.values(), *users)

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A source of a single set keeps the digest that it had before there were several.
        return {k: v for k, v in dump(self).items() if v or k not in ("user_map", "joined")}


class Config(SequenceSet):
    """``[source]`` of a corpus file."""

    kind: Literal["amazon_sequences"]
    joined: tuple[SequenceSet, ...] = ()
    """More sets, of other services: a user is the same in all where the raw id is."""

    @model_validator(mode="after")
    def _can_be_joined(self) -> Self:
        sets: tuple[SequenceSet, ...] = (self, *self.joined)
        if self.joined and not all(s.user_map for s in sets):
            raise ValueError("joined sets need the raw ids of their users: give each a user_map")
        names = [service for s in sets for service in s.titles]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"joined: service {twice[0]!r} is in more than one set")
        return self


def files(config: Config, base: Path) -> list[Path]:
    """The files read."""
    return [resolve(base, p) for s in (config, *config.joined) for p in s.files]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of all users; items without a title have none.

    Raises:
        CorpusError: a file is missing, is no gzip though it is named so, or ``item_map`` or
            ``user_map`` is not what it should be.
    """
    for one in (config, *config.joined):
        yield from _rows(one, base)


def _rows(config: SequenceSet, base: Path) -> Iterator[Log]:
    """Logs of one set."""
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
    users = None if config.user_map is None else _user_map(resolve(base, config.user_map))
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
                if users is not None and user not in users:
                    raise ValueError(f"unknown user {shown(user)}")
            except ValueError as e:
                yield Log(problem=f"{path}:{number}: {e}")
            else:
                asin, service = items[item]
                who = user if users is None else users[user]
                yield Log(who, service, asin, titles.get(asin), time, position)


def _entry(entry: str) -> tuple[int, int]:
    """Item and time."""
    if not re.fullmatch(r"[0-9]{1,18}\|-?[0-9]{1,18}", entry):
        raise ValueError(f"not 'item|unixtime': {shown(entry)}")
    item, time = map(int, entry.split("|"))
    return item, time_in_range(time, time)


def _user_map(path: Path) -> dict[str, str]:
    """Number of a user, as it is written, to the raw id."""
    try:
        raw = json.loads("\n".join(line for _, line in read_lines(path)))
        found = {str(int(user)): valid_text(name, "a user") for name, user in raw.items()}
    except (ValueError, TypeError, AttributeError) as e:
        raise CorpusError(f"{path}: not a JSON object of raw id: user: {e}") from None
    if len(found) < len(raw):
        raise CorpusError(f"{path}: {len(raw) - len(found)} raw ids have a number of another")
    return found


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
