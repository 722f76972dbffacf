"""Power laws with honest error bars.

``fit_power_law`` fits ``y = E + (x / x_c) ** -exponent``; ``scaling.analysis.law`` has the law in
several factors. The default objective is the sum of Huber losses (delta = 1e-3) of ln yhat - ln y,
as in Hoffmann et al. 2022 (eq. 3). The objective is part of the answer: the same table gives other
exponents under another delta, so every result carries it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from scaling.analysis.additive import (
    AdditiveFit,
    Certificate,
    FitError,
    FitStatus,
    parameter_names,
    plain,
)
from scaling.analysis.frontier import on_frontier
from scaling.analysis.solver import (
    GRADIENT_TOLERANCE,
    Array,
    Minima,
    Problem,
    best_starts,
    minimise,
    scatter_starts,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

F = TypeVar("F", bound=AdditiveFit)

LOG_HUBER_DELTA = 1e-3
"""Default knee of the Huber loss, in units of ln y (Hoffmann et al. 2022, section 3.3)."""
STARTS_SCORED = 2_000
STARTS_POLISHED = 24
SAME_OPTIMUM = 1e-6
"""Two optima are one when their objectives agree to this relative difference."""
RIVAL_OPTIMUM = 0.1
"""Bootstrap draws also start from optima whose objective is at most this much above the best."""
DRAW_TOLERANCE, DRAW_ITERATIONS = 1e-5, 60
"""Relative gradient that ends a bootstrap draw, and the iterations it may take: its rounding has
only to be small beside the spread of the draws."""


@dataclass(frozen=True, eq=False)
class PowerLawFit(AdditiveFit):
    """``y = E + (x / x_c) ** -exponent``; E, x_c are called ``irreducible`` and ``scale``."""

    @property
    def x(self) -> str:
        """Name of the column x."""
        return self.factors[0]

    def predict(
        self, x: float | Sequence[float] | Array, level: float | None = 0.95
    ) -> pd.DataFrame:
        """The law at ``x``: columns x's name, ``y``, ``lower``, ``upper``, ``extrapolated``.

        ``lower`` and ``upper`` bound the law itself (not a new run) at the given level.
        """
        values = np.atleast_1d(np.asarray(x, dtype=np.float64))
        low, high = self.ranges()[self.x]
        table = self.predict_log(np.log(values)[:, None], level)
        table.insert(0, self.x, values)
        inside = (values >= low * (1 - 1e-12)) & (values <= high * (1 + 1e-12))
        return table.assign(extrapolated=~inside)

    def band(self, extend: float = 1.0, points: int = 61) -> pd.DataFrame:
        """The law and its 95 % band over the fitted range, the upper end times ``extend``."""
        low, high = self.ranges()[self.x]
        return self.predict(np.geomspace(low, high * extend, points))

    def plot(self, ax: "Axes | None" = None, *, extend: float = 1.0) -> "Axes":
        """Fitted points, law and 95 % band on logarithmic axes."""
        from scaling.analysis.figures import law_and_points  # matplotlib only where it draws

        used = self.weights > 0
        x, y = np.exp(self.problem.log_x[used, 0]), np.exp(self.problem.log_y[used])
        return law_and_points(self, pd.DataFrame({self.x: x, self.y: y}), ax=ax, extend=extend)

    def to_dict(self) -> dict[str, Any]:
        """As ``AdditiveFit.to_dict``, with the curve and its band to draw (a decade beyond)."""
        band = self.band(extend=10.0)
        curve = {
            str(name): [bool(v) if name == "extrapolated" else plain(v) for v in band[name]]
            for name in band
        }
        return {**super().to_dict(), "x": self.x, "curve": curve}


def fit_power_law(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    irreducible: bool = False,
    frontier: bool = False,
    delta: float = LOG_HUBER_DELTA,
    n_boot: int = 1000,
    seed: int = 0,
    cluster: str | None = "run_key",
) -> PowerLawFit:
    """Fit ``y = E + (x / x_c) ** -exponent``.

    Args:
        df: one row per point.
        irreducible: with the floor E; without it E is 0.
        frontier: fit only the compute frontier. Each bootstrap draw then takes the frontier of its
            own runs, so that the interval includes the choice of the points.
        delta: knee of the Huber loss in ln y; ``inf`` is least squares in ln y.
        n_boot: bootstrap draws; 0 for none.
        seed: of starts and bootstrap.
        cluster: column of the independent units that are resampled (points of one run are not
            independent); None when every row is one.

    Raises:
        FitError: a column is missing, or too few usable points are left.

    Example:
        >>> c = np.geomspace(1e-3, 1, 9)
        >>> runs = pd.DataFrame({"run_key": range(9), "pf_days": c, "loss": 2 * c ** -0.05})
        >>> fit = fit_power_law(runs, x="pf_days", y="loss", n_boot=0)
        >>> round(fit.params["exponent"], 9)
        0.05
    """
    return fit_additive(
        PowerLawFit, df, (x,), y, irreducible=irreducible, frontier=frontier, delta=delta,
        n_boot=n_boot, seed=seed, cluster=cluster,
    )  # fmt: skip


def fit_additive(
    kind: type[F],
    df: pd.DataFrame,
    factors: tuple[str, ...],
    y: str,
    *,
    irreducible: bool,
    frontier: bool,
    delta: float,
    n_boot: int,
    seed: int,
    cluster: str | None,
) -> F:
    """Fit the additive law in ``factors``, as ``kind``; arguments as in the public callers."""
    rows, dropped = usable_rows(df, (*factors, y), cluster)
    log_x = np.log(rows[list(factors)].to_numpy(dtype=np.float64))
    log_y = np.log(rows[y].to_numpy(dtype=np.float64))
    codes = np.arange(len(rows)) if cluster is None else pd.factorize(rows[cluster].to_numpy())[0]
    rng = np.random.default_rng(seed)
    mask = np.ones(len(rows), dtype=bool)
    if frontier:
        mask = on_frontier(log_x[:, 0], log_y)
        dropped["not on the compute frontier"] = int((~mask).sum())
    n_free = 2 * len(factors) + irreducible
    _check_enough(log_x[mask], factors, n_free, dropped)

    n_clusters = int(codes.max()) + 1
    resampled = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_boot)
    draws = resampled[:, codes].astype(np.float64)
    if frontier:
        draws = draws * on_frontier(log_x[:, 0], log_y, draws > 0)
    kept = mask | (draws > 0).any(axis=0)
    problem = Problem(log_x[kept], log_y[kept], irreducible, delta)
    weights, draws = mask[kept].astype(np.float64), draws[:, kept]
    enough = [len(np.unique(problem.log_x[d > 0], axis=0)) >= n_free for d in draws]
    draws = draws[np.array(enough, dtype=bool)]

    scattered = scatter_starts(problem, STARTS_SCORED, rng)
    starts = best_starts(problem, scattered, STARTS_POLISHED, weights[None])
    minima = minimise(problem, starts, np.broadcast_to(weights, (len(starts), weights.size)))
    theta, certificate, others = _best(minima, int(mask.sum()))
    status, message = _judge(minima, starts, certificate, factors, irreducible)

    theta_draws, missed = _bootstrap(problem, [theta, *others], draws)
    return kind(
        factors=factors,
        y=y,
        status=status,
        message=message,
        params=_public(problem, theta[None], factors).iloc[0],
        draws=_public(problem, theta_draws, factors),
        certificate=certificate,
        n=int(mask.sum()),
        n_clusters=n_clusters,
        dropped=dropped,
        frontier=frontier,
        draws_failed=n_boot - len(draws),
        draws_unconverged=missed,
        cluster=cluster,
        seed=seed,
        problem=problem,
        weights=weights,
        theta=theta,
        theta_draws=theta_draws,
    )


def usable_rows(
    df: pd.DataFrame, columns: tuple[str, ...], cluster: str | None
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Rows where all columns are finite and positive, and how many each rule left out.

    Raises:
        FitError: a column is missing, or holds something else than numbers.
    """
    needed = [*columns, *([cluster] if cluster else [])]
    missing = [c for c in needed if c not in df]
    if missing:
        hint = "; pass cluster=None if every row is a unit of its own" if cluster in missing else ""
        raise FitError(
            f"the table has no column {', '.join(map(repr, missing))}{hint}; "
            f"its columns: {', '.join(map(str, df.columns))}"
        )
    dropped: dict[str, int] = {}
    keep = np.ones(len(df), dtype=bool)
    for name in columns:
        values = _numbers(df[name])
        for rule, bad in (
            (f"{name} is null", np.isnan(values)),
            (
                f"{name} is not positive and finite",
                ~np.isnan(values) & ~((values > 0) & np.isfinite(values)),
            ),
        ):
            if (count := int((bad & keep).sum())) > 0:
                dropped[rule] = count
            keep &= ~bad
    return df[keep], dropped


