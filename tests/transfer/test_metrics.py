"""Ranking metrics against slow and obvious implementations, other tools, closed forms, tables."""

import csv
import itertools
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

from scaling.transfer import lint
from scaling.transfer.intervals import bootstrap, paired, resampled
from scaling.transfer.lint import lint_metrics, lint_table
from scaling.transfer.metrics import (
    METRICS,
    MetricError,
    Ranks,
    gains,
    per_list,
    per_target,
    rank,
    rank_all,
    summarise,
)

NAMES = (*METRICS, "hr_3", "recall_3", "recall_10", "ndcg_3", "mrr_3", "mrr_10")


def of_order(name: str, places: list[int]) -> float:
    """One metric of a list without ties, its positives at these places (from 1), word for word."""
    kind, _, k = name.partition("_")
    seen = [p for p in sorted(places) if p <= (int(k) if k else math.inf)]
    if kind == "hr":
        return float(len(seen) > 0)
    if kind == "recall":
        return len(seen) / len(places)
    if kind == "mrr":
        return 1 / seen[0] if seen else 0.0
    ideal = sum(1 / math.log2(i + 2) for i in range(min(len(places), int(k))))
    return sum(1 / math.log2(p + 1) for p in seen) / ideal


def oracle(name: str, scores: list[float]) -> float:
    """Every place at which inserting the positive leaves the others sorted, averaged."""
    positive, others = scores[0], sorted(scores[1:], reverse=True)
    places = []
    for i in range(len(others) + 1):
        listed = [*others[:i], positive, *others[i:]]
        if listed == sorted(listed, reverse=True):
            places.append(i + 1)
    return sum(of_order(name, [p]) for p in places) / len(places)


# --- one positive ---------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40))
def test_metrics_equal_the_sorted_oracle_with_many_ties(scores: list[int]) -> None:
    ranks = rank(np.array(scores, np.float32))
    for name in NAMES:
        assert per_target(name, ranks) == pytest.approx(oracle(name, scores), abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64, np.int64]))
@settings(max_examples=20)
def test_a_block_of_lists_is_ranked_as_each_alone(seed: int, dtype: type) -> None:
    scores = np.random.default_rng(seed).integers(0, 9, (4, 3, 30)).astype(dtype)
    together = rank(scores)
    assert together.first.shape == (4, 3)
    for name in NAMES:
        values = per_target(name, together)
        for i in np.ndindex(4, 3):
            assert values[i] == pytest.approx(oracle(name, list(scores[i])), abs=1e-12)


def test_of_one_positive_recall_is_the_hit_ratio() -> None:
    ranks = rank(np.random.default_rng(0).integers(0, 9, (200, 30)))
    for k in (1, 2, 10, 50):
        assert (per_target(f"recall_{k}", ranks) == per_target(f"hr_{k}", ranks)).all()


def test_metrics_equal_scikit_learn_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    relevant = np.zeros((300, 101))
    relevant[:, 0] = 1
    distinct = rng.permuted(np.tile(np.arange(101.0), (300, 1)), axis=1)
    for scores in (distinct, rng.integers(0, 8, (300, 101)).astype(float)):
        ranks = rank(scores)
        for k in (1, 5, 10):  # scikit-learn averages ties in NDCG
            expected = ndcg_score(relevant, scores, k=k)
            assert per_target(f"ndcg_{k}", ranks).mean() == pytest.approx(expected, abs=1e-12)
        # and breaks them against the positive in the average precision, 1 / rank of one positive.
        expected = label_ranking_average_precision_score(relevant, scores)
        worst = per_target("mrr", ranks.pessimistic).mean()
        assert worst == pytest.approx(expected, abs=1e-12)
    assert per_target("mrr", rank(distinct)).mean() != pytest.approx(worst, abs=0.01)


TREC = {
    "hr_1": "success_1",
    "hr_10": "success_10",
    "recall_5": "recall_5",
    "recall_10": "recall_10",
    "ndcg_5": "ndcg_cut_5",
    "ndcg_10": "ndcg_cut_10",
    "mrr": "recip_rank",
}
"""trec_eval's names."""


def trec(scores: np.ndarray, positives: np.ndarray, rng: np.random.Generator) -> dict:
    """Metrics of every list by trec_eval, whose names of documents say nothing of relevance."""
    items = scores.shape[1]
    relevant, run = {}, {}
    for user, row in enumerate(scores):
        named = [f"d{n}" for n in rng.permutation(items)]
        run[str(user)] = dict(zip(named, row.tolist(), strict=True))
        relevant[str(user)] = {named[i]: 1 for i in positives[user]}
    wanted = {"success.1,10", "recall.5,10", "ndcg_cut.5,10", "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(relevant, wanted).evaluate(run)
    each = [found[str(user)] for user in range(len(scores))]
    return {ours: np.array([row[theirs] for row in each]) for ours, theirs in TREC.items()}


def test_metrics_equal_trec_eval_on_scores_without_ties() -> None:
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(101.0) / 8, (200, 1)), axis=1)
    ranks = rank(scores)
    for name, expected in trec(scores, np.zeros((200, 1), int), rng).items():
        assert per_target(name, ranks) == pytest.approx(expected, abs=1e-9)


