"""What a plan can tell before it is run: beside closed forms, numpy and simulated refits."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from typer.testing import CliRunner

from scaling.analysis import fit_law
from scaling.analysis.design.audit import Audit, FactorAudit, audit, judge
from scaling.analysis.design.belief import (
    Assumption,
    DesignError,
    assumption_of,
    believe,
    noise_of,
)
from scaling.analysis.design.information import Information
from scaling.analysis.design.mending import with_mends
from scaling.analysis.design.relations import log_columns, relation
from scaling.cli import app
from scaling.data.prepare import read_card
from scaling.sweeps import Grid, Zip

SWEEPS = Path(__file__).parents[2] / "sweeps"
NOISE = 0.01


def plan_of(name: str) -> tuple[Grid, pd.DataFrame]:
    grid = Grid.read(SWEEPS / f"{name}.toml")
    return grid, pd.DataFrame([r.row for r in grid.runs(read_card(grid.corpus, Path("nowhere")))])


def audited(name: str, **options: object) -> tuple[Audit, dict[str, FactorAudit]]:
    found = audit(plan_of(name)[1], sweep=name, noise=NOISE, noise_from="test", **options)  # type: ignore[arg-type]
    return found, {f.factor: f for f in found.factors}


def design(rows: int, factors: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(10 ** rng.uniform(0, 2.5, (rows, factors)), columns=list("abcd")[:factors])


def by_hand(table: pd.DataFrame, exponent: float = 0.3, floor: float = 0.4) -> np.ndarray:
    """[m, P] derivative of ln y of the assumed law: E, then ln of every term, then exponents."""
    logs = np.log(table.to_numpy())
    logs = logs - logs.mean(axis=0)
    terms = (1 - floor) / table.shape[1] * np.exp(-exponent * logs)
    y = floor + terms.sum(axis=1)
    return np.column_stack([np.ones(len(table)), terms, -terms * logs]) / y[:, None]


def assumed(table: pd.DataFrame, noise: float = NOISE) -> Information:
    return Information.of(
        believe("E + " + " + ".join(table), table, Assumption()), table, noise, laws=1
    )


# --- information ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [1, 2, 4])
def test_standard_errors_and_condition_are_those_of_the_closed_form(factors: int) -> None:
    table = design(30, factors)
    j, state = by_hand(table), assumed(table)
    wanted = NOISE * np.sqrt(np.diag(np.linalg.inv(j.T @ j)))
    order = [0, *range(1, 1 + factors), *range(1 + factors, 1 + 2 * factors)]
    assert state.standard_errors(state.jacobian) == pytest.approx(wanted[order], rel=1e-6)
    assert state.condition == pytest.approx(np.linalg.cond(j / np.linalg.norm(j, axis=0)), rel=1e-6)
    assert state.rank == 1 + 2 * factors == np.linalg.matrix_rank(j)


def test_standard_errors_are_the_spread_of_simulated_refits() -> None:
    table, noise = design(40, 2, seed=3), 0.005
    logs = np.log(table.to_numpy())
    logs = logs - logs.mean(axis=0)

    def law(theta: np.ndarray) -> np.ndarray:
        return np.log(theta[0] + np.exp(theta[1:3] - theta[3:5] * logs).sum(axis=1))

    true = np.array([0.4, np.log(0.3), np.log(0.3), 0.3, 0.3])
    rng = np.random.default_rng(0)
    refits = [
        scipy.optimize.least_squares(
            lambda t, y: law(t) - y, true, args=(law(true) + noise * rng.normal(size=40),)
        ).x
        for _ in range(300)
    ]
    state = assumed(table, noise)
    spread = np.std(refits, axis=0)
    # 300 draws know a standard deviation to 4 %, and the law bends a little
    assert state.standard_errors(state.jacobian) == pytest.approx(spread, rel=0.15)


def test_a_design_aliased_on_purpose_is_singular_in_what_is_aliased() -> None:
    table = design(30, 3)
    table["c"] = 2.0 * table["b"]
    j, state = by_hand(table), assumed(table)
    assert state.rank == np.linalg.matrix_rank(j) == 5
    assert state.condition == np.inf
    assert set(state.unidentified) == {"coefficient.b", "coefficient.c", "exponent.b", "exponent.c"}
    found = audit(table, sweep="x", noise=NOISE, noise_from="test", form="E + a + b + c", size="a")
    by = {f.factor: f for f in found.factors}
    assert by["a"].verdict == "identified"
    assert by["a"].standard_error == pytest.approx(
        state.standard_errors(state.jacobian)[list(state.belief.surface.names).index("exponent.a")]
    )
    for name in "bc":
        assert by[name].verdict == "not identifiable"
        assert by[name].standard_error is None
        assert by[name].seeds is None
        assert "singular" in by[name].reasons[0]
    assert "ln c = ln b + constant" in found.relations


def test_as_many_seeds_as_advised_make_the_interval_no_wider_than_the_exponent() -> None:
    _, factors = audited("scale_factors")
    batch = factors["batch_size"]
    assert batch.seeds is not None
    assert batch.seeds > 1
    widths = {}
    plan = plan_of("scale_factors")[1]
    for seeds in (batch.seeds - 1, batch.seeds):
        rows = pd.concat([plan] * seeds, ignore_index=True)
        found = audit(rows, sweep="x", noise=NOISE, noise_from="test")
        again = next(f for f in found.factors if f.factor == "batch_size")
        assert again.standard_error is not None
        assert again.exponent is not None
        widths[seeds] = 2 * 1.96 * again.standard_error / again.exponent
    assert widths[batch.seeds] <= 1 < widths[batch.seeds - 1]


# --- the study's sweeps ---------------------------------------------------------------------------


def test_scales_that_grow_together_cannot_be_parted() -> None:
    found, factors = audited("compute")
    assert factors["n_total"].verdict == "identified"
    for name in ("batch_size", "items_per_user_mean"):
        assert factors[name].verdict == "not identifiable"
        assert factors[name].inflation is not None
        assert factors[name].inflation > 10
    assert any("items_per_user_mean is nearly 0.64 ln batch_size" in r for r in found.relations)
    assert "ln negatives = ln batch_size + constant" in found.relations


def test_crossed_panels_can_be_parted_but_not_what_batch_size_carries() -> None:
    found, factors = audited("scale_factors")
    assert found.rank == found.parameters == 7
    assert factors["n_total"].verdict == "identified"
    assert factors["batch_size"].verdict == "weak"
    assert factors["batch_size"].aliases == ("negatives", "epochs")
    assert factors["users_seen"].verdict == "not identifiable"  # 6.4M at batch 64, else all
    assert any("n_item = n_service" in r for r in found.relations)
    assert any("another seed" in m for m in found.missing)


def test_a_sweep_of_one_factor_says_so() -> None:
    found, factors = audited("data_fraction")
    assert found.form == "E + users_seen"
    assert factors["users_seen"].verdict == "identified"
    assert factors["users_seen"].aliases == ("epochs",)
    assert factors["users_seen"].values == 5  # whole batches differ by less than 2 %
    assert factors["n_total"].reasons == ("the same in every run",)
    assert any(m.startswith("shuffle differ") for m in found.missing)


def test_a_single_run_has_no_law() -> None:
    found, factors = audited("best")
    assert found.form is None
    assert found.rank == 0
    assert {f.verdict for f in factors.values()} == {"not identifiable"}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["condition"] is None


def test_repetition_is_a_factor_where_the_form_has_it() -> None:
    found, factors = audited(
        "data_fraction", form="E + repeated(users_seen, repeats)", assumption=Assumption(r_star=50)
    )
    assert found.parameters == 4
    assert factors["users_seen"].exponent == pytest.approx(0.3)
    assert found.rank == 4
    plain_error = audited("data_fraction")[1]["users_seen"].standard_error
    assert plain_error is not None
    assert factors["users_seen"].standard_error is not None
    assert factors["users_seen"].standard_error > plain_error  # one more parameter
    assert "repeats" not in factors  # it has no exponent of its own
    assert any(m.startswith("r_star = 50, the worth of repetition") for m in found.missing)
    assert not any("as good as a new one" in m for m in found.missing)


@pytest.mark.parametrize(
    ("name", "factor"), [("scale_factors", "batch_size"), ("compute", "items_per_user_mean")]
)
def test_the_runs_that_mend_do_mend(name: str, factor: str) -> None:
    grid, plan = plan_of(name)
    card = read_card(grid.corpus, Path("nowhere"))
    before = audit(plan, sweep=name, noise=NOISE, noise_from="test")
    found = next(
        f for f in with_mends(before, plan, grid, card, Assumption()).factors if f.factor == factor
    )
    assert found.mend is not None
    assert found.mend.verdict == "identified" != found.verdict
    base = {k: v for k, v in grid.base.items() if k not in ("batch_size", "items_per_user")}
    more = grid.model_copy(
        update={"base": base, "grid": {}, "zip": Zip(rows=tuple(map(dict, found.mend.runs)))}
    )
    rows = pd.DataFrame([r.row for r in more.runs(card)])
    assert rows["pf_days_exact"].sum() == pytest.approx(found.mend.pf_days)
    assert set(rows["n_users"]) == {card.n_users}  # nothing but the law's factors is varied
    every = pd.concat([plan, rows], ignore_index=True)
    belief = believe(before.form or "", plan, Assumption())
    again = judge(
        factor, every, Information.of(belief, every, NOISE, laws=1),
        log_columns(every, ["n_total", "batch_size", "items_per_user_mean"]),
    )  # fmt: skip
    assert again.verdict == "identified"
    assert again.standard_error == pytest.approx(found.mend.standard_error)


# --- parts ----------------------------------------------------------------------------------------


def test_relations_are_found_as_they_were_made() -> None:
    table = design(30, 3)
    table["epochs"] = 1e5 * table["a"] / table["b"]
    logs = log_columns(table, ["a", "b", "c", "epochs"])
    found = relation("epochs", logs, ["a", "b", "c"])
    assert found is not None
    assert found.exact
    assert found.coefficients == pytest.approx({"a": 1.0, "b": -1.0})
    assert str(found) == "ln epochs = ln a - ln b + constant"
    assert relation("a", logs, ["b", "c"]) is None


def test_noise_is_the_pooled_deviation_of_seeds() -> None:
    rng = np.random.default_rng(0)
    runs = pd.DataFrame({"model": ["x", "x", "x", "y", "y", "z"], "services": None})
    runs["loss"] = np.exp(rng.normal(size=6))
    found = noise_of(runs, ["model", "services"])
    assert found is not None
    log = np.log(runs["loss"].to_numpy())
    squares = 2 * np.var(log[:3], ddof=1) + np.var(log[3:5], ddof=1)
    assert found == (pytest.approx(np.sqrt(squares / 3)), 3)
    assert noise_of(runs.iloc[[0, 3]], ["model"]) is None


def test_a_fitted_law_can_be_assumed(tmp_path: Path) -> None:
    table = design(60, 2, seed=1)
    logs = np.log(table.to_numpy())
    centred = logs - logs.mean(axis=0)
    table["loss"] = 2.0 + np.exp(np.log([1.2, 0.6]) - [0.5, 0.2] * centred).sum(axis=1)
    fit = fit_law(table, "E + a + b", y="loss", n_boot=0)
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"deep": [{"fit": fit.to_dict()}]}))
    given, form = assumption_of(path, table)
    assert form == "E + a + b"
    assert given.floor_share == pytest.approx(2.0 / 3.8, rel=1e-5)
    assert given.shares == pytest.approx({"a": 2 / 3, "b": 1 / 3}, rel=1e-5)
    assert given.exponents == pytest.approx({"a": 0.5, "b": 0.2}, rel=1e-5)
    with pytest.raises(DesignError, match="no law of columns of the plan; its laws: E \\+ a \\+ b"):
        assumption_of(path, table[["a"]])


def test_draws_lie_around_the_assumption() -> None:
    table = design(30, 2)
    belief = believe("E + a + b", table, Assumption(exponents={"b": 0.6}))
    public = belief.surface.public(belief.draws(4_000, np.random.default_rng(0)))
    assert public["exponent.a"].median() == pytest.approx(0.3, rel=0.05)
    assert public["exponent.b"].median() == pytest.approx(0.6, rel=0.05)
    assert np.log(public["exponent.a"]).std() == pytest.approx(0.5, rel=0.05)
    assert public["irreducible"].median() == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Assumption(floor_share=1.0), "below 1"),
        (lambda: Assumption(exponents={"a": 0.0}), "positive"),
        (lambda: believe("E + z", design(9, 1), Assumption()), "no column z"),
        (lambda: believe("sigmoid(a)", design(9, 1), Assumption()), "nothing is assumed"),
    ],
)
def test_what_cannot_be_assumed_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(DesignError, match=message):
        wrong()


# --- the verb -------------------------------------------------------------------------------------


def test_the_verb_says_it_to_people_and_programs(tmp_path: Path) -> None:
    call = ["audit", str(SWEEPS / "data_fraction.toml"), "--root", str(tmp_path)]
    said = CliRunner().invoke(app, call)
    assert said.exit_code == 0, said.output
    assert "batch_size: not identifiable" in said.output
    assert "identified with" in said.output
    options = ["--json", "--exponent", "users_seen=0.2", "--noise", "0.02"]
    done = CliRunner().invoke(app, [*call, *options])
    found = json.loads(done.stdout)
    assert found["noise"] == 0.02
    by = {f["factor"]: f for f in found["factors"]}
    assert by["users_seen"]["exponent"] == 0.2
    unknown = CliRunner().invoke(app, [*call, "--exponent", "userseen=0.2"])
    assert unknown.exit_code == 2
    assert "--exponent userseen: the plan has no such column" in unknown.stderr
    wrong = CliRunner().invoke(app, [*call, "--law", str(tmp_path / "none.json")])
    assert wrong.exit_code == 2
    assert "none.json" in wrong.output
