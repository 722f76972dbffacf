"""Real configurations near an optimum: whole layers, widths that heads divide, whole batches.

A continuous optimum cannot be run. Listed here are configurations that can, each using the budget
as far as its steps allow, with the loss that the law predicts and how sure it is that the loss is
as good as the best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.allocation.optimum import Allocation, Law, evaluate
from scaling.analysis.allocation.shapes import shape_numbers
from scaling.analysis.allocation.trend import AllocationError, Array
from scaling.analysis.allocation.workload import Workload
from scaling.analysis.fitting.record import plain_rows
from scaling.config import ModelConfig
from scaling.sweeps import model_name

LEVELS = 400
"""Batch sizes that are tried at most; where there are more multiples, evenly in the logarithm."""
LISTED = 1000
"""Configurations that are listed at most, the best."""
SPENT = 0.5
"""Configurations that use less than this of what the optimum spends are not listed."""


@dataclass(frozen=True, eq=False)
class Snapped:
    """Real configurations, the best first.

    Attributes:
        table: one row a configuration: ``model``, ``layers``, ``d_model``, ``heads``, the columns
            of ``Workload.rows``, ``spent`` (share of the budget), ``loss``, ``excess`` (over the
            continuous optimum, relative) and, where the law has draws, ``share_within``: of draws
            under which its excess over that draw's own optimum is at most ``within``.
        within: the relative excess that counts as optimal.
    """

    table: pd.DataFrame
    within: float

    @property
    def best(self) -> "pd.Series[Any]":
        """The configuration with the lowest predicted loss."""
        return self.table.iloc[0]

    @property
    def region(self) -> pd.DataFrame:
        """Those whose excess is at most ``within``."""
        return self.table[self.table["excess"] <= self.within]

    def to_dict(self, rows: int = 20) -> dict[str, Any]:
        """As one JSON value.

        Args:
            rows: configurations at most, the best.
        """
        columns = [
            "model", "layers", "d_model", "heads", "n_total", "n_non_embedding", "batch_size",
            "items_per_user", "items_per_user_mean", "n_users", "users_seen", "repeats", "pf_days",
            "pf_days_exact", "spent", "loss", "excess", "share_within",
        ]  # fmt: skip
        table = self.table.reindex(columns=columns).head(rows)
        return {
            "within": self.within,
            "in_region": len(self.region),
            "listed": len(self.table),
            "configurations": plain_rows(table),
        }


def snap(
    allocation: Allocation,
    law: Law,
    workload: Workload,
    shapes: Sequence[ModelConfig],
    *,
    batch_step: int = 32,
    items_step: int = 16,
    sizes: Mapping[str, ModelConfig] | None = None,
) -> Snapped:
    """List real configurations within a budget, by the loss that a law predicts.

    For each shape and batch size the largest cap on items that the budget allows.

    Args:
        allocation: the continuous optimum, in ``workload``.
        shapes: architectures to consider, such as ``shapes.between`` of the family's.
        batch_step: batch sizes are multiples of this; of a fixed batch size, that alone.
        items_step: caps are multiples of this, or the smallest allowed; a fixed cap, that alone.
        sizes: named sizes, for the names of models.

    Raises:
        AllocationError: no such configuration costs as little as the budget, or users have a price
            (their number is then not snapped).

    Where the batch or the items are limited, so are the configurations.
    """
    if workload.limits.user_price is not None:
        raise AllocationError("with a price of users there are no configurations to list")
    bounds = workload.bounds()
    batches = _multiples(bounds["batch_size"], batch_step, LEVELS)
    caps = _multiples(bounds["items_per_user"], items_step, None)
    numbers = shape_numbers(shapes, workload.card.vocab_size, workload.n_views)
    low, high = bounds["n_total"]
    inside = (numbers.counts[:, 0] >= low * (1 - 1e-9)) & (
        numbers.counts[:, 0] <= high * (1 + 1e-9)
    )
    least, chosen = SPENT * float(allocation.point[allocation.compute]), []
    for i in np.flatnonzero(inside):
        mesh = [m.ravel() for m in np.meshgrid(batches, caps, indexing="ij")]
        own = numbers.take(np.full(len(mesh[0]), i))
        cost = workload.cost(workload.rows(own, *mesh)).reshape(len(batches), len(caps))
        fits = (cost <= allocation.budget) & (cost >= least)
        largest = len(caps) - 1 - fits[:, ::-1].argmax(axis=1)
        for k in np.flatnonzero(fits.any(axis=1)):
            chosen.append((i, batches[k], caps[largest[k]]))
    if not chosen:
        raise AllocationError(
            f"none of {int(inside.sum())} shapes, {len(batches)} batch sizes and {len(caps)} caps "
            f"on items uses between {least:.3g} and {allocation.budget:g} PF-days"
        )
    index = np.array([c[0] for c in chosen], dtype=np.intp)
    table = workload.rows(
        numbers.take(index), np.array([c[1] for c in chosen]), np.array([c[2] for c in chosen])
    )
    loss = evaluate(law, table)[0]
    order = np.argsort(loss, kind="stable")[:LISTED]
    table = table.iloc[order].reset_index(drop=True)
    ordered = [shapes[i] for i in index[order]]
    vocab, named = workload.card.vocab_size, sizes or {}
    table.insert(0, "model", [model_name(s, vocab, named) for s in ordered])
    for place, name in enumerate(("layers", "d_model", "heads"), start=1):
        table.insert(place, name, [getattr(s, name) for s in ordered])
    whole = ["n_total", "n_non_embedding", "n_item", "n_service", "batch_size", "items_per_user"]
    table = table.astype(dict.fromkeys(whole, np.int64))
    optimum = float(allocation.point["loss"])
    table["spent"] = workload.cost(table) / allocation.budget
    table["loss"], table["excess"] = loss[order], loss[order] / optimum - 1
    if len(allocation.draws):
        losses = evaluate(law, table, len(allocation.draws))
        best = allocation.draws["loss"].to_numpy(dtype=np.float64)[:, None]
        table["share_within"] = (losses <= (1 + allocation.within) * best).mean(axis=0)
    return Snapped(table, allocation.within)


def _multiples(bounds: tuple[float, float], step: int, most: int | None) -> Array:
    """Whole multiples of a step within bounds; if there are none, the whole numbers at the ends."""
    low, high = int(np.ceil(bounds[0] - 1e-9)), int(np.floor(bounds[1] + 1e-9))
    first, last = -(-low // step), high // step
    if last < first:
        return np.unique(np.array([low, high], dtype=np.float64))
    if most is None or last - first < most:
        return np.arange(first, last + 1, dtype=np.float64) * step
    return np.unique(np.round(np.geomspace(max(first, 1), last, most))) * step
