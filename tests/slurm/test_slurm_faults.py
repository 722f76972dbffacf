"""Faults on a real Slurm (slurm/devcluster): preemption, wall time, dead nodes, dead daemons.

``--dependency=singleton`` is not needed: two jobs of one run may be alive at once, and the second
waits for the first because of its claim (``test_runs_outlive_a_controller_that_is_down``). That a
requeue touches only one element of an array is seen in ``test_slurm_devcluster.py``.
"""

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from scaling.rundir import RunDir
from scaling.slurm.cancel import cancel
from scaling.slurm.logs import log_files, tail
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.submission import SubmissionError, Unreachable
from scaling.slurm.sync import status, submit, sync
from tests.slurm.chaos import Devcluster, at, fork, is_sbatch

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def cluster(devcluster, root, monkeypatch):
    """The devcluster, made whole again after each test: they share it."""
    monkeypatch.setenv("SLURM_CONF", devcluster["slurm_conf"])
    cluster = Devcluster(devcluster["slurm_conf"])
    yield cluster
    monkeypatch.setenv("SLURM_CONF", devcluster["slurm_conf"])
    cluster.heal([root])


@pytest.fixture
def profile(cluster) -> ClusterProfile:
    return ClusterProfile(
        name="faults", partition="main", settle_s=1, quarantine_s=30, signal_lead_s=30,
        shape=Shape(time_min=10),
    )  # fmt: skip


@pytest.fixture
def quick_conf(cluster, tmp_path, monkeypatch):
    """For clients of a controller that is down: they give up after 1 s instead of 9 s."""
    conf = tmp_path / "quick.conf"
    conf.write_text((cluster.home / "etc" / "slurm.conf").read_text() + "MessageTimeout=2\n")
    return lambda: monkeypatch.setenv("SLURM_CONF", str(conf))


def finish(root, runs, profile, sweep="s") -> tuple[list[dict], set[str]]:
    """Sync to the end; the last rows, and every state seen on the way."""
    seen: set[str] = set()
    rows = sync(
        root, runs, profile, sweep=sweep, watch=True, interval_s=0.5,
        report=lambda rows: seen.update(r["state"] for r in rows),
    )  # fmt: skip
    return rows, seen


def fast_from_now_on(root: Path) -> None:
    """Starts after this one take no time for a step."""
    how = json.loads((root / "standin.json").read_text())
    (root / "standin.json").write_text(json.dumps(how | {"step_s": 0.0}))


def written(run: RunDir, generation: int) -> list[int]:
    """Steps that a generation computed."""
    lines = run.metrics_path(generation).read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if row["kind"] == "train"]


def whole(run: RunDir) -> bool:
    return [r["step"] for r in run.curve("train")] == list(range(1, run.spec().steps + 1))


