"""Runs that any host can execute, a fake Slurm, and the devcluster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.config import DataConfig, ModelConfig, PoolConfig, RunConfig
from scaling.rundir import RunDir
from scaling.slurm.profile import ClusterProfile, Shape

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder; processes that jobs start find the stand-in for training."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "standin"))
    monkeypatch.setattr("scaling.data.corpus.Corpus.find", lambda root, digest: digest)
    return tmp_path / "root"


@pytest.fixture
def make_runs(root: Path) -> Callable[..., list[RunDir]]:
    def make(count: int, steps: int = 20, **how: object) -> list[RunDir]:
        root.mkdir(parents=True, exist_ok=True)
        (root / "standin.json").write_text(json.dumps(how))
        return [
            RunDir.create(
                root,
                RunConfig(
                    model=ModelConfig(layers=1, d_model=64, heads=1),
                    data=DataConfig(corpus_digest="a" * 16, vocab_size=100),
                    batch_size=8,
                    negatives=8,
                    steps=steps,
                    evaluations=2,
                    pool=PoolConfig(size=4, digest="b" * 16),
                    seed=seed,
                ),
                "standin",
            )
            for seed in range(count)
        ]

    return make


class FakeSlurm:
    """The fake's state, and what a cluster would do by itself."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def jobs(self) -> list[dict]:
        path = self.home / "jobs.json"
        return json.loads(path.read_text()) if path.exists() else []

    def fault(self, **faults: object) -> None:
        (self.home / "faults.json").write_text(json.dumps(faults))

    def change(self, where: Callable[[dict], bool] = lambda job: True, **values: object) -> None:
        jobs = self.jobs()
        for job in jobs:
            if where(job):
                job.update(values)
        (self.home / "jobs.json").write_text(json.dumps(jobs))

    def run(self, number: int, **environment: str) -> subprocess.CompletedProcess[str]:
        """Execute one job's script as a single rank and record the state it ends in."""
        job = self.jobs()[number]
        env = {**os.environ, "SLURM_JOB_ID": str(9000 + number), "SLURM_NTASKS": "1",
               "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node1",
               "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **environment}  # fmt: skip
        if job["index"] is None:
            env["SLURM_JOB_ID"] = str(job["main"])
        else:
            env |= {
                "SLURM_ARRAY_JOB_ID": str(job["main"]),
                "SLURM_ARRAY_TASK_ID": str(job["index"]),
            }
        this = [number]
        self.change(lambda j: self._position(j) in this, state="RUNNING", reason="None")
        done = subprocess.run(
            ["bash", "-c", job["script"]], env=env, capture_output=True, text=True, check=False
        )
        if self.jobs()[number]["state"] == "RUNNING":
            state = "FAILED" if done.returncode else "COMPLETED"
            self.change(lambda j: self._position(j) in this, state=state)
        return done

    def _position(self, job: dict) -> int:
        return next(
            i for i, j in enumerate(self.jobs())
            if (j["main"], j["index"]) == (job["main"], job["index"])
        )  # fmt: skip


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's commands on PATH, answered from a file."""
    home, commands = tmp_path / "fake", tmp_path / "bin"
    home.mkdir()
    commands.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun"):
        script = commands / name
        script.write_text(
            f'#!/bin/sh\nexec {sys.executable} -S -E {HERE / "fake" / "slurm.py"} {name} "$@"\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(home))
    return FakeSlurm(home)


@pytest.fixture
def slurm_profile() -> ClusterProfile:
    return ClusterProfile(name="fake", settle_s=0, shape=Shape(time_min=60))


@pytest.fixture(scope="session")
def devcluster() -> dict[str, str]:
    """A running devcluster: ``slurm/devcluster/start`` has written its state file."""
    home = Path(os.environ.get("CLUE_DEVCLUSTER", REPOSITORY / "work" / "devcluster"))
    state = home / "cluster.json"
    if not state.exists():
        reason = f"no devcluster: {state} does not exist; start one with slurm/devcluster/start"
        if os.environ.get("CI") == "true" and os.environ.get("CLUE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return json.loads(state.read_text())


@pytest.fixture
def until() -> Callable[..., None]:
    def wait(condition: Callable[[], bool], seconds: float = 60, step: float = 0.3) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(step)

    return wait
