"""Filling the folder of a corpus: users split, items numbered and tokenised, histories, tasks.

The order of every query is total, and no number depends on threads or machine, so the same logs and
corpus file give the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
from numpy.typing import NDArray

from scaling.data import store, tokenizer
from scaling.data.corpus import SPLITS, CorpusError
from scaling.data.logs import CleanLogs, Progress, clean_logs
from scaling.data.recipe import CorpusFile, Users
from scaling.data.scratch import Scratch
from scaling.data.tasks import GROUPS, TaskLogs, build_task
from scaling.data.tasks import SCHEMA_VERSION as TASK_VERSION
from scaling.files import write_json
from scaling.packing import spans

Ints = NDArray[np.int64]
STAGES = ("logs", "users", "items", "histories", "tasks", "digests")


@dataclass(frozen=True)
class Built:
    """What a filled folder does not say of itself."""

    steps: list[dict[str, Any]]
    """Counts of every step of cleaning."""
    splits: dict[str, int]
    """Users of pretraining, validation and pool."""
    vocab_size: int


def build(
    file: CorpusFile, corpus_file: Path, scratch: Path, staged: Path, report: Progress
) -> Built:
    """Fill ``staged``.

    Args:
        scratch: folder for the database; the caller removes it.
        report: told of each of ``STAGES`` as it begins.

    Raises:
        CorpusError: the logs cannot make the corpus.
    """
    stage = iter(range(len(STAGES)))

    def begin(name: str) -> None:
        report(name, next(stage), len(STAGES))

    db = Scratch(scratch)
    try:
        begin("logs")
        clean = clean_logs(db, file, corpus_file.parent, str(corpus_file))
        begin("users")
        columns: dict[str, Any] = {"key": np.uint64, "draw": np.uint64}
        columns |= {f"n{i}": np.int64 for i in range(len(file.services))}
        keys, draws, *n = db.fetch(clean.users, columns, ("key",))
        counts = np.stack(n, axis=1)
        splits = split_users(counts, keys, draws, file.users, file.services, str(corpus_file))
        kept = np.concatenate([splits[s] for s in SPLITS])
        rows = db.create("rows", ibis.memtable({"key": keys[kept], "row": np.arange(len(kept))}))
        begin("items")
        n_items = int(db.value(clean.items.count()))
        (staged / "items").mkdir(parents=True)
        vocab_size = _write_items(clean, rows, len(splits["pretraining"]), file, staged)
        begin("histories")
        store.write_array(staged / "users" / "keys.npy", keys[kept])
        own = clean.logs.join(rows, "key")
        for index, service in enumerate(file.services):
            _write_histories(
                db,
                own.filter(own.service == index),
                counts[kept, index],
                file.users.max_logs,
                n_items,
                staged / "users" / service,
            )
        begin("tasks")
        for name in file.tasks:
            _write_task(clean, name, file, keys, splits["downstream"], staged / "tasks" / name)
    finally:
        db.close()
    begin("digests")
    return Built(clean.steps, {s: len(splits[s]) for s in SPLITS}, vocab_size)


def split_users(
    counts: Ints,
    keys: NDArray[np.uint64],
    draws: NDArray[np.uint64],
    rules: Users,
    services: tuple[str, ...],
    where: str,
) -> dict[str, Ints]:
    """Users of each split, in order of their hash.

    Args:
        counts: logs in each service of pretraining. [users, services]
        keys: hashes that order users. [users]
        draws: hashes that split them. [users]

    Returns:
        Rows of users in ``pretraining``, ``validation``, ``pool`` and ``downstream``.

    Raises:
        CorpusError: too few users have logs in every service of pretraining.
    """
    drawn = np.argsort(draws, kind="stable")
    fewest = counts.min(axis=1)
    eligible = drawn[(fewest >= rules.eligible_logs)[drawn]]
    n_downstream = round(rules.downstream * len(eligible))
    downstream = eligible[len(eligible) - n_downstream :]
    able = fewest >= rules.min_logs
    if not able.any():
        raise CorpusError(
            f"{where}: no user has {rules.min_logs} or more logs in each of the services "
            f"{', '.join(services)}"
        )
    free = able.copy()
    free[downstream] = False
    # By their keys: of the highest draws downstream has taken all eligible users, and held-out
    # users drawn there would be the light ones.
    candidates = np.flatnonzero(free)
    candidates = candidates[np.argsort(keys[candidates])]
    source = candidates if rules.held_out_from == "pretraining" else downstream[able[downstream]]
    n_held = rules.validation + rules.pool
    held = source[len(source) - n_held :] if n_held <= len(source) else source
    if rules.held_out_from == "pretraining":
        candidates = candidates[: max(0, len(candidates) - n_held)]
    if len(held) < n_held or not len(candidates):
        raise CorpusError(
            f"{where}: users.validation = {rules.validation} and users.pool = {rules.pool} "
            f"leave none for pretraining: {len(source)} users have {rules.min_logs} or more logs "
            f"in each of the services {', '.join(services)}"
            + (" and are downstream users" if rules.held_out_from == "downstream" else "")
        )
    splits = {
        "pretraining": candidates,
        "validation": held[: rules.validation],
        "pool": held[rules.validation :],
        "downstream": downstream,
    }
    return {name: rows[np.argsort(keys[rows])] for name, rows in splits.items()}


def _write_items(
    clean: CleanLogs, rows: Any, n_pretraining: int, file: CorpusFile, staged: Path
) -> int:
    """Learn the tokenizer and write the item table; returns the size of the vocabulary."""
    db, items = clean.db, clean.items
    seen = clean.logs.filter(clean.logs.service < len(file.services))
    seen = seen.join(rows.filter(rows["row"] < n_pretraining), "key").select("item").distinct()
    learnt = items.semi_join(seen, "item").select("text").distinct()
    bpe = tokenizer.train(_texts(db, learnt), file.tokenizer.vocab_size, file.all_services)
    (staged / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")

    distinct = items.select("text").distinct()
    chunks = list(tokenizer.encode(bpe, _texts(db, distinct)))
    lengths = np.concatenate([n for n, _ in chunks])
    tokens = np.concatenate([t for _, t in chunks]).astype(np.min_scalar_type(bpe.get_vocab_size()))
    starts = np.cumsum(lengths) - lengths
    numbered = db.create(
        "text_numbers",
        distinct.mutate(number=ibis.row_number().over(order_by=distinct.text)),
    )
    joined = items.join(numbered, "text").select("item", "service", "number")
    service, number = db.fetch(joined, {"service": np.int64, "number": np.int64}, ("item",))

    def encoded() -> Iterator[Any]:
        for at in range(0, len(number), tokenizer.CHUNK):
            texts = number[at : at + tokenizer.CHUNK]
            ends = np.cumsum(lengths[texts] + 1)
            out = np.empty(ends[-1], np.int64)
            heads = ends - lengths[texts] - 1
            body = np.ones(len(out), bool)
            body[heads] = False
            out[heads] = service[at : at + tokenizer.CHUNK] + 1
            out[body] = tokens[spans(starts[texts], lengths[texts])]
            yield out

    sizes = lengths[number] + 1
    total = int(sizes.sum())
    folder = staged / "items"
    store.write_stream(folder / "tokens.npy", total, bpe.get_vocab_size() - 1, encoded())
    store.write_array(
        folder / "offsets.npy", np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])
    )
    store.write_array(folder / "service.npy", service)
    return int(bpe.get_vocab_size())


def _texts(db: Scratch, table: Any) -> Iterator[str]:
    for (texts,) in db.stream(table, ("text",), ("text",)):
        yield from texts


def _write_histories(
    db: Scratch, logs: Any, counts: Ints, cap: int, n_items: int, folder: Path
) -> None:
    """Write the last ``cap`` logs of every user in one service, as they stream by in order."""
    ends = np.cumsum(counts)
    kept = np.minimum(counts, cap)

    def latest() -> Iterator[Any]:
        at = 0
        for row, item in db.stream(logs, ("row", "item"), ("row", "time", "position", "item")):
            place = np.arange(at, at + len(row))
            at += len(row)
            yield item[place >= ends[row] - cap]

    offsets = np.concatenate([np.zeros(1, np.int64), kept.cumsum()])
    store.write_array(folder / "offsets.npy", offsets)
    store.write_stream(folder / "items.npy", int(offsets[-1]), n_items - 1, latest())


def _write_task(
    clean: CleanLogs, name: str, file: CorpusFile, keys: Any, downstream: Ints, folder: Path
) -> None:
    db, config = clean.db, file.tasks[name]
    service = file.all_services.index(config.service)
    names = [config.service, *(s for s in file.services if s != config.service)]
    services = [file.all_services.index(s) for s in names]
    logs = clean.logs.filter(clean.logs.service.isin(services))
    if config.users == "downstream":
        chosen = db.create(f"users_{name}", ibis.memtable({"key": keys[downstream]}))
        logs = logs.semi_join(chosen, "key")
    able = logs.filter(logs.service == service).group_by("key").aggregate(n=lambda t: t.count())
    able = able.filter(able.n >= config.targets + config.min_history)
    logs = logs.semi_join(able, "key")
    timed = _timed(db, logs, name, file)
    clock = () if config.cut == "order" else ("time",)
    order = ("key", *clock, "position", "item")
    columns = {
        "key": np.uint64,
        "service": np.int64,
        "item": np.int64,
        "time": np.int64,
        "position": np.int64,
    }
    logs = logs.mutate(time=logs.time.fill_null(0))
    key, service_of, item, time, position = db.fetch(logs, columns, order)
    task_keys, user = np.unique(key, return_inverse=True)
    if not len(task_keys):
        raise CorpusError(
            f"task {name!r}: no user has the {config.targets} targets and "
            f"{config.min_history} earlier logs of {config.service!r} that it asks for"
        )
    (candidates,) = db.fetch(
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
        "schema_version": TASK_VERSION,
        "name": name,
        "services": [file.all_services[s] for s in arrays.history],
        **config.model_dump(mode="json"),
        "cut": arrays.cut,
        "n_users": len(task_keys),
        "n_candidates": len(candidates),
    }
    write_json(folder / "task.json", record)


def _timed(db: Scratch, logs: Any, name: str, file: CorpusFile) -> bool:
    """Whether the logs of a task have times.

    Raises:
        CorpusError: only some have, and the task would compare them.
    """
    found = logs.group_by("service").aggregate(
        timed=logs.time.notnull().any(), untimed=logs.time.isnull().any()
    )
    service, *flags = db.fetch(
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
