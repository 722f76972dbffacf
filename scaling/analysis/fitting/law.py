"""A fitted law: numbers, error bars, evidence, predictions.

What may be concluded from it is in ``verdicts``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as student

from scaling.analysis.fitting import profiles
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.intervals import Bootstrap, check_level, sandwich, tail
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.parameters import COEFFICIENT, FLOOR, Constraints
from scaling.analysis.fitting.prose import equation
from scaling.analysis.fitting.rows import numbers
from scaling.analysis.fitting.solver import Problem, minimise, settle
from scaling.analysis.fitting.status import Certificate, FitError, FitStatus
from scaling.analysis.fitting.surface import Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scaling.analysis.fitting.verdicts import Identification, Verdict

Interval = Literal["percentile", "delta", "profile"]
INTERVALS: tuple[Interval, ...] = get_args(Interval)
DELTAS = (1e-4, 1e-3, 1e-2)
"""Knees of the table of sensitivity, in units of ln y; on raw y times 100 median residuals."""


@dataclass(frozen=True, eq=False)
class LawFit:
    """A fitted law.

    Attributes:
        form, y, objective, constraints, weighted_by: what was fitted, and how.
        frontier: whether only the compute frontier was fitted.
        status, message: how far to trust it, and why.
        params: public parameters; a coefficient and the scale it is equal to are both there.
        draws: the same parameters, one row per bootstrap draw.
        certificate: evidence of the optimum.
        basins: public parameters and ``objective`` of the distinct optima, the best first.
        n: rows fitted.
        dropped: rows left out, by rule.
        bootstrap: how the draws were made.
        data_hash: SHA-256 of the fitted numbers.
        problem, columns, weights, codes, theta, theta_draws: data and parameters as the solver has
            them; ``theta [P]``, ``theta_draws [B, P]``, ``codes [rows]`` number the clusters.
    """

    form: Form
    y: str
    objective: Objective
    constraints: Constraints
    weighted_by: str | None
    frontier: bool
    status: FitStatus
    message: str
    params: "pd.Series[float]"
    draws: pd.DataFrame
    certificate: Certificate
    basins: pd.DataFrame
    n: int
    dropped: Mapping[str, int]
    bootstrap: Bootstrap
    data_hash: str
    problem: Problem
    columns: Mapping[str, Array]
    weights: Array
    codes: npt.NDArray[np.intp]
    theta: Array
    theta_draws: Array

    @property
    def surface(self) -> Surface:
        """The form over the axes of the data."""
        return self.problem.surface

    @property
    def factors(self) -> tuple[str, ...]:
        """Columns of the law."""
        return self.form.columns

    @property
    def irreducible(self) -> bool:
        """Whether the law has a floor E."""
        return self.form.floor

    @property
    def n_clusters(self) -> int:
        """Independent units."""
        return self.bootstrap.n_clusters

    # ---- error bars -----------------------------------------------------------------------------

    def ci(self, level: float = 0.95, method: Interval = "percentile") -> pd.DataFrame:
        """Intervals: ``estimate lower upper`` per public parameter.

        Args:
            level: coverage.
            method: ``percentile`` of the bootstrap, expanded for few clusters; ``delta``, from the
                cluster-robust covariance; ``profile`` of the objective, for parameters that are
                fitted themselves (not coefficients and scales).

        Raises:
            FitError: the fit was made without bootstrap draws, or ``level`` or ``method`` is none.
        """
        check_level(level)
        if method not in INTERVALS:
            raise FitError(f"method is one of {', '.join(INTERVALS)}, not {method!r}")
        if method == "delta":
            half = self.standard_errors() * self._quantile(level)
            return pd.DataFrame(
                {"estimate": self.params, "lower": self.params - half, "upper": self.params + half}
            )
        if method == "profile":
            rows = {name: profiles.interval(self, name, level) for name in self.profiled}
            table = pd.DataFrame(rows, index=["lower", "upper"]).T
            table.insert(0, "estimate", self.params[list(rows)])
            return table
        if self.draws.empty:
            raise FitError(f"no interval for {self.y}: the fit has no bootstrap draws (n_boot = 0)")
        share = self.tail(level)
        # "nearest": a draw's scale may be infinite (exponent near 0), which has no midpoint
        bounds = self.draws.quantile([share, 1 - share], interpolation="nearest")
        return pd.DataFrame(
            {"estimate": self.params, "lower": bounds.iloc[0], "upper": bounds.iloc[1]}
        )

    def tail(self, level: float = 0.95) -> float:
        """Share of the draws below a percentile interval (``intervals.tail``)."""
        return tail(level, self.n_clusters, self.surface.n_free)

    @cached_property
    def _covariance(self) -> Array:
        return sandwich(self.problem, self.theta, self.weights, self.codes)

    def covariance(self) -> Array:
        """``[P, P]`` cluster-robust covariance of theta (``intervals.sandwich``)."""
        return self._covariance.copy()

    def standard_errors(self) -> "pd.Series[float]":
        """Of the public parameters by the delta method."""
        gradient = np.empty((len(self.params), len(self.theta)))
        for i in range(len(self.theta)):
            step = 1e-6 * max(1.0, abs(self.theta[i]))
            ends = self.surface.public(
                self.theta + step * np.eye(len(self.theta))[[i, i]] * [[1], [-1]]
            )
            gradient[:, i] = (ends.iloc[0] - ends.iloc[1]).to_numpy() / (2 * step)
        covariance = self.covariance()
        with np.errstate(invalid="ignore"):
            variance = np.einsum("ai,ij,aj->a", gradient, covariance, gradient)
            return pd.Series(np.sqrt(variance), index=self.params.index)

    @property
    def profiled(self) -> list[str]:
        """Parameters whose profile can be taken: those fitted themselves."""
        return [n for n in self.surface.names if n.partition(".")[0] != COEFFICIENT]

    def profile(self, name: str, points: int = 21) -> pd.DataFrame:
        """Lowest objective with one parameter held (``profiles.profile``)."""
        return profiles.profile(self, name, points)

    @property
    def freedom(self) -> int:
        """Clusters less free parameters, at least 1."""
        units = int(self.codes[self.weights > 0].max()) + 1 if self.n else 1
        return max(1, units - self.surface.n_free)

    def _quantile(self, level: float) -> float:
        return float(student.ppf(0.5 + level / 2, self.freedom))

    # ---- predictions ----------------------------------------------------------------------------

    def predict(
        self, x: "pd.DataFrame | Mapping[str, Any] | Sequence[float] | Array | float",
        level: float | None = 0.95,
    ) -> pd.DataFrame:  # fmt: skip
        """The law at ``x``: the form's columns, ``y``, ``lower``, ``upper``, ``extrapolated``.

        ``lower`` and ``upper`` bound the law itself (not a new run) at the given level;
        ``extrapolated`` says that some column lies outside its fitted range.

        Args:
            x: table or mapping of columns; plain numbers where the law has one column.

        Raises:
            FitError: a column is missing or holds no numbers, columns differ in length, or the
                level is not between 0 and 1.
        """
        points = self._points(x)
        values = self._arrays(points)
        out = points.assign(y=self.surface.values(self.theta[None], values)[0])
        if level is not None:
            check_level(level)
        if level is not None and len(self.theta_draws):
            share = self.tail(level)
            band = self.surface.values(self.theta_draws, values)
            ends = [np.full(len(points), np.nan), np.full(len(points), np.nan)]
            known = np.isfinite(band).any(axis=0)  # not at a size of 0, where a power has no end
            if known.any():
                ends[0][known], ends[1][known] = np.nanquantile(
                    band[:, known], [share, 1 - share], axis=0
                )
            out["lower"], out["upper"] = ends
        outside = np.zeros(len(points), dtype=bool)
        for name, (low, high) in self.ranges().items():
            outside |= (values[name] < low * (1 - 1e-12)) | (values[name] > high * (1 + 1e-12))
        return out.assign(extrapolated=outside)

    def predict_draws(self, x: "pd.DataFrame | Mapping[str, Any] | Array | float") -> Array:
        """``[B, m]`` the law at ``x`` under every bootstrap draw."""
        return self.surface.values(self.theta_draws, self._arrays(self._points(x)))

    def residuals(self) -> "pd.Series[float]":
        """Measured less fitted, on the objective's scale, of the fitted rows."""
        used = self.weights > 0
        return pd.Series((self.problem.target - self.problem.fitted(self.theta[None])[0])[used])

    def elasticities(self, x: "pd.DataFrame | Mapping[str, Any]") -> pd.DataFrame:
        """How much each factor still gives at the rows of ``x``: d ln (y - E) / d ln factor, with
        its 95 % interval: columns ``row factor elasticity lower upper``; E is that of the draw."""
        points = self._points(x)
        every = np.concatenate([self.theta[None], self.theta_draws])
        floor = self.surface.public(every)[FLOOR].to_numpy()[:, None] if self.irreducible else 0.0
        share = self.tail()
        rows = []
        for name in self.factors:
            ends = []
            for step in (1e-5, -1e-5):
                moved = self._arrays(points.assign(**{name: points[name] * np.exp(step)}))
                with np.errstate(invalid="ignore", divide="ignore"):
                    ends.append(np.log(self.surface.values(every, moved) - floor))
            slopes = (ends[0] - ends[1]) / 2e-5
            for i in range(len(points)):
                row = {"row": points.index[i], "factor": name, "elasticity": slopes[0, i]}
                if len(slopes) > 1:
                    row["lower"], row["upper"] = np.nanquantile(slopes[1:, i], [share, 1 - share])
                rows.append(row)
        return pd.DataFrame(rows)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest fitted value of every column."""
        used = self.weights > 0
        return {n: (float(x[used].min()), float(x[used].max())) for n, x in self.columns.items()}

    def _points(self, x: Any) -> pd.DataFrame:
        if isinstance(x, pd.DataFrame | Mapping):
            scalars = isinstance(x, Mapping) and not any(np.ndim(v) for v in x.values())
            try:
                table = pd.DataFrame(
                    dict(x) if isinstance(x, Mapping) else x, index=[0] if scalars else None
                )
            except ValueError as e:
                raise FitError(f"no table of points to predict at: {e}") from None
        elif len(self.factors) == 1:
            table = pd.DataFrame({self.factors[0]: np.atleast_1d(np.asarray(x, dtype=np.float64))})
        else:
            raise FitError(
                f"the law has the columns {', '.join(self.factors)}: pass a table of them"
            )
        missing = [c for c in self.factors if c not in table]
        if missing:
            raise FitError(f"no column {', '.join(missing)} to predict from")
        return pd.DataFrame({c: numbers(table[c]) for c in self.factors}, index=table.index)

    def _arrays(self, points: pd.DataFrame) -> dict[str, Array]:
        return {c: points[c].to_numpy(dtype=np.float64) for c in self.factors}

    # ---- reports --------------------------------------------------------------------------------

    @cached_property
    def _sensitivity(self) -> pd.DataFrame:
        spread = float(np.median(np.abs(self.residuals()))) or 1.0
        unit = 1.0 if self.objective.scale == "log" else 100 * spread
        choices = [replace(self.objective, loss="lad")]
        choices += [replace(self.objective, loss="huber", delta=d * unit) for d in DELTAS]
        choices += [replace(self.objective, loss="mse")]
        others = self.surface.theta
        starts = np.stack(
            [self.theta, *(others(dict(row)) for _, row in self.basins.iloc[1:].iterrows())]
        )
        rows = []
        for choice in choices:
            problem = self.problem.with_knee(choice.knee(spread))
            found = settle(problem, minimise(problem, starts, self.weights), self.weights)
            i = int(np.argmin(found.objective))
            name = choice.loss if choice.loss != "huber" else f"huber {choice.delta:.3g}"
            params = self.surface.public(found.theta[[i]]).iloc[0]
            rows.append({"objective": name, **{str(k): v for k, v in params.items()}})
        return pd.DataFrame(rows).set_index("objective")

    def sensitivity(self) -> pd.DataFrame:
        """Parameters under other objectives, by name: ``lad``, three knees of ``huber``, ``mse``.

        Minimised from this fit's optima, so a basin that only another objective has is not seen.
        """
        return self._sensitivity.copy()

    def summary(self) -> pd.DataFrame:
        """Estimate, 95 % interval and bootstrap standard error of every parameter."""
        if self.draws.empty:
            return pd.DataFrame({"estimate": self.params})
        with np.errstate(invalid="ignore"):
            return self.ci().assign(standard_error=self.draws.std())

    def equation(self) -> str:
        """The law with its numbers, to six significant digits."""
        return equation(self.form, self.y, {str(k): float(v) for k, v in self.params.items()})

    def floor(self) -> "Verdict":
        """Whether the data identifies the floor E (``verdicts.floor``)."""
        from scaling.analysis.fitting import verdicts

        return verdicts.floor(self)

    def identified(self, rule: "Identification | None" = None) -> pd.DataFrame:
        """Whether the data identifies every exponent (``verdicts.exponents``)."""
        from scaling.analysis.fitting import verdicts

        return verdicts.exponents(self, rule or verdicts.IDENTIFICATION)

    def condition_number(self) -> float:
        """Condition number of the residuals' Jacobian, columns scaled to length one.

        Large values (over some hundreds) say that parameters can replace each other.
        """
        from scaling.analysis.fitting import verdicts

        return verdicts.condition_number(self)

    def plot(
        self, ax: "Axes | None" = None, *, x: str | None = None, extend: float = 1.0
    ) -> "Axes":
        """Fitted points, law and 95 % band.

        Args:
            x: column of the axis; the first by default. The other columns' share of each point is
                taken out: points show the law along ``x`` at the others' medians plus the residual.
            extend: draw the law to this many times the largest fitted x.
        """
        from scaling.analysis.figures import law_and_points  # matplotlib only where it draws

        return law_and_points(self, x or self.factors[0], ax=ax, extend=extend)

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to judge or repeat the fit, as plain JSON values."""
        from scaling.analysis.fitting.record import record

        return record(self)

    def _repr_html_(self) -> str:
        table = self.summary().to_html(float_format=lambda v: f"{v:.6g}")
        law, message = escape(self.equation()), escape(self.message)
        return f"<p><b>{law}</b><br>{self.status}: {message}</p>{table}"
