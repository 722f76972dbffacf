"""On a real Slurm of two nodes (slurm/devcluster): what the fake one cannot promise."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from scaling.config import Evaluation, ModelConfig, RunConfig, TrainSettings
from scaling.data.prepare import find_prepared
from scaling.rundir import RunDir
from scaling.slurm.doctor import doctor
from scaling.slurm.logs import log_files, tail
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.state import WORDS
from scaling.slurm.sync import status, submit, sync

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def profile(devcluster, monkeypatch) -> ClusterProfile:
    monkeypatch.setenv("SLURM_CONF", devcluster["slurm_conf"])
    return ClusterProfile(
        name="devcluster",
        partition=devcluster["partition"],
        settle_s=1,
        signal_lead_s=30,
        shape=Shape(nodes=2, tasks_per_node=1, gpus_per_node=1, time_min=10),
    )


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sacct(name: str) -> dict[str, dict[str, str]]:
    """Slurm's own account of a submission, by job id."""
    fields = ["JobID", "State", "AllocNodes", "NTasks", "AllocTRES"]
    rows = slurm("sacct", "-nXP", f"--name={name}", f"--format={','.join(fields)}").splitlines()
    return {row.split("|")[0]: dict(zip(fields, row.split("|"), strict=True)) for row in rows}


def test_an_array_of_runs_with_two_ranks_on_two_nodes(root, make_runs, profile, until):
    runs = make_runs(6)
    rows = submit(root, runs, profile, sweep="array")
    assert {r["action"] for r in rows} == {"submit"}
    assert {r["action"] for r in submit(root, runs, profile, sweep="array")} == {None}
    rows = sync(root, runs, profile, sweep="array", watch=True, interval_s=0.5)
    assert [r["state"] for r in rows] == ["DONE"] * 6
    assert [r["attempts"] for r in rows] == [1] * 6
    assert [r.result()["world_size"] for r in runs] == [2] * 6
    assert "rank 1 of 2 threads 1" in tail(log_files(runs[3], rank=1)[0], 50)
    assert {tuple(r.attempts()[0].claim["nodes"]) for r in runs} == {("gpu1", "gpu2")}
    name = runs[0].attempts()[0].intent["token"]
    # Accounts arrive some time after the jobs' ends, each task of the array by itself.
    ours = {r["job_id"]: "COMPLETED" for r in rows}
    until(lambda: {i: job["State"] for i, job in sacct(name).items()} == ours, 60)
    for job in sacct(name).values():
        assert job["AllocNodes"] == "2"
        assert "gres/gpu=2" in job["AllocTRES"]


def test_the_first_of_two_ranks_evaluates_when_the_other_has_left(root, make_runs, profile):
    """Longer than a site's WaitTime, after which srun would end it."""
    (run,) = make_runs(1)
    (root / "evaluation.json").write_text(json.dumps({"seconds": 4.0}))
    wanted = [
        Evaluation(corpus_digest="a" * 16, task=task, task_digest="t" * 16)
        for task in ("food", "kitchen")
    ]
    run.want(wanted)
    profile = profile.model_copy(update={"setup": ("export SLURM_WAIT=2",)})
    (row,) = sync(root, [run], profile, sweep="evaluated", watch=True, interval_s=0.5)
    assert (row["state"], row["evaluated"], row["attempts"]) == ("DONE", 2, 1)
    assert [start["world_size"] for start in run.starts()] == [2, 2]
    assert row["gpu_hours"] > 2 * 8 / 3600
    assert run.over()


@pytest.mark.parametrize("how", ["scontrol requeue", "scancel --signal=USR2", "kill -9"])
def test_a_run_goes_on_from_its_checkpoint(root, make_runs, profile, until, how):
    runs = make_runs(2, steps=60, step_s=0.1)
    submit(root, runs, profile, sweep="go-on")
    until(lambda: all((r["step"] or 0) >= 12 for r in status(runs)))
    job = status(runs)[1]["job_id"]
    assert job.endswith("_1")
    if how == "kill -9":
        os.kill(_rank_process(runs[1]), signal.SIGKILL)
    else:
        slurm(*how.split(), job)
    (root / "standin.json").write_text(json.dumps({"step_s": 0.0}))
    rows = sync(root, runs, profile, sweep="go-on", watch=True, interval_s=0.5)
    assert [r["state"] for r in rows] == ["DONE", "DONE"]
    assert runs[0].generations() == [1]  # only one element of the array was touched
    starts = [
        json.loads(runs[1].metrics_path(g).read_text().splitlines()[0])
        for g in runs[1].generations()
    ]
    assert len(starts) == 2
    assert starts[1]["resumed_from"] >= 10
    assert [r["step"] for r in runs[1].curve("train")] == list(range(1, 61))
    if how == "kill -9":  # the job ended: a new attempt
        assert rows[1]["attempts"] == 2
        assert rows[1]["job_id"] != job
    else:  # the same job, started again
        assert (rows[1]["attempts"], rows[1]["job_id"]) == (1, job)
        assert [s["job"]["restart"] for s in starts] == [0, 1]


