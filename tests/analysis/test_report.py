"""The study report on a study with a planted law."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from scaling.analysis.studies.choices import COMPUTE
from scaling.analysis.studies.report import repetition, study, write_study
from scaling.analysis.studies.runs import runs_to_fit, smaller_pools
from scaling.results import Tables

PLANTED = 0.06


def changed(tables: Tables, runs: pd.DataFrame) -> Tables:
    return replace(tables, runs=runs)


@pytest.mark.slow
def test_the_headline_is_the_planted_law(fits: dict[str, Any]) -> None:
    headline = fits["compute"]["headline"]
    assert (headline["x"], headline["points"], headline["floor"]) == ("pf_days", "frontier", False)
    assert headline["fit"]["status"] == "CONVERGED", headline["fit"]["message"]
    assert headline["fit"]["params"]["exponent"] == pytest.approx(PLANTED, abs=1e-6)
    low, high = headline["fit"]["ci95"]["exponent"]
    assert low <= PLANTED + 1e-9
    assert high >= PLANTED - 1e-9


@pytest.mark.slow
def test_every_choice_has_its_alternative(fits: dict[str, Any]) -> None:
    keys = ("x", "y", "points", "floor", "objective", "rows")
    base = ("pf_days", "loss", "frontier", False, "huber", "all")
    made = [tuple(a[k] for k in keys) for a in fits["compute"]["alternatives"]]
    changes = [
        {"x": "pf_days_non_embedding"}, {"x": "pf_days_exact"}, {"y": "loss_refit"},
        {"y": "loss_pool_64"}, {"y": "best_loss"}, {"objective": "huber 1e-2"},
        {"objective": "mse"}, {"objective": "lad"}, {"rows": "without outliers"},
        {"points": "all"}, {"floor": True}, {"floor": True, "points": "all"},
    ]  # fmt: skip
    assert made == [tuple((dict(zip(keys, base, strict=True)) | c).values()) for c in changes]
    assert set(fits["counting"]) == set(COMPUTE)


@pytest.mark.slow
def test_rank_correlation_is_scipy_s(fits: dict[str, Any], tables: Tables) -> None:
    expected = spearmanr(tables.runs["pf_days"], tables.runs["loss"]).statistic
    assert fits["rank_correlation"]["pf_days"]["spearman"] == pytest.approx(expected)
    assert fits["rank_correlation"]["pf_days"]["n"] == 24


@pytest.mark.slow
def test_transfer_has_a_row_per_task(fits: dict[str, Any]) -> None:
    assert set(fits["transfer"]) == {"books", "food"}
    assert fits["transfer"]["books"]["n"] == 24
    assert fits["transfer"]["books"]["pearson"] > 0.9
    assert set(fits["transfer_laws"]["loss"]["tasks"]) == {"books", "food"}
    last = fits["claims"]["claims"][-1]
    assert last["name"] == "same_loss_same_transfer"
    assert [v["choice"] for v in last["values"]][:2] == ["loss of books", "loss of food"]


@pytest.mark.slow
def test_factors_with_two_values_have_no_known_exponent(fits: dict[str, Any]) -> None:
    joint = fits["joint"]
    assert joint["factors"] == ["n_total", "batch_size", "items_per_user_mean", "users_seen"]
    assert joint["left_out"] == {"negatives": "equal to batch_size in every run"}
    verdicts = joint["without_floor"]["fit"]["identified"]
    for name in ("batch_size", "items_per_user_mean"):
        assert not verdicts[f"exponent.{name}"]["identified"]
        assert "only 2 distinct values" in verdicts[f"exponent.{name}"]["reasons"]
    assert set(joint["panels"]) == set(joint["factors"])
    assert len(joint["points"]) == 24


@pytest.mark.slow
def test_the_file_is_json(fits: dict[str, Any], tmp_path: Path) -> None:
    path = write_study(fits, tmp_path)
    assert path == tmp_path / "fits.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(fits, allow_nan=False))


def test_runs_left_out_are_named_with_the_rule(tables: Tables) -> None:
    runs = tables.runs.copy()
    runs.loc[0, ["status", "loss"]] = [None, np.nan]
    runs.loc[1, ["status", "loss"]] = ["diverged", np.nan]
    runs.loc[2, "pool_digest"] = "another"
    kept, rows = runs_to_fit(changed(tables, runs))
    keys = runs["run_key"].tolist()
    assert rows["dropped"] == [
        {"rule": "not over", "count": 1, "run_keys": [keys[0]]},
        {"rule": "diverged", "count": 1, "run_keys": [keys[1]]},
        {"rule": "another pool than most runs", "count": 1, "run_keys": [keys[2]]},
    ]
    assert rows["used"] == len(kept) == 21
    assert kept["run_key"].tolist() == keys[3:]


def test_columns_that_a_study_adds(tables: Tables) -> None:
    """Non-embedding compute by the paper's formula; ln negatives - train_loss; smaller pools."""
    runs, _ = runs_to_fit(tables)
    by_hand = 6 * runs["n_non_embedding"] * runs["batch_size"] * runs["steps"]
    by_hand = by_hand * runs["sequence_length"] / 8.64e19
    np.testing.assert_allclose(runs["pf_days_non_embedding"], by_hand, rtol=1e-12)
    np.testing.assert_allclose(
        np.exp(runs["train_information"] + runs["train_loss"]), runs["negatives"], rtol=1e-12
    )
    np.testing.assert_allclose(runs["loss_pool_64"], runs["loss"] - 1, rtol=1e-12)


