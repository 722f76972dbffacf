"""Intervals hold the truth as often as they say (part of benchmarks/interval_coverage.py), and what
the draws and the covariance behind them are."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from scaling.analysis import Objective, fit_law
from scaling.analysis.fitting import fit as fit_module
from scaling.analysis.fitting.intervals import (
    STRETCH,
    calibrated,
    fractional_weights,
    resampled_weights,
    sandwich,
    tail,
)

SQUARES = Objective("mse")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "interval_coverage.py"
    spec = importlib.util.spec_from_file_location("benchmark_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["power-12, least squares", "floor-40, least squares", "clusters-10"]
)
def test_intervals_hold_the_truth_as_often_as_they_say(benchmark: ModuleType, name: str) -> None:
    """Of 60 simulations of 95 % fewer than 51 hold the truth with a probability of 0.1 %."""
    world = next(w for w in benchmark.WORLDS if w.name == name)
    table = benchmark.coverage(world, simulations=60, draws=100)
    assert set(table["method"]) == {"percentile", "delta", "profile"}
    assert set(table["parameter"]) >= {"exponent", "scale", "prediction"}
    assert table["coverage"].min() >= 51 / 60, table
    assert (table["width"].dropna() > 0).all()


def test_starts_are_as_before_after_the_benchmark(benchmark: ModuleType) -> None:
    world = benchmark.WORLDS[0]
    benchmark.coverage(world, simulations=1, draws=20)
    assert (fit_module.STARTS_SCORED, fit_module.STARTS_POLISHED) == (4_000, 24)


def test_a_table_of_a_world_is_its_law_and_noise(benchmark: ModuleType) -> None:
    world = next(w for w in benchmark.WORLDS if w.name == "clusters-22")
    df = world.table(np.random.default_rng(0))
    truth = 1.5 + (df["a"] / 1e7) ** -0.3 + (df["b"] / 30) ** -0.6
    error = np.log(df["y"] / truth)
    by_run = error.groupby(df["run_key"])
    assert len(by_run) == 22
    assert by_run.size().eq(8).all()
    assert df.groupby("run_key")["a"].nunique().eq(1).all()
    assert by_run.std().mean() == pytest.approx(0.003, rel=0.2)
    assert by_run.mean().std() == pytest.approx(0.01, rel=0.4)


def test_fractional_weights_have_the_moments_of_resampling() -> None:
    codes = np.repeat(np.arange(5), 2)
    ours = fractional_weights(codes, 200_000, np.random.default_rng(0))
    counts = resampled_weights(codes, 200_000, np.random.default_rng(1))
    assert (ours > 0).all()
    np.testing.assert_array_equal(ours[:, ::2], ours[:, 1::2])  # all rows of a cluster
    np.testing.assert_allclose(ours.sum(axis=1), 10, rtol=1e-12)
    np.testing.assert_allclose(ours.mean(axis=0), 1, atol=0.01)
    np.testing.assert_allclose(np.cov(ours[:, ::2].T), np.cov(counts[:, ::2].T), atol=0.02)


def test_the_covariance_is_the_jackknife_of_a_regression() -> None:
    """With fixed exponents raw least squares are linear, and leaving a cluster out is exact."""
    rng = np.random.default_rng(0)
    n = 30
    df = pd.DataFrame({"a": rng.uniform(1, 100, n), "run_key": np.arange(n) // 3})
    df["y"] = 1 + 3 / df["a"] + rng.normal(0, 0.1, 10)[df["run_key"]]
    fit = fit_law(
        df, "E + a", y="y", objective=Objective("mse", scale="raw"), fixed={"exponent": 1.0},
        n_boot=0,
    )  # fmt: skip
    design = np.column_stack([np.ones(n), 1 / df["a"]])
    whole = np.linalg.lstsq(design, df["y"])[0]
    away = []
    for run in range(10):
        rest = (df["run_key"] != run).to_numpy()
        away.append(np.linalg.lstsq(design[rest], df["y"][rest])[0] - whole)
    exact = 0.9 * np.transpose(away) @ np.array(away)
    errors = fit.standard_errors()[["irreducible", "coefficient"]]
    np.testing.assert_allclose(errors, np.sqrt(np.diag(exact)), rtol=1e-6)
    # theta holds ln A in place of A
    scale = np.diag([1.0, 1 / float(fit.params["coefficient"])])
    np.testing.assert_allclose(fit.covariance(), scale @ exact @ scale, rtol=1e-6)


def test_a_law_that_one_run_alone_decides_has_no_covariance() -> None:
    df = pd.DataFrame(
        {"a": [1.0, 1, 1, 2, 3], "run_key": [0, 1, 2, 3, 3], "y": [2.0, 2.1, 1.9, 1.5, 1.4]}
    )  # fmt: skip
    fit = fit_law(df, "a", y="y", objective=SQUARES, n_boot=50)
    covariance = sandwich(fit.problem, fit.theta, fit.weights, fit.codes)
    np.testing.assert_array_equal(covariance, np.full((2, 2), np.inf))
    assert np.isfinite(fit.draws["exponent"]).all()


def test_calibrated_draws_have_the_spread_of_the_covariance() -> None:
    rng = np.random.default_rng(0)
    df = pd.DataFrame({"a": np.geomspace(1, 1e4, 20)})
    df["y"] = df["a"] ** -0.3 * np.exp(rng.normal(0, 0.01, 20))
    fit = fit_law(df, "a", y="y", objective=SQUARES, n_boot=0)
    covariance = np.diag([4e-4, 1e-4])
    shape = np.linalg.cholesky(covariance)
    draws = fit.theta + 0.9 * rng.normal(size=(20_000, 2)) @ shape.T
    got = calibrated(draws, fit.theta, covariance, fit.surface)
    np.testing.assert_allclose(np.cov(got.T), covariance, rtol=0.05, atol=1e-5)
    far = fit.theta + 5 * (draws - fit.theta)  # stretched back, but not by more than the limit
    expected = np.clip(
        fit.theta + STRETCH[0] * (far - fit.theta), fit.surface.lower, fit.surface.upper
    )  # fmt: skip
    np.testing.assert_allclose(
        calibrated(far, fit.theta, covariance, fit.surface), expected, rtol=1e-12
    )
    infinite = np.full((2, 2), np.inf)
    assert calibrated(draws, fit.theta, infinite, fit.surface) is draws
    bound = fit.theta.copy()
    bound[1] = fit.surface.lower[1]
    assert calibrated(draws, bound, covariance, fit.surface) is draws


@pytest.mark.parametrize(("loss", "stretched"), [("huber", False), ("lad", False), ("mse", True)])
def test_draws_are_calibrated_where_no_density_is_estimated(
    loss: Literal["huber", "lad", "mse"], stretched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    monkeypatch.setattr(
        fit_module, "calibrated", lambda draws, *rest: called.append(len(draws)) or draws
    )
    df = pd.DataFrame({"a": np.geomspace(1, 1e4, 20)})
    df["y"] = df["a"] ** -0.3 * np.exp(np.random.default_rng(0).normal(0, 0.01, 20))
    fit_law(df, "a", y="y", objective=Objective(loss), n_boot=20)
    assert called == ([20] if stretched else [])


def test_the_tail_of_many_clusters_is_the_normal_one() -> None:
    assert tail(0.95, 10**6, 3) == pytest.approx(0.025, abs=1e-6)
    # ten clusters, three parameters: t of 7 degrees of freedom is 2.3646
    assert tail(0.95, 10, 3) == pytest.approx(0.00902, abs=2e-5)
