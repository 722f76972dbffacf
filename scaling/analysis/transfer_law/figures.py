"""Figures of transfer: the law of a task with its band, and what factors add at equal loss."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullLocator

from scaling.analysis.figures import DOWNSTREAM_LABELS, LABELS, STYLE
from scaling.analysis.transfer_law.equality import EqualLossTest
from scaling.analysis.transfer_law.laws import CELL, LOSS, METRIC
from scaling.analysis.transfer_law.points import TransferPoints

LABEL = {
    **LABELS,
    "items_per_user_mean": "items per user, realised mean",
    "steps": "optimiser steps",
}
PANELS = 3
"""At most so many side by side."""


def task_laws(points: TransferPoints, record: Mapping[str, Any]) -> list[Axes]:
    """The laws of all tasks, one panel each.

    Args:
        points: of one metric.
        record: of the same metric (``record.transfer_laws``).

    Returns:
        The panels, of the tasks that have points.
    """
    tasks = [task for task in record["tasks"] if (points.table["task"] == task).any()]
    if not tasks:
        return []
    columns = min(PANELS, len(tasks))
    rows = -(-len(tasks) // columns)
    with mpl.rc_context(fname=STYLE):
        figure, panels = plt.subplots(
            rows, columns, layout="constrained", squeeze=False,
            figsize=(max(5.0, 4.2 * columns), 3.6 * rows),
        )  # fmt: skip
    for ax, task in zip(panels.flat, tasks, strict=False):
        own = points.table[points.table["task"] == task]
        label = DOWNSTREAM_LABELS.get(points.metric, points.metric)
        task_law(own, record["tasks"][task], title=task, ylabel=label, ax=ax)
    for ax in panels.flat[len(tasks) :]:
        figure.delaxes(ax)
    return list(panels.flat[: len(tasks)])


def task_law(
    points: pd.DataFrame,
    record: Mapping[str, Any],
    *,
    title: str = "",
    ylabel: str = METRIC,
    ax: Axes | None = None,
) -> Axes:
    """Runs of one task, its law with the 95 % band, and the spread between seeds.

    Dotted where the law is drawn beyond the losses of the runs, by a tenth of their range. A task
    that does not scale says so in its legend; one without a law shows its runs alone.

    Args:
        points: ``cell``, ``pretraining``, ``downstream`` of the task's runs.
        record: of the task (``laws.TaskLaw.to_dict``).
    """
    if ax is None:
        with mpl.rc_context(fname=STYLE):
            ax = plt.subplots(layout="constrained")[1]
    x = points[LOSS].to_numpy(dtype=np.float64)
    y = points[METRIC].to_numpy(dtype=np.float64)
    ax.plot(x, y, "o", color="C0", label=f"{len(x)} runs, {points[CELL].nunique()} configurations")
    noise = record["noise"]["between_seeds"]
    if noise is not None:
        ax.errorbar(
            [], [], yerr=noise, color="C0", linewidth=0.8, label=f"between seeds: ±{noise:.2g}"
        )
        ax.vlines(x, y - noise, y + noise, color="C0", linewidth=0.8, alpha=0.6)
    if record["curve"] is not None:
        curve = pd.DataFrame(record["curve"]).astype(np.float64)
        inside = curve["x"] >= x.min()
        label = f"{record['law']}" if record["scales"] else f"{record['law']} (does not scale)"
        ax.plot(curve["x"][inside], curve["y"][inside], color="C1", label=label)
        ax.plot(curve["x"][~inside], curve["y"][~inside], ":", color="C1")
        if "lower" in curve:
            ax.fill_between(
                curve["x"], curve["lower"], curve["upper"], color="C1", alpha=0.18, linewidth=0
            )
    ax.set_title(title)
    ax.set_xlabel("pretraining loss on the pool [nats]")
    ax.set_ylabel(ylabel)
    ax.legend()
    return ax


def residuals_by_factor(
    test: EqualLossTest, points: pd.DataFrame, *, ylabel: str = METRIC
) -> list[Axes]:
    """What the loss and the other factors leave of the metric, against each factor that was tested.

    One panel a factor, its effect at equal loss as a line with the 95 % interval and the corrected
    p in the title; coloured where the verdict says that it differs.

    Args:
        points: the table that was tested.

    Returns:
        The panels, in the order of ``test.effects``; none where no factor was tested.
    """
    if test.effects.empty:
        return []
    with mpl.rc_context(fname=STYLE):
        _, panels = plt.subplots(
            1, len(test.effects), layout="constrained", sharey=True, squeeze=False,
            figsize=(2.9 * len(test.effects), 3.4),
        )  # fmt: skip
    for ax, (factor, row) in zip(panels[0], test.effects.iterrows(), strict=True):
        x = points[str(factor)].to_numpy(dtype=np.float64)
        doublings = np.log2(x) - np.log2(x).mean()
        ax.scatter(
            x,
            test.unexplained[factor] + row["per_doubling"] * doublings,
            color="C0",
            s=22,
            linewidths=0,
        )
        order = np.argsort(x)[[0, -1]]
        ax.plot(
            x[order], row["per_doubling"] * doublings[order],
            color="C1" if factor in test.factors else "0.45",
        )  # fmt: skip
        ax.axhline(0, color="0.45", linestyle="--", linewidth=1)
        ax.set_xscale("log")
        ax.set_xticks(x[order], labels=[EngFormatter(sep="", places=1)(v) for v in x[order]])
        ax.xaxis.set_minor_locator(NullLocator())  # a range below a decade has no other ticks
        ax.set_xlabel(LABEL.get(str(factor), str(factor)))
        ax.set_title(
            f"{row['per_doubling']:+.2g} per doubling\n({row['lower']:+.2g} to "
            f"{row['upper']:+.2g}), p {row['p_adjusted']:.2g}",
            fontsize="small",
        )
    panels[0][0].set_ylabel(f"{ylabel}\nless law and other factors")
    return list(panels[0])
