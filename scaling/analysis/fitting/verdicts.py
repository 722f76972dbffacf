"""What a fit may claim: is the floor identified, is an exponent, do parameters replace each other.

The rules are the constants and the docstrings of this module; nothing else decides it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import f as f_distribution

from scaling.analysis.fitting import profiles
from scaling.analysis.fitting.intervals import bread
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.parameters import FLOOR
from scaling.analysis.fitting.status import FitStatus

if TYPE_CHECKING:
    from scaling.analysis.fitting.law import LawFit

FLOOR_MIN_SHARE = 0.01
"""A floor counts as identified only if its 95 % interval lies above this share of the lowest y"""
FLOOR_MAX_WIDTH = 1.0
"""and is not wider than this, relative to the floor itself."""
MIN_DRAWS = 20
"""Bootstrap draws below which there is no 95 % interval: their range would be narrow by being few.
"""


@dataclass(frozen=True)
class Verdict:
    """Whether the data identifies a parameter, and the reasons where it does not."""

    identified: bool
    reasons: tuple[str, ...]


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


def floor(fit: "LawFit") -> Verdict:
    """Whether the data identifies the floor E.

    It must lie, with its interval, above ``FLOOR_MIN_SHARE`` of the lowest y (in magnitude: on the
    raw scale both may be negative); the interval must not be wider than ``FLOOR_MAX_WIDTH`` times
    E; and the law with E = 0 must fit significantly worse (the profile statistic at 0 above its
    95 % quantile).
    """
    if not fit.irreducible:
        return Verdict(False, ("the law has no floor",))
    if FLOOR in fit.constraints.fixed:
        return Verdict(False, ("E was fixed, not fitted",))
    reasons = []
    value = float(fit.params[FLOOR])
    used = fit.weights > 0
    y = fit.problem.target[used]
    lowest = float((np.exp(y) if fit.problem.log_scale else y).min())
    nothing = FLOOR_MIN_SHARE * abs(lowest)
    if abs(value) < nothing:
        reasons.append(f"E = {value:.3g} is next to nothing beside the lowest y, {lowest:.4g}")
    elif FLOOR in fit.profiled and fit.surface.lower[fit.surface.names.index(FLOOR)] == 0:
        statistic = float(profiles.at_bound(fit, FLOOR, 0.0))
        limit = float(f_distribution.ppf(0.95, 1, fit.freedom))
        if statistic < limit:
            reasons.append(
                f"a law without floor fits nearly as well (statistic {statistic:.3g}, needed "
                f"{limit:.3g})"
            )
    if too_few := _no_interval(fit):
        reasons.append(too_few)
    else:
        interval = fit.ci()
        low, high = (float(interval[end][FLOOR]) for end in ("lower", "upper"))
        if low < nothing and high > -nothing:
            end = f"down to {low:.3g}" if value > 0 else f"up to {high:.3g}"
            reasons.append(f"the 95 % interval of E reaches {end}")
        if high - low > FLOOR_MAX_WIDTH * abs(value):
            reasons.append(f"the 95 % interval of E, {low:.3g} to {high:.3g}, is wider than E")
    if fit.status is not FitStatus.CONVERGED:
        reasons.append(f"status {fit.status}")
    return Verdict(not reasons, tuple(reasons))


def _no_interval(fit: "LawFit") -> str:
    """Why the draws give no 95 % interval; empty where they do."""
    if fit.draws.empty:
        return "no bootstrap"
    if fit.n_clusters <= fit.surface.n_free:  # no degree of freedom is left to expand it by
        return (
            f"independent units: {fit.n_clusters}, for {fit.surface.n_free} parameters; "
            "an interval needs more"
        )
    if len(fit.draws) < MIN_DRAWS:
        return f"{len(fit.draws)} bootstrap draws; an interval needs {MIN_DRAWS}"
    return ""


def exponents(fit: "LawFit", rule: Identification) -> pd.DataFrame:
    """Per parameter of the kind exponent: ``parameter factor exponent lower upper range values
    inflation identified reasons``, by factor."""
    used = fit.weights > 0
    positive = {c: x[used] for c, x in fit.columns.items() if (x[used] > 0).all()}
    names = list(positive)
    logs = np.log(np.stack([positive[c] for c in names], axis=1)) if names else np.empty((0, 0))
    inflation = dict(zip(names, variance_inflation(logs), strict=True)) if names else {}
    intervals = None if fit.draws.empty else fit.ci()
    too_few = _no_interval(fit)
    rows = []
    for slot, place in zip(fit.surface.slots, fit.surface.place, strict=True):
        if slot.name.partition(".")[0] != "exponent":
            continue
        factor = fit.form.terms[slot.term].factors[slot.factor].columns[0]
        estimate = float(fit.params[slot.name])
        low = high = float("nan")
        if intervals is not None:
            low = float(intervals["lower"][slot.name])
            high = float(intervals["upper"][slot.name])
        x = fit.columns[factor][used]
        span = float(x.max() / x.min()) if x.min() > 0 else float("inf")
        values = len(np.unique(x))
        moved = float(inflation.get(factor, 1.0))
        bounds = (fit.surface.lower[place], fit.surface.upper[place]) if place >= 0 else (0, 0)
        failed = {
            "it was fixed, not fitted": place < 0,
            f"status {fit.status}": fit.status is not FitStatus.CONVERGED,
            f"{fit.n} rows for {fit.surface.n_free} parameters": (
                fit.n < rule.min_rows_per_parameter * fit.surface.n_free
            ),
            f"values span only a factor of {span:.3g}": span < rule.min_range,
            f"only {values} distinct values": values < rule.min_values,
            f"moves with the other factors (variance inflation {moved:.3g})": (
                moved > rule.max_inflation
            ),
            too_few: bool(too_few),
            f"the 95 % interval [{low:.3g}, {high:.3g}] does not exclude zero": (
                low < rule.min_exponent and not high < -rule.min_exponent
            ),
            f"the 95 % interval [{low:.3g}, {high:.3g}] is too wide": (
                high - low > rule.max_relative_width * abs(estimate)
            ),
            "at a bound": place >= 0 and not bounds[0] < fit.theta[place] < bounds[1],
        }
        reasons = tuple(reason for reason, true in failed.items() if true)
        rows.append(
            {
                "factor": factor,
                "parameter": slot.name,
                "exponent": estimate,
                "lower": low,
                "upper": high,
                "range": span,
                "values": values,
                "inflation": moved,
                "identified": not reasons,
                "reasons": "; ".join(reasons),
            }
        )
    return pd.DataFrame(rows, columns=[
        "factor", "parameter", "exponent", "lower", "upper", "range", "values", "inflation",
        "identified", "reasons",
    ]).set_index("factor")  # fmt: skip


def condition_number(fit: "LawFit") -> float:
    """Condition number of the Jacobian at the optimum, columns scaled to length one."""
    gauss = bread(fit.problem, fit.theta, fit.weights)
    scale = np.sqrt(np.diag(gauss))
    if np.any(scale == 0):
        return float("inf")
    eigenvalues = np.linalg.eigvalsh(gauss / np.outer(scale, scale))
    smallest = float(eigenvalues[0])
    return float(np.sqrt(eigenvalues[-1] / smallest)) if smallest > 0 else float("inf")


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
