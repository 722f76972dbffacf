"""Surviving claims: every conclusion of a study under every choice that concerns it.

A claim is data: a question, the answers it can have with the statement of each, the law that it is
read off, and how. It is asked under the base choice, with one axis of choice changed at a time,
and where the law is quick to fit under all combinations. It survives, and its statement may be
printed, only if every choice gives the same answer; else the question is open, and ``against`` says
why. The claims of a study are in ``conclusions``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.fitting.record import plain
from scaling.analysis.fitting.status import FitError, FitStatus
from scaling.analysis.studies.choices import Choice, jointly, one_at_a_time
from scaling.analysis.studies.laws import Laws

MIN_EXPONENT = 1e-3
"""The exponent in compute is above zero where its 95 % interval lies above this."""
RULE = (
    "a claim survives if every choice gives the same answer, each from a fit that is CONVERGED (or "
    "whose floor alone is at its bound of zero); of an exponent in compute the 95 % intervals must "
    "also overlap that of the base choice, and under all combinations of choices it must be above "
    "zero"
)


@dataclass(frozen=True)
class Reading:
    """What a claim reads off one fit.

    Attributes:
        answer: one of the claim's, or None.
        value, lower, upper: the number behind it and its 95 % interval, where there is one.
        reason: why there is no answer.
    """

    answer: str | None
    value: float | None = None
    lower: float | None = None
    upper: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Claim:
    """A conclusion as data.

    Attributes:
        name: of the claim, unique in a study.
        question: what is asked.
        answers: by answer, the statement that holds if every choice gives it.
        law: of ``laws.AXES``.
        axes: the axes of choice it is asked along.
        read: from a choice's rows and fit to the answer.
        overlap: whether the intervals must overlap that of the base choice.
        grid: axes of which all combinations are tried, without intervals: the law is quick to fit.
    """

    name: str
    question: str
    answers: Mapping[str, str]
    law: str
    axes: tuple[str, ...]
    read: Callable[[Any, pd.DataFrame, Choice], Reading]
    overlap: bool = False
    grid: tuple[str, ...] = ()


def evaluated(laws: Laws, claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """Every claim, evaluated.

    Returns:
        Per claim ``name``, ``question``, ``holds``, ``answer`` and ``statement`` (null where it
        does not), ``values`` (per choice ``choice`` (what differs from the base), ``answer value
        lower upper reason``), ``combinations`` (null, or ``n``, those ``converged``, ``lowest`` and
        ``highest`` exponent) and ``against``.
    """
    return [_evaluated(laws, claim) for claim in claims]


def _evaluated(laws: Laws, claim: Claim) -> dict[str, Any]:
    choices = one_at_a_time(laws.runs, claim.axes)
    base = _read(laws, claim, choices[0])
    against: list[str] = []
    unread = base.value is None and base.answer is None and not claim.grid
    if unread:
        choices = choices[:1]  # a slow law that cannot be read under the base is not asked again
    readings = [(choice, _read(laws, claim, choice)) for choice in choices]
    for choice, reading in readings:
        where = choice.changed() or "base"
        if reading.answer is None:
            against.append(f"{where}: {reading.reason}")
        elif reading.answer != base.answer:
            against.append(f"{where}: {claim.answers[reading.answer]}")
        elif claim.overlap and not _overlap(reading, base):
            against.append(
                f"{where}: {reading.value:.3g} disagrees [{reading.lower:.3g}, {reading.upper:.3g}]"
            )
    if unread:
        against.append("other choices: not asked, as the base has no answer")
    every = _combinations(laws, claim) if claim.grid else None
    if every and (every["lowest"] is None or every["lowest"] <= MIN_EXPONENT):
        against.append(f"combinations: lowest exponent {every['lowest']} of {every['n']}")
    holds = base.answer is not None and not against
    return {
        "name": claim.name,
        "question": claim.question,
        "holds": holds,
        "answer": base.answer if holds else None,
        "statement": claim.answers[base.answer or ""] if holds else None,
        "values": [
            {
                "choice": choice.changed() or "base", "answer": r.answer, "value": plain(r.value),
                "lower": plain(r.lower), "upper": plain(r.upper), "reason": r.reason,
            }
            for choice, r in readings
        ],
        "combinations": every,
        "against": against,
    }  # fmt: skip


def _read(laws: Laws, claim: Claim, choice: Choice) -> Reading:
    try:
        rows = laws.rows(choice.rows)
        fit = laws.comparison(choice) if claim.law == "shapes" else laws.fit(claim.law, choice)
    except FitError as e:
        return Reading(None, reason=str(e))
    return claim.read(fit, rows, choice)


def _overlap(one: Reading, base: Reading) -> bool:
    ends = (one.lower, one.upper, base.lower, base.upper)
    if any(e is None for e in ends):
        return False
    low, high, base_low, base_high = (float(e) for e in ends if e is not None)
    return low <= base_high and base_low <= high


def _combinations(laws: Laws, claim: Claim) -> dict[str, Any]:
    """The exponent under every combination of choices, without intervals."""
    quick = laws.without_intervals()
    found = []
    for choice in jointly(laws.runs, claim.grid):
        try:
            fit = quick.fit(claim.law, choice)
        except FitError:
            found.append(np.nan)
            continue
        ended = fit.status is FitStatus.CONVERGED
        found.append(float(fit.params["exponent"]) if ended else np.nan)
    known = np.array(found)
    known = known[np.isfinite(known)]
    return {
        "n": len(found),
        "converged": len(known),
        "lowest": float(known.min()) if len(known) else None,
        "highest": float(known.max()) if len(known) else None,
    }


def same_loss_same_transfer(record: Mapping[str, Any]) -> dict[str, Any]:
    """The claim that transfer laws decide (``transfer_law.record``), per metric and task."""
    statements = {
        "equal": "runs of equal pretraining loss transfer alike, whichever factor bought it",
        "differs": "at equal pretraining loss transfer depends on which factor bought it",
    }
    values, against = [], []
    for metric, found in record.items():
        for task, one in found["tasks"].items():
            test = one["equal_loss"]
            said = test["conclusion"] if test else None
            answer = said if said in statements else None
            reason = None if answer else "; ".join(test["reasons"]) if test else "no law"
            choice = f"{metric} of {task}"
            values.append({
                "choice": choice, "answer": answer, "value": None, "lower": None, "upper": None,
                "reason": reason,
            })  # fmt: skip
            if answer is None:
                against.append(f"{choice}: {reason}")
    answers = {v["answer"] for v in values}
    if len(answers - {None}) > 1:
        against += [f"{v['choice']}: {statements[v['answer']]}" for v in values if v["answer"]]
    holds = len(answers) == 1 and not against
    answer = values[0]["answer"] if holds else None
    return {
        "name": "same_loss_same_transfer",
        "question": "Does equal pretraining loss give equal transfer, whichever factor bought it?",
        "holds": holds,
        "answer": answer,
        "statement": statements[answer] if answer else None,
        "values": values,
        "combinations": None,
        "against": against or ([] if holds else ["no task has a transfer law"]),
    }
