"""Extrapolation checked: fit small, predict large, for growing windows.

Each window fits the rows up to a value of one column (a factor or compute) and predicts all rows
beyond it. The errors are signed, the intervals are those of a new run, and the law is set against
what is had for free: a plain power law, the last value and the lowest one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.forms import Factor, Form, FormError, Term
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.predictive import predictive_interval
from scaling.analysis.fitting.record import plain, plain_rows
from scaling.analysis.fitting.rows import usable_rows
from scaling.analysis.fitting.selection import run_column
from scaling.analysis.fitting.status import FitError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOWS = 6
FIRST, LAST = 0.3, 0.9
"""Shares of the rows that the smallest and the largest window fit, where the column has more
values than windows."""
BASELINES = ("power", "last", "lowest")
"""What a law is set against: the plain power law, the value at the window's end, the lowest."""
RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0, np.inf)
"""Edges of the classes of the extrapolation ratio."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """Predictions of held-out rows, window by window.

    Attributes:
        form, baseline: the law, and the plain power law it is set against.
        y, by: predicted column; column whose small values are fitted and large ones predicted.
        level: nominal level of the intervals.
        cluster: column that names the run, None where every row is one.
        windows: one row per window (``table``).
        predictions: one row per window and held-out row: ``cut row run ratio y predicted lower
            upper error covered fitted_run error_power error_last error_lowest``. ``ratio`` is
            ``by`` over the window's largest; errors are ln(predicted / y), above 0 where the
            prediction is too high; ``fitted_run`` says that earlier rows of the same run were
            fitted.
        rows, dropped: rows used; rows left out, by rule.
    """

    form: Form
    baseline: Form
    y: str
    by: str
    level: float
    cluster: str | None
    windows: pd.DataFrame
    predictions: pd.DataFrame
    rows: int
    dropped: Mapping[str, int]

    def table(self) -> pd.DataFrame:
        """One row per window.

        ``cut rows_fitted runs_fitted rows_held rows_of_fitted_runs ratio status`` and of the
        held-out rows ``bias`` (mean error), ``error`` (mean absolute error), ``coverage``,
        ``width`` (median of ln upper / lower) and ``skill_power skill_last skill_lowest``:
        1 - error / error of the baseline, so that 0 is no better than the baseline.
        """
        return self.windows

    def by_ratio(self) -> pd.DataFrame:
        """The same scores over all windows, by class of the extrapolation ratio."""
        classes = pd.cut(self.predictions["ratio"], list(RATIOS), right=True)
        found = []
        for bounds, rows in self.predictions.groupby(classes, observed=True):
            ends = {"from": bounds.left, "to": bounds.right, "rows": len(rows)}
            found.append(ends | _scores(rows))
        return pd.DataFrame(found)

    def scores(self) -> dict[str, float]:
        """The scores over all windows; a row counts in each window that holds it out."""
        return _scores(self.predictions)

    def to_dict(self) -> dict[str, Any]:
        """All tables as plain JSON values."""
        return {
            "form": str(self.form),
            "baseline": str(self.baseline),
            "y": self.y,
            "by": self.by,
            "level": self.level,
            "cluster": self.cluster,
            "rows": {"used": self.rows, "dropped": dict(self.dropped)},
            "windows": plain_rows(self.windows),
            "by_ratio": plain_rows(self.by_ratio()),
            "scores": {k: plain(v) for k, v in self.scores().items()},
            "predictions": plain_rows(self.predictions),
        }

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Signed errors against the extrapolation ratio (``figures.rollout_errors``)."""
        from scaling.analysis.figures import rollout_errors  # matplotlib only where it draws

        return rollout_errors(self.to_dict(), ax=ax)


