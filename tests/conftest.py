"""Fixtures that more than one part of the tests uses."""

import csv
import functools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import settings

from scaling.data.prepare import prepare

# A machine that others use too makes any deadline on a single example flaky.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

WORDS = ("red", "green", "blue", "oak", "pine", "steel", "glass", "small", "large", "round", "soft")


def missing(reason: str) -> None:
    """Skip, or fail where a skip would hide that the tests were not run (``CI=true``)."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, which CI must have")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def clue_test_data() -> Path:
    """Folder of the real data, which ``CLUE_TEST_DATA`` names."""
    if not (folder := os.environ.get("CLUE_TEST_DATA")):
        missing("CLUE_TEST_DATA is not set")
    if not (path := Path(str(folder))).is_dir():
        missing(f"CLUE_TEST_DATA = {folder} is no folder")
    return path


class TinyCorpus(Protocol):
    """Writes logs and a corpus file, prepares them, and returns the root folder."""

    def __call__(
        self,
        users: int = 64,
        *,
        validation: int = 8,
        pool: int = 16,
        downstream: float = 0.3,
        negatives: int = 5,
        seed: int = 0,
    ) -> Path: ...


def write_tiny(
    folder: Path,
    users: int,
    validation: int,
    pool: int,
    downstream: float,
    negatives: int,
    seed: int,
) -> Path:
    """Write ``logs.csv`` and ``tiny.toml`` with two services of pretraining and one beside them."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "logs.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["who", "where", "what", "when"])
        for user in range(users):
            taste = rng.sample(WORDS, 3)
            for service, share in (("books", 1.0), ("garden", 1.0), ("beauty", 0.5)):
                if rng.random() < share:
                    for _ in range(rng.randint(5, 9)):
                        text = " ".join([rng.choice(taste), rng.choice(WORDS), service])
                        out.writerow([f"u{user}", service, text, rng.randint(0, 10**6)])
    toml = folder / "tiny.toml"
    toml.write_text(
        f"""
name = "tiny"
services = ["books", "garden"]
downstream_services = ["beauty"]

[source]
kind = "tables"
[[source.tables]]
files = ["logs.csv"]
columns = {{ user = "who", service = "where", text = "what", time = "when" }}

[users]
salt = "tiny"
eligible_logs = 4
downstream = {downstream}
validation = {validation}
pool = {pool}

[tokenizer]
vocab_size = 320

[tasks.books]
service = "books"
targets = 2
negatives = {negatives}

[tasks.beauty]
service = "beauty"
users = "all"
targets = 1
negatives = {negatives}
""",
        encoding="utf-8",
    )
    return toml


@pytest.fixture(scope="session")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Root folders with a prepared tiny corpus, each made once for all tests."""

    @functools.cache
    def make(*args: Any) -> Path:
        root = tmp_path_factory.mktemp("tiny")
        prepare(write_tiny(root, *args), root)
        return root

    return make


@pytest.fixture
def tiny_corpus(tmp_path: Path, _prepared: Callable[..., Path]) -> TinyCorpus:
    """``tiny_corpus(users=64, ...) -> root``: a prepared corpus, its file at ``root/tiny.toml``.

    Services ``books`` and ``garden`` are pretrained on; tasks are ``books`` and ``beauty``.
    """

    def make(
        users: int = 64,
        *,
        validation: int = 8,
        pool: int = 16,
        downstream: float = 0.3,
        negatives: int = 5,
        seed: int = 0,
    ) -> Path:
        made = _prepared(users, validation, pool, downstream, negatives, seed)
        shutil.copytree(made, tmp_path, dirs_exist_ok=True)
        return tmp_path

    return make
