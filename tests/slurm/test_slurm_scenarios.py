"""Fault scenarios of submission: real submitit and the real driver against a file-backed Slurm.

Names of tests say which: here F4 to F7, F15 and F16. F1 to F3 are in ``tests/train/kills.py``, F8
in ``test_slurm_state.py``, F9 to F13 in ``test_slurm_jobs.py``, F14 in ``test_slurm_ends.py``, F17
in ``test_slurm_edits.py``, F18 in ``test_slurm_machine.py``, F19 and F20 in
``test_slurm_hostile.py``, F21 in ``test_slurm_terminal.py``, F22 in ``test_slurm_cancel.py``; F24
is ``test_a_run_goes_on_with_another_number_of_ranks_and_stage`` in ``tests/train/test_engine.py``.
"""

import contextlib
import json
import os
import sys
import time

import pytest
import submitit
from scenario import Rank, forked, one_writer, simulate, states, tree, whole

from scaling.rundir import RunDir
from scaling.slurm import cancel as cancelling
from scaling.slurm import submission, sync
from scaling.slurm.cancel import cancel
from scaling.slurm.code import archive
from scaling.slurm.job import EXIT_SUPERSEDED
from scaling.slurm.submission import SubmissionError, Unreachable


def at_boundary(number, do):
    """``do`` at the ``number``-th moment of this process at which state becomes visible: before
    and after a record is linked or renamed and a command is run (``sys.addaudithook``). A hook
    cannot be removed: for a process that ends soon."""
    passed = [0]

    def hook(event, arguments):
        if event in ("os.link", "os.rename", "subprocess.Popen"):
            passed[0] += 1
            if passed[0] == number:
                do()

    sys.addaudithook(hook)
    return passed


# F4: the login process is killed


