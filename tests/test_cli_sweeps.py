"""Verbs on sweeps as people call them: costs, scripts, budgets, filters, what is asked first."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_cli import ROOT, SWEEP, call, refused, study, tree  # noqa: F401

from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare, read_card
from scaling.rundir import RunDir
from scaling.sweeps import Grid, write_sweep
from scaling.transfer.evaluate import evaluate

SCONTROL = """#!/bin/sh
echo 'MaxArraySize            = 3'
"""


@pytest.fixture
def cluster(study: Path, monkeypatch: pytest.MonkeyPatch) -> list:  # noqa: F811
    """Words for a cluster whose controller answers and whose queue is empty."""
    commands = study / "bin"
    commands.mkdir()
    for name, script in (
        ("scontrol", SCONTROL),
        ("squeue", "#!/bin/sh\n"),
        ("srun", "#!/bin/sh\n"),
    ):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    (study / "slurm.toml").write_text(
        'name = "there"\npartition = "gpu"\nsetup = ["module load cuda"]\n'
        "[shape]\ncpus_per_task = 4\n"
    )
    return ["--cluster", study / "slurm.toml", "--root", study]


def planned(study: Path) -> list:  # noqa: F811
    grid = Grid.read(study / "study.toml")
    return grid.runs(read_card(grid.corpus, study))


def test_a_plan_says_what_it_costs(study, cluster):  # noqa: F811
    words = ["plan", study / "study.toml", *cluster]
    rows = json.loads(call(*words, "--json").stdout)
    assert {"gpu_hours", "wall_hours", "disk_gb", "basis"} <= set(rows[0])
    assert {row["basis"] for row in rows} == {"model"}
    hours = sum(row["gpu_hours"] for row in rows)
    said = call(*words, "--parallel", 1).stdout
    assert f"about {hours:.3g} GPU-hours" in said
    assert "with 1 at once" in said
    assert "(3 model)" in said
    # a finished run corrects the model
    config = planned(study)[0].config
    run = RunDir.create(study, config, "tiny")
    record = {"flops_exact": 1e12, "seconds": 50.0, "world_size": 1, "profile": "there"}
    (run.path / "result.json").write_text(json.dumps(record))
    rows = json.loads(call(*words, "--json").stdout)
    assert {row["basis"] for row in rows} == {"measured"}
    expected = rows[0]["flops_exact"] / 2e10 / 3600 + 60 / 3600
    assert rows[0]["gpu_hours"] == pytest.approx(expected)


def test_a_nominal_sweep_can_be_priced():
    words = ["plan", ROOT / "sweeps/compute.toml", "--cluster", ROOT / "slurm/example_v100.toml"]
    rows = json.loads(call(*words, "--json").stdout)
    assert all(row["gpu_hours"] > 0 and row["run_key"] is None for row in rows)


def test_a_dry_run_prints_every_script_and_changes_nothing(study, cluster):  # noqa: F811
    before = tree(study)
    result = call("submit", study / "study.toml", *cluster, "--dry-run")
    assert result.exit_code == 0, result.output
    assert tree(study) == before
    (script,) = result.stdout.split("# ---- an array of 3 runs\n")[1:]
    for line in ("#SBATCH --array=0-2%3", "#SBATCH --partition=gpu", "module load cuda"):
        assert line in script.splitlines()
    assert re.search(r"export PYTHONSAFEPATH=1 PYTHONPATH=\S+/code/[a-z2-7]{16}\.zip", script)
    assert "about" in result.stdout
    assert "would submit 3 of 3 runs" in result.stdout


def test_a_budget_has_to_be_something(study, cluster):  # noqa: F811
    before = tree(study)
    for value in (0, -1, "nan", "much"):
        assert call("submit", study / "study.toml", *cluster, "--budget", value).exit_code == 2
    assert tree(study) == before


def test_a_status_can_be_filtered(study):  # noqa: F811
    words = ["status", study / "study.toml", "--root", study]
    torn = RunDir.create(study, planned(study)[1].config, "tiny")
    (torn.path / "spec.json").write_text("{")
    rows = json.loads(call(*words, "--json", "--state", "failed").stdout)
    assert [row["run_key"] for row in rows] == [torn.run_key]
    assert json.loads(call(*words, "--json", "--cause", "damaged").stdout) == rows
    assert json.loads(call(*words, "--json", "--state", "RUNNING").stdout) == []
    said = call(*words, "--state", "FAILED").stdout
    assert len([line for line in said.splitlines() if "FAILED" in line]) == 2  # its row, the tally
    assert "3 runs: 2 PLANNED, 1 FAILED" in said
    assert "no such state; valid: PLANNED, QUEUED" in refused(*words, "--state", "FINISHED")


def on_a_terminal(answer: bytes, *words: object) -> tuple[int, str]:
    """Exit status and output of a call on a terminal, to whose question somebody answers."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "scaling.cli", *map(str, words)]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT
    ) as process:
        os.close(terminal)
        said = b""
        while True:
            try:
                said += os.read(master, 4096)
            except OSError:
                break
            if said.endswith(b"[y/N]: "):
                os.write(master, answer + b"\n")
                said += b"|"
        os.close(master)
    return process.returncode, said.decode()