def test_preempted_runs_go_on(root, make_runs, cluster, profile, until, tmp_path, monkeypatch):
    low = profile.model_copy(update={"partition": "low"})
    runs = hears, deaf = make_runs(2, steps=500, step_s=0.1, checkpoint_every=7)
    submit(root, [hears], low, sweep="s")
    # Ranks that hear no SIGTERM, as in a long call into C: they are killed after the grace time.
    standin = os.environ["PYTHONPATH"]
    (tmp_path / "sitecustomize.py").write_text(
        "import runpy, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        f"runpy.run_path({standin + '/sitecustomize.py'!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{standin}")
    submit(root, [deaf], low, sweep="s")
    monkeypatch.setenv("PYTHONPATH", standin)
    until(lambda: all(r["step"] >= 12 for r in status(runs)))
    fast_from_now_on(root)
    wanted = ("--partition=main", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.command("sbatch", *wanted, "--wrap=sleep 1")
    rows, seen = finish(root, runs, low)
    assert seen <= {"QUEUED", "RUNNING", "DONE"}
    assert [(r["state"], r["attempts"]) for r in rows] == [("DONE", 1)] * 2
    assert [[s["job"]["restart"] for s in r.starts()] for r in runs] == [[0, 1]] * 2
    lost = [written(r, 1)[-1] - r.starts()[1]["resumed_from"] for r in runs]
    assert lost[0] == 0
    assert 0 <= lost[1] <= 7
    assert all(whole(r) for r in runs)
    # One that hears asks to be requeued before Slurm does it.
    jobs = [r["job_id"] for r in rows]
    expected = {jobs[0]: ["REQUEUED", "COMPLETED"], jobs[1]: ["PREEMPTED", "COMPLETED"]}
    until(lambda: words(cluster.accounts(runs)) == expected)


def test_a_run_goes_on_in_its_next_slice(root, make_runs, cluster, profile, until):
    # Slurm looks every 30 s for jobs that need a signal in the next 30: the signal comes 5 to 35 s
    # after the start, never while the job still starts, and long before the end of the slice.
    profile = profile.model_copy(update={"signal_lead_s": 85, "shape": Shape(nodes=2, time_min=2)})
    (run,) = make_runs(1, steps=900, step_s=0.1)
    submit(root, [run], profile, sweep="s")
    until(lambda: len(run.generations()) == 2 and written(run, 2), 70)
    fast_from_now_on(root)
    # The next slice ends early: the same signal, sent by hand.
    cluster.command("scancel", "--signal=USR2", status([run])[0]["job_id"])
    (row,), seen = finish(root, [run], profile)
    assert seen <= {"QUEUED", "RUNNING", "DONE"}
    assert (row["state"], row["attempts"]) == ("DONE", 1)
    starts = run.starts()
    assert [s["job"]["restart"] for s in starts] == [0, 1, 2]
    assert {s["job"]["job_id"] for s in starts} == {row["job_id"]}
    assert [written(run, g)[-1] for g in (1, 2)] == [s["resumed_from"] for s in starts[1:]]
    assert 0 < starts[1]["resumed_from"] < starts[2]["resumed_from"]
    assert whole(run)
    ends = {row["job_id"]: ["REQUEUED", "REQUEUED", "COMPLETED"]}
    until(lambda: words(cluster.accounts([run])) == ends)


def test_a_process_on_a_node_that_was_given_up_writes_no_more(
    root, make_runs, cluster, profile, until
):
    (run,) = make_runs(1, steps=900, step_s=0.1, checkpoint_every=7)
    submit(root, [run], profile, sweep="s")
    until(lambda: status([run])[0]["step"] >= 12)
    claim = run.attempts()[0].claim
    (node,) = claim["nodes"]
    zombie = Path(f"/proc/{_rank(claim['job_id'])}")
    fast_from_now_on(root)
    with cluster.without(f"slurmd-{node}"):
        # Without its slurmd the node cannot be told to end the job: the old process lives on.
        cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        until(lambda: len(run.generations()) == 2)
        until(lambda: not zombie.exists(), 10)
    (row,), seen = finish(root, [run], profile)
    assert seen <= {"QUEUED", "RUNNING", "DONE"}
    assert (row["state"], row["attempts"], row["job_id"]) == ("DONE", 1, claim["job_id"])
    first, second = run.starts()
    assert [s["job"]["restart"] for s in (first, second)] == [0, 1]
    assert second["job"]["nodes"] != first["job"]["nodes"] == [node]
    assert "generation 2 has started; generation 1 stops" in tail(log_files(run)[1], 50)
    # It went on meanwhile, and what it still committed counts; later steps are computed again.
    lost = written(run, 1)[-1] - second["resumed_from"]
    assert 0 <= lost <= 7
    assert second["resumed_from"] > 35
    assert run.result()["generation"] == 2
    assert whole(run)
    job = row["job_id"]
    until(lambda: cluster.accounts([run])[job][-1]["State"] == "COMPLETED")
    accounts = cluster.accounts([run])[job]
    assert [s["State"] for s in accounts] == ["NODE_FAIL", "COMPLETED"]
    assert accounts[1]["NodeList"] != node


def _rank(job_id: str) -> int:
    """Process of the only rank of a job, on whichever node of this host."""
    main, _, index = job_id.partition("_")
    # The batch script has no step.
    wanted = {f"SLURM_ARRAY_JOB_ID={main}", f"SLURM_ARRAY_TASK_ID={index}", "SLURM_STEP_ID=0"}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if wanted <= set(Path(f"/proc/{pid}/environ").read_text().split("\0")):
                return int(pid)
    raise AssertionError("no such process")


@pytest.mark.parametrize("how", ["hangs", "is down"])
def test_a_controller_lost_between_intent_and_sbatch(
    root, make_runs, cluster, profile, until, quick_conf, how
):
    runs = make_runs(3)
    pid = cluster.pid("slurmctld")

    def lose():
        if how == "hangs":  # what it is sent waits in its socket: accepted late
            os.kill(pid, signal.SIGSTOP)
        else:
            cluster.stop("slurmctld")

    def login():
        at("subprocess.Popen", is_sbatch, lose)
        with contextlib.suppress(Unreachable):
            submit(root, runs, profile, sweep="s")

    quick_conf()
    child = fork(target=login)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert [[a.submit for a in r.attempts()] for r in runs] == [[None]] * 3
    rows = status(runs)
    if how == "hangs":
        assert {(r["state"], bool(r["stale"])) for r in rows} == {("QUEUED", True)}
        os.kill(pid, signal.SIGCONT)
    else:  # sbatch was certain, so they are as if nobody had tried
        assert {(r["state"], r["cause"]) for r in rows} == {("PLANNED", "unreachable")}
        cluster.start("slurmctld")
    rows, seen = finish(root, runs, profile)
    attempts = 1 if how == "hangs" else 2
    assert [(r["state"], r["attempts"]) for r in rows] == [("DONE", attempts)] * 3
    assert "FAILED" not in seen
    assert [r.generations() for r in runs] == [[1]] * 3
    expected = {r["job_id"]: ["COMPLETED"] for r in rows}
    until(lambda: words(cluster.accounts(runs)) == expected)


def words(accounts: dict[str, list[dict]]) -> dict[str, list[str]]:
    """States in which the starts of each job ended."""
    return {job: [start["State"] for start in starts] for job, starts in accounts.items()}


def test_runs_outlive_a_controller_that_is_down(
    root, make_runs, cluster, profile, until, quick_conf, monkeypatch
):
    (slow,) = make_runs(1, steps=210)
    short, new = make_runs(2, steps=60, step_s=0.1)
    runs = [slow, short]
    submit(root, runs, profile, sweep="s")
    until(lambda: all(r["step"] >= 5 for r in status(runs)))
    conf = os.environ["SLURM_CONF"]
    with cluster.without("slurmctld"):
        quick_conf()
        for rows in (status(runs), sync(root, runs, profile, sweep="s")):
            assert {r["state"] for r in rows} == {"RUNNING"}
            assert all("Unable to contact" in r["stale"] for r in rows)
        assert [r["action"] for r in rows] == [None, None]
        with pytest.raises(Unreachable):
            submit(root, [new], profile, sweep="s")
        assert new.attempts() == []
        # The record is written, but Slurm cannot be told: the job goes on.
        with pytest.raises(SubmissionError, match="may still run"):
            cancel([slow])
        until(lambda: short.result() is not None)
        assert status([short])[0]["state"] == "DONE"
        monkeypatch.setenv("SLURM_CONF", conf)
    # Taken up again while its old job is alive: two jobs of one run, of which one trains.
    (row,) = submit(root, [slow], profile, sweep="s", retry_failed=True)
    assert (row["action"], row["attempts"]) == ("submit", 2)
    second = row["job_id"]
    waits = "waiting for the job of an older attempt to end"
    log = root / "sweeps" / "s" / "chunks" / slow.attempts()[1].intent["token"]
    until(lambda: (f := log / f"{second}_0_log.err").exists() and waits in f.read_text())
    rows, seen = finish(root, [*runs, new], profile)
    assert [(r["state"], r["attempts"]) for r in rows] == [("DONE", 2), ("DONE", 1), ("DONE", 1)]
    assert "FAILED" not in seen
    assert [r.generations() for r in (slow, short, new)] == [[1]] * 3
    assert slow.starts()[0]["attempt"] == 1
    assert all(whole(r) for r in (slow, short, new))
    until(lambda: words(cluster.accounts([slow])).get(second) == ["FAILED"])
    assert cluster.accounts([slow])[second][0]["ExitCode"] == "93:0"
    assert words(cluster.accounts([short, new]))[rows[2]["job_id"]] == ["COMPLETED"]


@pytest.fixture
def forgetful(cluster):
    """A controller that forgets a job some seconds after its end (MinJobAge), without accounts."""
    conf = cluster.home / "etc" / "slurm.conf"
    kept = conf.read_text()
    cluster.stop("slurmdbd")
    cluster.stop("slurmctld")
    conf.write_text(kept + "MinJobAge=2\n")
    try:
        cluster.start("slurmctld")
        yield
    finally:
        conf.write_text(kept)
        cluster.stop("slurmctld")
        cluster.start("slurmctld")


def test_a_job_that_everybody_forgot_is_not_doubled(
    root, make_runs, cluster, profile, until, tmp_path, monkeypatch, forgetful
):
    runs = done, asked, lost = make_runs(3, steps=60, step_s=0.1)
    submit(root, runs, profile, sweep="s")
    until(lambda: all(r["step"] >= 12 for r in status(runs)))
    for row in status([asked, lost]):
        cluster.command("scancel", "--signal=KILL", f"{row['job_id']}.0")
    fast_from_now_on(root)
    name = done.attempts()[0].intent["token"]
    squeue = ("squeue", "--noheader", "--states=all", f"--name={name}")
    until(lambda: not cluster.command(*squeue))
    rows = status(runs)
    assert [r["state"] for r in rows] == ["DONE", "RUNNING", "RUNNING"]
    assert [bool(r["stale"]) for r in rows] == [False, True, True]
    for drive in (submit, sync):
        assert [r["action"] for r in drive(root, runs, profile, sweep="s")] == [None] * 3
    cluster.start("slurmdbd")  # which is told everything by and by
    # A cluster that keeps no accounts answers: such a job is lost, and its run goes on.
    conf = tmp_path / "no_accounts.conf"
    kept, word = os.environ["SLURM_CONF"], "accounting_storage/"
    conf.write_text(Path(kept).read_text().replace(f"{word}slurmdbd", f"{word}none"))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    (row,), _ = finish(root, [lost], profile)
    assert (row["state"], row["attempts"]) == ("DONE", 2)
    monkeypatch.setenv("SLURM_CONF", kept)
    # And what the accounts know, once they are back, is believed.
    job = status([asked])[0]["job_id"]
    until(lambda: words(cluster.accounts([asked])).get(job) == ["FAILED"])
    (row,), _ = finish(root, [asked], profile)
    assert (row["state"], row["attempts"]) == ("DONE", 2)
    ends = [r.attempts()[0].end["class"] for r in runs]
    assert ends == ["done", "crashed", "lost"]
    assert [r.generations() for r in runs] == [[1], [1, 2], [1, 2]]
    assert all(r.starts()[1]["resumed_from"] >= 10 for r in (asked, lost))
    assert all(whole(r) for r in runs)


def test_two_logins_submit_at_once(root, make_runs, cluster, profile, until):
    # From both ends, so that each wins some; more than one array.
    runs = make_runs(14)
    start = multiprocessing.get_context("fork").Barrier(2)

    def login(order):
        start.wait()
        submit(root, order, profile, sweep="s")

    logins = [fork(target=login, args=(order,)) for order in (runs, runs[::-1])]
    for child in logins:
        child.start()
    for child in logins:
        child.join(60)
    assert [child.exitcode for child in logins] == [0, 0]
    won = [{r.attempts()[0].intent["token"] for r in half} for half in (runs[:1], runs[-1:])]
    assert won[0] != won[1]
    rows, _ = finish(root, runs, profile)
    assert [(r["state"], r["attempts"]) for r in rows] == [("DONE", 1)] * 14
    assert [r.generations() for r in runs] == [[1]] * 14
    expected = {r["job_id"]: ["COMPLETED"] for r in rows}
    assert len(expected) == 14
    until(lambda: words(cluster.accounts(runs)) == expected)
