"""Where a step's time goes, and what share of the device's peak the model's FLOPs are."""

import contextlib
import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
PHASES = ("data", "forward", "backward", "step")

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H200 NVL": {"bf16": 835, "fp16": 835, "fp32": 60},
    "H200": {"bf16": 989, "fp16": 989, "fp32": 67},
    "H100 PCIe": {"bf16": 756, "fp16": 756, "fp32": 51},
    "H100 NVL": {"bf16": 835, "fp16": 835, "fp32": 60},
    "H100": {"bf16": 989, "fp16": 989, "fp32": 67},
    "A100": {"bf16": 312, "fp16": 312, "fp32": 19.5},
    "V100": {"fp16": 125, "fp32": 15.7},
}
"""Dense peak by a part of the device's name, from NVIDIA's data sheets; fp32 without TF32, which
PyTorch leaves off for products. The first that fits holds. [TFLOP/s]"""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of a device in the precision of the products; None where none is known. [FLOP/s]"""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peaks in PEAK_TFLOPS.items():
        if all(word in name for word in part.split()):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def peak_memory(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process. [bytes]"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Stopwatch:
    """Seconds in the phases of a step, ``PHASES``.

    On a GPU the phases are between events of its stream, and are read at ``lap``, where the step
    has been waited for anyway. Waiting for data is the host's time. Evaluations and checkpoints,
    which come between steps, are no part of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._began = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self.steps = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.busy = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase."""
        if self.cuda:
            begin, end = (_event() for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        begin_s = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin_s

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time until each is there is phase ``data``."""
        iterator = iter(batches)
        while True:
            self._began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.seconds["data"] += time.perf_counter() - self._began
            yield batch

    def lap(self) -> None:
        """A step is over and has been waited for."""
        for name, begin, end in self._events:
            self.seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        self.busy += time.perf_counter() - self._began
        self.steps += 1

    def row(self, flops: float, peak: float | None) -> dict[str, float | None]:
        """What a metrics row says of the interval, ``speed``, and begin a new one.

        Args:
            flops: exact FLOPs of the interval over all ranks. [FLOPs]
            peak: of all ranks together. [FLOP/s]
        """
        rate = flops / self.busy
        mean = {f"seconds_{name}": s / max(1, self.steps) for name, s in self.seconds.items()}
        self.reset()
        return {**mean, "flops_per_second": rate, "mfu": None if peak is None else rate / peak}
