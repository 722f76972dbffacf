"""What a planned grid can and cannot tell, before anything is run.

The plan's rows and an assumed law give the Fisher information of the design, and with a stated
noise the standard error of every exponent that a fit of its runs should have. The verdict on a
factor follows the rules of a fit (``fitting.verdicts.Identification``), and asks for the range that
practice does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from scaling.analysis.design.belief import Assumption, DesignError, believe
from scaling.analysis.design.information import Information
from scaling.analysis.design.relations import EXACT, correlation, log_columns, relation
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.record import plain
from scaling.analysis.fitting.verdicts import IDENTIFICATION, variance_inflation
from scaling.sweeps import PLAN_COLUMNS

SIZE = "n_total"
FACTORS = (SIZE, "batch_size", "items_per_user_mean", "users_seen")
"""What the joint law of a study is in."""
SHADOWS = ("n_total", "n_non_embedding", "negatives", "epochs", "users_seen", "n_item", "n_service")
"""Columns that may move with a factor, so that its exponent is theirs as well."""
SETTINGS = tuple(
    c for c in PLAN_COLUMNS
    if c not in ("run_key", "sweep", "seed", "flops", "flops_exact", "pf_days", "pf_days_exact")
)  # fmt: skip
"""Columns that make a configuration: runs that differ in none of them are seeds of one."""
UNMODELLED = (
    "shuffle", "services", "feature_dim", "steps", "lr", "eps", "clip_norm", "precision", "gather",
    "distinct_items",
)  # fmt: skip
"""Settings that no factor stands for."""
COMPUTE = "pf_days_exact"
WISHED_DECADES = 1.5
"""Range that a factor should have, in powers of ten."""
NOISE_FREEDOM = 4
"""Runs beyond the first seed of their configuration that measure the noise: 3 seeds at 2."""
MOST_SEEDS = 30
"""No larger number of seeds is advised."""
NEAR_COMPUTE = 0.95
"""Correlation of logarithms from which a factor goes with compute."""
WIDTHS_PER_ERROR = 2 * 1.96

Verdict = Literal["identified", "weak", "not identifiable"]


@dataclass(frozen=True)
class Mend:
    """Runs that would lift a verdict.

    Attributes:
        runs: settings of each, on top of the sweep's ``[base]``.
        pf_days: their price, counted exactly.
        verdict, standard_error: of the factor with them.
    """

    runs: tuple[Mapping[str, Any], ...]
    pf_days: float
    verdict: Verdict
    standard_error: float | None


@dataclass(frozen=True)
class FactorAudit:
    """One factor of the study.

    Attributes:
        low, high, values: of the factor over the plan.
        decades: log10(high / low); None where it starts at 0.
        inflation: of the variance by the law's other factors; None where it is not in the law.
        with_compute: correlation of its logarithm with that of compute; None if either is fixed.
        exponent: assumed.
        standard_error: expected of the exponent at the assumed law; None where it is infinite.
        standard_error_high: its 90 % quantile over laws around the assumed one.
        seeds: seeds of every configuration that would make the 95 % interval no wider than the
            exponent; None where no number does.
        aliases: columns that are one with it in this plan: its exponent is theirs, too.
        mend: runs that would identify it, as cheap as were found (``mending``).
    """

    factor: str
    verdict: Verdict
    reasons: tuple[str, ...]
    low: float
    high: float
    values: int
    decades: float | None
    inflation: float | None = None
    with_compute: float | None = None
    exponent: float | None = None
    standard_error: float | None = None
    standard_error_high: float | None = None
    seeds: int | None = None
    aliases: tuple[str, ...] = ()
    mend: Mend | None = None


@dataclass(frozen=True)
class Audit:
    """The verdicts on a plan.

    Attributes:
        runs, configurations: rows, and distinct ones but for their seeds.
        form: law that is assumed; None where no factor varies enough for one.
        noise: standard deviation of ln loss from run to run, and where it is from.
        parameters: of the law.
        rank: of the Jacobian; below ``parameters`` some combination of them is not identifiable.
        condition: condition number of the Jacobian, columns scaled to length one; None if singular.
        unidentified: parameters that a singular design leaves open.
        relations: columns that the design cannot part, in words.
        missing: what else it lacks.
    """

    sweep: str
    runs: int
    configurations: int
    pf_days: float
    form: str | None
    assumption: str
    noise: float
    noise_from: str
    parameters: int
    rank: int
    condition: float | None
    unidentified: tuple[str, ...]
    relations: tuple[str, ...]
    missing: tuple[str, ...]
    factors: tuple[FactorAudit, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def audit(
    plan: pd.DataFrame,
    *,
    sweep: str,
    noise: float,
    noise_from: str,
    assumption: Assumption | None = None,
    form: str | Form | None = None,
    size: str = SIZE,
) -> Audit:
    """Judge a plan.

    Args:
        plan: rows of ``clue-scaling plan`` (columns ``scaling.sweeps.PLAN_COLUMNS``), or any table
            with the columns of ``form``.
        noise: standard deviation of ln loss from run to run.
        form: law to be fitted; by default E and a power of every factor of ``FACTORS`` with at
            least three values over a range of three.
        size: column that counts a model's parameters.

    Raises:
        DesignError: a column is missing or not positive, or the form has no assumption.
    """
    assumption = assumption or Assumption()
    factors = tuple(size if f == SIZE else f for f in FACTORS)
    if form is None:
        form = default_form(plan, factors)
    else:
        form = Form.parse(form)
        first = [f.columns[0] for term in form.terms for f in term.factors]
        factors = tuple(dict.fromkeys((*first, *(f for f in factors if f in plan))))
    check(plan, factors if form is None else (*factors, *form.columns))
    belief = believe(form, plan, assumption) if form else None
    state = Information.of(belief, plan, noise) if belief else None
    logs = log_columns(plan, [*factors, *SHADOWS, COMPUTE])
    verdicts = tuple(judge(f, plan, state, logs) for f in factors)
    same = [c for c in SETTINGS if c in plan] or list(plan.columns)
    return Audit(
        sweep=sweep,
        runs=len(plan),
        configurations=len(plan.astype(str).drop_duplicates(same)),
        pf_days=float(plan[COMPUTE].sum()) if COMPUTE in plan else 0.0,
        form=str(form) if form else None,
        assumption=assumption.source,
        noise=noise,
        noise_from=noise_from,
        parameters=state.jacobian.shape[1] if state else 0,
        rank=state.rank if state else 0,
        condition=plain(state.condition) if state else None,
        unidentified=state.unidentified if state else (),
        relations=tuple(_relations(factors, logs, plan)),
        missing=(*_missing(plan, same, form), *(_repetition(state) if state else ())),
        factors=verdicts,
    )


def default_form(plan: pd.DataFrame, factors: Sequence[str] = FACTORS) -> Form | None:
    """E and a power of every factor that varies enough; None where none does."""
    rule = IDENTIFICATION
    in_law = [
        f for f in factors
        if f in plan
        and distinct(plan[f].to_numpy(dtype=np.float64)) >= rule.min_values
        and plan[f].min() > 0
        and plan[f].max() / plan[f].min() >= rule.min_range
    ]  # fmt: skip
    return Form.parse("E + " + " + ".join(in_law)) if in_law else None


def check(plan: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse a plan that lacks columns."""
    missing = [c for c in columns if c not in plan]
    if missing:
        raise DesignError(
            f"no column {', '.join(missing)}; there are {', '.join(map(str, plan.columns))}"
        )


