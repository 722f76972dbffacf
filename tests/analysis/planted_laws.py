"""One law of every form, its numbers written out by hand: what the fitter has to find again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq


@dataclass(frozen=True)
class Law:
    """A form, its public parameters, and y as a formula that knows nothing of the fitter."""

    form: str
    params: dict[str, float]
    y: Callable[[pd.DataFrame], Any]
    name: str = ""

    def __str__(self) -> str:
        return self.form + self.name


def table(n: int = 60, seed: int = 0) -> pd.DataFrame:
    """Columns of the laws: four factors over some decades, passes beyond the first (a fifth of them
    none), and a loss."""
    rng = np.random.default_rng(seed)
    ranges = {"a": (1e6, 1e9), "b": (16, 4096), "c": (4, 512), "d": (1e4, 1e7)}
    columns = {k: np.exp(rng.uniform(*np.log(ends), n)) for k, ends in ranges.items()}
    columns["r"] = np.where(rng.random(n) < 0.2, 0.0, rng.uniform(0, 40, n))
    columns["loss"] = rng.uniform(2, 5, n)
    return pd.DataFrame(columns)


def bnsl(x: pd.Series, a: float, b: float, c0: float, *breaks: tuple[float, float, float]) -> Any:
    """Caballero et al. 2023 (arXiv 2210.14891), eq. 1; a break is (c_i, d_i, f_i)."""
    y = b * x**-c0
    for c, d, f in breaks:
        y = y * (1 + (x / d) ** (1 / f)) ** (-c * f)
    return a + y


def m4(x: pd.Series, floor: float, chance: float, b: float, c: float, a: float) -> Any:
    """Alabdulmohsin et al. 2022 (arXiv 2209.06640), eq. 3: (y - E) / (E0 - y)^a = b x^-c, y
    between E and E0; solved for s = (y - E) / (E0 - E) by bisection."""
    span = chance - floor

    def excess(t: float, u: float) -> float:  # s = 1 / (1 + e^-t)
        log_s, log_rest = -np.logaddexp(0, -t), -np.logaddexp(0, t)
        return float((1 - a) * np.log(span) + log_s - a * log_rest - np.log(b) + c * np.log(u))

    roots = np.array([brentq(excess, -500, 500, args=(u,), xtol=1e-13) for u in x])
    return floor + span / (1 + np.exp(-roots))


def worth(u: pd.Series, r: pd.Series, r_star: float) -> Any:
    """Muennighoff et al. 2023 (arXiv 2305.16264), eq. 5: unique data plus what repeats are worth;
    r is the number of passes beyond the first."""
    return u + u * r_star * (1 - np.exp(-r / r_star))


A, B = {"scale.a": 1e7, "exponent.a": 0.3}, {"scale.b": 30.0, "exponent.b": 0.6}
C, D = {"scale.c": 3.0, "exponent.c": 0.4}, {"scale.d": 1e4, "exponent.d": 0.25}
ONE_BREAK = {"change": 0.3, "break": 5e7, "sharpness": 0.3}
TWO_BREAKS = {
    "change.1": 0.3, "break.1": 1e7, "sharpness.1": 0.2,
    "change.2": -0.3, "break.2": 1e8, "sharpness.2": 0.2,
}  # fmt: skip
M4 = {"exponent": 0.6, "midpoint": 1e7, "sharpness": 1.6}


def _a(x: pd.DataFrame) -> Any:
    return (x.a / 1e7) ** -0.3


def _b(x: pd.DataFrame) -> Any:
    return (x.b / 30) ** -0.6


def _c(x: pd.DataFrame) -> Any:
    return (x.c / 3) ** -0.4


def _d(x: pd.DataFrame) -> Any:
    return (x.d / 1e4) ** -0.25


LAWS = [
    Law("a", {"scale": 1e7, "exponent": 0.3}, _a),
    Law("E + a", {"irreducible": 1.5, "scale": 1e7, "exponent": 0.3}, lambda x: 1.5 + _a(x)),
    Law("a + b", {**A, **B}, lambda x: _a(x) + _b(x)),
    Law("E + a + b", {"irreducible": 1.5, **A, **B}, lambda x: 1.5 + _a(x) + _b(x)),
    Law("a + b + c", {**A, **B, **C}, lambda x: _a(x) + _b(x) + _c(x)),
    Law(
        "E + a + b + c",
        {"irreducible": 1.5, **A, **B, **C},
        lambda x: 1.5 + _a(x) + _b(x) + _c(x),
    ),
    Law("a + b + c + d", {**A, **B, **C, **D}, lambda x: _a(x) + _b(x) + _c(x) + _d(x)),
    Law(
        "E + a + b + c + d",
        {"irreducible": 1.5, **A, **B, **C, **D},
        lambda x: 1.5 + _a(x) + _b(x) + _c(x) + _d(x),
    ),
    Law(
        "a * b",
        {"coefficient.a*b": 500.0, "exponent.a": 0.2, "exponent.b": 0.3},
        lambda x: 500 * x.a**-0.2 * x.b**-0.3,
    ),
    Law(
        "E + a * b + c",
        {"irreducible": 1.5, "coefficient.a*b": 500.0, "exponent.a": 0.2, "exponent.b": 0.3, **C},
        lambda x: 1.5 + 500 * x.a**-0.2 * x.b**-0.3 + _c(x),
    ),
    Law(
        "(a + b)^outer",
        {"outer": 0.1, "coefficient.a": 1e7, "exponent.a": 0.8, "coefficient.b": 30.0,
         "exponent.b": 0.9},
        lambda x: (1e7 * x.a**-0.8 + 30 * x.b**-0.9) ** 0.1,
    ),
    Law(
        "E + (a + b)^outer",
        {"irreducible": 1.5, "outer": 0.5, "coefficient.a": 500.0, "exponent.a": 0.3,
         "coefficient.b": 30.0, "exponent.b": 0.9},
        lambda x: 1.5 + (500 * x.a**-0.3 + 30 * x.b**-0.9) ** 0.5,
    ),
    Law("exp(loss)", {"coefficient": 2.0, "rate": 0.8}, lambda x: 2 * np.exp(-0.8 * x.loss)),
    Law(
        "E + exp(loss)",
        {"irreducible": 0.3, "coefficient": 2.0, "rate": 0.8},
        lambda x: 0.3 + 2 * np.exp(-0.8 * x.loss),
    ),
    Law(
        "E - exp(loss)",
        {"irreducible": 0.9, "coefficient": 2.0, "rate": 1.1},
        lambda x: 0.9 - 2 * np.exp(-1.1 * x.loss),
    ),
    Law(
        "sigmoid(loss)",
        {"coefficient": 0.7, "rate": -2.0, "midpoint": 3.2},
        lambda x: 0.7 / (1 + np.exp(2 * (x.loss - 3.2))),
    ),
    Law(
        "E + sigmoid(loss)",
        {"irreducible": 0.2, "coefficient": 0.7, "rate": 3.0, "midpoint": 3.2},
        lambda x: 0.2 + 0.7 / (1 + np.exp(-3 * (x.loss - 3.2))),
    ),
    Law(
        "E + shifted(loss)",
        {"irreducible": 0.1, "coefficient": 2.0, "exponent": 1.3, "shift": -1.5},
        lambda x: 0.1 + 2 * (x.loss - 1.5) ** -1.3,
        ", falling",
    ),
    Law(  # error against loss: E + kappa (L - L0)^omega
        "E + shifted(loss)",
        {"irreducible": 0.1, "coefficient": 0.2, "exponent": -1.3, "shift": -1.5},
        lambda x: 0.1 + 0.2 * (x.loss - 1.5) ** 1.3,
        ", rising",
    ),
    Law(
        "E - shifted(loss)",
        {"irreducible": 0.9, "coefficient": 0.05, "exponent": -1.6, "shift": -1.5},
        lambda x: 0.9 - 0.05 * (x.loss - 1.5) ** 1.6,
    ),
    Law(
        "broken(a)",
        {"coefficient": 5.0, "exponent": 0.1, **ONE_BREAK},
        lambda x: bnsl(x.a, 0, 5, 0.1, (0.3, 5e7, 0.3)),
    ),
    Law(
        "E + broken(a)",
        {"irreducible": 0.5, "coefficient": 5.0, "exponent": 0.1, **ONE_BREAK},
        lambda x: bnsl(x.a, 0.5, 5, 0.1, (0.3, 5e7, 0.3)),
    ),
    Law(
        "broken(a, 2)",
        {"coefficient": 5.0, "exponent": 0.1, **TWO_BREAKS},
        lambda x: bnsl(x.a, 0, 5, 0.1, (0.3, 1e7, 0.2), (-0.3, 1e8, 0.2)),
    ),
    Law(
        "E + broken(a, 2)",
        {"irreducible": 0.5, "coefficient": 5.0, "exponent": 0.1, **TWO_BREAKS},
        lambda x: bnsl(x.a, 0.5, 5, 0.1, (0.3, 1e7, 0.2), (-0.3, 1e8, 0.2)),
    ),
    Law(  # E0 = E + coefficient; b = coefficient^(1 - a) midpoint^exponent
        "E + saturating(a)",
        {"irreducible": 1.5, "coefficient": 3.0, **M4},
        lambda x: m4(x.a, 1.5, 4.5, 3**-0.6 * 1e7**0.6, 0.6, 1.6),
    ),
    Law(
        "saturating(a)",
        {"coefficient": 3.0, "exponent": 0.4, "midpoint": 1e7, "sharpness": 0.7},
        lambda x: m4(x.a, 0, 3, 3**0.3 * 1e7**0.4, 0.4, 0.7),
    ),
    Law(
        "repeated(d, r)",
        {"scale": 1e6, "exponent": 0.3, "r_star": 15.4},
        lambda x: (worth(x.d, x.r, 15.4) / 1e6) ** -0.3,
    ),
    Law(
        "E + a + repeated(d, r)",
        {"irreducible": 1.5, **A, "scale.d": 1e6, "exponent.d": 0.3, "r_star.d": 15.4},
        lambda x: 1.5 + _a(x) + (worth(x.d, x.r, 15.4) / 1e6) ** -0.3,
    ),
    Law(
        "E + a + rising(r)",
        {"irreducible": 1.5, **A, "coefficient.r": 0.02, "exponent.r": 0.6},
        lambda x: 1.5 + _a(x) + 0.02 * x.r**0.6,
    ),
    Law(
        "E + line(a)",
        {"irreducible": 9.0, "slope": -0.3},
        lambda x: 9 - 0.3 * np.log(x.a),
    ),
    Law(
        "E + b + line(a)",
        {"irreducible": 9.0, **B, "slope.a": -0.3},
        lambda x: 9 + _b(x) - 0.3 * np.log(x.a),
    ),
]  # fmt: skip
