"""How an optimal factor grows with compute: x*(C) = e^intercept C^exponent, whoever found x*."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling import ClueError
from scaling.analysis.fitting.intervals import resampled_weights
from scaling.analysis.fitting.intervals import tail as tail_of
from scaling.analysis.fitting.record import plain_rows
from scaling.analysis.fitting.rows import unit_column

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

LEAST_POINTS = 3
"""Optima at fewer levels of compute give no exponent: two points are always on a line."""
DRAWS_NEEDED = 0.5
"""An interval needs at least this share of the bootstrap draws to give an exponent."""


class AllocationError(ClueError):
    """A table, a law or a limit does not allow the question; the message names value and need."""


@dataclass(frozen=True, eq=False)
class Trend:
    """ln x* = intercept + exponent ln C, by one of the approaches of Hoffmann et al. 2022.

    Attributes:
        approach: 1 (envelope), 2 (IsoFLOP) or 3 (parametric).
        factor, compute: names of the columns x and C.
        points: optima found, one row each: C, x and the loss, under the columns' names; ``reason``
            says why one was not used, and is null where it was.
        exponent, intercept: None where ``refused``.
        exponents, intercepts: ``[draws]``, those bootstrap draws that gave one.
        draws_failed: those that did not.
        tail: share of the draws beyond either end of the 95 % interval (``intervals.tail``).
        refused: why there is no exponent; None where there is one.
        warnings: what biases it or makes it doubtful.
    """

    approach: int
    factor: str
    compute: str
    points: pd.DataFrame
    exponent: float | None
    intercept: float | None
    exponents: Array
    intercepts: Array
    draws_failed: int
    tail: float
    refused: str | None
    warnings: tuple[str, ...]

    def ci(self) -> tuple[float, float] | None:
        """95 % interval of the exponent; None without enough draws (``DRAWS_NEEDED``)."""
        if self.exponent is None or not self._enough_draws():
            return None
        low, high = np.quantile(self.exponents, [self.tail, 1 - self.tail])
        return float(low), float(high)

    def predict(self, compute: Sequence[float] | Array) -> pd.DataFrame:
        """x* at given compute: columns ``compute``'s and the factor's name, ``lower``, ``upper`` of
        its 95 % interval.

        Raises:
            AllocationError: there is no exponent.
        """
        if self.exponent is None or self.intercept is None:
            raise AllocationError(f"approach {self.approach}, {self.factor}: {self.refused}")
        c = np.atleast_1d(np.asarray(compute, dtype=np.float64))
        x = np.exp(self.intercept + self.exponent * np.log(c))
        table = pd.DataFrame({self.compute: c, self.factor: x})
        if self._enough_draws():
            spread = np.exp(self.intercepts[:, None] + self.exponents[:, None] * np.log(c))
            low, high = np.quantile(spread, [self.tail, 1 - self.tail], axis=0)
            table = table.assign(lower=low, upper=high)
        return table

    def to_dict(self) -> dict[str, Any]:
        """As one JSON value."""
        interval = self.ci()
        return {
            "approach": self.approach,
            "factor": self.factor,
            "compute": self.compute,
            "exponent": self.exponent,
            "intercept": self.intercept,
            "ci95": list(interval) if interval else None,
            "draws": len(self.exponents),
            "draws_failed": self.draws_failed,
            "refused": self.refused,
            "warnings": list(self.warnings),
            "points": plain_rows(self.points),
        }

    def _enough_draws(self) -> bool:
        n = len(self.exponents)
        return n > 1 and n >= DRAWS_NEEDED * (n + self.draws_failed)


def fit_lines(log_c: Array, log_x: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted least-squares lines of log_x over log_c, a line a row.

    Args:
        log_c, log_x: ``[S, m]``; values without weight may be anything.
        weights: ``[S, m]``, 0 for points that are not there.

    Returns:
        Slope and intercept, each ``[S]``; NaN where fewer than ``LEAST_POINTS`` distinct log_c
        have weight.
    """
    there = weights > 0
    levels = np.sort(np.where(there, log_c, np.inf), axis=1)
    with np.errstate(invalid="ignore"):  # of two levels that are not there
        steps = (np.diff(levels, axis=1) > 1e-12) & np.isfinite(levels[:, 1:])
    enough = there.any(axis=1) & (1 + steps.sum(axis=1) >= LEAST_POINTS)
    total = np.where(enough, weights.sum(axis=1), 1.0)
    c, x = np.where(there, log_c, 0.0), np.where(there, log_x, 0.0)
    mean_c, mean_x = (weights * c).sum(axis=1) / total, (weights * x).sum(axis=1) / total
    d = np.where(there, c - mean_c[:, None], 0.0)
    spread = np.where(enough, (weights * d**2).sum(axis=1), 1.0)
    slope = (weights * d * x).sum(axis=1) / spread
    nan = np.where(enough, 0.0, np.nan)
    return slope + nan, mean_x - slope * mean_c + nan


