"""Preparation: behaviour logs of a corpus file become a corpus.

Everything is written to a scratch folder beside the corpora and published by one rename, so that a
corpus is there or not. Its digest is that of its content.
"""

import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import ibis
import numpy
import pyarrow
import tokenizers

from scaling import __version__
from scaling.config import ConfigError, CorpusCard
from scaling.data.build import Built, build
from scaling.data.card import corpus_card, nominal_card
from scaling.data.corpus import (
    SCHEMA_VERSION,
    Corpus,
    CorpusError,
    Progress,
    content_digest,
    folders,
    read_manifest,
    task_digest,
)
from scaling.data.engine import DuckDB, Engine, EngineName, Spark
from scaling.data.recipe import CorpusFile, read_corpus_file
from scaling.data.scratch import locked, scratch_folder
from scaling.data.sources import refuse_foreign, source_files
from scaling.files import publish, sha256, write_json

MEMORY_OF_CORE = 1 << 30
"""Memory of the database for each core. [bytes]"""


def prepare(
    corpus_file: Path,
    root: Path,
    *,
    engine: EngineName = "duckdb",
    memory: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Prepare a corpus, or find it prepared: then only the source's files are looked at.

    Malformed rows are listed in ``root/corpora/<name>.malformed.txt``, whether they were few enough
    or not.

    Args:
        root: the corpus is published below ``root/corpora``.
        engine: where the relational part runs; the corpus is the same.
        memory: that DuckDB may use [bytes]; None: ``memory_of_database``.
        progress: told of each stage as it begins.

    Returns:
        The folder of the corpus.

    Raises:
        CorpusError: the logs cannot make the corpus, or the disk is full. Nothing is published.
        ConfigError: the corpus file is wrong.
    """
    corpus_file = Path(corpus_file)
    file = read_corpus_file(corpus_file)
    if file.source is None:
        raise CorpusError(f"{corpus_file}: a nominal corpus has no logs to prepare")
    sources = _fingerprint(file, corpus_file)
    for path, manifest in _same_recipe(root, file):
        if manifest["sources"] == sources and _has_tasks(manifest, file):
            Corpus.open(path)  # whole, as far as sizes tell
            return path
    report = progress or (lambda done, total, stage: None)
    corpora = Path(root) / "corpora"
    try:
        corpora.mkdir(parents=True, exist_ok=True)
        with scratch_folder(corpora) as scratch:
            staged = scratch / "corpus"
            malformed = corpora / f"{file.name}.malformed.txt"
            with contextlib.closing(_engine(engine, scratch, memory)) as opened:
                built = build(opened, file, corpus_file, staged, malformed, report)
                software = opened.software
            manifest = {**_manifest(file, staged, built, software), "sources": sources}
            with locked(corpora):
                return _publish(staged, corpora / f"{file.name}-{manifest['digest']}", manifest)
    except OSError as e:
        raise CorpusError(
            f"{corpora}: {e.strerror or e} while preparing {corpus_file}; nothing was published"
        ) from e
    except duckdb.Error as e:
        if isinstance(e, duckdb.InvalidInputException):
            refuse_foreign(file.source, corpus_file.parent)
        # What it says of other errors may quote values of logs.
        told = isinstance(e, duckdb.IOException | duckdb.OutOfMemoryException)
        reason = str(e).partition("\n")[0] if told else f"DuckDB: {type(e).__name__}"
        if not told and "No space left" in str(e):
            reason = f"{corpora}: no space left on device"
        raise CorpusError(f"{corpus_file}: {reason}; nothing was published") from None
    except RuntimeError as e:
        if "interrupted" in str(e):  # Ctrl-C during a query
            raise KeyboardInterrupt from None
        raise


def _engine(name: EngineName, folder: Path, memory: int | None) -> Engine:
    if name == "spark":
        if memory is not None:
            raise CorpusError("memory is of engine duckdb; Spark's is in its own configuration")
        return Spark(folder)
    return DuckDB(folder, memory_of_database() if memory is None else memory)


def memory_of_database() -> int:
    """What the database may use where nobody says it [bytes]: 1 GiB for each core of this process,
    at most half of what the machine has or the process's control group (a Slurm job, a container)
    may use."""
    machine: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return min(cores * MEMORY_OF_CORE, min([machine, *_limits_of_groups()]) // 2)


def _limits_of_groups() -> Iterator[int]:
    """Memory limits of the control groups (versions 1 and 2) that this process is in. [bytes]"""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            for limit in ("memory.max", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                    yield int((folder / limit).read_text())
            if folder == top:
                break


def find_prepared(root: Path, corpus_file: Path) -> Corpus | None:
    """The corpus prepared from a corpus file, whether or not its source is at hand.

    Of several, made as the source changed, it is the one made from the source as it is now.

    Raises:
        CorpusError: there are several, and not one alone is of the source as it is now.
    """
    file = read_corpus_file(corpus_file)
    made = _same_recipe(root, file)
    found = [path for path, _ in made]
    if len(found) > 1:
        with contextlib.suppress(CorpusError, ConfigError):  # the source is not at hand
            sources = _fingerprint(file, Path(corpus_file))
            found = [path for path, manifest in made if manifest["sources"] == sources] or found
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise CorpusError(
            f"{corpus_file}: prepared from several states of its source, none or more than one of "
            f"them as it is now: {names}; prepare it again or remove all but one"
        )
    return Corpus.open(found[0]) if found else None


def read_card(corpus_file: Path, root: Path) -> CorpusCard:
    """Card of a corpus: of the prepared one, or of a nominal one.

    Raises:
        CorpusError: the corpus has a source and is not prepared.
    """
    file = read_corpus_file(corpus_file)
    if file.nominal is not None:
        return nominal_card(file)
    corpus = find_prepared(root, corpus_file)
    if corpus is None:
        raise CorpusError(
            f"{corpus_file}: not prepared below {root.absolute()}; run: "
            + shlex.join(["clue-scaling", "prepare", str(corpus_file), "--root", str(root)])
        )
    return corpus.card


def _fingerprint(file: CorpusFile, corpus_file: Path) -> list[dict[str, Any]]:
    """Name, size and time of change of every file of the source. Where files do not tell what it
    reads, the time: it is never the same again."""
    files = source_files(file.source, corpus_file.parent)
    if files is None:
        return [{"read_ns": time.time_ns()}]
    found = []
    for path in files:
        try:
            stat = path.stat()
        except OSError as e:
            raise CorpusError(f"{corpus_file}: {path}: {e.strerror}") from None
        found.append(
            {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        )
    return found


def _same_recipe(root: Path, file: CorpusFile) -> list[tuple[Path, dict[str, Any]]]:
    own = (path for path in folders(root) if path.name.rpartition("-")[0] == file.name)
    manifests = ((path, read_manifest(path)) for path in own)
    return [(path, m) for path, m in manifests if m["recipe"] == file.recipe]


def _has_tasks(manifest: dict[str, Any], file: CorpusFile) -> bool:
    return all(manifest["task_recipes"].get(task) == file.task_recipe(task) for task in file.tasks)


def _manifest(
    file: CorpusFile, staged: Path, built: Built, software: dict[str, str]
) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": file.name,
        "recipe": file.recipe,
        "corpus_file": file.model_dump(mode="json"),
        "task_recipes": {t: file.task_recipe(t) for t in file.tasks},
        "services": list(file.all_services),
        "splits": built.splits,
        "steps": built.steps,
        "times": built.times,
        "files": {
            p.relative_to(staged).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)}
            for p in sorted(staged.rglob("*"))
            if p.is_file()
        },
        "software": {
            "clue-scaling": __version__,
            **software,
            **{m.__name__: m.__version__ for m in (ibis, numpy, pyarrow, tokenizers)},
        },
    }
    digest = content_digest(manifest)
    card = corpus_card(file, staged, digest, built.splits, built.vocab_size)
    return {
        **manifest,
        "digest": digest,
        "tasks": {t: task_digest(manifest, t) for t in file.tasks},
        "card": card.model_dump(mode="json"),
    }


def _publish(staged: Path, final: Path, manifest: dict[str, Any]) -> Path:
    """Publish a corpus; where its content is there already, add the tasks that are new.

    Raises:
        CorpusError: a task of that name is there with other content, which results may rest on.
    """
    if not final.exists():
        write_json(staged / "manifest.json", manifest)
        publish(staged, final)
    elif not (final / "manifest.json").exists():
        raise CorpusError(f"{final}: has no manifest, so it is no whole corpus; remove the folder")
    there = read_manifest(final)
    for task, digest in manifest["tasks"].items():
        if there["tasks"].get(task, digest) != digest:
            raise CorpusError(
                f"{final}: there is a task {task!r} of other content: its table in the corpus "
                "file, another choice or the source changed since it was made, and results may "
                "rest on it. Give the task or the corpus another name, or, if no run needs it, "
                f"remove the folder {final}"
            )
    for task in manifest["tasks"].keys() - there["tasks"].keys():
        (final / "tasks").mkdir(exist_ok=True)
        # Left by a preparation that ended before its manifest was written; nobody has read it.
        if (final / "tasks" / task).exists():
            shutil.rmtree(final / "tasks" / task)
        publish(staged / "tasks" / task, final / "tasks" / task)
    made = ("recipe", "corpus_file", "sources", "steps", "times", "software")
    if there == manifest:
        return final
    merged = {
        **there,
        **{k: manifest[k] for k in made},
        **{k: {**there[k], **manifest[k]} for k in ("tasks", "task_recipes", "files")},
    }
    write_json(final / "manifest.json", merged)
    return final
