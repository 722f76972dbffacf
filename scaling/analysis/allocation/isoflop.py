"""Approach 2 of Hoffmann et al. 2022 (section 3.2): minima of IsoFLOP profiles.

The vertex of a parabola is not the minimum of a profile that is no parabola. On noise-free sums of
power laws the vertex is off where the two exponents differ, the more so the wider the profile and
the further its middle lies from the minimum (Czech et al. 2026); ``approaches`` measures this bias
on the joint law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling.analysis.allocation.trend import (
    Array,
    Trend,
    cluster_weights,
    column,
    positive_rows,
    trend_of,
)

TOLERANCE = 0.1
"""Runs within this relative distance count as equal in compute (Porian et al. 2024 use 10 %)."""
LEAST_LEVELS = 3
"""Levels of the factor that a parabola needs."""
WIDE = 16.0
"""Warn of a profile whose factor varies by more than this: the vertex of a wide one is biased."""
OFF_CENTRE = 0.25
"""Warn of a vertex further from the middle of its profile than this share of half its width."""


@dataclass(frozen=True, eq=False)
class Slice:
    """One IsoFLOP profile.

    Attributes:
        compute: geometric mean of its rows' C.
        profile: levels of the factor under its name, ascending, the lowest ``y`` at each, and the
            number of ``rows`` behind it.
        curve: the parabola: ``(a, b, c)`` of a + b z + c z^2 with z = ln x - ``centre``; None where
            none was fitted.
        centre: middle of the profile in ln x.
        vertex: x at the minimum; None where there is none.
        refused: why the vertex is not used; None where it is.
    """

    compute: float
    profile: pd.DataFrame
    curve: tuple[float, float, float] | None
    centre: float
    vertex: float | None
    refused: str | None

    def at(self, x: Array) -> Array:
        """The parabola at x; NaN where none was fitted."""
        z = np.log(x) - self.centre
        a, b, c = self.curve or (np.nan,) * 3
        return np.asarray(a + b * z + c * z**2)


@dataclass(frozen=True, eq=False)
class IsoFlop(Trend):
    """A trend of vertices, with the profiles that they are of."""

    slices: tuple[Slice, ...]

    def to_dict(self) -> dict[str, Any]:
        """As ``Trend.to_dict``, with the profiles."""
        slices = [
            {
                "compute": s.compute,
                "profile": s.profile.to_dict("records"),
                "curve": list(s.curve) if s.curve else None,
                "centre": s.centre,
                "vertex": s.vertex,
                "refused": s.refused,
            }
            for s in self.slices
        ]
        return {**super().to_dict(), "slices": slices}


def isoflop(
    df: pd.DataFrame,
    *,
    factor: str,
    compute: str = "pf_days",
    y: str = "loss",
    others: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    budgets: Sequence[float] | None = None,
    n_boot: int = 1000,
    cluster: str | None = "auto",
    seed: int = 0,
) -> IsoFlop:
    """Fit a parabola in ln x to the loss at each level of compute, and a line through the vertices.

    Rows that agree in the factor and in ``others`` are replicates: their mean counts. Of the rows
    that share only the factor's level the lowest counts, as the other factors are free.

    Args:
        others: the other factors that make up C; none if C and x decide them.
        tolerance: relative distance within which compute counts as equal.
        budgets: levels of compute; None: found, from the smallest C on a new level begins where a
            row is more than the tolerance above the level's first.
        n_boot, cluster: as of ``envelope``.

    Returns:
        The trend, with one ``Slice`` a level. A vertex is refused where the profile has fewer than
        ``LEAST_LEVELS`` levels, curves downwards, or has its lowest row or its vertex at an end.

    Raises:
        AllocationError: a column is missing or without a positive number.

    Example:
        >>> x, c = np.meshgrid(np.geomspace(1, 100, 9), [25.0, 100.0, 400.0])
        >>> loss = (np.log(x) - 0.5 * np.log(c)) ** 2 + 1
        >>> df = pd.DataFrame({"x": x.ravel(), "c": c.ravel(), "loss": loss.ravel()})
        >>> round(isoflop(df, factor="x", compute="c", n_boot=0).exponent, 9)
        0.5
    """
    rows = positive_rows(df, (factor, compute, y, *others))
    weights, tail = cluster_weights(rows, cluster, n_boot, seed)
    log_c = np.log(column(rows, compute))
    labels = _levels(log_c, tolerance, budgets)
    slices, at, vertices, good = [], [], [], []
    for level in range(int(labels.max(initial=-1)) + 1):
        own = labels == level
        if not own.any():
            continue
        part, vertex, valid = _slice(rows[own], weights[:, own], factor, compute, y, others)
        slices.append(part)
        at.append(np.full(len(weights), np.log(part.compute)))
        vertices.append(vertex)
        good.append(valid)
    used = [s for s in slices if s.refused is None]
    points = pd.DataFrame(
        {
            compute: [s.compute for s in slices],
            factor: [s.vertex for s in slices],
            y: [None if s.vertex is None else float(s.at(np.array(s.vertex))) for s in slices],
            "reason": [s.refused for s in slices],
        }
    )
    refused = None
    if len(used) < 3:
        counts = pd.Series([s.refused for s in slices if s.refused], dtype=object).value_counts()
        why = "".join(f"; {n} refused: {reason}" for reason, n in counts.items())
        refused = (
            f"{len(used)} of {len(slices)} IsoFLOP profiles have a minimum, needs at least 3{why}"
        )
    shape = (len(weights), len(slices))
    base = trend_of(
        2, factor, compute, points,
        np.array(at).T.reshape(shape), np.array(vertices).T.reshape(shape),
        np.array(good, dtype=np.float64).T.reshape(shape),
        tail=tail, refused=refused, warnings=_warnings(used, factor),
    )  # fmt: skip
    return IsoFlop(**vars(base), slices=tuple(slices))


def _levels(
    log_c: Array, tolerance: float, budgets: Sequence[float] | None
) -> npt.NDArray[np.intp]:
    """``[rows]`` number of each row's level of compute; -1 for none."""
    reach = np.log1p(tolerance)
    if budgets is not None:
        distance = np.abs(log_c[:, None] - np.log(np.asarray(budgets, dtype=np.float64)))
        nearest = distance.argmin(axis=1)
        return np.where(distance.min(axis=1) <= reach, nearest, -1)
    labels = np.empty(len(log_c), dtype=np.intp)
    level, first = -1, -np.inf
    for i in np.argsort(log_c, kind="stable"):
        if log_c[i] > first + reach:
            level, first = level + 1, log_c[i]
        labels[i] = level
    return labels


