"""``slurm/devcluster`` touches nothing that is not its own."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "devcluster" / "devcluster.py"
PYTEST = "pytest -n 2 --dist loadfile --no-loadscope-reorder"


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("devcluster_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OURS", tmp_path / "ours")
    monkeypatch.setattr(module, "FOREIGN", (str(tmp_path / "munge.key"),))
    monkeypatch.setattr(module, "foreign_daemons", lambda ours: [])
    return module


def test_it_refuses_a_machine_with_a_munge_of_its_own(script, tmp_path):
    script.check_machine(tmp_path / "home")
    (tmp_path / "munge.key").touch()
    with pytest.raises(script.Refused, match=r"munge\.key exists"):
        script.check_machine(tmp_path / "home")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "installed").touch()
    script.check_machine(tmp_path / "home")


def test_it_refuses_a_machine_where_another_slurm_runs(tmp_path):
    daemon = subprocess.Popen(["/usr/sbin/munged", "60"], executable="/bin/sleep")
    try:
        done = subprocess.run(
            [SCRIPT.parent / "start", "--dir", tmp_path],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        daemon.kill()
        daemon.wait()
    assert done.returncode == 2
    assert f"munged (process {daemon.pid})" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_stop_ends_what_its_pid_files_name_and_only_if_it_is_ours(script, tmp_path):
    (tmp_path / "run").mkdir()
    argument, variable = f"{tmp_path}/key", {"SLURM_CONF": f"{tmp_path}/etc/slurm.conf"}
    mine = [
        subprocess.Popen(["munged", "-c", "sleep 60; :", argument], executable="/bin/sh"),
        subprocess.Popen(["slurmdbd", "60"], executable="/bin/sleep", env=variable),
    ]
    others = [
        subprocess.Popen(["slurmctld", "60"], executable="/bin/sleep"),
        subprocess.Popen(["sleep", "60"], env=variable),
    ]
    names = ("munged", "slurmdbd", "slurmctld", "mariadbd")
    try:
        for name, process in zip(names, (*mine, *others), strict=True):
            (tmp_path / "run" / f"{name}.pid").write_text(str(process.pid))
        (tmp_path / "run" / "slurmd-gpu1.pid").write_text("torn")
        assert script.processes(tmp_path) == {"munged": mine[0].pid, "slurmdbd": mine[1].pid}
        script.stop(tmp_path)
        assert [process.wait(5) for process in mine] == [-15, -15]
        assert [process.poll() for process in others] == [None, None]
        assert list((tmp_path / "run").iterdir()) == []
        script.stop(tmp_path)
    finally:
        for process in (*mine, *others):
            process.kill()
            process.wait()


def test_stop_where_nothing_was_started(tmp_path):
    done = subprocess.run([SCRIPT.parent / "stop", "--dir", tmp_path / "none"], check=False)
    assert done.returncode == 0
    assert not (tmp_path / "none").exists()


def test_status_where_nothing_was_started(script, tmp_path):
    status = [SCRIPT.parent / "status", "--dir", tmp_path / "none"]
    done = subprocess.run(status, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "not up\n")
    assert not (tmp_path / "none").exists()


def test_status_wants_every_daemon(script, tmp_path, monkeypatch):
    (tmp_path / script.STATE).touch()
    running = dict.fromkeys(script.ORDER, 1)
    monkeypatch.setattr(script, "processes", lambda home: running)
    assert script.is_up(tmp_path)
    del running["munged"]
    assert not script.is_up(tmp_path)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("up", "tests", "calls"),
    [
        (True, 0, ["status", "start --install", PYTEST]),
        (False, 0, ["status", "start --install", PYTEST, "stop"]),
        (False, 1, ["status", "start --install", PYTEST, "stop"]),
    ],
)
def test_make_stops_only_what_it_started(tmp_path, up, tests, calls):
    cluster, installed = tmp_path / "slurm" / "devcluster", tmp_path / ".venv"
    exits = {
        cluster / "status": 0 if up else 1,
        cluster / "start": 0,
        cluster / "stop": 0,
        installed / "bin" / "pytest": tests,
        installed / "bin" / "python": 0,
    }
    shutil.copy(SCRIPT.parents[2] / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for command, status in exits.items():
        command.parent.mkdir(parents=True, exist_ok=True)
        words = '"${0##*/}${*:+ $*}"'
        command.write_text(f"#!/bin/sh\necho {words} >> {tmp_path}/calls\nexit {status}\n")
        command.chmod(0o755)
    for stamp in (".installed", ".installed-dev"):
        (installed / stamp).touch()
    # Neither settings of a `make test` around us nor its arguments of pytest.
    environment = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ}
    done = subprocess.run(
        ["make", "test", "SLURM=1"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert bool(done.returncode) == bool(tests)
    assert (tmp_path / "calls").read_text().splitlines() == calls
