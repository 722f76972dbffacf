"""A check of printed tables: whether any ranking has the means that a row reports."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy.optimize import linprog

from scaling.transfer.metrics import NAME, Floats, Ints, MetricError, gains, parsed


def lint_table(
    rows: Iterable[Mapping[str, Any]], *, candidates: int = 101, tolerance: float = 5e-5
) -> dict[int, list[str]]:
    """Rows of a table that no ranking has: the messages of ``lint_metrics`` by position of the row.

    Args:
        rows: columns named as metrics are checked together, unless they are None or NaN; a column
            ``candidates`` holds for its row. Other columns may be anything.
        candidates: of rows that do not say it.
        tolerance: half a unit of the last printed digit.

    Raises:
        MetricError: a mean is infinite.
    """
    found = {}
    for at, row in enumerate(rows):
        means = {k: v for k, v in row.items() if NAME.fullmatch(k) and v is not None and v == v}
        among = int(row.get("candidates") or candidates)
        if problems := lint_metrics(means, candidates=among, tolerance=tolerance):
            found[at] = problems
    return found


def lint_metrics(
    row: Mapping[str, float], *, candidates: int = 101, tolerance: float = 5e-5
) -> list[str]:
    """Arithmetic impossibilities in reported means of one positive among ``candidates``.

    Means of rank metrics are linear in the distribution of ranks, so a row is possible if and only
    if a linear programme over that distribution is feasible. This contains
    HR@1 <= NDCG@10 <= HR@10 and every other such inequality. Means over lists with several
    positives are not bound by it.

    Args:
        row: reported means by metric.
        tolerance: half a unit of the last printed digit.

    Returns:
        One message for each metric, with the range the others leave it; empty if possible.

    Raises:
        MetricError: no metric has such a name, or a mean is NaN or infinite.
    """
    for name, value in row.items():
        if not np.isfinite(value):
            raise MetricError(f"{name} is {value}; a mean is finite, or left out of its row")
    # Beyond the last cut-off only MRR tells ranks apart, and its ends there span all between.
    told_apart = max((parsed(name)[1] or 0 for name in row), default=0) + 1
    ranks = np.union1d(np.arange(1, min(told_apart, candidates) + 1), [candidates])
    if _least(np.zeros(len(ranks)), row, ranks, tolerance) is not None:
        return []
    problems = []
    for name, value in row.items():
        others = {k: v for k, v in row.items() if k != name}
        given = ", ".join(f"{k} = {v:g}" for k, v in others.items())
        low = _least(gains(name, ranks), others, ranks, tolerance)
        high = _least(-gains(name, ranks), others, ranks, tolerance)
        if low is None or high is None:
            problems.append(f"{given} are impossible together")
        else:
            problems.append(
                f"{name} = {value:g} is outside [{low:.4f}, {-high:.4f}]"
                + (f" given {given}" if given else "")
            )
    return problems


def _least(
    worth: Floats, means: Mapping[str, float], ranks: Ints, tolerance: float
) -> float | None:
    """Least mean worth over distributions of ranks with these means; None if none has them."""
    rows = np.array([gains(name, ranks) for name in means]).reshape(-1, len(ranks))
    values = np.fromiter(means.values(), np.float64)
    solution = linprog(
        worth,
        A_ub=np.concatenate([rows, -rows]),
        b_ub=np.concatenate([values + tolerance, tolerance - values]),
        A_eq=np.ones((1, len(ranks))),
        b_eq=np.ones(1),
        bounds=(0, 1),
        method="highs",
    )
    if solution.status not in (0, 2):  # neither solved nor impossible
        raise MetricError(f"the check of {dict(means)} did not end: {solution.message}")
    return None if solution.fun is None else float(solution.fun)
