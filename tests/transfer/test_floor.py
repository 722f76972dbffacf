"""Popularity on Food x Kitchen against an independent count from the raw files."""

import gzip
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare
from scaling.data.tasks import Task
from scaling.transfer.baselines import Context
from scaling.transfer.baselines.evaluate import SYSTEMS
from scaling.transfer.intervals import bootstrap
from scaling.transfer.metrics import METRICS, per_target, rank, rank_all, summarise
from scaling.transfer.problem import pose
from tests.data import test_leave_one_out as s3rec

sequences, beauty = s3rec.sequences, s3rec.corpus  # fixtures

CORPUS_FILE = Path(__file__).parents[2] / "sweeps" / "corpora" / "food_kitchen.toml"

# Mean and standard deviation over 24 random splits of the users, counted by a separate program from
# the raw files: popularity among the 4,400 pretraining users, fresh uniform negatives.
FLOOR = {
    "food": {
        "hr_1": (0.0903, 0.0034),
        "hr_10": (0.4619, 0.0056),
        "ndcg_10": (0.2506, 0.0039),
        "mrr": (0.2039, 0.0037),
    },
    "kitchen": {
        "hr_1": (0.1004, 0.0032),
        "hr_10": (0.4299, 0.0057),
        "ndcg_10": (0.2465, 0.0039),
        "mrr": (0.2094, 0.0034),
    },
}


