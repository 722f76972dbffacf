"""The layout of tables of logs: which files or tables, and which of their columns hold what."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import Field, field_serializer, model_validator

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError
from scaling.data.sources import resolve

FILE = 1 << 40
"""Positions of a file's rows start at this times the file's number: rows of one file are fewer."""
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
OUTSIDE = "not a time from 1970 to 2099"
SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl"}
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""Name of the folder of a missing value (Apache Hive: ``hive.exec.default.partition.name``)."""

# What a text must be to be a number or a time, whoever reads it: engines and Python each take more.
# In the syntax that Python, RE2 and Java share.
SPACE = r"[ \t\n\r\f\x0b]*"
WHOLE = r"[+-]?[0-9]+"
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
NO_NUMBER = r"[+-]?([nN][aA][nN]|[iI][nN][fF]([iI][nN][iI][tT][yY])?)"
ISO = (
    r"[1-9][0-9]{3}-[0-9]{2}-[0-9]{2}"
    r"([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.,][0-9]+)?)?"
    r"(Z|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?)?"
)
"""ISO 8601: a date, or with ``T`` or a space a time to minutes or seconds, and an offset."""


class Columns(Frozen):
    """Which column holds what."""

    user: str
    service: str | None = None
    """None: the table's ``service``."""
    text: str
    """Item text."""
    item: str | None = None
    """Id of the item; None: its text is its identity."""
    time: str | None = None
    """Unix time, or ISO 8601 (UTC where it says no zone); None: the rows are in order."""
    position: str | None = None
    """Whole number that orders the rows of a user, and must be there where ``time`` is not mapped;
    None: the order of files and of their rows."""
    rating: str | None = None
    """Number; NaN and infinity count as no rating."""
    category: str | None = None


class LogTable(Frozen):
    """Files of one layout, or a table of a database."""

    files: tuple[str, ...] = ()
    """Paths, folders or globs."""
    table: str | None = None
    """Name in a database, ``schema.name``, in place of files."""
    connection: str | None = None
    """URL of the database: ``duckdb:///path/file.duckdb``, ``postgres://user@host/database`` or
    another that Ibis knows; None: the catalog of the Spark session."""
    columns: Columns
    service: Name | None = None
    """Service of all logs, where no column says it."""
    format: Literal["parquet", "csv", "jsonl"] | None = None
    """None: by the suffix of the file, before any ``.gz``."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Of CSV; None: a tab in ``.tsv`` files, else a comma."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of times that are numbers; they are cut to whole seconds."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.files) == bool(self.table):
            raise ValueError("a table has either files or the name of a table")
        if self.connection is not None and self.table is None:
            raise ValueError("connection goes with table, not with files")
        if (self.service is None) == (self.columns.service is None):
            raise ValueError(f"{self.where}: give either a service or a column for it")
        if self.table is not None and self.columns.time is None and self.columns.position is None:
            raise ValueError(
                f"{self.where}: rows of a database have no order; map time or position"
            )
        return self

    @field_serializer("connection")
    def _who_connects_is_not_kept(self, connection: str | None) -> str | None:
        return connection and public_url(connection)

    @property
    def wanted(self) -> list[str]:
        """Columns that there must be."""
        return [c for c in self.columns.model_dump().values() if c is not None]

    @property
    def where(self) -> str:
        """The table, for messages."""
        if self.table is None:
            return ", ".join(self.files)
        return f"{public_url(self.connection)}: {self.table}" if self.connection else self.table


def refuse_secrets(url: object) -> None:
    """Refuse a URL with a password. It is not shown: messages may end up anywhere.

    Raises:
        ValueError: it has one, or is none.
    """
    try:
        if not isinstance(url, str) or not re.match("[a-z][a-z0-9]*://", url):
            raise ValueError
        parts = urlsplit(url)
        secret = parts.password is not None or any(
            re.search("pass|pwd|secret|token|key", name, re.IGNORECASE)
            for name, _ in parse_qsl(parts.query, keep_blank_values=True)
        )
    except ValueError:
        raise ValueError(
            "connection is no URL; valid: duckdb:///path/file.duckdb, postgres://user@host/database"
        ) from None
    if secret:
        raise ValueError(
            "connection holds a password; leave it to the environment or to a file of the "
            "database's client (PostgreSQL: PGPASSWORD or ~/.pgpass)"
        )


def public_url(url: str) -> str:
    """A connection without the parts that say who connects, and how."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def table_files(table: LogTable, base: Path) -> list[tuple[Path, str]]:
    """Files of a table and their formats, sorted by path within each pattern or folder. One that
    several names lead to is there once, by the first of them.

    Raises:
        CorpusError: one is missing, or of unknown format, or is in folders of different values.
    """
    found: dict[Path, str] = {}
    for pattern in table.files:
        path = resolve(base, pattern)
        magic = glob.has_magic(str(path)) and not path.exists()
        matches = sorted(map(Path, glob.glob(str(path), recursive=True))) if magic else [path]
        for match in matches or [path]:
            if not match.exists():
                linked = f" (it links to {match.readlink()})" if match.is_symlink() else ""
                raise CorpusError(f"{match}: no such file{linked}")
        for match in matches:
            kind = _format(match, table)
            if match.is_dir():
                # What a pattern finds beside files is read only where it is a folder of parts.
                if not magic or match.suffix == ".parquet":
                    found |= _of_folder(match, table)
            elif kind is not None:
                found[match] = kind
            elif not (magic and match.name.startswith("_")):
                raise CorpusError(f"{match}: format unknown; set format = {FORMATS}")
    first: dict[Path, Path] = {}
    for path in found:
        other = first.setdefault(path.resolve(), path)
        values = (folder_values(p, table, ()) for p in (path, other) if other != path)
        if len(set(map(str, values))) > 1:
            raise CorpusError(f"{path}: the same file as {other}, in folders of other values")
    return [(path, found[path]) for path in first.values()]


FORMATS = "parquet, csv or jsonl"


def _format(path: Path, table: LogTable) -> str | None:
    return table.format or SUFFIXES.get(Path(path.name.removesuffix(".gz")).suffix)


def _of_folder(folder: Path, table: LogTable) -> dict[Path, str]:
    """Files below a folder; names that begin with ``_`` or ``.`` are marks of who wrote it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part[0] in "_." for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (kind := _format(path, table)):
            found[path] = kind
    if not found:
        raise CorpusError(f"{folder}: holds no file of a known format ({FORMATS})")
    return found


def folder_values(path: Path, table: LogTable, there: Sequence[str]) -> dict[str, str | None]:
    """Mapped columns that are no columns of a file, but are in the names of its folders.

    Folders are named ``column=value``, as Hive, Spark and DuckDB name partitions.
    """
    parts = (part.split("=", 1) for part in path.parts[:-1] if "=" in part)
    named = {unquote(column): value for column, value in parts}
    return {
        c: None if named[c] == NO_VALUE else unquote(named[c])
        for c in dict.fromkeys(table.wanted)
        if c in named and c not in there
    }


def require(where: Any, there: Sequence[str], table: LogTable) -> None:
    """Refuse a file or table that lacks a mapped column.

    Args:
        where: the file, for messages.
        there: names of its columns.

    Raises:
        CorpusError: naming the file, and the columns it has.
    """
    if missing := [c for c in table.wanted if c not in there]:
        raise CorpusError(
            f"{where}: has no column {', '.join(map(repr, missing))}; "
            f"its columns: {', '.join(sorted(there))}"
        )
