"""Features of users and items from a frozen encoder (Shin et al. 2023, Section 3, "Transfer").

A user's features are z, the user embeddings before the projection head, of one service or of
several side by side; an item's are h, from the same encoder. Dropout is off and nothing is trained
here, so a user's features do not depend on who else is in a batch.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling.config import MAX_TOKENS
from scaling.data.batches import latest, pack_items
from scaling.data.corpus import Corpus, blocks
from scaling.data.tasks import user_blocks
from scaling.models.clue import ContrastiveEncoder

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Logs = tuple[NDArray[Any], NDArray[Any]]
"""Offsets and items: user ``u`` has ``items[offsets[u]:offsets[u + 1]]``, oldest first. Offsets may
begin anywhere, so those of users a .. b - 1 are a slice, ``offsets[a:b + 1]``, of all."""

CHUNK_ITEMS = 1 << 18
"""Behaviours, or items, of a batch: it encodes each distinct item once. Bounds memory (their
embeddings are held), not the result."""
CHUNK_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 17}
"""Most elements (tokens of items, items of users) whose activations are held at once, by the kind
of device: so few stay in a CPU's caches, and so many keep a GPU busy."""


def device() -> torch.device:
    """Where this process computes: the GPU of its place on the host, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", place % torch.cuda.device_count())


@torch.no_grad()
def embed_users(
    model: ContrastiveEncoder, texts: Corpus, histories: Mapping[str, Logs], items_per_user: int
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Embeddings z of every log that is not empty, some users at a time.

    Args:
        model: in evaluation mode.
        texts: corpus whose item numbers the logs have, as the encoder sees it
            (``foreign.as_seen_by``).
        histories: logs of all users by service.
        items_per_user: cap S on the most recent items, per service, as in pretraining. [items]

    Yields:
        ``(users, columns, z)``: users' rows, and the places of the logs' services in
        ``histories``. [logs], [logs], [logs, feature_width]
    """
    offsets = [o for o, _ in histories.values()]
    lengths = sum(np.minimum(np.diff(o.astype(np.int64)), items_per_user) for o in offsets)
    users = np.flatnonzero(lengths)
    for part in user_blocks(np.asarray(lengths)[users], CHUNK_ITEMS):
        chunk = users[part]
        ragged = [latest(*logs, chunk, items_per_user) for logs in histories.values()]
        counts = np.concatenate([n for n, _ in ragged])
        rows = np.flatnonzero(counts)
        items = np.concatenate([i for _, i in ragged])
        batch = pack_items(texts, [(counts[rows], items)], distinct=True)
        embedded: Tensor = model(batch, CHUNK_TOKENS[model.device.type])
        columns, places = np.divmod(rows, len(chunk))
        yield chunk[places], columns, embedded.float().cpu().numpy()


def user_features(
    model: ContrastiveEncoder, texts: Corpus, histories: Mapping[str, Logs], items_per_user: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Embeddings of users, their services side by side in the order of ``histories``.

    Args as in ``embed_users``.

    Returns:
        z, zeros where a user has no history in a service [users, services * feature_width], and
        where there is one [users, services].
    """
    n_users = len(next(iter(histories.values()))[0]) - 1
    features = np.zeros((n_users, len(histories), model.config.feature_width), np.float32)
    present = np.zeros((n_users, len(histories)), np.bool_)
    for users, columns, embedded in embed_users(model, texts, histories, items_per_user):
        present[users, columns] = True
        features[users, columns] = embedded
    return features.reshape(n_users, -1), present


@torch.no_grad()
def embed_items(model: ContrastiveEncoder, texts: Corpus, items: Ints) -> Iterator[Floats]:
    """Embeddings h of items, in the given order, some at a time. [items, d]

    Args:
        model: in evaluation mode.
        texts: as in ``embed_users``.
        items: rows of the corpus's items. [items]
    """
    size = CHUNK_TOKENS[model.device.type] // MAX_TOKENS
    for part in blocks(len(items), size):
        batch = pack_items(texts, [(np.ones_like(items[part]), items[part])], distinct=False)
        yield model.encode_items(batch.tokens, batch.token_offsets).float().cpu().numpy()


def item_features(model: ContrastiveEncoder, texts: Corpus, items: Ints) -> Floats:
    """Embeddings h of items, in the given order. [items, d]

    Args as in ``embed_items``.
    """
    parts = list(embed_items(model, texts, items))
    return np.concatenate(parts) if parts else np.zeros((0, model.config.d_model), np.float32)
