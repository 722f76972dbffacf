"""Which job may write into a run: claims, made when a job starts.

``refusal`` and ``predecessors`` decide, and are pure; the protocol around them is in
``docs/decisions/0003-submission-protocol.md``.
"""

import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaling.rundir import Attempt, RunDir
from scaling.slurm.scheduler import may_write
from scaling.slurm.state import is_cancelled

POLL_S = 10.0
"""Between looks at a predecessor that may still be alive. [seconds]"""
STOPPED = "stopped while it waited for another job"
"""``claim``'s word for a job that may come again."""
CLAIM_WAIT_S = 300.0
"""Longest wait of a local rank for rank 0's claim; under Slurm srun ends the ranks. [seconds]"""


def claim(
    run: RunDir, number: int, job: dict[str, Any], stop: Callable[[], object] = bool
) -> str | None:
    """Make this job the owner of the attempt, unless it must not run.

    At most one job passes for a run at any time: whoever creates an attempt later than this look
    at the newest one finds our claim and waits for us; whoever created it earlier is seen here.

    Args:
        stop: whether the job is to stop; polled while it waits for another.

    Returns:
        None if the job may train, otherwise why not.
    """
    while True:
        if reason := _must_not_run(run, number, job):
            return reason
        if stop():
            return STOPPED
        if may_write(predecessors(run.attempts(), number)) is False:
            break
        print("waiting for the job of an older attempt to end", file=sys.stderr, flush=True)
        _sleep(POLL_S, stop)
    run.record(number, "claim", {**job, "host": socket.gethostname(), "time": time.time()})
    return _must_not_run(run, number, job)


def _sleep(seconds: float, stop: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop():
        time.sleep(min(1.0, seconds))


def await_claim(run: RunDir, number: int, job: dict[str, Any]) -> str | None:
    """As ``claim`` on the other ranks, which leave the decision to rank 0."""
    end = time.monotonic() + CLAIM_WAIT_S
    pause = 0.1
    while job["executor"] != "local" or time.monotonic() < end:
        if reason := _must_not_run(run, number, job):
            return reason
        if any(a.number == number and a.claim for a in run.attempts()):
            return None
        time.sleep(pause)
        pause = min(1.5 * pause, POLL_S)
    return f"rank 0 did not claim within {CLAIM_WAIT_S:.0f} s"


def refusal(
    attempts: Sequence[Attempt], over: bool, number: int, job: Mapping[str, Any]
) -> str | None:
    """Why a job must not run, from the run's records; None if nothing speaks against it. Pure.

    Args:
        attempts: all attempts of the run, oldest first.
        over: the run has a result, and all evaluations that are wanted of it.
        number: the attempt that the job is of.
        job: ``executor`` and ``job_id`` of the job; ``boot`` and ``started`` of a local one.
    """
    if over:
        return "the run is over"
    newest = attempts[-1]
    if newest.number != number:
        return f"attempt {newest.number} is newer than attempt {number}"
    if is_cancelled(attempts):
        return f"attempt {number} was cancelled"
    if newest.end is not None:
        return f"attempt {number} has ended: {newest.end['class']}"
    mine = ("job_id", "boot", "started") if job["executor"] == "local" else ("job_id",)
    if newest.claim is not None and any(newest.claim.get(k) != job.get(k) for k in mine):
        return f"attempt {number} belongs to job {newest.claim['job_id']}"
    return None


def predecessors(attempts: Sequence[Attempt], number: int) -> list[Attempt]:
    """Older attempts whose job may still write. Pure.

    Every claimed one may: that an end of it is recorded says what somebody saw who looked before
    the job started, or started again. Only a process on one host cannot start again.
    """
    return [
        a
        for a in attempts
        if a.number < number and a.claim and (a.intent["executor"] != "local" or not a.end)
    ]


def _must_not_run(run: RunDir, number: int, job: dict[str, Any]) -> str | None:
    return refusal(run.attempts(), run.over(), number, job)
