"""A fit as JSON: everything that is needed to judge or to repeat it."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import scaling
from scaling.analysis.fitting.solver import GRADIENT_TOLERANCE

if TYPE_CHECKING:
    from scaling.analysis.fitting.law import LawFit

CURVE_POINTS, CURVE_EXTEND = 61, 10.0
"""Points of the curve of a law in one column, and how far it goes beyond the largest x."""


def plain(value: Any) -> Any:
    """A number that JSON can say; infinity and NaN are None."""
    if isinstance(value, str | bool | int | type(None)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    number = float(value)
    return number if np.isfinite(number) else None


def plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as JSON values."""
    return [
        {str(key): plain(value) for key, value in row.items()}
        for row in table.to_dict(orient="records")
    ]


def record(fit: "LawFit") -> dict[str, Any]:
    """What ``LawFit.to_dict`` gives."""
    intervals = None if fit.draws.empty else fit.ci()
    floor = fit.floor()
    constraints, certificate, boot = fit.constraints, fit.certificate, fit.bootstrap
    out: dict[str, Any] = {
        "form": str(fit.form),
        "y": fit.y,
        "equation": fit.equation(),
        "points": "frontier" if fit.frontier else "all",
        "objective": {**fit.objective.to_dict(), "value": plain(certificate.objective)},
        "weights": fit.weighted_by,
        "params": {str(name): plain(v) for name, v in fit.params.items()},
        "standard_errors": {str(n): plain(v) for n, v in fit.standard_errors().items()},
        "ci95": None
        if intervals is None
        else {
            str(name): [plain(row["lower"]), plain(row["upper"])]
            for name, row in intervals.iterrows()
        },
        "free": list(fit.surface.names),
        "fixed": {name: plain(v) for name, v in constraints.fixed.items()},
        "bounded": {name: [plain(v) for v in ends] for name, ends in constraints.bounds.items()},
        "tied": [list(group) for group in constraints.tied],
        "floor_identified": floor.identified if fit.irreducible else None,
        "floor_reasons": list(floor.reasons) if fit.irreducible else [],
        "identified": {
            str(row.pop("parameter")): row for row in plain_rows(fit.identified().reset_index())
        },
        "condition_number": plain(fit.condition_number()),
        "sensitivity": plain_rows(fit.sensitivity().reset_index()),
        "status": str(fit.status),
        "message": fit.message,
        "certificate": {
            "gradient": plain(certificate.gradient),
            "gradient_tolerance": GRADIENT_TOLERANCE,
            "solver": "damped Newton and Gauss-Newton, analytic derivatives",
            "starts_scored": certificate.starts_scored,
            "starts_polished": certificate.starts_polished,
            "agree": certificate.agree,
        },
        "basins": plain_rows(fit.basins),
        "rows": {"used": fit.n, "dropped": dict(fit.dropped), "sha256": fit.data_hash},
        "range": {name: list(ends) for name, ends in fit.ranges().items()},
        "bootstrap": {
            "method": "percentile, expanded for few clusters",
            "cluster_weights": "fractional" if boot.fractional else "counts",
            "resampling": boot.resampling,
            "cluster": boot.cluster,
            "n_clusters": boot.n_clusters,
            "draws": len(fit.draws),
            "failed": boot.failed,
            "unconverged": boot.unconverged,
            "rechecked": boot.rechecked,
            "missed": boot.missed,
            "seed": boot.seed,
        },
        "versions": {
            "clue-scaling": scaling.__version__,
            **{name: version(name) for name in ("numpy", "scipy", "pandas")},
        },
    }
    if len(fit.factors) == 1:
        out["x"] = fit.factors[0]
        out["curve"] = _curve(fit)
    return out


def _curve(fit: "LawFit") -> dict[str, list[Any]]:
    """The law in one column and its 95 % band, to draw."""
    low, high = fit.ranges()[fit.factors[0]]
    grid = (
        np.geomspace(low, high * CURVE_EXTEND, CURVE_POINTS)
        if low > 0
        else np.linspace(low, high, CURVE_POINTS)
    )
    band = fit.predict(grid)
    return {str(name): [plain(v) for v in band[name]] for name in band}
