"""Any table of runs, from a file, and how constraints are written on the command line."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaling import ClueError

if TYPE_CHECKING:
    import pandas as pd

TABLES = (".parquet", ".csv", ".jsonl")
"""Endings of the tables that are read."""


def read_table(path: Path) -> "pd.DataFrame":
    """A Parquet, CSV or JSON Lines table.

    Raises:
        ClueError: there is no such file, or it is not such a table.
    """
    import pandas as pd

    if not path.is_file():
        raise ClueError(f"{path}: no such file")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path)
        if path.suffix == ".jsonl":
            return pd.read_json(path, lines=True)
        return pd.read_parquet(path)
    except ValueError as e:  # pandas' and pyarrow's parser errors are ValueErrors
        raise ClueError(f"{path}: not a readable table: {str(e).strip()}") from None


def fixed_values(words: Sequence[str], option: str = "--fix") -> dict[str, float]:
    """``NAME=VALUE`` of an option.

    Raises:
        ClueError: a word is not of this form, or names a parameter a second time.
    """
    out: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        _check_new(option, name, out)
        out[name.strip()] = _number(option, word, value, "NAME=VALUE")
    return out


def bounded(words: Sequence[str]) -> dict[str, tuple[float, float]]:
    """``NAME=LOW:HIGH`` of `--bound`.

    Raises:
        ClueError: a word is not of this form, or names a parameter a second time.
    """
    out: dict[str, tuple[float, float]] = {}
    for word in words:
        name, _, ends = word.partition("=")
        _check_new("--bound", name, out)
        low, _, high = ends.partition(":")
        shape = "NAME=LOW:HIGH"
        out[name.strip()] = (
            _number("--bound", word, low, shape),
            _number("--bound", word, high, shape),
        )
    return out


def groups(words: Sequence[str]) -> list[tuple[str, ...]]:
    """``NAME,NAME`` of `--tie`."""
    return [tuple(name.strip() for name in word.split(",")) for word in words]


def _check_new(option: str, name: str, known: Container[str]) -> None:
    if name.strip() in known:
        raise ClueError(f"{option} {name.strip()} is given twice")


def _number(option: str, word: str, text: str, shape: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ClueError(f"{option} {word}: {shape} is expected") from None
