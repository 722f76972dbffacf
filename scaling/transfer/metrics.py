"""Ranking metrics, exact under ties.

A positive that ties with others has no rank but a range of ranks: ``first`` if every tie is broken
in its favour, ``last`` if none is. Every metric here is the expected value under random
tie-breaking; the means of the two ends differ by the *tie gap*, reported beside every result
because a scorer with many ties (popularity, a collapsed encoder) looks as good or as bad as its tie
rule.

Names of metrics are ``hr_K``, ``recall_K``, ``ndcg_K``, ``mrr`` and ``mrr_K`` for any K from 1. Of
one positive among its candidates (Shin et al. 2023, Section 4: 100 negatives) they are means of a
gain at its rank: hit ratio and recall are the same, the ideal DCG is 1, and MRR has no cut-off
unless it is named with one. Lists with several positives are ``per_list``'s.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling import ClueError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Scores = NDArray[np.float32] | Floats | Ints

METRICS = ("hr_1", "hr_10", "ndcg_10", "mrr")
"""Those of every table."""
LOSSES = ("loss", "loss_softmax")
"""Those beside them, of systems whose scores are logits."""
AT_ONCE = 1 << 20
"""Scores compared at once in a full ranking: about a core's cache."""

NAME = re.compile(r"((?:hr|recall|ndcg)(?=_)|mrr)(?:_([1-9][0-9]*))?")
"""Kind and cut-off; only MRR goes without one."""


class MetricError(ClueError):
    """There is no such metric, or none of such values; the message says what would do."""


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


# --- ranks ----------------------------------------------------------------------------------------


def rank(scores: Scores) -> Ranks:
    """Rank the first of the candidates on the last axis, the positive, among the others.

    Args:
        scores: logits or counts, the positive's in ``scores[..., 0]``. [..., 1 + negatives]

    Raises:
        MetricError: a score is not finite (a NaN would rank first, since nothing exceeds it), the
            scores are in half precision, whose rounding makes ties of them, or there is no
            candidate.
    """
    _check(scores)
    positive, others = scores[..., :1], scores[..., 1:]
    first = 1 + np.count_nonzero(others > positive, axis=-1)
    last = 1 + np.count_nonzero(others >= positive, axis=-1)
    return Ranks(np.asarray(first, np.int64), np.asarray(last, np.int64))


