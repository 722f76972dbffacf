"""Records of a run: attempts, the generation fence, and curves after crashes."""

import json
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import (
    ConfigError,
    DataConfig,
    Evaluation,
    ModelConfig,
    PoolConfig,
    RunConfig,
)
from scaling.files import RecordError
from scaling.rundir import RunDir, Superseded, append_line

DIGEST = "abcdefghijklmnop"


def configured(seed: int = 0) -> RunConfig:
    return RunConfig(
        model=ModelConfig(layers=1, d_model=8, heads=1),
        data=DataConfig(corpus_digest=DIGEST, vocab_size=64),
        batch_size=4,
        negatives=4,
        steps=100,
        pool=PoolConfig(size=8, digest=DIGEST),
        seed=seed,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, configured(), "demo")


# ---- specification ------------------------------------------------------------------------------


def test_a_run_lies_under_its_key(run: RunDir, tmp_path: Path) -> None:
    key = configured().run_key
    assert run.path == tmp_path / "runs" / key[:2] / key
    assert run.spec() == configured()
    assert run.specification()[1]["corpus"] == "demo"


def test_creating_again_changes_nothing(run: RunDir, tmp_path: Path) -> None:
    before = (run.path / "spec.json").read_bytes()
    RunDir.create(tmp_path, configured(), "another name")
    assert (run.path / "spec.json").read_bytes() == before


def test_another_run_s_specification_is_refused(run: RunDir, tmp_path: Path) -> None:
    other = RunDir.create(tmp_path, configured(seed=1), "demo")
    (run.path / "spec.json").write_bytes((other.path / "spec.json").read_bytes())
    with pytest.raises(RecordError, match=rf"spec\.json: .* key {other.run_key}, not"):
        run.spec()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": {'])
def test_a_damaged_specification_is_named(run: RunDir, content: str) -> None:
    (run.path / "spec.json").write_text(content)
    with pytest.raises(RecordError, match=r"spec\.json"):
        run.spec()


@pytest.mark.parametrize("key", ["", "short", "../../../../etc/x", "ABCDEFGHIJKLMNOP", "a" * 17])
def test_what_is_no_key_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecordError, match="is not a run key"):
        RunDir(tmp_path, key)


def test_a_run_is_found_by_the_first_letters_of_its_key(run: RunDir, tmp_path: Path) -> None:
    for n in (1, 2, 3, 16):
        assert RunDir.find(tmp_path, run.run_key[:n]).run_key == run.run_key


def test_ambiguous_and_unknown_keys_name_what_there_is(run: RunDir, tmp_path: Path) -> None:
    twin = run.run_key[:15] + ("a" if run.run_key[15] != "a" else "b")
    RunDir(tmp_path, twin).path.mkdir()
    both = f"({run.run_key}.*{twin}|{twin}.*{run.run_key}).*give more letters"
    with pytest.raises(RecordError, match=f"2 runs have a key .*{both}"):
        RunDir.find(tmp_path, run.run_key[:15])
    for unknown in ("zzzz", "", "*", "../*", "a/b"):
        with pytest.raises(RecordError):
            RunDir.find(tmp_path, unknown)


# ---- attempts -----------------------------------------------------------------------------------


def test_one_caller_opens_an_attempt(run: RunDir) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: run.record(1, "intent", {"token": str(i)}), range(8)))
    assert won.count(True) == 1
    [attempt] = run.attempts()
    assert attempt.intent["token"] == str(won.index(True))


def test_attempts_hold_the_records_written_so_far(run: RunDir) -> None:
    assert run.attempts() == []
    run.record(1, "intent", {"token": "a"})
    run.record(1, "claim", {"job_id": "1_0"})
    run.record(1, "end", {"class": "preempted"})
    run.record(2, "intent", {"token": "b"})
    first, second = run.attempts()
    assert (first.number, first.submit, first.cancel) == (1, None, None)
    assert first.claim == {"schema_version": 1, "job_id": "1_0"}
    assert second.claim is None


