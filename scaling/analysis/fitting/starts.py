"""Where the search begins: thousands of starts at the data's own scale, scored in one go."""

import numpy as np

from scaling.analysis.fitting.jets import Array, Jet
from scaling.analysis.fitting.parameters import FLOOR, OUTER, is_coefficient
from scaling.analysis.fitting.solver import CHUNK, Problem

_SHARE = 1e-4
"""Least share of y that a start gives a term or the floor."""


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
            low, high = parameter.starts
            drawn = (
                np.exp(rng.uniform(np.log(low), np.log(high), n))
                if parameter.logs
                else rng.uniform(low, high, n)
            )
            if parameter.either_sign:
                drawn = drawn * rng.choice([-1.0, 1.0], n)
            theta[:, place] = np.clip(drawn, surface.lower[place], surface.upper[place])
    size = max(1, CHUNK // (problem.target.shape[-1] * max(1, surface.n_free)))
    for i in range(0, n, size):
        theta[i : i + size] = _levels(problem, theta[i : i + size], rng)
    return np.asarray(np.clip(theta, surface.lower, surface.upper))


def best(problem: Problem, starts: Array, n: int, weights: Array) -> Array:
    """The ``n`` starts with the smallest objective under ``weights [rows]``."""
    size = max(1, CHUNK // problem.target.shape[-1])
    scores = np.concatenate(
        [problem.objective(starts[i : i + size], weights) for i in range(0, len(starts), size)]
    )
    return np.asarray(starts[np.argsort(scores, kind="stable")[:n]])


def _levels(problem: Problem, theta: Array, rng: np.random.Generator) -> Array:
    """Fill in E, coefficients and slopes."""
    surface, n = problem.surface, len(theta)
    form = surface.form
    y = np.exp(problem.target) if problem.log_scale else problem.target
    weights = 1.0 / y if problem.log_scale else np.ones_like(y)
    reach = float(y.max() - y.min()) or float(np.abs(y).max()) or 1.0
    out = theta.copy()
    values = [_unit(problem, theta, t) for t in range(len(form.terms))]
    if form.outer:
        power = _value(problem, theta, next(s.name for s in surface.slots if s.name == OUTER))
        floor = rng.uniform(0, 0.95, n) * y.min() if form.floor else np.zeros(n)
        rest = np.maximum(y - floor[:, None], _SHARE * y.min()) ** (1 / power[:, None])
        solved = _least_squares(values, rest, 1.0 / rest, [True] * len(values))
        levels = {FLOOR: floor}
    else:
        columns = [np.ones((n, 1))] * form.floor + values
        signs = [1] * form.floor + [t.sign for t in form.terms]
        floor_positive = form.floor and surface.lower[surface.place[0]] == 0
        positive = [floor_positive] * form.floor + [not t.is_line for t in form.terms]
        columns = [c * s for c, s in zip(columns, signs, strict=True)]
        solved = _least_squares(columns, np.broadcast_to(y, (n, len(y))), weights, positive)
        levels = {FLOOR: solved[:, 0]} if form.floor else {}
        solved = solved[:, int(form.floor) :]
        random = rng.random(n) < 0.5
        if random.any() and not any(t.is_line for t in form.terms):
            shares = rng.dirichlet(np.ones(len(values)), n)
            floors = rng.uniform(0, 0.95, n) * form.floor
            if problem.log_scale and all(s > 0 for s in signs):
                middle = float(np.exp(problem.target.mean()))
                levels = {FLOOR: np.where(random, floors * middle, levels.get(FLOOR, 0.0))}
                drawn = shares * (1 - floors[:, None]) * middle
            else:
                drawn = shares * reach * np.exp(rng.normal(0, 1, (n, 1)))
            solved = np.where(random[:, None], drawn, solved)
    for slot, place in zip(surface.slots, surface.place, strict=True):
        if place < 0:
            continue
        if slot.name == FLOOR:
            out[:, place] = levels[FLOOR]
        elif is_coefficient(slot):
            least = _SHARE * (float(np.abs(y).max()) if problem.log_scale else reach)
            out[:, place] = np.log(np.maximum(solved[:, slot.term], least))
        elif slot.term >= 0 and form.terms[slot.term].is_line:
            out[:, place] = solved[:, slot.term]
    return out


def _unit(problem: Problem, theta: Array, t: int) -> Array:
    """``[S, rows]`` of term t without its coefficient (a line without its slope)."""
    surface = problem.surface
    term = surface.form.terms[t]
    factors, mask = problem.x[t]
    if term.is_line:
        return np.broadcast_to(factors[0][0], (len(theta), problem.target.shape[-1]))
    total = np.zeros((len(theta), problem.target.shape[-1]))
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


def _value(problem: Problem, theta: Array, name: str) -> Array:
    surface = problem.surface
    i = [s.name for s in surface.slots].index(name)
    jet = surface.jet(theta, surface.place[i], surface.constant[i])
    return np.broadcast_to(jet.value[:, 0], (len(theta),))


def _least_squares(columns: list[Array], y: Array, weights: Array, positive: list[bool]) -> Array:
    """``[S, L]`` weighted least squares; what comes out negative and may not is set to zero and
    the rest solved again, once."""
    design = np.stack([np.broadcast_to(c, y.shape) * weights for c in columns], axis=1)
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
