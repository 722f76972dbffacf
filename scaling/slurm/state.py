"""From facts on disk and one look at the scheduler to a run's state: pure, no I/O, no clock.

Facts beat Slurm, Slurm beats nothing, and an unknown state changes nothing: where the scheduler
does not answer or says a word we do not know, the verdict keeps what the records say, is marked
``stale``, and nothing is submitted.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Any

from scaling.rundir import Attempt


class State(StrEnum):
    """State of a run (a job's state is Slurm's word)."""

    PLANNED = "PLANNED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    DIVERGED = "DIVERGED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    LOST = "LOST"


class Phase(StrEnum):
    """What a Slurm word means for us."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class Word:
    """Meaning of one of Slurm's job states."""

    phase: Phase
    cause: str = ""
    """Why the attempt ended, where the job itself left no record of it."""
    held: bool = False


WORDS: Mapping[str, Word] = {
    "PENDING": Word(Phase.WAITING),
    "REQUEUED": Word(Phase.WAITING),
    "REQUEUE_FED": Word(Phase.WAITING),
    "REQUEUE_HOLD": Word(Phase.WAITING, held=True),
    "SPECIAL_EXIT": Word(Phase.WAITING, held=True),
    "RESV_DEL_HOLD": Word(Phase.WAITING, held=True),
    "CONFIGURING": Word(Phase.RUNNING),
    "RUNNING": Word(Phase.RUNNING),
    "COMPLETING": Word(Phase.RUNNING),
    "RESIZING": Word(Phase.RUNNING),
    "SIGNALING": Word(Phase.RUNNING),
    "STAGE_OUT": Word(Phase.RUNNING),
    "STOPPED": Word(Phase.RUNNING),
    "SUSPENDED": Word(Phase.RUNNING),
    "COMPLETED": Word(Phase.ENDED, "no_result"),
    "FAILED": Word(Phase.ENDED, "crashed"),
    "TIMEOUT": Word(Phase.ENDED, "timeout"),
    "DEADLINE": Word(Phase.ENDED, "timeout"),
    "PREEMPTED": Word(Phase.ENDED, "preempted"),
    "NODE_FAIL": Word(Phase.ENDED, "node_fail"),
    "BOOT_FAIL": Word(Phase.ENDED, "node_fail"),
    "LAUNCH_FAILED": Word(Phase.ENDED, "node_fail"),
    "RECONFIG_FAIL": Word(Phase.ENDED, "node_fail"),
    "REVOKED": Word(Phase.ENDED, "lost"),
    "OUT_OF_MEMORY": Word(Phase.ENDED, "host_oom"),
    "CANCELLED": Word(Phase.ENDED, "cancelled"),
}
"""Slurm's job states (job_state_string and the flags of slurm.h, 20.11 to 24.05)."""


def meaning(text: str) -> Word | None:
    """What a job state as Slurm prints it (``CANCELLED by 1000``) means; None if unknown."""
    return WORDS.get(text.partition(" ")[0].rstrip("+"))


FRUITLESS_LIMIT: Mapping[str, int] = {
    "stopped": 3,
    "preempted": 3,
    "timeout": 3,
    "node_fail": 3,
    "launch": 3,
    "killed": 3,
    "comm": 3,
    "budget": 3,
    "superseded": 3,
    "crashed": 2,
    "host_oom": 2,
    "lost": 2,
    "no_result": 2,
}
"""Per cause: attempts in a row without a newly committed step after which no more are made.
A cause that is not listed (``FINAL``) is never retried by itself. With progress there is no limit:
a run of many wall-time slices goes on to its end."""

FRUITLESS = "attempts without a new committed step"
NEVER_ACCEPTED = ("limit", "rejected", "unreachable", "withdrawn")
"""Causes with which a submission never reached the queue: the run is as if nobody had tried."""

FINAL = ("error", "gpu_oom", "disk_full", "drift", "no_progress", "damaged", "cancelled")
"""Causes that are never retried by themselves."""

UNEXPLAINED = ("crashed", "launch", "no_result")
"""Causes of which the job's log may know better (``scaling.slurm.logs.explain``)."""

NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""A node's name, which reaches ``sbatch --exclude``: others are not believed."""
BAD_NODE = ("node_fail", "launch")
"""Causes that speak against the nodes of an attempt."""
BAD_NODE_AFTER = 2
"""Failures of this kind after which a node is not used any more. One of an attempt on several nodes
counts in parts."""
BLAMED_S = 86_400.0
"""So long a failure speaks against a node. [seconds]"""

ARRIVING = "ended; its records may still arrive"
UNSEEN = "submitted; not seen yet"
MEANWHILE = "submitted meanwhile"
PASSING = (ARRIVING, UNSEEN, MEANWHILE)
"""Why a state is not known yet, though the scheduler answers."""

LAUNCH_HELD = "launch_failed_requeued_held"
"""Slurm's reason for holding a job that a node could not start."""

LOCAL_QUARANTINE_S = 60.0
"""As ``Rules.quarantine_s`` for processes on this host, which start at once. [seconds]"""


