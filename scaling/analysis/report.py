"""What a study found: every fit with the choices behind it, as one JSON value (``fits.json``).

The headline is the power law of the pool loss in PF-days on the compute frontier. It is called a
conclusion only if it survives the choices that a reader could have made otherwise: counting of
compute, objective, points, pool. Every one of these fits is in the result.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, spearmanr

import scaling
from scaling.analysis.downstream import correlations, downstream_points
from scaling.analysis.fitting.fit import fit_law, fit_power_law
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.objective import HUBER_DELTA, Objective
from scaling.analysis.fitting.status import FitError, FitStatus
from scaling.analysis.gains import gains_report
from scaling.files import write_json
from scaling.results import Tables

FITS_VERSION = 2

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
POOL_LOSS = "loss_pool_"
"""Beginning of the columns with the loss over smaller pools; the pool size follows."""
JOINT_DRAWS = 400
"""At most so many bootstrap draws for the joint law, the slow fit: enough for a verdict."""


def study(
    tables: Tables, *, n_boot: int = 1000, seed: int = 0, delta: float = HUBER_DELTA
) -> dict[str, Any]:
    """Fit everything the tables allow; a fit that cannot be made says why in its place.

    Returns:
        JSON-able: ``rows`` (used and dropped, by rule), ``rank_correlation`` of loss with compute,
        ``compute`` (``headline``, ``alternatives``, ``conclusion``), ``joint``, ``transfer``,
        ``gains``.
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
        "gains": gains_report(tables.gains),
    }


def write_study(fits: Mapping[str, Any], folder: Path) -> Path:
    """Write ``fits.json`` into ``results/<sweep>`` and return its path."""
    path = folder / "fits.json"
    write_json(path, fits)
    return path