def _slice(
    rows: pd.DataFrame, weights: Array, factor: str, compute: str, y: str, others: Sequence[str]
) -> tuple[Slice, Array, npt.NDArray[np.bool_]]:
    """A profile, and for every draw its vertex in ln x and whether it is one.

    Args:
        weights: ``[1 + draws, rows]``.
    """
    cells = rows.groupby([factor, *others], sort=True).ngroup().to_numpy()
    count = np.zeros((len(weights), cells.max() + 1))
    total = np.zeros_like(count)
    loss = column(rows, y)
    for cell in range(count.shape[1]):
        own = cells == cell
        count[:, cell] = weights[:, own].sum(axis=1)
        total[:, cell] = weights[:, own] @ loss[own]
    mean = np.divide(total, count, out=np.full_like(total, np.inf), where=count > 0)
    first = np.array([np.flatnonzero(cells == k)[0] for k in range(count.shape[1])])
    levels, level = np.unique(column(rows, factor)[first], return_inverse=True)
    lowest = np.full((len(weights), len(levels)), np.inf)
    weight = np.zeros_like(lowest)
    for k in range(len(levels)):
        own = np.flatnonzero(level == k)
        best = own[mean[:, own].argmin(axis=1)]
        lowest[:, k] = np.take_along_axis(mean, best[:, None], axis=1)[:, 0]
        weight[:, k] = np.take_along_axis(count, best[:, None], axis=1)[:, 0]
    log_x = np.log(levels)
    centre = float(log_x[[0, -1]].mean())
    curves, vertex, reason = _parabolas(log_x - centre, lowest, weight)
    words = {
        "few": f"{len(levels)} levels of {factor}, a parabola needs {LEAST_LEVELS}",
        "down": "it curves downwards",
        "low": f"its lowest row has its smallest {factor}: the minimum may lie below",
        "high": f"its lowest row has its largest {factor}: the minimum may lie above",
        "outside": f"its vertex lies outside its range of {factor}",
        "": None,
    }
    fitted = reason[0] != "few"
    return (
        Slice(
            compute=float(np.exp(np.log(column(rows, compute)).mean())),
            profile=pd.DataFrame({factor: levels, y: lowest[0], "rows": weight[0].astype(int)}),
            curve=(float(curves[0, 0]), float(curves[0, 1]), float(curves[0, 2]))
            if fitted
            else None,
            centre=centre,
            vertex=float(np.exp(vertex[0] + centre)) if not reason[0] else None,
            refused=words[str(reason[0])],
        ),
        vertex + centre,
        reason == "",
    )


