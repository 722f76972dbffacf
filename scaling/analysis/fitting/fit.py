"""Fit a law to a table.

``fit_law`` fits any form under any objective; ``fit_power_law`` is its short way to the law in one
factor, on the compute frontier if asked. The objective is part of the answer: the same table gives
other exponents under another, so every result carries it.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.frontier import on_frontier
from scaling.analysis.fitting.intervals import (
    FEW_CLUSTERS,
    RESAMPLINGS,
    Bootstrap,
    Resampling,
    calibrated,
    fractional_weights,
    refit,
    resampled_targets,
    resampled_weights,
    sandwich,
)
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.objective import LAD_DRAW_KNEE, Objective
from scaling.analysis.fitting.parameters import FREE, Constraints, Ends
from scaling.analysis.fitting.rows import (
    check_enough,
    check_unit,
    check_varies,
    distinct,
    unit_column,
    usable_rows,
)
from scaling.analysis.fitting.solver import GRADIENT_TOLERANCE, Minima, Problem, minimise, settle
from scaling.analysis.fitting.starts import best, scatter
from scaling.analysis.fitting.status import Certificate, FitError, FitStatus
from scaling.analysis.fitting.surface import Surface

STARTS_SCORED = 4_000
STARTS_POLISHED, POLISH_ITERATIONS = 24, 100
"""Starts minimised to the end, and their iterations; the best of what is open then is settled."""
SAME_OPTIMUM = 1e-6
"""Two optima are one when their objectives agree to this relative difference."""


def fit_law(
    df: pd.DataFrame,
    form: str | Form,
    *,
    y: str,
    objective: Objective | None = None,
    weights: str | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, Ends] | None = None,
    tied: Sequence[Sequence[str]] = (),
    bootstrap: Resampling = "clusters",
    n_boot: int = 1000,
    cluster: str | None = "auto",
    seed: int = 0,
) -> LawFit:
    """Fit a law.

    Args:
        df: one row per point.
        form: the law, such as ``"E + n_total + batch_size"`` (``Form.parse``).
        y: column that the law gives.
        objective: what is minimised; by default Huber losses of ln y with delta 1e-3.
        weights: column of the rows' weights in the objective.
        fixed: public parameters held at a value.
        bounds: lower and upper bounds of public parameters; None for the default's end.
        tied: groups of public parameters that share one value.
        bootstrap: what a draw weighs anew: whole ``clusters``, or ``rows`` one by one; or it
            redraws ``residuals`` around the fit (their signs by cluster).
        n_boot: bootstrap draws; 0 for none.
        cluster: column of the independent units (points of one run are not independent); None
            when every row is one; ``auto`` is ``run_key`` where the table has it, else None.
        seed: of starts and bootstrap.

    Raises:
        FormError: the form or a constraint cannot be read.
        FitError: a column is missing, a factor does not vary, or too few usable points are left.

    Example:
        >>> n = np.geomspace(1e6, 1e9, 12)
        >>> runs = pd.DataFrame({"n_total": n, "loss": 2 + (n / 5e5) ** -0.3})
        >>> fit = fit_law(runs, "E + n_total", y="loss", n_boot=0)
        >>> round(fit.params["exponent"], 9)
        0.3
    """
    return _fit(
        df, Form.parse(form), y, objective or Objective(), weights,
        Constraints(dict(fixed or {}), dict(bounds or {}), tuple(tuple(g) for g in tied)),
        bootstrap, n_boot, cluster, seed, frontier=False,
    )  # fmt: skip


def fit_power_law(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    irreducible: bool = False,
    frontier: bool = False,
    objective: Objective | None = None,
    weights: str | None = None,
    n_boot: int = 1000,
    cluster: str | None = "auto",
    seed: int = 0,
) -> LawFit:
    """Fit ``y = E + (x / scale) ** -exponent``, by default without floor E.

    Args:
        irreducible: with the floor E.
        frontier: fit only the compute frontier. Each bootstrap draw then takes the frontier of its
            own runs, so that the interval includes the choice of the points.
        objective, weights, n_boot, cluster, seed: as in ``fit_law``.

    Raises:
        FitError: a column is missing, or too few usable points are left.

    Example:
        >>> c = np.geomspace(1e-3, 1, 9)
        >>> runs = pd.DataFrame({"pf_days": c, "loss": 2 * c ** -0.05})
        >>> fit = fit_power_law(runs, x="pf_days", y="loss", n_boot=0)
        >>> round(fit.params["exponent"], 9)
        0.05
    """
    form = Form.parse(f"E + `{x}`" if irreducible else f"`{x}`")
    return _fit(
        df, form, y, objective or Objective(), weights, FREE, "clusters", n_boot,
        cluster, seed, frontier=frontier,
    )  # fmt: skip


def _fit(
    df: pd.DataFrame,
    form: Form,
    y: str,
    objective: Objective,
    weights: str | None,
    constraints: Constraints,
    resampling: Resampling,
    n_boot: int,
    cluster: str | None,
    seed: int,
    *,
    frontier: bool,
) -> LawFit:
    if resampling not in RESAMPLINGS:
        raise FitError(f"bootstrap is one of {', '.join(RESAMPLINGS)}, not {resampling!r}")
    if n_boot < 0 or seed < 0:
        raise FitError(f"n_boot and seed are 0 or more, not {n_boot} and {seed}")
    cluster = unit_column(df, cluster)
    rows, dropped = usable_rows(df, form, y, objective, weights, cluster)
    columns = {c: rows[c].to_numpy(dtype=np.float64) for c in form.columns}
    values = rows[y].to_numpy(dtype=np.float64)
    check_unit(y, values)
    codes = np.arange(len(rows)) if cluster is None else pd.factorize(rows[cluster].to_numpy())[0]
    own = np.ones(len(rows)) if weights is None else rows[weights].to_numpy(dtype=np.float64)
    rng = np.random.default_rng(seed)
    mask = np.ones(len(rows), dtype=bool)
    if frontier:
        x = columns[form.columns[0]]
        mask = on_frontier(x, values)
        dropped["not on the compute frontier"] = int((~mask).sum())
    check_varies({c: v[mask] for c, v in columns.items()}, dropped)
    surface = Surface.of(
        form, {c: v[mask] for c, v in columns.items()}, values[mask],
        log_scale=objective.scale == "log", constraints=constraints,
    )  # fmt: skip
    check_enough({c: v[mask] for c, v in columns.items()}, surface.n_free, dropped)

    by = np.arange(len(rows)) if resampling == "rows" else codes
    fractional = resampling != "residuals" and not frontier and int(by.max()) + 1 < FEW_CLUSTERS
    counts = np.ones((n_boot, len(rows)))
    if fractional:
        counts = fractional_weights(by, n_boot, rng)
    elif resampling != "residuals":
        counts = resampled_weights(by, n_boot, rng)
    if frontier:
        counts = counts * on_frontier(columns[form.columns[0]], values, counts > 0)
    kept = mask | (counts > 0).any(axis=0)
    columns, values, codes = {c: v[kept] for c, v in columns.items()}, values[kept], codes[kept]
    counts, weight = counts[:, kept], own[kept] * mask[kept]
    enough = distinct(columns, counts) >= surface.n_free
    draws = counts[enough] * own[kept]

    problem = Problem(
        surface, surface.transform(columns), objective.target(values),
        objective.scale == "log", objective.knee(), objective.overestimate,
    )  # fmt: skip
    scattered = scatter(problem, STARTS_SCORED, rng)
    spread = 0.0
    if objective.loss == "lad":
        round_problem = problem.with_knee(np.inf)
        squares = minimise(round_problem, best(round_problem, scattered, 4, weight), weight)
        residuals = problem.fitted(squares.theta[[np.argmin(squares.objective)]])[0]
        spread = float(np.median(np.abs(residuals - problem.target)[weight > 0])) or 1e-12
        problem = problem.with_knee(objective.knee(spread))
    starts = best(problem, scattered, STARTS_POLISHED, weight)
    polished = minimise(problem, starts, weight, max_iterations=POLISH_ITERATIONS)
    minima = settle(problem, polished, weight)
    theta, certificate, optima = _best(minima, problem, objective, weight)
    status, message = _judge(minima, starts, certificate, surface)

    targets = None
    if resampling == "residuals":
        targets = resampled_targets(
            problem.fitted(theta[None])[0], problem.target, codes, surface.n_free, n_boot, rng
        )
    drawn = problem.with_knee(LAD_DRAW_KNEE * spread) if objective.loss == "lad" else problem
    theta_draws, missed, rechecked, lower = refit(
        drawn, [theta, *optima], draws, targets, scattered[: STARTS_SCORED // 8]
    )
    if len(theta_draws) and resampling != "residuals" and not frontier:
        away = np.abs(problem.fitted(theta[None])[0] - problem.target)[weight > 0]
        if (away <= problem.delta).mean() > 0.5:
            covariance = sandwich(problem, theta, weight, by)
            theta_draws = calibrated(theta_draws, theta, covariance, surface)
    return LawFit(
        form=form,
        y=y,
        objective=objective,
        constraints=constraints,
        weighted_by=weights,
        frontier=frontier,
        status=status,
        message=message,
        params=surface.public(theta[None]).iloc[0],
        draws=surface.public(theta_draws),
        certificate=certificate,
        basins=surface.public(np.stack([theta, *optima])).assign(
            objective=list(certificate.basins)
        ),
        n=int((weight > 0).sum()),
        dropped=dropped,
        bootstrap=Bootstrap(
            resampling, None if resampling == "rows" else cluster, int(by.max()) + 1, n_boot,
            n_boot - len(draws), missed, rechecked, lower, seed, fractional,
        ),
        data_hash=_hash(columns, values, weight),
        problem=problem,
        columns=columns,
        weights=weight,
        codes=codes,
        theta=theta,
        theta_draws=theta_draws,
    )  # fmt: skip


def _best(
    minima: Minima, problem: Problem, objective: Objective, weights: Array
) -> tuple[Array, Certificate, list[Array]]:
    """The best optimum, its certificate, and the other basins (at most 4), best first."""
    order = np.argsort(minima.objective, kind="stable")
    lowest = float(minima.objective[order[0]])
    if not np.isfinite(lowest):
        raise FitError("the law has no value on this data at any start; bound its parameters")
    # below a squared residual of 1e-18 per row, objectives differ by rounding only
    tolerance = SAME_OPTIMUM * lowest + 1e-18 * float(weights.sum())
    basins: list[int] = []
    for i in order:
        settled = minima.gradient[i] <= GRADIENT_TOLERANCE or not basins
        lower = not basins or minima.objective[i] > minima.objective[basins[-1]] + tolerance
        if settled and lower and np.isfinite(minima.objective[i]):
            basins.append(int(i))
    basins = basins[:5]
    residuals = problem.fitted(minima.theta[basins]) - problem.target
    certificate = Certificate(
        objective=objective.value(residuals[0][weights > 0], weights[weights > 0]),
        gradient=float(minima.gradient[basins[0]]),
        starts_scored=STARTS_SCORED,
        starts_polished=len(order),
        agree=float(np.mean(minima.objective <= lowest + tolerance)),
        basins=tuple(objective.value(r[weights > 0], weights[weights > 0]) for r in residuals),
    )
    return minima.theta[basins[0]], certificate, [minima.theta[i] for i in basins[1:]]


def _judge(
    minima: Minima, starts: Array, certificate: Certificate, surface: Surface
) -> tuple[FitStatus, str]:
    i = int(np.argmin(minima.objective))
    moved = bool(np.any(np.abs(minima.theta[i] - starts[i]) > 1e-9))
    agreeing = round(certificate.agree * certificate.starts_polished)
    evidence = (
        f"relative gradient {certificate.gradient:.1e}, "
        f"{agreeing} of {certificate.starts_polished} starts agree"
    )
    if len(certificate.basins) > 1:
        above = certificate.basins[1] / certificate.basins[0] - 1 if certificate.basins[0] else 0
        evidence += f", {len(certificate.basins)} basins (the next {above:.2g} above)"
    linear = not surface.form.outer and all(term.is_line for term in surface.form.terms)
    if not moved and not linear:  # the starts of a linear law solve its least squares outright
        return FitStatus.STALLED, f"the optimum equals its start; {evidence}"
    if certificate.gradient > GRADIENT_TOLERANCE:
        stage = FitStatus.MAX_ITER if minima.exhausted[i] else FitStatus.STALLED
        return stage, f"the gradient is above {GRADIENT_TOLERANCE:.0e}; {evidence}"
    if minima.at_bound[i].any():
        held = ", ".join(n for n, hit in zip(surface.names, minima.at_bound[i], strict=True) if hit)
        return FitStatus.BOUND_HIT, f"on a bound: {held}; {evidence}"
    if agreeing < 2:
        return FitStatus.FEW_AGREE, evidence
    return FitStatus.CONVERGED, evidence


def _hash(columns: Mapping[str, Array], y: Array, weights: Array) -> str:
    """SHA-256 of the fitted numbers, columns in the form's order, then y and weights."""
    digest = hashlib.sha256()
    used = weights > 0
    for values in (*columns.values(), y, weights):
        digest.update(np.ascontiguousarray(values[used], dtype="<f8").tobytes())
    return digest.hexdigest()
