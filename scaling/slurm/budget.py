"""What a sweep may spend, and what each attempt may take of it.

    <root>/sweeps/<id>/budget.json      GPU-hours, set by a person

Every attempt reserves what it is estimated to need, with a margin, in its intent, and its job stops
itself when that is spent; another attempt goes on with a new reservation. So spendings and
reservations together never exceed the budget, retries and lost work included, however wrong an
estimate is. A run that two sweeps share counts in full for each.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling import ClueError
from scaling.config import RunConfig
from scaling.files import read_json, write_json
from scaling.rundir import RunDir
from scaling.slurm.cost import MARGIN, Estimate, Rate, estimate, measured_rates
from scaling.slurm.profile import ClusterProfile
from scaling.slurm.state import Facts
from scaling.slurm.status import gpu_hours_of, read_facts
from scaling.slurm.submission import Candidate


@dataclass(frozen=True)
class Prices:
    """Estimates for the runs of a sweep, from its plan and from what finished runs took."""

    rows: Mapping[str, Mapping[str, Any]]
    """Plan rows by run key."""
    rates: Sequence[Rate]

    @classmethod
    def read(cls, root: Path, sweep: str) -> "Prices | None":
        """Of a submitted sweep; None where it left no plan."""
        path = root / "sweeps" / sweep / "plan.json"
        if not path.exists():
            return None
        rows = {row["run_key"]: row for row in read_json(path)["runs"]}
        return cls(rows, measured_rates(root))

    def of(self, config: RunConfig, profile: ClusterProfile, step: int = 0) -> Estimate | None:
        """Cost of the rest of a run; None if the plan does not have it."""
        row = self.rows.get(config.run_key)
        if row is None:
            return None
        return estimate(config, row["n_total"], row["flops_exact"], profile, self.rates, step=step)


def set_budget(root: Path, sweep: str, gpu_hours: float) -> None:
    """Set what a sweep may spend from now on, with what it has spent. [GPU-hours]"""
    if not gpu_hours > 0:
        raise ClueError(f"budget = {gpu_hours}: give GPU-hours above 0")
    record = {"schema_version": 1, "gpu_hours": gpu_hours, "time": time.time()}
    write_json(root / "sweeps" / sweep / "budget.json", record)


def read_budget(root: Path, sweep: str) -> float | None:
    """What a sweep may spend; None if nobody has set it. [GPU-hours]"""
    path = root / "sweeps" / sweep / "budget.json"
    return float(read_json(path)["gpu_hours"]) if path.exists() else None


def committed_hours(
    runs: Sequence[RunDir], facts: Mapping[str, Facts], but: frozenset[str] = frozenset()
) -> float:
    """What runs have spent, and what their unended attempts reserve. [GPU-hours]

    Args:
        facts: of each run.
        but: keys of runs whose newest attempt is over, though it has no record of that yet.

    Raises:
        ClueError: a run executes without an allowance; it was submitted before the budget.
    """
    total = 0.0
    for run in runs:
        known = facts[run.run_key]
        if known.result is not None:
            total += gpu_hours_of(dict(known.result))
            continue
        if known.damage:
            continue  # reported by status; nothing more is spent on it
        total += run.gpu_hours()
        if not known.attempts or run.run_key in but:
            continue
        newest = known.attempts[-1]
        if newest.end is not None or newest.cancel is not None:
            continue
        allowance = newest.intent.get("allowance_gpu_hours")
        if allowance is None:
            raise ClueError(
                f"run {run.run_key}: was submitted before there was a budget, so nothing bounds "
                "what it will take; cancel it, or let it end first"
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
        left -= MARGIN * c.estimate
        if left < 0:
            break
        granted.append(replace(c, allowance=MARGIN * c.estimate))
    return granted


def excess(runs: Sequence[RunDir], budget: float) -> float:
    """By how much spendings and reservations exceed a budget, by the records as they are now.
    [GPU-hours]"""
    return committed_hours(runs, {run.run_key: read_facts(run) for run in runs}) - budget
