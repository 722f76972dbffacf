"""Rows of Parquet files: the engine reads them itself, so that any number of them will do."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from scaling.data.corpus import CorpusError
from scaling.data.engine import CHUNK, RESERVED, Engine, Spark
from scaling.data.sources.layout import FILE, LogTable, folder_values, require
from scaling.data.sources.relational import Types, column_types, is_text, to_logs

ROW, PATH, NUMBER, NAME = "#row", "#path", "#number", "#name"
"""Further columns: number of a row in its file, from 0; of the file: its path as the engine gives
it, its number among all, and its name for messages."""


@dataclass
class _Group:
    """Files that an engine can read at once: of the same columns, in and around them."""

    types: Types
    files: list[tuple[int, Path, dict[str, str | None]]] = field(default_factory=list)


def parquet_logs(
    engine: Engine, files: list[tuple[int, Path]], table: LogTable
) -> tuple[list[Any], int]:
    """The logs of files, for each layout among them, and the number of rows.

    Args:
        files: their numbers among all, and their paths.

    Raises:
        CorpusError: one is not Parquet, a mapped column is missing or of a type that cannot hold
            what it should, or a text in it is not UTF-8.
    """
    groups: dict[Any, _Group] = {}
    n_rows = 0
    for number, path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema, n = file.schema_arrow, file.metadata.num_rows
        except (OSError, pa.ArrowException) as e:
            reason = str(e).partition("\n")[0]
            raise CorpusError(f"{path}: cannot be read as Parquet: {reason}") from None
        _check_names(path, schema.names)
        around = folder_values(path, table, schema.names)
        require(path, [*schema.names, *around], table)
        kinds = column_types(path, schema, table)
        layout = (*zip(schema.names, schema.types, strict=True), *around)
        group = groups.setdefault(layout, _Group({**kinds, **dict.fromkeys(around, pa.string())}))
        group.files.append((number, path, around))
        n_rows += n
    return [_logs(engine, group, table) for group in groups.values()], n_rows


def _check_names(path: Path, names: list[str]) -> None:
    """Refuse names that an engine could not tell apart."""
    lower = [name.lower() for name in names]
    taken = (*RESERVED, ROW, PATH, NUMBER, NAME)
    if clash := sorted(n for n in names if lower.count(n.lower()) > 1 or n.lower() in taken):
        raise CorpusError(
            f"{path}: rename the columns {', '.join(map(repr, clash))}: names must differ in more "
            f"than case, also from {', '.join(taken)}"
        )


def _logs(engine: Engine, group: _Group, table: LogTable) -> Any:
    numbers, paths, around = zip(*group.files, strict=True)
    rows = engine.read_files(paths, ROW, PATH)
    columns = {
        PATH: [str(path.resolve()) for path in paths],
        NUMBER: pa.array(numbers, pa.int64()),
        NAME: [str(path) for path in paths],
        **{c: pa.array([values[c] for values in around], pa.string()) for c in around[0]},
    }
    batch = pa.RecordBatch.from_pydict(columns)
    here = engine.load(f"source_files_{numbers[0]}", [batch], batch.schema)
    rows = rows.select(*(c for c in group.types if c not in around[0]), ROW, PATH)
    texts = [c for c in rows.columns if c not in (ROW, PATH) and is_text(group.types[c])]
    # DuckDB ends at the first text that is not UTF-8; Spark would hand it on.
    if texts and isinstance(engine, Spark) and not _all_utf8(engine, rows, texts):
        refuse_foreign(paths, texts)
    rows = rows.join(here, PATH)
    where = rows[NAME] + ":" + (rows[ROW] + 1).cast("string") + ": "
    position = rows[NUMBER] * ibis.literal(FILE, "int64") + rows[ROW]
    return to_logs(rows, group.types, table, where, position)


@ibis.udf.scalar.builtin  # type: ignore[untyped-decorator]
def is_valid_utf8(text: str) -> bool:  # type: ignore[empty-body]
    """Of Spark 4."""


def _all_utf8(engine: Spark, rows: Any, texts: list[str]) -> bool:
    (wrong,) = engine.rows(rows.aggregate(**{c: (~is_valid_utf8(rows[c])).any() for c in texts}))
    return not any(wrong.values())


def refuse_foreign(paths: Iterable[Path], texts: Iterable[str]) -> None:
    """Look for texts that are not UTF-8, though Parquet says that they are.

    Args:
        texts: names of columns.

    Raises:
        CorpusError: there is one; the message names file and column.
    """
    for path in paths:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = [c for c in texts if c in schema.names and is_text(schema.field(c).type)]
            for batch in file.iter_batches(CHUNK, columns=columns):
                for name in columns:
                    try:
                        batch[name].validate(full=True)
                    except pa.ArrowInvalid:
                        raise CorpusError(f"{path}: column {name!r} holds text not UTF-8") from None
