"""Writing the arrays of a corpus: streamed, in the smallest unsigned type, never memory-mapped.

A memory-mapped write to a full disk kills the process with a signal; a plain write raises an error
that can be told to a person.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 22
"""Entries written at a time."""


def write_stream(
    path: Path, count: int, largest: int, chunks: Iterable[Any], entry: tuple[int, ...] = ()
) -> None:
    """Write an npy file out of chunks of its entries.

    Args:
        count: entries in all. [entries]
        largest: no number exceeds it; it decides the type.
        entry: shape of an entry; (): a number.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: there are not ``count`` entries.
    """
    dtype = np.min_scalar_type(largest)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with open(path, "xb") as f:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (count, *entry)}
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


class Spool:
    """Entries that come block by block, in a scratch file until their number and size are known.

    Args:
        path: of the scratch file, which is new.
        largest: no number can exceed it.
        entry: shape of an entry; (): a number.
    """

    def __init__(self, path: Path, largest: int, entry: tuple[int, ...] = ()):
        self.path = path
        self.entry = entry
        self.count = 0
        self._dtype = np.min_scalar_type(largest)
        self._largest = 0
        path.open("xb").close()

    def append(self, block: NDArray[Any]) -> None:
        """Add entries. [entries, *entry]"""
        with self.path.open("ab") as f:
            f.write(np.ascontiguousarray(block, self._dtype).data)
        self.count += len(block)
        self._largest = max(self._largest, int(block.max(initial=0)))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Entries from ``start`` to ``stop``. [entries, *entry]"""
        width = math.prod(self.entry)
        block: NDArray[Any] = np.fromfile(
            self.path,
            self._dtype,
            count=(stop - start) * width,
            offset=start * width * self._dtype.itemsize,
        )
        return block.reshape(-1, *self.entry)

    def save(self, path: Path) -> None:
        """Write an npy file of the smallest unsigned type that holds them, as ``write_array``, and
        remove the scratch file."""
        step = max(1, BLOCK // math.prod(self.entry))
        blocks = (
            self.read(start, min(start + step, self.count)) for start in range(0, self.count, step)
        )
        write_stream(path, self.count, self._largest, blocks, self.entry)
        self.path.unlink()
