"""Negatives of a task: items that a target is ranked with, drawn once and stored.

Both draws are in whole numbers out of keyed permutations (``permutation.py``): the same on every
machine and engine, and a user's do not depend on who else is there. Memory is that of some hundred
bytes a negative, so the users come in blocks (``tasks.user_blocks``).
"""

import numpy as np
from numpy.typing import NDArray

from scaling.data.corpus import CorpusError
from scaling.data.permutation import key_of, permute
from scaling.data.task_config import TaskConfig

Ints = NDArray[np.int64]


def draw_negatives(
    name: str,
    config: TaskConfig,
    user: Ints,
    item: Ints,
    keys: NDArray[np.uint64],
    candidates: Ints,
    weights: Ints | None = None,
) -> Ints:
    """Negatives of every target, without replacement, over what the user never touched.

    Args:
        user, item: every log of the service. [logs]
        keys: of the users. [users]
        candidates: items of the service, ascending.
        weights: logs that each candidate counts with; None: all alike.

    Returns:
        Items, in the order of the draw. [users, targets, negatives]

    Raises:
        CorpusError: a user has too few untouched items.
    """
    n_users, width = len(keys), len(candidates)
    touched = np.unique(user * np.int64(width) + np.searchsorted(candidates, item))
    able = np.ones(width, bool) if weights is None else weights > 0
    row, place = np.divmod(touched, width)
    free = able.sum() - np.bincount(row[able[place]], minlength=n_users)
    if n_users and free.min() < config.negatives:
        among = "" if weights is None else " that have logs to count"
        raise CorpusError(
            f"task {name!r}: negatives = {config.negatives}, but a user has touched all but "
            f"{free.min()} of the {able.sum()} items of {config.service!r}{among}"
        )
    salt = np.uint64(key_of("negatives", name, *([] if weights is None else ["popularity"])))
    draws = 1 if weights is None else config.negatives  # keys of a target
    number = np.arange(config.targets * draws, dtype=np.uint64).reshape(-1, draws)
    with np.errstate(over="ignore"):
        key = (keys[:, None, None] ^ salt) + number * np.uint64(0xD1342543DE82EF95)
    if weights is None:
        drawn = _uniform(touched, free, key, width, config.negatives)
    else:
        drawn = _by_weight(touched, key, weights)
    result: Ints = candidates[drawn]
    return result


def _uniform(touched: Ints, free: Ints, key: NDArray[np.uint64], width: int, count: int) -> Ints:
    """Places of candidates: the r-th untouched ones, r the first values of a permutation, whose key
    is that of the target. [users, targets, 1]

    They are found from the touched ones alone. Of these the i-th, at place p, has p - i untouched
    places before it; the r-th untouched place is r + (number of touched ones with p - i <= r).
    """
    rank = permute(np.arange(count), free[:, None, None], key)
    row, place = np.divmod(touched, width)
    counts = np.bincount(row, minlength=len(key))
    starts = np.cumsum(counts) - counts
    # One search over all users: offset by row.
    gaps = place - (np.arange(len(place)) - starts[row]) + row * (width + 1)
    at = np.arange(len(key))[:, None, None] * np.int64(width + 1)
    passed = np.searchsorted(gaps, rank + at, side="right") - starts[:, None, None]
    drawn: Ints = rank + passed
    return drawn


def _by_weight(touched: Ints, key: NDArray[np.uint64], weights: Ints) -> Ints:
    """Places of candidates, each drawn in proportion to its weight among those that are left.

    A candidate has as many tickets as its weight, in a row. Each draw is a number below the tickets
    left; its ticket is found by adding those of the candidates gone that lie before it: of the
    touched ones by one search, as in ``_uniform``, of those drawn by looking at each. That is
    successive sampling, exactly, and neither time nor memory depend on the weights.

    Args:
        key: of every draw. [users, targets, draws]
    """
    n_users, n_targets, count = key.shape
    user, key = np.repeat(np.arange(n_users), n_targets), key.reshape(-1, count).T
    ends = np.cumsum(weights)
    starts, total = ends - weights, int(ends[-1])
    row, place = np.divmod(touched, len(weights))
    gone = np.concatenate([np.zeros(1, np.int64), np.cumsum(weights[place])])
    before = gone[np.searchsorted(row, np.arange(n_users + 1))]
    # One search over all users: offset by row.
    gaps = starts[place] - (gone[:-1] - before[row]) + row * (total + 1)
    left = (total - np.diff(before))[user]
    drawn = np.zeros((count, len(user)), np.int64)
    # Of each candidate drawn: the tickets left before it, and its own. [draws, rows]
    ahead, own = np.zeros_like(drawn), np.zeros_like(drawn)
    for i in range(count):
        ticket = permute(0, left, key[i])
        passed = ahead[:i] <= ticket
        by_draws = np.where(passed, own[:i], 0).sum(axis=0)
        at = np.searchsorted(gaps, ticket + by_draws + user * (total + 1), side="right")
        shift = by_draws + gone[at] - before[user]
        drawn[i] = np.searchsorted(ends, ticket + shift, side="right")
        ahead[i], own[i] = starts[drawn[i]] - shift, weights[drawn[i]]
        ahead[:i] -= np.where(passed, 0, own[i])
        left -= own[i]
    return drawn.T.reshape(n_users, n_targets, count)