CHANCE = {
    "hr_1": 1 / 101,
    "hr_10": 10 / 101,
    "ndcg_10": sum(1 / math.log2(r + 1) for r in range(1, 11)) / 101,
    "mrr": sum(1 / r for r in range(1, 102)) / 101,
}


def test_a_scorer_of_nothing_is_exactly_a_random_ranker() -> None:
    row = summarise(rank(np.zeros((5, 101), np.float32)))
    assert {k: row[k] for k in CHANCE} == pytest.approx(CHANCE)
    printed = {"hr_1": 0.0099, "hr_10": 0.0990, "ndcg_10": 0.0450, "mrr": 0.0515}
    assert {k: round(row[k], 4) for k in CHANCE} == printed
    assert row["tie_gap"] == 1.0


def test_a_random_ranker_reaches_the_closed_forms() -> None:
    n = 60_000
    ranks = rank(np.random.default_rng(1).random((n, 101)))
    assert summarise(ranks)["tie_gap"] == 0
    for name, value in CHANCE.items():
        # Four standard errors; a value in [0, 1] has at most the variance mean * (1 - mean).
        assert summarise(ranks)[name] == pytest.approx(value, abs=4 * math.sqrt(value / n))


def test_the_tie_gap_is_the_distance_between_the_two_ends() -> None:
    # Half of the lists tie the positive with the best other, half are clean wins.
    scores = np.tile(np.arange(101.0), (4, 1))
    scores[:, 0] = [100, 100, 200, 200]
    ranks = rank(scores)
    assert summarise(ranks.optimistic)["hr_1"] == 1.0
    assert summarise(ranks.pessimistic)["hr_1"] == 0.5
    assert summarise(ranks)["hr_1"] == 0.75
    assert summarise(ranks)["tie_gap"] == 0.5
    assert summarise(ranks, ["hr_2", "mrr_5"]) == {"hr_2": 1.0, "mrr_5": 0.875, "tie_gap": 0.25}


def test_a_perfect_and_a_perverse_scorer() -> None:
    scores = np.tile(np.arange(101.0), (2, 1))
    scores[0, 0], scores[1, 0] = 1e6, -1.0
    ranks = rank(scores)
    assert ranks.first.tolist() == [1, 101]
    assert per_target("ndcg_10", ranks).tolist() == [1.0, 0.0]
    assert per_target("mrr", ranks).tolist() == [1.0, 1 / 101]


