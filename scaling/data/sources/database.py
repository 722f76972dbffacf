"""Logs in a table of a database: any that Ibis can name, or of the Spark session's catalog."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa

from scaling.data.corpus import CorpusError
from scaling.data.engine import Engine, Spark
from scaling.data.sources import CHUNK, resolve
from scaling.data.sources.layout import LogTable, require
from scaling.data.sources.relational import Types, column_types, to_logs


def database_files(table: LogTable, base: Path) -> list[Path] | None:
    """Files of the database of a table; None where what it reads is not to be told by files.

    Raises:
        CorpusError: there is no such file.
    """
    scheme, _, rest = (table.connection or "").partition("://")
    if scheme not in ("duckdb", "sqlite"):
        return None
    path = resolve(base, rest)
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    logs = (path.with_name(path.name + suffix) for suffix in (".wal", "-wal"))
    return [path, *(log for log in logs if log.exists())]


def table_logs(engine: Engine, table: LogTable, number: int, base: Path) -> tuple[Any, int]:
    """The logs of a table and the number of its rows.

    Rows of a database pass through once, into the engine.

    Args:
        number: of the table among all.

    Raises:
        CorpusError: there is no such database or table, its driver is not installed, or a mapped
            column is missing or of a type that cannot hold what it should.
    """
    if table.connection is None:
        if not isinstance(engine, Spark):
            raise CorpusError(f"{table.where}: no connection; only engine spark has a catalog")
        rows = _mapped(engine.con, table)
        kinds = column_types(table.where, rows.schema().to_pyarrow(), table)
        n_rows = int(engine.value(rows.count()))
    else:
        con = _connect(table, base)
        try:
            rows, kinds, n_rows = _loaded(engine, con, table, f"source_table_{number}")
        finally:
            con.disconnect()
    where = ibis.literal(f"{table.where}: ")
    return to_logs(rows, kinds, table, where, ibis.null("int64")), n_rows


def _connect(table: LogTable, base: Path) -> Any:
    url = table.connection or ""
    scheme = url.partition("://")[0].replace("postgresql", "postgres")
    try:
        if files := database_files(table, base):
            if scheme == "sqlite":
                return ibis.sqlite.connect(files[0])
            return ibis.duckdb.connect(files[0], read_only=True)
        return ibis.connect(url)
    except ImportError:
        extra = "clue-scaling" if scheme == "postgres" else "ibis-framework"
        raise CorpusError(
            f"{table.where}: no driver for {scheme}; run: pip install '{extra}[{scheme}]'"
        ) from None
    except CorpusError:
        raise
    except Exception as e:  # each driver has its own
        raise CorpusError(f"{table.where}: no connection: {_reason(e)}") from None


def _reason(error: Exception) -> str:
    """Kind and first line of an error, without who connects."""
    line = str(error).partition("\n")[0]
    line = re.sub(r"://[^/\s]*@", "://", line)
    return f"{type(error).__name__}: " + re.sub(r'\b(user|role) "[^"]*"', r"\1 ...", line)


def _mapped(con: Any, table: LogTable) -> Any:
    """The mapped columns of a table."""
    *schema, name = (table.table or "").split(".")
    try:
        found = con.table(name, database=tuple(schema) or None)
    except Exception as e:  # each driver has its own
        raise CorpusError(f"{table.where}: no such table: {type(e).__name__}") from None
    require(table.where, found.columns, table)
    return found.select(*dict.fromkeys(table.wanted))


def _loaded(engine: Engine, con: Any, table: LogTable, name: str) -> tuple[Any, Types, int]:
    """A table's mapped columns in the engine, their types, and the number of rows."""
    found = _mapped(con, table)
    # Arrow has no type for these but text.
    texts = {
        c: found[c].cast("string")
        for c, kind in found.schema().items()
        if kind.is_uuid() or (kind.is_decimal() and None in (kind.precision, kind.scale))
    }
    found = found.mutate(**texts)
    schema = found.schema().to_pyarrow()
    kinds = column_types(table.where, schema, table)
    n_rows = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal n_rows
        if con.name == "duckdb" and hasattr(con.con, "to_arrow_reader"):
            # DuckDB 2, which Ibis 12 asks by an older name.
            reader = con.con.sql(con.compile(found)).to_arrow_reader(CHUNK)
        else:
            reader = con.to_pyarrow_batches(found, chunk_size=CHUNK)
        for batch in reader:
            n_rows += batch.num_rows
            yield batch.cast(schema)

    try:
        return engine.load(name, batches(), schema), kinds, n_rows
    except (CorpusError, OSError):
        raise
    except Exception as e:  # each driver has its own; its text may hold values
        raise CorpusError(f"{table.where}: cannot be read: {type(e).__name__}") from None
