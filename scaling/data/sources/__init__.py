"""Sources: one module per raw format, each of which turns it into the one table of logs.

A source is a module with

- ``Config(Frozen)``: the ``[source]`` table of a corpus file, with ``kind: Literal["its name"]``;
- ``logs(con, config, base) -> ibis.Table``: the logs, in the schema ``LOG``. ``con`` is an Ibis
  connection to DuckDB in which it may create tables and views; relative paths of ``config`` start
  at ``base``, the folder of the corpus file. Nullable columns may be left out;
- ``files(config, base) -> list[Path]``: what it reads, for the fingerprint of the source. A source
  that computes its logs has none.

Rows are in any order: preparation sorts them. A row that cannot be read is not dropped by the
source: it comes with a ``problem``, and preparation counts and refuses.
"""

import importlib
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import ibis

from scaling.config import ConfigError, Frozen

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

TIMES = range(4_102_444_800)
"""Times that a log may have, 1970 to 2099 [Unix s]. Outside, it is mostly the unit that is wrong:
milliseconds read as seconds are of the year 55,000."""

KINDS = ("amazon_sequences", "synthetic", "tables")


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


def source_files(config: Any, base: Path) -> list[Path]:
    """What a source reads, sorted; empty for one that computes its logs."""
    module = source_module(config.kind, "source")
    return sorted(module.files(config, base)) if hasattr(module, "files") else []


def read_logs(con: Any, config: Any, base: Path) -> ibis.Table:
    """Logs of a source with exactly the columns of ``LOG``, in its types."""
    table: ibis.Table = source_module(config.kind, "source").logs(con, config, base)
    null = {c: ibis.null().cast(t) for c, t in LOG.items() if c not in table.columns}
    return table.mutate(**null).select(
        *(table[c].cast(t.lstrip("!")) if c in table.columns else c for c, t in LOG.items())
    )


def resolve(base: Path, path: str) -> Path:
    """A path of a source: ``~`` and ``$VARIABLES`` expanded, relative to the corpus file's folder.

    Raises:
        ConfigError: a variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if missing := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ConfigError(f"{path}: the environment variable {missing[0]} is not set")
    return base / expanded
