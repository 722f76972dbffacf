"""The law in several factors, and which of its exponents the data can tell.

``fit_law`` fits ``y = E + sum_k (x_k / scale_k) ** -exponent_k``: the additive form of Hoffmann et
al. 2022 (section 3.3) with any factors. An exponent is *identified* only if it passes every rule of
``Identification``; one that does not is reported with the reasons and never as a finding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.additive import AdditiveFit, FitError, FitStatus, label, plain
from scaling.analysis.fit import LOG_HUBER_DELTA, fit_additive
from scaling.analysis.solver import EXPONENT_BOUNDS, Array


@dataclass(frozen=True)
class Identification:
    """The declared rule for an exponent to count as identified by the data."""

    min_range: float = 3.0
    """Largest over smallest value of the factor."""
    min_values: int = 3
    """Distinct values of the factor."""
    max_inflation: float = 10.0
    """Variance inflation 1 / (1 - R^2) of ln x_k given the other factors' logarithms: above it the
    design moves the factor together with others (10 is the customary limit)."""
    max_relative_width: float = 1.0
    """Width of the 95 % interval over the estimate."""
    min_rows_per_parameter: float = 2.0
    """Fitted rows over parameters of the law."""
    min_exponent: float = 0.01
    """Lower end of the 95 % interval; an interval that reaches this low does not exclude zero."""


IDENTIFICATION = Identification()


@dataclass(frozen=True, eq=False)
class LawFit(AdditiveFit):
    """``y = E + sum_k (x_k / scale_k) ** -exponent_k``, with ``identified`` per exponent.

    Parameters are named ``irreducible``, ``scale.<factor>``, ``exponent.<factor>``.
    """

    @property
    def coefficients(self) -> "pd.Series[float]":
        """A_k of the other way to write a term, ``A_k * x_k ** -exponent_k``."""
        f, k = int(self.irreducible), len(self.factors)
        log_a = self.theta[f : f + k] + self.theta[f + k :] * self.problem.centre
        return pd.Series(np.exp(log_a), index=list(self.factors))

    def predict(self, df: pd.DataFrame, level: float | None = 0.95) -> pd.DataFrame:
        """The law at the rows of ``df``: factors, ``y``, ``lower``, ``upper``, ``extrapolated``.

        ``extrapolated`` says that some factor lies outside its fitted range.
        """
        points = df[list(self.factors)].astype(np.float64)
        table = self.predict_log(np.log(points.to_numpy()), level).set_index(df.index)
        outside = pd.Series(False, index=df.index)
        for name, (low, high) in self.ranges().items():
            outside |= (points[name] < low * (1 - 1e-12)) | (points[name] > high * (1 + 1e-12))
        return pd.concat([points, table], axis=1).assign(extrapolated=outside)

    def identified(self, rule: Identification = IDENTIFICATION) -> pd.DataFrame:
        """Per factor: ``exponent lower upper range values inflation identified reasons``."""
        fitted = self.problem.log_x[self.weights > 0]
        intervals = None if self.draws.empty else self.ci()
        inflation = variance_inflation(fitted)
        rows = []
        for k, name in enumerate(self.factors):
            parameter = label("exponent", name, self.factors)
            estimate = float(self.params[parameter])
            low = high = float("nan")
            if intervals is not None:
                low = float(intervals["lower"][parameter])
                high = float(intervals["upper"][parameter])
            span = float(np.exp(np.ptp(fitted[:, k])))
            values = len(np.unique(fitted[:, k]))
            failed = {
                f"status {self.status}": self.status is not FitStatus.CONVERGED,
                f"{self.n} rows for {self.problem.n_free} parameters": (
                    self.n < rule.min_rows_per_parameter * self.problem.n_free
                ),
                f"values span only a factor of {span:.3g}": span < rule.min_range,
                f"only {values} distinct values": values < rule.min_values,
                f"moves with the other factors (variance inflation {inflation[k]:.3g})": (
                    inflation[k] > rule.max_inflation
                ),
                "no bootstrap": intervals is None,
                f"the 95 % interval [{low:.3g}, {high:.3g}] does not exclude zero": (
                    low < rule.min_exponent
                ),
                f"the 95 % interval [{low:.3g}, {high:.3g}] is too wide": (
                    high - low > rule.max_relative_width * estimate
                ),
                "at a bound": not EXPONENT_BOUNDS[0] < estimate < EXPONENT_BOUNDS[1],
            }
            reasons = tuple(reason for reason, true in failed.items() if true)
            rows.append(
                {
                    "factor": name,
                    "exponent": estimate,
                    "lower": low,
                    "upper": high,
                    "range": span,
                    "values": values,
                    "inflation": float(inflation[k]),
                    "identified": not reasons,
                    "reasons": "; ".join(reasons),
                }
            )
        return pd.DataFrame(rows).set_index("factor")

    def condition_number(self) -> float:
        """Condition number of the Jacobian of ln y, columns scaled to length one.

        Large values (over some hundreds) say that parameters can replace each other.
        """
        _, _, _, gauss, _ = self.problem.derivatives(self.theta[None], self.weights[None])
        scale = np.sqrt(np.diag(gauss[0]))
        if np.any(scale == 0):
            return float("inf")
        eigenvalues = np.linalg.eigvalsh(gauss[0] / np.outer(scale, scale))
        smallest = float(eigenvalues[0])
        return float(np.sqrt(eigenvalues[-1] / smallest)) if smallest > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """As ``AdditiveFit.to_dict``, with the verdict on every exponent."""
        verdicts = {
            str(name): {
                str(key): value if isinstance(value, str | bool | int) else plain(value)
                for key, value in row.items()
            }
            for name, row in self.identified().to_dict(orient="index").items()
        }
        return {
            **super().to_dict(),
            "identified": verdicts,
            "condition_number": plain(self.condition_number()),
        }


def fit_law(
    df: pd.DataFrame,
    *,
    factors: Sequence[str],
    y: str,
    irreducible: bool = True,
    delta: float = LOG_HUBER_DELTA,
    n_boot: int = 1000,
    seed: int = 0,
    cluster: str | None = "run_key",
) -> LawFit:
    """Fit ``y = E + sum_k (x_k / scale_k) ** -exponent_k``.

    Args:
        df: one row per point.
        factors: columns x_k, each positive.
        irreducible: with the floor E.
        delta, n_boot, seed, cluster: as in ``fit_power_law``.

    Raises:
        FitError: a column is missing, a factor does not vary, or too few usable points are left.
    """
    names = tuple(factors)
    if not names or len(set(names)) != len(names):
        raise FitError(f"factors must be one or more different columns, not {list(factors)}")
    return fit_additive(
        LawFit, df, names, y, irreducible=irreducible, frontier=False, delta=delta,
        n_boot=n_boot, seed=seed, cluster=cluster,
    )  # fmt: skip


def variance_inflation(log_x: Array) -> Array:
    """``[K]`` 1 / (1 - R^2) of every column regressed on the others and a constant."""
    centred = log_x - log_x.mean(axis=0)
    scale = np.sqrt((centred**2).mean(axis=0))
    if np.any(scale == 0):
        return np.full(log_x.shape[1], np.inf)
    correlation = (centred / scale).T @ (centred / scale) / len(log_x)
    if np.linalg.cond(correlation) > 1e12:
        return _inflation_of_singular(centred / scale)
    return np.asarray(np.diag(np.linalg.inv(correlation)))


def _inflation_of_singular(standard: Array) -> Array:
    """Column by column where the correlation matrix has no inverse: aliased columns get inf."""
    out = np.empty(standard.shape[1])
    for k in range(standard.shape[1]):
        others = np.delete(standard, k, axis=1)
        fitted = others @ np.linalg.lstsq(others, standard[:, k], rcond=1e-8)[0]
        unexplained = float(((standard[:, k] - fitted) ** 2).mean())
        out[k] = np.inf if unexplained < 1e-10 else 1 / unexplained
    return out
