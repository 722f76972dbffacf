"""The code, its archive and the packages change after submission (F17).

That archives hold what was imported and packages are compared: ``test_slurm_code.py``.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from scenario import how, whole

import scaling
from scaling.config import Evaluation
from scaling.slurm import sync
from scaling.slurm.code import archive_path

STANDIN = Path(__file__).parent / "standin"


LOGIN = """
import json, sys
from pathlib import Path
from scaling import ClueError
from scaling.rundir import RunDir
from scaling.slurm import sync
from scaling.slurm.profile import ClusterProfile
root, keys, orders = json.loads(sys.argv[1])
profile = ClusterProfile(name="fake", settle_s=0)
drive = sync.submit if orders else sync.sync
try:
    runs = [RunDir(Path(root), key) for key in keys]
    rows = drive(Path(root), runs, profile, sweep="s", **orders)
except ClueError as e:
    sys.exit(str(e))
print(json.dumps(rows))
"""


@pytest.fixture
def edited(tmp_path, root):
    """``edited(mark)`` edits a copy of the package, ``edited.login(runs, **orders)`` is a login
    whose Python imports it."""
    copy = tmp_path / "copy" / "scaling"
    shutil.copytree(
        Path(scaling.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    text = (copy / "__init__.py").read_text()

    def edit(mark, job=""):
        (copy / "__init__.py").write_text(f"{text}\nMARK = {mark}\n")
        if job:
            (copy / "slurm" / "job.py").write_text(job)

    def login(runs, **orders):
        path = f"{copy.parent}{os.pathsep}{STANDIN}"
        words = json.dumps([str(root), [r.run_key for r in runs], orders])
        done = subprocess.run(
            [sys.executable, "-c", LOGIN, words],
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()

    edit.login = login
    edit.path = str(copy.parent)
    return edit


def marks(run):
    return [start["mark"] for start in run.starts()]


def test_f17_an_edit_after_submission_reaches_no_job(
    root, make_runs, fake_slurm, edited, monkeypatch
):
    """Runs that have steps keep their code, where nobody says otherwise."""
    keeps, takes, begun, fresh = runs = make_runs(4, fail_at=7, error="value")
    edited(1)
    assert [r["action"] for r in edited.login(runs)] == ["submit"] * 4
    edited(2, job="raise SystemExit('the edited job runs')")
    monkeypatch.setenv("PYTHONPATH", f"{edited.path}{os.pathsep}{STANDIN}")
    assert [fake_slurm.run(0), fake_slurm.run(1)] == [1, 1]
    how(root, fail_at=7, error="host")
    assert fake_slurm.run(2) == 1
    assert [marks(r) for r in runs] == [[1], [1], [1], []]
    assert keeps.attempts()[0].end["evidence"] == "rank 0: ValueError: boom"
    fake_slurm.set(3, state="NODE_FAIL")
    edited(2, job=(Path(scaling.__file__).parent / "slurm" / "job.py").read_text())
    assert [r["action"] for r in edited.login(runs)] == [None, None, "submit", "submit"]
    said = edited.login(runs[:2], retry_failed=True)
    assert "2 runs" in said
    assert "have checkpoints and the code has changed since" in said
    assert len(fake_slurm.jobs()) == 6
    assert edited.login([keeps], retry_failed=True, new_code=False)[0]["action"] == "submit"
    assert edited.login([takes], retry_failed=True, new_code=True)[0]["action"] == "submit"
    assert fake_slurm.finish() == [0] * 4
    assert [marks(r) for r in runs] == [[1, 1], [1, 2], [1, 1], [2]]
    assert all(whole(r) for r in (keeps, takes, begun, fresh))


@pytest.mark.parametrize("harm", ["changed", "missing", "cut"])
def test_f17_an_archive_that_was_tampered_with_is_refused(
    root, make_runs, fake_slurm, slurm_profile, harm
):
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    path = archive_path(root, run.attempts()[0].intent["code"])
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        with zipfile.ZipFile(path, "a") as packed:
            packed.writestr("scaling/evil.py", "print('hello')")
    assert fake_slurm.run(0) == 1
    assert run.generations() == []
    (row,) = sync.status([run])
    assert row["state"] == "FAILED"
    (log,) = root.glob("sweeps/s/chunks/*/*_0_log.err")
    if harm == "missing":
        assert "is missing, or not your own" in log.read_text()
        assert row["cause"] == "error"  # and no node is to blame
        return
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["cause"], row["action"]) == ("error", None)
    expected = "was changed after it was written" if harm == "changed" else "cannot be read"
    assert expected in row["evidence"]


def test_f17_other_packages_than_before_are_drift(root, make_runs, fake_slurm, slurm_profile):
    (run,) = make_runs(1, fail_at=7, error="host")
    sync.submit(root, [run], slurm_profile, sweep="s")
    assert fake_slurm.run(0) == 1
    # As if the first start had had another torch.
    start, *rest = run.metrics_path(1).read_text().splitlines()
    start = json.loads(start)
    digest = start["job"]["environment"]
    there = json.loads((root / f"environments/{digest}.json").read_text())
    there["packages"]["torch"] = "0.4.1"
    (root / f"environments/{'a' * 16}.json").write_text(json.dumps(there))
    start["job"]["environment"] = "a" * 16
    run.metrics_path(1).write_text("\n".join([json.dumps(start), *rest, ""]))
    assert sync.sync(root, [run], slurm_profile, sweep="s")[0]["action"] == "submit"
    assert fake_slurm.run(1) == 1
    for drive in (sync.sync, sync.submit):
        (row,) = drive(root, [run], slurm_profile, sweep="s")
        assert (row["state"], row["cause"], row["action"]) == ("FAILED", "drift", None)
    assert "torch 0.4.1 -> " in row["evidence"]
    assert "--allow-drift" in row["evidence"]
    assert run.generations() == [1]
    sync.submit(root, [run], slurm_profile, sweep="s", retry_failed=True, allow_drift=True)
    assert fake_slurm.run(2) == 0
    assert run.starts()[1]["job"]["environment"] == digest
    assert whole(run)


def test_f17_what_is_trained_is_evaluated_by_code_and_packages_of_today(
    root, make_runs, fake_slurm, edited
):
    """They cannot change it any more, and what it was trained with may know no evaluations."""
    (run,) = make_runs(1)
    edited(1)
    edited.login([run])
    assert fake_slurm.run(0) == 0
    start, *rest = run.metrics_path(1).read_text().splitlines()
    start = json.loads(start)
    (root / f"environments/{'a' * 16}.json").write_text(
        json.dumps({"python": "2.7.18", "packages": {"torch": "0.4.1"}})
    )
    start["job"]["environment"] = "a" * 16
    run.metrics_path(1).write_text("\n".join([json.dumps(start), *rest, ""]))
    edited(2)
    run.want([Evaluation(corpus_digest="a" * 16, task="food", task_digest="t" * 16)])
    assert [r["action"] for r in edited.login([run])] == ["submit"]
    assert fake_slurm.run(1) == 0
    assert run.over()
    codes = [attempt.intent["code"] for attempt in run.attempts()]
    assert codes[0] != codes[1]
    assert run.starts()[1]["job"]["environment"] != "a" * 16  # by what it was evaluated is known
