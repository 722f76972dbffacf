"""The demo end to end, cut down: real stages, real processes, a small world."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from scaling import demo
from scaling.cli import app
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


def test_outside_a_clone_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert re.search(r"sweeps/demo.toml.*root of a clone", result.output)
    assert list(tmp_path.iterdir()) == []
