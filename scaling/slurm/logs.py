"""Where a run's output is: submitit's log files, found through the records of its attempts."""

from pathlib import Path

from scaling.files import RecordError
from scaling.rundir import RunDir
from scaling.slurm.job import chunk_folder

TAIL_BYTES = 1 << 20


def log_files(run: RunDir, *, attempt: int | None = None, rank: int = 0) -> list[Path]:
    """Standard output and error of one rank of an attempt, those that exist.

    Args:
        attempt: its number; None: the newest.

    Raises:
        RecordError: the run has no such attempt, or nothing was written yet.
    """
    attempts = run.attempts()
    if not attempts:
        raise RecordError(
            f"run {run.run_key} was never submitted, so that no job has logs; `train` prints to "
            "the terminal"
        )
    chosen = [a for a in attempts if attempt is None or a.number == attempt][-1:]
    if not chosen:
        numbers = ", ".join(str(a.number) for a in attempts)
        raise RecordError(f"run {run.run_key} has no attempt {attempt}; there are: {numbers}")
    record = chosen[0].claim or chosen[0].submit
    if record is None:
        raise RecordError(
            f"run {run.run_key}, attempt {chosen[0].number}: its job is not known yet; see status"
        )
    intent = chosen[0].intent
    folder = chunk_folder(run.root, intent["sweep"], intent["token"])
    paths = [folder / f"{record['job_id']}_{rank}_log.{kind}" for kind in ("out", "err")]
    found = [p for p in paths if p.exists()]
    if not found:
        raise RecordError(f"{paths[0]}: no such file; the job has not started yet")
    return found


def tail(path: Path, lines: int) -> str:
    """The last lines of a log file; undecodable bytes are replaced."""
    with open(path, "rb") as f:
        f.seek(0, 2)
        f.seek(max(0, f.tell() - TAIL_BYTES))
        return "\n".join(f.read().decode(errors="replace").splitlines()[-lines:])
