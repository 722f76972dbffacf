"""The allocation that a sweep's results support: rows, law, limits and refusals declared here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal

import numpy as np
import pandas as pd

from scaling.analysis.allocation.optimum import DRAWS, WITHIN, Allocation, allocate
from scaling.analysis.allocation.shapes import between, growing
from scaling.analysis.allocation.snap import Snapped, snap
from scaling.analysis.allocation.trend import AllocationError, column
from scaling.analysis.allocation.workload import COMPUTE, Counting, Limits, Workload
from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.status import FitStatus
from scaling.analysis.fitting.verdicts import IDENTIFICATION
from scaling.config import PAPER_VOCABULARY, CorpusCard, ModelConfig
from scaling.results import Tables

FACTORS = ("n_total", "batch_size", "items_per_user_mean", "users_seen")
"""Factors of the default law, as far as a sweep varies them (``IDENTIFICATION``)."""
DEPENDS = {
    "n_total": ("n_total", "n_non_embedding", "n_item", "n_service"),
    "batch_size": ("batch_size", "negatives", "users_seen", "epochs", "repeats"),
    "items_per_user": ("items_per_user", "items_per_user_mean", "sequence_length"),
}
"""Columns of a law through which each quantity acts."""
REACH = 10.0
"""Quantities and budgets further than this beyond the fitted runs are not trusted: the default
limits of quantities end there, and a budget beyond is warned of."""


@dataclass(frozen=True, eq=False)
class SweepAllocation:
    """What a sweep says of a budget.

    Attributes:
        law: the joint law.
        rows: runs ``used`` and ``dropped`` by rule.
        chosen: the continuous optimum.
        snapped: real configurations; None where users have a price.
        workload: what was searched, and the steps of every run.
        warnings: of the law, the budget and the optimum.
    """

    law: LawFit
    rows: Mapping[str, Any]
    chosen: Allocation
    snapped: Snapped | None
    workload: Workload
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As one JSON value."""
        return {
            "rows": dict(self.rows),
            "steps": self.workload.steps,
            "law": self.law.to_dict(),
            **self.chosen.to_dict(),
            "warnings": list(self.warnings),
            "snapped": self.snapped.to_dict() if self.snapped else None,
        }


def allocate_sweep(
    tables: Tables,
    card: CorpusCard,
    sizes: Mapping[str, ModelConfig],
    budget: float,
    *,
    form: str | None = None,
    counting: Counting = "exact",
    max_batch: int | None = None,
    max_items: int | None = None,
    max_repeats: float | None = None,
    user_price: float | None = None,
    batch_step: int = 32,
    items_step: int = 16,
    within: float = WITHIN,
    n_boot: int = DRAWS,
    seed: int = 0,
) -> SweepAllocation:
    """Fit the joint law of a sweep's runs and choose the best use of a budget.

    Models are those of the sweep and, at the paper's vocabulary, the named sizes. Batch size and
    items per user reach ``REACH`` beyond those of the runs unless a limit is given; what the runs
    do not vary stays as it is.

    Args:
        tables: of the sweep.
        card: its corpus.
        sizes: named sizes.
        budget: [PF-days], in ``counting``.
        form: the law; by default E and a power of each of ``FACTORS`` that varies.
        max_batch, max_items, max_repeats, user_price: as of ``Limits``.
        batch_step, items_step: as of ``snap``.
        n_boot: bootstrap draws of the law, at least 2.

    Raises:
        AllocationError: the runs are of several corpora, steps or systems; the law did not
            converge, or an exponent of it is not identified; nothing within the limits fits.
        FitError, FormError: the law cannot be fitted.
    """
    runs, rows = _fitted_runs(tables, card)
    law = fit_law(
        runs, form or " + ".join(["E", *_varied(runs)]), y="loss", n_boot=max(n_boot, 2), seed=seed
    )
    _refuse_unidentified(law)
    workload = _workload(runs, card, sizes, law, counting, Limits(
        max_repeats=max_repeats, user_price=user_price,
        batch_size=_reach(runs, "batch_size", law, max_batch),
        items_per_user=_reach(runs, "items_per_user", law, max_items),
        n_total=None if _acts(law, "n_total") else _reach(runs, "n_total", law, None),
    ))  # fmt: skip
    chosen = allocate(law, workload, budget, within=within, draws=n_boot)
    snapped = None
    if user_price is None:
        widths = [s.d_model for s in workload.family.shapes]
        width = 64 if max(widths) >= 256 else gcd(*widths)
        snapped = snap(
            chosen, law, workload, between(workload.family.shapes, width_step=width),
            batch_step=batch_step, items_step=items_step, sizes=sizes,
        )  # fmt: skip
    warnings = (*_warnings(runs, law, chosen, counting), *chosen.warnings)
    return SweepAllocation(law, rows, chosen, snapped, workload, warnings)


