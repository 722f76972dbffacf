import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.data.corpus import Corpus, CorpusError
from scaling.data.negatives import draw_negatives
from scaling.data.prepare import prepare
from scaling.data.task_config import TaskConfig
from scaling.data.task_forms import DAY, TaskLogs, choose, cut_of
from scaling.data.tasks import Task, user_blocks


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


def test_history_ends_before_the_first_target():
    def histories(times, timed=True, services=None, **keys):
        n, zeros = len(times), np.zeros(len(times), np.int64)
        services, times = np.array(services) if services else zeros, np.array(times)
        config = task_config(targets=2, **keys)
        cut = cut_of("t", config, timed, lambda: not (times % DAY).any())
        logs = TaskLogs(zeros, services, np.arange(n), times, np.arange(n))
        kept = [0] if cut == "order" else [0, 1]
        chosen = choose("t", config, cut, logs, np.ones(1, np.uint64), 0, kept, 64)
        assert chosen.targets.tolist() == [[n - 2, n - 1]]
        return cut, {s: rows.tolist() for s, (_, rows) in chosen.history.items()}

    # The basket of the target's day is left out.
    whole_days = [0, DAY, 2 * DAY, 2 * DAY, 2 * DAY]
    assert histories(whole_days, services=[0, 1, 1, 0, 0]) == ("day", {0: [0], 1: [1]})
    assert histories([0, 5, 9, 9, 10]) == ("time", {0: [0, 1], 1: []})  # 9 is not before 9
    assert histories([0, 5, 9, 9, 10], cut="day") == ("day", {0: [], 1: []})
    # Positions of another service may lie before those of this one, whatever came first.
    assert histories([0] * 5, timed=False, services=[0, 0, 1, 0, 0]) == ("order", {0: [0, 1]})
    with pytest.raises(CorpusError, match="task 't' cannot be cut by 'time': the logs have no"):
        histories([0] * 5, timed=False, cut="time")


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


