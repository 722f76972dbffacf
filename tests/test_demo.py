"""The demo end to end, cut down: real stages, real processes, a small world."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from scaling import demo
from scaling.cli import app
from scaling.results import Tables
from scaling.rundir import RunDir

ROOT = Path(__file__).parent.parent

CORPUS = """
name = "small"
services = ["books", "clothing"]
downstream_services = ["coupons"]
[source]
kind = "synthetic"
users = 400
facets = 2
interests = 8
[users]
eligible_logs = 4
downstream = 0.3
validation = 16
pool = 32
[tokenizer]
vocab_size = 320
[tasks.coupons]
service = "coupons"
"""
SWEEP = """
name = "small"
figure = "none"
source = "tests"
corpus = "corpus.toml"
[transfer]
tasks = ["coupons"]
folds = 2
[base]
steps = 6
evaluations = 2
items_per_user = 4
[grid]
model = ["1x8", "1x16"]
batch_size = [8, 16]
"""


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.slow
def test_the_whole_way_and_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "corpus.toml").write_text(CORPUS)
    (tmp_path / "small.toml").write_text(SWEEP)
    root, results = tmp_path / "state", tmp_path / "state" / "results"

    def run() -> tuple[demo.Summary, str]:
        out = io.StringIO()
        summary = demo.run(
            root,
            sweep=tmp_path / "small.toml",
            profile=ROOT / "slurm" / "local.toml",
            console=Console(file=out, width=200),
        )
        return summary, out.getvalue()

    summary, said = run()
    assert summary.trained == 4
    runs = summary.tables.runs
    assert runs["state"].tolist() == ["DONE"] * 4
    assert runs["loss"].notna().all()
    assert runs["pf_days"].gt(0).all()
    assert set(summary.tables.transfer["system"]) >= {"clue/u-mlp", "popularity"}
    assert summary.tables.transfer.groupby("run_key").ngroups == 4
    assert summary.figures
    for figure in summary.figures:
        assert figure.stat().st_size > 1_000
        assert str(figure) in said
    for word in ("4 of 4 done, 4 of them now", "PF-days", "PF-day exponent", "transfer to coupons"):
        assert word in said

    before = state(root), state(results)
    again, said = run()
    assert again.trained == 0
    assert again.figures == summary.figures
    assert again.fits == summary.fits
    assert "4 of 4 done, 0 of them now" in said
    rewritten = {"sweep.toml", "plan.json", "collect.json"}
    for old, new in zip(before, (state(root), state(results)), strict=True):
        assert old.keys() == new.keys()
        for name in old:
            assert old[name][1] == new[name][1], name
            if Path(name).name not in rewritten and not name.endswith(".parquet"):
                assert old[name][0] == new[name][0], name
    for key in runs["run_key"]:
        assert len(RunDir(root, key).attempts()) == 1

    summary.figures[0].unlink()  # what is missing is made again, and is the same
    run()
    assert state(results).keys() == before[1].keys()
    assert (
        summary.figures[0].read_bytes() == before[1][f"small/figures/{summary.figures[0].name}"][1]
    )


def verdict(lower: float | None, upper: float | None, identified: bool = False) -> dict[str, Any]:
    reasons = "" if identified else "only 2 distinct values; moves with the other factors"
    return {
        **{"exponent": 0.1234567, "lower": lower, "upper": upper, "identified": identified},
        **{"reasons": reasons},
    }


def law(floor_identified: bool | None, first: dict[str, Any]) -> dict[str, Any]:
    names = ("n_total", "batch_size", "items_per_user", "users_seen")
    other = verdict(0.09, 1.75)
    fit = {
        "params": {"irreducible": 0.83},
        "floor_identified": floor_identified,
        "identified": {
            f"exponent.{name}": {"factor": name, **(first if name == "n_total" else other)}
            for name in names
        },
    }
    return {"fit": fit, "failed": None}


@pytest.mark.parametrize(
    ("identified", "said"),
    [
        (True, ["joint law", "with floor, 0.83 nats"]),
        (False, ["joint law", "without floor (none is identified)"]),
    ],
)
def test_the_table_reads_well_in_80_columns(identified: bool, said: list[str]) -> None:
    """One line a finding; the law with a floor only where there is one."""
    runs = pd.DataFrame(
        {
            **{"state": ["DONE"] * 17, "loss": np.linspace(6.2, 3.4, 17), "pool_size": 512},
            **{"chance": np.log(512), "pf_days": 1.234567e-9, "pf_days_exact": 2.345678e-9},
        }
    )
    rows = [("coupons", s, "a", "all", 0.234567) for s in ("clue/u-mlp", "popularity")]
    transfer = pd.DataFrame(rows, columns=["task", "system", "run_key", "segment", "hr_10"])
    headline = {"params": {"exponent": 0.1234567}, "ci95": {"exponent": [0.1, 0.2]}}
    against = [
        "headline: zero is in the 95 % interval [-0.01, 0.2]",
        "x pf_days_non_embedding: exponent 0.0716 disagrees [0.0516, 0.0961]",
        "y loss_pool_256: BOUND_HIT, on a bound: exponent; relative gradient 1.0e-02",
    ]
    fits = {
        "compute": {"headline": {"fit": headline}},
        "claims": {
            "claims": [
                {"name": "compute_exponent", "holds": False, "against": against},
                {"name": "memorisation", "holds": True, "statement": "it rises", "against": []},
            ]
        },
        "joint": {
            "with_floor": law(identified, verdict(0.1, 0.2, identified=True)),
            "without_floor": law(None, verdict(None, None)),
        },
        "transfer": {"coupons": {"system": "clue/u-mlp", "spearman": 0.92, "failed": None}},
    }
    summary = demo.Summary(Tables(runs, runs, transfer, runs, {}), fits, (), 17)
    out = io.StringIO()
    demo._print(Console(file=out, width=80), summary)
    lines = [line.strip() for line in out.getvalue().splitlines() if line.strip()]
    assert [re.split(r"  +", line) for line in lines] == [
        ["runs", "17 of 17 done, 17 of them now"],
        ["loss", "6.200 to 3.400 nats on 512 unseen users (chance 6.238)"],
        ["PF-days", "2.1e-08 by the paper's formula, 3.99e-08 counted"],
        ["PF-day exponent", "0.1235 (95 % interval 0.1000 to 0.2000)"],
        ["no conclusion", "headline: zero is in the 95 % interval"],
        ["no conclusion", "x pf_days_non_embedding: exponent 0.0716 disagrees"],
        ["no conclusion", "y loss_pool_256: BOUND_HIT"],
        ["survives", "it rises"],
        said,
        [
            "n_total",
            "0.1235 (95 % interval 0.1000 to 0.2000)" if identified
            else "not identified (no interval)",
        ],
        ["batch_size", "not identified (interval 0.09 to 1.75)"],
        ["items_per_user", "not identified (interval 0.09 to 1.75)"],
        ["users_seen", "not identified (interval 0.09 to 1.75)"],
        ["transfer to coupons", "HR@10 0.235 to 0.235, popularity 0.235"],
        ["losses", "rank correlation with pretraining 0.92"],
    ]  # fmt: skip


def test_outside_a_clone_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert re.search(r"sweeps/demo.toml.*root of a clone", result.output)
    assert list(tmp_path.iterdir()) == []