def _numbers(column: "pd.Series[Any]") -> Array:
    """A column as floats, NaN where it is null. Dates and truth values count as no numbers."""
    kind = column.infer_objects().dtype
    types = pd.api.types
    texts = types.is_object_dtype(kind) or types.is_string_dtype(kind)
    if types.is_bool_dtype(kind) or not (texts or types.is_numeric_dtype(kind)):
        raise FitError(f"column {column.name!r} holds {kind}, not numbers")
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = (numbers.isna() & column.notna()).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise FitError(
            f"column {column.name!r} holds {int(wrong.sum())} values that are no numbers, the "
            f"first in row {row + 1}: {column.iloc[row]!r}"
        )
    values: Array = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def _check_enough(
    log_x: Array, factors: tuple[str, ...], n_free: int, dropped: Mapping[str, int]
) -> None:
    points = len(np.unique(log_x, axis=0)) if len(log_x) else 0
    for k, name in enumerate(factors):
        if points > 1 and np.ptp(log_x[:, k]) == 0:
            raise FitError(
                f"{name} is {np.exp(log_x[0, k]):.6g} in every row: no exponent of it can be fitted"
            )
    if points <= n_free:
        left_out = "".join(f"; {n} rows left out: {rule}" for rule, n in dropped.items() if n)
        raise FitError(
            f"a law with {n_free} parameters in {', '.join(factors)} needs at least "
            f"{n_free + 1} distinct points, the table has {points}{left_out}"
        )


