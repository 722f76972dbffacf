"""Stand-in for ``scaling.train.loop`` in the processes of test jobs.

Keeps the records that training keeps (generations, metrics, committed checkpoints, result) and
computes nothing. ``<root>/standin.json`` tells it how: ``step_s``, ``checkpoint_every``, and the
exception to raise at a step of the first attempt: ``fail_at``, ``error``, ``fail_rank``. With the
error ``peer`` the other ranks then fail a second later, of a full disk.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

from scaling.files import RecordError, create_json
from scaling.rundir import append_line


class PeerError(RecordError):
    """As ``scaling.train.ranks.PeerError``, which would bring torch."""


def _full(*_):
    raise OSError(28, "No space left on device")


def train(run, corpus, settings, *, attempt=None, job=None, progress=None, should_stop=None):
    assert "torch" not in sys.modules
    config = run.spec()
    how = {"step_s": 0.0, "checkpoint_every": 5}
    if (run.root / "standin.json").exists():
        how |= json.loads((run.root / "standin.json").read_text())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    print("rank", rank, "of", world, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
    _meet(rank, world)
    first = max((int(p.name[5:]) for p in run.path.glob("ckpt/step-*")), default=0)
    generation = 0
    if rank == 0:
        generation = run.start_generation({"resumed_from": first, "attempt": attempt, "job": job})
    for step in range(first + 1, config.steps + 1):
        time.sleep(how["step_s"])
        if should_stop():
            _commit(run, rank, step - 1)
            return None
        if step == how.get("fail_at") and attempt == 1 and rank == how.get("fail_rank", rank):
            if how["error"] == "full disk":  # from now on no record can be written either
                run.record = _full
            raise {
                "oserror": OSError(28, "No space left on device"),
                "full disk": OSError(28, "No space left on device"),
                "peer": PeerError("rank 0 could not commit"),
                "value": ValueError("boom"),
            }[how["error"]]
        if step == how.get("fail_at") and how["error"] == "peer":
            time.sleep(1)
            raise OSError(28, "No space left on device")
        if rank == 0:
            run.fence(generation)
            with open(run.metrics_path(generation), "ab") as file:
                append_line(file, {"kind": "train", "step": step, "loss": 1.0 / step})
                if step in config.evaluation_steps:
                    append_line(file, {"kind": "pool", "step": step, "loss": 2.0 / step})
        if step % how["checkpoint_every"] == 0:
            _commit(run, rank, step)
    record = {"status": "done", "step": config.steps, "world_size": world}
    record |= {"loss": 2.0 / config.steps, "train_loss": 1.0 / config.steps}
    if rank == 0:
        run.write_result(generation, record)
    return record


def _commit(run, rank, step):
    if rank == 0:
        create_json(Path(run.path / "ckpt" / f"step-{step:09d}" / "COMMITTED"), {})


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