def judge(
    factor: str, plan: pd.DataFrame, state: Information | None, logs: Mapping[str, Array]
) -> FactorAudit:
    """The verdict on one factor."""
    rule = IDENTIFICATION
    x = plan[factor].to_numpy(dtype=np.float64)
    low, high, values = float(x.min()), float(x.max()), distinct(x)
    span = high / low if low > 0 else float("inf")
    decades = float(np.log10(span)) if low > 0 else None
    with_compute = (
        correlation(logs[factor], logs[COMPUTE]) if factor in logs and COMPUTE in logs else None
    )
    found = state.exponent(factor) if state else None
    basic = FactorAudit(
        factor, "not identifiable", (), low, high, values, decades, with_compute=with_compute,
        aliases=tuple(
            s for s in SHADOWS if s != factor and {s, factor} <= set(logs)
            and abs(correlation(logs[s], logs[factor])) ** 2 >= EXACT
        ),
    )  # fmt: skip
    if values == 1:
        return replace(basic, reasons=("the same in every run",))
    if found is None or state is None:
        reason = f"left out of the law: {values} values over a factor of {span:.3g}"
        return replace(basic, reasons=(reason,))
    exponent, error, error_high = found
    names = [c for c in state.belief.surface.form.columns if c in logs]
    inflations = variance_inflation(np.stack([logs[c] for c in names], axis=1))
    inflation = dict(zip(names, inflations, strict=True)).get(factor)
    width = WIDTHS_PER_ERROR * error / exponent
    wrong, weak = [], []
    if not np.isfinite(error):
        wrong.append("no finite standard error: the design is singular in it")
    elif width > 2:
        wrong.append(f"expected 95 % interval {exponent:.2g} ± {1.96 * error:.2g} includes zero")
    elif width > rule.max_relative_width:
        weak.append(f"expected 95 % interval {exponent:.2g} ± {1.96 * error:.2g} is wide")
    if values < rule.min_values:
        wrong.append(f"only {values} values")
    if span < rule.min_range:
        wrong.append(f"spans only a factor of {span:.3g}")
    elif decades is not None and decades < WISHED_DECADES - 0.005:
        weak.append(f"spans {decades:.3g} decades, wished {WISHED_DECADES:g}")
    if inflation is not None and inflation > rule.max_inflation:
        weak.append(f"moves with the other factors (variance inflation {inflation:.3g})")
    rows, free = len(plan), state.jacobian.shape[1]
    if rows < rule.min_rows_per_parameter * free:
        weak.append(f"{rows} runs for {free} parameters")
    verdict: Verdict = "not identifiable" if wrong else "weak" if weak else "identified"
    seeds = len(plan["seed"].unique()) if "seed" in plan else 1
    needed = np.ceil(seeds * max(1.0, width / rule.max_relative_width) ** 2 - 1e-9)
    return replace(
        basic, verdict=verdict, reasons=(*wrong, *weak), exponent=exponent,
        inflation=plain(inflation), standard_error=plain(error),
        standard_error_high=plain(error_high),
        seeds=int(needed) if needed <= MOST_SEEDS else None,
    )  # fmt: skip


