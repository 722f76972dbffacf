"""Systems without an encoder: what they may know, what they learn, and what is kept of them."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import linear, popular

from scaling.config import Evaluation
from scaling.data.corpus import Corpus
from scaling.data.tasks import Task
from scaling.transfer.baselines import Context, bst, deepfm
from scaling.transfer.baselines.evaluate import HYBRID, SYSTEMS, evaluate_baselines, vectors_beside
from scaling.transfer.baselines.lightgcn import LightGCN
from scaling.transfer.metrics import METRICS, rank, summarise
from scaling.transfer.problem import Problem, TransferError, pose
from scaling.transfer.scoring import ByVectors
from scaling.transfer.towers import TowerSettings

QUICK = [s for s in SYSTEMS if s != "bst-15m"]


class Planted(Context):
    """A context whose items' vectors are given."""

    def __init__(self, problem: Problem, texts: np.ndarray) -> None:
        super().__init__(None, problem)  # type: ignore[arg-type]
        self.__dict__["texts"] = texts


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bst, "SETTINGS", TowerSettings(lr=1e-3, max_epochs=4))


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root: Path = tiny_corpus(users=300, negatives=20)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def scores(context: Context, system: str, seed: int = 0) -> np.ndarray:
    split = context.problem.split(0, 5)
    scorer = SYSTEMS[system](context, split, seed)
    return np.asarray(scorer.pairs(split.test, context.problem.candidates[split.test].astype(int)))


@pytest.mark.parametrize("system", QUICK)
def test_no_system_sees_what_it_is_tested_on(corpus: Corpus, system: str) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    split = problem.split(0, 5)
    rng = np.random.default_rng(0)
    other = problem.candidates.copy()
    other[split.test] = rng.permuted(other[split.test], axis=2)
    altered = replace(problem, candidates=other)
    before = SYSTEMS[system](Context(corpus, problem), split, 3)
    after = SYSTEMS[system](Context(corpus, altered), split, 3)
    np.testing.assert_array_equal(before.every(split.test), after.every(split.test))


@pytest.mark.parametrize("system", QUICK)
def test_pairs_are_taken_from_the_scores_of_all_items(corpus: Corpus, system: str) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    split = problem.split(1, 5)
    scorer = SYSTEMS[system](Context(corpus, problem), split, 0)
    examples = split.test[[4, 1, 7]]
    rows = problem.candidates[examples].astype(int)
    flat = np.take_along_axis(np.asarray(scorer.every(examples)), rows.reshape(3, -1), 1)
    np.testing.assert_allclose(scorer.pairs(examples, rows), flat.reshape(rows.shape), rtol=1e-4)
    again = SYSTEMS[system](Context(corpus, problem), split, 0)
    np.testing.assert_array_equal(scorer.every(examples), again.every(examples))
    if scorer.losses:
        other = SYSTEMS[system](Context(corpus, problem), split, 1)
        assert not np.array_equal(scorer.every(examples), other.every(examples))


@pytest.mark.parametrize("system", ["popularity", "lightgcn-id", "cooccurrence"])
def test_what_everybody_likes_is_found(system: str) -> None:
    problem, features = popular(400)
    found = summarise(rank(scores(Planted(problem, features.items), system)))
    assert found["hr_10"] > 0.35


@pytest.mark.parametrize("system", ["bst", "deepfm", "lightgcn"])
def test_a_taste_that_items_vectors_show_is_learnt(system: str) -> None:
    problem, features = linear(1_000)
    found = summarise(rank(scores(Planted(problem, features.items), system)))
    assert found["hr_10"] > 0.35
    assert summarise(rank(scores(Planted(problem, features.items), "popularity")))["hr_10"] < 0.25


def test_cooccurrence_by_hand() -> None:
    problem, features = popular(60)
    split = problem.split(0, 5)
    scorer = SYSTEMS["cooccurrence"](Planted(problem, features.items), split, 0)
    baskets = [set(problem.histories(np.array([e]))) for e in range(60)]
    for e in split.train:
        baskets[e] |= set(problem.targets[e].tolist())
    bounds, logs = problem.pretraining  # type: ignore[misc]
    baskets += [set(logs[a:b]) for a, b in pairwise(bounds)]
    user = int(split.test[0])
    history = set(problem.histories(np.array([user])))
    every = np.asarray(scorer.every(np.array([user])))[0]
    for item in (0, 1, 5, 20):
        expected = sum(sum(h in b and item in b for b in baskets) for h in history if h != item)
        assert every[item] == expected


def test_popularity_counts_what_a_fold_may_know() -> None:
    problem, features = popular()
    split = problem.split(0, 5)
    context = Planted(problem, features.items)
    counts = SYSTEMS["popularity"](context, split, 0).every(np.array([0]))[0]
    by_hand = np.zeros(len(problem.catalogue), int)
    for user in range(200):
        for item in problem.histories(np.array([user])):
            by_hand[item] += 1
        if user in split.train:
            for item in problem.targets[user]:
                by_hand[item] += 1
    assert counts.tolist() == by_hand.tolist()
    assert SYSTEMS["popularity/pretraining"](context, split, 0).every(np.array([0])).sum() == 450
    nowhere = Planted(replace(problem, pretraining=None), features.items)
    with pytest.raises(TransferError, match="'planted': popularity/pretraining needs a service"):
        SYSTEMS["popularity/pretraining"](nowhere, split, 0)