def test_f04_login_killed_at_every_boundary_of_submit(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    """A submit limit makes several arrays of the chunk, so that it is killed between them, too."""
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    configs = [run.spec() for run in make_runs(3, steps=4)]
    fake_slurm.fault(max_submit=2)
    number, killed = 0, 9
    while killed == 9:
        number += 1
        place = root / f"{number}"
        archive(place)
        runs = [RunDir.create(place, config, "standin") for config in configs]
        (fake_slurm.home / "jobs.json").unlink(missing_ok=True)

        def submit(number=number, place=place, runs=runs):
            at_boundary(number, lambda: os._exit(9))
            sync.submit(place, runs, slurm_profile, sweep="s")

        killed = forked(submit)
        exits = []
        for _ in range(2):
            time.sleep(0.002)
            sync.sync(place, runs, waited, sweep="s")
            exits += simulate(place, fake_slurm)
        one_writer(runs)
        assert all(whole(r) for r in runs)
        assert exits == [0] * 3, number
    assert killed == 0
    assert number > 15
    print(f"{number - 1} kill points")


def test_f04_login_killed_after_a_failed_attempt_needs_no_repair(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    """What the login's crash cost is not a try of the run."""
    (run,) = make_runs(1, steps=4)
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.change(state="NODE_FAIL", node="bad")

    def submit():
        at_boundary(5, lambda: os._exit(9))  # after the intent of attempt 2, before sbatch
        sync.submit(root, [run], slurm_profile, sweep="s")

    assert forked(submit) == 9
    assert (run.attempts()[0].end["class"], run.attempts()[0].end["nodes"]) == (
        "node_fail", ["bad"],
    )  # fmt: skip
    assert [a.submit is not None for a in run.attempts()] == [True, False]
    assert len(fake_slurm.jobs()) == 1
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    time.sleep(0.002)
    (row,) = sync.sync(root, [run], waited, sweep="s")
    assert (row["action"], row["attempts"]) == ("submit", 3)
    assert simulate(root, fake_slurm) == [0]
    one_writer([run])


def test_f04_login_killed_before_submitit_brought_the_arguments(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch
):
    runs = make_runs(2)

    def submit():
        monkeypatch.setattr(
            submitit.core.utils.JobPaths, "move_temporary_file", lambda *_, **__: os._exit(9)
        )
        sync.submit(root, runs, slurm_profile, sweep="s")

    assert forked(submit) == 9
    assert states(sync.sync(root, runs, slurm_profile, sweep="s")) == ["QUEUED"] * 2
    begun = time.monotonic()
    assert fake_slurm.finish() == [0, 0]
    assert time.monotonic() - begun < 30  # submitit alone would wait a minute for each, and fail
    one_writer(runs)


# F5: sbatch says "Socket timed out"


def test_f05_sbatch_timed_out_and_the_job_is_there(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(2)
    fake_slurm.fault(sbatch="timeout_accepted")
    rows = sync.submit(root, runs, slurm_profile, sweep="s")
    assert [(r["state"], r["job_id"]) for r in rows] == [("QUEUED", None)] * 2
    fake_slurm.fault()
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    rows = sync.sync(root, runs, waited, sweep="s")
    assert [(r["action"], r["job_id"]) for r in rows] == [(None, "101_0"), (None, "101_1")]
    assert fake_slurm.finish() == [0, 0]
    one_writer(runs)


@pytest.mark.parametrize("when", ["in quarantine", "first", "beside", "after"])
def test_f05_sbatch_timed_out_and_the_job_comes_late(
    root, make_runs, fake_slurm, slurm_profile, until, when
):
    """In quarantine; before the second attempt's job starts; while it trains; when it is done."""
    (run,) = make_runs(1, step_s=0.05 if when == "beside" else 0.0)
    fake_slurm.fault(sbatch="timeout_late")
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.fault()
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["action"], row["attempts"]) == ("QUEUED", None, 1)
    if when == "in quarantine":
        fake_slurm.late()
        assert fake_slurm.finish() == [0]
        assert states(sync.sync(root, [run], slurm_profile, sweep="s")) == ["DONE"]
        one_writer([run])
        return
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    (row,) = sync.sync(root, [run], waited, sweep="s")
    assert (row["state"], row["action"], row["attempts"]) == ("QUEUED", "submit", 2)
    if when == "beside":
        second = fake_slurm.start(0)
        until(lambda: run.progress(), step=0.05)
    elif when == "after":
        assert fake_slurm.run(0) == 0
    fake_slurm.late()
    begun = time.monotonic()
    assert fake_slurm.run(1) == EXIT_SUPERSEDED
    assert time.monotonic() - begun < 5
    token = run.attempts()[0].intent["token"]
    (log,) = (root / "sweeps/s/chunks" / token).glob("*_0_log.err")
    reason = "the run is over" if when == "after" else "attempt 2 is newer than attempt 1"
    assert f"superseded: {reason}" in log.read_text()
    if when == "beside":
        assert fake_slurm.end(0, second) == 0
    elif when == "first":
        assert fake_slurm.run(0) == 0
    one_writer([run])
    assert states(sync.sync(root, [run], waited, sweep="s")) == ["DONE"]
    assert len(fake_slurm.jobs()) == 2


@pytest.mark.parametrize("times", [1, 4])
def test_f05_sbatch_timed_out_and_no_job_comes(root, make_runs, fake_slurm, slurm_profile, times):
    """A submission that nobody accepted is no try of the run, however often it happens."""
    (run,) = make_runs(1)
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    fake_slurm.fault(sbatch="timeout")
    for number in range(times):
        (row,) = sync.sync(root, [run], waited, sweep="s")
        assert (row["state"], row["action"], row["attempts"]) == ("QUEUED", "submit", number + 1)
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
        assert (row["state"], row["action"]) == ("QUEUED", None)  # in quarantine
    fake_slurm.fault()
    time.sleep(0.002)
    assert sync.sync(root, [run], waited, sweep="s")[0]["action"] == "submit"
    assert fake_slurm.finish() == [0]
    one_writer([run])


# F6: several logins submit at once


def test_f06_two_logins_between_look_and_intent(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch
):
    runs = make_runs(1)
    original, other = submission.start_attempts, []

    def second_login_is_faster(*args, **terms):
        if not other:
            other.append(True)
            sync.submit(root, runs, slurm_profile, sweep="s")
        return original(*args, **terms)

    monkeypatch.setattr(sync, "start_attempts", second_login_is_faster)
    assert sync.submit(root, runs, slurm_profile, sweep="s")[0]["action"] is None
    assert len(fake_slurm.jobs()) == 1


@pytest.mark.parametrize("logins", [2, 8])
def test_f06_logins_submit_overlapping_sweeps_at_once(
    root, make_runs, fake_slurm, slurm_profile, ranks, logins
):
    """Each lacks one of the runs, has its own order, and syncs twice thereafter."""
    runs = make_runs(12, steps=4)
    profile = slurm_profile.model_copy(update={"array_size": 4})
    begin = time.time() + 0.3
    children = []
    for n in range(logins):
        if (child := os.fork()) == 0:
            part = [r for i, r in enumerate(runs) if i != n]
            part = part[n:] + part[:n]
            time.sleep(max(0.0, begin - time.time()))
            for drive in (sync.submit, sync.sync, sync.sync):
                drive(root, part, profile, sweep=f"s{n}")
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * logins
    assert len(fake_slurm.jobs()) == 12
    assert [len(r.attempts()) for r in runs] == [1] * 12
    assert simulate(root, fake_slurm) == [0] * 12
    one_writer(runs)


# F7: the scheduler is silent, or says what nobody can read


SILENT = ["down", "garbage", "truncated", "hang"]


@pytest.mark.parametrize(
    "faults",
    [
        *({"squeue": how} for how in SILENT),
        {"squeue": "empty"},  # sacct still knows
        {"sacct": "empty"},  # squeue still knows
        *({"sacct": how} for how in SILENT),
        {"squeue": "down", "sacct": "down", "scontrol": "down", "scancel": "down"},
    ],
    ids=lambda faults: "-".join(f"{k}_{v}" for k, v in faults.items()),
)
def test_f07_a_scheduler_that_cannot_be_understood_changes_nothing(
    root, make_runs, fake_slurm, slurm_profile, ranks, monkeypatch, faults
):
    monkeypatch.setattr("scaling.slurm.scheduler.command.__kwdefaults__", {"timeout_s": 0.3})
    runs = make_runs(3)
    sync.submit(root, runs[:2], slurm_profile, sweep="s")
    fake_slurm.set(0, state="RUNNING")
    rank = Rank(root, fake_slurm.jobs()[0])
    rank.begin()
    if "sacct" in faults and "squeue" not in faults and faults["sacct"] != "empty":
        # Of this one sacct alone would know.
        fake_slurm.set(1, state="NODE_FAIL", purged=True)
    fake_slurm.fault(**faults)
    silent = "empty" not in faults.values()
    before = tree(root)
    for drive in (sync.sync, sync.submit, sync.sync) if silent else ():
        begun = time.monotonic()
        rows = drive(root, runs, slurm_profile, sweep="s")
        assert time.monotonic() - begun < 1
        assert states(rows) == ["RUNNING", "QUEUED", "PLANNED"]
        assert [bool(r["stale"]) for r in rows] == [True, True, False]
        assert {r["action"] for r in rows} == {None}
        assert tree(root) == before
    assert states(sync.status(runs)) == ["RUNNING", "QUEUED", "PLANNED"]
    if silent:
        with pytest.raises(Unreachable, match="nothing submitted"):
            sync.preview(root, [r.spec() for r in runs], slurm_profile, sweep="s")
    if "squeue" in faults and silent:
        with pytest.raises(SubmissionError, match=r"2 runs marked as cancelled.*may still run"):
            cancel(runs[1:])
        fake_slurm.fault()
        assert cancel(runs[1:]) == []
        assert fake_slurm.jobs()[1]["state"] == "CANCELLED by 0"
        sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
    else:
        if silent:
            fake_slurm.fault()  # it recovers, and so do they, alone
        rows = sync.sync(root, runs, slurm_profile, sweep="s")
        assert [r["action"] for r in rows] == [None, "submit" if silent else None, "submit"]
    fake_slurm.fault()
    while rank.status is None:
        rank.step()
    fake_slurm.set(0, state="COMPLETED")
    assert set(simulate(root, fake_slurm)) == {0}
    assert states(sync.sync(root, runs, slurm_profile, sweep="s")) == ["DONE"] * 3
    one_writer(runs)


@pytest.mark.parametrize("how", ["down", "hang"])
def test_f07_a_controller_that_dies_before_sbatch_is_a_clear_error(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch, how
):
    monkeypatch.setattr("scaling.slurm.scheduler.command.__kwdefaults__", {"timeout_s": 0.3})
    runs = make_runs(1)
    fake_slurm.fault(scontrol=how)
    for drive in (sync.submit, sync.sync):
        with pytest.raises(Unreachable, match="nothing submitted: scontrol: "):
            drive(root, runs, slurm_profile, sweep="s")
    assert runs[0].attempts() == []
    fake_slurm.fault(sbatch="down")
    with pytest.raises(Unreachable, match="Unable to contact slurm controller"):
        sync.submit(root, runs, slurm_profile, sweep="s")
    assert states(sync.status(runs)) == ["PLANNED"]
    fake_slurm.fault(scontrol="garbage")  # of a MaxArraySize that nobody knows the least is 1
    assert sync.submit(root, runs, slurm_profile, sweep="s")[0]["action"] == "submit"
    assert "--array=0-0%1" in fake_slurm.sbatches()[-1]


def test_f07_a_watching_sync_outlives_the_controller(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(1)
    fake_slurm.fault(scontrol="down")
    seen = []

    def report(rows):
        seen.append(rows[0]["state"])
        if len(seen) == 2:
            fake_slurm.fault()
        elif len(seen) == 3:
            fake_slurm.fault(squeue="down", sacct="down", scontrol="down")
        elif len(seen) == 5:
            fake_slurm.fault()
            fake_slurm.finish()

    sync.sync(root, runs, slurm_profile, sweep="s", watch=True, interval_s=0.01, report=report)
    assert seen == ["PLANNED", "PLANNED", "QUEUED", "QUEUED", "QUEUED", "DONE"]


# F15: what Slurm remembers is another job, or nothing


def test_f15_accounting_off(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(1)
    fake_slurm.fault(sacct="off")
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert states(sync.status(runs)) == ["QUEUED"]
    fake_slurm.change(purged=True)
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["attempts"], row["action"]) == (2, "submit")


def test_f15_a_sweep_of_last_week_and_its_ids_are_somebody_else_s(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    """The records decide; the job that has the id now is neither believed nor cancelled."""
    runs = done, begun, waiting, cancelled = make_runs(4, steps=6)
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert Rank(root, fake_slurm.jobs()[0]).finish() == 0
    rank = Rank(root, fake_slurm.jobs()[1])
    rank.begin()
    for _ in range(3):
        rank.step()  # committed 2
    week = 7 * 86_400
    for run in runs:
        for path in run.path.glob("attempts/0001/*.json"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps(record | {"time": record["time"] - week}))
    foreign = ("FAILED", "RUNNING", "COMPLETED", "RUNNING")
    for number, state in enumerate(foreign):
        fake_slurm.set(number, name="somebody-else", state=state)
    assert {r["job_state"] for r in sync.status(runs)} == {None}
    assert states(sync.status(runs)) == ["DONE", "LOST", "LOST", "LOST"]
    assert cancel([cancelled]) == [cancelled.run_key]
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [(r["state"], r["attempts"]) for r in rows] == [
        ("DONE", 1), ("QUEUED", 2), ("QUEUED", 2), ("CANCELLED", 1),
    ]  # fmt: skip
    assert [j["state"] for j in fake_slurm.jobs()[:4]] == list(foreign)
    assert simulate(root, fake_slurm) == [0, 0]
    assert begun.starts()[1]["resumed_from"] == 2
    assert all(whole(r) for r in (done, begun, waiting))


def test_f15_scancel_names_the_job_so_that_a_reused_id_is_safe(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch
):
    """The id is given to another between the look and scancel."""
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    look = cancelling.survey

    def reused(*arguments):
        seen = look(*arguments)
        fake_slurm.change(name="somebody-else", state="RUNNING")
        return seen

    monkeypatch.setattr(cancelling, "survey", reused)
    assert cancel([run]) == [run.run_key]
    assert [j["state"] for j in fake_slurm.jobs()] == ["RUNNING"]


# F16: limits


def test_f16_fifty_runs_through_limits_that_change(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    runs = make_runs(50, steps=2)
    limits = iter([{"max_submit": 7}, {"max_submit": 7}, {"max_submit": 3}, {"max_submit": 20}])
    refused, passes, states_seen = [], 0, set()
    while not all(r.result() for r in runs):
        passes += 1
        assert passes < 40
        with contextlib.suppress(StopIteration):
            limit = next(limits)
            fake_slurm.fault(max_array_size=10, **limit)
        tried, accepted = len(fake_slurm.sbatches()), len({j["main"] for j in fake_slurm.jobs()})
        rows = sync.sync(root, runs, slurm_profile, sweep="s")
        states_seen |= set(states(rows))
        queued = sum(j["state"] == "PENDING" for j in fake_slurm.jobs())
        assert 0 < queued <= limit["max_submit"]
        tried = len(fake_slurm.sbatches()) - tried
        refused.append(tried - (len({j["main"] for j in fake_slurm.jobs()}) - accepted))
        assert set(simulate(root, fake_slurm)) == {0}
    assert states_seen <= {"PLANNED", "QUEUED", "DONE"}
    assert states(sync.sync(root, runs, slurm_profile, sweep="s")) == ["DONE"] * 50
    one_writer(runs)
    assert len(fake_slurm.jobs()) == 50  # none lost, none doubled
    assert max(j["index"] for j in fake_slurm.jobs()) < 10
    assert max(refused) <= 4
    assert max(len(r.attempts()) for r in runs) <= 4
    print(f"{passes} passes, refused {refused}")


def test_f16_a_second_sync_at_the_limit_tries_nothing(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    """However many passes ago the limit was met."""
    runs = make_runs(30, steps=2)
    fake_slurm.fault(max_array_size=10, max_submit=7)
    for _ in range(3):
        sync.sync(root, runs, slurm_profile, sweep="s")
        tried, before = len(fake_slurm.sbatches()), tree(root)
        sync.sync(root, runs, slurm_profile, sweep="s")
        assert len(fake_slurm.sbatches()) == tried
        assert tree(root) == before
        assert simulate(root, fake_slurm) == [0] * 7


def test_f16_one_sync_fills_what_the_limit_allows(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(7)
    fake_slurm.fault(max_array_size=3, max_submit=5)
    rows = sync.submit(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["QUEUED"] * 5 + ["PLANNED"] * 2  # arrays of 3, 1 and 1
    assert [j["index"] for j in fake_slurm.jobs()] == [0, 1, 2, 0, 1]
    assert fake_slurm.finish() == [0] * 5
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["DONE"] * 5 + ["QUEUED"] * 2
    assert fake_slurm.finish() == [0, 0]
    one_writer(runs)
