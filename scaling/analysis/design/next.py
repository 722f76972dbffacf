"""The next runs: the best set of candidates that a budget can buy, given what is known."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.design.audit import UNMODELLED, default_form
from scaling.analysis.design.belief import (
    Assumption,
    Belief,
    DesignError,
    believe,
    columns_of,
    log_jacobian,
    update,
)
from scaling.analysis.design.candidates import (
    CROSSED,
    Candidate,
    candidates,
    of_law,
    table_of,
)
from scaling.analysis.design.criteria import Problem, choose
from scaling.analysis.design.information import Information
from scaling.analysis.design.targets import REACH, SHARES, Space, best, groups_of, target_matrices
from scaling.analysis.fitting.forms import Form
from scaling.analysis.fitting.jets import Array
from scaling.analysis.fitting.record import plain
from scaling.config import CorpusCard
from scaling.sweeps import Grid, to_toml_value

LAWS = 16
"""Laws that the criterion is averaged over."""
AHEAD = 10.0
"""Compute of the target, over that of the largest candidate."""
PRICES = {"exact": "pf_days_exact", "formula": "pf_days"}
"""Columns that a run may be priced by."""
IDENTITY = ("model", "batch_size", "negatives", "items_per_user", "data_fraction", "steps")
"""Columns by which a candidate is known among the finished runs."""


@dataclass(frozen=True, eq=False)
class Goal:
    """What the law shall be good for: the optimum at ``factor`` times the compute of ``space``'s
    reference."""

    space: Space
    factor: float


@dataclass(frozen=True)
class Proposal:
    """The next runs of a sweep.

    Attributes:
        budget, spent: PF-days by the column ``price``.
        points: settings of every run, on top of the sweep's ``[base]``; each at ``seeds``.
        runs: their rows of the plan, one a run.
        finished: runs whose losses were taken into account.
        form, assumption, noise: what the choice rests on.
        target: configuration of lowest loss at ``ahead`` times the compute of the largest
            candidate under the law believed in; None where the law knows no compute.
        expected: per quantity, its standard error with the finished runs alone (``before``) and
            with these (``after``), at that law and without any prior; None where it is infinite.
    """

    sweep: str
    budget: float
    price: str
    spent: float
    points: tuple[Mapping[str, Any], ...]
    seeds: tuple[int, ...]
    runs: tuple[Mapping[str, Any], ...]
    finished: int
    form: str
    assumption: str
    noise: float
    ahead: float
    target: Mapping[str, float] | None
    expected: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def propose(
    grid: Grid,
    card: CorpusCard,
    budget: float,
    *,
    noise: float,
    finished: pd.DataFrame | None = None,
    assumption: Assumption | None = None,
    form: str | Form | None = None,
    price: str = "exact",
    max_runs: int = 32,
    seeds: int = 1,
    ahead: float = AHEAD,
    seed: int = 0,
) -> Proposal:
    """Choose the next runs of a sweep.

    Args:
        budget: PF-days that they may cost in all.
        noise: standard deviation of ln loss from run to run.
        finished: runs of the sweep with ``loss``; none: a first design.
        form: by default E and a power of every factor that the candidates vary enough.
        price: ``exact`` or ``formula``.
        max_runs: most runs, seeds counted.
        seeds: seeds of every configuration.
        ahead: compute of the target over that of the largest candidate.
        seed: of the laws that the criterion is averaged over.

    Raises:
        DesignError: no candidate is affordable, or the sweep varies no factor of a law.
    """
    column = PRICES[price]
    finished = pd.DataFrame() if finished is None else finished
    offered = candidates(grid, card)
    finished = _comparable(finished, table_of(offered[:1]))
    offered = _open(offered, finished)
    every = pd.concat([table_of(offered), finished], ignore_index=True)
    form = default_form(every) if form is None else Form.parse(form)
    if form is None:
        raise DesignError(
            f"{grid.name}: no factor has three values over a range of three; declare more in the "
            "sweep file"
        )
    offered = of_law(offered, form.columns, grid)
    table = table_of(offered)
    cost = seeds * table[column].to_numpy(dtype=np.float64)
    if not (cost <= budget).any():
        raise DesignError(
            f"{grid.name}: {budget:g} PF-days buy none of {len(table)} candidates; the cheapest "
            f"costs {cost.min():.4g}"
        )
    belief = believe(form, every, assumption or Assumption())
    if len(finished):
        belief = update(belief, finished, noise)
    goal = _goal(form, table, card, ahead)
    problem = problem_of(
        belief, table, cost, noise / np.sqrt(seeds), goal, finished=finished, seed=seed,
        noise_before=noise,
    )  # fmt: skip
    chosen = sorted(choose(problem, budget, max(1, max_runs // seeds)))
    bought = table.iloc[chosen]
    own = tuple(range(min(grid.seeds), min(grid.seeds) + seeds))
    runs = [{**row, "seed": s} for row in bought.to_dict(orient="records") for s in own]
    return Proposal(
        sweep=grid.name,
        budget=budget,
        price=column,
        spent=float(cost[chosen].sum()),
        points=tuple(offered[i].point for i in chosen),
        seeds=own,
        runs=tuple({str(k): v if v == v else None for k, v in row.items()} for row in runs),
        finished=len(finished),
        form=str(form),
        assumption=belief.assumption.source,
        noise=noise,
        ahead=ahead,
        target=_target(belief, goal),
        expected=tuple(_expected(belief, goal, finished, bought, noise, seeds)),
    )


def problem_of(
    belief: Belief,
    offered: pd.DataFrame,
    cost: Array,
    noise: float,
    goal: Goal | None,
    *,
    finished: pd.DataFrame | None = None,
    noise_before: float | None = None,
    laws: int = LAWS,
    seed: int = 0,
) -> Problem:
    """The choice among candidates as ``criteria.choose`` takes it.

    Args:
        belief: of the law; with ``finished``, the one that was updated by them.
        offered: ``[m]`` rows with the columns of the law.
        cost: ``[m]`` their prices.
        noise: standard deviation of a candidate's ln y.
        goal: None for D-optimality alone.
        finished: runs whose information is there already.
        noise_before: standard deviation of theirs; None: the same.
        laws: how many laws the criterion is averaged over; 1 takes the belief's mean alone.
        seed: of the draws.
    """
    surface = belief.surface
    theta = belief.draws(laws, np.random.default_rng(seed))
    known = np.repeat((belief.prior or belief).precision[None], len(theta), axis=0)
    if finished is not None and len(finished):
        done = log_jacobian(surface, theta, columns_of(surface.form, finished))
        done = done / (noise_before or noise)
        known = known + np.swapaxes(done, 1, 2) @ done
    targets = np.empty((0, len(theta), surface.n_free, surface.n_free))
    if goal is not None:
        targets = target_matrices(surface, theta, goal.space, goal.factor)
    gradients = log_jacobian(surface, theta, columns_of(surface.form, offered)) / noise
    shares = SHARES if len(targets) == 2 else (1.0,) * len(targets)
    return Problem(gradients, cost, known, targets, shares)


def sweep_file(grid: Grid, proposal: Proposal, folder: Path, beside_sizes: bool) -> str:
    """A proposal as a sweep file that ``clue-scaling plan`` reads.

    Args:
        grid: the sweep that it continues.
        folder: where the file will lie; the corpus is named from there.
        beside_sizes: whether the named sizes are there, in ``models.toml``; else they go along.
    """
    base = {k: v for k, v in grid.base.items() if k not in (*CROSSED, "negatives")}
    corpus = Path(os.path.relpath(grid.corpus, folder)).as_posix()
    lines = [
        f"# The next {len(proposal.runs)} runs of {grid.name}, by clue-scaling next.",
        f"# They cost {proposal.spent:.6g} of {proposal.budget:g} PF-days ({proposal.price}); "
        f"{proposal.finished} finished runs were taken into account.",
        f"# Law: {proposal.form}; noise {proposal.noise:g} of ln loss.",
        f"# {proposal.assumption}.",
        "",
        f"name = {to_toml_value(f'{grid.name}_next')}",
        f"figure = {to_toml_value(grid.figure)}",
        f"source = {to_toml_value(f'{grid.source}; runs chosen by clue-scaling next')}",
        f"corpus = {to_toml_value(corpus)}",
        f"seeds = {to_toml_value(list(proposal.seeds))}",
    ]
    tables: list[tuple[str, Mapping[str, Any]]] = [("[base]", base)] if base else []
    if grid.transfer is not None:
        settings = grid.transfer.model_dump(mode="json", exclude_defaults=True)
        tables.insert(0, ("[transfer]", settings))
    if not beside_sizes:
        used = {str(p.get("model")) for p in proposal.points}
        tables += [
            (f"[sizes.{name}]", model.model_dump(mode="json", exclude_defaults=True))
            for name, model in grid.sizes.items()
            if name in used
        ]
    tables += [("[[zip.rows]]", point) for point in proposal.points]
    for head, keys in tables:
        lines += ["", head, *(f"{_key(k)} = {to_toml_value(v)}" for k, v in keys.items())]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() else to_toml_value(name)


def _comparable(finished: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    """Finished runs that differ from candidates in nothing that a law has no factor for."""
    same = pd.Series(True, index=finished.index)
    for c in (c for c in UNMODELLED if c in finished):
        wanted = like[c].iloc[0]
        same &= finished[c].isna() if pd.isna(wanted) else finished[c] == wanted
    return finished[same]


def _open(offered: Sequence[Candidate], finished: pd.DataFrame) -> list[Candidate]:
    """Candidates without those that are finished."""
    if finished.empty:
        return list(offered)
    same = [c for c in IDENTITY if c in finished]
    done = set(finished[same].itertuples(index=False, name=None))
    keys = list(table_of(offered)[same].itertuples(index=False, name=None))
    left = [c for c, key in zip(offered, keys, strict=True) if key not in done]
    if not left:
        raise DesignError("every candidate is finished; declare more values in the sweep file")
    return left


def _goal(form: Form, table: pd.DataFrame, card: CorpusCard, ahead: float) -> Goal | None:
    """The optimum at ``ahead`` times the compute of the largest candidate."""
    groups = groups_of(form.columns)
    if not groups:
        return None
    lead = [next(c for c in form.columns if c in group) for group in groups]
    logs = np.log(table[lead].to_numpy(dtype=np.float64))
    largest = int(np.argmax(logs.sum(axis=1)))
    row = table.iloc[largest]
    reference = {
        c: float(row[c])
        for c in dict.fromkeys((*form.columns, *(c for g in groups for c in g)))
        if c in table
    }
    if "users_seen" in reference or "repeats" in reference:
        reference |= {"users_seen": float(row["users_seen"]), "repeats": float(row["repeats"])}
    if "batch_size" not in reference:
        reference["batch_size"] = float(row["batch_size"])
    offset = logs - logs[largest]
    reach = np.log(REACH)
    users = card.fraction_users(float(table["data_fraction"].max()))
    space = Space(
        reference, groups, offset.min(axis=0) - reach, offset.max(axis=0) + reach, float(users),
        float(row["steps"]),
    )  # fmt: skip
    return Goal(space, ahead)


def _target(belief: Belief, goal: Goal | None) -> dict[str, float] | None:
    if goal is None:
        return None
    v = best(belief.surface, belief.mean, goal.space, goal.factor)
    at = goal.space.columns(v[None])
    return {c: float(at[c][0]) for c in belief.surface.form.columns}


def _expected(
    belief: Belief, goal: Goal | None, finished: pd.DataFrame, bought: pd.DataFrame,
    noise: float, seeds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Standard errors of exponents, of ln loss at the target, and the decision regret."""
    designs = {
        "before": finished,
        "after": pd.concat([finished, *[bought] * seeds], ignore_index=True),
    }
    names = belief.surface.names
    rows: dict[str, dict[str, Any]] = {
        n: {"quantity": n, "value": float(m)}
        for n, m in zip(names, belief.mean, strict=True)
        if n.startswith("exponent")
    }
    if goal is not None:
        matrices = target_matrices(belief.surface, belief.mean[None], goal.space, goal.factor)[:, 0]
    for when, design in designs.items():
        state = Information.of(belief, design, noise, laws=1) if len(design) else None
        errors = state.standard_errors(state.jacobian) if state else np.full(len(names), np.inf)
        for n, e in zip(names, errors, strict=True):
            if n in rows:
                rows[n][when] = plain(e)
        if goal is None:
            continue
        full = state is not None and state.rank == len(names)
        covariance = np.linalg.inv(state.jacobian.T @ state.jacobian) if state and full else None
        spread = [None if covariance is None else np.trace(m @ covariance) for m in matrices]
        rows.setdefault("ln loss at the target", {"quantity": "ln loss at the target"})[when] = (
            None if spread[-1] is None else float(np.sqrt(spread[-1]))
        )
        if len(spread) > 1:
            rows.setdefault("decision regret", {"quantity": "decision regret"})[when] = (
                None if spread[0] is None else float(spread[0] / 2)
            )
    return list(rows.values())