def _parabolas(z: Array, y: Array, weight: Array) -> tuple[Array, Array, npt.NDArray[np.str_]]:
    """Weighted parabolas of each row of ``y``: coefficients ``[S, 3]``, vertices ``[S]``, and why a
    vertex is none (empty where it is one).

    Args:
        z: ``[levels]`` ascending.
        y, weight: ``[S, levels]``; no weight where a level is absent.
    """
    there = weight > 0
    reason = np.full(len(y), "", dtype="<U8")
    reason[there.sum(axis=1) < LEAST_LEVELS] = "few"
    basis = np.stack([np.ones_like(z), z, z**2], axis=1)
    normal = np.einsum("sm,mi,mj->sij", weight, basis, basis)
    right = np.einsum("sm,mi,sm->si", weight, basis, np.where(there, y, 0.0))
    normal[reason == "few"] = np.eye(3)
    curves: Array = np.linalg.solve(normal, right[..., None])[..., 0]
    upwards = curves[:, 2] > 0
    reason[(reason == "") & ~upwards] = "down"
    vertex = -curves[:, 1] / np.where(upwards, 2 * curves[:, 2], 1.0)
    low = np.where(there, z, np.inf).min(axis=1)
    high = np.where(there, z, -np.inf).max(axis=1)
    best = z[np.where(there, y, np.inf).argmin(axis=1)]
    for name, true in (
        ("low", best == low),
        ("high", best == high),
        ("outside", (vertex <= low) | (vertex >= high)),
    ):
        reason[(reason == "") & true] = name
    return curves, vertex, reason


def _warnings(used: Sequence[Slice], factor: str) -> tuple[str, ...]:
    """What biases the vertices of the profiles in use."""
    wide = off = thin = 0
    for part in used:
        levels = column(part.profile, factor)
        half = np.log(levels[-1] / levels[0]) / 2
        wide += levels[-1] / levels[0] > WIDE
        thin += len(levels) == LEAST_LEVELS
        off += abs(np.log(part.vertex or np.nan) - part.centre) > OFF_CENTRE * half
    said = {
        f"span more than a factor {WIDE:g} in {factor}, which biases the vertex, and the exponent "
        "too where widths differ": wide,
        "are not centred on their minimum, which biases the vertex, and the exponent too where "
        "this drifts with compute": off,
        "have 3 levels, so that nothing tells whether they are parabolas": thin,
    }
    return tuple(f"{n} of {len(used)} profiles {text}" for text, n in said.items() if n)
