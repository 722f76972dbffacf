"""Transfer laws of one task, the chain from configuration to transfer, and the study's record."""

import json
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scaling.analysis import FitError, FitStatus, Objective, fit_law
from scaling.analysis.transfer_law.chain import compare_held_out, fit_chain
from scaling.analysis.transfer_law.equality import equal_loss_test
from scaling.analysis.transfer_law.figures import residuals_by_factor, task_law
from scaling.analysis.transfer_law.laws import fit_task, forms, tangent
from scaling.analysis.transfer_law.points import (
    FACTORS,
    mean_of_tasks,
    noise_floor,
    transfer_points,
)
from scaling.analysis.transfer_law.record import transfer_laws
from scaling.results import Tables

LAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "line": lambda x: 0.2 + 0.1 * x,
    "exponential": lambda x: 0.65 - 0.6 * np.exp(-0.8 * (x - 2.5)),
    "power": lambda x: 0.3 + 0.1 * (x - 2.8) ** 0.4,
    "sigmoid": lambda x: 0.3 + 0.3 / (1 + np.exp(-6 * (x - 4.2))),
}
PLANTED = {
    "line": {"irreducible": 0.2, "slope": 0.1},
    "exponential": {"irreducible": 0.65, "rate": 0.8, "coefficient": 0.6 * np.exp(2.0)},
    "power": {"irreducible": 0.3, "coefficient": 0.1, "exponent": -0.4, "shift": -2.8},
    "sigmoid": {"irreducible": 0.3, "coefficient": 0.3, "rate": 6.0, "midpoint": 4.2},
}
STAGE_1, STAGE_2 = "E + n_total + batch_size", "E + exp(pretraining)"
SQUARES = Objective(loss="mse")


def runs(metric: Callable[[np.ndarray], np.ndarray], noise: float, seed: int = 0) -> pd.DataFrame:
    """Two runs of each of 16 configurations."""
    rng = np.random.default_rng(seed)
    losses = np.repeat(np.linspace(3, 5.5, 16), 2) + np.tile([0.0, 0.01], 16)
    y = metric(losses) + rng.normal(0, noise, 32)
    return pd.DataFrame(
        {
            "cell": np.repeat(np.arange(16), 2),
            "pretraining": losses,
            "downstream": y,
            "low": y - 0.0196,
            "high": y + 0.0196,
        }
    )


def study(rng: np.random.Generator, loss_noise: float, noise: float) -> pd.DataFrame:
    """4 x 4 configurations under a law of the loss, and a metric that falls with the loss."""
    n, b = (x.ravel() for x in np.meshgrid(1e5 * 4.0 ** np.arange(4), 32.0 * 2 ** np.arange(4)))
    x = pd.DataFrame({"n_total": n, "batch_size": b})
    loss = true_loss(x) * np.exp(rng.normal(0, loss_noise, 16))
    metric = true_metric(loss) + rng.normal(0, noise, 16)
    cells = {"cell": [f"c{i}" for i in range(16)], "pf_days": n * b}
    return x.assign(pretraining=loss, downstream=metric, **cells)


def true_loss(x: pd.DataFrame) -> np.ndarray:
    n, b = x["n_total"].to_numpy(), x["batch_size"].to_numpy()
    return 2 + 1.5 * (n / 1e5) ** -0.25 + 1.2 * (b / 32) ** -0.3


def true_metric(loss: np.ndarray) -> np.ndarray:
    return 0.1 + 1.2 * np.exp(-0.6 * loss)


# ---- one task -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
def test_planted_laws_are_recovered(name: str) -> None:
    found = fit_task(runs(LAWS[name], 0.0), rises_with_loss=True, n_boot=0)
    assert (found.law, found.scales, found.reasons) == (name, True, ())
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.fits[name].status is FitStatus.CONVERGED
    for parameter, value in PLANTED[name].items():
        assert found.fits[name].params[parameter] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", ["exponential", "power"])
def test_metrics_that_fall_with_the_loss_mirror_those_that_rise(name: str) -> None:
    found = fit_task(runs(lambda x: 1 - LAWS[name](x), 0.0), rises_with_loss=False, n_boot=0)
    assert (found.law, found.scales) == (name, True)
    assert found.fits[name].params["irreducible"] == pytest.approx(
        1 - PLANTED[name]["irreducible"], rel=1e-4
    )


def test_the_simplest_law_within_a_standard_error_is_taken() -> None:
    found = fit_task(runs(LAWS["line"], 0.003), rises_with_loss=True, n_boot=200)
    assert (found.law, found.scales) == ("line", True)
    held_out = found.held_out["folds"]
    assert held_out["constant"] > 10 * held_out["line"]
    assert held_out["line"] == pytest.approx(0.003 / np.sqrt(2), rel=0.5)
    guess = found.predict(np.array([3.5]))
    assert guess["lower"][0] < LAWS["line"](np.array([3.5]))[0] < guess["upper"][0]
    assert guess["upper"][0] - guess["lower"][0] < 0.004


