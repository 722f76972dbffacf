"""Acceptance on real logs: Amazon 2014, Grocery x Home & Kitchen.

Counts and reference figures come from independent programs over the same files.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from scaling.data import tokenizer
from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare
from scaling.data.tasks import Task

pytestmark = [pytest.mark.data, pytest.mark.slow]
CORPUS_FILE = Path(__file__).parents[2] / "sweeps" / "corpora" / "food_kitchen.toml"
# Popularity counted on pretraining users: HR@1, HR@10, NDCG@10, MRR. One program on one split of
# the users; another on eight: their mean, and the standard deviation between splits.
ONE_SPLIT = {
    "food": [0.0901, 0.4674, 0.2560, 0.2086],
    "kitchen": [0.1000, 0.4301, 0.2497, 0.2135],
}
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


def test_what_results_refer_to(corpus):
    """Digests that the tables in ``results/`` name; tasks of other names may come beside them."""
    assert corpus.card.digest == "6vatc72s6xmiik2c"
    tasks = corpus.manifest["tasks"]
    assert (tasks["food"], tasks["kitchen"]) == ("scxuz5cpc67wajrq", "zzi3uqzc4fd7lcvn")


def test_titles_are_tokenised(corpus):
    assert corpus.card.vocab_size == 4_096
    assert 12 < np.dot(corpus.card.tokens_per_item, range(33)) < 18
    bpe = tokenizer.load(corpus.path / "tokenizer.json")
    texts = []
    for i in range(0, corpus.n_items, 500):
        start, end = corpus.token_offsets[i : i + 2]
        texts.append(bpe.decode(corpus.tokens[start + 1 : end].tolist()))
    assert not [t for t in texts if "&amp;" in t or "&quot;" in t or "  " in t.strip()]


def popularity(corpus, name):
    """HR@1, HR@10, NDCG@10 and MRR of every user, expected over the places that ties may take."""
    task = Task.open(corpus, name)
    offsets, items = corpus.users(task.service)
    trained = items[: int(offsets[corpus.card.n_users])]
    counts = np.bincount(trained, minlength=corpus.n_items)
    positive, negative = counts[task.targets][..., None], counts[task.negatives]
    above, tied = (negative > positive).sum(2), (negative == positive).sum(2)
    rank = np.arange(1, 102)
    gains = [rank <= 1, rank <= 10, (rank <= 10) / np.log2(rank + 1), 1 / rank]
    totals = [np.concatenate([[0.0], np.cumsum(gain)]) for gain in gains]
    return [((t[above + tied + 1] - t[above]) / (tied + 1)).mean(axis=1) for t in totals]


@pytest.mark.parametrize("name", ["food", "kitchen"])
def test_popularity_floor(corpus, name):
    """Against the one split in standard errors of the difference of two independent splits, once by
    resampling users, whose targets go together, and once from the eight splits; the larger counts.
    """
    per_user = np.array(popularity(corpus, name))
    measured = per_user.mean(axis=1)
    draw = np.random.default_rng(0)
    n = per_user.shape[1]
    resampled = [per_user[:, draw.integers(0, n, n)].mean(axis=1) for _ in range(400)]
    mean, sd = map(np.array, FLOOR[name])
    bootstrap = np.sqrt(2) * np.std(resampled, axis=0, ddof=1)
    splits = np.sqrt(2) * sd
    difference = measured - ONE_SPLIT[name]
    z = difference / np.maximum(bootstrap, splits)
    print(name, measured.round(4), bootstrap.round(4), splits.round(4), z.round(2))
    assert (np.abs(z) < 3).all(), (measured, z)
    assert (np.abs(measured - mean) < 4 * sd).all(), measured


@pytest.mark.parametrize("name", ["food", "kitchen"])
def test_among_popular_negatives_popularity_is_below_chance(corpus, name):
    """The most popular items are among almost everyone's negatives, as there is no replacement."""
    found = np.mean(popularity(corpus, f"{name}_popular"), axis=1)
    ranks = np.arange(1, 102)
    chance = [1 / 101, 10 / 101, (1 / np.log2(ranks[:10] + 1)).sum() / 101, (1 / ranks).mean()]
    print(name, found.round(4), np.round(chance, 4))
    assert (found < chance).all()
    assert found[1] > 0.3 * chance[1]
    task, same = Task.open(corpus, f"{name}_popular"), Task.open(corpus, name)
    assert (task.targets == same.targets).all()


def test_three_services_are_those_of_the_same_reviewers(tmp_path, clue_test_data, monkeypatch):
    """Users and logs of the corpus that joins Beauty, by a plain join of the files."""
    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    corpus = Corpus.open(prepare(CORPUS_FILE.with_name("food_kitchen_beauty.toml"), tmp_path))
    corpus.verify()

    def read(name):
        with gzip.open(clue_test_data / name, "rt", encoding="utf-8") as f:
            return f.read()

    titled = set()
    for name in ("food_kitchen/titles_food", "food_kitchen/titles_kitchen", "beauty/titles"):
        rows = (line.split("\t") for line in read(f"amazon14_{name}.tsv.gz").splitlines())
        titled |= {asin for asin, title in rows if title.strip()}
    logs = Counter()  # of a reviewer in a service
    for folder, services in (
        ("amazon14_food_kitchen/abxi_afk", ("food", "kitchen")),
        ("amazon14_beauty/abxi_abe", ("beauty", "electronics")),
    ):
        items = json.loads(read(f"{folder}/map_item_50.txt.gz"))
        named = {number: (asin, services[s]) for asin, (number, s) in items.items()}
        users = {v: k for k, v in json.loads(read(f"{folder}/map_user_50.txt.gz")).items()}
        for line in read(f"{folder}/{folder[-3:]}_50_preprocessed.txt.gz").splitlines():
            user, *entries = line.split()
            for entry in entries:
                asin, service = named[int(entry.partition("|")[0])]
                if asin in titled:
                    logs[users[int(user)], service] += 1
    names = ("food", "kitchen", "beauty")
    counts = [[logs[u, s] for s in names] for u in {u for u, _ in logs}]
    least = np.array(counts).min(axis=1)
    eligible, able = int((least >= 4).sum()), int((least >= 2).sum())
    assert (eligible, able) == (1_910, 1_990)
    assert corpus.card.services == names
    downstream = round(0.4 * eligible)
    assert corpus.card.n_users == able - downstream
    for name in names:
        assert Task.open(corpus, name).n_users == downstream
    pretrained = sum(int(corpus.users(s)[0][corpus.card.n_users]) for s in names)
    held = sum(int(corpus.users(s)[0][-1]) for s in names) - pretrained
    assert 0 < held < pretrained < sum(logs.values())
