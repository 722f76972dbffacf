"""Downstream tasks: predict a user's last items of one service among items never touched.

Shin et al. 2023, Section 4: a user's latest logs of a service are the targets, each ranked against
100 negatives drawn uniformly from the service's items that the user never touched. Negatives are
drawn once and stored. The history ends strictly before the first target; where times
are days it ends the day before, as the order within a day is arbitrary and a basket would give its
own items away. Where it goes by stored order it holds the task's own service alone: positions of
different services do not say which log was earlier.

    tasks/<task>/
        task.json
        keys.npy  group.npy                         [users]
        targets.npy  negatives.npy                  [users, targets(, negatives)]
        candidates.npy                              [items of the service]
        history/<service>/{offsets,items}.npy
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scaling.data.batches import latest, pack_items
from scaling.data.corpus import Corpus, CorpusError, load_array
from scaling.data.permutation import key_of, permute
from scaling.data.recipe import TaskConfig
from scaling.files import read_json
from scaling.packing import PackedBatch

Ints = NDArray[np.int64]
SCHEMA_VERSION = 1
GROUPS = 10
"""Groups of users by hash: the unit of an 80/10/10 split and of its rotations."""
DAY = 86_400


@dataclass(frozen=True)
class TaskLogs:
    """All logs of a task's users in its history services, in order of (user, time, position), or
    of (user, position) where the task is cut by stored order."""

    user: Ints
    """Row of the user, ascending. [logs]"""
    service: Ints
    """Index of the service in the corpus. [logs]"""
    item: Ints
    """Item. [logs]"""
    time: Ints
    """Unix time [s]; all zero where there are no times. [logs]"""
    position: Ints
    """Stored order among a user's logs of one service. [logs]"""
    timed: bool
    """Whether the logs have times."""


@dataclass(frozen=True)
class TaskArrays:
    """Content of a task, ready to be written."""

    cut: str
    targets: Ints
    """Oldest first. [users, targets]"""
    negatives: Ints
    """[users, targets, negatives]"""
    history: dict[int, tuple[Ints, Ints]]
    """Per service (the task's own alone if cut by order): lengths and items, oldest first.
    [users], [logs]"""


def build_task(
    name: str,
    config: TaskConfig,
    logs: TaskLogs,
    keys: NDArray[np.uint64],
    service: int,
    services: Sequence[int],
    candidates: Ints,
    max_logs: int,
) -> TaskArrays:
    """Targets, negatives and histories of a task.

    Args:
        keys: of the users. [users]
        service: index of the task's service.
        services: indices of the history services.
        candidates: items of the task's service, ascending.
        max_logs: most recent logs kept in a history, per service.

    Raises:
        CorpusError: a user has too few logs of the service, or too few untouched items.
    """
    n_users, n_targets = len(keys), config.targets
    own = logs.service == service
    counts = np.bincount(logs.user[own], minlength=n_users)
    if counts.min(initial=n_targets) < n_targets:
        raise CorpusError(f"task {name!r}: a user has fewer than {n_targets} logs of its service")
    ends = np.cumsum(counts)
    last = np.flatnonzero(own)[ends[:, None] - n_targets + np.arange(n_targets)]
    targets = logs.item[last]
    cut = config.cut or _default_cut(logs)
    clock = _clock(cut, logs)
    before = clock < clock[last[:, 0]][logs.user]
    history = {}
    for s in (service,) if cut == "order" else services:
        kept = np.flatnonzero(before & (logs.service == s))
        lengths = np.bincount(logs.user[kept], minlength=n_users)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        history[s] = latest(offsets, logs.item[kept], np.arange(n_users), max_logs)
    negatives = draw_negatives(name, config, logs.user[own], logs.item[own], keys, candidates)
    return TaskArrays(cut, targets, negatives, history)


def _default_cut(logs: TaskLogs) -> str:
    if not logs.timed:
        return "order"
    return "time" if (logs.time % DAY).any() else "day"


def _clock(cut: str, logs: TaskLogs) -> Ints:
    if cut == "order":
        return logs.position
    if not logs.timed:
        raise CorpusError(f"a task cannot be cut by {cut!r}: the logs have no times")
    return logs.time // DAY if cut == "day" else logs.time


def draw_negatives(
    name: str,
    config: TaskConfig,
    user: Ints,
    item: Ints,
    keys: NDArray[np.uint64],
    candidates: Ints,
) -> Ints:
    """Negatives of every target, uniform without replacement over what the user never touched.

    The r-th untouched candidate is found from the touched ones alone, and r runs over the first
    values of a permutation keyed by task, user and target: exact, and the same on every machine.

    Args:
        user, item: every log of the service. [logs]

    Returns:
        Items. [users, targets, negatives]
    """
    n_users = len(keys)
    place = np.searchsorted(candidates, item)
    touched = np.unique(user * np.int64(len(candidates)) + place)
    row, place = np.divmod(touched, len(candidates))
    counts = np.bincount(row, minlength=n_users)
    free = len(candidates) - counts
    if n_users and free.min() < config.negatives:
        raise CorpusError(
            f"task {name!r}: negatives = {config.negatives}, but a user has touched all but "
            f"{free.min()} of the {len(candidates)} items of {config.service!r}"
        )
    salt = np.uint64(key_of("negatives", name))
    target = np.arange(config.targets, dtype=np.uint64)[None, :, None]
    with np.errstate(over="ignore"):
        key = (keys[:, None, None] ^ salt) + target * np.uint64(0xD1342543DE82EF95)
    rank = permute(np.arange(config.negatives), free[:, None, None], key)
    # The i-th touched place p has p - i untouched places before it; the r-th untouched place is
    # r + (number of touched places with p - i <= r). One search over all users: offset by row.
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])[:-1]
    width = np.int64(len(candidates) + 1)
    gaps = place - (np.arange(len(place)) - starts[row]) + row * width
    at = np.arange(n_users)[:, None, None]
    passed = np.searchsorted(gaps, rank + at * width, side="right") - starts[:, None, None]
    result: Ints = candidates[rank + passed]
    return result


