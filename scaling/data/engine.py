"""Engines: where the relational part of a preparation runs.

The program (``logs.py``) is written once, in Ibis. Both engines run it and give the same bytes:
DuckDB on one machine, larger than memory, and Spark on as many as a cluster has. What is not
relational leaves the engine as Parquet in a total order, and comes back as Parquet.
"""

import abc
import contextlib
import glob
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaling.data.corpus import CorpusError

CHUNK = 1 << 20
"""Rows handed over at a time."""
RESERVED = ("file_row_number",)
"""Columns that DuckDB names itself."""
EngineName = Literal["duckdb", "spark"]


class Engine(abc.ABC):
    """A database for one preparation.

    Attributes:
        con: Ibis connection, for expressions that read.
        folder: scratch folder, which the caller removes.
    """

    con: Any
    folder: Path

    @property
    @abc.abstractmethod
    def software(self) -> dict[str, str]:
        """``engine``: its name; and the version of what it runs on."""

    @abc.abstractmethod
    def store(self, name: str, table: Any) -> Any:
        """Keep the rows of an expression, in any order, as a table."""

    @abc.abstractmethod
    def drop(self, name: str) -> None:
        """Remove what ``store`` or ``load`` keeps under a name."""

    @abc.abstractmethod
    def read(self, path: Path) -> Any:
        """The rows of a Parquet file, or of a folder of them."""

    @abc.abstractmethod
    def read_files(self, paths: Sequence[Path], row: str, file: str) -> Any:
        """The rows of Parquet files that have the same columns, none of a name in ``RESERVED``.

        Args:
            row: name of a further column: the number of the row in its file, from 0.
            file: name of a further column: its file, as ``Path.resolve`` gives it.
        """

    @abc.abstractmethod
    def write(self, table: Any, path: Path) -> None:
        """Write an expression as Parquet, in its order: a file, or a folder whose sorted files
        follow each other."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the database."""

    def load(self, name: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Any:
        """Keep batches of rows as a table, whatever their number."""
        path = self.folder / f"{name}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return self.read(path)

    def rows(self, table: Any) -> list[dict[str, Any]]:
        """The rows of a small table."""
        found: list[dict[str, Any]] = self.con.to_pyarrow(table).to_pylist()
        return found

    def value(self, expression: Any) -> Any:
        """The value of a scalar expression."""
        return self.con.to_pyarrow(expression).as_py()

    def stream(
        self, table: Any, columns: tuple[str, ...], order: tuple[str, ...]
    ) -> Iterator[tuple[NDArray[Any], ...]]:
        """Rows in order (nulls first), as numpy arrays of up to ``CHUNK`` rows."""
        rows = table.select(*dict.fromkeys(columns + order))
        rows = rows.order_by([ibis.asc(c, nulls_first=True) for c in order])
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            path = Path(folder) / "rows.parquet"
            self.write(rows, path)
            for part in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
                with pq.ParquetFile(part) as file:
                    for batch in file.iter_batches(CHUNK, columns=list(columns)):
                        yield tuple(batch[c].to_numpy(zero_copy_only=False) for c in columns)

    def fetch(
        self, table: Any, columns: Mapping[str, Any], order: tuple[str, ...]
    ) -> list[NDArray[Any]]:
        """Whole columns in order, in the given types."""
        chunks = [
            tuple(a.astype(t) for a, t in zip(arrays, columns.values(), strict=True))
            for arrays in self.stream(table, tuple(columns), order)
        ]
        return [
            np.concatenate([c[i] for c in chunks]) if chunks else np.zeros(0, t)
            for i, t in enumerate(columns.values())
        ]


class DuckDB(Engine):
    """DuckDB on a file in the scratch folder; it spills there when memory is short.

    Args:
        memory: of the database [bytes]; None: DuckDB's own choice, four fifths of the machine's.
    """

    def __init__(self, folder: Path, memory: int | None = None):
        self.folder = folder
        limit = {} if memory is None else {"memory_limit": f"{memory}B"}
        self.con = ibis.duckdb.connect(
            folder / "scratch.duckdb",
            temp_directory=str(folder / "spill"),
            preserve_insertion_order=False,
            **limit,
        )

    @property
    def software(self) -> dict[str, str]:
        """As the base class says."""
        return {"engine": "duckdb", "duckdb": self.con.version}

    def store(self, name: str, table: Any) -> Any:
        """As the base class says."""
        return self.con.create_table(name, table)

    def drop(self, name: str) -> None:
        """As the base class says. Spelt out: Ibis 12 leaves out the name with some sqlglots."""
        path = self.folder / f"{name}.parquet"
        if path.exists():
            path.unlink()
        else:
            self.con.raw_sql(f'DROP TABLE "{name}"')

    def read(self, path: Path) -> Any:
        """As the base class says."""
        # Folders above may be called a=b, which is no column of scratch files.
        return self.con.read_parquet(glob.escape(str(path)), hive_partitioning=False)

    def read_files(self, paths: Sequence[Path], row: str, file: str) -> Any:
        """As the base class says."""
        rows = self.con.read_parquet(
            [glob.escape(str(path.resolve())) for path in paths],
            filename=file,
            file_row_number=True,
            hive_partitioning=False,
        )
        return rows.rename({row: "file_row_number"})

    def write(self, table: Any, path: Path) -> None:
        """As the base class says."""
        table.to_parquet(path)

    def close(self) -> None:
        """As the base class says."""
        self.con.disconnect()


class Spark(Engine):
    """Apache Spark through PySpark: the session that is configured, else one on this machine.

    Its executors must see the scratch folder under the same path.

    Raises:
        CorpusError: PySpark is not installed, or no session can be had.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._views: list[str] = []
        try:
            from pyspark.sql import SparkSession
        except ImportError:
            raise CorpusError(
                "engine spark: PySpark is not installed; run: pip install 'clue-scaling[spark]'"
            ) from None
        try:
            with _told():
                self.session = (
                    SparkSession.builder.appName("clue-scaling prepare")
                    .config("spark.sql.session.timeZone", "UTC")
                    # Times in nanoseconds, which Spark has no type for, else end the query.
                    .config("spark.sql.legacy.parquet.nanosAsLong", True)
                    .getOrCreate()
                )
                self.con = ibis.pyspark.connect(self.session)
                # It would warn of each number given to users and items in one partition.
                self.session.sparkContext.setLogLevel("ERROR")
        except Exception as e:
            java = "JAVA_GATEWAY_EXITED" in str(e) or isinstance(e, FileNotFoundError)
            reason = "Java did not start; install it or set JAVA_HOME" if java else f"{e!s:.300}"
            raise CorpusError(f"engine spark: no session: {reason}") from None

    @property
    def software(self) -> dict[str, str]:
        """As the base class says."""
        return {"engine": "spark", "spark": self.session.version}

    def store(self, name: str, table: Any) -> Any:
        """As the base class says. Written out, so that a long plan is not run again."""
        path = self.folder / f"{name}.parquet"
        self.write(table, path)
        return self.read(path)

    def drop(self, name: str) -> None:
        """As the base class says."""
        path = self.folder / f"{name}.parquet"
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def read(self, path: Path) -> Any:
        """As the base class says."""
        with _told():
            return self._table(self.session.read.parquet(_pattern(path)))

    def read_files(self, paths: Sequence[Path], row: str, file: str) -> Any:
        """As the base class says."""
        from pyspark.sql import functions as f

        with _told():
            frame = self.session.read.parquet(*(_pattern(path.resolve()) for path in paths))
        metadata = frame.metadataColumn("_metadata")
        # A URI, in which "+" stands for itself: url_decode makes it a space.
        uri = f.replace(metadata["file_path"], f.lit("+"), f.lit("%2B"))
        uri = f.regexp_replace(uri, "^file:/*", "/")
        row_index = metadata["row_index"].alias(row)
        frame = frame.select("*", row_index, f.url_decode(uri).alias(file))
        return self._table(frame)

    def _table(self, frame: Any) -> Any:
        view = ibis.util.gen_name("parquet")
        frame.createOrReplaceTempView(view)
        self._views.append(view)
        return self.con.table(view)

    def write(self, table: Any, path: Path) -> None:
        """As the base class says."""
        with _told():
            frame = self.session.sql(self.con.compile(table))
            frame.write.parquet(_uri(path), mode="errorifexists")

    def rows(self, table: Any) -> list[dict[str, Any]]:
        """As the base class says."""
        with _told():
            return super().rows(table)

    def value(self, expression: Any) -> Any:
        """As the base class says."""
        with _told():
            return super().value(expression)

    def close(self) -> None:
        """As the base class says: a session may have other users, so it goes on."""
        for view in self._views:
            self.session.catalog.dropTempView(view)


def _uri(path: Path) -> str:
    """A path as Hadoop reads it: it takes ``%20`` for three characters."""
    return f"file://{path.absolute()}"


def _pattern(path: Path) -> str:
    """A path where Spark reads patterns: one that is itself alone."""
    return re.sub(r"([\\*?\[\]{}])", r"\\\1", _uri(path))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Spark's errors in a line, and no warning about releases of pandas, which is not used here.

    Raises:
        CorpusError: Spark could not do what the block asks of it.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")
        try:
            yield
        except (Py4JError, PySparkException) as e:
            raise CorpusError(f"engine spark: {_reason(e)}; nothing was published") from None


def _reason(error: Exception) -> str:
    """The class of what first went wrong, and what it says if it is about a file: other messages
    quote values of logs."""
    causes = re.findall(r"^(?:Caused by|): ([\w$.]+)(?:: (.*))?$", str(error), re.M)
    if not causes:  # Spark's own names of errors are like PATH_NOT_FOUND
        condition = re.match(r"\[([A-Z_.]+)\]", str(error))
        return condition[1] if condition else type(error).__name__
    name, said = causes[-1]
    return f"{name}: {said:.300}" if said and name.startswith("java.io.") else str(name)