def test_held_out_errors_are_those_of_fits_without_the_fold() -> None:
    """Ten configurations are ten folds of one: each error from a fit to the other nine."""
    points = runs(LAWS["exponential"], 0.003)[lambda d: d["cell"] < 10]
    found = fit_task(points, rises_with_loss=True, n_boot=0)
    cells = points.groupby("cell")[["pretraining", "downstream"]].mean()
    for name, form in list(forms(True).items())[:2]:
        errors = []
        for cell, (loss, metric) in cells.iterrows():
            others = points[points["cell"] != cell].assign(
                perplexity=lambda d: np.exp(d["pretraining"])
            )
            fit = fit_law(
                others, form, y="downstream", n_boot=0, cluster="cell",
                objective=Objective(loss="mse", scale="raw"),
            )  # fmt: skip
            x = {"pretraining": loss, "perplexity": np.exp(loss)}
            errors.append(fit.predict(x, level=None)["y"][0] - metric)
        assert found.held_out.loc[name, "folds"] == pytest.approx(
            np.sqrt(np.mean(np.square(errors))), rel=1e-4
        )
    late = cells.nsmallest(2, "pretraining")
    rest = points[~points["cell"].isin(late.index)]
    slope, level = np.polyfit(rest["pretraining"], rest["downstream"], 1)
    away = level + slope * late["pretraining"] - late["downstream"]
    assert found.held_out.loc["line", "late"] == pytest.approx(np.sqrt(np.mean(away**2)), rel=1e-6)


def test_tasks_that_do_not_scale_are_said_so() -> None:
    noise = fit_task(runs(lambda x: 0 * x + 0.3, 0.01), rises_with_loss=True, n_boot=0)
    assert not noise.scales
    assert any("rank" in reason for reason in noise.reasons)
    worse = fit_task(runs(LAWS["line"], 0.001), rises_with_loss=False, n_boot=0)
    assert not worse.scales  # the metric should fall with the loss and rises
    assert worse.reasons[0].startswith("transfer does not rank with the loss (Spearman 1.00")
    few = fit_task(runs(LAWS["line"], 0.001)[:8], rises_with_loss=True)
    assert few.reasons == ("4 configurations with different losses; 5 are needed",)
    assert (few.law, few.fit, few.held_out.empty) == (None, None, True)
    with pytest.raises(FitError, match="no law of this task: 4 configurations"):
        few.predict(np.array([4.0]))


def test_noise_floor() -> None:
    points = pd.DataFrame({"cell": list("aabbbc"), "downstream": [1.0, 3, 0, 3, 6, 9]})
    points = points.assign(
        low=points["downstream"] - 1.959964, high=points["downstream"] + 1.959964
    )
    found = noise_floor(points)
    assert found["spare"] == 3
    assert found["between_seeds"] == pytest.approx(np.sqrt((2 + 18) / 3))
    assert found["evaluation"] == pytest.approx(1.0)
    alone = noise_floor(points.iloc[[0, 2, 5]].assign(low=np.nan))
    assert (alone["between_seeds"], alone["evaluation"]) == (None, None)


# ---- the chain ----------------------------------------------------------------------------------


def test_a_noise_free_chain_is_exact() -> None:
    table = study(np.random.default_rng(0), 0.0, 0.0)
    chain = fit_chain(table, table, STAGE_1, STAGE_2, objective_1=SQUARES, n_boot=20)
    x = pd.DataFrame({"n_total": [2.56e7, 4e5], "batch_size": [1024.0, 64.0]})
    guess = chain.predict(x)
    np.testing.assert_allclose(guess["loss"], true_loss(x), rtol=1e-6)
    np.testing.assert_allclose(guess["y"], true_metric(true_loss(x)), rtol=1e-6)
    np.testing.assert_allclose(guess["lower"], guess["upper"], rtol=1e-4)
    assert guess["extrapolated"].tolist() == [True, False]


