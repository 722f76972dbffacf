"""Gains over systems without an encoder: pairs, intervals, tau, and files that cannot be used."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.data.corpus import Corpus
from scaling.data.domains import VARIANTS
from scaling.data.domains import compare as compare_domains
from scaling.files import RecordError
from scaling.transfer.gains import MEASURES, Evaluated, Gains, compare, read_targets
from scaling.transfer.intervals import paired

DIGEST, SEEDS, TARGETS = "abcdefghijklmnop", 2, 3


def scores(
    n_users: int, seed: int, *, skill: float = 0.0, losses: bool = True, seeds: int = SEEDS
) -> pa.Table:
    """A table of targets: ranks among 101, some tied, the better the more skill."""
    rng = np.random.default_rng(seed)
    users = np.sort(np.random.default_rng(99).integers(2**63, 2**64, n_users, dtype=np.uint64))
    user, place = np.repeat(users, TARGETS), np.tile(np.arange(TARGETS, dtype=np.int32), n_users)
    n = seeds * len(user)
    first = np.maximum(1, np.floor(101 * rng.random(n) ** (1 + skill))).astype(np.int32)
    loss = rng.random(n, dtype=np.float32) if losses else pa.nulls(n, pa.float32())
    return pa.table(
        {
            "seed": np.repeat(np.arange(seeds, dtype=np.int32), len(user)),
            "user": np.tile(user, seeds),
            "fold": np.zeros(n, np.int32),
            "target": np.tile(place, seeds),
            "first": first,
            "last": first + rng.integers(0, 3, n).astype(np.int32),
            "loss": loss,
            "loss_softmax": loss,
        }
    )


def values(row: dict[str, Any]) -> dict[str, float]:
    """Measures of one ranking, ties by expectation, in plain Python."""
    found = {}
    ranks = range(row["first"], row["last"] + 1)
    for name, worth in (
        ("hr_1", lambda r: float(r <= 1)),
        ("hr_10", lambda r: float(r <= 10)),
        ("ndcg_10", lambda r: float(r <= 10) / np.log2(1 + r)),
        ("mrr", lambda r: 1 / r),
    ):
        found[name] = sum(map(worth, ranks)) / len(ranks)
    return found | {name: row[name] for name in ("loss", "loss_softmax")}


def of_users(table: pa.Table) -> dict[int, dict[int, dict[str, float]]]:
    """Mean over seeds of every measure, by user and target."""
    sums: dict[int, dict[int, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in table.to_pylist():
        for name, value in values(row).items():
            sums[row["user"]][row["target"]][name] += value
    return {
        user: {t: {n: v / SEEDS for n, v in found.items()} for t, found in targets.items()}
        for user, targets in sums.items()
    }


def shuffled(table: pa.Table, seed: int = 0) -> pa.Table:
    return table.take(np.random.default_rng(seed).permutation(len(table)))


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Evaluated]:
    """``record(name, table, **columns)``: an evaluation whose targets lie below ``tmp_path``."""

    def write(name: str, table: pa.Table | None, **columns: Any) -> Evaluated:
        path = tmp_path / f"{name}.json"
        if table is not None:
            pq.write_table(table, path.with_suffix(".parquet"))
        shared = {"task": "books", "task_digest": DIGEST, "folds": 5, "seeds": SEEDS}
        return Evaluated(path, shared | columns, {})

    return write


def refused(found: Gains, **expected: str | None) -> str:
    """The error of the one record that could not be used, whose other keys are as expected."""
    (entry,) = found.unpaired
    assert {k: entry[k] for k in expected} == expected
    return str(entry["error"])


# ---- numbers ------------------------------------------------------------------------------------


def test_a_gain_is_the_mean_difference_over_the_same_targets(record: Any, tmp_path: Path) -> None:
    """Against sums in plain Python, whatever the order of the rows."""
    mine, other = scores(40, 1, skill=2.0), scores(40, 2)
    run = record("run", shuffled(mine), run_key="r", system="clue/u-mlp")
    bst = record("bst", shuffled(other, 1), baseline="bst", baseline_validation_loss=0.5)
    (row,) = compare(tmp_path, [run], [bst]).rows
    assert (row["run_key"], row["system"], row["baseline"]) == ("r", "clue/u-mlp", "bst")
    assert row["baseline_validation_loss"] == 0.5
    assert (row["n_users"], row["n_targets"]) == (40, 40 * TARGETS)
    a, b = of_users(mine), of_users(other)
    for name in MEASURES:
        pairs = [(a[u][t][name], b[u][t][name]) for u in a for t in a[u]]
        gain = sum(x - y for x, y in pairs) / len(pairs)
        baseline = sum(y for _, y in pairs) / len(pairs)
        assert row[f"{name}_gain"] == pytest.approx(gain, abs=1e-7)  # losses are stored in fp32
        assert row[f"{name}_baseline"] == pytest.approx(baseline, abs=1e-7)
        assert row[f"{name}_relative"] == pytest.approx(gain / baseline, abs=1e-6)


def test_the_interval_is_that_of_resampled_users(record: Any, tmp_path: Path) -> None:
    """The program's pairs to rounding, and a plain bootstrap of its own draws to their noise."""
    mine, other = scores(60, 3, skill=1.0), scores(60, 4)
    (row,) = compare(tmp_path, [record("run", mine)], [record("bst", other)]).rows
    a, b = of_users(mine), of_users(other)
    for name in MEASURES:
        x, y = (np.array([[v[name] for v in t.values()] for t in s.values()]) for s in (a, b))
        expected = paired(x, y)
        for end in ("low", "high"):
            assert row[f"{name}_gain_{end}"] == pytest.approx(getattr(expected, end), abs=1e-7)
        sums = list(zip(x.sum(1).tolist(), y.sum(1).tolist(), strict=True))
        draw = random.Random(0)
        again = [draw.choices(sums, k=len(sums)) for _ in range(4_000)]
        gains = [sum(p - q for p, q in some) / (len(some) * TARGETS) for some in again]
        sides = [(sum(p for p, _ in some), sum(q for _, q in some)) for some in again]
        if not all(q for _, q in sides):
            assert name == "hr_1"  # few are hit at once: a draw may have none
            sides = []
        for kind, means in (("gain", gains), ("relative", [p / q - 1 for p, q in sides])):
            if not means:
                continue
            low, high = np.quantile(means, [0.025, 0.975])
            # An end of 1,000 draws is known to about a thirtieth of the interval's width.
            for end, value in (("low", low), ("high", high)):
                assert row[f"{name}_{kind}_{end}"] == pytest.approx(
                    value, abs=0.12 * (high - low)
                ), (name, kind)


