"""Draws of the bootstrap that are minimised once more, from fresh starts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from scaling.analysis import LawFit, fit_law
from scaling.analysis.fitting.intervals import MISSED, refit, resampled_weights
from scaling.analysis.fitting.solver import minimise
from scaling.analysis.fitting.starts import best, scatter


@pytest.fixture(scope="module")
def fit() -> LawFit:
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"n": rng.uniform(1e6, 1e9, 60), "d": rng.uniform(1e8, 1e11, 60)})
    frame["loss"] = 1.5 + 200 / frame["n"] ** 0.3 + 900 / frame["d"] ** 0.35
    frame["loss"] *= np.exp(rng.normal(0, 0.01, 60))
    return fit_law(frame, "E + n + d", y="loss", n_boot=0)


def test_draws_that_found_nothing_start_from_what_fresh_starts_found(fit: LawFit) -> None:
    rng = np.random.default_rng(0)
    weights = resampled_weights(np.arange(60), 120, rng)
    scattered = scatter(fit.problem, 200, rng)
    nowhere = np.full_like(fit.theta, np.nan)
    theta, _, rechecked, missed = refit(fit.problem, [nowhere], weights, None, scattered)
    assert (rechecked, missed) == (3, 3)
    right, _, _, none = refit(fit.problem, [fit.theta], weights, None, scattered)
    assert none == 0
    found, expected = (fit.problem.objective(t, weights) for t in (theta, right))
    assert found == pytest.approx(expected, rel=MISSED)


@pytest.mark.parametrize("resample", ["weights", "targets"])
def test_a_draw_ends_as_low_as_from_fresh_starts_alone(fit: LawFit, resample: str) -> None:
    rng = np.random.default_rng(1)
    n = 150
    weights, targets = np.ones((n, 60)), None
    if resample == "weights":
        weights = resampled_weights(np.arange(60), n, rng)
    else:
        targets = fit.problem.target + rng.normal(0, 0.02, (n, 60))
    scattered = scatter(fit.problem, 200, rng)
    theta, _, rechecked, missed = refit(fit.problem, [fit.theta], weights, targets, scattered)
    assert (rechecked, missed) == (3, 0)
    for i in (0, 50, 100):
        own = fit.problem if targets is None else replace(fit.problem, target=targets[i])
        alone = minimise(own, best(own, scattered, 4, weights[i]), weights[i])
        ended = own.objective(theta[[i]], weights[i])[0]
        assert ended <= alone.objective.min() * (1 + MISSED)
