"""What encoders gain over task-specific systems, beside how alike pretraining and task are.

Shin et al. 2023 say of Figure 5 in words that both "show a trend, but not in all cases"; here every
point of it has an interval, and the trend its number of tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, spearmanr

from scaling.analysis.studies.downstream import HEAD, differences
from scaling.results import MEASURES

SPECIFIC = ("bst", "bst-15m", "lightgcn", "lightgcn-id", "deepfm")
"""Systems that are trained on a task, without the part of a name that says which texts they use."""
TAU = "tau_b_union"
"""Variant of tau that gains are set beside."""
FEWEST = 4
"""Tasks that a correlation needs: of three, one order in six is perfect by chance."""


@dataclass(frozen=True)
class TaskGains:
    """The runs of one task against the best task-specific system."""

    points: pd.DataFrame
    """``run_key``, ``tau_b``, relative ``gain`` with its ends ``low`` and ``high``."""
    baseline: str
    """That with the lowest validation loss: binary cross-entropy of the same pairs for all."""
    failed: str | None
    """Why there are no points."""


def encoder(gains: pd.DataFrame) -> str | None:
    """System of the encoder that most runs of a gains table have, with the first head."""
    heads = gains[gains["system"].str.endswith(HEAD)]
    counts = heads.groupby("system")["run_key"].nunique()
    return str(counts.idxmax()) if len(counts) else None


def gain_points(gains: pd.DataFrame, metric: str, system: str) -> dict[str, TaskGains]:
    """Points of every task on which a system was compared with a task-specific one.

    Args:
        gains: the table.
        metric: of ``results.MEASURES``; of a loss a gain below zero is better.
        system: the runs' encoder and head.
    """
    specific = gains["baseline"].str.split("/").str[0].isin(SPECIFIC)
    rows = gains[specific & gains["baseline_validation_loss"].notna()]
    rows = rows[rows["system"] == system]
    gain = f"{metric}_relative"
    columns = {TAU: "tau_b", gain: "gain", f"{gain}_low": "low", f"{gain}_high": "high"}
    tasks = {}
    for task, of_task in rows.groupby("task", sort=True):
        best = of_task.sort_values("baseline_validation_loss", kind="stable")["baseline"].iloc[0]
        own = of_task[(of_task["baseline"] == best) & of_task[gain].notna()]
        failed = differences(of_task)
        if not failed and own[TAU].isna().any():
            failed = "no tau: a corpus was not at hand"
        points = own[["run_key", *columns]].rename(columns=columns)
        tasks[str(task)] = TaskGains(
            points.iloc[: 0 if failed else None].sort_values("run_key", ignore_index=True),
            str(best),
            failed,
        )
    return tasks


def trend(tasks: Mapping[str, TaskGains]) -> dict[str, Any]:
    """Rank correlations of tau and relative gain over tasks, each a mean over its runs.

    Returns:
        ``n`` tasks, ``spearman``, ``kendall``, and ``failed``: why these are None.
    """
    columns = ["tau_b", "gain"]
    means = [t.points[columns].mean().to_list() for t in tasks.values() if len(t.points)]
    n, failed = len(means), None
    tau, gain = np.array(means, np.float64).reshape(n, 2).T
    if n < FEWEST:
        failed = f"{n} tasks; a correlation needs {FEWEST}"
    elif np.ptp(tau) == 0 or np.ptp(gain) == 0:
        failed = "all tasks have the same tau or gain"
    return {
        "n": n,
        "spearman": None if failed else float(spearmanr(tau, gain).statistic),
        "kendall": None if failed else float(kendalltau(tau, gain).statistic),
        "failed": failed,
    }


def gains_report(gains: pd.DataFrame) -> dict[str, Any]:
    """For ``fits.json``, per system of the runs: ``tasks`` and, per metric, ``trend``.

    ``tasks`` has per task ``baseline``, ``runs``, ``tau_b``, ``relative`` (mean over runs of the
    relative gain, by metric) and ``failed``.
    """
    found = {}
    for system in sorted(gains["system"].unique()):
        by_metric = {m: gain_points(gains, m, system) for m, *_ in MEASURES}
        found[system] = {
            "tasks": {
                task: {
                    "baseline": one.baseline,
                    "runs": len(one.points),
                    "tau_b": _mean(one.points["tau_b"]),
                    "relative": {m: _mean(t[task].points["gain"]) for m, t in by_metric.items()},
                    "failed": one.failed,
                }
                for task, one in by_metric["mrr"].items()
            },
            "trend": {metric: trend(tasks) for metric, tasks in by_metric.items()},
        }
    return found


def _mean(values: "pd.Series[float]") -> float | None:
    return float(values.mean()) if len(values) else None
