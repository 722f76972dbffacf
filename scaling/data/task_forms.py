"""The forms of a task: which logs of its users are targets, and which are the histories before.

Pure functions of the logs. What they choose is checked again, row by row, before it is stored: the
times that such a check needs are not kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling.data.batches import latest
from scaling.data.corpus import CorpusError
from scaling.data.permutation import key_of, permute
from scaling.data.task_config import TaskConfig
from scaling.packing import spans

Ints = NDArray[np.int64]
DAY = 86_400
SEGMENTS = ("new", "cold", "regular", "heavy")
"""Segments of users, in the order of the numbers stored."""


@dataclass(frozen=True)
class TaskLogs:
    """Logs of users of a task in its history services, in order of (user, time, position), or of
    (user, position) where the task is cut by stored order. Of the task's service they are all."""

    user: Ints
    """Row of the user, ascending. [logs]"""
    service: Ints
    """Index of the service in the corpus. [logs]"""
    item: Ints
    """Item. [logs]"""
    time: Ints
    """Unix time [s]; zero where there is none. [logs]"""
    position: Ints
    """Stored order among a user's logs of one service. [logs]"""


@dataclass(frozen=True)
class Chosen:
    """Rows of ``TaskLogs`` that a task consists of."""

    targets: Ints
    """Oldest first; in the order of the draw if at random. [users, targets]"""
    history: dict[int, tuple[Ints, Ints]]
    """Per service: lengths, and rows before the target, oldest first. With several targets that is
    the first one, in ``leave_one_out`` the last one, which tests. [users], [logs]"""
    ends: dict[int, Ints]
    """``leave_one_out``, per service: so many logs of the history are before each target.
    [users, targets]"""


def cut_of(name: str, config: TaskConfig, timed: bool, whole_days: Callable[[], bool]) -> str:
    """What "before the first target" means: ``day``, ``time``, ``order``, or ``none`` where items
    are set aside at random.

    Args:
        timed: whether all logs of the task have times.
        whole_days: whether the times are all midnight; asked only if it matters.

    Raises:
        CorpusError: the task compares times, and there are none.
    """
    if config.form == "random":
        return "none"
    if timed:
        return config.cut or ("day" if whole_days() else "time")
    if config.cut in ("day", "time"):
        raise CorpusError(f"task {name!r} cannot be cut by {config.cut!r}: the logs have no times")
    return "order"


def choose(
    name: str,
    config: TaskConfig,
    cut: str,
    logs: TaskLogs,
    keys: NDArray[np.uint64],
    service: int,
    services: Sequence[int],
    max_logs: int,
) -> Chosen:
    """Targets and histories of users of a task.

    Args:
        cut: as ``cut_of`` gives it.
        keys: of the users. [users]
        service: index of the task's service.
        services: indices of the services that have histories.
        max_logs: most recent logs kept in a history, per service.

    Raises:
        CorpusError: a user has too few logs of the service.
    """
    n_users = len(keys)
    rows = np.flatnonzero(logs.service == service)
    counts = np.bincount(logs.user[rows], minlength=n_users)
    if counts.min(initial=config.targets) < config.targets:
        raise CorpusError(
            f"task {name!r}: a user has fewer than {config.targets} logs of its service"
        )
    starts = np.cumsum(counts) - counts
    clock = logs.time
    if cut == "none":
        targets, before = _at_random(name, config, logs, keys, service)
    else:
        place = 0 if config.form == "first" else counts - config.targets
        targets = rows[(starts + place)[:, None] + np.arange(config.targets)]
        clock = _clock(cut, logs)
        bound = clock[targets[:, -1 if config.form == "leave_one_out" else 0]]
        before = clock < bound[logs.user]
    history, ends = {}, {}
    for s in services:
        kept = np.flatnonzero(before & (logs.service == s))
        lengths = np.bincount(logs.user[kept], minlength=n_users)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        lengths, kept = history[s] = latest(offsets, kept, np.arange(n_users), max_logs)
        if config.form == "leave_one_out":
            user = logs.user[kept]
            earlier = clock[kept][:, None] < clock[targets][user]
            ends[s] = np.stack([np.bincount(user[e], minlength=n_users) for e in earlier.T], 1)
    return Chosen(targets, history, ends)