def test_a_record_is_never_replaced(run: RunDir) -> None:
    assert run.record(1, "intent", {"token": "a"})
    assert not run.record(1, "intent", {"token": "b"})
    assert run.attempts()[0].intent["token"] == "a"


def test_an_unknown_record_is_refused(run: RunDir) -> None:
    with pytest.raises(RecordError, match="valid: intent, submit, claim, cancel, end"):
        run.record(1, "../../spec", {})


def test_a_folder_without_an_intent_is_no_attempt(run: RunDir) -> None:
    (run.path / "attempts" / "0001").mkdir(parents=True)
    (run.path / "attempts" / "0001" / ".tmp-123").write_text("torn")
    (run.path / "attempts" / "notes").mkdir()
    assert run.attempts() == []


def test_a_torn_record_is_named(run: RunDir) -> None:
    run.record(1, "intent", {})
    (run.path / "attempts" / "0001" / "claim.json").write_text('{"job"')
    with pytest.raises(RecordError, match=r"0001/claim\.json: not a whole JSON record"):
        run.attempts()


# ---- generations --------------------------------------------------------------------------------


def test_generations_are_numbered_and_say_where_they_resumed(run: RunDir) -> None:
    assert run.generations() == []
    assert run.start_generation({"resumed_from": 0}) == 1
    assert run.start_generation({"resumed_from": 20, "host": "n1"}) == 2
    line = json.loads(run.metrics_path(2).read_text())
    first = json.loads(run.metrics_path(1).read_text())
    assert re.fullmatch("[0-9a-f]{16}", first["token"])
    assert line.pop("token") != first["token"]
    assert line == {
        "kind": "start", "schema_version": 1, "generation": 2, "resumed_from": 20, "host": "n1",
    }  # fmt: skip


def test_a_generation_must_say_where_it_resumed(run: RunDir) -> None:
    with pytest.raises(ValueError, match="resumed from"):
        run.start_generation({})


def test_generations_started_at_once_are_all_different(run: RunDir) -> None:
    with ThreadPoolExecutor(8) as pool:
        started = list(pool.map(lambda _: run.start_generation({"resumed_from": 0}), range(24)))
    assert sorted(started) == run.generations() == list(range(1, 25))


def test_generations_beyond_nine_are_in_order(run: RunDir) -> None:
    for _ in range(11):
        run.start_generation({"resumed_from": 0})
    assert run.generations()[-1] == 11
    run.fence(11)
    with pytest.raises(Superseded):
        run.fence(10)


def test_a_newer_generation_fences_off_the_older(run: RunDir) -> None:
    old = run.start_generation({"resumed_from": 0})
    run.fence(old)
    new = run.start_generation({"resumed_from": 0})
    with pytest.raises(Superseded, match="generation 2 has started; generation 1 stops"):
        run.write_result(old, {"status": "done"})
    assert run.result() is None
    run.write_result(new, {"status": "done", "loss": 1.5})
    assert run.result() == {
        "schema_version": 1, "run_key": run.run_key, "generation": 2, "status": "done", "loss": 1.5,
    }  # fmt: skip


def test_a_folder_that_was_removed_is_not_written_again(run: RunDir) -> None:
    generation = run.start_generation({"resumed_from": 0})
    run.fence(generation)
    shutil.rmtree(run.path)
    with pytest.raises(Superseded, match="not the one that this process opened"):
        run.fence(generation)
    again = RunDir(run.root, run.run_key)
    assert again.start_generation({"resumed_from": 0}) == generation
    again.fence(generation)
    with pytest.raises(Superseded, match="not the one that this process opened"):
        run.fence(generation)


