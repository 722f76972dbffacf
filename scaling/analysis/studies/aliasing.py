"""Which factors a sweep can tell apart: negatives, users seen and repetition before all.

Batch size is compute, negatives and repetition at once. Quantities are parted by a design only if
the logarithm of one is not a linear combination of those of the others; where it is, products of
powers of them have a family of optima, and no fit can tell them apart.

Passes over the users are no quantity of their own: users_seen x (1 + repeats) = steps x batch_size
in every run of every design. A law with all of them parts them by its form alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.verdicts import IDENTIFICATION, variance_inflation
from scaling.analysis.studies.factors import REPEATS
from scaling.analysis.studies.runs import run_key

COLUMNS = {
    "n_total": "n_total",
    "batch_size": "batch_size",
    "negatives": "negatives",
    "items_per_user_mean": "items_per_user_mean",
    "users_seen": "users_seen",
    "repeats": "1 + repeats",
    "steps": "steps",
}
"""Quantities of a design, and what the logarithm is taken of."""
FOCUS = ("negatives", "users_seen", REPEATS)
"""Those that batch size moves along."""
SETTINGS = {"negatives": "negatives", "users_seen": "n_users", "repeats": "n_users"}
"""What sets a quantity apart from batch size: the other factors of the run stay."""
LEVELS = (0.5, 0.25, 0.125)
"""Proposed runs have the setting at these shares of a run's own."""
CLOSE = 1e-6
"""Coefficients below this are rounding."""


def aliasing(runs: pd.DataFrame) -> dict[str, Any]:
    """Verdict per quantity and per pair, as data.

    Returns:
        ``rule``; ``columns``: per quantity ``verdict`` (``constant``, ``aliased``, ``entangled``,
        ``parted``), variance ``inflation`` given all others that vary (but passes), and for an
        aliased one the ``combination``: exponents of the others whose product it is; ``pairs``: of
        ``FOCUS`` with batch size and each other, ``verdict``, squared ``correlation`` of the
        logarithms, ``reason`` and ``parted_by``: runs that would part them, each ``like`` a run but
        for its ``setting`` at ``value``, with the squared correlation ``then``, if those before it
        are run, too.
    """
    logs = _logs(runs)
    varying = [c for c in COLUMNS if len(logs) > 1 and np.ptp(logs[c].to_numpy()) > 0]
    free = [c for c in varying if c != REPEATS]
    inflation = {}
    if free:
        inflation = dict(zip(free, variance_inflation(logs[free].to_numpy()), strict=True))
    if REPEATS in varying:
        own = variance_inflation(logs[[REPEATS, *free]].to_numpy())
        inflation[REPEATS] = own[0]
    columns: dict[str, dict[str, Any]] = {}
    for name in COLUMNS:
        if name not in varying:
            columns[name] = {"verdict": "constant", "inflation": None, "combination": None}
            continue
        moved = float(inflation[name])
        aliased = not np.isfinite(moved)
        columns[name] = {
            "verdict": _verdict(moved),
            "inflation": None if aliased else moved,
            "combination": _combination(logs, name, free) if aliased else None,
        }
    pairs = [
        _pair(runs, logs, a, b)
        for i, a in enumerate(FOCUS)
        for b in ("batch_size", *FOCUS[:i])
    ]  # fmt: skip
    return {"rule": RULE, "columns": columns, "pairs": pairs}


RULE = (
    "a quantity is aliased where its logarithm is a linear combination of the others', entangled "
    f"where its variance inflation is above {IDENTIFICATION.max_inflation:g}, else parted; a pair "
    "by its two columns alone"
)


def _logs(runs: pd.DataFrame) -> pd.DataFrame:
    table = runs[[*COLUMNS]].astype(np.float64)
    table["repeats"] = 1 + table["repeats"]
    return pd.DataFrame(np.log(table))


