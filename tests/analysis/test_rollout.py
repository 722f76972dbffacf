"""Fit small, predict large: windows, errors, baselines, and the interval of a new run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import fractional_matrix_power
from typer.testing import CliRunner

from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.predictive import predictive_interval, scaled_residuals
from scaling.analysis.fitting.rollout import rollout
from scaling.analysis.fitting.status import FitError
from scaling.cli import app

SQUARES = Objective(loss="mse")


def table(n: int = 24, floor: float = 0.0, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    x = np.geomspace(1.0, 1e5, n)
    e = np.random.default_rng(seed).normal(0, noise, n)
    return pd.DataFrame({"x": x, "loss": (floor + 5 * x**-0.2) * np.exp(e)})


def line(df: pd.DataFrame) -> tuple[float, float]:
    """Slope and intercept of ln loss over ln x, by least squares."""
    slope, intercept = np.polyfit(np.log(df["x"]), np.log(df["loss"]), 1)
    return float(slope), float(intercept)


# ---- windows, errors, baselines -----------------------------------------------------------------


def test_a_law_that_holds_predicts_and_beats_what_is_free() -> None:
    found = rollout(table(floor=2.0), "E + x", y="loss", by="x", n_boot=0)
    windows = found.table()
    assert len(windows) == 6
    assert (windows["error"] < 1e-6).all()
    assert (windows["skill_power"] > 0.999).all()
    assert (windows["rows_fitted"] + windows["rows_held"] == 24).all()
    assert windows["ratio"].tolist() == pytest.approx((1e5 / windows["cut"]).tolist())
    assert windows["coverage"].isna().all()  # no draws, no interval


def test_windows_of_a_factor_with_few_values_are_its_values() -> None:
    df = pd.concat([table(8, noise=0.01, seed=s) for s in range(3)], ignore_index=True)
    found = rollout(df.iloc[::-1], "x", y="loss", by="x", n_boot=0, cuts=None)
    fitted_values = df["x"].drop_duplicates().sort_values().tolist()
    assert found.table()["cut"].tolist()[-1] == fitted_values[-2]
    assert found.table()["rows_held"].tolist()[-1] == 3


def test_errors_and_skill_are_those_of_least_squares() -> None:
    df = table(12, floor=1.0, noise=0.02)
    cut = float(df["x"][7])
    found = rollout(df, "E + x", y="loss", by="x", cuts=[cut], n_boot=0, objective=SQUARES)
    slope, intercept = line(df[:8])
    held, rows = df[8:], found.predictions
    power = intercept + slope * np.log(held["x"]) - np.log(held["loss"])
    assert rows["error_power"].to_numpy() == pytest.approx(power.to_numpy(), abs=1e-7)
    last = np.log(df["loss"][7]) - np.log(held["loss"])
    assert rows["error_last"].to_numpy() == pytest.approx(last.to_numpy(), abs=1e-12)
    lowest = np.log(df["loss"][:8].min()) - np.log(held["loss"])
    assert rows["error_lowest"].to_numpy() == pytest.approx(lowest.to_numpy(), abs=1e-12)
    error = np.log(rows["predicted"] / rows["y"])
    assert rows["error"].to_numpy() == pytest.approx(error.to_numpy(), abs=1e-12)
    window = found.table().iloc[0]
    assert window["bias"] == pytest.approx(error.mean())
    assert window["skill_power"] == pytest.approx(1 - error.abs().mean() / np.abs(power).mean())
    assert found.scores()["skill_last"] == pytest.approx(window["skill_last"])


def test_a_power_law_has_no_skill_over_itself() -> None:
    found = rollout(table(noise=0.02), "x", y="loss", by="x", n_boot=0)
    assert found.table()["skill_power"].to_numpy() == pytest.approx(0, abs=1e-6)


def test_scores_by_extrapolation_ratio_cover_every_prediction() -> None:
    found = rollout(table(noise=0.02), "x", y="loss", by="x", cuts=[10, 1e3], n_boot=20)
    rows, classes = found.predictions, found.by_ratio()
    assert classes["rows"].sum() == len(rows)
    near = rows[(rows["ratio"] > 1) & (rows["ratio"] <= 2)]
    assert classes["from"][0] == 1
    assert classes["rows"][0] == len(near)
    assert classes["error"][0] == pytest.approx(near["error"].abs().mean())
    inside = (rows["lower"] <= rows["y"]) & (rows["y"] <= rows["upper"])
    assert found.scores()["coverage"] == pytest.approx(inside.mean())


def test_checkpoints_of_fitted_runs_are_counted() -> None:
    step, run = np.meshgrid([1.0, 2, 4, 8, 16], range(4))
    df = pd.DataFrame({"run_key": run.ravel(), "step": step.ravel(), "n": 10.0 ** run.ravel()})
    df["loss"] = 3 * df["n"] ** -0.05 * df["step"] ** -0.1
    new = df["run_key"] == 3
    df = df[~(new & (df["step"] <= 4))]  # run 3 has late checkpoints alone
    found = rollout(df, "n * step", y="loss", by="step", cuts=[4.0], n_boot=0)
    window = found.table().iloc[0]
    assert (window["runs_fitted"], window["rows_held"], window["rows_of_fitted_runs"]) == (3, 8, 6)
    assert found.predictions.loc[~found.predictions["fitted_run"], "run"].unique().tolist() == ["3"]


def test_a_window_that_cannot_be_fitted_says_why() -> None:
    df = table(12)
    found = rollout(df, "E + x", y="loss", by="x", cuts=[float(df["x"][1]), 1e3], n_boot=0)
    windows = found.table()
    assert "points" in windows["status"][0]
    assert np.isnan(windows["error"][0])
    assert windows["status"][1] == "CONVERGED"
    assert found.predictions["cut"].unique().tolist() == [1e3]
    with pytest.raises(FitError, match=r"no window of x can be fitted: .*points"):
        rollout(df, "E + x", y="loss", by="x", cuts=[float(df["x"][1])], n_boot=0)
    with pytest.raises(FitError, match=r"x up to 1e\+09 parts 12 rows from 0; it runs from 1 to"):
        rollout(df, "x", y="loss", by="x", cuts=[1e9], n_boot=0)


def test_rows_without_a_number_are_left_out_and_counted() -> None:
    df = table(20)
    df.loc[3, "loss"], df.loc[5, "x"] = np.nan, np.inf
    found = rollout(df, "x", y="loss", by="x", n_boot=0)
    assert found.rows == 18
    assert found.dropped == {"loss is null": 1, "x is not positive and finite": 1}
    with pytest.raises(FitError, match="no column 'flops'; its columns: x, loss"):
        rollout(df, "x", y="loss", by="flops")
    with pytest.raises(FitError, match="column 'name' holds 18 values that are no numbers"):
        rollout(df.assign(name="a"), "x", y="loss", by="name")


def test_the_record_is_json_and_the_figure_has_every_prediction() -> None:
    found = rollout(table(noise=0.02), "x", y="loss", by="x", cuts=[10, 1e3], n_boot=50)
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["form"] == "x"
    assert len(report["predictions"]) == len(found.predictions)
    assert report["by_ratio"][-1]["to"] is None or report["by_ratio"][-1]["to"] <= 16
    ax = found.plot()
    points = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    drawn = np.sort(points[:, 1])
    assert drawn == pytest.approx(np.sort(found.predictions["error"]))
    filled = sum(len(c.get_offsets()) for c in ax.collections if len(c.get_facecolors()))  # type: ignore[attr-defined]
    assert filled == found.predictions["covered"].sum()


def test_a_bound_that_some_window_cannot_hold_is_that_window_s_status() -> None:
    """E may reach the largest loss of a window's rows, and here the first has small ones only."""
    df = table(noise=0.02, floor=2.0).assign(back=lambda d: 1 / d["x"])
    back, loss = (df.sort_values("back")[name].to_numpy() for name in ("back", "loss"))
    low = 1.001 * float(loss[:6].max())
    assert low < loss[:18].max()
    found = rollout(
        df, "E + x", y="loss", by="back", cuts=[back[5], back[17]], n_boot=0,
        bounds={"irreducible": (low, None)},
    )  # fmt: skip
    first, second = found.table()["status"]
    assert first == "the bounds of irreducible lie beyond the default; give both"
    assert second in {"CONVERGED", "BOUND_HIT"}
    with pytest.raises(FitError, match="no window of back can be fitted: the bounds of irr"):
        rollout(
            df, "E + x", y="loss", by="back", cuts=[back[5]], n_boot=0,
            bounds={"irreducible": (low, None)},
        )  # fmt: skip


