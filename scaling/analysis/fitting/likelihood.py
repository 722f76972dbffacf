"""Likelihood behind an objective, and AICc.

Minimising a sum of losses rho(r) maximises the likelihood of errors with density
exp(-rho(r) / tau) / Z(tau), whatever tau; tau is then estimated by maximum likelihood too. For
squares that is the normal density, for absolute values the Laplace density, for Huber's loss the
least favourable density of Huber 1964 (normal inside the knee, exponential tails outside). With a
penalty of over-estimates the two sides have different tau.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import erf

from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.objective import Objective


def log_likelihood(residuals: Array, objective: Objective) -> float:
    """Log likelihood of residuals at the best scale tau.

    It is that of ln y (``scale="log"``) or of y: the two are not comparable.

    Args:
        residuals: ``[rows]`` fit minus data, of ln y or of y as the objective's scale says.
    """
    rho = objective.value(residuals)
    if rho <= 0:
        return math.inf

    def negative(log_tau: float) -> float:
        tau = math.exp(log_tau)
        sides = _log_norm(tau, objective), _log_norm(tau / objective.overestimate, objective)
        # each side of the density has half of its symmetric normaliser
        return rho / tau + len(residuals) * (float(np.logaddexp(*sides)) - math.log(2))

    # tau of squares is their mean, of absolute values their mean times the knee: start wide of both
    middle = math.log(rho / len(residuals))
    found = minimize_scalar(negative, bounds=(middle - 12, middle + 12), method="bounded",
                            options={"xatol": 1e-9})  # fmt: skip
    return -float(found.fun)


def aicc(log_likelihood: float, parameters: int, rows: int) -> float:
    """Akaike's criterion with the correction for small samples (Hurvich and Tsai 1989).

    Args:
        parameters: free ones of the law; the scale tau is counted beside them.

    Returns:
        NaN where there are too few rows for the correction.
    """
    k = parameters + 1
    if rows - k - 1 <= 0:
        return math.nan
    return -2 * log_likelihood + 2 * k + 2 * k * (k + 1) / (rows - k - 1)


def _log_norm(tau: float, objective: Objective) -> float:
    """ln of the integral of exp(-rho / tau)."""
    if objective.loss == "lad":
        return math.log(2 * tau)
    if objective.loss == "mse" or not math.isfinite(objective.delta):
        return 0.5 * math.log(2 * math.pi * tau)
    knee = objective.delta / math.sqrt(tau)
    middle = math.sqrt(2 * math.pi * tau) * float(erf(knee / math.sqrt(2)))
    tails = 2 * tau / objective.delta * math.exp(-(knee**2) / 2)
    return math.log(middle + tails)