def test_both_stages_are_drawn_from_the_same_configurations() -> None:
    """Every draw is the fit to the table in which configurations stand as often as they were drawn;
    stage 2 lacks one of them, which then counts in stage 1 alone."""
    table = study(np.random.default_rng(1), 0.01, 0.003)
    part = table.iloc[:-1]
    chain = fit_chain(table, part, STAGE_1, STAGE_2, objective_1=SQUARES, n_boot=6, seed=3)
    cells = sorted(table["cell"])
    counts = np.random.default_rng(3).multinomial(16, np.full(16, 1 / 16), size=6)
    x = pd.DataFrame({"n_total": [4e5], "batch_size": [64.0]})
    assert chain.failed == 0
    for b, count in enumerate(counts):
        often = dict(zip(cells, count, strict=True))
        first, second = (
            t.loc[np.repeat(t.index, t["cell"].map(often))].reset_index(drop=True)
            for t in (table, part)
        )
        one = fit_law(first, STAGE_1, y="pretraining", objective=SQUARES, n_boot=0, cluster=None)
        two = fit_law(
            second, STAGE_2, y="downstream", objective=Objective(loss="mse", scale="raw"),
            n_boot=0, cluster=None,
        )  # fmt: skip
        for fit, theta, own in (
            (one, chain.draws_1[b], chain.stage_1),
            (two, chain.draws_2[b], chain.stage_2),
        ):
            at = x if own is chain.stage_1 else {"pretraining": 3.7}
            columns = {c: np.atleast_1d(at[c]) for c in fit.factors}
            assert own.surface.values(theta[None], columns)[0, 0] == pytest.approx(
                fit.predict(at, level=None)["y"][0], rel=2e-4
            )


def test_the_error_of_the_loss_widens_the_interval() -> None:
    table = study(np.random.default_rng(2), 0.02, 0.0005)
    chain = fit_chain(table, table, STAGE_1, STAGE_2, objective_1=SQUARES, n_boot=200)
    guess = chain.predict({"n_total": [2.56e7], "batch_size": [1024.0]})
    width = {
        k: float((guess[f"upper{k}"] - guess[f"lower{k}"]).iloc[0])
        for k in ("", "_stage_2", "_run")
    }
    assert width[""] > 3 * width["_stage_2"]
    assert width["_run"] > width[""]


@pytest.mark.slow
def test_chained_intervals_cover() -> None:
    """40 worlds, one extrapolated and one inner configuration; at 95 % fewer than 34 of 40 have a
    probability below 0.4 %. Without stage 1's error the extrapolated one falls below it."""
    rng = np.random.default_rng(5)
    x = pd.DataFrame({"n_total": [2.56e7, 4e5], "batch_size": [1024.0, 64.0]})
    truth = true_metric(true_loss(x))
    covered, stage_2, new = np.zeros(2), np.zeros(2), np.zeros(2)
    for i in range(40):
        table = study(rng, 0.02, 0.001)
        chain = fit_chain(table, table, STAGE_1, STAGE_2, objective_1=SQUARES, n_boot=100, seed=i)
        guess = chain.predict(x)
        run = true_metric(true_loss(x) * np.exp(rng.normal(0, 0.02, 2))) + rng.normal(0, 0.001, 2)
        covered += (guess["lower"] <= truth) & (truth <= guess["upper"])
        stage_2 += (guess["lower_stage_2"] <= truth) & (truth <= guess["upper_stage_2"])
        new += (guess["lower_run"] <= run) & (run <= guess["upper_run"])
    assert (covered >= 34).all()
    assert (new >= 34).all()
    assert stage_2[0] < 30


def test_stages_name_rows_that_cannot_be_used() -> None:
    table = study(np.random.default_rng(2), 0.02, 0.001)
    table.loc[3, "batch_size"] = np.nan
    with pytest.raises(FitError, match=r"stage 1 .* cannot be used \(1 rows: batch_size"):
        fit_chain(table, table, STAGE_1, STAGE_2, n_boot=0)


def test_chained_against_direct_laws_held_out() -> None:
    table = study(np.random.default_rng(3), 0.0, 0.0)
    late = table["pf_days"].rank() > 12
    found = compare_held_out(
        table, late, {"factors": STAGE_1, "nothing": "E + constant"}, STAGE_2,
        {"factors": "E - n_total - batch_size"}, objective_1=SQUARES, n_boot=20,
    )  # fmt: skip
    assert found.index.tolist() == [
        "chain, factors", "measured loss", "chain, nothing", "direct, factors",
    ]  # fmt: skip
    assert (found["n"] == 4).all()
    assert found["rmse"]["chain, factors"] < 1e-6
    assert found["rmse"]["measured loss"] < 1e-6
    direct = fit_law(
        table[~late], "E - n_total - batch_size", y="downstream", n_boot=0, cluster="cell",
        objective=Objective(loss="mse", scale="raw"),
    )  # fmt: skip
    away = direct.predict(table[late], level=None)["y"] - table.loc[late, "downstream"].to_numpy()
    assert found["rmse"]["direct, factors"] == pytest.approx(np.sqrt(np.mean(away**2)), rel=1e-6)
    assert found["bias"]["direct, factors"] == pytest.approx(np.mean(away), rel=1e-6)
    assert "no column" in found["failed"]["chain, nothing"]


# ---- a study ------------------------------------------------------------------------------------


