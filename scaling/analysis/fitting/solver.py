"""Numerics of the fits: any law under a Huber loss, minimised in batches.

The objective is ``sum_i w_i t_i huber_delta(r_i)`` with residuals r of ln y or of y; w are weights
of the rows and t is ``overestimate`` where r > 0. Everything is batched over S problems that share
their form and columns: starts (other theta), bootstrap draws (other weights) or resampled residuals
(other targets).

The minimiser is a damped Newton method that tries, at every iteration, two curvature matrices and
keeps the better step: the reweighted Gauss-Newton matrix, which majorises the Huber loss and is
therefore safe far from the optimum, and the exact Hessian, which converges quadratically near it.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.objective import huber
from scaling.analysis.fitting.surface import Inputs, Surface

GRADIENT_TOLERANCE = 1e-7
"""An optimum is certified when the relative gradient (see ``Minima.gradient``) is below this."""
RESIDUAL_ROUNDING = 1e-8
"""Residuals below this (times the largest target above 1) are rounding: they do not count against
the certificate."""
SHARPENINGS = 8
"""Whole Newton steps of ``settle``, at most."""
KNEES, KNEE_ITERATIONS = 10, 60
"""Steps in which ``settle`` narrows the knee, and the iterations of each."""
NEAR, SETTLED = 1e-2, 4
"""``settle`` takes ends at most this much above the lowest objective, and so many of them."""
CHUNK = 4_000_000
"""Numbers in the largest temporary array, so that memory stays small at any number of draws."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Data, law and loss of a fit.

    Attributes:
        surface: the law.
        x: its transformed columns.
        target: ``[rows]``, or ``[S, rows]`` where every draw has its own: ln y or y.
        log_scale: whether residuals are of ln y.
        delta: knee of the Huber loss, in units of the target; ``inf`` gives least squares.
        overestimate: factor on the loss of rows where the fit is above the target.
    """

    surface: Surface
    x: Inputs
    target: Array
    log_scale: bool = True
    delta: float = float("inf")
    overestimate: float = 1.0

    @property
    def rows(self) -> int:
        return int(self.target.shape[-1])

    def fitted(self, theta: Array) -> Array:
        """``[S, rows]`` on the scale of the target; NaN where a logarithm does not exist."""
        with np.errstate(all="ignore"):
            y = self.surface.evaluate(theta, self.x).value
            y = np.log(y) if self.log_scale else y
        return np.array(np.broadcast_to(y, (len(theta), self.rows)))

    def objective(
        self, theta: Array, weights: Array | None = None, target: Array | None = None
    ) -> Array:
        """``[S]`` objective; infinite where the law has no value at some row that counts."""
        r = self.fitted(theta) - (self.target if target is None else target)
        loss = huber(r, self.delta)
        if self.overestimate != 1:
            loss = np.where(r > 0, self.overestimate, 1.0) * loss
        if weights is not None:
            loss = np.where(weights > 0, loss * weights, 0.0)
        total = loss.sum(axis=1)
        return np.asarray(np.where(np.isfinite(total), total, np.inf))

    def derivatives(
        self, theta: Array, weights: Array | None = None, target: Array | None = None
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Objective ``[S]``, gradient ``[S, P]``, its bound ``[S, P]``, Gauss-Newton and exact
        Hessian ``[S, P, P]``.

        The bound is ``sum_i w_i |psi_i J_ij|``: gradient over bound is 0 where the rows' pulls
        cancel and 1 where they all pull one way, whatever the units.
        """
        s, p = theta.shape
        with np.errstate(all="ignore"):
            jet = self.surface.evaluate(theta, self.x, derivatives=True)
            y = np.broadcast_to(jet.value, (s, self.rows))
            against = self.target if target is None else target
            r = (np.log(y) if self.log_scale else y) - against
        w = np.ones_like(r) if weights is None else np.broadcast_to(weights, r.shape)
        if self.overestimate != 1:
            w = np.where(r > 0, self.overestimate, 1.0) * w
        r = np.where(w > 0, r, 0.0)  # a row that does not count may lie outside the law's domain
        value = (huber(r, self.delta) * w).sum(axis=1)
        jacobian = np.zeros((s, p, self.rows))
        inverse = 1.0 / y if self.log_scale else None
        for i, by in jet.grad.items():
            jacobian[:, i] = by if inverse is None else by * inverse
        irls = np.minimum(1.0, self.delta / np.maximum(np.abs(r), 1e-300))
        psi = w * irls * r
        gradient = (jacobian @ psi[:, :, None])[:, :, 0]
        rounding = RESIDUAL_ROUNDING * max(1.0, float(np.abs(against).max()))
        bound = (np.abs(jacobian) @ (np.abs(psi) + w * rounding)[:, :, None])[:, :, 0]
        transposed = np.swapaxes(jacobian, 1, 2)
        gauss = (jacobian * (w * irls)[:, None, :]) @ transposed
        inside = w * (np.abs(r) <= self.delta)
        # of ln y: (d2 y) / y - J J'; of y: d2 y
        exact = (jacobian * (inside - psi if self.log_scale else inside)[:, None, :]) @ transposed
        pull = psi if inverse is None else psi * inverse
        for (i, j), by in jet.hess.items():
            curved = (pull * by).sum(axis=1)
            exact[:, i, j] += curved
            if i != j:
                exact[:, j, i] += curved
        return value, gradient, bound, gauss, exact

    def with_knee(self, delta: float) -> "Problem":
        """The same under another knee of the Huber loss."""
        return replace(self, delta=delta)


