"""Every form: values from formulas, derivatives from differences, planted laws found again, and the
optima that scipy finds."""

import math
import re
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from planted_laws import LAWS, Law, table
from scipy.optimize import least_squares

from scaling.analysis import FitStatus, Form, Objective, fit_law
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.prose import equation
from scaling.analysis.fitting.solver import Problem
from scaling.analysis.fitting.surface import Surface

every_law = pytest.mark.parametrize("law", LAWS, ids=str)
SCALES = ("log", "raw")


def bind(law: Law, df: pd.DataFrame) -> tuple[Surface, dict[str, Array]]:
    form = Form.parse(law.form)
    columns = {c: df[c].to_numpy() for c in form.columns}
    return Surface.of(form, columns, np.asarray(law.y(df))), columns


# ---- values -------------------------------------------------------------------------------------


@every_law
def test_values_are_those_of_the_published_formula(law: Law) -> None:
    df = table()
    surface, columns = bind(law, df)
    y = surface.values(surface.theta(law.params)[None], columns)
    np.testing.assert_allclose(y[0], law.y(df), rtol=1e-10)


@every_law
def test_terms_sum_to_the_law(law: Law) -> None:
    df = table()
    surface, columns = bind(law, df)
    theta = surface.theta(law.params)
    parts = surface.parts(theta, columns)
    if surface.form.outer:
        floor = parts.pop("irreducible", 0.0)
        total = floor + sum(parts.values()) ** law.params["outer"]
    else:
        total = sum(parts.values())
    np.testing.assert_allclose(total, law.y(df), rtol=1e-10)


@every_law
def test_public_parameters_and_theta_are_one_to_one(law: Law) -> None:
    surface, _ = bind(law, table())
    theta = surface.theta(law.params)
    public = surface.public(theta[None])
    assert list(public.columns) == surface.public_names
    for name, value in law.params.items():
        assert public.loc[0, name] == pytest.approx(value, rel=1e-9), name
    # every public name is enough on its own: a coefficient says what a scale says
    scales = [n for n in public.columns if n.partition(".")[0] == "scale"]
    others = public.iloc[0].drop(scales).to_dict()
    np.testing.assert_allclose(surface.theta(others), theta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", [law for law in LAWS if "saturating" not in law.form], ids=str)
def test_the_equation_evaluates_to_the_law(law: Law) -> None:
    """The printed line, read as Python, gives y; M4's defines s implicitly and cannot be read."""
    df = table()
    form = Form.parse(law.form)
    surface, _ = bind(law, df)
    public = surface.public(surface.theta(law.params)[None]).iloc[0]
    text = equation(form, "loss", {str(k): float(v) for k, v in public.items()})
    assert text.startswith("loss = ")
    got = eval(as_python(text.removeprefix("loss = ")), {c: df[c] for c in df} | {"np": np})
    np.testing.assert_allclose(got, law.y(df), rtol=2e-4)  # six digits of each number


def as_python(text: str) -> str:
    """``^`` to ``**``, and a product where two things stand side by side."""
    text = text.replace("e^(", "np.exp(").replace("^", "**").replace("ln a", "np.log(a)")
    return re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", text)


# ---- derivatives --------------------------------------------------------------------------------


def problem_at(law: Law, objective: Objective) -> tuple[Problem, Array]:
    """A problem and a theta [1, P] at which every residual is well away from the kinks of the
    losses, at 0 and at a knee of 0.02, so that differences do not step over one."""
    df = table(40)
    surface, columns = bind(law, df)
    theta = surface.theta(law.params)[None]
    theta = theta + 0.01 * (1 + np.abs(theta))
    rng = np.random.default_rng(3)
    size = np.where(rng.random(40) < 0.5, rng.uniform(0.003, 0.015, 40), rng.uniform(0.03, 0.1, 40))
    y = surface.values(theta, columns)[0]
    target = objective.target(y) + size * rng.choice([-1.0, 1.0], 40)
    inputs, logs = surface.transform(columns), objective.scale == "log"
    return Problem(
        surface, inputs, target, logs, objective.knee(0.01), objective.overestimate
    ), theta


OBJECTIVES = [
    Objective("mse"),
    Objective("huber", delta=0.02),
    Objective("huber", delta=0.02, overestimate=3.0),
    Objective("lad"),
]


@every_law
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["mse", "huber", "asymmetric", "lad"])
def test_gradient_and_hessian_are_those_of_finite_differences(
    law: Law, scale: Literal["log", "raw"], objective: Objective
) -> None:
    problem, theta = problem_at(law, replace(objective, scale=scale))
    weights = np.random.default_rng(1).uniform(0, 2, 40) * (np.arange(40) % 5 > 0)
    value, gradient, bound, gauss, hessian = problem.derivatives(theta, weights)
    assert value == pytest.approx(problem.objective(theta, weights), rel=1e-13)
    assert np.all(np.abs(gradient) <= bound)
    p = problem.surface.n_free
    h = 1e-5 * np.maximum(1.0, np.abs(theta[0]))
    around = np.concatenate([theta + np.diag(h), theta - np.diag(h)])
    values, gradients, _, _, _ = problem.derivatives(around, weights)
    slopes = (values[:p] - values[p:]) / (2 * h)
    np.testing.assert_allclose(gradient[0], slopes, rtol=1e-6, atol=1e-6 * bound[0].max())
    curvatures = (gradients[:p] - gradients[p:]) / (2 * h)[:, None]
    size = np.abs(hessian).max() + np.abs(gauss).max()
    np.testing.assert_allclose(hessian[0], curvatures, rtol=1e-5, atol=1e-6 * size)
    assert np.linalg.eigvalsh(gauss[0])[0] >= -1e-12 * np.abs(gauss).max()


