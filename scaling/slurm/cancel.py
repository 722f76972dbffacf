"""Cancel runs: a record first, then the job, so that neither a requeue nor a sync revives it."""

import contextlib
import getpass
import os
import re
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Sequence

from scaling.rundir import Attempt, RunDir
from scaling.slurm.profile import private_files
from scaling.slurm.scheduler import command, look
from scaling.slurm.state import DEFAULT_RULES, Phase, State, meaning
from scaling.slurm.status import survey
from scaling.slurm.submission import SubmissionError

GONE = re.compile(r"Invalid job id|already complet", re.IGNORECASE)
"""What scancel says of a job that has ended since it was looked for."""


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
    _, derived = survey(runs, DEFAULT_RULES)
    cancelled, marked = [], []
    for run, _, verdict in derived:
        with private_files():
            if not verdict.over and _mark(run):
                cancelled.append(run.run_key)
        if verdict.state not in (State.DONE, State.DIVERGED) and verdict.cause != "damaged":
            marked += run.attempts()
    # Jobs are looked for after the marks: one that starts from now on sees its mark and leaves.
    snapshot = look(marked, history=False)
    elements = defaultdict(list)
    for attempt in marked:
        token = str(attempt.intent["token"])
        job = snapshot.jobs.get((token, int(attempt.intent["index"])))
        word = None if job is None else meaning(job.word)
        if job is None or (word is not None and word.phase is Phase.ENDED):
            continue
        if attempt.intent["executor"] == "local":
            _terminate(attempt)
        else:
            elements[token].append(job.job_id)
    problem = "" if snapshot.answered else snapshot.note
    for token, job_ids in elements.items():
        # The name guards against an id that Slurm has given to somebody else since.
        ok, output = command("scancel", f"--name={token}", *job_ids)
        if not ok and not GONE.search(output):
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
