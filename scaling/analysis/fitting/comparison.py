"""Which form of a law the data prefer, by what it says of rows it has not seen.

Forms are compared by held-out error: cross-validation that leaves whole runs out, and rollout (fit
small, predict large). AICc stands beside them. R^2 does not: it is about 0.99 for all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as student

from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.likelihood import aicc, log_likelihood
from scaling.analysis.fitting.record import plain_rows
from scaling.analysis.fitting.rollout import cut_points, log_ratio, rows_along
from scaling.analysis.fitting.selection import run_column
from scaling.analysis.fitting.status import FitError

Mask = npt.NDArray[np.bool_]

FOLDS = 10
SAME_ERROR = 1e-9
"""Differences of mean errors below this are rounding: two forms that coincide are the same."""


@dataclass(frozen=True, eq=False)
class FormComparison:
    """Several forms of a law on the same rows.

    Attributes:
        y, by: predicted column; column of the rollout, None for none.
        cluster: column that names the run, None where every row is one.
        level: of the test whether a form is worse than the best.
        forms: by name.
        fits: the law on all rows by name, None where it cannot be fitted.
        failed: why a form has no fit, by name; such a form is not compared.
        held_out: by criterion (``cross_validation``, ``rollout``) a table ``[runs, forms]`` of mean
            absolute errors of ln y on rows that were not fitted; without a criterion that no part
            of the table allows.
        skipped: by criterion the parts that some form cannot be fitted to, which count for no form.
        aicc: by name.
        rows, dropped: rows compared on, usable by all forms; rows left out, by rule.
    """

    y: str
    by: str | None
    cluster: str | None
    level: float
    forms: Mapping[str, Form]
    fits: Mapping[str, LawFit | None]
    failed: Mapping[str, str]
    held_out: Mapping[str, pd.DataFrame]
    skipped: Mapping[str, tuple[str, ...]]
    aicc: Mapping[str, float]
    rows: int
    dropped: Mapping[str, int]

    def table(self) -> pd.DataFrame:
        """One row per form, the best by held-out error first.

        ``form parameters status aicc`` (less the smallest) and for each criterion its error, the
        ``_difference`` to the best form's, the ``_se`` of that over runs, and ``_verdict``:
        ``best``, ``worse`` or ``not distinguishable``.
        """
        lines = {}
        least = min((v for v in self.aicc.values() if math.isfinite(v)), default=math.nan)
        for name, form in self.forms.items():
            fit = self.fits[name]
            lines[name] = {
                "form": str(form),
                "parameters": None if fit is None else fit.surface.n_free,
                "status": self.failed.get(name) or (fit and str(fit.status)),
                "aicc": self.aicc.get(name, math.nan) - least,
            }
        table = pd.DataFrame.from_dict(lines, orient="index").rename_axis("name")
        for criterion in self.held_out:
            table = table.join(self.differences(criterion).add_prefix(f"{criterion}_"))
        if not self.held_out:
            return table
        hardest = list(self.held_out)[-1]  # the rollout, where there is one
        return pd.DataFrame(table.sort_values(by=[f"{hardest}_error"], kind="stable"))

    def differences(self, criterion: str) -> pd.DataFrame:
        """Per form ``error difference se verdict`` against the form with the least error.

        A form is worse when its difference exceeds the t quantile of ``level`` (one-sided, runs - 1
        degrees of freedom, Bonferroni over the other forms) times its standard error over runs. The
        standard error takes the runs as independent; fits on overlapping rows make it a little too
        small (Bengio and Grandvalet 2004).
        """
        errors = self.held_out[criterion]
        mean = errors.mean()
        best = mean.idxmin()
        lines = {}
        for name in map(str, errors):
            gap = errors[name] - errors[best]
            spread = gap.std(ddof=1) if np.isfinite(gap).all() else math.nan
            se = float(spread / math.sqrt(len(gap))) if len(gap) > 1 else math.nan
            lines[name] = {
                "error": float(mean[name]), "difference": float(gap.mean()), "se": se,
                "verdict": self._word(criterion, name == best, float(gap.mean()), se),
            }  # fmt: skip
        return pd.DataFrame.from_dict(lines, orient="index")

    def _word(self, criterion: str, best: bool, difference: float, se: float) -> str:
        if best:
            return "best"
        if math.isinf(difference):
            return "worse"
        runs = len(self.held_out[criterion])
        if runs < 2:
            return "not distinguishable"
        level = 1 - (1 - self.level) / max(1, len(self.held_out[criterion].columns) - 1)
        limit = float(student.ppf(level, runs - 1)) * se
        return "worse" if difference > max(limit, SAME_ERROR) else "not distinguishable"

    def candidates(self) -> list[str]:
        """Forms that no criterion finds worse than its best."""
        words = [self.differences(criterion)["verdict"] for criterion in self.held_out]
        names: list[str] = [] if not words else [str(name) for name in words[0].index]
        return [name for name in names if all(w[name] != "worse" for w in words)]

    def verdict(self) -> str:
        """One sentence: which form wins, or that none does."""
        if not self.held_out:
            reasons = [*self.failed.values(), *(r for some in self.skipped.values() for r in some)]
            return f"nothing could be compared: {reasons[0]}"
        named = [str(self.forms[n]) for n in self.candidates()]
        criteria = [name.replace("_", "-") for name in self.held_out]
        if len(named) == 1:
            return f"{named[0]} wins: every other form is worse by {' or '.join(criteria)}"
        if named:
            return f"not distinguishable by {' and '.join(criteria)}: {'; '.join(named)}"
        return f"no form wins: {' and '.join(criteria)} disagree"

    def to_dict(self) -> dict[str, Any]:
        """The table, its verdict and what it rests on, as plain JSON values."""
        return {
            "y": self.y,
            "by": self.by,
            "cluster": self.cluster,
            "level": self.level,
            "error": "mean over runs of the mean absolute error of ln y on rows not fitted",
            "aicc": "of the density exp(-rho / tau) of the objective, less the smallest; the rows "
            "are taken as independent",
            "rows": {"used": self.rows, "dropped": dict(self.dropped)},
            "forms": plain_rows(self.table().reset_index()),
            "skipped": {criterion: list(parts) for criterion, parts in self.skipped.items()},
            "candidates": self.candidates(),
            "verdict": self.verdict(),
        }


def compute_forms(x: str) -> dict[str, str]:
    """The three laws in compute that Fig. 4 of the CLUE paper leaves open, by name."""
    return {"log-linear": f"E + line({x})", "power law": x, "power law with floor": f"E + {x}"}


def compare_forms(
    df: pd.DataFrame,
    forms: Mapping[str, str | Form] | Sequence[str | Form],
    *,
    y: str,
    by: str | None = None,
    folds: int = FOLDS,
    level: float = 0.95,
    cluster: str | None = "auto",
    seed: int = 0,
    **choices: Any,
) -> FormComparison:
    """Fit several forms to the same rows and to parts of them, and predict the other rows.

    Args:
        df: one row per run or checkpoint, y above 0: errors are of ln y.
        forms: by name, or a sequence (each is its own name).
        by: column of the rollout: positive; None for cross-validation alone.
        folds: of the cross-validation, each a set of whole runs; at most as many as runs.
        level: of the verdicts.
        cluster: column that names the run; ``auto`` is ``run_key`` where the table has it.
        seed: of the folds and of the fits' starts.
        choices: of ``fit_law`` (objective, ...), the same for all forms.

    Raises:
        FitError: fewer than two forms or runs, or a column is missing.
    """
    named = dict(forms) if isinstance(forms, Mapping) else {str(f): f for f in forms}
    laws = {name: Form.parse(f) for name, f in named.items()}
    if len(laws) < 2:
        raise FitError(f"a comparison needs two different forms, not {list(named)}")
    run = run_column(df, cluster)
    weights = choices.get("weights")
    table, dropped = rows_along(df, laws.values(), y=y, by=by, run=run, weights=weights)
    table = table.reset_index(drop=True)
    runs = table[run].astype(str) if run is not None else pd.Series(table.index, dtype=str)
    settings = {"y": y, "n_boot": 0, "seed": seed, "cluster": run, **choices}
    fits: dict[str, LawFit | None] = {}
    failed: dict[str, str] = {}
    scores: dict[str, float] = {}
    for name, law in laws.items():
        try:
            fits[name] = fit = fit_law(table, law, **settings)
        except FitError as e:
            fits[name], failed[name] = None, str(e)
            continue
        # the scale of weights is not a number of rows
        scores[name] = _aicc(fit) if weights is None else math.nan
    parts = {"cross_validation": _leave_runs_out(runs, folds, seed)}
    if by is not None:
        along = table[by].to_numpy(dtype=np.float64)
        parts["rollout"] = {
            f"{by} up to {cut:.6g}": (along <= cut, along > cut) for cut in cut_points(along)
        }
    fitted = {name: law for name, law in laws.items() if fits[name] is not None}
    held_out, skipped = {}, {}
    for criterion, split in parts.items() if len(fitted) > 1 else ():
        errors, skipped[criterion] = _errors(table, fitted, split, settings)
        if errors is not None:
            held_out[criterion] = errors.groupby(runs).mean().dropna(how="all")
    return FormComparison(
        y=y, by=by, cluster=run, level=level, forms=laws, fits=fits, failed=failed,
        held_out=held_out, skipped=skipped, aicc=scores, rows=len(table), dropped=dropped,
    )  # fmt: skip


def _aicc(fit: LawFit) -> float:
    residuals: Array = -np.asarray(fit.residuals(), dtype=np.float64)  # fitted less measured
    return aicc(log_likelihood(residuals, fit.objective), fit.surface.n_free, fit.n)


def _leave_runs_out(runs: "pd.Series[str]", folds: int, seed: int) -> dict[str, tuple[Mask, Mask]]:
    codes, names = pd.factorize(runs)
    if len(names) < 2:
        raise FitError(
            f"cross-validation leaves runs out and needs two, the table has {len(names)}"
        )
    count = min(folds, len(names))
    fold = np.random.default_rng(seed).permutation(np.arange(len(names)) % count)[codes]
    return {f"fold {k + 1}": (fold != k, fold == k) for k in range(count)}


def _errors(
    table: pd.DataFrame,
    laws: Mapping[str, Form],
    parts: Mapping[str, tuple[Mask, Mask]],
    settings: Mapping[str, Any],
) -> tuple[pd.DataFrame | None, tuple[str, ...]]:
    """``[rows, forms]`` mean absolute error of ln y over the parts that hold a row out, NaN where
    none does; None where no part can be used. A part that one form cannot be fitted to is left out
    for all, with the reason."""
    total, count = np.zeros((len(table), len(laws))), np.zeros(len(table))
    skipped = []
    for part, (fitted, held) in parts.items():
        rows, name = table[held], ""
        measured = rows[settings["y"]].to_numpy(dtype=np.float64)
        errors = []
        try:
            for name, law in laws.items():  # noqa: B007  (the reason names it)
                predicted = fit_law(table[fitted], law, **settings).predict(rows, level=None)["y"]
                errors.append(np.abs(log_ratio(predicted.to_numpy(), measured)))
        except FitError as e:
            skipped.append(f"{part}: {name}: {e}")
            continue
        total[held] += np.stack(errors, axis=1)
        count[held] += 1
    if not count.any():
        return None, tuple(skipped)
    mean = np.where(count > 0, total.T / np.maximum(count, 1), np.nan).T
    return pd.DataFrame(mean, index=table.index, columns=list(laws)), tuple(skipped)
