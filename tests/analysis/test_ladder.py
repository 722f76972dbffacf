"""The two-stage law of OLMo's ladder (Bhagia et al. 2024, arXiv 2412.04403) on its published data:
task loss by parameters and tokens from 16 runs, accuracy by task loss, 7B and 13B held out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit, minimize

from scaling.analysis import FitStatus, Objective, fit_law
from scaling.analysis.transfer_law.chain import fit_chain

pytestmark = pytest.mark.data

TASKS = (
    "mmlu_avg_test_5shot", "hellaswag_val_5shot", "arc_challenge_test_5shot", "arc_easy_test_5shot",
    "piqa_val_5shot", "csqa_val_5shot", "socialiqa_val_5shot", "openbookqa_test_5shot",
)  # fmt: skip
STEP_1, STEP_2 = "E + N + D", "E + sigmoid(pretraining)"
RAW_SQUARES = Objective(loss="mse", scale="raw")
START = [3.0, 6.0, 0.1, 0.2, 1.0]
"""Theirs: ln A, ln B, the exponents of N and D, E."""


@pytest.fixture(scope="module")
def folder(clue_test_data: Path) -> Path:
    return clue_test_data / "published_fits" / "olmo_ladder"


@pytest.fixture(scope="module")
def losses(folder: Path) -> pd.DataFrame:
    """Task losses of the runs' ends."""
    table = pd.read_csv(folder / "step1_bpb.csv").rename(columns={"bpb": "pretraining"})
    return table.assign(cell=table["model"] + " " + table["length"].fillna(""))


@pytest.fixture(scope="module")
def accuracies(folder: Path) -> pd.DataFrame:
    """Task losses and accuracies along the runs."""
    table = pd.read_csv(folder / "step2_bpb_acc.csv")
    table = table.rename(columns={"bpb": "pretraining", "acc": "downstream"})
    return table.assign(cell=table["model"] + " " + table["length"].fillna(""))


@pytest.fixture(scope="module")
def published(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "reference_fits_rerun.json").read_text())
    return {row["task"]: row for row in rows}


def fitted(table: pd.DataFrame, task: str) -> pd.DataFrame:
    return table[(table["task"] == task) & (table["mode"] == "train")]


def objective(p: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> float:
    """Their objective, written anew."""
    law = np.exp(p[0] - p[2] * np.log(n)) + np.exp(p[1] - p[3] * np.log(d)) + p[4]
    r = np.abs(np.log(law) - np.log(y))
    return float(np.where(r <= 1e-3, 0.5 * r**2, 1e-3 * (r - 5e-4)).sum())


def sigmoid(x: np.ndarray, a: float, x0: float, k: float, b: float) -> np.ndarray:
    return np.asarray(a / (1 + np.exp(-k * (x - x0))) + b)


def with_ceiling(table: pd.DataFrame) -> pd.DataFrame:
    """Their ideal point: at loss 0 the accuracy is 1."""
    ideal = pd.DataFrame({"pretraining": [0.0], "downstream": [1.0], "cell": ["ideal"]})
    return pd.concat([table[["pretraining", "downstream", "cell"]], ideal], ignore_index=True)


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_fitted_at_least_as_well(
    losses: pd.DataFrame, published: dict[str, Any], task: str
) -> None:
    own, theirs = fitted(losses, task), published[task]
    assert len(own) == 16
    n, d, y = (own[c].to_numpy(dtype=float) for c in ("N", "D", "pretraining"))
    parameters = [theirs["step1"][k] for k in ("a", "b", "alpha", "beta", "E")]
    fit = fit_law(own, STEP_1, y="pretraining", n_boot=0, cluster=None)
    reached = objective(np.array(parameters), n, d, y)
    assert fit.certificate.objective <= reached * (1 + 1e-9)
    assert fit.status in (FitStatus.CONVERGED, FitStatus.BOUND_HIT)
    assert (fit.status is FitStatus.BOUND_HIT) == (theirs["step1"]["E"] == 0)
    large = losses[(losses["task"] == task) & (losses["model"] == "13B-5T")]
    guess = fit.predict(large, level=None)["y"].iloc[0]
    assert guess == pytest.approx(theirs["pred_bpb_13B"], abs=1e-3)
    assert theirs["actual_bpb_13B"] == pytest.approx(large["pretraining"].iloc[0])


@pytest.mark.parametrize("task", ["hellaswag_val_5shot", "socialiqa_val_5shot"])
def test_their_start_leads_to_their_prediction(
    losses: pd.DataFrame, published: dict[str, Any], task: str
) -> None:
    """Their minimiser on the data as read here: that the table is theirs."""
    own = fitted(losses, task)
    columns = tuple(own[c].to_numpy(dtype=float) for c in ("N", "D", "pretraining"))
    found = minimize(
        objective, START, columns, method="L-BFGS-B", bounds=[(0, None)] * 5, tol=0.0,
        options={"maxiter": 1_000_000, "maxfun": 1_000_000},
    ).x  # fmt: skip
    large = losses[(losses["task"] == task) & (losses["model"] == "13B-5T")].iloc[0]
    guess = (
        np.exp(found[0] - found[2] * np.log(large["N"]))
        + np.exp(found[1] - found[3] * np.log(large["D"]))
        + found[4]
    )
    assert guess == pytest.approx(published[task]["pred_bpb_13B"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_accuracies_and_the_chain(
    losses: pd.DataFrame, accuracies: pd.DataFrame, published: dict[str, Any], task: str
) -> None:
    """The sigmoid against scipy within their bounds (a in -1..0, b in 0..1) and without them; then
    both stages composed, against their prediction of the 13B model."""
    theirs = published[task]
    own = with_ceiling(fitted(accuracies, task))
    assert len(own) == 1402
    x, y = own["pretraining"].to_numpy(), own["downstream"].to_numpy()
    bounds = ([-1, 0, 0, 0], [0, np.inf, np.inf, 1])
    at_bounds = curve_fit(sigmoid, x, y, p0=[-0.75, 0.9, 3, 1], bounds=bounds, maxfev=500_000)[0]
    reference = [theirs["step2"][k] for k in ("a", "x0", "k", "b")]
    np.testing.assert_allclose(at_bounds, reference, rtol=2e-3)
    fit = fit_law(own, STEP_2, y="downstream", objective=RAW_SQUARES, n_boot=0, cluster="cell")
    rss = 0.5 * np.sum((sigmoid(x, *reference) - y) ** 2)
    assert fit.certificate.objective <= rss * (1 + 1e-9)
    free = curve_fit(sigmoid, x, y, p0=reference, maxfev=500_000)[0]
    a, x0, k, b = free
    assert fit.params["irreducible"] == pytest.approx(a + b, abs=1e-4)
    assert fit.params["rate"] == pytest.approx(-k, rel=1e-3)
    assert fit.params["midpoint"] == pytest.approx(x0, abs=1e-3)

    chain = fit_chain(fitted(losses, task), own, STEP_1, STEP_2, n_boot=40)
    large = losses[(losses["task"] == task) & (losses["model"] == "13B-5T")]
    guess = chain.predict(large[["N", "D"]]).iloc[0]
    assert guess["loss"] == pytest.approx(theirs["pred_bpb_13B"], abs=1e-3)
    assert guess["y"] == pytest.approx(sigmoid(guess["loss"], *free), abs=1e-4)
    assert guess["y"] == pytest.approx(theirs["pred_acc_13B"], abs=0.01)
    assert guess["lower"] < guess["y"] < guess["upper"]