# ---- the interval of a new run ------------------------------------------------------------------


def test_residuals_are_scaled_up_by_leverage() -> None:
    df = table(10, noise=0.05)
    fit = fit_law(df, "x", y="loss", objective=SQUARES, n_boot=0)
    design = np.stack([np.ones(10), np.log(df["x"])], axis=1)
    hat = design @ np.linalg.solve(design.T @ design, design.T)
    slope, intercept = line(df)
    residual = (np.log(df["loss"]) - intercept - slope * np.log(df["x"])).to_numpy()
    alone, _ = scaled_residuals(fit)
    assert alone == pytest.approx(residual / np.sqrt(1 - np.diag(hat)), abs=1e-6)
    codes = np.repeat(np.arange(5), 2)
    fit = fit_law(df.assign(run=codes), "x", y="loss", objective=SQUARES, n_boot=0, cluster="run")
    paired, _ = scaled_residuals(fit)
    for code in range(5):
        rows = codes == code
        block = np.eye(2) - hat[np.ix_(rows, rows)]
        expected = fractional_matrix_power(block, -0.5) @ residual[rows]
        assert paired[rows] == pytest.approx(expected, abs=1e-6)


def coverage(seeds: range, runs: int, rows: int, between: float, within: float) -> float:
    """Share of new rows inside their 95 % interval, half of them beyond the fitted range."""
    inside = []
    for seed in seeds:
        rng = np.random.default_rng(seed)

        def world(n: int, each: int, high: float, rng: np.random.Generator = rng) -> pd.DataFrame:
            run = np.repeat(np.arange(n), each)
            x = np.exp(rng.uniform(0, high, n))[run] * np.exp(rng.uniform(0, 1, n * each))
            noise = rng.normal(0, between, n)[run] + rng.normal(0, within, n * each)
            return pd.DataFrame({"run_key": run, "x": x, "loss": 5 * x**-0.1 * np.exp(noise)})

        df, new = world(runs, rows, 6.0), world(100, 1, 12.0)
        fit = fit_law(df, "x", y="loss", n_boot=200, objective=SQUARES)
        found = predictive_interval(fit, new)
        inside.append(((found["lower"] < new["loss"]) & (new["loss"] < found["upper"])).mean())
    return float(np.mean(inside))


