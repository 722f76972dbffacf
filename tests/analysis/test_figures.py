"""Figures show what they say: artists, labels, files."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection

from scaling.analysis import LawFit, fit_power_law
from scaling.analysis.figures import loss_vs_compute, transfer_vs_pretraining
from scaling.analysis.fitting.rollout import rollout
from scaling.analysis.studies.draw import draw
from scaling.analysis.studies.figures import rollout_panels
from scaling.analysis.transfer_law.figures import task_laws
from scaling.analysis.transfer_law.points import transfer_points
from scaling.analysis.transfer_law.record import transfer_laws
from scaling.results import Tables


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def fit(tables: Tables) -> LawFit:
    return fit_power_law(tables.runs, x="pf_days", y="loss", frontier=True, n_boot=50)


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def points(ax: Axes) -> np.ndarray:
    clouds = [c for c in ax.collections if isinstance(c, PathCollection)]
    return np.concatenate([np.asarray(c.get_offsets()) for c in clouds])


def test_loss_against_compute_shows_every_run_frontier_law_and_chance(
    tables: Tables, fit: LawFit
) -> None:
    ax = loss_vs_compute(tables.runs, fit, floor=2.0, extend=3)
    assert sorted(points(ax)[:, 0]) == pytest.approx(sorted(tables.runs["pf_days"]))
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == "compute, paper's formula [PF-days]"
    assert ax.get_ylabel() == "contrastive loss on the pool [nats]"
    labels = legend(ax)
    assert [label for label in labels if "parameters" in label] == labels[:3]
    assert "compute frontier" in labels
    assert "chance (ln pool)" in labels
    assert "floor of the world" in labels
    assert any(label.startswith("exponent 0.0600\n95 %: ") for label in labels)
    bands = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert len(bands) == 1
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    grid = np.array(fit.to_dict()["curve"]["pf_days"])
    assert dotted[0].get_xdata()[-1] == grid[grid <= 3 * fit.ranges()["pf_days"][1]][-1]


def test_a_law_out_of_fits_json_draws_the_same(tables: Tables, fit: LawFit) -> None:
    one, two = (loss_vs_compute(tables.runs, law) for law in (fit, fit.to_dict()))
    assert legend(one) == legend(two)
    law = next(line for line in two.lines if str(line.get_label()).startswith("exponent"))
    x, y = law.get_data()
    np.testing.assert_allclose(y, fit.predict(x)["y"], rtol=1e-9)


def test_runs_without_a_loss_are_not_drawn(tables: Tables) -> None:
    runs = tables.runs.assign(loss=tables.runs["loss"].where(tables.runs.index > 3))
    assert len(points(loss_vs_compute(runs))) == len(runs) - 4


def test_many_values_of_the_hue_get_a_colour_bar(tables: Tables) -> None:
    ax = loss_vs_compute(tables.runs, hue="loss", chance=False)
    assert len(ax.figure.axes) == 2
    assert legend(ax) == ["compute frontier"]


def test_downstream_against_pretraining_per_task(tables: Tables) -> None:
    ax = transfer_vs_pretraining(tables.transfer, tables.runs)
    labels = legend(ax)
    assert labels[0].startswith("books, 24 runs\nPearson 0.9")
    assert labels[1] == "books, popularity"
    assert labels[2].startswith("food, 24 runs\n")
    assert len(points(ax)) == 48
    first = tables.transfer[
        (tables.transfer["task"] == "books")
        & (tables.transfer["system"] == "clue/u-mlp")
        & (tables.transfer["run_key"] == tables.runs["run_key"].iloc[0])
    ]
    assert first["loss"].mean() in points(ax)[:, 1]


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_runs_have_no_correlation(tables: Tables, n: int) -> None:
    ax = transfer_vs_pretraining(tables.transfer, tables.runs.iloc[:n], baseline=None)
    assert legend(ax) == [f"books, {n} runs", f"food, {n} runs"]


def test_fits_plot_themselves(fit: LawFit) -> None:
    ax = fit.plot(extend=2)
    assert legend(ax)[0] == "fitted points"
    assert len(ax.lines[0].get_xdata()) == fit.n


def test_drawing_twice_gives_the_same_files(tables: Tables, fit: LawFit, tmp_path: Path) -> None:
    fits = {"compute": {"headline": {"fit": fit.to_dict()}}}
    one, two = (draw(tables, fits, tmp_path / folder) for folder in ("one", "two"))
    assert [p.name for p in one] == [
        "loss_vs_compute.png",
        "loss_vs_compute.svg",
        "transfer_vs_pretraining.png",
        "transfer_vs_pretraining.svg",
    ]
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert "compute frontier" in one[1].read_text()  # text stays text in SVG
    assert not plt.get_fignums()


def test_a_study_s_laws_of_transfer_and_rollouts_are_drawn(tables: Tables, tmp_path: Path) -> None:
    """From the tables and fits.json alone, every point and every task."""
    laws = json.loads(json.dumps(transfer_laws(tables, n_boot=20)))
    runs = tables.runs.assign(loss=tables.runs["loss"].astype(float))
    asked = [("pf_days", "pf_days"), ("E + pf_days", "n_total")]
    found = [
        {"form": form, "by": by, "failed": None,
         "rollout": rollout(runs, form, y="loss", by=by, n_boot=20).to_dict()}
        for form, by in asked
    ]  # fmt: skip
    failed = {"form": "E + pf_days", "by": "epochs", "failed": "no", "rollout": None}
    fits = json.loads(json.dumps({"transfer_laws": laws, "rollouts": [*found, failed]}))
    names = {p.stem for p in draw(tables, fits, tmp_path)}
    assert {"transfer_law_loss", "rollouts"} <= names
    assert "transfer_law_mrr" not in names  # no run was measured by it

    alone = replace(tables, transfer=tables.transfer[tables.transfer["task"] == "food"])
    assert "transfer_law_loss" in {p.stem for p in draw(alone, fits, tmp_path)}
    none = replace(tables, transfer=tables.transfer.iloc[:0])
    left = {p.stem for p in draw(none, fits | {"rollouts": [failed]}, tmp_path)}
    assert not left & {"transfer_law_loss", "rollouts"}
    assert rollout_panels([failed]) == task_laws(transfer_points(none), laws["loss"]) == []

    record, points = laws["loss"], transfer_points(tables, "loss")
    panels = task_laws(points, record)
    assert [p.get_title(loc="left") or p.get_title() for p in panels] == list(record["tasks"])
    for panel, (task, law) in zip(panels, record["tasks"].items(), strict=True):
        own = points.table[points.table["task"] == task]
        np.testing.assert_array_equal(panel.lines[0].get_xdata(), own["pretraining"])
        inside, beyond = (np.asarray(line.get_xdata()) for line in panel.lines[1:3])
        np.testing.assert_array_equal([*beyond, *inside], law["curve"]["x"])
        assert max(beyond) < own["pretraining"].min() <= min(inside)
        assert law["law"] in legend(panel)[-1]
    panels = rollout_panels(fits["rollouts"])
    assert len(panels) == 2
    for panel, one in zip(panels, found, strict=True):
        drawn = np.concatenate([np.asarray(c.get_offsets()) for c in panel.collections])
        rows = pd.DataFrame(one["rollout"]["predictions"])
        np.testing.assert_allclose(np.sort(drawn[:, 0]), np.sort(rows["ratio"]))
        np.testing.assert_allclose(np.sort(drawn[:, 1]), np.sort(rows["error"]))


def test_nothing_to_show_draws_nothing(tables: Tables, tmp_path: Path) -> None:
    empty = replace(tables, runs=tables.runs.assign(loss=np.nan), transfer=tables.transfer.iloc[:0])
    assert draw(empty, {}, tmp_path) == []


def test_no_text_overlaps(tables: Tables, fit: LawFit) -> None:
    ax = loss_vs_compute(tables.runs, fit, floor=2.0, extend=3)
    figure = ax.figure
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_legend().get_texts()]
    boxes += [t.get_window_extent() for t in ax.get_yticklabels() if t.get_text()]
    boxes += [ax.xaxis.label.get_window_extent(), ax.yaxis.label.get_window_extent()]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
    assert not ax.get_window_extent().overlaps(ax.get_legend().get_window_extent())


def test_analysis_needs_no_torch() -> None:
    code = (
        "import sys, scaling.analysis as a; [getattr(a, n) for n in a.__all__]; "
        "import scaling.results; "
        "print(sorted(m for m in ('torch', 'deepspeed', 'submitit') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_fitting_loads_no_matplotlib() -> None:
    code = "import sys; from scaling.analysis import fit_law; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_public_names_are_those_listed() -> None:
    import scaling.analysis as analysis

    assert dir(analysis) == analysis.__all__
    assert pd.Series(analysis.__all__).is_unique
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = analysis.nothing


def test_the_study_is_a_function_whatever_is_imported_before() -> None:
    import scaling.analysis as analysis
    import scaling.analysis.studies.report

    assert analysis.study is scaling.analysis.studies.report.study
