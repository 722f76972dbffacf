"""Checkpoints: whole or not there, verified, free of the world size."""

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import RANK, StopAt, configure, curve

from scaling.config import TrainSettings
from scaling.rundir import RunDir
from scaling.train import checkpoint
from scaling.train.loop import train


@pytest.fixture
def stopped(corpus, tmp_path):
    """A run stopped after 12 of 24 steps, with checkpoints of steps 8 and 12."""
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    stop = StopAt(12)
    settings = TrainSettings(threads=1, checkpoint_every=4)
    assert train(run, corpus, settings, progress=stop.progress, should_stop=stop) is None
    assert [p.name for p in checkpoint.committed(run)] == ["step-000000008", "step-000000012"]
    return run


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("params.safetensors", truncate),
        ("exp_avg.safetensors", flip),
        ("exp_avg_sq.safetensors", Path.unlink),
        ("manifest.json", truncate),
        ("manifest.json", flip),
        ("COMMITTED", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(stopped, file, damage, caplog):
    damage(stopped.path / "ckpt" / "step-000000012" / file)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(stopped)
    assert found.step == 8
    assert "step-000000012" in caplog.text


def test_training_over_a_damaged_checkpoint_ends_as_if_it_had_been_whole(
    stopped, corpus, tmp_path_factory
):
    whole = RunDir.create(tmp_path_factory.mktemp("whole"), stopped.spec(), "tiny")
    train(whole, corpus, TrainSettings(threads=1))
    flip(stopped.path / "ckpt" / "step-000000012" / "params.safetensors")
    train(stopped, corpus, TrainSettings(threads=1))
    assert curve(stopped) == curve(whole)
    assert list(stopped.path.glob("ckpt/damaged-step-000000012-*"))


def test_nothing_in_a_run_directory_is_a_pickle(stopped):
    for path in stopped.path.rglob("*"):
        if path.is_file():
            assert path.suffix in {".json", ".jsonl", ".safetensors", ""}
            assert path.read_bytes()[:2] not in {b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"}


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(stopped, corpus, tmp_path):
    """A limit on file sizes stands in for a full disk: the write of the tensors fails midway."""
    size = (stopped.path / "ckpt/step-000000012/params.safetensors").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    done = subprocess.run(
        [sys.executable, str(RANK), str(stopped.root), stopped.run_key, str(corpus.path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert "params.safetensors" in done.stderr
    assert checkpoint.newest(stopped).step == 12
    assert not list(stopped.path.glob("ckpt/.tmp-*"))
    train(stopped, corpus, TrainSettings(threads=1))
    assert stopped.result()["step"] == 24
