"""Tasks as arrays: who is tested, on what, and that no target is where it should not be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import linear, problem_of

from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare
from scaling.data.tasks import Task
from scaling.transfer.problem import Problem, TransferError, example_histories, pose, replicas

FORMS = """
[tasks.loo]
form = "leave_one_out"
service = "beauty"
negatives = 5
[tasks.loo_full]
form = "leave_one_out"
service = "books"
negatives = 0
encoders = "foreign"
[tasks.full]
service = "books"
negatives = 0
[tasks.books]
"""


def grouped(group: Any) -> Problem:
    group = np.asarray(group, np.uint8)
    order = np.stack([np.random.default_rng(i).permutation(150) for i in range(len(group))])
    return problem_of(order, group=group)


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root: Path = tiny_corpus(users=200)
    path = root / "tiny.toml"
    path.write_text(path.read_text().replace("[tasks.books]\n", FORMS))
    return Corpus.open(prepare(path, root))


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_every_user_is_tested_once_and_is_in_one_part_of_a_fold(folds: int) -> None:
    group = np.random.default_rng(0).integers(0, 10, 500).astype(np.uint8)
    problem = grouped(group)
    tested = []
    for fold in range(folds):
        parts = problem.split(fold, folds)
        together = np.concatenate([parts.train, parts.validation, parts.test])
        assert sorted(together) == list(range(500))
        # Whole groups only, so that a group's users are never on two sides.
        groups = [set(group[p]) for p in (parts.train, parts.validation, parts.test)]
        assert sum(map(len, groups)) == 10
        assert len(groups[1]) == 1
        tested += parts.test.tolist()
    assert sorted(tested) == list(range(500))


def test_five_folds_are_the_documented_ones() -> None:
    problem = grouped(range(10))
    first, last = problem.split(0, 5), problem.split(4, 5)
    assert first.test.tolist() == [0, 1]
    assert first.validation.tolist() == [2]
    assert last.test.tolist() == [8, 9]
    assert last.validation.tolist() == [0]


def test_folds_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(TransferError, match="folds = 3; valid: 2, 5, 10"):
        grouped(range(10)).split(0, 3)
    with pytest.raises(TransferError, match="5, 0, 3 users"):
        grouped([0, 0, 1, 5, 5, 6, 7, 9]).split(0, 5)


def test_replicas_are_by_fold_then_by_seed_and_draw_apart() -> None:
    problem, _ = linear(100)
    splits, of_replica, seeds = replicas(problem, 5, 2)
    assert len(splits) == 5
    assert [id(s) for s in of_replica] == [id(s) for s in splits for _ in range(2)]
    assert len(set(seeds)) == 10
    assert replicas(problem, 5, 1)[2] == seeds[::2]  # the first seed's do not depend on others


def test_what_a_fold_may_count(corpus: Corpus) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    split = problem.split(1, 5)
    example, item = problem.known(split)
    hidden = np.concatenate([split.validation, split.test])
    counted = {e: sorted(item[example == e]) for e in range(len(problem.user))}
    offsets, logs = problem.history
    for e, found in counted.items():
        before = logs[offsets[e] : offsets[e + 1]].tolist()
        expected = before if e in hidden else before + problem.targets[e].tolist()
        assert found == sorted(expected)


def test_a_posed_task_says_what_the_task_says(corpus: Corpus) -> None:
    task = Task.open(corpus, "books")
    problem = pose(corpus, task)
    assert not problem.full
    np.testing.assert_array_equal(problem.catalogue[problem.targets], task.targets)
    np.testing.assert_array_equal(problem.catalogue[problem.candidates[..., 1:]], task.negatives)
    offsets, items = task.history("books")
    np.testing.assert_array_equal(problem.history[0], offsets)
    np.testing.assert_array_equal(problem.catalogue[problem.history[1]], items)
    assert problem.pretraining is not None
    log = corpus.users("books")[1]
    first = int(corpus.users("books")[0][corpus.split("pretraining").stop])
    np.testing.assert_array_equal(problem.catalogue[problem.pretraining[1]], log[:first])
    np.testing.assert_array_equal(
        problem.pretraining[0], corpus.users("books")[0][: corpus.card.n_users + 1]
    )


def test_negatives_that_no_task_stores_are_drawn_among_what_the_user_never_touched(
    corpus: Corpus,
) -> None:
    task = Task.open(corpus, "full")
    problem = pose(corpus, task)
    assert problem.full
    assert problem.candidates.shape[2] > 10
    np.testing.assert_array_equal(problem.candidates, pose(corpus, task).candidates)
    offsets, items = problem.history
    for u in range(len(problem.user)):
        touched = {*items[offsets[u] : offsets[u + 1]], *problem.targets[u]}
        for row in problem.candidates[u]:
            assert not touched & set(row[1:])
            assert len(set(row[1:])) == len(row) - 1


@pytest.mark.parametrize("name", ["loo", "loo_full"])
def test_leave_one_out_has_three_examples_a_user(corpus: Corpus, name: str) -> None:
    task = Task.open(corpus, name)
    problem = pose(corpus, task)
    split = problem.split(0, 5)
    assert problem.n_folds(5) == 1
    assert split.validation.tolist() == split.test.tolist() or len(split.test) == task.n_users
    offsets, items = example_histories(task, task.service)
    own, last = (np.asarray(a).astype(int) for a in task.history(task.service, 0))
    for e in range(len(problem.user)):
        u, part = problem.user[e], problem.part[e]
        history = items[offsets[e] : offsets[e + 1]].tolist()
        target = problem.catalogue[problem.targets[e, 0]]
        train = last[own[u] : own[u + 1]].tolist()
        if part == 0:
            assert [*history, target] == train
        elif part == 1:
            assert (history, target) == (train, task.targets[u, 0])
        else:
            bounds, logs = task.history(task.service, 1)
            assert history == logs[bounds[u] : bounds[u + 1]].tolist()
            assert target == task.targets[u, 1]
        negatives = problem.catalogue[problem.candidates[e, 0, 1:]]
        assert not set(negatives) & {*train, *task.targets[u].tolist()}
        if name == "loo" and part:
            assert negatives.tolist() == task.negatives[u, part - 1].tolist()
    # Whoever has a single log before the targets is not trained on.
    assert (problem.part == 0).sum() == (np.diff(own) > 1).sum()
    # Nothing of a later part is counted in an earlier one.
    example, item = problem.known(split)
    assert set(example) <= set(split.train)
    assert len(item) == int(np.diff(own)[problem.user[split.train]].sum())
