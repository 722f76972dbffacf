"""What is taken for granted of a law before its runs: a spread of laws, not one.

The information in a run depends on the law that is to be found, so a design needs an assumed one.
``Assumption`` holds it in numbers that mean the same on any corpus: shares of the loss at the
centre of the design, and exponents. Criteria are averaged over laws drawn around it (Bayesian
design: Chaloner and Verdinelli 1995, Statistical Science 10), and finished runs narrow the draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling import ClueError
from scaling.analysis.fitting.forms import Form, FormError
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.parameters import FLOOR, Slot, is_coefficient
from scaling.analysis.fitting.surface import Surface
from scaling.files import RecordError, read_json

NOISE = 0.01
"""Assumed standard deviation of ln loss from run to run, where no seeds tell it."""
DRAWS_MOMENTS = 4_000
"""Draws that the mean and the precision of an assumption are taken from."""
NEWTON_STEPS = 100


class DesignError(ClueError):
    """A design cannot be judged or made; the message names what is missing."""


@dataclass(frozen=True)
class Assumption:
    """An assumed law ``E + sum of terms``, with or without E, and how sure it is.

    Attributes:
        exponent: median exponent of every factor not named below. The two of Hoffmann et al. 2022
            (section 3.3) are 0.34 and 0.28.
        floor_share: E over the loss at the centre of the design.
        r_star: passes beyond which repetition stops to pay (Muennighoff et al. 2023, R_D*).
        exponents: medians by column.
        shares: of what is above E at the centre, by label of the term; equal where not named.
        source: where the numbers come from, in words.
    """

    exponent: float = 0.3
    floor_share: float = 0.4
    r_star: float = 15.4
    exponents: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    source: str = "assumed: exponents 0.3, E 40 % of the loss at the centre, terms of equal size"

    def __post_init__(self) -> None:
        if not 0 <= self.floor_share < 1:
            raise DesignError(f"floor share is from 0 to below 1, not {self.floor_share:g}")
        wrong = {
            k: v for k, v in {**self.exponents, "exponent": self.exponent}.items() if not v > 0
        }
        if wrong:
            raise DesignError(f"assumed exponents are positive, not {wrong}")

    def with_exponents(self, given: Mapping[str, float]) -> "Assumption":
        """The same with other exponents of some columns."""
        if not given:
            return self
        said = ", ".join(f"{k} {v:g}" for k, v in given.items())
        return replace(
            self, exponents={**self.exponents, **given}, source=f"{self.source}; given: {said}"
        )


SPREAD_EXPONENT, SPREAD_FLOOR, SPREAD_R_STAR, SPREAD_LEVEL = 0.5, 0.4, 0.7, 0.3
"""Standard deviations over the draws of ln exponent, ln E, ln r_star and ln of the whole law."""
LEAST_FLOOR, LEAST_EXPONENT, LEAST_SHARE = 0.01, 0.02, 1e-3
"""A law that stood on a bound is not taken at its word: E, exponents and shares start here."""
CONCENTRATION = 2.0
"""Of the Dirichlet distribution of the terms' shares, per term."""


def assumption_of(path: Path, plan: pd.DataFrame) -> tuple[Assumption, str]:
    """The assumption that a fitted law makes, read off at the centre of a plan, and its form.

    Args:
        path: JSON of ``clue-scaling fit --json`` or ``fits.json`` of a sweep; of several laws the
            one in most columns.
        plan: rows whose mean logarithms are the centre.

    Raises:
        DesignError: the file holds no law, or only laws of columns that the plan does not have.
    """
    try:
        found = _laws(read_json(path))
    except RecordError as e:
        raise DesignError(str(e)) from None
    usable = [
        (law, form)
        for law in found
        if (form := _form(law["form"])) and set(form.columns) <= set(plan)
    ]
    if not usable:
        said = "; ".join(dict.fromkeys(law["form"] for law in found)) or "none"
        raise DesignError(f"{path}: no law of columns of the plan; its laws: {said}")
    law, form = max(usable, key=lambda pair: len(pair[1].columns))
    params = law["params"]
    if any(v is None for v in params.values()):
        raise DesignError(f"{path}: not all parameters of {form} are numbers")
    columns = columns_of(form, plan)
    at = {c: np.array([np.exp(np.log(x[x > 0]).mean())]) for c, x in columns.items() if x.any()}
    at = {c: at.get(c, np.zeros(1)) for c in columns}
    surface = Surface.of(form, columns, np.ones(len(plan)))
    parts = surface.parts(surface.theta(params), at)
    floor = float(parts.pop(FLOOR, np.zeros(1))[0])
    sizes = {label: abs(float(v[0])) for label, v in parts.items()}
    total = sum(sizes.values())
    exponents = {
        c: float(value)
        for c in form.columns
        for name in (f"exponent.{c}", "exponent")
        if (value := params.get(name)) is not None and float(value) > 0
    }
    given = Assumption(
        floor_share=min(max(floor, 0.0) / (floor + total), 0.99),
        r_star=next((v for k, v in params.items() if k.startswith("r_star")), Assumption.r_star),
        exponents=exponents,
        shares={label: size / total for label, size in sizes.items()},
        source=f"law of {path} ({law.get('status', 'no status')}): {law.get('equation', form)}",
    )
    return given, str(form)