@given(st.sampled_from(NAMES), st.integers(1, 300))
def test_every_metric_is_worth_one_at_the_top_and_less_further_down(name: str, items: int) -> None:
    values = gains(name, np.arange(1, items + 1))
    assert values[0] == 1.0
    assert (np.diff(values) <= 0).all()
    for place in {1, (items + 1) // 2, items}:
        assert values[place - 1] == pytest.approx(of_order(name, [place]), abs=1e-15)


def tables(values: st.SearchStrategy, dtype: type = np.float64) -> st.SearchStrategy:
    """Scores of some lists: positives in the first column."""
    shapes = st.tuples(st.integers(1, 5), st.integers(2, 25))
    return hnp.arrays(dtype, shapes, elements=values)


@given(tables(st.integers(-3, 3)))
def test_metrics_lie_in_order_for_every_list(scores: np.ndarray) -> None:
    ranks = rank(scores)
    of = {name: per_target(name, ranks) for name in NAMES}
    chains = (
        ("hr_1", "ndcg_3", "hr_3", "hr_10"),
        ("hr_1", "ndcg_10", "hr_10"),
        ("hr_1", "mrr_3", "ndcg_3", "ndcg_10"),
        ("mrr_3", "mrr_10", "mrr"),
    )
    for chain in chains:
        for low, high in itertools.pairwise(chain):
            assert (of[low] <= of[high] + 1e-12).all()
    for name in NAMES:
        best, worst = (per_target(name, r) for r in (ranks.optimistic, ranks.pessimistic))
        assert (worst <= of[name] + 1e-12).all()
        assert (of[name] <= best + 1e-12).all()


@given(tables(st.integers(-1000, 1000), np.int64), st.randoms(use_true_random=False))
def test_ranks_ask_for_nothing_but_the_order_of_scores(scores: np.ndarray, random) -> None:
    ranks = rank(scores)
    order = list(range(1, scores.shape[1]))
    random.shuffle(order)
    for same in (scores**3 + 7, np.arctan(scores / 100), scores[:, [0, *order]]):
        assert (rank(same).first == ranks.first).all()
        assert (rank(same).last == ranks.last).all()


@given(tables(st.integers(-3, 3)), st.floats(0.1, 5))
def test_a_worse_negative_changes_nothing_and_a_better_one_never_helps(
    scores: np.ndarray, distance: float
) -> None:
    positive = scores[:, :1]
    before = rank(scores)
    worse = rank(np.hstack([scores, positive - distance]))
    assert (worse.first == before.first).all()
    assert (worse.last == before.last).all()
    for name in NAMES:
        value = per_target(name, before)
        for other in (positive, positive + distance):
            assert (per_target(name, rank(np.hstack([scores, other]))) <= value + 1e-12).all()
        higher = rank(np.hstack([positive + distance, scores[:, 1:]]))
        assert (per_target(name, higher) >= value - 1e-12).all()


@pytest.mark.parametrize(
    "name", ["hr", "HR@10", "hr_0", "hr_-1", "ndcg_010", "mrr_", "map_10", "hr_10 ", "hr_10\n", ""]
)
def test_a_wrong_name_is_told_the_right_forms(name: str) -> None:
    ranks = Ranks(np.ones((2, 2), np.int64), np.ones((2, 2), np.int64))
    for ask in (
        lambda: per_target(name, ranks),
        lambda: per_list(name, ranks),
        lambda: summarise(ranks, [name]),
        lambda: lint_metrics({name: 0.5}),
    ):
        with pytest.raises(MetricError, match="valid: hr_K, recall_K, ndcg_K, mrr and mrr_K") as e:
            ask()
        assert repr(name) in str(e.value)


def test_rank_refuses_what_it_would_rank_wrongly() -> None:
    with pytest.raises(MetricError, match=r"2 of 6 are NaN or infinite"):
        rank(np.array([[np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0]]))
    with pytest.raises(MetricError, match="float16"):
        rank(np.zeros((2, 101), np.float16))
    with pytest.raises(MetricError, match=r"\(3, 0\): there are no candidates"):
        rank(np.zeros((3, 0)))


# --- among all items ------------------------------------------------------------------------------


@st.composite
def catalogues(draw):
    """Scores with ties, distinct targets of each user, and items a user has had, repeats too."""
    users, items = draw(st.integers(1, 5)), draw(st.integers(3, 12))
    scores = draw(hnp.arrays(np.float32, (users, items), elements=st.integers(0, 4)))
    n = draw(st.integers(1, 3))
    targets = [draw(st.permutations(range(items)))[:n] for _ in range(users)]
    had = [draw(st.lists(st.integers(0, items - 1), max_size=2 * items)) for _ in range(users)]
    return scores, np.array(targets), had


@given(catalogues(), st.integers(1, 40))
def test_a_target_among_all_items_is_ranked_as_a_list_of_its_own(catalogue, at_once: int) -> None:
    scores, targets, had = catalogue
    offsets = np.cumsum([0, *map(len, had)])
    ragged = offsets, np.array([*itertools.chain(*had)], np.int64)
    mask = np.zeros(scores.shape, bool)
    for user, items in enumerate(had):
        mask[user, items] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "scaling.transfer.metrics.AT_ONCE", at_once
        )  # blocks of one user and of several
        found = [rank_all(scores, targets, left) for left in (None, mask, ragged)]
    for ranks, left in zip(found, ([[]] * len(had), had, had), strict=True):
        for user, t in np.ndindex(targets.shape):
            own, listed = targets[user, t], set(targets[user].tolist())
            rest = [i for i in range(scores.shape[1]) if i not in set(left[user]) - listed]
            alone = rank(scores[user, [own, *(i for i in rest if i != own)]])
            assert ranks.first[user, t] == alone.first
            assert ranks.last[user, t] == alone.last


def test_full_rankings_leave_their_arguments_as_they_are() -> None:
    scores, targets = np.arange(12.0).reshape(2, 6), np.array([[0], [5]])
    mask = np.ones((2, 6), bool)
    ranks = rank_all(scores, targets, mask)
    assert ranks.first.tolist() == ranks.last.tolist() == [[1], [1]]
    assert mask.all()


