"""One look at the scheduler: ``squeue`` and ``sacct`` for Slurm, processes for this host.

A query that fails, hangs, or prints what we cannot read never raises and never yields a verdict:
the snapshot then says that nobody answered, and why.
"""

import os
import pwd
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scaling.rundir import Attempt
from scaling.slurm.state import NODE, Job, Phase, Snapshot, Word, meaning

TIMEOUT_S = 30.0
"""Longest wait for one Slurm command. [seconds]"""
USERS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@-]*")
MOST_NAMES = 500
OVERRIDES = re.compile(r"(SUBMITIT|SBATCH|SQUEUE|SACCT|SCANCEL|SINFO|SRUN|SLURM)_\w+")
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_TIME = "%Y-%m-%dT%H:%M:%S"


def environment() -> dict[str, str]:
    """This process's environment without what changes the meaning of Slurm's commands.

    ``SQUEUE_PARTITION`` hides jobs, ``SBATCH_TIMELIMIT`` beats the job script, and what an
    allocation sets for its own job steps would reach the jobs that are submitted from it.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or not OVERRIDES.fullmatch(name)
    }


def command(*words: str, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """Run a command without a shell.

    Returns:
        Whether it succeeded, and its output, or what went wrong in one line.
    """
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=environment(),
        )
    except FileNotFoundError:
        return False, f"{words[0]}: not found on this machine"
    except subprocess.TimeoutExpired:
        return False, f"{words[0]}: no answer within {timeout_s:.0f} s"
    except OSError as e:
        return False, f"{words[0]}: {e}"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return False, f"{words[0]}: {lines[-1]}"
    return True, done.stdout


def look(attempts: Iterable[Attempt], *, history: bool = True) -> Snapshot:
    """What the scheduler says of these attempts' jobs: at most one squeue and one sacct.

    Args:
        history: ask sacct for jobs that the queue has forgotten. A job that may run is in the
            queue.
    """
    slurm, jobs = [], {}
    for attempt in attempts:
        key = (str(attempt.intent["token"]), int(attempt.intent["index"]))
        if attempt.intent["executor"] == "local":
            found = _local_job(attempt)
            if found is not None:
                jobs[key] = found
        elif attempt.intent["executor"] == "slurm":
            slurm.append((key, attempt))
    if not slurm:
        return Snapshot(jobs)
    tokens = sorted({token for (token, _), _ in slurm})
    # One word of a command holds 128 KiB; who has more submissions under way gets all jobs listed.
    names = [f"--name={','.join(tokens)}"] if len(tokens) <= MOST_NAMES else []
    # Jobs of other people cannot speak for ours, whatever they are called.
    users = ",".join(sorted({str(a.intent.get("user") or user_name()) for _, a in slurm}))
    if not USERS.fullmatch(users):
        return Snapshot(jobs, False, f"{users!r} in an intent is no user's name")
    whose = f"--user={users}"
    ok, output = command(
        "squeue", "--noheader", "--array", "--states=all", whose, *names,
        "--format=%F|%K|%T|%e|%r|%N|%j",
    )  # fmt: skip
    queue = _parse_squeue(output) if ok else None
    if queue is None:
        return Snapshot(jobs, False, output if not ok else "squeue printed what is not a job list")
    jobs.update(queue)
    unseen = [a for key, a in slurm if key not in jobs] if history else []
    if not unseen:
        return Snapshot(jobs)
    oldest = min(float(a.intent["time"]) for a in unseen) - 86_400
    ok, output = command(
        "sacct", "--noheader", "--allocations", "--parsable2", whose, *names,
        f"--starttime={time.strftime(_TIME, time.localtime(oldest))}",
        "--format=JobID,State,End,NodeList,JobName",
    )  # fmt: skip
    if not ok and _accounting_is_off(output):
        return Snapshot(jobs)
    past = _parse_sacct(output) if ok else None
    if past is None:
        return Snapshot(jobs, False, output if not ok else "sacct printed what is not a job list")
    return Snapshot({**past, **jobs})


def queued_jobs() -> int | None:
    """Jobs that this user has in the queue, pending array elements one by one; None if unknown."""
    ok, output = command("squeue", "--noheader", "--array", f"--user={user_name()}", "--format=%i")
    return len(output.splitlines()) if ok else None


def user_name() -> str:
    """The user whose jobs these are, by the system's word and not by a variable's."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _accounting_is_off(message: str) -> bool:
    """Whether sacct failed because this cluster keeps no accounts; squeue alone then decides."""
    return "accounting storage is disabled" in message.lower()


def _parse_squeue(output: str) -> dict[tuple[str, int], Job] | None:
    if output and not output.endswith("\n"):
        return None
    jobs = {}
    for line in output.splitlines():
        fields = line.split("|", 6)
        if len(fields) != 7 or not fields[0].isdecimal():
            return None
        main, index, word, end, reason, nodes, name = fields
        job_id = f"{main}_{index}" if index.isdecimal() else main
        place = int(index) if index.isdecimal() else 0
        reason = "" if reason == "None" else reason
        jobs[name, place] = Job(job_id, word, reason, _time(end), _node(nodes))
    return jobs


def _parse_sacct(output: str) -> dict[tuple[str, int], Job] | None:
    if output and not output.endswith("\n"):
        return None
    jobs = {}
    for line in output.splitlines():
        fields = line.split("|", 4)
        if len(fields) != 5:
            return None
        job_id, word, end, nodes, name = fields
        main, _, index = job_id.partition("_")
        if not main.isdecimal():
            return None
        if index and not index.isdecimal():
            continue  # the pending rest of an array, "123_[4-7%2]": squeue has its elements
        jobs[name, int(index or 0)] = Job(job_id, word, "", _time(end), _node(nodes))
    return jobs


def _node(text: str) -> str:
    """The node of a job on one; empty for several (``gpu[1-2]``), none, or ``None assigned``."""
    return text if NODE.fullmatch(text) else ""


def _time(text: str) -> float | None:
    """Slurm's local time as unix seconds; None for ``Unknown``, ``N/A``, ``NONE``."""
    try:
        return time.mktime(time.strptime(text, _TIME))
    except ValueError:
        return None


# processes on this host


def process_start(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot; None if it has ended.

    With the host's boot it tells a process from a later one with the same id.
    """
    try:
        # The command name may hold anything, so fields are counted from its closing parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    """Identity of this host's boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_identity(pid: int) -> dict[str, Any]:
    """What identifies a local job: its controlling process on this host."""
    return {
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": pid,
        "started": process_start(pid),
    }


def _local_job(attempt: Attempt) -> Job | None:
    record = attempt.claim or attempt.submit
    if record is None:
        return None
    job_id = str(record["job_id"])
    if record["host"] != socket.gethostname():
        return Job(job_id, f"ON_HOST_{record['host']}")
    alive = record["boot"] == boot_id() and process_start(int(record["pid"])) == record["started"]
    return Job(job_id, "RUNNING") if alive and record["started"] is not None else None


def may_write(attempts: Sequence[Attempt]) -> bool | None:
    """Whether the job of any of these claimed attempts may write now; None if nobody can tell.

    One that waits in the queue may not: when it starts again it will see that it is superseded.
    """
    snapshot = look(attempts, history=False)
    for attempt in attempts:
        job = snapshot.jobs.get((str(attempt.intent["token"]), int(attempt.intent["index"])))
        word = Word(Phase.ENDED) if job is None else meaning(job.word)
        if word is None:
            return None
        if word.phase is Phase.RUNNING:
            return True
    return False if snapshot.answered else None
