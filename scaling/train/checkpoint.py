"""Checkpoints: whole, verified, free of pickle and of the world size.

A checkpoint holds, per parameter, the fp32 master and both Adam moments, read and written through
DeepSpeed's accessors, so any ZeRO stage and number of ranks can continue from it:

    ckpt/step-000012000/  params.safetensors exp_avg.safetensors exp_avg_sq.safetensors
                          manifest.json (step, generation, counters; size and SHA-256 of each file)
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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scaling.files import RecordError, read_json, sha256, staging, write_bytes, write_json
from scaling.models import build
from scaling.models.clue import ContrastiveEncoder
from scaling.rundir import RunDir
from scaling.train.ranks import Ranks

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
TENSORS = ("params", *MOMENTS)


class PeerError(RecordError):
    """Another rank failed and says why; this one only follows."""


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
    failed = None
    if ranks.rank == 0:
        try:
            _write(run, tensors, ranks, step, generation, counters)
            for old in committed(run)[:-keep]:
                shutil.rmtree(old)
        except (OSError, RecordError) as e:
            failed = e
    if ranks.any(failed is not None)[0]:
        raise failed or PeerError(f"rank 0 could not commit the checkpoint of step {step}")


def _write(
    run: RunDir,
    tensors: Mapping[str, dict[str, Tensor]],
    ranks: Ranks,
    step: int,
    generation: int,
    counters: Mapping[str, float],
) -> None:
    with staging(run.path / "ckpt" / f"step-{step:09d}") as folder:
        files = {}
        for name in TENSORS:
            file = folder / f"{name}.safetensors"
            try:
                save_file(tensors[name], file)
            except SafetensorError as e:
                raise _os_error(e, file) from e
            files[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
        write_json(
            folder / "manifest.json",
            {
                "schema_version": 1,
                "run_key": run.run_key,
                "step": step,
                "generation": generation,
                "world_size": ranks.world_size,
                "counters": dict(counters),
                "files": files,
            },
        )
        write_bytes(folder / "COMMITTED", sha256(folder / "manifest.json").encode())
        run.fence(generation)


def _os_error(error: SafetensorError, file: Path) -> OSError:
    """The operating system's error inside safetensors' own, so that a full disk is told."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found.group(1)) if found else errno.EIO
    return OSError(number, f"{os.strerror(number)} ({error})", str(file))


def restore(checkpoint: Checkpoint, engine: Any) -> None:
    """Put a checkpoint's masters and moments into the engine; every rank calls it.

    The engine's optimiser state must exist (``create_optimizer_state``).
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    tensors = {name: checkpoint.load(name) for name in TENSORS}
    device = engine.device
    for name, parameter in engine.module.named_parameters():
        value = tensors["params"][name].to(device)
        with torch.no_grad():
            parameter.copy_(value)
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, value)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[moment][name].to(device), moment)
        else:
            for moment in MOMENTS:
                engine.optimizer.state[parameter][moment].copy_(tensors[moment][name])


def create_optimizer_state(engine: Any, step: int) -> None:
    """Give every parameter Adam's state as after ``step`` steps, with zero moments. Call it once.

    torch creates that state at the first step of each parameter group, and ZeRO links it to its
    parameters after the first group's step, when the other groups have none yet (DeepSpeed
    0.19.8): their moments could then be neither saved nor restored. Adam's step count, which
    corrects its bias, is not reachable through DeepSpeed's accessors either.
    """
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
    if inner is not zero:
        zero._lazy_init_hp_params_optimizer_state()


def master(engine: Any, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
    """A copy of a parameter's whole fp32 master, or of a moment, on the CPU; all ranks call it.

    ZeRO 1 and 2 keep flat partitions behind DeepSpeed's accessors (collective calls); ZeRO 0 in
    fp32 is a plain optimiser, for which the accessors answer None.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    full: Tensor
    if hasattr(parameter, "_hp_mapping"):
        full = (
            safe_get_full_fp32_param(parameter)
            if moment is None
            else safe_get_full_optimizer_state(parameter, moment)
        )
    else:
        full = parameter.data if moment is None else engine.optimizer.state[parameter][moment]
    return full.detach().float().cpu().contiguous().clone()


def load_encoder(run: RunDir) -> tuple[ContrastiveEncoder, int]:
    """The encoder of the run's newest checkpoint, in evaluation mode, and its step.

    Raises:
        RecordError: the run has no whole checkpoint.
    """
    checkpoint = newest(run)
    if checkpoint is None:
        raise RecordError(f"{run.path / 'ckpt'}: the run has no committed checkpoint yet")
    config = run.spec()
    model = build(config.model, config.data.vocab_size)
    model.load_state_dict(checkpoint.load("params"))
    return model.eval(), checkpoint.step
