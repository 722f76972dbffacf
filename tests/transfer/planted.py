"""Planted problems, users whose choices are known, for tests of what learns from them; and a small
run."""

from typing import Any

import numpy as np

from scaling.config import ModelConfig, RunConfig
from scaling.data.corpus import Corpus
from scaling.transfer.heads import Features
from scaling.transfer.problem import Problem

N_ITEMS, N_TARGETS, N_NEGATIVES = 400, 3, 100


def problem_of(order: np.ndarray, **changes: Any) -> Problem:
    """Users who like items in that order: three targets, six logs before them, 100 negatives.

    Args:
        order: items by utility, the liked first. [users, items]
    """
    rng = np.random.default_rng(len(order))
    n_users, n_items = order.shape
    negatives = np.stack([rng.permuted(order[:, 9:], axis=1)[:, :N_NEGATIVES] for _ in range(3)], 1)
    fields = {
        "name": "planted",
        "catalogue": np.arange(n_items),
        "user": np.arange(n_users),
        "candidates": np.concatenate([order[:, :3, None], negatives], 2).astype(np.int32),
        "full": False,
        "history": (np.arange(n_users + 1) * 6, order[:, 3:9].ravel()),
        "group": np.arange(n_users).astype(np.uint8) % 10,
        "part": np.zeros(n_users, np.uint8),
        "pretraining": (np.arange(n_users // 4 + 1) * 9, order[: n_users // 4, :9].ravel()),
        "segment": None,
    }
    return Problem(**fields | changes)


def linear(n_users: int, seed: int = 0, *, signal: float = 3.0) -> tuple[Problem, Features]:
    """Users who choose items by a linear relation W between their features and the items'."""
    world = np.random.default_rng(12345)
    items = world.normal(size=(N_ITEMS, 6)).astype(np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)  # a long item would be a popular one
    relation = np.linalg.qr(world.normal(size=(6, 5)))[0].T
    rng = np.random.default_rng(seed)
    users = rng.normal(size=(n_users, 5)).astype(np.float32)
    utility = signal * users @ relation @ items.T + rng.gumbel(size=(n_users, N_ITEMS))
    return problem_of(np.argsort(-utility, axis=1)), Features(users, items)


def popular(n_users: int = 200, seed: int = 0) -> tuple[Problem, Features]:
    """Users who differ in nothing and choose by a steep popularity; items 0, 1, ... fall off."""
    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, N_ITEMS + 1)
    order = np.argsort(-(np.log(weight) + rng.gumbel(size=(n_users, N_ITEMS))), axis=1)
    noise = rng.normal(size=(n_users, 3)), rng.normal(size=(N_ITEMS, 4))
    return problem_of(order), Features(*(x.astype(np.float32) for x in noise))


def configure(corpus: Corpus, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": ModelConfig(layers=1, d_model=8, heads=2),
            "data": {
                "corpus_digest": corpus.card.digest,
                "vocab_size": corpus.card.vocab_size,
                "n_services": len(corpus.card.services),
                "items_per_user": 4,
            },
            "batch_size": 16,
            "negatives": 16,
            "steps": 6,
            "evaluations": 2,
            "pool": corpus.card.pool,
            **changes,
        }
    )
