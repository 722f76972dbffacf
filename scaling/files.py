"""Durable writes: the only place that publishes, links, renames or fsyncs a record.

A record is either absent or whole: it is written to a temporary name in its own folder, flushed to
the disk, and then renamed (``write_json``) or hard-linked (``create_json``, which fails when the
name is taken, on NFS too). A crash leaves at most a ``.tmp-*`` file, which readers ignore.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling import ClueError

TMP_PREFIX = ".tmp-"
RETRIES_S = (0.05, 0.2, 1.0)
"""Before another try to read a file that a network file system lost sight of. [seconds]"""


class RecordError(ClueError):
    """A record on disk is missing, torn or not what its name says."""


def fsync_dir(path: Path) -> None:
    """Flush a directory entry to disk, so that a rename or link in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _temporary(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """Write ``data`` durably beside ``path`` under a temporary name; remove that name on exit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.parent / f"{TMP_PREFIX}{uuid.uuid4().hex}"
    try:
        with open(tmp, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        yield tmp
    finally:
        tmp.unlink(missing_ok=True)


def _dump(obj: Any) -> bytes:
    return (json.dumps(obj, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace ``path`` atomically and durably."""
    with _temporary(path, data) as tmp:
        os.rename(tmp, path)
        fsync_dir(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Replace ``path`` by ``obj`` as JSON, atomically and durably.

    Raises:
        ValueError: ``obj`` holds NaN or infinity, which JSON cannot say.
        OSError: the disk is full or not writable; ``path`` is then as it was.
    """
    write_bytes(path, _dump(obj))


def create_bytes(path: Path, data: bytes) -> bool:
    """Create ``path`` with ``data`` if nobody has; of any number of callers one succeeds.

    Returns:
        True for the one caller that created it, False if the name was taken (it is untouched).
    """
    if path.exists():  # spares writing and flushing what nobody would read
        return False
    with _temporary(path, data) as tmp:
        try:
            os.link(tmp, path)
        except FileExistsError:
            return False
        fsync_dir(path.parent)
        return True


def create_json(path: Path, obj: Any) -> bool:
    """``create_bytes`` with ``obj`` as JSON."""
    return create_bytes(path, _dump(obj))


def read_json(path: Path) -> Any:
    """Read a JSON record.

    A network file system may lose sight of a file that another host replaced (ESTALE), or fail for
    a moment (EIO): that is tried again.

    Raises:
        RecordError: it is missing, empty, torn or unreadable; the message names the file.
    """
    try:
        return json.loads(_read(path))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file") from None
    except OSError as e:
        raise RecordError(f"{path}: cannot be read: {e.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise RecordError(f"{path}: not a whole JSON record ({e})") from None


def _read(path: Path) -> bytes:
    for pause in RETRIES_S:
        try:
            return path.read_bytes()
        except OSError as e:
            if e.errno not in (errno.ESTALE, errno.EIO):
                raise
            time.sleep(pause)
    return path.read_bytes()


@contextlib.contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``final`` by one rename when the block ends without an error.

    Everything in it is flushed to disk first. On an error it is removed and ``final`` does not
    appear. If another process published ``final`` meanwhile, theirs stays and ours is dropped.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    tmp = final.parent / f"{TMP_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}"
    tmp.mkdir()
    try:
        yield tmp
        publish(tmp, final)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def publish(tmp: Path, final: Path) -> None:
    """Flush every file below ``tmp`` and rename it to ``final``; keep ``final`` if it exists."""
    for folder, _, names in os.walk(tmp):
        for name in names:
            fd = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(folder))
    try:
        os.rename(tmp, final)
    except OSError:
        if not final.is_dir():
            raise
    fsync_dir(final.parent)


def remove_folder(path: Path) -> None:
    """Remove a published folder; killed on the way, it is no longer there under its name."""
    tmp = path.with_name(f"{TMP_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, tmp)
    shutil.rmtree(tmp)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
