"""The cheapest runs found that would let a plan identify a factor."""

from dataclasses import replace

import numpy as np
import pandas as pd

from scaling.analysis.design.audit import (
    COMPUTE,
    FACTORS,
    WISHED_DECADES,
    Audit,
    FactorAudit,
    Mend,
    judge,
)
from scaling.analysis.design.belief import Assumption, Belief, believe, columns_of, log_jacobian
from scaling.analysis.design.candidates import SETTING, candidates, table_of
from scaling.analysis.design.criteria import Problem
from scaling.analysis.design.information import Information
from scaling.analysis.design.relations import log_columns
from scaling.analysis.fitting.forms import Form
from scaling.config import CorpusCard
from scaling.sweeps import Grid

MOST_RUNS = 8
"""No longer list of runs is proposed for one factor."""
COST_POWER = 0.5
"""Each run is the one with most gain in the exponent's variance over its price to this power."""


def with_mends(
    found: Audit, plan: pd.DataFrame, grid: Grid, card: CorpusCard, assumption: Assumption
) -> Audit:
    """The audit with ``mend`` for every factor that is not identified and that runs can mend.

    A factor may leave its range to reach the wished one; everything else stays within the plan's,
    so that the runs bring no second difference.

    Args:
        plan: what was audited: runs of ``grid``.
    """
    factors = tuple(
        f if f.verdict == "identified" or f.factor not in SETTING
        else replace(f, mend=_mend(f, found, plan, grid, card, assumption))
        for f in found.factors
    )  # fmt: skip
    return replace(found, factors=factors)


def _mend(
    factor: FactorAudit, found: Audit, plan: pd.DataFrame, grid: Grid, card: CorpusCard,
    assumption: Assumption,
) -> Mend | None:  # fmt: skip
    """Greedy: the gain in one exponent over the root of the price, until it is identified."""
    name = factor.factor
    form = Form.parse(found.form) if found.form else None
    if form is None or name not in form.columns:
        form = Form.parse(f"{form or 'E'} + {name}")
    belief = believe(form, plan, assumption)
    offered = candidates(grid, card, columns=form.columns, wide=SETTING[name])
    table = table_of(offered)
    inside = np.ones(len(table), dtype=bool)
    for other in {*(f.factor for f in found.factors), *form.columns} - {name}:
        x = table[other].to_numpy(dtype=np.float64)
        inside &= (x >= 0.99 * plan[other].min()) & (x <= 1.01 * plan[other].max())
    if not inside.any():
        return None
    table, offered = table[inside], [c for c, true in zip(offered, inside, strict=True) if true]
    problem, price = _problem(belief, table, plan, found.noise, name), table[COMPUTE].to_numpy()
    free = np.ones(len(table), dtype=bool)
    x = table[name].to_numpy(dtype=np.float64)
    chosen: list[int] = []
    verdict = factor
    while len(chosen) < MOST_RUNS and free.any():
        low, high = min(factor.low, *x[chosen], factor.high), max(factor.high, *x[chosen], 0.0)
        reach = np.log10(np.maximum(high, x) / np.minimum(low, x))
        enough = max(WISHED_DECADES, np.log10(high / low))
        allowed = free & (reach >= min(enough, reach[free].max()) - 1e-9)
        shortest = reach[allowed].min()  # no further out than the wish makes necessary
        allowed &= reach <= shortest + 0.02
        worth = problem.gains(problem.covariance(chosen)) / price**COST_POWER
        chosen.append(int(np.argmax(np.where(allowed, worth, -np.inf))))
        free[chosen[-1]] = False
        rows = pd.concat([plan, table.iloc[chosen]], ignore_index=True)
        state = Information.of(belief, rows, found.noise, laws=1)
        verdict = judge(name, rows, state, log_columns(rows, [*FACTORS, *form.columns]))
        if verdict.verdict == "identified":
            break
    if verdict.verdict == factor.verdict:
        return None
    return Mend(
        tuple(offered[i].point for i in chosen), float(price[chosen].sum()), verdict.verdict,
        verdict.standard_error,
    )  # fmt: skip


def _problem(
    belief: Belief, table: pd.DataFrame, plan: pd.DataFrame, noise: float, factor: str
) -> Problem:
    """Candidates for the variance of one exponent at the assumed law, after the plan."""
    surface, theta = belief.surface, belief.mean[None]
    names = surface.names
    target = np.zeros((1, 1, surface.n_free, surface.n_free))
    own = names.index(f"exponent.{factor}" if f"exponent.{factor}" in names else "exponent")
    target[0, 0, own, own] = 1.0
    planned = log_jacobian(surface, theta, columns_of(surface.form, plan)) / noise
    return Problem(
        log_jacobian(surface, theta, columns_of(surface.form, table)) / noise,
        table[COMPUTE].to_numpy(dtype=np.float64),
        # a breath of the prior: the plan alone may be singular
        1e-3 * belief.precision[None] + np.swapaxes(planned, 1, 2) @ planned,
        target,
        (1.0,),
        weight=1.0,
    )
