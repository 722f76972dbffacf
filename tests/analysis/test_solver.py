"""Derivatives against finite differences, optima against scipy."""

import numpy as np
import pytest
from scipy.optimize import minimize

from scaling.analysis.solver import Problem, best_starts, minimise, scatter_starts


def problem(k: int, floor: bool, delta: float, noise: float = 0.02) -> Problem:
    rng = np.random.default_rng(k)
    log_x = rng.uniform(0, 6, size=(30, k))
    y = 1.5 * floor + np.exp(0.5 - 0.3 * log_x).sum(axis=1)
    return Problem(log_x, np.log(y) + rng.normal(0, noise, 30), floor, delta)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("delta", [1e-2, float("inf")])
def test_gradient_and_hessian_are_those_of_finite_differences(
    k: int, floor: bool, delta: float
) -> None:
    p = problem(k, floor, delta)
    weights = np.random.default_rng(1).integers(0, 3, size=(1, 30)).astype(float)
    theta = scatter_starts(p, 1, np.random.default_rng(2))
    value, gradient, bound, _, hessian = p.derivatives(theta, weights)
    assert value == pytest.approx(p.objective(theta, weights), rel=1e-14)
    assert np.all(np.abs(gradient) <= bound)
    # central differences: truncation h^2 and rounding 1e-16 / h balance near h = 1e-5
    h = 1e-5
    for j in range(p.n_free):
        step = np.zeros_like(theta)
        step[0, j] = h
        up, down = p.derivatives(theta + step, weights), p.derivatives(theta - step, weights)
        assert gradient[0, j] == pytest.approx((up[0] - down[0])[0] / (2 * h), rel=1e-6, abs=1e-8)
        column = (up[1] - down[1])[0] / (2 * h)
        # a row whose residual crosses the knee between the two points bends the difference
        assert hessian[0, :, j] == pytest.approx(column, rel=1e-3, abs=1e-2)


def test_gauss_newton_is_the_hessian_of_least_squares_without_residuals() -> None:
    p = problem(2, True, float("inf"), noise=0.0)
    exact = np.array([[1.5, 0.5, 0.5, 0.3, 0.3]])
    exact[0, 1:3] -= 0.3 * p.centre
    _, _, _, gauss, hessian = p.derivatives(exact)
    np.testing.assert_allclose(gauss, hessian, atol=1e-12)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("delta", [1e-3, 1e-2, float("inf")])
def test_no_general_minimiser_finds_a_lower_optimum(floor: bool, delta: float) -> None:
    p = problem(2, floor, delta)
    starts = best_starts(p, scatter_starts(p, 300, np.random.default_rng(0)), 8)
    ours = minimise(p, starts)
    best = ours.objective.min()
    for start in starts:
        theirs = minimize(
            lambda t: float(p.objective(np.asarray(t)[None])[0]) / best,
            start, method="L-BFGS-B", bounds=np.transpose(p.bounds),
        )  # fmt: skip
        assert theirs.fun >= 1 - 1e-7


def test_weights_are_repetitions() -> None:
    p = problem(1, True, 1e-2)
    times = np.random.default_rng(3).integers(1, 4, size=30)
    repeated = Problem(np.repeat(p.log_x, times, axis=0), np.repeat(p.log_y, times), True, p.delta)
    starts = scatter_starts(p, 10, np.random.default_rng(0))
    weighted = minimise(p, starts, np.tile(times.astype(float), (10, 1)))
    alone = minimise(repeated, starts)
    assert weighted.objective.min() == pytest.approx(alone.objective.min(), rel=1e-9)
    np.testing.assert_allclose(
        p.predict(weighted.theta[[weighted.objective.argmin()]], p.log_x),
        repeated.predict(alone.theta[[alone.objective.argmin()]], p.log_x),
        rtol=1e-6,
    )


def test_batches_larger_than_a_chunk_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(1, True, 1e-2)
    starts = scatter_starts(p, 9, np.random.default_rng(0))
    together = minimise(p, starts)
    monkeypatch.setattr("scaling.analysis.solver._CHUNK", 4 * 30 * p.n_free)
    apart = minimise(p, starts)
    np.testing.assert_allclose(together.objective, apart.objective, rtol=1e-9)
    assert apart.theta.shape == (9, p.n_free)


def test_a_floor_that_is_not_there_ends_on_its_bound() -> None:
    x = np.linspace(0, 5, 20)
    p = Problem(x[:, None], -0.4 * x, True, 1e-3)
    found = minimise(p, scatter_starts(p, 5, np.random.default_rng(0)))
    i = found.objective.argmin()
    assert found.theta[i, 0] == pytest.approx(0, abs=1e-9)
    assert found.theta[i, 2] == pytest.approx(0.4, rel=1e-6)


def test_a_singular_system_does_not_stop_the_others() -> None:
    # the two factors are one: their exponents and scales can trade without end
    x = np.linspace(0, 3, 12)
    p = Problem(np.column_stack([x, x]), np.log(2 * np.exp(-0.3 * x)), False, 1e-3)
    found = minimise(p, scatter_starts(p, 6, np.random.default_rng(0)))
    assert found.objective.min() < 1e-12
