"""Derivatives of jets: closed forms, finite differences, and a number that an equation defines."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.analysis.fitting import jets
from scaling.analysis.fitting.jets import Array, Jet

values = st.floats(-3, 3, allow_nan=False)


def variables(*x: float) -> list[Jet]:
    """Independent parameters 0, 1, ... as [1, 1] jets."""
    one = np.ones((1, 1))
    return [Jet(np.full((1, 1), v), {i: one}) for i, v in enumerate(x)]


def dense(jet: Jet, n: int) -> tuple[float, Array, Array]:
    gradient, hessian = np.zeros(n), np.zeros((n, n))
    for i, by in jet.grad.items():
        gradient[i] = by.item()
    for (i, j), by in jet.hess.items():
        assert i <= j
        hessian[i, j] = hessian[j, i] = by.item()
    return jet.value.item(), gradient, hessian


def differences(f: Callable[..., float], x: list[float]) -> tuple[Array, Array]:
    """Central differences: for the gradient of O(h^4), for the Hessian of O(h^2)."""
    n, h = len(x), 1e-3

    def at(*steps: tuple[int, float]) -> float:
        moved = list(x)
        for i, step in steps:
            moved[i] += step
        return f(*moved)

    gradient = [
        (8 * (at((i, h)) - at((i, -h))) - (at((i, 2 * h)) - at((i, -2 * h)))) / (12 * h)
        for i in range(n)
    ]
    hessian = [
        [
            (at((i, h), (j, h)) - at((i, h), (j, -h)) - at((i, -h), (j, h)) + at((i, -h), (j, -h)))
            / (4 * h * h)
            for j in range(n)
        ]
        for i in range(n)
    ]
    return np.array(gradient), np.array(hessian)


@pytest.mark.parametrize(
    ("jet", "value", "first", "second"),
    [
        (jets.exp, np.exp, np.exp, np.exp),
        (jets.log, np.log, lambda x: 1 / x, lambda x: -1 / x**2),
        (jets.reciprocal, lambda x: 1 / x, lambda x: -1 / x**2, lambda x: 2 / x**3),
        (
            jets.softplus,
            lambda x: np.log1p(np.exp(x)),
            lambda x: 1 / (1 + np.exp(-x)),
            lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2,
        ),
    ],
)
@given(x=st.floats(0.05, 20))
def test_functions_have_the_derivatives_of_their_closed_forms(
    jet: Callable[[Jet], Jet], value, first, second, x: float
) -> None:
    got = dense(jet(variables(x)[0]), 1)
    assert got[0] == pytest.approx(value(x), rel=1e-14, abs=1e-15)
    assert got[1][0] == pytest.approx(first(x), rel=1e-13)
    assert got[2][0, 0] == pytest.approx(second(x), rel=1e-9)  # a share near 1 has lost digits


def test_softplus_neither_overflows_nor_loses_its_tail() -> None:
    x = Jet(np.array([[-800.0, 800.0]]), {0: np.ones((1, 2))})
    out = jets.softplus(x)
    np.testing.assert_array_equal(out.value, [[0.0, 800.0]])
    np.testing.assert_array_equal(out.grad[0], [[0.0, 1.0]])
    assert np.isfinite(out.hess[0, 0]).all()


@settings(max_examples=50, deadline=None)
@given(a=values, b=values, c=values)
def test_the_algebra_of_jets_is_that_of_numbers(a: float, b: float, c: float) -> None:
    def f(a: float, b: float, c: float) -> float:
        return float(
            (a * b - c * 2.0 + 1.5) * np.exp(-0.3 * a * c) * np.log(4 + a) / (5 + b * b) + b * b * b
        )

    x, y, z = variables(a, b, c)
    jet = (x * y - z * 2.0 + 1.5) * jets.exp(x * z * -0.3) * jets.log(x + 4.0)
    jet = jet * jets.reciprocal(y * y + 5.0) + y * y * y
    value, gradient, hessian = dense(jet, 3)
    by_difference = differences(f, [a, b, c])
    assert value == pytest.approx(f(a, b, c), rel=1e-13, abs=1e-13)
    np.testing.assert_allclose(gradient, by_difference[0], rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(hessian, by_difference[1], rtol=1e-4, atol=1e-4)


def test_products_of_one_variable_count_its_square_once() -> None:
    (x,) = variables(3.0)
    assert dense(x * x, 1) == (9.0, np.array([6.0]), np.array([[2.0]]))
    assert dense(x * x * x, 1)[2].item() == 18.0
    assert dense(-(x * x), 1)[1].item() == -6.0


def test_what_does_not_depend_on_a_parameter_stores_nothing() -> None:
    x, y = variables(1.0, 2.0)
    jet = jets.exp(x) + y * 3.0 + np.ones((1, 1))
    assert set(jet.grad) == {0, 1}
    assert set(jet.hess) == {(0, 0)}
    assert not jets.exp(Jet(np.zeros((1, 1)))).grad


def test_batches_broadcast() -> None:
    """[S, 1] parameters beside [m] data give [S, m] values and derivatives."""
    theta, data = np.linspace(0.1, 1, 4)[:, None], np.linspace(-1, 1, 7)
    p = Jet(theta, {0: np.ones((1, 1))})
    out = jets.exp(p * data)
    np.testing.assert_allclose(out.value, np.exp(theta * data), rtol=1e-15)
    np.testing.assert_allclose(out.grad[0], data * np.exp(theta * data), rtol=1e-15)
    np.testing.assert_allclose(out.hess[0, 0], data**2 * np.exp(theta * data), rtol=1e-15)


@given(p=st.floats(0.1, 5), q=st.floats(-3, 3))
def test_the_root_of_an_equation_has_the_derivatives_of_its_closed_form(p: float, q: float) -> None:
    """s^2 + q s - p = 0, whose positive root is (sqrt(q^2 + 4 p) - q) / 2."""
    a, b = variables(p, q)
    root = np.array([[(np.sqrt(q * q + 4 * p) - q) / 2]])
    got = dense(jets.implicit(root, lambda s: (s * s + b * s - a, s * 2.0 + b)), 2)
    w = np.sqrt(q * q + 4 * p)
    assert got[0] == pytest.approx(root.item(), rel=1e-14)
    np.testing.assert_allclose(got[1], [1 / w, (q / w - 1) / 2], rtol=1e-10, atol=1e-12)
    second = np.array([[-2 / w**3, -q / w**3], [-q / w**3, 2 * p / w**3]])
    np.testing.assert_allclose(got[2], second, rtol=1e-8, atol=1e-10)


def test_a_root_without_parameters_stays_as_it_is() -> None:
    root = np.array([[2.0]])
    out = jets.implicit(root, lambda s: (s * s + -4.0, s * 2.0))
    assert out.value is root
    assert not out.grad
