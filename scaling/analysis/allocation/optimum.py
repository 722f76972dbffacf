"""The allocation of a budget that a law says is best, how sure that is, and how little it matters.

The smallest loss is sought among everything that the budget and the limits allow, once under the
law and once under each of its bootstrap draws. Spending less than the budget is allowed, and found
where a law has its loss rise with repetition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from scaling.analysis.allocation.minimise import Axis, crossed, minimise
from scaling.analysis.allocation.space import Space
from scaling.analysis.allocation.trend import AllocationError, Array, Mask, Trend, trend_of
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.record import plain

WITHIN = 0.01
"""Relative excess loss that still counts as optimal."""
DRAWS = 400
"""Bootstrap draws that are solved at most: enough for a 95 % interval."""
FRONTIER_DRAWS = 200
"""The same for each of many budgets."""
AT_LIMIT = 1e-3
"""A quantity is at its limit when its logarithm is this close."""
REGION_NODES = {0: 1, 1: 801, 2: 121, 3: 33}
"""Points an axis on which the region is measured."""
CHEAPEST = 0.02
"""Smallest share of the budget that is considered when asking what a little loss saves."""


class Law(Protocol):
    """A fitted law (``LawFit``), or a planted one."""

    def predict(self, x: pd.DataFrame, level: float | None = None) -> pd.DataFrame:
        """A table with a column ``y``, a row for each of ``x``."""

    def predict_draws(self, x: pd.DataFrame) -> Array:
        """``[draws, rows]`` the law under every bootstrap draw; no rows without a bootstrap."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """The best use of a budget.

    Attributes:
        budget: what may be spent, in the unit of ``compute``.
        compute: column of the cost.
        names: the quantities chosen.
        point: all columns at the optimum, and ``loss``.
        draws: optimum under each bootstrap draw: the quantities and ``loss``.
        limits: lower and upper limit of each quantity.
        region: for each quantity ``low`` and ``high`` between which the whole budget can be spent
            at a loss at most ``within`` above the lowest.
        within: that relative excess.
        cheapest: smallest share of the budget whose own optimum is within the region's loss.
        tail: share of the draws beyond either end of the 95 % interval (``intervals.tail``).
        warnings: what a reader must know before using the numbers.
    """

    budget: float
    compute: str
    names: tuple[str, ...]
    point: "pd.Series[float]"
    draws: pd.DataFrame
    limits: dict[str, tuple[float, float]]
    region: pd.DataFrame
    within: float
    cheapest: float
    tail: float
    warnings: tuple[str, ...]

    def summary(self) -> pd.DataFrame:
        """One row a quantity, and ``loss``.

        Columns: ``optimum``, ``lower`` and ``upper`` (95 %), ``region_low`` and ``region_high``,
        ``at_limit`` (share of draws at either limit).
        """
        rows = {}
        for name in (*self.names, "loss"):
            row = {"optimum": float(self.point[name])}
            if len(self.draws) > 1:
                ends = np.quantile(self.draws[name], [self.tail, 1 - self.tail])
                row |= {"lower": float(ends[0]), "upper": float(ends[1])}
            if name in self.limits:
                row |= {f"region_{end}": float(self.region[end][name]) for end in ("low", "high")}
                if len(self.draws) > 1:
                    row["at_limit"] = float(self._at_limit(name).mean())
            rows[name] = row
        columns = ["optimum", "lower", "upper", "region_low", "region_high", "at_limit"]
        return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """As one JSON value."""
        return {
            "budget": self.budget,
            "compute": self.compute,
            "point": {str(k): float(v) for k, v in self.point.items()},
            "draws": len(self.draws),
            "limits": {name: list(pair) for name, pair in self.limits.items()},
            "quantities": {
                str(name): {str(k): plain(v) for k, v in row.items()}
                for name, row in self.summary().iterrows()
            },
            "within": self.within,
            "cheapest": self.cheapest,
            "warnings": list(self.warnings),
        }

    def _at_limit(self, name: str) -> Mask:
        values = np.log(self.draws[name].to_numpy(dtype=np.float64))
        low, high = np.log(self.limits[name])
        return np.asarray((high > low) & ((values - low < AT_LIMIT) | (high - values < AT_LIMIT)))


def allocate(
    law: Law,
    space: Space,
    budget: float,
    *,
    within: float = WITHIN,
    draws: int = DRAWS,
) -> Allocation:
    """Choose the quantities of a space that minimise a law within a budget.

    Args:
        law: reads columns of ``space.columns``.
        budget: in the unit of ``space.compute``. [PF-days, for a ``Workload``]
        within: relative excess loss that counts as optimal, for the region.
        draws: bootstrap draws to solve, the first so many of the law's; 0 for none.

    Returns:
        The optimum with its draws and its region.

    Raises:
        AllocationError: nothing within the limits costs as little as the budget, the law is not a
            positive number there, or the budget is not positive.
    """
    if not 0 < budget < np.inf:
        raise AllocationError(f"budget = {budget:g}; valid: positive and finite")
    quantities, loss = solve(law, space, budget)
    point = space.columns(quantities).iloc[0].astype(float)
    point["loss"] = loss[0]
    if loss[0] <= 0:
        raise AllocationError(f"the law gives a loss of {loss[0]:g} at its optimum")
    found = pd.DataFrame(columns=[*space.names, "loss"], dtype=np.float64)
    if draws:
        each, losses = solve(law, space, budget, draws=draws)
        found = pd.DataFrame(each, columns=list(space.names)).assign(loss=losses)
    limits = space.bounds()
    return Allocation(
        budget=budget,
        compute=space.compute,
        names=space.names,
        point=point,
        draws=found,
        limits=limits,
        region=_region(law, space, budget, (1 + within) * loss[0], quantities[0]),
        within=within,
        cheapest=_cheapest(law, space, budget, (1 + within) * loss[0]),
        tail=interval_tail(law),
        warnings=_warnings(space, budget, point, limits),
    )


def solve(law: Law, space: Space, budget: float, *, draws: int = 0) -> tuple[Array, Array]:
    """Quantities ``[S, K]`` and losses ``[S]`` at the optimum, of the law itself (S = 1) or of the
    first ``draws`` of its bootstrap draws.

    Raises:
        AllocationError: as ``allocate``.
    """

    def value(at: Array) -> Array:
        quantities, possible = space.spend(at, budget)
        values = evaluate(law, space.columns(quantities), draws)
        return np.where(possible, values, np.inf)

    if draws and not len(law.predict_draws(space.columns(_corner(space)))):
        return np.empty((0, len(space.names))), np.empty(0)
    at, losses = minimise(value, space.axes(budget))
    quantities = space.spend(at, budget)[0]
    for name in space.names:  # where a limit ends the search a little short of the budget
        raised = space.raised(quantities, name, budget)
        new = evaluate(law, space.columns(raised), draws).diagonal()
        better = new < losses
        quantities = np.where(better[:, None], raised, quantities)
        losses = np.where(better, new, losses)
    return quantities, losses


def evaluate(law: Law, table: pd.DataFrame, draws: int = 0) -> Array:
    """``[1, rows]`` the law, or ``[S, rows]`` its first draws."""
    if draws:
        return np.asarray(law.predict_draws(table)[:draws], dtype=np.float64)
    return law.predict(table, level=None)["y"].to_numpy(dtype=np.float64)[None]


@dataclass(frozen=True, eq=False)
class Frontier:
    """Optima over budgets.

    Attributes:
        table: one row a budget: the cost's column, each quantity and ``loss`` at the optimum, with
            ``<name>_lower`` and ``<name>_upper`` (95 %) where the law has draws.
        trends: per quantity, how it grows with compute (approach 3).
    """

    table: pd.DataFrame
    compute: str
    names: tuple[str, ...]
    trends: dict[str, Trend]

    def to_dict(self) -> dict[str, Any]:
        """As one JSON value."""
        return {
            "compute": self.compute,
            "table": self.table.to_dict("records"),
            "trends": {name: trend.to_dict() for name, trend in self.trends.items()},
        }


def frontier(
    law: Law, space: Space, budgets: Sequence[float] | Array, *, draws: int = FRONTIER_DRAWS
) -> Frontier:
    """Optima at several budgets, and the power of compute with which each quantity grows.

    A power is exact for a sum of powers of factors whose product is compute; with exact FLOPs or
    limits in reach the optima bend, and the exponent is their mean over the budgets.

    Raises:
        AllocationError: as ``allocate``.
    """
    levels = np.sort(np.asarray(budgets, dtype=np.float64))
    rows, every, tail = [], [], interval_tail(law)
    for budget in levels:
        quantities, loss = solve(law, space, budget)
        each, losses = (
            solve(law, space, budget, draws=draws) if draws else (quantities[:0], loss[:0])
        )
        stacked = np.column_stack([np.vstack([quantities, each]), np.append(loss, losses)])
        row = {space.compute: float(budget)}
        for k, name in enumerate((*space.names, "loss")):
            row[name] = float(stacked[0, k])
            if len(each) > 1:
                low, high = np.quantile(stacked[1:, k], [tail, 1 - tail])
                row |= {f"{name}_lower": float(low), f"{name}_upper": float(high)}
        rows.append(row)
        every.append(stacked)
    table = pd.DataFrame(rows)
    logs = np.log(np.array(every))  # [budgets, 1 + draws, K + 1]
    log_c = np.broadcast_to(np.log(levels), logs.shape[1::-1])
    trends = {}
    limits = space.bounds()
    for k, name in enumerate(space.names):
        low, high = limits[name]
        points = table[[space.compute, name, "loss"]].assign(reason=None)
        held = np.mean(
            [x >= high * (1 - AT_LIMIT) or x <= low * (1 + AT_LIMIT) for x in table[name]]
        )
        trends[name] = trend_of(
            3, name, space.compute, points, log_c, logs[:, :, k].T, np.ones(log_c.shape),
            tail=tail, refused=f"{name} is fixed" if low == high
            else f"{name} is at a limit at every budget" if held == 1 else None,
            warnings=(f"{name} is at a limit at {held:.0%} of the budgets",) if 0 < held < 1
            else (),
        )  # fmt: skip
    return Frontier(table, space.compute, space.names, trends)


def interval_tail(law: Law) -> float:
    """Share of the law's draws beyond either end of a 95 % interval."""
    return law.tail() if isinstance(law, LawFit) else 0.025


