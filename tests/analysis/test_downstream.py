"""Which runs of a task stand beside each other."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from scaling.analysis.figures import transfer_vs_pretraining
from scaling.analysis.studies.downstream import downstream_points, downstream_report
from scaling.results import Tables


def changed(transfer: pd.DataFrame, run_key: str, **values: Any) -> pd.DataFrame:
    """The table with one run's encoder rows of the task books changed."""
    transfer = transfer.copy()
    rows = (transfer["run_key"] == run_key) & (transfer["task"] == "books")
    rows &= transfer["system"] == "clue/u-mlp"
    for name, value in values.items():
        transfer.loc[rows, name] = value
    return transfer


def test_a_point_is_the_row_of_all_users(tables: Tables) -> None:
    found = downstream_points(tables.transfer, tables.runs)["books"]
    assert (found.system, found.left_out, found.failed) == ("clue/u-mlp", (), None)
    runs = tables.runs.set_index("run_key")["loss"]
    for point in found.points.to_dict(orient="records"):
        rows = tables.transfer.query(
            "task == 'books' and system == 'clue/u-mlp' and run_key == @point['run_key']"
        )
        assert len(rows) == 1
        assert (point["downstream"], point["low"], point["high"]) == tuple(
            rows[["loss", "loss_low", "loss_high"]].iloc[0]
        )
        assert point["pretraining"] == runs[point["run_key"]]
    assert len(found.points) == len(runs)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"folds": 5}, "folds 2, 5"),
        ({"seeds": 2}, "seeds 1, 2"),
        ({"history": "all"}, "history all, target"),
        ({"task_digest": "other", "seeds": pd.NA}, "seeds 1, <NA>; task_digest books, other"),
    ],
)
def test_runs_evaluated_differently_are_not_mixed(
    tables: Tables, values: dict[str, Any], reason: str
) -> None:
    transfer = changed(tables.transfer, tables.runs["run_key"][3], **values)
    mixed = replace(tables, transfer=transfer)
    found = downstream_report(mixed.transfer, mixed.runs)
    assert found["books"]["failed"] == f"runs were evaluated differently: {reason}"
    assert (found["books"]["n"], found["books"]["spearman"]) == (0, None)
    assert (found["food"]["failed"], found["food"]["n"]) == (None, 24)
    labels = transfer_vs_pretraining(transfer, tables.runs).get_legend().get_texts()
    assert labels[0].get_text() == "books: not drawn,\nevaluated differently"
    assert labels[1].get_text().startswith("food, 24 runs")


def test_losses_over_other_pools_are_not_mixed(tables: Tables) -> None:
    runs = tables.runs.copy()
    runs.loc[0, "pool_digest"] = "another"
    found = downstream_points(tables.transfer, runs)["books"]
    assert found.failed is not None
    assert found.failed.startswith("losses over 2 pools do not compare")
    assert found.points.empty


def test_segments_of_the_users_are_no_points(tables: Tables) -> None:
    cold = tables.transfer.assign(segment="cold", loss=9.0)
    both = pd.concat([tables.transfer, cold], ignore_index=True)
    found = downstream_points(both, tables.runs)["books"]
    pd.testing.assert_frame_equal(
        found.points, downstream_points(tables.transfer, tables.runs)["books"].points
    )


def test_runs_without_a_loss_do_not_count(tables: Tables) -> None:
    first = tables.runs["run_key"][0]
    runs = tables.runs.assign(loss=tables.runs["loss"].where(tables.runs["run_key"] != first))
    found = downstream_points(changed(tables.transfer, first, folds=5), runs)["books"]
    assert found.failed is None
    assert first not in set(found.points["run_key"])


def test_the_system_is_that_of_the_encoders(tables: Tables) -> None:
    single = tables.transfer.replace({"system": {"clue/u-mlp": "single/u-mlp"}})
    found = downstream_points(single, tables.runs)["books"]
    assert (found.system, len(found.points), found.left_out) == ("single/u-mlp", 24, ())


def test_encoders_of_another_system_are_named(tables: Tables) -> None:
    key = tables.runs["run_key"][0]
    transfer = changed(tables.transfer, key, system="single/u-mlp")
    found = downstream_points(transfer, tables.runs)["books"]
    assert (found.system, len(found.points)) == ("clue/u-mlp", 23)
    assert found.left_out == ("single/u-mlp: 1 runs",)
    other = downstream_points(transfer, tables.runs, system="single/u-mlp")
    assert other["books"].points["run_key"].tolist() == [key]
    assert "food" not in other


def test_metrics_of_popularity_are_not_an_encoder_s(tables: Tables) -> None:
    assert downstream_points(tables.transfer, tables.runs, "hr_10")["books"].system == "clue/u-mlp"
    floor = tables.transfer[tables.transfer["system"] == "popularity"]
    assert downstream_points(floor, tables.runs, "hr_10") == {}
