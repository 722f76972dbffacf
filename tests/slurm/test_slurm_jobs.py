"""Fault scenarios of jobs (F9 to F13): preemption, wall time, dead nodes, zombies, bad nodes.

Real submitit, the real driver and job processes against a file-backed Slurm; training is the
stand-in. Through real training: ``test_slurm_ends.py``.
"""

import os
import signal

import pytest
from scenario import Rank, Waits, how, log, states, step, whole, written

from scaling.slurm import job as job_module
from scaling.slurm import sync
from scaling.slurm.job import EXIT_SUPERSEDED
from scaling.slurm.logs import log_files

# F9: preemption


@pytest.mark.parametrize("slurm", ["leaves it to the job", "requeues it"])
def test_f09_preempted_with_grace_loses_no_step(
    root, make_runs, fake_slurm, slurm_profile, until, slurm
):
    (run,) = make_runs(1, step_s=0.05)
    sync.submit(root, [run], slurm_profile, sweep="s")
    process = fake_slurm.start(0)
    until(lambda: step(run) >= 7, step=0.02)
    if slurm == "requeues it":
        fake_slurm.set(0, state="COMPLETING")
    os.kill(fake_slurm.rank(0), signal.SIGTERM)
    assert fake_slurm.end(0, process) == 0
    if slurm == "requeues it":
        fake_slurm.requeue(0)
    assert (fake_slurm.jobs()[0]["state"], fake_slurm.jobs()[0]["restart"]) == ("PENDING", 1)
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["action"], row["attempts"]) == ("QUEUED", None, 1)
    how(root)
    assert fake_slurm.run(0) == 0
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["attempts"]) == ("DONE", 1)
    assert run.starts()[1]["resumed_from"] == written(run, 1)
    assert [s["job"]["restart"] for s in run.starts()] == [0, 1]
    assert whole(run)


def test_f09_killed_without_grace_loses_less_than_a_checkpoint_interval(
    root, make_runs, fake_slurm, slurm_profile, until
):
    (run,) = make_runs(1, step_s=0.05)
    sync.submit(root, [run], slurm_profile, sweep="s")
    process = fake_slurm.start(0)
    until(lambda: step(run) >= 7, step=0.02)
    os.kill(fake_slurm.rank(0), signal.SIGKILL)
    fake_slurm.requeue(0)
    fake_slurm.end(0, process)
    assert states(sync.sync(root, [run], slurm_profile, sweep="s")) == ["QUEUED"]
    how(root)
    assert fake_slurm.run(0) == 0
    assert 0 <= written(run, 1) - run.starts()[1]["resumed_from"] < 5
    assert len(run.attempts()) == 1
    assert whole(run)


def test_f09_preemptions_use_no_retry_up(root, make_runs, fake_slurm, slurm_profile, ranks):
    """Of a cluster that cancels what it preempts: each time another attempt."""
    (run,) = make_runs(1, steps=20)
    for number in range(10):
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
        assert (row["action"], row["attempts"]) == ("submit", number + 1)
        rank = Rank(root, fake_slurm.jobs()[number])
        rank.begin()
        rank.step()
        rank.step()
        fake_slurm.set(number, state="PREEMPTED")
    assert [a.end["class"] for a in run.attempts()[:-1]] == ["preempted"] * 9
    assert states(sync.sync(root, [run], slurm_profile, sweep="s")) == ["DONE"]


# F10: the wall time


def test_f10_many_slices_then_slices_too_short_for_a_step(
    root, make_runs, fake_slurm, slurm_profile
):
    (run,) = make_runs(1, steps=60, signal="SIGUSR2", signal_after=3)
    sync.submit(root, [run], slurm_profile, sweep="s")
    for number in range(4):
        assert fake_slurm.run(0) == 0
        assert (fake_slurm.jobs()[0]["state"], fake_slurm.jobs()[0]["restart"]) == (
            "PENDING", number + 1,
        )  # fmt: skip
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
        assert (row["state"], row["attempts"], row["step"]) == ("QUEUED", 1, 3 * number + 3)
    how(root, signal="SIGUSR2", signal_after=0)
    assert [fake_slurm.run(0) for _ in range(4)] == [0, 0, 0, 1]
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["cause"], row["over"]) == ("FAILED", "no_progress", True)
    assert "3 starts in a row from step 12" in row["evidence"]
    assert "time_min" in row["evidence"]
    how(root)
    (row,) = sync.submit(root, [run], slurm_profile, sweep="s", retry_failed=True)
    assert (row["action"], row["attempts"]) == ("submit", 2)
    assert fake_slurm.run(1) == 0
    assert whole(run)