def stored_history(corpus, task, service, target=0):
    offsets, items = task.history(service, target)
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
        path.read_text()
        .replace("[users]", '[logs]\ndeduplicate = "latest"\n[users]')
        .replace("[tasks.beauty]", '[tasks.order]\nservice = "books"\n'
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


def test_stored_task(corpus):
    task = Task.open(corpus, "books")
    assert task.services == ("books", "garden")
    assert task.targets.shape == (task.n_users, 2)
    assert task.negatives.shape == (task.n_users, 2, 5)
    assert set(task.group.tolist()) <= set(range(10))
    assert not set(task.keys.tolist()) & set(corpus.keys.tolist())
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


FORMS = """
[tasks.every]
service = "books"
targets = 2
negatives = 5
segments = true
[tasks.loo]
form = "leave_one_out"
service = "beauty"
negatives = 5
[tasks.foreign]
service = "books"
users = "all"
encoders = "foreign"
negatives = 0
[tasks.first]
form = "first"
service = "beauty"
negatives = 5
"""


@pytest.fixture
def many(tiny_corpus):
    """The tiny corpus with tasks of more forms, in which no user has an item twice."""
    root = tiny_corpus()
    path = root / "tiny.toml"
    text = path.read_text().replace("[tasks.books]", FORMS + "[tasks.books]")
    path.write_text(text.replace("[users]", '[logs]\ndeduplicate = "latest"\n[users]'))
    return Corpus.open(prepare(path, root))


def test_what_a_task_of_each_form_stores(many):
    many.verify()
    every = Task.open(many, "every")
    assert np.bincount(every.segment, minlength=4).sum() == every.n_users
    loo = Task.open(many, "loo")
    assert (loo.form, loo.targets.shape[1], loo.services) == ("leave_one_out", 2, ("beauty",))
    before, after = (stored_history(many, loo, "beauty", t) for t in (0, 1))
    for one, other in zip(before, after, strict=True):
        assert one == other[: len(one)]
    # Times are in seconds and no two alike, so the test's history ends with what validates.
    first = many.service_items("beauty")[0]
    assert [h[-1] for h in after] == (loo.targets[:, 0] - first).tolist()
    assert sum(map(len, after)) == sum(map(len, before)) + loo.n_users
    foreign = Task.open(many, "foreign")
    assert foreign.foreign
    assert np.isin(foreign.keys, many.keys[many.split("pretraining")]).any()
    assert foreign.negatives.shape == (foreign.n_users, 3, 0)
    assert not (foreign.path / "negatives.npy").exists()
    booking = Task.open(many, "first")
    assert booking.services == ("beauty", "books", "garden")
    assert not len(booking.history("beauty")[1])
    assert all(map(len, stored_history(many, booking, "books"))) or len(
        booking.history("garden")[1]
    )


def of_user(task, service, user):
    offsets, items = task.history(service)
    return items[int(offsets[user]) : int(offsets[user + 1])]


def swap(array, i=0, j=1):
    array[[i, j]] = array[[j, i]]


def set_at(array, place, value):
    array[place] = value


def put(task, service, user, item):
    """Let the history of a user, in one service, begin with an item."""
    offsets, items = (np.array(a, np.int64) for a in task._history[service])
    items[int(offsets[user])] = item
    task._history[service] = offsets, items


@given(st.lists(st.integers(0, 20), max_size=30))
def test_blocks_hold_whole_users_and_no_more_entries_than_a_part(entries):
    found = list(user_blocks(np.array(entries, np.int64), 12))
    assert [u for b in found for u in range(b.start, b.stop)] == list(range(len(entries)))
    for block, after in itertools.zip_longest(found, found[1:]):
        held = sum(entries[block])
        assert held <= 12 or block.stop - block.start == 1
        assert after is None or held + entries[after.start] > 12


LEAKS = [
    ("every", "1 of its users are users of pretraining",
     lambda t, c: set_at(t.keys, 0, c.keys[0]) or set_at(t.group, 0, c.keys[0] % 10)),
    ("every", "a negative is an item the user touched",
     lambda t, c: set_at(t.negatives, (0, 0, 0), next(
         i for i in t.targets[0] if i not in t.negatives[0, 0]))),
    ("every", "a negative is an item the user touched",
     lambda t, c: set_at(t.negatives, (1, 1, 4), of_user(t, "books", 1)[0])),
    ("every", "a negative is drawn twice", lambda t, c: set_at(
        t.negatives, (0, 0, 0), t.negatives[0, 0, 1])),
    ("every", "a target is no item of 'books'",
     lambda t, c: set_at(t.targets, (0, 0), c.service_items("garden")[0])),
    ("every", "a negative is no item of 'books'",
     lambda t, c: set_at(t.negatives, (0, 0, 0), c.service_items("garden")[0])),
    ("every", "its candidates are not the items of 'books'",
     lambda t, c: setattr(t, "candidates", t.candidates[1:])),
    ("every", "do not lie in the order of their keys", lambda t, c: swap(t.keys) or swap(t.group)),
    ("every", "a user is in another group", lambda t, c: set_at(
        t.group, 3, (t.group[3] + 1) % 10)),
    ("every", "negatives has the shape", lambda t, c: setattr(t, "negatives", t.negatives[1:])),
    ("every", "segment has the shape", lambda t, c: setattr(t, "segment", t.segment[1:])),
    ("every", "its segments have", lambda t, c: set_at(t.segment, slice(None), 1)),
    ("every", "its segments have", lambda t, c: set_at(t.segment, 0, 9)),
    ("every", "an item is twice among a user's targets",
     lambda t, c: set_at(t.targets, (0, 1), t.targets[0, 0])),
    ("every", r"a history before target 1 has the item of a target after it",
     lambda t, c: put(t, "books", 0, t.targets[0, 1])),
    ("every", "a history of 'garden' has an item of another service",
     lambda t, c: put(t, "garden", 0, t.targets[0, 1])),
    ("every", "a history of 'garden' has an item that the corpus lacks",
     lambda t, c: put(t, "garden", 0, c.n_items)),
    ("every", "the offsets of its histories of 'books' are not those of",
     lambda t, c: t._history.update(books=(t._history["books"][0], t._history["books"][1][1:]))),
    ("every", "a history of 'books' has a negative length",
     lambda t, c: t._history.update(
         books=(set_and(t._history["books"][0], 1, 10**4), t._history["books"][1]))),
    ("loo", "a history before target 1 has the item of a target after it",
     lambda t, c: t._ends.update(beauty=t._ends["beauty"] + np.array([1, 0], np.uint8))),
    ("loo", "a history before target 2 has the item of a target after it",
     lambda t, c: put(t, "beauty", 0, t.targets[0, 1])),
    ("loo", "do not end at one target after the other",
     lambda t, c: t._ends.update(beauty=t._ends["beauty"][:, ::-1])),
    ("loo", "beauty: ends has the shape",
     lambda t, c: t._ends.update(beauty=t._ends["beauty"][1:])),
    ("foreign", "of its users have their logs of 'books' in pretraining",
     lambda t, c: setattr(t, "foreign", False)),
    ("first", "1 of its users are users of pretraining",
     lambda t, c: set_at(t.keys, 0, c.keys[0]) or set_at(t.group, 0, c.keys[0] % 10)),
]  # fmt: skip


def set_and(array, place, value):
    changed = array.astype(np.int64)
    changed[place] = value
    return changed


@pytest.mark.parametrize(("name", "message", "spoil"), LEAKS)
def test_leaks_fail_loudly(many, monkeypatch, name, message, spoil):
    task = Task.open(many, name)
    for array in ("keys", "group", "targets", "negatives", "segment"):
        if getattr(task, array) is not None:
            dtype = np.uint64 if array == "keys" else np.int64  # any value can be put there
            setattr(task, array, np.array(getattr(task, array), dtype))
    task.check(many)
    spoil(task, many)
    for together in (1 << 20, 1):
        monkeypatch.setattr("scaling.data.tasks.PART", together)
        with pytest.raises(CorpusError, match=f"{task.path}: .*{message}"):
            task.check(many)


def test_a_leak_of_the_last_user_is_found(many, monkeypatch):
    monkeypatch.setattr("scaling.data.tasks.PART", 1)
    task = Task.open(many, "every")
    last = task.n_users - 1
    task.negatives = np.array(task.negatives)
    task.negatives[last, 1, 0] = of_user(task, "books", last)[-1]
    with pytest.raises(CorpusError, match="a negative is an item the user touched"):
        task.check(many)


def test_a_leak_on_disk_is_found_when_opened_and_when_verified(many):
    path = many.path / "tasks/loo/history/beauty/items.npy"
    task = Task.open(many, "loo")
    wrong = np.array(task.history("beauty", 1)[1])
    wrong[0] = task.targets[0, 1]
    np.save(path, wrong)
    with pytest.raises(CorpusError, match="a history before target 2 has the item of a target"):
        Task.open(many, "loo")
    with pytest.raises(CorpusError, match="tasks/loo"):
        many.verify()


def test_another_version_is_refused(corpus):
    path = corpus.path / "tasks/books/task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 9}))
    with pytest.raises(CorpusError, match="schema_version = 9"):
        Task.open(corpus, "books")
