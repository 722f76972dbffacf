"""The verb `allocate` on a study with a planted law: what it prints, and when it refuses."""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result
from written_tables import write_tables

from scaling.cli import app
from scaling.data.prepare import read_card
from scaling.flops import mean_items
from scaling.sweeps import Grid

ROOT = Path(__file__).parents[2]
E, TERMS = (
    1.0,
    {"n_total": (50.0, 0.3), "batch_size": (5.0, 0.5), "items_per_user_mean": (3.0, 0.4)},
)
SWEEP = """
name = "planted"
figure = "none"
source = "a planted law"
corpus = "{corpus}"
[base]
steps = 100_000
[grid]
model = ["clue-4m", "clue-15m", "clue-60m", "clue-160m"]
batch_size = [64, 256, 1024]
items_per_user = [16, 64, 256]
"""


def planted_loss(rows: pd.DataFrame) -> np.ndarray:
    return E + sum(a * rows[name].to_numpy(float) ** -p for name, (a, p) in TERMS.items())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``planted.toml`` and the results of its 36 runs, 0.2 % noise."""
    folder = tmp_path_factory.mktemp("allocate")
    shutil.copy(ROOT / "sweeps" / "models.toml", folder)
    sweep = folder / "planted.toml"
    sweep.write_text(SWEEP.format(corpus=ROOT / "sweeps" / "corpora" / "paper.toml"))
    write_results(sweep, folder / "results" / "planted", noise=0.002)
    return folder


def write_results(sweep: Path, folder: Path, noise: float) -> None:
    grid = Grid.read(sweep)
    rows = pd.DataFrame([r.row for r in grid.runs(read_card(grid.corpus, folder))])
    rng = np.random.default_rng(0)
    rows["loss"] = planted_loss(rows) * np.exp(rng.normal(0, noise, len(rows)))
    rows["run_key"] = [f"run{i}" for i in range(len(rows))]
    rows["status"], rows["pool_digest"], rows["corpus_digest"] = "done", "p", "c"
    rows.loc[len(rows) - 1, ["status", "loss"]] = ["diverged", np.nan]
    write_tables(rows, folder)


def call(study: Path, *words: object) -> Result:
    options = ["--results", study / "results", "--root", study / "work"]
    return CliRunner().invoke(
        app, [str(w) for w in ("allocate", study / "planted.toml", *options, *words)]
    )


def test_the_optimum_of_the_planted_law_is_in_the_interval(study: Path) -> None:
    result = call(study, "--budget", 0.05, "--counting", "paper", "--n-boot", 100, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["rows"] == {"table": 36, "used": 35, "dropped": {"not done": 1}}
    # an independent search over the same limits: a grid of real sizes, batches and caps
    grid = Grid.read(study / "planted.toml")
    card = read_card(grid.corpus, study)
    n = np.geomspace(4.06e6, 1.622e8, 301)[:, None]
    s = np.arange(2, 512)[None]
    means = np.array([[mean_items(card, int(cap)) for cap in s[0]]])
    b = np.clip(0.05 * 8.64e19 / (6 * n * 1e5 * s), 0, 10_240)
    loss = E + 50 * n**-0.3 + 5 * b**-0.5 + 3 * means**-0.4 + np.where(b < 6.4, np.inf, 0)
    i, j = np.unravel_index(loss.argmin(), loss.shape)
    best = {"n_total": n[i, 0], "batch_size": b[i, j], "items_per_user": float(s[0, j])}
    for name, value in best.items():
        row = found["quantities"][name]
        assert row["lower"] < value < row["upper"]
        assert row["region_low"] < value < row["region_high"]
    assert found["quantities"]["loss"]["optimum"] == pytest.approx(loss.min(), rel=5e-3)
    first = found["snapped"]["configurations"][0]
    assert first["pf_days"] <= 0.05
    assert first["batch_size"] % 32 == 0
    assert first["items_per_user"] % 16 == 0


def test_what_people_read(study: Path) -> None:
    result = call(study, "--budget", 0.05, "--n-boot", 60)
    assert result.exit_code == 0, result.stderr
    for words in ("35 of 36 runs fitted; dropped: 1 not done", "batch_size", "share_within"):
        assert words in result.stdout
    assert "at 100,000 steps" in result.stdout


def test_a_far_budget_is_warned_of(study: Path) -> None:
    result = call(study, "--budget", 300, "--n-boot", 40, "--json")
    assert result.exit_code == 0, result.stderr
    said = " ".join(json.loads(result.stdout)["warnings"])
    assert "above the most that a fitted run took" in said
    assert "n_total is at its upper limit" in said


def test_a_law_that_is_not_identified_gives_no_allocation(study: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    shutil.copytree(study, noisy)
    shutil.rmtree(noisy / "results")
    write_results(noisy / "planted.toml", noisy / "results" / "planted", noise=0.5)
    result = call(noisy, "--budget", 0.05, "--n-boot", 40)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "is not identified by 35 runs" in result.stderr


def test_a_law_blind_to_what_the_runs_vary_is_refused(study: Path) -> None:
    result = call(study, "--budget", 0.05, "--form", "E + n_total + batch_size", "--n-boot", 40)
    assert result.exit_code == 2
    assert "exponent" in result.stderr or "the runs vary items_per_user" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", 0], "budget = 0; valid: positive and finite"),
        (["--budget", 1, "--counting", "six"], "--counting six: valid: exact, paper"),
        (["--budget", 1e-9], "costs as little as the budget"),
        (["--budget", 0.05, "--form", "E + nothing"], "the table has no column 'nothing'"),
    ],
)
def test_what_cannot_be_answered_is_refused(study: Path, words: list[object], said: str) -> None:
    result = call(study, *words, "--n-boot", 40)
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_region_is_drawn(study: Path, tmp_path: Path) -> None:
    words = ("--budget", 0.05, "--counting", "paper", "--n-boot", 20)
    drawn, open_before = tmp_path / "region.svg", plt.get_fignums()
    result = call(study, *words, "--figure", drawn)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(drawn)
    text = drawn.read_text()
    for label in ("parameters", "batch size [users]", "items per user", "optimum"):
        assert label in text
    assert call(study, *words, "--figure", tmp_path / "again.svg").exit_code == 0
    assert (tmp_path / "again.svg").read_bytes() == drawn.read_bytes()
    assert plt.get_fignums() == open_before


def test_what_cannot_be_drawn_is_printed_all_the_same(study: Path, tmp_path: Path) -> None:
    lost = tmp_path / "region.svg" / "file.svg"
    (tmp_path / "region.svg").touch()
    result = call(study, "--budget", 0.05, "--n-boot", 20, "--figure", lost, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["quantities"]["batch_size"]["optimum"] > 1
    assert "region.svg" in result.stderr


def test_a_figure_of_an_unknown_kind_is_refused_before_anything_is_fitted(study: Path) -> None:
    priced = call(study, "--budget", 0.05, "--user-price", 1e-9, "--figure", study / "region.png")
    assert "no map is drawn where users have a price" in priced.stderr
    result = call(study, "--budget", 0.05, "--figure", study / "region.bmp")
    assert result.exit_code == 2
    assert "region.bmp: a file that ends in .png, .svg, .pdf" in result.stderr
    assert not (study / "region.bmp").exists()
