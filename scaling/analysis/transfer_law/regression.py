"""Linear regression with few clusters: bases, noise of a regressor, permutations, CR3 errors."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

CLUSTERS_PER_STRATUM = 8


def basis(columns: Array) -> Array:
    """Orthonormal basis of the columns' span; columns are scaled to length one before."""
    length = np.linalg.norm(columns, axis=0)
    u, s, _ = np.linalg.svd(columns / np.where(length > 0, length, 1.0), full_matrices=False)
    return np.asarray(u[:, s > 1e-8 * s[0]])


def with_constant(z: Array) -> Array:
    return np.column_stack([np.ones(len(z)), z])


def projection(columns: Array) -> Array:
    """``[n, n]`` projection onto the columns' span."""
    q = basis(columns)
    return np.asarray(q @ q.T)


def reliability(loss: Array, z: Array, codes: Codes) -> float | None:
    """1 - (variance of the loss between seeds) / (its variance given the factors)."""
    counts = np.bincount(codes) if len(codes) else np.zeros(0)
    spare = len(loss) - len(counts)
    if spare < 1:
        return None
    within = loss - (np.bincount(codes, loss) / counts)[codes]
    noise = float(within @ within) / spare
    rest = loss - projection(with_constant(z)) @ loss
    dof = max(1, len(loss) - z.shape[1] - 1)
    given = float(rest @ rest) / dof
    return max(0.0, 1 - noise / given) if given > 0 else 0.0


def calibrated(loss: Array, z: Array, reliability: float | None) -> Array:
    """The expected true loss of each run, given the measured one and the factors."""
    if reliability is None:
        return loss
    expected = projection(with_constant(z)) @ loss
    return np.asarray(expected + reliability * (loss - expected))


def permutations(
    loss: Array, codes: Codes, n: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], float]:
    """``[1 + n, rows]`` orders of the rows, the first unchanged, and the smallest p they allow.

    Configurations change places as wholes, with those of as many rows in the same stratum of loss.
    """
    counts = np.bincount(codes)
    rank = np.argsort(np.argsort(np.bincount(codes, loss) / counts))
    strata = rank * max(1, len(counts) // CLUSTERS_PER_STRATUM) // len(counts)
    order = np.tile(np.arange(len(codes)), (1 + n, 1))
    log_orders = 0.0
    for stratum in np.unique(strata):
        for size in np.unique(counts[strata == stratum]):
            group = np.flatnonzero((strata == stratum) & (counts == size))
            rows = np.stack([np.flatnonzero(codes == g) for g in group])
            places = rng.random((n, len(group))).argsort(axis=1)
            order[1:, rows.ravel()] = rows[places].reshape(n, -1)
            log_orders += float(np.log(np.arange(1, len(group) + 1)).sum())
    smallest = max(float(np.exp(-log_orders)), 1 / (1 + n))
    return order, smallest


def studentised(nuisance: Array, z: Array, codes: Codes, residuals: Array) -> tuple[Array, Array]:
    """Effects ``[B, K]`` and their CR3 errors, for residuals ``[B, n]`` of the null model."""
    partial = z - nuisance @ (nuisance.T @ z)
    bread = np.linalg.inv(partial.T @ partial)
    left = residuals - (residuals @ nuisance) @ nuisance.T
    beta = left @ partial @ bread
    rest = left - beta @ partial.T
    hat = nuisance @ nuisance.T + partial @ bread @ partial.T
    variance = np.zeros_like(beta)
    n_clusters = int(codes.max()) + 1
    for g in range(n_clusters):
        rows = np.flatnonzero(codes == g)
        # pinv: a configuration that alone decides a parameter leaves no residual to scale
        spread = np.linalg.pinv(np.eye(len(rows)) - hat[np.ix_(rows, rows)], rcond=1e-8)
        change = rest[:, rows] @ spread @ partial[rows] @ bread
        variance += change**2
    variance *= (n_clusters - 1) / n_clusters
    return beta, np.sqrt(np.maximum(variance, 1e-300))
