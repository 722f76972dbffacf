"""Submission: intent, then sbatch or a local process, then the scheduler's answer as a hint.

Identity, records, verdicts and retries are ours (``docs/decisions/0003-submission-protocol.md``);
``scaling.slurm.launcher`` has what submitit does.
"""

import logging
import platform
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit

from scaling import ClueError, __version__
from scaling.config import RunConfig
from scaling.files import write_json
from scaling.rundir import Attempt, RunDir, chunk_folder
from scaling.slurm.cost import Estimate
from scaling.slurm.failures import refused_as
from scaling.slurm.launcher import JobArray, Refused, array_script, start_array, start_process
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.scheduler import command, process_identity, queued_jobs, user_name
from scaling.slurm.state import Facts, Phase, State, Verdict, meaning

log = logging.getLogger(__name__)
SWEEP = re.compile(r"[a-z0-9][a-z0-9_-]{0,80}")
LIMIT_TRUSTED_S = 900.0
"""A submit limit that was met is believed for so long, then tried again with a few runs: it may
have changed, or be a group's. [seconds]"""
PROBES = 32
"""So many."""


class SubmissionError(ClueError):
    """The scheduler refused a submission."""


class Unreachable(SubmissionError):
    """The scheduler does not answer; nothing was submitted."""


@dataclass(frozen=True)
class Candidate:
    """A run that gets a new attempt, and on what terms."""

    run: RunDir
    config: RunConfig
    facts: Facts
    verdict: Verdict
    code: str = ""
    """Digest of the archive that its job imports."""
    estimate: Estimate | None = None
    """What the rest of the run is estimated to take."""
    allowance: float | None = None
    """What the attempt may take at most; None without a budget. [GPU-hours]"""
    again: bool = False
    """A person asked for it after it was cancelled."""
    allow_drift: bool = False
    """It may go on with other packages than it began with."""


@dataclass(frozen=True)
class Submitted:
    """A new attempt and what the scheduler called its job; None if its answer was lost."""

    run_key: str
    attempt: int
    job_id: str | None


@dataclass(frozen=True)
class Started:
    """What a pass started, and why it did not start more."""

    submitted: list[Submitted]
    held: str = ""


@dataclass(frozen=True)
class Chunk:
    """Runs that one job array may hold: of one shape, and one state of the code."""

    shape: Shape
    code: str
    candidates: list[Candidate]