def _corner(space: Space) -> Array:
    return np.array([[low for low, _ in space.bounds().values()]])


def _region(law: Law, space: Space, budget: float, highest: float, best: Array) -> pd.DataFrame:
    """Range of each quantity over allocations of the budget whose loss is at most ``highest``.

    Measured on a grid over the box, then on one over what the first found.
    """
    axes = space.axes(budget)
    low, high = best.copy(), best.copy()
    for _ in range(2):
        lines = [axis.nodes(REGION_NODES[len(axes)] - 1) for axis in axes]
        at = crossed(lines)
        quantities, possible = space.spend(at, budget)
        losses = evaluate(law, space.columns(quantities))[0]
        good = possible & (losses <= highest)
        if not good.any():
            break
        low = np.minimum(low, quantities[good].min(axis=0))
        high = np.maximum(high, quantities[good].max(axis=0))
        narrowed = []
        for k, axis in enumerate(axes):
            inside = np.flatnonzero(np.isin(lines[k], at[good][:, k]))
            first, last = max(0, inside[0] - 1), min(len(lines[k]) - 1, inside[-1] + 1)
            ends = (float(lines[k][first]), float(lines[k][last]))
            narrowed.append(Axis(axis.name, ends))
        axes = tuple(narrowed)
    return pd.DataFrame({"low": low, "high": high}, index=list(space.names))