def test_the_interval_holds_new_runs() -> None:
    # over such simulations the mean has a standard error of about 0.01
    assert coverage(range(20), runs=40, rows=1, between=0.0, within=0.01) == pytest.approx(
        0.95, abs=0.03
    )


@pytest.mark.slow
def test_the_interval_holds_new_runs_where_rows_of_a_run_go_together() -> None:
    assert 0.92 < coverage(range(60), runs=20, rows=5, between=0.01, within=0.003) < 0.975


def test_an_interval_needs_draws() -> None:
    df = table()
    with pytest.raises(FitError, match="no interval for loss: the fit has no bootstrap draws"):
        predictive_interval(fit_law(df, "x", y="loss", n_boot=0), df)


# ---- the verb -----------------------------------------------------------------------------------


def call(*words: object) -> Any:
    return CliRunner().invoke(app, ["rollout", *(str(w) for w in words)])


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_the_verb_reads_any_table(tmp_path: Path, ending: str) -> None:
    df, path = table(noise=0.01).assign(state="done"), tmp_path / f"runs.{ending}"
    df.loc[23, "state"] = "diverged"
    if ending == "jsonl":
        df.to_json(path, orient="records", lines=True)
    else:
        getattr(df, f"to_{ending}")(path, index=False)
    words = [path, "--form", "x", "--by", "x", "--n-boot", 20, "--cut", 100,
             "--rule", "state != diverged"]  # fmt: skip
    said = call(*words).stdout
    assert "rule state != diverged: 1 rows dropped" in said
    assert "23 of 23 rows used" not in said
    report = json.loads(call(*words, "--json").stdout)
    assert report["selection"]["used"] == report["rows"]["used"] == 23
    assert [w["cut"] for w in report["windows"]] == [100]
    library = rollout(df[:23], "x", y="loss", by="x", cuts=[100.0], n_boot=20)
    assert report["windows"][0]["error"] == pytest.approx(library.table()["error"][0], rel=1e-6)


