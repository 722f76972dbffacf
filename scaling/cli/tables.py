"""Any table of runs, from a file."""

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