@pytest.mark.slow
def test_people_are_asked_before_anything_is_submitted_or_cancelled(study):  # noqa: F811
    local = ["--cluster", study / "local.toml", "--root", study]
    before = tree(study)
    status, said = on_a_terminal(b"n", "submit", study / "study.toml", *local)
    assert status != 0
    assert "about" in said
    assert "submit 3 runs? [y/N]" in said
    assert tree(study) == before
    run = RunDir.create(study, planned(study)[0].config, "tiny")
    run.record(1, "intent", {"token": "none", "index": 0, "executor": "none", "step": 0, "time": 0})
    status, said = on_a_terminal(b"n", "cancel", study / "study.toml", "--root", study)
    assert status != 0
    assert "cancel 1 runs that are not done? [y/N]" in said
    assert run.attempts()[0].cancel is None
    status, said = on_a_terminal(b"y", "cancel", study / "study.toml", "--root", study)
    assert "cancelled 1 of 1 runs" in said
    assert run.attempts()[0].cancel is not None


def test_one_run_is_cancelled_alone(study):  # noqa: F811
    runs = [RunDir.create(study, p.config, "tiny") for p in planned(study)]
    for run in runs:
        intent = {"token": "none", "index": 0, "executor": "none", "step": 0, "time": 0}
        run.record(1, "intent", intent)
    words = ["cancel", study / "study.toml", "--root", study, "--run"]
    assert "cancelled 1 of 1 runs" in call(*words, runs[1].run_key[:8]).stdout
    assert [r.attempts()[0].cancel is not None for r in runs] == [False, True, False]
    assert "no run has a key starting with 'zzzz'" in refused(*words, "zzzz")


