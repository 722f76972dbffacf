"""Popularity: every user is shown the most frequent items.

With uniformly drawn negatives this is a strong floor, so it stands beside every result. It can
count two things, and the two rows are different baselines:

* ``popularity``: the interactions of the task's training users with the task's service, their
  histories and their targets. It knows what the head knows and exists for every task.
* ``popularity/pretraining``: the interactions of the corpus's pretraining users with that service.
  It knows what the encoder knows, and exists only for services that pretraining has.

Neither sees anything of a validation or a test user. Ties, of which counts have many, are left to
the metrics, which take the expected value.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def count_items(n_items: int, *logs: Ints) -> Ints:
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
