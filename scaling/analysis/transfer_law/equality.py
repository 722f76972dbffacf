"""Does equal pretraining loss give equal transfer, whichever factor bought it?

The model is ``T = f(L) + sum_k beta_k ln x_k``: transfer T of runs with pretraining loss L and
factors x_k. If the loss says all, every beta_k is zero. ``equal_loss_test`` takes f from a fitted
law or as a parabola and works in the space orthogonal to what f can absorb (Frisch and Waugh 1933;
for a nonlinear law its tangent space), so that a misfit slope of f is not read as an effect.

Three dangers are met as follows.

- *Noise of the loss.* At a noisy L the factors tell what L would have been, and so predict T even
  where the loss says all (regression dilution). Where configurations were run more than once, L is
  replaced by its expectation given the measured loss and the factors (regression calibration,
  Carroll et al. 2006, *Measurement Error in Nonlinear Models*, section 4.2).
- *Few configurations, unequal noise.* Standard errors are the cluster jackknife CR3 (Bell and
  McCaffrey 2002), p-values come from permutations of the residuals (Freedman and Lane 1983) of
  whole configurations, within strata of like loss, of the studentised effect.
- *Many factors.* p-values are corrected over factors by the largest statistic of each permutation
  (Westfall and Young 1993).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as student

from scaling.analysis.fitting.record import plain, plain_rows

Array = npt.NDArray[np.float64]

ALPHA = 0.05
POWER = 0.8
FEWEST_DOF = 3
"""Configurations beyond the parameters that the test needs."""
MAX_INFLATION = 1e4
"""Above this variance inflation a factor is the loss and the other factors in another guise. Below,
it stays: a factor left out would lend its effect to those that it moves with."""
SAME = 0.999
"""Correlation of the logarithms of two factors above which they are one."""
MIN_RELIABILITY = 0.5
"""Share of the variance of the loss at given factors that must not be noise."""
CLUSTERS_PER_STRATUM = 8


class EqualityVerdict(StrEnum):
    """What the design says of equal loss and equal transfer."""

    EQUAL = "equal"
    """The interval of every effect lies within the margin; one that is clear may be small."""
    DIFFERS = "differs"
    """At equal loss some factor changes the transfer, and by more than the margin for all that is
    known: corrected p below 5 %, zero outside its 95 % interval."""
    UNDECIDED = "not decidable with this design"
    """Neither; ``detectable`` says what effect would have been seen."""


@dataclass(frozen=True, eq=False)
class EqualLossTest:
    """Effects of factors on transfer at equal pretraining loss.

    Attributes:
        verdict: of the three, and ``factors`` those that differ.
        reasons: what speaks for the verdict.
        effects: one row a factor: ``per_doubling`` change of the metric when the factor doubles at
            equal loss, its 95 % interval ``lower`` and ``upper``, ``over_range`` the change over
            the factor's range in the data, permutation ``p`` and ``p_adjusted`` over factors,
            ``detectable`` effect per doubling seen with 80 % power at the corrected level,
            ``inflation`` of its variance by loss and other factors.
        residuals: T less f(L), per row; ``unexplained``: less the effects too. [metric]
        span: change of f(L) over the data: what the loss itself moves. [metric]
        margin: share of ``span`` within which an effect over its range counts as none.
        reliability: share of the variance of the loss at given factors that is not noise; None
            where no configuration was run twice.
        left_out: factors not tested, with the reason.
        n, n_clusters: rows and configurations.
        smallest_p: that the permutations of this design could have given.
    """

    verdict: EqualityVerdict
    factors: tuple[str, ...]
    reasons: tuple[str, ...]
    effects: pd.DataFrame
    residuals: Array
    unexplained: Array
    span: float
    margin: float
    reliability: float | None
    left_out: dict[str, str]
    n: int
    n_clusters: int
    smallest_p: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the values per row, as plain JSON values."""
        return {
            "verdict": str(self.verdict),
            "factors": list(self.factors),
            "reasons": list(self.reasons),
            "effects": plain_rows(self.effects.reset_index()),
            "span": plain(self.span),
            "margin": self.margin,
            "reliability": None if self.reliability is None else plain(self.reliability),
            "left_out": dict(self.left_out),
            "rows": self.n,
            "clusters": self.n_clusters,
            "smallest_p": plain(self.smallest_p),
        }


