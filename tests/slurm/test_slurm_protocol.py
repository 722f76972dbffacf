"""The submission protocol against a file-backed Slurm: crashes, lost answers, limits, hostility."""

import json
import os
import time

import pytest
import submitit

from scaling.config import ConfigError
from scaling.rundir import RunDir
from scaling.slurm import cancel as cancelling
from scaling.slurm import job as job_module
from scaling.slurm import submission, sync
from scaling.slurm.cancel import cancel
from scaling.slurm.failures import classify
from scaling.slurm.job import EXIT_SUPERSEDED
from scaling.slurm.profile import ClusterProfile, Shape, ShapeRule, safe_root
from scaling.slurm.submission import SubmissionError


def states(rows):
    return [r["state"] for r in rows]


def finish(fake_slurm):
    """Run every job that is pending, as the cluster would in time."""
    codes = []
    for number, job in enumerate(fake_slurm.jobs()):
        if job["state"] == "PENDING":
            codes.append(fake_slurm.run(number).returncode)
    return codes


def one_writer(runs):
    """Every run is done, and exactly one start of it ever wrote."""
    assert [r.result()["status"] for r in runs] == ["done"] * len(runs)
    assert [r.generations() for r in runs] == [[1]] * len(runs)


def test_submit_twice_is_one_array(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(2)
    rows = sync.submit(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["QUEUED"] * 2
    assert [r["job_id"] for r in rows] == ["101_0", "101_1"]
    assert {r["action"] for r in sync.submit(root, runs, slurm_profile, sweep="s")} == {None}
    assert finish(fake_slurm) == [0, 0]
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["DONE"] * 2
    assert [(r["step"], r["attempts"], r["job_id"]) for r in rows] == [
        (20, 1, "101_0"), (20, 1, "101_1"),
    ]  # fmt: skip
    one_writer(runs)
    assert len(fake_slurm.jobs()) == 2
    assert not list(root.rglob("*result.pkl"))


def test_dry_run_touches_nothing(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(2)
    before = sorted(root.rglob("*"))
    configs = [run.spec() for run in runs]
    seen = sync.preview(root, configs, slurm_profile, sweep="s")
    assert [(r["state"], r["action"]) for r in seen.rows] == [("PLANNED", "submit")] * 2
    assert [n for n, _ in seen.arrays] == [2]
    assert "#SBATCH --array=0-1%2" in seen.arrays[0][1]
    assert sorted(root.rglob("*")) == before
    assert fake_slurm.jobs() == []


def die(*_, **__):
    os._exit(9)


def killed_login(action, *points):
    """Run ``action`` in a process that dies at a point, as by kill -9: no cleanup runs."""
    child = os.fork()
    if child == 0:
        for owner, name, replacement in points:
            setattr(owner, name, replacement)
        action()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def record_then_die(name, at):
    """A ``RunDir.record`` that dies before writing the ``at``-th record of this name."""
    original, seen = RunDir.record, []

    def record(self, number, what, rec):
        if what == name:
            seen.append(number)
            if len(seen) == at:
                os._exit(9)
        return original(self, number, what, rec)

    return RunDir, "record", record


@pytest.mark.parametrize(
    ("name", "at", "jobs", "known"),
    [
        ("intent", 1, 0, 0),  # before any intent: nothing happened
        ("intent", 2, 0, 0),  # one run has an intent, nobody submitted it
        ("chunk", 1, 0, 0),  # all intents, no sbatch
        ("submit", 1, 2, 0),  # sbatch accepted, no answer recorded
        ("submit", 2, 2, 1),
    ],
)
def test_login_killed_during_submit(
    root, make_runs, fake_slurm, slurm_profile, name, at, jobs, known
):
    runs = make_runs(2)
    point = record_then_die(name, at) if name != "chunk" else (submission, "_sbatch", die)
    killed_login(lambda: sync.submit(root, runs, slurm_profile, sweep="s"), point)
    assert len(fake_slurm.jobs()) == jobs
    assert sum(a.submit is not None for r in runs for a in r.attempts()) == known
    sync.sync(root, runs, slurm_profile, sweep="s")  # what is in quarantine stays there
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    time.sleep(0.01)
    sync.sync(root, runs, waited, sweep="s")
    sync.sync(root, runs, waited, sweep="s")
    finish(fake_slurm)
    assert states(sync.sync(root, runs, waited, sweep="s")) == ["DONE"] * 2
    one_writer(runs)
    assert len(fake_slurm.jobs()) == 2


def test_login_killed_before_submitit_brought_the_arguments(
    root, make_runs, fake_slurm, slurm_profile
):
    runs = make_runs(2)
    point = (submitit.core.utils.JobPaths, "move_temporary_file", die)
    killed_login(lambda: sync.submit(root, runs, slurm_profile, sweep="s"), point)
    assert states(sync.sync(root, runs, slurm_profile, sweep="s")) == ["QUEUED"] * 2
    begun = time.monotonic()
    assert finish(fake_slurm) == [0, 0]
    assert time.monotonic() - begun < 30  # submitit alone would wait a minute for each, and fail
    one_writer(runs)


@pytest.mark.parametrize("accepted", ["now", "late", "never"])
def test_sbatch_timed_out(root, make_runs, fake_slurm, slurm_profile, accepted):
    runs = make_runs(1)
    fake_slurm.fault(sbatch="timeout" if accepted == "never" else "timeout_accepted")
    (row,) = sync.submit(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["job_id"]) == ("QUEUED", None)
    fake_slurm.fault()
    if accepted == "late":
        hidden = fake_slurm.jobs()
        (fake_slurm.home / "jobs.json").unlink()
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["action"]) == ("QUEUED", None)
    if accepted == "now":
        assert row["job_id"] == "101_0"
        finish(fake_slurm)
        one_writer(runs)
        return
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    (row,) = sync.sync(root, runs, waited, sweep="s")
    assert (row["state"], row["action"], row["attempts"]) == ("QUEUED", "submit", 2)
    if accepted == "late":  # the first submission was accepted after all, minutes later
        jobs = fake_slurm.jobs()
        hidden[0]["main"] = 500
        (fake_slurm.home / "jobs.json").write_text(json.dumps([*jobs, *hidden]))
        begun = time.monotonic()
        done = fake_slurm.run(1)
        assert done.returncode == EXIT_SUPERSEDED
        assert "superseded: attempt 2 is newer" in done.stderr
        assert time.monotonic() - begun < 5
        assert runs[0].generations() == []
        assert fake_slurm.run(0).returncode == 0
    else:
        finish(fake_slurm)
    one_writer(runs)


@pytest.mark.parametrize(
    "faults",
    [
        {"squeue": "down"},
        {"squeue": "garbage"},
        {"squeue": "truncated"},
        {"squeue": "hang"},
        {"sacct": "down"},
        {"sacct": "garbage"},
        {"squeue": "down", "sacct": "down", "scontrol": "down"},
    ],
)
def test_controller_down_changes_nothing(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch, faults
):
    monkeypatch.setattr("scaling.slurm.scheduler.command.__kwdefaults__", {"timeout_s": 1.0})
    runs = make_runs(3)
    sync.submit(root, runs[:2], slurm_profile, sweep="s")
    if "sacct" in faults:
        fake_slurm.change(purged=True)  # squeue has forgotten, sacct would know
    fake_slurm.fault(**faults)
    before = sorted(root.rglob("*"))
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["QUEUED", "QUEUED", "PLANNED"]
    assert all(r["stale"] for r in rows[:2])
    assert {r["action"] for r in rows} == {None}
    assert sorted(root.rglob("*")) == before
    fake_slurm.fault()
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["QUEUED"] * 3
    assert rows[2]["action"] == "submit"


def test_accounting_off(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(1)
    fake_slurm.fault(sacct="off")
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert states(sync.status(runs)) == ["QUEUED"]
    fake_slurm.change(purged=True)
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["attempts"], row["action"]) == (2, "submit")


def test_a_reused_job_id_is_not_ours(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(1)
    sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.change(name="somebody-else", state="COMPLETED")
    (row,) = sync.status(runs)
    assert row["job_state"] is None


def test_limits_and_array_size(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(7)
    fake_slurm.fault(max_array_size=3, max_submit=5)
    rows = sync.submit(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["QUEUED"] * 5 + ["PLANNED"] * 2  # arrays of 3, 1 and 1
    assert [j["index"] for j in fake_slurm.jobs()] == [0, 1, 2, 0, 1]
    tried = len((fake_slurm.home / "sbatch.log").read_text().split("---"))
    for _ in range(3):  # the limit is known: nothing is tried, no attempt is used up
        rows = sync.sync(root, runs, slurm_profile, sweep="s")
        assert states(rows) == ["QUEUED"] * 5 + ["PLANNED"] * 2
    assert len((fake_slurm.home / "sbatch.log").read_text().split("---")) == tried
    assert finish(fake_slurm) == [0] * 5
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["DONE"] * 5 + ["QUEUED"] * 2
    assert finish(fake_slurm) == [0, 0]
    one_writer(runs)


def test_a_rejected_submission_is_an_error_and_can_be_repeated(
    root, make_runs, fake_slurm, slurm_profile
):
    runs = make_runs(1)
    fake_slurm.fault(sbatch="rejected")
    with pytest.raises(SubmissionError, match="Invalid partition"):
        sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.fault()
    assert sync.submit(root, runs, slurm_profile, sweep="s")[0]["action"] == "submit"


def test_two_submitters_make_one_attempt(root, make_runs, fake_slurm, slurm_profile, monkeypatch):
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


def test_many_logins_at_once(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(4)
    children = []
    for n in range(5):
        if (child := os.fork()) == 0:
            # overlapping sweeps: each lacks one of the runs, or none
            part = [r for i, r in enumerate(runs) if i != n]
            sync.submit(root, part, slurm_profile, sweep=f"s{n}")
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * 5
    assert len(fake_slurm.jobs()) == 4
    assert [len(r.attempts()) for r in runs] == [1] * 4
    finish(fake_slurm)
    one_writer(runs)


def test_a_watching_sync_outlives_the_controller(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(1)
    fake_slurm.fault(scontrol="down")
    with pytest.raises(SubmissionError, match="Unable to contact"):
        sync.sync(root, runs, slurm_profile, sweep="s")
    seen = []

    def report(rows):
        seen.append(rows[0]["state"])
        if len(seen) == 2:
            fake_slurm.fault()
        elif len(seen) == 3:
            finish(fake_slurm)

    sync.sync(root, runs, slurm_profile, sweep="s", watch=True, interval_s=0.01, report=report)
    assert seen == ["PLANNED", "PLANNED", "QUEUED", "DONE"]


def test_what_slurm_said_of_an_end_is_kept(root, make_runs, fake_slurm, slurm_profile):
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.change(state="NODE_FAIL")
    (row,) = sync.status([run])
    assert (row["state"], row["cause"]) == ("FAILED", "node_fail")
    sync.sync(root, [run], slurm_profile, sweep="s")
    assert run.attempts()[0].end["class"] == "node_fail"
    assert run.attempts()[1].end is None


def test_a_job_waits_for_a_live_predecessor(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch
):
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    mine = {"executor": "slurm", "job_id": "101", "restart": 0}
    assert job_module.claim(run, 1, mine) is None
    assert job_module.claim(run, 1, mine) is None  # a requeue of the same job
    assert "belongs to job 101" in job_module.claim(run, 1, {**mine, "job_id": "102"})
    fake_slurm.change(state="RUNNING")
    run.record(2, "intent", {**run.attempts()[0].intent, "token": "s-other"})
    assert "attempt 2 is newer" in job_module.claim(run, 1, mine)
    looks = []

    class Clock:
        @staticmethod
        def sleep(seconds):
            looks.append(seconds)
            if len(looks) == 1:
                fake_slurm.fault(squeue="down")  # nobody can tell: wait on
            elif len(looks) == 2:
                fake_slurm.fault()
            else:
                fake_slurm.change(state="COMPLETED")

        time = staticmethod(time.time)

    monkeypatch.setattr(job_module, "time", Clock)
    assert job_module.claim(run, 2, {**mine, "job_id": "200"}) is None
    assert len(looks) == 3


def test_cancel_reaches_queued_and_unsubmitted_runs(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(3)
    sync.submit(root, runs[:2], slurm_profile, sweep="s")
    assert len(cancel(runs)) == 3
    assert [j["state"] for j in fake_slurm.jobs()] == ["CANCELLED by 0"] * 2
    assert cancel(runs) == []
    assert states(sync.sync(root, runs, slurm_profile, sweep="s")) == ["CANCELLED"] * 3
    assert fake_slurm.run(0).returncode == EXIT_SUPERSEDED  # even if Slurm starts it all the same
    assert runs[0].generations() == []
    fake_slurm.change(state="CANCELLED by 0")
    rows = sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
    assert [(r["state"], r["attempts"]) for r in rows] == [("QUEUED", 2)] * 3


def test_cancel_without_a_controller_says_so(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(1)
    sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.fault(squeue="down")
    with pytest.raises(SubmissionError, match="may still run"):
        cancel(runs)
    fake_slurm.fault()
    assert cancel(runs) == []
    assert fake_slurm.jobs()[0]["state"] == "CANCELLED by 0"


def test_cancel_while_somebody_submits_again(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch
):
    runs = make_runs(2)
    sync.submit(root, runs, slurm_profile, sweep="s")
    look = cancelling.survey

    def raced(*arguments):
        seen = look(*arguments)
        intent = runs[0].attempts()[0].intent
        runs[0].record(2, "intent", {**intent, "token": "s-other"})
        return seen

    monkeypatch.setattr(cancelling, "survey", raced)
    with pytest.raises(SubmissionError, match="1 of them got another attempt meanwhile"):
        cancel(runs)
    assert [run.attempts()[-1].cancel is not None for run in runs] == [True, True]
    assert [j["state"] for j in fake_slurm.jobs()] == ["CANCELLED by 0"] * 2


def test_damaged_records_are_reported_and_left_alone(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(2)
    (runs[0].path / "attempts/0001").mkdir(parents=True)
    (runs[0].path / "attempts/0001/intent.json").write_text('{"token": "s')
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (rows[0]["state"], rows[0]["cause"]) == ("FAILED", "damaged")
    assert "intent.json" in rows[0]["evidence"]
    assert rows[1]["action"] == "submit"
    assert sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)[0]["action"] is None


def test_shapes_make_arrays_of_their_own(root, make_runs, fake_slurm):
    profile = ClusterProfile(
        name="shapes",
        partition="gpu",
        shape=Shape(time_min=60, cpus_per_task=5, mem_gb=20.5),
        larger=(ShapeRule(batch_size_from=8, nodes=2, tasks_per_node=4, gpus_per_node=4),),
        setup=("module load cuda", "echo 'a; b' | cat"),
    )
    runs = make_runs(2)
    sync.submit(root, runs, profile, sweep="s")
    script = (fake_slurm.home / "sbatch.log").read_text()
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --partition=gpu",
        "#SBATCH --mem=20992M",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@300",
        "#SBATCH --array=0-1%2",
        "module load cuda",
        "echo 'a; b' | cat",
    ):
        assert line in script.splitlines()
    assert "--kill-on-bad-exit=1 --cpus-per-task=5" in script
    three = profile.model_copy(update={"shape": Shape(tasks_per_node=3), "larger": ()})
    with pytest.raises(ConfigError, match="not divisible by the 3 ranks"):
        sync.submit(root, runs, three, sweep="s")


HOSTILE = [
    "a\nb",
    "a'b",
    'a"b',
    "$(touch canary)",
    "a;b",
    "%j",
    "../x",
    "-rf",
    "é",
    "",
    "a b",
    "`x`",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_never_reach_a_script(
    root, make_runs, fake_slurm, slurm_profile, value, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fields = ["name", "partition", "account", "qos", "constraint", "exclude"]
    for field in fields:
        with pytest.raises(ConfigError, match=field):
            ClusterProfile.parse({"name": "x", field: value}, "profile")
    runs = make_runs(1)
    with pytest.raises(SubmissionError, match="sweep"):
        sync.submit(root, runs, slurm_profile, sweep=value)
    if value not in ("", "../x", "-rf"):  # these are ordinary in a path below a folder
        with pytest.raises(ConfigError, match="root folder"):
            safe_root(tmp_path / value)
    for line in ("a\nb", "a\x00", ""):
        with pytest.raises(ConfigError, match="setup"):
            ClusterProfile.parse({"name": "x", "setup": [line]}, "profile")
    assert fake_slurm.jobs() == []
    assert not list(tmp_path.rglob("canary"))


def test_failure_classes():
    from scaling.train.ranks import PeerError  # brings torch

    class OutOfMemoryError(RuntimeError):
        pass

    class DistBackendError(RuntimeError):
        pass

    cases = {
        "gpu_oom": OutOfMemoryError("CUDA out of memory"),
        "host_oom": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        "disk_full": OSError(28, "No space left on device"),
        "comm": RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
        "error": RuntimeError("shape mismatch"),
    }
    for cause, error in cases.items():
        assert classify(error) == cause
    assert classify(DistBackendError("x")) == "comm"
    assert classify(PeerError("rank 0 could not commit")) == "comm"
    outer = ValueError("wrapped")
    outer.__cause__ = OSError(122, "Disk quota exceeded")
    assert classify(outer) == "disk_full"