def start_attempts(
    root: Path,
    candidates: Sequence[Candidate],
    profile: ClusterProfile,
    sweep: str,
    *,
    exclude: Sequence[str] = (),
    others: Sequence[Attempt] = (),
    excess: Callable[[], float] | None = None,
) -> Started:
    """Give every candidate a new attempt, unless somebody else is just doing so.

    Args:
        candidates: their attempts before have ended, by record.
        exclude: nodes not to be used, besides the profile's.
        others: attempts of the sweep that are queued or running.
        excess: by how much the sweep's spendings and reservations exceed its budget, read anew.
            [GPU-hours]

    Raises:
        SubmissionError: the scheduler refused; what it accepted before is recorded, and the rest
            is as if nobody had tried.
    """
    check_name(sweep)
    local = profile.executor == "local"
    if not candidates:
        return Started([])
    chunks = split(candidates, profile, 1 if local else array_size(profile))
    free = profile.max_parallel - _occupied(others)
    done: list[Submitted] = []
    for chunk in chunks:
        if free <= 0 and not local:
            return Started(done, f"max_parallel = {profile.max_parallel} are queued or running")
        parallel = max(1, min(free, profile.max_parallel // len(chunks)))
        started = _submit_chunk(root, chunk, profile, sweep, parallel, exclude, excess)
        done += started.submitted
        free -= min(parallel, len(started.submitted))
        if started.held:
            return Started(done, started.held)  # the rest stays planned for the next sync
    return Started(done)


def scripts(
    root: Path,
    candidates: Sequence[Candidate],
    profile: ClusterProfile,
    sweep: str,
    exclude: Sequence[str] = (),
) -> Iterator[tuple[Chunk, str]]:
    """The job scripts of the arrays that ``start_attempts`` would submit; writes nothing.

    The part of the job name that is drawn at submission is zeros here.
    """
    check_name(sweep)
    chunks = split(candidates, profile, array_size(profile))
    for chunk in chunks:
        array = JobArray(
            root,
            sweep,
            f"{sweep}-{'0' * 10}",
            range(len(chunk.candidates)),
            chunk.shape,
            profile,
            chunk.code,
            parallel=max(1, profile.max_parallel // len(chunks)),
            exclude=_excluded(profile, exclude),
        )
        yield chunk, array_script(array)


def check_name(sweep: str) -> None:
    """Refuse a sweep's name that would not be safe in a job script.

    Raises:
        SubmissionError: it has other characters than a-z, 0-9, _ and -.
    """
    if not SWEEP.fullmatch(sweep):
        raise SubmissionError(
            f"sweep {sweep!r}: its name reaches job scripts; only a-z, 0-9, _ and - are safe"
        )


def split(candidates: Sequence[Candidate], profile: ClusterProfile, size: int) -> list[Chunk]:
    """Chunks of at most ``size`` runs, each of one shape and code, in the candidates' order."""
    groups: dict[tuple[Shape, str], list[Candidate]] = {}
    for candidate in candidates:
        key = profile.shape_of(candidate.config), candidate.code
        groups.setdefault(key, []).append(candidate)
    return [
        Chunk(shape, code, group[i : i + size])
        for (shape, code), group in groups.items()
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


def within_known_limit(
    candidates: Sequence[Candidate], attempts: Sequence[Attempt], profile: ClusterProfile
) -> tuple[Sequence[Candidate], str]:
    """As many candidates as a submit limit that this profile met leaves room for, and why not more.

    Args:
        attempts: of the whole sweep; some have met the limit.

    Raises:
        Unreachable: the cluster does not answer.
    """
    met = [
        a.end
        for a in attempts
        if a.end
        and a.end["class"] == "limit"
        and a.end.get("queued") is not None
        and a.intent.get("profile") == profile.name
    ]
    newest = max(met, key=lambda end: float(end["time"]), default=None)
    if newest is None:
        return candidates, ""
    queued = queued_jobs()
    if queued is None:
        raise Unreachable("nothing submitted: squeue does not say how many jobs are queued")
    room = max(0, int(newest["queued"]) - queued)
    if time.time() - float(newest["time"]) > LIMIT_TRUSTED_S:
        room = max(room, PROBES)
    held = f"at a submit limit of {newest['queued']} queued jobs"
    return candidates[:room], held if room < len(candidates) else ""


def _occupied(attempts: Sequence[Attempt]) -> int:
    """Runs that arrays already in the queue may execute at once."""
    waiting: dict[tuple[str, str], list[int]] = {}
    for attempt in attempts:
        array = str((attempt.submit or {}).get("job_id", "")).partition("_")[0]
        parallel = int(attempt.intent.get("parallel", 1))
        waiting.setdefault((str(attempt.intent["token"]), array), []).append(parallel)
    return sum(min(each[0], len(each)) for each in waiting.values())


def _excluded(profile: ClusterProfile, nodes: Sequence[str]) -> str | None:
    return ",".join([*([profile.exclude] if profile.exclude else []), *nodes]) or None


def _submit_chunk(
    root: Path,
    chunk: Chunk,
    profile: ClusterProfile,
    sweep: str,
    parallel: int,
    exclude: Sequence[str],
    excess: Callable[[], float] | None,
) -> Started:
    token = f"{sweep}-{secrets.token_hex(5)}"
    won: list[tuple[Candidate, int]] = []
    held = ""
    try:
        _intend(chunk, profile, sweep, token, parallel, exclude, won)
        if excess is not None:
            kept = _withdraw(won, excess())
            held = "" if kept == won else "the budget is reserved by another login"
            won = kept
        if not won:
            return Started([], held)
        write_json(
            chunk_folder(root, sweep, token) / "chunk.json",
            {"schema_version": 1, "token": token, "runs": [c.run.run_key for c, _ in won]},
        )
        if profile.executor == "local":
            return Started([_start_here(root, sweep, token, *won[0], chunk.shape)], held)
    except BaseException:
        # Nothing was asked of the scheduler yet: nobody has to wait for a job.
        for c, number in won:
            _end(c.run, number, "withdrawn", "the submission was interrupted")
        raise
    started = _sbatch(root, sweep, token, won, chunk, profile, parallel, exclude)
    return Started(started.submitted, started.held or held)


def _intend(
    chunk: Chunk,
    profile: ClusterProfile,
    sweep: str,
    token: str,
    parallel: int,
    exclude: Sequence[str],
    won: list[tuple[Candidate, int]],
) -> None:
    """Create the intents of a chunk; adds those won, with their numbers, to ``won``."""
    for c in chunk.candidates:
        number = (c.facts.attempts[-1].number if c.facts.attempts else 0) + 1
        intent = {
            "token": token,
            "index": len(won),
            "executor": profile.executor,
            "sweep": sweep,
            "step": c.facts.committed,
            "missing": c.facts.missing if c.facts.status else None,
            "profile": profile.name,
            "shape": chunk.shape.model_dump(mode="json"),
            "parallel": parallel,
            "exclude": list(exclude),
            "signal_lead_s": profile.signal_lead_s,
            "train": profile.train.model_dump(mode="json"),
            "code": c.code,
            "again": c.again,
            "allow_drift": c.allow_drift,
            "estimate_gpu_hours": None if c.estimate is None else c.estimate.gpu_hours,
            "allowance_gpu_hours": c.allowance,
            "host": socket.gethostname(),
            "user": user_name(),
            "time": time.time(),
            "versions": {
                "scaling": __version__,
                "submitit": submitit.__version__,
                "python": platform.python_version(),
            },
        }
        if c.run.record(number, "intent", intent):  # otherwise another process was faster
            won.append((c, number))


def _withdraw(won: list[tuple[Candidate, int]], excess: float) -> list[tuple[Candidate, int]]:
    """Take back the last intents that, with those of other logins, exceed the budget."""
    kept = list(won)
    while kept and excess > 0:
        c, number = kept.pop()
        excess -= c.allowance or 0.0
        _end(c.run, number, "withdrawn", "the budget was reserved by another login meanwhile")
    return kept


def _start_here(
    root: Path, sweep: str, token: str, candidate: Candidate, number: int, shape: Shape
) -> Submitted:
    job_id = start_process(root, sweep, token, shape, candidate.code)
    hint = {"job_id": job_id, "time": time.time(), **process_identity(int(job_id))}
    candidate.run.record(number, "submit", hint)
    return Submitted(candidate.run.run_key, number, job_id)


def _sbatch(
    root: Path,
    sweep: str,
    token: str,
    won: list[tuple[Candidate, int]],
    chunk: Chunk,
    profile: ClusterProfile,
    parallel: int,
    exclude: Sequence[str],
) -> Started:
    """Submit a chunk as one array, or at a submit limit the largest arrays that it allows.

    Raises:
        SubmissionError: the scheduler refused.
    """
    done: list[Submitted] = []
    begin, size = 0, len(won)
    while begin < len(won):
        part = range(begin, min(begin + size, len(won)))
        try:
            job_ids = start_array(
                JobArray(
                    root,
                    sweep,
                    token,
                    part,
                    chunk.shape,
                    profile,
                    chunk.code,
                    parallel=max(1, parallel * len(part) // len(won)),
                    exclude=_excluded(profile, exclude),
                )
            )
        except (Refused, OSError, ClueError) as e:
            cause = refused_as(str(e)) if isinstance(e, Refused) else "rejected"
            if cause == "limit" and len(part) > 1:
                size = len(part) // 2
                continue
            if cause is None:
                # The job may come: the attempt keeps its intent, and is repeated once the
                # quarantine is over and the controller knows no such job.
                log.warning("sbatch gave no clear answer; waiting for its job: %s", e)
                done += [Submitted(won[i][0].run.run_key, won[i][1], None) for i in part]
                begin = part.stop
                cause = "unreachable"
            queued = queued_jobs() if cause == "limit" else None
            for c, number in won[begin:]:
                _end(c.run, number, cause, str(e), queued=queued)
            if cause == "limit" or done:
                return Started(done, f"sbatch: {(str(e).splitlines() or ['refused'])[-1]}")
            error = Unreachable if cause == "unreachable" else SubmissionError
            raise error(f"sbatch refused {len(won)} runs: {e}") from None
        for i, job_id in zip(part, job_ids, strict=True):
            c, number = won[i]
            c.run.record(number, "submit", {"job_id": job_id, "time": time.time()})
            done.append(Submitted(c.run.run_key, number, job_id))
        begin = part.stop
        if size < len(won):
            size = max(1, size // 2)  # twice as many were refused: there is room for less
    return Started(done)


def close(run: RunDir, facts: Facts, verdict: Verdict) -> Facts:
    """Record how the newest attempt ended where its job could not.

    Nobody then has to ask Slurm again, nor Slurm to remember, and what it reserved is free.

    Returns:
        The facts with that record.
    """
    if not facts.attempts or facts.attempts[-1].end is not None or verdict.stale:
        return facts
    newest = facts.attempts[-1]
    word = meaning(verdict.job_state) if verdict.job_state is not None else None
    gone = verdict.job_state is None or (word is not None and word.phase is Phase.ENDED)
    if verdict.state in (State.FAILED, State.LOST):
        cause, evidence = str(verdict.cause), verdict.evidence
    elif verdict.state is State.CANCELLED and gone and newest.intent["executor"] != "none":
        cause, evidence = "cancelled", verdict.evidence
    else:
        return facts
    _end(
        run, newest.number, cause, evidence,
        step=facts.committed,
        generation=max(run.generations(), default=0),
        nodes=[verdict.node] if verdict.node else None,
    )  # fmt: skip
    if cause == "launch" and not gone:
        # Slurm holds it until somebody releases it.
        command("scancel", f"--name={newest.intent['token']}", str(verdict.job_id))
    return replace(facts, attempts=tuple(run.attempts()))


def _end(run: RunDir, number: int, cause: str, evidence: str, **more: Any) -> None:
    known = {k: v for k, v in more.items() if v is not None}
    record = {"class": cause, "evidence": evidence[-500:], "time": time.time(), **known}
    run.record(number, "end", {"host": socket.gethostname(), **record})
