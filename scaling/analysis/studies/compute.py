"""Laws of the loss in compute: the frontier's power law, and what else could describe Fig. 4."""

from typing import Any

import pandas as pd
from scipy.stats import kendalltau, spearmanr

from scaling.analysis.fitting.status import FitError
from scaling.analysis.studies.choices import COMPUTE, Choice, one_at_a_time
from scaling.analysis.studies.laws import AXES, Laws

FLOORS = (Choice(), Choice(points="all"))
"""Choices under which the law in compute is also fitted with a floor."""


def rank_correlation(runs: pd.DataFrame, x: str, y: str = "loss") -> dict[str, Any]:
    """``n``, Spearman's and Kendall's correlation; None without three runs or a spread."""
    pairs = runs[[x, y]].dropna()
    if len(pairs) < 3 or pairs[x].nunique() < 2 or pairs[y].nunique() < 2:
        return {"n": len(pairs), "spearman": None, "kendall": None}
    return {
        "n": len(pairs),
        "spearman": float(spearmanr(pairs[x], pairs[y]).statistic),
        "kendall": float(kendalltau(pairs[x], pairs[y]).statistic),
    }


def compute_laws(laws: Laws) -> dict[str, Any]:
    """``headline`` law, ``alternatives`` with one choice changed or with a floor, and ``shapes``:
    log-linear, power law with and without floor by held-out error, per counting of compute."""
    choices = one_at_a_time(laws.runs, AXES["compute"])
    return {
        "headline": _record(laws, "compute", choices[0]),
        "alternatives": [_record(laws, "compute", choice) for choice in choices[1:]]
        + [_record(laws, "compute_floor", choice) for choice in FLOORS],
        "shapes": {x: _shapes(laws, Choice(compute=x)) for x in COMPUTE},
    }


def _record(laws: Laws, law: str, choice: Choice) -> dict[str, Any]:
    """One law with its choices; where it cannot be fitted, the reason."""
    named = {
        "x": choice.compute,
        "y": choice.y,
        "points": choice.points,
        "floor": law == "compute_floor",
        "objective": choice.objective,
        "rows": choice.rows,
    }
    try:
        fit = laws.fit(law, choice)
    except FitError as e:
        return {**named, "fit": None, "failed": str(e)}
    return {**named, "fit": fit.to_dict(), "failed": None}


def _shapes(laws: Laws, choice: Choice) -> dict[str, Any]:
    try:
        return {"comparison": laws.comparison(choice).to_dict(), "failed": None}
    except FitError as e:
        return {"comparison": None, "failed": str(e)}