def equal_loss_test(
    points: pd.DataFrame,
    factors: Sequence[str],
    *,
    tangent: Callable[[Array], Array] | None = None,
    x: str = "pretraining",
    y: str = "downstream",
    cluster: str = "cell",
    margin: float = 0.1,
    n_permutations: int = 1999,
    seed: int = 0,
) -> EqualLossTest:
    """Test whether factors change the transfer at equal pretraining loss.

    Args:
        points: one row a run: ``x`` loss [nats], ``y`` metric, ``cluster`` configuration (seeds of
            one share it), and the factors, positive.
        factors: columns; those that do not vary, or only together with others, are left out.
        tangent: ``[m] -> [m, P]``, derivative of a fitted law of the loss by its parameters
            (``laws.tangent``): what f can absorb; None: f is a parabola.
        margin: share of the change of f(L) over the data within which an effect, over the range of
            its factor, counts as none.

    Raises:
        ValueError: a column is missing, or a factor is not positive.
    """
    missing = [c for c in (x, y, cluster, *factors) if c not in points]
    if missing:
        raise ValueError(f"no column {missing[0]!r}; columns: {', '.join(map(str, points))}")
    raw = points[list(factors)].to_numpy(dtype=np.float64, na_value=np.nan)
    if not (raw > 0).all():
        bad = factors[int(np.argmin((raw > 0).all(axis=0)))]
        raise ValueError(f"factor {bad!r} is not positive in every row")
    loss = points[x].to_numpy(dtype=np.float64)
    metric = points[y].to_numpy(dtype=np.float64)
    codes = pd.factorize(points[cluster])[0].astype(np.int64)
    n_clusters = int(codes.max()) + 1 if len(codes) else 0

    left_out, kept = _varying(np.log(raw), list(factors))
    z = np.log(raw)[:, kept]
    z = z - z.mean(axis=0) if len(z) else z
    names = [factors[k] for k in kept]
    reliability = _reliability(loss, z, codes)
    nuisance = _nuisance(_calibrated(loss, z, reliability), tangent)
    while names:  # the last factor that is the loss and the others in disguise goes, until none is
        inflation = _inflation(nuisance, z)
        if inflation.max() <= MAX_INFLATION:
            break
        k = int(np.flatnonzero(inflation > MAX_INFLATION)[-1])
        left_out[names[k]] = _aliased(names, z, k, float(inflation[k]))
        names.pop(k)
        z = np.delete(z, k, axis=1)
    fitted = nuisance @ (nuisance.T @ metric)
    residuals, span = metric - fitted, float(np.ptp(fitted)) if len(fitted) else 0.0
    dof = n_clusters - nuisance.shape[1] - z.shape[1]
    against = None
    if not names:
        against = "no factor can be told from the loss"
    elif dof < FEWEST_DOF:
        against = (
            f"{n_clusters} configurations for {nuisance.shape[1] + z.shape[1]} parameters; "
            f"{FEWEST_DOF} more than these are needed"
        )
    elif reliability is not None and reliability < MIN_RELIABILITY:
        against = (
            f"at given factors {1 - reliability:.0%} of the variance of the loss is noise between "
            "seeds: what the factors say of the loss and what they say beside it are not parted"
        )
    shared: dict[str, Any] = {
        "residuals": residuals, "span": span, "margin": margin, "reliability": reliability,
        "left_out": left_out, "n": len(points), "n_clusters": n_clusters,
    }  # fmt: skip
    if against is not None:
        return EqualLossTest(
            EqualityVerdict.UNDECIDED, (), (against,), _effects_table([], {}), smallest_p=1.0,
            unexplained=residuals, **shared,
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    order, smallest = _permutations(loss, codes, n_permutations, rng)
    beta, error = _studentised(nuisance, z, codes, residuals[order])
    t = np.abs(beta) / error
    exceed = t[1:] >= t[0] * (1 - 1e-12)
    largest = t[1:].max(axis=1, keepdims=True) >= t[0] * (1 - 1e-12)
    p = (1 + exceed.sum(axis=0)) / len(t)
    adjusted = (1 + largest.sum(axis=0)) / len(t)
    half = student.ppf(1 - ALPHA / 2, dof) * error[0]
    seen = student.ppf(1 - ALPHA / 2 / len(names), dof) + student.ppf(POWER, dof)
    doubling, ranges = np.log(2.0), np.ptp(z, axis=0)
    effects = _effects_table(
        names,
        {
            "per_doubling": beta[0] * doubling,
            "lower": (beta[0] - half) * doubling,
            "upper": (beta[0] + half) * doubling,
            "over_range": beta[0] * ranges,
            "p": p,
            "p_adjusted": adjusted,
            "detectable": seen * error[0] * doubling,
            "inflation": _inflation(nuisance, z),
        },
    )
    ends = np.maximum(np.abs(beta[0] - half), np.abs(beta[0] + half)) * ranges
    verdict, found, reasons = _judge(effects, ends, span, margin, ranges, smallest)
    unexplained = residuals - (z - nuisance @ (nuisance.T @ z)) @ beta[0]
    return EqualLossTest(
        verdict, found, reasons, effects, smallest_p=smallest, unexplained=unexplained, **shared
    )


def over_tasks(tests: Mapping[str, EqualLossTest]) -> dict[str, EqualityVerdict]:
    """Verdicts of several tasks, the p-values corrected for their number (Holm 1979).

    A task that differs by itself but not after the correction is not decided.
    """
    lowest = {
        task: float(test.effects["p_adjusted"].min()) if len(test.effects) else 1.0
        for task, test in tests.items()
    }
    out, worst = {}, 0.0
    for i, task in enumerate(sorted(lowest, key=lambda t: (lowest[t], t))):
        worst = max(worst, (len(lowest) - i) * lowest[task])
        verdict = tests[task].verdict
        fails = verdict is EqualityVerdict.DIFFERS and worst > ALPHA
        out[task] = EqualityVerdict.UNDECIDED if fails else verdict
    return {task: out[task] for task in tests}


def _judge(
    effects: pd.DataFrame, ends: Array, span: float, margin: float, ranges: Array, smallest: float
) -> tuple[EqualityVerdict, tuple[str, ...], tuple[str, ...]]:
    """The verdict, the factors that differ, and the reasons."""
    clear = (effects["lower"] > 0) | (effects["upper"] < 0)
    differing = effects[clear & (effects["p_adjusted"] <= ALPHA)]
    clear_ones = tuple(
        f"{name}: {row['per_doubling']:+.3g} per doubling at equal loss "
        f"({row['lower']:+.3g} to {row['upper']:+.3g}), corrected p {row['p_adjusted']:.2g}"
        for name, row in differing.iterrows()
    )
    if (ends <= margin * span).all():
        reason = (
            f"every effect over its factor's range lies within {margin:.0%} of what the loss "
            f"moves ({span:.3g})"
        )
        return EqualityVerdict.EQUAL, (), (reason, *clear_ones)
    if len(differing):
        return EqualityVerdict.DIFFERS, tuple(map(str, differing.index)), clear_ones
    reasons = tuple(
        f"{name}: an effect of {seen * reach / np.log(2):.3g} over its range would have been seen; "
        f"the loss itself moves {span:.3g}"
        for name, seen, reach in zip(effects.index, effects["detectable"], ranges, strict=True)
    )
    if smallest > ALPHA:
        reasons += (f"the design has too few permutations: no p below {smallest:.2g} is possible",)
    return EqualityVerdict.UNDECIDED, (), reasons


def _varying(z: Array, factors: list[str]) -> tuple[dict[str, str], list[int]]:
    constant = {f for k, f in enumerate(factors) if len(z) == 0 or np.ptp(z[:, k]) == 0}
    left_out = {f: "the same in every run" for f in factors if f in constant}
    return left_out, [k for k, f in enumerate(factors) if f not in constant]


def _reliability(loss: Array, z: Array, codes: npt.NDArray[np.int64]) -> float | None:
    """1 - (variance of the loss between seeds) / (its variance given the factors)."""
    counts = np.bincount(codes) if len(codes) else np.zeros(0)
    spare = len(loss) - len(counts)
    if spare < 1:
        return None
    within = loss - (np.bincount(codes, loss) / counts)[codes]
    noise = float(within @ within) / spare
    rest = loss - _projection(_with_constant(z)) @ loss
    dof = max(1, len(loss) - z.shape[1] - 1)
    given = float(rest @ rest) / dof
    return max(0.0, 1 - noise / given) if given > 0 else 0.0


def _calibrated(loss: Array, z: Array, reliability: float | None) -> Array:
    """The expected true loss of each run, given the measured one and the factors."""
    if reliability is None:
        return loss
    expected = _projection(_with_constant(z)) @ loss
    return np.asarray(expected + reliability * (loss - expected))


def _nuisance(loss: Array, tangent: Callable[[Array], Array] | None) -> Array:
    """``[n, q]`` orthonormal basis of what f can absorb at these losses."""
    if tangent is None:
        u = (loss - loss.mean()) / max(float(np.ptp(loss)), 1e-300)
        return _basis(np.stack([np.ones_like(u), u, u**2], axis=1))
    return _basis(_with_constant(tangent(loss)))


def _basis(columns: Array) -> Array:
    """Orthonormal basis of the columns' span; columns are scaled to length one before."""
    length = np.linalg.norm(columns, axis=0)
    u, s, _ = np.linalg.svd(columns / np.where(length > 0, length, 1.0), full_matrices=False)
    return np.asarray(u[:, s > 1e-8 * s[0]])


def _with_constant(z: Array) -> Array:
    return np.column_stack([np.ones(len(z)), z])


def _projection(columns: Array) -> Array:
    basis = _basis(columns)
    return np.asarray(basis @ basis.T)


def _inflation(nuisance: Array, z: Array) -> Array:
    """Variance inflation of each factor's effect by the loss and the other factors."""
    out = []
    for k in range(z.shape[1]):
        own = z[:, k] - z[:, k].mean()
        others = _basis(np.column_stack([nuisance, np.delete(z, k, axis=1)]))
        left = own - others @ (others.T @ own)
        out.append(float(own @ own) / max(float(left @ left), 1e-300))
    return np.array(out)


def _aliased(names: list[str], z: Array, k: int, inflation: float) -> str:
    """Why factor k is not tested."""
    with np.errstate(invalid="ignore"):
        like = np.abs(np.corrcoef(z.T))[k] if len(names) > 1 else np.zeros(1)
    twins = [n for i, n in enumerate(names) if i != k and like[i] > SAME]
    if twins:
        return f"moves with {', '.join(twins)} in this design: the two are not parted"
    return f"moves with the loss and the other factors (variance inflation {inflation:.3g})"


def _permutations(
    loss: Array, codes: npt.NDArray[np.int64], n: int, rng: np.random.Generator
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


def _studentised(
    nuisance: Array, z: Array, codes: npt.NDArray[np.int64], residuals: Array
) -> tuple[Array, Array]:
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


def _effects_table(names: list[str], columns: dict[str, Array]) -> pd.DataFrame:
    names_of_columns = (
        "per_doubling", "lower", "upper", "over_range", "p", "p_adjusted", "detectable",
        "inflation",
    )  # fmt: skip
    data = {c: columns.get(c, np.empty(0)) for c in names_of_columns}
    return pd.DataFrame(data, index=pd.Index(names, name="factor", dtype=object))