def _fitted_runs(tables: Tables, card: CorpusCard) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Runs to fit, each rule that left some out, and a refusal where they are not of one kind."""
    runs = tables.runs
    pools = runs.loc[runs["loss"].notna(), "pool_digest"].value_counts()
    pool = pools.index[0] if len(pools) else None
    rules = {
        "not done": (runs["status"] != "done").fillna(True),
        "no loss": runs["loss"].isna(),
        "another pool than most runs": (runs["pool_digest"] != pool).fillna(True),
    }
    keep, dropped = pd.Series(True, index=runs.index), {}
    for rule, true in rules.items():
        if count := int((keep & true).sum()):
            dropped[rule] = count
        keep &= ~true
    used = runs[keep]
    for name in ("steps", "services", "corpus_digest", "feature_dim"):
        values = used[name].astype(object).unique()
        if len(values) > 1:
            raise AllocationError(
                f"the runs differ in {name} ({', '.join(map(str, values))}); an allocation is for "
                "one of them"
            )
    if len(used) and card.digest not in (None, used["corpus_digest"].iloc[0]):
        raise AllocationError(
            f"the runs are on corpus {used['corpus_digest'].iloc[0]}, and {card.name} is now "
            f"{card.digest}: its lengths are not theirs"
        )
    return used, {"table": len(runs), "used": len(used), "dropped": dropped}


def _varied(runs: pd.DataFrame) -> list[str]:
    """Factors of the default law that the runs vary enough for an exponent.

    Raises:
        AllocationError: there is none.
    """
    rule, found = IDENTIFICATION, []
    for name in FACTORS:
        values = column(runs, name)
        if len(np.unique(values)) >= rule.min_values and np.ptp(np.log(values)) >= np.log(
            rule.min_range
        ):
            found.append(name)
    if not found:
        raise AllocationError(
            f"none of {', '.join(FACTORS)} has {rule.min_values} values over a factor of "
            f"{rule.min_range:g} in the {len(runs)} runs"
        )
    return found


def _refuse_unidentified(law: LawFit) -> None:
    """An optimum rests on every exponent: without one of them there is no optimum to print."""
    if law.status is not FitStatus.CONVERGED:
        reasons = [f"{law.status}, {law.message}"]
    else:
        table = law.identified()
        unknown = table[~table["identified"]]
        reasons = [f"exponent of {name}: {row['reasons']}" for name, row in unknown.iterrows()]
    if reasons:
        said = "\n".join(f"  {reason}" for reason in reasons)
        raise AllocationError(
            f"the law {law.form} is not identified by {law.n} runs, so no allocation follows from "
            f"it:\n{said}\n  another law: --form"
        )


def _acts(law: LawFit, quantity: str) -> bool:
    return any(name in law.form.columns for name in DEPENDS[quantity])


def _reach(
    runs: pd.DataFrame, quantity: str, law: LawFit, most: float | None
) -> tuple[float, float]:
    """Default limits of a quantity, or its one value where the law does not know it."""
    values = column(runs, quantity)
    if not _acts(law, quantity):
        if np.ptp(values) > 0:
            raise AllocationError(
                f"the runs vary {quantity}, and the law {law.form} has none of "
                f"{', '.join(DEPENDS[quantity])}: nothing says which to choose"
            )
        return float(values[0]), float(values[0])
    low, high = max(1.0, values.min() / REACH), values.max() * REACH
    if quantity == "batch_size":
        low = max(2.0, low)
    high = float(most) if most is not None else float(high)
    return min(float(low), high), high


def _workload(
    runs: pd.DataFrame,
    card: CorpusCard,
    sizes: Mapping[str, ModelConfig],
    law: LawFit,
    counting: Counting,
    limits: Limits,
) -> Workload:
    """The space that the runs are of."""
    first = runs.iloc[0]
    services = None if pd.isna(first["services"]) else tuple(str(first["services"]).split("+"))
    single = str(first["model"]).startswith("single")
    system: Literal["single", "clue"] = "single" if single else "clue"
    feature = None if pd.isna(first["feature_dim"]) else int(first["feature_dim"])
    distinct = runs[["layers", "d_model", "heads"]].drop_duplicates().astype(int)
    shapes = [
        ModelConfig(system=system, feature_dim=feature, **{str(k): int(v) for k, v in row.items()})
        for row in distinct.to_dict("records")
    ]
    if card.vocab_size == PAPER_VOCABULARY and _acts(law, "n_total"):
        named = [size.model_copy(update={"feature_dim": feature}) for size in sizes.values()]
        # dropout is no part of a size, and one shape is one model here
        known = {(s.layers, s.d_model) for s in shapes}
        shapes += [s for s in named if s.system == system and (s.layers, s.d_model) not in known]
    batches, negatives = column(runs, "batch_size"), column(runs, "negatives")
    apart = bool((batches != negatives).any())
    if apart and np.ptp(negatives) > 0:
        raise AllocationError("the runs vary negatives apart from batch_size: fix one of them")
    if apart:
        low = max(limits.batch_size[0], negatives[0])
        limits = replace(limits, batch_size=(low, max(low, limits.batch_size[1])))
    return Workload(
        card, growing(shapes, card.vocab_size, max(2, len(services or card.services))),
        steps=int(first["steps"]), services=services,
        negatives=int(negatives[0]) if apart else None, counting=counting, limits=limits,
    )  # fmt: skip


def _warnings(runs: pd.DataFrame, law: LawFit, chosen: Allocation, counting: Counting) -> list[str]:
    said = []
    spent = column(runs, COMPUTE[counting])
    for end, factor, which in (
        (spent.max(), chosen.budget / spent.max(), "above the most"),
        (spent.min(), spent.min() / chosen.budget, "below the least"),
    ):
        if factor > REACH:
            said.append(
                f"the budget is a factor of {factor:.3g} {which} that a fitted run took, {end:.4g} "
                "PF-days: the law is not known there"
            )
    for name, (low, high) in law.ranges().items():
        value = float(chosen.point[name])
        if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
            said.append(f"{name} = {value:.6g} is beyond the fitted runs, {low:.6g} to {high:.6g}")
    seen = column(runs, "users_seen")
    if np.ptp(seen) > 0 and not {"users_seen", "repeats", "epochs"} & set(law.form.columns):
        said.append(
            f"users_seen varies by a factor of {seen.max() / seen.min():.3g} between the runs, and "
            "the law knows nothing of it"
        )
    floor = law.floor()
    if law.form.floor and not floor.identified:
        said.append(f"the floor E is not identified: {'; '.join(floor.reasons)}")
    return said
