"""Rows of a plan with losses, written as the tables of a sweep."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scaling.files import write_json
from scaling.results import SCHEMAS


def write_tables(rows: pd.DataFrame, folder: Path) -> None:
    """``runs`` of these rows; the other tables are empty."""
    folder.mkdir(parents=True)
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    for name, schema in SCHEMAS.items():
        found = records if name == "runs" else []
        known = [{c.name: row.get(c.name) for c in schema} for row in found]
        pq.write_table(pa.Table.from_pylist(known, schema), folder / f"{name}.parquet")
    write_json(folder / "collect.json", {"sweep": folder.name})
