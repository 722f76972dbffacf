"""The phase of a job that evaluates, in this process: what it leaves, counts and says."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_slurm_machine import RUNS

from scaling import ClueError
from scaling.config import Evaluation
from scaling.files import write_json
from scaling.rundir import RunDir
from scaling.slurm import evaluating
from scaling.slurm.evaluating import evaluate_missing

START = {"attempt": 3, "job": {"began": 1000.0}, "world_size": 2}


def evaluation(task):
    return Evaluation(corpus_digest="c" * 16, task=task, task_digest="t" * 16)


def trained(run):
    generation = run.start_generation({"resumed_from": 0})
    run.write_result(generation, {"status": "done", "step": 4, "seconds": 50.0})
    return run


@pytest.fixture
def run(make_runs):
    return trained(make_runs(1, steps=4)[0])


def leave(run, one):
    write_json(run.path / "transfer" / f"{one.key}.json", {})


def rows(run):
    return run.curve("evaluation")


def test_what_is_there_is_not_asked_for_again(run):
    assert evaluate_missing(run, START, None, bool)
    food, kitchen = evaluation("food"), evaluation("kitchen")
    run.want([food, kitchen])
    leave(run, kitchen)
    asked = []

    def evaluate(wanted, tell):
        asked.extend(wanted)
        leave(run, food)

    assert evaluate_missing(run, START, evaluate, bool)
    assert asked == [food]
    assert evaluate_missing(run, START, None, bool)
    assert run.generations() == [1, 2]
    assert run.over()


def test_what_is_declared_meanwhile_is_evaluated_too(run, capsys):
    tasks = [evaluation(task) for task in ("books", "films", "games")]
    run.want(tasks[:1])
    asked = []

    def evaluate(wanted, tell):
        asked.append([e.task for e in wanted])
        for one in wanted:
            tell(0.0, one.key)
            tell(0.5, one.key)
            leave(run, one)
        run.want(tasks[: len(asked) + 1])

    assert evaluate_missing(run, START, evaluate, bool)
    assert asked == [["books"], ["films"], ["games"]]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"evaluating {one.key}, 0% done" for one in tasks]


def test_an_evaluation_that_leaves_no_record_is_an_error(run):
    food = evaluation("food")
    run.want([food])
    with pytest.raises(ClueError, match=f"{run.run_key}: {food.key} left no record"):
        evaluate_missing(run, START, lambda wanted, tell: None, bool)
    # Of a name that is not that of what it declares there will never be one.
    leave(run, food)
    wish = run.path / "transfer" / "wanted" / f"{food.key}.json"
    wish.rename(wish.with_name("food-aaaaaaaa.json"))
    with pytest.raises(ClueError, match="food-aaaaaaaa left no record"):
        evaluate_missing(run, START, lambda wanted, tell: None, bool)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_stopped_it_keeps_what_is_done(run, when):
    food, kitchen = evaluation("food"), evaluation("kitchen")
    run.want([food, kitchen])
    stop = [when == "before"]

    def evaluate(wanted, tell):
        leave(run, food)
        if when == "between":
            stop[0] = True
            return
        leave(run, kitchen)
        stop[0] = True

    assert evaluate_missing(run, START, evaluate, lambda: stop[0]) == (when == "after")
    left = {"before": 2, "between": 1, "after": 0}[when]
    assert len(run.evaluations()[1]) == left
    if when == "before":
        assert run.generations() == [1]  # no start that could count as one without progress
        return
    assert [row["missing"] for row in rows(run)] == [left]
    assert run.starts()[-1]["missing"] == 2


@given(st.lists(st.floats(0.0, 500.0), min_size=1, max_size=6), st.integers(0, 6))
def test_its_hours_count_whatever_ends_it(spans, fails_at):
    """Those of two ranks from the beginning of the job on, and what an evaluation took."""
    now = [2000.0]
    clock = SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0])
    tasks = [evaluation(f"t{i}") for i in range(len(spans))]

    def evaluate(wanted, tell):
        for i, (one, span) in enumerate(zip(wanted, spans, strict=True)):
            if i == fails_at:
                raise ValueError("boom")
            now[0] += span
            tell(0.0, one.key)
            leave(run, one)

    start = {**START, "job": {"began": now[0] - 20.0}}
    with tempfile.TemporaryDirectory() as root, mock.patch.object(evaluating, "time", clock):
        run = trained(RunDir.create(Path(root), RUNS[0], "none"))
        run.want(tasks)
        if fails_at < len(spans):
            with pytest.raises(ValueError, match="boom"):
                evaluate_missing(run, start, evaluate, bool)
        else:
            assert evaluate_missing(run, start, evaluate, bool)
        took, finished = sum(spans[:fails_at]), min(fails_at, len(spans))
        assert run.gpu_hours(3) == pytest.approx(2 * (20.0 + took) / 3600)
        assert run.evaluation_seconds() == pytest.approx(took / max(1, finished))
        seconds = [row["seconds"] for row in rows(run)]
        assert seconds == sorted(seconds)
        assert seconds[-1] == pytest.approx(50.0 + took)
        assert rows(run)[-1]["missing"] == len(spans) - finished
        assert run.pace() is None  # of training there is no row
