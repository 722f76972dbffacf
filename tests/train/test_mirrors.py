"""Mirrors of the metrics: what they show, after restarts too, and that no fault reaches the run."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scaling.config import DataConfig, ModelConfig, PoolConfig, RunConfig
from scaling.rundir import RunDir, append_line
from scaling.train import mirrors
from scaling.train.mirrors import Mirrors, scalars

DIGEST = "abcdefghijklmnop"
CONFIG = RunConfig(
    model=ModelConfig(layers=1, d_model=8, heads=1),
    data=DataConfig(corpus_digest=DIGEST, vocab_size=64),
    batch_size=4,
    negatives=4,
    steps=12,
    evaluations=3,
    pool=PoolConfig(size=8, digest=DIGEST),
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "root", CONFIG, "demo")


def rows(first: int, last: int, scale: float = 1.0) -> list[dict[str, Any]]:
    """Rows as training writes them, for steps ``first`` to ``last``."""
    found: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        totals = {"step": step, "tokens": 123_456_789 * step, "seconds": 0.1 * step}
        speed = {"mfu": None, "seconds_step": 0.25 / step, "peak_memory_bytes": 2**33 + step}
        found.append(
            {"kind": "train", **totals, "loss": scale / step, "loss_scale": None, "speed": speed}
        )
        if step % 4 == 0:
            pools = {"4": scale / step / 2, "8": scale / step / 3}
            found.append(
                {"kind": "pool", **totals, "loss": 2 * scale / step, "pools": pools, "whole": True}
            )
    return found


def start(run: RunDir, names: tuple[str, ...], resumed_from: int, shown: list[Any]) -> None:
    """One start of a run: the metrics file and its mirrors."""
    generation = run.start_generation({"resumed_from": resumed_from})
    opened = Mirrors.open(names, run, CONFIG, resumed_from)
    with run.metrics_path(generation).open("ab") as metrics:
        for row in shown:
            append_line(metrics, row)
            opened.write(row)
    opened.close()


def expected(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Every number of the curves: (step, value) by ``<kind>/<key>``."""
    found: dict[str, list[tuple[int, float]]] = {}
    for kind in ("train", "pool"):
        for row in run.curve(kind):
            for key, value in scalars(row).items():
                found.setdefault(f"{kind}/{key}", []).append((row["step"], value))
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_numbers_of_a_row() -> None:
    row = {"kind": "pool", "step": 3, "a": None, "b": True, "c": {"d": 1, "e": {"f": 0.5}, "g": ""}}
    assert scalars(row) == {"step": 3.0, "b": 1.0, "c/d": 1.0, "c/e/f": 0.5}


def test_without_names_nothing_is_imported_or_written(run: RunDir) -> None:
    script = """
        import sys
        from scaling.train.mirrors import Mirrors
        opened = Mirrors.open((), None, None, 0)
        opened.write({"kind": "train", "step": 1})
        opened.close()
        print([m for m in ("torch.utils.tensorboard", "tensorboard", "wandb") if m in sys.modules])
    """
    assert python(script, run.root) == ("[]\n", "")
    assert not (run.path / "mirrors").exists()


def python(script: str, home: Path, *args: object, **env: str) -> tuple[str, str]:
    """Both outputs of a script in a process of its own: W&B changes the one it works in.

    They are files, as a pipe would stay open for as long as the process of W&B lives.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    kept |= {"HOME": str(home), "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    with (home / "out").open("w+") as out, (home / "err").open("w+") as err:
        done = subprocess.run(
            command, env=kept | env, stdout=out, stderr=err, check=False, timeout=60
        )
        out.seek(0)
        err.seek(0)
        said = out.read(), err.read()
    assert done.returncode == 0, said
    return said


# ---- TensorBoard --------------------------------------------------------------------------------


def tensorboard(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(
        str(run.path / "mirrors" / "tensorboard"), size_guidance={"scalars": 0}
    ).Reload()
    return {
        tag: [(event.step, event.value) for event in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


def in_float32(curves: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard keeps of the numbers; steps are its axis and no curve."""
    return {
        name: [(step, float(np.float32(value))) for step, value in curve]
        for name, curve in curves.items()
        if not name.endswith("/step")
    }


