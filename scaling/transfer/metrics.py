"""Ranking metrics of one positive among its candidates, exact under ties.

A positive that ties with others has no rank but a range of ranks: ``first`` if every tie is broken
in its favour, ``last`` if none is. Every metric here is the expected value under random
tie-breaking, the mean of its gain over that range, and is returned per target; the means of the two
ends differ by the *tie gap*, reported beside every result because a scorer with many ties
(popularity, a collapsed encoder) looks as good or as bad as its tie rule.

Metrics: HR@k, NDCG@k and MRR of Shin et al. 2023, Section 4 (one positive, 100 negatives, so the
ideal DCG is 1); MRR has no cut-off.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ranks:
    """Best and worst rank (from 1) of each positive among its candidates; any shape, both alike."""

    first: Ints
    """1 + candidates that score higher."""
    last: Ints
    """1 + candidates that score higher or the same."""

    @property
    def optimistic(self) -> "Ranks":
        """Every tie broken in the positive's favour."""
        return Ranks(self.first, self.first)

    @property
    def pessimistic(self) -> "Ranks":
        """No tie broken in the positive's favour."""
        return Ranks(self.last, self.last)


def rank(scores: NDArray[np.float32] | Floats | Ints) -> Ranks:
    """Rank the first of the candidates on the last axis, the positive, among the others.

    Args:
        scores: logits or counts, the positive's in ``scores[..., 0]``. [..., 1 + negatives]

    Raises:
        ValueError: a score is not finite (a NaN would rank first, since nothing exceeds it), or the
            scores are in half precision, whose rounding makes ties of them.
    """
    if scores.dtype not in (np.float32, np.float64, np.int64):
        raise ValueError(f"scores are {scores.dtype}; rank float32, float64 or int64 scores")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity")
    positive, others = scores[..., :1], scores[..., 1:]
    first = 1 + np.count_nonzero(others > positive, axis=-1)
    last = 1 + np.count_nonzero(others >= positive, axis=-1)
    return Ranks(np.asarray(first, np.int64), np.asarray(last, np.int64))


def rank_all(scores: NDArray[np.float32] | Floats | Ints, targets: Ints) -> Ranks:
    """Rank targets among all items but themselves; a user's other targets count as any other.

    Args:
        scores: of all items. [users, items]
        targets: items. [users, targets]

    Raises:
        ValueError: as ``rank``.
    """
    own = np.take_along_axis(scores, targets, axis=1)
    found = [rank(np.concatenate([own[:, t : t + 1], scores], axis=1)) for t in range(own.shape[1])]
    # The target is among all items, too, where it ties with itself.
    return Ranks(
        np.stack([r.first for r in found], axis=1), np.stack([r.last - 1 for r in found], axis=1)
    )


def _hit_gain(ranks: Floats, k: int) -> Floats:
    return (ranks <= k).astype(np.float64)


def _ndcg_gain(ranks: Floats, k: int) -> Floats:
    return np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)


def _mrr_gain(ranks: Floats) -> Floats:
    return 1 / ranks


GAINS: dict[str, Callable[[Floats], Floats]] = {
    "hr_1": partial(_hit_gain, k=1),
    "hr_10": partial(_hit_gain, k=10),
    "ndcg_10": partial(_ndcg_gain, k=10),
    "mrr": _mrr_gain,
}
"""What a positive at a rank (from 1) is worth, by metric."""
METRICS = tuple(GAINS)
"""Those of every table."""


def per_target(name: str, ranks: Ranks) -> Floats:
    """Expected value of one metric for every target, in the shape of ``ranks``.

    Args:
        name: ``hr_1``, ``hr_10``, ``ndcg_10`` or ``mrr``.
    """
    gains = GAINS[name](np.arange(1.0, ranks.last.max(initial=1) + 1))
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    width = ranks.last - ranks.first + 1
    tied = (sums[ranks.last] - sums[ranks.first - 1]) / width
    return np.where(width == 1, gains[ranks.first - 1], tied)


def summarise(ranks: Ranks) -> dict[str, float]:
    """Mean over targets of every metric, and ``tie_gap``.

    ``tie_gap`` is the largest difference, over the metrics, between the means with all ties broken
    for and against the positive: 0 without ties.
    """
    row = {name: float(per_target(name, ranks).mean()) for name in GAINS}
    best, worst = ranks.optimistic, ranks.pessimistic
    row["tie_gap"] = max(
        float((per_target(name, best) - per_target(name, worst)).mean()) for name in GAINS
    )
    return row


@dataclass(frozen=True)
class Interval:
    """A mean with its interval by bootstrap over users."""

    mean: float
    low: float
    high: float
    se: float
    """Standard deviation of the resampled means."""


def bootstrap(
    values: NDArray[np.floating[Any]], n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean over all values, with users resampled: a user's targets go together.

    Args:
        values: [users] or [users, targets]
        level: of the interval, between percentiles of the resampled means.
    """
    of_user = np.asarray(values, np.float64).reshape(len(values), -1).mean(axis=1)
    draws = np.random.default_rng(seed)
    n = len(of_user)
    means = np.array([of_user[draws.integers(0, n, n)].mean() for _ in range(n_boot)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(of_user.mean()), float(low), float(high), float(means.std(ddof=1)))


def lint_metrics(
    row: Mapping[str, float], *, candidates: int = 101, tolerance: float = 5e-5
) -> list[str]:
    """Arithmetic impossibilities in reported means of one positive among ``candidates``.

    Means of rank metrics are linear in the distribution of ranks, so a row is possible if and only
    if a linear programme over that distribution is feasible. This contains
    HR@1 <= NDCG@10 <= HR@10 and every other such inequality.

    Args:
        row: reported means by metric (a subset of ``hr_1 hr_10 ndcg_10 mrr``).
        tolerance: half a unit of the last printed digit.

    Returns:
        One message per metric that lies outside the range the others leave it; empty if possible.
    """
    reported = {name: float(row[name]) for name in GAINS if name in row}
    problems = []
    for name, value in reported.items():
        others = {k: v for k, v in reported.items() if k != name}
        given = ", ".join(f"{k} = {v:g}" for k, v in others.items())
        bounds = _range_given(name, others, candidates, tolerance)
        if bounds is None:
            problems.append(f"{given} are impossible together")
        elif not bounds[0] - tolerance <= value <= bounds[1] + tolerance:
            problems.append(
                f"{name} = {value:g} is outside [{bounds[0]:.4f}, {bounds[1]:.4f}]"
                + (f" given {given}" if given else "")
            )
    return problems


def _range_given(
    name: str, others: Mapping[str, float], candidates: int, tolerance: float
) -> tuple[float, float] | None:
    """Least and greatest mean of a metric over rank distributions with these other means."""
    ranks = np.arange(1.0, candidates + 1)
    rows = [sign * GAINS[k](ranks) for k in others for sign in (1, -1)]
    limits = [sign * v + tolerance for v in others.values() for sign in (1, -1)]
    ends = []
    for sign in (1, -1):
        solution = linprog(
            sign * GAINS[name](ranks),
            A_ub=np.array(rows) if rows else None,
            b_ub=np.array(limits) if limits else None,
            A_eq=np.ones((1, candidates)),
            b_eq=np.ones(1),
            bounds=(0, 1),
            method="highs",
        )
        if solution.fun is None:
            return None
        ends.append(sign * float(solution.fun))
    return ends[0], ends[1]
