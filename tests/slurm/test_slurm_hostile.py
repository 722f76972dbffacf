"""Damaged files and odd roots (F19), hostile values and secrets (F20): refused and named, never
trusted. That names of sweeps are safe, is in ``tests/test_sweeps.py``."""

import errno
import os
import pickle
import stat
import time
from pathlib import Path

import pytest
from scenario import Rank, how, one_writer, states, tree

from scaling import ClueError
from scaling.config import ConfigError
from scaling.files import RecordError
from scaling.rundir import RunDir
from scaling.slurm import sync
from scaling.slurm.cancel import cancel
from scaling.slurm.job import EXIT_SUPERSEDED
from scaling.slurm.profile import ClusterProfile, Shape, safe_root
from scaling.slurm.submission import SubmissionError

STANDIN = Path(__file__).parent / "standin"
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")


# F19: damaged files, odd roots

TORN = {"empty": b"", "cut": b'{"token": "s', "zeros": b"\x00" * 64, "a list": b"[]",
        "foreign": b'{"a": 1}'}  # fmt: skip


@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
@pytest.mark.parametrize("name", ["spec", "result", "intent", "submit", "claim", "cancel", "end"])
def test_f19_a_damaged_record_is_reported_and_left_alone(
    root, make_runs, fake_slurm, slurm_profile, ranks, name, content
):
    damaged, other = runs = make_runs(2)
    sync.submit(root, [damaged], slurm_profile, sweep="s")
    Rank(root, fake_slurm.jobs()[0]).begin()
    fake_slurm.set(0, state="NODE_FAIL")  # it would be tried again
    folder = damaged.path if name in ("spec", "result") else damaged.path / "attempts/0001"
    (folder / f"{name}.json").write_bytes(content)
    before = tree(damaged.path)
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (rows[0]["state"], rows[0]["cause"]) == ("FAILED", "damaged")
    assert f"{name}.json" in rows[0]["evidence"] or "attempt 1" in rows[0]["evidence"]
    assert (rows[1]["state"], rows[1]["action"]) == ("QUEUED", "submit")
    if name == "spec":
        with pytest.raises(RecordError, match=r"spec\.json"):
            sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
    else:
        rows = sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
        assert [r["action"] for r in rows] == [None, None]
    assert cancel([damaged]) == []
    assert tree(damaged.path) == before
    assert other.attempts()[0].submit


def test_f19_a_folder_without_an_intent_is_no_attempt(root, make_runs, fake_slurm, slurm_profile):
    """As a login leaves it that dies in mid-write."""
    (run,) = make_runs(1)
    (run.path / "attempts/0001").mkdir(parents=True)
    (run.path / "attempts/0001/.tmp-1234").write_text('{"token": "s')
    (row,) = sync.submit(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["attempts"]) == ("QUEUED", 1)
    assert fake_slurm.run(0) == 0
    one_writer([run])


@pytest.mark.parametrize("content", [b"", b'{"runs": [', b"[]", b'{"runs": ["../../../etc"]}'])
def test_f19_a_damaged_chunk_starts_nothing(root, make_runs, fake_slurm, slurm_profile, content):
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    (chunk,) = root.glob("sweeps/s/chunks/*/chunk.json")
    chunk.write_bytes(content)
    assert fake_slurm.run(0) == 1
    assert (run.generations(), run.attempts()[0].claim) == ([], None)
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["action"]) == ("FAILED", None)
    assert "Error" in row["evidence"]


@pytest.mark.parametrize("name", ["budget", "plan"])
@pytest.mark.parametrize("content", TORN.values(), ids=TORN)
def test_f19_a_damaged_budget_or_plan_stops_with_a_word(
    root, make_runs, fake_slurm, slurm_profile, name, content
):
    runs = make_runs(1)
    (root / "sweeps/s").mkdir(parents=True)
    (root / f"sweeps/s/{name}.json").write_bytes(content)
    with pytest.raises(ClueError, match=f"{name}.json"):
        sync.submit(root, runs, slurm_profile, sweep="s")
    assert fake_slurm.jobs() == []
    assert runs[0].attempts() == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("times", [2, 1000])
