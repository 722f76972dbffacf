"""Figures of allocation; each function takes results and returns Axes."""

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from scaling.analysis.allocation.isoflop import IsoFlop
from scaling.analysis.allocation.minimise import crossed
from scaling.analysis.allocation.optimum import Allocation, Frontier, Law, evaluate
from scaling.analysis.allocation.snap import Snapped
from scaling.analysis.allocation.space import Space
from scaling.analysis.allocation.trend import AllocationError, Trend, column
from scaling.analysis.figures import LABELS, MARKERS, STYLE

EXCESS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Contours of relative excess loss."""
NODES = 160
"""Points an axis of the map of the region."""


def isoflop_slices(fit: IsoFlop, *, y: str = "loss", ax: Axes | None = None) -> Axes:
    """Loss against a factor at each level of compute, parabolas and their vertices.

    Profiles without a usable minimum are drawn faint and without a parabola.

    Args:
        y: column of the loss in the profiles.
    """
    ax = ax or _axes()
    cmap = mpl.colormaps["viridis"]
    levels = np.log([s.compute for s in fit.slices])
    scale = mpl.colors.Normalize(levels.min(), max(levels.max(), levels.min() + 1e-9))
    for part, level in zip(fit.slices, levels, strict=True):
        color, used = cmap(0.92 * scale(level)), part.refused is None
        x = column(part.profile, fit.factor)
        ax.plot(
            x, part.profile[y], "o" if used else "x", color=color, alpha=1.0 if used else 0.35,
            markersize=5 if used else 4,
        )  # fmt: skip
        if used and part.vertex is not None:
            line = np.geomspace(x[0], x[-1], 81)
            ax.plot(line, part.at(line), color=color, linewidth=1, label=f"{part.compute:.3g}")
            ax.plot(part.vertex, part.at(np.array(part.vertex)), "*", color=color, markersize=11)
    ax.set_xscale("log")
    ax.set_xlabel(LABELS.get(fit.factor, fit.factor))
    ax.set_ylabel(LABELS.get(y, y))
    if any(s.refused is None for s in fit.slices):
        title = LABELS.get(fit.compute, fit.compute)
        ax.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax


def optimum_vs_compute(
    found: Frontier,
    factor: str,
    *,
    others: Sequence[Trend] = (),
    ax: Axes | None = None,
) -> Axes:
    """The optimal value of a factor against compute, its 95 % band, and other approaches' optima.

    Args:
        found: optima of a law over budgets (approach 3).
        factor: one of its quantities.
        others: trends of approach 1 or 2 in the same factor and compute.
    """
    ax = ax or _axes()
    table = found.table
    ax.plot(table[found.compute], table[factor], color="C0", label="joint law (3)")
    if f"{factor}_lower" in table:
        ax.fill_between(
            table[found.compute], table[f"{factor}_lower"], table[f"{factor}_upper"], color="C0",
            alpha=0.18, linewidth=0,
        )  # fmt: skip
    names = {1: "envelope (1)", 2: "IsoFLOP (2)", 3: "joint law (3)"}
    for i, trend in enumerate(others, start=1):
        used = trend.points[trend.points["reason"].isna()]
        ax.plot(
            used[trend.compute], used[trend.factor], MARKERS[i % len(MARKERS)], color=f"C{i}",
            label=names[trend.approach],
        )  # fmt: skip
        if trend.exponent is not None:
            ends = np.array([used[trend.compute].min(), used[trend.compute].max()])
            ax.plot(ends, trend.predict(ends)[factor], color=f"C{i}", linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(LABELS.get(found.compute, found.compute))
    ax.set_ylabel(f"optimal {LABELS.get(factor, factor)}")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax


def flat_region(
    law: Law,
    space: Space,
    chosen: Allocation,
    *,
    x: str = "batch_size",
    y: str = "n_total",
    snapped: Snapped | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How much worse than the optimum any other use of the same budget is, over two quantities.

    What is not on the axes takes the rest of the budget; where it leaves a choice, the best one.
    Contours of relative excess loss, the optimum (star), the optima of the draws (grey), and the
    real configurations within the region (crosses).

    Raises:
        AllocationError: the budget leaves another number of quantities to choose than two.
    """
    axes = space.axes(chosen.budget)
    if len(axes) != 2:
        raise AllocationError(
            "a map needs a budget that leaves two quantities to choose, and here it leaves "
            f"{len(axes)}"
        )
    ax = ax or _axes()
    at = crossed([axis.nodes(NODES - 1) for axis in axes])
    quantities, possible = space.spend(at, chosen.budget)
    excess = evaluate(law, space.columns(quantities))[0] / float(chosen.point["loss"]) - 1
    near = possible & (excess <= 2 * EXCESS[-1])
    columns = [space.names.index(name) for name in (x, y)]
    places = np.round(np.log(quantities[near][:, columns]), 6)
    order = np.argsort(excess[near], kind="stable")
    _, first = np.unique(places[order], axis=0, return_index=True)
    kept = order[first]
    # triangles in logarithms, as the axes are
    triangles = mpl.tri.Triangulation(*places[kept].T)
    triangles.x, triangles.y = np.exp(places[kept]).T
    drawn = ax.tricontourf(
        triangles, np.maximum(excess[near][kept], 0.0), levels=EXCESS, cmap="viridis_r", alpha=0.8
    )
    ax.figure.colorbar(drawn, ax=ax, label="excess loss", format=lambda v, _: f"{v:.1%}")
    if len(chosen.draws):
        ax.plot(
            chosen.draws[x], chosen.draws[y], ".", color="0.35", markersize=2, alpha=0.5,
            label="optima of the draws",
        )  # fmt: skip
    if snapped is not None:
        inside = snapped.region
        ax.plot(inside[x], inside[y], "+", color="0.1", markersize=4, label="real, in the region")
    ax.plot(chosen.point[x], chosen.point[y], "*", color="C1", markersize=13, label="optimum")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y))
    ax.legend(loc="best")
    return ax


def _axes() -> Axes:
    with mpl.rc_context(fname=STYLE):
        return plt.subplots(layout="constrained")[1]
