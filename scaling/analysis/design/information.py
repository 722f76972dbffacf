"""The Fisher information of a design: rank, condition and standard errors before any run."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.analysis.design.belief import Belief, columns_of, log_jacobian
from scaling.analysis.fitting.jets import Array

RANK_TOLERANCE = 1e-9
"""Singular values of the scaled Jacobian below this share of the largest count as zero."""
LAWS = 64
"""Draws of the assumption for the upper end of a standard error."""


@dataclass(frozen=True, eq=False)
class Information:
    """What the rows of a design tell of a law, under its assumption and around it.

    Attributes:
        around: ``[S, m, P]`` derivative of ln y by theta over the noise, at the assumed law and
            then at laws around it.
    """

    belief: Belief
    around: Array

    @classmethod
    def of(
        cls, belief: Belief, plan: pd.DataFrame, noise: float, laws: int = LAWS
    ) -> "Information":
        """Of a plan's rows, each a run of its own."""
        x = columns_of(belief.surface.form, plan)
        drawn = belief.draws(laws, np.random.default_rng(0))
        return cls(belief, log_jacobian(belief.surface, drawn, x) / noise)

    @property
    def jacobian(self) -> Array:
        """``[m, P]`` at the assumed law."""
        return np.asarray(self.around[0])

    def _scaled(self, jacobian: Array) -> tuple[Array, Array]:
        length = np.sqrt((jacobian**2).sum(axis=0))
        length = np.where(length > 0, length, 1.0)
        return jacobian / length, length

    @property
    def rank(self) -> int:
        """Numerical rank of the Jacobian, columns scaled to length one."""
        values = np.linalg.svd(self._scaled(self.jacobian)[0], compute_uv=False)
        return int((values > RANK_TOLERANCE * values[0]).sum())

    @property
    def condition(self) -> float:
        """Largest over smallest singular value of the same; infinite where it is singular."""
        values = np.linalg.svd(self._scaled(self.jacobian)[0], compute_uv=False)
        full = self.rank == self.jacobian.shape[1]
        return float(values[0] / values[-1]) if full else float("inf")

    @property
    def unidentified(self) -> tuple[str, ...]:
        """Names of the parameters with no finite standard error."""
        errors = self.standard_errors(self.jacobian)
        names = self.belief.surface.names
        return tuple(n for n, e in zip(names, errors, strict=True) if not np.isfinite(e))

    def standard_errors(self, jacobian: Array) -> Array:
        """``[P]`` of theta: square roots of the diagonal of (J'J)^-1, infinite for what lies in
        part in the null space of J."""
        scaled, length = self._scaled(jacobian)
        _, values, axes = np.linalg.svd(scaled, full_matrices=True)
        padded = np.zeros(jacobian.shape[1])
        padded[: len(values)] = values
        seen = padded > RANK_TOLERANCE * padded[0]
        variance = ((axes[seen] / padded[seen, None]) ** 2).sum(axis=0)
        open_ = (axes[~seen] ** 2).sum(axis=0) > 1e-8
        return np.asarray(np.where(open_, np.inf, np.sqrt(variance) / length))

    def exponent(self, factor: str) -> tuple[float, float, float] | None:
        """Assumed exponent of a factor, its standard error, and that error's 90 % quantile around
        the assumed law; None where the law has none."""
        names = self.belief.surface.names
        for name in (f"exponent.{factor}", "exponent"):
            if name in names and factor in self.belief.surface.form.columns:
                i = names.index(name)
                errors = [self.standard_errors(j)[i] for j in self.around]
                high = float(np.quantile(errors, 0.9, method="higher"))
                return float(self.belief.mean[i]), float(errors[0]), high
        return None
