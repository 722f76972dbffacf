"""The verbs as people call them: help, errors, exit statuses, and the way from logs to figures."""

import csv
import errno
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import scaling
from scaling.cli import app
from scaling.cli.app import VERBS
from scaling.cli.terminal import cell, print_table, progress
from scaling.data.prepare import read_card
from scaling.data.recipe import read_corpus_file
from scaling.data.sources.synthetic import pool_floor
from scaling.rundir import RunDir
from scaling.sweeps import PLAN_COLUMNS, Grid

ROOT = Path(__file__).parent.parent
LOOKS = ["corpus info", "corpus compare", "corpus verify", "corpus floor"]
COMMANDS = [v for v in VERBS if v != "corpus"] + LOOKS
SWEEP = """
name = "study"
figure = "none"
source = "a test"
corpus = "tiny.toml"
[base]
model = "1x8"
batch_size = 8
steps = 20
evaluations = 2
[grid]
items_per_user = [2, 3, 4]
"""


@pytest.fixture(autouse=True)
def _no_root_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLUE_ROOT", raising=False)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def refused(*words: object) -> str:
    """What a call says that is refused: status 2, nothing on stdout, one paragraph on stderr."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "\n\n" not in result.stderr
    return result.stderr


@pytest.fixture
def study(tiny_corpus: Callable[..., Path]) -> Path:
    """Root folder with a prepared corpus, a sweep of three runs and a local cluster profile."""
    root = tiny_corpus(users=64)
    (root / "study.toml").write_text(SWEEP)
    (root / "local.toml").write_text('name = "here"\nexecutor = "local"\nmax_parallel = 1\n')
    return root


def tree(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- help and start -----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = call(*verb.split(), "--help")
    assert result.exit_code == 0
    example = result.output[result.output.index("Example:") :].splitlines()[1]
    words = shlex.split(example)
    assert words[: 1 + len(verb.split())] == ["clue-scaling", *verb.split()]


def test_help_says_what_an_argument_may_be() -> None:
    def said(verb: str) -> str:
        return " ".join(call(verb, "--help").output.split())

    assert "first letters, or a sweep file" in said("transfer")
    assert "must be prepared first" in said("plan")


def test_the_verbs_are_listed_in_the_order_of_the_work() -> None:
    result = call("--help")
    lines = result.output.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == list(VERBS)
    assert not any(line.endswith("...") for line in lines)


def test_without_a_verb_there_is_help() -> None:
    result = call()
    assert "Commands:" in result.output


def test_the_version_is_told() -> None:
    assert call("--version").stdout == f"clue-scaling {scaling.__version__}\n"


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], "torch deepspeed ibis duckdb pandas pyarrow scipy numpy pydantic matplotlib"),
        (["plan", "sweeps/best.toml"], "torch deepspeed matplotlib submitit"),
        (["status", "none.toml"], "torch deepspeed ibis duckdb pandas scipy matplotlib"),
        (["figures", "none.toml"], "torch deepspeed ibis duckdb"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_a_verb_does_not_need_is_not_loaded(words: list[str], absent: str) -> None:
    code = f"""
import sys
sys.argv = ["clue-scaling", *{words!r}]
from scaling.cli import main
try:
    main()
except SystemExit:
    pass
