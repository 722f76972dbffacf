"""Exported encoders: the only part of a run that anything downstream reads.

    export/step-000012000/  model.safetensors   parameters, fp32, by their names in the model
                            config.json         the run's configuration, the step, the file's digest

Written at the run's end and at its milestones (``TrainSettings.milestones``), each by one rename,
and never removed.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from scaling.config import RunConfig
from scaling.files import RecordError, read_json, sha256, staging, write_json
from scaling.flops import count_parameters
from scaling.models import build
from scaling.models.clue import ContrastiveEncoder
from scaling.rundir import RunDir
from scaling.train.checkpoint import write_tensors

SCHEMA_VERSION = 1


def exported(run: RunDir) -> dict[int, Path]:
    """Folders of a run's exports by their steps, ascending."""
    folders = run.path.glob("export/step-" + "[0-9]" * 9)
    return {int(p.name.removeprefix("step-")): p for p in sorted(folders)}


def export(run: RunDir, config: RunConfig, step: int, params: Mapping[str, Tensor]) -> None:
    """Publish the parameters after ``step``; what is published already stays.

    Args:
        params: fp32, by name, as a checkpoint's ``load("params")`` gives them.

    Raises:
        OSError: the disk is full; nothing is published.
    """
    final = run.path / "export" / f"step-{step:09d}"
    if final.is_dir():
        return
    with staging(final) as folder:
        file = folder / "model.safetensors"
        write_tensors(file, params)
        write_json(
            folder / "config.json",
            {
                "schema_version": SCHEMA_VERSION,
                "run_key": run.run_key,
                "step": step,
                "config": config.model_dump(mode="json"),
                "n_total": count_parameters(config.model, config.data.vocab_size).n_total,
                "size": file.stat().st_size,
                "sha256": sha256(file),
            },
        )


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
            "and at its milestones"
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
    card = read_json(folder / "config.json")
    if not isinstance(card, dict) or card.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(f"{folder / 'config.json'}: not version {SCHEMA_VERSION} of an export")
    file = folder / "model.safetensors"
    if not file.exists() or file.stat().st_size != card["size"] or sha256(file) != card["sha256"]:
        raise RecordError(f"{file}: missing, or not the file that config.json tells of")
    config = RunConfig.parse(card["config"], str(folder / "config.json"))
    model = build(config.model, config.data.vocab_size)
    model.load_state_dict(load_file(file))
    return model.eval()
