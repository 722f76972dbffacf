"""Does this machine and cluster do what submission relies on? One finding per question."""

import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaling.slurm.profile import SAFE_PATH, ClusterProfile
from scaling.slurm.scheduler import command

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One answer: what was looked at, what is so, and what to do about it."""

    check: str
    level: Level
    found: str
    advice: str = ""


def doctor(root: Path, profile: ClusterProfile) -> list[Finding]:
    """Look at the root folder's file system and, for ``executor = "slurm"``, at the cluster.

    Leaves nothing behind but the root folder itself. Nothing raises: what cannot be asked is a
    finding too.
    """
    findings = [*_file_system(Path(root).absolute())]
    if profile.executor == "slurm":
        findings += _cluster(profile)
    return findings


def _file_system(root: Path) -> list[Finding]:
    findings = []
    if SAFE_PATH.fullmatch(str(root)):
        findings.append(Finding("root folder", "ok", str(root)))
    else:
        findings.append(
            Finding(
                "root folder",
                "problem",
                repr(str(root)),
                "job scripts need a path of letters, digits and _ . / + @ = , -",
            )
        )
    folder = root / f".tmp-doctor-{uuid.uuid4().hex[:8]}"
    checks: list[tuple[str, Callable[[Path], None], str]] = [
        ("exclusive link", _probe_link, "claims need hard links; use another file system"),
        (
            "atomic rename",
            _probe_rename,
            "records need rename; use another file system",
        ),
    ]
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        return [
            *findings,
            Finding(
                "root folder",
                "problem",
                f"not writable: {e}",
                "choose a folder that login and compute nodes share",
            ),
        ]
    try:
        for name, probe, advice in checks:
            try:
                probe(folder)
                findings.append(Finding(name, "ok", "works"))
            except (OSError, AssertionError) as e:
                findings.append(Finding(name, "problem", str(e) or "does not work", advice))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(root).free / 1e9
    few = free < 20
    findings.append(
        Finding(
            "free disk",
            "warning" if few else "ok",
            f"{free:.0f} GB",
            "checkpoints of a large run need tens of GB" if few else "",
        )
    )
    return findings


def _probe_link(folder: Path) -> None:
    first, second, name = folder / "a", folder / "b", folder / "claim"
    first.write_text("a")
    second.write_text("b")
    os.link(first, name)
    try:
        os.link(second, name)
    except FileExistsError:
        return
    raise OSError("a second link to the same name succeeded")


def _probe_rename(folder: Path) -> None:
    new, name = folder / "new", folder / "record"
    name.write_text("old")
    new.write_text("new")
    os.rename(new, name)
    if name.read_text() != "new":
        raise OSError("a renamed file does not show its content")


def _cluster(profile: ClusterProfile) -> list[Finding]:
    missing = [
        c for c in ("sbatch", "srun", "squeue", "scontrol", "scancel") if shutil.which(c) is None
    ]
    if missing:
        return [
            Finding(
                "Slurm commands",
                "problem",
                f"not found: {', '.join(missing)}",
                "run on a login node, or load the site's Slurm module",
            )
        ]
    findings = [Finding("Slurm commands", "ok", str(shutil.which("sbatch")))]
    ok, output = command("scontrol", "show", "config")
    if not ok:
        return [
            *findings,
            Finding(
                "controller",
                "problem",
                output,
                "nothing is submitted while slurmctld does not answer",
            ),
        ]
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", output, re.MULTILINE))
    findings.append(Finding("controller", "ok", f"Slurm {config.get('SLURM_VERSION', '?')}"))
    size = config.get("MaxArraySize", "")
    findings.append(
        Finding("MaxArraySize", "ok", f"{size}: arrays of at most {size} runs")
        if size.isdecimal() and int(size) > 1
        else Finding("MaxArraySize", "warning", size or "unknown", "every run becomes its own job")
    )
    findings.append(
        Finding("JobRequeue", "ok", "1: a job that ran out of time requeues itself")
        if config.get("JobRequeue") == "1"
        else Finding(
            "JobRequeue",
            "warning",
            config.get("JobRequeue", "unknown"),
            "requeueing may be off; a later sync continues runs as new attempts instead",
        )
    )
    mode = config.get("PreemptMode", "unknown")
    findings.append(
        Finding("PreemptMode", "ok", mode)
        if "CANCEL" not in mode
        else Finding(
            "PreemptMode",
            "warning",
            mode,
            "preempted jobs end; a later sync continues their runs as new attempts",
        )
    )
    kill_wait = re.match(r"\d+", config.get("KillWait", ""))
    if kill_wait and int(kill_wait.group()) < 30:
        findings.append(
            Finding(
                "KillWait",
                "warning",
                config["KillWait"],
                "without GraceTime a preempted run may lose the steps since its checkpoint",
            )
        )
    ok, output = command("sacct", "--noheader", "--allocations", "--starttime=now")
    findings.append(
        Finding("accounting", "ok", config.get("AccountingStorageType", "answers"))
        if ok
        else Finding(
            "accounting",
            "warning",
            output,
            "states come from squeue alone, which forgets ended jobs after MinJobAge = "
            f"{config.get('MinJobAge', '?')}; run sync more often than that",
        )
    )
    if profile.partition is not None:
        ok, output = command("scontrol", "show", "partition", profile.partition)
        findings.append(
            Finding("partition", "ok", profile.partition)
            if ok
            else Finding(
                "partition",
                "problem",
                f"{profile.partition}: {output}",
                "see `sinfo -s` for the partitions there are",
            )
        )
    return findings
