"""Exports: what transfer reads, at the end and at milestones, whole or not there."""

import os
import shutil

import pytest
import torch
from test_loop import StopAt, configure, parameters

from scaling.config import TrainSettings
from scaling.files import RecordError
from scaling.rundir import RunDir, Superseded
from scaling.train import checkpoint
from scaling.train.export import export, exported, load_encoder, read_encoder
from scaling.train.loop import train


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run with four milestones, of steps 6, 12, 18 and 24."""
    run = RunDir.create(tmp_path_factory.mktemp("finished"), configure(corpus), "tiny")
    train(run, corpus, TrainSettings(threads=1, milestones=4, checkpoint_every=7))
    return run


def test_the_end_and_every_milestone_are_exported(finished):
    assert list(exported(finished)) == [6, 12, 18, 24]
    model, step = load_encoder(finished)
    assert step == 24
    assert not model.training
    last = parameters(finished)
    assert all(torch.equal(v, last[n]) for n, v in model.state_dict().items())
    earlier, step = load_encoder(finished, 12)
    assert step == 12
    assert not torch.equal(earlier.token_emb.weight, model.token_emb.weight)


def test_without_milestones_the_end_alone_is_exported(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    stop = StopAt(10)
    train(run, corpus, TrainSettings(threads=1), progress=stop.progress, should_stop=stop)
    with pytest.raises(RecordError, match="nothing is exported yet; a run exports its encoder at"):
        load_encoder(run)
    train(run, corpus, TrainSettings(threads=1))
    assert list(exported(run)) == [24]


@pytest.mark.parametrize(
    ("milestones", "steps"), [(0, (24,)), (1, (24,)), (5, (4, 9, 14, 19, 24)), (99, range(1, 25))]
)
def test_milestones_are_evenly_spaced_and_end_at_the_last_step(milestones, steps):
    assert TrainSettings(milestones=milestones).milestone_steps(24) == tuple(steps)


def test_an_export_stands_for_itself(finished, tmp_path):
    """Two files anywhere are enough: no run, no corpus."""
    copied = shutil.copytree(exported(finished)[18], tmp_path / "encoder")
    model = read_encoder(copied)
    expected, _ = load_encoder(finished, 18)
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_step_that_is_not_exported_is_refused_with_those_that_are(finished):
    with pytest.raises(RecordError, match="no step 7; exported: 6, 12, 18, 24"):
        load_encoder(finished, 7)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_export_is_named(finished, tmp_path, file):
    folder = shutil.copytree(exported(finished)[6], tmp_path / "encoder")
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 64
    (folder / file).write_bytes(bytes(data))
    with pytest.raises(RecordError, match=file):
        read_encoder(folder)


def test_an_export_that_a_crash_left_out_is_made_by_the_next_start(corpus, tmp_path, monkeypatch):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    settings = TrainSettings(threads=1, milestones=2)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("scaling.train.loop.export", crash)
    with pytest.raises(KeyboardInterrupt):
        train(run, corpus, settings)
    monkeypatch.undo()
    assert checkpoint.newest(run).step == 12
    assert not exported(run)
    train(run, corpus, settings)
    assert list(exported(run)) == [12, 24]


def test_publishing_again_changes_nothing(finished):
    folder = exported(finished)[24]
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    export(finished, finished.spec(), checkpoint.newest(finished), 1)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before


def test_an_export_whose_checkpoint_was_lost_gives_way_to_the_one_of_the_result(corpus, tmp_path):
    """Killed between the last export and the result; then the last checkpoint is damaged."""
    run = RunDir.create(tmp_path, configure(corpus, dropout=0.1), "tiny")
    train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=50))
    (run.path / "result.json").unlink()
    os.truncate(run.path / "ckpt/step-000000024/params.safetensors", 100)
    train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=80))  # another dropout
    model, _ = load_encoder(run)
    last = parameters(run)
    assert all(torch.equal(v, last[n]) for n, v in model.state_dict().items())
    assert len(list(run.path.glob("export/stale-step-000000024-*"))) == 1


def test_a_superseded_generation_exports_nothing(corpus, tmp_path, monkeypatch):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    save = checkpoint.save

    def overtaken(*args, **kwargs):
        save(*args, **kwargs)
        if kwargs["step"] == 24:
            run.start_generation({"resumed_from": 0})

    monkeypatch.setattr(checkpoint, "save", overtaken)
    with pytest.raises(Superseded):
        train(run, corpus, TrainSettings(threads=1))
    assert not exported(run)
    assert not list(run.path.glob("export/*"))


def test_a_run_that_ended_before_exports_existed_is_exported_by_train(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    result = train(run, corpus, TrainSettings(threads=1))
    shutil.rmtree(run.path / "export")
    with pytest.raises(RecordError, match=f"clue-scaling train {run.run_key}"):
        load_encoder(run)
    assert train(run, corpus, TrainSettings(threads=1)) == result
    assert load_encoder(run)[1] == 24


def test_what_a_killed_start_left_half_written_is_removed_by_the_next(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    left = [run.path / f / ".tmp-step-000000009-abc" for f in ("ckpt", "export")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "params.safetensors").write_bytes(b"half")
    train(run, corpus, TrainSettings(threads=1))
    assert not any(folder.exists() for folder in left)
