"""Runs as processes on this host: throttled, noticed when killed, taken up from the checkpoint."""

import json
import os
import signal
from pathlib import Path

import pytest

from scaling.config import TrainSettings
from scaling.slurm.cancel import cancel
from scaling.slurm.logs import log_files, tail
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.scheduler import process_start
from scaling.slurm.sync import status, submit, sync


@pytest.fixture
def profile() -> ClusterProfile:
    return ClusterProfile(
        name="local", executor="local", max_parallel=2, shape=Shape(cpus_per_task=3)
    )


def states(rows):
    return [row["state"] for row in rows]


def test_watch_keeps_at_most_max_parallel_running(root, make_runs, profile, until):
    runs = make_runs(5, step_s=0.01)
    most = []
    rows = sync(
        root, runs, profile, sweep="s", watch=True, interval_s=0.05,
        report=lambda rows: most.append(sum(r["state"] in ("QUEUED", "RUNNING") for r in rows)),
    )  # fmt: skip
    assert states(rows) == ["DONE"] * 5
    assert max(most) == 2
    assert [r["attempts"] for r in rows] == [1] * 5
    assert rows[0]["loss"] == pytest.approx(2.0 / 20)
    until(lambda: all(r.attempts()[0].end for r in runs))
    before = sorted(p for p in root.rglob("*"))
    assert {r["action"] for r in submit(root, runs, profile, sweep="s")} == {None}
    assert sorted(p for p in root.rglob("*")) == before
    assert "rank 0 of 1 threads 3" in tail(log_files(runs[0])[0], 50)


def test_threads_of_the_settings_win(root, make_runs, profile):
    profile = profile.model_copy(update={"train": TrainSettings(threads=1)})
    (run,) = make_runs(1)
    sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert "threads 1" in tail(log_files(run)[0], 50)


@pytest.mark.parametrize("victim", ["rank", "controller"])
def test_a_killed_run_goes_on_from_its_checkpoint(root, make_runs, profile, until, victim):
    (run,) = make_runs(1, steps=60, step_s=0.05)
    submit(root, [run], profile, sweep="s")
    until(lambda: (status([run])[0]["step"] or 0) >= 12)
    claim = run.attempts()[0].claim
    children = Path(f"/proc/{claim['pid']}/task/{claim['pid']}/children").read_text().split()
    ranks = [int(p) for p in children]
    assert len(ranks) == 1
    os.kill(ranks[0] if victim == "rank" else claim["pid"], signal.SIGKILL)
    until(lambda: process_start(ranks[0]) is None and process_start(claim["pid"]) is None, 10)
    (row,) = status([run])
    assert (row["state"], row["cause"]) == ("FAILED", "killed")
    (run.root / "standin.json").write_text(json.dumps({"step_s": 0.0}))
    (row,) = sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert (row["state"], row["attempts"]) == ("DONE", 2)
    start = json.loads(run.metrics_path(2).read_text().splitlines()[0])
    assert start["resumed_from"] >= 10
    assert start["resumed_from"] % 5 == 0
    assert [r["step"] for r in run.curve("train")] == list(range(1, 61))


def test_two_ranks_meet(root, make_runs, profile):
    profile = profile.model_copy(update={"shape": Shape(tasks_per_node=2)})
    (run,) = make_runs(1)
    sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert run.result()["world_size"] == 2
    assert "rank 1 of 2" in tail(log_files(run, rank=1)[0], 50)


def test_a_rank_that_fails_takes_the_others_along(root, make_runs, profile, until):
    profile = profile.model_copy(update={"shape": Shape(tasks_per_node=2)})
    (run,) = make_runs(1, steps=5000, step_s=0.05, fail_at=3, error="value", fail_rank=1)
    submit(root, [run], profile, sweep="s")
    until(lambda: run.attempts()[0].end)
    assert run.attempts()[0].end["evidence"] == "rank 1: ValueError: boom"
    until(lambda: process_start(run.attempts()[0].claim["pid"]) is None, 10)
    (row,) = status([run])
    assert (row["state"], row["cause"]) == ("FAILED", "error")


def test_a_run_that_was_told_to_stop_goes_on(root, make_runs, profile, until):
    (run,) = make_runs(1, steps=60, step_s=0.05)
    submit(root, [run], profile, sweep="s")
    until(lambda: (status([run])[0]["step"] or 0) >= 3)
    os.kill(run.attempts()[0].claim["pid"], signal.SIGTERM)  # the controller passes it on
    until(lambda: run.attempts()[0].end)
    assert run.attempts()[0].end["class"] == "stopped"
    stopped = run.attempts()[0].end["step"]
    (row,) = sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert (row["state"], row["attempts"]) == ("DONE", 2)
    start = json.loads(run.metrics_path(2).read_text().splitlines()[0])
    assert start["resumed_from"] == stopped  # no step is lost


def test_an_error_is_a_class_with_evidence_and_not_tried_again(root, make_runs, profile):
    (run,) = make_runs(1, fail_at=3, error="value")
    (row,) = sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert (row["state"], row["cause"], row["attempts"]) == ("FAILED", "error", 1)
    assert "ValueError: boom" in row["evidence"]
    assert "Traceback" in tail(log_files(run)[1], 100)
    (row,) = submit(root, [run], profile, sweep="s")
    assert row["action"] is None
    (row,) = submit(root, [run], profile, sweep="s", retry_failed=True)
    assert (row["action"], row["attempts"]) == ("submit", 2)
    (row,) = sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert row["state"] == "DONE"


def test_a_full_disk_is_named(root, make_runs, profile):
    (run,) = make_runs(1, fail_at=3, error="oserror")
    (row,) = sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert (row["state"], row["cause"]) == ("FAILED", "disk_full")


def test_the_rank_with_the_cause_has_time_to_name_it(root, make_runs, profile):
    profile = profile.model_copy(update={"shape": Shape(tasks_per_node=2)})
    (run,) = make_runs(1, fail_at=3, error="peer", fail_rank=1)
    (row,) = sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    assert (row["state"], row["cause"]) == ("FAILED", "disk_full")
    assert row["evidence"].startswith("rank 0: OSError: [Errno 28]")


def test_a_disk_too_full_for_the_record_leaves_the_reason_in_the_log(root, make_runs, profile):
    (run,) = make_runs(1, fail_at=3, error="full disk")
    (row,) = sync(root, [run], profile, sweep="s", watch=True, interval_s=0.05)
    # The next attempt says what is known of the one before: its process has ended.
    assert (row["state"], row["attempts"]) == ("DONE", 2)
    assert run.attempts()[0].end["class"] == "killed"
    printed = log_files(run, attempt=1)[1].read_text()
    assert "Traceback" in printed
    assert "raise ERRORS[" in printed
    assert "attempt 1 ended (disk_full), which could not be recorded: [Errno 28]" in printed


def test_cancel_ends_started_and_planned_runs_and_is_idempotent(root, make_runs, profile, until):
    runs = make_runs(4, steps=2000, step_s=0.05)
    submit(root, runs, profile, sweep="s")
    until(lambda: states(status(runs)) == ["RUNNING", "RUNNING", "PLANNED", "PLANNED"])
    until(lambda: all(r.progress() for r in runs[:2]))
    assert len(cancel(runs)) == 4
    assert cancel(runs) == []
    until(lambda: all(r.attempts()[0].end for r in runs[:2]))
    rows = sync(root, runs, profile, sweep="s", watch=True)
    assert states(rows) == ["CANCELLED"] * 4
    assert run_ends(runs[:2]) == ["cancelled", "cancelled"]


def run_ends(runs):
    return [r.attempts()[-1].end["class"] for r in runs]
