"""User and item features of a whole corpus, as shards on disk: ``clue-scaling embed``.

    <folder>/manifest.json          what it is; ``complete`` once every file below is there
             users.keys.npy         keys of the users, in the order of all rows
             users-000000.npy ...   z of their services side by side, so many users a shard
             items.keys.npy         numbers of the items in the corpus
             items-000000.npy ...   h
             parts/<file>.json      the record of each finished file

Users lie in the order of the corpus (or of the task), whoever computes them. What a batch is made
of depends on the shard alone, so a shard has the same bytes however often the work is interrupted
and by however many processes it is shared (``shards``), on the same kind of device with the same
number of threads. In memory is one shard, and the embeddings of one batch
(``features.CHUNK_ITEMS``).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaling.data.corpus import Corpus
from scaling.data.tasks import Task
from scaling.files import read_json
from scaling.models.clue import ContrastiveEncoder
from scaling.rundir import RunDir
from scaling.train.export import exported, load_encoder
from scaling.transfer.features import Logs, device, embed_items, embed_users
from scaling.transfer.foreign import as_read_by
from scaling.transfer.reduce import Reduction
from scaling.transfer.shards import EmbedError, Kind, Part, Progress, Shards, npy, parquet

SHARD_BYTES = 256 << 20
"""Of a shard's features, unless its users are said."""
WHAT: dict[str, tuple[Kind, ...]] = {
    "users": ("users",), "items": ("items",), "both": ("users", "items")
}  # fmt: skip
MEASURED_S = 2.0
"""A measurement of the pace takes at least so long, if the shard has so many users. [seconds]"""


@dataclass(frozen=True)
class Wanted:
    """What is to be written, besides encoder and corpus."""

    what: Literal["users", "items", "both"] = "users"
    task: str | None = None
    """Users of this task, by their histories before the first target; None: all users of
    pretraining, validation and pool, by all their logs."""
    services: tuple[str, ...] | None = None
    """Whose z stand side by side, in this order; None: all that there are logs of, sorted."""
    items_per_user: int | None = None
    """Cap S on the most recent items, per service; None: as in pretraining. [items]"""
    dtype: Literal["float16", "float32"] = "float16"
    format: Literal["npy", "parquet"] = "npy"
    shard_users: int | None = None
    """Users of a shard; None, and of items: as many as ``SHARD_BYTES`` hold."""
    unknown: str | None = None
    """Service of the encoder's pretraining whose token foreign services get (``foreign``)."""
    reduction: Reduction | None = None


