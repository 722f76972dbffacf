import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.data.corpus import CorpusError
from scaling.data.prepare import find_prepared
from scaling.data.recipe import TaskConfig
from scaling.data.tasks import DAY, Task, TaskLogs, build_task, draw_negatives, make_history_batch


@pytest.fixture
def corpus(tiny_corpus):
    root = tiny_corpus()
    return find_prepared(root, root / "tiny.toml")


def task_config(**keys):
    return TaskConfig.parse({"service": "a", **keys}, "test")


touched = st.lists(st.sets(st.integers(0, 11), max_size=6), min_size=1, max_size=5)


@given(touched, st.integers(0, 2**64 - 1))
def test_negatives_are_untouched_distinct_and_reproducible(users, salt):
    candidates = np.arange(12) * 3 + 1
    keys = np.arange(len(users), dtype=np.uint64) + np.uint64(salt % 2**60)
    user = np.array([u for u, items in enumerate(users) for _ in items], np.int64)
    item = np.array([candidates[i] for items in users for i in items], np.int64)
    config = task_config(negatives=6, targets=2)
    drawn = draw_negatives("t", config, user, item, keys, candidates)
    assert drawn.shape == (len(users), 2, 6)
    for u, items in enumerate(users):
        free = set(candidates.tolist()) - {int(candidates[i]) for i in items}
        for row in drawn[u].tolist():
            assert len(set(row)) == 6
            assert set(row) <= free
    # A user's negatives do not depend on who else is there.
    last = user == len(users) - 1
    alone = draw_negatives("t", config, user[last] * 0, item[last], keys[-1:], candidates)
    assert (alone[0] == drawn[-1]).all()


def test_negatives_are_uniform():
    n_users, candidates = 4_000, np.arange(20)
    user = np.repeat(np.arange(n_users), 3)
    item = np.tile([2, 3, 17], n_users)
    keys = np.arange(n_users, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    drawn = draw_negatives("t", task_config(negatives=5), user, item, keys, candidates)
    counts = np.bincount(drawn.ravel(), minlength=20)
    assert (counts[[2, 3, 17]] == 0).all()
    free = np.delete(counts, [2, 3, 17])
    expected = n_users * 3 * 5 / 17
    chi2 = ((free - expected) ** 2 / expected).sum()
    assert chi2 < 16 + 5 * np.sqrt(32)


def test_too_few_items_for_the_negatives():
    with pytest.raises(CorpusError, match="touched all but 1 of the 3 items of 'a'"):
        draw_negatives(
            "t",
            task_config(negatives=2),
            np.zeros(2, np.int64),
            np.arange(2),
            np.zeros(1, np.uint64),
            np.arange(3),
        )


def built(times, timed=True, services=None, **keys):
    n = len(times)
    logs = TaskLogs(
        np.zeros(n, np.int64),
        np.array(services or [0] * n),
        np.arange(n),
        np.array(times),
        np.arange(n),
        timed,
    )
    return build_task(
        "t", task_config(targets=2, negatives=1, **keys), logs, np.ones(1, np.uint64), 0, [0, 1],
        np.arange(50), 64,
    )  # fmt: skip


def test_history_ends_before_the_first_target():
    whole_days = [0, DAY, 2 * DAY, 2 * DAY, 2 * DAY]
    by_day = built(whole_days, services=[0, 1, 1, 0, 0])
    assert by_day.cut == "day"
    assert by_day.targets.tolist() == [[3, 4]]
    assert by_day.history[0][1].tolist() == [0]
    assert by_day.history[1][1].tolist() == [1]  # the basket of the target's day is left out
    clock = built([0, 5, 9, 9, 10])
    assert clock.cut == "time"
    assert clock.history[0][1].tolist() == [0, 1, 2][:2]  # 9 is not before 9
    same_day = built([0, 5, 9, 9, 10], cut="day")
    assert same_day.history[0][1].tolist() == []
    order = built([0] * 5, timed=False)
    assert order.cut == "order"
    assert order.history[0][1].tolist() == [0, 1, 2]
    with pytest.raises(CorpusError, match="the logs have no times"):
        built([0] * 5, timed=False, cut="time")


def test_stored_task_and_history_batch(corpus):
    task = Task.open(corpus, "books")
    assert task.services == ("books", "garden")
    assert task.targets.shape == (task.n_users, 2)
    assert task.negatives.shape == (task.n_users, 2, 5)
    assert set(task.group.tolist()) <= set(range(10))
    assert not set(task.keys.tolist()) & set(corpus.keys.tolist())
    users = np.arange(task.n_users)[::-1]
    made = make_history_batch(corpus, task, users, 3, task.services)
    assert (made.n_users, made.n_services) == (task.n_users, 2)
    assert made.batch.n_rows == len(made.rows)
    found = dict.fromkeys(range(2 * task.n_users), ())
    for row, at in enumerate(made.rows.tolist()):
        items = made.batch.items[made.batch.item_offsets[row] : made.batch.item_offsets[row + 1]]
        ends = made.batch.token_offsets
        found[at] = tuple(tuple(made.batch.tokens[ends[i] : ends[i + 1]].tolist()) for i in items)
    for s, service in enumerate(task.services):
        offsets, items = task.history(service)
        for place, u in enumerate(users):
            row = items[offsets[u] : offsets[u + 1]][-3:].astype(int)
            ends = corpus.token_offsets
            expected = tuple(tuple(corpus.tokens[ends[i] : ends[i + 1]].tolist()) for i in row)
            assert found[s * task.n_users + place] == expected
    with pytest.raises(CorpusError, match="no task 'x'; valid: beauty, books"):
        Task.open(corpus, "x")
    with pytest.raises(CorpusError, match="no history of 'beauty'; valid: books, garden"):
        task.history("beauty")


def test_a_service_that_only_tasks_have(corpus):
    task = Task.open(corpus, "beauty")
    assert task.services == ("beauty", "books", "garden")
    assert not task.disjoint
    assert set(corpus.item_service[task.candidates].tolist()) == {2}
    assert set(corpus.tokens[corpus.token_offsets[task.candidates]].tolist()) == {3}


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        ("user", "1 of its users are users of pretraining"),
        ("target", "a negative is an item the user touched"),
        ("twice", "a negative is drawn twice"),
        ("service", "a target is no item of 'books'"),
    ],
)
def test_leaks_fail_loudly(corpus, leak, message):
    task = Task.open(corpus, "books")
    for name in ("keys", "targets", "negatives"):
        setattr(task, name, np.array(getattr(task, name)))
    if leak == "user":
        task.keys[0] = corpus.keys[0]
    elif leak == "target":
        task.negatives[0, 0, 0] = next(
            t for t in task.targets[0] if t not in task.negatives[0, 0].tolist()
        )
    elif leak == "twice":
        task.negatives[0, 0, 0] = task.negatives[0, 0, 1]
    else:
        task.targets[0, 0] = corpus.service_items("garden")[0]
    with pytest.raises(CorpusError, match=message):
        task.check(corpus)


def test_another_version_is_refused(corpus):
    path = corpus.path / "tasks/books/task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 9}))
    with pytest.raises(CorpusError, match="schema_version = 9"):
        Task.open(corpus, "books")
