"""What a table cannot part: columns whose logarithms go together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.analysis.fitting.jets import Array

EXACT, NEAR = 0.9996, 0.9
"""R^2 of a logarithm on others from which they are one, and nearly one."""
SMALL = 0.02
"""Coefficients below are not said."""


@dataclass(frozen=True)
class Relation:
    """``ln column = sum of coefficient x ln other + constant``, with R^2 over the rows."""

    column: str
    coefficients: Mapping[str, float]
    r_squared: float

    @property
    def exact(self) -> bool:
        return self.r_squared >= EXACT

    def __str__(self) -> str:
        text = ""
        for name, c in self.coefficients.items():
            size = "" if abs(abs(c) - 1) < 0.005 else f"{abs(c):.2f} "
            sign = ("-" if c < 0 else "") if not text else (" - " if c < 0 else " + ")
            text += f"{sign}{size}ln {name}"
        word = "=" if self.exact else "is nearly"
        tail = "" if self.exact else f" (R^2 {self.r_squared:.3f})"
        return f"ln {self.column} {word} {text} + constant{tail}"


def log_columns(table: pd.DataFrame, names: Sequence[str]) -> dict[str, Array]:
    """Logarithms of the columns that vary and are positive in every row, less their means."""
    out = {}
    for name in names:
        if name not in table or not pd.api.types.is_numeric_dtype(table[name]):
            continue
        x = table[name].to_numpy(dtype=np.float64)
        if (x > 0).all() and x.max() / x.min() > 1 + 1e-9:
            out[name] = np.log(x) - np.log(x).mean()
    return out


def relation(column: str, logs: Mapping[str, Array], others: Sequence[str]) -> Relation | None:
    """A column's logarithm on those of others, by least squares; None where they leave more than
    ``NEAR`` allows."""
    others = [o for o in others if o in logs and o != column]
    if column not in logs or not others:
        return None
    y = logs[column]
    x = np.stack([logs[o] for o in others], axis=1)
    slope = np.linalg.lstsq(x, y, rcond=1e-8)[0]
    r_squared = 1 - float(((y - x @ slope) ** 2).sum() / (y**2).sum())
    if r_squared < NEAR:
        return None
    # the fewest of them that say it as well
    kept = list(range(len(others)))
    for i in sorted(kept, key=lambda k: abs(slope[k]) * x[:, k].std()):
        fewer = [k for k in kept if k != i]
        if not fewer:
            break
        part = np.linalg.lstsq(x[:, fewer], y, rcond=1e-8)[0]
        less = 1 - float(((y - x[:, fewer] @ part) ** 2).sum() / (y**2).sum())
        if less >= EXACT or (r_squared < EXACT and less >= r_squared - 0.005):
            kept, r_squared = fewer, less
    slope = np.linalg.lstsq(x[:, kept], y, rcond=1e-8)[0]
    coefficients = {
        others[k]: float(c) for k, c in zip(kept, slope, strict=True) if abs(c) >= SMALL
    }
    return Relation(column, coefficients, r_squared)


def correlation(a: Array, b: Array) -> float:
    """Of two centred columns."""
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
