"""Figures of allocation; each function takes results and returns Axes."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from scaling.analysis.allocation.isoflop import IsoFlop
from scaling.analysis.allocation.optimum import Allocation, Frontier, Law, evaluate
from scaling.analysis.allocation.snap import Snapped
from scaling.analysis.allocation.space import Space, varying
from scaling.analysis.allocation.trend import AllocationError, Array, Mask, Trend, column
from scaling.analysis.allocation.workload import Workload
from scaling.analysis.figures import LABELS, MARKERS, STYLE, log_axis

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

    The quantity that is not on the axes takes the rest of the budget, as far as its limit.
    Contours of relative excess loss, the optimum (star), the optima of the draws (grey), and the
    real configurations within the region (crosses).

    Raises:
        AllocationError: not three quantities vary, x and y are not two of them, or users have a
            price.
    """
    three = _mapped(space)
    if x == y or not {x, y} <= set(three):
        raise AllocationError(f"{x}, {y}: a map is of two of {', '.join(three)}")
    (rest,) = set(three) - {x, y}
    ax = ax or _axes()
    ends = [space.bounds()[name] for name in (x, y)]
    for _ in range(2):  # all that is allowed, then where anything is near the optimum
        grid = np.meshgrid(*(np.geomspace(low, high, NODES) for low, high in ends))
        excess = _excess(law, space, chosen, {x: grid[0], y: grid[1]}, rest)
        near = excess <= EXCESS[-1]
        ends = [_around(values, near) for values in grid]
    drawn = ax.contourf(
        *grid, np.ma.masked_invalid(np.maximum(excess, 0.0)), levels=EXCESS, cmap="viridis_r",
        alpha=0.8,
    )  # fmt: skip
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
    ax.set_xlim(grid[0].min(), grid[0].max())
    ax.set_ylim(grid[1].min(), grid[1].max())
    log_axis(ax, "x")
    log_axis(ax, "y")
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y))
    ax.legend(loc="best")
    return ax


def _mapped(space: Space) -> list[str]:
    """The three quantities that a map is of.

    Raises:
        AllocationError: there are more or fewer, or users are one.
    """
    if "n_users" in space.names:
        raise AllocationError("no map is drawn where users have a price")
    found = varying(space.bounds())
    if len(found) != 3:
        raise AllocationError(
            f"a map needs three quantities that vary, and here {len(found)} do: {', '.join(found)}"
        )
    return found


def _excess(
    law: Law, space: Space, chosen: Allocation, at: Mapping[str, Array], rest: str
) -> Array:
    """Relative excess loss where two quantities are given and a third takes what is left of the
    budget; NaN where the two cost more than that."""
    shape = next(iter(at.values())).shape
    start = {name: np.full(shape, low) for name, (low, _) in space.bounds().items()} | dict(at)
    quantities = np.column_stack([start[name].ravel() for name in space.names])
    columns = space.columns(space.raised(quantities, rest, chosen.budget))
    excess = evaluate(law, columns)[0] / float(chosen.point["loss"]) - 1
    affordable = columns[space.compute].to_numpy() <= chosen.budget * (1 + 1e-9)
    return np.asarray(np.where(affordable, excess, np.nan).reshape(shape))


def _around(values: Array, near: Mask) -> tuple[float, float]:
    """Ends of a grid's values where something is near, a node further on either side."""
    every = np.unique(values)
    inside = np.flatnonzero(np.isin(every, values[near]))
    return float(every[max(inside[0] - 1, 0)]), float(every[min(inside[-1] + 1, len(every) - 1)])


def flat_regions(
    law: Law, workload: Workload, chosen: Allocation, snapped: Snapped | None = None
) -> list[Axes]:
    """``flat_region`` over every pair of the three quantities that vary, side by side.

    Raises:
        AllocationError: not three quantities vary, or users have a price.
    """
    pairs = list(combinations(_mapped(workload), 2))
    with mpl.rc_context(fname=STYLE):
        _, panels = plt.subplots(
            1, len(pairs), layout="constrained", figsize=(5.2 * len(pairs), 4.0), squeeze=False
        )
    for ax, (y, x) in zip(panels[0], pairs, strict=True):
        flat_region(law, workload, chosen, x=x, y=y, snapped=snapped, ax=ax)
    return list(panels[0])


def _axes() -> Axes:
    with mpl.rc_context(fname=STYLE):
        return plt.subplots(layout="constrained")[1]
