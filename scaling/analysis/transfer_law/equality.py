"""Does equal pretraining loss give equal transfer, whichever factor bought it?

The model is ``T = f(L) + beta_k ln x_k``: transfer T of runs with pretraining loss L and a factor
x_k. If the loss says all, beta_k is zero for every k. ``equal_loss_test`` takes f from a fitted law
or as a parabola and works in the space orthogonal to what f can absorb (Frisch and Waugh 1933; for
a nonlinear law its tangent space), so that a misfit slope of f is not read as an effect.

Factors enter one by one, the clearest first, while they are significant; each is tested beside f
and those already in. All at once cannot be told: together they nearly make up the loss itself. So
what differs is told from what does not, and the smallest set of factors that explains it is named;
that all other factors differ from these, in the opposite direction, would look the same.

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
import pandas as pd
from scipy.stats import t as student

from scaling.analysis.fitting.record import plain, plain_rows
from scaling.analysis.transfer_law.regression import (
    Array,
    Codes,
    basis,
    calibrated,
    permutations,
    reliability,
    studentised,
    with_constant,
)

ALPHA = 0.05
POWER = 0.8
FEWEST_DOF = 3
"""Configurations beyond the parameters that the test needs."""
SAME = 0.999
"""Correlation of the logarithms of two factors above which they are one."""
MIN_RELIABILITY = 0.5
"""Share of the variance of the loss at given factors that must not be noise."""
COLUMNS = [
    "per_doubling", "lower", "upper", "over_range", "p", "p_adjusted", "detectable", "inflation",
    "range",
]  # fmt: skip
LN_2 = float(np.log(2))


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
            ``detectable`` effect per doubling seen with 80 % power at the level of Bonferroni,
            ``inflation`` of its variance by the loss and the factors already in, ``range`` of the
            factor in doublings. Of ``factors`` each beside the others of them.
        residuals: T less f(L), per row. [metric]
        unexplained: per row and factor, what f, the ``factors`` and this one leave. [metric]
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
    unexplained: pd.DataFrame
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
        factors: columns; those that do not vary, or only with an earlier one, are left out.
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

    left_out, kept = _apart(np.log(raw), list(factors))
    z = np.log(raw)[:, kept]
    z = z - z.mean(axis=0) if len(z) else z
    names = [factors[k] for k in kept]
    share = reliability(loss, z, codes)
    nuisance = _nuisance(calibrated(loss, z, share), tangent)
    residuals = metric - nuisance @ (nuisance.T @ metric)
    span = float(np.ptp(metric - residuals)) if len(metric) else 0.0
    shared: dict[str, Any] = {
        "residuals": residuals, "span": span, "margin": margin, "reliability": share,
        "left_out": left_out, "n": len(points), "n_clusters": n_clusters,
    }  # fmt: skip
    against = None
    if len(names) < 2:
        only = names[0] if names else "no factor"
        against = f"{only} alone bought the loss: there is nothing to compare it with"
    elif n_clusters - nuisance.shape[1] - 1 < FEWEST_DOF:
        against = (
            f"{n_clusters} configurations for {nuisance.shape[1] + 1} parameters; "
            f"{FEWEST_DOF} more than these are needed"
        )
    elif share is not None and share < MIN_RELIABILITY:
        against = (
            f"at given factors {1 - share:.0%} of the variance of the loss is noise between "
            "seeds: what the factors say of the loss and what they say beside it are not parted"
        )
    if against is not None:
        return EqualLossTest(
            EqualityVerdict.UNDECIDED, (), (against,), pd.DataFrame(columns=COLUMNS),
            smallest_p=1.0, unexplained=pd.DataFrame(index=points.index), **shared,
        )  # fmt: skip
    order, smallest = permutations(loss, codes, n_permutations, np.random.default_rng(seed))
    effects, unexplained, found = _select(metric, nuisance, z, names, codes, order)
    verdict, reasons = _judge(effects, found, span, margin, smallest)
    return EqualLossTest(
        verdict,
        tuple(found) if verdict is EqualityVerdict.DIFFERS else (),
        reasons,
        effects,
        smallest_p=smallest,
        unexplained=unexplained.set_index(points.index),
        **shared,
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


def _select(
    metric: Array, nuisance: Array, z: Array, names: list[str], codes: Codes, order: Codes
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Effects and what they leave unexplained, by factor, and the factors that were taken in.

    A factor is tested by itself beside f(L) and the factors already in; the clearest enters while
    it is significant.
    """
    rows: dict[str, dict[str, float]] = {}
    rest: dict[str, Array] = {}
    chosen: list[int] = []
    n_clusters = int(codes.max()) + 1

    def estimate(k: int, others: list[int], orders: Codes) -> tuple[Array, Array, int]:
        """Effect of factor k and its error, ``[B]`` each, and the degrees of freedom."""
        known = basis(np.column_stack([nuisance, z[:, others]]))
        null = metric - known @ (known.T @ metric)
        beta, error = studentised(known, z[:, [k]], codes, null[orders])
        own = z[:, k] - z[:, k].mean()
        partial = z[:, k] - known @ (known.T @ z[:, k])
        dof = n_clusters - known.shape[1] - 1
        half = student.ppf(1 - ALPHA / 2, dof) * error[0]
        seen = student.ppf(1 - ALPHA / 2 / len(names), dof) + student.ppf(POWER, dof)
        rest[names[k]] = null - beta[0, 0] * partial
        rows.setdefault(names[k], {}).update(
            {
                "per_doubling": beta[0, 0] * LN_2,
                "lower": (beta[0, 0] - half[0]) * LN_2,
                "upper": (beta[0, 0] + half[0]) * LN_2,
                "over_range": beta[0, 0] * np.ptp(z[:, k]),
                "detectable": seen * error[0, 0] * LN_2,
                "inflation": float(own @ own) / max(float(partial @ partial), 1e-300),
                "range": float(np.ptp(z[:, k])) / LN_2,
            }
        )
        return beta[:, 0], error[:, 0], dof

    while True:
        left = [k for k in range(len(names)) if k not in chosen]
        tried = [estimate(k, chosen, order) for k in left]
        t = np.stack([np.abs(beta) / error for beta, error, _ in tried], axis=1)
        largest = t[1:].max(axis=1, keepdims=True)
        for column, k in enumerate(left):
            bar = t[0, column] * (1 - 1e-12)
            rows[names[k]]["p"] = (1 + int((t[1:, column] >= bar).sum())) / len(t)
            rows[names[k]]["p_adjusted"] = (1 + int((largest >= bar).sum())) / len(t)
        k = left[int(np.argmax(t[0]))]
        row = rows[names[k]]
        clear = row["p_adjusted"] <= ALPHA and row["lower"] * row["upper"] > 0
        if not clear or tried[0][2] - 1 < FEWEST_DOF or len(left) == 1:
            break
        chosen.append(k)
    if clear and k not in chosen:
        chosen.append(k)
    for k in chosen:
        estimate(k, [other for other in chosen if other != k], order[:1])
    effects = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS).loc[names]
    return effects.rename_axis("factor"), pd.DataFrame(rest)[names], [names[k] for k in chosen]


