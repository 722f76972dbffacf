"""Which gains stand for a task, and the trend over tasks, on planted tables."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection

from scaling.analysis.figures import SPREAD, gain_vs_similarity
from scaling.analysis.studies.draw import GAIN_METRICS, draw
from scaling.analysis.studies.gains import encoder, gain_points, gains_report, trend
from scaling.results import GAINS_SCHEMA, MEASURES, Tables

RUNS = ("r0", "r1", "r2")
LOSSES = {"popularity": None, "bst": 0.6, "lightgcn/sbert-abcdefgh": 0.5, "deepfm": 0.7}


def planted(relative: dict[str, float], tau: dict[str, float]) -> pd.DataFrame:
    """Runs on tasks whose mean relative gain over the best system is as given, and 10 more over any
    other; heads differ by a factor of two."""
    rows = []
    for task, gain in relative.items():
        for i, run in enumerate(RUNS):
            for system, factor in (("clue/u-mlp", 1.0), ("clue/linear", 2.0)):
                for baseline, loss in LOSSES.items():
                    row: dict[str, Any] = dict.fromkeys(GAINS_SCHEMA.names)
                    row |= {"run_key": run, "task": task, "task_digest": task, "system": system}
                    row |= {"history": "target", "folds": 5, "seeds": 1, "baseline": baseline}
                    row |= {"baseline_validation_loss": loss, "tau_b_union": tau[task]}
                    value = factor * gain + (i - 1) / 100 + 10 * (loss != 0.5)
                    for name, *_ in MEASURES:
                        row[f"{name}_relative"] = value
                        row[f"{name}_relative_low"] = value - 0.1
                        row[f"{name}_relative_high"] = value + 0.1
                    rows.append(row)
    return pd.DataFrame(rows)


FOUR = dict(zip("abcd", (0.1, 0.3, 0.2, 0.5), strict=True))
TAUS = dict(zip("abcd", (0.2, 0.3, 0.4, 0.9), strict=True))


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def gains() -> pd.DataFrame:
    return planted(FOUR, TAUS)


def test_a_task_s_gain_is_over_the_best_system_of_its_own(gains: pd.DataFrame) -> None:
    """By validation loss, whatever the texts; systems that learn nothing are none."""
    tasks = gain_points(gains, "mrr", "clue/u-mlp")
    assert list(tasks) == list(FOUR)
    for task, found in tasks.items():
        assert (found.baseline, found.failed) == ("lightgcn/sbert-abcdefgh", None)
        assert found.points["run_key"].tolist() == list(RUNS)
        assert found.points["gain"].mean() == pytest.approx(FOUR[task])
        assert found.points["tau_b"].tolist() == [TAUS[task]] * 3
        assert (found.points["high"] - found.points["low"]).tolist() == pytest.approx([0.2] * 3)
    assert gain_points(gains[gains["baseline"] == "popularity"], "mrr", "clue/u-mlp") == {}


def test_the_encoder_is_that_of_most_runs_with_the_first_head(gains: pd.DataFrame) -> None:
    assert encoder(gains) == "clue/u-mlp"
    assert encoder(gains[gains["system"] == "clue/linear"]) is None
    one = gains["run_key"] == "r0"
    mixed = gains.assign(
        system=gains["system"].where(one, gains["system"].str.replace("clue", "x"))
    )
    assert encoder(mixed) == "x/u-mlp"


def test_trend_counts_tasks_and_not_runs(gains: pd.DataFrame) -> None:
    """Against pairs counted by hand: of six pairs of tasks one is the other way."""
    found = trend(gain_points(gains, "hr_10", "clue/u-mlp"))
    signs = [np.sign((TAUS[p] - TAUS[q]) * (FOUR[p] - FOUR[q])) for p, q in combinations("abcd", 2)]
    assert found["n"] == 4
    assert found["kendall"] == pytest.approx(np.mean(signs)) == pytest.approx(4 / 6)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two ranks off by one
    assert found["failed"] is None


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_tasks_have_no_trend(gains: pd.DataFrame, n: int) -> None:
    few = gains[gains["task"].isin([*"abcd"][:n])]
    assert trend(gain_points(few, "mrr", "clue/u-mlp")) == {
        "n": n, "spearman": None, "kendall": None, "failed": f"{n} tasks; a correlation needs 4",
    }  # fmt: skip


def test_tasks_that_are_all_alike_have_no_trend() -> None:
    found = trend(gain_points(planted(FOUR, dict.fromkeys("abcd", 0.5)), "mrr", "clue/u-mlp"))
    assert (found["n"], found["kendall"]) == (4, None)
    assert found["failed"] == "all tasks have the same tau or gain"


def test_what_cannot_be_compared_says_why(gains: pd.DataFrame) -> None:
    a, b = (gains["task"] == task for task in "ab")
    gains.loc[a & (gains["run_key"] == "r1"), "folds"] = 2
    gains.loc[b, "tau_b_union"] = np.nan
    tasks = gain_points(gains, "mrr", "clue/u-mlp")
    assert tasks["a"].failed == "runs were evaluated differently: folds 2, 5"
    assert tasks["b"].failed == "no tau: a corpus was not at hand"
    assert tasks["a"].points.empty
    assert tasks["b"].points.empty
    assert trend(tasks)["n"] == 2
    ax = gain_vs_similarity(gains)
    assert legend(ax)[:2] == [
        "a: not drawn,\nruns were evaluated differently", "b: not drawn,\nno tau",
    ]  # fmt: skip


def test_the_report_has_every_head_and_metric(gains: pd.DataFrame, tables: Tables) -> None:
    found = gains_report(gains)
    assert list(found) == ["clue/linear", "clue/u-mlp"]
    json.dumps(found, allow_nan=False)
    for system, factor in (("clue/u-mlp", 1), ("clue/linear", 2)):
        assert set(found[system]["trend"]) == {name for name, *_ in MEASURES}
        for task, one in found[system]["tasks"].items():
            assert (one["runs"], one["tau_b"]) == (3, pytest.approx(TAUS[task]))
            assert one["relative"]["loss"] == pytest.approx(factor * FOUR[task])
    assert gains_report(tables.gains) == {}  # those runs were compared with nothing


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_every_run_is_drawn_with_its_interval_near_its_tau(gains: pd.DataFrame) -> None:
    ax = gain_vs_similarity(gains, metric="mrr", system="clue/linear")
    assert legend(ax) == [f"{t}, 3 runs\nover lightgcn/sbert-abcdefgh" for t in "abcd"]
    clouds = [c for c in ax.collections if isinstance(c, PathCollection)]
    bars = [c for c in ax.collections if isinstance(c, LineCollection)]
    for task, cloud, bar in zip("abcd", clouds, bars, strict=True):
        x, y = np.asarray(cloud.get_offsets()).T
        assert np.abs(x - TAUS[task]).max() <= SPREAD + 1e-12
        assert sorted(y) == pytest.approx([2 * FOUR[task] + d for d in (-0.01, 0, 0.01)])
        ends = np.array([segment[:, 1] for segment in bar.get_segments()])
        np.testing.assert_allclose(ends, np.stack([y - 0.1, y + 0.1], 1))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_figure_needs_two_tasks(
    gains: pd.DataFrame, tables: Tables, tmp_path: Path, n: int
) -> None:
    few = replace(tables, gains=gains[gains["task"].isin([*"abcd"][:n])])
    written = {p.name for p in draw(few, {}, tmp_path)}
    assert ({"gain_vs_similarity.png", "gain_vs_similarity.svg"} <= written) == (n == 2)
    if n == 2:
        text = (tmp_path / "gain_vs_similarity.svg").read_text()
        assert all(f"relative gain, downstream {m}" in text for m in ("HR@10", "MRR"))
        assert len(GAIN_METRICS) == 2
        again = draw(few, {}, tmp_path / "again")
        assert all((tmp_path / p.name).read_bytes() == p.read_bytes() for p in again)
