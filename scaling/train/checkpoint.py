"""Checkpoints: whole, verified, free of pickle and of the world size.

A checkpoint holds, per parameter, the fp32 master and both Adam moments, read and written through
DeepSpeed's accessors, so any ZeRO stage and number of ranks can continue from it:

    ckpt/step-000012000/  params.safetensors exp_avg.safetensors exp_avg_sq.safetensors
                          manifest.json (step, generation, counters, loss scale; size and SHA-256
                          of each file)
                          COMMITTED     (SHA-256 of the manifest)

It is filled under a temporary name, flushed, and appears by one rename (``scaling.files``).
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaling.files import (
    TMP_PREFIX,
    RecordError,
    read_json,
    remove_folder,
    sha256,
    staging,
    write_bytes,
    write_json,
)
from scaling.rundir import RunDir
from scaling.train.engine import MOMENTS, loss_scale, master, restore_loss_scale, set_state
from scaling.train.ranks import Ranks

log = logging.getLogger(__name__)
TENSORS = ("params", *MOMENTS)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files match its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.manifest["step"])

    def load(self, name: str) -> dict[str, Tensor]:
        """``params``, ``exp_avg`` or ``exp_avg_sq`` by parameter name, fp32."""
        return dict(load_file(self.path / f"{name}.safetensors"))


def read(path: Path) -> Checkpoint:
    """Open a checkpoint folder and verify it.

    Raises:
        RecordError: something is missing, torn or altered; the message names the file.
    """
    manifest = read_json(path / "manifest.json")
    committed = path / "COMMITTED"
    if not committed.exists() or committed.read_text() != sha256(path / "manifest.json"):
        raise RecordError(f"{committed}: missing, or not that of manifest.json")
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != entry["size"]:
            raise RecordError(f"{file}: missing or not {entry['size']} bytes long")
        if sha256(file) != entry["sha256"]:
            raise RecordError(f"{file}: its SHA-256 is not the manifest's")
    return Checkpoint(path, manifest)


def committed(run: RunDir) -> list[Path]:
    """Folders of committed checkpoints, oldest first."""
    return sorted(run.path.glob("ckpt/step-" + "[0-9]" * 9))


def newest(run: RunDir, *, set_aside: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint. Damaged ones are named in the log and passed over.

    Args:
        set_aside: rename the damaged ones passed over to ``damaged-*``, so that their steps can be
            committed again.
    """
    for path in reversed(committed(run)):
        try:
            return read(path)
        except RecordError as e:
            log.warning("checkpoint passed over: %s", e)
            if set_aside:
                beside = len(list(path.parent.iterdir()))
                path.rename(path.with_name(f"damaged-{path.name}-{beside}"))
    return None


def clear_leftovers(run: RunDir) -> None:
    """Remove what killed starts left half-written; their generations can publish no more."""
    for folder in ("ckpt", "export"):
        for path in run.path.glob(f"{folder}/{TMP_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def save(
    run: RunDir,
    engine: Any,
    ranks: Ranks,
    *,
    step: int,
    generation: int,
    counters: Mapping[str, float],
    keep: int,
) -> None:
    """Commit a checkpoint after ``step``; every rank calls it, rank 0 writes.

    Raises:
        Superseded: a newer generation has started; nothing is committed.
        OSError: the disk is full; nothing is committed and older checkpoints are as they were.
    """
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in TENSORS}
    for name, parameter in engine.module.named_parameters():
        tensors["params"][name] = master(engine, parameter)
        for moment in MOMENTS:
            tensors[moment][name] = master(engine, parameter, moment)
    manifest = {
        "schema_version": 1,
        "run_key": run.run_key,
        "step": step,
        "generation": generation,
        "world_size": ranks.world_size,
        "counters": dict(counters),
        "loss_scale": loss_scale(engine),
    }

    def write() -> None:
        _write(run, tensors, manifest)
        for old in committed(run)[:-keep]:
            remove_folder(old)

    ranks.first(write)


def _write(
    run: RunDir, tensors: Mapping[str, dict[str, Tensor]], manifest: Mapping[str, Any]
) -> None:
    with staging(run.path / "ckpt" / f"step-{manifest['step']:09d}") as folder:
        files = {}
        for name in TENSORS:
            file = folder / f"{name}.safetensors"
            write_tensors(file, tensors[name])
            files[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
        write_json(folder / "manifest.json", {**manifest, "files": files})
        write_bytes(folder / "COMMITTED", sha256(folder / "manifest.json").encode())
        run.fence(manifest["generation"])


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: the operating system's error inside safetensors' own, so that a full disk is told.
    """
    try:
        save_file(dict(tensors), file)
    except SafetensorError as e:
        found = re.search(r"os error (\d+)", str(e))
        number = int(found.group(1)) if found else errno.EIO
        raise OSError(number, f"{os.strerror(number)} ({e})", str(file)) from e


def restore(checkpoint: Checkpoint, engine: Any) -> None:
    """Put a checkpoint's masters, moments and loss scale into the engine; every rank calls it.

    The engine's optimiser state must exist (``create_optimizer_state``).
    """
    tensors = {name: checkpoint.load(name) for name in TENSORS}
    for name, parameter in engine.module.named_parameters():
        moments = {moment: tensors[moment][name] for moment in MOMENTS}
        set_state(engine, parameter, tensors["params"][name], moments)
    if (state := checkpoint.manifest.get("loss_scale")) is not None:
        restore_loss_scale(engine, state)
