"""A study of four factors with a known truth, from the plan to the next runs.

The losses of a planned sweep are drawn from a planted law; then every verb is asked what it should
know: `audit` before, `fit` and `allocate` after, `next` for what to run then.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner
from written_tables import write_tables

from scaling.analysis import Objective, fit_law
from scaling.cli import app
from scaling.data.prepare import read_card
from scaling.flops import mean_items
from scaling.sweeps import Grid

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLOOR = 1.0
TERMS = {
    "n_total": (50.0, 0.30),
    "batch_size": (5.0, 0.50),
    "items_per_user_mean": (3.0, 0.40),
    "users_seen": (60.0, 0.35),
}
"""Coefficient and exponent of every factor of the planted law."""
FORM = "E + " + " + ".join(TERMS)
NOISE = 0.003
HEAD = """
name = "{name}"
figure = "none"
source = "a planted law"
corpus = "{corpus}"
[base]
steps = 100_000
"""
CROSSED = """
[grid]
model = ["clue-4m", "clue-15m", "clue-60m", "clue-160m"]
batch_size = [32, 256, 2048]
items_per_user = [4, 64, 512]
data_fraction = [0.004, 0.04, 0.4]
"""
ALIASED = """
[grid]
model = ["clue-4m", "clue-15m", "clue-60m", "clue-160m"]
[[zip.rows]]
batch_size = 64
items_per_user = 16
[[zip.rows]]
batch_size = 256
items_per_user = 16
[[zip.rows]]
batch_size = 1024
items_per_user = 16
"""


def planted(rows: pd.DataFrame) -> np.ndarray:
    return FLOOR + sum(a * rows[name].to_numpy(float) ** -p for name, (a, p) in TERMS.items())


def outcomes(sweep: Path, seed: int) -> pd.DataFrame:
    """Rows of a plan with a loss each."""
    grid = Grid.read(sweep)
    rows = pd.DataFrame([r.row for r in grid.runs(read_card(grid.corpus, sweep.parent))])
    noise = np.random.default_rng(seed).normal(0, NOISE, len(rows))
    rows["loss"] = planted(rows) * np.exp(noise)
    rows["run_key"] = [f"{sweep.stem}-{i}" for i in range(len(rows))]
    rows["status"], rows["pool_digest"], rows["corpus_digest"] = "done", "p", "c"
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``crossed.toml`` with the results of its 108 runs, and ``aliased.toml`` without any."""
    folder = tmp_path_factory.mktemp("end_to_end")
    shutil.copy(ROOT / "sweeps" / "models.toml", folder)
    corpus = ROOT / "sweeps" / "corpora" / "paper.toml"
    for name, body in (("crossed", CROSSED), ("aliased", ALIASED)):
        (folder / f"{name}.toml").write_text(HEAD.format(name=name, corpus=corpus) + body)
    write_tables(outcomes(folder / "crossed.toml", 0), folder / "results" / "crossed")
    return folder


def ask(folder: Path, verb: str, *words: object) -> dict[str, Any]:
    where = ["--results", folder / "results", "--root", folder / "work"]
    if verb == "fit":
        where = where[:2]
    result = CliRunner().invoke(app, [str(w) for w in (verb, *words, *where, "--json")])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def law(folder: Path):
    return fit_law(outcomes(folder / "crossed.toml", 0), FORM, y="loss", n_boot=300)


def test_what_a_design_cannot_tell_is_said_before_it_is_run(folder: Path) -> None:
    found = ask(folder, "audit", folder / "aliased.toml")
    verdicts = {f["factor"]: f["verdict"] for f in found["factors"]}
    assert verdicts["items_per_user_mean"] == "not identifiable"
    # without a data fraction users are met again as batches grow: two values, and no law of them
    assert verdicts["users_seen"] == "not identifiable"
    batch = next(f for f in found["factors"] if f["factor"] == "batch_size")
    assert set(batch["aliases"]) >= {"negatives", "epochs"}
    assert "ln epochs = ln batch_size + constant" in found["relations"]
    assert all(f["mend"] for f in found["factors"] if f["verdict"] == "not identifiable")


