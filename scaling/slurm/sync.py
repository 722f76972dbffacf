"""The only driver: look at records and scheduler, derive states, submit what may be submitted.

``sync`` is idempotent and may run anywhere, any number of times, at the same time: cron, a second
login node, a notebook. Nothing else submits, and no process has to stay alive for a sweep to be
safe. On this host (``executor = "local"``) it starts runs as others end, so there it is watched.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scaling import ClueError
from scaling.rundir import RunDir
from scaling.slurm.profile import ClusterProfile, safe_root
from scaling.slurm.scheduler import look
from scaling.slurm.state import DEFAULT_RULES, Facts, Rules, Snapshot, State, Verdict, derive
from scaling.slurm.submission import (
    Candidate,
    Submitted,
    Unreachable,
    array_size,
    start_attempts,
)

log = logging.getLogger(__name__)
Row = dict[str, Any]
WATCH_S = {"slurm": 60.0, "local": 0.5}
"""Between two looks of a watching sync. [seconds]"""
TAIL_BYTES = 1 << 16


def submit(
    root: Path,
    runs: Sequence[RunDir],
    profile: ClusterProfile,
    *,
    sweep: str,
    dry_run: bool = False,
    retry_failed: bool = False,
) -> list[Row]:
    """Submit what is missing of these runs; doing it twice submits nothing twice.

    Everything that can be checked is checked before the first job. Locally at most
    ``profile.max_parallel`` runs start; ``sync(watch=True)`` starts the rest.

    Args:
        sweep: name of the sweep's folder below ``<root>/sweeps``.
        dry_run: only say what would be submitted (``action`` of each row); touches nothing.
        retry_failed: also give failed, cancelled and lost runs a new attempt.

    Returns:
        Status rows, with ``action``: ``submit`` or None.

    Raises:
        ConfigError: a run does not fit the profile.
        CorpusError: a run's corpus is not prepared below ``root``.
        SubmissionError: the scheduler refused, or does not answer.
    """
    from scaling.data.corpus import Corpus

    configs = [run.spec() for run in runs]
    for config in configs:
        profile.shape_of(config)
    for digest in sorted({c.data.corpus_digest for c in configs}):
        Corpus.find(root, digest)
    if dry_run and profile.executor == "slurm":
        array_size(profile)  # asks the cluster, as a submission would
    return _pass(root, runs, profile, sweep, dry_run, retry_failed)


def sync(
    root: Path,
    runs: Sequence[RunDir],
    profile: ClusterProfile,
    *,
    sweep: str,
    watch: bool = False,
    interval_s: float | None = None,
    report: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Bring runs towards their end: submit what is planned or may be tried again.

    Args:
        watch: go on until every run is over (done, diverged, cancelled, or failed for good).
        interval_s: between two looks; None: once a minute on Slurm. [seconds]
        report: called with the rows after every look.

    Returns:
        Status rows, with ``action``.

    Raises:
        SubmissionError: as ``submit``; while watching, a scheduler that does not answer is waited
            for.
    """
    pause = WATCH_S[profile.executor] if interval_s is None else interval_s
    while True:
        try:
            rows = _pass(root, runs, profile, sweep, dry_run=False, retry_failed=False)
        except Unreachable as e:
            if not watch:
                raise
            log.warning("%s", e)  # a controller that is down for an hour ends no watch
            rows = status(runs, Rules(profile.quarantine_s, profile.settle_s))
        if report is not None:
            report(rows)
        if not watch or all(row["over"] for row in rows):
            return rows
        time.sleep(pause)


def status(runs: Sequence[RunDir], rules: Rules = DEFAULT_RULES) -> list[Row]:
    """What is known of each run, without changing anything.

    Returns:
        One row per run: ``run_key``, ``state``, ``job_state`` (Slurm's word), ``job_id``,
        ``attempts``, ``step``, ``steps``, ``loss`` (newest pool loss), ``train_loss``,
        ``progress_age_s`` (since the run last wrote metrics), ``cause`` and ``evidence`` of a
        failure, ``held``, ``stale`` (why the state is only the last one known, or None), ``over``.
    """
    _, derived = survey(runs, rules)
    return [_row(run, facts, verdict) for run, facts, verdict in derived]


