"""Laws as data: what a law is made of, the language it is written in, and the parts that exist.

A ``Form`` is a sum of terms, with or without a floor E and an outer power; a term is a product of
factors, each a function of one column. ``Form.parse`` reads

    E + n_total + batch_size            E + A n_total^-p + B batch_size^-q
    E + n_total * batch_size            E + A n_total^-p batch_size^-q
    (n_total + users_seen)^g            the sum to an outer power
    E - exp(loss)                       E - A e^(-rate loss)

and the parts of ``PARTS`` wherever a column may stand. Each term has one coefficient and each
factor its own parameters; a name stands for a column, never for a number. A column whose name is
not a plain word, or is E, stands in backticks.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from scaling import ClueError
from scaling.analysis.fitting.jets import Array, Jet, exp, implicit, log, softplus

_PLAIN = re.compile(r"[A-Za-z_][\w.]*")
"""Names that a form holds as they are; all others stand in backticks."""
EXPONENT_BOUNDS = (1e-4, 10.0)
"""Default bounds of a decreasing power's exponent."""


class FormError(ClueError):
    """A form or a constraint that cannot be read; the message shows it and the valid words."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a part, in the coordinates of the solver.

    Attributes:
        stem: public name without the column.
        bounds: default lower and upper bound; of a position or shift relative to the data's.
        starts: range of the starts; of a position or shift relative to the data's: 0 is the
            smallest and 1 the largest fitted value, a shift is e^starts of their distance.
        logs: whether starts are spread evenly in the logarithm.
        either_sign: whether starts take both signs.
        public: what theta stands for: ``theta`` itself (``same``), e^theta (``exp``), the position
            centre + spread theta on a raw axis (``position``), e^(centre + theta) on a log axis
            (``log_position``), theta / spread (``rate``), spread e^theta - low (``shift``).
    """

    stem: str
    bounds: tuple[float, float]
    starts: tuple[float, float]
    logs: bool = False
    either_sign: bool = False
    public: Literal["same", "exp", "position", "log_position", "rate", "shift"] = "same"


@dataclass(frozen=True)
class Axis:
    """How a column enters the solver.

    Attributes:
        centre: mean of ln x, or of x on a raw axis, over the fitted rows (0 or the logarithm of a
            fixed scale where a constraint needs it).
        spread: standard deviation of a raw axis (1 where a constraint needs it); 1 on a log axis.
        low, high: smallest and largest fitted value, of x or of ln x.
    """

    centre: float
    spread: float = 1.0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Part:
    """One kind of factor.

    Attributes:
        words: how it is written.
        formula: what stands beside the coefficient; ``x`` is the first column, ``r`` the second.
        columns: for each argument, what its values must be and how it is transformed: ``log``
            (positive; ln x less the axis' centre), ``raw`` (finite; (x - centre) / spread),
            ``above`` (finite; (x - low) / spread), ``count`` (not negative; as it is), ``power``
            (not negative; ln x less the centre, 0 contributes nothing).
        parameters: those of the factor.
        log_value: ln of the factor from its parameters and transformed columns.
        log_offset: what the factor's centring takes out of ln coefficient, from the parameters'
            values.
        power: whether (x / scale)^-exponent can stand for coefficient and factor.
    """

    words: str
    formula: str
    columns: tuple[Literal["log", "raw", "above", "count", "power"], ...]
    parameters: tuple[Parameter, ...]
    log_value: Callable[[Sequence[Jet], Sequence[Array]], Jet]
    log_offset: Callable[[Sequence[Array], Axis], Array]
    power: bool = False


EXPONENT = Parameter("exponent", EXPONENT_BOUNDS, (0.02, 2.0), logs=True)
_ANY_EXPONENT = Parameter("exponent", (-10.0, 10.0), (0.1, 3.0), logs=True, either_sign=True)


def _power(p: Sequence[Jet], x: Sequence[Array]) -> Jet:
    return p[0] * -x[0]


def _exponential(p: Sequence[Jet], x: Sequence[Array]) -> Jet:
    return p[0] * -x[0]


def _sigmoid(p: Sequence[Jet], x: Sequence[Array]) -> Jet:
    rate, midpoint = p
    return -softplus(rate * (midpoint - x[0]))


def _shifted(p: Sequence[Jet], x: Sequence[Array]) -> Jet:
    exponent, log_shift = p
    return -(exponent * log(exp(log_shift) + x[0]))


def _broken(p: Sequence[Jet], x: Sequence[Array]) -> Jet:
    """Caballero et al. 2023, eq. 1: each break multiplies by (1 + (x / d)^(1 / f))^(-c f)."""
    value = p[0] * -x[0]
    for change, place, log_sharpness in zip(p[1::3], p[2::3], p[3::3], strict=True):
        sharpness = exp(log_sharpness)
        value = value - change * sharpness * softplus((Jet(x[0]) - place) * exp(-log_sharpness))
    return value


