"""Profiles: how much worse the fit becomes with one parameter held at a value.

The statistic is twice the rise of the objective over its own robust scale, the ratio of the
parameter's sandwich variance to its inverse Hessian, so that it holds for Huber losses and clusters
alike; if the held value is true it is about F(1, clusters - P).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import f as f_distribution

from scaling.analysis.fitting.intervals import bread
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.solver import minimise
from scaling.analysis.fitting.status import FitError

if TYPE_CHECKING:
    from scaling.analysis.fitting.law import LawFit


def profile(fit: "LawFit", name: str, points: int) -> pd.DataFrame:
    """Lowest objective with one parameter held, four standard errors either way.

    Returns:
        Columns ``name`` (public units), ``objective``, ``excess`` (relative), ``statistic``.

    Raises:
        FitError: the parameter is not fitted itself.
    """
    i = _index(fit, name)
    lower, upper = float(fit.surface.lower[i]), float(fit.surface.upper[i])
    reach = 4 * _spread(fit, i)
    values = np.linspace(max(lower, fit.theta[i] - reach), min(upper, fit.theta[i] + reach), points)
    table = _statistics(fit, i, values)
    table.insert(0, name, [_public(fit, name, i, v) for v in values])
    return table


def interval(fit: "LawFit", name: str, level: float) -> tuple[float, float]:
    """Values of a parameter whose profile statistic stays below the F quantile.

    Infinite where the profile never reaches it within 64 standard errors; the bound of the
    parameter where it ends there.
    """
    i = _index(fit, name)
    limit = float(f_distribution.ppf(level, 1, fit.freedom))
    lower, upper = float(fit.surface.lower[i]), float(fit.surface.upper[i])
    ends = []
    for side, bound in ((-1, lower), (1, upper)):
        inside, outside = float(fit.theta[i]), None
        width = _spread(fit, i)
        for _ in range(7):
            trial = float(np.clip(fit.theta[i] + side * width, lower, upper))
            if _statistic(fit, i, trial) > limit:
                outside = trial
                break
            inside, width = trial, 2 * width
            if trial == bound:
                break
        if outside is None:
            ends.append(bound if inside == bound else side * float("inf"))
            continue
        for _ in range(12):
            middle = 0.5 * (inside + outside)
            above = _statistic(fit, i, middle) > limit
            inside, outside = (inside, middle) if above else (middle, outside)
        ends.append(0.5 * (inside + outside))
    public = [_public(fit, name, i, end) for end in ends]
    return min(public), max(public)


def at_bound(fit: "LawFit", name: str, value: float) -> float:
    """Statistic with a parameter held at a value in the solver's coordinates."""
    return _statistic(fit, _index(fit, name), value)


def held(fit: "LawFit", index: int, values: Array) -> Array:
    """``[V]`` lowest objective with ``theta[index]`` held at each of ``values``."""
    problem, theta, surface = fit.problem, fit.theta, fit.surface
    lowest = np.empty(len(values))
    middle = int(np.argmin(np.abs(values - theta[index])))
    for order in (range(middle, len(values)), range(middle - 1, -1, -1)):
        now = theta
        for i in order:
            lower, upper = surface.lower.copy(), surface.upper.copy()
            lower[index] = upper[index] = values[i]
            pinned = replace(problem, surface=replace(surface, lower=lower, upper=upper))
            starts = np.stack([now, theta])
            starts[:, index] = values[i]
            found = minimise(pinned, starts, fit.weights)
            k = int(np.argmin(found.objective))
            now, lowest[i] = found.theta[k], found.objective[k]
    return lowest


def _public(fit: "LawFit", name: str, index: int, value: float) -> float:
    if not np.isfinite(value):
        return value
    theta = fit.theta.copy()
    theta[index] = value
    return float(fit.surface.public(theta[None])[name].iloc[0])


def _index(fit: "LawFit", name: str) -> int:
    if name not in fit.profiled:
        raise FitError(f"no profile of {name!r}; there is one of {', '.join(fit.profiled)}")
    return fit.surface.names.index(name)


def _statistic(fit: "LawFit", i: int, value: float) -> float:
    return float(_statistics(fit, i, np.array([value]))["statistic"].iloc[0])


def _statistics(fit: "LawFit", i: int, values: Array) -> pd.DataFrame:
    objective = held(fit, i, values)
    base = float(fit.problem.objective(fit.theta[None], fit.weights)[0])
    curvature = np.linalg.pinv(bread(fit.problem, fit.theta, fit.weights))[i, i]
    scale = fit.covariance()[i, i] / curvature
    rise = np.maximum(objective - base, 0.0)
    return pd.DataFrame(
        {
            "objective": objective,
            "excess": rise / base if base > 0 else rise,
            "statistic": 2 * rise / scale if np.isfinite(scale) and scale > 0 else 0.0 * rise,
        }
    )


def _spread(fit: "LawFit", i: int) -> float:
    """Standard error of theta[i], or where there is none a tenth of its size."""
    variance = float(fit.covariance()[i, i])
    usable = np.isfinite(variance) and variance > 0
    return float(np.sqrt(variance)) if usable else 0.1 * max(1.0, abs(float(fit.theta[i])))