@given(shift=st.floats(-1, 1), n_users=st.integers(2, 30), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_a_difference_that_is_the_same_for_all_has_no_width(
    shift: float, n_users: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What makes a user easy for both cancels."""
    folder = tmp_path_factory.mktemp("same")
    other = scores(n_users, seed)
    both = np.float32(shift) + other["loss"].to_numpy()
    mine = other.set_column(other.schema.get_field_index("loss"), "loss", pa.array(both))
    columns = {"task": "t", "task_digest": DIGEST, "folds": 5, "seeds": SEEDS}
    sides = []
    for name, table in (("a", mine), ("b", other)):
        pq.write_table(table, folder / f"{name}.parquet")
        sides.append(Evaluated(folder / f"{name}.json", columns, {}))
    (row,) = compare(folder, sides[:1], sides[1:]).rows
    for end in ("", "_low", "_high"):
        assert row[f"loss_gain{end}"] == pytest.approx(shift, abs=1e-6)
        assert row[f"mrr_gain{end}"] == 0


def test_counts_have_no_loss_and_nothing_is_divided_by_zero(record: Any, tmp_path: Path) -> None:
    never = scores(20, 5, losses=False)
    far = pa.array(np.full(len(never), 90, np.int32))
    for name in ("first", "last"):
        never = never.set_column(never.schema.get_field_index(name), name, far)
    (row,) = compare(tmp_path, [record("r", scores(20, 6))], [record("p", never)]).rows
    for name in ("loss", "loss_softmax"):
        for column in ("gain", "gain_low", "gain_high", "relative", "relative_low", "baseline"):
            assert row[f"{name}_{column}"] is None
    assert (row["hr_10_baseline"], row["hr_10_relative"], row["hr_10_relative_low"]) == (
        0.0, None, None,
    )  # fmt: skip
    assert row["hr_10_gain_low"] <= row["hr_10_gain"] <= row["hr_10_gain_high"]
    assert row["mrr_relative"] is not None


def test_only_the_same_protocol_is_compared(record: Any, tmp_path: Path) -> None:
    runs = [record("run", scores(10, 1), history=h, run_key=h) for h in ("target", "all")]
    systems = [
        record("same", scores(10, 2), baseline="bst"),
        record("folds", None, baseline="bst", folds=2),
        record("seeds", None, baseline="bst", seeds=1),
        record("task", None, baseline="bst", task_digest="other"),
    ]
    found = compare(tmp_path, runs, systems)
    assert [(r["run_key"], r["baseline"]) for r in found.rows] == [
        ("target", "bst"),
        ("all", "bst"),
    ]
    assert not found.unpaired  # the files of what is not compared are not read


# ---- what cannot be used ------------------------------------------------------------------------


def test_a_missing_file_is_named_once(record: Any, tmp_path: Path) -> None:
    runs = [record(f"run{i}", scores(10, i), run_key=str(i)) for i in range(3)]
    systems = [record("bst", None), record("deepfm", scores(10, 9), baseline="deepfm")]
    found = compare(tmp_path, runs, systems)
    assert [r["baseline"] for r in found.rows] == ["deepfm"] * 3
    assert "bst.parquet: no such file" in refused(found, run_key=None, record="bst.json")
    gone = compare(tmp_path, [record("gone", None, run_key="4")], systems[1:])
    assert not gone.rows
    assert "gone.parquet: no such file" in refused(gone, run_key="4", record="gone.json")


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_torn_file_is_named(record: Any, tmp_path: Path, kept: int) -> None:
    run, bst = record("run", scores(10, 1), run_key="r"), record("bst", scores(10, 2))
    path = tmp_path / "run.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    found = compare(tmp_path, [run], [bst])
    assert "not a readable table of targets" in refused(found, run_key="r", record="run.json")


def test_other_users_or_targets_are_no_pairs(record: Any, tmp_path: Path) -> None:
    table = scores(10, 1)
    cut = table.filter(pa.compute.not_equal(table["user"], table["user"][0]))
    moved = table.set_column(
        table.schema.get_field_index("target"), "target", pa.compute.add(table["target"], 1)
    )
    bst = record("bst", scores(10, 2))
    for other in (cut, moved, scores(11, 1)):
        found = compare(tmp_path, [record("run", other, run_key="r")], [bst])
        assert not found.rows
        assert refused(found, run_key="r") == "other users or targets than bst.parquet has"


def test_files_that_are_not_what_their_record_tells_are_refused(
    record: Any, tmp_path: Path
) -> None:
    run, bst = record("run", scores(10, 1)), record("bst", scores(10, 2))
    mean = float(read_targets(tmp_path / "run.parquet").means[MEASURES.index("mrr")])
    assert compare(tmp_path, [Evaluated(run.record, run.columns, {"mrr": mean})], [bst]).rows
    for said in (mean + 1e-6, float("nan")):
        found = compare(tmp_path, [Evaluated(run.record, run.columns, {"mrr": said})], [bst])
        assert not found.rows
        assert "written by another evaluation" in refused(found, record="run.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop_columns("last"), "not a readable table of targets"),
        (
            lambda t: t.set_column(4, "first", pa.array(["far"] * len(t))),
            "not a readable table of targets",
        ),
        (lambda t: t.slice(0, 0), "0 rows of 0 seeds"),
        (lambda t: t.slice(1), "rows of 2 seeds"),
        (lambda t: pa.concat_tables([t, t]), "not ranked once by every seed"),
        (
            lambda t: pa.concat_tables([t.slice(0, 30), t.slice(0, 30)]),
            "a target is there twice",
        ),
        (
            lambda t: t.set_column(4, "first", pa.array(np.zeros(len(t), np.int32))),
            "has no rank",
        ),
    ],
)
def test_tables_of_another_kind_are_refused(
    tmp_path: Path, spoil: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(spoil(scores(10, 1)), tmp_path / "t.parquet")
    with pytest.raises(RecordError, match=message):
        read_targets(tmp_path / "t.parquet")


# ---- tau ----------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root: Path = tiny_corpus(users=100)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def with_corpora(one: Evaluated, *corpora: str) -> Evaluated:
    return Evaluated(one.record, one.columns, one.means, (corpora[0], corpora[1]))


def test_tau_is_that_of_comparing_domains_once_a_task(
    corpus: Corpus, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, digest = corpus.path.parent.parent, str(corpus.card.digest)
    calls = []
    similarity = compare.__globals__["similarity"]
    monkeypatch.setitem(
        compare.__globals__, "similarity", lambda *a: calls.append(a) or similarity(*a)
    )
    runs, systems = [], []
    for task, task_digest in corpus.manifest["tasks"].items():
        of = {"task": task, "task_digest": task_digest}
        for i in range(2):
            run = record(f"{task}{i}", scores(10, i), **of)
            runs.append(with_corpora(run, digest, digest))
        systems += [record(f"{task}-{s}", scores(10, 5), **of) for s in ("bst", "deepfm")]
    found = compare(root, runs, systems)
    assert len(found.rows) == 8
    assert len(calls) == 2
    pairs = compare_domains([corpus])["pairs"]
    for row in found.rows:
        for variant in VARIANTS:
            (tau,) = (
                p["tau_b"]
                for p in pairs
                if (p["a"], p["b"], p["variant"]) == ("tiny", f"tiny/tasks/{row['task']}", variant)
            )
            assert row[f"tau_b_{variant}"] == tau
    assert not found.without_tau


def test_without_its_corpus_a_gain_has_no_tau(corpus: Corpus, record: Any) -> None:
    root, digest = corpus.path.parent.parent, str(corpus.card.digest)
    bst = record("bst", scores(10, 2))
    for corpora, why in (
        (("gone", digest), "no corpus gone; prepared: tiny-"),
        ((digest, "gone"), "no corpus gone; prepared: tiny-"),
        ((digest, digest), "task 'books' is not the one that was evaluated"),
    ):
        runs = [with_corpora(record(f"run{i}", scores(10, i)), *corpora) for i in range(2)]
        found = compare(root, runs, [bst])
        assert [r["tau_b_union"] for r in found.rows] == [None, None]
        (entry,) = found.without_tau
        assert (entry["corpus_digest"], entry["task"]) == (corpora[0], "books")
        assert why in entry["error"]
