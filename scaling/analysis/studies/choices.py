"""What a reader could have chosen otherwise, as data.

A ``Choice`` names one value of every axis. The base is the first value of each; a conclusion is
looked at with one axis changed at a time, and, where fits are cheap, under all combinations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import pandas as pd

from scaling.analysis.fitting.objective import HUBER_DELTA, Objective
from scaling.analysis.studies.runs import POOL_LOSS, smaller_pools

COMPUTE = {
    "pf_days": "6 x n_total x batch_size x steps x sequence_length / 8.64e19 (the paper's formula)",
    "pf_days_non_embedding": "the same formula with n_non_embedding in place of n_total",
    "pf_days_exact": "counted from the lengths of the logs, stack by stack, / 8.64e19",
}
"""The countings of compute."""
OBJECTIVES = {
    "huber": Objective(delta=HUBER_DELTA),
    "huber 1e-2": Objective(delta=1e-2),
    "mse": Objective(loss="mse"),
    "lad": Objective(loss="lad"),
}
"""The objectives, by name; the first is the default. ``lad`` is the limit of small knees."""
ALL_RUNS, WITHOUT_OUTLIERS = "all", "without outliers"
OUTLIER_LIMIT = 5.0
"""A run is an outlier when it lies more than this many robust standard deviations of the residuals
from the law of least absolute deviations."""


@dataclass(frozen=True)
class Choice:
    """One value of every axis.

    Attributes:
        compute: counting of compute, a column.
        size: counting of parameters, a column.
        length: effective sequence length: the realised mean or the cap, a column.
        y: loss: on the pool at the end, with the logit scale refitted, over a smaller pool, or of
            the best evaluation; a column.
        objective: of ``OBJECTIVES``.
        rows: all runs, or without outliers.
        points: of a law in compute: the frontier, or all runs.
    """

    compute: str = "pf_days"
    size: str = "n_total"
    length: str = "items_per_user_mean"
    y: str = "loss"
    objective: str = "huber"
    rows: str = ALL_RUNS
    points: str = "frontier"

    def changed(self) -> str:
        """The axes on which it differs from the base, in words; empty for the base."""
        base = Choice()
        return ", ".join(
            f"{f.name} {getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(base, f.name)
        )

    def only(self, axes: Sequence[str]) -> "Choice":
        """The same on these axes, the base on all others."""
        return replace(Choice(), **{a: getattr(self, a) for a in axes})


def values(runs: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Values of every axis that these runs allow, the base first."""
    pools = smaller_pools(runs)
    losses = ["loss", "loss_refit", *(f"{POOL_LOSS}{size}" for size in pools[-1:]), "best_loss"]
    return {
        "compute": tuple(COMPUTE),
        "size": ("n_total", "n_non_embedding"),
        "length": ("items_per_user_mean", "items_per_user"),
        "y": tuple(y for y in losses if y == "loss" or runs[y].notna().all()),
        "objective": tuple(OBJECTIVES),
        "rows": (ALL_RUNS, WITHOUT_OUTLIERS),
        "points": ("frontier", "all"),
    }


def one_at_a_time(runs: pd.DataFrame, axes: Sequence[str]) -> list[Choice]:
    """The base, then it with each other value of each of the axes."""
    return [Choice()] + [
        replace(Choice(), **{axis: value})
        for axis, some in values(runs).items()
        if axis in axes
        for value in some[1:]
    ]


def jointly(runs: pd.DataFrame, axes: Sequence[str]) -> list[Choice]:
    """Every combination of the values of the axes."""
    some = {axis: v for axis, v in values(runs).items() if axis in axes}
    return [
        replace(Choice(), **dict(zip(some, chosen, strict=True)))
        for chosen in product(*some.values())
    ]
