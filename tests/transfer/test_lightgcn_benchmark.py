"""The benchmark of LightGCN runs and prints what it promises; no test looks at a time."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "lightgcn.py"


@pytest.fixture(scope="module")
def lightgcn() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_lightgcn", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_lightgcn_beside_pytorch_geometric() -> None:
    sizes = ["--users", "3000", "--items", "2000", "--edges", "9000", "--turns", "2"]
    call = [sys.executable, BENCHMARK, "--json", "--quick", "--threads", "1", *sizes]
    found = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    for key in ("propagate_s", "over_pyg", "over_pyg_once", "over_pyg_csr"):
        assert 0 < found[key] < np.inf
    assert (found["users"], found["items"], found["edges"]) == (300, 200, 900)
    assert set(found["differences"]) == {"pyg", "pyg_once", "pyg_csr"}
    assert found["threads"] == 1


def test_a_graph_is_drawn_with_distinct_edges(lightgcn: ModuleType) -> None:
    users, items = lightgcn.draw(50, 40, 300)
    assert len(set(zip(users.tolist(), items.tolist(), strict=True))) == len(users) == 300
    assert users.max() < 50
    assert items.max() < 40


@pytest.mark.parametrize("fault", ["vectors", "gradients"])
def test_it_stops_where_a_side_computes_something_else(lightgcn: ModuleType, fault: str) -> None:
    sides = lightgcn.sides_of(*lightgcn.draw(50, 40, 300), 50, 40)
    x, toward = torch.randn(2, 90, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert max(lightgcn.same(sides, x, toward).values()) < 1e-5
    ours = sides["ours"]

    def wrong(x: torch.Tensor) -> torch.Tensor:
        right = ours(x)
        return right + 1e-2 if fault == "vectors" else right.detach() + 0 * x

    with pytest.raises(SystemExit, match="pyg_csr and ours do not compute the same"):
        lightgcn.same({**sides, "pyg_csr": wrong}, x, toward)
