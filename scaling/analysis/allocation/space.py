"""What an allocation is chosen in, and the textbook's case: compute is a product of factors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pandas as pd

from scaling.analysis.allocation.minimise import Axis
from scaling.analysis.allocation.trend import AllocationError, Array, Mask

SOLVE_STEPS = 100
SOLVED = 1e-13
"""A cost is the budget when its logarithm differs by no more than this."""


class Space(Protocol):
    """What may be chosen, what it costs, and the columns that a law reads."""

    @property
    def names(self) -> tuple[str, ...]:
        """Quantities that are chosen, K of them."""

    @property
    def compute(self) -> str:
        """Name of the column of the cost."""

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Lower and upper limit of each quantity; equal where it is fixed."""

    def axes(self, budget: float) -> tuple[Axis, ...]:
        """Coordinates of the search; all other quantities follow from them and the budget."""

    def spend(self, at: Array, budget: float) -> tuple[Array, Mask]:
        """Quantities ``[m, K]`` at coordinates ``[m, d]``, one of them as large as budget and limit
        allow; and whether that is possible."""

    def raised(self, quantities: Array, name: str, budget: float) -> Array:
        """Quantities ``[m, K]`` with one of them as large as budget and limit allow."""

    def columns(self, quantities: Array) -> pd.DataFrame:
        """Factor columns and cost of quantities ``[m, K]``."""


@dataclass(frozen=True)
class ProductSpace:
    """Compute is ``unit`` times the product of the factors, each to its power.

    Attributes:
        factors: columns of the law, at least two, with their limits.
        unit: C where all factors are 1; 6 for FLOPs of parameters and tokens.
        compute: name of the column C.
        powers: power of a factor in C; 1 where none is given.

    Raises:
        AllocationError: fewer than two factors, limits that are none, or nothing to choose.
    """

    factors: Mapping[str, tuple[float, float]]
    unit: float = 6.0
    compute: str = "flops"
    powers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.factors) < 2:
            raise AllocationError(f"{', '.join(self.factors)}: compute is of at least two factors")
        check_bounds(self.factors)
        if not self._free:
            raise AllocationError(f"{', '.join(self.factors)} are all fixed")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.factors)

    @property
    def _free(self) -> list[str]:
        return [name for name, (low, high) in self.factors.items() if high > low]

    def bounds(self) -> dict[str, tuple[float, float]]:
        return dict(self.factors)

    def axes(self, budget: float) -> tuple[Axis, ...]:
        ends = ((name, self.factors[name]) for name in self._free[1:])
        return tuple(Axis(name, (np.log(low), np.log(high))) for name, (low, high) in ends)

    def spend(self, at: Array, budget: float) -> tuple[Array, Mask]:
        first, *searched = self._free
        given = dict(zip(searched, np.exp(at.T), strict=True))
        low, high = self.factors[first]
        start = [given.get(n, np.full(len(at), self.factors[n][0])) for n in self.names]
        cost = self.columns(np.column_stack(start))[self.compute].to_numpy()
        value = low * (budget / cost) ** (1 / self.powers.get(first, 1.0))
        start[self.names.index(first)] = np.clip(value, low, high)
        return np.column_stack(start), value >= low * (1 - SOLVED)

    def raised(self, quantities: Array, name: str, budget: float) -> Array:
        k, power = self.names.index(name), self.powers.get(name, 1.0)
        room = (budget / self.columns(quantities)[self.compute].to_numpy()) ** (1 / power)
        raised = quantities.copy()
        raised[:, k] = np.minimum(quantities[:, k] * np.maximum(room, 1.0), self.factors[name][1])
        return raised

    def columns(self, quantities: Array) -> pd.DataFrame:
        powers = np.array([self.powers.get(name, 1.0) for name in self.factors])
        table = pd.DataFrame(quantities, columns=list(self.factors))
        return table.assign(**{self.compute: self.unit * np.prod(quantities**powers, axis=1)})


def varying(bounds: Mapping[str, tuple[float, float]]) -> list[str]:
    """Quantities whose limits leave something to choose."""
    return [name for name, (low, high) in bounds.items() if high > low * (1 + 1e-12)]


def check_bounds(bounds: Mapping[str, tuple[float, float]]) -> None:
    """Refuse limits that are not 0 < lower <= upper.

    Raises:
        AllocationError: names the quantity.
    """
    for name, (low, high) in bounds.items():
        if not 0 < low <= high < np.inf:
            raise AllocationError(f"{name}: limits {low:g} to {high:g} are not 0 < lower <= upper")


def largest(
    cost: Callable[[Array], Array], low: Array, high: Array, budget: float
) -> tuple[Array, Mask]:
    """Largest logarithm in ``[low, high]`` whose cost is within the budget, where cost grows.

    The Illinois variant of regula falsi on ln cost, all points at once.

    Args:
        cost: of logarithms ``[m]``.
        low, high: ``[m]``.

    Returns:
        The logarithms ``[m]``, and whether even ``low`` is within the budget.
    """
    target = np.log(budget)
    a, b = low.copy(), high.copy()
    fa, fb = np.log(cost(a)) - target, np.log(cost(b)) - target
    possible, all_in = fa <= SOLVED, fb <= 0
    x = np.where(all_in, b, a)
    open_ = possible & ~all_in & (fa < -SOLVED)
    side = np.zeros(len(a), dtype=np.int8)
    for _ in range(SOLVE_STEPS):
        if not open_.any():
            break
        middle = np.where(open_, b - fb * (b - a) / np.where(fb == fa, 1.0, fb - fa), x)
        f = np.log(cost(middle)) - target
        x = np.where(open_, middle, x)
        right, left = open_ & (f > 0), open_ & (f <= 0)
        b, fb = np.where(right, middle, b), np.where(right, f, fb)
        fa = np.where(right & (side == 1), fa / 2, fa)
        a, fa = np.where(left, middle, a), np.where(left, f, fa)
        fb = np.where(left & (side == -1), fb / 2, fb)
        side = np.where(right, 1, np.where(left, -1, side)).astype(np.int8)
        open_ = open_ & (np.abs(f) > SOLVED) & (b - a > SOLVED)
    return x, possible
