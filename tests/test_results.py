"""Collecting run directories of every fate, and reading the tables back."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling import collect as collecting
from scaling import results
from scaling.collect import collect
from scaling.config import CorpusCard, PoolConfig
from scaling.files import RecordError, write_json
from scaling.results import SCHEMAS, ResultsError, Tables, data_dictionary, load
from scaling.rundir import RunDir, append_line
from scaling.sweeps import PLAN_COLUMNS, Grid, PlannedRun

STEPS = 10
ROOT = Path(__file__).parents[1]


def card(digest: str | None = "abcdefghijklmnop") -> CorpusCard:
    return CorpusCard(
        name="toy",
        digest=digest,
        services=("search", "shop"),
        vocab_size=100,
        n_users=64,
        pool=PoolConfig(size=8, digest="ponmlkjihgfedcba") if digest else None,
        items_per_user={"search": (0.0, 0.5, 0.5), "shop": (0.0, 0.0, 1.0)},
        tokens_per_item=(0.0, 0.0, 1.0),
    )


def plan(corpus: CorpusCard, seeds: int = 6) -> list[PlannedRun]:
    return Grid(
        name="toy",
        figure="Fig. 0",
        source="test",
        corpus=Path("toy.toml"),
        base={"model": "1x8", "batch_size": 4, "steps": STEPS, "evaluations": 2},
        seeds=tuple(range(seeds)),
    ).runs(corpus)


def start(root: Path, planned: PlannedRun) -> RunDir:
    assert planned.config is not None
    run = RunDir.create(root, planned.config, "toy")
    run.record(1, "intent", {"at": 0.0})
    return run


def steps(run: RunDir, first: int, last: int, resumed_from: int, loss: float = 1.0) -> int:
    """A generation that trains steps first..last, with an evaluation at its last step."""
    generation = run.start_generation({"resumed_from": resumed_from})
    with open(run.metrics_path(generation), "ab") as f:
        for step in range(first, last + 1):
            row = {"step": step, "users": 4.0 * step, "flops_exact": 8.64e19 * step}
            append_line(f, {"kind": "train", "loss": loss, "lr": 0.1, **row})
        pool = {"loss": loss, "loss_refit": loss, "accuracy": 0.5, "pools": {"4": loss / 2}}
        append_line(f, {"kind": "pool", **row, **pool})
    return generation


def result(planned: PlannedRun, **changed: Any) -> dict[str, Any]:
    record = dict.fromkeys(collecting.RESULT_COLUMNS)
    record |= {"status": "done", "step": STEPS, "loss": 1.5, "chance": math.log(8)}
    record |= {"pool_digest": "ponmlkjihgfedcba", "n_total": planned.row["n_total"]}
    return record | {"flops_exact": 2.0, "pf_days_exact": 3.0} | changed


@pytest.fixture
def runs() -> list[PlannedRun]:
    return plan(card())


def take(root: Path, runs: list[PlannedRun]) -> Tables:
    report = collect(root / "work", [r.row for r in runs], "toy", root / "results")
    tables = load(root / "results")
    assert tables.collected == report
    return tables


# ---- what becomes of each run -------------------------------------------------------------------


def test_every_fate_keeps_its_row_and_is_accounted_for(
    tmp_path: Path, runs: list[PlannedRun]
) -> None:
    done, diverged, stopped, torn, empty, _absent = runs
    work = tmp_path / "work"
    run = start(work, done)
    run.write_result(steps(run, 1, STEPS, 0), result(done))
    run = start(work, diverged)
    at_4 = result(diverged, status="diverged", step=4, loss=None)
    run.write_result(steps(run, 1, 4, 0), at_4)
    steps(start(work, stopped), 1, 7, 0)
    run = start(work, torn)
    steps(run, 1, STEPS, 0)
    (run.path / "result.json").write_text('{"status": "do')
    start(work, empty)

    tables = take(tmp_path, runs)

    assert tables.runs["run_key"].tolist() == [r.row["run_key"] for r in runs]
    assert tables.runs["state"].tolist()[:2] == ["DONE", "DIVERGED"]
    assert tables.runs["state"].iloc[2:5].isna().all()
    assert tables.runs["state"].iloc[5] == "PLANNED"
    assert tables.runs["loss"].notna().tolist() == [True, *[False] * 5]
    assert tables.runs["step"].tolist()[:3] == [STEPS, 4, 7]
    keys = [r.row["run_key"] for r in runs]
    found = tables.collected
    assert found["planned"] == 6
    assert found["states"] == {"DIVERGED": 1, "DONE": 1, "PLANNED": 1, "UNFINISHED": 3}
    assert found["with_loss"] == 1
    assert found["diverged"] == [{"run_key": keys[1], "step": 4}]
    assert [r["run_key"] for r in found["incomplete"]] == [keys[2], keys[4], keys[5]]
    assert found["incomplete"][0]["reason"] == "not over, last step 7"
    assert [r["run_key"] for r in found["unreadable"]] == [keys[3]]
    assert "result.json" in found["unreadable"][0]["error"]
    # nothing of an unreadable run is believed
    assert keys[3] not in set(tables.curves["run_key"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"status": "finished"}, "status is 'finished'; valid: done, diverged"),
        ({"loss": None}, "done at step 10 of 10 with loss None"),
        ({"step": 9}, "done at step 9 of 10"),
        ({"pool_digest": "aaaaaaaaaaaaaaaa"}, "pool_digest is 'aaaaaaaaaaaaaaaa', expected"),
        ({"n_total": 1}, "n_total is 1, expected"),
    ],
)
def test_a_result_that_cannot_be_true_is_not_taken(
    tmp_path: Path, runs: list[PlannedRun], changed: dict[str, Any], message: str
) -> None:
    run = start(tmp_path / "work", runs[0])
    run.write_result(steps(run, 1, STEPS, 0), result(runs[0], **changed))
    tables = take(tmp_path, runs[:1])
    assert message in tables.collected["unreadable"][0]["error"]
    assert pd.isna(tables.runs["loss"].iloc[0])


@pytest.mark.parametrize(
    "line", [b"{}\n", b"[]\n", b'{"kind": "pool", "step": 3, "loss": "low"}\n', b"half\n"]
)
def test_metrics_of_the_wrong_shape_spoil_one_run_only(
    tmp_path: Path, runs: list[PlannedRun], line: bytes
) -> None:
    good, bad = (start(tmp_path / "work", r) for r in runs[:2])
    good.write_result(steps(good, 1, STEPS, 0), result(runs[0]))
    steps(bad, 1, 2, 0)
    with open(bad.metrics_path(1), "ab") as f:
        f.write(line)
    tables = take(tmp_path, runs[:2])
    assert [u["run_key"] for u in tables.collected["unreadable"]] == [bad.run_key]
    assert str(bad.path) in tables.collected["unreadable"][0]["error"]
    assert tables.runs["loss"].tolist()[0] == 1.5
    assert set(tables.curves["run_key"]) == {good.run_key}


def test_a_result_without_a_column_names_it(tmp_path: Path, runs: list[PlannedRun]) -> None:
    run = start(tmp_path / "work", runs[0])
    record = result(runs[0])
    del record["chance"]
    run.write_result(steps(run, 1, STEPS, 0), record)
    tables = take(tmp_path, runs[:1])
    assert tables.collected["unreadable"][0]["error"].endswith("result.json: lacks chance")


def test_a_specification_of_another_run_is_unreadable(
    tmp_path: Path, runs: list[PlannedRun]
) -> None:
    one, two = (start(tmp_path / "work", r) for r in runs[:2])
    (one.path / "spec.json").write_bytes((two.path / "spec.json").read_bytes())
    tables = take(tmp_path, runs[:2])
    assert [u["run_key"] for u in tables.collected["unreadable"]] == [one.run_key]


def test_steps_computed_twice_after_a_crash_appear_once(
    tmp_path: Path, runs: list[PlannedRun]
) -> None:
    run = start(tmp_path / "work", runs[0])
    steps(run, 1, 7, 0, loss=9.0)
    with open(run.metrics_path(1), "ab") as f:
        f.write(b'{"kind": "train", "st')  # torn by the crash
    steps(run, 5, STEPS, 4, loss=2.0)
    curves = take(tmp_path, runs[:1]).curves
    train = curves[curves["kind"] == "train"]
    assert train["step"].tolist() == list(range(1, STEPS + 1))
    assert train["loss"].tolist() == [9.0] * 4 + [2.0] * 6
    pool = curves[curves["kind"] == "pool"]
    assert pool["step"].tolist() == [STEPS, STEPS]  # the one at step 7 was computed again
    assert pool["pool_size"].tolist() == [8, 4]
    assert pool["loss"].tolist() == [2.0, 1.0]
    assert pool["pf_days_exact"].tolist() == [STEPS, STEPS]


def test_every_file_of_a_finished_run_is_opened_once(
    tmp_path: Path, runs: list[PlannedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "work", runs[0])
    run.record(1, "end", {"class": "killed"})
    (run.path / "attempts" / "0002").mkdir()  # of somebody who died before the intent: no attempt
    steps(run, 1, 7, 0)
    run.write_result(steps(run, 5, STEPS, 4), result(runs[0]))
    opened: list[str] = []
    io_open = io.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return io_open(path, *args, **kwargs)

    monkeypatch.setattr("io.open", counting)
    monkeypatch.setattr("builtins.open", counting)
    tables = take(tmp_path, runs[:1])
    own = sorted(Path(p).name for p in opened if p.startswith(str(run.path)))
    assert own == ["1.jsonl", "2.jsonl", "result.json", "spec.json"]
    assert tables.runs["attempts"].tolist() == [1]
    assert tables.runs["corpus"].tolist() == ["toy"]


def test_long_training_curves_are_thinned_and_say_so(
    tmp_path: Path, runs: list[PlannedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "TRAIN_POINTS", 4)
    steps(start(tmp_path / "work", runs[0]), 1, STEPS, 0)
    tables = take(tmp_path, runs[:1])
    train = tables.curves[tables.curves["kind"] == "train"]
    assert train["step"].tolist() == [1, 4, 7, 10]
    assert tables.collected["train_rows_left_out"] == 6


def test_what_a_run_counted_replaces_what_was_planned(
    tmp_path: Path, runs: list[PlannedRun]
) -> None:
    run = start(tmp_path / "work", runs[0])
    run.write_result(steps(run, 1, STEPS, 0), result(runs[0]))
    table = take(tmp_path, runs[:2]).runs
    assert table["flops_exact"].tolist() == [2.0, runs[1].row["flops_exact"]]
    assert table["pf_days"].tolist() == [r.row["pf_days"] for r in runs[:2]]


def test_transfer_rows_carry_their_record(tmp_path: Path, runs: list[PlannedRun]) -> None:
    run = start(tmp_path / "work", runs[0])
    run.write_result(steps(run, 1, STEPS, 0), result(runs[0]))
    row = {"task": "books", "system": "clue/linear", "segment": "all", "loss": 0.5}
    protocol = {"history": "all", "folds": 5, "seeds": 3, "task_digest": "abcd"}
    record = {"run_key": run.run_key, "step": STEPS, "evaluation": {"task": "books", **protocol}}
    write_json(run.path / "transfer" / "books-aaaaaaaa.json", {**record, "rows": [row]})
    # Systems without an encoder on the same task stand beside it, those of others do not.
    for digest in ("abcd", "dcba"):
        beside = {"task": digest, "system": "popularity", "segment": "all"}
        write_json(
            run.root / "baselines" / "corpus" / digest / "popularity.json",
            {**protocol, "task_digest": digest, "rows": [beside]},
        )
    transfer = take(tmp_path, runs[:1]).transfer
    assert transfer[["task", "system", *protocol]].to_numpy().tolist() == [
        ["books", "clue/linear", *protocol.values()],
        ["abcd", "popularity", *protocol.values()],
    ]
    assert transfer["step"].tolist()[0] == STEPS
    assert pd.isna(transfer["run_key"].iloc[1])
    assert pd.isna(transfer["mrr"].iloc[0])


def test_a_torn_record_of_a_baseline_is_told(tmp_path: Path, runs: list[PlannedRun]) -> None:
    write_json(tmp_path / "work" / "baselines" / "c" / "t" / "bst.json", {"rows": []})
    with pytest.raises(RecordError, match=r"bst\.json: not a record of a baseline"):
        take(tmp_path, runs[:1])


def evaluated(root: Path, runs: list[PlannedRun]) -> tuple[Path, Path]:
    """Targets of an evaluation of the first run and of BST, two users with two targets: records
    and files beside them."""
    run = start(root / "work", runs[0])
    run.write_result(steps(run, 1, STEPS, 0), result(runs[0]))
    protocol = {"folds": 2, "seeds": 1, "task_digest": "abcd"}
    digest = "qrstuvwxyzqrstuv"
    paths = (
        run.path / "transfer" / "books-aaaaaaaa.json",
        root / "work" / "baselines" / digest / "books-bbbbbbbb" / "bst.json",
    )
    shared = {"task": "books", "segment": "all", "n_users": 2, "n_targets": 4}
    for path, system, ranks in zip(
        paths, ("clue/u-mlp", "bst"), ([1, 2, 2, 20], [2, 2, 4, 20]), strict=True
    ):
        losses = [rank / 10 for rank in ranks]
        row = {**shared, "system": system, "mrr": sum(1 / r for r in ranks) / 4}
        record: dict[str, Any] = {"rows": [row, {**row, "segment": "cold", "mrr": 0.0}]}
        if path is paths[0]:
            of = {"task": "books", "corpus_digest": digest, "history": "all", **protocol}
            record |= {"run_key": run.run_key, "step": STEPS, "evaluation": of}
        else:
            record |= {"system": system, "validation_loss": 0.5, "history": "target", **protocol}
        write_json(path, record)
        columns = {"seed": [0] * 4, "user": [5, 5, 9, 9], "fold": [0] * 4, "target": [0, 1, 0, 1]}
        columns |= {"first": ranks, "last": ranks, "loss": losses, "loss_softmax": losses}
        pq.write_table(pa.table(columns), path.with_suffix(".parquet"))
    return paths


def test_gains_are_the_run_s_against_every_system_beside_it(
    tmp_path: Path, runs: list[PlannedRun]
) -> None:
    evaluated(tmp_path, runs)
    tables = take(tmp_path, runs[:1])
    (row,) = tables.gains.to_dict(orient="records")
    assert {k: row[k] for k in ("run_key", "task", "system", "history", "baseline", "folds")} == {
        "run_key": runs[0].row["run_key"], "task": "books", "system": "clue/u-mlp",
        "history": "all", "baseline": "bst", "folds": 2,
    }  # fmt: skip
    # 1, 2, 2, 20 beside 2, 2, 4, 20: by user 1/2 and 1/4 more of the reciprocal rank in two
    assert row["mrr_gain"] == pytest.approx(3 / 16)
    assert (row["mrr_gain_low"], row["mrr_gain_high"]) == pytest.approx((1 / 8, 1 / 4))
    assert row["mrr_baseline"] == pytest.approx(1.3 / 4)
    assert row["mrr_relative"] == pytest.approx(0.75 / 1.3)
    assert (row["hr_1_gain"], row["hr_10_gain"]) == (0.25, 0)
    assert row["loss_gain"] == pytest.approx(-0.075)
    assert (row["n_users"], row["n_targets"], row["baseline_validation_loss"]) == (2, 4, 0.5)
    assert pd.isna(row["tau_b_union"])
    (entry,) = tables.collected["without_tau"]
    assert "no corpus abcdefghijklmnop" in entry["error"]
    assert tables.collected["unpaired"] == []


@pytest.mark.parametrize("side", [0, 1])
def test_an_evaluation_without_its_targets_is_named_and_keeps_its_row(
    tmp_path: Path, runs: list[PlannedRun], side: int
) -> None:
    paths = evaluated(tmp_path, runs)
    paths[side].with_suffix(".parquet").unlink()
    tables = take(tmp_path, runs[:1])
    assert tables.gains.empty
    assert len(tables.transfer) == 4
    (entry,) = tables.collected["unpaired"]
    assert entry["record"] == str(paths[side].relative_to(tmp_path / "work"))
    assert entry["run_key"] == [runs[0].row["run_key"], None][side]
    assert "no such file" in entry["error"]


@pytest.mark.parametrize("step", [STEPS - 1, None])
def test_transfer_of_another_step_is_stale(
    tmp_path: Path, runs: list[PlannedRun], step: int | None
) -> None:
    run = start(tmp_path / "work", runs[0])
    run.write_result(steps(run, 1, STEPS, 0), result(runs[0]))
    for task, evaluated in (("books", step), ("food", STEPS)):
        record = {"run_key": run.run_key, "step": evaluated, "evaluation": {"task": task}}
        rows = [{"task": task, "system": "clue/u-mlp", "segment": "all"}]
        write_json(run.path / "transfer" / f"{task}.json", {**record, "rows": rows})
    # one of the first version, which kept folds apart
    old = {"run_key": run.run_key, "step": STEPS, "task": "old", "folds": 5, "rows": []}
    write_json(run.path / "transfer" / "old.json", old)
    tables = take(tmp_path, runs[:1])
    assert tables.collected["stale"] == [
        {"run_key": run.run_key, "record": "books.json", "step": step},
        {"run_key": run.run_key, "record": "old.json", "step": STEPS},
    ]
    assert tables.transfer["task"].tolist() == ["food"]


def test_a_transfer_record_of_another_run_is_refused(
    tmp_path: Path, runs: list[PlannedRun]
) -> None:
    run = start(tmp_path / "work", runs[0])
    write_json(run.path / "transfer" / "books.json", {"run_key": "else", "rows": []})
    assert "books.json" in take(tmp_path, runs[:1]).collected["unreadable"][0]["error"]


def test_a_nominal_plan_has_rows_and_no_keys(tmp_path: Path) -> None:
    tables = take(tmp_path, plan(card(None), seeds=1))
    assert tables.runs["run_key"].isna().all()
    assert tables.collected["incomplete"][0]["reason"].startswith("nominal corpus")


# ---- plans that cannot be collected -------------------------------------------------------------


def test_an_empty_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="the plan has no runs"):
        collect(tmp_path, [], "toy", tmp_path / "results")


def test_a_run_named_twice_is_refused(tmp_path: Path, runs: list[PlannedRun]) -> None:
    with pytest.raises(ResultsError, match="more than once"):
        take(tmp_path, [runs[0], runs[0]])


def test_rows_without_a_column_are_refused(tmp_path: Path, runs: list[PlannedRun]) -> None:
    row = {k: v for k, v in runs[0].row.items() if k != "pf_days"}
    with pytest.raises(ResultsError, match="lack pf_days"):
        collect(tmp_path, [row], "toy", tmp_path / "results")


# ---- the tables as files ------------------------------------------------------------------------


def test_collecting_again_gives_the_same_bytes(tmp_path: Path, runs: list[PlannedRun]) -> None:
    steps(start(tmp_path / "work", runs[0]), 1, STEPS, 0)
    take(tmp_path, runs)
    files = sorted((tmp_path / "results").iterdir())
    before = {f.name: f.read_bytes() for f in files}
    take(tmp_path, runs)
    assert {f.name: f.read_bytes() for f in sorted((tmp_path / "results").iterdir())} == before
    assert sorted(before) == ["collect.json", *sorted(f"{name}.parquet" for name in SCHEMAS)]


def test_types_units_and_meanings_survive_the_file(tmp_path: Path, runs: list[PlannedRun]) -> None:
    tables = take(tmp_path, runs)
    for name, schema in SCHEMAS.items():
        read = pq.read_schema(tmp_path / "results" / f"{name}.parquet")
        assert read.equals(schema, check_metadata=True)
        assert all(field.metadata[b"meaning"] for field in read)
    assert tables.runs["n_total"].dtype == pd.Int64Dtype()
    assert tables.runs["best_step"].isna().all()  # null, not 0


def test_the_plan_is_the_first_part_of_the_runs_table() -> None:
    assert results.RUNS_SCHEMA.names[: len(PLAN_COLUMNS)] == list(PLAN_COLUMNS)


def test_column_names_are_unique() -> None:
    for schema in SCHEMAS.values():
        assert len(set(schema.names)) == len(schema.names)


def test_the_data_dictionary_is_that_of_the_schemas() -> None:
    assert data_dictionary() in (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def test_a_missing_table_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"runs\.parquet: no such table; `clue-scaling collect`"):
        load(tmp_path)


def test_a_damaged_table_is_named(tmp_path: Path, runs: list[PlannedRun]) -> None:
    take(tmp_path, runs)
    path = tmp_path / "results" / "curves.parquet"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ResultsError, match=r"curves\.parquet: not a readable Parquet file"):
        load(tmp_path / "results")


@pytest.mark.parametrize("version", ["3", "5"])
def test_another_version_is_refused(tmp_path: Path, runs: list[PlannedRun], version: str) -> None:
    take(tmp_path, runs)
    path = tmp_path / "results" / "runs.parquet"
    table = pq.read_table(path)
    pq.write_table(
        table.replace_schema_metadata({"clue.table": "runs", "clue.version": version}), path
    )
    with pytest.raises(ResultsError, match=f"runs of version {version}; this program reads runs"):
        load(tmp_path / "results")


def test_a_foreign_table_is_refused(tmp_path: Path, runs: list[PlannedRun]) -> None:
    take(tmp_path, runs)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "results" / "runs.parquet")
    with pytest.raises(ResultsError, match="holds some other table"):
        load(tmp_path / "results")


def test_a_torn_account_is_refused(tmp_path: Path, runs: list[PlannedRun]) -> None:
    take(tmp_path, runs)
    (tmp_path / "results" / "collect.json").write_text(json.dumps({})[:1])
    with pytest.raises(ResultsError, match=r"collect\.json"):
        load(tmp_path / "results")


def test_what_the_first_runs_did_not_record_is_null_and_taken_from_those_that_did(
    tmp_path: Path, runs: list[PlannedRun]
) -> None:
    first, later, *_ = runs
    start(tmp_path / "work", first).write_result(1, result(first))
    extra = {"loss_se": 0.02, "clipped_steps": 9, "overflows": 1, "micro_batch_tokens": 4096}
    run = start(tmp_path / "work", later)
    generation = run.start_generation({"resumed_from": 0})
    with open(run.metrics_path(generation), "ab") as f:
        speed = {"flops_per_second": 5e9, "mfu": 0.25, "seconds_data": 0.1}
        append_line(f, {"kind": "train", "step": STEPS, "loss": 1.0, "speed": speed})
        append_line(
            f, {"kind": "pool", "step": STEPS, "loss": 1.5, "loss_se": 0.02, "damping": 0.8}
        )
    run.write_result(generation, result(later, **extra))
    tables = take(tmp_path, runs)
    for name, value in extra.items():
        column = tables.runs[name]
        assert column.iloc[1] == value
        assert column.drop(index=1).isna().all()
    curve = tables.curves[tables.curves["run_key"] == later.row["run_key"]].set_index("kind")
    assert curve.loc["train", ["flops_per_second", "mfu"]].tolist() == [5e9, 0.25]
    assert curve.loc["pool", ["loss_se", "damping"]].tolist() == [0.02, 0.8]