@every_law
@pytest.mark.parametrize("scale", SCALES)
def test_the_objective_is_that_of_a_loop(law: Law, scale: Literal["log", "raw"]) -> None:
    objective = Objective("huber", delta=0.02, scale=scale, overestimate=3.0)
    df = table(40)
    surface, columns = bind(law, df)
    theta = surface.theta(law.params)[None]
    rng = np.random.default_rng(1)
    y, weights = law.y(df) * np.exp(rng.normal(0, 0.02, 40)), rng.uniform(0, 2, 40)
    problem = Problem(
        surface, surface.transform(columns), objective.target(np.asarray(y)), scale == "log",
        objective.knee(), objective.overestimate,
    )  # fmt: skip
    total = 0.0
    for fitted, measured, weight in zip(law.y(df), y, weights, strict=True):
        r = math.log(fitted / measured) if scale == "log" else fitted - measured
        loss = r * r / 2 if abs(r) <= 0.02 else 0.02 * (abs(r) - 0.01)
        total += weight * loss * (3.0 if r > 0 else 1.0)
    assert problem.objective(theta, weights)[0] == pytest.approx(total, rel=1e-8)
    residuals = problem.fitted(theta)[0] - problem.target
    assert objective.value(residuals, weights) == pytest.approx(total, rel=1e-8)


# ---- recovery -----------------------------------------------------------------------------------


@every_law
@pytest.mark.parametrize("scale", SCALES)
def test_a_planted_law_is_found_again(law: Law, scale: str) -> None:
    df = table()
    df["y"] = law.y(df)
    fit = fit_law(df, law.form, y="y", objective=Objective(scale=scale), n_boot=0)
    assert fit.status is FitStatus.CONVERGED, fit.message
    for name, value in law.params.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-6), name
    np.testing.assert_allclose(fit.predict(df)["y"], df["y"], rtol=1e-9)


@every_law
def test_no_optimum_of_scipy_is_lower(law: Law) -> None:
    """Least squares by trust region from the truth, on noisy data."""
    df = table()
    rng = np.random.default_rng(5)
    df["y"] = law.y(df) * np.exp(rng.normal(0, 0.01, len(df)))
    objective = Objective("mse")
    fit = fit_law(df, law.form, y="y", objective=objective, n_boot=0)
    problem = fit.problem
    truth = np.clip(fit.surface.theta(law.params), fit.surface.lower, fit.surface.upper)
    found = least_squares(
        lambda t: problem.fitted(t[None])[0] - problem.target, truth,
        bounds=(fit.surface.lower - 1e-12, fit.surface.upper + 1e-12),
        xtol=1e-15, ftol=1e-15, gtol=1e-12, x_scale="jac", max_nfev=2000,
    )  # fmt: skip
    assert fit.certificate.objective <= found.cost * (1 + 1e-8)
    if fit.status is FitStatus.CONVERGED and fit.certificate.objective >= found.cost * (1 - 1e-8):
        np.testing.assert_allclose(
            fit.predict(df)["y"], fit.surface.values(found.x[None], fit.columns)[0], rtol=1e-4
        )
