"""The corpus store: a prepared corpus on disk, memory-mapped.

    corpora/<name>-<digest>/
        manifest.json                      what it is, how it was made, digest of every file
        tokenizer.json
        items/{tokens,offsets,service}.npy
        users/keys.npy                     users of pretraining, then validation, then pool
        users/<service>/{offsets,items}.npy
        tasks/<task>/                      downstream tasks (scaling/data/tasks.py)

The digest names the content that a pretraining run reads: tokenizer, items and users. Tasks have
digests of their own, so that a task can be added beside trained runs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scaling import ClueError
from scaling.config import CorpusCard, canonical_json, short_digest
from scaling.files import read_json

SCHEMA_VERSION = 1
SPLITS = ("pretraining", "validation", "pool")
MANIFEST = {
    "name": str, "digest": str, "recipe": str, "corpus_file": dict, "task_recipes": dict,
    "sources": list, "services": list, "splits": dict, "steps": list, "files": dict, "tasks": dict,
    "card": dict,
}  # fmt: skip
"""Keys that every manifest has, and what they hold."""
INT32_MAX = 2**31 - 1
BLOCK = 1 << 22
"""Entries of an array looked at together: no array of behaviours is ever whole in memory."""

Progress = Callable[[int, int, str], None]
"""Told how much is read, of how much, and what: (done, total, name)."""


class CorpusError(ClueError):
    """A corpus, its logs or its file cannot be used; the message names what and where."""


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of a corpus's content: splits, services and the files outside ``tasks/``."""
    return short_digest(
        canonical_json(
            {
                "schema_version": SCHEMA_VERSION,
                "services": list(manifest["services"]),
                "splits": dict(manifest["splits"]),
                "files": {
                    name: record["sha256"]
                    for name, record in manifest["files"].items()
                    if not name.startswith("tasks/")
                },
            }
        )
    )


def task_digest(manifest: Mapping[str, Any], task: str) -> str:
    """Digest of a task's content: its files, and the corpus that its item numbers mean."""
    files = {n: r["sha256"] for n, r in manifest["files"].items() if n.startswith(f"tasks/{task}/")}
    return short_digest(canonical_json({"corpus": content_digest(manifest), "files": files}))