def _best(minima: Minima, n: int) -> tuple[Array, Certificate, list[Array]]:
    """The best optimum, its certificate, and its rivals (at most 2)."""
    order = np.argsort(minima.objective, kind="stable")
    best = float(minima.objective[order[0]])
    # below a squared residual of 1e-18 per row, objectives differ by rounding only
    tolerance = SAME_OPTIMUM * best + 1e-18 * n
    basins: list[int] = []
    for i in order:
        if not basins or minima.objective[i] > minima.objective[basins[-1]] + tolerance:
            basins.append(int(i))
    agree = float(np.mean(minima.objective <= best + tolerance))
    certificate = Certificate(
        objective=best,
        gradient=float(minima.gradient[order[0]]),
        starts_scored=STARTS_SCORED,
        starts_polished=len(order),
        agree=agree,
        basins=tuple(float(minima.objective[i]) for i in basins[:3]),
    )
    rivals = [i for i in basins[1:3] if minima.objective[i] <= (1 + RIVAL_OPTIMUM) * best]
    return minima.theta[basins[0]], certificate, [minima.theta[i] for i in rivals]


def _judge(
    minima: Minima,
    starts: Array,
    certificate: Certificate,
    factors: tuple[str, ...],
    irreducible: bool,
) -> tuple[FitStatus, str]:
    i = int(np.argsort(minima.objective, kind="stable")[0])
    names = parameter_names(factors, irreducible)
    moved = bool(np.any(np.abs(minima.theta[i] - starts[i]) > 1e-9))
    agreeing = round(certificate.agree * certificate.starts_polished)
    evidence = (
        f"relative gradient {certificate.gradient:.1e}, "
        f"{agreeing} of {certificate.starts_polished} starts agree"
    )
    if not moved:
        return FitStatus.STALLED, f"the optimum equals its start; {evidence}"
    if certificate.gradient > GRADIENT_TOLERANCE:
        stage = FitStatus.MAX_ITER if minima.exhausted[i] else FitStatus.STALLED
        return stage, f"the gradient is above {GRADIENT_TOLERANCE:.0e}; {evidence}"
    if minima.at_bound[i].any():
        held = ", ".join(n for n, hit in zip(names, minima.at_bound[i], strict=True) if hit)
        return FitStatus.BOUND_HIT, f"on a bound: {held}; {evidence}"
    if agreeing < 2:
        return FitStatus.FEW_AGREE, evidence
    return FitStatus.CONVERGED, evidence


def _bootstrap(problem: Problem, optima: list[Array], draws: Array) -> tuple[Array, int]:
    """``[B, P]`` the best optimum of every draw, and how many draws missed the tolerance."""
    if not len(draws):
        return np.empty((0, problem.n_free)), 0
    if problem.floor:  # the basin most often changed into: no floor at all
        optima = [*optima, np.concatenate([[0.0], optima[0][1:]])]
    found = [
        minimise(problem, np.tile(theta, (len(draws), 1)), draws, DRAW_TOLERANCE, DRAW_ITERATIONS)
        for theta in optima
    ]
    best = np.argmin([m.objective for m in found], axis=0)
    theta = np.stack([found[b].theta[i] for i, b in enumerate(best)])
    missed = [found[b].gradient[i] > DRAW_TOLERANCE for i, b in enumerate(best)]
    return theta, int(np.sum(missed))


def _public(problem: Problem, theta: Array, factors: tuple[str, ...]) -> pd.DataFrame:
    """Parameters as people know them: E, scales, exponents."""
    f, k = int(problem.floor), problem.n_terms
    exponents = theta[:, f + k :]
    with np.errstate(over="ignore"):
        scales = np.exp(problem.centre + theta[:, f : f + k] / exponents)
    values = np.concatenate([theta[:, :f], scales, exponents], axis=1)
    return pd.DataFrame(values, columns=parameter_names(factors, problem.floor))
