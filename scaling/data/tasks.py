"""Downstream tasks: predict some of a user's items of one service, among items never touched.

What the targets are is the form of the task (``task_config.py``). A history ends strictly before
the first target; where times are days it ends the day before, as the order within a day is
arbitrary and a basket would give its own items away. Where it goes by stored order it holds the
task's own service alone: positions of different services do not say which log was earlier.

    tasks/<task>/
        task.json
        keys.npy  group.npy                         [users]
        targets.npy  negatives.npy                  [users, targets(, negatives)]
        candidates.npy                              [items of the service]
        history/<service>/{offsets,items}.npy
        history/<service>/ends.npy                  [users, targets], leave_one_out only
        segment.npy                                 [users], where asked for

A task is checked for leaks when it is made, and whenever it is opened or verified.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scaling.data.corpus import Corpus, CorpusError, blocks, load_array, refuse
from scaling.data.task_forms import SEGMENTS
from scaling.files import read_json
from scaling.packing import spans

Ints = NDArray[np.int64]
SCHEMA_VERSION = 1
GROUPS = 10
"""Groups of users by hash: the unit of an 80/10/10 split and of its rotations."""
PART = 1 << 20
"""Entries of a task dealt with together."""


class Task:
    """A stored task.

    Attributes:
        name: of the task.
        form: ``last``, ``random``, ``first`` or ``leave_one_out``.
        service: whose items are predicted.
        services: whose histories are stored: the task's service first.
        cut: ``day``, ``time`` or ``order``: what "before the first target" means; ``none`` where
            items are set aside at random.
        disjoint: whether its users are not to be users of pretraining.
        foreign: whether it is for encoders of other corpora alone.
        keys: of the users, ascending. [users]
        group: hash group 0..9 of each user, the unit of splits. [users]
        targets: items, oldest first (at random: in the order of the draw); of ``leave_one_out`` the
            one that validates, then the one that tests. [users, targets]
        negatives: items; none where a target is ranked among all candidates.
            [users, targets, negatives]
        candidates: all items of the service, ascending. [items]
        segment: place of each user in ``task_forms.SEGMENTS``; None where it was not asked for.
            [users]
    """

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path = path
        self.name: str = record["name"]
        self.form: str = record.get("form", "last")
        self.service: str = record["service"]
        self.services: tuple[str, ...] = tuple(record["services"])
        self.cut: str = record["cut"]
        self.disjoint: bool = record["users"] == "downstream"
        self.foreign: bool = record.get("encoders") == "foreign"
        self.keys = load_array(path / "keys.npy")
        self.group = load_array(path / "group.npy")
        self.targets = load_array(path / "targets.npy", ndim=2)
        self.negatives = (
            load_array(path / "negatives.npy", ndim=3)
            if record["negatives"]
            else np.zeros((*self.targets.shape, 0), np.uint8)
        )
        self.candidates = load_array(path / "candidates.npy")
        self.segment = load_array(path / "segment.npy") if record.get("segments") else None
        self._history: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        self._ends: dict[str, NDArray[Any]] = {}
        for s in self.services:
            folder = path / "history" / s
            self._history[s] = load_array(folder / "offsets.npy"), load_array(folder / "items.npy")
            if self.form == "leave_one_out":
                self._ends[s] = load_array(folder / "ends.npy", ndim=2)

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

    def history(self, service: str, target: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
        """Logs before a target in one service, oldest first; rows may be empty.

        All targets of a user have the history before the first one; only in ``leave_one_out`` has
        each its own. There the first target's is what is left to train on: any log of it is a
        target whose history is the logs before it.

        Args:
            target: place of the target.

        Returns:
            ``(offsets, items)``: user ``u`` has ``items[offsets[u]:offsets[u + 1]]``.
        """
        if service not in self._history:
            raise CorpusError(
                f"{self.path}: no history of {service!r}; valid: {', '.join(self.services)}"
            )
        if service not in self._ends:
            return self._history[service]
        lengths, kept = self._before(service, target, slice(0, self.n_users))
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), kept

    def _before(self, service: str, target: int, users: slice) -> tuple[Ints, NDArray[Any]]:
        """Lengths and items of the histories of some users before a target. [users], [logs]"""
        offsets, items = self._history[service]
        bounds = offsets[users.start : users.stop + 1].astype(np.int64)
        part = items[bounds[0] : bounds[-1]]
        if service not in self._ends:
            return np.diff(bounds), part
        lengths = self._ends[service][users, target].astype(np.int64)
        return lengths, part[spans(bounds[:-1] - bounds[0], lengths)]

    def check(self, corpus: Corpus) -> None:
        """Check what would make a result too good.

        Raises:
            CorpusError: as ``refuse_leaks``.
        """
        self.refuse_leaks(
            corpus.keys[corpus.split("pretraining")],
            corpus.item_service,
            corpus.services,
            corpus.card.services,
            unique=corpus.manifest["corpus_file"]["logs"]["deduplicate"] == "latest",
        )

    def refuse_leaks(
        self,
        trained: NDArray[np.uint64],
        item_service: NDArray[Any],
        services: Sequence[str],
        pretrained: Sequence[str],
        *,
        unique: bool,
    ) -> None:
        """Check what would make a result too good. When a task is made, ``task_forms`` has checked
        more: times are not stored.

        Args:
            trained: keys of the users of pretraining.
            item_service: index in ``services`` of every item of the corpus. [items]
            pretrained: services of pretraining.
            unique: whether no user has two logs of one item.

        Raises:
            CorpusError: arrays do not fit together; a user of a disjoint task, or of one on a
                service of pretraining, is pretrained on; a negative is a target or in the history,
                or is drawn twice for a target; an item is of another service; a history has the
                item of its target where users have no item twice; a segment has another size than
                it should.
        """
        index = [services.index(s) for s in self.services]
        for faults in (
            self._misfits(index[0], item_service),
            self._by_blocks(partial(self._strangers, item_service, index)),
            self._pretrained(trained, pretrained),
            self._by_blocks(partial(self._leaks, len(item_service), unique)),
        ):
            refuse(f"{self.path}: {fault}" for fault in dict.fromkeys(faults))

    def _by_blocks(self, check: Callable[[slice], Iterator[str]]) -> Iterator[str]:
        entries = np.full(self.n_users, self.targets.shape[1] * (1 + self.negatives.shape[2]))
        for offsets, _ in self._history.values():
            entries += _lengths(offsets)
        for users in user_blocks(entries, PART):
            yield from check(users)

    def _misfits(self, service: int, item_service: NDArray[Any]) -> Iterator[str]:
        """Arrays that do not fit together."""
        n_users, n_targets = self.targets.shape
        shapes = {
            "keys": (self.keys, (n_users,)),
            "group": (self.group, (n_users,)),
            "negatives": (self.negatives[:, :, 0:0], (n_users, n_targets, 0)),
            **{f"{s}: ends": (e, (n_users, n_targets)) for s, e in self._ends.items()},
            **({} if self.segment is None else {"segment": (self.segment, (n_users,))}),
        }
        for name, (array, shape) in shapes.items():
            if array.shape != shape:
                yield f"{name} has the shape {array.shape}, targets {self.targets.shape}"
                return
        if (self.keys[1:] <= self.keys[:-1]).any():
            yield "its users do not lie in the order of their keys, or one is there twice"
        if (self.group != self.keys % np.uint64(GROUPS)).any():
            yield "a user is in another group than that of its key"
        of_service = np.flatnonzero(item_service == service)
        if not np.array_equal(self.candidates, of_service):
            yield f"its candidates are not the items of {self.service!r}"
        for s, (offsets, items) in self._history.items():
            bounds = offsets.astype(np.int64)
            if len(bounds) != n_users + 1 or bounds[0] or bounds[-1] != len(items):
                yield f"the offsets of its histories of {s!r} are not those of {n_users} users"
            elif (np.diff(bounds) < 0).any():
                yield f"a history of {s!r} has a negative length"
            elif s in self._ends:
                ends = np.column_stack([self._ends[s].astype(np.int64), np.diff(bounds)])
                if (np.diff(ends, axis=1) < 0).any() or (ends[:, -2] != ends[:, -1]).any():
                    yield f"the histories of {s!r} do not end at one target after the other"

        if self.segment is not None:
            sizes = np.bincount(self.segment, minlength=len(SEGMENTS))
            tenth = (n_users - sizes[SEGMENTS.index("new")]) // 10
            if len(sizes) > len(SEGMENTS) or any(
                sizes[SEGMENTS.index(s)] != tenth for s in ("cold", "heavy")
            ):
                yield f"its segments have {sizes.tolist()} users; cold and heavy are {tenth} each"

    def _strangers(
        self, item_service: NDArray[Any], services: Sequence[int], users: slice
    ) -> Iterator[str]:
        """Items of another service than they should be."""
        for what, found in (("target", self.targets[users]), ("negative", self.negatives[users])):
            if (
                int(found.max(initial=0)) >= len(item_service)
                or (item_service[found] != services[0]).any()
            ):
                yield f"a {what} is no item of {self.service!r}"
        for index, (s, (offsets, items)) in zip(services, self._history.items(), strict=True):
            part = items[int(offsets[users.start]) : int(offsets[users.stop])]
            if int(part.max(initial=0)) >= len(item_service):
                yield f"a history of {s!r} has an item that the corpus lacks"
            elif (item_service[part] != index).any():
                yield f"a history of {s!r} has an item of another service"

    def _pretrained(self, trained: NDArray[np.uint64], pretrained: Sequence[str]) -> Iterator[str]:
        """Users that pretraining has, where it should not."""
        n = sum(int(np.isin(trained[part], self.keys).sum()) for part in blocks(len(trained)))
        if n and not self.foreign:
            if self.disjoint:
                yield f"{n} of its users are users of pretraining"
            elif self.service in pretrained:
                yield f"{n} of its users have their logs of {self.service!r} in pretraining"

    def _leaks(self, n_items: int, unique: bool, users: slice) -> Iterator[str]:
        """Items that give a target away, or that should not be ranked with it."""
        negatives = self.negatives[users]
        ordered = np.sort(negatives, axis=2)
        if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
            yield "a negative is drawn twice for one target"
        row = np.arange(len(negatives), dtype=np.int64)[:, None] * n_items
        targets = self.targets[users] + row
        bounds, items = self._history[self.service]
        lengths = _lengths(bounds[users.start : users.stop + 1])
        stored = items[int(bounds[users.start]) : int(bounds[users.stop])]
        known = np.concatenate([targets.ravel(), stored + np.repeat(row, lengths)])
        if np.isin(negatives.reshape(len(negatives), -1) + row, known).any():
            yield "a negative is an item the user touched"
        if unique or self.form == "random":
            if len(np.unique(targets)) < targets.size:
                yield "an item is twice among a user's targets"
            for t in range(targets.shape[1]):
                lengths, before = self._before(self.service, t, users)
                if np.isin(before + np.repeat(row, lengths), targets[:, t:]).any():
                    yield f"a history before target {t + 1} has the item of a target after it"


def user_blocks(entries: Ints, size: int) -> Iterator[slice]:
    """Users one after another, as many at a time as have ``size`` entries, or one.

    Args:
        entries: of each user. [users]
    """
    ends, start = np.cumsum(entries), 0
    while start < len(ends):
        done = ends[start] - entries[start]
        stop = max(start + 1, int(np.searchsorted(ends, done + size, side="right")))
        yield slice(start, stop)
        start = stop


def _lengths(offsets: NDArray[Any]) -> Ints:
    bounds = offsets.astype(np.int64)
    return bounds[1:] - bounds[:-1]
