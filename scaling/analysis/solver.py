"""Numerics of the fits: the additive power law on the log scale under a Huber loss.

The law is ``y = E + sum_k (x_k / s_k) ** -p_k`` with an optional floor E. With ``u_k = ln x_k``
less its mean (centring takes away most of the correlation of scale and exponent) it reads

    y = E + sum_k exp(c_k - p_k u_k),    theta = (E, c_1..c_K, p_1..p_K),

and the objective is ``sum_i w_i huber_delta(ln yhat_i - ln y_i)`` (Hoffmann et al. 2022, eq. 3;
delta = 1e-3 there). E itself is the parameter, not its logarithm, so that a floor of zero is a
bound that one step reaches. Everything below is batched over S problems that share their data:
starts (other theta) or bootstrap draws (other weights w).

The minimiser is a damped Newton method that tries, at every iteration, two curvature matrices and
keeps the better step: the reweighted Gauss-Newton matrix, which majorises the Huber loss and is
therefore safe far from the optimum, and the exact Hessian, which converges quadratically near it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

GRADIENT_TOLERANCE = 1e-7
"""An optimum is certified when the relative gradient (see ``Minima.gradient``) is below this."""
RESIDUAL_ROUNDING = 1e-8
"""Log residuals below this (times the largest ln y above 1) are rounding: they do not count against
the certificate."""
EXPONENT_BOUNDS = (1e-4, 10.0)
TERM_DEPTH = float(np.log(1e6))
"""At the centre of the data no term may fall below a millionth of the smallest y."""
_CHUNK = 4_000_000
"""Numbers in the largest temporary array, so that memory stays small at any number of draws."""


@dataclass(frozen=True)
class Problem:
    """Data and form of one additive law.

    Attributes:
        log_x: ``[rows, K]`` natural logarithms of the factors, not centred.
        log_y: ``[rows]`` natural logarithm of the measured values.
        floor: whether the law has an irreducible part E.
        delta: knee of the Huber loss, in units of ln y; ``inf`` gives least squares in ln y.
    """

    log_x: Array
    log_y: Array
    floor: bool
    delta: float

    @property
    def n_terms(self) -> int:
        return int(self.log_x.shape[1])

    @property
    def n_free(self) -> int:
        return 2 * self.n_terms + self.floor

    @cached_property
    def centre(self) -> Array:
        """``[K]`` mean of ``log_x``."""
        return np.asarray(self.log_x.mean(axis=0))

    @cached_property
    def u(self) -> Array:
        """``[rows, K]`` centred ``log_x``."""
        return np.asarray(self.log_x - self.centre)

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, ``[P]`` each."""
        low, high = float(self.log_y.min()), float(self.log_y.max())
        k = self.n_terms
        lower = [0.0] * self.floor + [low - TERM_DEPTH] * k + [EXPONENT_BOUNDS[0]] * k
        upper = [np.exp(high)] * self.floor + [high + 5.0] * k + [EXPONENT_BOUNDS[1]] * k
        return np.array(lower), np.array(upper)

    def log_terms(self, theta: Array, u: Array) -> Array:
        """``[S, rows, terms]`` logarithm of every term, the floor first where there is one."""
        f, k = int(self.floor), self.n_terms
        c, p = theta[:, None, f : f + k], theta[:, None, f + k :]
        terms = c - p * u[None]
        if self.floor:
            with np.errstate(divide="ignore"):
                log_e = np.log(theta[:, None, :1])
            terms = np.concatenate([np.broadcast_to(log_e, (*terms.shape[:2], 1)), terms], axis=2)
        return np.asarray(terms)

    def predict(self, theta: Array, log_x: Array) -> Array:
        """``[S, m]`` ln y at ``log_x [m, K]`` for every row of ``theta [S, P]``."""
        return _logsumexp(self.log_terms(theta, log_x - self.centre))[0]

    def objective(self, theta: Array, weights: Array | None = None) -> Array:
        """``[S]`` weighted sum of Huber losses; ``weights [S, rows]``, one each by default."""
        r = _logsumexp(self.log_terms(theta, self.u))[0] - self.log_y
        return _total(_huber(r, self.delta), weights)

    def derivatives(
        self, theta: Array, weights: Array | None = None
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Objective ``[S]``, gradient ``[S, P]``, its bound ``[S, P]``, Gauss-Newton and exact
        Hessian ``[S, P, P]``.

        The bound is ``sum_i w_i |psi_i J_ij|``: gradient over bound is 0 where the rows' pulls
        cancel and 1 where they all pull one way, whatever the units.
        """
        f, k = int(self.floor), self.n_terms
        log_yhat, share = _logsumexp(self.log_terms(theta, self.u))
        r = log_yhat - self.log_y
        value = _total(_huber(r, self.delta), weights)
        terms = share[:, :, f:]
        by_floor = np.exp(-log_yhat)[:, :, None][:, :, :f]
        jac = np.concatenate([by_floor, terms, -terms * self.u[None]], axis=2)
        w = np.ones_like(r) if weights is None else weights
        irls = np.minimum(1.0, self.delta / np.maximum(np.abs(r), 1e-300))
        psi = w * irls * r
        gradient = np.einsum("si,sip->sp", psi, jac)
        floor_of_psi = np.abs(psi) + w * RESIDUAL_ROUNDING * max(1.0, np.abs(self.log_y).max())
        bound = np.einsum("si,sip->sp", floor_of_psi, np.abs(jac))
        gauss = np.swapaxes(jac * (w * irls)[:, :, None], 1, 2) @ jac
        inside = w * (np.abs(r) <= self.delta)
        exact = np.swapaxes(jac * (inside - psi)[:, :, None], 1, 2) @ jac
        # second derivative of ln(sum of terms): sum_t share_t a_t a_t' - J J' with a_t = (1, -u) at
        # (c_t, p_t); the floor is linear and adds nothing
        for t in range(k):
            pull = psi * terms[:, :, t]
            c, p, u = f + t, f + k + t, self.u[:, t]
            exact[:, c, c] += pull.sum(axis=1)
            cross = -pull @ u
            exact[:, c, p] += cross
            exact[:, p, c] += cross
            exact[:, p, p] += pull @ u**2
        return value, gradient, bound, gauss, exact


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
    tolerance: float = 1e-3 * GRADIENT_TOLERANCE,
    max_iterations: int = 300,
) -> Minima:
    """Minimise from each row of ``starts [S, P]``, under ``weights [S, rows]`` if given.

    Args:
        tolerance: relative gradient at which a start is done; by default well below what the
            certificate asks, since the last steps converge quadratically and cost little.
    """
    size = max(1, _CHUNK // (problem.log_y.size * problem.n_free))
    parts = [
        _minimise(
            problem,
            starts[i : i + size],
            None if weights is None else weights[i : i + size],
            tolerance,
            max_iterations,
        )
        for i in range(0, len(starts), size)
    ]
    return Minima(
        theta=np.concatenate([p.theta for p in parts]),
        objective=np.concatenate([p.objective for p in parts]),
        gradient=np.concatenate([p.gradient for p in parts]),
        at_bound=np.concatenate([p.at_bound for p in parts]),
        exhausted=np.concatenate([p.exhausted for p in parts]),
    )


def _minimise(
    problem: Problem,
    starts: Array,
    weights: Array | None,
    tolerance: float,
    max_iterations: int,
) -> Minima:
    lower, upper = problem.bounds
    theta = np.clip(starts, lower, upper)
    n, p = theta.shape
    objective = np.full(n, np.inf)
    relative = np.full(n, np.inf)
    damping = np.full(n, 1e-2)
    todo = np.arange(n)
    eye = np.eye(p)
    for _ in range(max_iterations):
        w = None if weights is None else weights[todo]
        value, gradient, bound, gauss, exact = problem.derivatives(theta[todo], w)
        now = theta[todo]
        stuck = ((now <= lower) & (gradient > 0)) | ((now >= upper) & (gradient < 0))
        gradient = np.where(stuck, 0.0, gradient)
        objective[todo] = value
        relative[todo] = np.max(np.abs(gradient) / bound, axis=1)
        more = (relative[todo] > tolerance) & (damping[todo] < 1e13)
        if not more.any():
            todo = todo[:0]
            break
        todo, now, value = todo[more], now[more], value[more]
        gradient, stuck = gradient[more], stuck[more]
        w = None if w is None else w[more]
        scale = np.einsum("sii->si", gauss[more])
        scale = scale + 1e-12 * scale.max(axis=1, keepdims=True) + 1e-300
        ridge = eye * (damping[todo, None] * scale)[:, None, :]
        free = ~stuck
        best, best_value = now, value
        for curvature in (gauss[more], exact[more]):
            system = np.where(free[:, :, None] & free[:, None, :], curvature + ridge, eye)
            step = _solve(system, -gradient)
            trial = np.clip(now + step, lower, upper)
            trial_value = problem.objective(trial, w)
            better = trial_value < best_value
            best = np.where(better[:, None], trial, best)
            best_value = np.where(better, trial_value, best_value)
        moved = best_value < value
        theta[todo] = best
        damping[todo] = np.where(moved, np.maximum(damping[todo] / 6, 1e-14), damping[todo] * 5)
    exhausted = np.zeros(n, dtype=bool)
    exhausted[todo] = True
    w = weights
    value, gradient, bound, _, _ = problem.derivatives(theta, w)
    at_bound = (theta <= lower) | (theta >= upper)
    pushing = ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
    relative = np.max(np.abs(np.where(pushing, 0.0, gradient)) / bound, axis=1)
    return Minima(theta, value, relative, at_bound, exhausted)


def scatter_starts(problem: Problem, n: int, rng: np.random.Generator) -> Array:
    """``[n, P]`` starts at the data's own scale.

    At the centre of the data the terms share the geometric mean of y in random proportions;
    exponents are log-uniform between 0.02 and 2.
    """
    k, f = problem.n_terms, int(problem.floor)
    middle = float(problem.log_y.mean())
    if problem.floor:
        floor = rng.uniform(0.0, 0.95, size=(n, 1))
        rest = rng.dirichlet(np.ones(k), size=n) * (1 - floor)
        shares = np.concatenate([floor, rest], axis=1)
    else:
        shares = rng.dirichlet(np.ones(k), size=n)
    starts = np.empty((n, problem.n_free))
    starts[:, :f] = shares[:, :f] * np.exp(middle)
    starts[:, f : f + k] = middle + np.log(np.maximum(shares[:, f:], 1e-6))
    starts[:, f + k :] = np.exp(rng.uniform(np.log(0.02), np.log(2.0), size=(n, k)))
    return np.clip(starts, *problem.bounds)


def best_starts(problem: Problem, starts: Array, n: int, weights: Array | None = None) -> Array:
    """The ``n`` starts with the smallest objective; ``weights [1, rows]`` hold for all of them."""
    size = max(1, _CHUNK // (problem.log_y.size * problem.n_free))
    scores = np.concatenate(
        [problem.objective(starts[i : i + size], weights) for i in range(0, len(starts), size)]
    )
    return np.asarray(starts[np.argsort(scores, kind="stable")[:n]])


def _solve(system: Array, rhs: Array) -> Array:
    """Batched solve; a singular system gives a zero step, which raises the damping."""
    try:
        return np.asarray(np.linalg.solve(system, rhs[:, :, None])[:, :, 0])
    except np.linalg.LinAlgError:
        steps = np.zeros_like(rhs)
        for i, matrix in enumerate(system):
            try:
                steps[i] = np.linalg.solve(matrix, rhs[i])
            except np.linalg.LinAlgError:
                continue
        return steps


def _logsumexp(terms: Array) -> tuple[Array, Array]:
    """Log of the sum over the last axis, and each term's share of it."""
    top = terms.max(axis=-1, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(axis=-1, keepdims=True)
    return np.asarray((np.log(total) + top)[..., 0]), np.asarray(parts / total)


def _huber(r: Array, delta: float) -> Array:
    size = np.abs(r)
    if np.isinf(delta):
        return np.asarray(0.5 * size**2)
    return np.asarray(np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)))


def _total(loss: Array, weights: Array | None) -> Array:
    return np.asarray(loss.sum(axis=1) if weights is None else (loss * weights).sum(axis=1))
