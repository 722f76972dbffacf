"""Where a new run will lie: the interval of a law plus the scatter of runs about it.

The band of a law says where the law is; a new run also has its own noise. The interval here is that
of (law under a bootstrap draw) + (residual of the fit, drawn by cluster): it takes the noise as
symmetric and the same everywhere, and as nothing else. Three corrections matter where runs are few.
Residuals of a fit are smaller than the noise that made them; they are scaled up by cluster as
(I - H)^-1/2, H being the cluster's block of the hat matrix (Bell and McCaffrey 2002, Survey
Methodology 28(2), section 2; for clusters of one row the HC2 of MacKinnon and White 1985). Few
residuals seldom reach the tails; each is drawn with either sign. And the spread of the draws is
widened by sqrt(n / (n - P)), and, as for the law's own interval (``intervals.tail``), the normal
quantile gives way to Student's with n - P degrees of freedom, n being the clusters.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from scaling.analysis.fitting.intervals import check_level
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.status import FitError

SAMPLES = 4_000
"""At least so many values make up an interval: ends of 95 % then rest on 100 values each."""
LEAST_FREEDOM = 0.1
"""Eigenvalues of I - H below this count as this: a cluster that alone decides a parameter has no
residual to scale up."""


def predictive_interval(
    fit: LawFit,
    x: "pd.DataFrame | Mapping[str, Any] | Array | float",
    *,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Interval that holds a new row of a new run with probability ``level``.

    Args:
        fit: with bootstrap draws.
        x: rows to predict, as for ``LawFit.predict``.
        seed: of the draws of residuals.

    Returns:
        As ``LawFit.predict``: the form's columns, ``y``, ``lower``, ``upper``, ``extrapolated``.

    Raises:
        FitError: the fit has no bootstrap draws, or the level is not between 0 and 1.
    """
    if not len(fit.theta_draws):
        raise FitError(f"no interval for {fit.y}: the fit has no bootstrap draws (n_boot = 0)")
    check_level(level)
    noise, codes = scaled_residuals(fit)
    rng = np.random.default_rng(seed)
    repeats = -(-SAMPLES // len(fit.theta_draws))
    size = len(fit.theta_draws) * repeats
    drawn = _draw_by_cluster(noise, codes, size, rng) * rng.choice([-1.0, 1.0], size)
    out = fit.predict(x, level=None)
    centre, draws = fit.objective.target(out["y"].to_numpy()), fit.predict_draws(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        away = fit.objective.target(draws) - centre
    away *= np.sqrt((fit.freedom + fit.surface.n_free) / fit.freedom)
    share = (1 - level) / 2
    student_over_normal = student.ppf(share, fit.freedom) / norm.ppf(share)
    away = student_over_normal * (np.repeat(away, repeats, axis=0) + drawn[:, None])
    ends = centre + np.nanquantile(away, [share, 1 - share], axis=0)
    lower, upper = np.exp(ends) if fit.objective.scale == "log" else ends
    at = list(out.columns).index("extrapolated")
    out.insert(at, "lower", lower)
    out.insert(at + 1, "upper", upper)
    return out


def scaled_residuals(fit: LawFit) -> tuple[Array, npt.NDArray[np.intp]]:
    """Residuals of the fitted rows without the fit's shrinkage, and the number of their cluster.

    Returns:
        ``[rows]`` measured less fitted on the objective's scale, scaled up; ``[rows]`` clusters.
    """
    used = fit.weights > 0
    columns = {name: values[used] for name, values in fit.columns.items()}
    residual: Array = np.asarray(fit.residuals(), dtype=np.float64)
    codes = fit.codes[used]
    jacobian = fit.surface.jacobian(fit.theta, columns)
    if fit.objective.scale == "log":
        jacobian = jacobian / fit.surface.values(fit.theta[None], columns)[0][:, None]
    q = _orthonormal(jacobian)
    out: Array = np.empty(len(residual))
    for code in np.unique(codes):
        rows = codes == code
        free, vectors = np.linalg.eigh(np.eye(int(rows.sum())) - q[rows] @ q[rows].T)
        scale = np.maximum(free, LEAST_FREEDOM) ** -0.5
        out[rows] = vectors @ (scale * (vectors.T @ residual[rows]))
    return out, codes


def _orthonormal(jacobian: Array) -> Array:
    """Basis of the column space; columns that are zero or repeat others add nothing."""
    length = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    u, s, _ = np.linalg.svd(jacobian / length, full_matrices=False)
    return np.asarray(u[:, s > 1e-10 * s[0]])


def _draw_by_cluster(
    noise: Array, codes: npt.NDArray[np.intp], size: int, rng: np.random.Generator
) -> Array:
    """``[size]`` residuals: a cluster with equal chances, then one of its rows."""
    order = np.argsort(codes, kind="stable")
    _, first, counts = np.unique(codes[order], return_index=True, return_counts=True)
    chosen = rng.integers(len(counts), size=size)
    drawn: Array = noise[order[first[chosen] + rng.integers(counts[chosen])]]
    return drawn