def _form(text: str) -> Form | None:
    """A form; None for the words of an older release."""
    try:
        return Form.parse(text)
    except FormError:
        return None


def _laws(record: Any) -> list[Mapping[str, Any]]:
    """Every law in a record, however deep: objects with a form and parameters."""
    if isinstance(record, Mapping):
        if isinstance(record.get("form"), str) and isinstance(record.get("params"), Mapping):
            return [record]
        return [law for value in record.values() for law in _laws(value)]
    if isinstance(record, list):
        return [law for value in record for law in _laws(value)]
    return []


@dataclass(frozen=True, eq=False)
class Belief:
    """A Gaussian over the parameters theta of a surface.

    Attributes:
        surface: the form, centred on the candidates; loss in units of its value at the centre.
        mean: ``[P]``.
        precision: ``[P, P]`` inverse covariance.
        prior: the belief before the runs; None if this is it.
    """

    surface: Surface
    mean: Array
    precision: Array
    assumption: Assumption
    prior: "Belief | None" = None

    def draws(self, n: int, rng: np.random.Generator) -> Array:
        """``[n, P]`` laws, the mean first. Before any run as the assumption has them; after runs
        half of them still, for a Gaussian around the mode makes too sure of it."""
        drawn = _draw(self.surface, self.assumption, n, rng)
        if self.prior is not None:
            root = np.linalg.cholesky(np.linalg.inv(self.precision))
            near = self.mean + rng.normal(size=((n + 1) // 2, len(self.mean))) @ root.T
            drawn[: len(near)] = np.clip(near, _least(self.surface), self.surface.upper)
        drawn[0] = self.mean
        return drawn


def believe(
    form: str | Form, centre_on: pd.DataFrame, assumption: Assumption, seed: int = 0
) -> Belief:
    """The belief before any run.

    Args:
        form: of power terms (``x``, products of them, ``repeated``, ``rising``), with or without E.
        centre_on: rows whose mean logarithms are the centre, such as the candidates.

    Raises:
        DesignError: the form has parts without an assumption, or a column is missing.
    """
    form = Form.parse(form)
    missing = [c for c in form.columns if c not in centre_on]
    if missing:
        raise DesignError(f"{form}: no column {', '.join(missing)} in the plan")
    surface = Surface.of(form, columns_of(form, centre_on), np.ones(len(centre_on)))
    drawn = _draw(surface, assumption, DRAWS_MOMENTS, np.random.default_rng(seed))
    precision = np.asarray(np.linalg.inv(np.cov(drawn.T)), dtype=np.float64)
    return Belief(surface, _median(surface, assumption), precision, assumption)


def update(belief: Belief, runs: pd.DataFrame, noise: float, y: str = "loss") -> Belief:
    """The belief after finished runs: the mode of prior times likelihood, and its curvature.

    Minimises ``sum(((ln fit - ln y) / noise)^2) + (theta - mean)' precision (theta - mean)`` by a
    damped Gauss-Newton method. The prior keeps what few runs cannot tell, where ``fit_law`` would
    stand on a bound. Losses are first brought to the law's own unit: their mean to what the mean
    law gives at these runs; ``SPREAD_LEVEL`` leaves room for the rest.

    Args:
        runs: rows with the columns of the form and ``y``.
        noise: standard deviation of ln y.
    """
    surface = belief.surface
    x = columns_of(surface.form, runs)
    centre = float(surface.values(belief.mean[None], x)[0].mean())
    log_y = np.log(runs[y].to_numpy(dtype=np.float64) / runs[y].mean() * centre)

    def misfit(theta: Array) -> tuple[float, Array]:
        with np.errstate(all="ignore"):
            residual = (np.log(surface.values(theta[None], x)[0]) - log_y) / noise
        away = theta - belief.mean
        return float(residual @ residual + away @ belief.precision @ away), residual

    theta, damping = belief.mean, 1e-3
    value, residual = misfit(theta)
    for _ in range(NEWTON_STEPS):
        jacobian = log_jacobian(surface, theta[None], x)[0] / noise
        hessian = jacobian.T @ jacobian + belief.precision
        gradient = jacobian.T @ residual + belief.precision @ (theta - belief.mean)
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        trial = np.clip(theta - step, _least(surface), surface.upper)
        lower, left = misfit(trial)
        if lower < value:
            done = value - lower < 1e-9 * value
            theta, value, residual, damping = trial, lower, left, damping / 3
            if done:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    jacobian = log_jacobian(surface, theta[None], x)[0] / noise
    return replace(
        belief, mean=theta, precision=jacobian.T @ jacobian + belief.precision, prior=belief
    )


def noise_of(runs: pd.DataFrame, same: Sequence[str], y: str = "loss") -> tuple[float, int] | None:
    """Standard deviation of ln y between seeds of one configuration, pooled, and its degrees of
    freedom; None where no configuration has two seeds."""
    log_y = pd.Series(np.log(runs[y].to_numpy(dtype=np.float64)), index=runs.index)
    groups = log_y.groupby([runs[c] for c in same], dropna=False)
    freedom = int((groups.size() - 1).sum())
    if freedom < 1:
        return None
    squares = float(((groups.size() - 1) * groups.var().fillna(0)).sum())
    return float(np.sqrt(squares / freedom)), freedom


def columns_of(form: Form, table: pd.DataFrame) -> dict[str, Array]:
    """The form's columns as arrays of floats."""
    return {c: table[c].to_numpy(dtype=np.float64) for c in form.columns}


def log_jacobian(surface: Surface, theta: Array, x: Mapping[str, Array]) -> Array:
    """``[S, m, P]`` derivative of ln y by theta, for ``theta [S, P]``."""
    by_law = [surface.jacobian(one, x) for one in theta]
    return np.asarray(np.stack(by_law) / surface.values(theta, x)[..., None])


def _least(surface: Surface) -> Array:
    """Lower bounds, a little above zero for an exponent: a law that falls."""
    exponent = np.array([n.startswith("exponent") for n in surface.names])
    return np.where(exponent, LEAST_EXPONENT, surface.lower)


def _kind(slot: Slot, form: Form) -> str:
    if slot.name == FLOOR:
        return "floor"
    if slot.term >= 0 and is_coefficient(slot):
        return "share"
    stem = slot.name.partition(".")[0]
    if stem not in ("exponent", "r_star"):
        raise DesignError(
            f"{form}: nothing is assumed of {slot.name!r}; a design takes laws of power terms: x, "
            "products of them, repeated(u, r), rising(r), with or without E"
        )
    return stem


def _draw(surface: Surface, given: Assumption, n: int, rng: np.random.Generator) -> Array:
    """``[n, P]`` laws around an assumption."""
    middle = _shares(surface.form, given)
    shares = rng.dirichlet(CONCENTRATION * len(middle) * middle, n)
    spread = rng.normal(size=(n, len(surface.slots)))
    level = np.exp(SPREAD_LEVEL * rng.normal(size=n))
    return np.clip(_laws_at(surface, given, shares, spread, level), _least(surface), surface.upper)


def _median(surface: Surface, given: Assumption) -> Array:
    """``[P]`` the assumed law itself."""
    spread = np.zeros((1, len(surface.slots)))
    return np.asarray(
        _laws_at(surface, given, _shares(surface.form, given)[None], spread, np.ones(1))[0]
    )


def _laws_at(
    surface: Surface, given: Assumption, shares: Array, spread: Array, level: Array
) -> Array:
    """``[n, P]`` laws away from an assumption.

    Args:
        shares: ``[n, terms]`` of what is above E at the centre.
        spread: ``[n, slots]`` of every parameter, in its standard deviations.
        level: ``[n]`` loss at the centre.
    """
    floor = max(given.floor_share, LEAST_FLOOR) * np.exp(SPREAD_FLOOR * spread[:, 0])
    floor = np.minimum(floor, (1 + given.floor_share) / 2) if surface.form.floor else 0 * floor
    theta = np.empty((len(level), surface.n_free))
    for i, (slot, place) in enumerate(zip(surface.slots, surface.place, strict=True)):
        kind = _kind(slot, surface.form)
        if kind == "floor":
            theta[:, place] = floor * level
        elif kind == "share":
            above = np.maximum(shares[:, slot.term], 1e-4) * (1 - floor)
            theta[:, place] = np.log(above * level)
        elif kind == "r_star":
            theta[:, place] = np.log(given.r_star) + SPREAD_R_STAR * spread[:, i]
        else:
            median = _exponent(slot, surface, given)
            theta[:, place] = median * np.exp(SPREAD_EXPONENT * spread[:, i])
    return theta


def _exponent(slot: Slot, surface: Surface, given: Assumption) -> float:
    column = surface.form.terms[slot.term].factors[slot.factor].columns[0]
    return max(given.exponents.get(column, given.exponent), 2 * LEAST_EXPONENT)


def _shares(form: Form, given: Assumption) -> Array:
    labels = [term.label for term in form.terms]
    named = np.array([given.shares.get(label, np.nan) for label in labels])
    rest = np.isnan(named)
    if rest.any():
        named[rest] = 1 / len(labels) if rest.all() else np.nanmean(named)
    return np.asarray(np.maximum(named, LEAST_SHARE) / np.maximum(named, LEAST_SHARE).sum())
