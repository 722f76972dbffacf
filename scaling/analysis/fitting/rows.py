"""Which rows of a table a law can be fitted to."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.status import FitError

_USABLE: dict[str, tuple[str, Callable[[Array], npt.NDArray[np.bool_]]]] = {
    "log": ("is not positive and finite", lambda v: (v > 0) & np.isfinite(v)),
    "power": ("is negative or infinite", lambda v: (v >= 0) & np.isfinite(v)),
    "count": ("is negative or infinite", lambda v: (v >= 0) & np.isfinite(v)),
    "raw": ("is infinite", np.isfinite),
    "above": ("is infinite", np.isfinite),
}
"""What a value must be in each role of a column."""
RUN = "run_key"
"""Column that tells which rows are of one run, where a table has it."""
UNITS = (1e-100, 1e100)
"""The largest |y| lies between these, so that products of three of them are numbers."""


def unit_column(df: pd.DataFrame, cluster: str | None) -> str | None:
    """Column of the independent units, None where every row is one; ``auto`` is ``run_key`` where
    the table has it, else None."""
    if cluster == "auto":
        return RUN if RUN in df else None
    return cluster


def usable_rows(
    df: pd.DataFrame,
    form: Form,
    y: str,
    objective: Objective,
    weights: str | None,
    cluster: str | None,
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Rows where the law and the objective have a value, and how many each rule left out.

    Raises:
        FitError: a column is missing, or holds something else than numbers.
    """
    if y in form.columns:
        raise FitError(f"{y!r} is what the law gives; it cannot be a column of the form {form} too")
    needed = [*form.columns, y, *([weights] if weights else []), *([cluster] if cluster else [])]
    missing = [c for c in needed if c not in df]
    if missing:
        hint = "; pass cluster=None if every row is a unit of its own" if cluster in missing else ""
        raise FitError(
            f"the table has no column {', '.join(map(repr, missing))}{hint}; "
            f"its columns: {', '.join(map(str, df.columns))}"
        )
    if twice := [c for c in dict.fromkeys(needed) if list(df.columns).count(c) > 1]:
        raise FitError(f"the table has more than one column {', '.join(map(repr, twice))}")
    roles = [
        (column, role)
        for term in form.terms
        for factor in term.factors
        for column, role in zip(factor.columns, factor.part.columns, strict=True)
    ]
    roles.append((y, "log" if objective.scale == "log" else "raw"))
    if weights:
        roles.append((weights, "log"))
    dropped: dict[str, int] = {}
    keep = np.ones(len(df), dtype=bool)

    def drop(rule: str, bad: npt.NDArray[np.bool_]) -> None:
        nonlocal keep
        if (count := int((bad & keep).sum())) > 0:
            dropped[rule] = count
        keep &= ~bad

    for column, role in roles:
        values = numbers(df[column])
        drop(f"{column} is null", np.isnan(values))
        rule, usable = _USABLE[role]
        drop(f"{column} {rule}", ~np.isnan(values) & ~usable(values))
    if cluster:
        drop(f"{cluster} is null", df[cluster].isna().to_numpy())
    return df[keep], dropped


def numbers(column: "pd.Series[Any]") -> Array:
    """A column as floats, NaN where it is null. Dates and truth values count as no numbers.

    Raises:
        FitError: it holds something else than numbers.
    """
    kind = column.infer_objects().dtype
    types = pd.api.types
    texts = types.is_object_dtype(kind) or types.is_string_dtype(kind)
    if types.is_bool_dtype(kind) or not (texts or types.is_numeric_dtype(kind)):
        raise FitError(f"column {column.name!r} holds {kind}, not numbers")
    parsed = pd.to_numeric(column, errors="coerce")
    wrong = (parsed.isna() & column.notna()).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise FitError(
            f"column {column.name!r} holds {int(wrong.sum())} values that are no numbers, the "
            f"first in row {row + 1}: {column.iloc[row]!r}"
        )
    values: Array = parsed.to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def check_unit(y: str, values: Array) -> None:
    largest = float(np.abs(values).max(initial=0.0))
    if largest and not UNITS[0] < largest < UNITS[1]:
        raise FitError(
            f"{y} reaches {largest:.3g}: its squares leave the range of numbers; scale it"
        )


def check_varies(columns: Mapping[str, Array], dropped: Mapping[str, int]) -> None:
    for name, x in columns.items():
        if len(x) > 1 and np.ptp(x) == 0:
            raise FitError(f"{name} is {x[0]:.6g} in every row: no parameter of it can be fitted")
        if not len(x):
            raise FitError(f"no row is left{_left_out(dropped)}")


def check_enough(columns: Mapping[str, Array], n_free: int, dropped: Mapping[str, int]) -> None:
    if not n_free:
        raise FitError("every parameter is held: nothing is left to fit")
    points = int(distinct(columns, np.ones((1, len(next(iter(columns.values()))))))[0])
    if points <= n_free:
        raise FitError(
            f"a law with {n_free} parameters in {', '.join(columns)} needs at least "
            f"{n_free + 1} distinct points, the table has {points}{_left_out(dropped)}"
        )


def _left_out(dropped: Mapping[str, int]) -> str:
    return "".join(f"; {n} rows left out: {rule}" for rule, n in dropped.items() if n)


def distinct(columns: Mapping[str, Array], counts: Array) -> npt.NDArray[np.intp]:
    """``[B]`` distinct points among the rows with a count above zero."""
    _, point = np.unique(np.stack(list(columns.values()), axis=1), axis=0, return_inverse=True)
    point = point.reshape(-1)
    member = np.zeros((len(point), int(point.max()) + 1))
    member[np.arange(len(point)), point] = 1
    return np.asarray((((counts > 0) @ member) > 0).sum(axis=1))
