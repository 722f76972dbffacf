"""Budgeted active selection of Li et al. 2026, "Spend Less, Fit Better" (arXiv:2604.22753).

Written anew after the paper's abstract and its authors' code (github.com/PlanarG/active-sl,
``mspe.py``). As there: the cheapest runs first (2.5 a parameter, at most 2 % of the pool's price);
then run by run, with a fit from many starts in between. Optima within 1.5 times the best misfit
are clustered by their predictions in the target region (complete linkage of the symmetric
Kullback-Leibler divergence, number of clusters by silhouette) and weighed by BIC; each is a
Gaussian around its optimum (Laplace, prior from the ranges of the parameters). The next run is the
one whose expected fall of the mean squared error over the target region, within and between the
modes, over its price to the power 0.4, is largest.

Not as there: the solver is the project's, with 12 starts and the 4 best earlier optima, where
theirs takes 64 of L-BFGS-B; the quadrature over an outcome has 81 points for 500; and where the
number of runs is limited, the price counts that, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from scaling.analysis.design.belief import columns_of
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.solver import Problem, minimise
from scaling.analysis.fitting.starts import best, scatter
from scaling.analysis.fitting.surface import Surface

INITIAL_PER_PARAMETER, INITIAL_SHARE = 2.5, 0.02
COST_POWER, NEAR, LEAST_WEIGHT, QUADRATURE, SHAPE = 0.4, 1.5, 1e-3, 81, 2.0
STARTS, KEPT = 12, 4
Array = np.ndarray[Any, Any]


def active(
    pool: pd.DataFrame, price: Array, form: str, region: pd.DataFrame,
    look: Callable[[Sequence[int]], Array], budget: float, max_runs: int, cost: Array, seed: int,
) -> list[int]:  # fmt: skip
    """Rows of the pool in the order bought."""
    rng, law = np.random.default_rng(seed), Form.parse(form)
    x = columns_of(law, pool)
    surface = Surface.of(law, x, np.ones(len(pool)))
    most = int(INITIAL_PER_PARAMETER * surface.n_free)
    chosen, spent = list[int](), 0.0
    for i in np.argsort(price):
        if len(chosen) == most or spent + price[i] > min(budget, INITIAL_SHARE * price.sum()):
            break
        chosen.append(int(i))
        spent += price[i]
    kept = np.empty((0, surface.n_free))
    precision = np.diag(1 / _prior_spread(surface) ** 2)
    while len(chosen) < max_runs:
        left = budget - float(price[chosen].sum())
        free = np.setdiff1d(np.flatnonzero(price <= left), chosen)
        if not len(free):
            break
        y = look(chosen)
        seen = {c: v[chosen] for c, v in x.items()}
        problem = Problem(surface, surface.transform(seen), y, log_scale=False)
        ones = np.ones(len(y))
        starts = best(problem, scatter(problem, 40 * STARTS, rng), STARTS, ones)
        minima = minimise(problem, np.concatenate([kept, starts]), ones, tolerance=1e-6,
                          max_iterations=60)  # fmt: skip
        misfit = 2 * minima.objective / len(y)
        order = np.argsort(misfit, kind="stable")
        kept = minima.theta[order[:KEPT]]
        noise = (SHAPE * np.var(y) + len(y) * misfit[order[0]] / 2) / (SHAPE + len(y) / 2 - 1)
        near = order[misfit[order] <= NEAR * misfit[order[0]]]
        modes = _modes(surface, minima.theta[near], misfit[near], seen, region, noise, precision)
        worth = _worth(surface, *modes, {c: v[free] for c, v in x.items()}, region, noise, y)
        chosen.append(int(free[np.argmax(worth / cost[free] ** COST_POWER)]))
    return chosen


def _prior_spread(surface: Surface) -> Array:
    """A quarter of the range of every parameter: E from 0.01 to 10 and exponents from 0.02 to 2 in
    the logarithm, coefficients over ln 2e4, r_star over six e-folds."""
    spread = {"irreducible": np.log(1e3), "exponent": np.log(100), "r_star": 6.0}
    return np.array([spread.get(n.partition(".")[0], np.log(2e4)) for n in surface.names]) / 4


def _jacobian(surface: Surface, theta: Array, x: dict[str, Array]) -> Array:
    """``[K, m, P]`` dy/dtheta, of positive parameters by their logarithms."""
    by = [surface.jacobian(one, x) for one in theta]
    logs = [n.partition(".")[0] in ("irreducible", "exponent") for n in surface.names]
    return np.stack(by) * np.where(logs, np.maximum(theta, 1e-6), 1.0)[:, None, :]


def _modes(
    surface: Surface, theta: Array, misfit: Array, seen: dict[str, Array], region: pd.DataFrame,
    noise: float, precision: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Representatives of the clusters of optima ``[K, P]``, weights ``[K]``, covariances."""
    j = _jacobian(surface, theta, seen)
    covariance = np.linalg.inv(np.swapaxes(j, 1, 2) @ j / noise + precision)
    target = columns_of(surface.form, region)
    mean = surface.values(theta, target)
    jt = _jacobian(surface, theta, target)
    variance = np.einsum("kmp,kpq,kmq->km", jt, covariance, jt, optimize=True) + noise
    labels = _clusters(mean, variance)
    first = np.array([np.flatnonzero(labels == c)[0] for c in np.unique(labels)])  # lowest misfit
    n = len(next(iter(seen.values())))
    log_weight = -0.5 * n * np.log(np.maximum(misfit[first], 1e-300))
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    heavy = weight > LEAST_WEIGHT
    return theta[first[heavy]], weight[heavy] / weight[heavy].sum(), covariance[first[heavy]]


