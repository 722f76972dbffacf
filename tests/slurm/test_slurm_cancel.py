"""Cancelling, while jobs start, are requeued and finish (F22)."""

import os

import pytest
from scenario import Rank, simulate, states, whole

from scaling.rundir import RunDir
from scaling.slurm import cancel as cancelling
from scaling.slurm import job as job_module
from scaling.slurm import sync
from scaling.slurm.cancel import cancel
from scaling.slurm.job import EXIT_SUPERSEDED


def test_f22_cancel_reaches_queued_and_unsubmitted_runs(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(3)
    sync.submit(root, runs[:2], slurm_profile, sweep="s")
    assert len(cancel(runs)) == 3
    assert [j["state"] for j in fake_slurm.jobs()] == ["CANCELLED by 0"] * 2
    assert cancel(runs) == []
    assert states(sync.sync(root, runs, slurm_profile, sweep="s")) == ["CANCELLED"] * 3
    assert fake_slurm.run(0) == EXIT_SUPERSEDED  # even if Slurm starts it all the same
    assert runs[0].generations() == []
    fake_slurm.change(state="CANCELLED by 0")
    rows = sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
    assert [(r["state"], r["attempts"]) for r in rows] == [("QUEUED", 2)] * 3


def test_f22_cancel_while_somebody_submits_again(
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
    assert len(cancel(runs)) == 2
    assert [run.attempts()[-1].cancel is not None for run in runs] == [True, True]
    assert [j["state"] for j in fake_slurm.jobs()] == ["CANCELLED by 0"] * 2


def never_again(root, run, profile, fake_slurm, state, generations):
    """Nothing but an explicit word takes a cancelled run up again, and then it is trained."""
    for number, job in enumerate(fake_slurm.jobs()):
        if job["state"] == "PENDING":
            assert Rank(root, job).finish() == EXIT_SUPERSEDED
            fake_slurm.set(number, state="FAILED")
    for drive in (sync.sync, sync.submit):
        (row,) = drive(root, [run], profile, sweep="s")
        assert (row["state"], row["action"]) == (state, None)
    assert run.generations() == generations
    assert cancel([run]) == []
    if state == "CANCELLED":
        (row,) = sync.submit(root, [run], profile, sweep="s", retry_failed=True)
        assert row["action"] == "submit"
        assert simulate(root, fake_slurm) == [0]
    assert run.result()["status"] == "done"
    assert whole(run)


@pytest.mark.parametrize("moment", ["start", "claim", "second look"])
def test_f22_cancel_races_with_a_start(
    root, make_runs, fake_slurm, slurm_profile, ranks, monkeypatch, moment
):
    (run,) = make_runs(1, steps=6)
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.set(0, state="RUNNING")
    rank = Rank(root, fake_slurm.jobs()[0])
    original = RunDir.record

    def record(self, number, name, rec):
        if name == "claim" and moment == "claim":
            cancel([run])
        done = original(self, number, name, rec)
        if name == "claim" and moment == "second look":
            cancel([run])
        return done

    monkeypatch.setattr(RunDir, "record", record)
    if moment == "start":
        cancel([run])
    rank.begin()
    monkeypatch.setattr(RunDir, "record", original)
    assert rank.status == EXIT_SUPERSEDED
    assert fake_slurm.jobs()[0]["state"] == "CANCELLED by 0"
    never_again(root, run, slurm_profile, fake_slurm, "CANCELLED", [])


@pytest.mark.parametrize("moment", ["before the look", "before the requeue", "after the requeue"])
def test_f22_cancel_races_with_a_requeue(
    root, make_runs, fake_slurm, slurm_profile, ranks, monkeypatch, moment
):
    (run,) = make_runs(1, steps=6)
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.set(0, state="RUNNING")
    rank = Rank(root, fake_slurm.jobs()[0])
    rank.begin()
    for _ in range(3):
        rank.step()
    original, asked = job_module.command, []

    def command(*words, **how):
        if words[0] == ("squeue" if moment == "before the look" else "scontrol") and not asked:
            asked.append(words)
            if moment != "after the requeue":
                cancel([run])
        done = original(*words, **how)
        if words[0] == "scontrol" and moment == "after the requeue":
            cancel([run])
        return done

    monkeypatch.setattr(job_module, "command", command)
    rank.stop.by = "SIGUSR2"
    rank.step()
    assert asked
    assert rank.status == 0
    assert run.committed_steps()[-1] == 3
    revived = fake_slurm.jobs()[0]["state"] == "PENDING"
    assert revived == (moment == "before the requeue")  # Slurm does as it was asked last
    never_again(root, run, slurm_profile, fake_slurm, "CANCELLED", [1])


@pytest.mark.parametrize("moment", ["before the result", "after the result", "after the end"])
def test_f22_cancel_races_with_the_finish(
    root, make_runs, fake_slurm, slurm_profile, ranks, monkeypatch, moment
):
    (run,) = make_runs(1, steps=4)
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.set(0, state="RUNNING")
    rank = Rank(root, fake_slurm.jobs()[0])
    write, record = RunDir.write_result, RunDir.record

    def write_result(self, generation, rec):
        if moment == "before the result":
            assert cancel([run]) == [run.run_key]
        write(self, generation, rec)

    def record_end(self, number, name, rec):
        if name == "end" and moment == "after the result":
            assert cancel([run]) == []  # it is done
        return record(self, number, name, rec)

    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "write_result", write_result)
        patched.setattr(RunDir, "record", record_end)
        assert rank.finish() == 0
    fake_slurm.set(0, state="COMPLETED")
    assert cancel([run]) == []
    never_again(root, run, slurm_profile, fake_slurm, "DONE", [1])


def test_f22_a_cancelled_job_commits_what_it_has(root, make_runs, fake_slurm, slurm_profile, until):
    (run,) = make_runs(1, step_s=0.05)
    sync.submit(root, [run], slurm_profile, sweep="s")
    process = fake_slurm.start(0)
    until(lambda: (run.progress() or {"step": 0})["step"] >= 3, step=0.02)
    assert cancel([run]) == [run.run_key]
    os.kill(fake_slurm.rank(0), 15)  # as scancel does
    assert fake_slurm.end(0, process) == 0
    end = run.attempts()[0].end
    assert (end["class"], end["evidence"]) == ("cancelled", "SIGTERM")
    assert end["step"] == run.committed_steps()[-1] >= 3
    assert fake_slurm.jobs()[0]["state"] == "CANCELLED by 0"
    assert states(sync.sync(root, [run], slurm_profile, sweep="s")) == ["CANCELLED"]
