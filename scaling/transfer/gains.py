"""What an encoder gains over the systems that have none: differences on the same targets.

Both sides of a comparison left ranks and losses of every target beside their records
(``scoring.per_user_table``). What makes a user easy for both cancels in a difference, so its
interval is narrower than those of the two means.

Shin et al. 2023 (Fig. 5) set the gain over task-specific models beside Kendall's tau of the token
distributions of pretraining and task, which is computed here as ``scaling.data.domains`` has it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scaling import ClueError
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.domains import VARIANTS, similarity
from scaling.files import RecordError
from scaling.transfer.intervals import resampled
from scaling.transfer.metrics import LOSSES, METRICS, Floats, Ints, Ranks, per_target

Row = dict[str, Any]
MEASURES = (*METRICS, *LOSSES)
MATCHED = ("task_digest", "folds", "seeds")
"""In what two evaluations agree whose targets are compared. A system without an encoder knows the
target service's histories, whichever an encoder was given."""
ENDS = (0.025, 0.975)
"""Of the intervals."""
READ = pa.schema(
    {
        "user": pa.uint64(),
        **dict.fromkeys(("target", "seed", "first", "last"), pa.int64()),
        **dict.fromkeys(LOSSES, pa.float64()),
    }
)
"""What of every target is read."""
TOLERANCE = 1e-9
"""Between a record's mean and that of the targets beside it: the rounding of another order."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that is recorded, with what it left of every target."""

    record: Path
    """Its file; the targets are in the one beside it that ends in ``.parquet``."""
    columns: Mapping[str, Any]
    """Those of the table that it fills, ``MATCHED`` among them."""
    means: Mapping[str, Any]
    """Its row of all users, to check the targets against."""
    corpora: tuple[str, str] = ("", "")
    """Digests of the corpus its encoder was trained on, and of the task's."""
    services: tuple[str, ...] | None = None
    """Services its encoder was trained on; None: all of that corpus."""

    @property
    def matched(self) -> tuple[Any, ...]:
        """The same for two whose targets are the same."""
        return tuple(self.columns[name] for name in MATCHED)

    def targets(self) -> "Targets":
        """What it left of every target.

        Raises:
            RecordError: that is missing or torn, or another evaluation's.
        """
        found = read_targets(self.record.with_suffix(".parquet"))
        for name, mean in zip(MEASURES, found.means.tolist(), strict=True):
            said = self.means.get(name)
            if said is not None and not abs(said - mean) <= TOLERANCE:
                raise RecordError(
                    f"{found.path}: mean {name} is {mean}, its record says {said}: written by "
                    "another evaluation"
                )
        return found


@dataclass
class Gains:
    """Rows of the table, and what it lacks."""

    rows: list[Row] = field(default_factory=list)
    unpaired: list[Row] = field(default_factory=list)
    """``run_key`` (None: a system without an encoder), ``record`` and ``error`` of evaluations
    whose targets cannot be read or are not those of the other side."""
    without_tau: list[Row] = field(default_factory=list)
    """``corpus_digest``, ``task`` and ``error`` where tau could not be computed."""


def compare(root: Path, runs: Iterable[Evaluated], systems: Sequence[Evaluated]) -> Gains:
    """Each run's evaluations against every system without an encoder on the same targets.

    Args:
        root: root folder of all state; corpora that are gone leave tau null.
        runs: evaluations of runs, with ``run_key`` and ``task`` among their columns.
        systems: records of systems without an encoder.

    Returns:
        A row for each pair, in the order of ``runs``, then of ``systems``: the columns of both, and
        for each measure m ``m_gain`` (the run's mean less the system's), ``m_baseline`` (the
        system's mean) and ``m_relative`` (gain over the system's mean), gains with the ends of
        their 95 % intervals, users resampled; ``tau_b_<variant>``; ``n_users``, ``n_targets``.
    """
    found = Gains()
    kept: dict[Path, Targets | None] = {}
    taus: dict[Any, Row] = {}

    def refuse(one: Evaluated, error: str) -> None:
        record = str(one.record.relative_to(root))
        key = one.columns.get("run_key")
        found.unpaired.append({"run_key": key, "record": record, "error": error})

    def read(one: Evaluated) -> Targets | None:
        try:
            return one.targets()
        except RecordError as e:
            refuse(one, str(e))
            return None

    for run in runs:
        beside = [s for s in systems if s.matched == run.matched]
        mine = read(run) if beside else None
        if mine is None:
            continue
        key = *run.corpora, run.columns["task"], run.columns["task_digest"], run.services
        if key not in taus:
            taus[key], error = _tau(root, *key)
            if error:
                of = {"corpus_digest": run.corpora[0], "task": run.columns["task"]}
                found.without_tau.append({**of, "error": error})
        for system in beside:
            if system.record not in kept:
                kept[system.record] = read(system)
            other = kept[system.record]
            if other is not None and not mine.same_as(other):
                refuse(run, f"other users or targets than {other.path.relative_to(root)} has")
            elif other is not None:
                numbers = differences(mine, other)
                found.rows.append({**system.columns, **run.columns, **numbers, **taus[key]})
    return found


