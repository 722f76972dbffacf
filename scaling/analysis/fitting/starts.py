"""Where the search begins: thousands of starts at the data's own scale, scored in one go."""

import numpy as np

from scaling.analysis.fitting.jets import Array, Jet
from scaling.analysis.fitting.parameters import FLOOR, OUTER, is_coefficient, start_range
from scaling.analysis.fitting.solver import CHUNK, Problem

_SHARE = 1e-4
"""Least share of y that a start gives a term."""


def scatter(problem: Problem, n: int, rng: np.random.Generator) -> Array:
    """``[n, P]`` starts.

    Exponents, positions and rates are drawn from their parts' ranges. In half of the starts E and
    the coefficients, in which a sum is linear, then solve weighted least squares; in the other half
    the terms share y at the centre of the data in random proportions.
    """
    surface = problem.surface
    form = surface.form
    theta = np.zeros((n, surface.n_free))
    for slot, place in zip(surface.slots, surface.place, strict=True):
        if place < 0:
            continue
        if slot.name == OUTER:
            theta[:, place] = np.exp(rng.uniform(np.log(0.2), np.log(2.0), n))
        elif slot.term >= 0 and not is_coefficient(slot):
            parameter = form.terms[slot.term].factors[slot.factor].parameters[slot.index]
            low, high = start_range(parameter, surface.axes[slot.term][slot.factor][0])
            drawn = (
                np.exp(rng.uniform(np.log(low), np.log(high), n))
                if parameter.logs
                else rng.uniform(low, high, n)
            )
            if parameter.either_sign:
                drawn = drawn * rng.choice([-1.0, 1.0], n)
            theta[:, place] = np.clip(drawn, surface.lower[place], surface.upper[place])
    size = max(1, CHUNK // (problem.rows * max(1, surface.n_free)))
    for i in range(0, n, size):
        theta[i : i + size] = _levels(problem, theta[i : i + size], rng)
    return np.asarray(np.clip(theta, surface.lower, surface.upper))


def best(problem: Problem, starts: Array, n: int, weights: Array) -> Array:
    """The ``n`` starts with the smallest objective under ``weights [rows]``."""
    size = max(1, CHUNK // problem.rows)
    scores = np.concatenate(
        [problem.objective(starts[i : i + size], weights) for i in range(0, len(starts), size)]
    )
    return np.asarray(starts[np.argsort(scores, kind="stable")[:n]])


def _levels(problem: Problem, theta: Array, rng: np.random.Generator) -> Array:
    """Fill in what a sum is linear in: E, coefficients and slopes."""
    surface, shape = problem.surface, (len(theta), problem.rows)
    form, out = surface.form, theta.copy()
    y = np.exp(problem.target) if problem.log_scale else problem.target
    rest = np.broadcast_to(y, shape)
    if form.outer:
        floor = np.full((len(theta), 1), surface.constant[0] if form.floor else 0.0)
        if form.floor and surface.place[0] >= 0:
            floor = rng.uniform(0, 0.95, floor.shape) * y.min()
            out[:, surface.place[0]] = floor[:, 0]
        outer = int(form.floor)
        power = surface.jet(theta, surface.place[outer], surface.constant[outer]).value
        rest = np.maximum(rest - floor, _SHARE * np.abs(y).max()) ** (1 / power)
    weights = 1.0 / rest if problem.log_scale or form.outer else np.ones(shape)
    columns, known = _linear(problem, theta)
    if not columns:
        return out
    rest, places = rest - known, list(columns)
    slots = [surface.slots[surface.place.index(place)] for place in places]
    positive = [
        is_coefficient(s) or (s.name == FLOOR and surface.lower[place] == 0)
        for s, place in zip(slots, places, strict=True)
    ]
    levels = _least_squares(list(columns.values()), rest, weights, positive)
    if len(places) == surface.n_free:
        # nothing is left to search; an optimum that equals its start would prove nothing
        levels = levels * (1 + rng.normal(0, 0.1, levels.shape))
    sizes = {
        k: np.exp(np.log(np.where(columns[place] == 0, 1.0, np.abs(columns[place]))).mean(axis=1))
        for k, place in enumerate(places)
        if is_coefficient(slots[k])
    }
    reach = float(y.max() - y.min()) or float(np.abs(y).max()) or 1.0
    if sizes and not form.outer and not any(t.is_line for t in form.terms):
        shares = rng.dirichlet(np.ones(len(sizes)), len(theta))
        random = rng.random(len(theta)) < 0.5
        if problem.log_scale and all(t.sign > 0 for t in form.terms):
            middle = np.exp(np.log(np.maximum(rest, _SHARE * y.max())).mean(axis=1))
            if FLOOR in (s.name for s in slots):
                floors = rng.uniform(0, 0.95, len(theta)) * middle
                levels[random, places.index(surface.place[0])] = floors[random]
                middle = middle - floors
        else:
            middle = reach * np.exp(rng.normal(0, 1, len(theta)))
        for share, (k, size) in zip(shares.T, sizes.items(), strict=True):
            levels[random, k] = (share * middle / size)[random]
    least = _SHARE * (float(np.abs(y).max()) if problem.log_scale else reach)
    for k, place in enumerate(places):
        level = levels[:, k]
        out[:, place] = np.log(np.maximum(level, least / sizes[k])) if k in sizes else level
    return out


def _linear(problem: Problem, theta: Array) -> tuple[dict[int, Array], Array]:
    """``[S, rows]`` derivative of the sum of terms (and E, if it is not outside a power) by every
    parameter that it is linear in, by place in theta, and what the fixed ones give."""
    surface = problem.surface
    form, shape = surface.form, (len(theta), problem.rows)
    units = [_unit(problem, theta, t) * term.sign for t, term in enumerate(form.terms)]
    columns, known = dict[int, Array](), np.zeros(shape)
    for slot, place, constant in zip(surface.slots, surface.place, surface.constant, strict=True):
        if slot.name == FLOOR and not form.outer:
            unit = np.ones(shape)
        elif is_coefficient(slot) or (slot.term >= 0 and form.terms[slot.term].is_line):
            unit = units[slot.term]
        else:
            continue
        if place < 0:
            known = known + unit * (np.exp(constant) if is_coefficient(slot) else constant)
        else:
            columns[place] = columns.get(place, 0.0) + unit
    return columns, known


def _unit(problem: Problem, theta: Array, t: int) -> Array:
    """``[S, rows]`` of term t without its coefficient (a line without its slope)."""
    surface, shape = problem.surface, (len(theta), problem.rows)
    term = surface.form.terms[t]
    factors, mask = problem.x[t]
    if term.is_line:
        return np.broadcast_to(factors[0][0], shape)
    total = np.zeros(shape)
    for f, (factor, columns) in enumerate(zip(term.factors, factors, strict=True)):
        own = {
            s.index: surface.jet(theta, place, constant)
            for s, place, constant in zip(
                surface.slots, surface.place, surface.constant, strict=True
            )
            if (s.term, s.factor) == (t, f)
        }
        log_value: Jet = factor.part.log_value([own[i] for i in sorted(own)], columns)
        total = total + log_value.value
    return np.exp(np.clip(total, -200, 200)) * (1.0 if mask is None else mask)


def _least_squares(columns: list[Array], y: Array, weights: Array, positive: list[bool]) -> Array:
    """``[S, L]`` weighted least squares; what comes out negative and may not is set to zero and
    the rest solved again, once."""
    design = np.stack([c * weights for c in columns], axis=1)
    size = np.sqrt((design**2).sum(axis=2, keepdims=True)) + 1e-300
    design = design / size
    gram = design @ np.swapaxes(design, 1, 2) + 1e-10 * np.eye(len(columns))
    right = (design * (y * weights)[:, None, :]).sum(axis=2)
    solved = np.linalg.solve(gram, right[:, :, None])[:, :, 0]
    keep = ~((solved < 0) & np.array(positive))
    eye = np.eye(len(columns))
    gram = np.where(keep[:, :, None] & keep[:, None, :], gram, eye)
    solved = np.linalg.solve(gram, np.where(keep, right, 0.0)[:, :, None])[:, :, 0]
    return np.asarray(np.where(np.array(positive), np.maximum(solved, 0), solved) / size[:, :, 0])
