"""Features of users and items from a frozen encoder (Shin et al. 2023, Section 3, "Transfer").

A user's features are z, the user embeddings before the projection head, of the task's service or
of all its history services side by side; an item's are h, from the same encoder. Dropout is off and
nothing is trained here, so a user's features do not depend on who else is in a batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling import ClueError
from scaling.data.batches import pack_items
from scaling.data.corpus import Corpus
from scaling.data.tasks import Task, make_history_batch, user_blocks
from scaling.models.clue import ContrastiveEncoder

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

CHUNK_ITEMS = 8192
"""Behaviours, or items, encoded at once: bounds memory, not the result."""


class TransferError(ClueError):
    """An encoder cannot be evaluated on a task; the message names both and why."""


@torch.no_grad()
def user_features(
    model: ContrastiveEncoder,
    corpus: Corpus,
    task: Task,
    services: Sequence[str],
    items_per_user: int,
) -> tuple[Floats, NDArray[np.bool_]]:
    """Embeddings of every user of a task, in the task's order.

    Args:
        model: in evaluation mode.
        services: history services, in the order their embeddings shall have.
        items_per_user: cap S on the most recent items, per service, as in pretraining. [items]

    Returns:
        z of the services side by side, zeros where a user has no history in one
        [users, services * d], and where there is one [users, services].
    """
    width = model.config.d_model
    features = np.zeros((task.n_users, len(services), width), np.float32)
    present = np.zeros((task.n_users, len(services)), np.bool_)
    for users in _chunks(task, services, items_per_user):
        histories = make_history_batch(corpus, task, users, items_per_user, services)
        column, row = np.divmod(histories.rows, len(users))
        embedded: Tensor = model(histories.batch)
        present[users[row], column] = True
        features[users[row], column] = embedded.float().cpu().numpy()
    return features.reshape(task.n_users, -1), present


@torch.no_grad()
def item_features(model: ContrastiveEncoder, corpus: Corpus, items: Ints) -> Floats:
    """Embeddings h of items, in the given order. [items, d]

    Args:
        model: in evaluation mode.
        items: rows of the corpus's items. [items]
    """
    features = np.zeros((len(items), model.config.d_model), np.float32)
    for start in range(0, len(items), CHUNK_ITEMS):
        chunk = items[start : start + CHUNK_ITEMS]
        batch = pack_items(corpus, [(np.ones_like(chunk), chunk)], distinct=False)
        embedded = model.encode_items(batch.tokens, batch.token_offsets)
        features[start : start + len(chunk)] = embedded.float().cpu().numpy()
    return features


def _chunks(task: Task, services: Sequence[str], items_per_user: int) -> Iterator[Ints]:
    """Users with any history, in runs of at most ``CHUNK_ITEMS`` behaviours (or one user)."""
    lengths = np.zeros(task.n_users, np.int64)
    for service in services:
        offsets = task.history(service)[0].astype(np.int64)
        lengths += np.minimum(np.diff(offsets), items_per_user)
    users = np.flatnonzero(lengths)
    for part in user_blocks(lengths[users], CHUNK_ITEMS):
        yield users[part]