def trend_of(
    approach: int,
    factor: str,
    compute: str,
    points: pd.DataFrame,
    log_c: Array,
    log_x: Array,
    weights: Array,
    *,
    tail: float,
    refused: str | None = None,
    warnings: tuple[str, ...] = (),
) -> Trend:
    """The trend of optima and of their bootstrap draws.

    Args:
        log_c, log_x, weights: ``[1 + draws, m]`` as ``fit_lines`` takes them; row 0 is the point
            estimate.
        tail: of the trend.
        refused: a reason that stands before any fit.
    """
    slope, intercept = fit_lines(log_c, log_x, weights)
    if refused is None and np.isnan(slope[0]):
        found = len(np.unique(np.round(log_c[0][weights[0] > 0], 9)))
        refused = (
            f"optima at {found} level{'' if found == 1 else 's'} of {compute}, needs at least "
            f"{LEAST_POINTS}"
        )
    good = np.isfinite(slope[1:]) if refused is None else np.zeros(len(slope) - 1, dtype=bool)
    return Trend(
        approach=approach,
        factor=factor,
        compute=compute,
        points=points,
        exponent=None if refused else float(slope[0]),
        intercept=None if refused else float(intercept[0]),
        exponents=slope[1:][good],
        intercepts=intercept[1:][good],
        draws_failed=int((~good).sum()) if refused is None else 0,
        tail=tail,
        refused=refused,
        warnings=warnings,
    )


def positive_rows(df: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows in which all columns are positive and finite.

    Raises:
        AllocationError: a column is missing, holds no numbers, or no such row is left.
    """
    missing = [c for c in columns if c not in df]
    if missing:
        raise AllocationError(
            f"the table has no column {', '.join(map(repr, missing))}; its columns: "
            f"{', '.join(map(str, df.columns))}"
        )
    wrong = [c for c in columns if not pd.api.types.is_numeric_dtype(df[c])]
    if wrong:
        raise AllocationError(f"column {wrong[0]!r} holds {df[wrong[0]].dtype}, not numbers")
    values = df[list(columns)].to_numpy(dtype=np.float64, na_value=np.nan)
    rows = df[((values > 0) & np.isfinite(values)).all(axis=1)]
    if rows.empty:
        raise AllocationError(f"no row has positive {', '.join(columns)}; the table has {len(df)}")
    return pd.DataFrame(rows)


def column(df: pd.DataFrame, name: str) -> Array:
    """A column as floats. [rows]"""
    values: Array = df[name].to_numpy(dtype=np.float64)
    return values


def cluster_weights(
    df: pd.DataFrame, cluster: str | None, n_boot: int, seed: int
) -> tuple[Array, float]:
    """How often each row counts, ``[1 + n_boot, rows]``: once, then in bootstrap draws; and the
    share of the draws beyond either end of a 95 % interval of a line.

    Args:
        cluster: column of the units that are resampled; ``auto``: ``run_key`` where the table has
            it, else every row; None: every row.

    Raises:
        AllocationError: the table has no such column, or it is null somewhere.
    """
    name = unit_column(df, cluster)
    if name is not None and name not in df:
        raise AllocationError(
            f"the table has no column {name!r} to resample; pass cluster=None if every row is a "
            "unit of its own"
        )
    if name is not None and df[name].isna().any():
        raise AllocationError(
            f"column {name!r}, to resample, is null in {int(df[name].isna().sum())} rows; pass "
            "cluster=None if every row is a unit of its own"
        )
    codes = np.arange(len(df)) if name is None else pd.factorize(df[name])[0]
    draws = resampled_weights(codes, n_boot, np.random.default_rng(seed))
    return np.vstack([np.ones(len(df)), draws]), tail_of(0.95, int(codes.max()) + 1, n_free=2)
