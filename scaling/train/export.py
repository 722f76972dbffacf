"""Exported encoders: the only part of a run that anything downstream reads.

    export/step-000012000/  model.safetensors   parameters, fp32, by their names in the model
                            config.json         the run's configuration, the step, the file's digest

Written at the run's end and at its milestones (``TrainSettings.milestones``), each by one rename,
and never removed.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from scaling.config import RunConfig
from scaling.files import RecordError, read_json, sha256, staging, write_json
from scaling.flops import count_parameters
from scaling.models import build
from scaling.models.clue import ContrastiveEncoder
from scaling.rundir import RunDir
from scaling.train.checkpoint import Checkpoint

SCHEMA_VERSION = 1


def exported(run: RunDir) -> dict[int, Path]:
    """Folders of a run's exports by their steps, ascending."""
    folders = run.path.glob("export/step-" + "[0-9]" * 9)
    return {int(p.name.removeprefix("step-")): p for p in sorted(folders)}


def export(run: RunDir, config: RunConfig, checkpoint: Checkpoint, generation: int) -> None:
    """Publish a checkpoint's parameters, to the byte.

    An export of the same step that holds others, of a start whose checkpoint was lost since, is
    set aside as ``stale-*``: what transfer scores must be what the run's loss was measured on.

    Raises:
        Superseded: a newer generation has started; nothing is published.
        OSError: the disk is full; nothing is published.
    """
    final = run.path / "export" / f"step-{checkpoint.step:09d}"
    params = checkpoint.manifest["files"]["params.safetensors"]
    if final.is_dir():
        if _card(final)["sha256"] == params["sha256"]:
            return
        final.rename(final.with_name(f"stale-{final.name}-{len(list(final.parent.iterdir()))}"))
    with staging(final) as folder:
        shutil.copyfile(checkpoint.path / "params.safetensors", folder / "model.safetensors")
        write_json(
            folder / "config.json",
            {
                "schema_version": SCHEMA_VERSION,
                "run_key": run.run_key,
                "step": checkpoint.step,
                "config": config.model_dump(mode="json"),
                "n_total": count_parameters(config.model, config.data.vocab_size).n_total,
                **params,
            },
        )
        run.fence(generation)


def load_encoder(run: RunDir, step: int | None = None) -> tuple[ContrastiveEncoder, int]:
    """An exported encoder, in evaluation mode, and its step.

    Args:
        step: None: the last one.

    Raises:
        RecordError: there is no such export, or it is damaged; the message says which there are.
    """
    there = exported(run)
    if not there:
        raise RecordError(
            f"{run.path / 'export'}: nothing is exported yet; a run exports its encoder at its end "
            f"and at its milestones (of one that ended before exports existed: clue-scaling train "
            f"{run.run_key})"
        )
    chosen = max(there) if step is None else step
    if chosen not in there:
        steps = ", ".join(map(str, there))
        raise RecordError(f"{run.path / 'export'}: no step {step}; exported: {steps}")
    return read_encoder(there[chosen]), chosen


def read_encoder(folder: Path) -> ContrastiveEncoder:
    """The encoder in an export folder, in evaluation mode, from nothing but its two files.

    Raises:
        RecordError: a file is missing, altered, or of another version.
    """
    card = _card(folder)
    file = folder / "model.safetensors"
    if not file.exists() or file.stat().st_size != card["size"] or sha256(file) != card["sha256"]:
        raise RecordError(f"{file}: missing, or not the file that config.json tells of")
    config = RunConfig.parse(card["config"], str(folder / "config.json"))
    model = build(config.model, config.data.vocab_size)
    model.load_state_dict(load_file(file))
    return model.eval()


def _card(folder: Path) -> dict[str, Any]:
    card = read_json(folder / "config.json")
    if (
        not isinstance(card, dict)
        or card.get("schema_version") != SCHEMA_VERSION
        or not {"size", "sha256", "config"} <= card.keys()
    ):
        raise RecordError(f"{folder / 'config.json'}: not version {SCHEMA_VERSION} of an export")
    return card
