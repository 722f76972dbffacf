"""Downstream loss beside pretraining loss: one point per run and task."""

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, spearmanr

SYSTEM = "clue/u-mlp"
"""Downstream system that stands for an encoder, unless told otherwise."""


def downstream_points(
    transfer: pd.DataFrame, runs: pd.DataFrame, metric: str = "loss", system: str = SYSTEM
) -> dict[str, pd.DataFrame]:
    """Per task: ``run_key``, ``pretraining`` loss, ``downstream`` metric (mean over folds)."""
    rows = transfer[(transfer["system"] == system) & transfer[metric].notna()]
    means = rows.groupby(["task", "run_key"])[metric].mean().rename("downstream").reset_index()
    known = runs.loc[runs["loss"].notna(), ["run_key", "loss"]]
    joined = means.merge(known.rename(columns={"loss": "pretraining"}), on="run_key")
    return {
        str(task): points.reset_index(drop=True)
        for task, points in joined.groupby("task", sort=True)
    }


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
