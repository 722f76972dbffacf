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
from scaling.config import MAX_TOKENS, CorpusCard, canonical_json, short_digest
from scaling.files import read_json, sha256

SCHEMA_VERSION = 1
SPLITS = ("pretraining", "validation", "pool")
MANIFEST = {
    "name": str, "digest": str, "services": list, "splits": dict, "steps": list, "files": dict,
    "tasks": dict, "card": dict,
}  # fmt: skip
"""Keys that every manifest has, and what they hold."""
INT32_MAX = 2**31 - 1
BLOCK = 1 << 22
"""Entries of an array looked at together: no array of behaviours is ever whole in memory."""
LARGE = 1 << 26
"""Size of a file that takes so long to read that people are told. [bytes]"""

Reading = Callable[[int, int, str], None]
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
        _refuse(faults)
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
        kind, offset = (pa.large_binary(), np.int64) if wide else (pa.binary(), np.int32)
        offsets = self.token_offsets.astype(offset)
        offsets *= self.tokens.itemsize
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self.tokens)]
        table = pa.Array.from_buffers(kind, self.n_items, buffers)
        try:
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

    def verify(self, progress: Reading | None = None) -> None:
        """Re-read everything: digests, structure, the card, and every task for leaks.

        Memory is that of a block, and of the table of items for the card, not of the behaviours.

        Args:
            progress: told of bytes read, of all, and each large file as its digest begins.

        Raises:
            CorpusError: something on disk is not what the manifest says, or cannot be a corpus. A
                line for each fault of the first of these kinds that has any: the later ones
                rest on the earlier.
        """
        _refuse(self._digest_faults(progress or (lambda done, total, name: None)))
        _refuse(self._table_faults())
        _refuse(self._log_faults())
        _refuse(self._card_faults())
        _refuse(self._task_faults())

    def _digest_faults(self, progress: Reading) -> Iterator[str]:
        files = self.manifest["files"]
        done, total = 0, sum(r["bytes"] for r in files.values())
        for name, record in files.items():
            if record["bytes"] >= LARGE:
                progress(done, total, name)
            done += record["bytes"]
            if (found := sha256(self.path / name)) != record["sha256"]:
                yield (
                    f"{self.path / name}: its SHA-256 is {found}, "
                    f"the manifest says {record['sha256']}"
                )
        name, digest = self.manifest["name"], content_digest(self.manifest)
        for where, named in (
            ("folder", self.path.resolve().name),
            ("manifest", f"{name}-{self.manifest['digest']}"),
            ("card", f"{self.card.name}-{self.card.digest}"),
        ):
            if named != f"{name}-{digest}":
                yield f"{self.path}: its content is {name}-{digest}, its {where} says {named}"
        for task, recorded in self.manifest["tasks"].items():
            if (digest := task_digest(self.manifest, task)) != recorded:
                yield (
                    f"{self.path / 'tasks' / task}: its content is {digest}, "
                    f"the manifest says {recorded}"
                )

    def _table_faults(self) -> Iterator[str]:
        """Items: in bounds, each with its service's token and then tokens of its text."""
        path, n_services = self.path / "items/tokens.npy", len(self.services)
        n_items, offsets = len(self.item_service), self.path / "items/offsets.npy"
        if fault := _offsets_fault(offsets, self.token_offsets, len(self.tokens), n_items):
            yield fault
            return
        for block in blocks(n_items, BLOCK // MAX_TOKENS):
            bounds = self.token_offsets[block.start : block.stop + 1].astype(np.int64)
            service = self.item_service[block].astype(np.int64)
            if (long := np.diff(bounds) > MAX_TOKENS).any():
                item = block.start + int(long.argmax())
                yield f"{offsets}: item {item} has more than {MAX_TOKENS} tokens"
                return
            tokens = self.tokens[bounds[0] : bounds[-1]].astype(np.int64)
            starts = bounds[:-1] - bounds[0]
            if (wrong := (tokens[starts] != service + 1) | (service >= n_services)).any():
                yield f"{path}: item {block.start + int(wrong.argmax())} has no service token"
                return
            valid = (tokens > n_services) & (tokens < self.card.vocab_size)
            valid[starts] = True
            if not valid.all():
                token = int(tokens[valid.argmin()])
                yield f"{path}: token {token} is none of a text ({n_services + 1} to vocabulary)"
                return

    def _log_faults(self) -> Iterator[str]:
        """Users: in the order of their keys, unseen where they should be, with items that are."""
        n_users, path = sum(self.manifest["splits"].values()), self.path / "users/keys.npy"
        if len(self.keys) != n_users:
            yield f"{path}: has {len(self.keys)} entries, not {n_users}"
            return
        held = self.keys[self.split("validation").start :]
        if len(np.unique(held)) < len(held):
            yield f"{path}: a user is twice among those of validation and pool"
        for name in SPLITS:
            rows = self.split(name)
            for block in blocks(rows.stop - rows.start):
                at = rows.start + block.start
                keys = self.keys[at : min(at + BLOCK + 1, rows.stop)]
                if name == "pretraining" and np.isin(keys, held).any():
                    yield f"{path}: a user of validation or pool is one of pretraining"
                    break
                if (keys[1:] < keys[:-1]).any():
                    yield f"{path}: users of {name} do not lie in the order of their keys"
                    break
        for service, (offsets, items) in self._users.items():
            folder, index = self.path / "users" / service, self.services.index(service)
            if fault := _offsets_fault(folder / "offsets.npy", offsets, len(items), n_users):
                yield fault
            for block in blocks(len(items)):
                part = items[block]
                if int(part.max()) >= self.n_items:
                    yield f"{folder / 'items.npy'}: an item that is not in the table"
                    break
                if (self.item_service[part] != index).any():
                    yield f"{folder / 'items.npy'}: an item of another service"
                    break

    def _card_faults(self) -> Iterator[str]:
        from scaling.data import tokenizer  # both build on this module
        from scaling.data.card import corpus_card

        path = self.path / "tokenizer.json"
        bpe = tokenizer.load(path)
        if bpe.get_vocab_size() != self.card.vocab_size:
            yield f"{path}: has {bpe.get_vocab_size()} entries, the card {self.card.vocab_size}"
        for i, service in enumerate(self.services):
            if bpe.token_to_id(f"<service:{service}>") != i + 1:
                yield f"{path}: token {i + 1} is not that of service {service!r}"
        splits = self.manifest["splits"]
        counted = corpus_card(
            self.card, self.path, self.manifest["digest"], splits, self.card.vocab_size
        ).model_dump()
        for key, value in self.card.model_dump().items():
            if value != counted[key]:
                yield f"{self.path / 'manifest.json'}: card.{key} is not that of the logs"

    def _task_faults(self) -> Iterator[str]:
        from scaling.data.tasks import Task  # which builds on this module

        for task in self.manifest["tasks"]:
            try:
                Task.open(self, task)
            except ClueError as e:
                yield str(e)


def blocks(total: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover ``total`` entries, ``size`` at a time."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _refuse(faults: Iterable[str]) -> None:
    if lines := "\n".join(faults):
        raise CorpusError(lines)


def _offsets_fault(path: Path, offsets: Any, total: int, rows: int) -> str | None:
    """What is wrong with the offsets of ``rows`` non-empty rows that together have ``total``."""
    if len(offsets) != rows + 1:
        return f"{path}: has {len(offsets)} entries, not {rows + 1}"
    if int(offsets[0]) != 0 or int(offsets[-1]) != total:
        return f"{path}: its offsets go from {offsets[0]} to {offsets[-1]}, not from 0 to {total}"
    for block in blocks(rows):
        bounds = offsets[block.start : block.stop + 1]
        if (wrong := bounds[1:] <= bounds[:-1]).any():
            return f"{path}: row {block.start + int(wrong.argmax())} is empty or of negative length"
    return None


def folders(root: Path) -> list[Path]:
    """Folders of all prepared corpora below ``root``."""
    return sorted(p.parent for p in (Path(root) / "corpora").glob("[!.]*/manifest.json"))


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
