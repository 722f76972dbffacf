"""From a system's scores to ranks, losses and the rows of a table.

Every test example of every fold is scored once per seed; what is kept is per target, so that any
metric and any interval can be taken from it later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from scaling.data.task_forms import SEGMENTS
from scaling.files import write_bytes
from scaling.transfer.intervals import bootstrap
from scaling.transfer.lint import lint_table
from scaling.transfer.metrics import (
    LOSSES,
    METRICS,
    Ranks,
    per_target,
    rank,
    rank_all,
    summarise,
)
from scaling.transfer.problem import Problem, Split, TransferError
from scaling.transfer.towers import Fitted, pair_loss, products, softmax_loss, vectors

Ints = NDArray[np.int64]
Scores = NDArray[np.float32] | NDArray[np.float64] | Ints
Row = dict[str, Any]

AT_ONCE = 1 << 24
"""Scores held at once: bounds memory, not the result."""


class Scorer(Protocol):
    """What a system has learnt in one fold."""

    @property
    def losses(self) -> bool:
        """Whether its scores are logits, so that they have a loss; counts are not."""

    def pairs(self, examples: Ints, rows: Ints) -> Scores:
        """Scores of candidates. [n], [n, targets, candidates] -> [n, targets, candidates]"""

    def every(self, examples: Ints) -> Scores:
        """Scores of all items of the catalogue. [n] -> [n, items]"""


@dataclass(frozen=True)
class ByVectors:
    """Scores are inner products of a user's and an item's vector."""

    users: torch.Tensor
    """Vectors of ``examples``. [n, k]"""
    examples: Ints
    """Examples that have vectors, ascending. [n]"""
    items: torch.Tensor
    """Vectors of ``rows``. [m, k]"""
    rows: Ints
    """Items that have vectors, ascending. [m]"""
    validation_loss: float
    """``pair_loss`` of the fold's validation examples. [nats]"""
    before: torch.Tensor | None = None
    """Vectors of ``examples`` by what is before their targets, where ``users`` know more. [n, k]"""
    losses: bool = True

    def pairs(self, examples: Ints, rows: Ints) -> Scores:
        """As ``Scorer``."""
        users = self.users[np.searchsorted(self.examples, examples)]
        scores: Scores = products(users, self.items, np.searchsorted(self.rows, rows)).numpy()
        return scores

    def every(self, examples: Ints) -> Scores:
        """As ``Scorer``."""
        users = self.users[np.searchsorted(self.examples, examples)]
        scores: Scores = (users @ self.items.T).cpu().numpy()
        return scores


def fitted_vectors(problem: Problem, fitted: Fitted) -> ByVectors:
    """Scores of one trained replica, for all examples and items."""
    examples, rows = np.arange(len(problem.user)), np.arange(len(problem.catalogue))
    users = vectors(fitted.towers.user, [examples], 1)[0]
    items = vectors(fitted.towers.item, [rows], 1)[0]
    return ByVectors(users, examples, items, rows, fitted.validation_loss[0])


@dataclass(frozen=True)
class Outcome:
    """What a system scored on every test target.

    Attributes:
        examples: tested, ascending within a fold. [n]
        fold: of each. [n]
        ranks: of the targets. [seeds, n, targets]
        losses: ``pair_loss`` and ``softmax_loss`` by name; empty for counts. [seeds, n, targets]
    """

    examples: Ints
    fold: Ints
    ranks: Ranks
    losses: dict[str, NDArray[np.float32]]


