"""Negatives of a task: items that a target is ranked with, drawn once and stored.

Both draws are in whole numbers out of a keyed permutation (``permutation.py``): the same on every
machine and engine, and a user's do not depend on who else is there.
"""

import numpy as np
from numpy.typing import NDArray

from scaling.data.corpus import BLOCK, CorpusError
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
    target = np.arange(config.targets, dtype=np.uint64)
    with np.errstate(over="ignore"):
        key = (keys[:, None] ^ salt) + target * np.uint64(0xD1342543DE82EF95)
    if weights is None:
        drawn = _uniform(touched, free, key, width, config.negatives)
    else:
        drawn = _by_weight(touched, key, weights, config.negatives)
    result: Ints = candidates[drawn]
    return result


def _uniform(touched: Ints, free: Ints, key: NDArray[np.uint64], width: int, count: int) -> Ints:
    """Places of candidates: the r-th untouched ones, r the first values of a permutation.

    They are found from the touched ones alone. Of these the i-th, at place p, has p - i untouched
    places before it; the r-th untouched place is r + (number of touched ones with p - i <= r).
    """
    rank = permute(np.arange(count), free[:, None, None], key[:, :, None])
    row, place = np.divmod(touched, width)
    counts = np.bincount(row, minlength=len(key))
    starts = np.cumsum(counts) - counts
    # One search over all users: offset by row.
    gaps = place - (np.arange(len(place)) - starts[row]) + row * (width + 1)
    at = np.arange(len(key))[:, None, None] * np.int64(width + 1)
    passed = np.searchsorted(gaps, rank + at, side="right") - starts[:, None, None]
    drawn: Ints = rank + passed
    return drawn


def _by_weight(touched: Ints, key: NDArray[np.uint64], weights: Ints, count: int) -> Ints:
    """Places of candidates, each drawn in proportion to its weight among those that are left.

    A candidate has as many tickets as its weight; tickets come in the order of a permutation, and
    one of a candidate that the user touched, or that is drawn already, is passed over. That is
    successive sampling, exactly.
    """
    ends = np.cumsum(weights)
    total = int(ends[-1])
    rows, user = key.reshape(-1), np.repeat(np.arange(len(key)), key.shape[1])
    drawn = np.zeros((len(rows), count), np.int64)
    pending, tickets = np.arange(len(rows)), min(2 * count, total)
    while len(pending):
        undone = []
        for part in np.array_split(pending, 1 + len(pending) * tickets // BLOCK):
            ticket = permute(np.arange(tickets), total, rows[part, None])
            place = np.searchsorted(ends, ticket, side="right")
            valid = _first(place) & ~_among(touched, user[part, None] * len(weights) + place)
            full = valid.sum(axis=1) >= count
            taken = valid & (np.cumsum(valid, axis=1) <= count)
            drawn[part[full]] = place[full][taken[full]].reshape(-1, count)
            undone.append(part[~full])
        pending, tickets = np.concatenate(undone), min(2 * tickets, total)
    return drawn.reshape(*key.shape, count)


def _first(values: Ints) -> NDArray[np.bool_]:
    """Whether each entry is the first of its value in its row. [rows, entries]"""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    first = np.ones(values.shape, bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first


def _among(ordered: Ints, values: Ints) -> NDArray[np.bool_]:
    """Whether each value is one of the ordered ones."""
    if not len(ordered):
        return np.zeros(values.shape, bool)
    found: NDArray[np.bool_] = (
        ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    )
    return found
