"""Selection of rows by declared rules, each logged, and what every rule does to a fit.

    chosen = select(df, ["status != diverged", "drop_warmup(step, 0.01)", "drop_largest(loss, 5)"])
    fit = fit_law(chosen.rows, "E + n_total + batch_size", y="loss")

How rules are written is in ``scaling.analysis.fitting.rule_text``. A rule is fixed before its
effect is seen; ``compare_selections`` then says what the fit would have been without it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.fitting.fit import fit_law
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.law import LawFit
from scaling.analysis.fitting.record import plain
from scaling.analysis.fitting.rows import unit_column
from scaling.analysis.fitting.rule_text import read_rule
from scaling.analysis.fitting.rules import Rule, RuleError
from scaling.analysis.fitting.status import FitError

Declared = str | Mapping[str, Any] | Rule
"""A rule as people declare it: a string, a mapping with its kind, or the rule itself."""


@dataclass(frozen=True)
class Applied:
    """What one rule did.

    Attributes:
        rule: the rule.
        before: rows it saw, those that the earlier rules left.
        rows: positions in the whole table of the rows it dropped, from 0.
        ids: of those rows: names of their runs, each once, or index labels where no runs are named.
        note: what the rule itself has to say.
    """

    rule: Rule
    before: int
    rows: tuple[int, ...]
    ids: tuple[str, ...]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``rule`` is the string, ``declared`` the mapping."""
        return {
            "rule": str(self.rule),
            "declared": self.rule.to_dict(),
            "before": self.before,
            "count": len(self.rows),
            "ids": list(self.ids),
            "rows": list(self.rows),
            "note": self.note,
        }


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows that are left, and the account of all others.

    Attributes:
        rows: the rows left, in the table's order and with its index.
        log: what every rule did, in the order of the rules.
        n_table: rows of the whole table.
        cluster: column that names the run, None where every row is a run of its own.
    """

    rows: pd.DataFrame
    log: tuple[Applied, ...]
    n_table: int
    cluster: str | None

    def table(self) -> pd.DataFrame:
        """One row per rule: ``rule before dropped left note``."""
        return pd.DataFrame(
            {
                "rule": [str(a.rule) for a in self.log],
                "before": [a.before for a in self.log],
                "dropped": [len(a.rows) for a in self.log],
                "left": [a.before - len(a.rows) for a in self.log],
                "note": [a.note for a in self.log],
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The account without the rows, as plain JSON values."""
        return {
            "table": self.n_table,
            "used": len(self.rows),
            "cluster": self.cluster,
            "rules": [a.to_dict() for a in self.log],
        }


def select(
    df: pd.DataFrame, rules: Sequence[Declared], *, cluster: str | None = "auto"
) -> Selection:
    """Apply rules in their order, each to the rows that the earlier ones left.

    Args:
        df: one row per run or per checkpoint.
        rules: see ``scaling.analysis.fitting.rule_text``.
        cluster: column that names the run; ``auto`` is ``run_key`` where the table has it. A row
            without a name counts as a run of its own.

    Raises:
        RuleError: a rule cannot be read, or does not fit the table.
        FitError: the preliminary fit of ``drop_outliers`` is impossible.
    """
    read = [read_rule(rule) for rule in rules]
    name = run_column(df, cluster)
    ids = _run_names(df, name)
    left = np.arange(len(df))
    rows, log = df, []
    for rule in read:
        outcome = rule.outcome(rows, None if name is None else ids.iloc[left])
        gone = left[~outcome.keep]
        log.append(
            Applied(
                rule=rule,
                before=len(left),
                rows=tuple(int(i) for i in gone),
                ids=tuple(dict.fromkeys(ids.iloc[gone])),
                note=outcome.note,
            )
        )
        rows = rows.assign(**outcome.replaced)[outcome.keep]
        left = left[outcome.keep]
    return Selection(rows, tuple(log), len(df), name)


def run_column(df: pd.DataFrame, cluster: str | None) -> str | None:
    """The column that names the run; ``auto`` is ``run_key`` where the table has it.

    Raises:
        RuleError: the table has no such column.
    """
    name = unit_column(df, cluster)
    if name is not None and name not in df:
        raise RuleError(
            f"no column {name!r} to name the run; the table has {', '.join(map(str, df))}"
        )
    return name


