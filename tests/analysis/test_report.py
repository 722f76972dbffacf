"""The study report on a study with a planted law."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from scaling.analysis import FitStatus, PowerLawFit, fit_power_law
from scaling.analysis.study.report import COMPUTE, study, write_study
from scaling.results import Tables

PLANTED = 0.06


@pytest.fixture(scope="module")
def fits(tables: Tables) -> dict[str, Any]:
    return study(tables, n_boot=60)


def changed(tables: Tables, runs: pd.DataFrame) -> Tables:
    return replace(tables, runs=runs)


def test_the_headline_is_the_planted_law(fits: dict[str, Any]) -> None:
    headline = fits["compute"]["headline"]
    assert (headline["x"], headline["points"], headline["floor"]) == ("pf_days", "frontier", False)
    assert headline["fit"]["status"] == "CONVERGED", headline["fit"]["message"]
    assert headline["fit"]["params"]["exponent"] == pytest.approx(PLANTED, abs=1e-6)
    low, high = headline["fit"]["ci95"]["exponent"]
    assert low <= PLANTED + 1e-9
    assert high >= PLANTED - 1e-9


def test_every_choice_has_its_alternative(fits: dict[str, Any]) -> None:
    keys = ("x", "y", "points", "floor", "delta")
    made = {tuple(a[k] for k in keys) for a in fits["compute"]["alternatives"]}
    assert made == {
        ("pf_days", "loss", "all", False, 1e-3),
        ("pf_days_non_embedding", "loss", "frontier", False, 1e-3),
        ("pf_days_exact", "loss", "frontier", False, 1e-3),
        ("pf_days", "loss_refit", "frontier", False, 1e-3),
        ("pf_days", "loss_pool_64", "frontier", False, 1e-3),
        ("pf_days", "loss", "frontier", False, 1e-4),
        ("pf_days", "loss", "frontier", False, 1e-2),
        ("pf_days", "loss", "frontier", False, "inf"),
        ("pf_days", "loss", "frontier", True, 1e-3),
        ("pf_days", "loss", "all", True, 1e-3),
    }
    assert set(fits["counting"]) == set(COMPUTE)


def test_rank_correlation_is_scipy_s(fits: dict[str, Any], tables: Tables) -> None:
    expected = spearmanr(tables.runs["pf_days"], tables.runs["loss"]).statistic
    assert fits["rank_correlation"]["pf_days"]["spearman"] == pytest.approx(expected)
    assert fits["rank_correlation"]["pf_days"]["n"] == 24


def test_transfer_has_a_row_per_task(fits: dict[str, Any]) -> None:
    assert set(fits["transfer"]) == {"books", "food"}
    assert fits["transfer"]["books"]["n"] == 24
    assert fits["transfer"]["books"]["pearson"] > 0.9


def test_factors_with_two_values_have_no_known_exponent(fits: dict[str, Any]) -> None:
    joint = fits["joint"]
    assert joint["factors"] == ["n_total", "batch_size", "items_per_user", "users_seen"]
    verdicts = joint["with_floor"]["fit"]["identified"]
    for name in ("batch_size", "items_per_user"):
        assert not verdicts[name]["identified"]
        assert "only 2 distinct values" in verdicts[name]["reasons"]


def test_the_file_is_json(fits: dict[str, Any], tmp_path: Path) -> None:
    path = write_study(fits, tmp_path)
    assert path == tmp_path / "fits.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(fits, allow_nan=False))


def test_runs_left_out_are_named_with_the_rule(tables: Tables) -> None:
    runs = tables.runs.copy()
    runs.loc[0, ["status", "loss"]] = [None, np.nan]
    runs.loc[1, ["status", "loss"]] = ["diverged", np.nan]
    runs.loc[2, "pool_digest"] = "another"
    rows = study(changed(tables, runs), n_boot=0)["rows"]
    keys = runs["run_key"].tolist()
    assert rows["dropped"] == [
        {"rule": "not over", "count": 1, "run_keys": [keys[0]]},
        {"rule": "diverged", "count": 1, "run_keys": [keys[1]]},
        {"rule": "another pool than most runs", "count": 1, "run_keys": [keys[2]]},
    ]
    assert rows["used"] == 21


def test_a_study_with_too_few_runs_says_so(tables: Tables) -> None:
    fits = study(changed(tables, tables.runs.iloc[:2]), n_boot=10)
    assert fits["compute"]["headline"]["fit"] is None
    assert "needs at least" in fits["compute"]["headline"]["failed"]
    assert fits["compute"]["conclusion"]["holds"] is False
    assert fits["joint"]["with_floor"]["fit"] is None
    json.dumps(fits, allow_nan=False)


def test_a_study_without_any_loss_is_still_a_report(tables: Tables) -> None:
    runs = tables.runs.assign(loss=np.nan, status=None)
    fits = study(changed(tables, runs), n_boot=10)
    assert fits["rows"]["used"] == 0
    assert fits["rows"]["dropped"][0]["count"] == 24
    assert fits["rank_correlation"]["pf_days"]["spearman"] is None
    json.dumps(fits, allow_nan=False)


def test_the_other_pool_is_the_largest_that_every_run_has(tables: Tables) -> None:
    """Final losses over smaller pools come from the last step of the curves."""
    smaller = tables.curves[tables.curves["pool_size"] == 64].assign(pool_size=16, loss=2.0)
    curves = pd.concat([tables.curves, smaller])
    fits = study(replace(tables, curves=curves), n_boot=0)
    (other,) = (a for a in fits["compute"]["alternatives"] if a["y"].startswith("loss_pool"))
    assert other["y"] == "loss_pool_64"
    fit = fit_power_law(
        tables.runs.assign(loss=tables.runs["loss"] - 1), x="pf_days", y="loss", frontier=True,
        n_boot=0,
    )  # fmt: skip
    assert other["fit"]["params"] == pytest.approx(dict(fit.params))
    one = (curves["pool_size"] == 64) & (curves["run_key"] == tables.runs["run_key"][0])
    fits = study(replace(tables, curves=curves[~one]), n_boot=0)
    assert {a["y"] for a in fits["compute"]["alternatives"]} == {
        "loss", "loss_refit", "loss_pool_16",
    }  # fmt: skip


def with_loss(tables: Tables, loss: np.ndarray) -> Tables:
    """The study with another loss, which all its pools and the refitted scale share."""
    runs = tables.runs.assign(loss=loss, loss_refit=loss)
    curves = tables.curves.drop(columns="loss").merge(runs[["run_key", "loss"]], on="run_key")
    return replace(tables, runs=runs, curves=curves)


def test_an_alternative_that_did_not_converge_is_against(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stalled(runs: pd.DataFrame, **choices: Any) -> PowerLawFit:
        fit = fit_power_law(runs, **choices)
        status = FitStatus.STALLED if choices["y"] == "loss_refit" else FitStatus.CONVERGED
        return replace(fit, status=status, message="a reason")

    monkeypatch.setattr("scaling.analysis.study.report.fit_power_law", stalled)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.03, len(tables.runs)))
    loss = 3 * (tables.runs["pf_days"].to_numpy() / 1e-9) ** -PLANTED * noise
    conclusion = study(with_loss(tables, loss), n_boot=60)["compute"]["conclusion"]
    assert conclusion["against"] == ["y loss_refit: STALLED, a reason"]
    assert not conclusion["holds"]


def test_a_conclusion_needs_the_choices_to_agree(tables: Tables) -> None:
    """With noise of a few per cent the countings agree; a loss that rises with compute has none."""
    rng = np.random.default_rng(0)
    runs = tables.runs.copy()
    compute = np.exp(
        np.log(runs[["pf_days", "pf_days_exact"]].astype(float)).mean(axis=1).to_numpy()
    )
    loss = 3 * (compute / 1e-9) ** -PLANTED * np.exp(rng.normal(0, 0.03, len(runs)))
    held = study(with_loss(tables, loss), n_boot=100)["compute"]["conclusion"]
    assert held["holds"], held["against"]
    lost = study(with_loss(tables, loss[::-1]), n_boot=100)["compute"]["conclusion"]
    assert not lost["holds"]
    assert lost["against"]
