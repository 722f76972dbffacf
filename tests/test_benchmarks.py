"""The benchmarks run and print what they promise; no test looks at a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.mark.slow
def test_orchestrate(tmp_path):
    sizes = ["--runs", "30", "--rows", "50", "--turns", "2"]
    call = [sys.executable, BENCHMARKS / "orchestrate.py", "--quick", "--json"]
    call += ["--folder", tmp_path, *sizes]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    keys = ["submit_2000_s", "status_2000_s", "collect_2000_s", "rss_mb", "collect_rss_mb"]
    assert all(0 < found[key] < np.inf for key in keys)
    assert found["runs"] == 40  # of each point of the grid as many
    assert found["table_rows"] == {
        "runs": 40,
        "curves": 40 * (50 + 2 * 20),
        "transfer": 0,
        "gains": 0,
    }
    # Counts, not times: opens of files, folders listed, calls of Slurm, files left.
    sides = found["sides"]
    assert found["opens_per_run"] == 3
    assert (sides["status, finished"]["opens_per_run"], sides["collect"]["opens_per_run"]) == (3, 3)
    assert 3 <= sides["status, queued"]["opens_per_run"] <= 6
    calls = {name: side["slurm_calls"] for name, side in sides.items()}
    assert calls["submit"] == {"scontrol": 1, "sbatch": 1}
    assert calls["status, queued"] == {"squeue": 1}
    assert calls["submitit, sacct"] == calls["submitit, queued"] == {"sacct": 1}
    assert calls["status, finished"] == calls["collect"] == calls["submitit, results"] == {}
    assert 6 < found["inodes_per_run"]["queued"] < 9
    assert 25 < found["inodes_per_run"]["finished"] < 40
    assert list(tmp_path.iterdir()) == []


def test_orchestrate_stops_where_a_side_does_not_say_what_is_so(monkeypatch, tmp_path):
    orchestrate = load("orchestrate")
    said = {"answers": {"DONE": 19, "FAILED": 1}, "seconds": 0.1, "rss_mb": 30.0}
    monkeypatch.setattr(orchestrate, "inside", lambda *asked: said)
    found = {"collect": []}
    with pytest.raises(SystemExit, match=r"collect: .*FAILED"):
        orchestrate.take(found, "collect", tmp_path, {"DONE": 20})
    orchestrate.take(found, "collect", tmp_path, said["answers"])
    assert found == {"collect": [said]}


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return load("train_step")


@pytest.mark.slow
@pytest.mark.parametrize("malloc", ["tuned", "default"])
def test_train_step(tmp_path, malloc):
    sizes = ["--items", "256", "--width", "16", "--turns", "2", "--malloc", malloc]
    call = [sys.executable, BENCHMARKS / "train_step.py", "--quick", "--json", "--folder", tmp_path]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # two wait for each other where cores are busy
    done = subprocess.run([*call, *sizes], capture_output=True, text=True, check=True, env=env)
    found = json.loads(done.stdout)
    ratios = ["packed_over_padded_sdpa", "ragged_over_encoder", "activation_share",
              "cache_over_full", "gemm_share"]  # fmt: skip
    assert all(0 < found[name] < np.inf for name in ratios)
    assert 0 <= found["data_share"] < 1
    assert 0 <= found["data_share_8x64"] < 1
    assert {value is None for value in found["malloc"].values()} == {malloc == "default"}
    # What is held for the backward pass is a count, not a time.
    assert found["activation_share"] < 1 / 2.5
    assert found["cache_chunks"] == 2
    assert 0.4 < found["cache_activation_share"] < 0.6
    for level, sides in (("one_level", 6), ("ragged", 6)):
        of = found[level]
        assert len(of["sides"]) == sides
        assert all(0 < n < np.inf for side in of["sides"].values() for n in side.values())
        assert max(of["differences"].values()) < 1e-3
        assert of["slots_over_elements"] > 2.9
    assert found["ragged"]["slots_over_elements"] > found["one_level"]["slots_over_elements"]
    assert list(tmp_path.iterdir()) == []


def test_train_step_stops_where_the_sides_differ(train_step):
    config = train_step.ModelConfig(layers=4, d_model=8, heads=4, dropout=0.0)
    model = train_step.build(config, train_step.VOCAB)
    batch, once = train_step.make_batches(np.array([3, 1, 5, 64]), np.random.default_rng(0))
    assert len(once.tokens) < len(batch.tokens)
    sides = train_step.sides_of(model, batch, once)
    assert train_step.same(model, sides)["embeddings"] < 1e-5
    other, _ = train_step.make_batches(np.array([3, 1, 5, 64]), np.random.default_rng(1))
    with pytest.raises(SystemExit, match="do not compute the same"):
        train_step.same(model, {**sides, "other": lambda: model(other)})


def test_train_step_counts_each_storage_held_for_the_backward_pass_once(train_step):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 4))
            self.logit_scale = torch.nn.Parameter(torch.zeros(1))

        def project(self, user_emb):
            return user_emb

    model, x = Model(), torch.ones(2, 4)
    once = train_step.saved_bytes(model, lambda: x @ model.weight)
    twice = train_step.saved_bytes(model, lambda: x @ model.weight + x @ model.weight)
    copied = train_step.saved_bytes(model, lambda: x @ model.weight + x.clone() @ model.weight)
    assert twice == once > x.nbytes
    assert copied == once + x.nbytes


def gpu(*arguments):
    call = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--quick", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as above
    done = subprocess.run([*call, *arguments], capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_gpu(tmp_path):
    found = gpu("--folder", tmp_path, "--out", tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]
    assert (found["failed"], found["skipped"], found["cut_off"]) == ({}, {}, None)
    keys = ["mfu_d64", "mfu_d192", "mfu_d720", "packed_over_padded", "users_per_s"]
    assert all(found[key] > 0 for key in keys)
    assert all(max(r["embeddings"], r["gradients"]) < 1e-3 for r in found["exact"])
    sections = ["packed", "padded", "loop", "profile", "compiled", "largest"]
    assert not [r for name in sections for r in found[name] if r.get("failed")]
    assert all(r["graphs"] > 0 for r in found["compiled"] if r["side"] == "compiled")
    works = [r for r in found["attention"] if not r["failed"]]
    assert {"default", "MATH"} <= {r["backend"] for r in works}
    assert all(r["difference"] < 0.05 for r in works if not r["dropout"])
    refused = {r["backend"] for r in found["attention"] if r["failed"]}
    assert {"CUDNN_ATTENTION", "varlen_attn", "flex_attention"} <= refused  # they say why


@pytest.mark.slow
def test_gpu_keeps_what_it_has_when_time_is_up(tmp_path):
    out = tmp_path / "gpu.json"
    found = gpu("--out", out, "--minutes", "0", "--sections", "compiled", "largest")
    assert json.loads(out.read_text()) == found
    assert (found["cut_off"], list(found["skipped"])) == ("compiled", ["largest"])
    assert found["product"]
    assert found["mfu_d720"] is None


@pytest.fixture
def metrics():
    for name in ("ranx", "torchmetrics"):
        if importlib.util.find_spec(name) is None:
            missing(f"{name} is not installed")
    return load("metrics")


@pytest.mark.slow
def test_metrics(metrics):
    call = [sys.executable, BENCHMARKS / "metrics.py", "--quick", "--json"]
    done = subprocess.run(
        [*call, "--users", "400", "--turns", "2"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert all(0 < found[k] < np.inf for k in ("ranks_100k_s", "over_torchmetrics", "over_ranx"))
    assert found["users"] == {"ours": 400, "ranx, arrays": 400, "torchmetrics": 100}
    for name in metrics.METRICS:
        on_logits = {side: values[name] for side, values in found["values"]["logits"].items()}
        assert on_logits["ranx, arrays"] == pytest.approx(on_logits["ours"], abs=1e-9)
        # A positive at or below 0 has no reciprocal rank there.
        assert (on_logits["torchmetrics"] < on_logits["ours"] - 1e-3) == (name == "mrr")
    ties = {side: values["ndcg_10"] for side, values in found["values"]["counts"].items()}
    assert ties["torchmetrics"] == pytest.approx(ties["ours"], abs=1e-5)  # both by expectation
    assert abs(ties["ranx, arrays"] - ties["ours"]) > 0.01
    text = metrics.table(found)
    assert "drops positives with a score <= 0" in text


def test_metrics_stops_where_a_side_is_wrong_in_another_way_than_is_known(metrics):
    values = dict.fromkeys(metrics.METRICS, 0.5)
    known = {"ours": values, "torchmetrics": {**values, "mrr": 0.4}}
    metrics.same(known, values, dropped=0.4)
    with pytest.raises(SystemExit, match=r"torchmetrics: mrr is 0.500000, not 0.400000"):
        metrics.same({**known, "torchmetrics": values}, values, dropped=0.4)
    wrong = {**known, "ranx, arrays": {**values, "hr_10": np.nan}}
    with pytest.raises(SystemExit, match=r"ranx, arrays: hr_10 is nan, not 0.500000"):
        metrics.same(wrong, values, dropped=0.4)
