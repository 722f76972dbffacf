"""The next runs: optimum beside brute force, regret beside decisions, the file beside `plan`."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from typer.testing import CliRunner

from scaling.analysis.design.belief import Assumption, DesignError, believe, update
from scaling.analysis.design.candidates import candidates, of_law
from scaling.analysis.design.criteria import Problem, choose
from scaling.analysis.design.next import Goal, Proposal, problem_of, propose, sweep_file
from scaling.analysis.design.targets import (
    GROUPS,
    Space,
    best,
    regret_matrix,
    target_matrices,
)
from scaling.cli import app
from scaling.data.prepare import read_card
from scaling.sweeps import Grid

ROOT = Path(__file__).parents[2]
SWEEPS = ROOT / "sweeps"
FORM = "E + n_total + batch_size + items_per_user_mean"
NOISE = 0.01


def random_problem(seed: int, weight: float, m: int = 9) -> Problem:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(2, m, 3))
    targets = np.stack([[np.outer(g, g) for g in rng.normal(size=(2, 3))] for _ in range(2)])
    known = np.repeat(1e-2 * np.eye(3)[None], 2, axis=0)
    return Problem(gradients, rng.uniform(0.5, 2, m), known, targets, (0.75, 0.25), weight)


def grid_table() -> pd.DataFrame:
    values = itertools.product((4e6, 1.5e7, 6e7, 1.6e8), (64, 128, 256, 512), (16, 64, 256))
    table = pd.DataFrame(values, columns=["n_total", "batch_size", "items_per_user_mean"])
    return table.assign(pf_days=6.0 * 1e5 / 8.64e19 * table.prod(axis=1))


def space_of(table: pd.DataFrame) -> Space:
    reference = np.exp(np.log(table).mean())
    columns = ["n_total", "batch_size", "items_per_user_mean"]
    logs = np.log(table[columns] / reference[columns]).to_numpy()
    return Space(reference[columns].to_dict(), GROUPS, logs.min(axis=0) - 3, logs.max(axis=0) + 3)


# --- criteria -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_the_gain_of_a_run_is_the_difference_of_the_criterion(weight: float) -> None:
    problem = random_problem(0, weight)
    chosen = [1, 4]
    gains = problem.gains(problem.covariance(chosen))
    for i in range(9):
        assert gains[i] == pytest.approx(problem.value([*chosen, i]) - problem.value(chosen))


def test_without_targets_the_criterion_is_the_determinant() -> None:
    problem = random_problem(1, 0.0)
    m = (
        problem.known
        + np.swapaxes(problem.gradients[:, [0, 2, 5]], 1, 2) @ problem.gradients[:, [0, 2, 5]]
    )
    assert problem.value([0, 2, 5]) == pytest.approx(
        np.mean([np.log(np.linalg.det(one)) for one in m]) / 3
    )


@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_the_design_is_the_best_of_all_or_next_to_it(weight: float) -> None:
    gaps = []
    for seed in range(12):
        problem = random_problem(seed, weight)
        budget, most = 4.5, 4
        every = [
            s
            for n in range(1, most + 1)
            for s in itertools.combinations(range(9), n)
            if problem.cost[list(s)].sum() <= budget
        ]
        brute = max(problem.value(s) for s in every)
        chosen = choose(problem, budget, most)
        assert tuple(sorted(chosen)) in set(every)
        gaps.append(brute - problem.value(chosen))
    assert min(gaps) >= -1e-12
    assert sum(g < 1e-9 for g in gaps) >= 10
    assert max(gaps) < 0.2  # of a logarithm of variance


def test_more_budget_tells_more() -> None:
    table = grid_table()
    belief = believe(FORM, table, Assumption())
    problem = problem_of(
        belief, table, table["pf_days"].to_numpy(), NOISE, Goal(space_of(table), 20.0)
    )
    values = [problem.value(choose(problem, budget, 16)) for budget in (0.01, 0.03, 0.1, 0.3)]
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.3


# --- targets --------------------------------------------------------------------------------------


def test_at_the_optimum_all_factors_pull_alike() -> None:
    """Additive law, compute ~ product: A_k p_k x_k^-p_k is the same for all k (Lagrange)."""
    table = grid_table()
    given = Assumption(exponents={"n_total": 0.4, "batch_size": 0.25})
    belief, space = believe(FORM, table, given), space_of(table)
    v = best(belief.surface, belief.mean, space, 20.0)
    assert v.sum() == pytest.approx(np.log(20.0))
    p = np.array([0.4, 0.25, 0.3])
    pulls = p * 0.2 * np.exp(-p * v)
    assert pulls == pytest.approx(np.full(3, pulls.mean()), rel=1e-3)


def test_the_regret_matrix_foretells_what_wrong_decisions_cost() -> None:
    table = grid_table()
    belief, space = believe(FORM, table, Assumption()), space_of(table)
    surface, theta = belief.surface, belief.mean
    v = best(surface, theta, space, 20.0)
    k = regret_matrix(surface, theta, space, v)
    rng = np.random.default_rng(0)

    def loss(at: np.ndarray) -> float:
        return float(surface.values(theta[None], space.columns(at[None]))[0, 0])

    for _ in range(5):
        off = 0.001 * rng.normal(size=len(theta))
        cost = loss(best(surface, theta + off, space, 20.0)) / loss(v) - 1
        assert cost == pytest.approx(off @ k @ off / 2, rel=0.05)


def test_users_and_repeats_follow_from_the_batch() -> None:
    space = Space(
        {"batch_size": 64.0, "users_seen": 1.0, "repeats": 0.0}, (("batch_size",),),
        np.zeros(1), np.ones(1), users=1_000.0, steps=10.0,
    )  # fmt: skip
    at = space.columns(np.log([[1.0], [2.0], [40.0]]))
    assert at["users_seen"] == pytest.approx([640, 1_000, 1_000])
    assert at["repeats"] == pytest.approx([0, 0.28, 24.6])


def test_a_design_for_the_decision_beats_the_others_at_it() -> None:
    """Expected regret at a law that nobody assumed, by the Fisher information there."""
    table = grid_table()
    cost, budget, runs = table["pf_days"].to_numpy(), 0.1, 20
    belief, space = believe(FORM, table, Assumption()), space_of(table)
    goal = Goal(space, 10 * budget / float(np.exp(np.log(cost).mean())))
    true = Assumption(
        floor_share=0.5, exponents={"n_total": 0.45, "batch_size": 0.25, "items_per_user_mean": 0.4}
    )
    theta = believe(FORM, table, true).mean
    matrices = target_matrices(belief.surface, theta[None], space, goal.factor)[:, 0]
    j = belief.surface.jacobian(
        theta, {c: table[c].to_numpy() for c in belief.surface.form.columns}
    )
    j = j / belief.surface.values(theta[None], dict(table.items()))[0][:, None] / NOISE

    def expected(chosen: list[int]) -> tuple[float, float]:
        covariance = np.linalg.inv(j[chosen].T @ j[chosen])
        return float(np.trace(matrices[0] @ covariance) / 2), float(
            np.trace(matrices[1] @ covariance)
        )

    ours = choose(problem_of(belief, table, cost, NOISE, goal), budget, runs)
    d_optimal = choose(problem_of(belief, table, cost, NOISE, None, laws=1), budget, runs)
    assert cost[ours].sum() <= budget * (1 + 1e-9)
    regret, variance = expected(ours)
    other, other_variance = expected(d_optimal)
    assert regret < 0.9 * other
    assert variance < other_variance
    base = np.flatnonzero((table["n_total"] == 1.5e7) & (table["batch_size"] == 128))[1]
    near = (table.iloc[:, :3] != table.iloc[base, :3]).sum(axis=1) <= 1
    assert regret < 0.5 * expected(list(np.flatnonzero(near)))[0]  # one factor at a time
    rng = np.random.default_rng(0)
    drawn = [expected(list(rng.permutation(len(table))[:runs]))[0] for _ in range(20)]
    assert regret < np.median(drawn)  # though these cost more than the budget


# --- belief ---------------------------------------------------------------------------------------


def test_finished_runs_move_the_belief_to_the_mode() -> None:
    table = grid_table().iloc[::5]
    belief = believe(FORM, grid_table(), Assumption())
    rng = np.random.default_rng(0)
    theta = belief.draws(5, rng)[3]
    surface = belief.surface
    x = {c: table[c].to_numpy() for c in surface.form.columns}
    table = table.assign(
        loss=7 * surface.values(theta[None], x)[0] * np.exp(NOISE * rng.normal(size=len(table)))
    )
    found = update(belief, table, NOISE)
    scale = surface.values(belief.mean[None], x)[0].mean() / table["loss"].mean()

    def negative_log_posterior(t: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            r = (np.log(surface.values(t[None], x)[0]) - np.log(scale * table["loss"])) / NOISE
        away = t - belief.mean
        value = float(r @ r + away @ belief.precision @ away)
        return value if np.isfinite(value) else 1e12

    wanted = scipy.optimize.minimize(
        negative_log_posterior, belief.mean, method="Nelder-Mead",
        options={"maxiter": 40_000, "maxfev": 40_000, "xatol": 1e-10, "fatol": 1e-10,
                 "adaptive": True},
    )  # fmt: skip
    assert negative_log_posterior(found.mean) <= wanted.fun * (1 + 1e-6)
    assert np.linalg.eigvalsh(found.precision - belief.precision)[0] > -1e-6


# --- a sweep --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scale() -> tuple[Grid, Proposal]:
    grid = Grid.read(SWEEPS / "scale_factors.toml")
    return grid, propose(grid, read_card(grid.corpus, ROOT), 0.4, noise=NOISE, max_runs=20)


def planned(path: Path) -> pd.DataFrame:
    grid = Grid.read(path)
    return pd.DataFrame([r.row for r in grid.runs(read_card(grid.corpus, ROOT))])


@pytest.mark.parametrize("beside", [True, False])
def test_the_file_is_read_back_as_the_runs_that_were_chosen(
    scale: tuple[Grid, Proposal], tmp_path: Path, beside: bool
) -> None:
    grid, found = scale
    if beside:
        (tmp_path / "models.toml").write_text((SWEEPS / "models.toml").read_text())
    path = tmp_path / "next.toml"
    path.write_text(sweep_file(grid, found, tmp_path, beside))
    rows = planned(path)
    assert len(rows) == len(found.runs) <= 20
    assert rows["pf_days_exact"].sum() == pytest.approx(found.spent)
    assert found.spent <= 0.4
    keys = ["n_total", "batch_size", "items_per_user", "data_fraction", "steps", "seed"]
    pd.testing.assert_frame_equal(rows[keys], pd.DataFrame(found.runs)[keys])
    assert set(rows["sweep"]) == {"scale_factors_next"}


def test_seeds_and_the_paper_s_count_are_paid_for(scale: tuple[Grid, Proposal]) -> None:
    grid, _ = scale
    found = propose(
        grid, read_card(grid.corpus, ROOT), 0.05, noise=NOISE, price="formula", seeds=2,
        max_runs=21,
    )  # fmt: skip
    assert found.seeds == (0, 1)
    assert len(found.runs) == 2 * len(found.points) <= 20
    assert sum(r["pf_days"] for r in found.runs) == pytest.approx(found.spent)
    assert found.spent <= 0.05


def test_nothing_but_the_law_s_factors_is_varied(scale: tuple[Grid, Proposal]) -> None:
    grid, _ = scale
    offered = candidates(grid, read_card(grid.corpus, ROOT))
    named = {c.point["model"] for c in offered}
    assert named == {
        "clue-4m", "clue-8m", "clue-15m", "clue-30m", "clue-60m", "clue-120m", "table8", "clue-160m"
    }  # fmt: skip
    assert {c.point["batch_size"] for c in offered} == {64, 128, 256, 512}
    assert {c.point["items_per_user"] for c in offered} == {16, 32, 64, 128, 256, 512}
    only = of_law(offered, ["n_total", "batch_size"], grid)
    assert {c.point["items_per_user"] for c in only} == {512}


def finished_runs(grid: Grid, seed: int = 0) -> pd.DataFrame:
    rows = pd.DataFrame([r.row for r in grid.runs(read_card(grid.corpus, ROOT))]).iloc[::3]
    surface = believe(FORM, rows, Assumption()).surface
    theta = believe(FORM, rows, Assumption(exponents={"n_total": 0.5})).mean
    x = {c: rows[c].to_numpy() for c in surface.form.columns}
    noise = np.random.default_rng(seed).normal(size=len(rows))
    return rows.assign(loss=4 * surface.values(theta[None], x)[0] * np.exp(NOISE * noise))


def test_finished_runs_are_taken_into_account_and_not_bought_again(
    scale: tuple[Grid, Proposal],
) -> None:
    grid, _ = scale
    done = finished_runs(grid)
    other = done.iloc[:2].assign(steps=1)  # a control: no law has a factor for it
    found = propose(
        grid, read_card(grid.corpus, ROOT), 0.4, noise=NOISE, max_runs=20,
        finished=pd.concat([done, other], ignore_index=True),
    )  # fmt: skip
    assert found.finished == len(done)
    keys = ["model", "batch_size", "items_per_user", "data_fraction"]
    old = set(done[keys].itertuples(index=False, name=None))
    assert not old & set(pd.DataFrame(found.runs)[keys].itertuples(index=False, name=None))
    for row in found.expected:
        assert row["after"] < row["before"], row["quantity"]
    exponent = next(r for r in found.expected if r["quantity"] == "exponent.n_total")
    assert exponent["value"] == pytest.approx(0.5, abs=0.15)  # of 0.3 assumed


def test_what_cannot_be_proposed_is_refused(scale: tuple[Grid, Proposal]) -> None:
    grid, _ = scale
    card = read_card(grid.corpus, ROOT)
    with pytest.raises(DesignError, match="buy none of 192 candidates; the cheapest costs"):
        propose(grid, card, 1e-9, noise=NOISE)
    with pytest.raises(DesignError, match="no factor has three values"):
        propose(Grid.read(SWEEPS / "best.toml"), card, 1.0, noise=NOISE)


def test_the_verb_writes_a_sweep_that_plan_reads(tmp_path: Path) -> None:
    out = tmp_path / "next.toml"
    call = ["next", str(SWEEPS / "compute.toml"), "--budget", "0.2", "--max-runs", "12"]
    done = CliRunner().invoke(app, [*call, "--out", str(out), "--json", "--root", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    plan = CliRunner().invoke(app, ["plan", str(out), "--json", "--root", str(tmp_path)])
    rows = json.loads(plan.stdout)
    assert len(rows) == len(found["runs"]) <= 12
    assert sum(r["pf_days_exact"] for r in rows) == pytest.approx(found["spent"])
    assert found["spent"] <= 0.2
    said = CliRunner().invoke(app, [*call, "--root", str(tmp_path)])
    assert "decision regret" in said.output


@pytest.mark.slow
def test_the_benchmark_keeps_every_method_within_the_budget() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "design.py", "--quick", "--json", "--methods",
         "next", "D-optimal", "random", "one factor"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert {r["method"] for r in found["rows"]} == {"next", "D-optimal", "random", "one factor"}
    for row in found["rows"]:
        assert 0 < row["pf_days"] <= 0.15 * (1 + 1e-6)
        assert row["regret"] >= 0
    medians = {r["method"]: r["regret_mean"] for r in found["medians"]}
    assert medians["next"] < min(medians["random"], medians["one factor"])


def test_a_proposal_is_plain_json(scale: tuple[Grid, Proposal]) -> None:
    _, found = scale
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["points"] == [dict(p) for p in found.points]
    assert dataclasses.asdict(found)["spent"] == again["spent"]
