"""Error bars: bootstrap over clusters, rows or residuals, the sandwich, and the profile.

Points of one run are not independent: whatever is resampled or summed here is a cluster of rows.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, t

from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.solver import Minima, Problem, minimise
from scaling.analysis.fitting.starts import best

Resampling = Literal["clusters", "rows", "residuals"]
RESAMPLINGS: tuple[str, ...] = get_args(Resampling)

DRAW_TOLERANCE, DRAW_ITERATIONS = 1e-5, 400
"""Relative gradient that ends a bootstrap draw, and the iterations it may take: its rounding has
only to be small beside the spread of the draws. Where the knee is small beside the residuals many
draws need hundreds of iterations; a draw that is done costs nothing more."""
RECHECKED = 0.02
"""Share of the draws that are minimised once more from fresh starts."""
MISSED = 1e-4
"""A fresh start that ends lower by this relative difference shows a basin that the draws missed."""


@dataclass(frozen=True)
class Bootstrap:
    """How the draws were made.

    Attributes:
        resampling: what was drawn: whole clusters; rows one by one; signs of the residuals of
            whole clusters (wild bootstrap), or where every row is a cluster residuals themselves.
        cluster: column of the clusters; None where every row is one.
        n_clusters: independent units.
        drawn, failed: draws asked for; those with too few distinct points to fit.
        unconverged: draws that ended above the tolerance of a draw; they are used.
        rechecked, missed: draws minimised again from fresh starts; those that ended lower.
        seed: of starts and draws.
    """

    resampling: Resampling
    cluster: str | None
    n_clusters: int
    drawn: int
    failed: int
    unconverged: int
    rechecked: int
    missed: int
    seed: int


def resampled_weights(codes: npt.NDArray[np.intp], n: int, rng: np.random.Generator) -> Array:
    """``[n, rows]`` how often each row is in each draw, clusters drawn with replacement."""
    n_clusters = int(codes.max()) + 1
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n)
    return counts[:, codes].astype(np.float64)


def resampled_targets(
    fitted: Array,
    target: Array,
    codes: npt.NDArray[np.intp],
    n_free: int,
    n: int,
    rng: np.random.Generator,
) -> Array:
    """``[n, rows]`` the fit plus residuals anew.

    Where rows are independent, residuals are drawn with replacement, widened by the degrees of
    freedom of the fit. Else all residuals of a cluster keep or change their sign together
    (Cameron, Gelbach and Miller 2008).
    """
    residuals = target - fitted
    n_clusters = int(codes.max()) + 1
    if n_clusters < len(codes):
        widen = np.sqrt(n_clusters / max(1, n_clusters - 1))
        signs = rng.choice([-1.0, 1.0], (n, n_clusters))
        return np.asarray(fitted + signs[:, codes] * residuals * widen)
    widen = np.sqrt(len(codes) / max(1, len(codes) - n_free))
    centred = (residuals - residuals.mean()) * widen
    return np.asarray(fitted + rng.choice(centred, (n, len(codes))))


def refit(
    problem: Problem,
    optima: list[Array],
    weights: Array,
    targets: Array | None,
    scattered: Array,
) -> tuple[Array, int, int, int]:
    """``[B, P]`` optimum of every draw, and how many missed the tolerance, were rechecked from
    fresh starts, and were found lower there.

    Draws start from the best optimum. A sample starts anew from scattered starts too; if any of it
    ends lower, all draws start from the rival optima and from what the sample found as well.

    Args:
        optima: the best optimum, then its rivals.
        weights: ``[B, rows]``.
        targets: ``[B, rows]``, where residuals were drawn.
        scattered: ``[S, P]`` fresh starts.
    """
    n = len(weights)
    if not n:
        return np.empty((0, problem.surface.n_free)), 0, 0, 0

    def from_one(theta: Array) -> Minima:
        starts = np.tile(theta, (n, 1))
        return minimise(problem, starts, weights, targets, DRAW_TOLERANCE, DRAW_ITERATIONS)

    found = [from_one(optima[0])]
    sample = np.arange(0, n, max(1, int(1 / RECHECKED)))[:50]
    fresh, ended = _fresh(
        problem, scattered, weights[sample], None if targets is None else targets[sample]
    )
    lower = ended < (1 - MISSED) * found[0].objective[sample]
    others = [*optima[1:], *fresh[lower]][: max(3, len(optima) - 1)]
    missed = int(lower.sum())
    if missed:
        found += [from_one(theta) for theta in others]
    choice = np.argmin([m.objective for m in found], axis=0)
    theta = np.stack([found[b].theta[i] for i, b in enumerate(choice)])
    above = [found[b].gradient[i] > DRAW_TOLERANCE for i, b in enumerate(choice)]
    return theta, int(np.sum(above)), len(sample), missed


def _fresh(
    problem: Problem, scattered: Array, weights: Array, targets: Array | None
) -> tuple[Array, Array]:
    """``[n, P]`` the best that each of n draws reaches from its own 4 best scattered starts, and
    its objective ``[n]``."""
    n = len(weights)
    starts = [
        best(
            problem if targets is None else replace(problem, target=targets[i]),
            scattered, 4, weights[i],
        )
        for i in range(n)
    ]  # fmt: skip
    draw = np.repeat(np.arange(n), len(starts[0]))
    found = minimise(
        problem, np.concatenate(starts), weights[draw], None if targets is None else targets[draw],
        DRAW_TOLERANCE, DRAW_ITERATIONS,
    )  # fmt: skip
    objective = found.objective.reshape(n, -1)
    lowest = objective.argmin(axis=1)
    theta = found.theta.reshape(n, objective.shape[1], -1)
    return theta[np.arange(n), lowest], objective[np.arange(n), lowest]


def tail(level: float, n_clusters: int, n_free: int) -> float:
    """Share of the draws below a percentile interval of nominal ``level``.

    The plain percentile interval is too narrow for few clusters; this is the expanded one of
    Hesterberg (2015, section 4.3), with the degrees of freedom of a regression: the normal
    quantile gives way to Student's, widened by sqrt(n / (n - P)).
    """
    freedom = max(1, n_clusters - n_free)
    quantile = t.ppf((1 - level) / 2, freedom) * np.sqrt(n_clusters / freedom)
    return float(norm.cdf(quantile))


def bread(problem: Problem, theta: Array, weights: Array) -> Array:
    """``[P, P]`` expected Hessian of the objective at ``theta [P]``.

    Of a Huber loss only rows inside the knee curve; where it is smaller than the residuals' spread,
    rows in a wider window count in its place, each for its share (the kernel estimator of Powell
    1991), which stays right where the spread depends on the row.
    """
    residuals, jacobian, w = _residuals(problem, theta, weights)
    if np.isfinite(problem.delta):
        size = np.abs(residuals)
        spread = float(np.median(size)) / 0.6745
        window = max(problem.delta, 1.06 * spread * len(size) ** -0.2)
        w = w * (size <= window) * (problem.delta / window)
    return np.asarray((jacobian * w[:, None]).T @ jacobian)


def sandwich(problem: Problem, theta: Array, weights: Array, codes: npt.NDArray[np.intp]) -> Array:
    """``[P, P]`` cluster-robust covariance of theta: bread^-1 (sum_g s_g s_g') bread^-1, where s_g
    is the pull of cluster g, with the factor G / (G - 1) x (n - 1) / (n - P) of small samples
    (Cameron and Miller 2015, eq. 12). Infinite where the bread is singular."""
    residuals, jacobian, w = _residuals(problem, theta, weights)
    p = len(theta)
    pulls = jacobian * (w * np.clip(residuals, -problem.delta, problem.delta))[:, None]
    used = np.unique(codes[weights > 0], return_inverse=True)[1]
    n_clusters, n = int(used.max()) + 1, len(residuals)
    scores = np.zeros((n_clusters, p))
    np.add.at(scores, used, pulls)
    try:
        inverse = np.linalg.inv(bread(problem, theta, weights))
    except np.linalg.LinAlgError:
        return np.full((p, p), np.inf)
    small = n_clusters / max(1, n_clusters - 1) * (n - 1) / max(1, n - p)
    return np.asarray(small * inverse @ (scores.T @ scores) @ inverse)


def _residuals(problem: Problem, theta: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Residuals ``[n]``, Jacobian ``[n, P]`` on their scale, weights, of the rows that count."""
    jet = problem.surface.evaluate(theta[None], problem.x, derivatives=True)
    y = np.broadcast_to(jet.value, (1, problem.rows))[0]
    jacobian = np.zeros((problem.rows, len(theta)))
    for i, by in jet.grad.items():
        jacobian[:, i] = np.broadcast_to(by, (1, problem.rows))[0]
    fitted = y
    if problem.log_scale:
        fitted, jacobian = np.log(y), jacobian / y[:, None]
    residuals = fitted - problem.target
    w = np.where(residuals > 0, problem.overestimate, 1.0) * weights
    used = weights > 0
    return residuals[used], jacobian[used], w[used]
