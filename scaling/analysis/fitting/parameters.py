"""Parameters of a form: their public names, what holds them, their bounds, and how they are said.

The solver's coordinates of a parameter and its public value differ only by what centring and
scaling of its column take out (``forms.Parameter.public``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling.analysis.fitting.forms import Axis, Factor, Form, FormError, Parameter
from scaling.analysis.fitting.jets import Array

TERM_DEPTH = float(np.log(1e6))
"""At the centre of the data no power may fall below a millionth of the smallest y."""
WIDE = 60.0
"""Bound of a log coefficient where the size of its term says little of it."""
OUTER_BOUNDS = (1e-3, 10.0)
COEFFICIENT, SCALE, OUTER, FLOOR = "coefficient", "scale", "outer", "irreducible"
_FREE_ORIGIN = ("same", "exp")
"""Kinds of parameters that two factors can share: they know nothing of an axis."""


Ends = tuple[float | None, float | None]
"""Lower and upper bound of a public parameter; None: as if nothing were said."""


@dataclass(frozen=True)
class Slot:
    """One parameter of a form: E, the outer power, a term's coefficient or one of a factor's.

    Attributes:
        name: public name.
        term, factor, index: where it belongs; -1 for none.
    """

    name: str
    term: int = -1
    factor: int = -1
    index: int = -1


@dataclass(frozen=True)
class Constraints:
    """What is not free: public names to values, to bounds, and groups that share one value.

    An end of a bound that is None is the default's.
    """

    fixed: Mapping[str, float]
    bounds: Mapping[str, Ends]
    tied: tuple[tuple[str, ...], ...] = ()

    @property
    def names(self) -> set[str]:
        return {*self.fixed, *self.bounds, *(name for group in self.tied for name in group)}


FREE = Constraints({}, {})


def slots(form: Form) -> list[Slot]:
    """Parameters of a form: E, outer power, coefficients, then the factors' own.

    A law of one term with one factor names them without the column. A column that several terms
    hold is named with its term.
    """
    out = [Slot(FLOOR)] * form.floor + [Slot(OUTER)] * form.outer
    single = len(form.terms) == 1 and len(form.terms[0].factors) == 1
    for t, term in enumerate(form.terms):
        if not term.is_line:
            out.append(Slot(COEFFICIENT if single else f"{COEFFICIENT}.{term.label}", t))
    every = [f.columns[0] for term in form.terms for f in term.factors]
    for t, f, factor in factors_of(form):
        column = factor.columns[0]
        tail = column if every.count(column) == 1 else f"{form.terms[t].label}.{column}"
        for i, parameter in enumerate(factor.parameters):
            name = parameter.stem if single else f"{parameter.stem}.{tail}"
            if factor.breaks > 1 and i > 0:
                name += f".{(i - 1) // 3 + 1}"
            out.append(Slot(name, t, f, i))
    return out


def scale_names(form: Form) -> dict[int, str]:
    """Terms whose coefficient can be said as a scale, and its public name."""
    single = len(form.terms) == 1
    return {
        t: SCALE if single else f"{SCALE}.{term.label}"
        for t, term in enumerate(form.terms)
        if len(term.factors) == 1 and term.factors[0].part.power and not form.outer
    }


def factors_of(form: Form) -> Iterator[tuple[int, int, Factor]]:
    for t, term in enumerate(form.terms):
        for f, factor in enumerate(term.factors):
            yield t, f, factor


def is_coefficient(slot: Slot) -> bool:
    return slot.term >= 0 and slot.factor < 0


def outward(parameter: Parameter, axis: Axis, value: Array) -> Array:
    match parameter.public:
        case "exp":
            return np.asarray(np.exp(value))
        case "position":
            return axis.centre + axis.spread * value
        case "log_position":
            return np.asarray(np.exp(axis.centre + value))
        case "rate":
            return value / axis.spread
        case "shift":
            return np.asarray(axis.spread * np.exp(value) - axis.low)
    return value


def inward(parameter: Parameter, axis: Axis, value: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        match parameter.public:
            case "exp":
                return float(np.log(value))
            case "position":
                return (value - axis.centre) / axis.spread
            case "log_position":
                return float(np.log(value) - axis.centre)
            case "rate":
                return value * axis.spread
            case "shift":
                return float(np.log((value + axis.low) / axis.spread))
    return value


def inward_slot(
    form: Form, axes: Sequence[Sequence[Sequence[Axis]]], slot: Slot, value: float
) -> float:
    """A fixed value or bound in the solver's coordinates (coefficients have their origin at 0)."""
    if slot.term < 0:
        inner = value
    elif is_coefficient(slot):
        with np.errstate(divide="ignore", invalid="ignore"):
            inner = float(np.log(value))
    else:
        parameter = form.terms[slot.term].factors[slot.factor].parameters[slot.index]
        inner = inward(parameter, axes[slot.term][slot.factor][0], value)
    if np.isnan(inner):
        raise FormError(f"{slot.name} cannot be {value:g}")
    return inner