def _tau(
    root: Path,
    trained_on: str,
    owner: str,
    task: str,
    digest: str,
    services: tuple[str, ...] | None,
) -> tuple[Row, str | None]:
    """Columns of tau, and why they are null if they are."""
    try:
        corpus = Corpus.find(root, trained_on)
        other = corpus if owner == trained_on else Corpus.find(root, owner)
        if other.manifest["tasks"].get(task) != digest:
            raise CorpusError(f"{other.path}: task {task!r} is not the one that was evaluated")
        taus = similarity(corpus, other, task, services)
        return {f"tau_b_{v}": tau for v, tau in taus.items()}, None
    except ClueError as e:
        return dict.fromkeys((f"tau_b_{v}" for v in VARIANTS), None), str(e)


# ---- targets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """What one evaluation scored on every target, by user, then target."""

    path: Path
    users: NDArray[np.uint64]
    """Key of the user of each target. [targets]"""
    places: Ints
    """Place of each target among its user's. [targets]"""
    values: Floats
    """``MEASURES``, means over seeds; NaN where a system has none. [measures, targets]"""

    @cached_property
    def starts(self) -> Ints:
        """First target of each user. [users]"""
        first: Ints = np.flatnonzero(np.append(True, self.users[1:] != self.users[:-1]))
        return first

    @cached_property
    def means(self) -> Floats:
        """Over targets. [measures]"""
        found: Floats = self.values.mean(axis=1)
        return found

    @cached_property
    def draws(self) -> Floats:
        """Means of resampled users: of the same ones for all systems on them. [measures, draws]"""
        sums = np.add.reduceat(self.values, self.starts, axis=1)
        return resampled(sums, np.diff(np.append(self.starts, len(self.users))))

    def same_as(self, other: "Targets") -> bool:
        """Whether both are of the same targets of the same users."""
        users = np.array_equal(self.users, other.users)
        return users and np.array_equal(self.places, other.places)


def read_targets(path: Path) -> Targets:
    """Read a table of ``scoring.per_user_table``.

    Raises:
        RecordError: it is missing, torn, or not such a table.
    """
    names = READ.names
    try:
        table = pq.read_table(path, columns=names).select(names).cast(READ)
        user, place, seed, first, last, *losses = (column.to_numpy() for column in table.columns)
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, KeyError) as e:
        raise RecordError(f"{path}: not a readable table of targets ({e})") from None
    order = np.lexsort((seed, place, user))
    seeds = np.unique(seed)
    n = len(order) // max(1, len(seeds))
    if not n or len(order) != n * len(seeds):
        raise RecordError(f"{path}: {len(order)} rows of {len(seeds)} seeds")
    user, place, seed, first, last = (
        column[order].reshape(n, -1) for column in (user, place, seed, first, last)
    )
    twice = (user[1:, 0] == user[:-1, 0]) & (place[1:, 0] == place[:-1, 0])
    if (user != user[:, :1]).any() or (place != place[:, :1]).any() or (seed != seeds).any():
        raise RecordError(f"{path}: a target was not ranked once by every seed")
    if twice.any() or not (first.min() >= 1 and (first <= last).all()):
        raise RecordError(f"{path}: a target is there twice, or has no rank")
    ranks = Ranks(first, last)
    values = [per_target(name, ranks).mean(axis=1) for name in METRICS]
    values += [loss[order].reshape(n, -1).mean(axis=1) for loss in losses]
    return Targets(path, user[:, 0], place[:, 0], np.stack(values))


def differences(mine: Targets, other: Targets) -> Row:
    """Columns of a comparison on the same targets (``compare``); None where a side has no value, or
    what is divided by is 0.

    Draws are of the same users on both sides, so that a gain's percentiles are those of
    ``intervals.paired``, and a relative gain's allow for the error of what it is divided by.
    """
    row: Row = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = mine.means - other.means, mine.draws - other.draws
        relative = gain[0] / other.means, gain[1] / other.draws
        for kind, (means, draws) in (("gain", gain), ("relative", relative)):
            low, high = np.quantile(draws, ENDS, axis=1)
            for at, name in enumerate(MEASURES):
                for ending, values in (("", means), ("_low", low), ("_high", high)):
                    row[f"{name}_{kind}{ending}"] = _finite(values[at])
    row |= {
        f"{name}_baseline": _finite(mean) for name, mean in zip(MEASURES, other.means, strict=True)
    }
    return row | {"n_users": len(mine.starts), "n_targets": len(mine.users)}


def _finite(value: np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None
