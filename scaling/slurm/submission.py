"""Submission: intent, then sbatch or a local process, then the scheduler's answer as a hint.

submitit writes the job script, submits it and names the logs; what it pickles is one module-level
function with strings and integers. Its result pickles, job states and requeue handler are not used:
identity, records, verdicts and retries are ours (``docs/decisions/0003-submission-protocol.md``).
"""

import contextlib
import getpass
import logging
import platform
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from scaling import ClueError, __version__
from scaling.config import RunConfig
from scaling.files import write_json
from scaling.rundir import RunDir
from scaling.slurm.job import chunk_folder, run_job
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.scheduler import command, process_identity
from scaling.slurm.state import Facts, State, Verdict

log = logging.getLogger(__name__)
_STARTED: list[Any] = []
"""Local jobs that this process started and has not reaped yet."""
SWEEP = re.compile(r"[a-z0-9][a-z0-9_-]{0,80}")


class SubmissionError(ClueError):
    """The scheduler refused a submission."""


class Unreachable(SubmissionError):
    """The scheduler does not answer; nothing was submitted."""


@dataclass(frozen=True)
class Candidate:
    """A run that gets a new attempt."""

    run: RunDir
    config: RunConfig
    facts: Facts
    verdict: Verdict


@dataclass(frozen=True)
class Submitted:
    """A new attempt and what the scheduler called its job; None if its answer was lost."""

    run_key: str
    attempt: int
    job_id: str | None