@pytest.mark.data
@pytest.mark.slow
def test_the_popularity_floor_of_food_and_kitchen(
    clue_test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpus = Corpus.open(prepare(CORPUS_FILE, tmp_path))
    for name, expected in FLOOR.items():
        problem = pose(corpus, Task.open(corpus, name))
        context = Context(corpus, problem)
        assert problem.candidates.shape == (2744, 3, 101)
        everybody = np.arange(2744)
        scorer = SYSTEMS["popularity/pretraining"](context, problem.split(0, 5), 0)
        row = summarise(rank(scorer.pairs(everybody, problem.candidates)))
        for metric, (mean, deviation) in expected.items():
            assert row[metric] == pytest.approx(mean, abs=4 * deviation), (name, metric)
        # What a fold may know, fewer than half as many logs, makes a floor a little lower.
        own = []
        for fold in range(5):
            split = problem.split(fold, 5)
            scorer = SYSTEMS["popularity"](context, split, 0)
            own.append(
                summarise(rank(scorer.pairs(split.test, problem.candidates[split.test])))["hr_10"]
            )
        assert 0.92 * row["hr_10"] < np.mean(own) < 1.01 * row["hr_10"]


# HR@1, HR@10, NDCG@10, MRR of one other split of the users, by a separate program on the raw files.
# It took the other service's logs for history, too. That matters to co-occurrence on Kitchen alone,
# which is compared as that program had it.
OTHERS = {
    ("food", "popularity/pretraining"): (0.0901, 0.4674, 0.2560, 0.2086),
    ("kitchen", "popularity/pretraining"): (0.1000, 0.4301, 0.2497, 0.2135),
    ("food", "tfidf"): (0.0716, 0.2433, 0.1468, 0.1377),
    ("food", "tfidf+popularity"): (0.1157, 0.4733, 0.2698, 0.2265),
    ("food", "cooccurrence"): (0.1090, 0.4447, 0.2664, 0.2229),
    ("food", "both services"): (0.1090, 0.4447, 0.2664, 0.2229),
    ("kitchen", "tfidf"): (0.0461, 0.2045, 0.1123, 0.1056),
    ("kitchen", "both services"): (0.1208, 0.3845, 0.2474, 0.2180),
}


@pytest.mark.data
@pytest.mark.slow
def test_what_texts_and_neighbours_score_on_food_and_kitchen(
    clue_test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that program found, but for tokens in place of words, which split them more finely."""
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpus = Corpus.open(prepare(CORPUS_FILE, tmp_path))
    for (name, system), expected in OTHERS.items():
        task = Task.open(corpus, name)
        problem = pose(corpus, task)
        everybody = np.arange(len(problem.user))
        if system == "both services":
            scores = cooccurrence_of_all_services(corpus, task)[:, problem.catalogue]
            scores = np.take_along_axis(scores[:, None], problem.candidates, 2)
        else:
            # No test user is known to the fold but by the history: all can be scored at once.
            split = problem.split(0, 5)
            none = type(split)(everybody[:0], split.validation, everybody)
            scorer = SYSTEMS[system](Context(corpus, problem), none, 0)
            scores = scorer.pairs(everybody, problem.candidates.astype(np.int64))
        for metric, value in zip(METRICS, expected, strict=True):
            found = bootstrap(per_target(metric, rank(scores)), n_boot=200)
            # both are draws of a split: the difference of two such means
            assert abs(found.mean - value) < 4 * 2**0.5 * found.se, (name, system, metric)


def cooccurrence_of_all_services(corpus: Corpus, task: Task) -> np.ndarray:
    """Sums, over the distinct items of a user's logs in all services, of how many pretraining users
    have both; an item does not occur with itself. [users, items]"""
    services, n_users = corpus.card.services, corpus.card.n_users
    # Items of two services differ, so that sums of the services' tables are of ones and zeros.
    logged = sum(baskets(*corpus.users(s), n_users, corpus.n_items) for s in services)
    profile = sum(baskets(*task.history(s), task.n_users, corpus.n_items) for s in services)
    together = (profile @ (logged.T @ logged)).toarray()
    return np.asarray(together - (profile * logged.sum(axis=0)).toarray())


def baskets(bounds: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> csr_array:
    """1 where a user has an item. [users, items]"""
    bounds = bounds[: n_users + 1].astype(np.int64)
    pairs = np.repeat(np.arange(n_users), np.diff(bounds)) * n_items + items[: bounds[-1]]
    user, item = np.divmod(np.unique(pairs), n_items)
    return csr_array((np.ones(len(user), np.float32), (user, item)), shape=(n_users, n_items))


@pytest.mark.data
@pytest.mark.slow
def test_popularity_on_beauty_is_below_the_published_row_which_counted_the_test_items(
    beauty: Corpus,
) -> None:
    problem = pose(beauty, Task.open(beauty, "ranked"))
    assert problem.n_folds(5) == 1
    split = problem.split(0, 5)
    assert len(split.test) == 22_363
    context = Context(beauty, problem)
    honest = SYSTEMS["popularity"](context, split, 0)
    rows = problem.candidates[split.test].astype(np.int64)
    # S3-Rec (Zhou et al. 2020) seems to have counted all logs: those that validate and test, too.
    targets = problem.targets[np.concatenate([split.validation, split.test])].ravel()
    leaking = np.asarray(honest.every(split.test[:1]))[0] + np.bincount(
        targets, minlength=len(problem.catalogue)
    )
    ours, theirs = rank(honest.pairs(split.test, rows)), rank(leaking[rows])
    for i, metric in enumerate(("hr_10", "ndcg_10", "mrr")):
        own, leaked = (bootstrap(per_target(metric, r), n_boot=200) for r in (ours, theirs))
        print(f"{metric}: {own.mean:.4f}, with the test items {leaked.mean:.4f} ({leaked.se:.4f})")
        assert abs(own.mean - s3rec.COUNTED["train"][i]) < 3 * own.se, metric
        assert abs(leaked.mean - s3rec.PUBLISHED[i]) < 3 * leaked.se, metric
        assert own.mean < s3rec.PUBLISHED[i] - 10 * own.se, metric


@pytest.mark.data
@pytest.mark.slow
def test_nothing_counts_the_targets_of_a_task_for_other_encoders(
    clue_test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All users of Scientific, pretraining's among them, by a plain count over the raw files: pairs
    of items that a user has before the two targets."""
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    file = CORPUS_FILE.with_name("scientific.toml")
    corpus = Corpus.open(prepare(file, tmp_path))
    problem = pose(corpus, Task.open(corpus, "lmrec"))
    assert problem.pretraining is None
    split = problem.split(0, 5)
    scorer = SYSTEMS["cooccurrence"](Context(corpus, problem), split, 0)
    found = rank_all(scorer.every(split.test), problem.targets[split.test])

    raw = clue_test_data / "amazon18_scientific_unisrec"
    with gzip.open(raw / "Scientific.train.inter.gz", "rt") as f:
        rows = [line.rstrip("\n").split("\t") for line in list(f)[1:]]
    known: dict[str, list[str]] = {}
    for user, history, target in rows:  # a user's longest log comes first
        known.setdefault(user, [*history.split(), target])
    both: dict[str, Counter[str]] = defaultdict(Counter)
    for log in known.values():
        for a, b in itertools.permutations(set(log), 2):
            both[a][b] += 1
    hits = []
    with gzip.open(raw / "Scientific.test.inter.gz", "rt") as f:
        for line in list(f)[1:]:
            _, history, target = line.rstrip("\n").split("\t")
            scores: Counter[str] = Counter()
            for item in history.split():
                scores.update(both[item])
            above = sum(v > scores[target] for v in scores.values())
            tied = sum(v == scores[target] for i, v in scores.items() if i != target)
            tied += (problem.candidates.max() + 1 - len(scores)) * (scores[target] == 0)
            hits.append(min(1, max(0, 10 - above) / (1 + tied)))
    assert len(hits) == len(split.test)
    assert summarise(found)["hr_10"] == pytest.approx(np.mean(hits), abs=0.005)
