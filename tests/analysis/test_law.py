"""The law in several factors, and which of its exponents count as known."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest

from scaling.analysis import FitError, FitStatus, FormError, Identification, Objective, fit_law
from scaling.analysis.fitting.verdicts import variance_inflation

TRUTH = {"n_total": (2e4, 0.3), "batch_size": (8.0, 0.5), "items_per_user": (2.0, 0.8)}

LAW = "E + " + " + ".join(TRUTH)


def grid(noise: float = 0.0, floor: float = 1.0, seed: int = 0) -> pd.DataFrame:
    values = ([1e4, 3e4, 1e5, 4e5], [16, 64, 256], [4, 16, 64])
    df = pd.DataFrame(itertools.product(*values), columns=list(TRUTH))
    y = floor + sum((df[name] / scale) ** -exponent for name, (scale, exponent) in TRUTH.items())
    y = y * np.exp(np.random.default_rng(seed).normal(0, noise, len(df)))
    return df.assign(loss=y, run_key=[f"run{i}" for i in range(len(df))])


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_a_planted_law_is_recovered(floor: float) -> None:
    fit = fit_law(grid(floor=floor), LAW[4 * (floor == 0) :], y="loss", n_boot=0)
    assert fit.status is FitStatus.CONVERGED, fit.message
    for name, (scale, exponent) in TRUTH.items():
        assert fit.params[f"exponent.{name}"] == pytest.approx(exponent, rel=1e-6)
        assert fit.params[f"scale.{name}"] == pytest.approx(scale, rel=1e-5)
        assert fit.params[f"coefficient.{name}"] == pytest.approx(scale**exponent, rel=1e-5)
    if floor:
        assert fit.params["irreducible"] == pytest.approx(floor, rel=1e-6)


def test_exponents_that_the_data_holds_are_identified() -> None:
    fit = fit_law(grid(noise=0.002), LAW, y="loss", n_boot=100)
    table = fit.identified()
    assert table["identified"].all(), table["reasons"].tolist()
    for name, (_, exponent) in TRUTH.items():
        assert table.loc[name, "lower"] < exponent < table.loc[name, "upper"]
    assert fit.floor().identified
    record = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert record["identified"]["exponent.n_total"]["identified"] is True
    assert record["condition_number"] == pytest.approx(fit.condition_number())


def test_noise_takes_the_identification_away() -> None:
    df = grid(noise=0.2).iloc[::2]
    table = fit_law(df, LAW, y="loss", n_boot=60).identified()
    assert not table["identified"].all()
    assert (table["reasons"][~table["identified"]] != "").all()


def test_aliased_factors_are_not_identified() -> None:
    df = grid(noise=0.002)
    df["epochs"] = df["batch_size"] * 3.0
    fit = fit_law(df, "E + n_total + batch_size + epochs", y="loss", n_boot=30)
    table = fit.identified()
    assert np.isinf(table.loc[["batch_size", "epochs"], "inflation"]).all()
    assert not table.loc[["batch_size", "epochs"], "identified"].any()
    assert "moves with the other factors" in table.loc["epochs", "reasons"]
    assert fit.condition_number() > 1e3
    json.dumps(fit.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (lambda d: d[d["batch_size"] < 256], "only 2 distinct values"),
        (lambda d: d.assign(batch_size=16 + d["batch_size"] / 64), "span only a factor of"),
        (lambda d: d.iloc[::4], "9 rows for 7 parameters"),
    ],
)
def test_a_design_that_cannot_tell_says_why(rows, reason: str) -> None:
    fit = fit_law(rows(grid(noise=0.002)), LAW, y="loss", n_boot=20)
    verdict = fit.identified().loc["batch_size"]
    assert not verdict["identified"]
    assert reason in verdict["reasons"]


def test_the_rule_is_an_argument() -> None:
    fit = fit_law(grid(noise=0.002), LAW, y="loss", n_boot=50)
    strict = fit.identified(Identification(max_relative_width=1e-6))
    assert not strict["identified"].any()


def test_predictions_at_other_runs() -> None:
    fit = fit_law(grid(noise=0.002), LAW, y="loss", n_boot=50)
    new = pd.DataFrame(
        {"n_total": [3e4, 3e6], "batch_size": [64, 64], "items_per_user": [16, 16]}, index=[5, 9]
    )
    table = fit.predict(new)
    assert table.index.tolist() == [5, 9]
    assert table["extrapolated"].tolist() == [False, True]
    truth = 1 + sum((new[name] / s) ** -p for name, (s, p) in TRUTH.items())
    np.testing.assert_allclose(table["y"], truth, rtol=0.01)
    assert ((table["lower"] <= table["y"]) & (table["y"] <= table["upper"])).all()


def test_variance_inflation_is_that_of_the_regressions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    x[:, 2] += 2 * x[:, 0]
    for k, value in enumerate(variance_inflation(x)):
        others = np.column_stack([np.ones(50), np.delete(x, k, axis=1)])
        residual = x[:, k] - others @ np.linalg.lstsq(others, x[:, k])[0]
        assert value == pytest.approx(x[:, k].var() / residual.var())


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ("", FormError, "it ends where a column is expected"),
        ("E + n_total + n_total", FormError, "two terms have the same columns"),
        ("E + n_total + width", FitError, "no column 'width'"),
        ("E + n_total + constant", FitError, "constant is 7 in every row"),
    ],
)
def test_laws_that_cannot_be_fitted(form: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_law(grid().assign(constant=7.0), form, y="loss", n_boot=0)


def test_with_every_parameter_held_there_is_nothing_to_fit() -> None:
    held = {"coefficient": 2.0, "exponent": 0.3}
    with pytest.raises(FitError, match="every parameter is held"):
        fit_law(grid(), "n_total", y="loss", fixed=held, n_boot=0)


def test_a_table_that_cannot_be_meant_is_refused() -> None:
    with pytest.raises(FitError, match="'loss' is what the law gives"):
        fit_law(grid(), "E + loss", y="loss", n_boot=0)
    twice = pd.concat([grid(), grid()[["n_total"]]], axis=1)
    with pytest.raises(FitError, match="more than one column 'n_total'"):
        fit_law(twice, "E + n_total", y="loss", n_boot=0)
    for unit in (1e-200, 1e200):
        with pytest.raises(FitError, match="loss reaches"):
            fit_law(grid().assign(loss=lambda t, u=unit: u * t["loss"]), LAW, y="loss", n_boot=0)
    with pytest.raises(FitError, match="0 or more, not -1"):
        fit_law(grid(), "E + n_total", y="loss", n_boot=-1)


@pytest.mark.parametrize(
    ("units", "draws", "reason"),
    [(1, 50, "units: 1, for 7"), (7, 50, "units: 7"), (36, 5, "5 boo")],
)
def test_what_gives_no_interval_identifies_nothing(units: int, draws: int, reason: str) -> None:
    runs = grid(noise=1e-3)
    runs["unit"] = np.arange(len(runs)) % units
    fit = fit_law(runs, LAW, y="loss", cluster="unit", n_boot=draws)
    assert fit.status is FitStatus.CONVERGED
    assert any(reason in said for said in fit.floor().reasons)
    assert fit.identified()["reasons"].str.contains(reason).all()


def test_a_negative_floor_is_judged_by_its_size() -> None:
    runs = grid(noise=1e-3).assign(accuracy=lambda t: -3 - t["loss"])
    fit = fit_law(
        runs, "E - n_total - batch_size - items_per_user", y="accuracy",
        objective=Objective("mse", scale="raw"), n_boot=50,
    )  # fmt: skip
    assert fit.params["irreducible"] == pytest.approx(-4, abs=0.1)
    assert fit.floor().identified, fit.floor().reasons


def test_predictions_that_cannot_be_made_are_refused_in_words() -> None:
    fit = fit_law(grid(noise=1e-3), "E + n_total", y="loss", n_boot=20)
    with pytest.raises(FitError, match="level is between 0 and 1"):
        fit.predict([1e5], level=95)
    with pytest.raises(FitError, match="level is between 0 and 1"):
        fit.ci(level=95)
    with pytest.raises(FitError, match="percentile, delta, profile, not 'bca'"):
        fit.ci(method="bca")  # type: ignore[arg-type]
    with pytest.raises(FitError, match="no numbers"):
        fit.predict({"n_total": ["large"]})
    with pytest.raises(FitError, match="same length"):
        fit.predict({"n_total": [1e5, 1e6], "other": [1.0]})
    assert len(fit.predict({"n_total": []})) == 0
    at_zero = fit.predict([0.0, 1e5])
    assert at_zero["y"].iloc[0] == np.inf
    assert at_zero[["lower", "upper"]].iloc[1].notna().all()


def test_a_column_is_no_markup_in_a_notebook() -> None:
    fit = fit_law(grid().rename(columns={"n_total": "<i>"}), "E + `<i>`", y="loss", n_boot=0)
    assert "<i>" not in fit._repr_html_()
    assert "&lt;i&gt;" in fit._repr_html_()
