"""Runs that any host can execute, a fake Slurm, and the devcluster."""

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scenario import FakeSlurm, without_code

from scaling.config import DataConfig, ModelConfig, PoolConfig, RunConfig
from scaling.rundir import RunDir
from scaling.slurm.profile import ClusterProfile, Shape

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
DEVCLUSTER = Path(os.environ.get("CLUE_DEVCLUSTER", REPOSITORY / "work" / "devcluster"))


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
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs may be simulated in this process (``scenario.Rank``)."""
    without_code(monkeypatch.setattr)


@pytest.fixture
def slurm_profile() -> ClusterProfile:
    return ClusterProfile(name="fake", settle_s=0, shape=Shape(time_min=60))


@pytest.fixture(scope="session")
def devcluster() -> dict[str, str]:
    """A running devcluster: ``slurm/devcluster/start`` has written its state file."""
    state = DEVCLUSTER / "cluster.json"
    if not state.exists():
        reason = f"no devcluster: {state} does not exist; start one with slurm/devcluster/start"
        if os.environ.get("CI") == "true" and os.environ.get("CLUE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return json.loads(state.read_text())


@pytest.fixture(autouse=True)
def _alone_on_the_devcluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of other workers wait: some stop the controller, or count what is in the queue."""
    if request.node.get_closest_marker("slurm") is None:
        yield
        return
    request.getfixturevalue("devcluster")
    with open(DEVCLUSTER / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:  # by name: a process that a test forked and lost would hold it on
            fcntl.flock(lock, fcntl.LOCK_UN)


@pytest.fixture
def until() -> Callable[..., None]:
    def wait(condition: Callable[[], bool], seconds: float = 60, step: float = 0.3) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(step)

    return wait
