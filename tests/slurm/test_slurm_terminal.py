"""Ctrl-C and the end of an ssh session, in real processes (F21)."""

import os
import signal
import subprocess
import sys
import time

import pytest
from scenario import Rank, one_writer, states, whole, without_code

from scaling.rundir import RunDir
from scaling.slurm import sync

CLI = [sys.executable, "-c", "from scaling.cli import main; main()"]


SWEEP = """
name = "study"
figure = "none"
source = "a test"
corpus = "tiny.toml"
[base]
model = "1x8"
batch_size = 8
steps = 4
evaluations = 2
[grid]
items_per_user = [2, 3, 4]
"""


@pytest.fixture(autouse=True)
def _at_a_terminal():
    """Signals mean what they mean there, also where these tests run under ``nohup`` or behind a
    script's ``&``, which ignores Ctrl-C for them."""
    kept = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGHUP, signal.SIGTERM)}
    kept[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def study(tiny_corpus, fake_slurm):
    """A root with a corpus, a sweep of three runs, and profiles."""
    root = tiny_corpus(64)
    (root / "study.toml").write_text(SWEEP)
    (root / "slurm.toml").write_text('name = "fake"\nsettle_s = 0\nquarantine_s = 0\n')
    return root


@pytest.mark.parametrize(
    ("verb", "sbatch", "signals", "whole_group"),
    [
        ("submit", "slow", [signal.SIGINT], True),
        ("submit", "slow_accepted", [signal.SIGINT, signal.SIGINT], True),
        ("submit", "slow_accepted", [signal.SIGHUP], False),
        ("watch", None, [signal.SIGINT], True),
        ("watch", None, [signal.SIGHUP], False),
    ],
)
def test_f21_ctrl_c_and_hangup_of_the_login(
    study, fake_slurm, slurm_profile, until, monkeypatch, verb, sbatch, signals, whole_group
):
    """It ends at once; jobs go on; whoever comes next goes on from what it left."""
    fake_slurm.fault(sbatch=sbatch)
    words = ["submit", "study.toml", "--cluster", "slurm.toml", "--root", str(study)]
    process = subprocess.Popen(
        [*CLI, *words, *(["--watch"] if verb == "watch" else [])],
        cwd=study,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if verb == "watch":
        until(lambda: len(fake_slurm.jobs()) == 3, step=0.05)
        fake_slurm.set(1, state="RUNNING")
        time.sleep(0.3)
    else:
        until(lambda: fake_slurm.sbatches(), step=0.05)
        time.sleep(0.3)
    begun = time.monotonic()
    for number in signals:
        (os.killpg if whole_group else os.kill)(process.pid, number)
        time.sleep(0.02)
    said, _ = process.communicate(timeout=20)
    assert time.monotonic() - begun < 2
    expected = (130, -signal.SIGINT) if signals[0] == signal.SIGINT else (-signal.SIGHUP,)
    assert process.returncode in expected, said
    assert 'Traceback (most recent call last):\n  File "<string>"' not in said
    fake_slurm.fault()

    monkeypatch.setattr("scaling.data.corpus.Corpus.find", lambda root, digest: digest)
    without_code(monkeypatch.setattr)
    folders = study.glob("runs/*/*")
    runs = [RunDir(study, p.name) for p in folders]
    assert len(runs) == 3
    waited = slurm_profile.model_copy(update={"quarantine_s": 0})
    jobs = fake_slurm.jobs()
    (sweep,) = study.glob("sweeps/*")
    rows = sync.sync(study, runs, waited, sweep=sweep.name)
    assert states(rows).count("QUEUED") + states(rows).count("RUNNING") == 3
    if jobs:  # they are untouched, and none is made twice
        assert fake_slurm.jobs() == jobs
        assert {r["action"] for r in rows} == {None}
    for number, job in enumerate(fake_slurm.jobs()):
        fake_slurm.set(number, state="RUNNING")
        assert Rank(study, job).finish() == 0
        fake_slurm.set(number, state="COMPLETED")
    assert len(fake_slurm.jobs()) == 3
    one_writer(runs)


WATCH = """
import sys
from pathlib import Path
from scaling.rundir import RunDir
from scaling.slurm import sync
from scaling.slurm.profile import ClusterProfile
root, key = sys.argv[1:]
here = ClusterProfile(name="here", executor="local")
sync.sync(Path(root), [RunDir(Path(root), key)], here, sweep="s", watch=True, interval_s=0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_f21_local_jobs_outlive_the_terminal_that_started_them(root, make_runs, until, number):
    (run,) = make_runs(1, steps=60, step_s=0.03)
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(root), run.run_key],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(lambda: (run.progress() or {"step": 0})["step"] >= 3, step=0.02)
    begun = time.monotonic()
    os.killpg(watch.pid, number)
    watch.wait(timeout=20)
    assert time.monotonic() - begun < 2
    until(lambda: run.attempts()[0].end, step=0.05)
    assert run.attempts()[0].end["class"] == "done"
    one_writer([run])
    assert whole(run)
