"""CSV and JSON lines files, parsed in as many processes as there are cores.

Files are cut into blocks at ends of lines. In CSV such an end may be inside quotes: then the parser
of a block says what is left of its last row, and the next block is parsed again behind that. So the
outcome is that of one parser running over the whole file.
"""

import csv
import gzip
import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from scaling.data.corpus import CorpusError
from scaling.data.sources import SCHEMA, UNREADABLE
from scaling.data.sources.delimited import column_places
from scaling.data.sources.layout import FILE, LogTable, folder_values
from scaling.data.sources.text_rows import Block, Parsed, TextFile, batch_of, delimiter, parse

BLOCK = 4 << 20
"""Bytes of text that are parsed at a time."""
PIECE = 1 << 17
"""Bytes read at a time."""
ALONE = 64 << 20
"""Bytes of all files up to which they are parsed in this process: others take a second to start."""
FOREIGN = 10
"""So many rows that are not UTF-8, and more than those that are beyond ASCII: the file is not."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass
class Found:
    """What the files of a table turned out to hold."""

    table: LogTable
    rows: int = 0
    unseen: set[str] | None = None
    """Mapped columns that no row of text files had so far; None: there was no whole row yet."""


def text_batches(files: list[TextFile], found: dict[int, Found]) -> Iterator[pa.RecordBatch]:
    """Logs of text files, in the schema of logs.

    Args:
        found: what is told of each file's table, by the file's number.

    Raises:
        CorpusError: a file cannot be opened, is not of its encoding or lacks a mapped column.
    """
    for file in files:
        _check_start(file)
    cores = len(os.sched_getaffinity(0))
    large = sum(file.path.stat().st_size for file in files) > ALONE
    try:
        with _processes(cores) if large and cores > 1 else _Here() as pool:
            blocks = (block for file in files for block in _blocks(file))
            yield from _logs(_in_order(blocks, pool, 2 * cores if large else 1), found)
    except BrokenProcessPool:
        raise CorpusError(
            "a process that parsed text files ended: memory was short, or a script that calls "
            "prepare() does so outside of: if __name__ == '__main__':"
        ) from None


class _Here(Executor):
    """Runs what is submitted at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _processes(n: int) -> Executor:
    context = get_context("forkserver")
    context.set_forkserver_preload([parse.__module__])
    return ProcessPoolExecutor(n, mp_context=context)


def _in_order(
    blocks: Iterator[Block], pool: Executor, ahead: int
) -> Iterator[tuple[Block, Parsed]]:
    """Parse blocks, some ahead of the one that is due."""
    pending: deque[tuple[Block, Future[Parsed]]] = deque()

    def start() -> bool:
        block = next(blocks, None)
        if block is not None:
            pending.append((block, pool.submit(parse, block)))
        return block is not None

    while True:
        while len(pending) < ahead and start():
            pass
        if not pending:
            return
        block, future = pending.popleft()
        parsed = future.result()
        if parsed.rest:
            if not pending:
                start()
            following, started = pending.popleft()
            started.cancel()
            following = replace(following, data=parsed.rest + following.data)
            pending.appendleft((following, pool.submit(parse, following)))
        yield block, parsed


def _logs(
    parts: Iterator[tuple[Block, Parsed]], found: dict[int, Found]
) -> Iterator[pa.RecordBatch]:
    """Give logs their positions and problems their lines."""
    rows = lines = foreign = 0
    utf8 = False
    for block, parsed in parts:
        file, of = block.file, found[block.file.number]
        if block.first:
            rows, lines, foreign, utf8 = 0, 0, 0, False
        utf8 |= parsed.foreign is None
        foreign += parsed.foreign or 0
        if foreign >= FOREIGN and not utf8:
            raise CorpusError(
                f"{file.path}: not utf-8: most lines with letters beyond ASCII are of another "
                'encoding; set the table\'s key encoding = "latin-1" or convert the file'
            )
        logs = parsed.logs
        if file.table.columns.position is None:
            place = SCHEMA.get_field_index("position")
            positions = pc.add(logs["position"], file.number * FILE + rows)
            logs = logs.set_column(place, SCHEMA.field(place), positions)
        yield logs
        problems = [(lines + line + 1, reason) for line, reason in parsed.problems]
        rows += parsed.rows
        lines += parsed.lines
        of.rows += parsed.rows
        if problems:
            yield batch_of({"problem": [f"{file.path}:{n}: {reason}" for n, reason in problems]})
        if parsed.unseen is not None:
            of.unseen = parsed.unseen if of.unseen is None else of.unseen & parsed.unseen


def _check_start(file: TextFile) -> None:
    """Refuse a file that cannot be opened, is not of the table's encoding or lacks a column."""
    path, table = file.path, file.table
    try:
        with _open(path) as f:
            start = f.read(2)
        if file.kind == "csv":
            with _open(path) as f:
                encoding = "utf-8-sig" if table.encoding == "utf-8" else table.encoding
                lines = io.TextIOWrapper(f, encoding, errors="surrogateescape", newline="")
                file.header = next(csv.reader(lines, delimiter=delimiter(file)), [])
    except (*UNREADABLE, csv.Error) as e:
        raise CorpusError(f"{path}: cannot be read: {e}") from None
    names = "".join(file.header)
    if start in UTF16 or "\0" in names or names != names.encode(errors="replace").decode():
        found = "it is UTF-16" if start in UTF16 else "its header cannot be read"
        raise CorpusError(
            f"{path}: not {table.encoding}: {found}; set the table's key encoding "
            "(valid: utf-8, latin-1) or convert the file"
        )
    if file.kind == "csv" and start:
        there = [*file.header, *folder_values(path, table, file.header)]
        column_places(path, there, table.wanted)


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _blocks(file: TextFile) -> Iterator[Block]:
    """A file in blocks. The last one may be empty.

    Raises:
        CorpusError: it cannot be read to its end.
    """
    data = bytearray()
    goal, first = BLOCK, True
    try:
        with _open(file.path) as f:
            while piece := f.read1(PIECE):
                data += piece
                if len(data) >= goal:
                    if end := _cut(data, file.kind == "csv"):
                        yield Block(file, bytes(data[:end]), first)
                        del data[:end]
                        first = False
                    goal = len(data) + BLOCK
    except UNREADABLE as e:
        raise CorpusError(f"{file.path}: cannot be read to its end: {e}") from None
    yield Block(file, bytes(data), first, last=True)


def _cut(data: bytearray, quotes: bool) -> int:
    """Where to cut: behind the last end of a line, or the last one that seems to end a row."""
    end = data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, len(data) - 1) + 1
    at, inside = end, quotes and data.count(b'"', 0, end) % 2
    while inside:
        line = data.rfind(b"\n", 0, at - 1) + 1
        inside ^= data.count(b'"', line, at) % 2
        at = line
    return at or end
