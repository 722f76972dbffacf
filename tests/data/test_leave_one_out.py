"""Acceptance on real logs: Beauty (Amazon 2014, 5-core), leave-one-out with 99 negatives.

S3-Rec (Zhou et al. 2020) publishes a popularity row for these very logs and this protocol; an
independent program over the file found what was counted for it.
"""

import csv
import gzip

import numpy as np
import pytest

from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare
from scaling.data.tasks import Task

pytestmark = [pytest.mark.data, pytest.mark.slow]
# HR@10, NDCG@10, MRR.
PUBLISHED = [0.3386, 0.1803, 0.1558]
COUNTED = {
    "all": [0.3337, 0.1779, 0.1547],  # all logs, the target that tests among them
    "without": [0.3020, 0.1595, 0.1387],  # all but that
    "train": [0.2858, 0.1485, 0.1293],  # all but the last two
}


@pytest.fixture(scope="module")
def sequences(request):
    path = request.getfixturevalue("clue_test_data") / "amazon14_beauty/s3rec_Beauty.txt.gz"
    with gzip.open(path, "rt") as f:
        return {user: items for user, *items in map(str.split, f)}


@pytest.fixture(scope="module")
def corpus(sequences, tmp_path_factory):
    """The sequences as a service that pretraining has not; it has ten users of our own."""
    root = tmp_path_factory.mktemp("beauty")
    with open(root / "logs.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["user", "service", "text"])
        out.writerows((f"x{u}", "other", f"thing {i}") for u in range(10) for i in range(3))
        out.writerows((u, "beauty", f"item {i}") for u, items in sequences.items() for i in items)
    (root / "beauty.toml").write_text(
        """
name = "beauty"
services = ["other"]
downstream_services = ["beauty"]
[source]
kind = "tables"
[[source.tables]]
files = ["logs.csv"]
columns = { user = "user", service = "service", text = "text" }
[logs]
k_core = 3                # of the 5-core nothing is dropped
[users]
validation = 2
pool = 4
[tokenizer]
vocab_size = 400
[tasks.ranked]            # S3-Rec's
form = "leave_one_out"
service = "beauty"
negatives = 99
[tasks.full]              # LMRec's
form = "leave_one_out"
service = "beauty"
"""
    )
    return Corpus.open(prepare(root / "beauty.toml", root))


def test_every_log_is_where_it_belongs(corpus, sequences):
    task = Task.open(corpus, "full")
    assert (task.cut, task.n_users, len(task.candidates)) == ("order", 22_363, 12_101)
    assert task.negatives.shape == (22_363, 2, 0)
    # Items are numbered by text.
    names = sorted({f"item {i}" for items in sequences.values() for i in items})
    number = {name: int(i) for name, i in zip(names, task.candidates, strict=True)}
    expected = sorted(tuple(number[f"item {i}"] for i in items) for items in sequences.values())
    (starts, train), (ends, test) = (task.history("beauty", t) for t in (0, 1))
    found = []
    for u, (validation, last) in enumerate(task.targets.tolist()):
        trained = train[int(starts[u]) : int(starts[u + 1])].tolist()
        assert test[int(ends[u]) : int(ends[u + 1])].tolist() == [*trained, validation]
        found.append((*trained, validation, last))
    assert sorted(found) == expected


def test_the_published_popularity_row_counts_what_it_predicts(corpus):
    """Each figure within three standard errors, users being the sample: 0.0032 of HR@10. The other
    figures draw other negatives for the same users, so the error of the difference is smaller."""
    task = Task.open(corpus, "ranked")
    n_items = corpus.n_items
    count = {
        "train": np.bincount(task.history("beauty")[1], minlength=n_items),
        "without": np.bincount(task.history("beauty", 1)[1], minlength=n_items),
    }
    count["all"] = count["without"] + np.bincount(task.targets[:, 1], minlength=n_items)
    rank = np.arange(1, 101)
    gains = [rank <= 10, (rank <= 10) / np.log2(rank + 1), 1 / rank]
    for what, counts in count.items():
        positive = counts[task.targets[:, 1]][:, None]
        negative = counts[task.negatives[:, 1]]
        above, tied = (negative > positive).sum(1), (negative == positive).sum(1)
        totals = [np.concatenate([[0.0], np.cumsum(gain)]) for gain in gains]
        exact = [(t[above + tied + 1] - t[above]) / (tied + 1) for t in totals]
        means = np.mean(exact, axis=1)
        error = np.std(exact, axis=1) / np.sqrt(task.n_users)
        print(what, means.round(4), error.round(4))
        assert (np.abs(means - COUNTED[what]) < 3 * error).all(), (what, means)
        published = np.abs(means - PUBLISHED) < 3 * error
        assert published.all() if what == "all" else not published.any()
