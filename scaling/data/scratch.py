"""What preparations that run at the same time share: a folder for scratch folders, and a lock."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scaling.files import TMP_PREFIX

LOCK = "lock"


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` that is removed when the block ends.

    Its process holds a lock on a file in it. Folders that nobody holds any more, left by processes
    that were killed, are removed first. Where the file system has no locks, they stay.
    """
    prefix = f"{TMP_PREFIX}scratch-"
    for lock in parent.glob(f"{prefix}*/{LOCK}"):
        with contextlib.suppress(OSError), open(lock, "r+b") as f:  # held, or just removed
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder,
        open(Path(folder) / f"{LOCK}.new", "xb") as f,
    ):
        with contextlib.suppress(OSError):
            fcntl.flock(f, fcntl.LOCK_EX)
            # Only now under its name: nobody ever finds a lock that is not held yet.
            Path(f.name).rename(Path(folder) / LOCK)
        yield Path(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against others that want it so, where its file system has locks."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