def rollout(
    df: pd.DataFrame,
    form: str | Form,
    *,
    y: str,
    by: str,
    cuts: Sequence[float] | None = None,
    baseline: str | Form | None = None,
    level: float = 0.95,
    n_boot: int = 200,
    cluster: str | None = "auto",
    seed: int = 0,
    **choices: Any,
) -> Rollout:
    """Fit small, predict large.

    Args:
        df: one row per run or checkpoint, y above 0: errors are of ln y.
        form: law to check.
        by: column to extrapolate along: positive; of the law, or compute.
        cuts: each window fits the rows with ``by`` up to one of these and predicts all others. By
            default every value but the last where there are at most 7 values, else the values that
            30 % to 90 % of the rows lie up to, in 6 steps.
        baseline: the plain power law; by default the product of the form's columns that
            are positive throughout, without floor.
        level: of the intervals, which are those of a new run (``predictive_interval``).
        n_boot: bootstrap draws of every window; 0 for no intervals.
        cluster: column that names the run; ``auto`` is ``run_key`` where the table has it.
        seed, choices: of ``fit_law``.

    Raises:
        FormError: the form cannot be read.
        FitError: no window can be fitted, or no row lies beyond a cut; the message says why.
        RuleError: the table has no column ``cluster``.
    """
    law, run = Form.parse(form), run_column(df, cluster)
    table, dropped = rows_along(df, [law], y=y, by=by, run=run, weights=choices.get("weights"))
    positive = [name for name in law.columns if (table[name] > 0).all()]
    free = Form.parse(baseline) if baseline is not None else power_law(positive)
    along = table[by].to_numpy(dtype=np.float64)
    windows, predictions = [], []
    if cuts is None and (len(along) == 0 or np.ptp(along) == 0):
        raise FitError(f"{by} has no two values: there is nothing to extrapolate to")
    for cut in cuts if cuts is not None else cut_points(along):
        fitted, held = table[along <= cut], table[along > cut]
        if fitted.empty or held.empty:
            raise FitError(
                f"{by} up to {cut:.6g} parts {len(fitted)} rows from {len(held)}; it runs from "
                f"{along.min():.6g} to {along.max():.6g}"
            )
        row = _window(fitted, held, by, run) | {"cut": float(cut)}
        try:
            fit = fit_law(fitted, law, y=y, n_boot=n_boot, cluster=run, seed=seed, **choices)
        except (FitError, FormError) as e:  # what bounds allow depends on the rows
            windows.append(row | {"status": str(e)})
            continue
        found = _predict(fit, fitted, held, level=level, run=run, seed=seed)
        found.insert(0, "cut", float(cut))
        found["ratio"] = held[by].to_numpy(dtype=np.float64) / float(fitted[by].max())
        for name, guess in _guesses(fitted, held, free, y, by, choices).items():
            found[f"error_{name}"] = log_ratio(guess, found["y"].to_numpy())
        predictions.append(found)
        windows.append(row | {"status": str(fit.status), **_scores(found)})
    if not predictions:
        raise FitError(f"no window of {by} can be fitted: {windows[-1]['status']}")
    columns = ["cut", *(c for c in pd.DataFrame(windows) if c != "cut")]
    return Rollout(
        form=law, baseline=free, y=y, by=by, level=level, cluster=run,
        windows=pd.DataFrame(windows)[columns],
        predictions=pd.concat(predictions, ignore_index=True), rows=len(table), dropped=dropped,
    )  # fmt: skip


