"""How a fit ended."""

from dataclasses import dataclass
from enum import StrEnum

from scaling import ClueError


class FitError(ClueError):
    """There is nothing usable to fit; the message names the column, the rows and the need."""


class FitStatus(StrEnum):
    """How far a fit can be trusted: only ``CONVERGED`` is a result, the others ask for care."""

    CONVERGED = "CONVERGED"
    """Gradient certificate met, inside all bounds, reached from several starts."""
    MAX_ITER = "MAX_ITER"
    """The iterations ran out before the gradient certificate was met."""
    STALLED = "STALLED"
    """No step lowers the objective although the gradient is not small, or the optimum equals its
    start: the minimiser did not work."""
    BOUND_HIT = "BOUND_HIT"
    """A parameter lies on a bound: the data does not hold it (a floor at zero, most often)."""
    FEW_AGREE = "FEW_AGREE"
    """One start alone reached the best objective; a better one may exist."""


@dataclass(frozen=True)
class Certificate:
    """Evidence that the reported optimum is one.

    Attributes:
        objective: value of the objective at the optimum (sum over rows).
        gradient: largest gradient component relative to the sum of the rows' pulls on it.
        starts_scored, starts_polished: starts tried, and those minimised to the end.
        agree: share of the polished starts that reached the best objective.
        basins: the distinct optima's objective values, best first, at most five.
    """

    objective: float
    gradient: float
    starts_scored: int
    starts_polished: int
    agree: float
    basins: tuple[float, ...]