def _at_random(
    name: str, config: TaskConfig, logs: TaskLogs, keys: NDArray[np.uint64], service: int
) -> tuple[Ints, NDArray[np.bool_]]:
    """Rows of items set aside, and which logs are of others.

    A user's items are set aside with all their logs. Which they are is a permutation keyed by task
    and user over the items in the order of their numbers.

    Returns:
        [users, targets], [logs]
    """
    own = np.flatnonzero(logs.service == service)
    width = np.int64(logs.item.max(initial=0) + 1)
    pair = logs.user * width + logs.item
    _, first = np.unique(pair[own], return_index=True)
    rows = own[first]
    counts = np.bincount(logs.user[rows], minlength=len(keys))
    if counts.min(initial=config.targets) < config.targets:
        raise CorpusError(
            f"task {name!r}: a user has fewer than {config.targets} items of its service"
        )
    key = keys ^ np.uint64(key_of("set aside", name))
    drawn = permute(np.arange(config.targets), counts[:, None], key[:, None])
    targets = rows[(np.cumsum(counts) - counts)[:, None] + drawn]
    return targets, ~((logs.service == service) & np.isin(pair, pair[targets]))


def _clock(cut: str, logs: TaskLogs) -> Ints:
    if cut == "order":
        return logs.position
    return logs.time // DAY if cut == "day" else logs.time


def refuse_leaks(name: str, cut: str, logs: TaskLogs, chosen: Chosen) -> None:
    """Check the rows chosen, one by one and in another way than they were found.

    Raises:
        CorpusError: a history has a log of another user or service, a target, or one that is not
            strictly before the target it is for.
    """
    n_users, n_targets = chosen.targets.shape
    user = np.arange(n_users)
    clock = None if cut == "none" else _clock(cut, logs)
    faults = []
    if (logs.user[chosen.targets] != user[:, None]).any():
        faults.append("a target is a log of another user")
    for s, (lengths, rows) in chosen.history.items():
        of = np.repeat(user, lengths)
        if (logs.user[rows] != of).any() or (logs.service[rows] != s).any():
            faults.append("a history has a log of another user or service")
            continue
        starts = np.cumsum(lengths) - lengths
        for t in range(n_targets):
            ends = chosen.ends[s][:, t] if chosen.ends else lengths
            seen = rows[spans(starts, ends)]
            target = chosen.targets[np.repeat(user, ends), t]
            if clock is not None and (clock[seen] >= clock[target]).any():
                faults.append(f"a history has logs at or after target {t + 1}")
            if clock is None and (logs.item[seen] == logs.item[target]).any():
                faults.append(f"a history has the item of target {t + 1}")
    if faults:
        raise CorpusError(f"task {name!r} leaks: {'; '.join(dict.fromkeys(faults))}")


def bounds(cut: str, logs: TaskLogs, chosen: Chosen) -> Ints:
    """Time before which a user's logs are before the first target. [users] [s]"""
    time = logs.time[chosen.targets[:, 0]]
    return time // DAY * DAY if cut == "day" else time


def segment(before: Ints, recent: Ints, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Segment of each user (Shin et al. 2023, online test), as a place in ``SEGMENTS``.

    New: no behaviour in the month before the first target. Of the other n users, by behaviours
    before the first target and, among equals, by key: the first ⌊n/10⌋ are cold, the last ⌊n/10⌋
    are heavy.

    Args:
        before: behaviours before the first target, in all services. [users]
        recent: those of the last month of it. [users]
        keys: of the users. [users]
    """
    found = np.full(len(keys), SEGMENTS.index("regular"), np.uint8)
    found[recent == 0] = SEGMENTS.index("new")
    others = np.flatnonzero(recent)
    others = others[np.lexsort([keys[others], before[others]])]
    tenth = len(others) // 10
    found[others[:tenth]] = SEGMENTS.index("cold")
    found[others[len(others) - tenth :]] = SEGMENTS.index("heavy")
    return found
