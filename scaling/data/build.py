"""Filling the folder of a corpus: users split, items numbered and tokenised, histories, tasks.

The order of every query is total, and no number depends on threads or machine, so the same logs and
corpus file give the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scaling.data import store, tokenizer
from scaling.data.corpus import SPLITS, CorpusError, Progress
from scaling.data.engine import Engine
from scaling.data.logs import CleanLogs, clean_logs
from scaling.data.recipe import CorpusFile, Users
from scaling.data.task_build import write_task
from scaling.packing import spans

Ints = NDArray[np.int64]
STAGES = ("logs", "users", "items", "histories", "tasks", "digests")


@dataclass(frozen=True)
class Built:
    """What a filled folder does not say of itself."""

    steps: list[dict[str, Any]]
    """Counts of every step of cleaning."""
    times: dict[str, dict[str, int | None]]
    """First and last time of each service, and its logs without one."""
    splits: dict[str, int]
    """Users of pretraining, validation and pool."""
    vocab_size: int


def build(
    engine: Engine,
    file: CorpusFile,
    corpus_file: Path,
    staged: Path,
    malformed: Path,
    report: Progress,
) -> Built:
    """Fill ``staged``.

    Args:
        malformed: file that gets the malformed rows.
        report: told of each of ``STAGES`` as it begins.

    Raises:
        CorpusError: the logs cannot make the corpus.
    """
    stage = iter(range(len(STAGES)))

    def begin(name: str) -> None:
        report(next(stage), len(STAGES), name)

    begin("logs")
    clean = clean_logs(engine, file, corpus_file.parent, str(corpus_file), malformed)
    begin("users")
    columns = ("uid", "key", "draw", *(f"n{i}" for i in range(len(file.services))))
    users = engine.stream(clean.users, columns, ("uid",))
    chunks = [(uid, _hashes(key), _hashes(draw), *n) for uid, key, draw, *n in users]
    uids, keys, draws, *n = (np.concatenate(c) for c in zip(*chunks, strict=True))
    counts = np.stack(n, axis=1)
    splits = split_users(counts, keys, draws, file.users, file.services, str(corpus_file))
    kept = np.concatenate([splits[s] for s in SPLITS])
    batch = pa.record_batch({"uid": uids[kept], "row": np.arange(len(kept))})
    logs = clean.logs.filter(clean.logs.service < len(file.services))
    logs = logs.join(engine.load("rows", [batch], batch.schema), "uid")
    begin("items")
    (staged / "items").mkdir(parents=True)
    learnt = logs.filter(logs.row < len(splits["pretraining"])).select("item").distinct()
    vocab_size, n_items = _write_items(clean, learnt, file, staged)
    begin("histories")
    store.write_array(staged / "users" / "keys.npy", keys[kept])
    _write_histories(engine, logs, counts[kept], file, n_items, staged / "users")
    begin("tasks")
    for name in file.tasks:
        folder = staged / "tasks" / name
        write_task(clean, name, file, uids, keys, splits, folder)
    begin("digests")
    return Built(clean.steps, clean.times, {s: len(splits[s]) for s in SPLITS}, vocab_size)


def _hashes(texts: Any) -> NDArray[np.uint64]:
    """Numbers out of 16 hexadecimal digits each."""
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)


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


def _write_items(clean: CleanLogs, learnt: Any, file: CorpusFile, staged: Path) -> tuple[int, int]:
    """Learn the tokenizer and write the item table.

    Args:
        learnt: item: those of pretraining users.

    Returns:
        Entries of the vocabulary and number of items.
    """
    engine, items = clean.engine, clean.items
    texts = items.semi_join(learnt, "item").select("text").distinct()
    sample = texts.order_by(texts.text.hexdigest("sha256")).limit(file.tokenizer.sample)
    bpe = tokenizer.train(_texts(engine, sample), file.tokenizer.vocab_size, file.all_services)
    (staged / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")
    vocab_size = int(bpe.get_vocab_size())
    distinct = engine.store("distinct_texts", items.select("text").distinct())
    lengths, tokens = _encoded_texts(bpe, _texts(engine, distinct), engine.folder / "tokens.bin")
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    numbered = distinct.mutate(number=ibis.row_number().over(order_by=distinct.text))
    joined = items.join(numbered, "text").select("item", "service", "number")
    kinds = {"service": len(file.all_services), "number": len(lengths)}
    types = {column: np.min_scalar_type(n) for column, n in kinds.items()}
    service, number = engine.fetch(joined, types, ("item",))

    def encoded() -> Iterator[Any]:
        for at in range(0, len(number), tokenizer.CHUNK):
            texts = number[at : at + tokenizer.CHUNK]
            sizes = lengths[texts].astype(np.int64)
            ends = np.cumsum(sizes + 1)
            out = np.empty(ends[-1], np.int64)
            heads = ends - sizes - 1
            body = np.ones(len(out), bool)
            body[heads] = False
            out[heads] = service[at : at + tokenizer.CHUNK].astype(np.int64) + 1
            out[body] = tokens[spans(starts[texts], sizes)]
            yield out

    offsets = np.zeros(len(number) + 1, np.int64)
    np.cumsum(lengths[number] + np.uint8(1), out=offsets[1:])
    folder = staged / "items"
    store.write_stream(folder / "tokens.npy", int(offsets[-1]), vocab_size - 1, encoded())
    store.write_array(folder / "offsets.npy", offsets)
    store.write_array(folder / "service.npy", service)
    return vocab_size, len(number)


def _encoded_texts(
    bpe: Tokenizer, texts: Iterator[str], path: Path
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Tokens of each text, and all tokens, which lie in a scratch file. [texts], [tokens]"""
    kind = np.min_scalar_type(bpe.get_vocab_size() - 1)
    lengths = []
    with open(path, "xb") as f:
        for n, tokens in tokenizer.encode(bpe, texts):
            lengths.append(n.astype(np.uint8))
            f.write(tokens.astype(kind).data)
    return np.concatenate(lengths), np.memmap(path, kind, mode="r")


