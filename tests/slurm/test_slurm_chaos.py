"""``chaos.py`` on four runs, and that it would see what it looks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.chaos import Devcluster, make_runs, violations

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
HERE = Path(__file__).parent


def test_a_small_sweep_survives_chaos(devcluster, tmp_path, monkeypatch):
    conf = devcluster["slurm_conf"]
    words = ["--runs=4", "--seed=1", "--faults=1", f"--root={tmp_path}", f"--slurm-conf={conf}"]
    done = subprocess.run(
        [sys.executable, HERE / "chaos.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no violation" in done.stdout
    monkeypatch.setenv("SLURM_CONF", conf)
    runs, references = (make_runs(tmp_path / r, 4) for r in ("disturbed", "undisturbed"))
    accounts = Devcluster(conf).accounts(runs)

    def seen(run) -> set[str]:
        others = [v for v in violations(runs, references, accounts, []) if run.run_key not in v]
        assert others == []
        return {v.split(": ")[1] for v in violations(runs, references, accounts, [])}

    def restored(path: Path, new: bytes, run) -> set[str]:
        kept = path.read_bytes()
        path.write_bytes(new)
        try:
            return seen(run)
        finally:
            path.write_bytes(kept)

    run = runs[0]
    params = run.path / "ckpt/step-000000040/params.safetensors"
    changed = bytearray(params.read_bytes())
    changed[-1] ^= 1
    found = restored(params, bytes(changed), run)
    assert found == {"its parameters are not those of the undisturbed run"}
    curve = run.metrics_path(run.generations()[-1])
    lines = curve.read_bytes().splitlines(keepends=True)
    found = restored(curve, b"".join([*lines, lines[-2]]), run)
    assert any("steps of its curve" in v or "curve is not that" in v for v in found)
    (claim,) = [run.path / f"attempts/{run.attempts()[-1].number:04d}/claim.json"]
    other = json.loads(claim.read_text()) | {"job_id": "1_0"}
    assert "jobs that did not hold the claim trained" in restored(
        claim, json.dumps(other).encode(), run
    )
    result = json.loads((run.path / "result.json").read_text()) | {"step": 39}
    assert "not done" in restored(run.path / "result.json", json.dumps(result).encode(), run)
    job = run.starts()[-1]["job"]["job_id"]
    early = {**accounts[job][-1], "End": "2000-01-01T00:00:00", "Start": "1999-01-01T00:00:00"}
    late = {**early, "Start": "1999-06-01T00:00:00"}
    accounts = accounts | {job: [early, late]}
    assert seen(run) == {f"job {job} began at {late['Start']}, job {job} ended at {early['End']}"}