class Embedding:
    """Features of one corpus by one encoder, on their way into a folder.

    Args:
        step: of the export; None: the last one.

    Raises:
        EmbedError: a service, a type or a size is none that there is; the reduction is of another
            encoder or lacks a service.
        RecordError: there is no such export.
        CorpusError: there is no such task.
    """

    def __init__(
        self, run: RunDir, corpus: Corpus, folder: Path, wanted: Wanted, step: int | None = None
    ):
        self.run, self.corpus, self.wanted = run, corpus, wanted
        self.config = run.spec()
        there = exported(run)
        self.step = max(there, default=0) if step is None else step
        if self.step not in there:
            load_encoder(run, step)  # which says what there is
        encoder = read_json(there[self.step] / "config.json")["sha256"]
        task = None if wanted.task is None else Task.open(corpus, wanted.task)
        logged = corpus.card.services if task is None else task.services
        self.services = self._chosen(corpus.services if wanted.what == "items" else logged)
        self.keys = {
            "users": corpus.keys if task is None else task.keys,
            "items": np.sort(np.concatenate([corpus.service_items(s) for s in self.services])),
        }
        self._histories: dict[str, Logs] = {}
        if wanted.what != "items":
            self._histories = {
                s: corpus.users(s) if task is None else task.history(s) for s in self.services
            }
        reduction, self.width = wanted.reduction, self.config.model.feature_width
        if reduction is not None:
            if reduction.encoder_sha256 != encoder:
                raise EmbedError(
                    f"the reduction is of the encoder {reduction.encoder_sha256[:16]}, and step "
                    f"{self.step} of run {run.run_key} is {encoder[:16]}"
                )
            if missing := set(self.services) - set(reduction.matrices):
                raise EmbedError(
                    f"the reduction has no layer for {', '.join(sorted(missing))}; valid: "
                    f"{', '.join(reduction.matrices)}"
                )
            self.width = len(next(iter(reduction.matrices.values())))
        self.dims = {
            "users": self.width * len(self.services), "items": self.config.model.d_model
        }  # fmt: skip
        tables: dict[str, dict[str, Any] | None] = {"users": None, "items": None}
        for kind in WHAT[wanted.what]:
            most = max(1, SHARD_BYTES // (self.dims[kind] * np.dtype(wanted.dtype).itemsize))
            size = wanted.shard_users or most if kind == "users" else most
            tables[kind] = {
                "rows": len(self.keys[kind]),
                "dims": self.dims[kind],
                "shard_rows": size,
                "services": list(self.services),
            }
        if (users := tables["users"]) is not None:
            users["splits"] = dict(corpus.manifest["splits"]) if task is None else None
        self.items_per_user = wanted.items_per_user or self.config.data.items_per_user
        header = {
            "run_key": run.run_key,
            "step": self.step,
            "encoder_sha256": encoder,
            "reduction_sha256": None if reduction is None else reduction.sha256,
            "corpus": corpus.card.name,
            "corpus_digest": corpus.card.digest,
            "task": wanted.task,
            "task_digest": None if task is None else corpus.manifest["tasks"][task.name],
            "items_per_user": self.items_per_user,
            "unknown_service": wanted.unknown,
            "dtype": wanted.dtype,
            "format": wanted.format,
            **tables,
        }
        self.shards = Shards(folder, header, self._parts(header))

    def _chosen(self, there: tuple[str, ...]) -> tuple[str, ...]:
        chosen = self.wanted.services or tuple(sorted(there))
        for service in chosen:
            if service not in there:
                raise EmbedError(
                    f"{self.corpus.path}: no "
                    f"{'items' if self.wanted.what == 'items' else 'logs'} of service {service!r}"
                    f"{'' if self.wanted.task is None else f' in task {self.wanted.task!r}'}; "
                    f"valid: {', '.join(sorted(there))}"
                )
        return chosen

    def _parts(self, header: dict[str, Any]) -> list[Part]:
        suffix, parts = self.wanted.format, []
        for kind in WHAT[self.wanted.what]:
            rows, size = len(self.keys[kind]), header[kind]["shard_rows"]
            if suffix == "npy":
                parts.append(Part(kind, f"{kind}.keys.npy", slice(0, rows), False))
            for number, start in enumerate(range(0, rows, size)):
                name = f"{kind}-{number:06d}.{suffix}"
                parts.append(Part(kind, name, slice(start, min(start + size, rows)), True))
        return parts

    @cached_property
    def model(self) -> ContrastiveEncoder:
        """The encoder, on this process's device."""
        model, _ = load_encoder(self.run, self.step)
        return model.to(device())

    @cached_property
    def texts(self) -> Corpus:
        """The corpus as the encoder reads it."""
        return as_read_by(self.run, self.corpus, unknown=self.wanted.unknown)

    def pace(self, parts: list[Part]) -> tuple[float, int]:
        """Rows of the first shard of ``parts`` embedded a second, and how many were measured.

        Users are in the order of a hash, so that the first ones are like all others.
        """
        part = next(p for p in parts if p.features)
        rows = min(64, part.size)
        self._compute(part, rows)  # what a first call takes longer
        while True:
            start = time.perf_counter()
            self._compute(part, rows)
            elapsed = time.perf_counter() - start
            if elapsed >= MEASURED_S or rows == part.size:
                return rows / elapsed, rows
            rows = min(4 * rows, part.size)

    def write(self, parts: list[Part], progress: Progress | None = None) -> None:
        """Write these files.

        Raises:
            EmbedError: a feature is not finite (a diverged run), or too large for float16.
            OSError: the disk is full; what is finished stays.
        """
        total, finished, begun = sum(p.size for p in parts if p.features), 0, time.monotonic()

        def tell(rows: int) -> None:
            nonlocal finished
            finished += rows
            if progress:
                progress(finished, total, finished / (time.monotonic() - begun + 1e-9))

        for part in parts:
            if part.features:
                data = self._compute(part, part.size, tell)
            else:
                data, keys = npy((part.size,), np.dtype(np.uint64))
                keys[:] = self.keys[part.kind]
            self.shards.publish(part, data)

    def _compute(
        self, part: Part, rows: int, tell: Callable[[int], None] = lambda rows: None
    ) -> memoryview:
        """The file of a part's first ``rows`` rows."""
        shape = rows, self.dims[part.kind]
        data, features = npy(shape, np.dtype(self.wanted.dtype))
        fill = self._fill_users if part.kind == "users" else self._fill_items
        fill(features, part.rows.start, tell)
        if self.wanted.format == "npy":
            return data
        keys = self.keys[part.kind][part.rows.start : part.rows.start + rows]
        return parquet(np.asarray(keys, np.uint64), features)

    def _fill_users(self, out: NDArray[Any], first: int, tell: Callable[[int], None]) -> None:
        stop = first + len(out)
        histories = {s: (o[first : stop + 1], i) for s, (o, i) in self._histories.items()}
        services = out.reshape(len(out), len(histories), self.width)
        layers = [self._layer(s) for s in histories]
        done = 0
        cap = self.items_per_user
        for users, columns, z in embed_users(self.model, self.texts, histories, cap):
            for column, layer in enumerate(layers):
                own = columns == column
                reduced = z[own] if layer is None else z[own] @ layer.T
                services[users[own], column] = self._checked(reduced)
            reached = int(users.max()) + 1
            tell(reached - done)
            done = reached
        tell(len(out) - done)

    def _fill_items(self, out: NDArray[Any], first: int, tell: Callable[[int], None]) -> None:
        items = self.keys["items"][first : first + len(out)].astype(np.int64)
        done = 0
        for h in embed_items(self.model, self.texts, items):
            out[done : done + len(h)] = self._checked(h)
            done += len(h)
            tell(len(h))

    def _layer(self, service: str) -> NDArray[np.float32] | None:
        reduction = self.wanted.reduction
        return None if reduction is None else reduction.matrices[service]

    def _checked(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        largest = float(np.abs(features).max(initial=0.0))
        if not np.isfinite(largest):
            raise EmbedError(
                f"run {self.run.run_key}, step {self.step}: its features hold NaN or infinity; did "
                "the run diverge?"
            )
        if largest > float(np.finfo(self.wanted.dtype).max):
            raise EmbedError(f"a feature is {largest:g}, too large for float16; use float32")
        return features
