"""The benchmark of embed runs and prints what it promises; no test looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaling.data.corpus import Corpus

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "embed.py"


@pytest.mark.slow
def test_embed_beside_its_peers(tiny_corpus: Any, tmp_path: Path) -> None:
    root = tiny_corpus(users=200)
    work = tmp_path / "work"
    work.mkdir()
    sizes = ["--width", "16", "--users", "70", "--alone", "5", "--turns", "2"]
    call = [sys.executable, BENCHMARK, "--json", "--root", root, "--corpus", "tiny"]
    done = subprocess.run(
        [*call, "--folder", work, *sizes], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    ratios = ["over_padded", "over_padded_once", "over_one_by_one", "users_per_s"]
    assert all(0 < found[key] < np.inf for key in ratios)
    users = len(Corpus.open(next((root / "corpora").glob("tiny-*"))).keys)
    assert found["users_of"] == {
        "embed": users, "padded": 70, "padded, once": 70, "one by one": 5
    }  # fmt: skip
    # Half precision of two services and a key, and the headers of two files.
    assert found["bytes_per_user"] == pytest.approx(2 * 16 * 2 + 8 + 2 * 128 / users)
    assert found["projected_gb_36m"] == pytest.approx(155.52 + 0.288)
    assert found["projected_hours_36m"] == pytest.approx(1e4 / found["users_per_s"])
    assert set(found["differences"]) == {"padded", "padded, once", "one by one"}
    assert list(work.iterdir()) == []
