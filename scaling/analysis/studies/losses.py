"""The pool loss beside the loss of the training batch, and losses over other pool sizes.

A loss over K users is at chance ln K: losses over batches or pools of different sizes do not
compare. ln K - L does: what the encoder tells of the users (a lower bound of the mutual
information of two views, van den Oord et al. 2018, section 2.3).
"""

from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.status import FitError
from scaling.analysis.studies.compute import rank_correlation
from scaling.analysis.studies.runs import POOL_LOSS, TRAIN_INFORMATION, smaller_pools


def losses(runs: pd.DataFrame, n_boot: int, seed: int) -> dict[str, Any]:
    """Information on the pool, on smaller pools and on training batches, over compute.

    Returns:
        ``note``; ``agreement``: rank correlation of the pool loss with ``train_loss``, with
        ``train_information`` and with ``train_loss`` at each batch size; ``information``: per
        source its ``users`` (contrasted; null where it varies), ``lowest`` and ``highest`` [nats],
        ``largest_loss_share`` (of chance that the best run leaves), and the power with which it
        rises in ``pf_days``: ``exponent lower upper status``, or why it has none.
    """
    sources: dict[str, tuple[int | None, pd.Series[float]]] = {
        "pool": (int(runs["pool_size"].iloc[0]), np.log(runs["pool_size"]) - runs["loss"])
        if len(runs)
        else (None, runs["loss"]),
    }
    for size in reversed(smaller_pools(runs)):
        sources[f"pool of {size}"] = (size, np.log(size) - runs[f"{POOL_LOSS}{size}"])
    sizes = runs["negatives"].unique()
    sources["training batch"] = (
        int(sizes[0]) if len(sizes) == 1 else None, runs[TRAIN_INFORMATION],
    )  # fmt: skip
    return {
        "note": "train_loss is over negatives users of the batch, so that it may be compared only "
        "at equal negatives; ln(users) - loss may be compared over all",
        "agreement": {
            "train_loss": rank_correlation(runs, "train_loss"),
            TRAIN_INFORMATION: rank_correlation(runs, TRAIN_INFORMATION),
            "train_loss at equal negatives": {
                str(size): rank_correlation(some, "train_loss")
                for size, some in runs.groupby("negatives")
            },
        },
        "information": {
            name: {"users": users, **_law(runs.assign(information=values), n_boot, seed)}
            for name, (users, values) in sources.items()
        },
    }


def _law(runs: pd.DataFrame, n_boot: int, seed: int) -> dict[str, Any]:
    """How information rises with compute; runs below zero tell nothing and have no logarithm."""
    known = runs["information"].dropna().astype(np.float64)
    out: dict[str, Any] = {
        "lowest": float(known.min()) if len(known) else None,
        "highest": float(known.max()) if len(known) else None,
    }
    try:
        fit = fit_law(runs, "rising(pf_days)", y="information", n_boot=n_boot, seed=seed)
    except FitError as e:
        return out | {"failed": str(e)}
    out |= {
        "exponent": float(fit.params["exponent"]), "status": str(fit.status),
        "rows": fit.n, "dropped": dict(fit.dropped), "failed": None,
    }  # fmt: skip
    if not fit.draws.empty:
        interval = fit.ci()
        out |= {end: float(interval[end]["exponent"]) for end in ("lower", "upper")}
    return out
