"""Cancel runs: a record first, then the job, so that neither a requeue nor a sync revives it."""

import contextlib
import getpass
import os
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Sequence

from scaling.rundir import Attempt, RunDir
from scaling.slurm.scheduler import command
from scaling.slurm.state import DEFAULT_RULES, Phase, State, meaning
from scaling.slurm.status import survey
from scaling.slurm.submission import SubmissionError


def cancel(runs: Sequence[RunDir]) -> list[str]:
    """End runs: their jobs stop after committing a checkpoint, and nothing restarts them.

    Doing it again is a no-op. A run that is over stays what it is; one that was not submitted yet
    is marked, so that a watching ``sync`` does not start it. ``submit(retry_failed=True)`` takes
    a cancelled run up again.

    Returns:
        Keys of the runs cancelled by this call.

    Raises:
        SubmissionError: the records are written, but the scheduler could not be told of every job;
            call again.
    """
    snapshot, derived = survey(runs, DEFAULT_RULES)
    cancelled, late, jobs = [], 0, defaultdict(list)
    for run, facts, verdict in derived:
        if verdict.state in (State.DONE, State.DIVERGED) or verdict.cause == "damaged":
            continue
        if not verdict.over and _mark(run):
            cancelled.append(run.run_key)
            newest = run.attempts()[-1]
            late += newest.number > verdict.attempt and newest.intent["executor"] != "none"
        if verdict.job_state is None:
            continue
        word = meaning(verdict.job_state)
        if word is None or word.phase is not Phase.ENDED:
            seen = facts.attempts[-1]
            jobs[str(seen.intent["executor"]), str(seen.intent["token"])].append(seen)
    problem = "" if snapshot.answered else snapshot.note
    if late:
        problem = f"{late} of them got another attempt meanwhile"
    for (executor, token), attempts in jobs.items():
        if executor == "local":
            _terminate(attempts[0])
            continue
        elements = [snapshot.jobs[token, int(a.intent["index"])].job_id for a in attempts]
        # The name guards against an id that Slurm has given to somebody else since.
        ok, output = command("scancel", f"--name={token}", *elements)
        if not ok:
            problem = output
    if problem:
        raise SubmissionError(
            f"{len(cancelled)} runs marked as cancelled, but their jobs may still run: {problem}"
        )
    return cancelled


def _mark(run: RunDir) -> bool:
    """Mark the newest attempt, and any that somebody adds at the same time."""
    by = {"by": getpass.getuser(), "host": socket.gethostname(), "time": time.time()}
    if not run.attempts():
        intent = {"token": "none", "index": 0, "executor": "none", "step": 0, **by}
        run.record(1, "intent", intent)
    done = False
    while (newest := run.attempts()[-1]).cancel is None:
        done = run.record(newest.number, "cancel", by) or done
    return done


def _terminate(attempt: Attempt) -> None:
    """SIGTERM to a local job's controlling process, which passes it on to the ranks."""
    record = attempt.claim or attempt.submit or {}
    with contextlib.suppress(ProcessLookupError, KeyError):
        os.kill(int(record["pid"]), signal.SIGTERM)
