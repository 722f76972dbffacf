"""A form bound to data: the solver's parameters theta, and the public ones they stand for.

Columns are centred (ln x less its mean), which takes away most of the correlation of a term's
coefficient and exponents; theta holds E itself, so that "no floor" is a bound that is reached, and
the logarithm of every coefficient at the centre. What people read, coefficients and scales in the
columns' own units, is computed from theta, never fitted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling.analysis.fitting.forms import Axis, Form, FormError, Parameter, Term
from scaling.analysis.fitting.jets import Array, Jet, exp, log
from scaling.analysis.fitting.parameters import (
    FLOOR,
    FREE,
    Constraints,
    Slot,
    check,
    default_bounds,
    factors_of,
    inward,
    inward_slot,
    is_coefficient,
    known,
    outward,
    scale_names,
    slots,
)

_ONE = np.ones((1, 1))


@dataclass(frozen=True, eq=False)
class Surface:
    """A form over the axes of its data.

    Attributes:
        form: the law.
        axes: by term, factor and column.
        slots: parameters of the form.
        place: index in theta of every slot; -1 where it is fixed.
        constant: value in the solver's coordinates of every fixed slot; NaN elsewhere.
        lower, upper: ``[P]`` bounds of theta.
    """

    form: Form
    axes: tuple[tuple[tuple[Axis, ...], ...], ...]
    slots: tuple[Slot, ...]
    place: tuple[int, ...]
    constant: tuple[float, ...]
    lower: Array
    upper: Array

    @classmethod
    def of(
        cls,
        form: Form,
        columns: Mapping[str, Array],
        y: Array,
        *,
        log_scale: bool = True,
        constraints: Constraints = FREE,
    ) -> "Surface":
        """Bind a form to data.

        Args:
            columns: ``[rows]`` values of the form's columns.
            y: ``[rows]`` measured values.
            log_scale: whether residuals are of ln y (then y is positive).

        Raises:
            FormError: a constraint names no parameter, or cannot be held.
        """
        every, scales = slots(form), scale_names(form)
        check(form, every, scales, constraints)
        at_zero = {s.term for s in every if s.name in constraints.names and is_coefficient(s)}
        if FLOOR in constraints.names:  # centring a line would move E
            at_zero |= {t for t, term in enumerate(form.terms) if term.is_line}
        axes = tuple(
            tuple(
                tuple(
                    _axis(role, columns[c], t in at_zero)
                    for role, c in zip(factor.part.columns, factor.columns, strict=True)
                )
                for factor in term.factors
            )
            for t, term in enumerate(form.terms)
        )
        fixed = dict(constraints.fixed)
        for t, name in scales.items():
            if name in fixed:
                first = axes[t][0]
                at_scale = replace(first[0], centre=float(np.log(fixed.pop(name))))
                axes = (*axes[:t], ((at_scale, *first[1:]),), *axes[t + 1 :])
                fixed[next(s.name for s in every if s.term == t and is_coefficient(s))] = 1.0
        group = {name: names[0] for names in constraints.tied for name in names}
        groups = {names[0]: names for names in constraints.tied}
        place, constant, seen = [], [], dict[str, int]()
        lower, upper = list[float](), list[float]()
        for slot in every:
            if slot.name in fixed:
                place.append(-1)
                value = inward_slot(form, axes, slot, fixed[slot.name])
                if np.isinf(value) and not is_coefficient(slot):  # a coefficient may be 0
                    raise FormError(f"{slot.name} cannot be {fixed[slot.name]:g}")
                constant.append(value)
                continue
            constant.append(float("nan"))
            key = group.get(slot.name, slot.name)
            if key in seen:
                place.append(seen[key])
                continue
            seen[key] = len(lower)
            place.append(len(lower))
            low, high = default_bounds(form, axes, slot, y, log_scale and slot.term not in at_zero)
            stated = [
                ends for name, ends in constraints.bounds.items() if group.get(name, name) == key
            ]
            lows = [inward_slot(form, axes, slot, end) for end, _ in stated if end is not None]
            highs = [inward_slot(form, axes, slot, end) for _, end in stated if end is not None]
            low, high = max(lows, default=low), min(highs, default=high)
            if not low < high:
                names = ", ".join(groups.get(key, (key,)))
                wide = "do not overlap" if lows and highs else "lie beyond the default; give both"
                raise FormError(f"the bounds of {names} {wide}")
            lower.append(low)
            upper.append(high)
        return cls(
            form, axes, tuple(every), tuple(place), tuple(constant), np.array(lower),
            np.array(upper),
        )  # fmt: skip

    @property
    def n_free(self) -> int:
        """P, the number of free parameters."""
        return len(self.lower)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """``[P]`` public name that stands for each free parameter (the first of a tied group)."""
        first = dict[int, str]()
        for slot, place in zip(self.slots, self.place, strict=True):
            if place >= 0:
                first.setdefault(place, slot.name)
        return tuple(first[p] for p in range(self.n_free))

    @property
    def public_names(self) -> list[str]:
        """Columns of ``public``."""
        names = [s.name for s in self.slots]
        last = max((i for i, s in enumerate(self.slots) if is_coefficient(s)), default=-1)
        return names[: last + 1] + list(scale_names(self.form).values()) + names[last + 1 :]

    # ---- values ---------------------------------------------------------------------------------

    def transform(self, columns: Mapping[str, Array]) -> "Inputs":
        """Columns as the parts want them: centred logarithms, standardised values."""
        terms = []
        for term, axes in zip(self.form.terms, self.axes, strict=True):
            mask: Array | None = None
            factors = []
            for factor, by_column in zip(term.factors, axes, strict=True):
                values = []
                for role, name, axis in zip(
                    factor.part.columns, factor.columns, by_column, strict=True
                ):
                    x = np.asarray(columns[name], dtype=np.float64)
                    if role == "power" and (x <= 0).any():
                        mask = (x > 0).astype(np.float64) * (1.0 if mask is None else mask)
                        x = np.where(x > 0, x, np.exp(axis.centre))
                    values.append(_onto(axis, role, x))
                factors.append(tuple(values))
            terms.append((tuple(factors), mask))
        return tuple(terms)

    def evaluate(self, theta: Array, x: "Inputs", derivatives: bool = False) -> Jet:
        """y at every row for every parameter vector, ``[S, m]``, with derivatives by theta.

        Args:
            theta: ``[S, P]``.
            x: from ``transform``.
        """
        parameters = [
            self.jet(theta, place, constant, derivatives)
            for place, constant in zip(self.place, self.constant, strict=True)
        ]
        own = {(s.term, s.factor, s.index): p for s, p in zip(self.slots, parameters, strict=True)}
        total: Jet | None = None
        for t, (term, (factors, mask)) in enumerate(zip(self.form.terms, x, strict=True)):
            value = self._term(t, term, factors, own)
            if mask is not None:
                value = value * mask
            value = value if term.sign > 0 else -value
            total = value if total is None else total + value
        assert total is not None
        if self.form.outer:
            outer = parameters[int(self.form.floor)]
            total = exp(outer * log(total))
        return total + parameters[0] if self.form.floor else total

    def values(self, theta: Array, columns: Mapping[str, Array]) -> Array:
        """``[S, m]`` y for ``theta [S, P]``."""
        with np.errstate(all="ignore"):
            value = self.evaluate(theta, self.transform(columns)).value
        m = len(next(iter(columns.values())))
        return np.array(np.broadcast_to(value, (len(theta), m)))

    def jacobian(self, theta: Array, columns: Mapping[str, Array]) -> Array:
        """``[m, P]`` derivative of y by theta, at ``theta [P]``."""
        jet = self.evaluate(theta[None], self.transform(columns), derivatives=True)
        m = len(next(iter(columns.values())))
        out = np.zeros((m, self.n_free))
        for i, by in jet.grad.items():
            out[:, i] = np.broadcast_to(by, (1, m))[0]
        return out

    def parts(self, theta: Array, columns: Mapping[str, Array]) -> dict[str, Array]:
        """``[m]`` of every term (with its sign) under its label, and of E, at ``theta [P]``."""
        out = {}
        if self.form.floor:
            value = self.jet(theta[None], self.place[0], self.constant[0]).value
            out[FLOOR] = np.full(len(next(iter(columns.values()))), float(np.squeeze(value)))
        own = {
            (s.term, s.factor, s.index): self.jet(theta[None], place, constant)
            for s, place, constant in zip(self.slots, self.place, self.constant, strict=True)
        }
        for t, (term, (factors, mask)) in enumerate(
            zip(self.form.terms, self.transform(columns), strict=True)
        ):
            value = self._term(t, term, factors, own).value[0]
            out[term.label] = term.sign * value * (1.0 if mask is None else mask)
        return out

    def _term(
        self, t: int, term: Term, factors: "tuple[tuple[Array, ...], ...]",
        own: Mapping[tuple[int, int, int], Jet],
    ) -> Jet:  # fmt: skip
        logs = [
            factor.part.log_value([own[t, f, i] for i in range(len(factor.parameters))], columns)
            for f, (factor, columns) in enumerate(zip(term.factors, factors, strict=True))
        ]
        if term.is_line:
            return logs[0]
        value = own[t, -1, -1]
        for each in logs:
            value = value + each
        return exp(value)

    def jet(self, theta: Array, place: int, constant: float, derivatives: bool = False) -> Jet:
        """A parameter of ``theta [S, P]`` as ``[S, 1]``: free at ``place``, else ``constant``."""
        if place < 0:
            return Jet(np.full((1, 1), constant))
        return Jet(theta[:, place, None], {place: _ONE} if derivatives else {})

    def ordered(self, theta: Array) -> Array:
        """``theta [S, P]`` with the breaks of every factor in rising order.

        Breaks can change places without changing the law; only in order do they have names. They
        stay where a constraint tells one from another.
        """
        out = theta.copy()
        own = {(s.term, s.factor, s.index): p for s, p in zip(self.slots, self.place, strict=True)}
        for t, f, factor in factors_of(self.form):
            if factor.breaks < 2:
                continue
            indices = range(1, 3 * factor.breaks + 1)
            places = np.array([own[t, f, i] for i in indices]).reshape(factor.breaks, 3)
            if any(p < 0 or self.place.count(p) > 1 for p in places.flat) or any(
                np.ptp(bound[places], axis=0).any() for bound in (self.lower, self.upper)
            ):
                continue
            order = np.argsort(theta[:, places[:, 1]], axis=1)
            out[:, places] = np.take_along_axis(theta[:, places], order[:, :, None], axis=1)
        return out

    # ---- public parameters ----------------------------------------------------------------------

    def public(self, theta: Array) -> pd.DataFrame:
        """Public parameters of ``theta [S, P]``: one row each, columns ``public_names``."""
        inner = [
            np.full(len(theta), c) if p < 0 else theta[:, p]
            for p, c in zip(self.place, self.constant, strict=True)
        ]
        by = {(s.term, s.factor, s.index): v for s, v in zip(self.slots, inner, strict=True)}
        out: dict[str, Array] = {}
        scales = scale_names(self.form)
        for slot, value in zip(self.slots, inner, strict=True):
            if slot.term < 0:
                out[slot.name] = value
            elif is_coefficient(slot):
                offset = sum(self._offsets(slot.term, by))
                with np.errstate(over="ignore"):
                    out[slot.name] = np.exp(value + offset)
                    if slot.term in scales:
                        centre = self.axes[slot.term][0][0].centre
                        out[scales[slot.term]] = np.exp(centre + value / by[slot.term, 0, 0])
            else:
                parameter, axis = self._owner(slot)
                out[slot.name] = outward(parameter, axis, value)
        if self.form.floor:  # a line's slope times its centre is part of the public E
            out[FLOOR] = out[FLOOR] - sum(
                by[t, 0, 0] * self.axes[t][0][0].centre
                for t, term in enumerate(self.form.terms)
                if term.is_line
            )
        return pd.DataFrame(out)[self.public_names]

    def theta(self, params: Mapping[str, float]) -> Array:
        """``[P]`` from public parameters; a term takes its coefficient, else its scale.

        Raises:
            FormError: a parameter is missing, or has a value that it cannot have.
        """
        scales = scale_names(self.form)
        inner: dict[tuple[int, int, int], Array] = {}
        for slot in self.slots:
            if slot.term >= 0 and not is_coefficient(slot):
                parameter, axis = self._owner(slot)
                value = known(params, slot.name)
                key = slot.term, slot.factor, slot.index
                inner[key] = np.array([inward(parameter, axis, value)])
        theta = np.full(self.n_free, np.nan)
        for slot, place in zip(self.slots, self.place, strict=True):
            if place < 0:
                continue
            if slot.term < 0:
                theta[place] = known(params, slot.name)
                if slot.name == FLOOR:
                    theta[place] += sum(
                        float(inner[t, 0, 0][0]) * self.axes[t][0][0].centre
                        for t, term in enumerate(self.form.terms)
                        if term.is_line
                    )
            elif is_coefficient(slot):
                scale = scales.get(slot.term)
                if scale is not None and slot.name not in params and scale in params:
                    centre = self.axes[slot.term][0][0].centre
                    exponent = float(inner[slot.term, 0, 0][0])
                    theta[place] = exponent * (np.log(params[scale]) - centre)
                else:
                    offset = sum(float(o[0]) for o in self._offsets(slot.term, inner))
                    with np.errstate(invalid="ignore", divide="ignore"):
                        theta[place] = np.log(known(params, slot.name)) - offset
            else:
                theta[place] = inner[slot.term, slot.factor, slot.index][0]
            if np.isnan(theta[place]):
                raise FormError(f"{slot.name} cannot be what it is in {dict(params)}")
        return theta

    def _owner(self, slot: Slot) -> tuple[Parameter, Axis]:
        factor = self.form.terms[slot.term].factors[slot.factor]
        return factor.parameters[slot.index], self.axes[slot.term][slot.factor][0]

    def _offsets(self, t: int, by: Mapping[tuple[int, int, int], Array]) -> Iterator[Array]:
        for f, factor in enumerate(self.form.terms[t].factors):
            values = [by[t, f, i] for i in range(len(factor.parameters))]
            yield factor.part.log_offset(values, self.axes[t][f][0])


Inputs = tuple[tuple[tuple[tuple[Array, ...], ...], npt.NDArray[np.float64] | None], ...]
"""By term: transformed columns of every factor, and a mask of rows where the term is not zero."""


def _axis(role: str, x: Array, at_zero: bool) -> Axis:
    """Axis of a fitted column; ``at_zero`` where the coefficient must be the public one."""
    if role == "count":
        return Axis(0.0)
    logs = role in ("log", "power")
    values = np.log(x[x > 0]) if logs else x
    centre, low, high = (float(v) for v in (values.mean(), values.min(), values.max()))
    unscaled = logs or (role == "above" and at_zero)
    spread = 1.0 if unscaled else float(values.std()) or 1.0
    return Axis(0.0 if at_zero else centre, spread, low, high)


def _onto(axis: Axis, role: str, x: Array) -> Array:
    if role in ("log", "power"):
        return np.asarray(np.log(x) - axis.centre)
    if role == "count":
        return x
    return (x - (axis.low if role == "above" else axis.centre)) / axis.spread
