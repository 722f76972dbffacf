"""A downstream task as arrays: what the systems of one table learn from and are tested on.

An *example* is a user at a point of time: logs before it, and targets after it. Most tasks have one
example a user, and the users fall into ten groups by the hash of their id. Of F folds, fold r tests
on groups 10r/F ..., takes the next group for early stopping and trains on the rest: with five folds
the paper's style of split 70/10/20, every user tested once, and no user in two parts of a fold.

A ``leave_one_out`` task has three examples a user, one for each part, and one fold: the last log of
those before its two targets is trained on, the first target validates and the second one tests.

What is learnt or counted in a fold sees no target of a validation or test example
(docs/decisions/0006-transfer-protocol.md).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling import ClueError
from scaling.data.batches import latest
from scaling.data.corpus import Corpus
from scaling.data.negatives import draw_negatives
from scaling.data.task_config import TaskConfig
from scaling.data.tasks import GROUPS, Task
from scaling.packing import spans

Ints = NDArray[np.int64]
Logs = tuple[Ints, Ints]
"""Offsets and items: example ``e`` has ``items[offsets[e]:offsets[e + 1]]``, oldest first."""

FOLDS = (2, 5, 10)
"""Numbers of folds whose test groups are whole and leave groups to train on."""
DRAWN = 100
"""Negatives drawn for a target whose task stores none, to train on and for the losses."""
SEED = 8_191
"""Seed s of fold r draws from (SEED, s, r)."""
DRAWN_AT_ONCE = 1 << 14
"""Users whose negatives are drawn together, which bounds memory, not the result."""


class TransferError(ClueError):
    """A system cannot be evaluated on a task; the message names both and why."""


@dataclass(frozen=True)
class Split:
    """Examples of one fold; no target in two parts."""

    train: Ints
    validation: Ints
    test: Ints


@dataclass(frozen=True)
class Problem:
    """A task as arrays. Items are rows of the catalogue, the items of the task's service."""

    name: str
    catalogue: Ints
    """Items of the corpus, ascending. [items]"""
    user: Ints
    """Row of each example's user in the task. [examples]"""
    candidates: NDArray[np.int32]
    """Of every target: the target, then negatives that the user never touched.
    [examples, targets, 1 + negatives]"""
    full: bool
    """A test target is ranked among all other items, not among its candidates."""
    history: Logs
    """Logs of the task's service before the targets. [examples]"""
    group: NDArray[np.uint8] | None
    """Group 0..9 of each example; None: ``part`` says it."""
    part: NDArray[np.uint8]
    """0 train, 1 validation, 2 test, of a task that has one fold. [examples]"""
    pretraining: Logs | None
    """Logs of the service by the users of pretraining; None if pretraining lacks it, or may have
    the targets (a task for encoders of other corpora)."""
    segment: NDArray[np.uint8] | None
    """Place of each user in ``task_forms.SEGMENTS``. [users]"""

    @property
    def targets(self) -> NDArray[np.int32]:
        """[examples, targets]"""
        return self.candidates[..., 0]

    def n_folds(self, folds: int) -> int:
        """Folds that there are where ``folds`` are asked for."""
        return 1 if self.group is None else folds

    def split(self, fold: int, folds: int) -> Split:
        """The examples of fold ``fold`` of ``folds``.

        Raises:
            TransferError: ``folds`` does not divide the groups, or a part has no examples.
        """
        if self.group is None:
            parts = [np.flatnonzero(self.part == p) for p in range(3)]
        else:
            if folds not in FOLDS:
                raise TransferError(f"folds = {folds}; valid: {', '.join(map(str, FOLDS))}")
            width = GROUPS // folds
            tested = self.group // width == fold
            stopping = self.group == (fold + 1) * width % GROUPS
            parts = [np.flatnonzero(p) for p in (~tested & ~stopping, stopping, tested)]
        if not all(map(len, parts)):
            sizes = ", ".join(str(len(p)) for p in parts)
            raise TransferError(
                f"task {self.name!r}: fold {fold} has {sizes} users to train on, validate on and "
                "test on; each needs at least one"
            )
        return Split(*parts)

    def before(self, examples: Ints) -> tuple[Ints, Ints]:
        """Logs before the targets of some examples: how many of each, and their items, one example
        after another. [examples], [logs]"""
        return latest(*self.history, examples, np.iinfo(np.int64).max)

    def served(self, split: Split) -> Ints:
        """Examples whose histories a system may count in a fold: all, who are known by them when
        they are served; of a leave-one-out task, where a user's three examples overlap, those that
        are trained on."""
        return split.train if self.group is None else np.arange(len(self.user))

    def known(self, split: Split) -> tuple[Ints, Ints]:
        """Logs that a system may count in a fold: example and item of each. [logs], [logs]

        The histories of ``served``, and the targets of training examples.
        """
        train, served = split.train, self.served(split)
        lengths, items = self.before(served)
        n_targets = self.targets.shape[1]
        return (
            np.concatenate([np.repeat(served, lengths), np.repeat(train, n_targets)]),
            np.concatenate([items, self.targets[train].ravel()]),
        )