def test_a_result_that_json_cannot_say_is_refused(run: RunDir) -> None:
    generation = run.start_generation({"resumed_from": 0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_result(generation, {"loss": float("nan")})
    assert run.result() is None


# ---- curves -------------------------------------------------------------------------------------


def write_rows(run: RunDir, generation: int, steps: range, torn: bool = False) -> None:
    with run.metrics_path(generation).open("ab") as f:
        for step in steps:
            append_line(f, {"kind": "train", "step": step, "by": generation})
            if step % 5 == 0:
                append_line(f, {"kind": "pool", "step": step, "by": generation})
        if torn:
            f.write(b'{"kind": "train", "step": 9')


def test_steps_computed_twice_count_once(run: RunDir) -> None:
    run.start_generation({"resumed_from": 0})
    write_rows(run, 1, range(1, 13), torn=True)
    run.start_generation({"resumed_from": 10})
    write_rows(run, 2, range(11, 21))
    curve = run.curve("train")
    assert [r["step"] for r in curve] == list(range(1, 21))
    assert [r["by"] for r in curve] == [1] * 10 + [2] * 10
    assert [r["step"] for r in run.curve("pool")] == [5, 10, 15, 20]


def test_a_zombie_s_later_rows_do_not_count(run: RunDir) -> None:
    """An old process that lost its node's network goes on writing its own file."""
    run.start_generation({"resumed_from": 0})
    write_rows(run, 1, range(1, 11))
    run.start_generation({"resumed_from": 10})
    write_rows(run, 2, range(11, 15))
    write_rows(run, 1, range(11, 40))
    assert [(r["step"], r["by"]) for r in run.curve("train")][9:] == [
        (10, 1), (11, 2), (12, 2), (13, 2), (14, 2),
    ]  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Starts of a run: each resumes from some committed step and is killed somewhere."""
    committed, starts = {0}, []
    for _ in range(draw(st.integers(1, 6))):
        resumed = draw(st.sampled_from(sorted(committed)))  # the newest, or one before if damaged
        committed = {s for s in committed if s <= resumed}
        reached = resumed + draw(st.integers(0, 30))
        every = draw(st.integers(1, 10))
        committed |= {s for s in range(resumed + 1, reached + 1) if s % every == 0}
        zombie = draw(st.integers(0, 10))
        starts.append(
            {"resumed": resumed, "reached": reached, "zombie": zombie, "torn": draw(st.booleans())}
        )
    return starts


@settings(deadline=None)
@given(histories())
def test_a_curve_is_the_lineage_of_the_newest_generation(starts: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        run = RunDir.create(Path(root), configured(), "demo")
        model: dict[int, int] = {}  # step -> generation whose computation the checkpoints contain
        for i, start in enumerate(starts, 1):
            assert run.start_generation({"resumed_from": start["resumed"]}) == i
            rows = range(start["resumed"] + 1, start["reached"] + 1)
            write_rows(run, i, rows)
            model = {s: g for s, g in model.items() if s <= start["resumed"]}
            model |= dict.fromkeys(rows, i)
        for i, start in enumerate(starts[:-1], 1):
            end = start["reached"] + 1
            write_rows(run, i, range(end, end + start["zombie"]), torn=start["torn"])
        # A zombie's rows lie beyond its last commit, so beyond where its successor resumed.
        curve = [(r["step"], r["by"]) for r in run.curve("train")]
        assert curve == sorted(model.items())
        assert [s for s, _ in curve] == list(range(1, len(curve) + 1))


def test_progress_is_the_newest_row(run: RunDir) -> None:
    assert run.progress() is None
    run.start_generation({"resumed_from": 0})
    assert run.progress() is None
    write_rows(run, 1, range(1, 8), torn=True)
    assert run.progress() == {"kind": "train", "step": 7, "by": 1}
    run.start_generation({"resumed_from": 5})
    assert run.progress() == {"kind": "train", "step": 7, "by": 1}


def test_a_foreign_line_is_named(run: RunDir) -> None:
    run.start_generation({"resumed_from": 0})
    with run.metrics_path(1).open("ab") as f:
        f.write(b"Traceback\n")
    with pytest.raises(RecordError, match=r"metrics/1\.jsonl: not a metrics row"):
        run.curve("train")


def test_metrics_refuse_nan(run: RunDir) -> None:
    run.start_generation({"resumed_from": 0})
    with run.metrics_path(1).open("ab") as f, pytest.raises(ValueError, match="not JSON compliant"):
        append_line(f, {"kind": "train", "step": 1, "loss": float("inf")})
    assert run.progress() is None


# ---- downstream evaluations ---------------------------------------------------------------------


def evaluation(task: str = "books", **changes: Any) -> Evaluation:
    return Evaluation(corpus_digest=DIGEST, task=task, task_digest=DIGEST, **changes)


def leave(run: RunDir, *evaluations: Evaluation) -> None:
    """As an evaluation does: the record, and a table beside it."""
    for one in evaluations:
        (run.path / "transfer").mkdir(exist_ok=True)
        for suffix in ("json", "parquet"):
            (run.path / "transfer" / f"{one.key}.{suffix}").write_text("{}")


def finish(run: RunDir, status: str = "done") -> None:
    run.write_result(run.start_generation({"resumed_from": 0}), {"status": status})


def test_what_is_wanted_is_read_as_it_was_declared(run: RunDir) -> None:
    assert run.wanted() == []
    assert run.evaluations() == (0, [])
    wanted = [evaluation(head="linear"), evaluation("beauty", history="all", folds=2, seeds=3)]
    run.want(wanted)
    assert run.wanted() == sorted(wanted, key=lambda e: e.key)
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    run.want(reversed(wanted))
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before


def test_evaluations_of_several_sweeps_add_up(run: RunDir) -> None:
    keys = set()
    for settings_of_a_sweep in ({}, {"head": "linear"}, {}, {"folds": 10}):
        one = evaluation(**settings_of_a_sweep)
        run.want([one])
        keys.add(one.key)
        assert run.evaluations() == (len(keys), sorted(keys))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"task": "books"}', '{"task":'])
def test_a_damaged_wish_is_named(run: RunDir, content: str) -> None:
    run.want([evaluation()])
    path = run.path / "transfer" / "wanted" / f"{evaluation().key}.json"
    path.write_text(content)
    with pytest.raises((RecordError, ConfigError), match=re.escape(path.name)):
        run.wanted()
    assert run.evaluations() == (1, [evaluation().key])  # by listing alone: it is still owed


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.booleans()), max_size=8),
    st.sets(st.sampled_from("abcdef")),
    st.sampled_from([None, "done", "diverged"]),
)
def test_a_run_is_over_when_nothing_that_is_wanted_is_missing(
    steps: list[tuple[str, bool, bool]], more: set[str], status: str | None
) -> None:
    with tempfile.TemporaryDirectory() as root:
        run = RunDir.create(Path(root), configured(), "demo")
        wanted, there = set[str](), set[str]()
        for task, want, record in steps:
            one = evaluation(task)
            if want:
                run.want([one])
                wanted.add(one.key)
            if record:
                leave(run, one)
                there.add(one.key)
        if status:
            finish(run, status)
        assert run.evaluations() == (len(wanted), sorted(wanted - there))
        keys = {evaluation(task).key for task in more}
        found = run.evaluations(more=keys)
        assert found == (len(wanted | keys), sorted((wanted | keys) - there))
        over = {None: False, "done": not wanted - there, "diverged": True}
        assert run.over() is over[status]


def test_tables_and_other_steps_are_no_records_of_the_last(run: RunDir) -> None:
    one = evaluation()
    run.want([one])
    finish(run)
    other = run.path / "transfer" / "step-000000060"
    other.mkdir()
    (other / f"{one.key}.json").write_text("{}")
    (run.path / "transfer" / f"{one.key}.parquet").write_text("")
    (run.path / "transfer" / f".{one.key}.json.tmp").write_text("torn")
    assert run.evaluations() == (1, [one.key])
    assert not run.over()