def test_points_carry_the_factors_of_their_runs(tables: Tables) -> None:
    points = transfer_points(tables)
    assert points.table.groupby("task").size().to_dict() == {"books": 24, "food": 24}
    assert points.table["cell"].nunique() == 24
    planned = tables.runs.set_index("run_key")
    for factor in FACTORS:
        values = planned[factor].astype(float)[points.table["run_key"]]
        np.testing.assert_array_equal(points.table[factor], values)
    again = tables.runs.assign(run_key=tables.runs["run_key"] + "-2", seed=1)
    doubled = Tables(
        pd.concat([tables.runs, again]), tables.curves,
        pd.concat([tables.transfer, tables.transfer.assign(run_key=lambda d: d["run_key"] + "-2")]),
        tables.gains, tables.collected,
    )  # fmt: skip
    points = transfer_points(doubled)
    assert (len(points.table), points.table["cell"].nunique()) == (96, 24)


def test_mean_of_tasks_takes_those_that_every_run_has() -> None:
    points = pd.DataFrame(
        {"task": list("aabbc"), "run_key": list("xyxyx"), "downstream": [1.0, 2, 3, 6, 100]}
    ).assign(cell=lambda d: d["run_key"], pretraining=1.0)
    table, over = mean_of_tasks(points)
    assert over == ("a", "b")
    assert dict(zip(table["run_key"], table["downstream"], strict=True)) == {"x": 2.0, "y": 4.0}
    alone, over = mean_of_tasks(points[points["task"] != "b"])
    assert (alone.empty, over) == (True, ("a",))


def test_record_of_a_study(tables: Tables) -> None:
    """The metric of the simulated study is .3 (.45) + .05 x loss, whatever bought the loss."""
    record = transfer_laws(tables, metrics=("loss",), n_boot=100)["loss"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["rises_with_loss"], record["failed"]) == (True, {})
    for task, level in (("books", 0.3), ("food", 0.45)):
        found = record["tasks"][task]
        assert (found["law"], found["scales"], found["system"]) == ("line", True, "clue/u-mlp")
        fit = found["fit"]
        assert set(found["others"]) == {"exponential", "power", "sigmoid"}
        assert fit["params"]["slope"] == pytest.approx(0.05, rel=0.1)
        assert fit["params"]["irreducible"] == pytest.approx(level, abs=0.02)
        assert found["noise"]["evaluation"] == pytest.approx(0.01 / 1.96, rel=1e-3)
        effects = found["equal_loss"]["effects"]
        assert len(effects) == 4
        assert all(abs(e["over_range"]) < 0.2 * found["equal_loss"]["span"] for e in effects)
        assert found["equal_loss"]["left_out"]["steps"] == "the same in every run"
        ways = found["held_out_compute"]["ways"]
        assert ways["measured loss"]["rmse"] < 0.005
        assert ways["chain, compute"]["rmse"] < 0.005
        left_out = found["held_out_compute"]["left_out"]
        assert set(left_out) == {"batch_size", "items_per_user_mean"}
        assert left_out["batch_size"] == "fewer than 3 values have no exponent"
        assert "chain, factors" not in ways
    mean = record["mean_of_tasks"]
    assert (mean["over"], mean["law"], mean["runs"]) == (["books", "food"], "line", 24)
    assert mean["fit"]["params"]["irreducible"] == pytest.approx(0.375, abs=0.02)
    assert record["pooled"]["failed"] is None
    assert record["pooled"]["ci95"][0] < 0 < record["pooled"]["ci95"][1]  # a line


def test_figures(tables: Tables) -> None:
    own = transfer_points(tables).table.query("task == 'books'")
    law = fit_task(own, rises_with_loss=True, n_boot=40)
    ax = task_law(law.points, law.to_dict(), title="books")
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["24 runs, 24 configurations", "line"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), own["downstream"])
    assert law.fit is not None
    fit = law.fit
    test = equal_loss_test(
        law.points, FACTORS, tangent=lambda x: tangent(fit, x), n_permutations=19
    )
    panels = residuals_by_factor(test, law.points)
    assert [p.get_xlabel() for p in panels] == [
        "parameters", "batch size [users]", "items per user, realised mean", "distinct users met",
    ]  # fmt: skip
    for ax, (factor, row) in zip(panels, test.effects.iterrows(), strict=True):
        cloud = ax.collections[0].get_offsets()
        np.testing.assert_array_equal(cloud[:, 0], law.points[factor])
        slope = np.polyfit(np.log2(cloud[:, 0]), cloud[:, 1], 1)[0]
        ends = ax.lines[0].get_ydata()
        assert ends[1] - ends[0] == pytest.approx(row["over_range"])
        assert slope == pytest.approx(row["per_doubling"], abs=1e-6)
    plt.close("all")
