"""Estimates against arithmetic done by hand, and what a budget lets start."""

import heapq
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling import ClueError
from scaling.config import TrainSettings
from scaling.rundir import Attempt, append_line
from scaling.slurm import budget, cost
from scaling.slurm.cost import MARGIN, START_S, Estimate, Rate, estimate, wall_hours
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.state import Facts, Verdict
from scaling.slurm.submission import Candidate

GPUS = ClusterProfile(
    name="v100",
    shape=Shape(nodes=2, tasks_per_node=4, gpus_per_node=4, time_min=600),
    train=TrainSettings(peak_tflops=100.0),
)


@pytest.fixture
def config(make_runs):
    return make_runs(1)[0].spec()  # 1x64, batch of 8, 20 steps


def test_the_stated_model(config):
    found = estimate(config, 10**6, 3.6e18, GPUS)
    seconds = 3.6e18 / (0.05 * 100e12) / 8  # a width of 64 reaches 5 % of the peak
    slices = -(-seconds // (600 * 60 - 300))
    assert slices == 3
    assert found.basis == "model"
    assert found.wall_hours == pytest.approx((seconds + slices * START_S) / 3600)
    assert found.gpu_hours == pytest.approx(8 * found.wall_hours)
    # two checkpoints of three copies, the next one while it is written, and the last export
    assert found.disk_gb == pytest.approx((10 * 4e6 + 2e6) / 1e9)
    half = estimate(config, 10**6, 3.6e18, GPUS, step=10)
    assert half.wall_hours == pytest.approx((seconds / 2 + 2 * START_S) / 3600)
    assert estimate(config, 10**6, 3.6e18, GPUS, step=20).wall_hours == START_S / 3600
    slow = estimate(config, 10**6, 3.6e18, GPUS, start_s=600.0)
    assert slow.wall_hours == pytest.approx((seconds + slices * 600) / 3600)


def test_what_was_measured_beats_the_model(config):
    flops = 1e16

    def rate(model="1x64", d_model=64, value=2e9, profile="v100"):
        return Rate(profile, model, d_model, 1, value)

    def hours(*rates):
        found = estimate(config, 1, flops, GPUS, rates)
        return found.basis, found.gpu_hours - 8 * START_S / 3600

    seconds = flops / 2e9
    assert hours(rate(profile="other"))[0] == "model"
    assert hours(rate(), rate(value=1e9), rate(value=9e9)) == (
        "measured", pytest.approx(seconds / 3600, rel=1e-2),
    )  # fmt: skip
    # as much below the model as the nearest width was
    basis, found = hours(rate("1x128", 128, 0.5 * 0.10 * 100e12), rate("9x720", 720, 1.0))
    assert basis == "calibrated"
    assert found == pytest.approx(flops / (0.5 * 0.05 * 100e12) / 3600, rel=1e-2)


def test_rates_are_those_of_finished_runs_of_jobs(root, make_runs):
    runs = make_runs(4)
    record = {"run_key": "", "flops_exact": 1e12, "seconds": 100.0, "world_size": 2}
    for run, more in zip(
        runs,
        (
            {"profile": "v100", "cpus_per_task": 4},
            {"profile": None},  # by hand: nobody knows on what
            {"profile": "v100", "seconds": 9.0},  # too short to tell
            {"profile": "v100", "seconds": 0.0},
        ),
        strict=True,
    ):
        (run.path / "result.json").write_text(json.dumps(record | more))
    (root / "runs" / "aa" / "notes").mkdir(parents=True)
    assert cost.measured_rates(root) == [Rate("v100", "1x64", 64, 4, 5e9)]


@given(st.lists(st.floats(0.01, 100), max_size=30), st.integers(1, 10))
def test_wall_time_is_that_of_a_queue(hours, parallel):
    found = wall_hours(hours, parallel)
    free = [0.0] * parallel
    for h in hours:
        heapq.heapreplace(free, free[0] + h)
    assert found == pytest.approx(max(free))
    assert found >= max(hours, default=0)
    assert found >= sum(hours) / parallel - 1e-9
    assert wall_hours(hours, 1) == pytest.approx(sum(hours))


def candidate(run, hours):
    estimated = None if hours is None else Estimate(hours, hours, 0.0, "model")
    return Candidate(run, run.spec(), Facts(run.run_key), Verdict("PLANNED"), estimate=estimated)


def test_a_budget_grants_in_order_and_in_full(make_runs):
    runs = make_runs(4)
    asked = [candidate(run, hours) for run, hours in zip(runs, (2.0, 4.0, 1.0, 0.1), strict=True)]
    assert [c.allowance for c in budget.grant(asked, MARGIN * 7)] == [MARGIN * h for h in (2, 4, 1)]
    assert [c.allowance for c in budget.grant(asked, MARGIN * 5)] == [MARGIN * 2]  # no overtaking
    assert budget.grant(asked, 0.0) == []
    with pytest.raises(ClueError, match="plan does not have it"):
        budget.grant([candidate(runs[0], None)], 1.0)


def test_what_is_spent_and_what_is_reserved_is_not_free(make_runs):
    done, running, ended, planned = runs = make_runs(4)

    def attempt(number, allowance, **records):
        intent = {"allowance_gpu_hours": allowance, "executor": "slurm"}
        return Attempt(number, intent, None, None, records.get("cancel"), records.get("end"))

    def start(run, number, hours):
        """Of two ranks; half of the time before the first step, after an hour of another start."""
        began = {"began": 5.0, "job_id": "1"}
        first = {"attempt": number, "time": 5.0 + 900 * hours, "seconds": 3600.0, "world_size": 2}
        generation = run.start_generation({"resumed_from": 0, "job": began, **first})
        with open(run.metrics_path(generation), "ab") as file:
            for share in (0.5, 1.0):
                row = {"kind": "train", "step": 1, "seconds": 3600 + share * 900 * hours}
                append_line(file, row)
            file.write(b'{"kind": "train", "seconds": 1e9')  # torn

    start(running, 1, 3.0)
    start(running, 2, 1.0)
    start(ended, 1, 2.0)
    facts = {
        done.run_key: Facts(done.run_key, "done", result={"gpu_hours": 5.0}),
        running.run_key: Facts(
            running.run_key, attempts=(attempt(1, 4.0, end={}), attempt(2, 10.0))
        ),
        ended.run_key: Facts(ended.run_key, attempts=(attempt(1, 4.0, end={}),)),
        planned.run_key: Facts(planned.run_key),
    }
    # 5 done, 3 and 1 spent by the running one and 9 still reserved, 2 spent by the one that ended
    assert budget.committed_hours(runs, facts) == pytest.approx(5 + 3 + 1 + 9 + 2)
    cancelled = Facts(running.run_key, attempts=(attempt(1, 4.0, cancel={}),))
    # until its end is known its job may go on
    found = budget.committed_hours([running], {running.run_key: cancelled})
    assert found == pytest.approx(3 + 1 + 1)
    for unknown in (
        Facts(running.run_key, attempts=(attempt(1, None),)),
        Facts(running.run_key, damage="torn"),
    ):
        with pytest.raises(ClueError, match=r"without a budget|cannot be told: torn"):
            budget.committed_hours([running], {running.run_key: unknown})


def test_a_finished_run_of_before_counts_its_seconds():
    from scaling.slurm.status import gpu_hours_of

    assert gpu_hours_of({"gpu_hours": 3.5, "seconds": 1.0, "world_size": 9}) == 3.5
    assert gpu_hours_of({"seconds": 1800.0, "world_size": 4}) == 2.0
