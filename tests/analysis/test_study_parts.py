"""Parts of the study on designs and laws whose answers are known in closed form."""

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

from scaling.analysis import fit_law
from scaling.analysis.studies import figures
from scaling.analysis.studies.aliasing import COLUMNS, aliasing
from scaling.analysis.studies.joint import joint
from scaling.analysis.studies.laws import Laws
from scaling.analysis.studies.limits import limits
from scaling.analysis.studies.losses import losses

World = Callable[..., pd.DataFrame]
EXPONENTS = {"n_total": 0.5, "batch_size": 0.25, "items_per_user_mean": 0.3, "users_seen": 0.4}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def runs(world: World) -> pd.DataFrame:
    return world(EXPONENTS, floor=1.0, noise=0.0)


def term(runs: pd.DataFrame, name: str) -> np.ndarray:
    """A planted term of the law."""
    values: np.ndarray = ((runs[name] / runs[name].median()) ** -EXPONENTS[name]).to_numpy()
    return values


@pytest.fixture(scope="module")
def limited(runs: pd.DataFrame) -> dict[str, Any]:
    fit = fit_law(runs, "E + " + " + ".join(EXPONENTS), y="loss", n_boot=20)
    assert fit.status == "CONVERGED", fit.message
    return limits(fit, runs)


def test_gains_are_slopes_of_the_planted_law(runs: pd.DataFrame, limited: dict[str, Any]) -> None:
    """-dL / d ln x = p (x / m)^-p per factor; a batch also meets new users where there are any."""
    slope = {name: EXPONENTS[name] * term(runs, name) for name in EXPONENTS}
    fresh = (runs["users_seen"] < runs["n_users"]).to_numpy()
    assert 0 < fresh.sum() < len(runs)
    slope["batch_size"] = slope["batch_size"] + np.where(fresh, slope["users_seen"], 0.0)
    at = {key: i for i, key in enumerate(runs["run_key"])}
    assert len(limited["cells"]) == len(runs)
    for cell in limited["cells"]:
        i = at[cell["run_keys"][0]]
        for name in EXPONENTS:
            assert cell["gains"][name]["gain"] == pytest.approx(
                slope[name][i] * np.log(2), rel=1e-4
            )
            assert cell["elasticities"][name]["elasticity"] == pytest.approx(
                -EXPONENTS[name] * term(runs, name)[i] / (runs["loss"][i] - 1.0), rel=1e-3
            )
        paid = ("n_total", "batch_size", "items_per_user_mean")
        assert cell["limiting"] == max(paid, key=lambda name: slope[name][i])
        assert cell["share"] > 0.9  # nothing is noisy here
    compute = [cell["pf_days"] for cell in limited["cells"]]
    assert compute == sorted(compute)


def test_seeds_of_a_cell_are_one(runs: pd.DataFrame) -> None:
    twice = pd.concat([runs, runs.assign(run_key="s" + runs["run_key"], loss=runs["loss"] + 0.1)])
    fit = fit_law(twice, "E + n_total + batch_size", y="loss", n_boot=0)
    found = limits(fit, twice.reset_index(drop=True))["cells"]
    assert len(found) == len(runs)
    for cell in found:
        one, two = cell["run_keys"]
        assert two == f"s{one}"
        mean = runs.loc[runs["run_key"] == one, "loss"].iloc[0] + 0.05
        assert cell["loss"] == pytest.approx(mean)
        assert (cell["share"], cell["said"]) == (None, False)  # no bootstrap, no verdict


