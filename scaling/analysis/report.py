"""What a study found: every fit with the choices behind it, as one JSON value (``fits.json``).

The headline is the power law of the pool loss in PF-days on the compute frontier. It is called a
conclusion only if it survives the choices that a reader could have made otherwise: counting of
compute, objective, points. Every one of these fits is in the result.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, spearmanr

import scaling
from scaling.analysis.additive import FitError, FitStatus
from scaling.analysis.downstream import SYSTEM, correlations, downstream_points
from scaling.analysis.fit import LOG_HUBER_DELTA, PowerLawFit, fit_power_law
from scaling.analysis.law import fit_law
from scaling.files import write_json
from scaling.results import Tables

FITS_VERSION = 1

COMPUTE = {
    "pf_days": "6 x n_total x batch_size x steps x sequence_length / 8.64e19 (the paper's formula)",
    "pf_days_non_embedding": "the same formula with n_non_embedding in place of n_total",
    "pf_days_exact": "counted from the lengths of the logs, stack by stack, / 8.64e19",
}
"""The countings of compute that every fit in it is repeated with."""
DELTAS = (1e-4, 1e-2, float("inf"))
"""Knees of the Huber loss that the headline is repeated with; infinity is least squares."""
FACTORS = ("n_total", "batch_size", "items_per_user", "users_seen")
"""Factors of the joint law; those that a sweep does not vary are left out, with the reason."""
JOINT_DRAWS = 400
"""At most so many bootstrap draws for the joint law, the slow fit: enough for a verdict."""


def study(
    tables: Tables, *, n_boot: int = 1000, seed: int = 0, delta: float = LOG_HUBER_DELTA
) -> dict[str, Any]:
    """Fit everything the tables allow; a fit that cannot be made says why in its place.

    Returns:
        JSON-able: ``rows`` (used and dropped, by rule), ``rank_correlation`` of loss with compute,
        ``compute`` (``headline``, ``alternatives``, ``conclusion``), ``joint``, ``transfer``.
    """
    runs, rows = _rows(tables)
    return {
        "schema_version": FITS_VERSION,
        "program": f"clue-scaling {scaling.__version__}",
        "sweep": tables.collected.get("sweep"),
        "y": "loss: contrastive loss on the fixed pool at the final step [nats]",
        "counting": COMPUTE,
        "rows": rows,
        "rank_correlation": {x: _rank_correlation(runs, x) for x in COMPUTE},
        "compute": _compute(runs, n_boot, seed, delta),
        "joint": _joint(runs, n_boot, seed, delta),
        "transfer": _transfer(tables),
    }


def write_study(fits: Mapping[str, Any], folder: Path) -> Path:
    """Write ``fits.json`` into ``results/<sweep>`` and return its path."""
    path = folder / "fits.json"
    write_json(path, fits)
    return path


def _rows(tables: Tables) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Runs to fit, and the account of all others."""
    runs = tables.runs.copy()
    share = runs["n_non_embedding"].astype(float) / runs["n_total"].astype(float)
    runs["pf_days_non_embedding"] = runs["pf_days"] * share
    pools = runs.loc[runs["loss"].notna(), "pool_digest"].value_counts()
    pool = pools.index[0] if len(pools) else None
    rules = {
        "not over": runs["status"].isna(),
        "diverged": runs["status"] == "diverged",
        "no loss": runs["loss"].isna(),
        "another pool than most runs": runs["pool_digest"] != pool,
    }
    keep = pd.Series(True, index=runs.index)
    dropped = []
    for rule, true in rules.items():
        now = keep & true.fillna(False)
        if now.any():
            keys = [None if pd.isna(k) else str(k) for k in runs.loc[now, "run_key"]]
            dropped.append({"rule": rule, "count": int(now.sum()), "run_keys": keys})
        keep &= ~now
    account = {
        "table": len(runs), "used": int(keep.sum()), "dropped": dropped, "pool_digest": pool,
        "exclusions_by_hand": 0,
    }  # fmt: skip
    return runs[keep], account


def _rank_correlation(runs: pd.DataFrame, x: str) -> dict[str, Any]:
    pairs = runs[[x, "loss"]].dropna()
    if len(pairs) < 3 or pairs[x].nunique() < 2 or pairs["loss"].nunique() < 2:
        return {"n": len(pairs), "spearman": None, "kendall": None}
    return {
        "n": len(pairs),
        "spearman": float(spearmanr(pairs[x], pairs["loss"]).statistic),
        "kendall": float(kendalltau(pairs[x], pairs["loss"]).statistic),
    }


