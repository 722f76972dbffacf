"""Runs that a sweep wants evaluated downstream: over only when they are, whatever dies meanwhile.

Real jobs against the fake Slurm, with stand-ins for training and for evaluation (``standin``).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from scenario import states, whole

from scaling import ClueError
from scaling.config import ConfigError, Evaluation
from scaling.files import write_json
from scaling.rundir import Attempt, RunDir, append_line
from scaling.slurm import sync
from scaling.slurm.budget import committed_hours, set_budget
from scaling.slurm.cancel import cancel
from scaling.slurm.cost import EVALUATION_S, MARGIN, START_S
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.state import Facts, Snapshot, State, derive, fruitless
from scaling.slurm.status import read_facts


def evaluation(task, **changes):
    fields = {"corpus_digest": "c" * 16, "task": task, "task_digest": "t" * 16}
    return Evaluation(**fields | changes)


@pytest.fixture
def wanted():
    return [evaluation("food"), evaluation("kitchen")]


@pytest.fixture
def runs(make_runs, wanted):
    found = make_runs(1, steps=4)
    for run in found:
        run.want(wanted)
    return found


def evaluated(run):
    """Tasks whose evaluation began, in their order."""
    path = run.path / "evaluated.log"
    return path.read_text().split() if path.exists() else []


def evaluate_how(root, **settings):
    (root / "evaluation.json").write_text(json.dumps(settings))


def over(run):
    """Trained once, by one start, and evaluated."""
    trained = [s for s in run.starts() if "missing" not in s]
    return run.over() and len(trained) == 1 and whole(run)


def test_a_job_trains_and_then_evaluates(root, runs, fake_slurm, slurm_profile):
    (row,) = sync.submit(root, runs, slurm_profile, sweep="s")
    assert (row["evaluated"], row["wanted"]) == (None, None)  # of a run that is not trained
    assert fake_slurm.finish() == [0]
    (run,) = runs
    assert evaluated(run) == ["food", "kitchen"]
    assert over(run)
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["evaluated"], row["wanted"], row["over"]) == ("DONE", 2, 2, True)
    assert run.attempts()[0].end["class"] == "done"
    assert sync.submit(root, runs, slurm_profile, sweep="s")[0]["action"] is None
    assert "evaluating food-" in next(run.root.glob("sweeps/s/chunks/*/*_0_log.out")).read_text()


def test_a_task_that_is_added_later_is_evaluated_without_training(
    root, runs, fake_slurm, slurm_profile
):
    (run,) = runs
    sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.finish()
    run.want([evaluation("books")])
    assert not run.over()
    assert run.evaluations()[0] == 3
    (seen,) = sync.preview(root, [run.spec()], slurm_profile, sweep="s").rows
    assert seen["action"] == "submit"
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert run.attempts()[1].intent["missing"] == 1
    assert fake_slurm.finish() == [0]
    assert evaluated(run) == ["food", "kitchen", "books"]
    assert over(run)
    # Some that nobody has declared yet would be, by a submission that is only tried.
    more = sync.preview(root, [run.spec()], slurm_profile, sweep="s", wanted=["films-aaaaaaaa"])
    assert [r["action"] for r in more.rows] == ["submit"]
    assert run.over()


@pytest.mark.parametrize("place", ["food", "kitchen"])
def test_a_job_that_dies_while_it_evaluates_is_repeated(
    root, runs, fake_slurm, slurm_profile, place
):
    (run,) = runs
    evaluate_how(root, kill_at=place)
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert fake_slurm.finish() != [0]
    assert run.result()["status"] == "done"
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["action"], row["step"]) == ("QUEUED", "submit", 4)
    evaluate_how(root)
    assert fake_slurm.finish() == [0]
    assert over(run)
    # It died between the result and the first record, or between the first and the second.
    assert (
        evaluated(run)
        == {
            "food": ["food", "food", "kitchen"],
            "kitchen": ["food", "kitchen", "kitchen"],
        }[place]
    )


def test_it_is_given_up_after_some_tries_without_a_new_record(
    root, runs, fake_slurm, slurm_profile
):
    (run,) = runs
    evaluate_how(root, kill_at="kitchen")
    sync.submit(root, runs, slurm_profile, sweep="s")
    tries = 0
    while fake_slurm.finish():
        tries += 1
        (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    # The first try trained and evaluated one task: what follows is without progress.
    assert tries == 3
    assert (row["state"], row["cause"], row["over"]) == ("FAILED", "crashed", True)
    assert (row["evaluated"], row["wanted"]) == (1, 2)
    evaluate_how(root)
    sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True, new_code=True)
    assert fake_slurm.finish() == [0]
    assert over(run)


def test_preempted_while_it_evaluates_it_goes_on_with_what_is_missing(
    root, runs, fake_slurm, slurm_profile
):
    (run,) = runs
    evaluate_how(root, stop_at="kitchen")
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert fake_slurm.run(0) == 0
    job = fake_slurm.jobs()[0]
    assert (job["state"], job["restart"]) == ("PENDING", 1)
    assert run.attempts()[0].end is None
    evaluate_how(root)
    assert fake_slurm.run(0) == 0
    assert evaluated(run) == ["food", "kitchen", "kitchen"]
    assert over(run)
    assert len(run.attempts()) == 1


def test_an_evaluation_that_fails_by_itself_is_told_and_the_training_stays(
    root, runs, fake_slurm, slurm_profile
):
    (run,) = runs
    evaluate_how(root, error="task 'food': the encoder's features hold NaN")
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert fake_slurm.finish() == [1]
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["cause"], row["over"]) == ("FAILED", "error", True)
    assert "features hold NaN" in row["evidence"]
    assert (row["loss"], row["evaluated"]) == (run.result()["loss"], 0)
    assert run.result()["status"] == "done"
    evaluate_how(root)
    sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True, new_code=True)
    assert fake_slurm.finish() == [0]
    assert over(run)


def test_a_run_that_diverged_is_not_evaluated(root, make_runs, wanted, fake_slurm, slurm_profile):
    (run,) = make_runs(1, steps=4, diverge_at=3)
    run.want(wanted)
    sync.submit(root, [run], slurm_profile, sweep="s")
    assert fake_slurm.finish() == [0]
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["over"]) == ("DIVERGED", True)
    assert evaluated(run) == []
    assert run.over()


def test_two_logins_submit_one_job(root, runs, fake_slurm, slurm_profile, monkeypatch):
    (run,) = runs
    sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.finish()
    run.want([evaluation("books")])
    choose = sync._choose

    def meanwhile(*args, **kwargs):
        chosen = choose(*args, **kwargs)
        monkeypatch.setattr(sync, "_choose", choose)
        sync.submit(root, [RunDir(root, run.run_key)], slurm_profile, sweep="s")
        return chosen

    monkeypatch.setattr(sync, "_choose", meanwhile)
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert len(fake_slurm.jobs()) == 2
    assert fake_slurm.finish() == [0]
    assert evaluated(run) == ["food", "kitchen", "books"]


def test_cancelled_while_it_waits_for_its_evaluation(root, runs, fake_slurm, slurm_profile):
    (run,) = runs
    evaluate_how(root, kill_at="food")
    sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.finish()
    sync.sync(root, runs, slurm_profile, sweep="s")
    assert cancel(runs) == [run.run_key]
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["over"], row["evaluated"]) == ("CANCELLED", True, 0)
    assert run.result()["status"] == "done"
    evaluate_how(root)
    sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True, new_code=True)
    assert fake_slurm.finish() == [0]
    assert over(run)


def test_a_run_trained_by_hand_is_evaluated_by_the_sweep(root, runs, fake_slurm, slurm_profile):
    (run,) = runs
    generation = run.start_generation({"resumed_from": 0, "world_size": 1})
    with open(run.metrics_path(generation), "ab") as file:
        for step in range(1, 5):
            append_line(file, {"kind": "train", "step": step, "loss": 1.0, "seconds": step})
    result = {"status": "done", "step": 4, "loss": 1.0, "train_loss": 1.0, "world_size": 1}
    run.write_result(generation, result)
    assert states(sync.submit(root, runs, slurm_profile, sweep="s")) == ["QUEUED"]
    assert fake_slurm.finish() == [0]
    assert evaluated(run) == ["food", "kitchen"]
    assert over(run)


@pytest.mark.parametrize("place", ["food", "kitchen"])
def test_slices_too_short_for_an_evaluation_do_not_go_on_for_ever(
    root, runs, fake_slurm, slurm_profile, place
):
    """Slurm requeues the job after each; sync is asked by nobody."""
    (run,) = runs
    evaluate_how(root, stop_at=place)
    sync.submit(root, runs, slurm_profile, sweep="s")
    starts = 0
    while fake_slurm.jobs()[0]["state"] == "PENDING":
        fake_slurm.run(0)
        starts += 1
        assert starts < 9
    # One start trains, and evaluates what comes before the place.
    assert starts == {"food": 4, "kitchen": 5}[place]
    end = run.attempts()[0].end
    assert end["class"] == "no_progress"
    left = {"food": 2, "kitchen": 1}[place]
    assert f"none finished one of {left} evaluations: longer slices" in end["evidence"]
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["over"], row["evaluated"]) == ("FAILED", True, 2 - left)
    evaluate_how(root)
    sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
    assert fake_slurm.finish() == [0]
    assert over(run)


def test_cancelled_while_it_evaluates(root, runs, fake_slurm, slurm_profile, until):
    (run,) = runs
    evaluate_how(root, seconds=2.0)
    sync.submit(root, runs, slurm_profile, sweep="s")
    process = fake_slurm.start(0)
    until(lambda: evaluated(run) == ["food"], 30, 0.05)
    assert cancel(runs) == [run.run_key]
    fake_slurm.set(0, state="COMPLETING")
    os.kill(fake_slurm.rank(0), signal.SIGTERM)
    assert fake_slurm.end(0, process) == 0
    assert run.attempts()[0].end["class"] == "cancelled"
    # It was told before it ended, and ends when the evaluation at work is done.
    assert evaluated(run) == ["food"]
    for drive in (sync.sync, sync.submit):
        (row,) = drive(root, runs, slurm_profile, sweep="s")
        assert (row["state"], row["action"], row["evaluated"]) == ("CANCELLED", None, 1)
    assert cancel(runs) == []
    evaluate_how(root)
    sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
    assert fake_slurm.finish() == [0]
    assert over(run)
    assert evaluated(run) == ["food", "kitchen"]


def test_its_hours_count_as_those_of_training_do(root, runs, fake_slurm, slurm_profile):
    (run,) = runs
    evaluate_how(root, seconds=1.0)
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert fake_slurm.finish() == [0]
    (row,) = sync.status(runs)
    assert row["gpu_hours"] == pytest.approx(run.gpu_hours())
    assert row["gpu_hours"] > run.result()["gpu_hours"] + 2 / 3600
    spent = committed_hours(runs, {run.run_key: read_facts(run)})
    assert spent == row["gpu_hours"]
    trained, evaluating = run.starts()
    # Nothing counts twice: the second begins when the first is over.
    assert evaluating["job"]["began"] > trained["time"]
    assert row["gpu_hours"] * 3600 < evaluating["time"] - trained["job"]["began"] + 60


def test_a_look_at_one_that_is_evaluated_opens_one_file_more(
    root, make_runs, wanted, fake_slurm, slurm_profile
):
    """Of the start that evaluated, whose hours count: neither declarations nor records."""
    plain, run = make_runs(2, steps=4)
    run.want(wanted)
    sync.submit(root, [plain, run], slurm_profile, sweep="s")
    assert fake_slurm.finish() == [0, 0]
    opened, looking = [], True

    def hook(event, args):  # stays for the life of the process
        if looking and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(hook)
    rows = sync.status([plain, run])
    looking = False
    assert [row["state"] for row in rows] == ["DONE", "DONE"]
    files = [Path(path) for path in opened]
    own = [{f.relative_to(r.path) for f in files if f.is_relative_to(r.path) and f.is_file()}
           for r in (plain, run)]  # fmt: skip
    assert own[1] - own[0] == {Path("metrics/2.jsonl")}
    assert own[0] < own[1]


@pytest.mark.parametrize("damage", [{}, {"generation": None}, {"generation": "1"}])
def test_a_result_of_no_generation_is_damaged(root, runs, fake_slurm, slurm_profile, damage):
    (run,) = runs
    sync.submit(root, runs, slurm_profile, sweep="s")
    assert fake_slurm.finish() == [0]
    result = run.result()
    del result["generation"]
    write_json(run.path / "result.json", result | damage)
    (row,) = sync.sync(root, runs, slurm_profile, sweep="s")
    assert (row["state"], row["cause"], row["action"]) == ("FAILED", "damaged", None)
    assert "result.json: status 'done' at step 4 of generation" in row["evidence"]
    with pytest.raises(ClueError, match=r"cannot be told: .*result\.json"):
        committed_hours(runs, {run.run_key: read_facts(run)})


def test_a_job_that_evaluates_is_not_stalled(root, runs, fake_slurm, slurm_profile, monkeypatch):
    """Hours after the result was written its metrics say that it is alive."""
    (run,) = runs
    evaluate_how(root, kill_at="kitchen")
    sync.submit(root, runs, slurm_profile, sweep="s")
    fake_slurm.finish()
    fake_slurm.set(0, state="RUNNING")
    hours_ago = time.time() - 7200
    os.utime(run.path / "result.json", (hours_ago, hours_ago))
    (row,) = sync.status(runs)
    assert (row["state"], row["step"], row["stalled"]) == ("RUNNING", 4, False)
    assert row["progress_age_s"] < 600
    os.utime(run.metrics_path(2), (hours_ago, hours_ago))
    assert sync.status(runs)[0]["stalled"]


def test_ranks_that_have_trained_leave_and_the_first_evaluates(root, runs):
    (run,) = runs
    profile = ClusterProfile(name="local", executor="local", shape=Shape(tasks_per_node=2))
    (row,) = sync.sync(root, runs, profile, sweep="s", watch=True, interval_s=0.05)
    assert (row["state"], row["evaluated"], row["attempts"]) == ("DONE", 2, 1)
    assert [start["world_size"] for start in run.starts()] == [2, 2]
    assert over(run)
    run.want([evaluation("books")])
    (row,) = sync.sync(root, runs, profile, sweep="s", watch=True, interval_s=0.05)
    assert (row["state"], row["evaluated"], row["attempts"]) == ("DONE", 3, 2)
    assert evaluated(run) == ["food", "kitchen", "books"]


def test_an_allowance_holds_for_evaluations_too(root, runs, fake_slurm, slurm_profile):
    """Each try is granted more than one took that did not suffice."""
    (run,) = runs
    row = {"run_key": run.run_key, "n_total": 1, "flops_exact": 1.0}
    write_json(root / "sweeps/s/plan.json", {"runs": [row]})
    set_budget(root, "s", 1.0, runs)
    sync.submit(root, runs, slurm_profile, sweep="s")
    (first,) = run.attempts()
    asked = START_S + 2 * EVALUATION_S  # the training takes no time
    assert first.intent["estimate_gpu_hours"] == pytest.approx(asked / 3600, rel=1e-3)
    evaluate_how(root, kill_at="kitchen")
    assert fake_slurm.finish() != [0]
    # As if the one that was cut had been at it for ten minutes.
    begun = run.starts()[1]["seconds"]
    with open(run.metrics_path(2), "ab") as file:
        at = {"step": 4, "seconds": begun + 600.0, "missing": 2}
        append_line(file, {"kind": "evaluation", **at})
    sync.sync(root, runs, slurm_profile, sweep="s")
    second = run.attempts()[1].intent
    assert second["estimate_gpu_hours"] == pytest.approx((START_S + MARGIN * 600) / 3600, rel=1e-3)
    assert second["allowance_gpu_hours"] == pytest.approx(MARGIN * second["estimate_gpu_hours"])
    evaluate_how(root)
    assert fake_slurm.finish() == [0]
    assert over(run)


def test_progress_is_judged_by_the_newest_tries(runs):
    """What was declared since is no failure of the tries before."""

    def attempt(number, cause, **intent):
        intent = {"token": "t", "index": 0, "executor": "slurm", "time": 0.0, **intent}
        return Attempt(number, intent, {"job_id": "1"}, None, None, {"class": cause})

    def tries(*attempts, missing=2):
        facts = Facts("k" * 16, "done", 4, attempts, steps=4, wanted=4, missing=missing)
        return fruitless(facts), derive(facts, Snapshot(), 0.0).state.value

    # It wrote its result, from a checkpoint of the last step: that is progress.
    wrote = attempt(1, "crashed", step=4, missing=None)
    assert tries(wrote) == (0, "FAILED")
    assert derive(Facts("k" * 16, "done", 4, (wrote,), missing=2), Snapshot(), 0.0).start
    assert tries(wrote, attempt(2, "crashed", step=4, missing=2))[0] == 1
    assert tries(wrote, attempt(2, "crashed", step=4, missing=3))[0] == 0
    finished = attempt(2, "done", step=4, missing=1)
    assert tries(wrote, finished) == (0, "PLANNED")
    assert tries(wrote, finished, attempt(3, "crashed", step=4, missing=2))[0] == 1
    # As intents were before they said what was missing.
    old = attempt(1, "crashed", step=0)
    assert tries(old)[0] == 0


def test_facts_of_a_trained_run_that_lacks_some(runs, wanted):
    (run,) = runs
    assert run.wanted() == wanted
    run.want(wanted)  # doing it again changes nothing
    assert run.evaluations() == (2, [e.key for e in wanted])
    assert not run.over()
    facts = read_facts(run)
    assert (facts.status, facts.wanted, facts.missing) == (None, 0, 0)
    missing = Facts(run.run_key, "done", 4, steps=4, wanted=2, missing=2)
    assert derive(missing, Snapshot(), 0.0).state is State.PLANNED
    assert derive(missing, Snapshot(), 0.0).start
    done = Facts(run.run_key, "done", 4, steps=4, wanted=2, missing=0, newest=3)
    assert derive(done, Snapshot(), 0.0).state is State.DONE
    (run.path / "transfer" / "wanted" / f"{wanted[0].key}.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"corpus_digest.* is missing"):
        run.wanted()