def test_f19_a_file_that_nfs_has_lost_sight_of(
    root, make_runs, fake_slurm, slurm_profile, monkeypatch, number, times
):
    """For a moment: nobody notices. For long: reported, nothing is done, and it recovers."""
    monkeypatch.setattr("scaling.files.RETRIES_S", (0.01, 0.01, 0.01))
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    before, read, failures = tree(root), Path.read_bytes, []

    def lost(self):
        if self.name == "intent.json" and len(failures) < times:
            failures.append(self)
            raise OSError(number, os.strerror(number), str(self))
        return read(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lost)
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert failures
    if times == 2:
        assert (row["state"], row["cause"]) == ("QUEUED", None)
    else:
        assert (row["state"], row["cause"], row["action"]) == ("FAILED", "damaged", None)
        assert os.strerror(number) in row["evidence"]
    assert tree(root) == before
    assert states(sync.sync(root, [run], slurm_profile, sweep="s")) == ["QUEUED"]


@pytest.mark.parametrize("ahead", [-600.0, 600.0])
def test_f19_clocks_ten_minutes_apart_make_nobody_write_twice(
    root, make_runs, fake_slurm, ranks, monkeypatch, ahead
):
    """The clock of the second login; sbatch's answer was lost and its job comes late."""
    profile = ClusterProfile(name="fake", settle_s=30, quarantine_s=600, shape=Shape(time_min=60))
    lost, known = runs = make_runs(2, steps=4)
    fake_slurm.fault(sbatch="timeout_late")
    sync.submit(root, [lost], profile, sweep="s")
    fake_slurm.fault()
    sync.submit(root, [known], profile, sweep="s")
    fake_slurm.change(purged=True, unaccounted=True)  # a queue that hides it for a moment
    here = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: here() + ahead + 1)
        rows = sync.sync(root, runs, profile, sweep="s")
    impatient = "submit" if ahead > 0 else None
    assert [r["action"] for r in rows] == [impatient] * 2
    fake_slurm.late()
    fake_slurm.change(purged=False, unaccounted=False)
    exits = []
    for number, job in enumerate(fake_slurm.jobs()):
        fake_slurm.set(number, state="RUNNING")
        exits.append(Rank(root, job).finish())
        fake_slurm.set(number, state="FAILED" if exits[-1] else "COMPLETED")
    one_writer(runs)
    assert sorted(exits) == ([0, 0, 93, 93] if ahead > 0 else [0, 0])
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: here() + ahead)
        assert states(sync.sync(root, runs, profile, sweep="s")) == ["DONE"] * 2


