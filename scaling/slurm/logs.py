"""Where a run's output is: submitit's log files, found through the records of its attempts."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scaling.files import RecordError
from scaling.rundir import Attempt, RunDir, chunk_folder
from scaling.slurm.failures import START_LINE, explain
from scaling.slurm.profile import Shape

TAIL_BYTES = 1 << 20
EXPLAINING_LINES, EXPLAINING_RANKS = 200, 64
"""Of each log, and of so many ranks, the end is searched for the cause of a failure."""
FOLLOW_S = 0.5
"""Between two looks at a log that is followed. [seconds]"""
ASK_S = 60.0
"""Between two questions to the scheduler while a log is followed. [seconds]"""
FOLLOW_FROM_BYTES = 1 << 12
"""Following begins so far before the end. [bytes]"""


def log_files(run: RunDir, *, attempt: int | None = None, rank: int = 0) -> list[Path]:
    """Standard output and error of one rank of an attempt, those that exist.

    Args:
        attempt: its number; None: the newest.

    Raises:
        RecordError: the run has no such attempt, or nothing was written yet.
    """
    chosen = _chosen(run, run.attempts(), attempt)
    if not (chosen.claim or chosen.submit):
        raise RecordError(
            f"run {run.run_key}, attempt {chosen.number}: its job is not known yet; see status"
        )
    if rank >= (ranks := _ranks(chosen)):
        raise RecordError(f"run {run.run_key} has no rank {rank}; there are: 0 to {ranks - 1}")
    paths = _paths(run, chosen, rank)
    found = [p for p in paths if p.exists()]
    if not found:
        raise RecordError(f"{paths[0]}: no such file; the job has not started yet")
    return found


def explanation(run: RunDir, attempt: Attempt) -> tuple[str, str] | None:
    """Cause and evidence that the ends of an attempt's logs have, of whichever rank; else None."""
    if not (attempt.claim or attempt.submit):
        return None
    ends = [
        tail(path, EXPLAINING_LINES).rpartition(START_LINE)[2]  # of the last start alone
        for rank in range(min(_ranks(attempt), EXPLAINING_RANKS))
        for path in _paths(run, attempt, rank)
        if path.exists()
    ]
    return explain("\n".join(ends))


def _chosen(run: RunDir, attempts: Sequence[Attempt], number: int | None) -> Attempt:
    """The attempt of this number, or the newest."""
    if not attempts:
        raise RecordError(
            f"run {run.run_key} was never submitted, so that no job has logs; `train` prints to "
            "the terminal"
        )
    chosen = [a for a in attempts if number is None or a.number == number]
    if not chosen:
        numbers = ", ".join(str(a.number) for a in attempts)
        raise RecordError(f"run {run.run_key} has no attempt {number}; there are: {numbers}")
    return chosen[-1]


def _ranks(attempt: Attempt) -> int:
    return Shape.model_validate(attempt.intent["shape"]).world_size


def _paths(run: RunDir, attempt: Attempt, rank: int) -> list[Path]:
    record = attempt.claim or attempt.submit or {}
    folder = chunk_folder(run.root, attempt.intent["sweep"], attempt.intent["token"])
    return [folder / f"{record['job_id']}_{rank}_log.{kind}" for kind in ("out", "err")]


def follow(
    run: RunDir,
    over: Callable[[], bool],
    *,
    attempt: int | None = None,
    rank: int = 0,
) -> Iterator[str]:
    """Lines that a rank prints from now on, until its attempt is over and all is printed.

    Args:
        over: whether nothing more will happen to the run by itself. A job that was killed leaves
            no record, so it is asked once a minute, and whenever an attempt has ended.
        attempt: its number; None: the newest, and each one that comes after it.

    Raises:
        RecordError: the run has no such attempt.
    """
    at: dict[Path, int] = {}
    rest: dict[Path, bytes] = {}
    asked = time.monotonic()
    while True:
        attempts = run.attempts()
        followed = _chosen(run, attempts, attempt)
        due = followed.end is not None or time.monotonic() > asked + ASK_S
        ended = followed.number < attempts[-1].number or (due and over())
        asked = time.monotonic() if due else asked
        for path in _paths(run, followed, rank) if followed.claim or followed.submit else []:
            if not path.exists():
                continue
            with open(path, "rb") as f:
                f.seek(at.setdefault(path, max(0, f.seek(0, 2) - FOLLOW_FROM_BYTES)))
                *lines, rest[path] = (rest.get(path, b"") + f.read()).split(b"\n")
                at[path] = f.tell()
            yield from (line.decode(errors="replace") for line in lines)
        if ended:
            yield from (line.decode(errors="replace") for line in rest.values() if line)
            return
        time.sleep(FOLLOW_S)


def tail(path: Path, lines: int) -> str:
    """The last lines of a log file; undecodable bytes are replaced."""
    with open(path, "rb") as f:
        f.seek(0, 2)
        f.seek(max(0, f.tell() - TAIL_BYTES))
        return "\n".join(f.read().decode(errors="replace").splitlines()[-lines:])
