"""The benchmark of fits: its sides minimise what it says, and it prints what it promises."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from tests.conftest import missing

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def sides():
    for name in ("chinchilla", "lmfit"):
        if importlib.util.find_spec(name) is None:
            missing(f"{name} is not installed")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fit_sides
    finally:
        sys.path.remove(str(BENCHMARKS))
    return fit_sides


@pytest.mark.slow
def test_sides_take_turns_on_synthetic_tables(sides: ModuleType) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "CLUE_TEST_DATA"}
    call = [sys.executable, BENCHMARKS / "fit.py", "--json", "--quick"]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    for key in ("fit_s", "bootstrap_1000_s", "over_chinchilla", "fit4_s", "bootstrap4_1000_s"):
        assert 0 < found[key] < np.inf
    assert 0 <= found["excess_objective"] < 1e-8
    two, four = found["two"], found["four"]
    assert (two["rows"], four["rows"], found["tables"]) == (240, 200, [])
    assert list(two["sides"]) == ["ours", "chinchilla", "Epoch", "OLMo-core", "lmfit", "scipy"]
    assert list(four["sides"]) == ["ours", "Epoch", "lmfit", "scipy"]
    of = {"chinchilla": 3125, "Epoch": 4500, "OLMo-core": 1024, "lmfit": 24, "scipy": 24}
    assert {name: two["sides"][name]["of"] for name in of} == of
    for compared in (two, four):
        assert compared["sides"]["scipy"]["excess"] < 1e-9
        assert all(0 <= side["excess"] < 1 for side in compared["sides"].values())
        # ours and scipy's bootstraps are of the same draws: other draws would be percents apart
        assert compared["sides"]["ours"]["bootstrap_excess"]["largest"] < 1e-4
        assert compared["sides"]["scipy"]["bootstrap_excess"]["largest"] < 1e-4


def test_the_objective_and_its_derivatives(sides: ModuleType) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"N": rng.uniform(1e6, 1e9, 30), "D": rng.uniform(1e8, 1e10, 30)})
    frame["loss"] = 2 + 300 / frame["N"] ** 0.3 + 900 / frame["D"] ** 0.35 + rng.normal(0, 0.01, 30)
    table = sides.Table("", frame, ("N", "D"), delta=2e-3)
    theta = np.array([np.log(1.98), np.log(310), np.log(890), 0.3, 0.35])
    y = 1.98 + 310 * frame["N"] ** -0.3 + 890 * frame["D"] ** -0.35
    r = np.log(y / frame["loss"]).abs()
    losses = [d * d / 2 if d <= 2e-3 else 2e-3 * (d - 1e-3) for d in r]
    assert 3 < (r <= 2e-3).sum() < 27
    found, gradient, hessian = sides.derivatives(theta, table)
    assert sides.value(theta, table) == pytest.approx(sum(losses), rel=1e-12)
    assert found == pytest.approx(sum(losses), rel=1e-12)
    step = 1e-6 * np.eye(5)
    there = [
        (sides.derivatives(theta + s, table), sides.derivatives(theta - s, table)) for s in step
    ]
    by = np.array([(a[0] - b[0]) / 2e-6 for a, b in there])
    twice = np.array([(a[1] - b[1]) / 2e-6 for a, b in there])
    assert gradient == pytest.approx(by, rel=1e-6, abs=1e-6 * np.abs(by).max())
    assert hessian == pytest.approx(twice, abs=1e-6 * np.abs(twice).max())


@pytest.mark.parametrize("side", ["by_scipy", "by_lmfit"])
@pytest.mark.parametrize("factors", [("N", "D"), ("N", "D", "B")])
def test_sides_recover_a_law(sides: ModuleType, side: str, factors: tuple[str, ...]) -> None:
    k, rng = len(factors), np.random.default_rng(1)
    theta = np.array([0.5, *np.log([400.0, 900.0, 3.0])[:k], *[0.3, 0.4, 0.6][:k]])
    frame = pd.DataFrame({f: np.exp(rng.uniform(4, 20, 50)) for f in factors})
    frame["loss"] = np.exp(sides.predicted(theta, np.log(frame.to_numpy()).T))
    table = sides.Table("", frame, factors)
    found = getattr(sides, side)(table, sides.scattered(table, 6))
    assert found == pytest.approx(theta, abs=1e-4)


def test_starts_are_those_of_the_peers(sides: ModuleType) -> None:
    epoch = sides.epoch_starts(2)
    assert epoch.shape == (4500, 5)
    assert epoch.min(axis=0).tolist() == [-1, 0, 0, 0, 0]
    assert epoch.max(axis=0).tolist() == [1, 25, 25, 2, 2]
    two, _ = sides.synthetic()
    olmo = sides.olmo_starts(two)
    assert len(np.unique(olmo, axis=0)) == 1024
    assert olmo.max(axis=0).tolist() == [two.frame["loss"].min(), 20, 20, 0.8, 0.8]
    assert [len(v) for v in sides.chinchilla_grid(5).values()] == [5] * 5


@pytest.mark.parametrize("side", ["by_scipy", "by_lmfit", "epoch_bootstrap"])
def test_weights_count_rows(sides: ModuleType, side: str) -> None:
    two, _ = sides.synthetic()
    counts = np.random.default_rng(0).integers(0, 3, 240)
    rows = np.repeat(np.arange(240), counts)
    repeated = sides.Table("", two.frame.iloc[rows], two.factors)
    weighted = two.weighted(counts.astype(float))
    start = np.array([np.log(1.8172), np.log(482.01), np.log(2085.43), 0.3478, 0.3658])
    start = start if side == "epoch_bootstrap" else start[None]
    found = getattr(sides, side)(weighted, start)
    assert sides.value(found, weighted) == pytest.approx(sides.value(found, repeated), rel=1e-12)
    expected = sides.by_scipy(repeated, np.atleast_2d(start))
    best = sides.value(expected, repeated)
    assert best < 0.999 * sides.value(np.ravel(start), repeated)
    assert sides.value(found, repeated) == pytest.approx(best, rel=1e-5)


@pytest.mark.data
def test_published_objectives_are_those_of_the_published_parameters(
    sides: ModuleType, clue_test_data: Path
) -> None:
    of_epoch = sides.epoch(clue_test_data)
    assert len(of_epoch.frame) == 240
    grid_fit = np.array([*np.log([1.8172355, 477.8417, 2143.8638]), 0.3473127, 0.3671826])
    assert sides.value(grid_fit, of_epoch) == pytest.approx(0.0010182740346, rel=1e-8)
    tables = list(sides.gemstones(clue_test_data))
    assert len({table.name for table, _ in tables}) == 27
    folder = clue_test_data / "published_fits/gemstones/published_fits"
    told = {
        round(json.loads(path.read_text())["loss"]["0"], 10)
        for path in folder.glob("parameters_delta-*/*.json")
    }
    for table, published in tables:
        value = sides.value(published, table)
        assert min(abs(value - t) for t in told) < 2e-10, table.name
    frame, fixed = sides.datablations(clue_test_data)
    found = sides.repeated(5.309743, 15.387756, frame, fixed)
    assert found == pytest.approx(0.015825936570763588, rel=1e-7)