def start_attempts(
    root: Path,
    candidates: Sequence[Candidate],
    profile: ClusterProfile,
    sweep: str,
) -> list[Submitted]:
    """Give every candidate a new attempt, unless somebody else is just doing so.

    Raises:
        SubmissionError: the scheduler refused; what it accepted before is recorded, and the rest
            is as if nobody had tried.
    """
    if not SWEEP.fullmatch(sweep):
        raise SubmissionError(
            f"sweep {sweep!r}: its name reaches job scripts; only a-z, 0-9, _ and - are safe"
        )
    if not candidates:
        return []
    chunks = split(candidates, profile, 1 if profile.executor == "local" else array_size(profile))
    done: list[Submitted] = []
    for shape, chunk in chunks:
        # max_parallel holds for all arrays of this submission together.
        submitted, complete = _submit_chunk(
            root, chunk, shape, profile, sweep, max(1, profile.max_parallel // len(chunks))
        )
        done += submitted
        if not complete:
            break  # at a submit limit: the rest stays planned for the next sync
    return done


def split(
    candidates: Sequence[Candidate], profile: ClusterProfile, size: int
) -> list[tuple[Shape, list[Candidate]]]:
    """Chunks of at most ``size`` runs, each of one shape, in the order of the candidates."""
    groups: dict[Shape, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(profile.shape_of(candidate.config), []).append(candidate)
    return [
        (shape, group[i : i + size])
        for shape, group in groups.items()
        for i in range(0, len(group), size)
    ]


def array_size(profile: ClusterProfile) -> int:
    """Most runs of one array: indices of an array stay below the cluster's MaxArraySize.

    Raises:
        Unreachable: the cluster does not answer.
    """
    ok, output = command("scontrol", "show", "config")
    if not ok:
        raise Unreachable(f"nothing submitted: {output}")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", output, re.MULTILINE)
    allowed = max(1, int(found.group(1)) if found else 1)
    return min(allowed, profile.array_size or allowed)


def _submit_chunk(
    root: Path,
    chunk: Sequence[Candidate],
    shape: Shape,
    profile: ClusterProfile,
    sweep: str,
    parallel: int,
) -> tuple[list[Submitted], bool]:
    """Returns the new attempts, and whether there may be room for more."""
    token = f"{sweep}-{secrets.token_hex(5)}"
    won: list[tuple[RunDir, int]] = []
    for c in chunk:
        _close(c)
        number = (c.facts.attempts[-1].number if c.facts.attempts else 0) + 1
        intent = {
            "token": token,
            "index": len(won),
            "executor": profile.executor,
            "sweep": sweep,
            "step": c.facts.committed,
            "profile": profile.name,
            "shape": shape.model_dump(mode="json"),
            "train": profile.train.model_dump(mode="json"),
            "host": socket.gethostname(),
            "user": getpass.getuser(),
            "time": time.time(),
            "versions": {
                "scaling": __version__,
                "submitit": submitit.__version__,
                "python": platform.python_version(),
            },
        }
        if c.run.record(number, "intent", intent):  # otherwise another process was faster
            if _cancelled_meanwhile(c):
                c.run.record(number, "cancel", {"by": "cancel of the attempt before"})
            won.append((c.run, number))
    if not won:
        return [], True
    write_json(
        chunk_folder(root, sweep, token) / "chunk.json",
        {"schema_version": 1, "token": token, "runs": [run.run_key for run, _ in won]},
    )
    try:
        job_ids = _sbatch(root, sweep, token, won, shape, profile, parallel)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as e:
        return _refused(won, chunk, str(e).strip())
    done = []
    for (run, number), job_id in zip(won, job_ids, strict=True):
        hint: dict[str, Any] = {"job_id": job_id, "time": time.time()}
        if profile.executor == "local":
            hint |= process_identity(int(job_id))
        run.record(number, "submit", hint)
        done.append(Submitted(run.run_key, number, job_id))
    return done, True


def _close(candidate: Candidate) -> None:
    """Record how the last attempt ended where its job could not, before a new one is made.

    The new job then need not ask Slurm, nor Slurm remember.
    """
    verdict, attempts = candidate.verdict, candidate.facts.attempts
    if attempts and attempts[-1].end is None and verdict.state in (State.FAILED, State.LOST):
        end = {
            "class": verdict.cause,
            "evidence": verdict.evidence,
            "step": candidate.facts.committed,
            "generation": max(candidate.run.generations(), default=0),
            "host": socket.gethostname(),
            "time": time.time(),
        }
        candidate.run.record(attempts[-1].number, "end", end)


def _cancelled_meanwhile(candidate: Candidate) -> bool:
    """A cancel that raced with us hit the attempt before; a cancel looks for ours in turn."""
    if not candidate.facts.attempts or candidate.facts.attempts[-1].cancel is not None:
        return False
    number = candidate.facts.attempts[-1].number
    return (candidate.run.path / "attempts" / f"{number:04d}" / "cancel.json").exists()


def _sbatch(
    root: Path,
    sweep: str,
    token: str,
    won: Sequence[tuple[RunDir, int]],
    shape: Shape,
    profile: ClusterProfile,
    parallel: int,
) -> list[str]:
    """Submit through submitit's public interface; job ids in the order of ``won``."""
    folder = chunk_folder(root, sweep, token)
    common = {
        "timeout_min": shape.time_min,
        "nodes": shape.nodes,
        "tasks_per_node": shape.tasks_per_node,
        "gpus_per_node": shape.gpus_per_node,
    }
    if profile.executor == "local":
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(**common)
    else:
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        except RuntimeError as e:
            raise SubmissionError(
                f"no Slurm on this machine ({e}); submit from a login node"
            ) from e
        if shape.gpus_per_node == 0:
            del common["gpus_per_node"]
        words = {
            "partition": profile.partition,
            "account": profile.account,
            "qos": profile.qos,
            "constraint": profile.constraint,
            "exclude": profile.exclude,
        }
        executor.update_parameters(
            **common,
            **({"mem_gb": shape.mem_gb} if shape.mem_gb is not None else {}),
            name=token,
            cpus_per_task=shape.cpus_per_task,
            slurm_signal_delay_s=profile.signal_lead_s,
            slurm_array_parallelism=parallel,
            slurm_wckey=None,
            slurm_setup=[*_bring_arguments(root, sweep, folder, shape), *profile.setup],
            slurm_additional_parameters={"requeue": True},
            # A rank that ends badly ends its step: no other waits for it in a collective. srun
            # does not inherit --cpus-per-task since Slurm 22.05.
            slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={shape.cpus_per_task}"],
            **{f"slurm_{k}": v for k, v in words.items() if v is not None},
        )
    n = len(won)
    with _jobs_ignore_the_terminal() if profile.executor == "local" else contextlib.nullcontext():
        jobs = executor.map_array(run_job, [str(root)] * n, [sweep] * n, [token] * n)
    if profile.executor == "local":
        _STARTED[:] = [job for job in (*_STARTED, *jobs) if not job.done()]
    return [str(job.job_id) for job in jobs]


def _bring_arguments(root: Path, sweep: str, folder: Path, shape: Shape) -> list[str]:
    """Shell lines with which a job brings its own arguments to where submitit looks for them.

    submitit renames them there after sbatch has answered. Where the answer is lost or the login
    dies first, its job would wait a minute for them and fail. They are the same for every job of a
    chunk, so that each can copy them.
    """
    arguments = DelayedSubmission(run_job, str(root), sweep, folder.name)
    arguments.set_timeout(shape.time_min, 0)
    folder.mkdir(parents=True, exist_ok=True)
    arguments.dump(folder / "arguments.pkl")
    return [
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        f"test -e {folder}/${{job}}_submitted.pkl"
        f" || cp {folder}/arguments.pkl {folder}/${{job}}_submitted.pkl",
    ]


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


LIMIT = re.compile(r"AssocMax|AssocGrp|QOSMax|QOSGrp|MaxSubmit|submit limit|accounting/QOS", re.I)
UNREACHABLE = re.compile(r"Unable to contact slurm controller|Connection refused", re.I)
REJECTED = re.compile(
    r"\bInvalid\b|not available|denied|not permitted|unrecognized option|Unable to open file"
    r"|Requested node configuration|No partition|command not found|Memory specification",
    re.I,
)


def _refused(
    won: Sequence[tuple[RunDir, int]], chunk: Sequence[Candidate], message: str
) -> tuple[list[Submitted], bool]:
    """Record a failed sbatch: only where it certainly was not accepted is the attempt ended.

    ``Socket timed out`` and the like say nothing: the job may come. Such an attempt keeps its
    intent and is repeated once the quarantine is over and the controller knows no such job.
    """
    cause = next(
        (c for c, pattern in (("limit", LIMIT), ("unreachable", UNREACHABLE),
                              ("rejected", REJECTED)) if pattern.search(message)),
        None,
    )  # fmt: skip
    if cause is None:
        log.warning("sbatch gave no clear answer; waiting for its job: %s", message)
        return [Submitted(run.run_key, number, None) for run, number in won], True
    for run, number in won:
        run.record(number, "end", {"class": cause, "evidence": message[-500:], "time": time.time()})
    if cause == "limit":
        log.warning("at a submit limit; the rest stays planned: %s", message)
        return [], False
    error = Unreachable if cause == "unreachable" else SubmissionError
    raise error(f"sbatch refused {len(chunk)} runs: {message}")
