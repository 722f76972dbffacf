"""Rules that leave rows out of a fit, as data: one small class a rule.

``rule_text`` reads them from strings and mappings. A rule sees the rows that the earlier ones left.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling import ClueError
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.rule_values import Value, is_number, kind_of, write_value

Mask = npt.NDArray[np.bool_]

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
ROUNDING = 1e-6
"""Residuals of ln y below this are rounding: they make no outlier of noise-free data."""


class RuleError(ClueError):
    """A rule cannot be read, or does not fit the table; the message names the rule."""


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of a table.

    Attributes:
        keep: ``[rows]`` whether a row stays.
        note: what a reader of the log should know beside the count.
        replaced: new values of columns, ``[rows]`` each.
    """

    keep: Mask
    note: str = ""
    replaced: Mapping[str, Array] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Rule(ABC):
    """One declared rule. ``str(rule)`` is what ``read_rule`` reads."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed = (int, float) if field.type is float else field.type
            if not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool):  # type: ignore[arg-type]
                kind = getattr(field.type, "__name__", field.type)
                raise RuleError(f"rule {self.kind}: {field.name} must be a {kind}, not {value!r}")

    @abstractmethod
    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Apply the rule.

        Args:
            df: rows that the earlier rules left.
            runs: name of the run of every row; None where every row is a run of its own.

        Raises:
            RuleError: a column is missing or of another kind, or runs are needed and not known.
        """

    def to_dict(self) -> dict[str, Any]:
        """``kind`` and fields, as plain JSON values."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return f"{self.kind}({', '.join(write_value(v) for v in values)})"

    def _column(self, df: pd.DataFrame, name: str) -> "pd.Series[Any]":
        if name not in df:
            raise RuleError(
                f"rule {self}: no column {name!r}; the table has {', '.join(map(str, df.columns))}"
            )
        return df[name]

    def _numbers(self, df: pd.DataFrame, name: str) -> Array:
        column = self._column(df, name)
        try:
            values: Array = column.to_numpy(dtype=np.float64, na_value=np.nan)
        except (TypeError, ValueError):
            raise RuleError(f"rule {self}: column {name} does not hold numbers") from None
        return values

    def _in_runs(
        self, values: Array, runs: "pd.Series[Any] | None"
    ) -> "pd.api.typing.SeriesGroupBy[Any, Any]":
        """The values grouped by run, in the table's order.

        Raises:
            RuleError: it is not known which rows are one run's.
        """
        if runs is None:
            raise RuleError(
                f"rule {self} works run by run: name the column of the run (cluster=...)"
            )
        return pd.Series(values).groupby(runs.to_numpy(), sort=False, dropna=False)


OPERATORS = ("==", "!=", "<=", ">=", "<", ">", "not in", "in")


@dataclass(frozen=True)
class Where(Rule):
    """Keeps the rows of which the comparison holds.

    A row without a value is kept by ``!=`` and ``not in`` and dropped by the others.
    """

    kind: ClassVar[str] = "where"
    column: str
    operator: str
    value: Value | tuple[Value, ...]

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise RuleError(
                f"rule where: operator {self.operator!r} is none of {', '.join(OPERATORS)}"
            )
        several = isinstance(self.value, tuple)
        if several != self.operator.endswith("in"):
            need = "a list of values" if self.operator.endswith("in") else "one value"
            raise RuleError(f"rule where: {self.operator} needs {need}, not {self.value!r}")
        if self.operator[0] in "<>" and not is_number(self.value):
            raise RuleError(f"rule {self}: {self.operator} needs a number, not {self.value!r}")
        if is_number(self.value) and not math.isfinite(self.value):
            raise RuleError(f"rule {self} needs a finite number; keep_present drops missing ones")

    def __str__(self) -> str:
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        column = write_value(self.column, bare=True)
        return f"{column} {self.operator} {', '.join(write_value(v, bare=True) for v in values)}"

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Apply the comparison; a text that no row has is noted."""
        column = self._column(df, self.column)
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        if len(kinds := {kind_of(v) for v in values}) > 1:
            raise RuleError(f"rule {self} mixes {' and '.join(sorted(kinds))}")
        known = column.dropna()
        held = {kind_of(v) for v in known.unique()}
        if held - kinds:
            raise RuleError(
                f"rule {self}: column {self.column} holds {', '.join(sorted(held))}, "
                f"not {', '.join(kinds)}"
            )
        if is_number(values[0]):
            numbers = self._numbers(df, self.column)
            blank = int(np.isnan(numbers).sum())
            return Outcome(self._compare(numbers), f"{blank} rows without a value" * (blank > 0))
        hit = column.isin(values).to_numpy(dtype=bool)
        absent = [v for v in values if not known.isin([v]).any()]
        note = ""
        if absent and not isinstance(absent[0], bool):
            seen = ", ".join(map(str, known.unique()[:6]))
            note = f"no row has {', '.join(map(repr, absent))}; there are: {seen}"
        negative = self.operator in ("!=", "not in")
        return Outcome(~hit if negative else hit, note)

    def _compare(self, numbers: Array) -> Mask:
        if isinstance(self.value, tuple):
            found = np.isin(numbers, np.array(self.value, dtype=np.float64))
            return np.asarray(~found if self.operator == "not in" else found)
        compare = {
            "==": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal,
            ">": np.greater, ">=": np.greater_equal,
        }[self.operator]  # fmt: skip
        return np.asarray(compare(numbers, float(self.value)), dtype=bool)