@dataclass(frozen=True)
class Minima:
    """Where the minimiser ended, for each of S starts or draws.

    Attributes:
        theta: ``[S, P]``.
        objective: ``[S]``.
        gradient: ``[S]`` largest component of the gradient relative to its bound, components
            that push against an active bound of theta left out.
        at_bound: ``[S, P]`` parameters on a bound.
        exhausted: ``[S]`` whether the iterations ran out.
    """

    theta: Array
    objective: Array
    gradient: Array
    at_bound: npt.NDArray[np.bool_]
    exhausted: npt.NDArray[np.bool_]


def minimise(
    problem: Problem,
    starts: Array,
    weights: Array | None = None,
    target: Array | None = None,
    tolerance: float = 1e-3 * GRADIENT_TOLERANCE,
    max_iterations: int = 300,
) -> Minima:
    """Minimise from each row of ``starts [S, P]``.

    Args:
        weights: ``[rows]`` for all or ``[S, rows]`` for each.
        target: ``[S, rows]`` in place of the problem's.
        tolerance: relative gradient at which a start is done; by default well below what the
            certificate asks, since the last steps converge quadratically and cost little.
    """
    size = max(1, CHUNK // (problem.rows * max(1, problem.surface.n_free)))

    def part(values: Array | None, i: int) -> Array | None:
        return values if values is None or values.ndim == 1 else values[i : i + size]

    parts = [
        _minimise(
            problem, starts[i : i + size], part(weights, i), part(target, i), tolerance,
            max_iterations,
        )
        for i in range(0, len(starts), size)
    ]  # fmt: skip
    return Minima(
        theta=np.concatenate([p.theta for p in parts]),
        objective=np.concatenate([p.objective for p in parts]),
        gradient=np.concatenate([p.gradient for p in parts]),
        at_bound=np.concatenate([p.at_bound for p in parts]),
        exhausted=np.concatenate([p.exhausted for p in parts]),
    )


def settle(problem: Problem, found: Minima, weights: Array) -> Minima:
    """Minimise again what ended without a certificate.

    First by whole Newton steps that only have to lower the gradient: near an optimum the objective
    no longer changes in the digits it has. What is still open is minimised under a knee that
    shrinks to the problem's: where the knee is small beside the residuals, the objective is a
    polygon whose optimum goes through some of the points, and from afar steps jump from edge to
    edge; under a wider knee it is round, and each optimum is close to the next.

    Args:
        weights: ``[rows]``.
    """
    found = _sharpened(problem, found, weights)
    left = _open(found)
    if not len(left) or np.isinf(problem.delta):
        return found
    residuals = problem.fitted(found.theta[left]) - problem.target
    widest = float(np.median(np.abs(residuals[:, weights > 0])))
    theta = found.theta[left]
    for knee in np.geomspace(max(widest, 2 * problem.delta), 2 * problem.delta, KNEES):
        wider = problem.with_knee(float(knee))
        theta = minimise(wider, theta, weights, max_iterations=KNEE_ITERATIONS).theta
    again = _sharpened(problem, minimise(problem, theta, weights), weights)
    better = (again.objective <= found.objective[left]) & (again.gradient < found.gradient[left])
    return _replaced(found, left[better], again, np.flatnonzero(better))


def _open(found: Minima) -> npt.NDArray[np.intp]:
    """Ends without a certificate that may still become the best, at most ``SETTLED``."""
    near = found.objective <= found.objective.min() * (1 + NEAR)
    left = np.flatnonzero((found.gradient > GRADIENT_TOLERANCE) & near)
    return left[np.argsort(found.objective[left], kind="stable")[:SETTLED]]


def _replaced(
    found: Minima, ends: npt.NDArray[np.intp], by: Minima, some: npt.NDArray[np.intp]
) -> Minima:
    """``found`` with its rows ``ends`` taken from the rows ``some`` of another."""
    columns = ("theta", "objective", "gradient", "at_bound", "exhausted")
    new = {name: getattr(found, name).copy() for name in columns}
    for name in columns:
        new[name][ends] = getattr(by, name)[some]
    return Minima(**new)


def _sharpened(problem: Problem, found: Minima, weights: Array) -> Minima:
    lower, upper = problem.surface.lower, problem.surface.upper
    for _ in range(SHARPENINGS):
        left = _open(found)
        if not len(left):
            break
        theta = found.theta[left]
        _, gradient, _, _, exact = problem.derivatives(theta, weights)
        stuck = ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
        free = ~stuck
        eye = np.eye(theta.shape[1])
        system = np.where(free[:, :, None] & free[:, None, :], exact, eye)
        trial = np.clip(theta + _solve(system, -np.where(stuck, 0.0, gradient)), lower, upper)
        again = minimise(problem, trial, weights, max_iterations=0)
        better = (again.gradient < found.gradient[left]) & (
            again.objective <= found.objective[left] * (1 + 1e-12)
        )
        if not better.any():
            break
        found = _replaced(found, left[better], again, np.flatnonzero(better))
    return found


def _minimise(
    problem: Problem,
    starts: Array,
    weights: Array | None,
    target: Array | None,
    tolerance: float,
    max_iterations: int,
) -> Minima:
    lower, upper = problem.surface.lower, problem.surface.upper
    theta = np.clip(starts, lower, upper)
    n, p = theta.shape
    objective = problem.objective(theta, weights, target)
    relative = np.full(n, np.inf)
    damping = np.full(n, 1e-2)
    todo = np.flatnonzero(np.isfinite(objective))  # no law at the start: nothing to descend
    eye = np.eye(p)

    def of(values: Array | None, some: npt.NDArray[np.intp]) -> Array | None:
        return values if values is None or values.ndim == 1 else values[some]

    for _ in range(max_iterations):
        w, t = of(weights, todo), of(target, todo)
        value, gradient, bound, gauss, exact = problem.derivatives(theta[todo], w, t)
        now = theta[todo]
        stuck = ((now <= lower) & (gradient > 0)) | ((now >= upper) & (gradient < 0))
        gradient = np.where(stuck, 0.0, gradient)
        objective[todo] = value
        relative[todo] = np.max(np.abs(gradient) / (bound + 1e-300), axis=1)
        more = (relative[todo] > tolerance) & (damping[todo] < 1e13)
        if not more.any():
            todo = todo[:0]
            break
        todo, now, value = todo[more], now[more], value[more]
        gradient, stuck = gradient[more], stuck[more]
        w, t = of(weights, todo), of(target, todo)
        scale = np.einsum("sii->si", gauss[more])
        scale = scale + 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300
        ridge = eye * (damping[todo, None] * scale)[:, None, :]
        free = ~stuck
        best, best_value = now, value
        for curvature in (gauss[more], exact[more]):
            system = np.where(free[:, :, None] & free[:, None, :], curvature + ridge, eye)
            step = _solve(system, -gradient)
            trial = np.clip(now + step, lower, upper)
            trial_value = problem.objective(trial, w, t)
            better = trial_value < best_value
            best = np.where(better[:, None], trial, best)
            best_value = np.where(better, trial_value, best_value)
        moved = best_value < value
        theta[todo] = best
        damping[todo] = np.where(moved, np.maximum(damping[todo] / 6, 1e-14), damping[todo] * 5)
    exhausted = np.zeros(n, dtype=bool)
    exhausted[todo] = max_iterations > 0
    theta = problem.surface.ordered(theta)
    finite = np.isfinite(objective)
    if finite.any():
        w, t = of(weights, np.flatnonzero(finite)), of(target, np.flatnonzero(finite))
        value, gradient, bound, _, _ = problem.derivatives(theta[finite], w, t)
        ended = theta[finite]
        pushing = ((ended <= lower) & (gradient > 0)) | ((ended >= upper) & (gradient < 0))
        objective[finite] = value
        relative[finite] = np.max(
            np.abs(np.where(pushing, 0.0, gradient)) / (bound + 1e-300), axis=1
        )
    at_bound = (theta <= lower) | (theta >= upper)
    return Minima(theta, objective, relative, at_bound, exhausted)


def _solve(system: Array, rhs: Array) -> Array:
    """Batched solve; a singular system gives a zero step, which raises the damping."""
    try:
        steps = np.asarray(np.linalg.solve(system, rhs[:, :, None])[:, :, 0])
    except np.linalg.LinAlgError:
        steps = np.zeros_like(rhs)
        for i, matrix in enumerate(system):
            try:
                steps[i] = np.linalg.solve(matrix, rhs[i])
            except np.linalg.LinAlgError:
                continue
    return np.where(np.isfinite(steps), steps, 0.0)
