"""Figures of tables and laws. Each function returns Axes; ``studies.draw`` writes files.

A law to draw is either a ``LawFit`` or its ``to_dict()`` out of ``fits.json``, so that
committed tables and fits are enough to make every figure again.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from scaling.analysis.fitting.frontier import compute_frontier
from scaling.analysis.studies.downstream import correlations, downstream_points
from scaling.analysis.studies.gains import encoder, gain_points

if TYPE_CHECKING:
    from scaling.analysis.fitting.law import LawFit

STYLE = Path(__file__).with_name("clue.mplstyle")
MARKERS = "osD^vPX"

LABELS = {
    "pf_days": "compute, paper's formula [PF-days]",
    "pf_days_exact": "compute, counted [PF-days]",
    "pf_days_non_embedding": "compute, non-embedding parameters [PF-days]",
    "loss": "contrastive loss on the pool [nats]",
    "loss_refit": "loss on the pool, logit scale refitted [nats]",
    "n_total": "parameters",
    "n_non_embedding": "parameters, non-embedding",
    "batch_size": "batch size [users]",
    "items_per_user": "items per user",
    "items_per_user_mean": "items per user, mean",
    "users_seen": "distinct users met",
    "negatives": "negatives [users]",
    "epochs": "passes over users",
    "data_fraction": "data fraction",
    "n_users": "users",
}
"""Axis and legend labels of columns, with units."""

DOWNSTREAM_LABELS = {
    "loss": "downstream loss [nats]",
    "loss_softmax": "downstream loss over 101 candidates [nats]",
    "mrr": "downstream MRR",
    "hr_1": "downstream HR@1",
    "hr_10": "downstream HR@10",
    "ndcg_10": "downstream NDCG@10",
}


SPREAD = 0.01
"""Half the width over which the runs of a task are spread around its tau."""


class Law(Protocol):
    """A fitted power law; its record is what ``fits.json`` holds."""

    def to_dict(self) -> dict[str, Any]:
        """Parameters, intervals, range and curve."""


def loss_vs_compute(
    runs: pd.DataFrame,
    fit: Law | Mapping[str, Any] | None = None,
    *,
    x: str = "pf_days",
    y: str = "loss",
    hue: str = "n_total",
    chance: bool = True,
    floor: float | None = None,
    extend: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Loss of every run against its compute, the compute frontier, and a law with its 95 % band.

    Args:
        fit: law in ``x``, or its record; dotted where it is extrapolated.
        hue: column that colours the runs.
        chance: draw the loss of a guess, ln of the pool size.
        floor: loss that no model can beat, where the world states one. [nats]
        extend: draw the law to this many times the largest fitted compute, at most 10.
    """
    ax = ax or _axes()
    whole = runs[runs[x].notna() & runs[y].notna()]
    _scatter_by(ax, whole, x, y, hue)
    front = compute_frontier(whole, x=x, y=y)
    ax.plot(
        front[x], front[y], color="0.25", linewidth=0.9, marker="o", markersize=10,
        markerfacecolor="none", markeredgewidth=0.9, label="compute frontier", zorder=2.5,
    )  # fmt: skip
    if fit is not None:
        _law(ax, fit, x, extend)
    if chance and "chance" in whole:
        for value in sorted(whole["chance"].dropna().unique()):
            ax.axhline(value, color="0.45", linestyle="--", linewidth=1, label="chance (ln pool)")
    if floor is not None:
        ax.axhline(floor, color="0.45", linestyle="-.", linewidth=1, label="floor of the world")
    return _log_log(ax, x, y)


def transfer_vs_pretraining(
    transfer: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    metric: str = "loss",
    system: str | None = None,
    baseline: str | None = "popularity",
    ax: Axes | None = None,
) -> Axes:
    """Downstream loss with its 95 % interval against pretraining loss, one colour a task.

    The legend gives Pearson's and Spearman's correlation over runs; a dashed line shows the
    baseline of the same task. A task whose runs were evaluated differently is named and not drawn.

    Args:
        metric: a column of the transfer table.
        system: downstream system to draw; None: of the encoder that most runs of a task have.
        baseline: system of the dashed lines; None for none.
    """
    ax = ax or _axes()
    for i, (task, found) in enumerate(downstream_points(transfer, runs, metric, system).items()):
        color, points = f"C{i % 7}", found.points
        if found.failed:
            ax.plot([], [], " ", label=f"{task}: not drawn,\nevaluated differently")
            continue
        label = f"{task}, {len(points)} runs"
        r = correlations(points)
        if r["pearson"] is not None:
            label += f"\nPearson {r['pearson']:.2f}, Spearman {r['spearman']:.2f}"
        ax.scatter(
            points["pretraining"], points["downstream"], color=color, s=34, alpha=0.9,
            marker=MARKERS[i % len(MARKERS)], linewidths=0, label=label,
        )  # fmt: skip
        ax.vlines(
            points["pretraining"], points["low"], points["high"], color=color, linewidth=0.8,
            alpha=0.6,
        )  # fmt: skip
        rows = transfer[(transfer["task"] == task) & (transfer["system"] == baseline)]
        rows = rows[rows["segment"] == "all"]
        if len(rows) and rows[metric].notna().any():
            ax.axhline(
                rows[metric].mean(), color=color, linestyle="--", linewidth=1,
                label=f"{task}, {baseline}",
            )  # fmt: skip
    ax.set_xlabel("pretraining loss on the pool [nats]")
    ax.set_ylabel(DOWNSTREAM_LABELS.get(metric, metric))
    _legend(ax)
    return ax


