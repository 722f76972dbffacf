"""Error bars: bootstrap over clusters, rows or residuals, the sandwich, and the profile.

Points of one run are not independent: whatever is resampled or summed here is a cluster of rows.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2, norm, t

from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.solver import Minima, Problem, minimise
from scaling.analysis.fitting.starts import best
from scaling.analysis.fitting.status import FitError
from scaling.analysis.fitting.surface import Surface

Resampling = Literal["clusters", "rows", "residuals"]
RESAMPLINGS: tuple[str, ...] = get_args(Resampling)

DRAW_TOLERANCE, DRAW_ITERATIONS = 1e-5, 400
"""Relative gradient that ends a bootstrap draw, and the iterations it may take: its rounding has
only to be small beside the spread of the draws. Where the knee is small beside the residuals many
draws need hundreds of iterations; a draw that is done costs nothing more."""
FEW_CLUSTERS = 40
"""Below so many clusters draws give them fractional weights, in place of counts."""
RECHECKED = 0.02
"""Share of the draws that are minimised once more from fresh starts."""
SINGULAR = 1e-13
"""Smallest eigenvalue of a scaled Hessian below which some direction is not held at all."""
STRETCH = (2 / 3, 3 / 2)
"""Smallest and largest factor by which draws are stretched about the optimum."""
MISSED = 1e-4
"""A fresh start that ends lower by this relative difference shows a basin that the draws missed."""


@dataclass(frozen=True)
class Bootstrap:
    """How the draws were made.

    Attributes:
        resampling: what was drawn: whole clusters, or single rows (``fractional_weights`` where
            they are few); signs of the residuals of whole clusters (wild bootstrap), or where every
            row is a cluster residuals themselves.
        cluster: column of the clusters; None where every row is one.
        n_clusters: independent units.
        drawn, failed: draws asked for; those with too few distinct points to fit.
        unconverged: draws that ended above the tolerance of a draw; they are used.
        rechecked, missed: draws minimised again from fresh starts; those that ended lower.
        seed: of starts and draws.
        fractional: whether clusters got fractional weights (``FEW_CLUSTERS``).
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
    fractional: bool


def resampled_weights(codes: npt.NDArray[np.intp], n: int, rng: np.random.Generator) -> Array:
    """``[n, rows]`` how often each row is in each draw, clusters drawn with replacement."""
    n_clusters = int(codes.max()) + 1
    counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n)
    return counts[:, codes].astype(np.float64)


def fractional_weights(codes: npt.NDArray[np.intp], n: int, rng: np.random.Generator) -> Array:
    """``[n, rows]`` weight of each row in each draw, the same for all rows of a cluster.

    Fractional random weights (Xu et al. 2020, The American Statistician 74:345): from a Dirichlet
    distribution with the means and covariances of ``resampled_weights``, but no cluster is ever
    left out, so that a draw holds every parameter that the data holds. With few clusters some
    draws of whole clusters hold it hardly at all and make the interval too wide. Their tail is
    heavier than that of counts, which are the better where clusters are many.
    """
    n_clusters = int(codes.max()) + 1
    share = max(1, n_clusters - 1) / n_clusters
    weights = n_clusters * rng.dirichlet(np.full(n_clusters, share), size=n)
    return np.asarray(weights[:, codes])


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


def calibrated(draws: Array, theta: Array, covariance: Array, surface: Surface) -> Array:
    """``[B, P]`` draws, stretched about the optimum to the spread of the jackknife covariance.

    The draws have the shape of the distribution, but of least squares their spread is too small
    where rows have leverage. One factor for all directions makes the upper quartile of their
    Mahalanobis distance that of a normal distribution with the covariance. It is kept within
    ``STRETCH``, and draws stay as they are where the covariance says less than they do: at a bound,
    where a cluster alone decides, and where most residuals are beyond the knee, so that it rests on
    an estimated density.

    Args:
        draws, theta: ``[B, P]`` and ``[P]``.
        covariance: ``sandwich``.
    """
    p = len(theta)
    inside = np.all((surface.lower < theta) & (theta < surface.upper))
    if not inside or not np.isfinite(covariance).all():
        return draws
    away = draws - theta
    squared = np.einsum("bi,ij,bj->b", away, np.linalg.pinv(covariance, hermitian=True), away)
    middle = float(np.quantile(squared, 0.75))
    factor = np.sqrt(chi2.ppf(0.75, p) / middle) if middle > 0 else 1.0
    return np.asarray(np.clip(theta + np.clip(factor, *STRETCH) * away, surface.lower,
                              surface.upper))  # fmt: skip