def test_negatives_that_are_the_batch_are_aliased(runs: pd.DataFrame) -> None:
    found = aliasing(runs)
    assert found["columns"]["steps"]["verdict"] == "constant"
    for name in ("negatives", "batch_size"):
        other = {"negatives": "batch_size", "batch_size": "negatives"}[name]
        assert found["columns"][name]["verdict"] == "aliased"
        assert found["columns"][name]["combination"] == pytest.approx({other: 1.0})
    assert found["columns"]["n_total"]["verdict"] == "parted"
    pair = found["pairs"][0]
    assert pair["pair"] == ["negatives", "batch_size"]
    assert (pair["verdict"], pair["reason"]) == (
        "aliased", "negatives equals batch_size in every run",
    )  # fmt: skip
    (*_, last) = pair["parted_by"]
    assert (last["setting"], last["value"]) == ("negatives", last["value"])
    added = runs.loc[[int(runs["pf_days"].argmax())] * len(pair["parted_by"])]
    added = added.assign(negatives=[p["value"] for p in pair["parted_by"]])
    both = pd.concat([runs, added])
    r = np.corrcoef(np.log(both["negatives"]), np.log(both["batch_size"]))[0, 1]
    assert last["then"] == pytest.approx(r**2)


def test_inflation_is_that_of_least_squares(runs: pd.DataFrame) -> None:
    """1 / (1 - R^2), R^2 by numpy, with negatives set apart so that nothing is aliased."""
    apart = runs.assign(negatives=np.where(runs["data"] == 1, 16, runs["batch_size"]))
    found = aliasing(apart)["columns"]
    logs = np.log(apart[[*COLUMNS]].assign(repeats=1 + apart["repeats"]).astype(float))
    varying = [c for c in logs if np.ptp(logs[c]) > 0 and c != "repeats"]
    for name in varying:
        x = np.column_stack([np.ones(len(logs)), logs[[c for c in varying if c != name]]])
        rest = logs[name] - x @ np.linalg.lstsq(x, logs[name], rcond=None)[0]
        expected = logs[name].var(ddof=0) / (rest**2).mean()
        assert found[name]["inflation"] == pytest.approx(expected, rel=1e-6)
        limit = "parted" if expected <= 10 else "entangled"
        assert found[name]["verdict"] == limit


def test_passes_are_no_quantity_of_their_own(runs: pd.DataFrame) -> None:
    """users_seen x (1 + repeats) = steps x batch_size."""
    found = aliasing(runs)["columns"]["repeats"]
    assert found["verdict"] == "aliased"
    apart = runs.assign(negatives=np.where(runs["data"] == 1, 16, runs["batch_size"]))
    found = aliasing(apart)["columns"]["repeats"]
    assert found["combination"] == pytest.approx({"batch_size": 1.0, "users_seen": -1.0})


def test_a_column_that_is_a_product_names_its_factors(runs: pd.DataFrame) -> None:
    apart = runs.assign(
        negatives=2.0, users_seen=runs["batch_size"] * runs["n_total"] ** 0.5, repeats=0.0
    )
    found = aliasing(apart)["columns"]["users_seen"]
    assert found["combination"] == pytest.approx({"batch_size": 1.0, "n_total": 0.5})
    empty = aliasing(runs.iloc[:0])
    assert {c["verdict"] for c in empty["columns"].values()} == {"constant"}


def test_information_rises_as_planted(runs: pd.DataFrame) -> None:
    """ln negatives - train_loss compares over batches; the training loss itself does not."""
    told = 0.3 * (runs["pf_days"] / runs["pf_days"].min()) ** 0.1
    pool = 0.2 * (runs["pf_days"] / runs["pf_days"].min()) ** 0.05
    some = runs.assign(
        train_loss=np.log(runs["negatives"]) - told, train_information=told, pool_size=256,
        loss=np.log(256) - pool,
    )  # fmt: skip
    found = losses(some, 10, 0)
    batch, whole = (found["information"][k] for k in ("training batch", "pool"))
    assert (batch["users"], whole["users"]) == (None, 256)
    assert batch["exponent"] == pytest.approx(0.1, abs=1e-6)
    assert whole["exponent"] == pytest.approx(0.05, abs=1e-6)
    assert found["agreement"]["train_information"]["spearman"] == pytest.approx(-1.0)
    assert found["agreement"]["train_loss"]["spearman"] > -1
    apart = found["agreement"]["train_loss at equal negatives"]
    assert apart["32"]["spearman"] == pytest.approx(1.0)