def _rows(tables: Tables) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Runs to fit, and the account of all others."""
    runs = tables.runs.merge(_smaller_pools(tables), on="run_key", how="left")
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


def _smaller_pools(tables: Tables) -> pd.DataFrame:
    """``run_key`` and ``loss_pool_<size>``: final losses over each smaller pool size."""
    curves = tables.curves[tables.curves["kind"] == "pool"]
    ends = tables.runs[["run_key", "step", "pool_size"]].dropna()
    last = curves.merge(ends, on=["run_key", "step"], suffixes=("", "_whole"))
    last = last[(last["pool_size"] < last["pool_size_whole"]).fillna(False)]
    wide = last.pivot_table(index="run_key", columns="pool_size", values="loss")
    return wide.rename(columns=lambda size: f"{POOL_LOSS}{size}").reset_index()


def _fit(
    runs: pd.DataFrame, x: str, y: str, **choices: Any
) -> tuple[LawFit | None, dict[str, Any]]:
    """One law in compute with its choices; where it cannot be fitted, the reason."""
    named = {
        "x": x,
        "y": y,
        "points": "frontier" if choices["frontier"] else "all",
        "floor": choices["irreducible"],
        "delta": choices["delta"] if np.isfinite(choices["delta"]) else "inf",
    }
    try:
        objective = Objective(delta=choices.pop("delta"))
        fit = fit_power_law(runs, x=x, y=y, objective=objective, **choices)
    except FitError as e:
        return None, {**named, "fit": None, "failed": str(e)}
    return fit, {**named, "fit": fit.to_dict(), "failed": None}


def _compute(runs: pd.DataFrame, n_boot: int, seed: int, delta: float) -> dict[str, Any]:
    base: dict[str, Any] = {
        "x": "pf_days",
        "y": "loss",
        "frontier": True,
        "irreducible": False,
        "delta": delta,
        "n_boot": n_boot,
        "seed": seed,
    }
    choices: list[dict[str, Any]] = [{"frontier": False}]
    choices += [{"x": x} for x in COMPUTE if x != base["x"]]
    choices += [{"y": y} for y in ("loss_refit", _other_pool(runs)) if y]
    choices += [{"delta": d} for d in DELTAS if d != delta]
    choices += [{"irreducible": True, "frontier": f} for f in (True, False)]
    headline, record = _fit(runs, **base)
    alternatives = [_fit(runs, **{**base, **changed}) for changed in choices]
    return {
        "headline": record,
        "alternatives": [other for _, other in alternatives],
        "conclusion": _conclusion(headline, record, alternatives),
    }


def _other_pool(runs: pd.DataFrame) -> str | None:
    """Loss over the largest smaller pool that every run was evaluated on."""
    names = [str(c) for c in runs.columns]
    whole = [c for c in names if c.startswith(POOL_LOSS) and runs[c].notna().all()]
    return max(whole, key=lambda c: int(c.removeprefix(POOL_LOSS)), default=None)


def _conclusion(
    headline: LawFit | None,
    chosen: Mapping[str, Any],
    alternatives: list[tuple[LawFit | None, dict[str, Any]]],
) -> dict[str, Any]:
    """Whether the exponent may be stated, by the rule in ``rule``.

    A reason in ``against`` begins with ``headline:`` or with the choice an alternative changes.
    """
    rule = (
        "status CONVERGED, 95 % interval above zero, and overlapping the 95 % interval of every "
        "alternative without floor, each of which is CONVERGED"
    )
    if headline is None or headline.draws.empty:
        return {"holds": False, "rule": rule, "against": ["headline: could not be fitted"]}
    low, high = (float(headline.ci()[end]["exponent"]) for end in ("lower", "upper"))
    against = []
    if headline.status is not FitStatus.CONVERGED:
        against.append(f"headline: {headline.status}, {headline.message}")
    if low <= 1e-3:
        against.append(f"headline: zero is in the 95 % interval [{low:.3g}, {high:.3g}]")
    for fit, record in alternatives:
        if record["floor"]:
            continue
        name = ", ".join(
            f"{key} {record[key]}"
            for key in ("x", "y", "points", "delta")
            if record[key] != chosen[key]
        )
        if fit is None:
            against.append(f"{name}: {record['failed']}")
            continue
        if fit.status is not FitStatus.CONVERGED:
            against.append(f"{name}: {fit.status}, {fit.message}")
            continue
        other_low, other_high = (float(fit.ci()[end]["exponent"]) for end in ("lower", "upper"))
        if other_high < low or other_low > high:
            against.append(
                f"{name}: exponent {fit.params['exponent']:.3g} disagrees "
                f"[{other_low:.3g}, {other_high:.3g}]"
            )
    return {"holds": not against, "rule": rule, "against": against}


def _joint(runs: pd.DataFrame, n_boot: int, seed: int, delta: float) -> dict[str, Any]:
    """The law in all factors that the sweep varies, with and without floor."""
    fixed = {f: "the same in every run" for f in FACTORS if runs[f].nunique() < 2}
    factors = [f for f in FACTORS if f not in fixed]
    out: dict[str, Any] = {"factors": factors, "left_out": fixed}
    for name, floor in (("with_floor", True), ("without_floor", False)):
        if not factors:
            out[name] = {"fit": None, "failed": "no factor varies"}
            continue
        try:
            fit = fit_law(
                runs, " + ".join([*["E"] * floor, *factors]), y="loss",
                objective=Objective(delta=delta), n_boot=min(n_boot, JOINT_DRAWS), seed=seed,
            )  # fmt: skip
        except FitError as e:
            out[name] = {"fit": None, "failed": str(e)}
            continue
        out[name] = {"fit": fit.to_dict(), "failed": None}
    return out


def _transfer(tables: Tables) -> dict[str, Any]:
    """Per task: correlation of downstream and pretraining loss over runs."""
    return {
        task: {
            "system": found.system,
            "n": len(found.points),
            **correlations(found.points),
            "left_out": list(found.left_out),
            "failed": found.failed,
        }
        for task, found in downstream_points(tables.transfer, tables.runs).items()
    }