def _texts(engine: Engine, table: Any) -> Iterator[str]:
    for (texts,) in engine.stream(table, ("text",), ("text",)):
        yield from texts


def _write_histories(
    engine: Engine, logs: Any, counts: Ints, file: CorpusFile, n_items: int, folder: Path
) -> None:
    """Write every user's last logs in each service of pretraining.

    Args:
        logs: row, service, item, time, position: all logs of the users kept.
        counts: logs of each user in each service. [users, services]
    """
    cap = file.users.max_logs

    def parts() -> Iterator[tuple[int, Ints, Ints]]:
        """Service, rows of users and items of logs, by service and then by user and time."""
        columns = ("service", "row", "item")
        for service, row, item in engine.stream(
            logs, columns, ("service", "row", "time", "position", "item")
        ):
            bounds = np.searchsorted(service, np.arange(len(file.services) + 1))
            for s in np.flatnonzero(np.diff(bounds)).tolist():
                here = slice(bounds[s], bounds[s + 1])
                yield s, row[here], item[here]

    for s, of_service in groupby(parts(), key=itemgetter(0)):
        lengths = np.minimum(counts[:, s], cap)
        offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        target = folder / file.services[s]
        store.write_array(target / "offsets.npy", offsets)
        latest = _latest(of_service, np.cumsum(counts[:, s]), cap)
        store.write_stream(target / "items.npy", int(offsets[-1]), n_items - 1, latest)


def _latest(parts: Iterator[tuple[int, Ints, Ints]], ends: Ints, cap: int) -> Iterator[Ints]:
    """Items of the last ``cap`` logs of each user.

    Args:
        parts: service, rows of users and items, all logs of one service in order.
        ends: number of logs up to and with each user's. [users]
    """
    at = 0
    for _, row, item in parts:
        place = np.arange(at, at + len(row))
        at += len(row)
        yield item[place >= ends[row] - cap]
