"""The benchmark of downstream models runs and prints what it promises; no test looks at a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "downstream.py"


@pytest.mark.slow
def test_downstream_models_beside_each_other(tiny_corpus: Any) -> None:
    root = tiny_corpus(users=200)
    call = [sys.executable, BENCHMARK, "--json", "--quick", "--root", root, "--corpus", "tiny"]
    done = subprocess.run(
        [*call, "--turns", "2", "--task", "books"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    models = found["models"]
    assert list(models) == [
        *("bst-15m", "bst", "deepfm", "lightgcn", "u-mlp", "u-mlp, with the encoder")
    ]
    assert all(0 < row["batch_s"] < np.inf for row in models.values())
    assert models["bst-15m"]["over_bst_15m"] == 1.0
    # Two tables of 256 text dimensions to 64; d of the quick encoder is 64.
    assert models["lightgcn"]["parameters"] == 2 * (256 * 64 + 64)
    towers = [(65, 512), (64, 512), *2 * [(512, 256), (256, 128), (128, 64), (64, 64)]]
    assert models["u-mlp"]["parameters"] == sum(a * b + b for a, b in towers)
    for key in ("u_mlp_over_bst", "u_mlp_with_encoder_over_bst", "lightgcn_over_bst"):
        assert 0 < found[key] < np.inf
