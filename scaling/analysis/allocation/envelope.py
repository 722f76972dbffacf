"""Approach 1 of Hoffmann et al. 2022 (section 3.1): optima on the compute frontier."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling.analysis.allocation.trend import (
    AllocationError,
    Array,
    Mask,
    Trend,
    cluster_weights,
    column,
    positive_rows,
    trend_of,
)
from scaling.analysis.fitting.frontier import on_frontier

CURVE_POINTS = 1500
"""Levels of compute at which curves are compared (Hoffmann et al. 2022, section 3.1)."""
CENSORED = 0.25
"""Warn when more than this share of the optima sits at an end of the factor's range."""
CHUNK = 2**24
"""Entries of the largest temporary array."""

Kind = Literal["rows", "hull", "curves"]


def envelope(
    df: pd.DataFrame,
    *,
    factor: str,
    compute: str = "pf_days",
    y: str = "loss",
    kind: Kind = "rows",
    curve: str = "run_key",
    n_boot: int = 1000,
    cluster: str | None = "auto",
    seed: int = 0,
) -> Trend:
    """Fit ln x over ln C along the lower envelope of the loss.

    Args:
        kind: what the envelope is made of. ``rows``: rows that no other beats at equal or smaller
            C; ``hull``: of these the lower convex hull in ln C and ln y (McLeish et al. 2025,
            Gemstones); ``curves``: the best of the runs' curves at ``CURVE_POINTS`` levels of C
            (Hoffmann et al. 2022), y and ln x interpolated in ln C.
        curve: of ``curves``, the column that tells runs apart.
        n_boot: bootstrap draws. Each takes the envelope of its own runs, so that the interval
            includes the choice of the points.
        cluster: column of the units that are resampled; ``auto``: ``run_key`` where the table has
            it; None: every row.

    Returns:
        The trend; where none can be fitted, one that says why. The envelope follows the luckiest
        of noisy runs, and coarse levels of the factor make steps of it.

    Raises:
        AllocationError: a column is missing or without a positive number.

    Example:
        >>> c = np.geomspace(1e-3, 1, 7)
        >>> runs = pd.DataFrame({"pf_days": c, "n_total": 1e6 * c**0.5, "loss": c**-0.1})
        >>> round(envelope(runs, factor="n_total", n_boot=0).exponent, 9)
        0.5
    """
    rows = positive_rows(df, (factor, compute, y))
    weights, tail = cluster_weights(rows, cluster, n_boot, seed)
    log_c, log_x, loss = (
        np.log(column(rows, compute)),
        np.log(column(rows, factor)),
        column(rows, y),
    )
    refused = f"{factor} is the same in every row" if np.ptp(log_x) == 0 else None
    if kind == "curves":
        if curve not in rows:
            raise AllocationError(
                f"the table has no column {curve!r} that tells the curves apart; its columns: "
                f"{', '.join(map(str, df.columns))}"
            )
        codes = pd.factorize(rows[curve])[0]
        at, best, value, present = _along_curves(codes, log_c, log_x, loss, weights)
    else:
        mask = on_frontier(log_c, loss, weights > 0)
        if kind == "hull":
            mask &= _lower_hulls(mask, log_c, np.log(loss))
        at, best = np.broadcast_to(log_c, mask.shape), np.broadcast_to(log_x, mask.shape)
        value, present = np.broadcast_to(loss, mask.shape), weights * mask
    there = present[0] > 0
    points = pd.DataFrame(
        {
            compute: np.exp(at[0][there]),
            factor: np.exp(best[0][there]),
            y: value[0][there],
            "reason": None,
        }
    ).sort_values(compute, ignore_index=True)
    warnings = _censored(best[0][there], log_x, factor)
    return trend_of(
        1, factor, compute, points, at, best, present, tail=tail, refused=refused, warnings=warnings
    )


def _lower_hulls(mask: Mask, log_c: Array, log_y: Array) -> Mask:
    """Which points of each row of ``mask`` lie on the lower convex hull of that row's points.

    The points are on a frontier, so that y falls as C grows; Andrew's monotone chain.
    """
    order = np.argsort(log_c, kind="stable")
    hull = np.zeros_like(mask)
    for row, keep in zip(mask, hull, strict=True):
        chain: list[int] = []
        for i in order[row[order]]:
            while len(chain) > 1 and _above(chain[-2], chain[-1], i, log_c, log_y):
                chain.pop()
            chain.append(int(i))
        keep[chain] = True
    return hull


def _above(a: int, b: int, c: int, x: Array, y: Array) -> bool:
    """Whether point b lies on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))


def _along_curves(
    codes: npt.NDArray[np.intp],
    log_c: Array,
    log_x: Array,
    loss: Array,
    weights: Array,
) -> tuple[Array, Array, Array, Array]:
    """At each level of compute the run with the lowest loss, for every draw.

    Returns:
        ln C, ln x, loss and weight, each ``[1 + draws, CURVE_POINTS]``; weight 0 where no run of a
        draw has that compute.
    """
    levels = np.linspace(log_c.min(), log_c.max(), CURVE_POINTS)
    runs = int(codes.max()) + 1
    y = np.full((runs, CURVE_POINTS), np.inf)
    x = np.zeros((runs, CURVE_POINTS))
    count = np.zeros((len(weights), runs))
    for run in range(runs):
        own = np.flatnonzero(codes == run)
        own = own[np.argsort(log_c[own], kind="stable")]
        y[run] = np.interp(levels, log_c[own], loss[own], left=np.inf, right=np.inf)
        x[run] = np.interp(levels, log_c[own], log_x[own])
        count[:, run] = weights[:, own].max(axis=1)
    order = np.argsort(y, axis=0)
    best = np.empty((len(weights), CURVE_POINTS), dtype=np.intp)
    chunk = max(1, CHUNK // y.size)
    for start in range(0, len(weights), chunk):
        there = count[start : start + chunk, order] > 0  # [chunk, runs by loss, levels]
        first = there.argmax(axis=1)
        best[start : start + chunk] = order[first, np.arange(CURVE_POINTS)]
    at = np.broadcast_to(levels, best.shape)
    chosen = y[best, np.arange(CURVE_POINTS)]
    weight = np.where(np.isfinite(chosen), np.take_along_axis(count, best, axis=1), 0.0)
    return at, x[best, np.arange(CURVE_POINTS)], chosen, weight


def _censored(best: Array, log_x: Array, factor: str) -> tuple[str, ...]:
    """Warnings of optima that the range of the factor may have cut off."""
    said = []
    for end, name in ((log_x.min(), "smallest"), (log_x.max(), "largest")):
        share = float(np.mean(np.isclose(best, end)))
        if share > CENSORED:
            said.append(
                f"{share:.0%} of the frontier has the {name} {factor}, {np.exp(end):.6g}: better "
                "values may lie beyond, and the exponent is biased towards 0"
            )
    return tuple(said)
