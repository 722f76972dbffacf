"""One row per run and task: pretraining loss, downstream metric, factors; and each task's noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.studies.downstream import downstream_points
from scaling.results import COUNTED, Tables
from scaling.sweeps import PLAN_COLUMNS

FACTORS = ("n_total", "batch_size", "items_per_user_mean", "users_seen", "steps")
"""What can buy pretraining loss."""
COMPUTE = "pf_days"
LOWER_IS_BETTER = ("loss", "loss_softmax")
"""Metrics of the transfer table that fall as transfer gets better; all others rise."""
IDENTITY = ("run_key", "sweep", "seed", *COUNTED)
"""Columns of a plan that do not say which configuration a run is: names, seed, measured counts."""


@dataclass(frozen=True, eq=False)
class TransferPoints:
    """Points of all tasks under one metric.

    Attributes:
        metric: column of the transfer table.
        table: ``task``, ``run_key``, ``cell`` (runs that differ in their seed alone share it),
            ``pretraining``, ``downstream``, ``low``, ``high``, the factors, ``pf_days``.
        systems: downstream system of each task.
        failed: tasks without points, with the reason.
        left_out: per task, encoders of other systems with the number of their runs.
    """

    metric: str
    table: pd.DataFrame
    systems: Mapping[str, str]
    failed: Mapping[str, str]
    left_out: Mapping[str, tuple[str, ...]]


def transfer_points(
    tables: Tables, metric: str = "loss", system: str | None = None
) -> TransferPoints:
    """Join each task's points with the factors of their runs.

    Args:
        metric: a column of the transfer table.
        system: downstream system; None: of the encoder that most runs of the task have.
    """
    found = downstream_points(tables.transfer, tables.runs, metric, system)
    parts = [one.points.assign(task=task) for task, one in found.items() if len(one.points)]
    columns = ["task", "run_key", "pretraining", "downstream", "low", "high"]
    table = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    runs = tables.runs.drop_duplicates("run_key")
    plan = [c for c in PLAN_COLUMNS if c in runs and c not in IDENTITY]
    cells = runs.groupby(plan, dropna=False, sort=False).ngroup().map("cell {}".format)
    extra = runs[["run_key", *FACTORS, COMPUTE]].assign(cell=cells)
    table = table.merge(extra, on="run_key", how="left")
    numbers = ["pretraining", "downstream", "low", "high", *FACTORS, COMPUTE]
    return TransferPoints(
        metric,
        table.astype(dict.fromkeys(numbers, np.float64)),
        {task: one.system for task, one in found.items()},
        {task: one.failed for task, one in found.items() if one.failed is not None},
        {task: one.left_out for task, one in found.items()},
    )


def mean_of_tasks(points: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Each run's mean metric over the tasks that every run was evaluated on, and their names.

    One task's noise is averaged down (Gadre et al. 2024, arXiv 2403.08540, section 2); the result
    has the columns of one task without ``low`` and ``high``, and no rows for fewer than two tasks.
    """
    runs = points["run_key"].nunique()
    counts = points.groupby("task")["run_key"].nunique()
    tasks = tuple(map(str, counts.index[counts == runs]))
    shared = points[points["task"].isin(tasks if len(tasks) > 1 else ())]
    first = shared.drop_duplicates("run_key").set_index("run_key")
    means = shared.groupby("run_key")["downstream"].mean()
    table = first.assign(downstream=means, task="mean of tasks", low=np.nan, high=np.nan)
    return table.reset_index(), tasks


def noise_floor(points: pd.DataFrame) -> dict[str, Any]:
    """What no law of one task can predict, by two routes. [metric]

    Returns:
        ``between_seeds``: standard deviation between runs of one configuration, None where none was
        run twice, with ``spare`` runs that it rests on; ``evaluation``: mean standard error of an
        evaluation, from its 95 % interval over users, None without intervals.
    """
    by_cell = points.groupby("cell")["downstream"]
    spare = len(points) - by_cell.ngroups
    within = points["downstream"] - by_cell.transform("mean")
    width = (points["high"] - points["low"]) / (2 * 1.959964)
    return {
        "between_seeds": float(np.sqrt((within**2).sum() / spare)) if spare else None,
        "spare": spare,
        "evaluation": float(width.mean()) if width.notna().any() else None,
    }
