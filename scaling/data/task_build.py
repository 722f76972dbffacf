"""Making a task from clean logs, and writing it into the folder of a corpus.

Only logs of the task's users leave the engine, in a total order, so both engines give the same
bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ibis import _
from numpy.typing import NDArray

from scaling.data import store
from scaling.data.corpus import CorpusError, load_array
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
    refuse_leaks,
    segment,
)
from scaling.data.tasks import GROUPS, SCHEMA_VERSION, Task
from scaling.files import write_json
from scaling.packing import spans

Ints = NDArray[np.int64]
COLUMNS = dict.fromkeys(("uid", "service", "item", "time", "position"), np.int64)


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
        logs = logs.semi_join(_users(clean, f"users_{name}", uids[splits["downstream"]]), "uid")
    everyone, logs = logs, logs.semi_join(_able(logs, config, service), "uid")
    # A user whose first log has no time is able to nothing; the reason is told of everyone.
    timed = _timed(clean, everyone if config.form == "first" else logs, name, file)
    order = ("uid", *(() if config.cut == "order" else ("time",)), "position", "item")
    logs = logs.mutate(time=logs.time.fill_null(0))
    uid, service_of, item, time, position = engine.fetch(logs, COLUMNS, order)
    rows, user = np.unique(uid, return_inverse=True)
    task_logs = TaskLogs(user, service_of, item, time, position, timed)
    if not len(rows):
        raise CorpusError(
            f"task {name!r}: no user has the {config.targets} targets and {config.min_history} "
            f"other logs that it asks for (service = {config.service!r}, form = {config.form!r})"
        )
    task_keys = keys[np.searchsorted(uids, rows)]
    (candidates,) = engine.fetch(
        clean.items.filter(clean.items.service == service), {"item": np.int64}, ("item",)
    )
    chosen = choose(name, config, task_logs, task_keys, service, services, file.users.max_logs)
    refuse_leaks(name, config, task_logs, chosen)
    for array, values in {
        "keys": task_keys,
        "group": task_keys % np.uint64(GROUPS),
        "targets": task_logs.item[chosen.targets],
        "candidates": candidates,
    }.items():
        store.write_array(folder / f"{array}.npy", values)
    for s, (lengths, kept) in chosen.history.items():
        history = folder / "history" / file.all_services[s]
        store.write_ragged(history, lengths, task_logs.item[kept])
        if chosen.ends:
            store.write_array(history / "ends.npy", chosen.ends[s])
    if config.negatives:
        own = task_logs.service == service
        weights = None
        if config.negatives_from == "popularity":
            pretraining = uids[splits["pretraining"]]
            if config.users == "all":
                item, n = _logs_before(task_logs, chosen, service)
            else:
                item, n = _logs_of(clean, _users(clean, f"counted_{name}", pretraining), service)
            weights = np.zeros(len(candidates), np.int64)
            weights[np.searchsorted(candidates, item)] = n
        drawn = draw_negatives(
            name, config, task_logs.user[own], task_logs.item[own], task_keys, candidates, weights
        )
        store.write_array(folder / "negatives.npy", drawn)
    if config.segments:
        before, recent = _behaviours(clean, name, file, rows, bounds(chosen, task_logs))
        store.write_array(folder / "segment.npy", segment(before, recent, task_keys))
    record = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "services": [file.all_services[s] for s in chosen.history],
        **config.record,
        "cut": chosen.cut,
        "n_users": len(task_keys),
        "n_candidates": len(candidates),
    }
    write_json(folder / "task.json", record)
    Task(folder, record).refuse_leaks(
        keys[splits["pretraining"]],
        load_array(folder.parents[1] / "items/service.npy"),
        file.all_services,
        file.services,
        unique=file.logs.deduplicate == "latest",
    )


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


def _logs_of(clean: CleanLogs, users: Any, service: int) -> tuple[Ints, Ints]:
    """Items of a service that some users have logs of, and how many."""
    logs = clean.logs.filter(clean.logs.service == service).semi_join(users, "uid")
    counted = logs.group_by("item").aggregate(n=_.count())
    item, n = clean.engine.fetch(counted, {"item": np.int64, "n": np.int64}, ("item",))
    return item, n


def _logs_before(logs: TaskLogs, chosen: Chosen, service: int) -> tuple[Ints, Ints]:
    """Items of a service in histories before the first target, and how often."""
    lengths, rows = chosen.history[service]
    ends = chosen.ends[service][:, 0] if chosen.ends else lengths
    before = rows[spans(np.cumsum(lengths) - lengths, ends)]
    item, n = np.unique(logs.item[before], return_counts=True)
    return item, n


def _behaviours(
    clean: CleanLogs, name: str, file: CorpusFile, uids: Ints, bound: Ints
) -> tuple[Ints, Ints]:
    """Each user's behaviours before a time, and in the month before it, over all services."""
    batch = pa.record_batch({"uid": uids, "bound": bound})
    times = clean.logs.join(clean.engine.load(f"bounds_{name}", [batch], batch.schema), "uid")
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