@dataclass(frozen=True)
class KeepPresent(Rule):
    """Keeps the rows that have a value (not null, not NaN) in the column."""

    kind: ClassVar[str] = "keep_present"
    column: str

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop rows without a value."""
        return Outcome(self._column(df, self.column).notna().to_numpy(dtype=bool))


@dataclass(frozen=True)
class KeepComplete(Rule):
    """Keeps the runs whose last step reached ``share`` of the planned steps."""

    kind: ClassVar[str] = "keep_complete"
    step: str
    planned: str
    share: float = 1.0

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop all rows of a run that ended early; without run names every row is a run."""
        reached, planned = self._numbers(df, self.step), self._numbers(df, self.planned)
        if runs is not None:
            reached = self._in_runs(reached, runs).transform("max").to_numpy()
        return Outcome(np.asarray(reached >= self.share * planned))


@dataclass(frozen=True)
class KeepLast(Rule):
    """Keeps one row per run, that of the last step; of rows with equal steps the later."""

    kind: ClassVar[str] = "keep_last"
    step: str

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop all rows but the last of every run."""
        steps = self._numbers(df, self.step)
        order = np.argsort(steps, kind="stable")  # NaN last
        order = order[np.isfinite(steps[order])]
        last = self._in_runs(order.astype(np.float64), None if runs is None else runs.iloc[order])
        keep = np.zeros(len(df), dtype=bool)
        keep[last.last().to_numpy(dtype=np.int64)] = True
        return Outcome(keep)


@dataclass(frozen=True)
class KeepCommonest(Rule):
    """Keeps the rows with the value that most rows have; of equally common ones the first."""

    kind: ClassVar[str] = "keep_commonest"
    column: str

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop rows with another value, or none; the note says which value stayed."""
        column = self._column(df, self.column)
        counts = column.value_counts(sort=False)
        if counts.empty:
            return Outcome(np.zeros(len(df), dtype=bool), "no row has a value")
        value, most = counts.idxmax(), int(counts.max())
        tied = int((counts == most).sum())
        note = f"{self.column} is {value} in {most} of {len(df)} rows"
        note += f", as often as {tied - 1} others" if tied > 1 else ""
        return Outcome((column == value).fillna(False).to_numpy(dtype=bool), note)


