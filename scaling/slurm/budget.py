"""What a sweep may spend, and what each attempt may take of it.

    <root>/sweeps/<id>/budget.json      GPU-hours, set by a person

Every attempt reserves what it is estimated to need, with a margin, in its intent, and its job stops
itself when that is spent; another attempt goes on with a new reservation. So spendings and
reservations together stay within the budget, retries and lost work included, however wrong an
estimate is: but for the step and the checkpoint that follow the alarm, and for what a killed job
did after its last row of metrics. A run that two sweeps share counts in full for each.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling import ClueError
from scaling.config import RunConfig
from scaling.files import RecordError, read_json, write_json
from scaling.rundir import RunDir, starting_seconds
from scaling.slurm.cost import (
    EVALUATION_S,
    MARGIN,
    START_S,
    Estimate,
    Rate,
    estimate,
    measured_rates,
)
from scaling.slurm.profile import ClusterProfile
from scaling.slurm.state import Facts
from scaling.slurm.status import read_facts, spent_hours
from scaling.slurm.submission import Candidate


@dataclass(frozen=True)
class Prices:
    """Estimates for the runs of a sweep, from its plan and from what finished runs took."""

    rows: Mapping[str, Mapping[str, float]]
    """``n_total`` and ``flops_exact`` of the plan, by run key."""
    rates: Sequence[Rate]
    wanted: Sequence[str] = ()
    """Keys of evaluations that are about to be declared of all runs."""

    @classmethod
    def of_plan(
        cls, root: Path, rows: Iterable[Mapping[str, Any]], wanted: Sequence[str] = ()
    ) -> "Prices":
        """From plan rows."""
        needed = ("n_total", "flops_exact")
        return cls(
            {str(row["run_key"]): {k: float(row[k]) for k in needed} for row in rows},
            measured_rates(root),
            wanted,
        )

    @classmethod
    def read(cls, root: Path, sweep: str) -> "Prices | None":
        """Of a submitted sweep; None where it left no plan."""
        path = root / "sweeps" / sweep / "plan.json"
        if not path.exists():
            return None
        try:
            return cls.of_plan(root, read_json(path)["runs"])
        except (KeyError, TypeError, ValueError) as e:
            raise RecordError(f"{path}: not a sweep's plan ({e!r})") from None

    def of(self, run: RunDir, config: RunConfig, profile: ClusterProfile) -> Estimate | None:
        """Cost of the rest of a run; None if the plan does not have it.

        A start is taken to last somewhat longer than the run's longest one did, and so is an
        evaluation.
        """
        row = self.rows.get(config.run_key)
        if row is None:
            return None
        longest = max((starting_seconds(s) for s in run.starts() if "time" in s), default=0.0)
        return estimate(
            config,
            int(row["n_total"]),
            row["flops_exact"],
            profile,
            self.rates,
            step=max(run.committed_steps(), default=0),
            start_s=max(START_S, MARGIN * longest),
            pace=run.pace(),
            evaluations=len(run.evaluations(self.wanted)[1]),
            evaluation_s=max(EVALUATION_S, MARGIN * run.evaluation_seconds()),
        )


def set_budget(root: Path, sweep: str, gpu_hours: float, runs: Sequence[RunDir]) -> None:
    """Set what a sweep may spend from now on, with what it has spent. [GPU-hours]

    Raises:
        ClueError: it is no number above 0, or runs execute without an allowance.
    """
    if not 0 < gpu_hours < math.inf:
        raise ClueError(f"budget = {gpu_hours}: give GPU-hours above 0")
    committed_hours(runs, {run.run_key: read_facts(run) for run in runs})
    record = {"schema_version": 1, "gpu_hours": gpu_hours, "time": time.time()}
    write_json(root / "sweeps" / sweep / "budget.json", record)


def unset_budget(root: Path, sweep: str) -> None:
    """Let a sweep take what it takes."""
    (root / "sweeps" / sweep / "budget.json").unlink(missing_ok=True)


def read_budget(root: Path, sweep: str) -> float | None:
    """What a sweep may spend; None if nobody has set it. [GPU-hours]"""
    path = root / "sweeps" / sweep / "budget.json"
    if not path.exists():
        return None
    try:
        return float(read_json(path)["gpu_hours"])
    except (KeyError, TypeError, ValueError) as e:
        raise RecordError(f"{path}: not a budget ({e!r}); set it again") from None


def committed_hours(runs: Sequence[RunDir], facts: Mapping[str, Facts]) -> float:
    """What runs have spent, and what their unended attempts reserve. [GPU-hours]

    Args:
        facts: of each run.

    Raises:
        ClueError: it cannot be told: records of a run are damaged, or one executes without an
            allowance.
    """
    total = 0.0
    for run in runs:
        known = facts[run.run_key]
        if known.damage:
            raise ClueError(f"what run {run.run_key} takes cannot be told: {known.damage}")
        total += spent_hours(run, known)
        if known.over:
            continue
        newest = known.attempts[-1] if known.attempts else None
        if newest is None or newest.end is not None or newest.intent["executor"] == "none":
            continue
        allowance = newest.intent.get("allowance_gpu_hours")
        if allowance is None:
            raise ClueError(
                f"run {run.run_key}: was submitted without a budget, by this sweep or another, so "
                "nothing bounds what it will take; let it end first, or cancel it"
            )
        total += max(0.0, float(allowance) - run.gpu_hours(newest.number))
    return total


def grant(candidates: Sequence[Candidate], left: float) -> list[Candidate]:
    """Candidates with their allowances, as many, in their order, as what is left pays for.

    Raises:
        ClueError: a candidate has no estimate.
    """
    granted = []
    for c in candidates:
        if c.estimate is None:
            raise ClueError(f"run {c.run.run_key}: the sweep's plan does not have it")
        allowance = MARGIN * c.estimate.gpu_hours
        left -= allowance
        if left < 0:
            break
        granted.append(replace(c, allowance=allowance))
    return granted


def excess(runs: Sequence[RunDir], budget: float) -> float:
    """By how much spendings and reservations exceed a budget, by the records as they are now.
    [GPU-hours]"""
    return committed_hours(runs, {run.run_key: read_facts(run) for run in runs}) - budget