def _saturating(p: Sequence[Jet], x: Sequence[Array]) -> Jet:
    """ln s with ln s - a ln(1 - s) = -p (u - m): M4 of Alabdulmohsin et al. 2022, eq. 3."""
    exponent, place, log_a = p
    a, w = exp(log_a), -(exponent * (Jet(x[0]) - place))

    def equation(t: Jet) -> tuple[Jet, Jet]:
        # s = 1 / (1 + e^-t): ln s = -softplus(-t), ln(1 - s) = -softplus(t)
        residual = a * softplus(t) - softplus(-t) - w
        share = exp(-softplus(-t))
        return residual, a * share + (share * -1.0 + 1.0)

    return -softplus(-implicit(_saturation(a.value, w.value), equation))


def _saturation(a: Array, w: Array) -> Array:
    """t with a softplus(t) - softplus(-t) = t + (a - 1) softplus(t) = w.

    The left side rises with a slope that goes from 1 to a: Newton's steps cannot overshoot twice.
    """
    a, w = np.broadcast_arrays(a, w)
    bend = w - (a - 1.0) * np.log(2.0)  # its sign is that of t
    t = np.where(bend < 0, bend, bend / a)
    for _ in range(60):
        share = 0.5 * (1.0 + np.tanh(0.5 * t))
        # softplus(t) = max(t, 0) - ln max(share, 1 - share)
        soft = np.maximum(t, 0.0) - np.log(np.maximum(share, 1.0 - share))
        step = (t + (a - 1.0) * soft - w) / (1.0 + (a - 1.0) * share)
        t = t - step
        # steps are squared from one to the next, so that after this one the rest is rounding
        if not np.any(np.abs(step) > 1e-8 * (1.0 + np.abs(t))):
            break
    return np.asarray(t)


def _repeated(p: Sequence[Jet], x: Sequence[Array]) -> Jet:
    """Muennighoff et al. 2023, eq. 5: unique data plus the worth of its repetition."""
    exponent, log_r_star = p
    decay = exp(Jet(-x[1]) * exp(-log_r_star))
    return -(exponent * (log(exp(log_r_star) * (decay * -1.0 + 1.0) + 1.0) + x[0]))


def _centred(p: Sequence[Array], axis: Axis) -> Array:
    return p[0] * axis.centre


PARTS: Mapping[str, Part] = {
    "power": Part(
        "x", "{x}^-{exponent}", ("log",), (EXPONENT,), _power, _centred, power=True
    ),
    "exp": Part(
        "exp(x)", "e^(-{rate} {x})", ("raw",),
        (Parameter("rate", (1e-4, 50.0), (0.05, 5.0), logs=True, public="rate"),),
        _exponential, lambda p, axis: p[0] * axis.centre / axis.spread,
    ),
    "sigmoid": Part(
        "sigmoid(x)", "/ (1 + e^(-{rate} ({x} - {midpoint})))", ("raw",),
        (
            Parameter(
                "rate", (-50.0, 50.0), (0.3, 10.0), logs=True, either_sign=True, public="rate"
            ),
            Parameter("midpoint", (-10.0, 10.0), (-0.2, 1.2), public="position"),
        ),
        _sigmoid, lambda p, axis: 0.0 * p[0],
    ),
    "shifted": Part(
        "shifted(x)", "({x} + {shift})^-{exponent}", ("above",),
        (_ANY_EXPONENT, Parameter("shift", (-12.0, 5.0), (-6.0, 1.0), public="shift")),
        _shifted, lambda p, axis: p[0] * np.log(axis.spread),
    ),
    "broken": Part(
        "broken(x) or broken(x, breaks)",
        "{x}^-{exponent} (1 + ({x} / {break})^(1 / {sharpness}))^(-{change} {sharpness})", ("log",),
        (
            Parameter("exponent", (-10.0, 10.0), (0.02, 2.0), logs=True),
            Parameter("change", (-10.0, 10.0), (0.02, 2.0), logs=True, either_sign=True),
            Parameter("break", (-30.0, 30.0), (0.0, 1.0), public="log_position"),
            Parameter("sharpness", (-5.0, 2.0), (-3.0, 0.5), public="exp"),
        ),
        _broken, _centred,
    ),
    "saturating": Part(
        "saturating(x)", "s, ln s - {sharpness} ln(1 - s) = -{exponent} ln({x} / {midpoint}),",
        ("log",),
        (
            EXPONENT,
            Parameter("midpoint", (-60.0, 60.0), (-0.5, 1.5), public="log_position"),
            Parameter("sharpness", (-4.0, 4.0), (-1.5, 1.5), public="exp"),
        ),
        _saturating, lambda p, axis: 0.0 * p[0],
    ),
    "repeated": Part(
        "repeated(u, r)", "({x} (1 + {r_star} (1 - e^(-{r} / {r_star}))))^-{exponent}",
        ("log", "count"),
        (EXPONENT, Parameter("r_star", (-5.0, 10.0), (-1.0, 9.0), public="exp")),
        _repeated, _centred, power=True,
    ),
    "rising": Part(
        "rising(r)", "{x}^{exponent}", ("power",), (EXPONENT,), lambda p, x: p[0] * x[0],
        lambda p, axis: -p[0] * axis.centre,
    ),
    "line": Part(
        "line(x), a term of its own", "{slope} ln {x}", ("log",),
        (Parameter("slope", (-np.inf, np.inf), (0.0, 0.0)),), lambda p, x: p[0] * x[0],
        lambda p, axis: p[0] * axis.centre,
    ),
}  # fmt: skip
"""Every kind of factor; ``power`` is a bare column."""


