import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import find_prepared, prepare
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
    order = built([0] * 5, timed=False, services=[0, 0, 1, 0, 0])
    assert order.cut == "order"
    # Positions of another service may lie before those of this one, whatever came first.
    assert {s: items.tolist() for s, (_, items) in order.history.items()} == {0: [0, 1]}
    with pytest.raises(CorpusError, match="the logs have no times"):
        built([0] * 5, timed=False, cut="time")


def services_in_files(folder, *timed):
    """Logs of 30 users: books in one file, garden in another; the services in ``timed`` have times.

    Item i of a service is a user's i-th log of it.
    """
    tables = ""
    for service, n_logs in (("books", 6), ("garden", 4)):
        rows = [f"u{u},{service} {i},{100 + i}" for u in range(30) for i in range(n_logs)]
        rows.append(f"other,{service} spare,0")  # the negative
        (folder / f"{service}.csv").write_text("\n".join(["user,text,time", *rows]) + "\n")
        columns = 'user = "user", text = "text"' + ', time = "time"' * (service in timed)
        tables += f"""
[[source.tables]]
files = ["{service}.csv"]
service = "{service}"
columns = {{ {columns} }}
"""
    toml = folder / "files.toml"
    toml.write_text(
        f"""
name = "files"
services = ["books", "garden"]
[source]
kind = "tables"
{tables}
[users]
downstream = 0.5
validation = 2
pool = 4
[tokenizer]
vocab_size = 300
[tasks.garden]
service = "garden"
targets = 1
negatives = 1
[tasks.books]
service = "books"
targets = 2
negatives = 1
"""
    )
    return toml


def stored_history(corpus, task, service):
    offsets, items = task.history(service)
    return [
        (items[a:b] - corpus.service_items(service)[0]).tolist()
        for a, b in itertools.pairwise(offsets.astype(int))
    ]


def test_without_times_a_task_has_no_history_of_other_services(tmp_path):
    toml = services_in_files(tmp_path)
    corpus = Corpus.open(prepare(toml, tmp_path))
    for service, before in (("books", [0, 1, 2, 3]), ("garden", [0, 1, 2])):
        task = Task.open(corpus, service)
        assert (task.cut, task.services) == ("order", (service,))
        assert stored_history(corpus, task, service) == [before] * task.n_users
        record = json.loads((task.path / "task.json").read_text())
        assert record["services"] == [service]
        assert [p.name for p in (task.path / "history").iterdir()] == [service]
    corpus.verify()


def test_with_times_a_task_has_histories_of_all_services(tmp_path):
    corpus = Corpus.open(prepare(services_in_files(tmp_path, "books", "garden"), tmp_path))
    task = Task.open(corpus, "garden")
    assert (task.cut, task.services) == ("time", ("garden", "books"))
    assert stored_history(corpus, task, "books") == [[0, 1, 2]] * task.n_users


def test_times_in_only_some_services_are_refused_unless_none_is_needed(tmp_path):
    toml = services_in_files(tmp_path, "books")
    with pytest.raises(
        CorpusError,
        match=r"task 'garden': there are logs without times of garden, and with times of books; "
        r".*tasks\.garden\.cut = 'order'",
    ):
        prepare(toml, tmp_path)
    toml.write_text(toml.read_text().replace("targets =", 'cut = "order"\ntargets ='))
    corpus = Corpus.open(prepare(toml, tmp_path))
    for service, before in (("books", [0, 1, 2, 3]), ("garden", [0, 1, 2])):
        task = Task.open(corpus, service)
        assert task.services == (service,)
        assert stored_history(corpus, task, service) == [before] * task.n_users


def test_stored_order_against_times(tiny_corpus):
    root = tiny_corpus()
    path = root / "tiny.toml"
    path.write_text(
        path.read_text().replace("[tasks.beauty]", '[tasks.order]\nservice = "books"\n'
                                 'targets = 2\nnegatives = 5\ncut = "order"\n[tasks.beauty]')
    )  # fmt: skip
    corpus = Corpus.open(prepare(path, root))
    by_order, by_time = Task.open(corpus, "order"), Task.open(corpus, "books")
    assert (by_order.targets != by_time.targets).any()
    offsets, items = by_order.history("books")
    for u, targets in enumerate(by_order.targets.tolist()):
        assert not set(targets) & set(items[offsets[u] : offsets[u + 1]].tolist())
    lengths = np.diff(offsets.astype(int))
    assert lengths.min() >= 1


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