def rank_all(
    scores: Scores, targets: Ints, exclude: Bools | tuple[Ints, Ints] | None = None
) -> Ranks:
    """Rank each target among all other items.

    A user's other targets are candidates as any other. Beside ``scores`` it holds a few megabytes,
    so memory is the caller's chunk of users.

    Args:
        scores: of all items. [users, items]
        targets: items. A user with fewer repeats one, which ``present`` then hides from
            ``per_list``. [users, targets]
        exclude: items left out of a user's ranking, such as its history, as a mask [users, items]
            or as (offsets [users + 1], items), in which an item may repeat. Targets of the user are
            never left out, even if they are among them.

    Returns:
        Ranks of the targets. [users, targets]

    Raises:
        MetricError: as ``rank``, or a target or an excluded item is no item, or shapes differ.
    """
    _check(scores)
    users, items = scores.shape
    if len(targets) != users:
        raise MetricError(f"targets of {len(targets)} users, scores of {users}")
    _check_items("targets", targets, items)
    if isinstance(exclude, tuple):
        if len(exclude[0]) != users + 1 or exclude[0][-1] != len(exclude[1]):
            raise MetricError(
                f"exclude: {len(exclude[0])} offsets up to {exclude[0][-1]}, but {users} users "
                f"and {len(exclude[1])} items"
            )
        _check_items("exclude", exclude[1], items)
    elif exclude is not None and exclude.shape != scores.shape:
        raise MetricError(f"exclude is {exclude.shape}, scores are {scores.shape}")
    first, last = np.empty(targets.shape, np.int64), np.empty(targets.shape, np.int64)
    size = max(1, AT_ONCE // items)
    for start in range(0, users, size):
        block = slice(start, min(start + size, users))
        found, mine = scores[block], targets[block]
        kept = None if exclude is None else _kept(exclude, block, mine, items)
        for t, own in enumerate(np.take_along_axis(found, mine, axis=1).T):
            above, level = found > own[:, None], found >= own[:, None]
            if kept is not None:
                above &= kept
                level &= kept
            first[block, t] = 1 + np.count_nonzero(above, axis=1)
            last[block, t] = np.count_nonzero(level, axis=1)  # a target is level with itself
    return Ranks(first, last)


def _kept(exclude: Bools | tuple[Ints, Ints], block: slice, targets: Ints, items: int) -> Bools:
    """Items that stay in the rankings of a block of users. [block, items]"""
    if isinstance(exclude, tuple):
        offsets = exclude[0][block.start : block.stop + 1]
        kept = np.ones((len(targets), items), bool)
        rows = np.repeat(np.arange(len(targets)), np.diff(offsets))
        kept[rows, exclude[1][offsets[0] : offsets[-1]]] = False
    else:
        kept = ~exclude[block]
    np.put_along_axis(kept, targets, True, axis=1)
    return kept


def _check(scores: Scores) -> None:
    if scores.dtype not in (np.float32, np.float64, np.int64):
        raise MetricError(f"scores are {scores.dtype}; rank float32, float64 or int64 scores")
    if not scores.shape[-1]:
        raise MetricError(f"scores are {scores.shape}: there are no candidates")
    if not np.isfinite(scores).all():
        wrong = np.count_nonzero(~np.isfinite(scores))
        raise MetricError(f"scores: {wrong:,} of {scores.size:,} are NaN or infinite")


def _check_items(name: str, numbers: Ints, items: int) -> None:
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < items:
        raise MetricError(
            f"{name} are from {numbers.min()} to {numbers.max()}; items are 0 to {items - 1}"
        )


# --- metrics --------------------------------------------------------------------------------------


def gains(name: str, ranks: Ints) -> Floats:
    """What a positive at these ranks (from 1) is worth: 1 at rank 1, never more further down.

    ``ndcg_K``: 1 / log2(rank + 1), Jarvelin and Kekalainen 2002 with the discount in use since
    Burges et al. 2005.

    Raises:
        MetricError: no metric has this name.
    """
    kind, k = parsed(name)
    worth = {"ndcg": 1 / np.log2(1.0 + ranks), "mrr": 1.0 / ranks}.get(kind, np.ones(ranks.shape))
    return worth if k is None else np.where(ranks <= k, worth, 0.0)


def parsed(name: str) -> tuple[str, int | None]:
    """Kind and cut-off of a metric."""
    if not (match := NAME.fullmatch(name)):
        raise MetricError(
            f"no metric {name!r}; valid: hr_K, recall_K, ndcg_K, mrr and mrr_K with K = 1, 2, ..., "
            f"such as {', '.join(METRICS)}"
        )
    return match[1], int(match[2]) if match[2] else None


def per_target(name: str, ranks: Ranks) -> Floats:
    """Expected value of one metric for every target, in the shape of ``ranks``.

    Raises:
        MetricError: no metric has this name.
    """
    worth = gains(name, np.arange(1, ranks.last.max(initial=1) + 1))
    sums = np.concatenate([[0.0], np.cumsum(worth)])
    width = ranks.last - ranks.first + 1
    tied = (sums[ranks.last] - sums[ranks.first - 1]) / width
    return np.where(width == 1, worth[ranks.first - 1], tied)


def per_list(name: str, ranks: Ranks, present: Bools | None = None) -> Floats:
    """Expected value of one metric for every list with several positives.

    As LightGCN's evaluation (He et al. 2020, Section 4.1) has them, with ties by expectation:
    ``recall_K`` is the share of the positives among the first K, ``ndcg_K`` their DCG over that of
    min(positives, K) at the top, ``hr_K`` whether any is among the first K, ``mrr`` and ``mrr_K``
    one over the rank of the best. Positives of one tie group are never at the same place: the best
    of them follows the negative hypergeometric distribution.

    Args:
        ranks: of a list's positives among all its items, each other included, as ``rank_all`` has
            them. [users, positives]
        present: which of them exist, where lists have different numbers. [users, positives]

    Returns:
        One value for each list. [users]

    Raises:
        MetricError: no metric has this name, a list has no positive, or more of them share a range
            of ranks than it has places (they were ranked without each other).
    """
    kind = parsed(name)[0]
    present = np.ones(ranks.first.shape, bool) if present is None else present
    positives = np.count_nonzero(present, axis=1)
    if not positives.all():
        raise MetricError(f"list {np.argmin(positives)} has no positive")
    first = np.where(present, ranks.first, np.iinfo(np.int64).max)
    best, lists = np.argmin(first, axis=1), np.arange(len(first))
    top = Ranks(ranks.first[lists, best], ranks.last[lists, best])
    tied = np.count_nonzero(first == top.first[:, None], axis=1)
    if (crowded := tied > top.last - top.first + 1).any():
        at = np.argmax(crowded)
        raise MetricError(
            f"list {at}: {tied[at]} positives share ranks {top.first[at]} to {top.last[at]}; rank "
            "each among all items, the other positives included"
        )
    if kind in ("hr", "mrr"):
        return _best_of(gains(name, np.arange(1, top.last.max(initial=1) + 1)), top, tied)
    filled = Ranks(*(np.where(present, r, 1) for r in (ranks.first, ranks.last)))
    total: Floats = np.where(present, per_target(name, filled), 0.0).sum(axis=1)
    ideal = np.cumsum(gains(name, np.arange(1, positives.max(initial=1) + 1)))
    most: Floats = ideal[positives - 1] if kind == "ndcg" else positives.astype(np.float64)
    return total / most


def _best_of(worth: Floats, top: Ranks, tied: Ints) -> Floats:
    """Expected worth of the best of ``tied`` positives that share the places of ``top``. [users]"""
    # A collapsed encoder ties whole catalogues, but for every user alike: each case once.
    cases, of_list = np.unique([top.first, top.last, tied], axis=1, return_inverse=True)
    first, last, tied = cases
    value, missed = np.zeros(len(tied)), np.ones(len(tied))
    left, step = np.arange(len(tied)), 0
    while len(left):
        # The first positive is at this place, if at none before; 1 where only positives are left.
        hit = tied[left] / (last[left] - first[left] + 1 - step)
        value[left] += missed[left] * hit * worth[first[left] - 1 + step]
        missed[left] *= 1 - hit
        step += 1
        left = left[missed[left] > 0]
        left = left[worth[first[left] - 1 + step] > 0]  # others are beyond the cut-off
    return value[of_list.ravel()]


def summarise(ranks: Ranks, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Mean over targets of every metric, and ``tie_gap``.

    ``tie_gap`` is the largest difference, over the metrics, between the means with all ties broken
    for and against the positive: 0 without ties.

    Raises:
        MetricError: no metric has such a name.
    """
    row = {name: float(per_target(name, ranks).mean()) for name in metrics}
    best, worst = ranks.optimistic, ranks.pessimistic
    row["tie_gap"] = max(
        float((per_target(name, best) - per_target(name, worst)).mean()) for name in metrics
    )
    return row