def test_the_factorisation_machine_is_the_sum_over_pairs() -> None:
    fields = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    expected = fields.sum(0)
    for i in range(5):
        for j in range(i):
            expected = expected + fields[i] * fields[j]
    torch.testing.assert_close(deepfm.machine(fields), expected)


def test_sizes_are_those_that_the_papers_state() -> None:
    problem, _ = popular(20)
    texts = np.ones((400, 256), np.float32)
    large, small = (
        sum(p.numel() for p in bst.BST(config, problem, texts).stack.layers.parameters())
        for config in (bst.LARGE, bst.SMALL)
    )
    assert large == pytest.approx(12.6e6, rel=0.01)
    assert small == pytest.approx(0.79e6, rel=0.01)


def test_users_without_logs_are_scored(corpus: Corpus) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    offsets, items = problem.history
    lengths = np.diff(offsets)
    kept = ~np.isin(np.repeat(np.arange(len(lengths)), lengths), [0, 5])
    lengths[[0, 5]] = 0
    history = np.concatenate([[0], np.cumsum(lengths)]), items[kept]
    context = Context(corpus, replace(problem, history=history))
    for system in QUICK:
        scorer = SYSTEMS[system](context, problem.split(0, 5), 0)
        assert np.isfinite(scorer.every(np.array([0, 5]))).all(), system


@pytest.mark.slow
def test_baselines_are_computed_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    root = corpus.path.parent.parent
    told: list[float] = []
    rows = evaluate_baselines(
        root, corpus, "books", ["popularity", "bst"], folds=2, seeds=2,
        progress=lambda share, what: told.append(share),
    )  # fmt: skip
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert [(r["run_key"], r["system"]) for r in rows] == [(None, "popularity"), (None, "bst")]
    n_users = Task.open(corpus, "books").n_users
    for row in rows:
        assert (row["n_users"], row["n_targets"]) == (n_users, 2 * n_users)
        assert all(row[f"{m}_low"] <= row[m] <= row[f"{m}_high"] for m in METRICS)
    assert rows[0]["loss"] is None
    assert 0.3 < rows[1]["loss"] < 1.5
    for system in SYSTEMS:
        monkeypatch.setitem(SYSTEMS, system, None)  # nothing is computed again
    assert (
        evaluate_baselines(root, corpus, "books", ["popularity", "bst"], folds=2, seeds=2) == rows
    )
    with pytest.raises(TransferError, match="'best': there is none; valid: popularity, "):
        evaluate_baselines(root, corpus, "books", ["best"])


def test_vectors_for_the_hybrid_do_not_tell_of_any_target(corpus: Corpus) -> None:
    """Not even of those that the system was trained on, which a head would rely on in vain."""
    problem = pose(corpus, Task.open(corpus, "books"))
    split = problem.split(0, 5)
    found = SYSTEMS["lightgcn"](Context(corpus, problem), split, 0)
    assert isinstance(found, ByVectors)
    assert found.before is not None
    # Training examples are met with their targets in the graph, all others without.
    known = (found.users - found.before).abs().amax(1).numpy() > 1e-4
    assert known[split.train].mean() > 0.9
    # A projection of the history's texts and the graph of histories alone make them.
    example = int(split.train[0])
    fewer = replace(problem, candidates=np.roll(problem.candidates, 1, axis=0))
    towers = LightGCN(problem, _histories(problem), Context(corpus, problem).texts)
    again = LightGCN(fewer, _histories(fewer), Context(corpus, fewer).texts)
    again.load_state_dict(towers.state_dict())
    for one in (towers, again):
        one.refresh()
    torch.testing.assert_close(towers.nodes[example], again.nodes[example], rtol=0, atol=0)


def _histories(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    offsets, items = problem.history
    return np.repeat(np.arange(len(problem.user)), np.diff(offsets)), items


@pytest.mark.slow
def test_the_hybrid_takes_the_better_of_two(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, task = corpus.path.parent.parent, Task.open(corpus, "books")
    problem = pose(corpus, task)
    wanted = Evaluation(
        corpus_digest=str(corpus.card.digest), task="books",
        task_digest=corpus.manifest["tasks"]["books"], folds=2, seeds=1, head="hybrid",
    )  # fmt: skip
    found = vectors_beside(root, corpus, task, problem, wanted, lambda share: None)
    assert found.shape == (2, len(problem.user), 64)
    (folder,) = (root / "baselines" / str(corpus.card.digest)).iterdir()
    losses = {s: json.loads((folder / f"{s}.json").read_text())["validation_loss"] for s in HYBRID}
    better = min(losses, key=losses.__getitem__)
    np.testing.assert_array_equal(found, np.load(folder / f"{better}.npy"))
    # Fold by fold they are those of the system trained on that fold.
    np.save(folder / f"{better}.npy", found + 1)
    with pytest.raises(TransferError, match=rf"{better}\.npy: missing or altered"):
        vectors_beside(root, corpus, task, problem, wanted, lambda share: None)
