"""Evaluation of real, small runs: the features, the record it leaves, and what it refuses."""

import json
from typing import Any

import pytest
import torch

from scaling.config import ModelConfig, RunConfig, TrainSettings
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.tasks import Task
from scaling.files import RecordError
from scaling.models import build
from scaling.rundir import RunDir
from scaling.train.export import exported
from scaling.train.loop import train
from scaling.transfer.evaluate import evaluate
from scaling.transfer.problem import TransferError

COLUMNS = {
    *("run_key", "task", "system", "fold", "hr_1", "hr_10", "ndcg_10", "mrr"),
    *("loss", "loss_softmax", "tie_gap", "n_users", "n_targets"),
}


POPULARITY = ("popularity", "popularity/pretraining")


def configure(corpus: Corpus, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": ModelConfig(layers=1, d_model=8, heads=2),
            "data": {
                "corpus_digest": corpus.card.digest,
                "vocab_size": corpus.card.vocab_size,
                "n_services": len(corpus.card.services),
                "items_per_user": 4,
            },
            "batch_size": 16,
            "negatives": 16,
            "steps": 6,
            "evaluations": 2,
            "pool": corpus.card.pool,
            **changes,
        }
    )


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root = tiny_corpus(users=400, negatives=20)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


@pytest.mark.slow
def test_a_run_is_evaluated_once_per_export(corpus: Corpus) -> None:
    root = corpus.path.parent.parent
    run = RunDir.create(root, configure(corpus), corpus.card.name)
    with pytest.raises(RecordError, match="nothing is exported yet"):
        evaluate(run, corpus, ["books"], folds=2)
    settings = TrainSettings(threads=1, milestones=2)
    train(run, corpus, settings, should_stop=lambda: bool(exported(run)))
    calls: list[tuple[int, int]] = []
    rows = evaluate(run, corpus, ["books", "beauty"], folds=2, progress=lambda *a: calls.append(a))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(set(row) == COLUMNS and row["run_key"] == run.run_key for row in rows)
    assert [(r["task"], r["fold"], r["system"]) for r in rows] == [
        *(("books", f, s) for f in (0, 1) for s in ("clue/u-mlp", *POPULARITY)),
        *(("beauty", f, s) for f in (0, 1) for s in ("clue/u-mlp", "popularity")),
    ]
    users = {t: Task.open(corpus, t).n_users for t in ("books", "beauty")}
    for task, targets in (("books", 2), ("beauty", 1)):
        of_task = [r for r in rows if r["task"] == task and r["system"] == "popularity"]
        assert sum(r["n_users"] for r in of_task) == users[task]
        assert sum(r["n_targets"] for r in of_task) == users[task] * targets

    # The record is whole, and the same evaluation again only reads it.
    path = run.path / "transfer" / "books.json"
    record = json.loads(path.read_text())
    assert record["rows"] == rows[:6]
    assert (record["schema_version"], record["history"], record["folds"]) == (1, "target", 2)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert evaluate(run, corpus, ["books", "beauty"], folds=2) == rows
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before

    # Another setting, and then a later export, are other evaluations.
    both = evaluate(run, corpus, ["books"], folds=2, history="all")
    assert json.loads(path.read_text())["history"] == "all"
    assert both[0]["loss"] != rows[0]["loss"]
    assert both[1] == rows[1]
    train(run, corpus, settings)
    later = evaluate(run, corpus, ["books"], folds=2)
    assert json.loads(path.read_text())["step"] == 6 > record["step"]
    assert later[0]["loss"] != rows[0]["loss"]
    assert later[1] == rows[1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["beauty.json", "books.json"]

    # What it cannot do it refuses, and leaves the record as it was.
    kept = path.read_text()
    with pytest.raises(CorpusError, match="no task 'garden'; valid: "):
        evaluate(run, corpus, ["garden"])
    with pytest.raises(TransferError, match="history = 'some'; valid: target, all"):
        evaluate(run, corpus, ["books"], history="some")  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="folds = 4; valid: 2, 5, 10"):
        evaluate(run, corpus, ["books"], folds=4)
    assert path.read_text() == kept


def test_a_run_of_another_corpus_is_refused(corpus: Corpus) -> None:
    config = configure(corpus)
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"corpus_digest": "a" * 16})}
    )
    run = RunDir.create(corpus.path.parent.parent, other, "other")
    with pytest.raises(TransferError, match="was trained on aaaaaaaaaaaaaaaa"):
        evaluate(run, corpus, ["books"])


