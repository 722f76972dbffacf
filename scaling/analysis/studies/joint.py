"""The joint law of model size, batch size, sequence length and users seen."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.fitting.comparison import compare_forms
from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.record import plain
from scaling.analysis.fitting.status import FitError
from scaling.analysis.studies.choices import Choice
from scaling.analysis.studies.factors import additive, joint_forms, size_forms
from scaling.analysis.studies.laws import ALTERNATIVE_DRAWS, FOLDS, Laws
from scaling.analysis.studies.runs import run_key

CURVE_POINTS = 41


def joint(laws: Laws) -> dict[str, Any]:
    """``factors`` and those ``left_out`` with the reason; the additive law ``with_floor`` and
    ``without_floor``, and of the ``best_checkpoint``; the laws with ``repetition``; ``forms`` and
    ``sizes``: which form and which counting of parameters predicts runs left out; ``panels`` and
    ``points`` to draw."""
    factors = laws.factors()
    forms = joint_forms(factors) if factors.names else {}
    sizes, size_left_out = size_forms(laws.runs, factors)
    out = {
        "factors": list(factors.names),
        "left_out": factors.left_out,
        **_with_and_without_floor(laws),
        "best_checkpoint": _said(partial(laws.fit, "joint", Choice(y="best_loss"))),
        "repetition": {
            law: _said(partial(laws.fit, law)) for law in ("repeated", "rising") if law in forms
        },
        "forms": _compared(laws, forms),
        "sizes": _compared(laws, sizes) | {"left_out": size_left_out},
    }
    try:
        shown = laws.fit("joint")
    except FitError:
        return out | {"panels": {}, "points": []}
    return out | {"panels": _panels(shown), "points": _points(shown, laws.runs)}


def _with_and_without_floor(laws: Laws) -> dict[str, Any]:
    """The additive law that conclusions rest on, and its other half: with the floor at its bound of
    zero there is nothing to draw, so that this one has no intervals."""
    names = laws.factors().names
    chosen = _said(partial(laws.fit, "joint"))
    if not names:
        return {"with_floor": chosen, "without_floor": chosen}
    if chosen["fit"] and not chosen["fit"]["form"].startswith("E + "):
        other = _said(partial(_fit, laws, additive(names), 0))
        return {"with_floor": other, "without_floor": chosen}
    other = _said(partial(_fit, laws, additive(names, floor=False), ALTERNATIVE_DRAWS))
    return {"with_floor": chosen, "without_floor": other}


def _fit(laws: Laws, form: str, draws: int) -> LawFit:
    return fit_law(laws.runs, form, y="loss", n_boot=min(laws.n_boot, draws), seed=laws.seed)


def _said(make: Callable[[], LawFit]) -> dict[str, Any]:
    """A fit's record, or why there is none."""
    try:
        return {"fit": make().to_dict(), "failed": None}
    except FitError as e:
        return {"fit": None, "failed": str(e)}


def _compared(laws: Laws, forms: dict[str, str]) -> dict[str, Any]:
    try:
        compared = compare_forms(laws.runs, forms, y="loss", folds=FOLDS, seed=laws.seed)
    except FitError as e:
        return {"comparison": None, "failed": str(e)}
    return {"comparison": compared.to_dict(), "failed": None}


def _panels(fit: LawFit) -> dict[str, Any]:
    """Per factor the law along it, the others at their medians ``at``: columns ``x y lower
    upper``."""
    used = fit.weights > 0
    medians = {c: float(np.median(x[used])) for c, x in fit.columns.items()}
    panels = {}
    for name, (low, high) in fit.ranges().items():
        grid = np.geomspace(low, high, CURVE_POINTS)
        band = fit.predict(pd.DataFrame({**medians, name: grid}))
        columns = {"x": name, "y": "y", "lower": "lower", "upper": "upper"}
        panels[name] = {
            "at": {c: v for c, v in medians.items() if c != name},
            "curve": {
                k: [plain(v) for v in band[c]] for k, c in columns.items() if c in band
            },
        }  # fmt: skip
    return panels


def _points(fit: LawFit, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Per run the law's value and the residual ln(loss / fitted)."""
    fitted = fit.predict(runs, level=None)["y"].to_numpy()
    residual = np.log(runs[fit.y].to_numpy(dtype=np.float64) / fitted)
    return [
        {"run_key": run_key(k), "fitted": plain(f), "residual": plain(r)}
        for k, f, r in zip(runs["run_key"], fitted, residual, strict=True)
    ]