@dataclass(frozen=True)
class Factor:
    """A function of one column (two for ``repeated``).

    Attributes:
        kind: one of ``PARTS``.
        columns: names of its columns.
        breaks: of ``broken``.
    """

    kind: str
    columns: tuple[str, ...]
    breaks: int = 1

    @property
    def part(self) -> Part:
        return PARTS[self.kind]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        first, *rest = self.part.parameters
        return (first, *rest * self.breaks) if self.kind == "broken" else self.part.parameters

    def __str__(self) -> str:
        columns = [c if _PLAIN.fullmatch(c) and c != "E" else f"`{c}`" for c in self.columns]
        if self.kind == "power":
            return columns[0]
        extra = (str(self.breaks),) if self.breaks > 1 else ()
        return f"{self.kind}({', '.join((*columns, *extra))})"


@dataclass(frozen=True)
class Term:
    """A product of factors; ``sign`` -1 subtracts it."""

    factors: tuple[Factor, ...]
    sign: Literal[1, -1] = 1

    @property
    def is_line(self) -> bool:
        return any(f.kind == "line" for f in self.factors)

    @property
    def label(self) -> str:
        """Its columns, joined: ``n_total*batch_size``."""
        return "*".join(f.columns[0] for f in self.factors)

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors))


@dataclass(frozen=True)
class Form:
    """A law without numbers.

    Attributes:
        terms: what is summed.
        floor: whether the irreducible E is part of it.
        outer: whether the sum of the terms is raised to a power.
    """

    terms: tuple[Term, ...]
    floor: bool = False
    outer: bool = False

    def __post_init__(self) -> None:
        if not self.terms:
            raise FormError("a law needs a term")
        for column in self.columns:
            if not column or "`" in column:
                raise FormError(f"{column!r} cannot be the name of a column in a form")
        names = [term.label for term in self.terms]
        if len(set(names)) != len(names):
            raise FormError(f"{self}: two terms have the same columns")
        for term in self.terms:
            held = [(f.columns[0], p.stem) for f in term.factors for p in f.part.parameters]
            if len(set(held)) != len(held):
                raise FormError(f"{self}: two factors of {term} have the same parameters")
        if any(t.is_line and len(t.factors) > 1 for t in self.terms):
            raise FormError(f"{self}: line(x) is a term of its own, not a factor")
        if self.outer and any(t.sign < 0 or t.is_line for t in self.terms):
            raise FormError(f"{self}: a sum to an outer power has only positive terms")
        if not self.floor and any(t.sign < 0 or t.is_line for t in self.terms):
            raise FormError(f"{self}: a subtracted term or line(x) needs the floor E")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that the law reads, in order."""
        every = (c for t in self.terms for f in t.factors for c in f.columns)
        return tuple(dict.fromkeys(every))

    def __str__(self) -> str:
        text = str(self.terms[0])
        if self.terms[0].sign < 0 and not self.floor:
            text = f"- {text}"
        for term in self.terms[1:]:
            text += f" {'+' if term.sign > 0 else '-'} {term}"
        if self.outer:
            text = f"({text})^outer"
        if self.floor:
            text = f"E {'-' if self.terms[0].sign < 0 else '+'} {text}"
        return text

    @classmethod
    def parse(cls, text: "str | Form") -> "Form":
        """Read a form; the module's head shows the language.

        Raises:
            FormError: it cannot be read; the message shows where, and the parts there are.

        >>> str(Form.parse("E + n_total*batch_size + exp(loss)"))
        'E + n_total * batch_size + exp(loss)'
        """
        from scaling.analysis.fitting.language import Parser  # it builds forms: a circle otherwise

        return text if isinstance(text, Form) else Parser(text).form()
