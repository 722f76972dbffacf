"""Evaluation of real, small runs: the features, the record it leaves, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted import configure

from scaling.collect import collect
from scaling.config import Evaluation, ModelConfig, TrainSettings, TransferSettings
from scaling.data import tokenizer
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.tasks import Task
from scaling.files import RecordError
from scaling.models import build
from scaling.results import load
from scaling.rundir import RunDir
from scaling.sweeps import PLAN_COLUMNS
from scaling.train.export import exported, load_encoder
from scaling.train.loop import train
from scaling.transfer import scoring
from scaling.transfer.baselines import deepfm
from scaling.transfer.baselines.evaluate import evaluate_baselines
from scaling.transfer.declared import evaluations, fit_tasks
from scaling.transfer.embed import Embedding, Wanted
from scaling.transfer.evaluate import _outcome, evaluate
from scaling.transfer.features import item_features, user_features
from scaling.transfer.foreign import as_seen_by
from scaling.transfer.heads import Features, HeadTowers
from scaling.transfer.metrics import METRICS
from scaling.transfer.problem import TransferError, example_histories, pose
from scaling.transfer.reduce import Reduction, ReductionError
from scaling.transfer.scoring import rows_of
from scaling.transfer.towers import TowerSettings


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root = tiny_corpus(users=400, negatives=20)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def wanted(
    corpus: Corpus, *tasks: str, heads: tuple[str, ...] = ("u-mlp",), **settings: Any
) -> list[Evaluation]:
    root = corpus.path.parent.parent
    named = TransferSettings.model_validate(
        {"tasks": tasks, "heads": heads, "folds": 2, **settings}
    )
    return evaluations(root, corpus, named)


def untrained(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> RunDir:
    """A run whose export is a fresh encoder."""
    config = configure(corpus, **changes)
    model = build(config.model, config.data.vocab_size).eval()
    monkeypatch.setattr("scaling.transfer.evaluate.load_encoder", lambda run, step: (model, step))
    return RunDir.create(corpus.path.parent.parent, config, corpus.card.name)


@pytest.mark.slow
def test_a_run_is_evaluated_once_per_export(corpus: Corpus) -> None:
    root = corpus.path.parent.parent
    run = RunDir.create(root, configure(corpus), corpus.card.name)
    both = wanted(corpus, "books", "beauty")
    with pytest.raises(RecordError, match="nothing is exported yet"):
        evaluate(run, corpus, both)
    settings = TrainSettings(threads=1, milestones=2)
    train(run, corpus, settings, should_stop=lambda: bool(exported(run)))
    with pytest.raises(RecordError, match="no step 6; exported: 3"):
        evaluate(run, corpus, both)
    early = evaluate(run, corpus, both, step=3)
    assert {(r["run_key"], r["step"]) for r in early} == {(run.run_key, 3)}
    folder = run.path / "transfer"
    assert {p.parent.name for p in folder.rglob("*.json")} == {"step-000000003"}

    train(run, corpus, settings)
    told: list[tuple[float, str]] = []
    rows = evaluate(run, corpus, both, progress=lambda *a: told.append(a))
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert [name for _, name in told if name] == sorted((n for _, n in told), reverse=True)
    assert [(r["task"], r["system"], r["segment"]) for r in rows] == [
        (task, "clue/u-mlp", "all") for task in ("books", "beauty")
    ]
    assert rows[0]["loss"] != early[0]["loss"]
    for row, targets in zip(rows, (2, 1), strict=True):
        users = Task.open(corpus, row["task"]).n_users
        assert (row["n_users"], row["n_targets"]) == (users, users * targets)
        assert (row["folds"], row["seeds"], row["candidates"]) == (2, 1, 21)
        for name in (*METRICS, "loss", "loss_softmax"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]

    # The record is whole, and the same evaluation again only reads it.
    paths = [folder / f"{e.key}.json" for e in both]
    before = [(p.stat().st_mtime_ns, p.stat().st_ino) for p in paths]
    assert evaluate(run, corpus, both) == rows
    assert [(p.stat().st_mtime_ns, p.stat().st_ino) for p in paths] == before
    # So does one that is made anew.
    kept = paths[0].read_bytes(), paths[0].with_suffix(".parquet").read_bytes()
    paths[0].unlink()
    assert evaluate(run, corpus, both) == rows
    assert (paths[0].read_bytes(), paths[0].with_suffix(".parquet").read_bytes()) == kept


def test_a_run_on_one_service_is_reduced_by_it_alone(corpus: Corpus) -> None:
    config = configure(corpus)
    data = config.data.model_copy(update={"services": ("garden",), "n_services": 1})
    changes = {"data": data, "pool": corpus.card.pool_of(("garden",))}
    run = RunDir.create(corpus.path.parent.parent, config.model_copy(update=changes), "tiny")
    train(run, corpus, TrainSettings(threads=1))
    with pytest.raises(TransferError, match="no layer for books"):
        evaluate(run, corpus, wanted(corpus, "books", feature_dim=3))
    layers = Reduction.read(run.path / "reductions" / "step-000000006-f3").matrices
    assert {s: m.shape for s, m in layers.items()} == {"garden": (3, 8)}


@pytest.mark.slow
def test_features_are_reduced_by_layers_learnt_of_the_frozen_encoder(corpus: Corpus) -> None:
    root = corpus.path.parent.parent
    run = RunDir.create(root, configure(corpus), corpus.card.name)
    train(run, corpus, TrainSettings(threads=1))
    (plain,), (reduced,) = wanted(corpus, "books"), wanted(corpus, "books", feature_dim=3)
    assert "feature_dim" not in plain.record  # which has the key it had before there was such
    assert Evaluation.parse(plain.record, "record").key == plain.key != reduced.key
    whole, narrow = evaluate(run, corpus, [plain, reduced])
    assert (whole["system"], narrow["system"]) == ("clue/u-mlp", "clue/u-mlp/f3")
    assert whole["loss"] != narrow["loss"]
    layers = Reduction.read(run.path / "reductions" / "step-000000006-f3").matrices
    assert {s: m.shape for s, m in layers.items()} == {"books": (3, 8), "garden": (3, 8)}

    # The same out of the parts, with the layer as a plain product.
    model, _ = load_encoder(run)
    task = Task.open(corpus, "books")
    problem = pose(corpus, task)
    history = {"books": example_histories(task, "books")}
    z, present = user_features(model, corpus, history, 4)
    users = np.column_stack([z @ layers["books"].T, present]).astype(np.float32)
    features = Features(users, item_features(model, corpus, problem.catalogue))
    outcome, _ = _outcome(problem, features, reduced, lambda share: None)
    (expected,) = rows_of(problem, outcome, "clue/u-mlp/f3")
    assert narrow["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert narrow["mrr"] == pytest.approx(expected["mrr"])

    # One that fails does not keep those behind it.
    wrong, right = (wanted(corpus, t, feature_dim=2)[0] for t in ("beauty", "books"))
    with pytest.raises(TransferError, match="no layer for beauty"):
        evaluate(run, corpus, [wrong, right])
    assert [p.stem for p in (run.path / "transfer").glob("*.json")].count(right.key) == 1
    assert not (run.path / "transfer" / f"{wrong.key}.json").exists()
    # Who is stopped behind it has not failed: the next start meets it again.
    asked: list[int] = []
    last = wanted(corpus, "books", feature_dim=1)[0]
    assert (
        evaluate(
            run, corpus, [wrong, last], should_stop=lambda: bool(asked.append(0)) or len(asked) > 1
        )
        == []
    )
    with pytest.raises(ReductionError, match="multiples of 2 up to 16"):
        evaluate(run, corpus, wanted(corpus, "books", feature_dim=9))


def test_a_run_with_reduced_features_is_trained_evaluated_and_embedded(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(layers=1, d_model=8, heads=2, feature_dim=3)
    run = RunDir.create(corpus.path.parent.parent, configure(corpus, model=model), "tiny")
    train(run, corpus, TrainSettings(threads=1))
    widths, honest = [], HeadTowers.__init__

    def noted(self: Any, head: Any, features: Any, *args: Any) -> None:
        widths.append((features.users.shape[1], features.items.shape[1]))
        honest(self, head, features, *args)

    monkeypatch.setattr(HeadTowers, "__init__", noted)
    rows = evaluate(run, corpus, wanted(corpus, "books", heads=("u-mlp", "u-mlp-64", "linear")))
    both = evaluate(run, corpus, wanted(corpus, "beauty", history="all"))
    services = len(Task.open(corpus, "beauty").services)
    # Beside z, whether there is a history.
    assert widths == [(3 + 1, 8)] * 3 + [(services * (3 + 1), 8)]
    assert all(math.isfinite(row["loss"]) for row in rows + both)
    embedding = Embedding(run, corpus, tmp_path, Wanted(dtype="float32"))
    embedding.shards.begin()
    embedding.write(embedding.shards.parts)
    assert np.load(tmp_path / "users-000000.npy").shape == (len(corpus.keys), 2 * 3)


def test_a_row_is_what_the_ranks_that_are_kept_say(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(corpus, monkeypatch)
    one = wanted(corpus, "books", seeds=2)
    (row,) = evaluate(run, corpus, one)
    table = pq.read_table(run.path / "transfer" / f"{one[0].key}.parquet").to_pandas()
    task = Task.open(corpus, "books")
    assert sorted(set(table["user"])) == sorted(task.keys)
    assert len(table) == 2 * task.n_users * 2
    assert table.groupby("user")["fold"].nunique().max() == 1
    group = dict(zip(task.keys.tolist(), task.group.tolist(), strict=True))
    assert (table["fold"] == table["user"].map(group) // 5).all()
    assert (table["first"] == table["last"]).all()
    rank = table["first"].to_numpy(float)
    assert row["hr_1"] == pytest.approx((rank == 1).mean())
    assert row["hr_10"] == pytest.approx((rank <= 10).mean())
    assert row["mrr"] == pytest.approx((1 / rank).mean())
    assert row["ndcg_10"] == pytest.approx(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean())
    for name in ("loss", "loss_softmax"):
        assert row[name] == pytest.approx(table[name].mean(), rel=1e-5)


def test_other_heads_and_histories_are_other_evaluations(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(corpus, monkeypatch)
    heads = ("u-mlp", "u-mlp-64", "linear")
    rows = evaluate(run, corpus, wanted(corpus, "books", heads=heads))
    assert [r["system"] for r in rows] == [f"clue/{head}" for head in heads]
    everything = evaluate(run, corpus, wanted(corpus, "books", history="all"))
    assert everything[0]["loss"] != rows[0]["loss"]
    assert len(list((run.path / "transfer").glob("*.json"))) == 4


def test_what_is_done_when_it_is_stopped_stays(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(corpus, monkeypatch)
    both = wanted(corpus, "books", "beauty")
    run.want(both)
    assert run.evaluations() == (2, sorted(e.key for e in both))
    done = run.path / "transfer" / f"{both[0].key}.json"
    rows = evaluate(run, corpus, both, should_stop=done.exists)
    assert [r["task"] for r in rows] == ["books"]
    assert run.evaluations() == (2, [both[1].key])
    assert len(evaluate(run, corpus, both)) == 2
    assert run.evaluations() == (2, [])
    assert run.wanted() == sorted(both, key=lambda e: e.key)


def test_what_cannot_be_evaluated_is_refused_before_anything_is_done(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(corpus, monkeypatch)
    with pytest.raises(CorpusError, match="no task 'garden'; valid: "):
        wanted(corpus, "books", "garden")
    with pytest.raises(CorpusError, match="no corpus 'else'; prepared: tiny-"):
        wanted(corpus, "else:books")
    for changes, message in (
        ({"heads": ("u-mlp", "best")}, "best"),
        ({"history": "some"}, "some"),
        ({"folds": 4}, "4"),
    ):
        with pytest.raises(ValueError, match=message):
            wanted(corpus, "books", **changes)
    (one,) = wanted(corpus, "books")
    altered = one.model_copy(update={"task_digest": "a" * 16})
    with pytest.raises(TransferError, match=r"'books' has the digest .*, not aaaaaaaaaaaaaaaa"):
        evaluate(run, corpus, [one, altered])
    assert not (run.path / "transfer").exists()


def test_a_run_of_another_corpus_is_refused(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {**configure(corpus).data.model_dump(), "corpus_digest": "a" * 16}
    run = untrained(corpus, monkeypatch, data=data)
    with pytest.raises(TransferError, match="was trained on aaaaaaaaaaaaaaaa"):
        evaluate(run, corpus, wanted(corpus, "books"))


def test_the_histories_that_stored_order_cannot_tell_are_refused(corpus: Corpus) -> None:
    path = corpus.path / "tasks" / "books" / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cut": "order"}))
    with pytest.raises(TransferError, match=r"task 'books': history = 'all' .*garden.*'order'"):
        wanted(corpus, "books", history="all")


FORMS = """
[tasks.alone]
service = "books"
negatives = 5
history = "service"
[tasks.first]
form = "first"
service = "beauty"
negatives = 5
[tasks.foreign]
service = "books"
users = "all"
encoders = "foreign"
negatives = 5
[tasks.full]
service = "books"
negatives = 0
[tasks.loo]
form = "leave_one_out"
service = "beauty"
negatives = 5
[tasks.books]
"""


@pytest.fixture
def all_forms(tiny_corpus: Any) -> Corpus:
    root = tiny_corpus(users=200)
    path = root / "tiny.toml"
    path.write_text(path.read_text().replace("[tasks.books]\n", FORMS))
    return Corpus.open(prepare(path, root))


def test_every_form_is_evaluated(all_forms: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    run = untrained(all_forms, monkeypatch)
    rows = evaluate(run, all_forms, wanted(all_forms, "alone", "full", "loo"))
    rows += evaluate(run, all_forms, wanted(all_forms, "first", history="all"))
    for row in rows:
        task = Task.open(all_forms, row["task"])
        assert row["n_users"] == task.n_users
        ranked = len(task.candidates) if row["task"] == "full" else 6
        assert row["candidates"] == ranked
    assert [r["n_targets"] // r["n_users"] for r in rows] == [3, 3, 1, 1]


@pytest.mark.parametrize(
    ("history", "fit"),
    [
        ("target", ["alone", "beauty", "books", "full", "loo"]),
        ("all", ["beauty", "books", "first", "full"]),
    ],
)
def test_tasks_that_a_history_suits(all_forms: Corpus, history: str, fit: list[str]) -> None:
    assert fit_tasks(all_forms, history) == fit
    for task in set(all_forms.manifest["tasks"]) - set(fit):
        with pytest.raises(TransferError, match=f"task '{task}': "):
            wanted(all_forms, task, history=history)
    for task in fit:
        del all_forms.manifest["tasks"][task]
    with pytest.raises(TransferError, match=r"task 'foreign': .*encoders of other corpora"):
        fit_tasks(all_forms, history)


def test_a_diverged_encoder_is_refused_by_name(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(corpus, monkeypatch)
    config = configure(corpus)
    model = build(config.model, config.data.vocab_size).eval()
    torch.nn.init.constant_(model.token_emb.weight, float("nan"))
    monkeypatch.setattr("scaling.transfer.evaluate.load_encoder", lambda run, step: (model, step))
    with pytest.raises(TransferError, match=r"task 'books': .* NaN .*did the run diverge"):
        evaluate(run, corpus, wanted(corpus, "books"))
    assert not (run.path / "transfer").exists()


def test_metrics_that_no_ranking_has_are_refused(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(corpus, monkeypatch)
    honest = scoring.bootstrap
    monkeypatch.setattr(
        scoring, "bootstrap", lambda x: replace(honest(x), mean=1.5 * honest(x).mean + 0.5)
    )
    with pytest.raises(TransferError, match=r"clue/u-mlp on 'books': .*hr_10"):
        evaluate(run, corpus, wanted(corpus, "books"))


def test_a_corpus_that_the_encoder_never_saw(
    tiny_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_corpus(users=200)
    corpus = Corpus.open(next((root / "corpora").glob("tiny-*")))
    text = (root / "tiny.toml").read_text()
    for ours, theirs in (('name = "tiny"', 'name = "other"'), ("= 320", "= 270")):
        text = text.replace(ours, theirs)
    foreign = (
        '[tasks.theirs]\nservice = "books"\nusers = "all"\nencoders = "foreign"\nnegatives = 5\n'
    )
    (root / "other.toml").write_text(text + foreign)
    other = Corpus.open(prepare(root / "other.toml", root))
    run = untrained(corpus, monkeypatch)
    both = wanted(corpus, "books", "other:theirs")
    assert [e.corpus_digest for e in both] == [corpus.card.digest, other.card.digest]
    rows = evaluate(run, corpus, both)
    assert rows[1]["n_users"] == Task.open(other, "theirs").n_users > rows[0]["n_users"]
    # A text has the same features whichever corpus has it: it is read by the encoder's tokenizer.
    model = build(configure(corpus).model, corpus.card.vocab_size).eval()
    features = []
    for one in (corpus, other):
        items = one.service_items("books")
        own = tokenizer.load(one.path / "tokenizer.json")
        bounds = [one.token_offsets[i : i + 2].astype(int) for i in items]
        texts = own.decode_batch([one.tokens[a + 1 : b].tolist() for a, b in bounds])
        seen = item_features(model, as_seen_by(one, corpus), items)
        features.append(dict(zip(texts, seen, strict=True)))
    mine, theirs = features
    assert len(mine) > 50
    assert mine.keys() == theirs.keys()
    for text in mine:
        np.testing.assert_allclose(mine[text], theirs[text], atol=1e-5)


def test_gains_are_taken_from_what_evaluations_leave(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of both seeds, of every task, and with all histories, against a system that learns nothing
    and one that does."""
    monkeypatch.setattr(deepfm, "SETTINGS", TowerSettings(max_epochs=2))
    root, run = corpus.path.parent.parent, untrained(corpus, monkeypatch)
    evaluate(run, corpus, wanted(corpus, "books", "beauty", seeds=2))
    evaluate(run, corpus, wanted(corpus, "books", heads=("linear",), seeds=2, history="all"))
    for task in ("books", "beauty"):
        evaluate_baselines(root, corpus, task, ["popularity", "deepfm"], folds=2, seeds=2)
    evaluate_baselines(root, corpus, "books", ["popularity"], folds=2, seeds=1)  # another protocol
    planned = dict.fromkeys(PLAN_COLUMNS) | {"run_key": run.run_key}
    account = collect(root, [planned], "tiny", tmp_path / "results")
    assert (account["unpaired"], account["without_tau"]) == ([], [])
    tables = load(tmp_path / "results")
    assert [tuple(r) for r in tables.gains[["task", "system", "baseline"]].to_numpy()] == [
        (task, system, baseline)
        for task, system in tables.transfer.loc[
            tables.transfer["run_key"].notna(), ["task", "system"]
        ].to_numpy()
        for baseline in ("deepfm", "popularity")
    ]
    assert len(tables.gains) == 6
    mean = tables.transfer[tables.transfer["seeds"] == 2].set_index(["task", "system"])
    for row in tables.gains.to_dict(orient="records"):
        mine, other = (mean.loc[(row["task"], row[side])] for side in ("system", "baseline"))
        assert row["n_targets"] == mine["n_targets"]
        assert (row["tau_b_union"] > 0) == (row["task"] == "books")  # a service of pretraining
        for name in (*METRICS, "loss", "loss_softmax"):
            if name in METRICS or row["baseline"] == "deepfm":
                assert row[f"{name}_gain"] == pytest.approx(mine[name] - other[name], abs=1e-12)
                assert row[f"{name}_gain_low"] <= row[f"{name}_gain"] <= row[f"{name}_gain_high"]
                width = row[f"{name}_gain_high"] - row[f"{name}_gain_low"]
                widths = [side[f"{name}_high"] - side[f"{name}_low"] for side in (mine, other)]
                assert width < sum(widths)
            else:
                assert np.isnan(row[f"{name}_gain"])
        assert np.isnan(row["baseline_validation_loss"]) == (row["baseline"] == "popularity")