@pytest.fixture(scope="module")
def joint_record(runs: pd.DataFrame) -> dict[str, Any]:
    few = runs[runs["data"] == 1].assign(repeats=0.0, users_seen=2e4, negatives=2)
    return joint(Laws(few.reset_index(drop=True), n_boot=10))


@pytest.mark.slow
def test_points_and_panels_are_the_law(runs: pd.DataFrame, joint_record: dict[str, Any]) -> None:
    assert joint_record["factors"] == ["n_total", "batch_size", "items_per_user_mean"]
    assert joint_record["repetition"] == {}
    points = pd.DataFrame(joint_record["points"]).merge(runs, on="run_key")
    np.testing.assert_allclose(
        points["fitted"] * np.exp(points["residual"]), points["loss"], rtol=1e-12
    )
    panel = joint_record["panels"]["n_total"]
    assert set(panel["at"]) == {"batch_size", "items_per_user_mean"}
    forms = joint_record["forms"]["comparison"]
    assert {f["name"] for f in forms["forms"]} == {"additive", "product", "kaplan"}
    assert joint_record["sizes"]["comparison"] is not None


@pytest.mark.slow
def test_panels_and_residuals_show_every_run(
    runs: pd.DataFrame, joint_record: dict[str, Any]
) -> None:
    axes = figures.loss_panels(runs, joint_record)
    assert len(axes) == 3
    curve = joint_record["panels"]["batch_size"]["curve"]
    points, line = axes[1].lines
    assert len(points.get_xdata()) == len(joint_record["points"])
    np.testing.assert_allclose(line.get_ydata(), curve["y"])
    left = figures.residuals(runs, joint_record)
    assert [ax.get_xlabel() for ax in left] == [
        "parameters", "batch size [users]", "items per user, mean",
        "passes over users",
    ]  # fmt: skip
    shown = np.concatenate([line.get_ydata() for line in left[0].lines[1:]])
    assert sorted(shown) == pytest.approx(sorted(p["residual"] for p in joint_record["points"]))


def test_the_cloud_has_a_colour_per_limiting_factor(
    runs: pd.DataFrame, limited: dict[str, Any]
) -> None:
    ax = figures.limiting_cloud(runs, limited)
    names = {cell["limiting"] for cell in limited["cells"]}
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len({label.removesuffix(", not sure") for label in labels[1:]}) == len(names)
    drawn = [line for line in ax.lines if line.get_label() != "compute frontier"]
    assert sum(len(line.get_xdata()) for line in drawn) == len(runs)


def test_the_cloud_shows_cells_that_no_factor_limits(
    runs: pd.DataFrame, limited: dict[str, Any]
) -> None:
    first, *others = limited["cells"]
    cells = [first | {"limiting": None, "share": None, "said": False}, *others]
    ax = figures.limiting_cloud(runs, limited | {"cells": cells})
    marks = {line.get_label(): len(line.get_xdata()) for line in ax.lines}
    assert marks["none, not sure"] == len(first["run_keys"])


def value(choice: str, number: float | None, answer: str | None) -> dict[str, Any]:
    ends = (None, None) if number is None else (number - 0.1, number + 0.2)
    return {"choice": choice, "value": number, "answer": answer, "lower": ends[0], "upper": ends[1]}


def test_the_forest_has_a_row_per_choice() -> None:
    claim = {
        "question": "Is it?", "statement": None,
        "values": [value("base", 0.3, "yes"), value("x", 0.5, None), value("y", None, None)],
        "combinations": {"n": 12, "lowest": 0.1, "highest": 0.7},
    }  # fmt: skip
    ax = figures.forest(claim)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["base", "x", "12 combinations"]
    assert "open: Is it?" in (ax.get_title(), ax.get_title(loc="left"))
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(m.get_xdata()[0]) for m in marks] == [0.3, 0.5]
    assert marks[1].get_markerfacecolor() == "white"
