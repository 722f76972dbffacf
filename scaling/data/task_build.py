"""Making a task from clean logs, and writing it into the folder of a corpus.

Only logs of the task's users leave the engine, in a total order, so both engines give the same
bytes. They come in blocks of whole users: what is in memory is a block, and some numbers of every
user.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ibis import _
from numpy.typing import NDArray

from scaling.data import store, tasks
from scaling.data.corpus import CorpusError, load_array
from scaling.data.engine import Engine
from scaling.data.logs import MONTH, CleanLogs
from scaling.data.negatives import draw_negatives
from scaling.data.recipe import CorpusFile
from scaling.data.task_config import TaskConfig
from scaling.data.task_forms import (
    DAY,
    Chosen,
    TaskLogs,
    bounds,
    choose,
    cut_of,
    refuse_leaks,
    segment,
)
from scaling.data.tasks import GROUPS, SCHEMA_VERSION, Task, user_blocks
from scaling.files import write_json
from scaling.packing import spans

Ints = NDArray[np.int64]
COLUMNS = ("uid", "service", "item", "time", "position")


def write_task(
    clean: CleanLogs,
    name: str,
    file: CorpusFile,
    uids: Ints,
    keys: NDArray[np.uint64],
    splits: Mapping[str, Ints],
    folder: Path,
) -> None:
    """Write a task, and check it for leaks.

    Args:
        uids: of all users, ascending. [users]
        keys: hashes of all users, ascending. [users]
        splits: rows of both in ``pretraining`` and ``downstream``.
        folder: of the task, in a corpus whose items are written.

    Raises:
        CorpusError: the logs cannot make the task, or it leaks.
    """
    engine, config = clean.engine, file.tasks[name]
    service = file.all_services.index(config.service)
    alone = config.history == "service" or config.cut == "order"
    others = [] if alone else [s for s in file.services if s != config.service]
    services = [service, *map(file.all_services.index, others)]
    logs = clean.logs.filter(clean.logs.service.isin(services))
    if config.users == "downstream":
        users = _users(clean, f"task_{name}_users", uids[splits["downstream"]])
        logs = logs.semi_join(users, "uid")
    able = engine.store(f"task_{name}_able", _able(logs, config, service))
    everyone, logs = logs, logs.semi_join(able, "uid")
    # A user whose first log has no time is able to nothing; the reason is told of everyone.
    timed = _timed(clean, everyone if config.form == "first" else logs, name, file)
    cut = cut_of(name, config, timed, lambda: not engine.value((logs.time % DAY != 0).any()))
    if cut == "order":
        services, logs = [service], logs.filter(logs.service == service)
    (candidates,) = engine.fetch(
        clean.items.filter(clean.items.service == service), {"item": np.int64}, ("item",)
    )
    item_service = load_array(folder.parents[1] / "items/service.npy")
    columns: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)
    touched, *stored = (
        store.Spool(engine.folder / f"task_{name}_{part}", len(item_service))
        for part in ("touched", *services)
    )
    seen = np.zeros(len(candidates), np.int64)  # logs in histories before the first target
    for uid, *logged in _blocks(clean, logs, cut):
        rows, user = np.unique(uid, return_inverse=True)
        task_logs = TaskLogs(user, *logged)
        task_keys = keys[np.searchsorted(uids, rows)]
        chosen = choose(
            name, config, cut, task_logs, task_keys, service, services, file.users.max_logs
        )
        refuse_leaks(name, cut, task_logs, chosen)
        own = task_logs.service == service
        touched.append(task_logs.item[own])
        for spool, (_lengths, kept) in zip(stored, chosen.history.values(), strict=True):
            spool.append(task_logs.item[kept])
        if config.negatives_from == "popularity" and config.users == "all":
            before = np.searchsorted(candidates, task_logs.item[_before(chosen, service)])
            seen += np.bincount(before, minlength=len(candidates))
        of_users = {
            "uids": rows,
            "keys": task_keys,
            "targets": task_logs.item[chosen.targets],
            "touched": np.bincount(user[own], minlength=len(rows)),
            "bounds": bounds(cut, task_logs, chosen),
            **{f"lengths/{s}": lengths for s, (lengths, _rows) in chosen.history.items()},
            **{f"ends/{s}": ends for s, ends in chosen.ends.items()},
        }
        for column, values in of_users.items():
            columns[column].append(values)
    if not columns:
        raise CorpusError(
            f"task {name!r}: no user has the {config.targets} targets and {config.min_history} "
            f"other logs that it asks for (service = {config.service!r}, form = {config.form!r})"
        )
    users = {column: np.concatenate(columns.pop(column)) for column in list(columns)}
    ends = "ends" if config.form == "leave_one_out" else "lengths"  # of all targets, or of the one
    if not any(users[f"{ends}/{s}"].reshape(len(users["keys"]), -1)[:, 0].any() for s in services):
        raise CorpusError(
            f"task {name!r}: no user has a log before the first target (cut = {cut!r}): "
            "are all times alike?"
        )
    for array, values in {
        "keys": users["keys"],
        "group": users["keys"] % np.uint64(GROUPS),
        "targets": users["targets"],
        "candidates": candidates,
    }.items():
        store.write_array(folder / f"{array}.npy", values)
    for s, spool in zip(services, stored, strict=True):
        history = folder / "history" / file.all_services[s]
        offsets = np.concatenate([np.zeros(1, np.int64), users[f"lengths/{s}"].cumsum()])
        store.write_array(history / "offsets.npy", offsets)
        spool.save(history / "items.npy")
        if config.form == "leave_one_out":
            store.write_array(history / "ends.npy", users[f"ends/{s}"])
    if config.negatives:
        if config.negatives_from == "uniform":
            weights = None
        elif config.users == "all":
            weights = seen
        else:
            weights = _logs_of(clean, name, uids[splits["pretraining"]], service, candidates)
        _write_negatives(
            engine, name, config, users, touched, candidates, weights, folder / "negatives.npy"
        )
    touched.path.unlink()
    if config.segments:
        before, recent = _behaviours(clean, name, file, users["uids"], users["bounds"])
        store.write_array(folder / "segment.npy", segment(before, recent, users["keys"]))
    record = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "services": [file.all_services[s] for s in services],
        **config.record,
        "cut": cut,
        "n_users": len(users["keys"]),
        "n_candidates": len(candidates),
    }
    write_json(folder / "task.json", record)
    Task(folder, record).refuse_leaks(
        keys[splits["pretraining"]],
        item_service,
        file.all_services,
        file.services,
        unique=file.logs.deduplicate == "latest",
    )


def _blocks(clean: CleanLogs, logs: Any, cut: str) -> Iterator[list[Ints]]:
    """``COLUMNS`` of the logs of whole users, those of about ``engine.CHUNK`` logs at a time."""
    order = ("uid", *(() if cut == "order" else ("time",)), "position", "item")
    held = [np.zeros(0, np.int64) for _ in COLUMNS]
    for chunk in clean.engine.stream(logs.mutate(time=logs.time.fill_null(0)), COLUMNS, order):
        held = [np.concatenate(parts) for parts in zip(held, chunk, strict=True)]
        end = np.searchsorted(held[0], held[0][-1])  # the last user may go on in the next chunk
        if end:
            yield [column[:end] for column in held]
        held = [column[end:] for column in held]
    if len(held[0]):
        yield held


def _write_negatives(
    engine: Engine,
    name: str,
    config: TaskConfig,
    users: Mapping[str, NDArray[Any]],
    touched: store.Spool,
    candidates: Ints,
    weights: Ints | None,
    path: Path,
) -> None:
    """Draw the negatives of every target, and write them.

    Args:
        users: ``keys`` of the users, and how many items each ``touched``.
        touched: those items, user by user.
        weights: as ``draw_negatives`` has them.
    """
    shape = (config.targets, config.negatives)
    drawn = store.Spool(engine.folder / f"task_{name}_negatives", int(candidates.max()), shape)
    counts = users["touched"]
    ends = np.cumsum(counts)
    for part in user_blocks(counts + config.targets * config.negatives, tasks.PART):
        user = np.repeat(np.arange(part.stop - part.start), counts[part])
        item = touched.read(int(ends[part.start] - counts[part.start]), int(ends[part.stop - 1]))
        keys = users["keys"][part]
        drawn.append(draw_negatives(name, config, user, item, keys, candidates, weights))
    drawn.save(path)


def _users(clean: CleanLogs, name: str, uids: Ints) -> Any:
    batch = pa.record_batch({"uid": uids})
    return clean.engine.load(name, [batch], batch.schema)


def _able(logs: Any, config: TaskConfig, service: int) -> Any:
    """uid: users with the logs that a task asks for."""
    if config.form == "first":
        logs = logs.mutate(clock=_.time - _.time % DAY if config.cut == "day" else _.time)
    own = logs.filter(logs.service == service).group_by("uid")
    if config.form == "first":
        first = own.aggregate(first=_.clock.min())
        earlier = logs.join(first, "uid").filter(_.clock < _.first, _.service != service)
        found, least = earlier.group_by("uid").aggregate(n=_.count()), config.min_history
    else:
        n = _.item.nunique() if config.form == "random" else _.count()
        found, least = own.aggregate(n=n), config.targets + config.min_history
    return found.filter(_.n >= least)


def _timed(clean: CleanLogs, logs: Any, name: str, file: CorpusFile) -> bool:
    """Whether the logs of a task have times.

    Raises:
        CorpusError: only some have, and the task would compare them; or its form does not go with
            what they have.
    """
    config = file.tasks[name]
    found = logs.group_by("service").aggregate(
        timed=logs.time.notnull().any(), untimed=logs.time.isnull().any()
    )
    service, *flags = clean.engine.fetch(
        found, {"service": np.int64, "timed": np.bool_, "untimed": np.bool_}, ("service",)
    )
    timed, untimed = ([file.all_services[s] for s in service[flag].tolist()] for flag in flags)
    if config.form == "first" and untimed:
        raise CorpusError(
            f"task {name!r}: form = 'first' compares times, and there are logs without of "
            f"{', '.join(untimed)}"
        )
    if config.form == "random":
        if config.service in timed and config.service not in untimed:
            raise CorpusError(
                f"task {name!r}: form = 'random' is for logs without times, and all logs of "
                f"{config.service!r} have them; use form = 'last'"
            )
    elif timed and untimed and config.cut != "order":
        raise CorpusError(
            f"task {name!r}: there are logs without times of {', '.join(untimed)}, and with times "
            f"of {', '.join(timed)}; which were earlier is unknown. tasks.{name}.cut = 'order' "
            f"needs no times and keeps histories of {config.service!r} alone"
        )
    return not untimed


def _logs_of(clean: CleanLogs, name: str, uids: Ints, service: int, candidates: Ints) -> Ints:
    """Logs of each candidate that some users have. [candidates]"""
    users = _users(clean, f"task_{name}_counted", uids)
    logs = clean.logs.filter(clean.logs.service == service).semi_join(users, "uid")
    counted = logs.group_by("item").aggregate(n=_.count())
    item, n = clean.engine.fetch(counted, {"item": np.int64, "n": np.int64}, ("item",))
    found = np.zeros(len(candidates), np.int64)
    found[np.searchsorted(candidates, item)] = n
    return found


def _before(chosen: Chosen, service: int) -> Ints:
    """Rows in histories before the first target. [logs]"""
    lengths, rows = chosen.history[service]
    ends = chosen.ends[service][:, 0] if chosen.ends else lengths
    before: Ints = rows[spans(np.cumsum(lengths) - lengths, ends)]
    return before


def _behaviours(
    clean: CleanLogs, name: str, file: CorpusFile, uids: Ints, bound: Ints
) -> tuple[Ints, Ints]:
    """Each user's behaviours before a time, and in the month before it, over all services."""
    batch = pa.record_batch({"uid": uids, "bound": bound})
    times = clean.logs.join(clean.engine.load(f"task_{name}_bounds", [batch], batch.schema), "uid")
    earlier = times.time < times.bound
    found = times.group_by("uid").aggregate(
        before=earlier.sum().fill_null(0),
        recent=(earlier & (times.time >= times.bound - int(MONTH))).sum().fill_null(0),
        untimed=times.time.isnull().sum(),
    )
    columns = dict.fromkeys(("before", "recent", "untimed"), np.int64)
    before, recent, untimed = clean.engine.fetch(found, columns, ("uid",))
    if untimed.any():
        raise CorpusError(
            f"task {name!r}: segments = true, but {untimed.sum():,} logs of its users have no time"
        )
    return before, recent
