"""RecBole's atomic files: tab-separated text under a header of ``name:type``.

Formats (Zhao et al., CIKM 2021, recbole.io/docs/user_guide/data/atomic_files.html; Hou et al., KDD
2022, github.com/RUCAIBox/UniSRec, dataset/preprocessing), every file plain or gzipped:

- interactions, a row each: ``user_id``, ``item_id`` and, where there are, ``rating`` and
  ``timestamp``;
- UniSRec's sequences, a row per target: ``user_id``, ``item_id_list`` (the newest 50 items before
  the target), ``item_id``. They have an order and no times;
- items: ``item_id`` and fields of text (``.item``; UniSRec's ``.text``);
- UniSRec's ``.item2index`` and ``.user2index``: raw id and number, without a header. Its items have
  raw ids, its sequences numbers.

Nothing is quoted: a quotation mark is one.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import Log, resolve
from scaling.data.sources.delimited import line_rows, parsed
from scaling.data.sources.lines import read_lines
from scaling.data.sources.values import finite_number, known, time_in_range, valid_text

HEADER = re.compile(r"\w+:(token|token_seq|float|float_seq)", re.ASCII)


class Service(Frozen):
    """Files of one service."""

    inter: Annotated[tuple[str, ...], Field(min_length=1)]
    """Interactions or sequences, the oldest first: UniSRec's train, valid, test."""
    items: str
    item_index: str | None = None
    """``.item2index``; None: interactions and items name an item alike."""
    user_index: str | None = None
    """``.user2index``; None: users have the names of the interactions, in all services."""


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["recbole"]
    text: Annotated[tuple[str, ...], Field(min_length=1)] = ("title",)
    """Fields of an item whose values, joined by ``". "``, are its text; UniSRec's: ``text``."""
    services: Annotated[dict[Name, Service], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_population(self) -> Self:
        for name, service in self.services.items():
            if len(self.services) > 1 and service.item_index and not service.user_index:
                raise ValueError(
                    f"services.{name}.user_index is missing: UniSRec numbers the users of each "
                    "data set anew, so that one number is another person in another service"
                )
        return self


class Row(NamedTuple):
    """A row of a file of sequences."""

    line: int
    user: str
    before: list[str]
    """Items before ``item``, oldest first; the newest of them where they are cut."""
    item: str


def files(config: Config, base: Path) -> list[Path]:
    """The files read."""
    return [
        resolve(base, path)
        for s in config.services.values()
        for path in (*s.inter, s.items, s.item_index, s.user_index)
        if path is not None
    ]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of all services; a row of any file that cannot be read is a problem.

    Raises:
        CorpusError: a file is missing, torn, no gzip though it is named so, or has another header.
    """
    position = count()
    for name, service in config.services.items():
        reader = _Reader(name, config.text, position)
        yield from reader.tables(service, base)
        for path in service.inter:
            yield from reader.logs(resolve(base, path))


class _Reader:
    """Reads the files of one service."""

    def __init__(self, service: str, fields: tuple[str, ...], position: Iterator[int]) -> None:
        self.service = service
        self.fields = fields
        self.position = position
        self.texts: dict[str, str] = {}
        self.items: dict[str, str] | None = None
        self.users: dict[str, str] | None = None
        self.newest: dict[str, str] = {}
        """Last item so far of each user of sequences."""

    def tables(self, service: Service, base: Path) -> Iterator[Log]:
        """Read what the interactions are joined with; yields the problems."""
        yield from self._texts(resolve(base, service.items))
        if service.item_index is not None:
            self.items = {}
            yield from _index(resolve(base, service.item_index), self.items)
        if service.user_index is not None:
            self.users = {}
            yield from _index(resolve(base, service.user_index), self.users)

    def logs(self, path: Path) -> Iterator[Log]:
        """Logs and problems of a file of interactions or sequences."""
        lines = read_lines(path)
        names = _header(path, lines, ("user_id", "item_id"))
        if "item_id_list" in names:
            yield from self._sequences(path, lines, names)
        else:
            yield from self._interactions(path, lines, names)

    def _texts(self, path: Path) -> Iterator[Log]:
        lines = read_lines(path)
        names = _header(path, lines, ("item_id", *self.fields))

        def texts(number: int, line: str) -> None:
            # As UniSRec reads it: text may hold tabs, and a row that ends early has none.
            values = dict(zip(names, line.split("\t", len(names) - 1), strict=False))
            item = known(values.get("item_id", ""), "item_id")
            text = ". ".join(v for f in self.fields if (v := values.get(f, "")).strip())
            if text.strip(" ."):  # UniSRec writes '.' for what is missing
                self.texts.setdefault(item, text)

        yield from parsed(path, line_rows(lines), texts)

    def _interactions(
        self, path: Path, lines: Iterator[tuple[int, str]], names: list[str]
    ) -> Iterator[Log]:
        def interaction(number: int, line: str) -> Log:
            values = _fields(line, names)
            user = known(values["user_id"], "user_id")
            item = known(values["item_id"], "item_id")
            rated, told = values.get("rating"), values.get("timestamp")
            rating = finite_number(rated, "rating") if rated else None
            time = None if told is None else time_in_range(finite_number(told, "timestamp"), told)
            return self._log(user, item, time, rating)

        return parsed(path, line_rows(lines), interaction)

    def _sequences(
        self, path: Path, lines: Iterator[tuple[int, str]], names: list[str]
    ) -> Iterator[Log]:
        rows: list[Row] = []
        for number, line in lines:
            try:
                values = _fields(line, names)
                user = known(values["user_id"], "user_id")
                item = known(values["item_id"], "item_id")
                row = Row(number, user, values["item_id_list"].split(), item)
            except ValueError as e:
                yield Log(problem=f"{path}:{number}: {e}")
                continue
            if rows and rows[0].user != row.user:
                yield from self._sequence(path, rows)
                rows = []
            rows.append(row)
        if rows:
            yield from self._sequence(path, rows)

    def _sequence(self, path: Path, rows: list[Row]) -> Iterator[Log]:
        """Logs of a user from rows that repeat one sequence: each row adds its own item, and the
        oldest row of all files also those before."""
        if len(rows[0].before) >= len(rows[-1].before):  # UniSRec writes the newest target first
            rows.reverse()
        newest = self.newest.get(rows[0].user)
        so_far: list[str] | None = None
        for row in rows:
            try:
                if so_far is not None:
                    items, follows = [row.item], row.before in (so_far, so_far[1:])
                elif newest is not None:
                    items, follows = [row.item], row.before[-1:] == [newest]
                else:
                    items, follows = [*row.before, row.item], True
                if not follows:
                    raise ValueError("the row does not continue its user's sequence")
                logs = [self._log(row.user, item) for item in items]
            except ValueError as e:
                logs = [Log(problem=f"{path}:{row.line}: {e}")]
            yield from logs
            so_far = [*row.before, row.item]
        self.newest[rows[0].user] = rows[-1].item

    def _log(
        self, user: str, item: str, time: int | None = None, rating: float | None = None
    ) -> Log:
        user, item = _raw(self.users, user, "user_index"), _raw(self.items, item, "item_index")
        text = self.texts.get(item)
        return Log(user, self.service, item, text, time, next(self.position), rating)


def _header(path: Path, lines: Iterator[tuple[int, str]], required: tuple[str, ...]) -> list[str]:
    """Names of the columns, in order."""
    _, line = next(lines, (0, ""))
    fields = line.split("\t")
    if not all(map(HEADER.fullmatch, fields)):
        raise CorpusError(
            f"{path}: its first line is no header of tab-separated 'name:type', "
            "type being token, token_seq, float or float_seq"
        )
    names = [field.partition(":")[0] for field in fields]
    if missing := [name for name in required if names.count(name) != 1]:
        raise CorpusError(
            f"{path}: has not one column {', '.join(map(repr, missing))}; "
            f"its columns: {', '.join(names)}"
        )
    return names


def _index(path: Path, raw: dict[str, str]) -> Iterator[Log]:
    """Fill ``raw``, number to raw id; yields the problems."""

    def entry(line: int, text: str) -> None:
        values = _fields(text, ["raw id", "number"])
        number = known(values["number"], "number")
        if number in raw:
            raise ValueError("its number is there twice")
        raw[number] = known(values["raw id"], "raw id")

    return parsed(path, line_rows(read_lines(path)), entry)


def _raw(index: dict[str, str] | None, identity: str, key: str) -> str:
    if index is None:
        return identity
    if (raw := index.get(identity)) is None:
        raise ValueError(f"not in {key}")
    return raw


def _fields(line: str, names: list[str]) -> dict[str, str]:
    values = valid_text(line, "the line").split("\t")
    if len(values) != len(names):
        raise ValueError(f"{len(values)} fields, not {len(names)}")
    return dict(zip(names, values, strict=True))
