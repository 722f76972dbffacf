"""Popularity: every user is shown the most frequent items.

With uniformly drawn negatives this is a strong floor, so it stands beside every result. It can
count two things, and the two rows are different baselines:

* ``popularity``: what a fold may know (``Problem.known``): histories, and the targets of training
  examples. It knows what the heads know and exists for every task.
* ``popularity/pretraining``: the logs of the corpus's pretraining users in that service. It knows
  what the encoder knows, and exists only for services that pretraining has.

Ties, of which counts have many, are left to the metrics, which take the expected value.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling.transfer.baselines import Context
from scaling.transfer.problem import Split, TransferError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ByCounts:
    """Scores that are the same for every user."""

    counts: Ints
    """[items]"""
    losses: bool = False

    def pairs(self, examples: Ints, rows: Ints) -> Ints:
        """As ``scoring.Scorer``."""
        found: Ints = self.counts[rows]
        return found

    def every(self, examples: Ints) -> Ints:
        """As ``scoring.Scorer``."""
        return np.broadcast_to(self.counts, (len(examples), len(self.counts)))


def count_items(n_items: int, *logs: NDArray[np.integer]) -> Ints:
    """Interactions with each item.

    Args:
        n_items: items of the service.
        logs: item indices in 0..``n_items`` - 1, of any shape.

    Returns:
        Counts. [n_items]
    """
    counts = np.zeros(n_items, np.int64)
    for log in logs:
        counts += np.bincount(np.asarray(log, np.int64).ravel(), minlength=n_items)
    return counts


def known(context: Context, split: Split, seed: int) -> ByCounts:
    """Counts of what the fold may know."""
    problem = context.problem
    return ByCounts(count_items(len(problem.catalogue), problem.known(split)[1]))


def pretraining(context: Context, split: Split, seed: int) -> ByCounts:
    """Counts of the pretraining users' logs.

    Raises:
        TransferError: pretraining lacks the service.
    """
    problem = context.problem
    if problem.pretraining is None:
        raise TransferError(
            f"task {problem.name!r}: popularity/pretraining needs a service of pretraining, "
            "and a task whose users are not among its users"
        )
    return ByCounts(count_items(len(problem.catalogue), problem.pretraining[1]))