@dataclass(frozen=True)
class Job:
    """What the scheduler says of one job (one element of an array)."""

    job_id: str
    word: str
    """Slurm's state, as it says it."""
    reason: str = ""
    ended: float | None = None
    """When it ended. [unix seconds]"""
    node: str = ""
    """Where it is or was, for a job of one node; empty if unknown."""


@dataclass(frozen=True)
class Snapshot:
    """One look at the scheduler, for attempts by (token, index)."""

    jobs: Mapping[tuple[str, int], Job] = field(default_factory=dict)
    answered: bool = True
    """Slurm's controller answered, and so did its accounting where it was needed."""
    note: str = ""
    """Why it did not."""


@dataclass(frozen=True)
class Facts:
    """What a run's folder says."""

    run_key: str
    status: str | None = None
    """``done`` or ``diverged`` once ``result.json`` says so."""
    committed: int = 0
    """Step of the newest committed checkpoint."""
    attempts: tuple[Attempt, ...] = ()
    damage: str = ""
    """What is wrong with the records, where they cannot be read."""
    steps: int | None = None
    """Steps of the run; None if its specification cannot be read."""
    newest: int = 0
    """Number of the newest attempt of a run that is over, whose attempts are not read."""
    result: Mapping[str, Any] | None = None
    """Content of ``result.json``."""
    wanted: int = 0
    """Downstream evaluations declared."""
    missing: int = 0
    """Those of them that a trained run still lacks."""
    explained: tuple[str, str] | None = None
    """Cause and evidence that the log of the newest attempt's job has."""

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.status is not None and not self.missing


@dataclass(frozen=True)
class Rules:
    """Waiting times of a profile. [seconds]"""

    quarantine_s: float = 600.0
    settle_s: float = 30.0


DEFAULT_RULES = Rules()


@dataclass(frozen=True)
class Verdict:
    """A run's state, why, and whether a new attempt may be made."""

    state: State
    attempt: int = 0
    """Number of the newest attempt; 0: none yet."""
    job_id: str | None = None
    job_state: str | None = None
    """Slurm's word."""
    node: str = ""
    """Where the job is or was, if on one node that the scheduler names."""
    cause: str | None = None
    evidence: str = ""
    held: bool = False
    stale: str = ""
    """Why the state is only the last one known; empty if it is known."""
    start: bool = False
    """A new attempt may be made now."""

    @property
    def over(self) -> bool:
        """Nothing more will happen by itself."""
        return not self.start and self.state not in (State.PLANNED, State.QUEUED, State.RUNNING)


def fruitless(facts: Facts) -> int:
    """Newest attempts in a row after whose start no step was committed and nothing evaluated.

    Those that never reached the queue do not count, nor those of which nobody ever saw a job.
    """
    count = 0
    for attempt in reversed(facts.attempts):
        cause = "lost" if attempt.end is None else attempt.end["class"]
        seen = attempt.submit is not None or attempt.claim is not None
        if cause in NEVER_ACCEPTED or (cause == "lost" and not seen):
            continue
        if cause == "done" or int(attempt.intent["step"]) < facts.committed:
            break
        missing = attempt.intent.get("missing")
        if facts.status and (missing is None or int(missing) > facts.missing):
            break
        count += 1
    return count


def is_cancelled(attempts: Sequence[Attempt]) -> bool:
    """Whether a person ended the run, and nobody asked for it again since. Pure.

    An attempt made while somebody cancelled the one before it is cancelled with it.
    """
    cancelled = False
    for attempt in attempts:
        inherited = cancelled and not attempt.intent.get("again")
        cancelled = attempt.cancel is not None or inherited
    return cancelled


