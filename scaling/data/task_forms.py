"""How a downstream task is made from logs, and written into the folder of a corpus."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scaling.data import store
from scaling.data.corpus import CorpusError
from scaling.data.engine import Engine
from scaling.data.logs import CleanLogs
from scaling.data.recipe import CorpusFile
from scaling.data.tasks import GROUPS, SCHEMA_VERSION, TaskLogs, build_task
from scaling.files import write_json


def write_task(
    clean: CleanLogs,
    name: str,
    file: CorpusFile,
    uids: NDArray[np.int64],
    keys: NDArray[np.uint64],
    downstream: NDArray[np.int64],
    folder: Path,
) -> None:
    """Write a task.

    Args:
        uids: of all users, ascending. [users]
        keys: hashes of all users, ascending. [users]
        downstream: the downstream users, as rows of both.

    Raises:
        CorpusError: the logs cannot make the task.
    """
    engine, config = clean.engine, file.tasks[name]
    service = file.all_services.index(config.service)
    names = [config.service, *(s for s in file.services if s != config.service)]
    services = [file.all_services.index(s) for s in names]
    logs = clean.logs.filter(clean.logs.service.isin(services))
    if config.users == "downstream":
        chosen = pa.record_batch({"uid": uids[downstream]})
        logs = logs.semi_join(engine.load(f"users_{name}", [chosen], chosen.schema), "uid")
    able = logs.filter(logs.service == service).group_by("uid").aggregate(n=lambda t: t.count())
    able = able.filter(able.n >= config.targets + config.min_history)
    logs = logs.semi_join(able, "uid")
    timed = _timed(engine, logs, name, file)
    clock = () if config.cut == "order" else ("time",)
    order = ("uid", *clock, "position", "item")
    columns = {
        "uid": np.int64,
        "service": np.int64,
        "item": np.int64,
        "time": np.int64,
        "position": np.int64,
    }
    logs = logs.mutate(time=logs.time.fill_null(0))
    uid, service_of, item, time, position = engine.fetch(logs, columns, order)
    rows, user = np.unique(uid, return_inverse=True)
    task_keys = keys[np.searchsorted(uids, rows)]
    if not len(task_keys):
        raise CorpusError(
            f"task {name!r}: no user has the {config.targets} targets and "
            f"{config.min_history} earlier logs of {config.service!r} that it asks for"
        )
    (candidates,) = engine.fetch(
        clean.items.filter(clean.items.service == service), {"item": np.int64}, ("item",)
    )
    arrays = build_task(
        name,
        config,
        TaskLogs(user, service_of, item, time, position, timed),
        task_keys,
        service,
        services,
        candidates,
        file.users.max_logs,
    )
    store.write_array(folder / "keys.npy", task_keys)
    store.write_array(folder / "group.npy", task_keys % np.uint64(GROUPS))
    store.write_array(folder / "targets.npy", arrays.targets)
    store.write_array(folder / "negatives.npy", arrays.negatives)
    store.write_array(folder / "candidates.npy", candidates)
    for s, ragged in arrays.history.items():
        store.write_ragged(folder / "history" / file.all_services[s], *ragged)
    record = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "services": [file.all_services[s] for s in arrays.history],
        **config.model_dump(mode="json"),
        "cut": arrays.cut,
        "n_users": len(task_keys),
        "n_candidates": len(candidates),
    }
    write_json(folder / "task.json", record)


def _timed(engine: Engine, logs: Any, name: str, file: CorpusFile) -> bool:
    """Whether the logs of a task have times.

    Raises:
        CorpusError: only some have, and the task would compare them.
    """
    found = logs.group_by("service").aggregate(
        timed=logs.time.notnull().any(), untimed=logs.time.isnull().any()
    )
    service, *flags = engine.fetch(
        found, {"service": np.int64, "timed": np.bool_, "untimed": np.bool_}, ("service",)
    )
    timed, untimed = (
        ", ".join(file.all_services[s] for s in service[flag].tolist()) for flag in flags
    )
    if timed and untimed and file.tasks[name].cut != "order":
        raise CorpusError(
            f"task {name!r}: there are logs without times of {untimed}, and with times of {timed}; "
            f"which were earlier is unknown. tasks.{name}.cut = 'order' needs no times and keeps "
            f"histories of {file.tasks[name].service!r} alone"
        )
    return not untimed
