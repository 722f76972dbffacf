"""A sweep with a budget, through retries, lost work and several logins.

Arithmetic of estimates and grants: ``test_slurm_cost.py``; random histories with a budget:
``test_slurm_machine.py``.
"""

import os
import time

import pytest
from scenario import Rank, states, whole, without_code

from scaling import ClueError
from scaling.files import write_json
from scaling.slurm import budget, cost, submission, sync
from scaling.slurm.budget import set_budget, unset_budget
from scaling.slurm.cancel import cancel
from scaling.slurm.claims import STOPPED, claim
from scaling.slurm.cost import MARGIN
from scaling.slurm.job import StopFlag, _stopped
from scaling.slurm.submission import SubmissionError

HOUR = 3600.0


@pytest.fixture
def ranks(monkeypatch):
    """Jobs may be simulated in this process."""
    without_code(monkeypatch.setattr)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture
def plan(root, make_runs, monkeypatch):
    """``plan(count, hours)``: runs of a sweep with a plan, estimated to take so long each."""

    def make(count, hours, start=0.0, **how):
        monkeypatch.setattr(cost, "START_S", start * HOUR)
        monkeypatch.setattr(budget, "START_S", start * HOUR)
        runs = make_runs(count, **how)
        rows = [
            {"run_key": r.run_key, "n_total": 1, "flops_exact": hours * HOUR * cost.CPU_FLOPS}
            for r in runs
        ]
        write_json(root / "sweeps/s/plan.json", {"runs": rows})
        return runs

    return make


def spent(runs):
    return sum(r.gpu_hours() for r in runs)


def allowances(run):
    return [a.intent["allowance_gpu_hours"] for a in run.attempts()]


def test_attempts_carry_what_they_may_take_and_the_rest_waits(
    root, plan, fake_slurm, slurm_profile, ranks, clock
):
    runs = plan(4, hours=1.0, steps=4)
    set_budget(root, "s", 3.5, runs)  # twice 1.5, and half an hour
    rows = sync.submit(root, runs, slurm_profile, sweep="s")
    assert [r["action"] for r in rows] == ["submit", "submit", None, None]
    assert rows[2]["waiting"].startswith("of the budget of 3.5 GPU-hours 3 are spent or reserved")
    assert [allowances(r) for r in runs] == [[MARGIN], [MARGIN], [], []]
    assert {r["action"] for r in sync.sync(root, runs, slurm_profile, sweep="s")} == {None}
    rank = Rank(root, fake_slurm.jobs()[0])
    rank.begin()
    while rank.status is None:
        clock[0] += 0.25 * HOUR
        rank.step()
    fake_slurm.set(0, state="COMPLETED")
    # 1 spent and 1.5 reserved: what is left pays for no other
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["DONE", "QUEUED", "PLANNED", "PLANNED"]
    set_budget(root, "s", 4.0, runs)
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [r["action"] for r in rows] == [None, None, "submit", None]
    unset_budget(root, "s")
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [r["action"] for r in rows] == [None, None, None, "submit"]
    assert allowances(runs[3]) == [None]


def test_retries_and_lost_work_never_exceed_it_and_more_money_goes_on(
    root, plan, fake_slurm, slurm_profile, ranks, clock
):
    """Runs that take three times what was estimated, and whose jobs are killed half of the time."""
    runs = plan(3, hours=0.5, start=0.25, steps=12)
    set_budget(root, "s", 4.0, runs)

    def drive(passes):
        for _ in range(passes):
            sync.sync(root, runs, slurm_profile, sweep="s")
            for number, job in enumerate(fake_slurm.jobs()):
                if job["state"] != "PENDING":
                    continue
                fake_slurm.set(number, state="RUNNING")
                rank = Rank(root, job)
                rank.begin()
                for _ in range(3 if number % 2 else 99):
                    if rank.status is None:
                        clock[0] += 0.125 * HOUR
                        rank.step()
                killed = rank.status is None
                fake_slurm.set(number, state="PREEMPTED" if killed else "COMPLETED")
            assert spent(runs) <= read

    read = 4.0
    drive(12)
    assert not all(r.result() for r in runs)
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert {r["action"] for r in rows} == {None}
    assert any("of the budget of 4 GPU-hours" in str(r["waiting"]) for r in rows)
    ends = [a.end["class"] for r in runs for a in r.attempts()]
    assert {"budget", "preempted"} <= set(ends)
    read = 12.0
    set_budget(root, "s", read, runs)
    drive(20)
    assert all(whole(r) for r in runs)
    assert spent(runs) > 4.0


