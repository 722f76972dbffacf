"""The three approaches of Hoffmann et al. 2022 side by side: exponents, intervals, disagreement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.allocation.envelope import Kind, envelope
from scaling.analysis.allocation.isoflop import TOLERANCE, isoflop
from scaling.analysis.allocation.optimum import FRONTIER_DRAWS, Law, evaluate
from scaling.analysis.allocation.parametric import parametric
from scaling.analysis.allocation.space import Space
from scaling.analysis.allocation.trend import Trend, positive_rows
from scaling.analysis.fitting.record import plain_rows


@dataclass(frozen=True, eq=False)
class Comparison:
    """Exponents of the optimal factors by each approach.

    Attributes:
        trends: one for each approach and factor, also where it is refused.
        bias: by approach and factor: the exponent that approach 1 or 2 finds on the law's own
            values at the rows of the table, less the law's own exponent. It is what the method
            gets wrong on this grid if the law is true, without any noise.
    """

    trends: tuple[Trend, ...]
    bias: Mapping[tuple[int, str], float]

    def of(self, approach: int, factor: str) -> Trend:
        """One trend.

        Raises:
            KeyError: there is none.
        """
        for trend in self.trends:
            if (trend.approach, trend.factor) == (approach, factor):
                return trend
        raise KeyError(f"approach {approach}, {factor}")

    def summary(self) -> pd.DataFrame:
        """One row a factor and approach: ``exponent``, ``lower``, ``upper`` (95 %), ``optima`` (how
        many points it rests on), ``bias``, ``refused``, ``warnings``."""
        rows = []
        for trend in self.trends:
            low, high = trend.ci() or (None, None)
            rows.append(
                {
                    "factor": trend.factor,
                    "approach": trend.approach,
                    "exponent": trend.exponent,
                    "lower": low,
                    "upper": high,
                    "optima": int(trend.points["reason"].isna().sum()) if len(trend.points) else 0,
                    "bias": self.bias.get((trend.approach, trend.factor)),
                    "refused": trend.refused,
                    "warnings": "; ".join(trend.warnings),
                }
            )
        table = pd.DataFrame(rows)
        numbers = ["exponent", "lower", "upper", "bias"]
        return table.astype(dict.fromkeys(numbers, np.float64)).sort_values(
            ["factor", "approach"], kind="stable", ignore_index=True
        )

    def disagreement(self, level: float = 0.95) -> pd.DataFrame:
        """One row a factor and pair of approaches that both gave an exponent: ``difference``,
        ``lower``, ``upper``, whether they ``agree`` (0 lies between), and ``of_bias``: how much of
        the difference the methods' bias on this grid accounts for.

        The intervals take the approaches as independent. They use the same runs, so that errors
        which they share make the true interval narrower: an agreement may be missed late, never
        a disagreement found early.
        """
        rows = []
        for a, b in combinations(self.trends, 2):
            if a.factor != b.factor or a.exponent is None or b.exponent is None:
                continue
            row: dict[str, Any] = {
                "factor": a.factor,
                "approaches": f"{a.approach} - {b.approach}",
                "difference": a.exponent - b.exponent,
            }
            known = [
                0.0 if t.approach == 3 else self.bias.get((t.approach, t.factor)) for t in (a, b)
            ]
            if self.bias and known[0] is not None and known[1] is not None:
                row["of_bias"] = known[0] - known[1]
            if a.ci() and b.ci():
                both = np.subtract.outer(a.exponents, b.exponents)
                low, high = np.quantile(both, [(1 - level) / 2, (1 + level) / 2])
                row |= {"lower": low, "upper": high, "agree": bool(low <= 0 <= high)}
            rows.append(row)
        columns = ["factor", "approaches", "difference", "lower", "upper", "agree", "of_bias"]
        return pd.DataFrame(rows, columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """As one JSON value."""
        return {
            "trends": [trend.to_dict() for trend in self.trends],
            "bias": [
                {"approach": approach, "factor": factor, "bias": value}
                for (approach, factor), value in self.bias.items()
            ],
            "disagreement": plain_rows(self.disagreement()),
        }


def compare_approaches(
    df: pd.DataFrame,
    factors: Sequence[str],
    *,
    compute: str = "pf_days",
    y: str = "loss",
    law: Law | None = None,
    space: Space | None = None,
    kind: Kind = "rows",
    curve: str = "run_key",
    tolerance: float = TOLERANCE,
    budgets: Sequence[float] | None = None,
    n_boot: int = 1000,
    draws: int = FRONTIER_DRAWS,
    cluster: str | None = "auto",
    seed: int = 0,
) -> Comparison:
    """Fit how each factor grows with compute, by approach 1, 2 and, with a law, 3.

    Args:
        factors: columns that make up compute.
        law: the joint law, for approach 3 and for the bias of the others; without it neither is
            given.
        space: where the law is minimised, with ``space.compute`` the column ``compute``; None:
            compute must be proportional to the product of the factors in every row.
        kind, curve: of ``envelope``.
        tolerance, budgets: of ``isoflop``.
        n_boot, cluster, seed: of both.
        draws: of the law, for approach 3.

    Raises:
        AllocationError: a column is missing or without a positive number.
    """
    rows = positive_rows(df, (*factors, compute, y))
    options: dict[str, Any] = {"compute": compute, "y": y, "cluster": cluster, "seed": seed}

    def first(table: pd.DataFrame, factor: str, n_boot: int) -> Trend:
        return envelope(table, factor=factor, kind=kind, curve=curve, n_boot=n_boot, **options)

    def second(table: pd.DataFrame, factor: str, n_boot: int) -> Trend:
        # with a single other factor, compute and x decide it
        others = [f for f in factors if f != factor] if len(factors) > 2 else ()
        return isoflop(
            table, factor=factor, others=others, tolerance=tolerance, budgets=budgets,
            n_boot=n_boot, **options,
        )  # fmt: skip

    trends = [fit(rows, factor, n_boot) for factor in factors for fit in (first, second)]
    bias: dict[tuple[int, str], float] = {}
    if law is not None:
        own_trends = parametric(rows, factors, law, compute=compute, space=space, draws=draws)
        trends += own_trends.values()
        exact = rows.assign(**{y: evaluate(law, rows)[0]})
        for factor, own in own_trends.items():
            for fit in (first, second):
                found = fit(exact, factor, 0)
                if found.exponent is not None and own.exponent is not None:
                    bias[found.approach, factor] = found.exponent - own.exponent
    return Comparison(tuple(trends), bias)
