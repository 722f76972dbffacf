"""Fits that others published, on their own tables: what they reported is met, or beaten.

Each number carries its source; ``published_fits/*/PROVENANCE.txt`` beside the data says where the
tables are from.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling.analysis import FitStatus, LawFit, Objective, fit_law

pytestmark = pytest.mark.data

GEMSTONES = (
    "slim_chinchilla", "hot_100b+", "hot", "lr_ablation_hot", "cool_end",
)  # fmt: skip


@pytest.fixture(scope="module")
def published() -> Path:
    folder = os.environ.get("CLUE_TEST_DATA")
    if not folder:
        pytest.skip("CLUE_TEST_DATA names no folder")
    path = Path(folder) / "published_fits"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


# ---- Besiroglu et al. 2024 (arXiv 2404.10102): runs of Hoffmann et al. 2022, read off a figure ---


@pytest.fixture(scope="module")
def chinchilla(published: Path) -> pd.DataFrame:
    df = pd.read_csv(published / "epoch_chinchilla" / "svg_extracted_data.csv")
    df = df.rename(columns={"Model Size": "n"}).dropna(subset=["loss", "n", "Training FLOP"])
    df["d"] = df["Training FLOP"] / (6 * df["n"])
    # the authors leave out the five rows with the highest loss
    df = df[df["loss"] < df["loss"].nlargest(5).iloc[-1]]
    assert len(df) == 240
    return df


def fit_chinchilla(df: pd.DataFrame, **options: Any) -> LawFit:
    return fit_law(df, "E + n + d", y="loss", **{"n_boot": 0, **options})


def test_the_optimum_of_published_data_is_reached(chinchilla: pd.DataFrame) -> None:
    """Grid fit of their notebook: objective 1.0182740346e-3; the best known: 1.0182740178e-3."""
    fit = fit_chinchilla(chinchilla)
    assert fit.status is FitStatus.CONVERGED
    assert fit.certificate.agree == 1.0
    assert fit.certificate.objective <= 1.018274035e-3
    assert fit.certificate.objective == pytest.approx(0.0010182740178, rel=1e-9)
    assert fit.params["exponent.n"] == pytest.approx(0.34731, abs=2e-5)
    assert fit.params["exponent.d"] == pytest.approx(0.36717, abs=2e-5)
    assert fit.params["irreducible"] == pytest.approx(1.817218, abs=1e-4)
    assert fit.params["coefficient.n"] == pytest.approx(477.826, rel=1e-3)
    assert fit.params["coefficient.d"] == pytest.approx(2143.417, rel=1e-3)


@pytest.mark.parametrize("objective", [Objective("lad"), Objective(delta=1e-6)])
def test_the_published_headline_is_that_of_least_absolute_deviations(
    chinchilla: pd.DataFrame, objective: Objective
) -> None:
    fit = fit_chinchilla(chinchilla, objective=objective)
    assert fit.status is FitStatus.CONVERGED, fit.message
    assert fit.params["coefficient.n"] == pytest.approx(482.006, rel=1e-3)
    assert fit.params["coefficient.d"] == pytest.approx(2085.43, rel=1e-3)
    assert fit.params["irreducible"] == pytest.approx(1.81686, abs=1e-4)
    assert fit.params["exponent.n"] == pytest.approx(0.34781, abs=1e-4)
    assert fit.params["exponent.d"] == pytest.approx(0.36585, abs=1e-4)


def test_the_objective_is_part_of_the_answer(chinchilla: pd.DataFrame, published: Path) -> None:
    reference = json.loads((published / "epoch_chinchilla" / "reference_optima.json").read_text())
    table = fit_chinchilla(chinchilla).sensitivity()
    for row, key in (
        ("huber 0.0001", "delta_1e-4"),
        ("huber 0.01", "delta_1e-2"),
        ("mse", "delta_inf_(log-MSE)"),
    ):
        expected = reference[key]
        assert table.loc[row, "exponent.n"] == pytest.approx(expected["alpha"], abs=2e-5)
        assert table.loc[row, "exponent.d"] == pytest.approx(expected["beta"], abs=2e-5)
        assert table.loc[row, "coefficient.d"] == pytest.approx(expected["B"], rel=1e-4)


def test_raw_squares_are_those_of_three_other_tools(
    chinchilla: pd.DataFrame,
) -> None:
    """Runs below 1e21 FLOPs, N in millions, D in billions, squares of the raw loss."""
    df = chinchilla[chinchilla["Training FLOP"] < 1e21]
    df = df.assign(n=df["n"] / 1e6, d=df["d"] / 1e9)
    assert len(df) == 217
    fit = fit_chinchilla(df, objective=Objective("mse", scale="raw"))
    assert fit.status is FitStatus.CONVERGED
    assert 2 * fit.certificate.objective == pytest.approx(0.062414, abs=5e-7)
    for name, digits in (
        ("irreducible", 1.9051), ("coefficient.n", 4.0005), ("coefficient.d", 1.0509),
        ("exponent.n", 0.3511), ("exponent.d", 0.4587),
    ):  # fmt: skip
        assert fit.params[name] == pytest.approx(digits, abs=5e-5)


@pytest.mark.slow
def test_published_error_bars_are_met(chinchilla: pd.DataFrame) -> None:
    """4,000 bootstraps: A 124.5, B 1293, E .0257, alpha .0154, beta .0206, a .020 (their cells 25,
    26, 59), of least absolute deviations."""
    fit = fit_chinchilla(chinchilla, objective=Objective("lad"), n_boot=4000)
    summary = fit.summary()
    errors = summary["standard_error"]
    for name, error in (("irreducible", 0.0257), ("exponent.n", 0.0154), ("exponent.d", 0.0206)):
        assert errors[name] == pytest.approx(error, rel=0.1)
    # the tail of A and B is heavy: their standard errors are themselves uncertain
    assert errors["coefficient.n"] == pytest.approx(124.5, rel=0.2)
    assert errors["coefficient.d"] == pytest.approx(1293, rel=0.2)
    share = fit.draws["exponent.d"] / (fit.draws["exponent.n"] + fit.draws["exponent.d"])
    assert share.mean() == pytest.approx(0.513, abs=0.005)
    assert share.std() == pytest.approx(0.020, rel=0.1)
    for name, low, high in (
        ("exponent.n", 0.317, 0.373), ("exponent.d", 0.331, 0.415), ("irreducible", 1.769, 1.871),
    ):  # fmt: skip
        assert summary.loc[name, "lower"] == pytest.approx(low, abs=0.005)
        assert summary.loc[name, "upper"] == pytest.approx(high, abs=0.005)
    assert fit.identified()["identified"].all()
    assert fit.floor().identified


# ---- McLeish et al. 2025 (arXiv 2502.06857), Gemstones: 2, 3 and 4 terms ------------------------


def gemstones(published: Path) -> list[tuple[str, str, float, bool, Path]]:
    """Table, terms, delta, whether embeddings are left out, file of the fit."""
    found = []
    for folder, delta in (("parameters_delta-3", 1e-3), ("parameters_delta-4", 1e-4)):
        for path in sorted((published / "gemstones/published_fits" / folder).glob("*.json")):
            kind, rest = path.stem.removeprefix("approach_3_").split("_grid_search_0_")
            table = rest.removesuffix("_no_embeds")
            if table in GEMSTONES:
                found.append((table, kind, delta, rest != table, path))
    return found


OPTIMA = {
    ("slim_chinchilla", "parameters", 1e-3): 1.204360e-4,
    ("slim_chinchilla", "parameters", 1e-4): 1.30364e-5,
    ("hot_100b+", "parameters", 1e-3): 6.5925342e-3,
    ("hot_100b+", "parameters", 1e-4): 6.923289e-4,
    ("hot", "parameters", 1e-3): 1.9816128e-3,
    ("hot", "parameters", 1e-4): 2.075052e-4,
    ("lr_ablation_hot", "parameters", 1e-3): 1.9728624e-3,
    ("lr_ablation_hot", "parameters", 1e-4): 2.058421e-4,
    ("cool_end", "parameters", 1e-3): 1.9640864e-3,
    ("cool_end", "parameters", 1e-4): 2.047791e-4,
    ("hot_100b+", "width_depth", 1e-3): 3.8782174e-3,
    ("hot_100b+", "width_depth", 1e-4): 4.199462e-4,
    ("hot_100b+", "width_depth_parameters", 1e-3): 2.6427291e-3,
    ("hot_100b+", "width_depth_parameters", 1e-4): 2.948053e-4,
    ("lr_ablation_hot", "width_depth_parameters", 1e-3): 1.0088810e-3,
    ("lr_ablation_hot", "width_depth_parameters", 1e-4): 1.091852e-4,
}
"""Best objectives known for 16 of the fits (PROVENANCE.txt), to the digits given."""


@pytest.mark.slow
def test_gemstones_objectives_are_reached_or_beaten(published: Path) -> None:
    cases = gemstones(published)
    assert len(cases) == 27
    for table, kind, delta, no_embeddings, path in cases:
        df = pd.read_json(
            published / "gemstones" / f"wandb_df_for_fitting_{table}.jsonl", lines=True
        )
        df["params"] = df["params_active_precise"]
        if no_embeddings:
            df["params"] -= 50304 * df["width"]
        terms = [*kind.split("_"), "tokens"]
        terms = ["params" if t == "parameters" else t for t in terms]
        fit = fit_law(
            df, "E + " + " + ".join(terms), y="final_loss", objective=Objective(delta=delta),
            n_boot=0,
        )  # fmt: skip
        known = json.loads(path.read_text())
        what = (path.stem, fit.message)
        assert fit.certificate.objective <= known["loss"]["0"] * (1 + 1e-6), what
        best = None if no_embeddings else OPTIMA.get((table, kind, delta))
        if best is not None:
            assert fit.certificate.objective <= best * (1 + 5e-6), what
        if kind == "parameters" and delta == 1e-3:
            exponents = [fit.params[f"exponent.{t}"] for t in terms]
            np.testing.assert_allclose(exponents, known["exponents"]["0"], atol=5e-4)
        if kind == "width_depth":
            # published with log E of -155 and -4555, and no word about it
            assert fit.status is FitStatus.BOUND_HIT
            assert "irreducible" in fit.message
            assert not fit.floor().identified
        else:
            assert fit.status is FitStatus.CONVERGED, what


@pytest.mark.slow
def test_checkpoints_of_one_run_are_not_independent(published: Path) -> None:
    """4-term law, 770 checkpoints of 22 models: resampling models widens the intervals."""
    df = pd.read_json(published / "gemstones/wandb_df_for_fitting_hot_100b+.jsonl", lines=True)
    df["model"] = df["width"].astype(str) + "x" + df["depth"].astype(str)
    assert df["model"].nunique() == 22
    form = "E + width + depth + params_active_precise + tokens"
    rows = fit_law(df, form, y="final_loss", n_boot=80, cluster=None)
    models = fit_law(df, form, y="final_loss", n_boot=80, cluster="model")
    name = "exponent.width"

    def spread(fit: LawFit) -> float:  # the quartiles: some draws of rows end in another basin
        return float(np.subtract(*fit.draws[name].quantile([0.75, 0.25])))

    assert spread(models) > 1.5 * spread(rows)


# ---- Muennighoff et al. 2023 (arXiv 2305.16264): repeated data ----------------------------------


def repeated_data(published: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Their 182 runs with U_D, R_D, U_N, R_N, and the constants they hold fixed."""
    a, b, e, alpha = np.exp(6.255414), np.exp(7.3049974), np.exp(0.6254804), 0.3526596
    df = pd.read_csv(published / "datablations" / "c4_runs_182.csv")
    df["u_d"] = df[["unique_tokens", "tokens"]].min(axis=1)
    df["r_d"] = (df["tokens"] / df["u_d"] - 1).clip(lower=0)
    df["u_n"] = np.minimum(df["params"], (a / b) ** (1 / alpha) * df["u_d"])
    df["r_n"] = (df["params"] / df["u_n"] - 1).clip(lower=0)
    fixed = {
        "irreducible": e, "coefficient.u_n": a, "coefficient.u_d": b, "exponent.u_n": alpha,
        "exponent.u_d": alpha,
    }  # fmt: skip
    return df, fixed


def test_repeated_data_have_more_than_one_basin(published: Path) -> None:
    """Published (R_D*, R_N*) = (15.387756, 5.309743) with objective .015825936570763588: a local
    optimum. (46.99, 2.33) with .0158073786 is lower, and it is not the last."""
    df, fixed = repeated_data(published)
    fit = fit_law(
        df, "E + repeated(u_n, r_n) + repeated(u_d, r_d)", y="loss", fixed=fixed, n_boot=0
    )
    at_theirs = fit.surface.theta({**fit.params, "r_star.u_d": 15.387756, "r_star.u_n": 5.309743})
    stated = float(fit.problem.objective(at_theirs[None], fit.weights)[0])
    assert stated == pytest.approx(0.015825936570763588, rel=1e-7)
    assert fit.certificate.objective <= 0.0158073786
    assert len(fit.basins) >= 3
    assert "basins" in fit.message
    theirs = (fit.basins["r_star.u_d"] - 15.371758).abs().argmin()
    assert fit.basins["objective"].iloc[theirs] == pytest.approx(0.0158259321, rel=1e-7)
    assert fit.basins["r_star.u_n"].iloc[theirs] == pytest.approx(5.315126, rel=1e-4)
