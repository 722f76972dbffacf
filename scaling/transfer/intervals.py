"""Means over targets with intervals by bootstrap over users: a user's targets go together."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.transfer.metrics import Floats, Ints, MetricError

Values = NDArray[np.floating[Any]] | tuple[NDArray[np.floating[Any]], Ints]
"""Of a metric: [users], [users, targets], or sums over each user's targets and how many these are,
both [users]."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval by bootstrap over users."""

    mean: float
    low: float
    high: float
    se: float
    """Standard deviation of the resampled means."""


def bootstrap(values: Values, n_boot: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean over all targets, with users resampled: a user's targets go together.

    The percentile interval (Efron and Tibshirani 1993, Chapter 13). Memory is a few numbers a
    user, whatever ``n_boot``; 100,000 users and 1,000 draws take one or two seconds.

    Args:
        level: of the interval, between percentiles of the resampled means.

    Raises:
        MetricError: there are no users, or one without targets, or a value is not finite, or
            ``level`` is not between 0 and 1, or there are fewer than two draws.
    """
    sums, counts = _by_user(values)
    if not 0 < level < 1 or n_boot < 2:
        raise MetricError(f"level = {level}, n_boot = {n_boot}; valid: 0 < level < 1, n_boot >= 2")
    means = resampled(sums[None], counts, n_boot, seed)[0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = sums.sum() / counts.sum()
    return Interval(float(mean), float(low), float(high), float(means.std(ddof=1)))


def resampled(sums: Floats, counts: Ints, n_boot: int = 1000, seed: int = 0) -> Floats:
    """Means over all targets of several metrics, with users resampled. [metrics, n_boot]

    The users of a draw depend on their number and on the seed alone: draws of two systems on the
    same users belong together, and their differences are those of ``paired``.

    Args:
        sums: over each user's targets. [metrics, users]
        counts: targets of each user. [users]
    """
    draws = np.random.default_rng(seed)
    n, means = len(counts), np.empty((len(sums), n_boot))
    for draw in range(n_boot):
        chosen = draws.integers(0, n, n)
        means[:, draw] = [metric.take(chosen).sum() for metric in sums]
        means[:, draw] /= counts.take(chosen).sum()
    return means


def paired(
    a: Values, b: Values, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ``a`` less that of ``b``, two systems on the same targets of the same users.

    What makes a user easy for both cancels, so the interval is narrower than those of the two.

    Raises:
        MetricError: as ``bootstrap``, or users or their numbers of targets differ.
    """
    (sums, counts), (others, expected) = _by_user(a), _by_user(b)
    if not np.array_equal(counts, expected):
        raise MetricError(
            f"{len(counts):,} users with {int(counts.sum()):,} targets beside {len(expected):,} "
            f"with {int(expected.sum()):,}; pair the same targets of the same users"
        )
    return bootstrap((sums - others, counts), n_boot, seed, level)


def _by_user(values: Values) -> tuple[Floats, Ints]:
    """Sum over each user's targets, and their number. [users]"""
    if isinstance(values, tuple):
        sums, counts = np.asarray(values[0], np.float64), np.asarray(values[1], np.int64)
    else:
        table = np.asarray(values, np.float64)
        table = table[:, None] if table.ndim == 1 else table
        sums, counts = table.sum(axis=1), np.full(len(table), table.shape[1])
    if not len(sums) or sums.shape != counts.shape or counts.min() < 1:
        raise MetricError(
            f"values of shape {sums.shape} with {counts.shape} numbers of targets, the least "
            f"{counts.min(initial=0)}; valid: one user or more, each with a target"
        )
    if not np.isfinite(sums).all():
        raise MetricError(f"values: those of user {np.argmin(np.isfinite(sums))} are not finite")
    return sums, counts
