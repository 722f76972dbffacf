"""Which runs a study fits, and the account of all others."""

from typing import Any

import numpy as np
import pandas as pd

from scaling.results import Tables

POOL_LOSS = "loss_pool_"
"""Beginning of the columns with the loss over smaller pools; the pool size follows."""
TRAIN_INFORMATION = "train_information"
"""ln negatives - train_loss: what a training batch tells of the users [nats]. Both it and chance -
loss bound the mutual information of two views from below (van den Oord et al. 2018, section 2.3),
so that they may be compared over batch sizes, which the losses themselves may not."""
CELL = (
    "model", "n_total", "batch_size", "negatives", "items_per_user", "n_users", "steps", "lr",
    "eps", "clip_norm",
)  # fmt: skip
"""Settings that runs of one cell share; only the seed differs."""


def runs_to_fit(tables: Tables) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Runs to fit with the columns of a study, and how many were left out by which rule.

    Added: ``loss_pool_<size>``, ``pf_days_non_embedding``, ``train_information``.
    """
    runs = tables.runs.merge(_smaller_pools(tables), on="run_key", how="left")
    share = runs["n_non_embedding"].astype(float) / runs["n_total"].astype(float)
    runs["pf_days_non_embedding"] = runs["pf_days"] * share
    runs[TRAIN_INFORMATION] = np.log(runs["negatives"].astype(float)) - runs["train_loss"]
    pools = runs.loc[runs["loss"].notna(), "pool_digest"].value_counts()
    pool = pools.index[0] if len(pools) else None
    rules = {
        "not over": runs["status"].isna(),
        "diverged": runs["status"] == "diverged",
        "no loss": runs["loss"].isna(),
        "another pool than most runs": runs["pool_digest"] != pool,
    }
    keep = pd.Series(True, index=runs.index)
    dropped = []
    for rule, true in rules.items():
        now = keep & true.fillna(False)
        if now.any():
            keys = [run_key(k) for k in runs.loc[now, "run_key"]]
            dropped.append({"rule": rule, "count": int(now.sum()), "run_keys": keys})
        keep &= ~now
    account = {
        "table": len(runs), "used": int(keep.sum()), "dropped": dropped, "pool_digest": pool,
        "exclusions_by_hand": 0,
    }  # fmt: skip
    return runs[keep].reset_index(drop=True), account


def run_key(value: Any) -> str | None:
    """A run's key as JSON has it."""
    return None if pd.isna(value) else str(value)


def smaller_pools(runs: pd.DataFrame) -> list[int]:
    """Sizes of the smaller pools that every run was evaluated on, ascending."""
    names = [str(c) for c in runs.columns if str(c).startswith(POOL_LOSS)]
    return sorted(int(c.removeprefix(POOL_LOSS)) for c in names if runs[c].notna().all())


def _smaller_pools(tables: Tables) -> pd.DataFrame:
    """``run_key`` and ``loss_pool_<size>``: final losses over each smaller pool size."""
    curves = tables.curves[tables.curves["kind"] == "pool"]
    ends = tables.runs[["run_key", "step", "pool_size"]].dropna()
    last = curves.merge(ends, on=["run_key", "step"], suffixes=("", "_whole"))
    last = last[(last["pool_size"] < last["pool_size_whole"]).fillna(False)]
    wide = last.pivot_table(index="run_key", columns="pool_size", values="loss")
    return wide.rename(columns=lambda size: f"{POOL_LOSS}{size}").reset_index()