def test_tensorboard_shows_every_number(run: RunDir) -> None:
    start(run, ("tensorboard",), 0, rows(1, 12))
    shown = tensorboard(run)
    assert shown == in_float32(expected(run))
    assert shown["pool/pools/8"] == [(s, float(np.float32(1 / s / 3))) for s in (4, 8, 12)]
    assert shown["pool/whole"] == [(4, 1.0), (8, 1.0), (12, 1.0)]
    assert "train/loss_scale" not in shown
    assert "train/speed/mfu" not in shown


@pytest.mark.parametrize("resumed_from", [0, 4, 7])
def test_a_resumed_run_is_one_curve_in_tensorboard(run: RunDir, resumed_from: int) -> None:
    start(run, ("tensorboard",), 0, rows(1, 9))
    start(run, ("tensorboard",), resumed_from, rows(resumed_from + 1, 12, scale=3.0))
    shown = tensorboard(run)
    assert shown == in_float32(expected(run))
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 13))
    assert shown["pool/loss"][-1] == (12, 0.5)


def test_an_evaluation_that_was_owed_is_shown(run: RunDir) -> None:
    *before, owed = rows(1, 4)
    start(run, ("tensorboard",), 0, before)
    start(run, ("tensorboard",), 4, [owed, *rows(5, 8)])
    assert tensorboard(run) == in_float32(expected(run))
    assert [step for step, _ in tensorboard(run)["pool/loss"]] == [4, 8]


# ---- W&B ----------------------------------------------------------------------------------------

WANDB = """
    import json, logging, sys
    from pathlib import Path
    from scaling.rundir import RunDir
    from scaling.train import mirrors
    logging.basicConfig(format="%(levelname)s %(message)s")
    run = RunDir(Path(sys.argv[1]), sys.argv[2])
    mirrors.PATIENCE, mirrors.INIT_TIMEOUT = float(sys.argv[4]), 2.0
    opened = mirrors.Mirrors.open(sys.argv[5:], run, run.spec(), 0)
    for row in json.loads(sys.argv[3]):
        opened.write(row)
    opened.close()
    print("the run goes on")
"""


def wandb(
    run: RunDir,
    shown: list[Any],
    names: tuple[str, ...] = ("wandb",),
    script: str = WANDB,
    patience: float = 20,
    **env: str,
) -> tuple[str, str]:
    """Both outputs of a run with the real W&B; offline unless ``env`` says other."""
    env = env or {"WANDB_MODE": "offline"}
    return python(
        script, run.root, run.root, run.run_key, json.dumps(shown), patience, *names, **env
    )