def test_f10_slices_with_progress_go_on_without_a_limit(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    (run,) = make_runs(1, steps=41)
    sync.submit(root, [run], slurm_profile, sweep="s")
    for number in range(20):
        fake_slurm.set(0, state="RUNNING")
        rank = Rank(root, fake_slurm.jobs()[0])
        rank.begin()
        rank.step()
        rank.step()
        rank.stop.by = "SIGUSR2"
        rank.step()
        assert rank.status == 0
        assert fake_slurm.jobs()[0]["restart"] == number + 1
    fake_slurm.set(0, state="RUNNING")
    assert Rank(root, fake_slurm.jobs()[0]).finish() == 0
    assert len(run.attempts()) == 1
    assert len(run.starts()) == 21
    assert whole(run)


def test_f10_timed_out_by_slurm(root, make_runs, fake_slurm, slurm_profile, ranks):
    """Attempts that commit go on without a limit; three that do not are the end."""
    (run,) = make_runs(1, steps=20)
    for number in range(8):
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
        assert row["action"] == "submit"
        rank = Rank(root, fake_slurm.jobs()[number])
        rank.begin()
        for _ in range(2 if number < 5 else 1):
            rank.step()
        fake_slurm.set(number, state="TIMEOUT")
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["cause"], row["over"]) == ("FAILED", "timeout", True)
    assert "3 attempts without a new committed step" in row["evidence"]
    assert row["action"] is None


# F11: a node fails, and Slurm requeues


def test_f11_node_fail_and_requeue_of_the_same_job_is_the_same_attempt(
    root, make_runs, fake_slurm, slurm_profile, until
):
    (run,) = make_runs(1, step_s=0.05)
    sync.submit(root, [run], slurm_profile, sweep="s")
    process = fake_slurm.start(0)
    until(lambda: step(run) >= 7, step=0.02)
    os.kill(fake_slurm.rank(0), signal.SIGKILL)
    fake_slurm.set(0, state="NODE_FAIL")
    fake_slurm.end(0, process)
    fake_slurm.requeue(0)
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["action"], row["attempts"]) == ("QUEUED", None, 1)
    how(root)
    assert fake_slurm.run(0, "node2") == 0
    assert [s["job"]["nodes"] for s in run.starts()] == [["node1"], ["node2"]]
    assert len(run.attempts()) == 1
    assert whole(run)


def test_f11_a_sync_between_node_fail_and_requeue(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    """It makes a second attempt: then the requeued job of the first leaves."""
    (run,) = make_runs(1, steps=6)
    sync.submit(root, [run], slurm_profile, sweep="s")
    rank = Rank(root, fake_slurm.jobs()[0])
    rank.begin()
    fake_slurm.set(0, state="NODE_FAIL")
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["action"], row["attempts"]) == ("submit", 2)
    fake_slurm.requeue(0)
    fake_slurm.set(0, state="RUNNING")
    assert Rank(root, fake_slurm.jobs()[0]).finish() == EXIT_SUPERSEDED
    fake_slurm.set(0, state="FAILED")
    assert Rank(root, fake_slurm.jobs()[1]).finish() == 0
    assert run.generations() == [1, 2]


def test_f11_requeued_and_training_before_the_second_attempt_is_made(
    root, make_runs, fake_slurm, slurm_profile, ranks, monkeypatch
):
    """The sync looked before and records an end: its attempt's job waits for what trains."""
    (run,) = make_runs(1, steps=6)
    sync.submit(root, [run], slurm_profile, sweep="s")
    Rank(root, fake_slurm.jobs()[0]).begin()
    fake_slurm.set(0, state="NODE_FAIL")
    original, found = sync.close, []

    def later(*arguments):
        fake_slurm.requeue(0)
        fake_slurm.set(0, state="RUNNING")
        found.append(Rank(root, fake_slurm.jobs()[0]))
        found[0].begin()
        return original(*arguments)

    monkeypatch.setattr(sync, "close", later)
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["action"], row["attempts"]) == ("submit", 2)
    (first,) = found
    assert first.trains

    def waits(seconds):
        raise Waits

    monkeypatch.setattr(job_module.time, "sleep", waits)
    fake_slurm.set(1, state="RUNNING")
    second = Rank(root, fake_slurm.jobs()[1])
    second.begin()
    assert not second.trains
    assert second.status is None
    while first.status is None:
        first.step()
    fake_slurm.set(0, state="COMPLETED")
    second.begin()
    assert second.status == EXIT_SUPERSEDED
    assert run.result()["generation"] == 2
    assert whole(run)


# F12: the zombie


