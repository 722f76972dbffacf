"""The code that jobs run and what they run it on: archives, their check, packages that drift."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import scaling
from scaling.slurm import code, environment
from scaling.slurm.code import CodeError

PACKAGE = Path(scaling.__file__).parent
ARCHIVE = """
import sys
from pathlib import Path
from scaling.slurm.code import archive
print(archive(Path(sys.argv[1])))
"""


def archived(package: Path, root: Path) -> str:
    """Digest of the archive that a process makes which imports that copy of the package."""
    env = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", ARCHIVE, str(root)]
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package that may be edited."""
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "copy" / "scaling", ignore=ignore))


def test_an_archive_is_what_is_imported_and_runs_by_itself(tmp_path, copy):
    digest = archived(copy, tmp_path)
    path = code.archive_path(tmp_path, digest)
    with zipfile.ZipFile(path) as packed:
        held = {name: packed.read(name) for name in packed.namelist()}
    files = [p for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert held == {str(p.relative_to(copy.parent)): p.read_bytes() for p in files}
    code.verify(tmp_path, digest)
    env = {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    said = subprocess.run(
        [sys.executable, "-c", "import scaling.slurm.job; print(scaling.slurm.job.__file__)"],
        env=env, check=True, capture_output=True, text=True, cwd=PACKAGE.parent,
    ).stdout.strip()  # fmt: skip
    assert said == f"{path}/scaling/slurm/job.py"


def test_the_digest_is_of_the_content(tmp_path, copy):
    first = archived(copy, tmp_path)
    kept = code.archive_path(tmp_path, first).stat()
    os.utime(copy / "flops.py", (0, 0))
    assert archived(copy, tmp_path) == first
    assert code.archive_path(tmp_path, first).stat().st_mtime_ns == kept.st_mtime_ns
    (copy / "flops.py").write_text((copy / "flops.py").read_text() + "# changed\n")
    second = archived(copy, tmp_path)
    (copy / "new.py").write_text("")
    third = archived(copy, tmp_path)
    (copy / "new.py").rename(copy / "other.py")
    assert len({first, second, third, archived(copy, tmp_path)}) == 4
    for digest in (first, second, third):
        code.verify(tmp_path, digest)


def test_a_changed_archive_is_refused(tmp_path, copy):
    digest = archived(copy, tmp_path)
    path = code.archive_path(tmp_path, digest)
    with pytest.raises(CodeError, match="cannot be read"):
        code.verify(tmp_path, "a" * 16)
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("scaling/evil.py", "print('hello')")
    with pytest.raises(CodeError, match="was changed after it was written"):
        code.verify(tmp_path, digest)
    path.write_bytes(b"PK")
    with pytest.raises(CodeError, match="cannot be read"):
        code.verify(tmp_path, digest)


def test_what_git_knows_is_recorded(tmp_path, copy):
    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", *who, *words], cwd=copy.parent, check=True, capture_output=True)

    record = code.archive_path(tmp_path, archived(copy, tmp_path)).with_suffix(".json")
    assert json.loads(record.read_text())["commit"] is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    (copy / "flops.py").write_text("# nothing\n")
    (copy / "new.py").write_text("secret = 1\n")
    path = code.archive_path(tmp_path, archived(copy, tmp_path))
    said = json.loads(path.with_suffix(".json").read_text())
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=copy.parent, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert said["commit"] == head
    assert said["changed"] == ["scaling/flops.py", "scaling/new.py"]
    assert b"+# nothing" in path.with_suffix(".diff").read_bytes()
    with zipfile.ZipFile(path) as packed:
        assert packed.read("scaling/new.py") == b"secret = 1\n"


def test_an_environment_holds_packages_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("SLURM_JWT", "canary")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = environment.capture(tmp_path)
    (path,) = (tmp_path / "environments").iterdir()
    assert path.stem == found["environment"]
    record = json.loads(path.read_text())
    assert record["packages"]["numpy"] == __import__("numpy").__version__
    assert found["variables"].items() >= {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "17"}.items()
    assert "canary" not in path.read_text() + json.dumps(found)
    assert environment.capture(tmp_path)["environment"] == found["environment"]


def test_only_packages_that_matter_drift(tmp_path, monkeypatch):
    versions = {"numpy": "1.0", "rich": "1.0", "nvidia-cublas-cu12": "12.1"}

    class Package:
        def __init__(self, name):
            self.metadata = {"Name": name, "Version": versions[name]}

    monkeypatch.setattr(environment.metadata, "distributions", lambda: map(Package, versions))
    first = environment.capture(tmp_path)["environment"]
    versions["rich"] = "2.0"
    second = environment.capture(tmp_path)["environment"]
    assert first != second
    assert environment.drift(tmp_path, first, second) == []
    versions["numpy"] = "2.0"
    del versions["nvidia-cublas-cu12"]
    third = environment.capture(tmp_path)["environment"]
    assert environment.drift(tmp_path, first, third) == [
        "numpy 1.0 -> 2.0",
        "nvidia-cublas-cu12 12.1 -> none",
    ]


def test_gpus_are_named_as_the_driver_names_them(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA V100, GPU-1, 535.1, 1530 MHz'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = environment.capture(tmp_path / "root")
    assert found["gpus"] == [
        {
            "name": "NVIDIA V100",
            "uuid": "GPU-1",
            "driver_version": "535.1",
            "clocks.max.sm": "1530 MHz",
        }
    ]


def test_variables_that_change_slurms_commands_do_not_reach_them(tmp_path, monkeypatch):
    from scaling.slurm.scheduler import command

    for name in ("SQUEUE_PARTITION", "SBATCH_TIMELIMIT", "SLURM_TIME_FORMAT", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ok, output = command("env")
    assert ok
    names = {line.partition("=")[0] for line in output.splitlines()}
    assert {n for n in names if n.startswith(("SQUEUE_", "SBATCH_", "SLURM_"))} == {"SLURM_CONF"}
    assert "OMP_NUM_THREADS" in names