def _clusters(mean: Array, variance: Array) -> Array:
    k = len(mean)
    if k <= 2:
        return np.arange(k)
    far = np.zeros((k, k))
    for a in range(k):
        gap = (mean[a] - mean) ** 2 * (1 / variance[a] + 1 / variance)
        ratio = variance[a] / variance
        far[a] = 0.25 * (ratio + 1 / ratio - 2 + gap).mean(axis=1)
    far = np.log1p(np.clip((far + far.T) / 2, 0, None))
    np.fill_diagonal(far, 0)
    tree = linkage(squareform(far, checks=False), "complete")
    found, score = np.ones(k, dtype=int), 0.01
    for height in np.unique(tree[:, 2]):
        labels = fcluster(tree, height + 1e-10, "distance")
        if 2 <= len(np.unique(labels)) < k and (new := _silhouette(far, labels)) > score:
            found, score = labels, new
    return found


def _silhouette(far: Array, labels: Array) -> float:
    total = 0.0
    for i, own in enumerate(labels):
        same = labels == own
        same[i] = False
        if same.any():
            a = far[i, same].mean()
            b = min(far[i, labels == c].mean() for c in np.unique(labels) if c != own)
            total += (b - a) / max(a, b, 1e-300)
    return total / len(labels)


def _worth(
    surface: Surface, theta: Array, weight: Array, covariance: Array, x: dict[str, Array],
    region: pd.DataFrame, noise: float, y: Array,
) -> Array:  # fmt: skip
    """``[m]`` expected fall of the squared error summed over the region."""
    target = columns_of(surface.form, region)
    jc, jt = _jacobian(surface, theta, x), _jacobian(surface, theta, target)
    at, there = surface.values(theta, x), surface.values(theta, target)
    predictive = noise + np.einsum("kmp,kpq,kmq->km", jc, covariance, jc, optimize=True)
    cross = jt @ covariance @ np.swapaxes(jc, 1, 2)
    within = np.einsum("k,ktm,km->m", weight, cross**2, 1 / predictive)
    if len(theta) == 1:
        return within
    gain = cross / predictive[:, None, :]
    sd = np.sqrt(predictive)
    low = max((at - 4 * sd).min(), 0.0, y.min() - 1)
    grid = np.linspace(low, min((at + 4 * sd).max(), y.max() + 1), QUADRATURE)
    density = np.exp(-0.5 * (grid[None, :, None] - at[:, None]) ** 2 / predictive[:, None])
    density /= np.sqrt(2 * np.pi * predictive[:, None])
    mixture = np.maximum(np.einsum("k,kqm->qm", weight, density), 1e-300)
    middle = weight @ there
    before = float((weight[:, None] * (there - middle) ** 2).sum())
    after = np.zeros(at.shape[1])
    for a in range(len(theta)):
        for b in range(a + 1, len(theta)):
            fixed = (there[a] - there[b])[:, None] - at[a] * gain[a] + at[b] * gain[b]
            slope = gain[a] - gain[b]
            apart = (
                (fixed**2).sum(axis=0)
                + 2 * (fixed * slope).sum(axis=0) * grid[:, None]
                + (slope**2).sum(axis=0) * grid[:, None] ** 2
            )
            overlap = density[a] * density[b] / mixture * apart
            after += weight[a] * weight[b] * np.trapezoid(overlap, grid, axis=0)
    return within + np.maximum(before - after, 0.0)
