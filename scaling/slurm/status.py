"""What is known of runs: facts from their folders, one look at the scheduler, rows for people."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scaling import ClueError
from scaling.files import read_json
from scaling.rundir import TAIL_BYTES, RunDir
from scaling.slurm.logs import explanation
from scaling.slurm.scheduler import look
from scaling.slurm.state import (
    DEFAULT_RULES,
    MEANWHILE,
    UNEXPLAINED,
    Facts,
    Rules,
    Snapshot,
    State,
    Verdict,
    derive,
    is_cancelled,
)

Row = dict[str, Any]
Survey = list[tuple[RunDir, Facts, Verdict]]
STALLED_S = 900.0
"""A running run that has written nothing for so long is shown as stalled. [seconds]"""


def status(runs: Sequence[RunDir], rules: Rules = DEFAULT_RULES) -> list[Row]:
    """What is known of each run, without changing anything.

    Returns:
        One row per run, in their order: see ``status_row``.
    """
    _, derived = survey(runs, rules)
    return [status_row(run, facts, verdict) for run, facts, verdict in derived]


def survey(
    runs: Iterable[RunDir], rules: Rules, wanted: Sequence[str] = ()
) -> tuple[Snapshot, Survey]:
    """One look at records and scheduler. The scheduler is asked between two readings of the
    records of open runs, so that a job it shows as ended has left there whatever it will leave.

    Args:
        wanted: keys of evaluations that are about to be declared of all of them.
    """
    before = [(run, read_facts(run, wanted)) for run in runs]
    begun = time.time()
    open_runs = {
        f.run_key
        for _, f in before
        if f.attempts and not f.over and not f.damage and f.attempts[-1].end is None
    }
    snapshot = look(f.attempts[-1] for _, f in before if f.run_key in open_runs)
    derived = []
    for run, first in before:
        facts = read_facts(run, wanted) if first.run_key in open_runs else first
        newer = facts.attempts[len(first.attempts) :]
        if newer and newer[-1].end is None and not is_cancelled(facts.attempts):
            # Somebody has made it since; nobody was asked about it.
            state = State.RUNNING if newer[-1].claim else State.QUEUED
            verdict = Verdict(state, newer[-1].number, stale=MEANWHILE)
        else:
            verdict = derive(facts, snapshot, begun, rules)
        if verdict.cause in UNEXPLAINED and facts.attempts[-1].end is None:
            facts = replace(facts, explained=explanation(run, facts.attempts[-1]))
            verdict = derive(facts, snapshot, begun, rules)
        derived.append((run, facts, verdict))
    return snapshot, derived


def read_facts(run: RunDir, wanted: Sequence[str] = ()) -> Facts:
    """What the run's folder says; damage is reported in it, not raised.

    Of a run that is over only the result is read: of thousands of runs most are.
    """
    steps: int | None = None
    known: dict[str, Any] = {}
    try:
        if not run.path.exists():
            return Facts(run.run_key)
        if run.path.is_symlink():
            raise ClueError(f"{run.path}: is a symbolic link; a run lies in a real folder")
        result = run.result()
        if result is not None:
            status, step, generation = (result.get(k) for k in ("status", "step", "generation"))
            if (
                status not in ("done", "diverged")
                or not isinstance(step, int)
                or not isinstance(generation, int)
            ):
                raise ClueError(
                    f"{run.path / 'result.json'}: status {status!r} at step {step!r} of generation "
                    f"{generation!r}"
                )
            if result.get("run_key") != run.run_key:
                raise ClueError(f"{run.path / 'result.json'}: is of run {result.get('run_key')!r}")
            count, missing = run.evaluations(wanted) if status == "done" else (0, [])
            known = {"result": result, "wanted": count, "missing": len(missing)}
            if not missing:
                return Facts(
                    run.run_key,
                    status,
                    step,
                    steps=step if status == "done" else run.spec().steps,
                    newest=max(run.attempt_numbers(), default=0),
                    **known,
                )
        steps = run.spec().steps
        attempts = tuple(run.attempts())
        for attempt in attempts:
            if not {"token", "index", "executor", "step", "time"} <= attempt.intent.keys():
                raise ClueError(f"{run.path}: attempt {attempt.number} has no valid intent")
    except (ClueError, OSError) as e:
        return Facts(run.run_key, damage=str(e), steps=steps)
    committed = max(run.committed_steps(), default=0)
    return Facts(
        run.run_key, "done" if known else None, steps if known else committed, attempts,
        steps=steps, **known,
    )  # fmt: skip


def status_row(run: RunDir, facts: Facts, verdict: Verdict) -> Row:
    """A run's row for people and ``--json``.

    Returns:
        ``run_key``, ``state``, ``job_state`` (Slurm's word), ``job_id``, ``attempts``, ``step``,
        ``steps``, ``loss`` (newest pool loss), ``train_loss``, ``eta_s`` (until the last step, at
        the pace of the newest steps), ``gpu_hours`` (spent, work that was lost too; on CPUs hours
        of ranks), ``estimate_gpu_hours`` (before its first attempt), ``progress_age_s`` (since it
        last wrote metrics), ``stalled``, ``cause`` and ``evidence`` of a failure, ``held``,
        ``evaluated`` and ``wanted`` (downstream evaluations; null where none is declared),
        ``stale`` (why the state is only the last one known, or None), ``over``.
    """
    try:
        progress = _result_progress(run, facts) if facts.result else _progress(run)
    except (ClueError, OSError, KeyError, TypeError):
        progress = Progress(gpu_hours=None)  # metrics that are torn, foreign, or gone for a moment
    attempts = facts.attempts
    first = attempts[0].intent if attempts else _record(run, 1, "intent") if facts.newest else {}
    job_id = verdict.job_id
    if job_id is None and facts.newest:
        job_id = _record(run, facts.newest, "claim").get("job_id")
    running = verdict.state is State.RUNNING
    left = (facts.steps or 0) - progress.step
    return {
        "run_key": run.run_key,
        "state": verdict.state.value,
        "job_state": verdict.job_state,
        "job_id": job_id,
        "attempts": verdict.attempt,
        "step": progress.step,
        "steps": facts.steps,
        "loss": progress.loss,
        "train_loss": progress.train_loss,
        "eta_s": left / progress.pace if running and progress.pace else None,
        "gpu_hours": progress.gpu_hours,
        "estimate_gpu_hours": first.get("estimate_gpu_hours"),
        "progress_age_s": progress.age_s,
        "stalled": running and progress.age_s is not None and progress.age_s > STALLED_S,
        "cause": verdict.cause,
        "evidence": verdict.evidence or None,
        "evaluated": facts.wanted - facts.missing if facts.wanted else None,
        "wanted": facts.wanted or None,
        "held": verdict.held,
        "stale": verdict.stale or None,
        "over": verdict.over,
    }


def _record(run: RunDir, number: int, name: str) -> dict[str, Any]:
    """A record of an attempt; empty if it has none, or one that cannot be read."""
    try:
        return dict(read_json(run.attempt_path(number, name)))
    except ClueError:
        return {}


@dataclass(frozen=True)
class Progress:
    """How far a run is, by its metrics."""

    step: int = 0
    loss: float | None = None
    train_loss: float | None = None
    age_s: float | None = None
    pace: float | None = None
    """Of the newest steps. [steps/s]"""
    gpu_hours: float | None = 0.0


def gpu_hours_of(result: dict[str, Any]) -> float:
    """What a finished run took. [GPU-hours]"""
    if (known := result.get("gpu_hours")) is not None:
        return float(known)
    # of a run that ended before runs counted what their lost work took, too
    return float(result.get("seconds") or 0) * int(result.get("world_size") or 1) / 3600


def spent_hours(run: RunDir, facts: Facts) -> float:
    """What a run has taken so far, evaluations too. [GPU-hours]

    Raises:
        RecordError: metrics are torn.
    """
    if facts.result is None:
        return run.gpu_hours()
    result = dict(facts.result)
    evaluating = run.gpu_hours(after=int(result["generation"])) if facts.wanted else 0.0
    return gpu_hours_of(result) + evaluating


def _result_progress(run: RunDir, facts: Facts) -> Progress:
    result = dict(facts.result or {})
    written = [run.path / "result.json"]
    if facts.missing:
        written += [run.metrics_path(g) for g in run.generations()[-1:]]
    age = time.time() - max(path.stat().st_mtime for path in written)
    loss, train_loss = result.get("loss"), result.get("train_loss")
    hours = spent_hours(run, facts)
    return Progress(facts.committed, loss, train_loss, age, None, hours)


def _progress(run: RunDir) -> Progress:
    """From the end of the metrics files: a run of 100,000 steps is asked for its state often."""
    step: int | None = None
    losses: dict[str, float | None] = {"pool": None, "train": None}
    age = pace = None
    for generation in reversed(run.generations()):
        with open(run.metrics_path(generation), "rb") as f:
            if age is None:
                age = time.time() - os.fstat(f.fileno()).st_mtime
            f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL_BYTES))
            rows = _whole_rows(f.read())
        pace = pace or _pace([r for r in rows if r["kind"] == "train"])
        for row in reversed(rows):
            if row["kind"] in losses:
                step = int(row["step"]) if step is None else step
                if losses[row["kind"]] is None:
                    losses[row["kind"]] = row["loss"]
        if step is not None and None not in losses.values():
            break
    return Progress(step or 0, losses["pool"], losses["train"], age, pace, run.gpu_hours())


def _whole_rows(data: bytes) -> list[dict[str, Any]]:
    """Rows in the tail of a metrics file, whose first line may be cut and last line torn."""
    rows = []
    for line in data.split(b"\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _pace(rows: Sequence[dict[str, Any]]) -> float | None:
    if len(rows) < 2 or "seconds" not in rows[0]:
        return None
    seconds = rows[-1]["seconds"] - rows[0]["seconds"]
    return (rows[-1]["step"] - rows[0]["step"]) / seconds if seconds > 0 else None