def _fit(runs: pd.DataFrame, x: str, **choices: Any) -> tuple[PowerLawFit | None, dict[str, Any]]:
    """One law in compute with its choices; where it cannot be fitted, the reason."""
    named = {
        "x": x,
        "points": "frontier" if choices["frontier"] else "all",
        "floor": choices["irreducible"],
        "delta": choices["delta"] if np.isfinite(choices["delta"]) else "inf",
    }
    try:
        fit = fit_power_law(runs, x=x, y="loss", **choices)
    except FitError as e:
        return None, {**named, "fit": None, "failed": str(e)}
    return fit, {**named, "fit": fit.to_dict(), "failed": None}


def _compute(runs: pd.DataFrame, n_boot: int, seed: int, delta: float) -> dict[str, Any]:
    base = {
        "frontier": True,
        "irreducible": False,
        "delta": delta,
        "n_boot": n_boot,
        "seed": seed,
    }
    choices: list[tuple[str, dict[str, Any]]] = [("pf_days", {"frontier": False})]
    choices += [(x, {}) for x in COMPUTE if x != "pf_days"]
    choices += [("pf_days", {"delta": d}) for d in DELTAS if d != delta]
    choices += [("pf_days", {"irreducible": True, "frontier": f}) for f in (True, False)]
    headline, record = _fit(runs, "pf_days", **base)
    alternatives = [_fit(runs, x, **{**base, **changed}) for x, changed in choices]
    return {
        "headline": record,
        "alternatives": [other for _, other in alternatives],
        "conclusion": _conclusion(headline, [(fit, other) for fit, other in alternatives]),
    }


def _conclusion(
    headline: PowerLawFit | None, alternatives: list[tuple[PowerLawFit | None, dict[str, Any]]]
) -> dict[str, Any]:
    """Whether the exponent may be stated, by the rule in ``rule``."""
    rule = (
        "status CONVERGED, 95 % interval above zero, and overlapping the 95 % interval of every "
        "alternative without floor"
    )
    if headline is None or headline.draws.empty:
        return {"holds": False, "rule": rule, "against": ["the headline could not be fitted"]}
    low, high = (float(headline.ci()[end]["exponent"]) for end in ("lower", "upper"))
    against = []
    if headline.status is not FitStatus.CONVERGED:
        against.append(f"headline: {headline.status}, {headline.message}")
    if low <= 1e-3:
        against.append(f"headline: the 95 % interval [{low:.3g}, {high:.3g}] does not exclude zero")
    for fit, record in alternatives:
        if record["floor"]:
            continue
        name = f"{record['x']}, {record['points']} points, delta {record['delta']}"
        if fit is None:
            against.append(f"{name}: {record['failed']}")
            continue
        other_low, other_high = (float(fit.ci()[end]["exponent"]) for end in ("lower", "upper"))
        if other_high < low or other_low > high:
            against.append(
                f"{name}: exponent {fit.params['exponent']:.3g} "
                f"[{other_low:.3g}, {other_high:.3g}] disagrees"
            )
    return {"holds": not against, "rule": rule, "against": against}


def _joint(runs: pd.DataFrame, n_boot: int, seed: int, delta: float) -> dict[str, Any]:
    """The law in all factors that the sweep varies, with and without floor."""
    fixed = {f: "the same in every run" for f in FACTORS if runs[f].nunique() < 2}
    factors = [f for f in FACTORS if f not in fixed]
    out: dict[str, Any] = {"factors": factors, "left_out": fixed}
    for name, floor in (("with_floor", True), ("without_floor", False)):
        try:
            fit = fit_law(
                runs, factors=factors, y="loss", irreducible=floor, delta=delta,
                n_boot=min(n_boot, JOINT_DRAWS), seed=seed,
            )  # fmt: skip
        except FitError as e:
            out[name] = {"fit": None, "failed": str(e)}
            continue
        out[name] = {"fit": fit.to_dict(), "failed": None}
    return out


def _transfer(tables: Tables) -> dict[str, Any]:
    """Per task: correlation of downstream and pretraining loss over runs."""
    points = downstream_points(tables.transfer, tables.runs)
    return {
        task: {"system": SYSTEM, "n": len(some), **correlations(some)}
        for task, some in points.items()
    }
