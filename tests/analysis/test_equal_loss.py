"""Whether equal pretraining loss gives equal transfer: estimates, size, power, verdicts."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling.analysis.transfer_law.equality import (
    EqualityVerdict,
    equal_loss_test,
    over_tasks,
)

FACTORS = ("n_total", "batch_size", "items_per_user")


def world(
    rng: np.random.Generator,
    *,
    seeds: int = 2,
    loss_noise: float = 0.01,
    noise: float = 0.004,
    effect: float = 0.0,
    noise_of_large: float = 1.0,
) -> pd.DataFrame:
    """4 x 3 x 2 configurations whose transfer is a function of the true loss alone, plus ``effect``
    per doubling of the batch."""
    rows = []
    for n in (1e5, 4e5, 1.6e6, 6.4e6):
        for b in (32, 64, 128):
            for s in (4, 16):
                loss = 2 + 1.5 * (n / 1e5) ** -0.25 + 1.2 * (b / 32) ** -0.3 + (s / 4) ** -0.4
                level = 0.65 - 2 * np.exp(-0.8 * loss) + effect * np.log2(b / 64)
                spread = noise * (noise_of_large if n > 1e6 else 1.0)
                for _ in range(seeds):
                    measured = loss + rng.normal(0, loss_noise)
                    rows.append((f"{n} {b} {s}", n, b, s, measured, level + rng.normal(0, spread)))
    columns = ["cell", *FACTORS, "pretraining", "downstream"]
    return pd.DataFrame(rows, columns=columns)


def rejections(worlds: int, *, apart: bool = False, **settings: Any) -> float:
    """Share of worlds in which some factor has a corrected p of 5 % or less; ``apart`` hides which
    runs are of one configuration."""
    rng = np.random.default_rng(1)
    found = 0
    for i in range(worlds):
        points = world(rng, **settings)
        if apart:
            points["cell"] = range(len(points))
        test = equal_loss_test(points, FACTORS, n_permutations=199, seed=i)
        found += test.effects["p_adjusted"].min() <= 0.05 if len(test.effects) else False
    return found / worlds


def jackknife(design: np.ndarray, y: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """CR3 standard errors by leaving out every configuration in turn."""
    whole = np.linalg.lstsq(design, y, rcond=None)[0]
    groups = np.unique(cells)
    away = [
        np.linalg.lstsq(design[cells != g], y[cells != g], rcond=None)[0] - whole for g in groups
    ]
    return np.sqrt((len(groups) - 1) / len(groups) * np.sum(np.square(away), axis=0))


def test_effects_and_errors_are_those_of_least_squares() -> None:
    """Each factor by itself beside a parabola in the loss: nothing is significant here."""
    points = world(np.random.default_rng(3), seeds=1)
    found = equal_loss_test(points, FACTORS, n_permutations=9)
    assert (found.reliability, found.factors) == (None, ())
    loss, y = points["pretraining"].to_numpy(), points["downstream"].to_numpy()
    parabola = np.column_stack([np.ones(len(y)), loss, loss**2])
    for factor, row in found.effects.iterrows():
        z = np.log2(points[factor].to_numpy(dtype=float))
        design = np.column_stack([parabola, z])
        expected = np.linalg.lstsq(design, y, rcond=None)[0]
        error = jackknife(design, y, points["cell"].to_numpy())[3]
        assert row["per_doubling"] == pytest.approx(expected[3], rel=1e-7)
        assert row["over_range"] == pytest.approx(expected[3] * np.ptp(z), rel=1e-7)
        assert row["range"] == pytest.approx(np.ptp(z))
        # 24 configurations less 4 parameters: t_20 at 97.5 %; at 1 - .05/6 plus at 80 %
        assert row["upper"] - expected[3] == pytest.approx(2.0859634 * error, rel=1e-6)
        assert row["detectable"] == pytest.approx((2.6125854 + 0.8599644) * error, rel=1e-6)
        np.testing.assert_allclose(found.unexplained[factor], y - design @ expected, atol=1e-10)


def test_factors_that_differ_are_told_beside_each_other() -> None:
    points = world(np.random.default_rng(3), effect=0.01, noise=0.001)
    points["downstream"] -= 0.01 * np.log2(points["items_per_user"])
    found = equal_loss_test(points, FACTORS, n_permutations=199)
    assert set(found.factors) == {"batch_size", "items_per_user"}
    loss, y = points["pretraining"].to_numpy(), points["downstream"].to_numpy()
    assert found.reliability is not None
    z = np.log2(points[list(FACTORS)].to_numpy(dtype=float))
    design = np.column_stack([np.ones(len(y)), z])
    expected = design @ np.linalg.lstsq(design, loss, rcond=None)[0]
    true = expected + found.reliability * (loss - expected)
    parabola = np.column_stack([np.ones(len(y)), true, true**2])
    both = np.linalg.lstsq(np.column_stack([parabola, z[:, 1:]]), y, rcond=None)[0][3:]
    every = np.linalg.lstsq(np.column_stack([parabola, z]), y, rcond=None)[0][3]
    effects = found.effects["per_doubling"]
    assert effects["batch_size"] == pytest.approx(both[0], rel=1e-6)
    assert effects["items_per_user"] == pytest.approx(both[1], rel=1e-6)
    assert effects["n_total"] == pytest.approx(every, rel=1e-5)
    assert both == pytest.approx([0.01, -0.01], rel=0.1)


def test_loss_is_replaced_by_its_expectation_given_the_factors() -> None:
    """Regression calibration against its formula, with the noise of the loss from the seeds."""
    points = world(np.random.default_rng(4), loss_noise=0.03)
    found = equal_loss_test(points, FACTORS, n_permutations=19)
    loss, y = points["pretraining"].to_numpy(), points["downstream"].to_numpy()
    z = np.log2(points[list(FACTORS)].to_numpy(dtype=float))
    design = np.column_stack([np.ones(len(y)), z])
    expected = design @ np.linalg.lstsq(design, loss, rcond=None)[0]
    given = np.sum((loss - expected) ** 2) / (len(y) - 4)
    within = loss - points.groupby("cell")["pretraining"].transform("mean").to_numpy()
    reliability = 1 - np.sum(within**2) / 24 / given
    assert found.reliability == pytest.approx(reliability)
    assert 0.5 < reliability < 0.9
    true = expected + reliability * (loss - expected)
    assert found.factors == ()
    for k, factor in enumerate(FACTORS):
        design = np.column_stack([np.ones(len(y)), true, true**2, z[:, k]])
        effect = np.linalg.lstsq(design, y, rcond=None)[0][3]
        assert found.effects["per_doubling"][factor] == pytest.approx(effect, rel=1e-7)


def test_a_fitted_law_s_tangent_takes_the_place_of_the_parabola() -> None:
    points = world(np.random.default_rng(5), seeds=1)

    def tangent(loss: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(loss)), np.exp(-loss), loss * np.exp(-loss)])

    found = equal_loss_test(points, FACTORS, tangent=tangent, n_permutations=19)
    assert found.factors == ()
    for factor in FACTORS:
        z = np.log2(points[factor].to_numpy(dtype=float))
        design = np.column_stack([tangent(points["pretraining"].to_numpy()), z])
        expected = np.linalg.lstsq(design, points["downstream"].to_numpy(), rcond=None)[0][3]
        assert found.effects["per_doubling"][factor] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"noise_of_large": 3.0}, {"loss_noise": 0.03}])
def test_size(settings: dict[str, float]) -> None:
    """5 % of 120 worlds is 6; 14 or more have a probability below 0.4 %."""
    assert rejections(120, **settings) <= 13 / 120


@pytest.mark.slow
def test_noise_of_the_loss_is_not_read_as_an_effect() -> None:
    """Replicates tell the noise: L is corrected, or the verdict is that it is too noisy."""
    settings = {"loss_noise": 0.12, "noise": 0.001}
    assert rejections(60, **settings) <= 0.05
    assert rejections(60, apart=True, **settings) >= 0.2


@pytest.mark.slow
def test_power_is_what_is_stated() -> None:
    rng = np.random.default_rng(7)
    stated = np.median(
        [
            equal_loss_test(world(rng), FACTORS, n_permutations=19).effects["detectable"].iloc[1]
            for _ in range(40)
        ]
    )
    seen, estimates = [], []
    for i in range(100):
        test = equal_loss_test(world(rng, effect=stated), FACTORS, n_permutations=199, seed=i)
        seen.append(test.effects["p_adjusted"]["batch_size"] <= 0.05)
        estimates.append(test.effects["per_doubling"]["batch_size"])
    assert 0.68 <= np.mean(seen) <= 0.95
    assert np.mean(estimates) == pytest.approx(stated, rel=0.06)


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    test = equal_loss_test(world(rng, effect=0.01), FACTORS)
    assert test.verdict is EqualityVerdict.DIFFERS
    assert test.factors == ("batch_size",)
    assert test.effects.loc["batch_size", "p_adjusted"] < 0.01
    assert test.reasons[0].startswith("batch_size: +0.0")
    points = world(rng, noise=0.0004, loss_noise=0.001)
    test = equal_loss_test(points, FACTORS)
    assert test.verdict is EqualityVerdict.EQUAL
    assert "10%" in test.reasons[0]
    doublings = np.log2(points[list(FACTORS)].max() / points[list(FACTORS)].min())
    ends = test.effects[["lower", "upper"]].abs().max(axis=1) * doublings
    assert (ends <= 0.1 * test.span).all()
    small = equal_loss_test(world(rng, noise=0.0002, loss_noise=0.0, effect=0.0019), FACTORS)
    assert small.verdict is EqualityVerdict.EQUAL
    assert small.reasons[1].startswith("batch_size: +0.0")
    strict = equal_loss_test(points, FACTORS, margin=0.99 * ends.max() / test.span)
    assert strict.verdict is EqualityVerdict.UNDECIDED
    test = equal_loss_test(world(rng, noise=0.05), FACTORS)
    assert test.verdict is EqualityVerdict.UNDECIDED
    assert all("would have been seen" in reason for reason in test.reasons)
    assert len(test.reasons) == 3


def test_designs_that_cannot_decide() -> None:
    points = world(np.random.default_rng(0), seeds=1)
    few = points.iloc[[0, 5, 9, 14, 20, 23]]
    test = equal_loss_test(few, FACTORS)
    assert (test.verdict, test.effects.empty) == (EqualityVerdict.UNDECIDED, True)
    assert test.reasons == ("6 configurations for 4 parameters; 3 more than these are needed",)
    test = equal_loss_test(points.assign(n_total=1.0), ["n_total", "batch_size"])
    assert test.left_out == {"n_total": "the same in every run"}
    assert test.reasons == (
        "batch_size alone bought the loss: there is nothing to compare it with",
    )
    noisy = world(np.random.default_rng(0), loss_noise=0.2)
    test = equal_loss_test(noisy, FACTORS)
    assert test.verdict is EqualityVerdict.UNDECIDED
    assert "is noise between seeds" in test.reasons[0]


def test_factors_that_move_together_are_not_parted() -> None:
    points = world(np.random.default_rng(0)).assign(users_seen=lambda d: 100.0 * d["batch_size"])
    test = equal_loss_test(points, [*FACTORS, "users_seen"])
    assert test.effects.index.tolist() == list(FACTORS)
    assert test.left_out == {
        "users_seen": "moves with batch_size in this design: the two are not parted"
    }


def test_few_permutations_limit_p() -> None:
    """Two configurations of one size a stratum and size leave few orders."""
    points = world(np.random.default_rng(0), seeds=1, effect=0.02)
    sizes = np.repeat(np.arange(1, 13), 2)  # configurations of 1, 1, 2, 2, ... rows
    order = points.sort_values("pretraining").index
    repeated = points.loc[order].loc[np.repeat(order, sizes)]
    test = equal_loss_test(repeated, FACTORS, n_permutations=99)
    assert test.n == sizes.sum()
    assert test.smallest_p == pytest.approx(max(0.01, 0.5**12))


def test_tasks_are_corrected_for_their_number() -> None:
    rng = np.random.default_rng(2)
    clear = equal_loss_test(world(rng, effect=0.01), FACTORS, n_permutations=999)
    equal = equal_loss_test(world(rng, noise=0.0004, loss_noise=0.001), FACTORS, n_permutations=999)
    near = None
    for seed in range(100):  # a test that is significant by itself, and not twice as clearly
        near = equal_loss_test(world(rng, effect=0.0022), FACTORS, n_permutations=199, seed=seed)
        if near.factors and near.effects["p_adjusted"].min() > 0.025:
            break
    assert near is not None
    assert near.verdict is EqualityVerdict.DIFFERS
    found = over_tasks({"clear": clear, "near": near, "equal": equal})
    assert found == {
        "clear": EqualityVerdict.DIFFERS,
        "near": EqualityVerdict.UNDECIDED,
        "equal": EqualityVerdict.EQUAL,
    }


def test_record_is_json() -> None:
    points = world(np.random.default_rng(0))
    record = equal_loss_test(points, FACTORS, n_permutations=19).to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [row["factor"] for row in record["effects"]] == list(FACTORS)
    assert (record["rows"], record["clusters"]) == (48, 24)


def test_tables_that_cannot_be_read() -> None:
    points = world(np.random.default_rng(0))
    with pytest.raises(ValueError, match="no column 'width'"):
        equal_loss_test(points, ["width"])
    with pytest.raises(ValueError, match="factor 'batch_size' is not positive"):
        equal_loss_test(points.assign(batch_size=0), FACTORS)