def gain_vs_similarity(
    gains: pd.DataFrame,
    *,
    metric: str = "hr_10",
    system: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Relative gain over the best task-specific system, with its 95 % interval, against Kendall's
    tau-b of pretraining and task; one colour a task.

    The runs of a task have one tau; in the order of their gains they are spread a little around it,
    so that their intervals can be told apart. A task without points is named with the reason.

    Args:
        metric: of ``results.MEASURES``.
        system: the runs' encoder and head; None: ``u-mlp`` on the encoder that most runs have.
    """
    ax = ax or _axes()
    chosen = system or encoder(gains)
    tasks = gain_points(gains, metric, chosen) if chosen else {}
    for i, (task, found) in enumerate(tasks.items()):
        color, points = f"C{i % 7}", found.points.sort_values("gain", kind="stable")
        if found.failed:
            ax.plot([], [], " ", label=f"{task}: not drawn,\n{found.failed.partition(':')[0]}")
            continue
        x = points["tau_b"] + (np.linspace(-SPREAD, SPREAD, len(points)) if len(points) > 1 else 0)
        ax.scatter(
            x, points["gain"], color=color, s=22, alpha=0.9, linewidths=0,
            marker=MARKERS[(i + i // 7) % len(MARKERS)],
            label=f"{task}, {len(points)} runs\nover {found.baseline}",
        )  # fmt: skip
        ax.vlines(x, points["low"], points["high"], color=color, linewidth=0.8, alpha=0.6)
    ax.axhline(0, color="0.45", linestyle="--", linewidth=1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("tau-b of pretraining and task")
    ax.set_ylabel(f"relative gain, {DOWNSTREAM_LABELS.get(metric, metric)}")
    _legend(ax)
    return ax


def law_and_points(fit: "LawFit", x: str, *, ax: Axes | None = None, extend: float = 1.0) -> Axes:
    """A law along one column with its 95 % band, and the points it was fitted to.

    The other columns are held at their medians: a point is the law there plus its residual.

    Args:
        extend: draw the law to this many times the largest fitted x.
    """
    ax = ax or _axes()
    used = fit.weights > 0
    columns = {name: values[used] for name, values in fit.columns.items()}
    points = pd.DataFrame({n: v if n == x else np.median(v) for n, v in columns.items()})
    at_medians = fit.predict(points, level=None)["y"].to_numpy()
    residuals = fit.residuals().to_numpy()
    log_scale = fit.objective.scale == "log"
    shown = at_medians * np.exp(residuals) if log_scale else at_medians + residuals
    ax.plot(columns[x], shown, "o", color="C0", label="fitted points")
    low, high = fit.ranges()[x]
    log_x = low > 0
    grid = np.geomspace(low, high * extend, 61) if log_x else np.linspace(low, high, 61)
    band = fit.predict(pd.DataFrame({n: grid if n == x else points[n].iloc[0] for n in points}))
    ax.plot(grid, band["y"], color="C1", label=fit.equation().replace(" = ", " =\n"), zorder=2.8)
    if "lower" in band:
        ax.fill_between(
            grid, band["lower"], band["upper"], color="C1", alpha=0.18, linewidth=0, zorder=1
        )
    if log_x and log_scale:
        return _log_log(ax, x, fit.y)
    ax.set_xscale("log" if log_x else "linear")
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(fit.y, fit.y))
    _legend(ax)
    return ax


def rollout_errors(record: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Signed error of every prediction against its extrapolation ratio, one colour a window.

    Open points lie outside their interval.

    Args:
        record: of a rollout (``fitting.rollout.Rollout.to_dict``).
    """
    ax = ax or _axes()
    predictions = pd.DataFrame(record["predictions"])
    for i, (cut, rows) in enumerate(predictions.groupby("cut")):
        for face in (f"C{i % 7}", "none"):
            some = rows[(rows["covered"] == 0) == (face == "none")]
            label = None if face == "none" else short(float(str(cut)))
            ax.scatter(
                some["ratio"], some["error"], s=22, edgecolors=f"C{i % 7}", facecolors=face,
                label=label,
            )  # fmt: skip
    if (predictions["covered"] == 0).any():
        outside = f"outside {record['level']:.0%}"
        ax.scatter([], [], s=22, edgecolors="0.35", facecolors="none", label=outside)
    ax.axhline(0, color="0.45", linestyle="--", linewidth=1)
    ax.set_xlim(0.95, max(2.1, 1.1 * float(predictions["ratio"].max())))
    log_axis(ax)
    by = LABELS.get(record["by"], record["by"]).partition(" [")[0].partition(",")[0]
    ax.set_xlabel(f"{by} / largest fitted")
    ax.set_ylabel(f"ln(predicted {record['y']} / measured)")
    ax.legend(
        title="fitted up to", title_fontsize="small", fontsize="small", loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
    )  # fmt: skip
    return ax


def log_axis(ax: Axes, which: Literal["x", "y"] = "x") -> None:
    """A logarithmic axis with few plain numbers, for narrow panels."""
    ax.set(**{f"{which}scale": "log"})
    axis, (low, high) = (ax.xaxis, ax.get_xlim()) if which == "x" else (ax.yaxis, ax.get_ylim())
    subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    axis.set_minor_formatter(NullFormatter())


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the content of a file; the same figure gives the same bytes.

    Args:
        kind: ``png``, ``svg`` or ``pdf``.
    """
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with mpl.rc_context(fname=STYLE):
        figure.savefig(buffer, format=kind, metadata=undated[kind])
    return buffer.getvalue()


def _axes() -> Axes:
    with mpl.rc_context(fname=STYLE):
        return plt.subplots(layout="constrained")[1]


def _law(ax: Axes, fit: Law | Mapping[str, Any], x: str, extend: float) -> None:
    law = fit if isinstance(fit, Mapping) else fit.to_dict()
    curve, exponent = pd.DataFrame(law["curve"]), float(law["params"]["exponent"])
    interval = law["ci95"] and tuple(law["ci95"]["exponent"])
    curve = curve[curve[x] <= law["range"][x][1] * extend * (1 + 1e-9)]
    label = f"exponent {exponent:#.3g}"
    if interval is not None:
        label += f"\n95 %: {interval[0]:#.3g} to {interval[1]:#.3g}"
    outside = curve["extrapolated"].to_numpy(dtype=bool)
    ax.plot(curve[x][~outside], curve["y"][~outside], color="C1", label=label, zorder=2.8)
    if outside.any():
        joined = outside | np.append(outside[1:], False)  # from the last fitted point on
        ax.plot(curve[x][joined], curve["y"][joined], color="C1", linestyle=":", zorder=2.8)
    if "lower" in curve:
        ax.fill_between(
            curve[x], curve["lower"], curve["upper"], color="C1", alpha=0.18, linewidth=0, zorder=1
        )


def _scatter_by(ax: Axes, runs: pd.DataFrame, x: str, y: str, hue: str) -> None:
    """Points coloured by a column: one legend entry a value, a colour bar if there are many."""
    values = runs[hue].to_numpy(dtype=np.float64, na_value=np.nan)
    levels = np.unique(values[np.isfinite(values)])
    cmap = mpl.colormaps["viridis"]
    if len(levels) > 7:
        points = ax.scatter(runs[x], runs[y], c=values, cmap=cmap, norm="log", s=30, zorder=3)
        ax.figure.colorbar(points, ax=ax, label=LABELS.get(hue, hue))
        return
    for i, level in enumerate(levels):
        some = runs[values == level]
        ax.scatter(
            some[x], some[y], color=cmap(0.92 * i / max(1, len(levels) - 1)), s=34, linewidths=0,
            marker=MARKERS[i % len(MARKERS)], label=f"{short(level)} {LABELS.get(hue, hue)}",
            zorder=3,
        )  # fmt: skip


def _log_log(ax: Axes, x: str, y: str) -> Axes:
    """Logarithmic axes of two columns, labelled; plain numbers on y, often less than a decade."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 30:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y))
    _legend(ax)
    return ax


def _legend(ax: Axes) -> None:
    """Legend beside the axes, where it hides no point; one entry per label."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        ax.legend(unique.values(), unique.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.0))


def short(value: float) -> str:
    """4,200,000 as 4.2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
