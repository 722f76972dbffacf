"""The scratch database of a preparation: Ibis on a DuckDB file, and ordered streams out of it."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaling.files import TMP_PREFIX

CHUNK = 1 << 20
"""Rows handed over at a time."""
LOCK = "lock"


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` that is removed when the block ends.

    Its process holds a lock on a file in it. Folders that nobody holds any more, left by processes
    that were killed, are removed first. Where the file system has no locks, they stay.
    """
    prefix = f"{TMP_PREFIX}scratch-"
    for lock in parent.glob(f"{prefix}*/{LOCK}"):
        with contextlib.suppress(OSError), open(lock, "r+b") as f:  # held, or just removed
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder,
        open(Path(folder) / f"{LOCK}.new", "xb") as f,
    ):
        with contextlib.suppress(OSError):
            fcntl.flock(f, fcntl.LOCK_EX)
            # Only now under its name: nobody ever finds a lock that is not held yet.
            Path(f.name).rename(Path(folder) / LOCK)
        yield Path(folder)


class Scratch:
    """A DuckDB file in a folder that the caller removes; it spills there when memory is short."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.con = ibis.duckdb.connect(
            folder / "scratch.duckdb", temp_directory=str(folder / "spill")
        )

    def create(self, name: str, table: Any) -> Any:
        """Store the rows of an expression as a table."""
        return self.con.create_table(name, table)

    def drop(self, name: str) -> None:
        """Remove a table. Spelt out: Ibis 12 leaves out the name with some releases of sqlglot."""
        self.con.raw_sql(f'DROP TABLE "{name}"')

    def value(self, expression: Any) -> Any:
        """Value of a scalar expression, or a data frame of a small table."""
        return self.con.execute(expression)

    def stream(
        self, table: Any, columns: tuple[str, ...], order: tuple[str, ...]
    ) -> Iterator[tuple[NDArray[Any], ...]]:
        """Rows in order (nulls first), as numpy arrays of up to ``CHUNK`` rows.

        They pass through a Parquet file: what is larger than memory stays on disk, and the
        interface does not depend on a database's own way to hand out batches.
        """
        keys = [ibis.asc(table[c], nulls_first=True) for c in order]
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder) / "rows.parquet"
            table.select(*dict.fromkeys(columns + order)).order_by(keys).to_parquet(path)
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(CHUNK, columns=list(columns)):
                    yield tuple(batch[c].to_numpy(zero_copy_only=False) for c in columns)

    def fetch(
        self, table: Any, columns: dict[str, Any], order: tuple[str, ...]
    ) -> list[NDArray[Any]]:
        """Whole columns in order, in the given types."""
        chunks = list(self.stream(table, tuple(columns), order))
        return [
            np.concatenate([c[i] for c in chunks]).astype(t) if chunks else np.zeros(0, t)
            for i, t in enumerate(columns.values())
        ]

    def close(self) -> None:
        """Let go of the database."""
        self.con.disconnect()
