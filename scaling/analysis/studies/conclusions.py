"""The claims of a study, as data: what is asked, and how an answer is read off a fit."""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from scaling.analysis.fitting.comparison import FormComparison
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.parameters import FLOOR
from scaling.analysis.fitting.status import FitStatus
from scaling.analysis.fitting.verdicts import IDENTIFICATION
from scaling.analysis.studies.choices import Choice
from scaling.analysis.studies.claims import MIN_EXPONENT, Claim, Reading
from scaling.analysis.studies.factors import REPEATS
from scaling.analysis.studies.laws import AXES, Laws
from scaling.analysis.studies.limits import PAID, limits

DECIDED = 0.975
"""Share of the bootstrap draws in which one exponent must exceed another."""
FELT = 0.005
"""Repetition raises the loss where its term, at the most repeated run, is above this share of it
(lower end of the interval), and does not where the upper end is below."""


def conclusions(laws: Laws) -> Iterator[Claim]:
    """The claims that these runs allow to ask."""
    yield Claim(
        "compute_exponent",
        "Does the loss of the compute frontier fall as a power of compute?",
        {"falls": "the loss of the compute frontier falls as a power of compute"},
        "compute", AXES["compute"], _exponent_in_compute, overlap=True,
        grid=("compute", "y", "rows", "points"),
    )  # fmt: skip
    yield Claim(
        "compute_floor",
        "Do these runs identify a floor of the loss in compute?",
        {
            "identified": "a floor of the loss in compute is identified",
            "not identified": "no floor of the loss in compute is identified: extrapolations with "
            "and without one are both open",
        },
        "compute_floor", AXES["compute_floor"], _floor,
    )  # fmt: skip
    yield Claim(
        "shape",
        "Is the loss log-linear in compute, or a power law?",
        {
            "log-linear": "runs left out are predicted best by the log-linear law in compute",
            "power law": "runs left out are predicted best by a power law in compute",
            "power law with floor": "runs left out are predicted best by a power law with floor",
            "either": "runs left out do not tell a log-linear law in compute from a power law",
        },
        "shapes", AXES["shapes"], _shape,
    )  # fmt: skip
    factors = laws.factors()
    for name in factors.names:
        yield Claim(
            f"exponent.{name}",
            f"Does the loss fall with {name}, the other factors held?",
            {"above zero": f"the loss falls with {name}, the other factors held"},
            "joint", AXES["joint"], _above_zero(name),
        )  # fmt: skip
    for one, other in combinations(factors.names, 2):
        yield Claim(
            f"order.{one}.{other}",
            f"Is the exponent of {one} or that of {other} the larger?",
            {
                one: f"the exponent of {one} is larger than that of {other}",
                other: f"the exponent of {other} is larger than that of {one}",
            },
            "joint", AXES["joint"], _order(one, other),
        )  # fmt: skip
    paid = [n for n in factors.names if n in PAID]
    if len(paid) > 1:
        yield Claim(
            "limiting_factor",
            "Which factor limits the run of most compute?",
            {n: f"{n} limits the run of most compute: its doubling gains the most" for n in paid},
            "joint", AXES["joint"], _limits_the_largest,
        )  # fmt: skip
    if factors.repeats:
        yield Claim(
            "memorisation",
            "Does the loss rise when users are repeated?",
            {
                "rises": "the loss rises with passes beyond the first, users seen held",
                "does not": "the loss does not rise with passes beyond the first",
            },
            "rising", AXES["rising"], _memorised,
        )  # fmt: skip


def _no_fit(fit: LawFit) -> Reading | None:
    """Why nothing may be read off a fit; None where it may."""
    if fit.status is not FitStatus.CONVERGED:
        return Reading(None, reason=f"{fit.status}, {fit.message}")
    return Reading(None, reason="no bootstrap") if fit.draws.empty else None


def _interval(fit: LawFit, name: str) -> tuple[float, float, float]:
    interval = fit.ci()
    return (
        float(fit.params[name]), float(interval["lower"][name]), float(interval["upper"][name]),
    )  # fmt: skip


def _exponent_in_compute(fit: LawFit, rows: pd.DataFrame, choice: Choice) -> Reading:
    if failed := _no_fit(fit):
        return failed
    value, lower, upper = _interval(fit, "exponent")
    if lower > MIN_EXPONENT:
        return Reading("falls", value, lower, upper)
    reason = f"zero is in the 95 % interval [{lower:.3g}, {upper:.3g}]"
    return Reading(None, value, lower, upper, reason)


def _floor(fit: LawFit, rows: pd.DataFrame, choice: Choice) -> Reading:
    if fit.status not in (FitStatus.CONVERGED, FitStatus.BOUND_HIT) or fit.draws.empty:
        return _no_fit(fit) or Reading(None, reason=str(fit.status))
    verdict = fit.floor()
    answer = "identified" if verdict.identified else "not identified"
    return Reading(answer, *_interval(fit, FLOOR))