def records(path: Path) -> list[Any]:
    """All records of a ``.wandb`` file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(part))
            part = b""
    return found


def test_wandb_offline_holds_every_number(run: RunDir) -> None:
    generation = run.start_generation({"resumed_from": 0})
    with run.metrics_path(generation).open("ab") as metrics:
        for row in rows(1, 12):
            append_line(metrics, row)
    out, err = wandb(run, rows(1, 12))
    assert (out, err) == ("the run goes on\n", "")
    (path,) = run.path.glob(f"mirrors/wandb/offline-run-*/run-{run.run_key}.wandb")

    shown: dict[str, list[tuple[int, float]]] = {}
    metrics_defined, started = {}, None
    for record in records(path):
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for name, value in items.items():
            if not name.startswith("_") and name != "step":
                shown.setdefault(name, []).append((json.loads(items["step"]), json.loads(value)))
        if record.HasField("metric"):
            metrics_defined[record.metric.glob_name or record.metric.name] = (
                record.metric.step_metric
            )
        if record.HasField("run") and record.run.config.update:
            started = record.run
    assert shown == expected(run)
    assert metrics_defined == {"step": "", "train/*": "step", "pool/*": "step"}
    assert started is not None
    assert (started.run_id, started.display_name) == (run.run_key, run.run_key)
    assert started.project == "clue-scaling"
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    config.pop("_wandb")
    assert config == CONFIG.model_dump(mode="json")


def test_wandb_keeps_to_project_and_mode(run: RunDir) -> None:
    wandb(run, rows(1, 2), WANDB_MODE="offline", WANDB_PROJECT="other")
    (path,) = run.path.glob("mirrors/wandb/offline-run-*/*.wandb")
    assert "other" in {r.run.project for r in records(path) if r.HasField("run")}


def test_wandb_disabled_leaves_nothing(run: RunDir) -> None:
    assert wandb(run, rows(1, 2), WANDB_MODE="disabled")[0] == "the run goes on\n"
    assert not list(run.path.glob("mirrors/*"))


def test_nothing_in_the_mirrors_is_a_pickle(run: RunDir) -> None:
    start(run, ("tensorboard",), 0, rows(1, 12))
    wandb(run, rows(1, 12))
    files = [p for p in run.path.glob("mirrors/**/*") if p.is_file()]
    assert {p.suffix for p in files if "wandb" in p.parts} == {".wandb", ".log"}
    for path in files:
        assert path.read_bytes()[:2] not in {b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"}


class StandIn:
    """As much of the module ``wandb`` as a mirror uses; remembers, and fails where told."""

    def __init__(self, fault: str = "", what: BaseException | None = None) -> None:
        self.fault, self.what = fault, what or RuntimeError("injected")
        self.logged: list[dict[str, float]] = []
        self.summary: dict[str, float] = {}
        self.torn_down = threading.Event()
        self.asked: dict[str, Any] = {}

    def _at(self, place: str) -> None:
        if place == self.fault:
            raise self.what
        if f"hung {place}" == self.fault:
            time.sleep(3600)

    def Settings(self, **settings: Any) -> SimpleNamespace:
        self._at("settings")
        return SimpleNamespace(**settings)

    def init(self, **asked: Any) -> "StandIn":
        self._at("init")
        self.asked = asked
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self._at("define_metric")

    def log(self, row: dict[str, float]) -> None:
        self._at(f"row {len(self.logged)}")
        self.logged.append(row)
        self.summary |= row

    def finish(self) -> None:
        self._at("finish")

    def teardown(self) -> None:
        self.torn_down.set()
        raise SystemExit(1)


def install(monkeypatch: pytest.MonkeyPatch, module: Any) -> Any:
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_shows_the_steps_of_a_resumed_run_once(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the server: what an earlier start showed is in the summary."""
    fake = install(monkeypatch, StandIn())
    start(run, ("wandb",), 0, rows(1, 8)[:-1])  # the evaluation of step 8 never came
    start(run, ("wandb",), 4, rows(5, 12))
    assert [r["step"] for r in fake.logged if "train/loss" in r] == list(range(1, 13))
    assert [r["step"] for r in fake.logged if "pool/loss" in r] == [4, 8, 12]
    assert fake.asked["id"] == run.run_key
    assert fake.asked["resume"] == "allow"
    assert fake.asked["settings"].init_timeout == mirrors.INIT_TIMEOUT
    assert not fake.torn_down.is_set()


def test_a_stop_button_does_not_interrupt_the_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = install(monkeypatch, StandIn())
    start(run, ("wandb",), 0, rows(1, 2))
    fake.asked["settings"].stop_fn()
    assert "clue-scaling cancel" in caplog.text


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [RuntimeError("injected"), SystemExit(3), OSError(28, "full")])
@pytest.mark.parametrize("fault", ["settings", "init", "define_metric", "row 0", "row 5", "finish"])
def test_a_fault_switches_off_one_mirror_with_one_warning(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    what: BaseException,
) -> None:
    fake = install(monkeypatch, StandIn(fault, what))
    start(run, ("wandb", "tensorboard"), 0, rows(1, 12))
    (warning,) = warnings(caplog)
    assert "mirror wandb is off" in warning
    assert f"{type(what).__name__}: {what}" in warning
    assert tensorboard(run) == in_float32(expected(run))
    assert fake.torn_down.wait(10)
    if fault == "row 5":
        assert len(fake.logged) == 5


