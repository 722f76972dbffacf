"""What a fit minimises. It is part of the answer: every result carries it."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scaling import ClueError
from scaling.analysis.fitting.jets import Array

HUBER_DELTA = 1e-3
"""Default knee of the Huber loss, in units of ln y (Hoffmann et al. 2022, section 3.3)."""
LAD_KNEE = 1e-4
"""Knee of the Huber loss that stands for |r|, relative to the median |r| of least squares: below it
the optimum of the Huber loss no longer moves, above zero it has a gradient to certify."""

LAD_DRAW_KNEE = 3e-2
"""The same for bootstrap draws, whose optima need only be sharp beside their spread."""


class ObjectiveError(ClueError):
    """An objective that does not exist."""


@dataclass(frozen=True)
class Objective:
    """Sum over rows of weight x loss(residual); the residual is fitted minus measured.

    Attributes:
        loss: ``huber`` (r^2 / 2 up to ``delta``, linear beyond), ``lad`` (|r|) or ``mse``
            (r^2 / 2).
        delta: knee of ``huber``, in units of the residual.
        scale: residuals of ``log`` y or of ``raw`` y.
        overestimate: factor on the loss of rows whose fit lies above the measurement; above 1 it
            draws the law towards the lower envelope.

    Raises:
        ObjectiveError: a value is not one of these.
    """

    loss: Literal["huber", "lad", "mse"] = "huber"
    delta: float = HUBER_DELTA
    scale: Literal["log", "raw"] = "log"
    overestimate: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in ("huber", "lad", "mse"):
            raise ObjectiveError(f"loss is huber, lad or mse, not {self.loss!r}")
        if self.scale not in ("log", "raw"):
            raise ObjectiveError(f"scale of residuals is log or raw, not {self.scale!r}")
        if not self.delta > 0:
            raise ObjectiveError(
                f"delta must be above 0, not {self.delta:g}; loss='lad' is its limit"
            )
        if not 0 < self.overestimate < np.inf:
            raise ObjectiveError(f"overestimate must be positive, not {self.overestimate:g}")

    def __str__(self) -> str:
        residual = "ln(fit) - ln(y)" if self.scale == "log" else "fit - y"
        loss = {
            "huber": f"Huber losses (delta {self.delta:g})",
            "lad": "absolute values",
            "mse": "half the squares",
        }[self.loss]
        extra = "" if self.overestimate == 1 else f", {self.overestimate:g} x above the measurement"
        return f"sum of {loss} of {residual}{extra}"

    def to_dict(self) -> dict[str, Any]:
        """The choice as JSON values; delta is null where the loss has none."""
        return {
            "name": str(self),
            "loss": self.loss,
            "delta": self.delta if self.loss == "huber" and np.isfinite(self.delta) else None,
            "scale": self.scale,
            "overestimate": self.overestimate,
            "reduction": "sum",
        }

    def target(self, y: Array) -> Array:
        """Measured values on the scale of the residuals."""
        return np.asarray(np.log(y)) if self.scale == "log" else y

    def value(self, residuals: Array, weights: Array | None = None) -> float:
        """The objective itself, of ``[rows]`` residuals; exact also for ``lad``."""
        loss = np.abs(residuals) if self.loss == "lad" else huber(residuals, self.knee())
        tilt = np.where(residuals > 0, self.overestimate, 1.0)
        return float((loss * tilt * (1.0 if weights is None else weights)).sum())

    def knee(self, spread: float = 0.0) -> float:
        """Knee of the Huber loss that stands for this one.

        Args:
            spread: median absolute residual of least squares; only ``lad`` needs it.
        """
        if self.loss == "huber":
            return self.delta
        return float("inf") if self.loss == "mse" else LAD_KNEE * spread


def huber(r: Array, delta: float) -> Array:
    """r^2 / 2 where |r| <= delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(r)
    with np.errstate(over="ignore"):  # a wild start; infinite is what it shall be
        square = 0.5 * size**2
    if np.isinf(delta):
        return np.asarray(square)
    return np.asarray(np.where(size <= delta, square, delta * (size - 0.5 * delta)))