def test_full_rankings_refuse_items_and_shapes_that_do_not_fit() -> None:
    scores, targets = np.zeros((2, 6)), np.array([[0], [5]])
    with pytest.raises(MetricError, match="targets are from -1 to 0; items are 0 to 5"):
        rank_all(scores, np.array([[0], [-1]]))
    with pytest.raises(MetricError, match="targets of 1 users, scores of 2"):
        rank_all(scores, targets[:1])
    with pytest.raises(MetricError, match="exclude are from 6 to 6"):
        rank_all(scores, targets, (np.array([0, 1, 1]), np.array([6])))
    for offsets in ([0, 1], [0, 1, 2]):
        with pytest.raises(MetricError, match="offsets up to"):
            rank_all(scores, targets, (np.array(offsets), np.array([3])))
    with pytest.raises(MetricError, match=r"exclude is \(2, 5\), scores are \(2, 6\)"):
        rank_all(scores, targets, np.zeros((2, 5), bool))
    with pytest.raises(MetricError, match="1 of 12 are NaN"):
        rank_all(np.where(np.arange(12).reshape(2, 6) == 3, np.nan, 0.0), targets)


# --- several positives in one list ----------------------------------------------------------------


def enumerated(name: str, scores: list[int], positives: int) -> float:
    """Mean over all orders of the items that are sorted by score; the first items are positive."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    found = [
        of_order(name, [i + 1 for i, item in enumerate(order) if item < positives])
        for order in orders
    ]
    return sum(found) / len(found)


KINDS = ("hr", "recall", "ndcg", "mrr")
LISTS = ("mrr", *(f"{kind}_{k}" for kind in KINDS for k in (1, 2, 3, 5, 10)))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.data())
@settings(max_examples=60)
def test_lists_equal_the_mean_over_all_orders_of_their_ties(scores: list[int], data) -> None:
    positives = data.draw(st.integers(1, len(scores)))
    ranks = rank_all(np.array([scores]), np.arange(positives)[None])
    for name in LISTS:
        expected = enumerated(name, scores, positives)
        assert per_list(name, ranks) == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize("positives", [1, 3, 7])
def test_lists_without_a_score_equal_the_mean_over_all_places(positives: int) -> None:
    ranks = rank_all(np.zeros((2, 12)), np.tile(np.arange(positives), (2, 1)))
    places = list(itertools.combinations(range(1, 13), positives))
    for name in LISTS:
        expected = sum(of_order(name, list(p)) for p in places) / len(places)
        assert per_list(name, ranks) == pytest.approx([expected] * 2, abs=1e-12)


def test_lists_of_different_lengths_are_as_each_alone_whatever_stands_in_the_gaps() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (50, 20))
    targets = rng.permuted(np.tile(np.arange(20), (50, 1)), axis=1)[:, :4]
    present = np.arange(4) < rng.integers(1, 5, 50)[:, None]
    ranks = rank_all(scores, targets)
    holes = Ranks(np.where(present, ranks.first, 0), np.where(present, ranks.last, -7))
    repeats = rank_all(scores, np.where(present, targets, targets[:, :1]))
    for name in LISTS:
        values = per_list(name, holes, present)
        assert (per_list(name, repeats, present) == values).all()
        for user in range(50):
            own = targets[user : user + 1, present[user]]
            alone = per_list(name, rank_all(scores[user : user + 1], own))
            assert values[user] == pytest.approx(alone[0], abs=1e-12)


def test_lists_of_one_positive_are_its_metrics() -> None:
    rng = np.random.default_rng(0)
    ranks = rank_all(rng.integers(0, 6, (200, 30)), rng.integers(0, 30, (200, 1)))
    for name in LISTS:
        assert per_list(name, ranks) == pytest.approx(per_target(name, ranks)[:, 0], abs=1e-12)


def test_lists_equal_trec_eval_without_ties_and_scikit_learn_with_them() -> None:
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(60.0), (100, 1)), axis=1)
    targets = rng.permuted(np.tile(np.arange(60), (100, 1)), axis=1)[:, :6]
    ranks = rank_all(scores, targets)
    for name, expected in trec(scores, targets, rng).items():
        assert per_list(name, ranks) == pytest.approx(expected, abs=1e-9)
    tied, relevant = np.floor(scores / 7), np.zeros((100, 60))
    np.put_along_axis(relevant, targets, 1.0, axis=1)
    for k in (3, 10):
        expected = ndcg_score(relevant, tied, k=k)
        found = per_list(f"ndcg_{k}", rank_all(tied, targets)).mean()
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_catalogue_that_ties_whole_has_the_closed_forms_of_chance() -> None:
    items, positives, k = 5_000, 4, 20
    targets = np.tile(np.arange(positives), (300, 1))
    ranks = rank_all(np.zeros((300, items), np.float32), targets)
    missed = math.comb(items - positives, k) / math.comb(items, k)
    assert per_list(f"hr_{k}", ranks) == pytest.approx(np.full(300, 1 - missed))
    assert per_list(f"recall_{k}", ranks) == pytest.approx(np.full(300, k / items))
    best = [math.comb(items - r, positives - 1) for r in range(1, items + 1)]
    mrr = sum(n / r for r, n in enumerate(best, 1)) / math.comb(items, positives)
    assert per_list("mrr", ranks) == pytest.approx(np.full(300, mrr))


def test_lists_refuse_positives_that_were_ranked_without_each_other() -> None:
    ones = np.ones((3, 2), np.int64)
    with pytest.raises(MetricError, match=r"list 0: 2 positives share ranks 1 to 1; .* all items"):
        per_list("hr_1", Ranks(ones, ones))
    present = np.array([[True, False], [False, False], [False, True]])
    with pytest.raises(MetricError, match="list 1 has no positive"):
        per_list("recall_10", Ranks(ones, ones), present)


# --- intervals ------------------------------------------------------------------------------------


def test_the_bootstrap_mean_and_error_are_the_closed_forms() -> None:
    values = np.random.default_rng(0).exponential(size=(400, 3))
    found = bootstrap(values, n_boot=4000)
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    # A resampled mean has the variance of the users' means over their number (n, not n - 1);
    # with 4,000 draws of nearly normal means its root is known to 1 in sqrt(2 * 4000).
    error = values.mean(1).std() / math.sqrt(400)
    assert found.se == pytest.approx(error, rel=4 / math.sqrt(8000))
    half = 1.959964 * error
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)
    wider, narrower = bootstrap(values, level=0.99), bootstrap(values, level=0.5)
    assert wider.low < found.low < narrower.low < narrower.high < found.high < wider.high


def test_the_bootstrap_draws_users_with_replacement() -> None:
    values = np.array([0.0, 1.0, 5.0])
    means = [np.mean(c) for c in itertools.product(values, repeat=3)]  # all resamples
    found = bootstrap(values, n_boot=5000, level=0.9)
    assert found.se == pytest.approx(np.std(means), rel=0.05)
    assert (found.low, found.high) == pytest.approx((np.quantile(means, 0.05), 11 / 3), abs=1e-12)


def test_a_users_targets_go_together() -> None:
    of_user = np.random.default_rng(0).integers(0, 2, 500).astype(float)
    alone, repeated = bootstrap(of_user), bootstrap(np.tile(of_user[:, None], (1, 3)))
    assert repeated == alone
    # As three users they would seem to be known better, by the root of three.
    as_users = bootstrap(np.repeat(of_user, 3))
    assert alone.se / as_users.se == pytest.approx(math.sqrt(3), rel=0.15)


def test_ragged_numbers_of_targets_weigh_by_target() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 800)
    sums = np.array([rng.random(n).sum() for n in counts]) * (1 + counts)
    found = bootstrap((sums, counts), n_boot=2000)
    assert found.mean == pytest.approx(sums.sum() / counts.sum(), abs=1e-12)
    # Linearised ratio estimator (Cochran 1977, eq. 6.13).
    residuals = sums - found.mean * counts
    error = math.sqrt((residuals**2).sum()) / counts.sum()
    assert found.se == pytest.approx(error, rel=4 / math.sqrt(4000) + 0.01)
    equal = np.full(800, 3)
    same = bootstrap((sums, equal)), bootstrap(np.tile(sums[:, None] / 3, (1, 3)))
    assert vars(same[0]) == pytest.approx(vars(same[1]), abs=1e-12)


def test_intervals_depend_on_the_seed_alone() -> None:
    values = np.random.default_rng(0).random(50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "paired"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str) -> None:
    # Three targets of a user share its luck: hits are Bernoulli given the user's own rate.
    rng, trials, users = np.random.default_rng(0), 600, 300
    covered = 0
    for _ in range(trials):
        rate = rng.beta(2, 4, users)[:, None]  # mean 1/3
        a = rng.random((users, 3)) < rate
        b = rng.random((users, 3)) < 0.9 * rate
        truth = 1 / 3 if kind == "one" else 0.1 / 3
        x, y = a.astype(float), b.astype(float)
        found = bootstrap(x, n_boot=400) if kind == "one" else paired(x, y, n_boot=400)
        covered += found.low <= truth <= found.high
    # 0.95 is inside the 99.9 % interval of the share that 600 trials estimate.
    share = binomtest(covered, trials).proportion_ci(0.999)
    assert share.low < 0.95 < share.high


def test_pairs_are_told_apart_where_two_intervals_overlap() -> None:
    rng = np.random.default_rng(0)
    b = rng.random((500, 3))
    a = b + rng.normal(0.01, 0.01, (500, 3))
    found = paired(a, b)
    assert vars(found) == pytest.approx(vars(bootstrap(a - b)), abs=1e-12)
    assert found.low > 0
    assert bootstrap(a).low < bootstrap(b).high
    flipped = paired(b, a)
    assert flipped.mean == pytest.approx(-found.mean, abs=1e-12)
    counts = np.arange(500) % 3 + 1
    ragged = paired((a[:, 0], counts), (b[:, 0], counts))
    assert ragged == bootstrap((a[:, 0] - b[:, 0], counts))


def test_draws_of_one_seed_are_of_the_same_users() -> None:
    rng = np.random.default_rng(0)
    a, b, counts = rng.random(200), rng.random(200), rng.integers(1, 5, 200)
    draws = resampled(np.stack([a, b]), counts, n_boot=500)
    assert draws.shape == (2, 500)
    np.testing.assert_array_equal(draws[1], resampled(b[None], counts, n_boot=500)[0])
    found = paired((a, counts), (b, counts), n_boot=500)
    ends = np.quantile(draws[0] - draws[1], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-12)


def test_intervals_refuse_values_that_have_none() -> None:
    for values in (np.zeros(0), np.zeros((3, 0)), (np.ones(2), np.array([1, 0]))):
        with pytest.raises(MetricError, match="valid: one user or more, each with a target"):
            bootstrap(values)
    with pytest.raises(MetricError, match="user 1 are not finite"):
        bootstrap(np.array([[1.0, 2.0], [np.nan, 0.0]]))
    for wrong in ({"level": 1.0}, {"level": 95}, {"n_boot": 1}):
        with pytest.raises(MetricError, match="valid: 0 < level < 1, n_boot >= 2"):
            bootstrap(np.ones(3), **wrong)
    for other in (np.ones((3, 1)), np.ones((4, 2)), (np.ones(3), np.array([2, 2, 1]))):
        with pytest.raises(MetricError, match="pair the same targets of the same users"):
            paired(np.ones((3, 2)), other)


# --- possible tables ------------------------------------------------------------------------------

SYSTEMS = ("DeepFM", "BST", "LightGCN", "UserBERT", "UniSRec", "ShopperBERT", "SimCLR", "CLUE",
           "Hybrid")  # fmt: skip
PRINTED = """
Books    HR@1    .0580 .0676 .0889 .0850 .0618 - - .1087 - .0947
Books    NDCG@10 .1857 .1916 .1875 .1826 .1895 - - .2104 - .1925
Books    MRR     .1552 .1606 .1690 .1644 .1601 - - .1854 - .1742
Clothing HR@1    .0812 .1169 .0924 .1208 .1091 - - .1564 - .0846
Clothing NDCG@10 .2082 .2294 .2245 .2544 .2228 - - .2857 - .2048
Clothing MRR     .1777 .2046 .1929 .2228 .1971 - - .2481 - .1783
PCR      HR@1    .4297 .4832 .4792 .5134 .5024 .4991 .5114 .5414 .5485
PCR      NDCG@10 .6696 .7017 .6988 .7140 .7126 .7174 .7231 .7418 .7466
PCR      MRR     .5979 .6380 .6344 .6642 .6478 .6552 .6626 .6857 .6912
MMR      HR@1    .1609 .2498 .2485 .2874 .2648 .2744 .3032 .3146 .2987
MMR      NDCG@10 .4430 .5354 .5325 .5627 .5504 .5637 .5873 .6030 .5856
MMR      MRR     .3048 .4019 .3995 .4514 .4326 .4298 .4578 .4713 .4532
NVR      HR@1    .5492 .5750 .4412 .5790 .5815 .5492 .5720 .5927 .5950
NVR      NDCG@10 .6992 .7161 .5849 .7127 .7108 .7025 .5589 .7253 .7287
NVR      MRR     .6615 .6806 .5498 .6866 .6903 .6665 .6789 .6924 .6954
OTAR     HR@1    .1654 .1616 .1794 .1628 .1720 .1739 .1754 .1977 .2003
OTAR     NDCG@10 .4097 .4092 .4235 .4045 .4161 .4192 .4216 .4445 .4471
OTAR     MRR     .3285 .3292 .3439 .3334 .3429 .3393 .3415 .3653 .3682
FWR      HR@1    - - - - - .1281 .1282 .1538 -
FWR      NDCG@10 - - - - - .7015 .7003 .7220 -
FWR      MRR     - - - - - .2464 .2468 .2804 -
ICLT     HR@1    .4109 .4489 .4781 .4891 .4915 - .4543 .5081 .5262
ICLT     NDCG@10 .6302 .6620 .6832 .7017 .6982 - .6628 .7036 .7112
ICLT     MRR     .5631 .5964 .6215 .6334 .6312 - .5987 .6440 .6560
"""
"""Shin et al. 2023 (AAAI), Table 2 (Books, Clothing; their YTMoE stands last here) and Table 3."""
COLUMNS = {"HR@1": "hr_1", "NDCG@10": "ndcg_10", "MRR": "mrr"}


def printed_rows() -> list[dict]:
    rows: dict[tuple[str, str], dict] = defaultdict(dict)
    for line in PRINTED.split("\n")[1:-1]:
        task, metric, *values = line.split()
        for system, value in zip((*SYSTEMS, "YTMoE"), values, strict=False):
            if value != "-":
                rows[task, system][COLUMNS[metric]] = float(value)
    return [{"task": task, "system": system, **row} for (task, system), row in rows.items()]


def test_seven_of_the_papers_rows_are_impossible() -> None:
    rows = printed_rows()
    assert len(rows) == 61
    assert all(len(row) == 5 for row in rows)
    flagged = lint_table(rows)
    assert {(rows[i]["task"], rows[i]["system"]) for i in flagged} == {
        *(("MMR", system) for system in ("SimCLR", "CLUE", "Hybrid")),
        ("NVR", "SimCLR"),
        *(("FWR", system) for system in ("ShopperBERT", "SimCLR", "CLUE")),
    }
    # Ranges that another program had found for these rows.
    of = {(rows[i]["task"], rows[i]["system"]): messages for i, messages in flagged.items()}
    given = "given hr_1 = 0.572, mrr = 0.6789"
    assert f"ndcg_10 = 0.5589 is outside [0.6768, 0.7563] {given}" in of["NVR", "SimCLR"]
    for system, top in (("SimCLR", "0.5862"), ("CLUE", "0.5970"), ("Hybrid", "0.5825")):
        assert any(m.startswith("ndcg_10") and f", {top}]" in m for m in of["MMR", system])
    for system in ("ShopperBERT", "SimCLR", "CLUE"):
        ends = [re.search(r"ndcg_10 = \S+ is outside \[.*, (.*)\]", m) for m in of["FWR", system]]
        assert any(end and 0.41 < float(end[1]) < 0.445 for end in ends)


@pytest.mark.parametrize(
    "row",
    [
        # Shin et al. 2023, Table 5 (PCR and ICLT, Single and Stacking) and Table 6 (2160D; 300D
        # has the figures of Stacking on PCR).
        (0.5341, 0.7377, 0.6808),
        (0.5414, 0.7418, 0.6857),
        (0.4956, 0.6934, 0.6333),
        (0.5081, 0.7036, 0.6440),
        (0.5360, 0.7390, 0.6822),
    ],
)
def test_what_the_paper_calls_hits_at_ten_are_hits_at_one(row: tuple[float, float, float]) -> None:
    hits, ndcg, mrr = row
    assert lint_metrics({"hr_10": hits, "ndcg_10": ndcg, "mrr": mrr})
    assert lint_metrics({"hr_1": hits, "ndcg_10": ndcg, "mrr": mrr}) == []


def published(path: Path) -> list[dict]:
    """Rows of a table that has metrics as lines and systems as columns."""
    rows: dict[tuple[str, str], dict] = defaultdict(dict)
    with open(path, encoding="utf-8", newline="") as f:
        for line in csv.DictReader(f, delimiter="\t"):
            (task, metric), *systems = itertools.islice(line.values(), 2), *line.items()
            for system, value in systems[2:]:
                rows[task, system][metric.lower().replace("@", "_")] = float(value)
    return list(rows.values())


@pytest.mark.data
def test_published_tables_of_other_papers_are_possible(clue_test_data: Path) -> None:
    folder = clue_test_data / "published_results"
    clue = published(folder / "clue_table2_books_clothing.tsv")
    assert len(clue) == 14
    own = [{k: v for k, v in r.items() if k in METRICS} for r in printed_rows()[:14]]
    assert sorted(clue, key=str) == sorted(own, key=str)
    # S3-Rec (Zhou et al. 2020): 99 negatives. HR@1, HR@5, NDCG@5, HR@10, NDCG@10 and MRR together.
    s3rec = published(folder / "s3rec_99_uniform_negatives.tsv")
    assert [len(row) for row in s3rec] == [6] * 24
    assert lint_table(s3rec, candidates=100) == {}
    # LMRec (Shin et al. 2023), Table 4: among all items.
    lmrec = published(folder / "lmrec_table4_public_full_ranking.tsv")
    items = [n for n in (4_385, 4_898, 3_469) for _ in range(9)]
    rows = [{**row, "candidates": n} for row, n in zip(lmrec, items, strict=True)]
    assert lint_table(rows) == {}
    with open(folder / "abxi_v2_readme_5_seed_mean.tsv", encoding="utf-8", newline="") as f:
        abxi = [
            {k.lower().replace("@", "_"): float(v) for k, v in line.items() if k not in names}
            for names in [("pair", "service")]
            for line in csv.DictReader(f, delimiter="\t")
        ]
    assert [set(row) for row in abxi] == [{"hr_5", "hr_10", "ndcg_10", "mrr"}] * 4
    assert lint_table(abxi, candidates=1_000) == {}
    # Nothing here is possible with its metrics interchanged, so the check looks at them.
    swapped = [{**row, "hr_1": row["hr_10"], "hr_10": row["hr_1"]} for row in s3rec]
    assert len(lint_table(swapped, candidates=100)) == 24


@given(st.integers(0, 2**32 - 1), st.integers(2, 101), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_what_we_compute_is_never_arithmetically_impossible(
    seed: int, candidates: int, values: int
) -> None:
    rng = np.random.default_rng(seed)
    row = summarise(rank(rng.integers(0, values, (7, candidates))), NAMES)
    del row["tie_gap"]
    assert lint_metrics(row, candidates=candidates, tolerance=1e-7) == []


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 20), st.integers(0, 20))
@settings(max_examples=60)
def test_a_row_is_possible_if_lists_with_these_ranks_exist(
    candidates: int, lists: int, hits: int, reciprocal: int
) -> None:
    row = {"hr_1": hits / 20, "mrr": reciprocal / 20}
    every = itertools.combinations_with_replacement(range(1, candidates + 1), lists)
    found = any(
        abs(np.mean([r == 1 for r in ranks]) - row["hr_1"]) < 1e-9
        and abs(np.mean([1 / r for r in ranks]) - row["mrr"]) < 1e-9
        for ranks in every
    )
    # The rest of the lists, 1 - HR@1, have their positive between the second place and the last.
    rest = 1 - row["hr_1"]
    low, high = row["hr_1"] + rest / candidates, row["hr_1"] + rest / 2
    assume(min(abs(row["mrr"] - low), abs(row["mrr"] - high)) > 1e-3 or found)
    between = low - 1e-9 <= row["mrr"] <= high + 1e-9
    assert between or not found
    assert (lint_metrics(row, candidates=candidates, tolerance=1e-6) == []) == between


@pytest.mark.parametrize(
    ("row", "flagged"),
    [
        ({"hr_1": 0.2, "hr_10": 0.1}, True),
        ({"hr_3": 0.2, "recall_3": 0.2001}, False),
        ({"hr_3": 0.2, "recall_3": 0.2002}, True),
        ({"mrr_10": 0.3, "mrr": 0.29}, True),
        ({"mrr_10": 0.3, "mrr": 0.31}, False),
        ({"mrr_10": 0.3, "mrr": 0.3 + 0.7 / 11 + 0.001}, True),
        ({"ndcg_10": 1.2}, True),
        ({"mrr": 0.0098}, True),  # 1 / 101 is the least
        ({"mrr": 0.0099}, False),
        ({"hr_200": 0.9}, True),  # all 101 are among the first 200
        ({}, False),
    ],
)
def test_lint_tells_possible_from_impossible_rows(row: dict[str, float], flagged: bool) -> None:
    assert bool(lint_metrics(row)) is flagged


def test_lint_names_the_metric_and_the_range_left_to_it() -> None:
    (message,) = (m for m in lint_metrics({"hr_1": 0.9, "ndcg_10": 0.5}) if m.startswith("ndcg"))
    # All of the rest beyond the tenth place, or all of it on the second.
    top = 0.9 + 0.1 / math.log2(3)
    assert message == f"ndcg_10 = 0.5 is outside [0.9000, {top:.4f}] given hr_1 = 0.9"


def test_lint_refuses_what_is_no_mean_and_a_program_that_failed(monkeypatch) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(MetricError, match=f"mrr is {value}; a mean is finite"):
            lint_metrics({"hr_1": 0.3, "mrr": value})
    with pytest.raises(MetricError, match="hr_1 is inf"):
        lint_table([{"hr_1": math.inf}])
    # A solver that gives up says nothing of the row: it is not to be called impossible.
    solve = lint.linprog
    monkeypatch.setattr(lint, "linprog", lambda *a, **k: solve(*a, **k, options={"maxiter": 0}))
    with pytest.raises(MetricError, match=r"\{'hr_1': 0.3, 'ndcg_10': 0.4\} did not end"):
        lint_metrics({"hr_1": 0.3, "ndcg_10": 0.4})


def test_lint_of_a_table_passes_over_what_is_missing_or_no_metric() -> None:
    rows = [
        {"system": "a", "hr_1": 0.3, "hr_10": None, "mrr": math.nan, "hr_1_low": 9.0, "loss": 7.0},
        {"system": "b", "hr_1": 0.3, "hr_10": 0.2},
        {"system": "c", "mrr": 0.005, "candidates": None},
        {"system": "d", "mrr": 0.005, "candidates": 5_000},
        {"system": "e"},
    ]
    flagged = lint_table(rows)
    assert list(flagged) == [1, 2]
    assert [m.partition(" ")[0] for m in flagged[1]] == ["hr_1", "hr_10"]
    assert list(lint_table(rows, candidates=200)) == [1]
