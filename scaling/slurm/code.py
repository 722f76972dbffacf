"""The code that jobs run: a content-addressed archive of this package, made at submission.

    <root>/code/<digest>.zip     the package's files; Python imports from it as it is
    <root>/code/<digest>.json    where they come from: version, commit, what differs from it
    <root>/code/<digest>.diff    that difference, where there is one

An edit after submission reaches no job. A run that has checkpoints keeps the archive of its last
attempt, so that its retries compute what it began with, unless somebody says otherwise.
"""

import hashlib
import io
import subprocess
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import scaling
from scaling import ClueError
from scaling.config import canonical_json, short_digest
from scaling.files import create_bytes, create_json

PACKAGE = Path(scaling.__file__).parent
"""The running package: a folder, or a folder in an archive."""
_DATE = (1980, 1, 1, 0, 0, 0)
"""Of every file in an archive: the earliest that zip can say."""


class CodeError(ClueError):
    """An archive of code is missing, or is not what its name says."""


def archive_path(root: Path, digest: str) -> Path:
    """Where the archive of this digest lies."""
    return Path(root) / "code" / f"{digest}.zip"


def import_line(archive: Path) -> str:
    """Line of a job script by which Python imports from an archive before all else, and not at all
    from the folder that was submitted from."""
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={archive}${{PYTHONPATH:+:$PYTHONPATH}}"


def archive(root: Path) -> str:
    """Archive the running package below ``root``, unless it is there; returns its digest.

    Uncommitted changes and files that git does not know are in it: what would be imported here
    is what jobs import.
    """
    digest, data = _packed()
    path = archive_path(root, digest)
    if not path.exists():
        record, difference = _provenance()
        if difference:
            create_bytes(path.with_suffix(".diff"), difference)
        create_json(path.with_suffix(".json"), {"schema_version": 1, "digest": digest, **record})
        create_bytes(path, data)
    return digest


def digest_of_package() -> str:
    """Digest of the running package's files."""
    return _packed()[0]


def verify(root: Path, digest: str) -> None:
    """Check that an archive holds what its name says.

    Raises:
        CodeError: it is missing or was changed.
    """
    path = archive_path(root, digest)
    try:
        with zipfile.ZipFile(path) as packed:
            files = [(name, packed.read(name)) for name in packed.namelist()]
    except (OSError, zipfile.BadZipFile) as e:
        raise CodeError(f"{path}: the archive of the run's code cannot be read ({e})") from None
    if (found := _digest(files)) != digest:
        raise CodeError(f"{path}: holds the code {found}; it was changed after it was written")


def running_from(root: Path, digest: str) -> bool:
    """Whether this process has imported the package from that archive."""
    here = PACKAGE.parent
    return here.is_file() and here.samefile(archive_path(root, digest))


@cache
def _packed() -> tuple[str, bytes]:
    """Digest and archive of the package's files as they are when first asked."""
    if PACKAGE.parent.is_file():  # a job: what it runs from is the archive
        return PACKAGE.parent.stem, PACKAGE.parent.read_bytes()
    files = [
        (path.relative_to(PACKAGE.parent).as_posix(), path.read_bytes())
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    ]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files:
            packed.writestr(zipfile.ZipInfo(name, _DATE), data, zipfile.ZIP_DEFLATED)
    return _digest(files), buffer.getvalue()


def _digest(files: Iterable[tuple[str, bytes]]) -> str:
    """Of names and contents, and so of no compressor's version."""
    return short_digest(
        canonical_json([[name, hashlib.sha256(data).hexdigest()] for name, data in files])
    )


def _provenance() -> tuple[dict[str, Any], bytes]:
    """Version and commit of the package, and how it differs from the commit, where git knows."""
    record: dict[str, Any] = {"version": scaling.__version__, "commit": None, "changed": None}
    commit = _git(PACKAGE, "rev-parse", "HEAD")
    if commit is None or _git(PACKAGE, "ls-files", "--error-unmatch", "__init__.py") is None:
        return record, b""  # installed, or inside somebody else's repository
    changed = _git(PACKAGE, "status", "--porcelain", "--untracked-files=all", "--", ".") or b""
    names = [line[3:] for line in changed.decode(errors="replace").splitlines()]
    record |= {"commit": commit.decode().strip(), "changed": names}
    return record, _git(PACKAGE, "diff", "--binary", "HEAD", "--", ".") or b""


def _git(folder: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