@dataclass(frozen=True)
class DropWarmup(Rule):
    """Drops rows with a step below ``until``: below 1 a share of the run's last step."""

    kind: ClassVar[str] = "drop_warmup"
    step: str
    until: float

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop the rows before ``until``, and those without a step."""
        steps = self._numbers(df, self.step)
        first: Array | float = self.until
        if self.until < 1:
            first = self.until * self._in_runs(steps, runs).transform("max").to_numpy()
        return Outcome(np.asarray(steps >= first))


@dataclass(frozen=True)
class DropDiverged(Rule):
    """Drops runs whose last value is missing, infinite or above ``ratio`` x their lowest one."""

    kind: ClassVar[str] = "drop_diverged"
    column: str
    step: str
    ratio: float = 1.5

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop all rows of such runs."""
        values, steps = self._numbers(df, self.column), self._numbers(df, self.step)
        lowest = self._in_runs(np.where(np.isfinite(values), values, np.nan), runs)
        order = np.argsort(steps, kind="stable")
        assert runs is not None  # _in_runs refused it
        keys = runs.to_numpy()
        position = pd.Series(order).groupby(keys[order], sort=False, dropna=False)
        last = np.empty(len(df), dtype=np.int64)
        last[order] = position.transform("last").to_numpy()
        with np.errstate(invalid="ignore"):
            ends = values[last] <= self.ratio * lowest.transform("min").to_numpy()
        return Outcome(np.asarray(ends & np.isfinite(values[last])))


@dataclass(frozen=True)
class DropLargest(Rule):
    """Drops the rows with the ``count`` largest values, and those that tie with the last of them.

    As Besiroglu et al. 2024 (arXiv 2404.10102) leave out 5 of 245 runs by their loss.
    """

    kind: ClassVar[str] = "drop_largest"
    column: str
    count: int

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop by value; rows without one stay."""
        values = self._numbers(df, self.column)
        known = np.sort(values[~np.isnan(values)])
        if not 0 < self.count < len(known):
            raise RuleError(f"rule {self}: {len(known)} rows have a value, {self.count} of them go")
        return Outcome(~(values >= known[-self.count]))


@dataclass(frozen=True)
class DropOutliers(Rule):
    """Drops rows more than ``limit`` robust standard deviations from a preliminary fit.

    The fit is of least absolute deviations of ln y, so that the outliers hardly move it; the
    standard deviation is 1.4826 x the median absolute deviation of its residuals.
    """

    kind: ClassVar[str] = "drop_outliers"
    form: str
    y: str
    limit: float = 5.0

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Drop rows by residual; the note says by how much the farthest is off.

        Raises:
            FitError: the preliminary fit is impossible.
        """
        from scaling.analysis.fitting.fit import fit_law  # the fitter may use rules itself
        from scaling.analysis.fitting.objective import Objective

        y = self._numbers(df, self.y)
        table = df.reset_index(drop=True)
        fit = fit_law(table, self.form, y=self.y, objective=Objective(loss="lad"), n_boot=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            residual = np.log(y) - np.log(fit.predict(table, level=None)["y"].to_numpy())
        used = np.isfinite(residual)
        off = np.abs(residual - np.median(residual[used]))
        spread = max(MAD_TO_SIGMA * float(np.median(off[used])), ROUNDING)
        note = (
            f"robust standard deviation {spread:.3g}, farthest {np.nanmax(off) / spread:.3g} of it"
        )
        return Outcome(~(off > self.limit * spread), note)


@dataclass(frozen=True)
class Smooth(Rule):
    """Replaces a column by its mean over the last ``window`` rows of a run, in order of step.

    The first rows of a run are averaged over as many as there are.
    """

    kind: ClassVar[str] = "smooth"
    column: str
    window: int
    step: str

    def outcome(self, df: pd.DataFrame, runs: "pd.Series[Any] | None") -> Outcome:
        """Keep every row; the column is replaced."""
        if self.window < 2:
            raise RuleError(f"rule {self}: the window must be at least 2 rows")
        values, steps = self._numbers(df, self.column), self._numbers(df, self.step)
        order = np.argsort(steps, kind="stable")
        grouped = self._in_runs(values[order], None if runs is None else runs.iloc[order])
        mean = grouped.transform(lambda v: v.rolling(self.window, min_periods=1).mean())
        smoothed = np.empty(len(df))
        smoothed[order] = mean.to_numpy()
        note = f"{self.column} is a mean over {self.window} rows"
        return Outcome(np.ones(len(df), dtype=bool), note, {self.column: smoothed})
