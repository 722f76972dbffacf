"""Figures of transfer: the law of a task with its band, and what factors add at equal loss."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullLocator

from scaling.analysis.figures import LABELS, STYLE
from scaling.analysis.transfer_law.equality import EqualLossTest
from scaling.analysis.transfer_law.laws import CELL, LOSS, METRIC, TaskLaw

LABEL = {
    **LABELS,
    "items_per_user_mean": "items per user, realised mean",
    "steps": "optimiser steps",
}


def task_law(
    law: TaskLaw, *, title: str = "", ylabel: str = METRIC, ax: Axes | None = None
) -> Axes:
    """Runs of one task, its law with the 95 % band, and the spread between seeds.

    Dotted where the law is drawn beyond the losses of the runs, by a tenth of their range. A task
    that does not scale says so in its legend; one without a law shows its runs alone.
    """
    if ax is None:
        with mpl.rc_context(fname=STYLE):
            ax = plt.subplots(layout="constrained")[1]
    x = law.points[LOSS].to_numpy(dtype=np.float64)
    y = law.points[METRIC].to_numpy(dtype=np.float64)
    ax.plot(
        x, y, "o", color="C0", label=f"{len(x)} runs, {law.points[CELL].nunique()} configurations"
    )
    noise = law.noise["between_seeds"]
    if noise is not None:
        ax.errorbar(
            [], [], yerr=noise, color="C0", linewidth=0.8, label=f"between seeds: ±{noise:.2g}"
        )
        ax.vlines(x, y - noise, y + noise, color="C0", linewidth=0.8, alpha=0.6)
    if law.fit is not None:
        low, high = float(x.min()), float(x.max())
        losses = np.linspace(low - 0.1 * (high - low), high, 101)
        curve = law.predict(losses)
        inside = losses >= low
        label = f"{law.law}" if law.scales else f"{law.law} (does not scale)"
        ax.plot(losses[inside], curve["y"][inside], color="C1", label=label)
        ax.plot(losses[~inside], curve["y"][~inside], ":", color="C1")
        if "lower" in curve:
            ax.fill_between(
                losses, curve["lower"], curve["upper"], color="C1", alpha=0.18, linewidth=0
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
