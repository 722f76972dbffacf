"""Writing the arrays of a corpus: streamed, in the smallest unsigned type, never memory-mapped.

A memory-mapped write to a full disk kills the process with a signal; a plain write raises an error
that can be told to a person.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 22
"""Entries written at a time."""


def write_stream(path: Path, count: int, largest: int, chunks: Iterable[Any]) -> None:
    """Write an npy file of one dimension out of chunks.

    Args:
        count: entries in all. [entries]
        largest: no entry exceeds it; it decides the type.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: there are not ``count`` entries.
    """
    dtype = np.min_scalar_type(largest)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with open(path, "xb") as f:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(f, header)
        for chunk in chunks:
            written += len(chunk)
            f.write(np.ascontiguousarray(chunk, dtype).data)
    if written != count:
        raise ValueError(f"{path}: {written} entries, not {count}")


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an npy file of any shape; integers in the smallest unsigned type that holds them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.min_scalar_type(int(array.max(initial=0)))
    flat = array.reshape(-1)
    with open(path, "xb") as f:
        header = {"descr": dtype.str, "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(f, header)
        for start in range(0, len(flat), BLOCK):
            f.write(flat[start : start + BLOCK].astype(dtype).data)


def write_ragged(folder: Path, lengths: NDArray[np.int64], items: NDArray[np.int64]) -> None:
    """Write ``offsets.npy`` and ``items.npy`` of rows given by lengths and items in a row."""
    write_array(folder / "offsets.npy", np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))
    write_array(folder / "items.npy", items)
