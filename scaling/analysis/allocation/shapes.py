"""Architectures as numbers: parameters and costs of real shapes, and a family that joins them.

A law in ``n_total`` has an optimum at any number of parameters; architectures have layers and a
width that heads divide. A ``Family`` joins declared shapes by a smooth monotone curve through them,
so that one number, ln ``n_total``, stands for a shape and for everything counted from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.interpolate import PchipInterpolator

from scaling.analysis.allocation.trend import AllocationError, Array
from scaling.config import ModelConfig
from scaling.flops import count_parameters, exact_flops

COUNTS = ("n_total", "n_non_embedding", "n_item", "n_service")
COSTS = ("tokens", "tokens_sq", "items", "items_sq", "rows", "negatives")
"""What a user's exact FLOPs are linear in (``flops.Lengths``, and the users contrasted with)."""


@dataclass(frozen=True, eq=False)
class ShapeNumbers:
    """Numbers of m shapes.

    Attributes:
        counts: ``[m, 4]`` parameters, by ``COUNTS``.
        costs: ``[m, 6]`` FLOPs of training per unit, by ``COSTS``.
    """

    counts: Array
    costs: Array

    def take(self, index: "np.ndarray[tuple[int, ...], np.dtype[np.intp]]") -> "ShapeNumbers":
        """The numbers of some of the shapes, in that order."""
        return ShapeNumbers(self.counts[index], self.costs[index])


def shape_numbers(shapes: Sequence[ModelConfig], vocab_size: int, n_views: int) -> ShapeNumbers:
    """Parameters and costs of real shapes (``scaling.flops``).

    Args:
        vocab_size: entries of the token table.
        n_views: views of a user that are contrasted.
    """
    counts, costs = [], []
    for shape in shapes:
        parameters = count_parameters(shape, vocab_size)
        counts.append([float(getattr(parameters, name)) for name in COUNTS])
        costs.append([_unit_cost(shape, name, n_views) for name in COSTS])
    return ShapeNumbers(np.array(counts), np.array(costs))


def _unit_cost(shape: ModelConfig, name: str, n_views: int) -> float:
    """FLOPs of one unit of a length; of ``negatives``, of one user contrasted with one."""
    lengths = dict.fromkeys(("tokens", "tokens_sq", "items", "items_sq", "rows"), 0.0)
    users, negatives = (1.0, 1) if name == "negatives" else (0.0, 0)
    if name in lengths:
        lengths[name] = 1.0
    return exact_flops(shape, **lengths, users=users, n_views=n_views, negatives=negatives).total


class Family:
    """Shapes joined by monotone cubics (PCHIP) through their logarithms, over ln ``n_total``.

    Exact at the declared shapes; between them an architecture that does not exist.
    """

    def __init__(self, shapes: Sequence[ModelConfig], vocab_size: int, n_views: int) -> None:
        """Order the shapes by size.

        Args:
            shapes: at least one; all of one system, and with more parameters costing more.

        Raises:
            AllocationError: the shapes are no such family.
        """
        if not shapes:
            raise AllocationError("a family of models needs at least one shape")
        if len({shape.system for shape in shapes}) > 1:
            raise AllocationError("a family of models is either of system clue or of single")
        numbers = shape_numbers(shapes, vocab_size, n_views)
        order = np.argsort(numbers.counts[:, 0], kind="stable")
        self.shapes = tuple(shapes[i] for i in order)
        self.numbers = numbers.take(order)
        table = np.hstack([self.numbers.counts, self.numbers.costs])
        for i, rise in enumerate(np.diff(table, axis=0)):
            if rise[0] <= 0 or (rise < 0).any():
                small, large = self.shapes[i].shape, self.shapes[i + 1].shape
                raise AllocationError(
                    f"{large} has more parameters than {small} but not more of everything: a "
                    "family needs shapes along which parameters and FLOPs both grow (see growing)"
                )
        self._zero = (table == 0).any(axis=0)
        if (self._zero & (table > 0).any(axis=0)).any():
            raise AllocationError("shapes with and without a part do not make one family")
        self._curve = None
        if len(shapes) > 1:
            logs = np.log(np.where(self._zero, 1.0, table))
            self._curve = PchipInterpolator(logs[:, 0], logs)

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest ``n_total``."""
        return float(self.numbers.counts[0, 0]), float(self.numbers.counts[-1, 0])

    def at(self, log_n: Array) -> ShapeNumbers:
        """Numbers of the shapes with these ln ``n_total``, clipped to the family's ends. [m]"""
        if self._curve is None:
            return self.numbers.take(np.zeros(len(log_n), dtype=np.intp))
        logs = self._curve(np.clip(log_n, *np.log(self.ends)))
        table = np.where(self._zero, 0.0, np.exp(logs))
        return ShapeNumbers(table[:, : len(COUNTS)], table[:, len(COUNTS) :])


def growing(shapes: Sequence[ModelConfig], vocab_size: int, n_views: int = 2) -> list[ModelConfig]:
    """Shapes along which everything that is counted grows: the longest such chain of those given.

    Among chains of equal length the one with the smaller shapes; a family can be made of it.
    """
    distinct = list(dict.fromkeys(shapes))
    numbers = shape_numbers(distinct, vocab_size, n_views)
    table = np.hstack([numbers.counts, numbers.costs])
    order = [int(i) for i in np.argsort(table[:, 0], kind="stable")]
    chains: dict[int, list[int]] = {}
    for i in order:
        before = [
            c
            for j, c in chains.items()
            if table[j, 0] < table[i, 0] and (table[j] <= table[i]).all()
        ]
        chains[i] = [*max(before, key=len, default=[]), i]
    return [distinct[i] for i in max(chains.values(), key=len, default=[])]


def between(shapes: Sequence[ModelConfig], *, width_step: int = 64) -> list[ModelConfig]:
    """Real shapes around and between the given ones: integer layers, widths that heads divide.

    Of each two neighbours in size, all layers from the fewer to the more, with widths that are
    multiples of ``width_step`` from the narrower to the wider. Heads are 64 wide where that
    divides the width, else as few wider ones as divide it (as a sweep's ``8x64``).

    Args:
        shapes: ascending in size; returned too.
        width_step: of d.
    """
    found = dict.fromkeys(shapes)
    for small, large in pairwise(shapes):
        layers = sorted((small.layers, large.layers))
        widths = sorted((small.d_model, large.d_model))
        first = -(-widths[0] // width_step) * width_step
        for n in range(layers[0], layers[1] + 1):
            for d in range(first, widths[1] + 1, width_step):
                heads = next(h for h in range(max(1, d // 64), 0, -1) if d % h == 0)
                shape = small.model_copy(update={"layers": n, "d_model": d, "heads": heads})
                if all((s.layers, s.d_model) != (n, d) for s in found):
                    found[shape] = None
    return list(found)
