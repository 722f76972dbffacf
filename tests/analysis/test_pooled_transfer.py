"""One rate for many tasks: likelihood, recovery, what is borrowed, tasks held out."""

import json

import numpy as np
import pandas as pd
import pytest

from scaling.analysis.transfer_law.pooled import held_out_tasks, pooled_law

RATE = 0.8


def world(
    rng: np.random.Generator,
    *,
    spread: float = 0.0,
    noise: float = 0.003,
    tasks: int = 8,
    n: int = 14,
) -> pd.DataFrame:
    """Tasks with levels of their own, on the same configurations."""
    losses = np.sort(rng.uniform(3, 5.5, n))
    parts = []
    for j in range(tasks):
        rate = RATE + spread * rng.normal()
        height = 0.2 * np.exp(rng.normal(0, 0.4)) * rng.choice([-1, 1])
        metric = 0.1 * j + height * np.exp(-rate * (losses - 3)) + rng.normal(0, noise, n)
        parts.append(pd.DataFrame({"pretraining": losses, "downstream": metric, "task": f"t{j}"}))
    return pd.concat(parts).assign(cell=lambda d: "c" + d.index.astype(str)).reset_index(drop=True)


def test_likelihood_is_that_of_least_squares() -> None:
    points = world(np.random.default_rng(0), tasks=2)
    law = pooled_law(points, n_boot=0)
    own = points[points["task"] == "t1"]
    x, y = own["pretraining"].to_numpy(), own["downstream"].to_numpy()
    found = []
    for i in (20, 100, 120, 150, 200):
        rate = law.rates[i]
        shape = x if rate == 0 else np.exp(-rate * x)
        rss = np.linalg.lstsq(np.column_stack([np.ones(len(x)), shape]), y, rcond=None)[1]
        found.append((law.likelihood[1, i], -0.5 * (len(x) - 2) * np.log(rss[0])))
    ours, expected = np.array(found).T
    np.testing.assert_allclose(ours - ours[0], expected - expected[0], rtol=1e-6)


def test_a_shared_rate_is_recovered_whatever_the_units() -> None:
    points = world(np.random.default_rng(1), noise=1e-9)
    step = 2 * 8.0 / np.ptp(points["pretraining"]) / 240
    law = pooled_law(points, n_boot=0)
    assert law.mean == pytest.approx(RATE, abs=step)
    assert law.spread == 0
    assert np.abs(law.tasks["alone"] - RATE).max() <= step
    noisy = world(np.random.default_rng(1))
    scaled = noisy.assign(downstream=lambda d: 5 + 1000 * d["downstream"])
    one, other = pooled_law(noisy, n_boot=0), pooled_law(scaled, n_boot=0)
    pd.testing.assert_frame_equal(one.tasks, other.tasks, rtol=1e-6)


def test_seeds_of_a_configuration_are_averaged() -> None:
    points = world(np.random.default_rng(2))
    away = np.where(np.arange(len(points)) % 2, 0.01, -0.01)
    seeds = pd.concat([points.assign(downstream=points["downstream"] + s * away) for s in (1, -1)])
    pd.testing.assert_frame_equal(
        pooled_law(seeds, n_boot=0).tasks, pooled_law(points, n_boot=0).tasks
    )


def test_rates_that_differ_are_told_and_shrink_less() -> None:
    same = pooled_law(world(np.random.default_rng(3)), n_boot=0)
    other = pooled_law(world(np.random.default_rng(3), spread=0.5), n_boot=0)
    assert same.p_same > 0.05
    assert other.p_same < 0.001
    assert (same.spread, other.spread) == (0, pytest.approx(0.5, rel=0.5))
    assert same.tasks["borrowed"].mean() > 0.5 > 0.3 > other.tasks["borrowed"].mean()
    assert same.tasks["pooled"].std() < 0.5 * same.tasks["alone"].std()


@pytest.mark.slow
def test_intervals_cover() -> None:
    """The mean in 25 worlds with a spread over tasks: at 95 %, fewer than 20 have 0.2 %."""
    rng = np.random.default_rng(4)
    covered = in_tasks = 0
    for i in range(25):
        low, high = pooled_law(world(rng, spread=0.3), n_boot=40, seed=i).interval
        covered += low <= RATE <= high
        tasks = pooled_law(world(rng), n_boot=0).tasks
        in_tasks += ((tasks["lower"] <= RATE) & (tasks["upper"] >= RATE)).mean()
    assert covered >= 20
    assert in_tasks / 25 > 0.9


def test_held_out_tasks_gain_from_the_pool() -> None:
    rng = np.random.default_rng(5)
    errors = pd.concat([held_out_tasks(pooled_law(world(rng), n_boot=0)) for _ in range(6)])
    assert (errors["early"] == 8).all()
    assert (errors["late"] == 6).all()
    means = errors[["pooled", "alone", "line"]].mean()
    assert means["pooled"] < 0.5 * means["line"]
    assert means["pooled"] < 0.5 * means["alone"]


def test_a_held_out_task_knows_nothing_of_its_late_points() -> None:
    points = world(np.random.default_rng(6))
    other = points.copy()
    late = (other["task"] == "t0") & (other["pretraining"] < other["pretraining"].quantile(0.4))
    other.loc[late, "downstream"] += 1.0
    one, changed = (held_out_tasks(pooled_law(p, n_boot=0)) for p in (points, other))
    assert changed.loc["t0", "pooled"] == pytest.approx(1.0, abs=0.1)
    assert one.loc["t0", "pooled"] < 0.05


def test_prediction_passes_through_noise_free_points() -> None:
    points = world(np.random.default_rng(7), noise=1e-9)
    law = pooled_law(points, n_boot=0)
    own = points[points["task"] == "t3"]
    guess = law.predict("t3", own["pretraining"].to_numpy())
    np.testing.assert_allclose(guess, own["downstream"], atol=5e-4)


def test_record_is_json() -> None:
    law = pooled_law(world(np.random.default_rng(8)), n_boot=20)
    assert json.loads(json.dumps(law.to_dict(), allow_nan=False)) == law.to_dict()
    assert law.identified
    noise = world(np.random.default_rng(8), noise=10.0, tasks=2)
    assert not pooled_law(noise, n_boot=40).identified


def test_one_task_is_no_pool() -> None:
    points = world(np.random.default_rng(9), tasks=1)
    with pytest.raises(ValueError, match="1 tasks have 5 configurations"):
        pooled_law(points)
    with pytest.raises(ValueError, match="0 tasks"):
        pooled_law(world(np.random.default_rng(9), n=4))
