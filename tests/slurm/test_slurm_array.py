"""Commands as job arrays: what reaches sbatch and the shell, and what the elements do."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenario import FakeSlurm
from typer.testing import CliRunner

from scaling import ClueError
from scaling.cli import app
from scaling.config import ConfigError, ModelConfig, RunConfig
from scaling.data.corpus import Corpus
from scaling.files import sha256, write_json
from scaling.models import build
from scaling.rundir import RunDir
from scaling.slurm.array import CommandArray
from scaling.slurm.profile import ClusterProfile, Shape

PROFILE = ClusterProfile(
    name="x", max_parallel=3, partition="main", constraint="v100&nvlink", qos="long",
    setup=("module load cuda", "export MINE=1"),
    shape=Shape(tasks_per_node=2, gpus_per_node=2, cpus_per_task=4, mem_gb=1.5, time_min=90),
)  # fmt: skip


def array_of(folder: Path, words: list[str], **changes: Any) -> CommandArray:
    values = {"name": "embed-x", "words": words, "size": 5, "folder": folder, "root": folder,
              "code": "c" * 16, "profile": PROFILE}  # fmt: skip
    return CommandArray(**{**values, **changes})


def test_the_script_asks_for_what_the_profile_says(tmp_path: Path) -> None:
    script = array_of(tmp_path, ["embed", "key"]).script()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE))
    assert options == {
        "job-name": "embed-x", "array": "0-4%3", "output": f"{tmp_path}/embed-x-%a.log",
        "open-mode": "append", "time": "90", "nodes": "1", "ntasks-per-node": "2",
        "cpus-per-task": "4", "gpus-per-node": "2", "mem": "1536M", "partition": "main",
        "qos": "long", "constraint": "'v100&nvlink'", "requeue": "",
    }  # fmt: skip
    assert script.startswith("#!/bin/bash\n#SBATCH")
    assert script.index("module load cuda\n[ $? -eq 0 ] ||") < script.index("srun ")
    assert "srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task=4 " in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@given(words=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), max_size=5))
def test_words_reach_the_command_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    script = array_of(tmp_path_factory.getbasetemp(), words).script()
    end = script[script.index("srun ") :]
    echo = re.sub(r"^srun .*? -m scaling\.cli", 'printf "%s\\\\0"', end, count=1)
    done = subprocess.run(
        ["bash", "-c", echo], capture_output=True, check=True,
        env={"SLURM_ARRAY_TASK_ID": "3", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stdout.decode().split("\0")[:-1] == [*words, "--shards", "3/5"]


def test_what_a_shell_might_take_otherwise_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"folder": Path("/tmp/a b")}, "'/tmp/a b': reaches a job script"),
        ({"folder": Path("relative")}, "'relative': reaches a job script"),
        ({"folder": tmp_path / "%j"}, "reaches a job script"),
        ({"name": "x;y"}, "'x;y': reaches a job script"),
        ({"profile": ClusterProfile(name="here", executor="local")}, "has no job arrays; start"),
    ):
        with pytest.raises(ConfigError, match=message):
            array_of(changes.pop("folder", tmp_path), ["embed"], **changes)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="anybody may write to it"):
        array_of(tmp_path / "open" / "array", ["embed"])


def test_a_submission_that_fails_says_so(tmp_path: Path, fake_slurm: FakeSlurm) -> None:
    made = array_of(tmp_path, ["embed"])
    fake_slurm.fault(sbatch="rejected")
    with pytest.raises(ClueError, match=r"not submitted: sbatch: .*Invalid partition name"):
        made.submit()
    fake_slurm.fault()
    assert made.submit() == "101"
    assert len(fake_slurm.jobs()) == 5
    assert (tmp_path / "embed-x.sh").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def root(tiny_corpus: Any) -> Path:
    """A root folder with a corpus and a run with an export."""
    made: Path = tiny_corpus(users=200)
    return made


@pytest.mark.slow
def test_features_by_the_elements_of_an_array(
    root: Path, tmp_path: Path, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    corpus = Corpus.open(next((root / "corpora").glob("tiny-*")))
    config = RunConfig.model_validate(
        {
            "model": ModelConfig(layers=1, d_model=8, heads=2),
            "data": {"corpus_digest": corpus.card.digest, "vocab_size": corpus.card.vocab_size},
            "batch_size": 16, "negatives": 16, "steps": 6, "evaluations": 2,
            "pool": corpus.card.pool,
        }
    )  # fmt: skip
    run = RunDir.create(root, config, "tiny")
    export = run.path / "export" / "step-000000006"
    export.mkdir(parents=True)
    file = export / "model.safetensors"
    save_file(build(config.model, config.data.vocab_size).state_dict(), file)
    card = {"schema_version": 1, "run_key": run.run_key, "step": 6, "config": config.model_dump(
        mode="json"), "size": file.stat().st_size, "sha256": sha256(file)}  # fmt: skip
    write_json(export / "config.json", card)
    profile = tmp_path / "cluster.toml"
    profile.write_text('name = "fake"\n[shape]\ntasks_per_node = 2\n')

    def call(out: str, *words: str) -> str:
        words = ("embed", run.run_key, "--root", str(root), "--out", str(tmp_path / out), *words)
        done = CliRunner().invoke(app, [*words, "--shard-users", "10", "--services", "garden"])
        assert done.exit_code == 0, done.output
        return done.stdout

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ("--cluster", str(profile), "--array", "2")
    assert "#SBATCH --array=0-1%2" in call("a", *asked, "--dry-run")
    assert not (tmp_path / "a").exists()
    assert call("a", *asked).startswith("job 101: an array of 2; ")
    jobs = fake_slurm.jobs()
    assert [job["index"] for job in jobs] == [0, 1]
    call("b")

    # Each element's two ranks, one after the other and the last first; from another folder.
    for job in jobs[::-1]:
        for rank in ("1", "0"):
            env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(job["index"]), "SLURM_PROCID": rank,
                   "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": rank}  # fmt: skip
            done = subprocess.run(
                ["bash", "-c", job["script"]], env=env, cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    names = [p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file()]
    assert len(names) > 10
    for name in names:
        assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name)
    assert shlex.quote(sys.executable) in jobs[0]["script"]
    assert f"PYTHONPATH={root}/code/" in jobs[0]["script"]