def _rank_process(run, rank=0) -> int:
    """The process of a rank of a run, on whichever of the nodes of this host."""
    main, _, index = run.attempts()[0].claim["job_id"].partition("_")
    job = {f"SLURM_ARRAY_JOB_ID={main}", f"SLURM_ARRAY_TASK_ID={index}"}
    # The batch script calls itself process 0 too, but has no step.
    wanted = {*job, f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:
            continue
        if wanted <= set(environment):
            return int(pid)
    raise AssertionError("no such process")


def test_training_on_two_nodes_repeats_itself_through_a_kill(tiny_corpus, profile, until):
    root = tiny_corpus(128, pool=24)
    corpus = find_prepared(root, root / "tiny.toml")
    config = RunConfig.model_validate(
        {
            "model": ModelConfig(layers=1, d_model=16, heads=2, dropout=0.1),
            "data": {
                "corpus_digest": corpus.card.digest,
                "vocab_size": corpus.card.vocab_size,
                "n_services": 2,
                "items_per_user": 4,
            },
            "batch_size": 16,
            "negatives": 16,
            "steps": 80,
            "evaluations": 4,
            "pool": corpus.card.pool,
        }
    )
    profile = profile.model_copy(update={"train": TrainSettings(checkpoint_every=10)})
    # The same run below two roots, side by side.
    other = root / "other"
    (other / "corpora").mkdir(parents=True)
    (other / "corpora" / corpus.path.name).symlink_to(corpus.path)
    undisturbed, killed = (RunDir.create(r, config, "tiny") for r in (root, other))
    for run in (undisturbed, killed):
        submit(run.root, [run], profile, sweep="real")
    until(lambda: (killed.progress() or {"step": 0})["step"] >= 25, 60, 0.05)
    os.kill(_rank_process(killed, rank=1), signal.SIGKILL)
    until(lambda: submit(other, [killed], profile, sweep="real")[0]["action"] == "submit", 30)
    assert killed.result() is None
    for run in (undisturbed, killed):
        (row,) = sync(run.root, [run], profile, sweep="real", watch=True, interval_s=0.5)
        assert row["state"] == "DONE"
    assert undisturbed.generations() == [1]
    assert killed.generations() == [1, 2]
    assert _start(killed, 2)["resumed_from"] >= 20
    assert [_start(killed, g)["world_size"] for g in (1, 2)] == [2, 2]
    for kind, rows in (("train", 80), ("pool", 4)):
        curves = [_timeless(run.curve(kind)) for run in (undisturbed, killed)]
        assert len(curves[0]) == rows
        assert curves[0] == curves[1]
    final = [run.path / "ckpt/step-000000080/params.safetensors" for run in (undisturbed, killed)]
    assert final[0].read_bytes() == final[1].read_bytes()


def _start(run, generation) -> dict:
    return json.loads(run.metrics_path(generation).read_text().splitlines()[0])


def _timeless(rows) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "speed")} for row in rows]


def test_doctor_finds_this_cluster_in_order(root, profile):
    findings = {f.check: f for f in doctor(root, profile)}
    assert findings["MaxArraySize"].found.startswith("12:")
    assert {f.check: f.found for f in findings.values() if f.level == "problem"} == {}
    assert findings["accounting"].level == "ok"
    assert findings["JobRequeue"].level == "ok"
    bad = doctor(root, profile.model_copy(update={"partition": "nowhere"}))
    assert [f.check for f in bad if f.level == "problem"] == ["partition"]


def test_every_state_that_squeue_knows_is_in_our_table(profile):
    done = subprocess.run(
        ["squeue", "--states=nonsense"], capture_output=True, text=True, check=False
    )
    listed = done.stderr.partition("Valid job states include: ")[2].strip().split(",")
    assert len(listed) > 15
    assert set(listed) <= set(WORDS)
