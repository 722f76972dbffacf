"""Popularity on Food x Kitchen against an independent count from the raw files."""

from pathlib import Path

import numpy as np
import pytest

from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare
from scaling.data.tasks import Task
from scaling.transfer.baselines.popularity import count_items
from scaling.transfer.evaluate import pose, split
from scaling.transfer.metrics import rank, summarise

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
        task = Task.open(corpus, name)
        n_items = len(task.candidates)
        nothing = np.zeros((n_items, 1), np.float32)
        problem = pose(corpus, task, np.zeros((task.n_users, 1), np.float32), nothing)
        rows = problem.examples.rows
        assert rows.shape == (2744, 3, 101)
        assert problem.pretraining is not None
        counts = count_items(n_items, problem.pretraining)
        row = summarise(rank(counts[rows]))
        for metric, (mean, deviation) in expected.items():
            assert row[metric] == pytest.approx(mean, abs=4 * deviation), (name, metric)
        # The task's own training users, fewer than half as many, make a floor a little lower.
        own = []
        for fold in range(5):
            users = split(problem.group, fold, 5)
            history, starts = problem.history[1], problem.history[0]
            logs = [history[starts[u] : starts[u + 1]] for u in users.train]
            counts = count_items(n_items, np.concatenate(logs), rows[users.train, :, 0])
            own.append(summarise(rank(counts[rows[users.test]]))["hr_10"])
        assert 0.92 * row["hr_10"] < np.mean(own) < 1.01 * row["hr_10"]
