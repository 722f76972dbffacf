"""What a law is for: the prediction at a larger budget, and the decision how to spend that budget.

The decision: at C times the compute of a reference run, which size, batch and items per user give
the lowest loss, where compute goes as their product (the paper's formula at fixed steps). If the
law is off by d, the decision taken from it costs

    1/2 d' K d,     K = L_vt' T (T' L_vv T)^-1 T' L_vt

to second order: v are the logarithms of what may be decided, T spans the directions of equal
compute, L_vv and L_vt are derivatives of the law by v, and by v and theta. Its mean over the errors
of a design is ``trace(K covariance) / 2``: the decision regret, which a design can be chosen for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.analysis.design.belief import DesignError, log_jacobian
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.surface import Surface

SIZES = ("n_total", "n_non_embedding", "n_item", "n_service")
BATCHES = ("batch_size", "negatives")
ITEMS = ("items_per_user_mean", "items_per_user", "sequence_length")
GROUPS: tuple[tuple[str, ...], ...] = (SIZES, BATCHES, ITEMS)
"""What is decided: columns of a group move together, and compute with each group."""
SHARES = (0.75, 0.25)
"""Of the decision and of the prediction among the targets."""
GRID = 33
"""Points per axis of the search for the optimum."""
REACH = 10.0
"""How far the optimum is searched beyond the smallest and the largest value of a factor."""
STEP = 1e-3
"""Of the finite differences, in ln x."""


@dataclass(frozen=True, eq=False)
class Space:
    """Configurations around a reference run: what moves, and what follows from it.

    Attributes:
        reference: value of every column at the reference.
        low, high: by group that the law has, ln of the smallest and largest value searched, over
            the reference's.
        users: unique users there are, for ``users_seen`` and ``repeats``; None where the table
            does not say.
        steps: optimiser steps.
    """

    reference: Mapping[str, float]
    groups: tuple[tuple[str, ...], ...]
    low: Array
    high: Array
    users: float | None = None
    steps: float | None = None

    def columns(self, v: Array) -> dict[str, Array]:
        """Columns at ``v [m, d]``, ln of the groups' values over the reference's."""
        out = {c: np.full(len(v), x) for c, x in self.reference.items()}
        for k, group in enumerate(self.groups):
            for c in group:
                if c in out:
                    out[c] = out[c] * np.exp(v[:, k])
        if self.users is not None and self.steps is not None and "batch_size" in out:
            views = self.steps * out["batch_size"]
            out["users_seen"] = np.minimum(self.users, views)
            out["repeats"] = np.maximum(0.0, views / self.users - 1)
        return out

    def equal_compute(self, factor: float, points: int = GRID) -> Array:
        """``[m, d]`` configurations of ``factor`` times the reference's compute, on a grid of
        ``points`` per axis."""
        d = len(self.groups)
        if d == 0:
            raise DesignError("the law has no factor that compute pays for")
        axes = [np.linspace(self.low[k], self.high[k], points) for k in range(d - 1)]
        free = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, d - 1)
        last = np.log(factor) - free.sum(axis=1)
        inside = (last >= self.low[-1] - 1e-9) & (last <= self.high[-1] + 1e-9)
        if not inside.any():
            raise DesignError(
                f"no configuration has {factor:g} times the compute of the reference within "
                f"{REACH:g} times the factors' ranges"
            )
        return np.asarray(np.concatenate([free, last[:, None]], axis=1)[inside])


def best(surface: Surface, theta: Array, space: Space, factor: float) -> Array:
    """``[d]`` configuration of lowest y at ``factor`` times the reference's compute.

    The best point of the grid, then Newton steps along equal compute that stay inside.
    """
    grid = space.equal_compute(factor)
    v = grid[int(np.argmin(surface.values(theta[None], space.columns(grid))[0]))]
    tangent = _tangent(len(v))
    for _ in range(8):
        slope, bend = _derivatives(surface, theta, space, v)
        curvature = tangent.T @ bend @ tangent
        if not len(curvature) or np.linalg.eigvalsh(curvature)[0] <= 0:
            break
        trial = v - tangent @ np.linalg.solve(curvature, tangent.T @ slope)
        at = surface.values(theta[None], space.columns(np.stack([v, trial])))[0]
        inside = (trial >= space.low).all() and (trial <= space.high).all()
        if not inside or not at[1] < at[0]:
            break
        v = trial
    return np.asarray(v)


def regret_matrix(surface: Surface, theta: Array, space: Space, v: Array) -> Array:
    """``[P, P]`` K / L of the module's head, at the optimum v: relative loss of the decision."""
    tangent = _tangent(len(v))
    if tangent.shape[1] == 0:
        return np.zeros((surface.n_free, surface.n_free))
    _, bend = _derivatives(surface, theta, space, v)
    around = v + STEP * np.concatenate([np.eye(len(v)), -np.eye(len(v))])
    x = space.columns(around)
    gradients = surface.jacobian(theta, x)
    mixed = (gradients[: len(v)] - gradients[len(v) :]) / (2 * STEP)
    turned = tangent.T @ mixed
    curvature = tangent.T @ bend @ tangent
    level, axes = np.linalg.eigh(curvature)
    level = np.maximum(level, 1e-3 * abs(level).max() + 1e-12)  # a flat direction costs little
    turned = axes.T @ turned / np.sqrt(level)[:, None]
    loss = float(surface.values(theta[None], space.columns(v[None]))[0, 0])
    return np.asarray(turned.T @ turned / loss)


def target_matrices(surface: Surface, laws: Array, space: Space, factor: float) -> Array:
    """``[T, S, P, P]`` of a design's targets under every law: the decision regret (where there is
    something to decide), then the variance of ln y at the optimum.

    Args:
        laws: ``[S, P]``.
        factor: compute of the target over the reference's.
    """
    regrets, variances = [], []
    for theta in laws:
        v = best(surface, theta, space, factor)
        regrets.append(regret_matrix(surface, theta, space, v))
        g = log_jacobian(surface, theta[None], space.columns(v[None]))[0, 0]
        variances.append(np.outer(g, g))
    if len(space.groups) < 2:
        return np.stack([variances])
    return np.stack([regrets, variances])


def groups_of(columns: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The groups of ``GROUPS`` that a law's columns belong to."""
    return tuple(g for g in GROUPS if any(c in g for c in columns))


def _tangent(d: int) -> Array:
    """``[d, d - 1]`` orthonormal directions of equal compute: orthogonal to (1, ..., 1)."""
    return np.asarray(np.linalg.svd(np.ones((1, d)))[2][1:].T)


def _derivatives(surface: Surface, theta: Array, space: Space, v: Array) -> tuple[Array, Array]:
    """Slope ``[d]`` and second derivatives ``[d, d]`` of y by v, by central differences."""
    d, h = len(v), STEP
    shifts = [np.zeros(d)]
    for i in range(d):
        for j in range(i, d):
            for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                shifts.append(a * h * np.eye(d)[i] + b * h * np.eye(d)[j])
    y = surface.values(theta[None], space.columns(v + np.array(shifts)))[0]
    slope, bend, at = np.empty(d), np.empty((d, d)), 1
    for i in range(d):
        for j in range(i, d):
            pp, pm, mp, mm = y[at : at + 4]
            bend[i, j] = bend[j, i] = (pp - pm - mp + mm) / (4 * h * h)
            if i == j:  # pp and mm are two steps apart on each side
                slope[i] = (pp - mm) / (4 * h)
            at += 4
    return slope, bend
