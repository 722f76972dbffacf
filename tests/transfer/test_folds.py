"""Folds on planted arrays: who is tested, what is learnt, and that nothing leaks."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import scaling.transfer.evaluate as evaluation
from scaling.transfer.evaluate import Problem, evaluate_fold, split
from scaling.transfer.features import TransferError
from scaling.transfer.heads import Examples, Head

N_ITEMS = 300


def popular(n_users: int = 200, seed: int = 0) -> Problem:
    """Users who differ in nothing and choose by a steep popularity; items 0, 1, ... fall off."""
    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, N_ITEMS + 1)
    order = np.argsort(-(np.log(weight) + rng.gumbel(size=(n_users, N_ITEMS))), axis=1)
    negatives = np.stack([rng.permuted(order[:, 9:], axis=1)[:, :100] for _ in range(3)], 1)
    return Problem(
        items=rng.normal(size=(N_ITEMS, 4)).astype(np.float32),
        examples=Examples(
            rng.normal(size=(n_users, 3)).astype(np.float32),
            np.concatenate([order[:, :3, None], negatives], 2),
        ),
        group=np.arange(n_users).astype(np.uint8) % 10,
        history=(np.arange(n_users + 1) * 6, order[:, 3:9].ravel()),
        pretraining=order[:50, :9].ravel(),
    )


@pytest.mark.parametrize("folds", [2, 5, 10])
def test_every_user_is_tested_once_and_is_in_one_part_of_a_fold(folds: int) -> None:
    group = np.random.default_rng(0).integers(0, 10, 500).astype(np.uint8)
    tested = []
    for fold in range(folds):
        parts = split(group, fold, folds)
        together = np.concatenate([parts.train, parts.validation, parts.test])
        assert sorted(together) == list(range(500))
        # Whole groups only, so that a group's users are never on two sides.
        groups = [set(group[p]) for p in (parts.train, parts.validation, parts.test)]
        assert sum(map(len, groups)) == 10
        assert len(groups[1]) == 1
        tested += parts.test.tolist()
    assert sorted(tested) == list(range(500))


def test_five_folds_are_the_documented_ones() -> None:
    group = np.arange(10).astype(np.uint8)
    first, last = split(group, 0, 5), split(group, 4, 5)
    assert first.test.tolist() == [0, 1]
    assert first.validation.tolist() == [2]
    assert last.test.tolist() == [8, 9]
    assert last.validation.tolist() == [0]


def test_folds_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(TransferError, match="folds = 3; valid: 2, 5, 10"):
        split(np.arange(10).astype(np.uint8), 0, 3)
    with pytest.raises(TransferError, match="5, 0, 3 users"):
        split(np.array([0, 0, 1, 5, 5, 6, 7, 9], np.uint8), 0, 5)


def rows_of(problem: Problem, fold: int = 0) -> dict[str, dict[str, Any]]:
    rows = evaluate_fold(problem, fold, folds=5, seed=0, system="clue/u-mlp")
    return {row["system"]: row for row in rows}


def test_rows_of_a_fold() -> None:
    rows = rows_of(popular())
    assert list(rows) == ["clue/u-mlp", "popularity", "popularity/pretraining"]
    for row in rows.values():
        assert (row["fold"], row["n_users"], row["n_targets"]) == (0, 40, 120)
    head, floor = rows["clue/u-mlp"], rows["popularity"]
    assert head["loss"] < 1.05 * math.log(2)
    assert head["loss_softmax"] < 1.05 * math.log(101)
    assert floor["loss"] is None
    assert floor["loss_softmax"] is None
    # Everybody chooses by popularity and the features say nothing.
    assert floor["hr_10"] > 0.4 > head["hr_10"]
    assert rows_of(popular()) == rows


def test_metrics_that_no_ranking_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    impossible = {"hr_1": 0.5, "hr_10": 0.4, "ndcg_10": 0.3, "mrr": 0.3, "tie_gap": 0.0}
    monkeypatch.setattr(evaluation, "summarise", lambda ranks: impossible)
    with pytest.raises(TransferError, match=r"clue/u-mlp, fold 0: .*hr_10 = 0\.4"):
        rows_of(popular())


def test_popularity_needs_no_pretraining_service() -> None:
    problem = replace(popular(), pretraining=None)
    assert list(rows_of(problem)) == ["clue/u-mlp", "popularity"]


def test_popularity_counts_histories_and_targets_of_training_users_only() -> None:
    problem = popular()
    users = split(problem.group, 0, 5)
    counts = dict(evaluation._popularity(problem, users.train))
    by_hand = [0] * N_ITEMS
    for user in users.train:
        for item in problem.history[1][6 * user : 6 * user + 6]:
            by_hand[item] += 1
        for item in problem.examples.rows[user, :, 0]:
            by_hand[item] += 1
    assert counts["popularity"].tolist() == by_hand
    assert counts["popularity"].sum() == 9 * len(users.train)
    assert counts["popularity/pretraining"].sum() == 450


def test_nothing_of_a_test_user_reaches_what_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = popular()
    test = split(problem.group, 0, 5).test
    rng = np.random.default_rng(9)
    rows, items, users = problem.examples.rows.copy(), problem.history[1].copy(), None
    rows[test] = rng.permuted(rows[test], axis=2)
    items.reshape(-1, 6)[test] = rng.integers(0, N_ITEMS, (len(test), 6))
    users = problem.examples.users.copy()
    users[test] *= 100
    altered = replace(problem, examples=Examples(users, rows), history=(problem.history[0], items))
    heads: list[Head] = []
    counts: list[np.ndarray] = []
    fit, count_items = evaluation.fit, evaluation.count_items

    def spied_fit(*args: Any, **kwargs: Any) -> Head:
        heads.append(fit(*args, **kwargs))
        return heads[-1]

    def spied_count(*args: Any) -> np.ndarray:
        counts.append(count_items(*args))
        return counts[-1]

    monkeypatch.setattr(evaluation, "fit", spied_fit)
    monkeypatch.setattr(evaluation, "count_items", spied_count)
    assert rows_of(problem) != rows_of(altered)
    before, after = heads
    assert before.epochs == after.epochs
    assert before.validation_loss == after.validation_loss
    for p, q in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert np.array_equal(p.detach(), q.detach())
    for a, b in ((before.user_input, after.user_input), (before.item_input, after.item_input)):
        assert np.array_equal(a.mean, b.mean)
        assert np.array_equal(a.scale, b.scale)
    assert np.array_equal(counts[0], counts[2])
    assert np.array_equal(counts[1], counts[3])
