"""Systems that compare a user's history with an item and learn nothing.

* ``tfidf``: cosine of the summed TF-IDF of the history with the item's.
* ``tfidf+popularity``: that plus 0.3 log(1 + count); the count is that of pretraining users where
  pretraining has the service, else of what the fold may know.
* ``cooccurrence``: how often an item was logged by users who also logged the items of the history,
  c(h, i) summed over the history, counted over pretraining users where pretraining has the service
  and over what the fold may know. An item does not co-occur with itself.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scaling.transfer.baselines import Context
from scaling.transfer.baselines.popularity import known as known_counts
from scaling.transfer.baselines.popularity import pretraining as pretraining_counts
from scaling.transfer.problem import Problem, Split

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
POPULARITY_WEIGHT = 0.3
AT_ONCE = 1 << 22
"""Scores held at once, which bounds memory."""


@dataclass(frozen=True)
class BySimilarity:
    """Scores of a history against items: (history x left) x right, plus a score of each item."""

    problem: Problem
    left: csr_array
    """[items, k]"""
    right: csr_array
    """[k, items]"""
    normalised: bool
    """Whether the history's vector has unit length."""
    bias: Floats | None = None
    """[items]"""
    losses: bool = False

    def every(self, examples: Ints) -> Floats:
        """As ``scoring.Scorer``."""
        lengths, items = self.problem.before(examples)
        row = np.repeat(np.arange(len(examples)), lengths)
        shape = (len(examples), len(self.problem.catalogue))
        profile = csr_array((np.ones(len(items)), (row, items)), shape=shape) @ self.left
        if self.normalised:
            length = np.sqrt(profile.multiply(profile).sum(axis=1))
            profile = profile.multiply(1 / np.maximum(length, 1e-12)[:, None]).tocsr()
        scores: Floats = (profile @ self.right).toarray()
        return scores if self.bias is None else scores + self.bias

    def pairs(self, examples: Ints, rows: Ints) -> Floats:
        """As ``scoring.Scorer``."""
        size = max(1, AT_ONCE // len(self.problem.catalogue))
        parts = []
        for start in range(0, len(examples), size):
            part = slice(start, start + size)
            flat = rows[part].reshape(len(rows[part]), -1)
            parts.append(np.take_along_axis(self.every(examples[part]), flat, 1))
        found: Floats = np.concatenate(parts).reshape(rows.shape)
        return found


def tfidf(context: Context, split: Split, seed: int) -> BySimilarity:
    """Cosine of texts."""
    matrix = context.tfidf
    return BySimilarity(context.problem, matrix, matrix.T.tocsr(), normalised=True)


def tfidf_popularity(context: Context, split: Split, seed: int) -> BySimilarity:
    """Cosine of texts, plus popularity."""
    counted = known_counts if context.problem.pretraining is None else pretraining_counts
    bias = POPULARITY_WEIGHT * np.log1p(counted(context, split, seed).counts)
    matrix = context.tfidf
    return BySimilarity(context.problem, matrix, matrix.T.tocsr(), normalised=True, bias=bias)


def cooccurrence(context: Context, split: Split, seed: int) -> BySimilarity:
    """Counts of pairs of items that a user has both of."""
    problem = context.problem
    users, items = problem.known(split)
    if problem.pretraining is not None:
        offsets, logs = problem.pretraining
        of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        users = np.concatenate([users, of + len(problem.user)])
        items = np.concatenate([items, logs])
    n_items = len(problem.catalogue)
    pairs = np.unique(users * np.int64(n_items) + items)
    users, items = np.divmod(pairs, n_items)
    logged = csr_array((np.ones(len(users)), (users, items)), shape=(users.max() + 1, n_items))
    counts = (logged.T @ logged).tolil()
    counts.setdiag(0)
    identity = csr_array((np.ones(n_items), (np.arange(n_items),) * 2), shape=(n_items, n_items))
    return BySimilarity(problem, identity, counts.tocsr(), normalised=False)