def _judge(
    effects: pd.DataFrame, found: list[str], span: float, margin: float, smallest: float
) -> tuple[EqualityVerdict, tuple[str, ...]]:
    """The verdict and the reasons."""
    clear = tuple(
        f"{name}: {effects['per_doubling'][name]:+.3g} per doubling at equal loss "
        f"({effects['lower'][name]:+.3g} to {effects['upper'][name]:+.3g}), corrected p "
        f"{effects['p_adjusted'][name]:.2g}"
        for name in found
    )
    ends = effects[["lower", "upper"]].abs().max(axis=1) * effects["range"]
    if (ends <= margin * span).all():
        reason = (
            f"every effect over its factor's range lies within {margin:.0%} of what the loss "
            f"moves ({span:.3g})"
        )
        return EqualityVerdict.EQUAL, (reason, *clear)
    if found:
        return EqualityVerdict.DIFFERS, clear
    reasons = tuple(
        f"{name}: an effect of {row['detectable'] * row['range']:.3g} over its range would have "
        f"been seen; the loss itself moves {span:.3g}"
        for name, row in effects.iterrows()
    )
    if smallest > ALPHA:
        reasons += (f"the design has too few permutations: no p below {smallest:.2g} is possible",)
    return EqualityVerdict.UNDECIDED, reasons


def _apart(z: Array, factors: list[str]) -> tuple[dict[str, str], list[int]]:
    """Why factors are left out, and the places of the others."""
    left_out, kept = dict[str, str](), list[int]()
    for k, factor in enumerate(factors):
        if len(z) == 0 or np.ptp(z[:, k]) == 0:
            left_out[factor] = "the same in every run"
            continue
        alike = [i for i in kept if abs(np.corrcoef(z[:, i], z[:, k])[0, 1]) > SAME]
        if alike:
            left_out[factor] = (
                f"moves with {factors[alike[0]]} in this design: the two are not parted"
            )
        else:
            kept.append(k)
    return left_out, kept


def _nuisance(loss: Array, tangent: Callable[[Array], Array] | None) -> Array:
    """``[n, q]`` orthonormal basis of what f can absorb at these losses."""
    if tangent is None:
        u = (loss - loss.mean()) / max(float(np.ptp(loss)), 1e-300)
        return basis(np.stack([np.ones_like(u), u, u**2], axis=1))
    return basis(with_constant(tangent(loss)))
