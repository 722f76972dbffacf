"""Stand-in for ``scaling.train.loop`` in the processes of test jobs.

Keeps the records that training keeps (generations, metrics, committed checkpoints, result) and
computes nothing. ``<root>/standin.json`` tells it how: ``step_s``, ``checkpoint_every``, and the
exception to raise at a step of the first attempt: ``fail_at``, ``error``, ``fail_rank``. With the
error ``peer`` the other ranks then fail a second later, of a full disk. ``signal`` comes after
``signal_after`` steps of every start, as from Slurm before the wall time ends. ``diverge_at`` is a
step whose loss is not finite.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import scaling
from scaling.files import RecordError, create_json
from scaling.rundir import append_line


class PeerError(RecordError):
    """As ``scaling.train.ranks.PeerError``, which would bring torch."""


class OutOfMemoryError(RuntimeError):
    """As torch's."""


class DistBackendError(RuntimeError):
    """As torch's."""


def _full(*_):
    raise OSError(28, "No space left on device")


ERRORS = {
    "oserror": OSError(28, "No space left on device"),
    "quota": OSError(122, "Disk quota exceeded"),
    "full disk": OSError(28, "No space left on device"),
    "peer": PeerError("rank 0 could not commit"),
    "value": ValueError("boom"),
    "gpu": OutOfMemoryError("CUDA out of memory: micro_batch_tokens = 512 fits"),
    "host": MemoryError("cannot allocate 8 GiB"),
    "nccl": DistBackendError("NCCL watchdog: collective timed out after 600 s"),
    "xid": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
}


def train(run, corpus, settings, *, attempt=None, job=None, progress=None, should_stop=None):
    assert "torch" not in sys.modules
    if (result := run.result()) is not None:
        return result
    config = run.spec()
    how = {"step_s": 0.0, "checkpoint_every": 5}
    if (run.root / "standin.json").exists():
        how |= json.loads((run.root / "standin.json").read_text())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    print("rank", rank, "of", world, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
    _meet(rank, world)
    first = max((int(p.name[5:]) for p in run.path.glob("ckpt/step-*")), default=0)
    generation, began, seconds = 0, time.time(), 0.0
    if first:
        seconds = float(json.loads(_checkpoint(run, first).read_text()).get("seconds", 0.0))
    if rank == 0:
        generation = run.start_generation(
            {
                "resumed_from": first,
                "attempt": attempt,
                "job": job,
                "time": began,
                "seconds": seconds,
                "world_size": world,
                "mark": getattr(scaling, "MARK", None),
            }
        )

    def spent():
        return seconds + time.time() - began

    for step in range(first + 1, config.steps + 1):
        time.sleep(how["step_s"])
        if step - first > how.get("signal_after", config.steps):
            os.kill(os.getpid(), getattr(signal, how["signal"]))
        if should_stop():
            _commit(run, rank, step - 1, spent())
            return None
        if step == how.get("fail_at") and attempt == 1 and rank == how.get("fail_rank", rank):
            if how["error"] == "full disk":  # from now on no record can be written either
                run.record = _full
            raise ERRORS[how["error"]]
        if step == how.get("fail_at") and how["error"] == "peer":
            time.sleep(1)
            raise OSError(28, "No space left on device")
        if step == how.get("diverge_at"):
            run.write_result(generation, {"status": "diverged", "step": step})
            return {"status": "diverged"}
        if rank == 0:
            run.fence(generation)
            with open(run.metrics_path(generation), "ab") as file:
                row = {"step": step, "seconds": spent()}
                append_line(file, {"kind": "train", "loss": 1.0 / step, **row})
                if step in config.evaluation_steps:
                    append_line(file, {"kind": "pool", "loss": 2.0 / step, **row})
        if step % how["checkpoint_every"] == 0:
            _commit(run, rank, step, spent())
    record = {"status": "done", "step": config.steps, "world_size": world}
    record |= {"loss": 2.0 / config.steps, "train_loss": 1.0 / config.steps}
    record |= {"gpu_hours": run.gpu_hours()}
    if rank == 0:
        run.write_result(generation, record)
    return record


def _checkpoint(run, step):
    return Path(run.path / "ckpt" / f"step-{step:09d}" / "COMMITTED")


def _commit(run, rank, step, seconds):
    if rank == 0 and step:
        create_json(_checkpoint(run, step), {"seconds": seconds})


def _meet(rank, world):
    """The ranks meet where MASTER_ADDR and MASTER_PORT say, as torch.distributed would."""
    if world == 1:
        assert "RANK" not in os.environ
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.create_server(("", place[1])) as server:
            met = {server.accept()[0].recv(16) for _ in range(world - 1)}
        assert met == {str(r).encode() for r in range(1, world)}
        return
    for _ in range(300):
        try:
            with socket.create_connection(place) as s:
                s.sendall(str(rank).encode())
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"rank 0 does not answer at {place}")
