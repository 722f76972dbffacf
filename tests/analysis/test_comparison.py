"""Which form wins: held-out errors, their standard errors, likelihoods and verdicts."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, optimize, stats

from scaling.analysis.fitting.comparison import FormComparison, compare_forms, compute_forms
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.likelihood import aicc, log_likelihood
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.status import FitError

WORSE = "every other form is worse by cross-validation or rollout"
SQUARES = Objective(loss="mse")


def world(form: str, n: int = 40, noise: float = 0.003, seed: int = 0) -> pd.DataFrame:
    x = np.geomspace(1.0, 1e5, n)
    y = {
        "floor": 2 + 3 * x**-0.3,
        "power": 5 * x**-0.1,
        "line": 6 - 0.3 * np.log(x),
    }[form]  # fmt: skip
    y = y * np.exp(np.random.default_rng(seed).normal(0, noise, n))
    return pd.DataFrame({"x": x, "loss": y})


# ---- likelihood ---------------------------------------------------------------------------------

RESIDUALS = np.random.default_rng(5).standard_t(3, 60) * 0.01


def test_squares_are_normal_and_absolute_values_laplace() -> None:
    normal = stats.norm.logpdf(RESIDUALS, 0, np.sqrt((RESIDUALS**2).mean())).sum()
    laplace = stats.laplace.logpdf(RESIDUALS, 0, np.abs(RESIDUALS).mean()).sum()
    assert log_likelihood(RESIDUALS, Objective(loss="mse")) == pytest.approx(normal, rel=1e-9)
    assert log_likelihood(RESIDUALS, Objective(loss="lad")) == pytest.approx(laplace, rel=1e-9)


@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("over", [1.0, 10.0])
def test_huber_has_the_density_that_integrates_to_one(delta: float, over: float) -> None:
    def rho(r: float) -> float:
        size = abs(r)
        value = size**2 / 2 if size <= delta else delta * (size - delta / 2)
        return value * (over if r > 0 else 1.0)

    def negative(log_tau: float) -> float:
        tau = math.exp(log_tau)
        wide = 60 * max(math.sqrt(tau), tau / delta)
        points = sorted({-delta, 0.0, delta, -math.sqrt(tau), math.sqrt(tau / over)})
        inside = [p for p in points if abs(p) < wide]
        z, _ = integrate.quad(lambda r: math.exp(-rho(r) / tau), -wide, wide, points=inside,
                              limit=500)  # fmt: skip
        return sum(rho(r) for r in RESIDUALS) / tau + len(RESIDUALS) * math.log(z)

    mean = sum(rho(r) for r in RESIDUALS) / len(RESIDUALS)
    best = optimize.minimize_scalar(
        negative, bounds=(math.log(mean) - 3, math.log(mean) + 3), method="bounded"
    )
    objective = Objective(loss="huber", delta=delta, overestimate=over)
    assert log_likelihood(RESIDUALS, objective) == pytest.approx(-best.fun, rel=1e-6)


def test_aicc_is_that_of_hurvich_and_tsai() -> None:
    n, parameters = 20, 3
    rss = 0.04
    residuals = np.full(n, math.sqrt(rss / n))
    k = parameters + 1
    expected = n * (math.log(2 * math.pi * rss / n) + 1) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
    assert aicc(log_likelihood(residuals, SQUARES), parameters, n) == pytest.approx(expected)
    assert math.isnan(aicc(0.0, 3, 5))


# ---- which form wins ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "winner"),
    [("floor", "power law with floor"), ("line", "log-linear")],
)
def test_the_true_law_in_compute_wins(truth: str, winner: str) -> None:
    found = compare_forms(world(truth), compute_forms("x"), y="loss", by="x", folds=5)
    assert found.candidates() == [winner]
    assert found.verdict() == f"{compute_forms('x')[winner]} wins: " + WORSE
    table = found.table()
    assert table.index[0] == winner
    assert table["aicc"][winner] == 0
    others = table.drop(winner)
    assert (others["aicc"] > 20).all()
    assert (others["rollout_verdict"] == "worse").all()


def test_a_floor_that_the_data_does_not_need_is_not_distinguishable() -> None:
    df = world("power", noise=0.03)
    found = compare_forms(df, ["x", "E + x"], y="loss", folds=5)
    assert found.candidates() == ["x", "E + x"]
    assert found.verdict() == "not distinguishable by cross-validation: x; E + x"
    assert sorted(found.table()["aicc"])[0] == 0
    assert found.table()["aicc"].max() < 6  # of -2 ln likelihood: no evidence either way


def test_held_out_errors_are_those_of_leaving_each_run_out() -> None:
    df = world("power", n=10, noise=0.05).assign(run_key=list("aabbccddee"))
    found = compare_forms(df, ["x", "E + x"], y="loss", folds=10, objective=SQUARES)
    errors = found.held_out["cross_validation"]["x"]
    for run, rows in df.groupby("run_key"):
        rest = df[df["run_key"] != run]
        line = np.polyfit(np.log(rest["x"]), np.log(rest["loss"]), 1)
        off = np.polyval(line, np.log(rows["x"])) - np.log(rows["loss"])
        assert errors[run] == pytest.approx(np.abs(off).mean(), abs=1e-7)


def test_rollout_errors_average_over_the_windows_that_hold_a_row_out() -> None:
    df = world("power", n=6, noise=0.05)
    found = compare_forms(df, ["x", "E + x"], y="loss", by="x", objective=SQUARES, folds=6)
    # three points do not hold three parameters, so that both forms are judged from four on
    assert [s.partition(":")[0] for s in found.skipped["rollout"]] == [
        f"x up to {cut:.6g}" for cut in df["x"][:3]
    ]
    errors = found.held_out["rollout"]["x"]
    assert sorted(errors.index) == ["4", "5"]
    off = []
    for n in (4, 5):
        line = np.polyfit(np.log(df["x"][:n]), np.log(df["loss"][:n]), 1)
        off.append(abs(np.polyval(line, math.log(df["x"][5])) - math.log(df["loss"][5])))
    assert errors["5"] == pytest.approx(np.mean(off), abs=1e-7)


def test_a_form_that_cannot_be_fitted_is_not_compared() -> None:
    df = world("power", noise=0.03).assign(z=1.0)
    found = compare_forms(df, ["x", "E + x", "x * z"], y="loss", folds=4)
    assert "z is 1 in every row" in found.failed["x * z"]
    assert found.table()["status"]["x * z"] == found.failed["x * z"]
    assert found.candidates() == ["x", "E + x"]
    nothing = compare_forms(df, ["x", "x * z"], y="loss", folds=4)
    assert nothing.candidates() == []
    assert nothing.verdict().startswith("nothing could be compared: z is 1 in every row")
    assert list(nothing.table().index) == ["x", "x * z"]


def test_forms_are_compared_on_the_same_rows() -> None:
    df = world("power").assign(z=lambda d: d["x"] ** 0.5)
    df.loc[[3, 4], "z"] = np.nan
    found = compare_forms(df, ["x", "z"], y="loss", folds=4)
    assert (found.rows, found.dropped) == (38, {"z is null": 2})
    assert found.differences("cross_validation")["difference"].max() == pytest.approx(0, abs=1e-6)
    assert "not distinguishable" in found.verdict()


def test_the_record_is_json() -> None:
    found = compare_forms(world("floor"), ["x", "E + x"], y="loss", folds=3)
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["candidates"] == found.candidates()
    assert [f["name"] for f in report["forms"]] == list(found.table().index)


def test_a_comparison_needs_two_forms_and_two_runs() -> None:
    df = world("power")
    with pytest.raises(FitError, match="needs two different forms"):
        compare_forms(df, ["x", "x"], y="loss")
    with pytest.raises(FitError, match="needs two, the table has 1"):
        compare_forms(df.assign(run_key="a"), ["x", "E + x"], y="loss")


# ---- verdicts -----------------------------------------------------------------------------------


def judged(**held_out: dict[str, list[float]]) -> FormComparison:
    names = list(next(iter(held_out.values())))
    return FormComparison(
        y="loss", by=None, cluster=None, level=0.95, forms={n: Form.parse(n) for n in names},
        fits=dict.fromkeys(names), failed={}, aicc={}, rows=0, dropped={}, skipped={},
        held_out={k: pd.DataFrame(v) for k, v in held_out.items()},
    )  # fmt: skip


def test_a_difference_counts_beside_its_standard_error_over_runs() -> None:
    a, b = [1.0, 2.0, 1.0, 2.0], [1.5, 2.6, 1.4, 2.5]
    found = judged(cross_validation={"a": a, "b": b}).differences("cross_validation")
    test = stats.ttest_rel(b, a)
    assert found["difference"]["b"] == pytest.approx(0.5)
    assert found["difference"]["b"] / found["se"]["b"] == pytest.approx(test.statistic)
    assert found["verdict"].tolist() == ["best", "worse"]
    scattered = judged(cross_validation={"a": a, "b": [0.0, 4.0, 0.5, 3.0]})
    assert scattered.differences("cross_validation")["verdict"]["b"] == "not distinguishable"


def test_more_forms_make_the_test_stricter() -> None:
    a = np.zeros(4)
    b = a + np.array([0.5, 0.1, 0.5, 0.1])
    t = b.mean() / (b.std(ddof=1) / 2)
    assert stats.t.ppf(0.95, 3) < t < stats.t.ppf(1 - 0.05 / 3, 3)
    two = {"a": list(a), "b": list(b)}
    four = two | {"c": list(b + 9), "d": list(b + 9)}
    assert judged(cross_validation=two).candidates() == ["a"]
    assert judged(cross_validation=four).candidates() == ["a", "b"]


def test_no_form_wins_where_the_criteria_disagree() -> None:
    a, b = [1.0, 1.1, 1.0, 1.1], [2.0, 2.1, 2.1, 2.0]
    found = judged(cross_validation={"a": a, "b": b}, rollout={"a": b, "b": a})
    assert found.candidates() == []
    assert found.verdict() == "no form wins: cross-validation and rollout disagree"


def test_a_law_that_predicts_nothing_above_zero_is_worse() -> None:
    found = judged(rollout={"a": [1.0, 2.0], "b": [0.5, math.inf]})
    assert found.differences("rollout")["verdict"].tolist() == ["best", "worse"]


@pytest.mark.data
@pytest.mark.slow
def test_the_additive_law_wins_on_chinchilla(clue_test_data: Path) -> None:
    df = pd.read_csv(clue_test_data / "published_fits/epoch_chinchilla/svg_extracted_data.csv")
    df["N"], df["C"] = df["Model Size"], df["Training FLOP"]
    df["D"] = df["C"] / 6 / df["N"]
    df = df[df["loss"] < df["loss"].nlargest(5).min()]
    forms = ["E + N + D", "N + D", "E + N * D", "N * D"]
    found = compare_forms(df, forms, y="loss", by="C", folds=5)
    assert found.candidates() == ["E + N + D"]
