"""Downstream loss beside pretraining loss: one point per run and task."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, spearmanr

from scaling.results import PROTOCOL

HEAD = "/u-mlp"
"""Ending of the downstream systems that stand for an encoder; before it, the encoder's system."""


@dataclass(frozen=True)
class TaskPoints:
    """The runs of one task."""

    points: pd.DataFrame
    """``run_key``, ``pretraining`` loss, ``downstream`` metric, and ``low``, ``high``."""
    system: str
    """Downstream system of the points."""
    left_out: tuple[str, ...]
    """Systems of other encoders in the table, with the number of their runs."""
    failed: str | None
    """Why there are no points."""


def downstream_points(
    transfer: pd.DataFrame, runs: pd.DataFrame, metric: str = "loss", system: str | None = None
) -> dict[str, TaskPoints]:
    """Points of every task that has some; none where its runs were evaluated differently.

    Args:
        metric: a column of the transfer table.
        system: downstream system; None: of the encoder that most runs of the task have.
    """
    known = runs.loc[runs["loss"].notna(), ["run_key", "loss", "pool_digest"]]
    everybody = transfer[transfer[metric].notna() & (transfer["segment"] == "all")]
    rows = everybody.merge(
        known.rename(columns={"loss": "pretraining"}), on="run_key", suffixes=("", "_run")
    )
    tasks = {}
    for task, of_task in rows.groupby("task", sort=True):
        encoders = of_task[of_task["system"].str.endswith(HEAD)]
        counts = encoders.groupby("system")["run_key"].nunique()
        chosen = system or (str(counts.idxmax()) if len(counts) else None)
        own = of_task[of_task["system"] == chosen]
        if chosen is None or own.empty:
            continue
        failed = differences(own)
        if failed is None and own["pool_digest"].nunique() > 1:
            pools = own["pool_digest"].nunique()
            failed = (
                f"losses over {pools} pools do not compare: of other users, or of other services"
            )
        columns = {metric: "downstream", f"{metric}_low": "low", f"{metric}_high": "high"}
        points = own[["run_key", "pretraining", *columns]].rename(columns=columns)
        tasks[str(task)] = TaskPoints(
            points.iloc[: 0 if failed else None].sort_values("run_key", ignore_index=True),
            chosen,
            tuple(f"{name}: {n} runs" for name, n in counts.items() if name != chosen),
            failed,
        )
    return tasks


def differences(rows: pd.DataFrame) -> str | None:
    """In what the protocols of some rows differ; None if they are one."""
    found = {c: sorted(map(str, rows[c].unique())) for c in PROTOCOL}
    differing = [f"{c} {', '.join(v)}" for c, v in found.items() if len(v) > 1]
    return f"runs were evaluated differently: {'; '.join(differing)}" if differing else None


def correlations(points: pd.DataFrame) -> dict[str, float | None]:
    """Pearson's and Spearman's correlation of a task's points; None without three or a spread."""
    x = points["pretraining"].to_numpy(dtype=np.float64)
    y = points["downstream"].to_numpy(dtype=np.float64)
    if len(points) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"pearson": None, "spearman": None}
    return {
        "pearson": float(pearsonr(x, y).statistic),
        "spearman": float(spearmanr(x, y).statistic),
    }


def downstream_report(transfer: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any]:
    """For ``fits.json``, per task: ``system``, ``n`` runs, correlations of downstream and
    pretraining loss, systems ``left_out`` and why the task ``failed``."""
    return {
        task: {
            "system": found.system,
            "n": len(found.points),
            **correlations(found.points),
            "left_out": list(found.left_out),
            "failed": found.failed,
        }
        for task, found in downstream_points(transfer, runs).items()
    }
