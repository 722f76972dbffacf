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

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scaling import ClueError
from scaling.config import CorpusCard, canonical_json, short_digest
from scaling.files import read_json, sha256

SCHEMA_VERSION = 1
SPLITS = ("pretraining", "validation", "pool")


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
        for name, record in manifest["files"].items():
            file = Path(path) / name
            size = file.stat().st_size if file.is_file() else None
            if size != record["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise CorpusError(f"{file}: {found}; its manifest says {record['bytes']} bytes")
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

    def info(self) -> dict[str, Any]:
        """What the corpus is, for people and for ``corpus info``; no array is read through."""
        m = self.manifest
        return {
            "name": self.card.name,
            "digest": self.card.digest,
            "path": str(self.path),
            "services": list(self.services),
            "pretraining_services": list(self.card.services),
            "users": m["splits"],
            "items": self.n_items,
            "behaviours": {s: len(items) for s, (_, items) in self._users.items()},
            "tokens": len(self.tokens),
            "vocab_size": self.card.vocab_size,
            "pool_digest": self.card.pool.digest if self.card.pool else None,
            "tasks": m["tasks"],
            "steps": m["steps"],
            "bytes": sum(r["bytes"] for r in m["files"].values()),
        }

    def verify(self) -> None:
        """Re-read everything: digests of all files, of the corpus and its tasks, and structure.

        Raises:
            CorpusError: something on disk is not what the manifest says; the message names it.
        """
        for name, record in self.manifest["files"].items():
            if (found := sha256(self.path / name)) != record["sha256"]:
                raise CorpusError(
                    f"{self.path / name}: its SHA-256 is {found}, "
                    f"the manifest says {record['sha256']}"
                )
        if (digest := content_digest(self.manifest)) != self.card.digest:
            raise CorpusError(f"{self.path}: its content is {digest}, its name {self.card.digest}")
        for task, recorded in self.manifest["tasks"].items():
            if task_digest(self.manifest, task) != recorded:
                raise CorpusError(f"{self.path / 'tasks' / task}: its content is not {recorded}")
        self._verify_structure()

    def _verify_structure(self) -> None:
        n_users = sum(self.manifest["splits"][s] for s in SPLITS)
        check_offsets(self.path / "items/offsets.npy", self.token_offsets, len(self.tokens))
        for name, found, expected in (
            ("items/service.npy", len(self.item_service), self.n_items),
            ("users/keys.npy", len(self.keys), n_users),
        ):
            if found != expected:
                raise CorpusError(f"{self.path / name}: has {found} entries, not {expected}")
        if len(self.tokens) and int(self.tokens.max()) >= self.card.vocab_size:
            raise CorpusError(f"{self.path / 'items/tokens.npy'}: a token outside the vocabulary")
        if not np.array_equal(
            self.tokens[self.token_offsets[:-1]].astype(np.int64),
            self.item_service.astype(np.int64) + 1,
        ):
            raise CorpusError(f"{self.path / 'items/tokens.npy'}: an item without service token")
        for service, (offsets, items) in self._users.items():
            folder = self.path / "users" / service
            check_offsets(folder / "offsets.npy", offsets, len(items), n_users)
            if int(items.max()) >= self.n_items:
                raise CorpusError(f"{folder / 'items.npy'}: an item that is not in the table")
            if (self.item_service[items] != self.services.index(service)).any():
                raise CorpusError(f"{folder / 'items.npy'}: an item of another service")


def check_offsets(path: Path, offsets: Any, total: int, rows: int | None = None) -> None:
    """Raise CorpusError unless ``offsets`` bound non-empty rows that together have ``total``."""
    if (
        not len(offsets)
        or (rows is not None and len(offsets) != rows + 1)
        or int(offsets[0]) != 0
        or int(offsets[-1]) != total
        or (offsets[1:] <= offsets[:-1]).any()
    ):
        raise CorpusError(f"{path}: its offsets do not bound {total} entries in non-empty rows")


def folders(root: Path) -> list[Path]:
    """Folders of all prepared corpora below ``root``."""
    return sorted(p.parent for p in (Path(root) / "corpora").glob("[!.]*/manifest.json"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a corpus.

    Raises:
        CorpusError: it is missing or of another version.
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
    return dict(manifest)
