"""Behaviour logs in tables, with a mapping of columns: Parquet, CSV or JSON lines, or a table of a
database.

Parquet goes straight into the engine (``parquet.py``): it is the format for logs that are large.
Texts are parsed by Python (``texts.py``); rows of a database pass through once (``database.py``).
"""

from pathlib import Path
from typing import Any, Literal, Self

import ibis
from pydantic import model_validator

from scaling.config import Frozen
from scaling.data.corpus import CorpusError
from scaling.data.engine import Engine
from scaling.data.sources import SCHEMA, parquet
from scaling.data.sources.database import database_files, table_logs
from scaling.data.sources.layout import LogTable, refuse_secrets, table_files
from scaling.data.sources.text_rows import TextFile
from scaling.data.sources.texts import Found, text_batches


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["tables"]
    tables: tuple[LogTable, ...]

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, data: Any) -> Any:
        # Before anything else is wrong: messages show the values that they are about.
        tables = data.get("tables") if isinstance(data, dict) else None
        for table in tables if isinstance(tables, list) else []:
            if isinstance(table, dict) and table.get("connection") is not None:
                refuse_secrets(table["connection"])
            if isinstance(table, dict) and "://" in str(table.get("files")):
                raise ValueError("files are paths; the URL of a database is its connection")
        return data

    @model_validator(mode="after")
    def _some_table(self) -> Self:
        if not self.tables:
            raise ValueError("there is no [[source.tables]]")
        return self


def files(config: Config, base: Path) -> list[Path] | None:
    """All files that are read; None where a server or a catalog is read, too."""
    found: list[Path] = []
    for table in config.tables:
        if table.table is None:
            found += [path for path, _ in table_files(table, base)]
        elif (database := database_files(table, base)) is not None:
            found += database
        else:
            return None
    return found


def refuse_foreign(config: Config, base: Path) -> None:
    """Look for texts of Parquet files that are not UTF-8.

    Raises:
        CorpusError: there is one; the message names file and column.
    """
    for table in config.tables:
        found = table_files(table, base)
        parquet.refuse_foreign((p for p, kind in found if kind == "parquet"), table.wanted)


def logs(engine: Engine, config: Config, base: Path) -> ibis.Table:
    """Logs of all tables; rows that cannot be read have a ``problem``.

    Raises:
        CorpusError: a file or table is missing, of unknown format, not of the format it should be,
            or lacks a mapped column; or it has no rows.
    """
    parts: list[Any] = []
    texts: list[TextFile] = []
    found: dict[int, Found] = {}
    number = 0
    for table in config.tables:
        of = Found(table)
        found[number] = of
        if table.table is not None:
            part, of.rows = table_logs(engine, table, number, base)
            parts.append(part)
            number += 1
            continue
        of_parquet = []
        for path, kind in table_files(table, base):
            found[number] = of
            if kind == "parquet":
                of_parquet.append((number, path))
            else:
                texts.append(TextFile(number, path, kind, table))
            number += 1
        more, of.rows = parquet.parquet_logs(engine, of_parquet, table)
        parts += more
    if texts:
        parts.append(engine.load("source_texts", text_batches(texts, found), SCHEMA))
    for of in found.values():
        if not of.rows:
            raise CorpusError(f"{of.table.where}: no rows")
        if of.unseen:
            raise CorpusError(
                f"{of.table.where}: no row has {', '.join(map(repr, sorted(of.unseen)))}; "
                "correct the table's columns or leave them out"
            )
    return ibis.union(*parts) if len(parts) > 1 else parts[0]
