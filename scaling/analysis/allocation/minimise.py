"""The lowest point of many similar functions over one box, all at once.

The functions are a law under each of its bootstrap draws: smooth, but for kinks at known places (a
user seen a second time) and for a border beyond which they are infinite (the budget). They are only
ever evaluated together, as ``predict_draws`` does: every draw at every point asked for. So the
search works on a lattice, on which draws whose minima lie close together ask for the same points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from scaling.analysis.allocation.trend import AllocationError, Array

CELLS = {0: 0, 1: 96, 2: 32, 3: 14}
"""Lattice cells an axis at the coarsest level, by the number of axes."""
LEVELS = 5
"""Times that the lattice is halved."""
MOVES = 12
"""Steps at most on each level."""
NEWTON_STEPS = 4
"""Newton steps that end the search, where the function is smooth."""
STENCIL = 0.02
"""Spacing of the differences of the first; a quarter of it in each one after. [ln units]"""

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
    every = np.stack(np.meshgrid(*map(np.arange, map(len, nodes)), indexing="ij"), axis=-1)
    index = every.reshape(-1, d)
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
    steps = np.array(list(product((-1, 0, 1), repeat=d)), dtype=np.float64)
    place = {tuple(step): i for i, step in enumerate(steps)}
    middle = place[(0.0,) * d]
    rows = np.arange(len(at))
    for turn in range(NEWTON_STEPS):
        room = np.stack([np.abs(at[:, k, None] - knots[k]).min(axis=1) for k in range(d)], axis=1)
        fixed = room < 1e-9
        h = np.where(fixed, 0.0, np.minimum(room, STENCIL / 4**turn))
        near = at[:, None] + steps * h[:, None]
        # one call for all draws, of which each draw reads its own points
        values = value(near.reshape(-1, d)).reshape(len(at), *near.shape[:2])[rows, rows]
        gradient, hessian = np.zeros((len(at), d)), np.zeros((len(at), d, d))
        spacing = np.where(fixed, 1.0, h)
        for k in range(d):
            up, down = values[:, _at(place, d, k)], values[:, _at(place, d, k, -1)]
            gradient[:, k] = (up - down) / (2 * spacing[:, k])
            hessian[:, k, k] = (up - 2 * values[:, middle] + down) / spacing[:, k] ** 2
            for j in range(k):
                cross = sum(
                    a * b * values[:, place[tuple(_offset(d, {k: a, j: b}))]]
                    for a in (-1, 1)
                    for b in (-1, 1)
                )
                hessian[:, k, j] = hessian[:, j, k] = cross / (4 * spacing[:, k] * spacing[:, j])
        hessian[fixed[:, :, None] | fixed[:, None, :]] = 0.0
        diagonal = np.einsum("skk->sk", hessian)
        diagonal[fixed] = 1.0
        gradient[fixed] = 0.0
        smooth = np.isfinite(values).all(axis=1)
        hessian[~smooth], gradient[~smooth] = np.eye(d), 0.0
        convex = np.linalg.eigvalsh(hessian)[:, 0] > 0
        hessian[~convex], gradient[~convex] = np.eye(d), 0.0
        move = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
        low, high = np.array([k[[0, -1]] for k in knots]).T
        target = np.clip(at + np.clip(move, -10 * STENCIL, 10 * STENCIL), low, high)
        new = value(target)[rows, rows]
        better = new <= best
        at, best = np.where(better[:, None], target, at), np.where(better, new, best)
    return at, best


def _offset(d: int, where: dict[int, int]) -> Array:
    step = np.zeros(d)
    for k, sign in where.items():
        step[k] = sign
    return step


def _at(place: dict[tuple[float, ...], int], d: int, k: int, sign: int = 1) -> int:
    return place[tuple(_offset(d, {k: sign}))]
