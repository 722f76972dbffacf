"""The benchmarks run and print what they promise; no test looks at a time."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling.packing import PackedBatch
from tests.conftest import missing

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def datasets():
    if importlib.util.find_spec("datasets") is None:
        missing("datasets is not installed")


@pytest.mark.slow
@pytest.mark.usefixtures("datasets")
def test_batches(tmp_path):
    sizes = ["--users", "300", "--items", "400", "--batch-size", "16", "--turns", "2"]
    call = [sys.executable, BENCHMARKS / "batches.py", "--quick", "--json", "--folder", tmp_path]
    done = subprocess.run([*call, *sizes], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {"tokens_per_s", "over_datasets_collator", "over_h100_need_15m"} <= found.keys()
    assert found["tokens_compared"] > 16 * 2 * 2 * 9  # two batches of two services: all sides
    assert len(found["wall_tokens_per_s"]) == 5
    assert all(rate > 0 for rate in found["wall_tokens_per_s"].values())
    assert found["datasets_collator"].startswith("datasets")
    assert list(tmp_path.iterdir()) == []


def test_batches_stops_where_the_sides_differ():
    same = load("batches").same

    def batch(tokens):
        return PackedBatch(np.array(tokens), np.array([0, 1, 3]), np.array([0, 1, 0]),
                           np.array([0, 2, 3]), 1)  # fmt: skip

    assert same([iter([batch([5, 6, 7])]), iter([batch([5, 6, 7])])]) == 4
    with pytest.raises(SystemExit, match="do not deliver the same tokens"):
        same([iter([batch([5, 6, 7])]), iter([batch([5, 6, 8])])])
    with pytest.raises(ValueError):
        same([iter([batch([5, 6, 7])]), iter([])])