def bad_nodes(attempts: Iterable[Attempt], now: float) -> list[str]:
    """Nodes on which attempts of a sweep failed as only a bad node fails, sorted. Pure.

    A node's failures are forgotten after a day, and when a job has begun on it since. Where it
    would be more than half of all nodes met, it is not the nodes.

    Args:
        now: times only decide how long a node is blamed. [unix seconds]
    """
    attempts = list(attempts)
    begun: dict[str, float] = {}
    for attempt in attempts:
        for node in _nodes(attempt.claim or {}):
            begun[node] = max(begun.get(node, 0.0), float((attempt.claim or {}).get("time", 0.0)))
    blame: defaultdict[str, Fraction] = defaultdict(Fraction)
    for attempt in attempts:
        if attempt.end is None or attempt.end["class"] not in BAD_NODE:
            continue
        nodes = _nodes(attempt.end) or _nodes(attempt.claim or {})
        failed = float(attempt.end.get("time", now))
        for node in nodes:
            if now - failed < BLAMED_S and begun.get(node, 0.0) <= failed:
                blame[node] += Fraction(1, len(nodes))
    bad = sorted(node for node, count in blame.items() if count >= BAD_NODE_AFTER)
    return bad if len(bad) <= max(1, len({*begun, *blame}) // 2) else []


def _nodes(record: Mapping[str, Any]) -> list[str]:
    return [node for node in map(str, record.get("nodes") or ()) if NODE.fullmatch(node)]


def derive(facts: Facts, snapshot: Snapshot, now: float, rules: Rules = DEFAULT_RULES) -> Verdict:
    """A run's state.

    Args:
        facts: read after the snapshot was taken, so that a job it shows as ended has left there
            whatever it was going to leave.
        now: when the snapshot was begun. [unix seconds]
    """
    number = facts.attempts[-1].number if facts.attempts else 0
    if facts.damage:
        return Verdict(State.FAILED, number, cause="damaged", evidence=facts.damage)
    if not facts.attempts:
        if facts.status and facts.over:
            return Verdict(State(facts.status.upper()), facts.newest)
        return Verdict(State.PLANNED, start=True)
    newest = facts.attempts[-1]
    job = snapshot.jobs.get((newest.intent["token"], int(newest.intent["index"])))
    known: dict[str, Any] = {
        "attempt": number,
        "job_id": _job_id(newest, job),
        "job_state": job.word if job is not None else None,
        "node": job.node if job is not None else "",
    }
    if facts.status and facts.over:
        return Verdict(State(facts.status.upper()), **known)
    if is_cancelled(facts.attempts):
        by = next((a.cancel.get("by", "") for a in reversed(facts.attempts) if a.cancel), "")
        return Verdict(State.CANCELLED, evidence=str(by), **known)
    if newest.end is not None:
        return _ended(facts, str(newest.end["class"]), str(newest.end.get("evidence", "")), known)
    return _of_job(facts, newest, job, snapshot, now, rules, known)


def _of_job(
    facts: Facts,
    newest: Attempt,
    job: Job | None,
    snapshot: Snapshot,
    now: float,
    rules: Rules,
    known: dict[str, Any],
) -> Verdict:
    local = newest.intent["executor"] == "local"
    last = State.RUNNING if newest.claim else State.QUEUED
    if not local and not snapshot.answered:
        return Verdict(last, stale=snapshot.note or "the scheduler does not answer", **known)
    if job is not None:
        word = meaning(job.word)
        if word is None:
            return Verdict(last, stale=f"unknown job state {job.word!r}", **known)
        if word.phase is Phase.WAITING:
            if LAUNCH_HELD in job.reason.lower().replace(" ", "_"):
                # Slurm gives such a job up until somebody releases it: another attempt does better.
                return _ended(facts, "launch", f"Slurm holds the job: {job.reason}", known)
            held = word.held or "held" in job.reason.lower()
            return Verdict(State.QUEUED, evidence=job.reason, held=held, **known)
        if word.phase is Phase.RUNNING:
            return Verdict(State.RUNNING, **known)
        if job.ended is not None and now - job.ended < rules.settle_s:
            return Verdict(last, stale=ARRIVING, **known)
        if word.cause == "cancelled":
            return _ended(facts, "cancelled", job.word, known)
        cause = "launch" if word.cause == "crashed" and not newest.claim else word.cause
        evidence = f"Slurm says {job.word}; the job left no record"
        if cause in UNEXPLAINED and facts.explained:
            cause, evidence = facts.explained
        return _ended(facts, cause, evidence, known)
    # Nobody knows a job of this attempt. That may be news not yet arrived, so it is believed only
    # after a while, counted from what a login node wrote; the job's own protocol keeps a late one
    # from writing (docs/decisions/0003).
    seen = newest.submit is not None or newest.claim is not None
    since = float((newest.submit or newest.intent)["time"])
    if local:
        grace = 0.0 if seen else LOCAL_QUARANTINE_S
    else:
        grace = rules.settle_s if seen else rules.quarantine_s
    if now - since <= grace:
        return Verdict(last, stale=UNSEEN, **known)
    if local and seen:
        return _ended(facts, "killed", "its process is gone and left no end record", known)
    return _ended(facts, "lost", "no job of this attempt is known to the scheduler", known)


def _ended(facts: Facts, cause: str, evidence: str, known: dict[str, Any]) -> Verdict:
    if cause in NEVER_ACCEPTED:
        return Verdict(State.PLANNED, cause=cause, evidence=evidence, start=True, **known)
    if cause == "cancelled":
        return Verdict(State.CANCELLED, cause=cause, evidence=evidence, **known)
    if cause == "done":  # and evaluations were declared since
        return Verdict(State.PLANNED, start=True, **known)
    limit = FRUITLESS_LIMIT.get(cause, 0)
    count = fruitless(facts)
    start = count < limit
    if limit and not start and FRUITLESS not in evidence:
        evidence += f" ({count} {FRUITLESS})"
    state = State.LOST if cause == "lost" else State.FAILED
    if cause == "budget" and start:
        state = State.PLANNED  # its share is spent; it goes on with another
    return Verdict(state, cause=cause, evidence=evidence, start=start, **known)


def _job_id(attempt: Attempt, job: Job | None) -> str | None:
    if job is not None:
        return job.job_id
    for record in (attempt.claim, attempt.submit):
        if record is not None:
            return str(record["job_id"])
    return None