def _verdict(inflation: float) -> str:
    if not np.isfinite(inflation):
        return "aliased"
    return "entangled" if inflation > IDENTIFICATION.max_inflation else "parted"


def _combination(logs: pd.DataFrame, name: str, varying: Sequence[str]) -> dict[str, float]:
    """Exponents of the others whose product the column is: of as few others as there are."""
    others = [c for c in varying if c != name]
    y = logs[name].to_numpy() - logs[name].mean()
    for other in others:  # one other quantity says more than a mixture
        found = _solve(logs, y, [other])
        if found is not None:
            return found
    kept = list(others)
    for other in others:
        fewer = [c for c in kept if c != other]
        if fewer and _solve(logs, y, fewer) is not None:
            kept = fewer
    return _solve(logs, y, kept) or {}


def _solve(logs: pd.DataFrame, y: Array, others: list[str]) -> dict[str, float] | None:
    x = logs[others].to_numpy()
    x = x - x.mean(axis=0)
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    rest = y - x @ coefficients
    if rest @ rest > 1e-10 * (y @ y):
        return None
    return {c: float(v) for c, v in zip(others, coefficients, strict=True) if abs(v) > CLOSE}


def _pair(runs: pd.DataFrame, logs: pd.DataFrame, a: str, b: str) -> dict[str, Any]:
    correlation = _correlation(logs, a, b)
    inflation = np.inf if correlation > 1 - 1e-10 else 1 / (1 - correlation)
    constant = [c for c in (a, b) if not len(logs) or np.ptp(logs[c].to_numpy()) == 0]
    verdict = "constant" if constant else _verdict(float(inflation))
    if constant:
        reason = f"{' and '.join(constant)}: the same in every run"
    elif verdict == "aliased":
        same = (runs[a] == runs[b]).all()
        reason = f"{a} {'equals' if same else 'is a power of'} {b} in every run"
    else:
        reason = f"squared correlation of the logarithms {correlation:.3g}"
    record = {
        "pair": [a, b],
        "verdict": verdict,
        "correlation": None if constant else correlation,
        "reason": reason,
    }
    return record | {"parted_by": [] if verdict == "parted" else _parted_by(runs, a, b)}


def _parted_by(runs: pd.DataFrame, a: str, b: str) -> list[dict[str, Any]]:
    """Runs like the one of most compute, with the setting of one quantity lowered step by step."""
    if not len(runs):
        return []
    like = runs.iloc[int(runs["pf_days"].argmax())]
    for setting in dict.fromkeys(SETTINGS[c] for c in (a, b) if c in SETTINGS):
        new: list[pd.Series[Any]] = []
        proposed = []
        for level in LEVELS:
            value = int(like[setting] * level)
            if value < (2 if setting == "negatives" else like["batch_size"]):
                break
            if setting == "negatives" and like["batch_size"] % value:
                break
            new.append(_with(like, setting, value))
            after = pd.concat([runs, pd.DataFrame(new)], ignore_index=True)
            then = _correlation(_logs(after), a, b)
            proposed.append({
                "like": run_key(like["run_key"]),
                "setting": setting, "value": value, "then": then,
            })  # fmt: skip
        if proposed:
            return proposed
    return []


def _with(run: "pd.Series[Any]", setting: str, value: int) -> "pd.Series[Any]":
    """The run with one setting changed, and what follows from it."""
    new = run.copy()
    new[setting] = value
    views = float(new["steps"]) * float(new["batch_size"])
    new["users_seen"] = min(float(new["n_users"]), views)
    new["repeats"] = max(0.0, views / float(new["n_users"]) - 1)
    return new


def _correlation(logs: pd.DataFrame, a: str, b: str) -> float:
    """Squared correlation of two columns; 0 where one does not vary."""
    x, y = (logs[c].to_numpy() - logs[c].mean() for c in (a, b))
    if not len(x) or not x.any() or not y.any():
        return 0.0
    return float((x @ y) ** 2 / ((x @ x) * (y @ y)))