def default_bounds(
    form: Form, axes: Sequence[Sequence[Sequence[Axis]]], slot: Slot, y: Array, at_centre: bool
) -> tuple[float, float]:
    """Bounds in the solver's coordinates.

    Args:
        at_centre: whether a coefficient is the size of its term at the centre of positive data.
    """
    if slot.name == OUTER:
        return OUTER_BOUNDS
    low, high = float(y.min()), float(y.max())
    reach = max(high - low, 1e-12 * max(abs(low), abs(high)), 1e-300)
    if slot.term < 0:
        if any(t.is_line for t in form.terms):
            return -np.inf, np.inf
        if any(t.sign < 0 for t in form.terms):
            return low, high + 10 * reach
        return 0.0 if low > 0 else low - 10 * reach, high
    if is_coefficient(slot):
        term = form.terms[slot.term]
        pure = all(f.kind == "power" for f in term.factors) and not form.outer
        if at_centre and pure and term.sign > 0:
            return float(np.log(low)) - TERM_DEPTH, float(np.log(high)) + 5.0
        middle = float(np.log(max(abs(low), abs(high))))
        return middle - WIDE, middle + WIDE
    parameter = form.terms[slot.term].factors[slot.factor].parameters[slot.index]
    axis = axes[slot.term][slot.factor][0]
    low, high = parameter.bounds
    match parameter.public:
        case "position" | "log_position":
            origin = (0.5 * (axis.low + axis.high) - axis.centre) / axis.spread
        case "shift":
            origin = _log_reach(axis)
        case _:
            origin = 0.0
    return origin + low, origin + high


def start_range(parameter: Parameter, axis: Axis) -> tuple[float, float]:
    """Range of a parameter's starts in the solver's coordinates."""
    low, high = parameter.starts
    match parameter.public:
        case "position" | "log_position":
            low, high = (axis.low + end * (axis.high - axis.low) for end in (low, high))
            return (low - axis.centre) / axis.spread, (high - axis.centre) / axis.spread
        case "shift":
            return low + _log_reach(axis), high + _log_reach(axis)
    return low, high


def _log_reach(axis: Axis) -> float:
    return float(np.log((axis.high - axis.low or 1.0) / axis.spread))


def check(
    form: Form, every: Sequence[Slot], scales: Mapping[int, str], constraints: Constraints
) -> None:
    names = [s.name for s in every]
    valid = [*names, *scales.values()]
    for name in constraints.names:
        if name not in valid:
            raise FormError(f"{form} has no parameter {name!r}; it has {', '.join(valid)}")
        if name in scales.values() and name not in constraints.fixed:
            raise FormError(f"{name} can be fixed, not bounded or tied; bound the coefficient")
    for name, value in constraints.fixed.items():
        if not np.isfinite(value):
            raise FormError(f"{name} cannot be fixed to {value:g}")
    for name, ends in constraints.bounds.items():
        low = -np.inf if ends[0] is None else ends[0]
        high = np.inf if ends[1] is None else ends[1]
        if not low < high:
            raise FormError(f"bounds of {name} must rise, not {low:g} to {high:g}")
        if name in constraints.fixed:
            raise FormError(f"{name} is fixed and bounded")
    for t, name in scales.items():
        coefficient = next(s.name for s in every if s.term == t and is_coefficient(s))
        if name in constraints.fixed and coefficient in constraints.names:
            raise FormError(f"{name} and {coefficient} say the same; constrain one of them")
        if name in constraints.fixed and not constraints.fixed[name] > 0:
            raise FormError(f"{name} must be positive, not {constraints.fixed[name]:g}")
    stems = {s.name: _kind(form, s) for s in every}
    for group in constraints.tied:
        if len(group) < 2 or len({stems[n] for n in group}) != 1 or None in map(stems.get, group):
            raise FormError(
                f"{', '.join(group)} cannot be tied; a group holds two or more parameters of one "
                "kind: coefficients, exponents, changes, sharpnesses or r_stars"
            )
        if any(n in constraints.fixed for n in group):
            raise FormError(f"{', '.join(group)}: a tied parameter is fixed")
    if len({n for g in constraints.tied for n in g}) != sum(map(len, constraints.tied)):
        raise FormError("a parameter is in two tied groups")


def _kind(form: Form, slot: Slot) -> str | None:
    """What a slot may be tied with; None: with nothing."""
    if is_coefficient(slot):
        return COEFFICIENT
    if slot.term < 0:
        return None
    parameter = form.terms[slot.term].factors[slot.factor].parameters[slot.index]
    return parameter.stem if parameter.public in _FREE_ORIGIN else None


def known(params: Mapping[str, float], name: str) -> float:
    if name not in params:
        raise FormError(f"parameter {name} is missing; given: {', '.join(params)}")
    return float(params[name])