def load_array(path: Path, dtype_kind: str = "u", ndim: int = 1) -> NDArray[Any]:
    """Memory-map an npy file.

    Raises:
        CorpusError: it is missing, torn, pickled, or holds another kind of array.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise CorpusError(f"{path}: not a readable npy file ({e})") from None
    if array.dtype.kind != dtype_kind or array.ndim != ndim:
        raise CorpusError(
            f"{path}: holds {array.dtype} {array.shape}, "
            f"not {ndim} dimension(s) of kind {dtype_kind!r}"
        )
    return array


class Corpus:
    """A prepared corpus.

    Attributes:
        path: its folder.
        manifest: content of ``manifest.json``.
        card: the numbers that planning and counting need.
        services: all services, in the order of their tokens (1, 2, ...); those of pretraining
            (``card.services``) come first.
        tokens: tokens of all items, one after another. [tokens]
        token_offsets: item ``i`` has ``tokens[token_offsets[i] : token_offsets[i + 1]]``.
            [items + 1]
        item_service: index in ``services`` of every item. [items]
        keys: first 8 bytes of the hash of every user's id; raw ids are not kept. [users]
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.card = CorpusCard.parse(manifest["card"], f"{path / 'manifest.json'}: card")
        self.services: tuple[str, ...] = tuple(manifest["services"])
        self.tokens = load_array(path / "items/tokens.npy")
        self.token_offsets = load_array(path / "items/offsets.npy")
        self.item_service = load_array(path / "items/service.npy")
        self.keys = load_array(path / "users/keys.npy")
        self._users = {
            s: (
                load_array(path / "users" / s / "offsets.npy"),
                load_array(path / "users" / s / "items.npy"),
            )
            for s in self.card.services
        }

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a corpus and check that every file has the size its manifest says.

        Raises:
            CorpusError: it is not a whole corpus of this version.
        """
        manifest = read_manifest(Path(path))
        faults = []
        for name, record in manifest["files"].items():
            file = Path(path) / name
            size = file.stat().st_size if file.is_file() else None
            if size != record["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                faults.append(f"{file}: {found}; its manifest says {record['bytes']} bytes")
        refuse(faults)
        return cls(Path(path), manifest)

    @classmethod
    def find(cls, root: Path, digest: str) -> Self:
        """The prepared corpus with a digest.

        Raises:
            CorpusError: there is none below ``root``; the message names those there are.
        """
        found = [p for p in folders(root) if p.name.endswith(f"-{digest}")]
        if not found:
            there = ", ".join(p.name for p in folders(root)) or "none"
            raise CorpusError(f"{Path(root) / 'corpora'}: no corpus {digest}; prepared: {there}")
        return cls.open(found[0])

    def item_tokens(self, items: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Tokens of items, one after another, and their offsets. [tokens], [items + 1]

        Raises:
            IndexError: there is no such item.
        """
        import pyarrow as pa  # a corpus is often opened for its card alone

        taken = self._item_table.take(pa.array(items))
        _, offsets, tokens = taken.buffers()
        wide = np.int64 if pa.types.is_large_binary(taken.type) else np.int32
        starts = np.frombuffer(offsets, wide).astype(np.int64)
        starts //= self.tokens.itemsize
        return np.frombuffer(tokens, self.tokens.dtype), starts

    @cached_property
    def _item_table(self) -> Any:
        """Items as strings of bytes in Arrow, over the mapped tokens.

        Arrow gathers many of them several times faster than indexing does, and without Python's
        lock. Its offsets count bytes, so they are held beside those on disk: 4 bytes an item, 8
        where the tokens exceed 2 GiB, once per process.
        """
        import pyarrow as pa

        wide = self.tokens.nbytes > INT32_MAX
        offsets = self.token_offsets.astype(np.int64) * self.tokens.itemsize
        buffers = [
            None,
            pa.py_buffer(offsets if wide else offsets.astype(np.int32)),
            pa.py_buffer(self.tokens),
        ]
        kind = pa.large_binary() if wide else pa.binary()
        try:
            table = pa.Array.from_buffers(kind, self.n_items, buffers)
            table.validate(full=True)  # Arrow would read what lies outside
        except pa.ArrowInvalid as e:
            raise CorpusError(f"{self.path / 'items/offsets.npy'}: {e}") from None
        return table

    @property
    def n_items(self) -> int:
        """Items of all services."""
        return len(self.token_offsets) - 1

    def users(self, service: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Logs of all users in one service of pretraining, oldest first.

        Returns:
            ``(offsets, items)``: user ``u`` has ``items[offsets[u]:offsets[u + 1]]``.

        Raises:
            CorpusError: it is no service of pretraining; the message names them.
        """
        if service not in self._users:
            valid = ", ".join(self._users)
            raise CorpusError(
                f"{self.path}: {service!r} is no service of pretraining; valid: {valid}"
            )
        return self._users[service]

    def split(self, name: str) -> slice:
        """Rows of users in ``pretraining``, ``validation`` or ``pool``."""
        if name not in SPLITS:
            raise CorpusError(
                f"{self.path}: no split {name!r} in users/; valid: {', '.join(SPLITS)}"
            )
        sizes = self.manifest["splits"]
        start = sum(sizes[s] for s in SPLITS[: SPLITS.index(name)])
        return slice(start, start + sizes[name])

    def service_items(self, service: str) -> NDArray[np.int64]:
        """All items of one service, ascending."""
        if service not in self.services:
            raise CorpusError(
                f"{self.path}: no service {service!r}; valid: {', '.join(self.services)}"
            )
        return np.flatnonzero(self.item_service == self.services.index(service))

    def verify(self, progress: Progress | None = None) -> None:
        """Re-read everything (``scaling/data/verify.py``).

        Args:
            progress: told of bytes read, of all, and each large file as its digest begins.

        Raises:
            CorpusError: something on disk is not what the manifest says, or cannot be a corpus.
        """
        from scaling.data.verify import verify  # which builds on this module

        verify(self, progress or (lambda done, total, name: None))


def blocks(total: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover ``total`` entries, ``size`` at a time."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def refuse(faults: Iterable[str]) -> None:
    """Raise CorpusError with a line for every fault, if there is any."""
    if lines := "\n".join(faults):
        raise CorpusError(lines)


def folders(root: Path) -> list[Path]:
    """Folders of all prepared corpora below ``root``."""
    return sorted(p.parent for p in (Path(root) / "corpora").glob("[!.]*/manifest.json"))


def named(root: Path, name: str) -> list[Path]:
    """Folders of the prepared corpora of this name, of this digest, or of ``<name>-<digest>``.

    Raises:
        CorpusError: there is none; the message names those there are.
    """
    there = folders(root)
    if found := [p for p in there if name in (p.name, *p.name.rsplit("-", 1))]:
        return found
    names = ", ".join(p.name for p in there) or "none"
    raise CorpusError(f"{Path(root) / 'corpora'}: no corpus {name!r}; prepared: {names}")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a corpus.

    Raises:
        CorpusError: it is missing, of another version, or without a key that every manifest has.
    """
    if not (path / "manifest.json").is_file():
        raise CorpusError(f"{path}: not a prepared corpus (it has no manifest.json)")
    manifest = read_json(path / "manifest.json")
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise CorpusError(
            f"{path / 'manifest.json'}: schema_version = {version!r}; "
            f"this program reads {SCHEMA_VERSION}"
        )
    for key, kind in MANIFEST.items():
        if not isinstance(manifest.get(key), kind):
            raise CorpusError(f"{path / 'manifest.json'}: {key} is missing or no {kind.__name__}")
    for name, record in manifest["files"].items():
        if not isinstance(record, dict) or not record.keys() >= {"bytes", "sha256"}:
            raise CorpusError(f"{path / 'manifest.json'}: files.{name} is not bytes and sha256")
    if not all(isinstance(manifest["splits"].get(s), int) for s in SPLITS):
        raise CorpusError(f"{path / 'manifest.json'}: splits is not {', '.join(SPLITS)}")
    return dict(manifest)
