"""Verification: everything of a corpus is read again, in memory of a block and of the item table.

What digests cannot tell is checked too, for a corpus may have been made by another program: the
structure of items and users, the card that planning relies on, and every task for leaks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scaling import ClueError
from scaling.config import MAX_TOKENS
from scaling.data import tokenizer
from scaling.data.card import corpus_card
from scaling.data.corpus import (
    BLOCK,
    SPLITS,
    Corpus,
    Progress,
    blocks,
    content_digest,
    refuse,
    task_digest,
)
from scaling.data.tasks import Task
from scaling.files import sha256

LARGE = 1 << 26
"""Size of a file that takes so long to read that people are told. [bytes]"""


def verify(corpus: Corpus, progress: Progress) -> None:
    """Re-read everything: digests, structure, the card, and every task for leaks.

    Args:
        progress: told of bytes read, of all, and each large file as its digest begins.

    Raises:
        CorpusError: something on disk is not what the manifest says, or cannot be a corpus. A line
            for each fault of the first of these kinds that has any: the later ones rest on the
            earlier.
    """
    refuse(_digest_faults(corpus, progress))
    refuse(_table_faults(corpus))
    refuse(_log_faults(corpus))
    refuse(_card_faults(corpus))
    refuse(_task_faults(corpus))


def _digest_faults(corpus: Corpus, progress: Progress) -> Iterator[str]:
    files = corpus.manifest["files"]
    done, total = 0, sum(r["bytes"] for r in files.values())
    for name, record in files.items():
        if record["bytes"] >= LARGE:
            progress(done, total, name)
        done += record["bytes"]
        if (found := sha256(corpus.path / name)) != record["sha256"]:
            yield (
                f"{corpus.path / name}: its SHA-256 is {found}, "
                f"the manifest says {record['sha256']}"
            )
    name, digest = corpus.manifest["name"], content_digest(corpus.manifest)
    for where, named in (
        ("folder", corpus.path.resolve().name),
        ("manifest", f"{name}-{corpus.manifest['digest']}"),
        ("card", f"{corpus.card.name}-{corpus.card.digest}"),
    ):
        if named != f"{name}-{digest}":
            yield f"{corpus.path}: its content is {name}-{digest}, its {where} says {named}"
    for task, recorded in corpus.manifest["tasks"].items():
        if (digest := task_digest(corpus.manifest, task)) != recorded:
            yield (
                f"{corpus.path / 'tasks' / task}: its content is {digest}, "
                f"the manifest says {recorded}"
            )


def _table_faults(corpus: Corpus) -> Iterator[str]:
    """Items: in bounds, each with its service's token and then tokens of its text."""
    path, n_services = corpus.path / "items/tokens.npy", len(corpus.services)
    n_items, offsets = len(corpus.item_service), corpus.path / "items/offsets.npy"
    if fault := _offsets_fault(offsets, corpus.token_offsets, len(corpus.tokens), n_items):
        yield fault
        return
    for block in blocks(n_items, BLOCK // MAX_TOKENS):
        bounds = corpus.token_offsets[block.start : block.stop + 1].astype(np.int64)
        service = corpus.item_service[block].astype(np.int64)
        if (long := np.diff(bounds) > MAX_TOKENS).any():
            item = block.start + int(long.argmax())
            yield f"{offsets}: item {item} has more than {MAX_TOKENS} tokens"
            return
        tokens = corpus.tokens[bounds[0] : bounds[-1]].astype(np.int64)
        starts = bounds[:-1] - bounds[0]
        if (wrong := (tokens[starts] != service + 1) | (service >= n_services)).any():
            yield f"{path}: item {block.start + int(wrong.argmax())} has no service token"
            return
        valid = (tokens > n_services) & (tokens < corpus.card.vocab_size)
        valid[starts] = True
        if not valid.all():
            token = int(tokens[valid.argmin()])
            yield f"{path}: token {token} is none of a text ({n_services + 1} to vocabulary)"
            return


def _log_faults(corpus: Corpus) -> Iterator[str]:
    """Users: in the order of their keys, unseen where they should be, with items that are."""
    n_users, path = sum(corpus.manifest["splits"].values()), corpus.path / "users/keys.npy"
    if len(corpus.keys) != n_users:
        yield f"{path}: has {len(corpus.keys)} entries, not {n_users}"
        return
    held = corpus.keys[corpus.split("validation").start :]
    if len(np.unique(held)) < len(held):
        yield f"{path}: a user is twice among those of validation and pool"
    for name in SPLITS:
        rows = corpus.split(name)
        for block in blocks(rows.stop - rows.start):
            after = min(rows.start + block.stop + 1, rows.stop)  # the first of the next block too
            keys = corpus.keys[rows.start + block.start : after]
            if name == "pretraining" and np.isin(keys, held).any():
                yield f"{path}: a user of validation or pool is one of pretraining"
                break
            if (keys[1:] < keys[:-1]).any():
                yield f"{path}: users of {name} do not lie in the order of their keys"
                break
    for service in corpus.card.services:
        offsets, items = corpus.users(service)
        folder, index = corpus.path / "users" / service, corpus.services.index(service)
        if fault := _offsets_fault(folder / "offsets.npy", offsets, len(items), n_users):
            yield fault
        for block in blocks(len(items)):
            part = items[block]
            if int(part.max()) >= corpus.n_items:
                yield f"{folder / 'items.npy'}: an item that is not in the table"
                break
            if (corpus.item_service[part] != index).any():
                yield f"{folder / 'items.npy'}: an item of another service"
                break


def _card_faults(corpus: Corpus) -> Iterator[str]:
    path = corpus.path / "tokenizer.json"
    bpe = tokenizer.load(path)
    if bpe.get_vocab_size() != corpus.card.vocab_size:
        yield f"{path}: has {bpe.get_vocab_size()} entries, the card {corpus.card.vocab_size}"
    for i, service in enumerate(corpus.services):
        if bpe.token_to_id(f"<service:{service}>") != i + 1:
            yield f"{path}: token {i + 1} is not that of service {service!r}"
    splits = corpus.manifest["splits"]
    counted = corpus_card(
        corpus.card, corpus.path, corpus.manifest["digest"], splits, corpus.card.vocab_size
    ).model_dump()
    for key, value in corpus.card.model_dump().items():
        if value != counted[key]:
            yield f"{corpus.path / 'manifest.json'}: card.{key} is not that of the logs"


def _task_faults(corpus: Corpus) -> Iterator[str]:
    for task in corpus.manifest["tasks"]:
        try:
            Task.open(corpus, task)
        except ClueError as e:
            yield str(e)


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