def survey(
    runs: Iterable[RunDir], rules: Rules
) -> tuple[Snapshot, list[tuple[RunDir, Facts, Verdict]]]:
    """One look at records and scheduler. The scheduler is asked between two readings of the
    records of open runs, so that a job it shows as ended has left there whatever it will leave."""
    before = [(run, read_facts(run)) for run in runs]
    begun = time.time()
    open_runs = {
        f.run_key
        for _, f in before
        if f.attempts and not f.status and not f.damage and f.attempts[-1].end is None
    }
    snapshot = look(f.attempts[-1] for _, f in before if f.run_key in open_runs)
    derived = []
    for run, first in before:
        facts = read_facts(run) if first.run_key in open_runs else first
        derived.append((run, facts, derive(facts, snapshot, begun, rules)))
    return snapshot, derived


def read_facts(run: RunDir) -> Facts:
    """What the run's folder says; damage is reported in it, not raised."""
    steps = None
    try:
        steps = run.spec().steps
        result = run.result()
        attempts = tuple(run.attempts())
        for attempt in attempts:
            if not {"token", "index", "executor", "step", "time"} <= attempt.intent.keys():
                raise ClueError(f"{run.path}: attempt {attempt.number} has no valid intent")
        if result is not None and result.get("status") not in ("done", "diverged"):
            raise ClueError(f"{run.path / 'result.json'}: status {result.get('status')!r}")
    except ClueError as e:
        return Facts(run.run_key, damage=str(e), steps=steps)
    committed = [int(p.parent.name[5:]) for p in run.path.glob("ckpt/step-[0-9]*/COMMITTED")]
    status = None if result is None else str(result["status"])
    return Facts(run.run_key, status, max(committed, default=0), attempts, steps=steps)


def _pass(
    root: Path,
    runs: Sequence[RunDir],
    profile: ClusterProfile,
    sweep: str,
    dry_run: bool,
    retry_failed: bool,
) -> list[Row]:
    root = safe_root(root)
    rules = Rules(profile.quarantine_s, profile.settle_s)
    snapshot, derived = survey(runs, rules)
    wanted = [
        Candidate(run, run.spec(), facts, verdict)
        for run, facts, verdict in derived
        if _wanted(verdict, retry_failed)
    ]
    if not snapshot.answered:
        if dry_run:
            raise Unreachable(f"nothing submitted: {snapshot.note}")
        wanted = []  # an unknown state changes nothing: it must not hide a job that runs
    if profile.executor == "local":
        busy = sum(v.state in (State.QUEUED, State.RUNNING) for _, _, v in derived)
        wanted = wanted[: max(0, profile.max_parallel - busy)]
    new: dict[str, Submitted] = {}
    if not dry_run:
        new = {s.run_key: s for s in start_attempts(root, wanted, profile, sweep)}
    chosen = {c.run.run_key for c in wanted}
    rows = []
    for run, facts, verdict in derived:
        if (started := new.get(run.run_key)) is not None:
            verdict = Verdict(State.QUEUED, started.attempt, started.job_id)
        row = _row(run, facts, verdict)
        row["action"] = "submit" if run.run_key in (chosen if dry_run else new) else None
        rows.append(row)
    return rows


def _wanted(verdict: Verdict, retry_failed: bool) -> bool:
    again = verdict.state in (State.FAILED, State.CANCELLED, State.LOST)
    return verdict.start or (retry_failed and again and verdict.cause != "damaged")


def _row(run: RunDir, facts: Facts, verdict: Verdict) -> Row:
    step, loss, train_loss, age = _progress(run)
    return {
        "run_key": run.run_key,
        "state": verdict.state.value,
        "job_state": verdict.job_state,
        "job_id": verdict.job_id,
        "attempts": verdict.attempt,
        "step": step,
        "steps": facts.steps,
        "loss": loss,
        "train_loss": train_loss,
        "progress_age_s": age,
        "cause": verdict.cause,
        "evidence": verdict.evidence or None,
        "held": verdict.held,
        "stale": verdict.stale or None,
        "over": verdict.over,
    }


def _progress(run: RunDir) -> tuple[int, float | None, float | None, float | None]:
    """Newest step, pool loss and training loss, and the age of the newest metrics file.

    Only the ends of the files are read: a run of 100,000 steps is asked for its state often.
    """
    step: int | None = None
    losses: dict[str, float | None] = {"pool": None, "train": None}
    age = None
    for generation in reversed(run.generations()):
        path = run.metrics_path(generation)
        with open(path, "rb") as f:
            if age is None:
                age = time.time() - os.fstat(f.fileno()).st_mtime
            f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL_BYTES))
            lines = f.read().split(b"\n")[:-1]
        for line in reversed(lines):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the first line of the tail may be cut
            if row["kind"] in losses:
                step = int(row["step"]) if step is None else step
                if losses[row["kind"]] is None:
                    losses[row["kind"]] = row["loss"]
        if step is not None and None not in losses.values():
            break
    return step or 0, losses["pool"], losses["train"], age