def test_a_job_stops_itself_when_its_share_is_spent_and_the_next_goes_on(
    root, plan, fake_slurm, slurm_profile
):
    """Real jobs: 40 steps of 50 ms, and a second for each attempt."""
    (run,) = plan(1, hours=1.0 / HOUR / MARGIN, steps=40, step_s=0.05, checkpoint_every=100)
    set_budget(root, "s", 10.0 / HOUR, [run])
    for number in range(6):
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
        if row["state"] == "DONE":
            break
        assert row["action"] == "submit"
        assert fake_slurm.run(number) == 0
    assert row["state"] == "DONE"
    assert 2 <= row["attempts"] <= 5
    *stopped, last = run.attempts()
    assert {a.end["class"] for a in stopped} == {"budget"}
    assert {a.end["evidence"] for a in stopped} == {"the budget's share of this attempt is spent"}
    assert last.end["class"] == "done"
    for attempt in run.attempts():
        allowed = attempt.intent["allowance_gpu_hours"]
        assert run.gpu_hours(attempt.number) <= allowed + 0.3 / HOUR  # a step, on a busy machine
    assert whole(run)
    assert [s["resumed_from"] for s in run.starts()[1:]] == [a.end["step"] for a in stopped]


@pytest.mark.parametrize("logins", [2, 4])
def test_logins_at_once_do_not_reserve_it_twice(
    root, plan, fake_slurm, slurm_profile, ranks, logins
):
    runs = plan(8, hours=1.0)
    set_budget(root, "s", 4.6, runs)
    profile = slurm_profile.model_copy(update={"array_size": 1})
    begin, children = time.time() + 0.3, []
    for n in range(logins):
        if (child := os.fork()) == 0:
            part = runs[n:] + runs[:n]
            time.sleep(max(0.0, begin - time.time()))
            sync.submit(root, part, profile, sweep="s")
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * logins
    assert len(fake_slurm.jobs()) <= 3
    sync.sync(root, runs, profile, sweep="s")
    assert len(fake_slurm.jobs()) == 3


def test_a_login_that_reserves_between_grant_and_intent(
    root, plan, fake_slurm, slurm_profile, monkeypatch
):
    """Both saw the same money; the second takes its intents back."""
    first, second = plan(2, hours=1.0)
    set_budget(root, "s", 2.0, [first, second])
    original, other = submission.start_attempts, []

    def faster(*arguments, **terms):
        if not other:
            other.append(True)
            sync.submit(root, [second, first], slurm_profile, sweep="s")
        return original(*arguments, **terms)

    monkeypatch.setattr(sync, "start_attempts", faster)
    rows = sync.submit(root, [first, second], slurm_profile, sweep="s")
    assert len(fake_slurm.jobs()) == 1
    assert first.attempts()[-1].end["class"] == "withdrawn"
    assert [r["state"] for r in rows] == ["PLANNED", "QUEUED"] or rows[0]["action"] is None
    fake_slurm.set(0, state="OUT_OF_MEMORY")  # it took nothing
    rows = sync.sync(root, [first, second], slurm_profile, sweep="s")
    assert [r["action"] for r in rows] == ["submit", None]


def test_a_run_without_an_estimate_starts_nothing(root, plan, fake_slurm, slurm_profile):
    planned, *_ = runs = plan(2, hours=1.0)
    write_json(
        root / "sweeps/s/plan.json",
        {"runs": [{"run_key": planned.run_key, "n_total": 1, "flops_exact": 1e9}]},
    )
    set_budget(root, "s", 10.0, runs)
    rows = sync.submit(root, runs, slurm_profile, sweep="s")
    assert {r["action"] for r in rows} == {None}
    assert "plan does not have it" in rows[1]["waiting"]
    assert fake_slurm.jobs() == []