def replicas(
    problem: Problem, folds: int, seeds: int
) -> tuple[list[Split], list[Split], list[int]]:
    """The folds, and the fold and the seed of each replica: by fold, then by seed."""
    splits = [problem.split(fold, folds) for fold in range(problem.n_folds(folds))]
    drawn = [
        int(np.random.SeedSequence([SEED, seed, fold]).generate_state(1)[0])
        for fold in range(len(splits))
        for seed in range(seeds)
    ]
    return splits, [split for split in splits for _ in range(seeds)], drawn


def example_histories(task: Task, service: str) -> Logs:
    """Logs of one service before each example's targets, items as the corpus numbers them.

    Of a ``leave_one_out`` task the examples are those that train, then those that validate, then
    those that test; a training history of another service ends at the first target.
    """
    if task.form != "leave_one_out":
        offsets, items = task.history(service)
        return offsets.astype(np.int64), items.astype(np.int64)
    trained = _trained(task)
    offsets, items = (a.astype(np.int64) for a in task.history(service, 0))
    lengths = np.diff(offsets)[trained] - (service == task.service)
    train = lengths, items[spans(offsets[trained], lengths)]
    parts = [train]
    for target in range(2):
        bounds, logs = task.history(service, target)
        parts.append((np.diff(bounds.astype(np.int64)), logs.astype(np.int64)))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([n for n, _ in parts]))])
    return offsets, np.concatenate([i for _, i in parts])


def _trained(task: Task) -> Ints:
    """Users of a leave-one-out task with two logs before their targets: one, and one before it."""
    lengths = np.diff(task.history(task.service, 0)[0].astype(np.int64))
    return np.flatnonzero(lengths > 1)


def pose(corpus: Corpus, task: Task) -> Problem:
    """A task as arrays.

    Args:
        corpus: the task's.
    """
    catalogue = np.asarray(task.candidates, np.int64)
    row_of = np.full(corpus.n_items, -1)
    row_of[catalogue] = np.arange(len(catalogue))
    offsets, items = example_histories(task, task.service)
    history = offsets, row_of[items]
    users = np.arange(task.n_users)
    targets = row_of[np.asarray(task.targets)]
    negatives = row_of[np.asarray(task.negatives)]
    group, part = np.asarray(task.group), np.zeros(task.n_users, np.uint8)
    if task.form == "leave_one_out":
        trained = _trained(task)
        bounds, logs = task.history(task.service, 0)
        last = row_of[logs[bounds[trained + 1].astype(np.int64) - 1]]
        part = np.repeat(np.arange(3, dtype=np.uint8), [len(trained), len(users), len(users)])
        users = np.concatenate([trained, users, users])
        targets = np.concatenate([last, targets[:, 0], targets[:, 1]])[:, None]
    pretraining = None
    if task.service in corpus.card.services and not task.foreign:
        bounds, log = corpus.users(task.service)
        bounds = bounds[: corpus.card.n_users + 1].astype(np.int64)
        pretraining = bounds, row_of[log[: bounds[-1]]]
    if task.form == "leave_one_out":
        own = _draw(task, 3, stored=negatives.shape[2])
        negatives = own if not negatives.shape[2] else np.concatenate([own[:, :1], negatives], 1)
        negatives = np.concatenate([negatives[trained, 0], negatives[:, 1], negatives[:, 2]])
        negatives = negatives[:, None]
    elif not negatives.shape[2]:
        negatives = _draw(task, targets.shape[1])
    return Problem(
        name=task.name,
        catalogue=catalogue,
        user=users,
        candidates=np.concatenate([targets[..., None], negatives], axis=2).astype(np.int32),
        full=not task.negatives.shape[2],
        history=history,
        group=None if task.form == "leave_one_out" else group,
        part=part,
        pretraining=pretraining,
        segment=None if task.segment is None else np.asarray(task.segment),
    )


def _draw(task: Task, n_targets: int, stored: int = 0) -> Ints:
    """Negatives for targets that have none stored, uniform over what their user never touched, as
    rows of the catalogue: the same whenever they are drawn. [users, targets, negatives]

    Args:
        stored: negatives of the task's other targets; 0: ``DRAWN``, or as many as there are.
    """
    catalogue = np.asarray(task.candidates, np.int64)
    offsets, items = task.history(task.service, task.targets.shape[1] - 1)
    bounds = offsets.astype(np.int64)
    width = task.targets.shape[1]
    count = stored or min(DRAWN, len(catalogue) - int(np.diff(bounds).max(initial=0)) - width)
    config = TaskConfig(service=task.service, targets=n_targets, negatives=max(1, count))
    parts = []
    for start in range(0, task.n_users, DRAWN_AT_ONCE):
        users = np.arange(start, min(start + DRAWN_AT_ONCE, task.n_users))
        lengths = np.diff(bounds)[users]
        logs = items[bounds[start] : bounds[users[-1] + 1]].astype(np.int64)
        user = np.repeat(np.arange(len(users)), lengths)
        drawn = draw_negatives(
            f"{task.name}/evaluation",
            config,
            np.concatenate([user, np.repeat(np.arange(len(users)), width)]),
            np.concatenate([logs, task.targets[users].astype(np.int64).ravel()]),
            task.keys[users],
            catalogue,
        )
        parts.append(np.searchsorted(catalogue, drawn))
    return np.concatenate(parts)