def test_the_other_pools_are_those_that_every_run_has(tables: Tables) -> None:
    """Final losses over smaller pools come from the last step of the curves."""
    smaller = tables.curves[tables.curves["pool_size"] == 64].assign(pool_size=16, loss=2.0)
    curves = pd.concat([tables.curves, smaller])
    runs, _ = runs_to_fit(replace(tables, curves=curves))
    assert smaller_pools(runs) == [16, 64]
    assert (runs["loss_pool_16"] == 2.0).all()
    one = (curves["pool_size"] == 64) & (curves["run_key"] == tables.runs["run_key"][0])
    runs, _ = runs_to_fit(replace(tables, curves=curves[~one]))
    assert smaller_pools(runs) == [16]


def test_a_study_with_too_few_runs_says_so(tables: Tables) -> None:
    fits = study(changed(tables, tables.runs.iloc[:2]), n_boot=10)
    assert fits["compute"]["headline"]["fit"] is None
    assert "needs at least" in fits["compute"]["headline"]["failed"]
    assert not any(claim["holds"] for claim in fits["claims"]["claims"])
    assert all(claim["against"] for claim in fits["claims"]["claims"])
    assert fits["joint"]["with_floor"]["fit"] is None
    json.dumps(fits, allow_nan=False)


def test_a_study_without_any_loss_is_still_a_report(tables: Tables) -> None:
    runs = tables.runs.assign(loss=np.nan, status=None)
    fits = study(changed(tables, runs), n_boot=10)
    assert fits["rows"]["used"] == 0
    assert fits["rows"]["dropped"][0]["count"] == 24
    assert fits["rank_correlation"]["pf_days"]["spearman"] is None
    json.dumps(fits, allow_nan=False)


def test_runs_that_ended_above_their_best_are_named(tables: Tables) -> None:
    runs = tables.runs.assign(loss_se=0.01, best_loss=tables.runs["loss"] - 0.005)
    assert repetition(runs)["rose"] == []
    runs.loc[3, ["best_loss", "best_step", "repeats"]] = [runs["loss"][3] - 0.02, 100, 2.5]
    (rose,) = repetition(runs)["rose"]
    assert (rose["run_key"], rose["best_step"], rose["repeats"]) == (runs["run_key"][3], 100, 2.5)
    assert rose["rise"] == pytest.approx(0.02)