def check_level(level: float) -> None:
    """Raises:
    FitError: the level of an interval is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise FitError(f"level is between 0 and 1, such as 0.95, not {level:g}")


def tail(level: float, n_clusters: int, n_free: int) -> float:
    """Share of the draws below a percentile interval of nominal ``level``.

    The plain percentile interval is too narrow for few clusters; here, as in the expanded one of
    Hesterberg (2015, section 4.3), the normal quantile gives way to Student's, with the degrees of
    freedom of a regression. It is not widened by sqrt(n / (n - P)) as well: draws of least squares
    are calibrated, and those of a loss with a knee are wide enough.
    """
    return float(norm.cdf(t.ppf((1 - level) / 2, max(1, n_clusters - n_free))))


def bread(problem: Problem, theta: Array, weights: Array) -> Array:
    """``[P, P]`` expected Hessian of the objective at ``theta [P]``.

    Of a Huber loss only rows inside the knee curve; where it is smaller than the residuals' spread,
    rows in a wider window count in its place, each for its share (the kernel estimator of Powell
    1991), which stays right where the spread depends on the row.
    """
    residuals, jacobian, w = _residuals(problem, theta, weights)
    return np.asarray((jacobian * _curving(problem, residuals, w)[:, None]).T @ jacobian)


def _curving(problem: Problem, residuals: Array, w: Array) -> Array:
    """``[n]`` expected second derivative of each row's loss."""
    if np.isinf(problem.delta):
        return w
    size = np.abs(residuals)
    spread = float(np.median(size)) / 0.6745
    window = max(problem.delta, 1.06 * spread * len(size) ** -0.2)
    return np.asarray(w * (size <= window) * (problem.delta / window))


def sandwich(problem: Problem, theta: Array, weights: Array, codes: npt.NDArray[np.intp]) -> Array:
    """``[P, P]`` cluster-robust covariance of theta, by the jackknife.

    Without cluster g the optimum moves by about ``(bread - bread_g)^-1 s_g``, where s_g is the pull
    of the cluster; the covariance is (G - 1) / G times the sum of the squares of these moves: CV3
    of MacKinnon, Nielsen and Webb (2023, Journal of Econometrics 232:272), which for few clusters
    is less often too small than the plain sandwich. Infinite where the law is not identified
    without some cluster.
    """
    residuals, jacobian, w = _residuals(problem, theta, weights)
    p = len(theta)
    pulls = jacobian * (w * np.clip(residuals, -problem.delta, problem.delta))[:, None]
    used = np.unique(codes[weights > 0], return_inverse=True)[1]
    g = int(used.max()) + 1
    curved = jacobian * _curving(problem, residuals, w)[:, None]
    scores, own = np.zeros((g, p)), np.zeros((g, p, p))
    np.add.at(scores, used, pulls)
    np.add.at(own, used, curved[:, :, None] * jacobian[:, None, :])
    every = own.sum(axis=0)
    size = np.sqrt(np.diag(every))
    if (size == 0).any() or (
        np.linalg.eigvalsh((every - own) / np.outer(size, size))[:, 0] < SINGULAR
    ).any():
        return np.full((p, p), np.inf)
    moves = np.linalg.solve(every - own, scores[:, :, None])[:, :, 0]
    return np.asarray((g - 1) / g * moves.T @ moves)


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
