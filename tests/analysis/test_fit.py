"""Power laws in one factor: recovery, error bars, and the many ways not to succeed."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.analysis import FitError, FitStatus, Objective, fit_power_law
from scaling.analysis.fitting import fit as fit_module
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.solver import Minima
from scaling.analysis.fitting.status import Certificate
from scaling.analysis.fitting.surface import Surface

SQUARES = Objective("mse")


def study(
    n: int = 16,
    exponent: float = 0.1,
    scale: float = 5.0,
    floor: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
    span: tuple[float, float] = (1e-4, 1e0),
) -> pd.DataFrame:
    x = np.geomspace(*span, n)
    y = floor + (x / scale) ** -exponent
    y = y * np.exp(np.random.default_rng(seed).normal(0, noise, n))
    return pd.DataFrame({"run_key": np.arange(n), "pf_days": x, "loss": y})


# ---- what is planted is found -------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    exponent=st.floats(0.03, 1.5),
    log_scale=st.floats(-8, 3),
    floor=st.floats(0.5, 4),
    unit=st.sampled_from([1e-12, 1.0, 1e15]),
)
def test_a_planted_law_is_recovered(
    exponent: float, log_scale: float, floor: float, unit: float
) -> None:
    df = study(exponent=exponent, scale=np.exp(log_scale), floor=floor)
    df["pf_days"] *= unit
    fit = fit_power_law(df, x="pf_days", y="loss", irreducible=True, n_boot=0)
    assert fit.status is FitStatus.CONVERGED, fit.message
    assert fit.params["exponent"] == pytest.approx(exponent, rel=1e-6)
    assert fit.params["scale"] == pytest.approx(unit * np.exp(log_scale), rel=1e-4)
    assert fit.params["irreducible"] == pytest.approx(floor, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(exponent=st.floats(0.01, 2), log_scale=st.floats(-20, 20))
def test_a_planted_line_is_recovered(exponent: float, log_scale: float) -> None:
    df = study(exponent=exponent, scale=np.exp(log_scale))
    fit = fit_power_law(df, x="pf_days", y="loss", n_boot=0)
    assert fit.status is FitStatus.CONVERGED, fit.message
    assert fit.params["exponent"] == pytest.approx(exponent, rel=1e-9)
    assert np.log(fit.params["scale"]) == pytest.approx(log_scale, rel=1e-7, abs=1e-7)


def test_least_squares_without_floor_is_the_straight_line_of_the_logarithms() -> None:
    df = study(noise=0.05)
    slope, intercept = np.polyfit(np.log(df["pf_days"]), np.log(df["loss"]), 1)
    fit = fit_power_law(df, x="pf_days", y="loss", objective=SQUARES, n_boot=0)
    assert fit.params["exponent"] == pytest.approx(-slope, rel=1e-9)
    assert np.log(fit.params["scale"]) == pytest.approx(-intercept / slope, rel=1e-9)


def test_one_wild_run_moves_least_squares_and_not_the_default() -> None:
    df = study(noise=0.002)
    df.loc[15, "loss"] *= 1.5
    robust = fit_power_law(df, x="pf_days", y="loss", n_boot=0)
    squares = fit_power_law(df, x="pf_days", y="loss", n_boot=0, objective=SQUARES)
    assert robust.params["exponent"] == pytest.approx(0.1, abs=0.002)
    assert abs(squares.params["exponent"] - 0.1) > 0.01


def test_the_same_seed_gives_the_same_fit() -> None:
    df = study(noise=0.02)
    one, two = (fit_power_law(df, x="pf_days", y="loss", n_boot=50) for _ in range(2))
    assert one.to_dict() == two.to_dict()


# ---- error bars ---------------------------------------------------------------------------------


def test_points_of_one_run_are_one_observation() -> None:
    df = study(noise=0.02)
    copies = pd.concat([df] * 5)
    alone = fit_power_law(df, x="pf_days", y="loss", n_boot=300, objective=SQUARES)
    clustered = fit_power_law(copies, x="pf_days", y="loss", n_boot=300, objective=SQUARES)
    naive = fit_power_law(
        copies, x="pf_days", y="loss", n_boot=300, objective=SQUARES, cluster=None
    )
    width = {f: np.ptp(f.ci().loc["exponent", ["lower", "upper"]]) for f in (alone, clustered)}
    assert clustered.n_clusters == 16
    assert width[clustered] == pytest.approx(width[alone], rel=1e-3)
    assert np.ptp(naive.ci().loc["exponent", ["lower", "upper"]]) < 0.6 * width[alone]


@pytest.mark.parametrize("cluster", [None, "run_key"])
def test_the_spread_of_the_draws_is_that_of_refits_without_one_cluster(cluster) -> None:
    """The jackknife by 24 or 12 lines."""
    df = study(n=24, noise=0.03).assign(run_key=np.arange(24) // 2)
    fit = fit_power_law(df, x="pf_days", y="loss", objective=SQUARES, cluster=cluster, n_boot=2000)
    group = df["run_key"] if cluster else pd.Series(range(24))
    slope = float(np.polyfit(np.log(df["pf_days"]), np.log(df["loss"]), 1)[0])
    away = []
    for one in group.unique():
        rest = df[group != one]
        away.append(np.polyfit(np.log(rest["pf_days"]), np.log(rest["loss"]), 1)[0] - slope)
    g = len(away)
    jackknife = np.sqrt((g - 1) / g * np.sum(np.square(away)))
    assert fit.standard_errors()["exponent"] == pytest.approx(jackknife, rel=1e-4)
    assert fit.draws["exponent"].std() == pytest.approx(jackknife, rel=0.15)
    assert fit.draws["exponent"].mean() == pytest.approx(-slope, abs=0.3 * jackknife)


@pytest.mark.slow
@pytest.mark.parametrize("irreducible", [False, True])
def test_intervals_cover_the_truth_as_often_as_they_say(
    irreducible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one clean factor has one optimum: few starts do, and the test is about the intervals
    monkeypatch.setattr(fit_module, "STARTS_SCORED", 100)
    monkeypatch.setattr(fit_module, "STARTS_POLISHED", 3)
    floor = 1.5 if irreducible else 0.0
    hits = []
    for seed in range(100):
        df = study(n=40, exponent=0.3, floor=floor, noise=0.01, seed=seed)
        fit = fit_power_law(df, x="pf_days", y="loss", irreducible=irreducible, n_boot=100)
        low, high = fit.ci().loc["exponent", ["lower", "upper"]]
        hits.append(low <= 0.3 <= high)
    # 100 trials of 95 %: standard error 2.2 points; the percentile bootstrap is a little narrow
    assert 0.87 <= np.mean(hits) <= 0.99


def test_the_frontier_and_its_interval() -> None:
    df = study(n=40, noise=0.0)
    df.loc[1::2, "loss"] *= 1.2  # half the runs lie above the law
    fit = fit_power_law(df, x="pf_days", y="loss", frontier=True, n_boot=200)
    assert fit.n == 20
    assert fit.dropped == {"not on the compute frontier": 20}
    assert fit.params["exponent"] == pytest.approx(0.1, rel=1e-6)
    # where a frontier run is missing from a draw, worse ones take its place: the draws differ
    assert fit.draws["exponent"].std() > 1e-5


# ---- predictions and reports --------------------------------------------------------------------


def test_predictions_carry_a_band_and_say_where_they_extrapolate() -> None:
    fit = fit_power_law(study(noise=0.02), x="pf_days", y="loss", n_boot=200)
    table = fit.predict([1e-5, 1e-4, 1e-2, 1.0, 10.0])
    assert table.columns.tolist() == ["pf_days", "y", "lower", "upper", "extrapolated"]
    assert table["extrapolated"].tolist() == [True, False, False, False, True]
    assert (table["lower"] < table["y"]).all()
    assert (table["y"] < table["upper"]).all()
    width = np.log(table["upper"] / table["lower"])
    assert width.iloc[0] > width.iloc[2] < width.iloc[4]
    scale, exponent = fit.params["scale"], fit.params["exponent"]
    np.testing.assert_allclose(table["y"], (table["pf_days"] / scale) ** -exponent)


def test_the_record_says_everything_and_is_json() -> None:
    df = study(noise=0.02)
    df.loc[3, "loss"] = np.nan
    df.loc[4, "loss"] = -1.0
    fit = fit_power_law(df, x="pf_days", y="loss", irreducible=True, n_boot=50)
    record = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert record["form"] == "E + pf_days"
    assert record["objective"]["delta"] == 1e-3
    assert record["rows"]["used"] == 14
    assert record["rows"]["dropped"] == {
        "loss is null": 1,
        "loss is not positive and finite": 1,
    }
    assert record["bootstrap"]["cluster"] == "run_key"
    assert record["certificate"]["starts_polished"] == 24
    assert fit.equation() in fit._repr_html_()
    assert f"{fit.params['exponent']:.6g}" in fit.equation()


def test_without_draws_there_is_no_interval() -> None:
    fit = fit_power_law(study(), x="pf_days", y="loss", n_boot=0)
    with pytest.raises(FitError, match="no bootstrap draws"):
        fit.ci()
    assert fit.summary().columns.tolist() == ["estimate"]
    assert fit.predict(1.0).columns.tolist() == ["pf_days", "y", "extrapolated"]


# ---- what the data does not hold ----------------------------------------------------------------


def test_a_floor_that_is_not_in_the_data_is_flagged() -> None:
    fit = fit_power_law(
        study(exponent=0.05, noise=0.01, seed=1),
        x="pf_days",
        y="loss",
        irreducible=True,
        n_boot=200,
    )
    verdict = fit.floor()
    assert not verdict.identified
    assert verdict.reasons


def test_a_floor_that_the_data_shows_is_identified() -> None:
    fit = fit_power_law(
        study(exponent=0.5, floor=1.5, scale=1e-3, noise=0.005, n=30),
        x="pf_days", y="loss", irreducible=True, n_boot=200,
    )  # fmt: skip
    assert fit.floor().identified, fit.floor().reasons
    low, high = fit.ci().loc["irreducible", ["lower", "upper"]]
    assert low < 1.5 < high


def test_a_floor_at_zero_is_a_bound_hit() -> None:
    # steeper than any power law towards large x: the floor would have to be negative
    x = np.geomspace(1, 100, 12)
    df = pd.DataFrame({"run_key": range(12), "pf_days": x, "loss": 3 - 0.6 * np.log10(x) ** 2})
    fit = fit_power_law(df, x="pf_days", y="loss", irreducible=True, n_boot=0)
    assert fit.status is FitStatus.BOUND_HIT
    assert "irreducible" in fit.message
    assert fit.params["irreducible"] == 0


def test_a_rising_loss_is_a_bound_hit() -> None:
    df = study().assign(loss=lambda d: d["loss"].to_numpy()[::-1])
    fit = fit_power_law(df, x="pf_days", y="loss", n_boot=0)
    assert fit.status is FitStatus.BOUND_HIT
    assert "exponent" in fit.message


def test_an_optimum_that_equals_its_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(problem, starts, weights=None, *_, **__):
        n = len(starts)
        return Minima(
            starts, problem.objective(starts, weights), np.zeros(n),
            np.zeros(starts.shape, dtype=bool), np.zeros(n, dtype=bool),
        )  # fmt: skip

    monkeypatch.setattr(fit_module, "minimise", lazy)
    fit = fit_power_law(study(noise=0.02), x="pf_days", y="loss", n_boot=0)
    assert fit.status is FitStatus.STALLED
    assert "equals its start" in fit.message


@pytest.mark.parametrize(
    ("gradient", "exhausted", "agree", "status"),
    [
        (1e-9, False, 1.0, FitStatus.CONVERGED),
        (1e-3, True, 1.0, FitStatus.MAX_ITER),
        (1e-3, False, 1.0, FitStatus.STALLED),
        (1e-9, False, 1 / 24, FitStatus.FEW_AGREE),
    ],
)
def test_verdicts(gradient: float, exhausted: bool, agree: float, status: FitStatus) -> None:
    minima = Minima(
        np.ones((1, 2)), np.ones(1), np.array([gradient]),
        np.zeros((1, 2), dtype=bool), np.array([exhausted]),
    )  # fmt: skip
    certificate = Certificate(1.0, gradient, 2000, 24, agree, (1.0,))
    x = np.array([1.0, 2.0])
    surface = Surface.of(Form.parse("x"), {"x": x}, x)
    found, message = fit_module._judge(minima, np.zeros((1, 2)), certificate, surface)
    assert found is status
    assert "starts agree" in message


@pytest.mark.parametrize(
    ("df", "options", "message"),
    [
        (study(), {"x": "flops"}, "no column 'flops'; its columns: run_key, pf_days, loss"),
        (study(), {"cluster": "seed"}, "no column 'seed'; pass cluster=None"),
        (
            study(n=2),
            {},
            "2 parameters in pf_days needs at least 3 distinct points, the table has 2",
        ),
        (study(n=3), {"irreducible": True}, "needs at least 4 distinct points"),
        (study().assign(loss=np.nan), {}, "no row is left; 16 rows left out: loss is null"),
        (study().assign(loss="high"), {}, "16 values that are no numbers, the first in row 1: 'hi"),
        (study().assign(loss=pd.Timestamp(2024, 1, 1)), {}, "'loss' holds datetime64"),
        (study().iloc[:0], {}, "no row is left"),
    ],
)
def test_nothing_usable_says_what_is_missing(df: pd.DataFrame, options: dict, message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit_power_law(df, **{"x": "pf_days", "y": "loss", **options})


def test_draws_with_too_few_points_are_counted() -> None:
    df = study(n=3, noise=0.01)  # all on the frontier
    fit = fit_power_law(df, x="pf_days", y="loss", n_boot=300, frontier=True)
    # three rows drawn from three: all the same with probability 1/9
    assert 10 < fit.bootstrap.failed < 60
    assert len(fit.draws) + fit.bootstrap.failed == 300


def test_integers_with_missing_values_are_read() -> None:
    df = study(n=8).assign(steps=pd.array([1, 2, 3, 4, 5, 6, 7, None], dtype="Int64"))
    fit = fit_power_law(df, x="steps", y="loss", n_boot=0)
    assert fit.dropped == {"steps is null": 1}
