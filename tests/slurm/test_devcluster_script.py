"""``slurm/devcluster`` touches nothing that is not its own."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "devcluster" / "devcluster.py"


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
