"""Sources: one module per raw format, each of which turns it into the one table of logs.

A source is a module with

- ``Config(Frozen)``: the ``[source]`` table of a corpus file, with ``kind: Literal["its name"]``;
- ``files(config, base) -> list[Path] | None``: what it reads, for the fingerprint of the source;
  relative paths of ``config`` start at ``base``, the folder of the corpus file. A source that
  computes its logs has none; None: it reads what no file tells the state of, such as a server;
- one of ``rows(config, base) -> Iterator[Log]``, parsed line by line in Python, or
  ``logs(engine, config, base) -> ibis.Table``, an expression in the engine's database in the schema
  ``LOG``, of which nullable columns may be left out. It is read more than once.

Rows are in any order: preparation sorts them. A row that cannot be read is not dropped by the
source: it comes with a ``problem``, and preparation counts, sets aside and refuses.
"""

import gzip
import importlib
import os
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import ibis
import pyarrow as pa

from scaling.config import ConfigError, Frozen
from scaling.data.corpus import CorpusError
from scaling.data.engine import Engine

LOG = {
    "user": "!string",  # who; hashed before anything is stored
    "service": "!string",  # where
    "item": "string",  # identity of the item within its service; null: its text is its identity
    "text": "string",  # item text as found; null or blank: untitled
    "time": "int64",  # [Unix s], in TIMES; null where the source has order only
    "position": "int64",  # stored order among a user's logs: breaks ties of time
    "rating": "float64",
    "category": "string",
    "problem": "string",  # null: a sound row; else "FILE:LINE: REASON", the rest may be null
}
"""Columns of a table of logs and their Ibis types; ``!`` marks what a sound row must have."""


class Log(NamedTuple):
    """A row of the table of logs: columns and order of ``LOG``."""

    user: str | None = None
    service: str | None = None
    item: str | None = None
    text: str | None = None
    time: int | None = None
    position: int | None = None
    rating: float | None = None
    category: str | None = None
    problem: str | None = None


TIMES = range(4_102_444_800)
"""Times that a log may have, 1970 to 2099 [Unix s]. Outside, it is mostly the unit that is wrong:
milliseconds read as seconds are of the year 55,000."""

UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file raises that is not there, or is no gzip file or a torn one."""

TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
SCHEMA = pa.schema([(c, TYPES[t.lstrip("!")]) for c, t in LOG.items()])
CHUNK = 65_536
"""Parsed rows handed over at a time."""

KINDS = (
    "amazon_reviews",
    "amazon_sequences",
    "complete_journey",
    "lastfm",
    "movielens",
    "online_retail",
    "recbole",
    "synthetic",
    "tables",
)


def source_module(kind: Any, where: str) -> ModuleType:
    """The module of a kind of source; only the one asked for is imported.

    Raises:
        ConfigError: there is no such kind; the message names the kinds there are.
    """
    if kind not in KINDS:
        raise ConfigError(f"{where}: source.kind = {kind!r}; valid kinds: {', '.join(KINDS)}")
    return importlib.import_module(f"{__name__}.{kind}")


def source_config(data: Any, where: str) -> Frozen:
    """Validate a ``[source]`` table against the model of its kind."""
    kind = data.get("kind") if isinstance(data, dict) else None
    config: Frozen = source_module(kind, where).Config.parse(data, f"{where}: [source]")
    return config


def source_files(config: Any, base: Path) -> list[Path] | None:
    """What a source reads, sorted; empty for one that computes its logs. None: files do not tell
    what it reads."""
    module = source_module(config.kind, "source")
    files = module.files(config, base) if hasattr(module, "files") else []
    return None if files is None else sorted(files)


def refuse_foreign(config: Any, base: Path) -> None:
    """Look for what an engine could not read as text, where a source can tell.

    Raises:
        CorpusError: naming the file.
    """
    module = source_module(config.kind, "source")
    if hasattr(module, "refuse_foreign"):
        module.refuse_foreign(config, base)


def read_logs(engine: Engine, config: Any, base: Path) -> ibis.Table:
    """Logs of a source with exactly the columns of ``LOG``, in its types."""
    module = source_module(config.kind, "source")
    if hasattr(module, "rows"):
        return load_rows(engine, "source_rows", module.rows(config, base))
    table: ibis.Table = module.logs(engine, config, base)
    null = {c: ibis.null().cast(t) for c, t in LOG.items() if c not in table.columns}
    return table.mutate(**null).select(
        *(table[c].cast(t.lstrip("!")) if c in table.columns else c for c, t in LOG.items())
    )


def load_rows(engine: Engine, name: str, rows: Iterator[Log]) -> ibis.Table:
    """Parsed rows as a table of the engine."""

    def batches() -> Iterator[pa.RecordBatch]:
        while chunk := list(islice(rows, CHUNK)):
            arrays = [
                pa.array(c, t) for c, t in zip(zip(*chunk, strict=True), SCHEMA.types, strict=True)
            ]
            yield pa.record_batch(arrays, schema=SCHEMA)

    table: ibis.Table = engine.load(name, batches(), SCHEMA)
    return table


def shown(value: object) -> str:
    """How a wrong value is quoted to people: what looks like a number or a date as it is, anything
    else by its length alone, since it may be a person's name or words.

    >>> shown("2018-13-01"), shown("Great mug!")
    ("'2018-13-01'", 'text of 10 characters')
    """
    text = value if isinstance(value, str) else str(value)
    if re.fullmatch(r"[0-9.:+\-/TZeE, ]{0,30}", text):
        return repr(text)
    return f"text of {len(text):,} characters"


def open_text(path: Path, encoding: str = "utf-8") -> TextIO:
    """Open a text file, gzipped where its name says so, for reading line by line.

    Bytes that are not of the encoding become lone surrogates: a row with one is a problem.

    Raises:
        CorpusError: there is no such file, or it is no gzip file though it is named so.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            f.read(1)
        file: TextIO = opener(path, "rt", encoding=encoding, errors="surrogateescape", newline="")
    except UNREADABLE as e:
        reason = "no such file" if isinstance(e, FileNotFoundError) else f"cannot be read: {e}"
        raise CorpusError(f"{path}: {reason}") from None
    return file


def resolve(base: Path, path: str) -> Path:
    """A path of a source: ``~`` and ``$VARIABLES`` expanded, relative to the corpus file's folder.

    Raises:
        ConfigError: a variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if missing := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ConfigError(f"{path}: the environment variable {missing[0]} is not set")
    return base / expanded
