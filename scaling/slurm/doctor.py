"""Does this machine and cluster do what submission relies on? One finding per question."""

import getpass
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaling.config import ConfigError
from scaling.slurm.profile import SAFE_PATH, ClusterProfile, check_owner
from scaling.slurm.scheduler import command

Level = Literal["ok", "warning", "problem"]
SHORT_LEAD_S = 120
"""A shorter time between the signal and the end of the wall time is worth a warning. [seconds]"""
CLOCK_S = 5.0
"""So far may the file server's clock be from this host's. [seconds]"""


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
        (
            "clock",
            _probe_clock,
            "ages in status are off by that; only patience depends on clocks",
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
            except OSError as e:
                level: Level = "warning" if probe is _probe_clock else "problem"
                findings.append(Finding(name, level, str(e), advice))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    findings += _own(root)
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


def _probe_clock(folder: Path) -> None:
    (folder / "now").write_text("now")
    ahead = (folder / "now").stat().st_mtime - time.time()
    if abs(ahead) > CLOCK_S:
        raise OSError(f"the file server's clock is {ahead:+.0f} s from this host's")


def _own(root: Path) -> list[Finding]:
    try:
        check_owner(root.resolve(), root / "runs", root / "sweeps", root / "code")
    except ConfigError as e:
        return [Finding("owner", "problem", str(e), "jobs would refuse it")]
    return [Finding("owner", "ok", "yours")]


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
    config = dict(re.findall(r"^(\w+)[ \t]*=[ \t]*(.*?)[ \t]*$", output, re.MULTILINE))
    return [
        *findings,
        Finding("controller", "ok", f"Slurm {config.get('SLURM_VERSION', '?')}"),
        *_defaults(profile),
        _array_size(config),
        _requeue(config),
        _preemption(config),
        _signal_lead(config, profile),
        _accounting(config),
        *_submit_limits(),
        *(_partition(profile) if profile.partition else _gpus(profile)),
    ]


def _defaults(profile: ClusterProfile) -> list[Finding]:
    """Defaults that a site sets as variables, which submission does not use."""
    words = {"account": profile.account, "partition": profile.partition, "qos": profile.qos}
    return [
        Finding(
            f"SBATCH_{key.upper()}",
            "warning",
            f"{os.environ[f'SBATCH_{key.upper()}']}, and the profile has no {key}",
            f"variables do not reach sbatch; set {key} in the profile",
        )
        for key, word in words.items()
        if word is None and os.environ.get(f"SBATCH_{key.upper()}")
    ]


def _array_size(config: dict[str, str]) -> Finding:
    size = config.get("MaxArraySize", "")
    if size.isdecimal() and int(size) > 1:
        return Finding("MaxArraySize", "ok", f"{size}: arrays of at most {size} runs")
    if size == "1":
        advice = "max_parallel does not hold over arrays; ask for a larger MaxArraySize"
        return Finding("MaxArraySize", "warning", "1: every run becomes its own array", advice)
    return Finding(
        "MaxArraySize",
        "problem",
        size or "unknown",
        "runs are submitted as job arrays; ask for MaxArraySize of at least 2",
    )


def _requeue(config: dict[str, str]) -> Finding:
    if config.get("JobRequeue") == "1":
        return Finding("JobRequeue", "ok", "1: a job that ran out of time requeues itself")
    return Finding(
        "JobRequeue",
        "warning",
        config.get("JobRequeue", "unknown"),
        "requeueing may be off; a later sync continues runs as new attempts instead",
    )


def _preemption(config: dict[str, str]) -> Finding:
    mode = config.get("PreemptMode", "unknown")
    if "CANCEL" in mode:
        advice = "preempted jobs end; a later sync continues their runs as new attempts"
        return Finding("PreemptMode", "warning", mode, advice)
    if "SUSPEND" in mode:
        advice = "a suspended run keeps its GPU memory; prefer a partition that requeues"
        return Finding("PreemptMode", "warning", mode, advice)
    return Finding("PreemptMode", "ok", mode)


def _signal_lead(config: dict[str, str], profile: ClusterProfile) -> Finding:
    """Whether a checkpoint fits between the signal and the end, of the wall time or the grace."""
    lead = profile.signal_lead_s
    kill_wait = re.match(r"\d+", config.get("KillWait", ""))
    wait = int(kill_wait.group()) if kill_wait else None
    found = f"signal_lead_s = {lead}, KillWait = {wait if wait is not None else 'unknown'} s"
    if lead < SHORT_LEAD_S:
        return Finding(
            "signal lead time",
            "warning",
            found,
            f"Slurm may be a minute early: below {SHORT_LEAD_S} s little is left for a step and a "
            "checkpoint",
        )
    if wait is not None and wait < 30:
        return Finding(
            "signal lead time",
            "warning",
            found,
            "preempted without GraceTime, a run has KillWait for its checkpoint, or loses the "
            "steps since the last one: set checkpoint_every",
        )
    return Finding("signal lead time", "ok", found)


def _accounting(config: dict[str, str]) -> Finding:
    ok, output = command("sacct", "--noheader", "--allocations", "--starttime=now")
    if ok:
        return Finding("accounting", "ok", config.get("AccountingStorageType", "answers"))
    return Finding(
        "accounting",
        "warning",
        output,
        "states come from squeue alone, which forgets ended jobs after MinJobAge = "
        f"{config.get('MinJobAge', '?')}; run sync more often than that",
    )


def _submit_limits() -> list[Finding]:
    """Limits of the user's associations on queued jobs; none where accounting is off."""
    ok, output = command(
        "sacctmgr", "--noheader", "--parsable2", "show", "associations",
        f"user={getpass.getuser()}", "format=Account,MaxSubmitJobs,GrpSubmitJobs",
    )  # fmt: skip
    if not ok:
        return []
    limits = []
    for line in output.splitlines():
        account, *numbers = line.split("|")
        limits += [f"{account}: {n}" for n in numbers if n.isdecimal()]
    if not limits:
        return [Finding("submit limits", "ok", "none known")]
    return [
        Finding(
            "submit limits",
            "ok",
            ", ".join(sorted(set(limits))),
            "a larger sweep is submitted in parts: run sync again, from cron or with --watch",
        )
    ]


def _partition(profile: ClusterProfile) -> list[Finding]:
    name = str(profile.partition)
    ok, output = command("scontrol", "show", "partition", name)
    if not ok:
        listed, names = command("sinfo", "--noheader", "--format=%R")
        there = ", ".join(sorted(set(names.split()))) if listed else f"unknown ({names})"
        return [Finding("partition", "problem", f"no such partition: {name}", f"valid: {there}")]
    facts = dict(re.findall(r"(\w+)=(\S+)", output))
    state = facts.get("State", "UP")
    findings = [
        *_gpus(profile),
        *_nodes(profile),
        Finding("partition", "ok", name)
        if state == "UP"
        else Finding("partition", "warning", f"{name} is {state}", "jobs wait until it is UP"),
    ]
    longest = _minutes(facts.get("MaxTime", "UNLIMITED"))
    asked = max(s.time_min for s in profile.shapes())
    if longest is not None and asked > longest:
        advice = f"set time_min to {longest} or less: runs go on in the next slice"
        findings.append(
            Finding("wall time", "problem", f"{asked} min, and {name} allows {longest}", advice)
        )
    nodes = facts.get("MaxNodes", "UNLIMITED")
    wide = max(s.nodes for s in profile.shapes())
    if nodes.isdecimal() and wide > int(nodes):
        advice = f"give no shape more than {nodes} nodes"
        findings.append(Finding("nodes", "problem", f"{wide}, and {name} allows {nodes}", advice))
    return findings


def _gpus(profile: ClusterProfile) -> list[Finding]:
    wanted = max(s.gpus_per_node for s in profile.shapes())
    if not wanted:
        return []
    where = [f"--partition={profile.partition}"] if profile.partition else []
    ok, output = command("sinfo", "--noheader", "--format=%G", *where)
    if not ok:
        return [Finding("GPUs", "warning", output, "could not be asked for")]
    counts = [int(n) for n in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", output)]
    if not counts or max(counts) < wanted:
        found = f"{wanted} of a node asked for, {max(counts, default=0)} there"
        return [Finding("GPUs", "problem", found, "see `sinfo -o '%P %G'`; set gpus_per_node")]
    return [Finding("GPUs", "ok", f"{max(counts)} of a node, {wanted} asked for")]


def _nodes(profile: ClusterProfile) -> list[Finding]:
    """Whether any node of the partition has the CPUs and memory of a shape."""
    ok, output = command(
        "sinfo", "--noheader", f"--partition={profile.partition}", "--exact", "--format=%c %m"
    )
    sizes = [tuple(map(int, re.findall(r"\d+", line)[:2])) for line in output.splitlines()]
    findings = []
    for shape in dict.fromkeys(profile.shapes()) if ok and all(len(s) == 2 for s in sizes) else ():
        cpus, memory = shape.tasks_per_node * shape.cpus_per_task, 1024 * (shape.mem_gb or 0)
        if not any(c >= cpus and m >= memory for c, m in sizes):
            most = ", ".join(f"{c} CPUs and {m / 1024:.0f} GB" for c, m in sorted(set(sizes)))
            found = f"{cpus} CPUs and {shape.mem_gb or 0:g} GB of a node asked for, there: {most}"
            advice = "such jobs never start; set cpus_per_task and mem_gb"
            findings.append(Finding("node size", "problem", found, advice))
    return findings


def _minutes(text: str) -> int | None:
    """Slurm's ``[days-]hours:minutes:seconds`` in minutes; None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, _ = (int(n or 0) for n in found.groups())
    return (24 * days + hours) * 60 + minutes
