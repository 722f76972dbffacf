"""Second-order forward derivatives over batches, kept sparse.

A ``Jet`` is a value with its first and second derivatives by the parameters it depends on. Laws are
sums of terms of few parameters each, so most second derivatives are zero and are never stored;
nothing here knows of laws. Values are arrays that broadcast to ``[S, m]``: S parameter vectors, m
rows of data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Key = TypeVar("Key", int, tuple[int, int])


@dataclass(frozen=True, eq=False)
class Jet:
    """A batch of values with sparse derivatives.

    Attributes:
        value: broadcasts to ``[S, m]``.
        grad: first derivative by parameter index; a missing index is a derivative of zero.
        hess: second derivative by pair ``(i, j)`` with ``i <= j``; a missing pair is zero.
    """

    value: Array
    grad: dict[int, Array] = field(default_factory=dict)
    hess: dict[tuple[int, int], Array] = field(default_factory=dict)

    def __add__(self, other: "Jet | Array | float") -> "Jet":
        if not isinstance(other, Jet):
            return Jet(self.value + other, self.grad, self.hess)
        return Jet(
            self.value + other.value, _sum(self.grad, other.grad), _sum(self.hess, other.hess)
        )

    def __mul__(self, other: "Jet | Array | float") -> "Jet":
        if not isinstance(other, Jet):
            return Jet(
                self.value * other,
                {i: g * other for i, g in self.grad.items()},
                {ij: h * other for ij, h in self.hess.items()},
            )
        a, b = self, other
        grad = _sum(
            {i: g * b.value for i, g in a.grad.items()}, {i: g * a.value for i, g in b.grad.items()}
        )
        hess = _sum(
            {ij: h * b.value for ij, h in a.hess.items()},
            {ij: h * a.value for ij, h in b.hess.items()},
        )
        for i, by_i in a.grad.items():
            for j, by_j in b.grad.items():
                pair = (min(i, j), max(i, j))
                cross = by_i * by_j * (2.0 if i == j else 1.0)
                hess[pair] = hess[pair] + cross if pair in hess else cross
        return Jet(a.value * b.value, grad, hess)

    def __neg__(self) -> "Jet":
        return self * -1.0

    def __sub__(self, other: "Jet | Array | float") -> "Jet":
        return self + -other

    def map(self, value: Array, first: Array, second: Array) -> "Jet":
        """``f(self)``, given f and its first two derivatives at ``self.value``."""
        grad = {i: first * g for i, g in self.grad.items()}
        hess = {ij: first * h for ij, h in self.hess.items()}
        indices = sorted(self.grad)
        for k, i in enumerate(indices):
            scaled = second * self.grad[i]
            for j in indices[k:]:
                curved = scaled * self.grad[j]
                hess[i, j] = hess[i, j] + curved if (i, j) in hess else curved
        return Jet(value, grad, hess)


def exp(x: Jet) -> Jet:
    """e to the x."""
    value = np.exp(x.value)
    return x.map(value, value, value)


def log(x: Jet) -> Jet:
    """Natural logarithm; NaN where x is negative."""
    inverse = 1.0 / x.value
    return x.map(np.log(x.value), inverse, -inverse * inverse)


def softplus(x: Jet) -> Jet:
    """ln(1 + e^x), without overflow."""
    share = 0.5 * (1.0 + np.tanh(0.5 * x.value))
    return x.map(np.logaddexp(0.0, x.value), share, share * (1.0 - share))


def reciprocal(x: Jet) -> Jet:
    """1 / x."""
    inverse = 1.0 / x.value
    return x.map(inverse, -inverse * inverse, 2.0 * inverse**3)


def implicit(root: Array, equation: Callable[[Jet], tuple[Jet, Jet]]) -> Jet:
    """Derivatives of a number that an equation defines.

    Newton's step on derivatives doubles the order that is right: from the root alone, one step
    makes the first derivatives exact and the second step the second ones.

    Args:
        root: the solution s of F(s) = 0, to machine precision.
        equation: gives F and dF/ds at s, as jets in the parameters.
    """
    s = Jet(root)
    for _ in range(2):
        residual, slope = equation(s)
        if not residual.grad:  # no parameter is differentiated by
            break
        s = s - residual * reciprocal(slope)
    return s


def _sum(a: dict[Key, Array], b: dict[Key, Array]) -> dict[Key, Array]:
    out = dict(a)
    for key, value in b.items():
        out[key] = out[key] + value if key in out else value
    return out