print("LOADED", *[m for m in {absent.split()!r} if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_the_installed_command_is_this_one() -> None:
    script = Path(sys.executable).parent / "clue-scaling"
    for command in ([script], [sys.executable, "-m", "scaling.cli"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == f"clue-scaling {scaling.__version__}\n"


# ---- errors -------------------------------------------------------------------------------------


def test_a_missing_file_is_named() -> None:
    for verb in ("plan", "status", "cancel", "collect", "figures", "fit"):
        assert "no/such.toml: no such file" in refused(verb, "no/such.toml")
    assert "no/such.toml" in refused("prepare", "no/such.toml")
    assert "no/such.toml: no such file" in refused("doctor", "no/such.toml")


def test_an_unknown_key_is_named_with_the_valid_ones(study: Path) -> None:
    (study / "study.toml").write_text(SWEEP.replace("batch_size", "batchsize"))
    said = refused("plan", study / "study.toml", "--root", study)
    assert "study.toml: base: unknown key 'batchsize'; valid keys: model" in said


def test_an_unprepared_corpus_says_how_to_prepare_it(study: Path, tmp_path: Path) -> None:
    said = refused("plan", study / "study.toml", "--root", tmp_path / "empty")
    root = tmp_path / "empty"
    assert f"clue-scaling prepare {study / 'tiny.toml'} --root {root}\n" in said
    assert not (tmp_path / "empty").exists()


def test_a_nominal_corpus_is_planned_and_not_submitted(study: Path) -> None:
    sweep = ROOT / "sweeps" / "best.toml"
    result = call("plan", sweep)
    assert result.exit_code == 0
    assert "1 runs on corpus paper, nominal" in result.output
    assert "paper's formula: 0.4411 PF-days" in result.output
    for verb in ("status", "cancel", "collect"):
        assert "corpus is nominal" in refused(verb, sweep, "--root", study)
    cluster = ["--cluster", study / "local.toml", "--root", study]
    assert "corpus is nominal" in refused("submit", sweep, *cluster)


def test_what_was_never_submitted_says_so(study: Path) -> None:
    said = refused("cancel", study / "study.toml", "--root", study)
    assert "none of its 3 runs was submitted" in said
    assert "clue-scaling submit" in said
    assert "no run has a key" in refused("logs", "abcd", "--root", study)


def test_training_by_hand_makes_one_folder_and_submits_nothing(study: Path) -> None:
    sweep = ["--sweep", study / "study.toml", "--root", study]
    before = tree(study)
    assert "no run has a key starting with 'aaaaaaa'" in refused("train", "aaaaaaa", *sweep)
    assert "does not begin a run key" in refused("train", "x/", *sweep)
    assert tree(study) == before
    rows = json.loads(call("plan", study / "study.toml", "--root", study, "--json").stdout)
    key = rows[1]["run_key"]
    assert call("train", key[:8], *sweep).exit_code == 0
    assert [p.name for p in (study / "runs").glob("*/*")] == [key]
    said = refused("logs", key, "--root", study)
    assert f"run {key} was never submitted" in said
    cluster = ["--cluster", study / "local.toml"]
    for words in (["cancel"], ["sync", *cluster]):
        said = refused(words[0], study / "study.toml", "--root", study, *words[1:])
        assert "none of its 3 runs was submitted" in said
    states = json.loads(call("status", study / "study.toml", "--root", study, "--json").stdout)
    assert [row["state"] for row in states] == ["PLANNED", "DONE", "PLANNED"]


def test_figures_before_collect_and_fit_say_what_is_missing(study: Path) -> None:
    where = ["--results", study / "results"]
    assert "clue-scaling collect" in refused("figures", study / "study.toml", *where)
    assert call("collect", study / "study.toml", "--root", study, *where).exit_code == 0
    for verb in ("fit", "figures"):
        assert "none of its 3 runs is done yet" in refused(verb, study / "study.toml", *where)
    path = study / "results" / "study" / "runs.parquet"
    runs = pq.read_table(path)
    column = runs.schema.get_field_index("loss")
    pq.write_table(runs.set_column(column, runs.field(column), pa.array([1.0, 2.0, 3.0])), path)
    losses = pa.array([1.0, None, None])
    pq.write_table(runs.set_column(column, runs.field(column), losses), path)
    fitted = call("fit", study / "study.toml", *where, "--n-boot", 10)
    told = [line.split(": ")[1].split("/") for line in fitted.stderr.splitlines()]
    assert all(line.startswith("fit: ") for line in fitted.stderr.splitlines())
    total = int(told[-1][1].split()[0])
    assert [int(done) for done, _ in told] == list(range(total + 1))
    assert {"claims", "joint", "transfer laws"} <= {rest.partition(" ")[2] for _, rest in told}
    said = fitted.stdout
    assert said.count("no law could be fitted: ") == 1
    assert len(said.splitlines()) == 4
    (study / "results" / "study" / "fits.json").unlink()
    said = refused("figures", study / "study.toml", *where)
    assert f"clue-scaling fit {study / 'study.toml'} --results {study / 'results'}" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "writing: No space left on device"),
    ],
)
def test_a_full_disk_needs_no_traceback(
    monkeypatch: pytest.MonkeyPatch, study: Path, error: OSError, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("scaling.collect.collect", fail)
    assert refused("collect", study / "study.toml", "--root", study) == f"error: {said}\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, study: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("scaling.collect.collect", fail)
    result = call("collect", study / "study.toml", "--root", study)
    assert isinstance(result.exception, KeyError)


def test_a_file_where_a_folder_should_be_needs_no_traceback(study: Path) -> None:
    sweep = study / "study.toml"
    for words in (["plan", sweep, "--root"], ["status", sweep, "--root"],
                  ["doctor", study / "local.toml", "--root"],
                  ["collect", sweep, "--root", study, "--results"]):  # fmt: skip
        result = call(*words, sweep)
        assert result.exit_code == 2
        assert f"'{sweep}' is a file" in result.stderr.replace("\n", "")
    (study / "results").mkdir()
    (study / "results" / "study").write_text("")
    words = ["collect", sweep, "--root", study, "--results"]
    assert "File exists" in refused(*words, study / "results")
    assert "Not a directory" in refused(*words, study / "results" / "study" / "deeper")


@pytest.mark.parametrize("module", ["scaling.cli.corpora", "typer"])
def test_ctrl_c_while_python_starts_is_status_130_too(tmp_path: Path, module: str) -> None:
    code = f"""
import sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
from scaling.cli import main
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_number_beyond_any_float_is_refused(study: Path) -> None:
    (study / "study.toml").write_text(SWEEP.replace("steps = 20", f"steps = {10**22}"))
    said = refused("plan", study / "study.toml", "--root", study)
    assert f"steps = {10**22}: Input should be less than or equal to {2**53}" in said


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, study: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scaling.collect.collect", interrupted)
    result = call("collect", study / "study.toml", "--root", study)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


# ---- before anything ran ------------------------------------------------------------------------


def test_plan_prints_a_plain_list_of_rows(study: Path) -> None:
    before = tree(study)
    result = call("plan", study / "study.toml", "--root", study, "--json")
    rows = json.loads(result.stdout)
    assert [tuple(row) for row in rows] == [tuple(PLAN_COLUMNS)] * 3
    assert [row["items_per_user"] for row in rows] == [2, 3, 4]
    assert tree(study) == before


def test_plan_shows_rows_and_sums(study: Path) -> None:
    rows = json.loads(call("plan", study / "study.toml", "--root", study, "--json").stdout)
    said = call("plan", study / "study.toml", "--root", study).stdout
    header, *lines = said.splitlines()
    assert {"items_per_user", "items_per_user_mean", "epochs", "users_seen"} <= set(header.split())
    assert [line.split()[0] for line in lines[:3]] == [row["run_key"] for row in rows]
    for column in ("flops", "flops_exact", "pf_days", "pf_days_exact"):
        assert f"{sum(row[column] for row in rows):.4g}" in said


def test_the_root_comes_from_the_option_then_the_environment(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLUE_ROOT", str(study))
    assert call("plan", study / "study.toml").exit_code == 0
    refused("plan", study / "study.toml", "--root", tmp_path / "other")


def test_a_corpus_is_looked_into(study: Path) -> None:
    [corpus] = json.loads(call("corpus", "info", "tiny", "--root", study, "--json").stdout)
    assert corpus["name"] == "tiny"
    assert corpus["digest"] in call("corpus", "info", corpus["digest"], "--root", study).stdout
    assert "whole" in call("corpus", "verify", "tiny", "--root", study).stdout
    tokens = Path(corpus["path"]) / "items" / "tokens.npy"
    data = bytearray(tokens.read_bytes())
    data[-1] ^= 1
    tokens.write_bytes(data)
    assert "tokens.npy" in refused("corpus", "verify", "tiny", "--root", study)
    assert "no corpus 'huge'; prepared: tiny-" in refused("corpus", "info", "huge", "--root", study)


def test_the_floor_of_a_synthetic_corpus_is_told() -> None:
    path = ROOT / "sweeps" / "corpora" / "demo.toml"
    words = ["corpus", "floor", path, "--items-per-user", 4, "--pool-size", 64]
    world = read_corpus_file(path).source
    expected = pool_floor(world, items_per_user=4, pool_size=64)
    assert json.loads(call(*words, "--json").stdout) == {
        **{"corpus": "demo", "items_per_user": 4, "pool_size": 64, "loss": expected.loss},
        **{"standard_error": expected.standard_error, "n_pools": expected.n_pools},
    }
    assert call(*words).stdout.startswith(f"{expected.loss:.4f} nats, standard error ")


@pytest.mark.parametrize(
    ("name", "kind"), [("food_kitchen", "amazon_sequences"), ("paper", "none")]
)
def test_other_corpora_have_no_known_floor(name: str, kind: str) -> None:
    path = ROOT / "sweeps" / "corpora" / f"{name}.toml"
    said = refused("corpus", "floor", path, "--items-per-user", 4)
    assert f"{name}.toml: source.kind = '{kind}'; the floor is known for 'synthetic' only" in said


def test_an_unknown_history_is_refused_before_any_work(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads(call("plan", study / "study.toml", "--root", study, "--json").stdout)
    [run, *_] = Grid.read(study / "study.toml").runs(read_card(study / "tiny.toml", study))
    assert run.config is not None
    RunDir.create(study, run.config, "tiny")
    before = tree(study)
    words = ["transfer", rows[0]["run_key"], "--root", study, "--history"]
    typo, right = call(*words, "al"), call(*words, "all")
    assert (typo.exit_code, right.exit_code) == (2, 2)
    assert "transfer: history = 'al': Input should be 'target' or 'all'" in typo.stderr
    assert "nothing is exported yet" in right.stderr  # what it looks for next
    assert tree(study) == before


def test_preparing_again_prints_the_same_folder(study: Path) -> None:
    call("prepare", study / "tiny.toml", "--root", study)
    before = tree(study / "corpora")
    result = call("prepare", study / "tiny.toml", "--root", study)
    assert Path(result.stdout.strip()).is_dir()
    assert tree(study / "corpora") == before


def test_a_dry_run_leaves_no_trace(study: Path) -> None:
    before = tree(study)
    cluster = ["--cluster", study / "local.toml", "--root", study]
    result = call("submit", study / "study.toml", *cluster, "--dry-run")
    assert "would submit 3 of 3 runs" in result.stdout
    assert tree(study) == before


def test_a_run_that_does_not_fit_the_profile_stops_before_the_first(study: Path) -> None:
    with (study / "local.toml").open("a") as f:
        f.write("[shape]\ntasks_per_node = 3\n")
    before = tree(study)
    cluster = ["--cluster", study / "local.toml", "--root", study]
    assert "batch_size = 8" in refused("submit", study / "study.toml", *cluster)
    assert tree(study) == before


def test_what_nobody_submitted_is_planned(study: Path) -> None:
    rows = json.loads(call("status", study / "study.toml", "--root", study, "--json").stdout)
    assert [row["state"] for row in rows] == ["PLANNED"] * 3
    assert "3 runs: 3 PLANNED" in call("status", study / "study.toml", "--root", study).stdout


def test_a_torn_specification_damages_one_run(study: Path) -> None:
    words = (study / "study.toml", "--root", study)
    rows = json.loads(call("plan", *words, "--json").stdout)
    grid = Grid.read(study / "study.toml")
    for planned in grid.runs(read_card(grid.corpus, study)):
        assert planned.config is not None
        RunDir.create(study, planned.config, "tiny")
    torn = RunDir(study, rows[1]["run_key"]).path / "spec.json"
    torn.write_bytes(torn.read_bytes()[:100])
    result = call("status", *words, "--json")
    assert result.exit_code == 0, result.output
    states = json.loads(result.stdout)
    assert [(r["state"], r["cause"]) for r in states] == [
        ("PLANNED", None), ("FAILED", "damaged"), ("PLANNED", None)
    ]  # fmt: skip
    assert str(torn) in states[1]["evidence"]
    assert [r["steps"] for r in states] == [20] * 3
    assert "2 PLANNED, 1 FAILED" in call("status", *words).stdout


def test_status_rows_have_the_documented_columns(study: Path) -> None:
    grid = Grid.read(study / "study.toml")
    [first, *_] = grid.runs(read_card(grid.corpus, study))
    assert first.config is not None
    RunDir.create(study, first.config, "tiny")
    rows = json.loads(call("status", study / "study.toml", "--root", study, "--json").stdout)
    section = (ROOT / "docs" / "formats.md").read_text().split("### Status rows")[1].split("\n#")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {name.strip().strip("`") for one in cells for name in one.split(",")}
    for row in rows:
        assert set(row) == documented


def test_a_dry_run_says_that_the_scheduler_does_not_answer(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    (study / "slurm.toml").write_text('name = "there"\nexecutor = "slurm"\n')
    words = ["--cluster", study / "slurm.toml", "--root", study, "--dry-run"]
    said = refused("submit", study / "study.toml", *words)
    assert "nothing submitted: scontrol: not found on this machine" in said


def test_collect_counts_what_is_not_there(study: Path) -> None:
    where = ["--root", study, "--results", study / "results"]
    result = call("collect", study / "study.toml", *where)
    assert "3 runs (3 PLANNED), 0 with a loss" in result.stdout
    assert "incomplete: 3" in result.stdout


def test_a_law_is_fitted_to_any_table(tmp_path: Path) -> None:
    with open(tmp_path / "points.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["c", "l"])
        out.writerows([[x, 2 * x**-0.25] for x in (1e-3, 1e-2, 1e-1, 1, 10, 100)])
    words = ["fit", tmp_path / "points.csv", "--x", "c", "--y", "l", "--n-boot", 50]
    law = json.loads(call(*words, "--json").stdout)
    assert law["params"]["exponent"] == pytest.approx(0.25, abs=1e-6)
    assert "exponent" in call(*words).stdout
    assert "nothing" in refused("fit", tmp_path / "points.csv", "--x", "nothing")
    assert "none.csv: no such file" in refused("fit", tmp_path / "none.csv")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    assert "torn.parquet: not a readable table" in refused("fit", tmp_path / "torn.parquet")


def write_points(path: Path, rows: list[tuple[object, object]]) -> Path:
    path.write_text("\n".join(f"{x},{y}" for x, y in [("pf_days", "loss"), *rows]) + "\n")
    return path


def test_a_law_that_did_not_converge_is_no_fit_to_rely_on(tmp_path: Path) -> None:
    rising = write_points(tmp_path / "rise.csv", [(x, x) for x in range(1, 9)])
    said = call("fit", rising, "--n-boot", 20).stdout
    assert "not a fit to rely on: BOUND_HIT, on a bound: exponent" in said
    assert "lower" not in said
    assert json.loads(call("fit", rising, "--n-boot", 20, "--json").stdout)["status"] == "BOUND_HIT"


def test_a_fit_says_which_rows_it_used(tmp_path: Path) -> None:
    law = [(x, 2 * x**-0.25) for x in (1e-3, 1e-2, 1e-1, 1, 10)]
    table = write_points(tmp_path / "c.csv", [*law, ("", 1), (-1, 1), ("inf", 1), (1, 0), (2, "")])
    said = call("fit", table, "--n-boot", 20).stdout.splitlines()
    assert said[0] == (
        "5 rows fitted; dropped: 1 where pf_days is null, 2 where pf_days is not positive and "
        "finite, 1 where loss is null, 1 where loss is not positive and finite"
    )
    assert said[1].startswith("CONVERGED, ")
    assert "lower, upper: 95 %, 20 bootstrap draws of clusters, 5 independent units (row)" in said


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(1, 2), (2, "abc"), (3, 1)], "'loss' holds 1 values that are no numbers, the first in "
         "row 2: 'abc'"),
        ([("2024-01-01", 2)], "'pf_days' holds 1 values that are no numbers, the first in row 1: "
         "'2024-01-01'"),
        ([("True", 2), ("False", 1)], "'pf_days' holds bool, not numbers"),
        ([], "no row is left"),
    ],
)  # fmt: skip
def test_a_table_without_numbers_is_refused(
    tmp_path: Path, rows: list[tuple[object, object]], said: str
) -> None:
    table = write_points(tmp_path / "t.csv", rows)
    assert f"{table}: " in refused("fit", table)
    assert said in refused("fit", table)


def test_what_is_no_table_is_not_fitted(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no table")
    said = refused("fit", tmp_path / "README.md")
    assert "README.md: neither a sweep file (.toml) nor a folder of tables" in said
    assert "none.txt: no such file or folder" in refused("fit", tmp_path / "none.txt")
    for option in ("--n-boot", "--seed"):
        assert call("fit", tmp_path / "c.csv", option, -1).exit_code == 2


def test_doctor_has_a_word_on_every_question(study: Path) -> None:
    words = ["doctor", study / "local.toml", "--root", study]
    findings = json.loads(call(*words, "--json").stdout)
    assert {"check", "level", "found", "advice"} == set(findings[0])
    assert "root folder" in call(*words).stdout


# ---- running ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_way(tiny_corpus: Callable[..., Path]) -> None:
    root = tiny_corpus(users=200)
    sweep, where = root / "study.toml", ["--root", root, "--results", root / "results"]
    sweep.write_text(SWEEP)
    (root / "local.toml").write_text('name = "here"\nexecutor = "local"\nmax_parallel = 3\n')
    cluster = ["--cluster", root / "local.toml", "--root", root]
    result = call("submit", sweep, *cluster, "--watch")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "3 runs: 3 DONE"
    assert call("submit", sweep, *cluster).stdout == "3 runs: 3 DONE\n"
    assert "would submit 0 of 3 runs" in call("submit", sweep, *cluster, "--dry-run").stdout
    assert call("sync", sweep, *cluster).stdout == "3 runs: 3 DONE\n"
    rows = json.loads(call("status", sweep, "--root", root, "--json").stdout)
    assert [(r["state"], r["step"], r["attempts"]) for r in rows] == [("DONE", 20, 1)] * 3
    key = rows[0]["run_key"]
    assert "==> " in call("logs", key[:6], "--root", root).stdout
    assert key in call("train", key, "--root", root).stdout
    assert "cancelled 0 of 3 runs" in call("cancel", sweep, "--root", root).stdout
    result = call("transfer", sweep, "--root", root, "--folds", 2)
    assert "clue/u-mlp" in result.stdout
    floor = ["--root", root, "--folds", 2, "--task", "books", "--system", "popularity"]
    assert "popularity" in call("baselines", root / "tiny.toml", *floor).stdout
    one = json.loads(
        call("transfer", key, "--root", root, "--folds", 2, "--task", "books", "--json").stdout
    )
    assert {(r["run_key"], r["task"]) for r in one} == {(key, "books")}
    assert "3 runs (3 DONE), 3 with a loss" in call("collect", sweep, *where).stdout
    result = call("fit", sweep, "--results", root / "results", "--n-boot", 20)
    assert result.exit_code == 0, result.output
    assert "3 of 3 runs fitted" in result.stdout
    drawn = call("figures", sweep, "--results", root / "results").stdout.splitlines()
    assert drawn
    assert all(Path(path).stat().st_size > 1000 for path in drawn)


@pytest.mark.slow
def test_ctrl_c_commits_a_checkpoint_and_training_goes_on(study: Path) -> None:
    (study / "study.toml").write_text(SWEEP.replace("steps = 20", "steps = 2000"))
    rows = json.loads(call("plan", study / "study.toml", "--root", study, "--json").stdout)
    key = rows[0]["run_key"]
    words = ["train", key, "--sweep", str(study / "study.toml"), "--root", str(study)]
    with subprocess.Popen(
        [sys.executable, "-m", "scaling.cli", *words], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as job:
        metrics = study / "runs" / key[:2] / key / "metrics" / "1.jsonl"
        while not (metrics.exists() and b'"train"' in metrics.read_bytes()):
            assert job.poll() is None, job.stderr.read() if job.stderr else ""
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        _, said = job.communicate(timeout=120)
    assert job.returncode == 130
    assert "stopped after a checkpoint" in said
    assert "Traceback" not in said
    assert list(metrics.parent.parent.glob("ckpt/step-*/COMMITTED"))


# ---- what people see ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (True, "yes"), (False, "no"), (162219601, "162,219,601"), (0.0, "0"),
     (0.0369139, "0.03691"), (3.189e18, "3.189e+18"), ("DONE", "DONE")],
)  # fmt: skip
def test_cells(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_a_plain_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"name": "a", "n": 1000}, {"name": "bcdef", "n": None}], ["name", "n"])
    assert capsys.readouterr().out == "name       n\na      1,000\nbcdef      -\n"


def test_plain_progress_tells_stages_and_tenths(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train") as update:
        for step in range(1, 101):
            update(step, 100, 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "train: 100/100 0.5"


def on_a_terminal(*words: object, columns: int = 200, **variables: str) -> Iterator[str]:
    """Output of a call whose stdout and stderr are a terminal."""
    controller, terminal = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    environment = {**inherited, "COLUMNS": str(columns), "TERM": "xterm-256color", **variables}
    command = [sys.executable, "-m", "scaling.cli", *map(str, words)]
    with subprocess.Popen(
        command, stdout=terminal, stderr=terminal, cwd=ROOT, env=environment
    ) as job:
        os.close(terminal)
        while True:
            try:
                if not (chunk := os.read(controller, 4096)):
                    break
            except OSError:  # Linux's end of file on a terminal
                break
            yield chunk.decode()
        assert job.wait() == 0
    os.close(controller)


def test_a_terminal_gets_a_rich_table(study: Path) -> None:
    said = "".join(on_a_terminal("plan", study / "study.toml", "--root", study))
    rows = json.loads(call("plan", study / "study.toml", "--root", study, "--json").stdout)
    assert all(row["run_key"] in said for row in rows)
    assert "\x1b[1m" in said


def test_no_color_is_no_escape_code(study: Path) -> None:
    said = "".join(on_a_terminal("plan", study / "study.toml", "--root", study, NO_COLOR="1"))
    assert "items_" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("verb", ["plan", "status"])
def test_a_narrow_terminal_hides_columns_and_folds_nothing(
    study: Path, verb: str, columns: int
) -> None:
    words = (verb, study / "study.toml", "--root", study)
    rows = json.loads(call(*words, "--json").stdout)
    said = "".join(on_a_terminal(*words, columns=columns, NO_COLOR="1")).replace("\r", "")
    lines = said.splitlines()
    for row in rows:
        [line] = [one for one in lines if row["run_key"] in one]
        assert len(line) <= columns
    if verb == "plan":
        assert all(cell(row["pf_days"]) in said for row in rows)
        assert "hidden at this width: " in said
        assert "n_non_embedding" in said
        assert "--json" in said
    else:
        assert said.count("PLANNED") == 4
    shown = said.split("hidden at this width")[0]
    plain = call(*words).stdout.splitlines()[1 : 1 + len(rows)]
    whole = {word for line in plain for word in line.split()}
    body = [line.split() for line in shown.splitlines() if any(r["run_key"] in line for r in rows)]
    assert {word for line in body for word in line} <= whole


def test_an_option_of_fit_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    said = refused("fit", tmp_path, "--form", "E + n", "--loss", "mse")
    assert "--form, --loss would do nothing" in said
    (tmp_path / "t.csv").write_text("n,loss\n1,2\n")
    table = tmp_path / "t.csv"
    assert "--x" in refused("fit", table, "--form", "E + n", "--x", "n")
    assert "form ''" in refused("fit", table, "--form", "")
    twice = ("--fix", "exponent=1", "--fix", "exponent=2")
    assert "exponent is given twice" in refused("fit", table, "--form", "E + n", *twice)
    for word in ("exponent", "exponent=1", "exponent=:", "exponent=a:1"):
        said = refused("fit", table, "--form", "E + n", "--bound", word)
        assert f"--bound {word}: NAME=LOW:HIGH" in said