def test_the_error_bars_come_out_as_the_audit_said(folder: Path, law) -> None:
    exponents = [f"--exponent={name}={p}" for name, (_, p) in TERMS.items()]
    found = ask(
        folder, "audit", folder / "crossed.toml", *exponents, "--noise", NOISE, "--form", FORM
    )
    verdicts = {f["factor"]: f for f in found["factors"]}
    errors = law.standard_errors()
    for name in TERMS:
        assert verdicts[name]["verdict"] == "identified"
        expected = verdicts[name]["standard_error"]
        # the audit knows the exponents, not the terms' shares: right to a factor of three
        assert expected / 3 < errors[f"exponent.{name}"] < expected * 3


def test_exponents_are_recovered_and_called_identified(folder: Path, law) -> None:
    table = law.identified()
    for name, (_, exponent) in TERMS.items():
        assert table.loc[name, "identified"], table.loc[name, "reasons"]
        assert table.loc[name, "lower"] < exponent < table.loc[name, "upper"]
    low, high = law.ci().loc["irreducible", ["lower", "upper"]]
    assert low < FLOOR < high
    assert law.floor().identified


def test_the_best_use_of_a_budget_is_inside_its_interval(folder: Path) -> None:
    found = ask(
        folder, "allocate", folder / "crossed.toml", "--budget", 0.05, "--counting", "paper",
        "--n-boot", 200, "--form", FORM,
    )  # fmt: skip
    card = read_card(Grid.read(folder / "crossed.toml").corpus, folder)
    n = np.geomspace(4.06e6, 1.622e8, 201)[:, None]
    s = np.arange(2, 512)[None]
    mean = np.array([[mean_items(card, int(cap)) for cap in s[0]]])
    b = np.clip(0.05 * 8.64e19 / (6 * n * 1e5 * s), 0, 10_240)
    users = np.minimum(card.n_users, 1e5 * b)
    with np.errstate(divide="ignore"):
        loss = FLOOR + 50 * n**-0.3 + 5 * b**-0.5 + 3 * mean**-0.4 + 60 * users**-0.35
    i, j = np.unravel_index(np.where(b < 6.4, np.inf, loss).argmin(), loss.shape)
    best = {"n_total": n[i, 0], "batch_size": b[i, j], "items_per_user": float(s[0, j])}
    for name, value in best.items():
        row = found["quantities"][name]
        assert row["lower"] < value < row["upper"], (name, value, row)
        assert row["region_low"] < value < row["region_high"]
    assert found["quantities"]["loss"]["optimum"] == pytest.approx(loss[i, j], rel=5e-3)


def test_the_next_runs_narrow_what_they_were_chosen_for(folder: Path) -> None:
    exponents = [f"--exponent={name}={p}" for name, (_, p) in TERMS.items()]
    first = ask(
        folder, "next", folder / "crossed.toml", "--budget", 0.02, *exponents, "--noise", NOISE,
        "--form", FORM, "--out", folder / "first.toml",
    )  # fmt: skip
    more = ask(
        folder, "next", folder / "crossed.toml", "--budget", 0.2, *exponents, "--noise", NOISE,
        "--form", FORM, "--out", folder / "more.toml",
    )  # fmt: skip
    assert first["spent"] <= 0.02
    assert more["spent"] <= 0.2
    small, large = (outcomes(folder / f"{name}.toml", 5) for name in ("first", "more"))
    assert len(small) == len(first["runs"])
    # a law fitted to the proposed runs alone has the truth in its intervals
    fit = fit_law(large, FORM, y="loss", n_boot=200)
    interval = fit.ci()
    for name, (_, exponent) in TERMS.items():
        low, high = interval.loc[f"exponent.{name}", ["lower", "upper"]]
        assert low < exponent < high
    # with what was there they narrow every exponent
    there = outcomes(folder / "crossed.toml", 0)
    before, after = (
        fit_law(rows, FORM, y="loss", objective=Objective("mse"), n_boot=0).standard_errors()
        for rows in (there, pd.concat([there, large]))
    )
    names = [f"exponent.{name}" for name in TERMS]
    assert (after[names] < before[names]).all()
