"""What a fit of an additive power law is: parameters, error bars, evidence, verdicts.

The rules that decide whether a fit converged and whether the data identifies its floor are the
constants and the docstrings of this module; nothing else in the project decides it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from scaling import ClueError
from scaling.analysis.solver import GRADIENT_TOLERANCE, Array, Problem

FLOOR_MIN_SHARE = 0.01
"""A floor counts as identified only if its 95 % interval lies above this share of the lowest y"""
FLOOR_MAX_WIDTH = 1.0
"""and is not wider than this, relative to the floor itself."""


PER_TERM = ("scale", "exponent")


def label(parameter: str, factor: str, factors: tuple[str, ...]) -> str:
    return parameter if len(factors) == 1 else f"{parameter}.{factor}"


def parameter_names(factors: tuple[str, ...], irreducible: bool) -> list[str]:
    """Public names of the parameters, in the order of theta."""
    return ["irreducible"] * irreducible + [label(p, f, factors) for p in PER_TERM for f in factors]


def plain(value: float) -> float | None:
    """A float that JSON can say; infinity and NaN are None."""
    number = float(value)
    return number if np.isfinite(number) else None


class FitError(ClueError):
    """There is nothing usable to fit; the message names the column, the rows and the need."""


class FitStatus(StrEnum):
    """How far a fit can be trusted: only ``CONVERGED`` is a result, the others ask for care."""

    CONVERGED = "CONVERGED"
    """Gradient certificate met, inside all bounds, reached from several starts."""
    MAX_ITER = "MAX_ITER"
    """The iterations ran out before the gradient certificate was met."""
    STALLED = "STALLED"
    """No step lowers the objective although the gradient is not small, or the optimum equals its
    start: the minimiser did not work."""
    BOUND_HIT = "BOUND_HIT"
    """A parameter lies on a bound: the data does not hold it (a floor at zero, most often)."""
    FEW_AGREE = "FEW_AGREE"
    """One start alone reached the best objective; a better one may exist."""


@dataclass(frozen=True)
class Certificate:
    """Evidence that the reported optimum is one.

    Attributes:
        objective: value of the objective at the optimum (sum over rows).
        gradient: largest gradient component relative to the sum of the rows' pulls on it.
        starts_scored, starts_polished: starts tried, and those minimised to the end.
        agree: share of the polished starts that reached the best objective.
        basins: the distinct objective values reached, best first, at most three.
    """

    objective: float
    gradient: float
    starts_scored: int
    starts_polished: int
    agree: float
    basins: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether the data identifies a parameter, and the reasons where it does not."""

    identified: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class AdditiveFit:
    """A fitted additive law ``y = E + sum_k (x_k / scale_k) ** -exponent_k``.

    Attributes:
        factors: names of the columns x_k.
        y: name of the fitted column.
        status, message: how far to trust it, and why.
        params: estimates: ``irreducible`` (with a floor), then scales, then exponents.
        draws: one row of the same parameters per bootstrap draw.
        certificate: evidence of the optimum.
        n: rows fitted; with ``frontier`` those on the compute frontier.
        n_clusters: independent units that the bootstrap resamples.
        dropped: rows left out, by rule.
        frontier: whether only the compute frontier was fitted.
        draws_failed: bootstrap draws with too few distinct points to fit; not among ``draws``.
        draws_unconverged: draws that ended above the tolerance of a draw; they are among ``draws``.
        cluster, seed: of the bootstrap.
        problem, theta, theta_draws: data and parameters as the solver has them.
    """

    factors: tuple[str, ...]
    y: str
    status: FitStatus
    message: str
    params: "pd.Series[float]"
    draws: pd.DataFrame
    certificate: Certificate
    n: int
    n_clusters: int
    dropped: Mapping[str, int]
    frontier: bool
    draws_failed: int
    draws_unconverged: int
    cluster: str | None
    seed: int
    problem: Problem
    weights: Array
    theta: Array
    theta_draws: Array

    @property
    def irreducible(self) -> bool:
        """Whether the law has a floor E."""
        return self.problem.floor

    def ci(self, level: float = 0.95) -> pd.DataFrame:
        """Percentile bootstrap intervals: ``estimate lower upper`` per parameter.

        Raises:
            FitError: the fit was made without bootstrap draws.
        """
        if self.draws.empty:
            raise FitError(f"no interval for {self.y}: the fit has no bootstrap draws (n_boot = 0)")
        tail = (1 - level) / 2
        # "nearest": a draw's scale may be infinite (exponent near 0), which has no midpoint
        bounds = self.draws.quantile([tail, 1 - tail], interpolation="nearest")
        return pd.DataFrame(
            {"estimate": self.params, "lower": bounds.iloc[0], "upper": bounds.iloc[1]}
        )

    def summary(self) -> pd.DataFrame:
        """Estimate, 95 % interval and bootstrap standard error of every parameter."""
        if self.draws.empty:
            return pd.DataFrame({"estimate": self.params})
        return self.ci().assign(standard_error=self.draws.std())

    def predict_log(self, log_x: Array, level: float | None) -> pd.DataFrame:
        """``y`` and, with a level, ``lower`` and ``upper`` at ``log_x [m, K]``."""
        out = {"y": np.exp(self.problem.predict(self.theta[None], log_x)[0])}
        if level is not None and len(self.theta_draws):
            tail = (1 - level) / 2
            band = np.exp(self.problem.predict(self.theta_draws, log_x))
            out["lower"], out["upper"] = np.quantile(band, [tail, 1 - tail], axis=0)
        return pd.DataFrame(out)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest fitted value of every factor."""
        x = np.exp(self.problem.log_x[self.weights > 0])
        return {
            name: (float(x[:, k].min()), float(x[:, k].max()))
            for k, name in enumerate(self.factors)
        }

    def floor(self) -> Verdict:
        """Whether the data identifies the floor E; the rule is in this module's constants."""
        if not self.irreducible:
            return Verdict(False, ("the law has no floor",))
        reasons = []
        value = float(self.params["irreducible"])
        lowest = float(np.exp(self.problem.log_y[self.weights > 0].min()))
        if value < FLOOR_MIN_SHARE * lowest:
            reasons.append(f"E = {value:.3g} is next to nothing beside the lowest y, {lowest:.4g}")
        if self.draws.empty:
            reasons.append("no bootstrap")
        else:
            interval = self.ci()
            low, high = (float(interval[end]["irreducible"]) for end in ("lower", "upper"))
            if low < FLOOR_MIN_SHARE * lowest:
                reasons.append(f"the 95 % interval of E reaches down to {low:.3g}")
            if high - low > FLOOR_MAX_WIDTH * value:
                reasons.append(f"the 95 % interval of E, {low:.3g} to {high:.3g}, is wider than E")
        if self.status is not FitStatus.CONVERGED:
            reasons.append(f"status {self.status}")
        return Verdict(not reasons, tuple(reasons))

    def equation(self) -> str:
        """The law with its numbers, to six significant digits."""
        terms = [f"{self.params['irreducible']:.6g}"] if self.irreducible else []
        for name in self.factors:
            scale, exponent = (self.params[label(p, name, self.factors)] for p in PER_TERM)
            terms.append(f"({name} / {scale:.6g})^-{exponent:.6g}")
        return f"{self.y} = " + " + ".join(terms)

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to judge or repeat the fit, as plain JSON values."""
        intervals = None if self.draws.empty else self.ci()
        return {
            "form": f"{self.y} = "
            + " + ".join(
                ["E"] * self.irreducible + [f"({f} / scale)^-exponent" for f in self.factors]
            ),
            "equation": self.equation(),
            "points": "frontier" if self.frontier else "all",
            "objective": {
                "name": "sum of Huber losses of ln(fit) - ln(y)",
                "delta": plain(self.problem.delta),
                "value": plain(self.certificate.objective),
            },
            "params": {name: plain(v) for name, v in self.params.items()},
            "ci95": None
            if intervals is None
            else {
                str(name): [plain(row["lower"]), plain(row["upper"])]
                for name, row in intervals.iterrows()
            },
            "floor_identified": self.floor().identified if self.irreducible else None,
            "floor_reasons": list(self.floor().reasons) if self.irreducible else [],
            "status": str(self.status),
            "message": self.message,
            "certificate": {
                "gradient": plain(self.certificate.gradient),
                "gradient_tolerance": GRADIENT_TOLERANCE,
                "starts_scored": self.certificate.starts_scored,
                "starts_polished": self.certificate.starts_polished,
                "agree": self.certificate.agree,
                "basins": [plain(v) for v in self.certificate.basins],
            },
            "rows": {"used": self.n, "dropped": dict(self.dropped)},
            "range": {name: list(ends) for name, ends in self.ranges().items()},
            "bootstrap": {
                "method": "percentile, resampling clusters",
                "cluster": self.cluster,
                "n_clusters": self.n_clusters,
                "draws": len(self.draws),
                "failed": self.draws_failed,
                "unconverged": self.draws_unconverged,
                "seed": self.seed,
            },
        }

    def _repr_html_(self) -> str:
        table = self.summary().to_html(float_format=lambda v: f"{v:.6g}")
        return f"<p><b>{self.equation()}</b><br>{self.status}: {self.message}</p>{table}"