@pytest.mark.slow
def test_logs_are_followed_to_the_end(study):  # noqa: F811
    text = (study / "study.toml").read_text().replace("steps = 20", "steps = 60")
    (study / "study.toml").write_text(text)
    local = ["--cluster", study / "local.toml", "--root", study]
    result = call("submit", study / "study.toml", *local)
    assert result.exit_code == 0, result.output
    rows = json.loads(call("status", study / "study.toml", "--root", study, "--json").stdout)
    key = next(r["run_key"] for r in rows if r["attempts"])
    run = RunDir(study, key)
    command = [sys.executable, "-m", "scaling.cli", "logs", key, "--root", str(study), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        said, _ = process.communicate(timeout=180)
    assert process.returncode == 0
    assert run.attempts()[0].end is not None
    printed = (study / "sweeps").glob("*/chunks/*/*_log.*")
    lines = [line for path in printed for line in path.read_text().splitlines()]
    assert lines
    assert said.splitlines() == lines or set(said.splitlines()) == set(lines)
    call("cancel", study / "study.toml", "--root", study)


@pytest.mark.slow
def test_what_jobs_run_is_private(study):  # noqa: F811
    local = ["--cluster", str(study / "local.toml"), "--root", str(study)]
    command = [sys.executable, "-m", "scaling.cli", "submit", str(study / "study.toml"), *local]
    subprocess.run([*command, "--watch"], check=True, cwd=ROOT, capture_output=True)
    for folder in ("runs", "sweeps", "code", "environments"):
        for path in (study / folder, *(study / folder).rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, path
    starts = RunDir(study, planned(study)[0].row["run_key"]).starts()
    assert set(starts[0]["job"]) >= {"environment", "gpus", "variables", "profile"}
    rows = json.loads(call("status", study / "study.toml", "--root", study, "--json").stdout)
    assert all(row["gpu_hours"] > 0 for row in rows)
    assert all(row["estimate_gpu_hours"] > 0 for row in rows)


@pytest.mark.slow
def test_a_budget_that_pays_for_no_run_ends_a_watch_and_a_larger_one_goes_on(study):  # noqa: F811
    words = ["submit", study / "study.toml", "--cluster", study / "local.toml", "--root", study]
    rows = json.loads(call(*words, "--dry-run", "--json").stdout)
    assert [row["action"] for row in rows] == ["submit"] * 3
    result = call(*words, "--budget", 0.02, "--watch")  # each run reserves a minute and a half
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "3 runs: 3 PLANNED"
    why = "of the budget of 0.02 GPU-hours 0 are spent or reserved, and the next run reserves 0.025"
    assert f"waiting: {why}" in result.stderr
    again = json.loads(call(*words, "--json").stdout)
    assert [row["action"] for row in again] == [None] * 3
    assert {row["waiting"] for row in again} == {f"{why} (1.5 times its estimate)"}
    dry = call(*words, "--dry-run", "--budget", 0.03)
    assert "would submit 1 of 3 runs" in dry.stdout
    assert "contradict" in refused(*words, "--budget", 1, "--no-budget")
    rows = json.loads(call(*words, "--budget", 1, "--watch", "--json").stdout)
    assert [row["state"] for row in rows] == ["DONE"] * 3
    assert sum(row["gpu_hours"] for row in rows) < 1


def test_what_runs_can_be_looked_at_and_ended_without_corpus_or_file(study):  # noqa: F811
    runs = [RunDir.create(study, p.config, "tiny") for p in planned(study)]
    for run in runs:
        intent = {"token": "none", "index": 0, "executor": "none", "step": 0, "time": 0}
        run.record(1, "intent", intent)
    grid = Grid.read(study / "study.toml")
    folder = write_sweep(study, grid, read_card(grid.corpus, study), planned(study))
    (study / "corpora").rename(study / "gone")
    result = call("status", study / "study.toml", "--root", study, "--json")
    assert "not prepared" in result.stderr
    assert "taking the runs as they were submitted" in result.stderr
    assert [row["run_key"] for row in json.loads(result.stdout)] == [r.run_key for r in runs]
    result = call("cancel", folder.name, "--root", study)
    assert "cancelled 3 of 3 runs" in result.stdout
    assert all(r.attempts()[0].cancel for r in runs)
    assert "not prepared" in refused("status", study / "study.toml", "--root", study / "other")


def test_runs_of_another_version_of_a_sweep_are_not_forgotten(study):  # noqa: F811
    grid = Grid.read(study / "study.toml")
    folder = write_sweep(study, grid, read_card(grid.corpus, study), planned(study))
    for run in (RunDir.create(study, p.config, "tiny") for p in planned(study)):
        intent = {"token": "none", "index": 0, "executor": "none", "step": 0, "time": 0}
        run.record(1, "intent", intent)
    text = (study / "study.toml").read_text()
    (study / "study.toml").write_text(text.replace("batch_size = 8", "batch_size = 16"))
    said = call("status", study / "study.toml", "--root", study).stdout
    assert f"3 runs of another version of this sweep, {folder.name}" in said
    assert "3 runs: 3 PLANNED" in said


def test_a_failure_is_shown_with_its_reason(study):  # noqa: F811
    run = RunDir.create(study, planned(study)[0].config, "tiny")
    intent = {"token": "none", "index": 0, "executor": "none", "step": 0, "time": 0}
    run.record(1, "intent", intent)
    run.record(1, "end", {"class": "gpu_oom", "evidence": "512 fits (tried)"})
    words = ["status", study / "study.toml", "--root", study]
    assert f"{run.run_key} gpu_oom: 512 fits (tried)" in call(*words).stdout
    assert "no such cause; valid: budget" in refused(*words, "--cause", "oops")


# ---- downstream evaluations ---------------------------------------------------------------------

TASKS = """
[tasks.first]
service = "beauty"
form = "first"
negatives = 5
[tasks.strangers]
service = "beauty"
encoders = "foreign"
users = "all"
targets = 1
negatives = 5
"""


@pytest.fixture
def transferring(tiny_corpus):
    """``transferring(table)``: a study of two runs whose sweep has this ``[transfer]`` table."""

    def make(table: str, tasks: str = "", users: int = 64) -> Path:
        root = tiny_corpus(users=users)
        if tasks:
            path = root / "tiny.toml"
            path.write_text(path.read_text() + tasks)
            prepare(path, root)
        text = SWEEP.replace("[2, 3, 4]", "[2, 3]") + f"[transfer]\n{table}\n"
        (root / "study.toml").write_text(text)
        (root / "local.toml").write_text('name = "here"\nexecutor = "local"\nmax_parallel = 2\n')
        return root

    return make


BAD_TABLES = [
    ('tasks = ["books"]\nfold = 5', r"transfer\.fold"),
    ('tasks = ["books"]\nfolds = 3', r"transfer\.folds.*2, 5 or 10"),
    ('tasks = ["books"]\nhistory = "mine"', r"transfer\.history.*'target' or 'all'"),
    ('tasks = ["books"]\nheads = ["mlp"]', r"'u-mlp', 'u-mlp-64', 'linear' or 'hybrid'"),
    ('tasks = ["books"]\nheads = []', r"transfer\.heads"),
    ('tasks = ["books"]\nseeds = 0', r"transfer\.seeds"),
    ("tasks = []", r"transfer\.tasks"),
    ("", r"transfer\.tasks"),
    ('tasks = ["bookz"]', r"bookz.*beauty, books"),
    ('tasks = ["other:books"]', r"no corpus 'other'; prepared: tiny-"),
    ('tasks = ["first"]', r"'first': before a first log of 'beauty'.*valid: all"),
    ('tasks = ["strangers"]', r"'strangers': it is for encoders of other corpora"),
]


@pytest.mark.parametrize(("table", "why"), BAD_TABLES, ids=[w for _, w in BAD_TABLES])
def test_evaluations_that_cannot_be_are_refused_before_anything_is_written(
    transferring, table, why
):
    study = transferring(table, TASKS)  # noqa: F811
    before = tree(study)
    said = refused("submit", study / "study.toml", "--cluster", study / "local.toml",
                   "--root", study, "--watch")  # fmt: skip
    assert re.search(why, said, re.DOTALL), said
    assert tree(study) == before


def test_a_dry_run_says_what_runs_are_evaluated_on(transferring):
    study = transferring('tasks = ["books", "beauty"]\nheads = ["u-mlp", "linear"]')  # noqa: F811
    before = tree(study)
    words = ["submit", study / "study.toml", "--cluster", study / "local.toml", "--root", study]
    said = call(*words, "--dry-run").stdout
    (line,) = re.findall("^and evaluate, where that is missing: (.*)$", said, re.MULTILINE)
    assert [re.sub("-[a-z2-7]{8}$", "", key) for key in line.split(", ")] == [
        "books", "books", "beauty", "beauty",
    ]  # fmt: skip
    assert "would submit 2 of 2 runs" in said
    assert f"each is then evaluated: {line}\n" in call("plan", *words[1:2], *words[4:]).stdout
    hours = [row["gpu_hours"] for row in json.loads(call("plan", *words[1:], "--json").stdout)]
    assert tree(study) == before
    text = (study / "study.toml").read_text()
    (study / "study.toml").write_text(text[: text.index("[transfer]")])
    alone = [row["gpu_hours"] for row in json.loads(call("plan", *words[1:], "--json").stdout)]
    assert [a - b for a, b in zip(hours, alone, strict=True)] == pytest.approx([4 / 60] * 2)
    assert "evaluated" not in call("plan", *words[1:2], *words[4:]).stdout


@pytest.mark.slow
def test_a_sweep_is_trained_and_evaluated_and_a_later_task_is_evaluated_alone(transferring):
    study = transferring(  # noqa: F811
        'tasks = ["books"]\nheads = ["u-mlp", "linear"]\nfolds = 2', users=200
    )
    words = ["submit", study / "study.toml", "--cluster", study / "local.toml", "--root", study]
    rows = json.loads(call(*words, "--watch", "--json").stdout)
    assert [(r["state"], r["evaluated"], r["wanted"]) for r in rows] == [("DONE", 2, 2)] * 2
    runs = [RunDir(study, row["run_key"]) for row in rows]
    for run in runs:
        assert run.over()
        assert run.generations() == [1, 2]
        for path in (run.path, *run.path.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, path
    before = [tree(run.path) for run in runs]
    assert "would submit 0 of 2 runs" in call(*words, "--dry-run").stdout
    assert {r["action"] for r in json.loads(call(*words, "--json").stdout)} == {None}
    assert [tree(run.path) for run in runs] == before
    # What a job leaves is what evaluating by hand leaves.
    corpus = Corpus.find(study, runs[0].spec().data.corpus_digest)
    for run in runs:
        copy = RunDir(study / "copy", run.run_key)
        shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("transfer"))
        evaluate(copy, corpus, run.wanted())
        for one in run.wanted():
            left, again = (r.path / "transfer" / f"{one.key}.json" for r in (run, copy))
            assert json.loads(left.read_text()) == json.loads(again.read_text())
    # A task is added: it is evaluated, and nothing is trained or evaluated again.
    text = (study / "study.toml").read_text()
    (study / "study.toml").write_text(text.replace('["books"]', '["books", "beauty"]'))
    said = call(*words, "--dry-run").stdout
    assert "would submit 2 of 2 runs" in said
    assert len(re.findall(r"beauty-[a-z2-7]{8}", said)) == 2
    header, *table = (line.split() for line in said.splitlines()[:3])
    assert header[3:] == ["step", "steps", "evaluated", "wanted"]
    assert [line[3:] for line in table] == [["20", "20", "2", "4"]] * 2
    assert ", 0 PF-days" in said  # there is nothing to train
    said = call("status", study / "study.toml", "--root", study).stdout
    assert "2 runs: 2 DONE" in said  # nobody has declared it yet
    result = call(*words, "--watch")
    assert result.stdout.splitlines()[-1] == "2 runs: 2 DONE", result.output
    rows = json.loads(call("status", study / "study.toml", "--root", study, "--json").stdout)
    assert [(r["evaluated"], r["wanted"], r["attempts"]) for r in rows] == [(4, 4, 2)] * 2
    for run, files in zip(runs, before, strict=True):
        assert files.items() <= tree(run.path).items()
        assert [s.get("missing") for s in run.starts()] == [None, 2, 2]
    call("collect", study / "study.toml", "--root", study, "--results", study / "results")
    table = pq.read_table(study / "results/study/transfer.parquet").to_pylist()
    found = {(r["run_key"], r["task"], r["system"]) for r in table if r["run_key"]}
    assert found == {
        (run.run_key, task, system)
        for run in runs
        for task in ("books", "beauty")
        for system in ("clue/u-mlp", "clue/linear")
    }
