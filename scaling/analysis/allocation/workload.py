"""The study's space: a shape, a batch size and a cap on items, trained on a corpus for fixed steps.

This is the one place where a configuration becomes the columns that a law reads; their names and
values are those of a plan (``scaling.sweeps.PLAN_COLUMNS``), for quantities between the whole
numbers of real configurations too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from scaling.analysis.allocation.minimise import Axis
from scaling.analysis.allocation.shapes import COUNTS, Family, ShapeNumbers
from scaling.analysis.allocation.space import check_bounds, largest, varying
from scaling.analysis.allocation.trend import AllocationError, Array, Mask
from scaling.config import MAX_ITEMS, MAX_TOKENS, MAX_TOKENS_SINGLE, CorpusCard, ModelConfig
from scaling.flops import PF_DAY, expected_lengths, mean_items, mean_tokens

Counting = Literal["exact", "paper"]
COMPUTE = {"exact": "pf_days_exact", "paper": "pf_days"}
"""Column of the budget under each counting."""
LEAST_SHARE = 1e-3
"""Where users have a price: the fewest that are considered, as a share of the users met."""


@dataclass(frozen=True)
class Limits:
    """What may be chosen; equal ends fix a quantity.

    Attributes:
        batch_size: users a step. [users]
        items_per_user: the cap S; the longest log limits it too. [items]
        n_total: parameters; None: the family's ends.
        n_users: users that there are; None: the corpus's. [users]
        max_repeats: most passes over the users beyond the first; None: any number; 0: no user
            twice.
        user_price: what a distinct user costs, out of the same budget; their number is then chosen
            too, up to ``n_users``. None: those that there are cost nothing, as unique data is no
            part of compute. [PF-days]

    Raises:
        AllocationError: a value is not valid.
    """

    batch_size: tuple[float, float] = (8, 65_536)
    items_per_user: tuple[float, float] = (1, MAX_ITEMS)
    n_total: tuple[float, float] | None = None
    n_users: float | None = None
    max_repeats: float | None = None
    user_price: float | None = None

    def __post_init__(self) -> None:
        pairs = {"batch_size": self.batch_size, "items_per_user": self.items_per_user}
        check_bounds(pairs | ({"n_total": self.n_total} if self.n_total else {}))
        for name, least in (("n_users", 1), ("max_repeats", 0), ("user_price", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < np.inf:
                raise AllocationError(f"{name} = {value:g}; valid: finite, at least {least}")


class Workload:
    """Runs of a fixed number of steps on one corpus; a ``space.Space``.

    Quantities: ``n_total`` (which stands for a shape of the family), ``batch_size``,
    ``items_per_user`` and, where users have a price, ``n_users``. Every batch is drawn anew
    (``shuffle``).
    """

    def __init__(
        self,
        card: CorpusCard,
        shapes: Sequence[ModelConfig],
        *,
        steps: int = 100_000,
        services: tuple[str, ...] | None = None,
        negatives: int | None = None,
        counting: Counting = "exact",
        limits: Limits | None = None,
    ) -> None:
        """Count what does not depend on the choice.

        Args:
            card: the corpus in numbers.
            shapes: models to choose from (``shapes.Family``).
            services: of pretraining that are contrasted; None: all.
            negatives: users contrasted with each other; None: the batch.
            counting: ``exact``: expected exact FLOPs; ``paper``: the paper's formula.
            limits: what may be chosen; None: the defaults of ``Limits``.

        Raises:
            AllocationError: shapes or limits leave nothing to choose from.
        """
        self.card, self.steps, self.services, self.negatives = card, steps, services, negatives
        self.counting, self.limits = counting, limits or Limits()
        system = shapes[0].system if shapes else "clue"
        lengths = [expected_lengths(card, s, services, system) for s in range(MAX_ITEMS + 1)]
        self.n_views = lengths[0].rows
        self._lengths = np.array(
            [[x.tokens, x.tokens_sq, x.items, x.items_sq, x.rows] for x in lengths]
        )
        self._means = np.array([mean_items(card, s, services) for s in range(MAX_ITEMS + 1)])
        self._single = system == "single"
        self.family = Family(shapes, card.vocab_size, self.n_views)
        self._bounds = self._find_bounds()
        free = varying(self._bounds)
        order = ("n_total", "items_per_user", "batch_size")
        chosen = [name for name in order if name in free]
        # what is left of the budget goes into the first; a quantity that is alone is searched for,
        # as nothing says that a law falls as a batch grows
        self._rest = chosen[0] if len(free) > 1 and chosen else None
        if self.limits.user_price is not None and self._rest in (None, "batch_size"):
            raise AllocationError(
                "users have a price, so n_total or items_per_user must be free to use up the rest"
            )
        self._searched = [n for n in self.names if n in free and n != self._rest]

    @property
    def names(self) -> tuple[str, ...]:
        priced = ("n_users",) if self.limits.user_price is not None else ()
        return ("n_total", "batch_size", "items_per_user", *priced)

    @property
    def compute(self) -> str:
        return COMPUTE[self.counting]

    @property
    def n_users(self) -> float:
        """Users that there are. [users]"""
        return float(self.limits.n_users or self.card.n_users)

    def bounds(self) -> dict[str, tuple[float, float]]:
        return dict(self._bounds)

    def axes(self, budget: float) -> tuple[Axis, ...]:
        axes = []
        for name in self._searched:
            low, high = self._bounds[name]
            knots = {low, high}
            if name == "n_users":  # the coordinate is their share of the users met
                limit = self.limits.max_repeats
                knots = {LEAST_SHARE if limit is None else 1 / (1 + limit), 1.0}
            elif name == "batch_size" and self.limits.user_price is None:
                once = self.n_users / self.steps
                knots |= {once} if low < once < high else set()
            if self._rest is None:  # it ends where the budget does
                start = self._quantities(np.empty((1, 0)))
                top = float(self.raised(start, name, budget)[0, self.names.index(name)])
                knots = {k for k in knots if k < top} | {top}
            axes.append(Axis(name, tuple(float(np.log(k)) for k in sorted(knots))))
        return tuple(a for a in axes if len(a.knots) > 1)

    def spend(self, at: Array, budget: float) -> tuple[Array, Mask]:
        quantities = self._quantities(at)
        if self._rest is None:
            return quantities, self._cost(quantities) <= budget * (1 + 1e-9)
        low, high = (np.full(len(at), v) for v in np.log(self._bounds[self._rest]))
        rest = self._rest
        found, possible = largest(
            lambda x: self._cost(self._with(quantities, rest, np.exp(x))), low, high, budget
        )
        return self._with(quantities, rest, np.exp(found)), possible

    def raised(self, quantities: Array, name: str, budget: float) -> Array:
        low = np.log(quantities[:, self.names.index(name)])
        high = np.maximum(low, np.log(self._bounds[name][1]))
        found, _ = largest(
            lambda x: self._cost(self._with(quantities, name, np.exp(x))), low, high, budget
        )
        return self._with(quantities, name, np.exp(found))

    def columns(self, quantities: Array) -> pd.DataFrame:
        return self.rows(self.family.at(np.log(quantities[:, 0])), *quantities[:, 1:].T)

    def rows(
        self,
        numbers: ShapeNumbers,
        batch_size: Array,
        items_per_user: Array,
        n_users: Array | None = None,
    ) -> pd.DataFrame:
        """Plan columns of configurations of given shapes, one row each; all arguments ``[m]``."""
        met = batch_size * self.steps
        users = np.full(len(met), self.n_users) if n_users is None else n_users
        counts = dict(zip(COUNTS, numbers.counts.T, strict=True))
        sequence = self._sequence(items_per_user)
        flops = 6.0 * counts["n_total"] * met * sequence
        exact = self._exact(numbers, batch_size, items_per_user)
        columns = {
            **counts,
            "batch_size": batch_size,
            "negatives": batch_size
            if self.negatives is None
            else np.full(len(met), self.negatives),
            "items_per_user": items_per_user,
            "items_per_user_mean": self._interpolate(self._means, items_per_user),
            "sequence_length": sequence,
            "tokens_per_item_mean": np.full(len(met), mean_tokens(self.card)),
            "data_fraction": users / self.card.n_users,
            "n_users": users,
            "users_seen": np.minimum(users, met),
            "epochs": met / users,
            "repeats": np.maximum(0.0, met / users - 1),
            "steps": np.full(len(met), float(self.steps)),
            "flops": flops,
            "flops_exact": exact,
            "pf_days": flops / PF_DAY,
            "pf_days_exact": exact / PF_DAY,
        }
        return pd.DataFrame(columns)

    def cost(self, rows: pd.DataFrame) -> Array:
        """What configurations take of the budget: compute and, at a price, users. [PF-days]"""
        price = self.limits.user_price or 0.0
        total: Array = (rows[self.compute] + price * rows["n_users"]).to_numpy(dtype=np.float64)
        return total

    def _find_bounds(self) -> dict[str, tuple[float, float]]:
        limits, ends = self.limits, self.family.ends
        asked = limits.n_total or ends
        bounds = {"n_total": (max(asked[0], ends[0]), min(asked[1], ends[1]))}
        low, high = limits.batch_size
        if limits.max_repeats is not None:
            # with a price users are chosen, but never more than there are
            high = min(high, (1 + limits.max_repeats) * self.n_users / self.steps)
        bounds["batch_size"] = (low, high)
        low, high = limits.items_per_user
        longest = 1 + int(np.flatnonzero(np.diff(self._means) > 0)[-1])
        bounds["items_per_user"] = (low, min(high, longest))
        if limits.user_price is not None:
            bounds["n_users"] = (1.0, self.n_users)
        for name, (low, high) in bounds.items():
            if low > high:
                raise AllocationError(
                    f"{name}: nothing is left between {low:g} and {high:g} under the limits"
                )
        return bounds

    def _quantities(self, at: Array) -> Array:
        """Quantities at coordinates; what is not searched for is at its lower limit."""
        given = dict(zip(self._searched, np.exp(at.T), strict=False))
        columns = [given.get(name, np.full(len(at), self._bounds[name][0])) for name in self.names]
        if "n_users" in self.names:
            share = given.get("n_users", np.ones(len(at)))
            columns[-1] = np.minimum(share * columns[1] * self.steps, self.n_users)
        return np.column_stack(columns)

    def _with(self, quantities: Array, name: str, values: Array) -> Array:
        changed = quantities.copy()
        changed[:, self.names.index(name)] = values
        return changed

    def _cost(self, quantities: Array) -> Array:
        numbers = self.family.at(np.log(quantities[:, 0]))
        batch, items = quantities[:, 1], quantities[:, 2]
        if self.counting == "paper":
            flops = 6.0 * numbers.counts[:, 0] * batch * self.steps * self._sequence(items)
        else:
            flops = self._exact(numbers, batch, items)
        cost: Array = flops / PF_DAY
        if self.limits.user_price is not None:
            cost = cost + self.limits.user_price * quantities[:, 3]
        return cost

    def _exact(self, numbers: ShapeNumbers, batch: Array, items: Array) -> Array:
        """Expected exact FLOPs (``flops.expected_flops``). [m]"""
        lengths = np.column_stack([self._interpolate(self._lengths[:, k], items) for k in range(5)])
        negatives = batch if self.negatives is None else np.full(len(batch), float(self.negatives))
        units = np.column_stack([lengths, negatives])
        total: Array = batch * self.steps * (numbers.costs * units).sum(axis=1)
        return total

    def _sequence(self, items: Array) -> Array:
        """S of the paper's formula (``RunConfig.sequence_length``)."""
        return np.minimum(MAX_TOKENS_SINGLE, MAX_TOKENS * items) if self._single else items

    def _interpolate(self, table: Array, items: Array) -> Array:
        """Between whole caps linearly, as the mean of min(n, S) is."""
        return np.interp(items, np.arange(len(table)), table)