@pytest.mark.parametrize("fault", ["hung init", "hung row 3", "hung finish"])
def test_a_mirror_that_hangs_is_left_behind(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    monkeypatch.setattr(mirrors, "PATIENCE", 1.0)
    fake = install(monkeypatch, StandIn(fault))
    began = time.monotonic()
    start(run, ("wandb", "tensorboard"), 0, rows(1, 12))
    assert time.monotonic() - began < 5
    assert any("mirror wandb is off" in w and "within 1 s" in w for w in warnings(caplog))
    assert fake.torn_down.wait(10)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    start(run, (name,), 0, rows(1, 4))
    (warning,) = warnings(caplog)
    assert f"mirror {name} is off" in warning
    assert f"pip install 'clue-scaling[{name}]'" in warning


@pytest.mark.parametrize("what", [SystemExit(1), RuntimeError("injected"), ImportError("broken")])
def test_a_package_that_fails_to_import(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: BaseException,
) -> None:
    def fail(name: str) -> None:
        raise what

    monkeypatch.setattr(mirrors.importlib, "import_module", fail)
    start(run, ("tensorboard", "wandb"), 0, rows(1, 4))
    assert len(warnings(caplog)) == 2
    assert all(str(what) in w for w in warnings(caplog))


def test_a_thread_that_cannot_start(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(mirrors._Mirror, "start", fail)
    start(run, ("tensorboard",), 0, rows(1, 4))
    (warning,) = warnings(caplog)
    assert "can't start new thread" in warning


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_folder_that_cannot_be_made(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    install(monkeypatch, StandIn())
    (run.path / "mirrors").write_text("in the way")
    start(run, (name,), 0, rows(1, 4))
    (warning,) = warnings(caplog)
    assert f"mirror {name} is off" in warning
    assert str(run.path / "mirrors") in warning


def test_wandb_does_not_evade_to_another_folder(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = install(monkeypatch, StandIn())
    monkeypatch.setattr(mirrors.os, "access", lambda *_: False)
    start(run, ("wandb",), 0, rows(1, 4))
    (warning,) = warnings(caplog)
    assert f"{run.path / 'mirrors'} is not writable" in warning
    assert not fake.asked


@pytest.mark.slow
def test_a_full_disk_ends_the_mirrors_only(run: RunDir) -> None:
    """A limit on file sizes stands in for a full disk; TensorBoard fails in a thread of its own."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
    out, err = wandb(run, rows(1, 50), ("tensorboard", "wandb"), script + textwrap.dedent(WANDB))
    assert out == "the run goes on\n"
    assert err.count("WARNING mirror tensorboard is off, the run goes on: OSError") == 1


@pytest.mark.slow
def test_wandb_without_a_server(run: RunDir) -> None:
    began = time.monotonic()
    out, err = wandb(run, rows(1, 4), WANDB_BASE_URL="http://127.0.0.1:1", WANDB_API_KEY="0" * 40)
    assert out == "the run goes on\n"
    assert err.count("WARNING mirror wandb is off, the run goes on: CommError") == 1
    assert time.monotonic() - began < 25


def test_wandb_without_a_login(run: RunDir) -> None:
    out, err = wandb(run, rows(1, 4), WANDB_BASE_URL="http://127.0.0.1:1")
    assert out == "the run goes on\n"
    assert err.count("WARNING mirror wandb is off, the run goes on: UsageError") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_wandb_loses_its_process(run: RunDir, number: signal.Signals) -> None:
    """The run's process ends even where that of W&B is frozen."""
    strike = f"""
    import psutil, time
    while not (cores := [p for p in psutil.Process().children() if p.name() == "wandb-core"]):
        time.sleep(0.1)
    opened.write({{"kind": "train", "step": 1, "loss": 1.0}})
    time.sleep(2)
    print(cores[0].pid, flush=True)
    cores[0].send_signal({int(number)})
    """
    script = WANDB.replace("    for row in", strike + "for row in")
    try:
        out, err = wandb(run, rows(2, 12), script=script, patience=2)
    finally:
        pid = int((run.root / "out").read_text().split()[0])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert out.splitlines()[1] == "the run goes on"
    assert err.count("WARNING mirror wandb is off, the run goes on: ") == 1