def scored(problem: Problem, split: Split, scorer: Scorer) -> tuple[Ranks, dict[str, Any]]:
    """Ranks and losses of a fold's test targets. [examples, targets]"""
    first, last = [], []
    losses: dict[str, list[NDArray[np.float32]]] = {name: [] for name in LOSSES if scorer.losses}
    width = problem.candidates[0].size + (len(problem.catalogue) if problem.full else 0)
    size = max(1, AT_ONCE // width)
    for start in range(0, len(split.test), size):
        examples = split.test[start : start + size]
        rows = problem.candidates[examples].astype(np.int64)
        logits = scorer.pairs(examples, rows)
        found = rank_all(scorer.every(examples), rows[..., 0]) if problem.full else rank(logits)
        first.append(found.first)
        last.append(found.last)
        if scorer.losses:
            both = pair_loss, softmax_loss
            for name, loss in zip(LOSSES, both, strict=True):
                losses[name].append(loss(torch.from_numpy(logits)).numpy())
    ranks = Ranks(np.concatenate(first), np.concatenate(last))
    return ranks, {name: np.concatenate(parts) for name, parts in losses.items()}


def gather(splits: Sequence[Split], found: Sequence[tuple[Ranks, dict[str, Any]]]) -> Outcome:
    """One outcome of what each replica scored.

    Args:
        splits: of the folds.
        found: of ``scored``, by fold, then by seed (``problem.replicas``).
    """
    seeds = len(found) // len(splits)

    def together(of: Any) -> Any:
        return np.stack([np.concatenate([of(f) for f in found[s::seeds]]) for s in range(seeds)])

    return Outcome(
        np.concatenate([s.test for s in splits]),
        np.repeat(np.arange(len(splits)), [len(s.test) for s in splits]),
        Ranks(together(lambda f: f[0].first), together(lambda f: f[0].last)),
        {name: together(lambda f, n=name: f[1][n]) for name in found[0][1]},
    )


def rows_of(problem: Problem, outcome: Outcome, system: str) -> list[Row]:
    """Rows of a system: one for all users, and one for each segment that the task knows.

    A metric is the mean over targets and seeds; its interval is by bootstrap over users, given the
    heads that were trained. ``tie_gap`` is as ``summarise`` has it.

    Raises:
        TransferError: no ranking has the metrics of a row.
    """
    groups = {"all": np.ones(len(outcome.examples), bool)}
    if problem.segment is not None:
        of_example = problem.segment[problem.user[outcome.examples]]
        groups |= {name: of_example == i for i, name in enumerate(SEGMENTS)}
    rows = [
        _row(problem, outcome, system, name, kept) for name, kept in groups.items() if kept.any()
    ]
    for messages in lint_table(rows).values():
        raise TransferError(f"{system} on {problem.name!r}: {'; '.join(messages)}")
    return rows


def _row(
    problem: Problem, outcome: Outcome, system: str, segment: str, kept: NDArray[np.bool_]
) -> Row:
    ranks = Ranks(outcome.ranks.first[:, kept], outcome.ranks.last[:, kept])
    row: Row = {"task": problem.name, "system": system, "segment": segment}
    values = {name: per_target(name, ranks) for name in METRICS}
    values |= {name: loss[:, kept].astype(np.float64) for name, loss in outcome.losses.items()}
    for name in (*METRICS, *LOSSES):
        interval = bootstrap(values[name].mean(0)) if name in values else None
        row[name] = interval and interval.mean
        row[f"{name}_low"] = interval and interval.low
        row[f"{name}_high"] = interval and interval.high
    row["tie_gap"] = summarise(ranks)["tie_gap"]
    row["candidates"] = len(problem.catalogue) if problem.full else problem.candidates.shape[2]
    row |= {"n_users": int(kept.sum()), "n_targets": int(kept.sum()) * ranks.first.shape[2]}
    return row


def per_user_table(problem: Problem, keys: NDArray[np.uint64], outcome: Outcome) -> pa.Table:
    """Ranks and losses of every tested target, one row for each seed.

    Args:
        keys: of the task's users. [users]
    """
    seeds, n, targets = outcome.ranks.first.shape
    repeated = np.repeat(np.arange(n), targets)
    columns: dict[str, Any] = {
        "seed": np.repeat(np.arange(seeds, dtype=np.int32), n * targets),
        "user": np.tile(keys[problem.user[outcome.examples[repeated]]], seeds),
        "fold": np.tile(outcome.fold[repeated].astype(np.int32), seeds),
        "target": np.tile(np.arange(targets, dtype=np.int32), seeds * n),
        "first": outcome.ranks.first.ravel().astype(np.int32),
        "last": outcome.ranks.last.ravel().astype(np.int32),
    }
    for name in LOSSES:
        loss = outcome.losses.get(name)
        columns[name] = (
            pa.nulls(seeds * n * targets, pa.float32()) if loss is None else loss.ravel()
        )
    return pa.table(columns)


def write_per_user(path: Path, table: pa.Table) -> None:
    """Write a table of ``per_user_table`` whole."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes(path, buffer.getbuffer())
