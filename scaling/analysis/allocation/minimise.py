"""The lowest point of many similar functions over one box, all at once.

The functions are a law under each of its bootstrap draws: smooth, but for kinks at known places (a
user seen a second time) and for a border beyond which they are infinite (the budget). They are only
ever evaluated together, as ``predict_draws`` does: every draw at every point asked for. So the
search works on a lattice, on which draws whose minima lie close together ask for the same points.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from scaling.analysis.allocation.trend import AllocationError, Array, Mask

CELLS = {0: 0, 1: 96, 2: 32, 3: 14}
"""Lattice cells an axis at the coarsest level, by the number of axes."""
LEVELS = 5
"""Times that the lattice is halved."""
MOVES = 12
"""Steps at most on each level."""
STENCILS = (0.02, 0.02, 0.02, 0.005, 0.00125)
"""Spacings of the differences of the Newton steps that end the search. [ln units]"""
LONGEST = 1.0
"""Length at most of a Newton step. [ln units]"""
SHORTENED = (1.0, 0.3, 0.1)
"""Shares of a Newton step that are tried until the value falls."""

Value = Callable[[Array], Array]
"""Coordinates ``[m, d]`` to values ``[S, m]``, infinite where not allowed."""


@dataclass(frozen=True)
class Axis:
    """One coordinate of the box.

    Attributes:
        name: what it is the logarithm of.
        knots: ascending: lower end, places of kinks, upper end. [ln units]
    """

    name: str
    knots: tuple[float, ...]

    def nodes(self, cells: int) -> Array:
        """Ends of about so many cells, with all knots among them. [ln units]"""
        spans = np.diff(self.knots)
        parts = [
            np.linspace(low, high, max(1, round(cells * span / spans.sum())), endpoint=False)
            for low, high, span in zip(self.knots, self.knots[1:], spans, strict=False)
        ]
        return np.append(np.concatenate(parts), self.knots[-1])


def minimise(value: Value, axes: Sequence[Axis]) -> tuple[Array, Array]:
    """Minima of S functions over a box.

    The best node of a lattice over the whole box, then steps to better neighbours on ever finer
    lattices, then Newton steps by central differences. Knots are nodes of every lattice; a minimum
    on one, or beside the border of what is allowed, is exact to the finest spacing across it.

    Returns:
        Coordinates ``[S, d]`` and values ``[S]``.

    Raises:
        AllocationError: a function has no finite value, or one that is not a number.
    """
    d = len(axes)
    if d not in CELLS:
        raise AllocationError(f"{d} free quantities; at most {max(CELLS)} can be chosen at once")
    nodes = [axis.nodes(CELLS[d]) for axis in axes]
    index = crossed([np.arange(len(n)) for n in nodes])
    found = value(_place(index, nodes, 0))
    if np.isnan(found).any():
        raise AllocationError("the law is not a number somewhere within the limits")
    best = found.min(axis=1)
    if not np.isfinite(best).all():
        raise AllocationError("no allocation within the limits costs as little as the budget")
    index = index[found.argmin(axis=1)]
    if d == 0:
        return np.empty((len(best), 0)), best
    steps = np.array(list(product((-1, 0, 1), repeat=d)))
    for level in range(1, LEVELS + 1):
        index = index * 2
        last = np.array([(len(n) - 1) << level for n in nodes])
        for _ in range(MOVES):
            near = np.clip(index[:, None] + steps, 0, last)
            unique, where = np.unique(near.reshape(-1, d), axis=0, return_inverse=True)
            own = np.take_along_axis(
                value(_place(unique, nodes, level)), where.reshape(near.shape[:2]), axis=1
            )
            step = own.argmin(axis=1)
            lowest = np.take_along_axis(own, step[:, None], axis=1)[:, 0]
            moved = lowest < best
            if not moved.any():
                break
            index = np.where(moved[:, None], near[np.arange(len(near)), step], index)
            best = np.minimum(best, lowest)
    return _polish(value, _place(index, nodes, LEVELS), best, axes)


def crossed(lines: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """``[m, d]`` every combination of d lists of values, the last fastest; one of none."""
    if not lines:
        return np.empty((1, 0))
    return np.stack([mesh.ravel() for mesh in np.meshgrid(*lines, indexing="ij")], axis=1)


def _place(index: npt.NDArray[np.intp], nodes: Sequence[Array], level: int) -> Array:
    """Coordinates of lattice points. [m, d]"""
    if not nodes:
        return np.empty((1, 0))
    scaled = index / 2**level
    return np.stack(
        [np.interp(scaled[:, k], np.arange(len(n)), n) for k, n in enumerate(nodes)], axis=1
    )


def _polish(value: Value, at: Array, best: Array, axes: Sequence[Axis]) -> tuple[Array, Array]:
    """Newton steps in the coordinates that are not on a knot; kept where they lower the value."""
    d = len(axes)
    knots = [np.array(axis.knots) for axis in axes]
    low, high = np.array([k[[0, -1]] for k in knots]).T
    steps = np.array(list(product((-1, 0, 1), repeat=d)), dtype=np.float64)
    at, best, rows = at.copy(), best.copy(), np.arange(len(at))
    for stencil in STENCILS:
        room = np.stack([np.abs(at[:, k, None] - knots[k]).min(axis=1) for k in range(d)], axis=1)
        fixed = room < 1e-9
        h = np.where(fixed, 0.0, np.minimum(room, stencil))
        near = at[:, None] + steps * h[:, None]
        # one call for all draws, of which each draw reads its own points
        values = value(near.reshape(-1, d)).reshape(len(at), *near.shape[:2])[rows, rows]
        move = _newton(values, h, fixed)
        length = np.linalg.norm(move, axis=1, keepdims=True)
        move *= np.minimum(1.0, LONGEST / np.maximum(length, LONGEST))
        left = rows
        for share in SHORTENED:
            target = np.clip(at[left] + share * move[left], low, high)
            new = value(target)[left, np.arange(len(left))]
            better = new <= best[left]
            at[left[better]], best[left[better]] = target[better], new[better]
            left = left[~better]
            if not len(left):
                break
    return at, best


def _newton(values: Array, h: Array, fixed: Mask) -> Array:
    """Newton's steps ``[S, d]`` by central differences; none where it would not lead down.

    Args:
        values: ``[S, 3^d]`` over the products of (-h, 0, h), the last coordinate fastest.
        h, fixed: ``[S, d]`` spacings, and the coordinates that are held.
    """
    n, d = h.shape
    smooth: Mask = np.asarray(np.isfinite(values).all(axis=1))
    cube = np.where(smooth[:, None], values, 0.0).reshape(n, *(3,) * d)

    def along(offsets: Mapping[int, int]) -> Array:
        place: Any = (slice(None), *(1 + offsets.get(k, 0) for k in range(d)))
        return np.asarray(cube[place])

    spacing = np.where(fixed, 1.0, h)
    gradient, hessian = np.zeros((n, d)), np.zeros((n, d, d))
    for k in range(d):
        up, down = along({k: 1}), along({k: -1})
        gradient[:, k] = (up - down) / (2 * spacing[:, k])
        hessian[:, k, k] = (up - 2 * along({}) + down) / spacing[:, k] ** 2
        for j in range(k):
            cross = along({k: 1, j: 1}) - along({k: 1, j: -1}) - along({k: -1, j: 1})
            cross = (cross + along({k: -1, j: -1})) / (4 * spacing[:, k] * spacing[:, j])
            hessian[:, k, j] = hessian[:, j, k] = cross
    held: Mask = np.asarray(np.logical_or(fixed, ~smooth[:, None]))
    gradient[held] = 0.0
    hessian[held[:, :, None] | held[:, None, :]] = 0.0
    np.einsum("skk->sk", hessian)[held] = 1.0
    convex = np.linalg.eigvalsh(hessian)[:, 0] > 0
    hessian[~convex], gradient[~convex] = np.eye(d), 0.0
    return -np.asarray(np.linalg.solve(hessian, gradient[..., None])[..., 0])
