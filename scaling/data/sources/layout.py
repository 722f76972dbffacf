"""The layout of tables of logs: which files, and which of their columns hold what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from scaling.config import Frozen, Name
from scaling.data.corpus import CorpusError

FILE = 1 << 40
"""Positions of a file's rows start at this times the file's number: rows of one file are fewer."""
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
OUTSIDE = "not a time from 1970 to 2099"


class Columns(Frozen):
    """Which column of the files holds what."""

    user: str
    service: str | None = None
    """None: the table's ``service``."""
    text: str
    """Item text."""
    item: str | None = None
    """Id of the item; None: its text is its identity."""
    time: str | None = None
    """Unix time, or ISO 8601 (UTC where it says no zone); None: the rows are in order."""
    rating: str | None = None
    """Number; NaN and infinity count as no rating."""
    category: str | None = None


class LogTable(Frozen):
    """Files of one layout."""

    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs."""
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

    @property
    def wanted(self) -> list[str]:
        """Columns that the files must have."""
        return [c for c in self.columns.model_dump().values() if c is not None]


def require(path: Path, there: Sequence[str], table: LogTable) -> None:
    """Refuse a file without exactly one column of each name that is mapped.

    Args:
        there: names of its columns.

    Raises:
        CorpusError: naming the file, and the columns it has.
    """
    for column in table.wanted:
        if there.count(column) > 1:
            raise CorpusError(f"{path}: has {there.count(column)} columns {column!r}")
    if missing := [c for c in table.wanted if c not in there]:
        raise CorpusError(
            f"{path}: has no column {', '.join(map(repr, missing))}; "
            f"its columns: {', '.join(sorted(there))}"
        )
