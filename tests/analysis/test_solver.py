"""The minimiser: optima against scipy, weights, chunks, bounds. Derivatives: test_recovery."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog, minimize

from scaling.analysis import FitStatus, Objective, fit_power_law
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.solver import Problem, minimise
from scaling.analysis.fitting.starts import best, scatter
from scaling.analysis.fitting.surface import Surface

INF = float("inf")


def bind(x: np.ndarray, y: np.ndarray, floor: bool, delta: float) -> Problem:
    columns = {f"x{i}": x[:, i] for i in range(x.shape[1])}
    form = Form.parse("E + " * floor + " + ".join(columns))
    surface = Surface.of(form, columns, y)
    return Problem(surface, surface.transform(columns), np.log(y), delta=delta)


def problem(k: int, floor: bool, delta: float, noise: float = 0.02) -> Problem:
    rng = np.random.default_rng(k)
    log_x = rng.uniform(0, 6, size=(30, k))
    y = 1.5 * floor + np.exp(0.5 - 0.3 * log_x).sum(axis=1)
    return bind(np.exp(log_x), y * np.exp(rng.normal(0, noise, 30)), floor, delta)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("delta", [1e-3, 1e-2, INF])
def test_no_general_minimiser_finds_a_lower_optimum(floor: bool, delta: float) -> None:
    p = problem(2, floor, delta)
    starts = best(p, scatter(p, 300, np.random.default_rng(0)), 8, np.ones(30))
    ours = minimise(p, starts)
    lowest = ours.objective.min()
    for start in starts:
        theirs = minimize(
            lambda t: float(p.objective(np.asarray(t)[None])[0]) / lowest,
            start, method="L-BFGS-B",
            bounds=np.transpose([p.surface.lower, p.surface.upper]),
        )  # fmt: skip
        assert theirs.fun >= 1 - 1e-7


def test_gauss_newton_is_the_hessian_of_least_squares_without_residuals() -> None:
    p = problem(2, True, INF, noise=0.0)
    exact = p.surface.theta(
        {
            "irreducible": 1.5,
            **{f"coefficient.x{i}": np.exp(0.5) for i in range(2)},
            **{f"exponent.x{i}": 0.3 for i in range(2)},
        }
    )
    _, gradient, _, gauss, hessian = p.derivatives(exact[None])
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    np.testing.assert_allclose(gauss, hessian, atol=1e-12)


def test_weights_are_repetitions() -> None:
    rng = np.random.default_rng(1)
    x = np.exp(rng.uniform(0, 6, size=(30, 1)))
    y = (1.5 + np.exp(0.5) * x[:, 0] ** -0.3) * np.exp(rng.normal(0, 0.02, 30))
    times = np.random.default_rng(3).integers(1, 4, size=30)
    p = bind(x, y, True, 1e-2)
    repeated = bind(np.repeat(x, times, axis=0), np.repeat(y, times), True, 1e-2)
    weighted = minimise(p, scatter(p, 10, rng), times.astype(float))
    alone = minimise(repeated, scatter(repeated, 10, rng))
    assert weighted.objective.min() == pytest.approx(alone.objective.min(), rel=1e-9)
    new = {"x0": np.array([0.5, 30.0, 1e4])}
    np.testing.assert_allclose(
        p.surface.values(weighted.theta[[weighted.objective.argmin()]], new),
        repeated.surface.values(alone.theta[[alone.objective.argmin()]], new),
        rtol=1e-6,
    )


def test_batches_larger_than_a_chunk_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(1, True, 1e-2)
    starts = scatter(p, 9, np.random.default_rng(0))
    weights = np.random.default_rng(1).integers(1, 4, size=(9, 30)).astype(float)
    together = minimise(p, starts, weights)
    monkeypatch.setattr("scaling.analysis.fitting.solver.CHUNK", 4 * 30 * p.surface.n_free)
    apart = minimise(p, starts, weights)
    np.testing.assert_allclose(together.objective, apart.objective, rtol=1e-9)
    assert apart.theta.shape == (9, p.surface.n_free)


def test_draws_may_have_their_own_targets() -> None:
    p = problem(1, True, INF)
    targets = p.target + np.random.default_rng(5).normal(0, 0.02, size=(3, 30))
    starts = np.tile(minimise(p, scatter(p, 5, np.random.default_rng(0))).theta[:1], (3, 1))
    together = minimise(p, starts, target=targets)
    for i in range(3):
        alone = Problem(p.surface, p.x, targets[i])
        found = minimise(alone, scatter(alone, 5, np.random.default_rng(0)))
        assert together.objective[i] == pytest.approx(found.objective.min(), rel=1e-9)


def test_a_floor_that_is_not_there_ends_on_its_bound() -> None:
    x = np.exp(np.linspace(0, 5, 20))
    p = bind(x[:, None], x**-0.4, True, 1e-3)
    found = minimise(p, scatter(p, 5, np.random.default_rng(0)))
    params = p.surface.public(found.theta[[found.objective.argmin()]]).iloc[0]
    assert params["irreducible"] == pytest.approx(0, abs=1e-9)
    assert params["exponent"] == pytest.approx(0.4, rel=1e-6)


def test_a_singular_system_does_not_stop_the_others() -> None:
    # the two factors are one: their exponents and scales can trade without end
    x = np.exp(np.linspace(0, 3, 12))
    p = bind(np.column_stack([x, x]), 2 * x**-0.3, False, 1e-3)
    found = minimise(p, scatter(p, 6, np.random.default_rng(0)))
    assert found.objective.min() < 1e-12


def test_a_start_where_the_law_has_no_value_is_left_where_it_is() -> None:
    x = np.linspace(1, 5, 20)
    columns = {"x": x}
    surface = Surface.of(Form.parse("E - exp(x)"), columns, x)
    p = Problem(surface, surface.transform(columns), np.log(x))
    below = surface.theta({"irreducible": 0.5, "coefficient": 50.0, "rate": 0.1})
    good = surface.theta({"irreducible": 8.0, "coefficient": 9.0, "rate": 0.2})
    found = minimise(p, np.stack([below, good]))
    assert np.isinf(found.objective[0])
    assert found.objective[1] < 0.1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("n", [6, 7, 30])
def test_least_absolute_deviations_are_those_of_the_linear_program(seed: int, n: int) -> None:
    """Without a floor ln y is linear in the parameters, and the optimum a corner of a polytope."""
    rng = np.random.default_rng(seed)
    x = np.exp(rng.uniform(0, 5, n))
    y = 3 * x**-0.2 * np.exp(rng.standard_t(2, n) * 0.02)
    fit = fit_power_law(
        pd.DataFrame({"x": x, "y": y}), x="x", y="y", objective=Objective("lad"), n_boot=0
    )
    assert fit.status in (FitStatus.CONVERGED, FitStatus.FEW_AGREE), fit.message
    design = np.column_stack([np.ones(n), -np.log(x)])
    above = np.hstack([design, -np.eye(n)])
    below = np.hstack([-design, -np.eye(n)])
    program = linprog(
        np.r_[0, 0, np.ones(n)], np.vstack([above, below]), np.r_[np.log(y), -np.log(y)],
        bounds=[(None, None)] * 2 + [(0, None)] * n,
    )  # fmt: skip
    assert fit.certificate.objective == pytest.approx(program.fun, rel=1e-3)
    assert fit.params["exponent"] == pytest.approx(program.x[1], rel=5e-3)