def _run_names(df: pd.DataFrame, name: str | None) -> "pd.Series[str]":
    """``[rows]`` the name of every row's run; a row without one is called by its index label."""
    labels = pd.Series([f"row {i}" for i in df.index], index=df.index, dtype=object)
    if name is None:
        return labels
    return df[name].astype(object).where(df[name].notna(), labels).astype(str)


@dataclass(frozen=True, eq=False)
class SelectionComparison:
    """One law fitted under several selections of one table.

    Attributes:
        form, y: the law and the column it is fitted to.
        selections: by name: ``all rules``, ``no rules``, and ``without <rule>`` for every rule.
        fits: the law of each selection, None where it cannot be fitted.
        failed: why not, by name.
    """

    form: Form
    y: str
    selections: Mapping[str, Selection]
    fits: Mapping[str, LawFit | None]
    failed: Mapping[str, str]

    def table(self) -> pd.DataFrame:
        """One row per selection: ``rows``, ``status``, parameters, ``largest_change``, ``of``.

        ``largest_change`` is the largest change of a parameter (coefficients and scales aside)
        against the fit under all rules, in standard errors of that fit, and ``of`` its name; null
        without bootstrap draws.
        """
        base = self.fits["all rules"]
        spread = None if base is None or base.draws.empty else base.draws.std()
        lines = []
        for name, fit in self.fits.items():
            line: dict[str, Any] = {"selection": name, "rows": len(self.selections[name].rows)}
            if fit is None:
                lines.append(line | {"status": self.failed[name]})
                continue
            line["status"] = str(fit.status)
            line |= {str(name): float(value) for name, value in fit.params.items()}
            if base is not None and spread is not None:
                own = base.profiled  # a coefficient or a scale moves with its exponent
                change = ((fit.params - base.params).abs() / spread)[own].dropna()
                line |= {"largest_change": change.max(), "of": change.idxmax()}
            lines.append(line)
        return pd.DataFrame(lines).set_index("selection")

    def to_dict(self) -> dict[str, Any]:
        """Every selection with its account and its fit, as plain JSON values."""
        changes = self.table().to_dict("index")
        out = {}
        for name, fit in self.fits.items():
            change, of = (changes[name].get(key) for key in ("largest_change", "of"))
            out[name] = {
                "selection": self.selections[name].to_dict(),
                "fit": None if fit is None else fit.to_dict(),
                "failed": self.failed.get(name),
                "largest_change": plain(change) if isinstance(of, str) else None,
                "of": of if isinstance(of, str) else None,
            }
        return {"form": str(self.form), "y": self.y, "selections": out}


def compare_selections(
    df: pd.DataFrame,
    form: str | Form,
    rules: Sequence[Declared],
    *,
    y: str,
    cluster: str | None = "auto",
    **choices: Any,
) -> SelectionComparison:
    """Fit a law under all rules, under none, and without each rule in turn.

    Without a rule the later ones see its rows again, so that a rule that counts or fits (as
    ``drop_largest``) may then drop others.

    Args:
        df, rules, cluster: as in ``select``.
        form, y, choices: of ``fit_law``.

    Raises:
        RuleError: a rule cannot be read, or does not fit the table.
    """
    read = [read_rule(rule) for rule in rules]
    chosen: dict[str, list[Rule]] = {"all rules": read, "no rules": []}
    if len(read) > 1:
        for i, rule in enumerate(read):
            chosen[f"without {rule}"] = [r for j, r in enumerate(read) if j != i]
    selections = {name: select(df, some, cluster=cluster) for name, some in chosen.items()}
    fits: dict[str, LawFit | None] = {}
    failed = {}
    for name, selection in selections.items():
        try:
            fits[name] = fit_law(selection.rows, form, y=y, cluster=selection.cluster, **choices)
        except FitError as e:
            fits[name], failed[name] = None, str(e)
    return SelectionComparison(Form.parse(form), y, selections, fits, failed)
