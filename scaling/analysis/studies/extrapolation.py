"""How far the study's laws can be extrapolated, and how its factors grew along the frontier."""

from typing import Any

from scaling.analysis.allocation.approaches import compare_approaches
from scaling.analysis.allocation.trend import AllocationError
from scaling.analysis.fitting.rollout import rollout
from scaling.analysis.fitting.status import FitError
from scaling.analysis.studies.choices import Choice
from scaling.analysis.studies.factors import additive
from scaling.analysis.studies.laws import ALTERNATIVE_DRAWS, Laws

PRODUCT = ("n_total", "batch_size", "items_per_user")
"""Factors whose product the paper's compute is: the cap, not the realised mean."""
ROLLOUT_DRAWS = 50
"""Bootstrap draws of every window of a rollout."""


def rollouts(laws: Laws) -> list[dict[str, Any]]:
    """Fit small, predict large: the power law in compute, with and without floor, by compute; the
    additive joint law by each of its factors and by compute.

    Returns:
        Per law and column ``form``, ``by``, ``rollout`` (``Rollout.to_dict``) and ``failed``.
    """
    names = laws.factors().names
    asked = [("pf_days", "pf_days"), ("E + pf_days", "pf_days")]
    if names:
        asked += [(additive(names), by) for by in ("pf_days", *names)]
    return [_rollout(laws, form, by) for form, by in asked]


def _rollout(laws: Laws, form: str, by: str) -> dict[str, Any]:
    draws = min(laws.n_boot, ROLLOUT_DRAWS)
    try:
        found = rollout(laws.runs, form, y="loss", by=by, n_boot=draws, seed=laws.seed)
    except FitError as e:
        return {"form": form, "by": by, "rollout": None, "failed": str(e)}
    return {"form": form, "by": by, "rollout": found.to_dict(), "failed": None}


def approaches(laws: Laws) -> dict[str, Any]:
    """How model, batch and sequence length should grow with compute, by approach 1 (envelope), 2
    (IsoFLOP) and 3 (the joint law), with their disagreement."""
    varying = [name for name in PRODUCT if laws.runs[name].nunique() > 1]
    if len(varying) < 2:
        return {"comparison": None, "failed": "fewer than two factors of compute vary"}
    try:
        law = laws.fit("joint", Choice(length="items_per_user"))
    except FitError:
        law = None
    try:
        found = compare_approaches(
            laws.runs, PRODUCT, law=law, n_boot=min(laws.n_boot, ALTERNATIVE_DRAWS), seed=laws.seed
        )
    except AllocationError as e:
        return {"comparison": None, "failed": str(e)}
    return {"comparison": found.to_dict(), "failed": None}
