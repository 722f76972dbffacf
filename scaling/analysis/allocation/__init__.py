"""How a budget of compute is best spent: by approach 1, 2 and 3, and on exact FLOPs.

    trend        x*(C) as a power of C, with its bootstrap draws
    envelope     approach 1: optima on the compute frontier
    isoflop      approach 2: minima of IsoFLOP profiles
    parametric   approach 3: optima of the joint law
    approaches   the three side by side, with their disagreement and bias
    space        what is chosen and what it costs; compute as a product of factors
    shapes       architectures as numbers, and families of them
    workload     the study's space: model, batch, items; exact FLOPs and limits
    minimise     minima of a law under all its draws at once
    optimum      the optimum of a budget, its interval, the region around it, the frontier
    snap         real configurations near an optimum
    figures      their figures

Nothing here knows how a law was fitted: it needs ``predict`` and ``predict_draws``.
"""

from scaling.analysis.allocation.approaches import Comparison, compare_approaches
from scaling.analysis.allocation.envelope import envelope
from scaling.analysis.allocation.isoflop import IsoFlop, isoflop
from scaling.analysis.allocation.optimum import Allocation, Frontier, allocate, frontier
from scaling.analysis.allocation.parametric import closed_form
from scaling.analysis.allocation.shapes import Family, between, growing
from scaling.analysis.allocation.snap import Snapped, snap
from scaling.analysis.allocation.space import ProductSpace
from scaling.analysis.allocation.trend import AllocationError, Trend
from scaling.analysis.allocation.workload import Limits, Workload

__all__ = [
    "Allocation",
    "AllocationError",
    "Comparison",
    "Family",
    "Frontier",
    "IsoFlop",
    "Limits",
    "ProductSpace",
    "Snapped",
    "Trend",
    "Workload",
    "allocate",
    "between",
    "closed_form",
    "compare_approaches",
    "envelope",
    "frontier",
    "growing",
    "isoflop",
    "snap",
]