def test_the_verb_fits_as_it_is_told(tmp_path: Path) -> None:
    df = table(noise=0.02, floor=2.0).assign(w=lambda d: 1 / d["x"])
    df.to_csv(tmp_path / "runs.csv", index=False)
    words = ["--form", "E + x", "--by", "x", "--cut", 100, "--n-boot", 0, "--loss", "mse",
             "--scale", "raw", "--weights", "w", "--overestimate", 2, "--bound", "exponent=:0.2",
             "--fix", "irreducible=1.9"]  # fmt: skip
    report = json.loads(call(tmp_path / "runs.csv", *words, "--json").stdout)
    library = rollout(
        df, "E + x", y="loss", by="x", cuts=[100.0], n_boot=0, weights="w",
        objective=Objective("mse", scale="raw", overestimate=2.0), fixed={"irreducible": 1.9},
        bounds={"exponent": (None, 0.2)},
    )  # fmt: skip
    found, expected = report["windows"][0], library.table().iloc[0]
    assert found["status"] == expected["status"]
    assert found["error"] == pytest.approx(expected["error"], rel=1e-9)
    plain = rollout(df, "E + x", y="loss", by="x", cuts=[100.0], n_boot=0).table()["error"][0]
    assert found["error"] != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--form", "x", "--by", "flops"], "no column 'flops'"),
        (["--form", "x +", "--by", "x"], "x +"),
        (["--form", "x", "--by", "x", "--rule", "what"], "rule 'what' is neither"),
        (["--form", "x", "--by", "x", "--loss", "l2"], "l2"),
        (["--form", "x", "--by", "x", "--scale", "ln"], "ln"),
        (["--form", "x", "--by", "x", "--fix", "slope=1"], "has no parameter 'slope'"),
        (["--form", "x", "--by", "x", "--bound", "exponent=1"], "NAME=LOW:HIGH"),
        (["--form", "x", "--by", "x", "--weights", "w"], "no column 'w'"),
        (["--form", "x", "--by", "x", "--level", "1"], "level is between 0 and 1"),
        (["--form", "x", "--by", "x", "--cluster", "run"], "no column 'run' to name the run"),
    ],
)
def test_the_verb_says_what_is_wrong(tmp_path: Path, words: list[str], said: str) -> None:
    path = tmp_path / "runs.csv"
    table().to_csv(path, index=False)
    result = call(path, *words)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: ")
    assert said in result.stderr


def test_the_verb_says_that_there_is_no_file(tmp_path: Path) -> None:
    result = call(tmp_path / "runs.csv", "--form", "x", "--by", "x")
    assert result.exit_code == 2
    assert "runs.csv: no such file" in result.stderr


# ---- published tables ---------------------------------------------------------------------------


@pytest.mark.data
def test_chinchilla_extrapolates_over_compute(clue_test_data: Path) -> None:
    df = pd.read_csv(clue_test_data / "published_fits/epoch_chinchilla/svg_extracted_data.csv")
    df["N"], df["C"] = df["Model Size"], df["Training FLOP"]
    df["D"] = df["C"] / 6 / df["N"]
    df = df[df["loss"] < df["loss"].nlargest(5).min()]
    found = rollout(df, "E + N + D", y="loss", by="C", cuts=[1e20], n_boot=0)
    window = found.table().iloc[0]
    assert window["rows_fitted"] + window["rows_held"] == 240
    assert abs(window["bias"]) < 0.01
    assert window["skill_power"] > 0.7


# 13B predictions of OLMo-ladder's step 1, bits per byte (their figures/step1_main.csv)
PUBLISHED = {
    "mmlu_avg_test_5shot": 0.7501562, "hellaswag_val_5shot": 0.6531766,
    "arc_challenge_test_5shot": 0.7833239, "arc_easy_test_5shot": 0.5931046,
    "piqa_val_5shot": 0.8747949, "csqa_val_5shot": 0.6617283,
    "socialiqa_val_5shot": 0.9915737, "openbookqa_test_5shot": 1.2750065,
}  # fmt: skip


@pytest.mark.data
def test_the_olmo_ladder_predicts_its_large_models_as_published(clue_test_data: Path) -> None:
    df = pd.read_csv(clue_test_data / "published_fits/olmo_ladder/step1_bpb.csv")
    small = float(df.loc[df["mode"] == "train", "N"].max())
    assert set(df["task"]) == set(PUBLISHED)
    for task, rows in df.groupby("task"):
        found = rollout(rows, "E + N + D", y="bpb", by="N", cuts=[small], n_boot=0)
        assert found.table()["rows_fitted"][0] == 16
        largest = found.predictions.loc[found.predictions["ratio"].idxmax()]
        assert largest["predicted"] == pytest.approx(PUBLISHED[str(task)], abs=1e-3)


def test_a_column_without_two_values_is_refused() -> None:
    runs = pd.DataFrame({"n": [5.0, 5.0, 5.0], "loss": [1.0, 2.0, 3.0]})
    with pytest.raises(FitError, match="n has no two values"):
        rollout(runs, "n", y="loss", by="n", n_boot=0)
