"""Approach 3 of Hoffmann et al. 2022 (section 3.3): optima of the joint law."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling import ClueError
from scaling.analysis.allocation.optimum import (
    FRONTIER_DRAWS,
    Law,
    evaluate,
    frontier,
    interval_tail,
)
from scaling.analysis.allocation.space import ProductSpace, Space
from scaling.analysis.allocation.trend import AllocationError, Array, Trend, column
from scaling.analysis.fitting.law import LawFit

BUDGETS = 5
"""Budgets over the range of the table at which a law is solved."""
ROOM = 1e4
"""How far beyond the table's range a factor may go where compute is a product."""


def closed_form(exponents: npt.ArrayLike, powers: npt.ArrayLike | None = None) -> Array:
    """Powers of compute with which the optimal factors grow: a_k = (1 / p_k) / sum_j (m_j / p_j).

    The minimum of E + sum_k A_k x_k^-p_k at fixed C = unit prod_k x_k^m_k has
    x_k = (A_k p_k / (m_k lambda))^(1 / p_k); for two factors and m = 1 it is Hoffmann et al. 2022,
    eq. 4: a = beta / (alpha + beta). Neither E nor the coefficients matter.

    Args:
        exponents: ``[..., K]`` p_k > 0, draws first.
        powers: ``[K]`` m_k; 1 by default.

    >>> closed_form([0.34, 0.28]).round(3).tolist()
    [0.452, 0.548]
    """
    inverse = 1 / np.asarray(exponents, dtype=np.float64)
    weight = np.ones(inverse.shape[-1]) if powers is None else np.asarray(powers, dtype=np.float64)
    return np.asarray(inverse / (inverse @ weight)[..., None])


def parametric(
    df: pd.DataFrame,
    factors: Sequence[str],
    law: Law,
    *,
    compute: str = "pf_days",
    space: Space | None = None,
    draws: int = FRONTIER_DRAWS,
) -> dict[str, Trend]:
    """How each factor grows with compute under a law, over a table's range of compute.

    In closed form, with all draws, where a ``LawFit`` is a sum of one power each of the factors and
    compute is their product; else from optima at ``BUDGETS`` levels.

    Args:
        df: rows with positive factors and compute.
        factors: columns that make up compute.
        space: where the law is minimised; None: compute must be proportional to the product of the
            factors in every row.
        draws: of the law, where optima are sought.

    Returns:
        A trend a factor; where there is none, one that says why.
    """
    c = column(df, compute)
    levels = np.geomspace(c.min(), c.max(), BUDGETS)
    try:
        if space is None:
            space = _product(df, factors, compute)
            if isinstance(law, LawFit) and _is_sum_of_powers(law, factors):
                return _closed_trends(law, factors, space, levels)
        found = frontier(law, space, levels, draws=draws)
    except ClueError as e:  # the law may read columns that the space does not have
        return {factor: _refusal(factor, compute, str(e)) for factor in factors}
    absent = f"{', '.join(found.names)} are chosen, not this factor"
    return {
        factor: found.trends.get(factor) or _refusal(factor, compute, absent) for factor in factors
    }


def _is_sum_of_powers(law: LawFit, factors: Sequence[str]) -> bool:
    """Whether the law is a sum of terms, with or without floor, each a power of one factor."""
    terms = law.form.terms
    return (
        not law.form.outer
        and all(
            term.sign > 0 and len(term.factors) == 1 and term.factors[0].kind == "power"
            for term in terms
        )
        and sorted(law.factors) == sorted(factors)
    )


def _closed_trends(
    law: LawFit, factors: Sequence[str], space: ProductSpace, levels: Array
) -> dict[str, Trend]:
    """Trends by ``closed_form``, with the intercepts that the coefficients give."""
    every = pd.concat([law.params.to_frame().T, law.draws], ignore_index=True)
    p = every[[f"exponent.{factor}" for factor in factors]].to_numpy(dtype=np.float64)
    a = every[[f"coefficient.{factor}" for factor in factors]].to_numpy(dtype=np.float64)
    exponents = closed_form(p)
    own = np.log(a * p) / p
    shared = own.sum(axis=1, keepdims=True) + np.log(space.unit)
    intercepts = own - exponents * shared
    optima = np.exp(intercepts[:1] + exponents[:1] * np.log(levels)[:, None])
    table = pd.DataFrame(optima, columns=list(factors))
    loss = evaluate(law, table)[0]
    trends = {}
    for k, factor in enumerate(factors):
        points = pd.DataFrame(
            {space.compute: levels, factor: optima[:, k], law.y: loss, "reason": None}
        )
        good = np.isfinite(exponents[1:, k]) & np.isfinite(intercepts[1:, k])
        trends[factor] = Trend(
            3, factor, space.compute, points, float(exponents[0, k]), float(intercepts[0, k]),
            exponents[1:, k][good], intercepts[1:, k][good], int((~good).sum()),
            interval_tail(law), None, (),
        )  # fmt: skip
    return trends


def _product(df: pd.DataFrame, factors: Sequence[str], compute: str) -> ProductSpace:
    """The space in which compute is proportional to the product of the factors.

    Raises:
        AllocationError: it is not, in the table.
    """
    logs = {f: np.log(column(df, f)) for f in factors}
    log_unit = np.log(column(df, compute)) - sum(logs.values())
    if np.ptp(log_unit) > 0.01:
        raise AllocationError(
            f"{compute} is not proportional to {' x '.join(factors)} (the ratio varies by a factor "
            f"of {np.exp(np.ptp(log_unit)):.3g}): the law needs a space to be minimised in"
        )
    limits = {
        f: (float(np.exp(x.min()) / ROOM), float(np.exp(x.max()) * ROOM)) for f, x in logs.items()
    }
    return ProductSpace(limits, float(np.exp(np.mean(log_unit))), compute)


def _refusal(factor: str, compute: str, reason: str) -> Trend:
    none = np.empty(0)
    return Trend(3, factor, compute, pd.DataFrame(), None, None, none, none, 0, 0.025, reason, ())
