"""The laws that conclusions rest on, each fitted once per choice."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd

from scaling.analysis.fitting.comparison import FormComparison, compare_forms, compute_forms
from scaling.analysis.fitting.fit import fit_law, fit_power_law
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.objective import Objective
from scaling.analysis.fitting.parameters import FLOOR
from scaling.analysis.fitting.selection import select
from scaling.analysis.fitting.status import FitError, FitStatus
from scaling.analysis.studies.choices import (
    ALL_RUNS,
    OBJECTIVES,
    OUTLIER_LIMIT,
    WITHOUT_OUTLIERS,
    Choice,
)
from scaling.analysis.studies.factors import Factors, additive, factors_of, joint_forms
from scaling.analysis.studies.runs import run_key

AXES = {
    "compute": ("compute", "y", "objective", "rows", "points"),
    "compute_floor": ("compute", "y", "points"),
    "shapes": ("compute", "y"),
    "joint": ("size", "length", "y", "objective", "rows"),
    "repeated": ("size", "y", "rows"),
    "rising": ("size", "y", "rows"),
}
"""The laws, and the axes of choice that concern each."""
JOINT_DRAWS = 400
"""At most so many bootstrap draws for the slow fits, the joint law and laws with a floor; enough
for a verdict."""
ALTERNATIVE_DRAWS = 200
"""At most so many for it under another choice."""
FOLDS = 5
"""Folds of every cross-validation of a study, each of whole runs."""


@dataclass
class Laws:
    """Fits of a study, by law and choice; a law is fitted when it is first asked for.

    Attributes:
        runs: the runs to fit.
        n_boot, seed: of the fits.
    """

    runs: pd.DataFrame
    n_boot: int = 1000
    seed: int = 0
    _found: dict[tuple[str, Choice], Any] = field(default_factory=dict, repr=False)
    _rows: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    def without_intervals(self) -> "Laws":
        """The same runs and rules of rows, to fit without bootstrap draws."""
        return Laws(self.runs, n_boot=0, seed=self.seed, _rows=self._rows)

    def rows(self, which: str) -> pd.DataFrame:
        """The runs under a rule of rows.

        Raises:
            FitError: the preliminary fit, from which outliers are told, is impossible.
        """
        if which == ALL_RUNS:
            return self.runs
        if which not in self._rows:
            self._rows[which] = select(self.runs, [self.outlier_rule()]).rows
        return self._rows[which]

    def outlier_rule(self) -> str:
        """The declared rule, with the joint law as the preliminary fit where factors vary."""
        names = self.factors().names
        form = additive(names, floor=False) if names else "pf_days"
        return f'drop_outliers("{form}", loss, {OUTLIER_LIMIT:g})'

    def outliers(self) -> dict[str, Any]:
        """The rule and the runs that it leaves out, or why it cannot be applied."""
        try:
            kept = self.rows(WITHOUT_OUTLIERS)
        except FitError as e:
            return {"rule": self.outlier_rule(), "run_keys": None, "failed": str(e)}
        gone = self.runs[~self.runs.index.isin(kept.index)]
        keys = [run_key(k) for k in gone["run_key"]]
        return {"rule": self.outlier_rule(), "run_keys": keys, "failed": None}

    def factors(self, choice: Choice | None = None) -> Factors:
        """Factors of the joint law under a choice."""
        found = factors_of(self.runs)
        choice = choice or Choice()
        for old, new in (("n_total", choice.size), ("items_per_user_mean", choice.length)):
            if old in found.names:
                found = found.replaced(old, (new,))
        return found

    def fit(self, law: str, choice: Choice | None = None) -> LawFit:
        """A law of ``AXES`` but ``shapes`` under a choice.

        Raises:
            FitError: it cannot be fitted; asked again, it says the same.
        """
        found = self._once(law, choice or Choice())
        assert isinstance(found, LawFit)
        return found

    def comparison(self, choice: Choice) -> FormComparison:
        """The three laws in compute under a choice, by held-out error.

        Raises:
            FitError: they cannot be compared.
        """
        found = self._once("shapes", choice)
        assert isinstance(found, FormComparison)
        return found

    def _once(self, law: str, choice: Choice) -> LawFit | FormComparison:
        key = law, choice.only(AXES[law])
        if key not in self._found:
            try:
                self._found[key] = self._make(law, key[1])
            except FitError as e:
                self._found[key] = e
        found: LawFit | FormComparison | FitError = self._found[key]
        if isinstance(found, FitError):
            raise found
        return found

    def _make(self, law: str, choice: Choice) -> LawFit | FormComparison:
        rows, objective = self.rows(choice.rows), OBJECTIVES[choice.objective]
        if law == "shapes":
            return compare_forms(
                rows, compute_forms(choice.compute), y=choice.y, folds=FOLDS, seed=self.seed,
                objective=objective,
            )  # fmt: skip
        if law in ("compute", "compute_floor"):
            floor = law == "compute_floor"
            return fit_power_law(
                rows, x=choice.compute, y=choice.y, irreducible=floor,
                frontier=choice.points == "frontier", objective=objective,
                n_boot=min(self.n_boot, JOINT_DRAWS) if floor else self.n_boot, seed=self.seed,
            )  # fmt: skip
        factors = self.factors(choice)
        if not factors.names:
            raise FitError("no factor of the joint law varies")
        form = joint_forms(factors).get("additive" if law == "joint" else law)
        if form is None:
            raise FitError("no two runs differ in passes over their users, or in users seen")
        draws = min(self.n_boot, JOINT_DRAWS if choice == Choice() else ALTERNATIVE_DRAWS)
        return settled(rows, form, choice.y, objective, draws, self.seed)


def settled(
    rows: pd.DataFrame, form: str, y: str, objective: Objective, n_boot: int, seed: int
) -> LawFit:
    """A law with floor; the same without, where the floor ends at its bound of zero and nothing
    else is wrong. Bootstrap draws are made where the fit converged: of another nothing may be
    concluded, and its draws are slow.

    Raises:
        FitError: it cannot be fitted.
    """
    fit = partial(fit_law, rows, y=y, objective=objective, seed=seed)
    first = fit(form, n_boot=0)
    if floor_alone_is_bound(first):
        form = form.removeprefix("E + ")
        first = fit(form, n_boot=0)
    if not n_boot or first.status is not FitStatus.CONVERGED:
        return first
    return fit(form, n_boot=n_boot)


def floor_alone_is_bound(fit: LawFit) -> bool:
    """Whether the fit lies on one bound, that of E = 0: it is then the law without floor."""
    if fit.status is not FitStatus.BOUND_HIT or not fit.irreducible:
        return False
    hit = (fit.theta <= fit.surface.lower) | (fit.theta >= fit.surface.upper)
    return [n for n, true in zip(fit.surface.names, hit, strict=True) if true] == [FLOOR]