def test_a_run_that_executes_without_a_bound_keeps_a_budget_from_being_set(
    root, plan, fake_slurm, slurm_profile
):
    runs = plan(2, hours=1.0)
    sync.submit(root, runs[:1], slurm_profile, sweep="s")
    with pytest.raises(ClueError, match="nothing bounds what it will take"):
        set_budget(root, "s", 10.0, runs)
    assert fake_slurm.finish() == [0]
    set_budget(root, "s", 10.0, runs)
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [r["action"] for r in rows] == [None, "submit"]


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_amount_is_refused(root, plan, hours):
    with pytest.raises(ClueError, match="budget"):
        set_budget(root, "s", hours, plan(1, hours=1.0))


def test_a_run_that_failed_for_good_reserves_nothing(root, plan, fake_slurm, slurm_profile, ranks):
    """Its job was killed and left no record: what it did not take pays for others."""
    failed, waiting = runs = plan(2, hours=1.0)
    set_budget(root, "s", 2.0, runs)
    for number in range(2):
        rows = sync.sync(root, runs, slurm_profile, sweep="s")
        assert [r["action"] for r in rows] == ["submit", None]
        Rank(root, fake_slurm.jobs()[number]).begin()
        fake_slurm.set(number, state="OUT_OF_MEMORY")
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [(r["state"], r["action"]) for r in rows] == [("FAILED", None), ("QUEUED", "submit")]
    assert len(failed.attempts()) == 2
    assert len(waiting.attempts()) == 1


def test_a_cancelled_job_keeps_its_reservation_until_it_has_ended(
    root, plan, fake_slurm, slurm_profile, ranks, clock
):
    """Slurm could not be told: the job goes on, and what it may take still is not free."""
    cancelled, waiting = runs = plan(2, hours=1.0, steps=4)
    set_budget(root, "s", 2.0, runs)
    sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.set(0, state="RUNNING")
    rank = Rank(root, fake_slurm.jobs()[0])
    rank.begin()
    fake_slurm.fault(scancel="down")
    with pytest.raises(SubmissionError, match="may still run"):
        cancel([cancelled])
    fake_slurm.fault()
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [(r["state"], r["action"]) for r in rows] == [("CANCELLED", None), ("PLANNED", None)]
    assert cancel([cancelled]) == []
    rank.stop.by = "SIGTERM"
    rank.step()
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert [(r["state"], r["action"]) for r in rows] == [("CANCELLED", None), ("QUEUED", "submit")]
    assert allowances(waiting) == [MARGIN]


def test_a_job_that_waits_for_another_leaves_when_its_share_is_spent(
    root, plan, fake_slurm, slurm_profile, ranks
):
    """It holds its GPUs meanwhile."""
    (run,) = plan(1, hours=1.0, steps=4)
    set_budget(root, "s", 10.0, [run])
    sync.submit(root, [run], slurm_profile, sweep="s")
    fake_slurm.set(0, state="RUNNING")
    Rank(root, fake_slurm.jobs()[0]).begin()
    fake_slurm.fault(scancel="down")
    with pytest.raises(SubmissionError, match="may still run"):
        cancel([run])
    sync.submit(root, [run], slurm_profile, sweep="s", retry_failed=True)
    fake_slurm.set(1, state="RUNNING")
    second = Rank(root, fake_slurm.jobs()[1])
    stop = object.__new__(StopFlag)  # whose signals are those of a job
    stop.by, stop.since = "", 0.0
    stop.stop_after(0.2)
    assert claim(run, 2, second.job, stop) == STOPPED
    _stopped(run, run.attempts()[1], second.job, stop)
    assert run.attempts()[1].claim is None
    assert run.attempts()[1].end["class"] == "budget"
    assert run.generations() == [1]
