"""Which factor limits a cell: the one whose growth, for the same compute, lowers the loss most.

Compute is a product of model size, batch size and sequence length, so that each costs the same per
doubling. A larger batch also meets more users as long as the corpus has unseen ones. More users
alone cost no compute; what they would give is told beside.
"""

from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.record import plain
from scaling.analysis.fitting.status import FitStatus
from scaling.analysis.studies.factors import REPEATS, USERS
from scaling.analysis.studies.runs import CELL, run_key

AGREE = 0.95
"""Share of the bootstrap draws that must name the same factor for it to be said to limit."""
STEP = 1e-4
"""Relative step of the differences in ln x."""
PAID = ("n_total", "n_non_embedding", "batch_size", "items_per_user_mean", "items_per_user")
"""Factors that compute is a product of."""


def limits(fit: LawFit, runs: pd.DataFrame) -> dict[str, Any]:
    """Per cell the gain of each factor, the limiting one, and elasticities.

    Args:
        fit: joint law.
        runs: rows with the law's columns, ``n_users``, ``loss``, ``pf_days`` and the cell's own.

    Returns:
        ``unit``, ``rule`` and ``cells``, by ascending compute: ``run_keys``, the ``factors``,
        ``pf_days``, mean ``loss``, ``fitted``, per factor ``gains`` (``gain lower upper``: nats
        that a doubling takes off the loss) and ``elasticities`` (``d ln (y - E) / d ln x``), the
        ``limiting`` factor among those that cost compute, the ``share`` of the draws that agree,
        and ``said``: whether that is enough.
    """
    keys = [k for k in CELL if k in runs]
    cells = [some for _, some in runs.groupby(keys, sort=False, dropna=False)]
    cells.sort(key=lambda some: float(some["pf_days"].iloc[0]))
    table = pd.DataFrame([some.iloc[0] for some in cells]).reset_index(drop=True)
    if not len(table):
        return {"unit": UNIT, "rule": RULE, "cells": []}
    gains = {name: _gain(fit, table, name) for name in fit.factors if name != REPEATS}
    share = fit.tail()
    elastic = {
        (row["row"], row["factor"]): row for row in fit.elasticities(table).to_dict("records")
    }
    fitted = fit.predict(table, level=None)["y"]
    paid = [name for name in gains if name in PAID]
    out = []
    for i, some in enumerate(cells):
        record: dict[str, Any] = {
            "run_keys": [run_key(k) for k in some["run_key"]],
            "factors": {name: plain(table[name][i]) for name in fit.factors},
            "pf_days": plain(table["pf_days"][i]),
            "loss": plain(some[fit.y].mean()),
            "fitted": plain(fitted[i]),
            "gains": {name: _interval(values[:, i], share) for name, values in gains.items()},
            "elasticities": {
                name: {
                    str(k): plain(v)
                    for k, v in elastic[i, name].items()
                    if k not in ("row", "factor")
                }
                for name in gains
            },
        }  # fmt: skip
        limiting = _limiting(paid, {name: gains[name][:, i] for name in paid})
        limiting["said"] &= fit.status is FitStatus.CONVERGED
        out.append(record | limiting)
    return {"unit": UNIT, "rule": RULE, "cells": out}


UNIT = "nats that doubling the factor takes off the loss, by the law's slope at the cell"
RULE = (
    f"the factor that costs compute with the largest gain; said where at least {AGREE:.0%} of the "
    "bootstrap draws of a law that CONVERGED name the same; none where no gain is above zero"
)


def _gain(fit: LawFit, table: pd.DataFrame, name: str) -> Array:
    """``[1 + B, cells]`` loss that a doubling of a factor saves, of the law and of its draws."""
    moved = [name]
    if name == "batch_size" and USERS in fit.factors:
        fresh = table[USERS] < table["n_users"]
        moved.append(USERS)
    else:
        fresh = pd.Series(True, index=table.index)
    ends = []
    for step in (STEP, -STEP):
        there = table.assign(**{name: table[name] * np.exp(step)})
        if len(moved) > 1:
            there[USERS] = table[USERS] * np.where(fresh, np.exp(step), 1.0)
        law = fit.predict(there, level=None)["y"].to_numpy()[None]
        ends.append(np.concatenate([law, fit.predict_draws(there)]))
    return np.asarray((ends[1] - ends[0]) / (2 * STEP) * np.log(2))


def _interval(values: Array, share: float) -> dict[str, float | None]:
    out = {"gain": plain(values[0])}
    if len(values) > 1:
        lower, upper = np.nanquantile(values[1:], [share, 1 - share])
        out |= {"lower": plain(lower), "upper": plain(upper)}
    return out


def _limiting(names: list[str], gains: dict[str, Array]) -> dict[str, Any]:
    """The factor of the largest gain, and the share of the draws in which it is that."""
    if not names:
        return {"limiting": None, "share": None, "said": False}
    values = np.stack([gains[name] for name in names], axis=1)
    best = int(np.argmax(values[0]))
    if not values[0, best] > 0:
        return {"limiting": None, "share": None, "said": False}
    if len(values) == 1:
        return {"limiting": names[best], "share": None, "said": False}
    share = float((np.argmax(values[1:], axis=1) == best).mean())
    return {"limiting": names[best], "share": share, "said": share >= AGREE and len(names) > 1}