def rows_along(
    df: pd.DataFrame,
    forms: Iterable[Form],
    *,
    y: str,
    by: str | None,
    run: str | None,
    weights: str | None,
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Rows that every form can be fitted to, with y and ``by`` above 0, and how many each rule left
    out.

    Raises:
        FitError: a column is missing, or does not hold numbers.
    """
    rows, dropped = df, dict[str, int]()
    for form in (*forms, *([power_law([by])] if by is not None else [])):
        rows, gone = usable_rows(rows, form, y, Objective(), weights, run)
        dropped |= {rule: dropped.get(rule, 0) + n for rule, n in gone.items()}
    return rows, dropped


def power_law(columns: Sequence[str]) -> Form:
    """The plain power law in some columns: their product, without floor."""
    return Form((Term(tuple(Factor("power", (name,)) for name in columns)),))


def cut_points(along: Array) -> list[float]:
    values, counts = np.unique(along, return_counts=True)
    if len(values) <= WINDOWS + 1:
        return [float(v) for v in values[:-1]]
    shares = np.cumsum(counts) / counts.sum()
    at = np.searchsorted(shares, np.linspace(FIRST, LAST, WINDOWS))
    return [float(v) for v in np.unique(values[np.minimum(at, len(values) - 2)])]


def _window(fitted: pd.DataFrame, held: pd.DataFrame, by: str, run: str | None) -> dict[str, Any]:
    """What a window has, before anything is fitted."""
    return {
        "rows_fitted": len(fitted),
        "runs_fitted": len(fitted) if run is None else int(fitted[run].nunique()),
        "rows_held": len(held),
        "rows_of_fitted_runs": int(_of_fitted_run(fitted, held, run).sum()),
        "ratio": float(held[by].max() / fitted[by].max()),
    }


def _of_fitted_run(
    fitted: pd.DataFrame, held: pd.DataFrame, run: str | None
) -> npt.NDArray[np.bool_]:
    if run is None:
        return np.zeros(len(held), dtype=bool)
    return held[run].isin(fitted[run].dropna()).to_numpy(dtype=bool)


def _predict(
    fit: LawFit,
    fitted: pd.DataFrame,
    held: pd.DataFrame,
    *,
    level: float,
    run: str | None,
    seed: int,
) -> pd.DataFrame:
    y = held[fit.y].to_numpy(dtype=np.float64)
    law = fit.predict(held, level=None)["y"].to_numpy()
    low = high = inside = np.full(len(held), np.nan)
    if len(fit.theta_draws):
        interval = predictive_interval(fit, held, level=level, seed=seed)
        low, high = interval["lower"].to_numpy(), interval["upper"].to_numpy()
        inside = (low <= y) & (y <= high)
    return pd.DataFrame(
        {
            "row": [str(i) for i in held.index],
            "run": None if run is None else held[run].astype(str).to_numpy(),
            "y": y,
            "predicted": law,
            "lower": low,
            "upper": high,
            "covered": inside,
            "fitted_run": _of_fitted_run(fitted, held, run),
            "error": log_ratio(law, y),
        }
    )


def _guesses(
    fitted: pd.DataFrame, held: pd.DataFrame, plain: Form, y: str, by: str,
    choices: Mapping[str, Any],
) -> dict[str, Array]:  # fmt: skip
    """``[held rows]`` of every baseline; NaN where the plain power law cannot be fitted."""
    values = fitted[y].to_numpy(dtype=np.float64)
    ends = fitted[by].to_numpy(dtype=np.float64)
    same = {k: v for k, v in choices.items() if k in ("objective", "weights")}
    try:
        law = fit_law(fitted, plain, y=y, n_boot=0, **same)
        power = law.predict(held, level=None)["y"].to_numpy()
    except FitError:
        power = np.full(len(held), np.nan)
    return {
        "power": power,
        "last": np.full(len(held), values[ends == ends.max()].mean()),
        "lowest": np.full(len(held), values.min()),
    }


def log_ratio(predicted: Array, y: Array) -> Array:
    """ln(predicted / y); infinitely low where a law predicts nothing above 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(predicted, 0.0)) - np.log(y)


def _scores(rows: pd.DataFrame) -> dict[str, float]:
    error = float(rows["error"].abs().mean())
    scores = {
        "bias": float(rows["error"].mean()),
        "error": error,
        "coverage": float(rows["covered"].mean()),
        "width": float(np.log((rows["upper"] / rows["lower"]).median())),
    }
    for name in BASELINES:
        other = float(rows[f"error_{name}"].abs().mean())
        scores[f"skill_{name}"] = 1 - error / other if other > 0 else float("nan")
    return scores
