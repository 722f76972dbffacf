"""Time, FLOPs a second and memory, as metrics rows tell them."""

import time

import pytest
import torch
from test_loop import configure

from scaling.config import TrainSettings
from scaling.rundir import RunDir
from scaling.train.loop import train
from scaling.train.throughput import Stopwatch, peak_flops, peak_memory


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Some GPU of 2030", "bf16", None),
    ],
)
def test_peaks_are_known_by_the_device_s_name(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak = peak_flops(torch.device("cuda", 0), precision)
    assert peak == (None if tflops is None else tflops * 1e12)
    assert peak_flops(torch.device("cpu"), precision) is None


def test_the_phases_of_a_step_are_told_apart():
    watch = Stopwatch(torch.device("cpu"))

    def slow():
        for _ in range(4):
            time.sleep(0.02)
            yield None

    for _ in watch.waiting(slow()):
        with watch.phase("forward"):
            time.sleep(0.01)
        with watch.phase("step"):
            pass
        watch.lap()
        time.sleep(0.03)  # an evaluation
    busy = watch.busy
    row = watch.row(flops=1e9, peak=1e12)
    assert row["seconds_data"] >= 0.02
    assert row["seconds_forward"] >= 0.01
    assert row["seconds_backward"] == 0
    assert row["flops_per_second"] == pytest.approx(1e9 / busy)
    assert row["mfu"] == pytest.approx(row["flops_per_second"] / 1e12)
    assert watch.steps == 0


def test_rows_say_how_fast_the_run_was(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    before = time.perf_counter()
    train(run, corpus, TrainSettings(threads=1, peak_tflops=0.5))
    wall = time.perf_counter() - before
    rows = run.curve("train")
    spent = 0.0
    for row, previous in zip(rows, [{"flops_exact": 0}, *rows], strict=False):
        speed = row["speed"]
        phases = sum(speed[f"seconds_{name}"] for name in ("data", "forward", "backward", "step"))
        busy = (row["flops_exact"] - previous["flops_exact"]) / speed["flops_per_second"]
        assert 0 < phases <= busy
        spent += busy
        assert speed["mfu"] == pytest.approx(speed["flops_per_second"] / 0.5e12)
    assert spent < wall
    assert 0 < rows[-1]["speed"]["peak_memory_bytes"] <= peak_memory(torch.device("cpu"))


def test_clipped_steps_are_counted_across_restarts(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    result = train(run, corpus, TrainSettings(threads=1))
    norms = [row["grad_norm"] for row in run.curve("train")]
    assert result["clipped_steps"] == sum(n > 0.01 for n in norms) == 24
    assert run.curve("train")[9]["clipped_steps"] == 10
