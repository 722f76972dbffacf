"""Corpora that were changed by hand and whose manifest owns up to it."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling.data.card import corpus_card
from scaling.data.corpus import Corpus, content_digest, task_digest
from scaling.data.engine import DuckDB, Engine, Spark
from scaling.data.prepare import find_prepared
from scaling.files import sha256
from tests.conftest import TinyCorpus, missing


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Spark session on this machine, which the engine finds; two tasks a shuffle."""
    if importlib.util.find_spec("pyspark") is None:
        missing("PySpark is not installed")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        missing("Spark needs Java")
    from pyspark.sql import SparkSession

    warehouse = tmp_path_factory.mktemp("warehouse")
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.sql.shuffle.partitions", 2)
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.warehouse.dir", warehouse.as_uri())
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=pytest.mark.slow)])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Each engine in turn."""
    if request.param == "spark":
        request.getfixturevalue("spark")
    kind: Any = {"duckdb": DuckDB, "spark": Spark}[request.param]
    with closing(kind(tmp_path_factory.mktemp("scratch"))) as opened:
        yield opened


@pytest.fixture
def corpus(tiny_corpus: TinyCorpus) -> Corpus | None:
    """A prepared tiny corpus."""
    root = tiny_corpus()
    return find_prepared(root, root / "tiny.toml")


@pytest.fixture
def resigned() -> Callable[..., Corpus]:
    """``resigned(path)``: a corpus whose files were changed, with sizes and digests as they are
    now. Only reading what is in the files can tell that something is wrong."""

    def make(path: Path) -> Corpus:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, record in manifest["files"].items():
            record["bytes"] = (path / name).stat().st_size
            record["sha256"] = sha256(path / name)
        digest = content_digest(manifest)
        manifest["digest"] = manifest["card"]["digest"] = digest
        manifest["tasks"] = {task: task_digest(manifest, task) for task in manifest["tasks"]}
        (path / "manifest.json").write_text(json.dumps(manifest))
        return Corpus.open(path.rename(path.with_name(f"{manifest['name']}-{digest}")))

    return make


@pytest.fixture
def enlarged(resigned: Callable[..., Corpus]) -> Callable[..., Corpus]:
    """``enlarged(corpus, n_users, logs)``: a corpus with more users of pretraining, each with
    ``logs`` logs drawn at random in each service, as many as a test of memory needs."""

    def make(corpus: Corpus, n_users: int, logs: int) -> Corpus:
        path, draw = corpus.path, np.random.default_rng(0)
        manifest = json.loads((path / "manifest.json").read_text())
        held = corpus.split("validation").start
        manifest["splits"]["pretraining"] = n_users
        keys = np.sort(draw.integers(2**64, size=n_users, dtype=np.uint64))
        np.save(path / "users/keys.npy", np.concatenate([keys, corpus.keys[held:]]))
        for service in corpus.card.services:
            offsets, items = corpus.users(service)
            drawn = draw.choice(corpus.service_items(service), n_users * logs).astype(items.dtype)
            lengths = np.concatenate([np.full(n_users, logs), np.diff(offsets[held:])])
            kept = np.concatenate([drawn, items[int(offsets[held]) :]])
            folder = path / "users" / service
            np.save(folder / "items.npy", kept)
            np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype("u4"))
        counted = corpus_card(
            corpus.card, path, corpus.card.digest, manifest["splits"], corpus.card.vocab_size
        )
        manifest["card"] = counted.model_dump(mode="json")
        (path / "manifest.json").write_text(json.dumps(manifest))
        return resigned(path)

    return make
