"""The one place that knows submitit: job arrays through ``sbatch``, processes on this host.

submitit writes the job script, submits it and names the logs; what it pickles is one module-level
function with three strings. Its result pickles, job states and requeue handler are not used.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from scaling import ClueError
from scaling.rundir import chunk_folder
from scaling.slurm import scheduler
from scaling.slurm.code import archive_path, import_line
from scaling.slurm.job import run_job
from scaling.slurm.profile import ClusterProfile, Shape

_STARTED: list[Any] = []
"""Local jobs that this process started and has not reaped yet."""


class Refused(ClueError):
    """``sbatch`` failed; its message says whether the job may come all the same."""


@dataclass(frozen=True)
class JobArray:
    """Elements of a chunk that one ``sbatch`` submits."""

    root: Path
    sweep: str
    token: str
    indices: range
    """Their places in the chunk, and in the array."""
    shape: Shape
    profile: ClusterProfile
    code: str
    """Digest of the archive that they import."""
    parallel: int
    """So many execute at once."""
    exclude: str | None
    """Nodes not to be used, as Slurm lists them."""

    @property
    def folder(self) -> Path:
        """The chunk's."""
        return chunk_folder(self.root, self.sweep, self.token)


def start_array(array: JobArray) -> list[str]:
    """Submit a job array; returns its elements' job ids, ``<array>_<index>``.

    Raises:
        Refused: ``sbatch`` gave no job id.
    """
    array.folder.mkdir(parents=True, exist_ok=True)
    # submitit brings the arguments to where a job looks for them after sbatch has answered. Where
    # the answer is lost or the login dies first, a job would wait a minute for them and fail. They
    # are the same for every job of a chunk: the script copies them.
    words = str(array.root), array.sweep, array.token
    arguments = DelayedSubmission(run_job, *words)
    arguments.set_timeout(array.shape.time_min, 0)
    arguments.dump(array.folder / "arguments.pkl")
    executor = _executor(array)
    try:
        with _environment(scheduler.environment()):
            job = executor.submit(run_job, *words)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as e:
        raise Refused(str(e).strip()) from None
    return [f"{job.job_id}_{i}" for i in array.indices]


def array_script(array: JobArray) -> str:
    """The script that ``start_array`` would give to ``sbatch``; writes nothing."""
    executor = _executor(array)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def _executor(array: JobArray) -> Any:
    folder, shape, profile = array.folder, array.shape, array.profile
    try:
        executor = submitit.SlurmExecutor(folder=folder)
    except RuntimeError as e:
        raise ClueError(f"no Slurm on this machine ({e}); submit from a login node") from e
    wanted = {"job-name": array.token, **profile.resources(shape)}
    if array.exclude is not None:
        wanted["exclude"] = array.exclude
    archive = archive_path(array.root, array.code)
    first, last = array.indices[0], array.indices[-1]
    copied = f"{folder}/${{job}}_submitted.pkl"
    executor.update_parameters(
        **{name.replace("-", "_"): value for name, value in wanted.items()},
        wckey=None,
        setup=[
            "umask 077",
            "job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",
            # What is imported and unpickled must be the user's own.
            f"for file in {archive} {folder}/arguments.pkl; do test -O $file"
            ' || { echo "error: $file: is missing, or not your own" >&2; exit 1; }; done',
            f"test -e {copied} || cp {folder}/arguments.pkl {copied}",
            *profile.setup_lines(),
            import_line(archive),
        ],
        additional_parameters={
            "requeue": True,
            # Elements keep their index in the chunk, wherever the array begins; always an array,
            # so that one run's job is named and logged as any other.
            "array": f"{first}-{last}%{min(array.parallel, len(array.indices))}",
            # submitit takes another signal from a variable of the shell.
            "signal": f"USR2@{profile.signal_lead_s}",
        },
        srun_args=shape.srun_words,
    )
    executor.parameters["map_count"] = len(array.indices)  # names logs by array and index
    return executor


def start_process(root: Path, sweep: str, token: str, shape: Shape, code: str) -> str:
    """Start one run on this host; returns the id of the process that controls its ranks."""
    executor = submitit.LocalExecutor(folder=chunk_folder(root, sweep, token))
    executor.update_parameters(
        timeout_min=shape.time_min,
        tasks_per_node=shape.tasks_per_node,
        gpus_per_node=shape.gpus_per_node,
    )
    with _jobs_ignore_the_terminal(), _environment(_importing(archive_path(root, code))):
        job = executor.submit(run_job, str(root), sweep, token)
    _STARTED[:] = [j for j in (*_STARTED, job) if not j.done()]
    return str(job.job_id)


def _importing(archive: Path) -> dict[str, str]:
    """This environment, importing the package from an archive, as jobs of arrays do."""
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": f"{archive}{os.pathsep + path if path else ''}",
        "PYTHONSAFEPATH": "1",
    }


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes started meanwhile have this environment: submitit hands on its own."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _jobs_ignore_the_terminal() -> Iterator[None]:
    """Processes started meanwhile outlive Ctrl-C and the end of an ssh session.

    An ignored signal stays ignored across exec.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