def _cheapest(law: Law, space: Space, budget: float, highest: float) -> float:
    """Smallest share of the budget whose optimum has a loss of at most ``highest``, to 0.1 %."""
    least = float(space.columns(_corner(space))[space.compute].iloc[0]) / budget
    low = max(np.log(CHEAPEST), np.log(least) + 1e-6)

    def excess(log_share: float) -> float:
        return float(solve(law, space, budget * np.exp(log_share))[1][0] - highest)

    if low >= 0 or excess(low) <= 0:
        return float(np.exp(min(low, 0.0)))
    return float(np.exp(brentq(excess, low, 0.0, xtol=1e-3)))


def _warnings(
    space: Space, budget: float, point: "pd.Series[float]", limits: dict[str, tuple[float, float]]
) -> tuple[str, ...]:
    said = []
    for name, (low, high) in limits.items():
        if low == high:
            continue
        for limit, which in ((low, "lower"), (high, "upper")):
            if abs(np.log(point[name] / limit)) < AT_LIMIT:
                said.append(f"{name} is at its {which} limit, {limit:.6g}")
    spent = float(point[space.compute])
    if spent < budget * (1 - 1e-6) and "n_users" not in limits:
        said.append(f"{spent / budget:.1%} of the budget is spent: no use of the rest helps")
    return tuple(said)