def test_the_histories_that_stored_order_cannot_tell_are_refused(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus.path / "tasks" / "books" / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cut": "order"}))
    config = configure(corpus)
    run = RunDir.create(corpus.path.parent.parent, config, corpus.card.name)
    model = build(config.model, config.data.vocab_size).eval()
    monkeypatch.setattr("scaling.transfer.evaluate.load_encoder", lambda run: (model, 6))
    with pytest.raises(TransferError, match=r"task 'books': history = 'all' .*garden.*'order'"):
        evaluate(run, corpus, ["books"], history="all")
    assert not (run.path / "transfer").exists()


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


def of_all_forms(tiny_corpus: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Corpus, RunDir]:
    root = tiny_corpus(users=200)
    path = root / "tiny.toml"
    path.write_text(path.read_text().replace("[tasks.books]\n", FORMS))
    corpus = Corpus.open(prepare(path, root))
    config = configure(corpus)
    model = build(config.model, config.data.vocab_size).eval()
    monkeypatch.setattr("scaling.transfer.evaluate.load_encoder", lambda run: (model, 6))
    return corpus, RunDir.create(root, config, corpus.card.name)


def test_tasks_of_forms_that_folds_do_not_evaluate(
    tiny_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, run = of_all_forms(tiny_corpus, monkeypatch)
    for task, history, message in (
        ("alone", "all", "stores histories of 'books' alone .*; valid: target"),
        ("first", "target", "no history of it; valid: all"),
        ("foreign", "target", "encoders of other corpora"),
        ("full", "target", "form = 'last' and 0 negatives"),
        ("loo", "target", "form = 'leave_one_out' and 5 negatives"),
    ):
        with pytest.raises(TransferError, match=f"task '{task}'.*{message}"):
            # Beside a task that could be done, too.
            evaluate(run, corpus, ["books", task], history=history, folds=2)
    assert not (run.path / "transfer").exists()
    rows = evaluate(run, corpus, ["first"], folds=2, history="all")
    assert {r["system"] for r in rows} == {"clue/u-mlp", "popularity"}
    assert sum(r["n_targets"] for r in rows) == 2 * Task.open(corpus, "first").n_users


@pytest.mark.parametrize(
    ("history", "fit"),
    [("target", ["alone", "beauty", "books"]), ("all", ["beauty", "books", "first"])],
)
def test_by_default_all_tasks_that_the_history_suits(
    tiny_corpus: Any, monkeypatch: pytest.MonkeyPatch, history: str, fit: list[str]
) -> None:
    corpus, run = of_all_forms(tiny_corpus, monkeypatch)
    opened: list[str] = []
    real = Task.open.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, corpus: Corpus, name: str) -> Task:
        opened.append(name)
        return real(cls, corpus, name)  # type: ignore[no-any-return]

    monkeypatch.setattr(Task, "open", classmethod(noted))
    rows = evaluate(run, corpus, folds=2, history=history)
    assert sorted({r["task"] for r in rows}) == fit
    assert sorted(p.stem for p in (run.path / "transfer").iterdir()) == fit
    assert sorted(opened) == sorted(corpus.manifest["tasks"])  # each is read once


def test_a_corpus_without_a_task_that_can_be_done(
    tiny_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, run = of_all_forms(tiny_corpus, monkeypatch)
    for task in ("alone", "beauty", "books"):
        del corpus.manifest["tasks"][task]
    with pytest.raises(TransferError, match=r"(?s)task 'first': .*task 'full': .*task 'loo': "):
        evaluate(run, corpus)


def test_a_diverged_encoder_is_refused_by_name(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(corpus)
    run = RunDir.create(corpus.path.parent.parent, config, corpus.card.name)
    model = build(config.model, config.data.vocab_size).eval()
    torch.nn.init.constant_(model.token_emb.weight, float("nan"))
    monkeypatch.setattr("scaling.transfer.evaluate.load_encoder", lambda run: (model, 6))
    with pytest.raises(TransferError, match=rf"run {run.run_key}, step 6: .*'books' hold NaN"):
        evaluate(run, corpus, ["books"])
    assert not (run.path / "transfer").exists()
