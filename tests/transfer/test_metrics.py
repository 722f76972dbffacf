"""Ranking metrics against a sorted() oracle, scikit-learn, closed forms and impossible tables."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from scaling.transfer.metrics import GAINS, Ranks, lint_metrics, per_target, rank, summarise


def oracle(scores: list[float]) -> dict[str, float]:
    """Every place at which inserting the positive leaves the others sorted, averaged."""
    positive, others = scores[0], sorted(scores[1:], reverse=True)
    places = []
    for i in range(len(others) + 1):
        listed = [*others[:i], positive, *others[i:]]
        if listed == sorted(listed, reverse=True):
            places.append(i + 1)
    return {
        "hr_1": sum(p == 1 for p in places) / len(places),
        "hr_10": sum(p <= 10 for p in places) / len(places),
        "ndcg_10": sum(1 / math.log2(p + 1) for p in places if p <= 10) / len(places),
        "mrr": sum(1 / p for p in places) / len(places),
    }


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40))
def test_metrics_equal_the_sorted_oracle_with_many_ties(scores: list[int]) -> None:
    ranks = rank(np.array(scores, np.float32))
    for name, value in oracle(scores).items():
        assert per_target(name, ranks) == pytest.approx(value, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=20)
def test_a_block_of_lists_is_ranked_as_each_alone(seed: int, dtype: type) -> None:
    scores = np.random.default_rng(seed).integers(0, 9, (4, 3, 30)).astype(dtype)
    together = rank(scores)
    assert together.first.shape == (4, 3)
    for i in np.ndindex(4, 3):
        for name, value in oracle(list(scores[i])).items():
            assert per_target(name, together)[i] == pytest.approx(value, abs=1e-12)


def test_ndcg_equals_scikit_learn_on_scores_without_ties() -> None:
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(101.0), (300, 1)), axis=1)
    relevant = np.zeros_like(scores)
    relevant[:, 0] = 1
    ours = per_target("ndcg_10", rank(scores))
    assert ours.mean() == pytest.approx(ndcg_score(relevant, scores, k=10), abs=1e-12)


CHANCE = {
    "hr_1": 1 / 101,
    "hr_10": 10 / 101,
    "ndcg_10": sum(1 / math.log2(r + 1) for r in range(1, 11)) / 101,
    "mrr": sum(1 / r for r in range(1, 102)) / 101,
}


def test_a_scorer_of_nothing_is_exactly_a_random_ranker() -> None:
    row = summarise(rank(np.zeros((5, 101), np.float32)))
    assert {k: row[k] for k in CHANCE} == pytest.approx(CHANCE)
    assert row["tie_gap"] == 1.0


def test_a_random_ranker_reaches_the_closed_forms() -> None:
    n = 60_000
    row = summarise(rank(np.random.default_rng(1).random((n, 101))))
    assert row["tie_gap"] == 0
    for name, value in CHANCE.items():
        assert row[name] == pytest.approx(value, abs=4 * math.sqrt(value / n))


def test_the_tie_gap_is_the_distance_between_the_two_ends() -> None:
    # Half of the lists tie the positive with the best other, half are clean wins.
    scores = np.tile(np.arange(101.0), (4, 1))
    scores[:, 0] = [100, 100, 200, 200]
    ranks = rank(scores)
    assert summarise(ranks.optimistic)["hr_1"] == 1.0
    assert summarise(ranks.pessimistic)["hr_1"] == 0.5
    assert summarise(ranks)["hr_1"] == 0.75
    assert summarise(ranks)["tie_gap"] == 0.5


def test_a_perfect_and_a_perverse_scorer() -> None:
    scores = np.tile(np.arange(101.0), (2, 1))
    scores[0, 0], scores[1, 0] = 1e6, -1.0
    ranks = rank(scores)
    assert ranks.first.tolist() == [1, 101]
    assert per_target("ndcg_10", ranks).tolist() == [1.0, 0.0]
    assert per_target("mrr", ranks).tolist() == [1.0, 1 / 101]


@given(st.integers(0, 2**32 - 1), st.integers(2, 101), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_what_we_compute_is_never_arithmetically_impossible(
    seed: int, candidates: int, values: int
) -> None:
    rng = np.random.default_rng(seed)
    row = summarise(rank(rng.integers(0, values, (7, candidates))))
    assert row["hr_1"] <= row["ndcg_10"] + 1e-12
    assert row["ndcg_10"] <= row["hr_10"] + 1e-12
    assert row["hr_1"] <= row["mrr"] + 1e-12
    assert lint_metrics(row, candidates=candidates, tolerance=1e-7) == []


@pytest.mark.parametrize(
    ("row", "flagged"),
    [
        # Shin et al. 2023, Table 5: printed as HR@10, but only possible as HR@1.
        ({"hr_10": 0.5414, "ndcg_10": 0.7418, "mrr": 0.6857}, True),
        ({"hr_1": 0.5414, "ndcg_10": 0.7418, "mrr": 0.6857}, False),
        # Table 2, CLUE on Books and on Clothing: possible.
        ({"hr_1": 0.1087, "ndcg_10": 0.2104, "mrr": 0.1854}, False),
        ({"hr_1": 0.1564, "ndcg_10": 0.2857, "mrr": 0.2481}, False),
        # Table 3, SimCLR on news: an NDCG@10 below HR@1.
        ({"hr_1": 0.5720, "ndcg_10": 0.5589}, True),
        ({"hr_1": 0.2, "hr_10": 0.1}, True),
        ({"ndcg_10": 1.2}, True),
        ({}, False),
    ],
)
def test_lint_tells_possible_from_impossible_rows(row: dict[str, float], flagged: bool) -> None:
    assert bool(lint_metrics(row)) is flagged


def test_lint_names_the_metric_and_the_range_left_to_it() -> None:
    (message,) = (m for m in lint_metrics({"hr_1": 0.9, "ndcg_10": 0.5}) if m.startswith("ndcg"))
    # All of the rest beyond the tenth place, or all of it on the second.
    assert "[0.9" in message
    assert "hr_1 = 0.9" in message


def test_rank_refuses_what_it_would_rank_wrongly() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rank(np.array([np.nan, 1.0, 2.0]))
    with pytest.raises(ValueError, match="float16"):
        rank(np.zeros((2, 101), np.float16))  # type: ignore[arg-type]


def test_every_metric_is_worth_less_further_down() -> None:
    ranks = np.arange(1, 102)
    for name in GAINS:
        values = per_target(name, Ranks(ranks, ranks))
        assert values[0] == 1.0
        assert (np.diff(values) <= 0).all()
