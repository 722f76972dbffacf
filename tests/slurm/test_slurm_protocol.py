"""The submission protocol against a file-backed Slurm; faults: test_slurm_scenarios.py."""

import time

import pytest
from scenario import one_writer, states

from scaling.config import ConfigError
from scaling.slurm import job as job_module
from scaling.slurm import sync
from scaling.slurm.profile import ClusterProfile, Shape, ShapeRule
from scaling.slurm.submission import SubmissionError


def test_submit_twice_is_one_array(root, make_runs, fake_slurm, slurm_profile):
    runs = make_runs(2)
    rows = sync.submit(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["QUEUED"] * 2
    assert [r["job_id"] for r in rows] == ["101_0", "101_1"]
    assert {r["action"] for r in sync.submit(root, runs, slurm_profile, sweep="s")} == {None}
    assert fake_slurm.finish() == [0, 0]
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


def test_a_rejected_submission_is_an_error_and_can_be_repeated(
    root, make_runs, fake_slurm, slurm_profile
):
    runs = make_runs(1)
    fake_slurm.fault(sbatch="rejected")
    with pytest.raises(SubmissionError, match="Invalid partition"):
        sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.fault()
    assert sync.submit(root, runs, slurm_profile, sweep="s")[0]["action"] == "submit"


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
        monotonic = staticmethod(lambda: 60.0 * len(looks))

    monkeypatch.setattr("scaling.slurm.claims.time", Clock)
    assert job_module.claim(run, 2, {**mine, "job_id": "200"}) is None
    assert len(looks) == 3


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
    assert "--kill-on-bad-exit=1 --wait=0 --cpus-per-task=5" in script
    three = profile.model_copy(update={"shape": Shape(tasks_per_node=3), "larger": ()})
    with pytest.raises(ConfigError, match="not divisible by the 3 ranks"):
        sync.submit(root, runs, three, sweep="s")


def test_a_watch_goes_on_at_a_submit_limit_and_tries_again_in_time(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch
):
    runs = make_runs(2)
    fake_slurm.fault(max_submit=0)  # other people's jobs fill the group's limit
    looks = []

    def report(rows):
        looks.append([row["waiting"] for row in rows])
        if len(looks) == 3:
            fake_slurm.fault()
            monkeypatch.setattr("scaling.slurm.submission.LIMIT_TRUSTED_S", 0.0)
        if len(looks) == 4:
            assert fake_slurm.finish() == [0, 0]

    rows = sync.sync(
        root, runs, slurm_profile, sweep="s", watch=True, interval_s=0.01, report=report
    )
    assert states(rows) == ["DONE", "DONE"]
    assert all("limit" in why for look in looks[:3] for why in look)
    assert looks[3] == [None, None]
    assert [len(run.attempts()) for run in runs] == [2, 2]
