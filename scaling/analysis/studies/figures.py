"""Figures of a study's joint law and of its claims, from ``runs`` and ``fits.json`` alone."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scaling.analysis.figures import LABELS, MARKERS, STYLE, log_axis, rollout_errors
from scaling.analysis.fitting.frontier import compute_frontier


def loss_panels(
    runs: pd.DataFrame, joint: Mapping[str, Any], *, y: str = "loss", axes: Sequence[Axes] = ()
) -> list[Axes]:
    """The joint law along each factor, the others at their medians, with its 95 % band.

    A point is a run: the law there plus the run's residual, so that the other factors' share is
    taken out.

    Args:
        joint: ``fits["joint"]``.
        axes: one a factor; made where there are none.
    """
    panels = {name: joint["panels"][name] for name in joint["factors"]}
    axes = list(axes) or _row(len(panels))
    points = pd.DataFrame(joint["points"]).merge(runs, on="run_key")
    for ax, (name, panel) in zip(axes, panels.items(), strict=True):
        curve = pd.DataFrame(panel["curve"]).astype(np.float64)
        at = np.interp(np.log(points[name].astype(float)), np.log(curve["x"]), np.log(curve["y"]))
        ax.plot(
            points[name], np.exp(at + points["residual"].astype(float)), "o", color="C0",
            markersize=5, alpha=0.8, markeredgewidth=0,
        )  # fmt: skip
        ax.plot(curve["x"], curve["y"], color="C1")
        if "lower" in curve:
            ax.fill_between(
                curve["x"], curve["lower"], curve["upper"], color="C1", alpha=0.18, linewidth=0
            )
        log_axis(ax)
        ax.set_xlabel(LABELS.get(name, name))
    axes[0].set_ylabel(LABELS.get(y, y))
    return axes


def residuals(
    runs: pd.DataFrame, joint: Mapping[str, Any], *, axes: Sequence[Axes] = ()
) -> list[Axes]:
    """Residuals of the joint law, ln(loss / law), against each factor and the passes over users.

    What is left of a trend here, the law does not say.

    Args:
        joint: ``fits["joint"]``.
    """
    points = pd.DataFrame(joint["points"]).merge(runs, on="run_key")
    names = [*joint["factors"], "epochs"]
    axes = list(axes) or _row(len(names))
    for ax, name in zip(axes, names, strict=True):
        ax.axhline(0, color="0.45", linewidth=1)
        ax.plot(
            points[name], points["residual"], "o", color="C0", markersize=5, alpha=0.8,
            markeredgewidth=0,
        )  # fmt: skip
        log_axis(ax)
        ax.set_xlabel(LABELS.get(name, name))
    axes[0].set_ylabel("ln(loss / law)")
    return axes


def forest(claim: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """A claim's number with its 95 % interval under every choice; the base and its interval shaded.

    Filled marks give the base's answer, open ones another or none. Below them the range over all
    combinations of choices, where there is one.

    Args:
        claim: of ``fits["claims"]["claims"]``.
    """
    ax = ax or _axes(height=0.32 * len(claim["values"]) + 1.6)
    shown = [v for v in claim["values"] if v["value"] is not None]
    names = [v["choice"] for v in shown]
    base = next((v for v in shown if v["choice"] == "base"), None)
    if base and base["lower"] is not None:
        ax.axvspan(base["lower"], base["upper"], color="C0", alpha=0.1, linewidth=0)
    for i, v in enumerate(shown):
        said = v["answer"] is not None and base is not None and v["answer"] == base["answer"]
        color = "C0" if said else "C1"
        if v["lower"] is not None:
            ax.hlines(i, v["lower"], v["upper"], color=color, linewidth=1.4)
        ax.plot(v["value"], i, "o", color=color, markerfacecolor=color if said else "white")
    every = claim["combinations"]
    if every and every["lowest"] is not None:
        names.append(f"{every['n']} combinations")
        ax.hlines(len(shown), every["lowest"], every["highest"], color="0.35", linewidth=4)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.axvline(0, color="0.45", linewidth=1)
    ax.set_xlabel("exponent, 95 % interval")
    title = claim["statement"] or f"open: {claim['question']}"
    ax.set_title("\n".join(wrap(title, 60)), fontsize=10)
    return ax


def limiting_cloud(
    runs: pd.DataFrame,
    limits: Mapping[str, Any],
    *,
    x: str = "pf_days",
    y: str = "loss",
    ax: Axes | None = None,
) -> Axes:
    """Loss against compute, each run coloured by the factor that limits its cell.

    Open marks: fewer bootstrap draws than the rule asks for name the same factor.

    Args:
        limits: ``fits["limits"]``.
    """
    ax = ax or _axes()
    by_run = {
        key: (cell["limiting"] or "none", cell["said"])
        for cell in limits["cells"]
        for key in cell["run_keys"]
    }
    known = runs[runs["run_key"].isin(by_run)]
    factors = sorted({limiting for limiting, _ in by_run.values()})
    front = compute_frontier(known, x=x, y=y)
    ax.plot(front[x], front[y], color="0.25", linewidth=0.9, label="compute frontier", zorder=1.5)
    for i, factor in enumerate(factors):
        for said in (True, False):
            keys = [k for k, v in by_run.items() if v == (factor, said)]
            some = known[known["run_key"].isin(keys)]
            if some.empty:
                continue
            color = f"C{i % 7}"
            ax.plot(
                some[x], some[y], MARKERS[i % len(MARKERS)], color=color,
                markerfacecolor=color if said else "white", linestyle="none",
                label=f"{LABELS.get(factor, factor)}{'' if said else ', not sure'}",
            )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y))
    ax.legend(title="limited by", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax


def rollout_panels(rollouts: Sequence[Mapping[str, Any]]) -> list[Axes]:
    """How far the laws can be extrapolated: a panel a law and column (``rollout_errors``).

    Args:
        rollouts: ``fits["rollouts"]``; those that failed have no panel.
    """
    found = [one["rollout"] for one in rollouts if one["rollout"]]
    if not found:
        return []
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    with mpl.rc_context(fname=STYLE):
        figure, panels = plt.subplots(
            rows, columns, layout="constrained", figsize=(4.4 * columns, 3.2 * rows), squeeze=False
        )
    for ax, record in zip(panels.flat, found, strict=False):
        rollout_errors(record, ax=ax)
        ax.set_title("\n".join(wrap(record["form"], 44)), fontsize=9)
    for ax in panels.flat[len(found) :]:
        figure.delaxes(ax)
    return list(panels.flat[: len(found)])


def _row(n: int) -> list[Axes]:
    """Panels side by side with one y axis."""
    with mpl.rc_context(fname=STYLE):
        _, axes = plt.subplots(
            1, n, layout="constrained", figsize=(max(3.4, 2.5 * n), 3.1), sharey=True, squeeze=False
        )
    return list(axes[0])


def _axes(height: float = 4.2) -> Axes:
    with mpl.rc_context(fname=STYLE):
        return plt.subplots(layout="constrained", figsize=(7.2, height))[1]
