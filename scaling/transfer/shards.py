"""Files that many processes make together in one folder, each whole or absent.

    <folder>/manifest.json          what they are; ``complete`` once every file is there
             <file> ...             each appears by one rename
             parts/<file>.json      its record, which follows

Work that begins again keeps every file that has its record's digest. Any number of processes may
work in one folder, even on the same file, if a file has the same bytes whoever makes it: shares
only keep them from doing work twice. Whichever sees all records completes the manifest.
"""

import contextlib
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaling import ClueError
from scaling.config import canonical_json, short_digest
from scaling.files import (
    TMP_PREFIX,
    RecordError,
    create_json,
    read_json,
    sha256,
    write_bytes,
    write_json,
)

SCHEMA_VERSION = 1
ROW_GROUP = 8_192
"""Rows of a Parquet file that a reader takes at once."""
STALE_S = 3_600.0
"""A temporary file so old is nobody's: a shard is written in seconds. [seconds]"""
RECORD = ("file", "first", "rows", "bytes", "sha256")

Kind = Literal["users", "items"]
Progress = Callable[[int, int, float], None]
"""Told what is done, of how much, and how much a second."""


class EmbedError(ClueError):
    """Features cannot be written so; the message names what, and what would do."""


@dataclass(frozen=True)
class Part:
    """One file."""

    kind: Kind
    file: str
    rows: slice
    features: bool
    """Whether it holds features; else keys."""

    @property
    def size(self) -> int:
        """Rows."""
        return int(self.rows.stop - self.rows.start)


class Shards:
    """A folder of files.

    Args:
        header: of its manifest: everything that decides the files' bytes.
        parts: all files.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], parts: Sequence[Part]):
        self.folder = Path(folder)
        self.path = self.folder / "manifest.json"
        self.header = {"schema_version": SCHEMA_VERSION, **header}
        self.digest = short_digest(canonical_json(self.header))
        self.parts = list(parts)

    def begin(self) -> None:
        """Lay claim to the folder.

        Raises:
            EmbedError: it holds other features.
        """
        create_json(self.path, {**self.header, "complete": False, "files": []})
        self._manifest()

    def _manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.path)
        if other := next(_differences(found, self.header), None):
            raise EmbedError(f"{self.path}: of other features: {other}; choose another folder")
        return found

    def record(self, part: Part) -> dict[str, Any] | None:
        """The record of a file that is there in its full size, or None."""
        try:
            record: dict[str, Any] = read_json(self.folder / "parts" / f"{part.file}.json")
            size = (self.folder / part.file).stat().st_size
        except (RecordError, FileNotFoundError):
            return None
        return record if (record["of"], record["bytes"]) == (self.digest, size) else None

    def done(self, part: Part) -> bool:
        """Whether a file is there with its record's digest."""
        record = self.record(part)
        return record is not None and sha256(self.folder / part.file) == record["sha256"]

    def missing(self, parts: Sequence[Part], progress: Progress | None = None) -> list[Part]:
        """Those of some files that are not there, or damaged; all that are there are read."""
        there = [part for part in parts if self.record(part)]
        whole, begun = set(), time.monotonic()
        for number, part in enumerate(there, 1):
            if self.done(part):
                whole.add(part.file)
            if progress:
                progress(number, len(there), number / (time.monotonic() - begun + 1e-9))
        return [part for part in parts if part.file not in whole]

    def faults(self, progress: Progress | None = None) -> list[str]:
        """Read everything again: a sentence for everything that is missing or damaged.

        Raises:
            RecordError: nothing was begun here.
            EmbedError: it holds other features.
        """
        manifest = self._manifest()
        files = [self.folder / p.file for p in self.missing(self.parts, progress)]
        found = [f"{f}: {'damaged' if f.exists() else 'missing'}" for f in files]
        if not found and not manifest["complete"]:
            found.append(f"{self.path}: not complete; embed again")
        return found

    def complete(self) -> bool:
        """Complete the manifest if every file has its record; whether it is complete.

        Then what killed processes have left goes, too.
        """
        records = [self.record(p) for p in self.parts]
        files = [{k: r[k] for k in RECORD} for r in records if r]
        if len(files) < len(self.parts):
            return False
        write_json(self.path, {**self.header, "complete": True, "files": files})
        for left in self.folder.rglob(f"{TMP_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > STALE_S:
                    left.unlink()
        return True

    def publish(self, part: Part, data: memoryview) -> None:
        """Write a file, and then its record.

        Raises:
            OSError: the disk is full; what was there stays.
        """
        write_bytes(self.folder / part.file, data)
        write_json(
            self.folder / "parts" / f"{part.file}.json",
            {
                "schema_version": SCHEMA_VERSION,
                "of": self.digest,
                "file": part.file,
                "first": part.rows.start,
                "rows": part.size,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            },
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """What differs in a manifest from what it should say, ``users.dims = 8, not 16``."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key, value in wanted.items():
            yield from _differences(found.get(key), value, f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name} = {found!r}, not {wanted!r}"


def share_of(environment: Mapping[str, str], shards: str | None = None) -> tuple[int, int]:
    """Which of how many processes this one is: its place in a job array, and its rank there.

    Args:
        environment: SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_MIN and SLURM_ARRAY_TASK_COUNT; RANK and
            WORLD_SIZE, or SLURM_PROCID and SLURM_STEP_NUM_TASKS in a step of a job.
        shards: ``i/n``, part i (from 0) of n, in place of the array's.

    Raises:
        EmbedError: it is not that, or variables do not fit together.
    """

    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default))
        if not text.isdecimal():
            raise EmbedError(f"{name} = {text!r} is not a number")
        return int(text)

    index = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
    count = number("SLURM_ARRAY_TASK_COUNT", 1)
    if shards is not None:
        first, slash, last = shards.partition("/")
        if not (slash and first.isdecimal() and last.isdecimal()):
            raise EmbedError(f"--shards {shards}: valid: i/n, such as 0/4, the first of four parts")
        index, count = int(first), int(last)
    rank, world = ("RANK", "WORLD_SIZE")
    if rank not in environment:  # srun gives both to every process of a step
        rank, world = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    ranks = number(world, 1)
    place = number(rank, 0) if ranks > 1 else 0
    if not (0 <= index < count and place < ranks):
        raise EmbedError(f"part {index} of {count}, rank {place} of {ranks}: parts count from 0")
    return index * ranks + place, count * ranks


def npy(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[memoryview, NDArray[Any]]:
    """An npy file of zeros, and its array, in the same memory."""
    header = io.BytesIO()
    described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    start = header.tell()
    data = bytearray(start + int(np.prod(shape)) * dtype.itemsize)
    data[:start] = header.getvalue()
    return memoryview(data), np.frombuffer(data, dtype, offset=start).reshape(shape)


def parquet(keys: NDArray[np.uint64], features: NDArray[Any]) -> memoryview:
    """A Parquet file of keys and lists of one size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array(features.reshape(-1))
    kind = pa.list_(pa.field("element", values.type, nullable=False), features.shape[1])
    fields = [pa.field("key", pa.uint64(), nullable=False), pa.field("z", kind, nullable=False)]
    lists = pa.FixedSizeListArray.from_arrays(values, type=kind)
    table = pa.Table.from_arrays([pa.array(keys), lists], schema=pa.schema(fields))
    out = pa.BufferOutputStream()
    pq.write_table(
        table, out, row_group_size=ROW_GROUP, compression="none", use_dictionary=False,
        write_statistics=False,
    )  # fmt: skip
    return memoryview(out.getvalue())
