"""All figures of a study, as files."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling.analysis.figures import (
    STYLE,
    gain_vs_similarity,
    loss_vs_compute,
    rendered,
    transfer_vs_pretraining,
)
from scaling.analysis.studies import figures as of
from scaling.analysis.studies.gains import encoder, gain_points
from scaling.analysis.transfer_law.figures import task_laws
from scaling.analysis.transfer_law.points import TransferPoints, transfer_points
from scaling.files import write_bytes
from scaling.results import Tables

GAIN_METRICS = ("hr_10", "mrr")
"""Panels of the figure of gains."""


def draw(tables: Tables, fits: Mapping[str, Any], out: Path) -> list[Path]:
    """Write all figures of a study as PNG and SVG.

    Args:
        fits: content of ``fits.json`` (``report.study``).
        out: folder of the figures, ``results/<sweep>/figures``.

    Returns:
        Paths of the files written; a figure without data is not drawn.
    """
    written = []
    for name, make in _figures(tables, fits).items():
        with mpl.rc_context(fname=STYLE):
            figure = make().figure
            assert isinstance(figure, Figure)
            for kind in ("png", "svg"):
                write_bytes(out / f"{name}.{kind}", rendered(figure, kind))
                written.append(out / f"{name}.{kind}")
            plt.close(figure)
    return written


def _figures(tables: Tables, fits: Mapping[str, Any]) -> dict[str, Callable[[], Axes]]:
    """What there is to draw, by the name of its files."""
    runs = tables.runs
    figures: dict[str, Callable[[], Axes]] = {}
    if runs["loss"].notna().any():
        law = fits.get("compute", {}).get("headline", {}).get("fit")
        figures["loss_vs_compute"] = lambda: loss_vs_compute(runs, law, extend=3.0)
    joint = fits.get("joint", {})
    if joint.get("panels"):
        figures["loss_vs_factors"] = lambda: of.loss_panels(runs, joint)[0]
        figures["residuals"] = lambda: of.residuals(runs, joint)[0]
    if fits.get("limits", {}).get("cells"):
        figures["limiting_factor"] = lambda: of.limiting_cloud(runs, fits["limits"])
    claims = {claim["name"]: claim for claim in fits.get("claims", {}).get("claims", [])}
    exponent = claims.get("compute_exponent", {"values": []})
    if any(v["value"] is not None for v in exponent["values"]):
        figures["exponent_by_choice"] = lambda: of.forest(exponent)
    if len(tables.transfer):
        figures["transfer_vs_pretraining"] = lambda: transfer_vs_pretraining(tables.transfer, runs)
    for metric, found in (fits.get("transfer_laws") or {}).items():
        points = transfer_points(tables, metric)
        measured = set(points.table["task"])
        if any(law.get("curve") for task, law in found["tasks"].items() if task in measured):
            figures[f"transfer_law_{metric}"] = partial(_transfer_laws, points, found)
    if any(one["rollout"] for one in fits.get("rollouts", [])):
        figures["rollouts"] = lambda: of.rollout_panels(fits["rollouts"])[0]
    if _has_gains(tables):
        figures["gain_vs_similarity"] = lambda: _gain_panels(tables)
    return figures


def _transfer_laws(points: TransferPoints, record: Mapping[str, Any]) -> Axes:
    return task_laws(points, record)[0]


def _has_gains(tables: Tables) -> bool:
    """Whether at least two tasks have points of gains."""
    system = encoder(tables.gains)
    tasks = gain_points(tables.gains, GAIN_METRICS[0], system) if system else {}
    return sum(len(found.points) > 0 for found in tasks.values()) > 1


def _gain_panels(tables: Tables) -> Axes:
    """One panel a metric side by side, with one legend."""
    _, panels = plt.subplots(1, len(GAIN_METRICS), layout="constrained", figsize=(9.6, 4.2))
    for ax, metric in zip(panels, GAIN_METRICS, strict=True):
        gain_vs_similarity(tables.gains, metric=metric, ax=ax)
    for ax in panels[:-1]:
        ax.get_legend().remove()
    last: Axes = panels[-1]
    return last