def _shape(compared: FormComparison, rows: pd.DataFrame, choice: Choice) -> Reading:
    left = compared.candidates()
    if not left:
        return Reading(None, reason=compared.verdict())
    errors = compared.differences("cross_validation")["error"]
    value = float(errors[left[0]])
    if len(left) == 1:
        return Reading(left[0], value)
    if "log-linear" not in left:
        return Reading("power law", value)
    return Reading("either", value)


def _column(name: str, choice: Choice) -> str:
    """The column that stands for a factor under a choice."""
    return {"n_total": choice.size, "items_per_user_mean": choice.length}.get(name, name)


def _exponent(fit: LawFit, column: str) -> str:
    """Public name of a factor's exponent."""
    return f"exponent.{column}" if len(fit.params.filter(like="exponent")) > 1 else "exponent"


def _not_identified(fit: LawFit, column: str) -> str | None:
    """Why the design or the data does not hold a factor's exponent."""
    row = fit.identified().loc[column]
    return None if row["identified"] else f"{column} not identified: {row['reasons']}"


def _above_zero(name: str) -> Callable[[LawFit, pd.DataFrame, Choice], Reading]:
    def read(fit: LawFit, rows: pd.DataFrame, choice: Choice) -> Reading:
        if failed := _no_fit(fit):
            return failed
        column = _column(name, choice)
        value, lower, upper = _interval(fit, _exponent(fit, column))
        row = fit.identified().loc[column]
        moved = row["inflation"] > IDENTIFICATION.max_inflation
        if lower > IDENTIFICATION.min_exponent and not moved:
            return Reading("above zero", value, lower, upper)
        return Reading(None, value, lower, upper, f"{column}: {row['reasons']}")

    return read


def _order(one: str, other: str) -> Callable[[LawFit, pd.DataFrame, Choice], Reading]:
    def read(fit: LawFit, rows: pd.DataFrame, choice: Choice) -> Reading:
        if failed := _no_fit(fit):
            return failed
        columns = [_column(n, choice) for n in (one, other)]
        a, b = (fit.draws[_exponent(fit, c)] for c in columns)
        difference = float(
            fit.params[_exponent(fit, columns[0])] - fit.params[_exponent(fit, columns[1])]
        )
        share = float((a > b).mean())
        lower, upper = (float(v) for v in (a - b).quantile([1 - DECIDED, DECIDED]))
        for column in columns:
            if (reason := _not_identified(fit, column)) is not None:
                return Reading(None, difference, lower, upper, reason)
        if DECIDED > share > 1 - DECIDED:
            reason = f"{one} is the larger in {share:.0%} of the bootstrap draws"
            return Reading(None, difference, lower, upper, reason)
        return Reading(one if share >= DECIDED else other, difference, lower, upper)

    return read


def _limits_the_largest(fit: LawFit, rows: pd.DataFrame, choice: Choice) -> Reading:
    if failed := _no_fit(fit):
        return failed
    largest = rows[rows["pf_days"] == rows["pf_days"].max()]
    cell = limits(fit, largest)["cells"][-1]
    names = {choice.size: "n_total", choice.length: "items_per_user_mean"}
    limiting = cell["limiting"]
    if limiting is None:
        return Reading(None, reason="no factor that costs compute lowers the loss there")
    name, gain = names.get(limiting, limiting), cell["gains"][limiting]
    ends = gain["gain"], gain.get("lower"), gain.get("upper")
    if not cell["said"]:
        return Reading(None, *ends, f"{name}, in {cell['share']:.0%} of the bootstrap draws only")
    return Reading(name, *ends)


def _memorised(fit: LawFit, rows: pd.DataFrame, choice: Choice) -> Reading:
    """Share of the loss that the rising term makes up at the most repeated run."""
    if failed := _no_fit(fit):
        return failed
    at = rows.iloc[[int(rows[REPEATS].argmax())]][list(fit.factors)].astype(np.float64)
    whole, without = at, at.assign(**{REPEATS: 0.0})
    value = 1 - float(fit.predict(without)["y"].iloc[0] / fit.predict(whole)["y"].iloc[0])
    share = 1 - fit.predict_draws(without)[:, 0] / fit.predict_draws(whole)[:, 0]
    ends = fit.tail()
    lower, upper = (float(v) for v in np.nanquantile(share, [ends, 1 - ends]))
    if lower > FELT:
        return Reading("rises", value, lower, upper)
    if upper < FELT:
        return Reading("does not", value, lower, upper)
    reason = f"its share of the loss at the most repeated run is {lower:.2g} to {upper:.2g}"
    return Reading(None, value, lower, upper, reason)
