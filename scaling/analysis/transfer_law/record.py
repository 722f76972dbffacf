"""What a study says of transfer, as one JSON value: ``transfer_laws``."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling.analysis.transfer_law.chain import compare_held_out
from scaling.analysis.transfer_law.equality import (
    SAME,
    EqualityVerdict,
    EqualLossTest,
    equal_loss_test,
    over_tasks,
)
from scaling.analysis.transfer_law.laws import CELL, TaskLaw, fit_task, forms, tangent
from scaling.analysis.transfer_law.points import (
    COMPUTE,
    FACTORS,
    LOWER_IS_BETTER,
    TransferPoints,
    mean_of_tasks,
    transfer_points,
)
from scaling.analysis.transfer_law.pooled import held_out_tasks, pooled_law
from scaling.results import Tables

Array = npt.NDArray[np.float64]

METRICS = ("loss", "mrr")
"""Metrics of the transfer table that a study's record has laws of."""
HELD_OUT = 0.25
"""Share of the configurations, those of most compute, that chained and direct laws predict."""
FEWEST_VALUES = 3
"""Values that a factor needs to have an exponent."""


def transfer_laws(
    tables: Tables, *, metrics: Sequence[str] = METRICS, n_boot: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Transfer laws of every task, alone and pooled, and whether equal loss is equal transfer.

    Returns:
        JSON-able, by metric: ``rises_with_loss``; ``failed``: tasks without points; and

        - ``tasks``: per task ``system``, ``left_out``, the record of ``laws.TaskLaw``;
          ``equal_loss``: ``equality.EqualLossTest`` with the chosen law as f, ``with_parabola`` the
          verdict with a parabola, and ``conclusion``: the verdict where both agree and which
          survives the number of tasks (not of metrics); ``held_out_compute``:
          ``chain.compare_held_out`` for the configurations of most compute;
        - ``mean_of_tasks``: the same of the mean over the tasks that every run was evaluated on,
          which ``over`` names; None with fewer than two;
        - ``pooled``: ``pooled.PooledLaw`` of the tasks that scale, with ``held_out_tasks``, or the
          reason under ``failed``.
    """
    return {m: _by_metric(transfer_points(tables, m), n_boot, seed) for m in metrics}


def _by_metric(points: TransferPoints, n_boot: int, seed: int) -> dict[str, Any]:
    rises = points.metric in LOWER_IS_BETTER
    by_task = {str(task): own for task, own in points.table.groupby("task", sort=True)}
    laws = {
        task: fit_task(own, rises_with_loss=rises, n_boot=n_boot, seed=seed)
        for task, own in by_task.items()
    }
    tests = {task: _equal_loss(law, seed) for task, law in laws.items() if law.fit is not None}
    with_law = over_tasks({task: pair[0] for task, pair in tests.items()})
    with_parabola = over_tasks({task: pair[1] for task, pair in tests.items()})
    tasks = {}
    for task, law in laws.items():
        agree = task in tests and with_law[task] is with_parabola[task]
        tasks[task] = {
            "system": points.systems[task],
            "left_out": list(points.left_out[task]),
            **_one(law, tests.get(task), with_law[task] if agree else None, rises, seed),
        }
    return {
        "rises_with_loss": rises,
        "tasks": tasks,
        "mean_of_tasks": _mean_of_tasks(points.table, rises, n_boot, seed),
        "pooled": _pooled(points.table, [t for t, law in laws.items() if law.scales], seed),
        "failed": dict(points.failed),
    }


def _one(
    law: TaskLaw,
    tests: tuple[EqualLossTest, EqualLossTest] | None,
    agreed: EqualityVerdict | None,
    rises: bool,
    seed: int,
) -> dict[str, Any]:
    """The record of one task; ``agreed`` is the verdict that both tests and the correction give."""
    found = {**law.to_dict(), "equal_loss": None, "held_out_compute": None}
    if tests is not None:
        found["equal_loss"] = {
            **tests[0].to_dict(),
            "with_parabola": str(tests[1].verdict),
            "conclusion": str(agreed or EqualityVerdict.UNDECIDED),
        }
        found["held_out_compute"] = _held_out(law, rises, seed)
    return found


def _mean_of_tasks(
    points: pd.DataFrame, rises: bool, n_boot: int, seed: int
) -> dict[str, Any] | None:
    table, over = mean_of_tasks(points)
    if table.empty:
        return None
    law = fit_task(table, rises_with_loss=rises, n_boot=n_boot, seed=seed)
    tests = None if law.fit is None else _equal_loss(law, seed)
    agree = tests is not None and tests[0].verdict is tests[1].verdict
    agreed = tests[0].verdict if tests is not None and agree else None
    return {"over": list(over), **_one(law, tests, agreed, rises, seed)}


def _equal_loss(law: TaskLaw, seed: int) -> tuple[EqualLossTest, EqualLossTest]:
    """The test with the task's law and with a parabola."""
    fit = law.fit
    assert fit is not None
    factors = _known(law.points)
    return (
        equal_loss_test(law.points, factors, tangent=lambda x: tangent(fit, x), seed=seed),
        equal_loss_test(law.points, factors, seed=seed),
    )


def _known(points: pd.DataFrame) -> list[str]:
    """Factors that every run has."""
    return [f for f in FACTORS if (points[f] > 0).all()]


def _held_out(law: TaskLaw, rises: bool, seed: int) -> dict[str, Any]:
    """Chained and direct predictions of the configurations of most compute."""
    assert law.law is not None
    factors, few = _separable(law.points)
    compute = law.points.groupby(CELL)[COMPUTE].mean()
    late = set(compute.nlargest(max(1, int(HELD_OUT * len(compute)))).index)
    ways = {"compute": [COMPUTE]}
    if factors and not few:
        ways["factors"] = factors
    sign = " + " if rises else " - "
    table = compare_held_out(
        law.points,
        law.points[CELL].isin(late),
        {name: " + ".join(["E", *columns]) for name, columns in ways.items()},
        forms(rises)[law.law],
        {name: sign.join(["E", *columns]) for name, columns in ways.items()},
        seed=seed,
    )
    return {
        "configurations": len(late),
        "factors": factors,
        "left_out": dict.fromkeys(few, f"fewer than {FEWEST_VALUES} values have no exponent"),
        "ways": table.astype(object).where(table.notna(), None).to_dict(orient="index"),
    }


def _separable(points: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Factors that vary and are no other in disguise: with values enough, and with too few."""
    kept: dict[str, Array] = {}
    for factor in _known(points):
        x = np.log(points[factor].to_numpy(dtype=np.float64))
        alike = (abs(np.corrcoef(x, other)[0, 1]) for other in kept.values())
        if np.ptp(x) > 0 and all(r < SAME for r in alike):
            kept[factor] = x
    few = [f for f, x in kept.items() if len(np.unique(x)) < FEWEST_VALUES]
    return [f for f in kept if f not in few], few


def _pooled(points: pd.DataFrame, scaling: list[str], seed: int) -> dict[str, Any]:
    """The pooled law of the tasks that scale; the others have no curve to share."""
    if len(scaling) < 2:
        return {"failed": f"{len(scaling)} tasks scale; a pool needs two"}
    try:
        law = pooled_law(points[points["task"].isin(scaling)], seed=seed)
    except ValueError as e:
        return {"failed": str(e)}
    return {
        **law.to_dict(),
        "held_out_tasks": held_out_tasks(law).to_dict(orient="index"),
        "failed": None,
    }