class Task:
    """A stored task.

    Attributes:
        name: of the task.
        service: whose items are predicted.
        services: whose histories are stored: the task's service first, and alone if cut by order.
        cut: ``day``, ``time`` or ``order``: what "before the first target" means.
        keys: of the users, ascending. [users]
        group: hash group 0..9 of each user, the unit of splits. [users]
        targets: items, oldest first. [users, targets]
        negatives: items. [users, targets, negatives]
        candidates: all items of the service, ascending. [items]
    """

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path = path
        self.name: str = record["name"]
        self.service: str = record["service"]
        self.services: tuple[str, ...] = tuple(record["services"])
        self.cut: str = record["cut"]
        self.disjoint: bool = record["users"] == "downstream"
        self.keys = load_array(path / "keys.npy")
        self.group = load_array(path / "group.npy")
        self.targets = load_array(path / "targets.npy", ndim=2)
        self.negatives = load_array(path / "negatives.npy", ndim=3)
        self.candidates = load_array(path / "candidates.npy")
        self._history = {
            s: (
                load_array(path / "history" / s / "offsets.npy"),
                load_array(path / "history" / s / "items.npy"),
            )
            for s in self.services
        }

    @classmethod
    def open(cls, corpus: Corpus, name: str) -> Self:
        """Open a task of a corpus and check it for leaks.

        Raises:
            CorpusError: there is no such task (the message names those there are), or it leaks.
        """
        if name not in corpus.manifest["tasks"]:
            valid = ", ".join(corpus.manifest["tasks"]) or "none"
            raise CorpusError(f"{corpus.path}: no task {name!r}; valid: {valid}")
        path = corpus.path / "tasks" / name
        record = read_json(path / "task.json")
        if record.get("schema_version") != SCHEMA_VERSION:
            raise CorpusError(
                f"{path / 'task.json'}: schema_version = {record.get('schema_version')!r}; "
                f"this program reads {SCHEMA_VERSION}"
            )
        task = cls(path, record)
        task.check(corpus)
        return task

    @property
    def n_users(self) -> int:
        """Users of the task."""
        return len(self.keys)

    def history(self, service: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Logs before the first target in one service, oldest first; rows may be empty.

        Returns:
            ``(offsets, items)``: user ``u`` has ``items[offsets[u]:offsets[u + 1]]``.
        """
        if service not in self._history:
            raise CorpusError(
                f"{self.path}: no history of {service!r}; valid: {', '.join(self.services)}"
            )
        return self._history[service]

    def check(self, corpus: Corpus) -> None:
        """Check what would make a result too good.

        Raises:
            CorpusError: a user of a disjoint task is pretrained on; a negative is a target or in
                the history, or is drawn twice for a target; an item is of another service.
        """
        trained = corpus.keys[corpus.split("pretraining")]
        if self.disjoint and (n := int(np.isin(self.keys, trained).sum())):
            raise CorpusError(f"{self.path}: {n} of its users are users of pretraining")
        for what, items in (("target", self.targets), ("negative", self.negatives)):
            if not np.isin(items, self.candidates).all():
                raise CorpusError(f"{self.path}: a {what} is no item of {self.service!r}")
        ordered = np.sort(self.negatives, axis=2)
        if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
            raise CorpusError(f"{self.path}: a negative is drawn twice for one target")
        width = np.int64(corpus.n_items)
        row = np.arange(self.n_users, dtype=np.int64)
        drawn = (self.negatives.reshape(self.n_users, -1) + row[:, None] * width).ravel()
        offsets, items = self.history(self.service)
        lengths: Ints = offsets[1:].astype(np.int64) - offsets[:-1].astype(np.int64)
        known = np.concatenate(
            [
                (self.targets + row[:, None] * width).ravel(),
                items + np.repeat(row, lengths) * width,
            ]
        )
        if np.isin(drawn, known).any():
            raise CorpusError(f"{self.path}: a negative is an item the user touched")


@dataclass(frozen=True)
class HistoryBatch:
    """Histories of some users of a task: those that are not empty, and where they belong."""

    batch: PackedBatch
    """Only rows with items, as one service: ``batch.n_rows == len(rows)``."""
    rows: Ints
    """Row of each in the full service-major grid: ``service * n_users + user``; the features of all
    other rows of the grid are zero."""
    n_users: int
    n_services: int


def make_history_batch(
    corpus: Corpus, task: Task, users: Any, items_per_user: int, services: Sequence[str]
) -> HistoryBatch:
    """The most recent logs before the first target, every distinct item once.

    Args:
        users: rows of the task's users. [users]
        items_per_user: cap per service. [items]
        services: whose histories, in the order of the grid's rows.
    """
    users = np.asarray(users)
    ragged = [latest(*task.history(s), users, items_per_user) for s in services]
    lengths = np.concatenate([n for n, _ in ragged])
    rows = np.flatnonzero(lengths)
    items = np.concatenate([i for _, i in ragged])
    batch = pack_items(corpus, [(lengths[rows], items)], distinct=True)
    return HistoryBatch(batch, rows, len(users), len(services))