def test_f19_a_root_that_became_read_only(root, make_runs, fake_slurm, slurm_profile, monkeypatch):
    """Status goes on, submission stops with the system's word before sbatch."""
    runs = make_runs(2)
    sync.submit(root, runs[:1], slurm_profile, sweep="s")
    before, jobs = tree(root), fake_slurm.jobs()

    def opened(path, mode="r", **terms):
        if set(mode) & set("wxa"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open(path, mode, **terms)

    def mkdir(self, *arguments, **terms):
        if not self.is_dir():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr("scaling.files.open", opened, raising=False)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert states(sync.status(runs)) == ["QUEUED", "PLANNED"]
    with pytest.raises(OSError, match="Read-only file system"):
        sync.submit(root, runs, slurm_profile, sweep="s")
    assert (tree(root), fake_slurm.jobs()) == (before, jobs)


ODD = {
    "another's": "belongs to user 12345",
    "world-writable": "anybody may write to it",
    "symbolic link": "is a symbolic link",
}


@pytest.mark.parametrize(
    ("place", "oddity"),
    [
        *((p, "world-writable") for p in (".", "runs", "sweeps", "code")),
        *((p, "symbolic link") for p in ("runs", "sweeps", "code")),
        *(pytest.param(p, "another's", marks=as_root) for p in (".", "runs", "sweeps", "code")),
    ],
)
def test_f19_a_root_that_somebody_else_can_write_to_is_refused(
    root, make_runs, fake_slurm, slurm_profile, tmp_path, place, oddity
):
    runs = make_runs(2)
    sync.submit(root, runs[:1], slurm_profile, sweep="s")
    path = root / place
    if oddity == "another's":
        os.chown(path, 12345, 12345)
    elif oddity == "world-writable":
        path.chmod(0o777)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    for drive in (sync.sync, sync.submit):
        with pytest.raises(ConfigError, match=ODD[oddity]):
            drive(root, runs, slurm_profile, sweep="s")
    assert len(fake_slurm.jobs()) == 1


@pytest.mark.parametrize(
    ("place", "oddity"),
    [
        ("run", "symbolic link"),
        ("run", "world-writable"),
        ("chunk", "world-writable"),
        pytest.param("root", "another's", marks=as_root),
        pytest.param("run", "another's", marks=as_root),
        pytest.param("chunk", "another's", marks=as_root),
        pytest.param("arguments", "another's", marks=as_root),
    ],
)
def test_f19_a_job_trains_nothing_that_somebody_else_can_write_to(
    root, make_runs, fake_slurm, slurm_profile, tmp_path, monkeypatch, place, oddity
):
    monkeypatch.setenv("FAKE_AUDIT", str(tmp_path / "opened"))
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    (chunk,) = root.glob("sweeps/s/chunks/*")
    path = {"root": root, "run": run.path, "chunk": chunk, "arguments": chunk / "arguments.pkl"}[
        place
    ]
    if oddity == "another's":
        os.chown(path, 12345, 12345)
    elif oddity == "world-writable":
        path.chmod(0o777)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert fake_slurm.run(0) == 1
    assert run.generations() == []
    assert not (run.path / "attempts/0001/claim.json").exists()
    if place == "arguments":
        assert not (tmp_path / "opened").exists()
    elif place == "run" and oddity == "symbolic link":
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
        assert (row["cause"], row["action"]) == ("damaged", None)
        assert ODD[oddity] in row["evidence"]


# F20: hostile values

HOSTILE = ["a\nb", "a'b", 'a"b', "$(touch canary)", "a;b", "%j", "../x", "-rf", "é", "", "a b",
           "`touch canary`", "a\x00b", "a\tb", "a\\b", "~", "a,b;c", "\u202ea", "x" * 300, "a&&b",
           "#SBATCH", "${HOME}", "a|b", "a>b", "*"]  # fmt: skip
WORDS = ["name", "partition", "account", "qos", "constraint", "exclude"]
ORDINARY = {"constraint": {"a|b", "a&&b"}, "exclude": {"x" * 300}}
"""In Slurm's own notation, and in a comment of a script."""


@pytest.mark.parametrize("value", HOSTILE)
def test_f20_hostile_values_never_reach_a_script(
    root, make_runs, fake_slurm, slurm_profile, value, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for field in WORDS:
        if value not in ORDINARY.get(field, ()):
            with pytest.raises(ConfigError, match=field):
                ClusterProfile.parse({"name": "x", field: value}, "profile")
    for field in (
        "time_min",
        "nodes",
        "tasks_per_node",
        "gpus_per_node",
        "cpus_per_task",
        "mem_gb",
    ):
        with pytest.raises(ConfigError, match=field):
            ClusterProfile.parse({"name": "x", "shape": {field: value}}, "profile")
        with pytest.raises(ConfigError, match=field):
            ClusterProfile.parse({"name": "x", "larger": [{field: value}]}, "profile")
    for field in (
        "executor",
        "max_parallel",
        "array_size",
        "signal_lead_s",
        "quarantine_s",
        "train",
    ):
        with pytest.raises(ConfigError, match=field):
            ClusterProfile.parse({"name": "x", field: value}, "profile")
    with pytest.raises(ConfigError, match="unknown key"):
        ClusterProfile.parse({"name": "x", value: 1}, "profile")
    runs = make_runs(1)
    with pytest.raises(SubmissionError, match="sweep"):
        sync.submit(root, runs, slurm_profile, sweep=value)
    with pytest.raises(RecordError, match="not a run key"):
        RunDir(root, value)
    if value not in ("", "../x", "-rf", "x" * 300):  # these are ordinary in a path below a folder
        with pytest.raises(ConfigError, match="root folder"):
            safe_root(tmp_path / value)
    for line in ("a\nb", "a\x00", "", "a\x1b[0m"):
        with pytest.raises(ConfigError, match="setup"):
            ClusterProfile.parse({"name": "x", "setup": [line]}, "profile")
    assert fake_slurm.jobs() == []
    assert not list(tmp_path.rglob("canary"))


def test_f20_nodes_that_records_and_slurm_name_are_not_believed(
    root, make_runs, fake_slurm, slurm_profile, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    runs = make_runs(4)
    evil = "x\n#SBATCH --wrap=touch${IFS}canary"
    sync.submit(root, runs, slurm_profile, sweep="s")
    for run in runs[:2]:
        run.record(1, "end", {"class": "node_fail", "nodes": [evil, "$(touch canary)"]})
    for number in range(4):
        fake_slurm.set(number, state="NODE_FAIL", node="$(touch canary);x")
    sync.sync(root, runs, slurm_profile, sweep="s")
    sync.sync(root, runs, slurm_profile, sweep="s")
    assert "canary" not in fake_slurm.sbatches()[-1]
    assert {j["exclude"] for j in fake_slurm.jobs()} == {""}
    assert set(fake_slurm.finish()) == {0}
    assert not list(tmp_path.rglob("canary"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_f20_no_secret_is_written_no_foreign_pickle_read_and_files_are_the_user_s_alone(
    root, make_runs, fake_slurm, slurm_profile, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_TOKEN", "canary-value")
    monkeypatch.setenv("FAKE_AUDIT", str(tmp_path / "opened"))
    runs = make_runs(3, fail_at=7, error="host")
    profile = slurm_profile.model_copy(update={"setup": ('test "$SECRET_TOKEN"',)})
    sync.submit(root, runs[:2], profile, sweep="s")
    (chunk,) = root.glob("sweeps/s/chunks/*")
    names = ("evil.pkl", "101_0_0_result.pkl", "result.pkl", "ckpt/state.pkl")
    evil = [place / name for place in (*(r.path for r in runs), chunk) for name in names]
    for path in evil:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Evil()))
    planted = set(root.rglob("*"))
    assert fake_slurm.finish() == [1, 1]
    how(root)
    with monkeypatch.context() as patched:
        patched.setattr(pickle, "load", None)
        patched.setattr(pickle, "loads", None)
        sync.status(runs)
        sync.sync(root, runs, profile, sweep="s")
        cancel(runs[2:])
    assert set(fake_slurm.finish()) <= {0, EXIT_SUPERSEDED}
    here = ClusterProfile(name="here", executor="local", max_parallel=2)
    sync.submit(root, runs[2:], here, sweep="s", retry_failed=True)
    sync.sync(root, runs, here, sweep="s", watch=True, interval_s=0.1)
    assert [r.result()["status"] for r in runs] == ["done"] * 3

    assert not list(tmp_path.rglob("canary"))
    files = [p for p in root.rglob("*") if p.is_file()]
    assert len(files) > 40
    assert [p for p in files if b"canary-value" in p.read_bytes()] == []

    opened = {Path(line) for line in (tmp_path / "opened").read_text().splitlines()}
    assert opened
    assert {p.name.partition("_")[2] or p.name for p in opened} <= {
        "0_submitted.pkl", "1_submitted.pkl", "submitted.pkl", "arguments.pkl",
    }  # fmt: skip
    assert {p.parent.parent for p in opened} == {root / "sweeps/s/chunks"}

    ours = [p for p in files if p not in planted or "attempts" in p.parts or chunk in p.parents]
    ours = [p for p in ours if p.name not in {e.name for e in evil}]
    assert {"intent.json", "claim.json", "end.json", "COMMITTED", "result.json", "1.jsonl"} <= {
        p.name for p in ours
    }
    assert [p for p in ours if stat.S_IMODE(p.stat().st_mode) & 0o077] == []
