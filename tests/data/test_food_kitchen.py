"""Acceptance on real logs: Amazon 2014, Grocery x Home & Kitchen.

Counts and reference figures come from an independent program over the same files.
"""

from pathlib import Path

import numpy as np
import pytest

from scaling.data import tokenizer
from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare
from scaling.data.tasks import Task

pytestmark = [pytest.mark.data, pytest.mark.slow]
CORPUS_FILE = Path(__file__).parents[2] / "sweeps" / "corpora" / "food_kitchen.toml"
# Popularity counted on pretraining users, 8 other splits of the users: mean of HR@1, HR@10,
# NDCG@10, MRR, and the standard deviation between splits.
FLOOR = {
    "food": ([0.0914, 0.4624, 0.2520, 0.2054], [0.0051, 0.0058, 0.0053, 0.0049]),
    "kitchen": ([0.0975, 0.4269, 0.2438, 0.2068], [0.0028, 0.0046, 0.0028, 0.0024]),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUE_DATA", str(request.getfixturevalue("clue_test_data")))
        return Corpus.open(prepare(CORPUS_FILE, tmp_path_factory.mktemp("food_kitchen")))


def test_counts(corpus):
    corpus.verify()
    steps = {s["step"]: s for s in corpus.manifest["steps"]}
    assert steps["read"] == {"step": "read", "logs": 83_663 + 89_885, "malformed": 0}
    assert steps["titled"]["logs"] == 165_229
    assert steps["titled"]["users"] == 7_144
    assert steps["deduplicated"]["logs"] == 165_229  # the files repeat no (user, item)
    assert corpus.n_items == 23_357
    assert corpus.manifest["splits"]["validation"] == 256
    assert corpus.manifest["splits"]["pool"] == 512
    # 6,676 eligible users, 2,744 set aside; 464 of the 468 others have a log in both services.
    assert corpus.card.n_users == 6_676 - 2_744 + 464
    for name in ("food", "kitchen"):
        task = Task.open(corpus, name)
        assert task.n_users == 2_744
        assert task.cut == "day"
        held = np.concatenate([corpus.keys[corpus.split(s)] for s in ("validation", "pool")])
        assert np.isin(held, task.keys).all()


def test_titles_are_tokenised(corpus):
    assert corpus.card.vocab_size == 4_096
    assert 12 < np.dot(corpus.card.tokens_per_item, range(33)) < 18
    bpe = tokenizer.load(corpus.path / "tokenizer.json")
    texts = []
    for i in range(0, corpus.n_items, 500):
        start, end = corpus.token_offsets[i : i + 2]
        texts.append(bpe.decode(corpus.tokens[start + 1 : end].tolist()))
    assert not [t for t in texts if "&amp;" in t or "&quot;" in t or "  " in t.strip()]


@pytest.mark.parametrize("name", ["food", "kitchen"])
def test_popularity_floor(corpus, name):
    task = Task.open(corpus, name)
    offsets, items = corpus.users(name)
    trained = items[: int(offsets[corpus.card.n_users])]
    counts = np.bincount(trained, minlength=corpus.n_items)
    positive, negative = counts[task.targets][..., None], counts[task.negatives]
    above, tied = (negative > positive).sum(2), (negative == positive).sum(2)
    rank = np.arange(1, 102)
    gains = [rank <= 1, rank <= 10, (rank <= 10) / np.log2(rank + 1), 1 / rank]
    measured = []
    for gain in gains:  # expected over the places that ties may take
        total = np.concatenate([[0.0], np.cumsum(gain)])
        measured.append(((total[above + tied + 1] - total[above]) / (tied + 1)).mean())
    mean, sd = map(np.array, FLOOR[name])
    assert (np.abs(np.array(measured) - mean) < 4 * sd).all(), measured