@pytest.mark.parametrize("zombie", ["goes on", "freezes"])
def test_f12_a_zombie_commits_nothing_beside_the_requeued_job(
    root, make_runs, fake_slurm, slurm_profile, until, zombie
):
    (run,) = make_runs(1, step_s=0.1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    old = fake_slurm.start(0)
    until(lambda: step(run) >= 7, step=0.02)
    pid = fake_slurm.rank(0)
    if zombie == "freezes":
        os.kill(pid, signal.SIGSTOP)
    fake_slurm.requeue(0)  # Slurm lost the node, and the process lives on
    how(root)
    assert fake_slurm.run(0, "node2") == 0
    result, committed = run.result(), run.committed_steps()
    assert result["generation"] == 2
    os.kill(pid, signal.SIGCONT)
    assert old.wait(timeout=30) == EXIT_SUPERSEDED
    assert run.result() == result
    assert run.committed_steps() == committed
    assert "generation 2 has started; generation 1 stops" in log_files(run)[1].read_text()
    assert whole(run)
    assert states(sync.sync(root, [run], slurm_profile, sweep="s")) == ["DONE"]


# F13: a bad node


def offer_the_bad_node(root, fake_slurm):
    """Every job goes to the node ``bad``, where it fails at once, unless its script excludes it."""
    for number, job in enumerate(fake_slurm.jobs()):
        if job["state"] != "PENDING":
            continue
        if "bad" in job["exclude"].split(","):
            assert Rank(root, {**job, "node": "good"}).finish() == 0
            fake_slurm.set(number, state="COMPLETED", node="good")
        else:
            fake_slurm.set(number, state="FAILED", node="bad")


@pytest.mark.parametrize("count", [1, 5])
def test_f13_a_bad_node_is_left_out_after_two_failures(
    root, make_runs, fake_slurm, slurm_profile, ranks, count
):
    runs = make_runs(count, steps=4)
    profile = slurm_profile.model_copy(update={"exclude": "old[1-2]"})
    for _ in range(4):
        sync.sync(root, runs, profile, sweep="s")
        offer_the_bad_node(root, fake_slurm)
    rows = sync.sync(root, runs, profile, sweep="s")
    assert states(rows) == ["DONE"] * count
    assert {r["attempts"] for r in rows} == {3 if count == 1 else 2}
    assert [j["exclude"] for j in fake_slurm.jobs() if j["state"] == "FAILED"] == [
        "old[1-2]"
    ] * max(2, count)
    assert {j["exclude"] for j in fake_slurm.jobs() if j["state"] != "FAILED"} == {"old[1-2],bad"}
    ends = [a.end for r in runs for a in r.attempts()[:-1]]
    assert {(e["class"], *e["nodes"]) for e in ends} == {("launch", "bad")}


def test_f13_one_failure_and_failures_of_the_user_s_making_leave_no_node_out(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    runs = make_runs(4, steps=4)
    sync.submit(root, runs, slurm_profile, sweep="s")
    words = ("NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "PREEMPTED")
    for number, word in enumerate(words):
        Rank(root, fake_slurm.jobs()[number]).begin()
        fake_slurm.set(number, state=word, node="node1")
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [r["action"] for r in rows] == ["submit"] * 4
    assert {j["exclude"] for j in fake_slurm.jobs()} == {""}


def test_f13_a_node_is_blamed_by_slurm_s_word_and_by_what_the_log_says_of_its_gpu(
    root, make_runs, fake_slurm, slurm_profile, ranks
):
    """And no more once a job has begun there again."""
    runs = make_runs(2, steps=4)
    sync.submit(root, runs, slurm_profile, sweep="s")
    for job in fake_slurm.jobs():
        Rank(root, job).begin()
    log(root, fake_slurm.jobs()[1], "kernel: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off")
    fake_slurm.set(0, state="NODE_FAIL", node="node1")
    fake_slurm.set(1, state="FAILED", node="node1")
    sync.sync(root, runs, slurm_profile, sweep="s")
    assert [j["exclude"] for j in fake_slurm.jobs()] == ["", "", "node1", "node1"]
    Rank(root, fake_slurm.jobs()[2]).begin()  # of an array that was submitted before
    fake_slurm.set(2, state="PREEMPTED", node="node1")
    sync.sync(root, runs, slurm_profile, sweep="s")
    assert fake_slurm.jobs()[-1]["exclude"] == ""


def test_f13_a_job_held_after_a_failed_launch_is_given_up(
    root, make_runs, fake_slurm, slurm_profile
):
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.set(0, reason="launch_failed_requeued_held", restart=1)
    (row,) = sync.status([run])
    assert (row["state"], row["cause"]) == ("FAILED", "launch")
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["action"], row["attempts"]) == ("submit", 2)
    assert run.attempts()[0].end["class"] == "launch"
    assert fake_slurm.jobs()[0]["state"] == "CANCELLED by 0"
    fake_slurm.set(0, state="PENDING", reason="None")  # somebody released it in this moment
    assert [fake_slurm.run(0), fake_slurm.run(1)] == [EXIT_SUPERSEDED, 0]
    assert run.generations() == [1]
