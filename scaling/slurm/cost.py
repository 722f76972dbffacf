"""What runs will cost: GPU-hours, wall time and disk, as measured or else as modelled.

A GPU-hour is an hour of one rank: of a GPU, or on CPUs of a rank's cores. The work of a run is its
exact FLOPs; what a rank does of them in a second comes, best first, from the run's own steps so far
(``own pace``), from runs of the same shape on the same profile (``measured``), from the stated
model scaled by what other runs on the profile did (``calibrated``), or from that model alone
(``model``).
"""

import heapq
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaling import ClueError
from scaling.config import RunConfig
from scaling.files import read_json
from scaling.rundir import RUN_KEY, RunDir
from scaling.slurm.profile import ClusterProfile, Shape

Basis = Literal["own pace", "measured", "calibrated", "model"]
MFU_BY_WIDTH = ((64, 0.05), (128, 0.10), (192, 0.15), (320, 0.22), (448, 0.28), (720, 0.35))
"""The stated model on a GPU: share of the peak that a model of this width reaches. An assumption,
on the cautious side; the first finished run of a profile corrects it."""
PEAK_FLOPS = 125e12
"""Peak of a GPU for which the profile states none: a V100's in fp16. [FLOP/s]"""
CPU_FLOPS = 10e9
"""The stated model on CPUs: of one core, in fp32. [FLOP/s]"""
START_S = 60.0
"""Of every start: imports, corpus, memory, first batch. [seconds]"""
EVALUATION_S = 60.0
"""The stated model of a downstream evaluation: of one task with one head. [seconds]"""
MARGIN = 1.5
"""A budget reserves this multiple of what a run is estimated to need still."""
SHORTEST_S = 10.0
"""Shorter runs say nothing of a rate. [seconds]"""
_FP32 = 4


@dataclass(frozen=True)
class Rate:
    """What one finished run did."""

    profile: str
    model: str
    """Its model's shape, ``8x64``."""
    d_model: int
    cpus: int
    flops_per_second: float
    """Of one rank, evaluations and checkpoints included. [FLOP/s]"""


@dataclass(frozen=True)
class Estimate:
    """What one run will take, from its start or from where it stands."""

    gpu_hours: float
    wall_hours: float
    """Of its jobs, without waiting in the queue. [hours]"""
    disk_gb: float
    """Checkpoints, exports and metrics at their most. [GB]"""
    basis: Basis


def measured_rates(root: Path) -> list[Rate]:
    """Rates of all finished runs below ``root`` that jobs of a profile computed."""
    rates = []
    for path in Path(root).glob("runs/*/*/result.json"):
        if not RUN_KEY.fullmatch(path.parent.name):
            continue
        try:
            result = read_json(path)
            if not result.get("profile") or result["seconds"] < SHORTEST_S:
                continue
            config = RunDir(root, path.parent.name).spec()
            rate = result["flops_exact"] / result["seconds"] / result["world_size"]
            rates.append(
                Rate(
                    result["profile"], config.model.shape, config.model.d_model,
                    int(result.get("cpus_per_task") or 1), rate,
                )
            )  # fmt: skip
        except (ClueError, AttributeError, KeyError, TypeError, ZeroDivisionError):
            continue  # damage is reported by status and collect; an estimate does without
    return rates


def model_flops_per_second(d_model: int, gpus: int, cpus: int, peak_tflops: float | None) -> float:
    """The stated model: exact FLOPs that a rank computes in a second. [FLOP/s]

    Args:
        gpus: of a node; 0: ranks compute on ``cpus`` cores.
        peak_tflops: of a GPU, as the profile states it. [TFLOP/s]
    """
    if not gpus:
        return CPU_FLOPS * cpus
    mfu = next((m for width, m in MFU_BY_WIDTH if d_model <= width), MFU_BY_WIDTH[-1][1])
    return mfu * (peak_tflops * 1e12 if peak_tflops else PEAK_FLOPS)


def estimate(
    config: RunConfig,
    n_total: int,
    flops_exact: float,
    profile: ClusterProfile,
    rates: Sequence[Rate] = (),
    *,
    step: int = 0,
    start_s: float = START_S,
    pace: float | None = None,
    evaluations: int = 0,
    evaluation_s: float = EVALUATION_S,
) -> Estimate:
    """Cost of a run on a profile.

    Args:
        n_total: its parameters.
        flops_exact: of the whole run, expected or counted. [FLOPs]
        rates: of finished runs; those of other profiles do not count.
        step: steps done already.
        start_s: of every start, before the first step. [seconds]
        pace: the run's own so far, which beats all else. [steps/s]
        evaluations: downstream, that it still lacks; all ranks' time counts while one evaluates.
        evaluation_s: of each. [seconds]

    Raises:
        ConfigError: the run does not fit the profile.
    """
    shape = profile.shape_of(config)
    rate, basis = _rate(config, shape, profile, rates)
    left = max(0, config.steps - step)
    seconds = left / config.steps * flops_exact / rate / shape.world_size
    if pace:
        seconds, basis = left / pace, "own pace"
    seconds += evaluations * evaluation_s
    slices = max(1, -(-seconds // max(1, 60 * shape.time_min - profile.signal_lead_s)))
    wall = (seconds + slices * start_s) / 3600
    train = profile.train
    copies = 3 * train.keep_checkpoints + 3 + len(train.milestone_steps(config.steps))
    return Estimate(
        gpu_hours=wall * shape.world_size,
        wall_hours=wall,
        disk_gb=(copies * _FP32 * n_total + 2e6) / 1e9,
        basis=basis,
    )


def _rate(
    config: RunConfig, shape: Shape, profile: ClusterProfile, rates: Iterable[Rate]
) -> tuple[float, Basis]:
    def modelled(d_model: int, cpus: int) -> float:
        peak = profile.train.peak_tflops
        return model_flops_per_second(d_model, shape.gpus_per_node, cpus, peak)

    here = [r for r in rates if r.profile == profile.name]
    same = [r.flops_per_second for r in here if r.model == config.model.shape]
    if same:
        return statistics.median(same), "measured"
    model = modelled(config.model.d_model, shape.cpus_per_task)
    if here:
        # Narrow models are bound by something else than arithmetic, so width is what is alike.
        nearest = min(abs(r.d_model - config.model.d_model) for r in here)
        near = [r for r in here if abs(r.d_model - config.model.d_model) == nearest]
        ratios = [r.flops_per_second / modelled(r.d_model, r.cpus) for r in near]
        return model * statistics.median(ratios), "calibrated"
    return model, "model"


def wall_hours(hours: Sequence[float], parallel: int) -> float:
    """Time until all runs are done, ``parallel`` at once, started in this order. [hours]"""
    ends: list[float] = []
    for h in hours:
        begin = heapq.heappop(ends) if len(ends) >= parallel else 0.0
        heapq.heappush(ends, begin + h)
    return max(ends, default=0.0)