def distinct(x: Array) -> int:
    """Values that are at least 2 % apart."""
    values = np.unique(x)
    return 1 + int((values[1:] > 1.02 * values[:-1]).sum())


def _relations(factors: Sequence[str], logs: Mapping[str, Array], plan: pd.DataFrame) -> list[str]:
    """What goes together, in words: among the factors, and what else moves with them."""
    varied = [f for f in factors if f in logs]
    alike = {"n_item", "n_service"} <= set(plan) and (plan["n_item"] == plan["n_service"]).all()
    found = [relation(factor, logs, varied[:i]) for i, factor in enumerate(varied)]
    found += [
        relation(shadow, logs, varied)
        for shadow in SHADOWS
        if shadow not in factors and not (alike and shadow in ("n_item", "n_service"))
    ]
    said = [str(r) for r in found if r is not None]
    for factor in varied:
        if COMPUTE in logs and abs(r := correlation(logs[factor], logs[COMPUTE])) > NEAR_COMPUTE:
            said.append(f"{factor} goes with compute (correlation of logarithms {r:.3f})")
    if alike:
        said.append("n_item = n_service in every run: both stacks are alike, no run parts them")
    return said


def _repetition(state: Information) -> list[str]:
    """What the design tells of r_star, where it is less than a factor of three."""
    out = []
    errors = state.standard_errors(state.jacobian)
    for name, at, error in zip(state.belief.surface.names, state.belief.mean, errors, strict=True):
        if name.startswith("r_star") and 1.96 * error > np.log(3):
            how = f"within a factor of {np.exp(1.96 * error):.3g}" if error < 10 else "not at all"
            out.append(f"{name} = {np.exp(at):.3g}, the worth of repetition, would be known {how}")
    return out


def _missing(plan: pd.DataFrame, same: Sequence[str], form: Form | None) -> list[str]:
    """What a design of good practice has and this one lacks."""
    out = []
    if "seed" in plan:
        text = plan[list(same)].astype(str)
        freedom = len(plan) - len(text.drop_duplicates())
        if freedom < NOISE_FREEDOM:
            out.append(
                f"{freedom} runs repeat a configuration with another seed; {NOISE_FREEDOM} or more "
                "(3 seeds at 2 configurations) would measure the noise"
            )
    if mixed := [c for c in UNMODELLED if c in plan and plan[c].astype(str).nunique() > 1]:
        out.append(
            f"{', '.join(mixed)} differ between runs and are no factor: a law over all of them "
            "mixes their effects"
        )
    if "repeats" in plan and plan["repeats"].max() > 0 and not (form and "repeats" in form.columns):
        once = int((plan["repeats"] == 0).sum())
        out.append(
            f"{len(plan) - once} of {len(plan)} runs meet users again (up to "
            f"{plan['repeats'].max():.3g} times): the law takes a user for as good as a new one"
        )
    return out
