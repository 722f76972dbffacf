"""Every form of a task against a plain program: dictionaries, sorted lists and loops."""

import csv
import hashlib
import itertools
import random
import tomllib
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.engine import DuckDB
from scaling.data.negatives import draw_negatives
from scaling.data.permutation import key_of, permute
from scaling.data.prepare import prepare
from scaling.data.task_build import write_task
from scaling.data.task_config import TaskConfig
from scaling.data.task_forms import (
    DAY,
    SEGMENTS,
    TaskLogs,
    choose,
    refuse_leaks,
    segment,
)
from scaling.data.tasks import Task
from scaling.files import read_json

FORMS = ("last", "random", "first", "leave_one_out")
MONTH = 2_629_800  # a twelfth of 365.25 days


class Entry(NamedTuple):
    service: int
    item: int
    time: int
    position: int


def task_config(**keys: Any) -> TaskConfig:
    return TaskConfig.parse({"service": "a", **keys}, "test")


# --- the plain program -----------------------------------------------------------------------


def clock_of(cut: str, entry: Entry) -> int:
    return {"order": entry.position, "time": entry.time, "day": entry.time // DAY}[cut]


def set_aside(name: str, key: int, n_items: int, count: int) -> list[int]:
    places = permute(np.arange(count), n_items, np.uint64(key ^ key_of("set aside", name)))
    return [int(p) for p in places]


def plain(
    form: str, log: list[Entry], service: int, n_targets: int, cut: str, cap: int, drawn: list[int]
) -> tuple[list[int], list[dict[int, list[int]]]]:
    """Targets of one user in a service, and per target the history in every service."""
    if cut == "order":
        log = sorted((e for e in log if e.service == service), key=lambda e: (e.position, e.item))
    else:
        log = sorted(log, key=lambda e: (e.time, e.position, e.item))
    own = [e for e in log if e.service == service]
    if form == "random":
        items = sorted({e.item for e in own})
        targets = [items[i] for i in drawn]
        seen = [[e for e in log if e.service != service or e.item not in targets]] * n_targets
    else:
        chosen = own[:1] if form == "first" else own[-n_targets:]
        targets = [e.item for e in chosen]
        ends = chosen if form == "leave_one_out" else chosen[:1] * n_targets
        seen = [[e for e in log if clock_of(cut, e) < clock_of(cut, end)] for end in ends]
    latest = {s: [e for e in seen[-1] if e.service == s][-cap:] for s in {e.service for e in log}}
    return targets, [
        {s: [e.item for e in whole if e in before] for s, whole in latest.items()}
        for before in seen
    ]


def plain_tickets(
    weights: list[int], touched: set[int], key: int, target: int, count: int
) -> list[int]:
    """A ticket for each log of what is left, one of them drawn, and again without what it drew."""
    drawn: list[int] = []
    for i in range(count):
        gone = touched | set(drawn)
        tickets = [p for p, w in enumerate(weights) for _ in range(w) if p not in gone]
        stream = (key + (target * count + i) * 0xD1342543DE82EF95) % 2**64
        drawn.append(tickets[int(permute(0, len(tickets), np.uint64(stream)))])
    return drawn


def plain_segments(before: list[int], recent: list[int], keys: list[int]) -> list[str]:
    found = ["regular" if r else "new" for r in recent]
    others = sorted((before[u], keys[u], u) for u in range(len(keys)) if recent[u])
    tenth = len(others) // 10
    for rank, (_, _, u) in enumerate(others):
        if rank < tenth:
            found[u] = "cold"
        if rank >= len(others) - tenth:
            found[u] = "heavy"
    return found


# --- the choice of rows ----------------------------------------------------------------------

entries = st.lists(
    st.tuples(st.sampled_from([0, 0, 1]), st.integers(0, 5), st.integers(0, 6)),
    min_size=5,
    max_size=14,
)


def table(users: list[list[Entry]], cut: str) -> TaskLogs:
    """Logs in the order that a task asks for; items of service 1 are 100, 101, ..."""

    def place(row: tuple[int, Entry]) -> tuple[int, ...]:
        user, e = row
        clock = () if cut == "order" else (e.time,)
        return (user, *clock, e.position, e.item)

    rows = sorted(((u, e) for u, log in enumerate(users) for e in log), key=place)
    columns = np.array([(u, *e) for u, e in rows], np.int64).reshape(-1, 5).T
    return TaskLogs(*columns)


@settings(max_examples=300)
@given(
    users=st.lists(entries, min_size=1, max_size=3),
    form=st.sampled_from(FORMS),
    cut=st.sampled_from(["time", "day", "order"]),
    n_targets=st.integers(1, 3),
    cap=st.sampled_from([2, 64]),
    unit=st.sampled_from([1, DAY // 2, DAY]),
)
def test_targets_and_histories_are_those_of_the_plain_program(
    users: list[Any], form: str, cut: str, n_targets: int, cap: int, unit: int
) -> None:
    assume(not (form == "first" and cut == "order"))
    logs = [
        [Entry(s, i + 100 * s, t * unit, p) for p, (s, i, t) in enumerate(log)] for log in users
    ]
    n_targets = {"first": 1, "leave_one_out": 2}.get(form, n_targets)
    timed = form != "random"
    if not timed:
        cut, logs = "time", [[e._replace(time=0) for e in log] for log in logs]
    keys = np.arange(7, 7 + len(users), dtype=np.uint64)
    given_logs = table(logs, cut)
    services = [0] if cut == "order" else [0, 1]
    cut = "none" if form == "random" else cut
    config = task_config(form=form, targets=n_targets, history="all")
    sizes = [
        len({e.item for e in log if e.service == 0})
        if form == "random"
        else sum(e.service == 0 for e in log)
        for log in logs
    ]
    if min(sizes) < n_targets:
        with pytest.raises(CorpusError, match=f"a user has fewer than {n_targets}"):
            choose("t", config, cut, given_logs, keys, 0, services, cap)
        return
    chosen = choose("t", config, cut, given_logs, keys, 0, services, cap)
    refuse_leaks("t", cut, given_logs, chosen)
    assert list(chosen.history) == services
    for u, log in enumerate(logs):
        drawn = set_aside("t", int(keys[u]), sizes[u], n_targets) if form == "random" else []
        targets, histories = plain(form, log, 0, n_targets, cut, cap, drawn)
        assert given_logs.item[chosen.targets[u]].tolist() == targets
        for s, (lengths, rows) in chosen.history.items():
            start = int(lengths[:u].sum())
            stored = given_logs.item[rows[start : start + lengths[u]]].tolist()
            for t in range(n_targets):
                end = chosen.ends[s][u, t] if chosen.ends else lengths[u]
                assert stored[:end] == histories[t].get(s, [])
    event(f"{form} {cut}")


def test_items_are_set_aside_alike() -> None:
    """Each of a user's five items in 2/5 of the cases, however many logs it has."""
    n, items = 3_000, [0, 1, 1, 1, 2, 3, 4]
    log = [Entry(0, item, 0, p) for p, item in enumerate(items)]
    logs = table([log] * n, "time")
    keys = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    config = task_config(form="random", targets=2)
    chosen = choose("t", config, "none", logs, keys, 0, [0], 64)
    counts = np.bincount(logs.item[chosen.targets].ravel(), minlength=5)
    assert counts.sum() == 2 * n
    assert (np.abs(counts - n * 2 / 5) < 5 * np.sqrt(n * 2 / 5 * 3 / 5)).all(), counts
    assert (chosen.history[0][0] == [7 - sum(items.count(i) for i in row) for row in
                                     logs.item[chosen.targets].tolist()]).all()  # fmt: skip


def chosen_rows(form: str) -> tuple[str, TaskLogs, Any]:
    """Two users with six logs a service, one of every service an hour."""
    cut = "none" if form == "random" else "time"
    config = task_config(form=form, history="all")
    logs = [[Entry(s, 10 * s + p, 3600 * p, p) for p in range(6) for s in (1, 0)]] * 2
    if form == "first":  # the first log of service 0 is the fourth hour's
        logs = [[e for e in log if e.service or e.time >= 3 * 3600] for log in logs]
    made, keys = table(logs, "time"), np.arange(2, dtype=np.uint64)
    return cut, made, choose("t", config, cut, made, keys, 0, [0, 1], 64)


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        *itertools.product(FORMS, ["target", "user", "service", "whose"]),
        *((form, "simultaneous") for form in ("last", "first", "leave_one_out")),
        ("leave_one_out", "early"),
    ],
)
def test_a_leak_is_refused_before_it_is_stored(form: str, fault: str) -> None:
    cut, logs, chosen = chosen_rows(form)
    refuse_leaks("t", cut, logs, chosen)
    last = chosen.targets.shape[1] - 1
    lengths, rows = (a.copy() for a in chosen.history[1])
    history, ends = dict(chosen.history), dict(chosen.ends)
    message = rf"a history has logs at or after target {last + 1 if ends else 1}"
    if fault == "target":
        own_lengths, own = (a.copy() for a in history[0])
        own = np.insert(own, own_lengths[0], chosen.targets[0, last])
        own_lengths[0] += 1
        history[0] = own_lengths, own
        if ends:
            ends[0] = ends[0] + [[0, 1], [0, 0]]
        if form == "random":
            message = "a history has the item of target"
    elif fault == "user":
        rows[0] = np.flatnonzero((logs.user == 1) & (logs.service == 1))[0]
        history[1] = lengths, rows
        message = "a history has a log of another user or service"
    elif fault == "service":
        rows[0] = np.flatnonzero((logs.user == 0) & (logs.service == 0))[0]
        history[1] = lengths, rows
        message = "a history has a log of another user or service"
    elif fault == "simultaneous":
        same = logs.time == logs.time[chosen.targets[0, last if ends else 0]]
        rows[lengths[0] - 1] = np.flatnonzero(same & (logs.user == 0) & (logs.service == 1))[0]
        history[1] = lengths, rows
    elif fault == "early":
        ends[0] = ends[0] + [[1, 0], [0, 0]]  # the target that validates is trained on
        message = "a history has logs at or after target 1"
    else:
        chosen = replace(chosen, targets=chosen.targets[::-1])
        message = "a target is a log of another user"
    with pytest.raises(CorpusError, match=f"task 't' leaks: .*{message}"):
        refuse_leaks("t", cut, logs, replace(chosen, history=history, ends=ends))


# --- segments --------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=45), st.randoms())
def test_segments_are_those_of_the_plain_program(counts: list[Any], draw: Any) -> None:
    before, recent = [a + b for a, b in counts], [b for _, b in counts]
    keys = draw.sample(range(10**6), len(counts))
    found = segment(np.array(before), np.array(recent), np.array(keys, np.uint64))
    assert [SEGMENTS[s] for s in found] == plain_segments(before, recent, keys)


def test_a_tenth_is_cold_and_a_tenth_is_heavy_whatever_ties() -> None:
    keys = np.arange(100, dtype=np.uint64)[::-1]
    recent = np.r_[np.zeros(19, int), np.ones(81, int)]
    found = segment(np.r_[np.zeros(19, int), np.full(81, 5)], recent, keys)
    assert np.bincount(found).tolist() == [19, 8, 65, 8]
    assert (found[-8:] == SEGMENTS.index("cold")).all()  # of equals, those of the lowest keys


# --- negatives by popularity -----------------------------------------------------------------


@given(
    weights=st.lists(st.integers(0, 9), min_size=4, max_size=12),
    touched=st.lists(st.sets(st.integers(0, 11), max_size=4), min_size=1, max_size=4),
    count=st.integers(1, 4),
)
def test_popular_negatives_are_those_of_the_plain_program(
    weights: list[int], touched: list[set[int]], count: int
) -> None:
    touched = [{i for i in items if i < len(weights)} for items in touched]
    candidates = np.arange(len(weights)) * 2 + 3
    keys = np.arange(len(touched), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    user = np.array([u for u, items in enumerate(touched) for _ in items], np.int64)
    item = np.array([candidates[i] for items in touched for i in sorted(items)], np.int64)
    config = task_config(targets=2, negatives=count, negatives_from="popularity")

    def draw() -> Any:
        return draw_negatives("t", config, user, item, keys, candidates, np.array(weights))

    free = min(sum(w > 0 and i not in s for i, w in enumerate(weights)) for s in touched)
    if free < count:
        with pytest.raises(CorpusError, match=f"all but {free} of the .* that have logs to count"):
            draw()
        return
    drawn, salt = draw(), key_of("negatives", "t", "popularity")
    assert drawn.shape == (len(touched), 2, count)
    for u, items in enumerate(touched):
        for t in range(2):
            expected = plain_tickets(weights, items, int(keys[u]) ^ salt, t, count)
            assert drawn[u, t].tolist() == [int(candidates[i]) for i in expected]


def test_popular_negatives_are_drawn_in_proportion() -> None:
    """Pairs of draws without replacement, against their exact probabilities."""
    n, weights, touched = 20_000, [5, 0, 3, 2, 1, 4], 5
    keys = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    config = task_config(targets=1, negatives=2, negatives_from="popularity")
    drawn = draw_negatives(
        "t", config, np.arange(n), np.full(n, touched), keys, np.arange(6), np.array(weights)
    )
    found = Counter(map(tuple, drawn[:, 0].tolist()))
    free = {i: w for i, w in enumerate(weights) if w and i != touched}
    total = sum(free.values())
    exact = {
        (a, b): Fraction(free[a], total) * Fraction(free[b], total - free[a])
        for a, b in itertools.permutations(free, 2)
    }
    assert sum(exact.values()) == 1
    assert found.keys() == exact.keys()
    chi2 = sum((found[p] - n * float(q)) ** 2 / (n * float(q)) for p, q in exact.items())
    assert chi2 < 11 + 5 * np.sqrt(22), found


def test_the_cost_of_popular_negatives_is_that_of_draws_not_of_logs() -> None:
    """One item of 10^12 logs among a hundred with one: it is drawn first, then the others."""
    weights = np.ones(102, np.int64)
    weights[7] = 10**12
    user, item = np.zeros(1, np.int64), np.full(1, 3)
    config = task_config(targets=1, negatives=101, negatives_from="popularity")
    tracemalloc.start()
    drawn = draw_negatives(
        "t", config, user, item, np.ones(1, np.uint64), np.arange(102), weights
    )  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn[0, 0, 0] == 7
    assert sorted(drawn[0, 0].tolist()) == [i for i in range(102) if i != 3]
    assert peak < 1 << 20


# --- the table of the corpus file ------------------------------------------------------------


def test_defaults_of_the_forms() -> None:
    found = {
        f: (c.users, c.targets, c.history, c.negatives)
        for f, c in ((f, task_config(form=f)) for f in FORMS)
    }
    assert found == {
        "last": ("downstream", 3, "all", 100),
        "random": ("downstream", 1, "service", 100),
        "first": ("downstream", 1, "all", 100),
        "leave_one_out": ("all", 2, "service", 0),
    }
    assert task_config(form="leave_one_out", negatives=99, users="downstream").negatives == 99


def test_a_task_of_the_first_version_keeps_its_record() -> None:
    config = task_config(targets=1)
    assert config.record == {
        "service": "a", "users": "downstream", "targets": 1, "min_history": 1, "negatives": 100,
        "cut": None,
    }  # fmt: skip
    later = task_config(form="leave_one_out", users="all", encoders="foreign", cut="time")
    assert later.record == {
        "form": "leave_one_out", "service": "a", "users": "all", "encoders": "foreign",
        "targets": 2, "min_history": 1, "history": "service", "negatives": 0, "cut": "time",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"form": "latest"}, "form = 'latest': Input should be 'last', 'random', 'first' or"),
        ({"form": ["last"]}, "form = \\['last'\\]"),
        ({"form": "first", "targets": 2}, "targets = 2, but form = 'first' has 1"),
        ({"form": "leave_one_out", "targets": 3}, "targets = 3, but form = 'leave_one_out' has 2"),
        ({"form": "first", "history": "service"}, "predicts the first log of it; valid: 'all'"),
        ({"form": "first", "cut": "order"}, "valid: 'day', 'time'"),
        ({"form": "random", "cut": "time"}, "no cut and no segments"),
        ({"form": "random", "segments": True}, "no cut and no segments"),
        ({"encoders": "foreign"}, "encoders = 'foreign' allows users = 'all'"),
        ({"negatives": 0, "negatives_from": "popularity"}, "but negatives = 0"),
        (
            {"form": "first", "users": "all", "negatives_from": "popularity"},
            "form = 'first' has no history of 'a'",
        ),
        ({"negatives": -1}, "negatives = -1"),
        ({"segments": 1}, "segments = 1"),
        ({"holdout": 2}, "unknown key 'holdout'; valid keys: cut, encoders, form, history"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_config(**keys)


def test_the_tasks_of_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    block = guide.split("\n### Tasks\n")[1].split("\n### ")[0]
    lines = [line.strip() for line in block.splitlines() if line.startswith("    ")]
    tasks = tomllib.loads("\n".join(lines))["tasks"]
    forms = [TaskConfig.parse(table, name).form for name, table in tasks.items()]
    assert sorted(set(forms)) == sorted(FORMS)


# --- the whole program -----------------------------------------------------------------------

TASKS = """
[tasks.bench]
service = "a"
targets = 2
negatives = 2
segments = true
[tasks.days]
service = "a"
targets = 1
negatives = 2
cut = "day"
segments = true
[tasks.own]
service = "a"
targets = 1
negatives = 2
history = "service"
[tasks.popular]
service = "a"
targets = 1
negatives = 2
negatives_from = "popularity"
[tasks.everyone]
service = "c"
users = "all"
targets = 1
negatives = 2
negatives_from = "popularity"
[tasks.first]
form = "first"
service = "c"
negatives = 2
negatives_from = "popularity"
segments = true
[tasks.first_day]
form = "first"
service = "c"
users = "all"
negatives = 2
cut = "day"
[tasks.loo]
form = "leave_one_out"
service = "c"
[tasks.foreign]
form = "leave_one_out"
service = "a"
encoders = "foreign"
negatives = 1
history = "all"
"""
UNTIMED = """
[tasks.aside]
form = "random"
service = "a"
targets = 2
negatives = 2
history = "all"
[tasks.order]
service = "a"
targets = 1
negatives = 2
[tasks.loo]
form = "leave_one_out"
service = "c"
negatives = 1
negatives_from = "popularity"
"""


def hashed(purpose: str, user: str) -> int:
    return int(hashlib.sha256(f"s/{purpose}/{user}".encode()).hexdigest()[:16], 16)


def write_corpus(folder: Path, rows: list[Any], timed: bool, deduplicate: str) -> Path:
    with open(folder / "logs.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["user", "service", "item", "time"])
        out.writerows([f"u{u}", s, f"{s}{i}", t] for u, s, i, t in rows)
    path, time = folder / "c.toml", ', time = "time"' * timed
    path.write_text(
        f"""
name = "c"
services = ["a", "b"]
downstream_services = ["c"]
[source]
kind = "tables"
[[source.tables]]
files = ["logs.csv"]
columns = {{ user = "user", service = "service", text = "item"{time} }}
[logs]
deduplicate = "{deduplicate}"
[users]
salt = "s"
max_logs = 4
downstream = 0.5
validation = 1
pool = 2
[tokenizer]
vocab_size = 300
"""
        + (TASKS if timed else UNTIMED)
    )
    return path


class World(NamedTuple):
    """What the plain program makes of the rows."""

    logs: dict[str, list[Entry]]
    downstream: set[str]
    by_service: list[list[int]]


def world(rows: list[Any], timed: bool, deduplicate: str) -> World:
    names = sorted({(s, f"{s}{i}") for _, s, i, _ in rows})
    number = {name: i for i, name in enumerate(names)}
    kept: dict[Any, Any] = {}
    for position, (user, s, i, time) in enumerate(rows):
        entry = ("abc".index(s), number[s, f"{s}{i}"], time if timed else 0, position)
        key = (user, s, i) if deduplicate == "latest" else position
        if key not in kept or kept[key][1][2:] < entry[2:]:
            kept[key] = (f"u{user}", entry)
    logs = defaultdict(list)
    for user, entry in kept.values():
        logs[user].append(Entry(*entry))
    able = [u for u, log in logs.items() if {0, 1} <= {e.service for e in log}]
    able.sort(key=lambda u: hashed("split", u))
    downstream = set(able[len(able) - round(0.5 * len(able)) :])
    by_service = [[i for name, i in number.items() if name[0] == s] for s in "abc"]
    return World(dict(logs), downstream, by_service)


def random_rows(seed: int, users: int, items: int) -> list[tuple[int, str, int, int]]:
    """Logs of 120 days; a third of them within a few hours of another one's day."""
    draw = random.Random(seed)
    rows = []
    for user in range(users):
        for service, most in (("a", 8), ("b", 4), ("c", 5)):
            for _ in range(draw.randint(0, most)):
                day, hour = draw.randint(0, 120), draw.choice([0, 0, 0, 1, 2])
                rows.append((user, service, draw.randrange(items), day * DAY + hour * 3600))
    draw.shuffle(rows)
    return rows


@settings(
    max_examples=4,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 10**6), users=st.integers(24, 50), items=st.integers(12, 20))
@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("deduplicate", ["latest", "none"])
@pytest.mark.slow
def test_stored_tasks_are_those_of_the_plain_program(
    tmp_path_factory: Any, seed: int, users: int, items: int, timed: bool, deduplicate: str
) -> None:
    folder, rows = tmp_path_factory.mktemp("forms"), random_rows(seed, users, items)
    path = write_corpus(folder, rows, timed, deduplicate)
    expected = world(rows, timed, deduplicate)
    corpus = Corpus.open(prepare(path, folder))
    corpus.verify()
    pretrained = set(corpus.keys[corpus.split("pretraining")].tolist())
    for name in corpus.manifest["tasks"]:
        check_task(Task.open(corpus, name), expected, pretrained, timed)


def check_task(task: Task, world: World, pretrained: set[int], timed: bool) -> None:
    record = read_json(task.path / "task.json")
    form, n_targets = record.get("form", "last"), record["targets"]
    service = "abc".index(task.service)
    history_of = ["abc".index(s) for s in task.services]
    if record.get("history", "all") == "service" or task.cut == "order":
        assert history_of == [service]
    else:
        assert history_of == [service, *(s for s in (0, 1) if s != service)]
    times = [e.time for log in world.logs.values() for e in log]
    if form == "random":
        assert task.cut == "none"
    elif not timed:
        assert task.cut == "order"
    else:
        asked = "day" if task.name in ("days", "first_day") else None
        assert task.cut == (asked or ("time" if any(t % DAY for t in times) else "day"))
    cut = "time" if task.cut == "none" else task.cut
    expected = {}
    for user, whole in world.logs.items():
        if record["users"] == "downstream" and user not in world.downstream:
            continue
        own = [e for e in whole if e.service == service]
        least = record["targets"] + record["min_history"]
        key = hashed("order", user)
        log = [e for e in whole if e.service in history_of]
        drawn: list[int] = []
        if form == "random":
            n = len({e.item for e in own})
            if n < least:
                continue
            drawn = set_aside(task.name, key, n, n_targets)
        elif (form != "first" and len(own) < least) or not own:
            continue
        targets, histories = plain(form, log, service, n_targets, cut, 4, drawn)
        if form == "first" and not any(histories[0].values()):
            continue
        expected[key] = (user, targets, histories, {e.item for e in own})
    assert task.keys.tolist() == sorted(expected)
    for u, key in enumerate(task.keys.tolist()):
        _, targets, histories, touched = expected[key]
        assert task.targets[u].tolist() == targets
        for s in history_of:
            for t in range(n_targets):
                offsets, items = task.history("abc"[s], t)
                found = items[int(offsets[u]) : int(offsets[u + 1])].tolist()
                assert found == histories[t].get(s, []), (task.name, u, s, t)
        for t in range(n_targets):
            row = task.negatives[u, t].tolist()
            assert len(set(row)) == len(row) == record["negatives"]
            assert set(row) <= set(world.by_service[service]) - touched
    if record.get("negatives_from") == "popularity":
        check_popular(task, world, pretrained, expected, service)
    if task.segment is not None:
        before, recent = [], []
        for key in task.keys.tolist():
            user, targets, *_ = expected[key]
            own = sorted(
                (e for e in world.logs[user] if e.service == service),
                key=lambda e: (e.time, e.position, e.item),
            )
            until = own[0 if form == "first" else -n_targets].time
            until = until // DAY * DAY if cut == "day" else until
            earlier = [e.time for e in world.logs[user] if e.time < until]
            before.append(len(earlier))
            recent.append(sum(t >= until - MONTH for t in earlier))
        found_segments = [SEGMENTS[s] for s in task.segment]
        assert found_segments == plain_segments(before, recent, task.keys.tolist())


def check_popular(
    task: Task, world: World, pretrained: set[int], expected: Any, service: int
) -> None:
    counts: Counter[int] = Counter()
    if task.disjoint:
        for user, log in world.logs.items():
            if hashed("order", user) in pretrained:
                counts.update(e.item for e in log if e.service == service)
    else:
        for _, _, histories, _ in expected.values():
            counts.update(histories[0].get(service, []))
    candidates = world.by_service[service]
    weights, salt = [counts[i] for i in candidates], key_of("negatives", task.name, "popularity")
    for u, key in enumerate(task.keys.tolist()):
        places = {candidates.index(i) for i in expected[key][3]}
        for t in range(task.targets.shape[1]):
            drawn = plain_tickets(weights, places, key ^ salt, t, task.negatives.shape[2])
            assert task.negatives[u, t].tolist() == [candidates[i] for i in drawn]


@pytest.mark.slow
@pytest.mark.parametrize("timed", [True, False])
def test_both_engines_make_the_same_tasks(tmp_path: Path, timed: bool, spark: Any) -> None:
    path = write_corpus(tmp_path, random_rows(0, 60, 14), timed, "latest")
    made = {
        engine: Corpus.open(prepare(path, tmp_path / engine, engine=engine))
        for engine in ("duckdb", "spark")
    }
    one, other = (c.manifest["tasks"] for c in made.values())
    assert len(one) == (9 if timed else 3)
    assert one == other


@pytest.mark.parametrize("timed", [True, False])
def test_blocks_of_users_leave_the_bytes_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: bool
) -> None:
    """Of a few logs each, so that most users are cut by the end of a chunk."""
    path = write_corpus(tmp_path, random_rows(0, 60, 14), timed, "none")
    whole = Corpus.open(prepare(path, tmp_path / "whole"))
    monkeypatch.setattr("scaling.data.engine.CHUNK", 5)
    monkeypatch.setattr("scaling.data.tasks.PART", 9)
    monkeypatch.setattr("scaling.data.store.BLOCK", 3)
    cut = Corpus.open(prepare(path, tmp_path / "cut"))
    assert len(whole.manifest["tasks"]) == (9 if timed else 3)
    assert cut.manifest["tasks"] == whole.manifest["tasks"]
    cut.verify()


def test_memory_of_a_task_is_that_of_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 36,000 logs and 100,000 negatives, of which 2,000 are in memory together."""
    draw, hours = random.Random(0), range(36)
    rows = [(u, s, draw.randrange(150), 3600 * t) for u in range(500) for t in hours for s in "ab"]
    rows.append((0, "c", 0, 0))
    path = write_corpus(tmp_path, rows, True, "none")
    head = path.read_text().split("[tasks.")[0].replace("max_logs = 4", "max_logs = 64")
    path.write_text(
        f'{head}[tasks.t]\nservice = "a"\nusers = "all"\nencoders = "foreign"\ntargets = 2\n'
        'cut = "time"\n'
    )
    monkeypatch.setattr("scaling.data.engine.CHUNK", 1 << 11)
    monkeypatch.setattr("scaling.data.tasks.PART", 1 << 11)
    peaks: dict[str, int] = {}

    def measured(what: str, run: Any) -> Any:
        def call(*args: Any) -> Any:
            tracemalloc.start()
            try:
                return run(*args)
            finally:
                peaks[what] = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()

        return call

    monkeypatch.setattr("scaling.data.build.write_task", measured("made", write_task))
    corpus = Corpus.open(prepare(path, tmp_path))
    task = measured("opened", Task.open)(corpus, "t")
    assert task.negatives.shape == (500, 2, 100)
    assert sum(len(task.history(s)[1]) for s in "ab") > 30_000
    assert peaks["made"] < 2 << 20, peaks
    assert peaks["opened"] < 1 << 19, peaks


def test_no_two_tables_of_a_preparation_have_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Spark stored tables and loaded ones are files beside each other."""
    names: list[str] = []

    def noted(method: Any) -> Any:
        def call(self: Any, name: str, *args: Any) -> Any:
            names.append(name)
            return method(self, name, *args)

        return call

    for method in ("store", "load"):
        monkeypatch.setattr(DuckDB, method, noted(getattr(DuckDB, method)))
    prepare(named_like_tables(tmp_path), tmp_path)
    assert "task_users_counted" in names
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_task_named_like_a_table_on_spark(tmp_path: Path, spark: Any) -> None:
    path = named_like_tables(tmp_path)
    made = [
        Corpus.open(prepare(path, tmp_path / engine, engine=engine)).manifest["tasks"]
        for engine in ("duckdb", "spark")
    ]
    assert made[0] == made[1]


def named_like_tables(folder: Path) -> Path:
    path = write_corpus(folder, random_rows(0, 60, 14), True, "latest")
    head = path.read_text().split("[tasks.")[0]
    path.write_text(
        f'{head}[tasks.users]\nservice = "a"\ntargets = 1\nnegatives = 2\nsegments = true\n'
        'negatives_from = "popularity"\n'
    )
    return path


def test_forms_and_logs_that_do_not_go_together(tmp_path: Path) -> None:
    rows = random_rows(0, 60, 14)
    for timed, task, message in (
        (True, 'form = "random"', "form = 'random' is for logs without times"),
        (False, 'form = "first"', "form = 'first' compares times, and there are logs without"),
        (False, "segments = true", "segments = true, but .* logs of its users have no time"),
    ):
        path = write_corpus(tmp_path, rows, timed, "latest")
        head = path.read_text().split("[tasks.")[0]
        path.write_text(f'{head}[tasks.t]\nservice = "a"\nnegatives = 2\ntargets = 1\n{task}\n')
        with pytest.raises(CorpusError, match=message):
            prepare(path, tmp_path)
        assert not list((tmp_path / "corpora").glob("c-*"))


@pytest.mark.parametrize("cut", ["time", "day"])
def test_the_month_of_a_new_user_ends_to_the_second(tmp_path: Path, cut: str) -> None:
    """Users with one log beside that of long ago: a month before what is not before the target any
    more, or a second earlier; at that very time, or on the day of the target."""
    target = 100 * DAY + 3600
    until = target if cut == "time" else 100 * DAY
    rows = [(u, s, 1, 0) for u in range(9) for s in "ab"]
    for user, time in ((10, until - MONTH), (11, until - MONTH - 1), (12, until), (13, until - 1)):
        rows += [(user, "c", 1, 0), (user, "c", 2, target), (user, "b", 2, time)]
    path = write_corpus(tmp_path, [*rows, (0, "c", 3, 1)], True, "none")
    head = path.read_text().split("[tasks.")[0]
    path.write_text(
        f'{head}[tasks.t]\nservice = "c"\nusers = "all"\nnegatives = 1\ntargets = 1\n'
        f'segments = true\ncut = "{cut}"\n'
    )
    task = Task.open(Corpus.open(prepare(path, tmp_path)), "t")
    found = dict(zip(task.keys.tolist(), task.segment.tolist(), strict=True))
    named = {u: SEGMENTS[found[hashed("order", f"u{u}")]] for u in (10, 11, 12, 13)}
    assert named == {10: "regular", 11: "new", 12: "new", 13: "regular"}


@pytest.mark.parametrize("check", ["task_build.refuse_leaks", "tasks.Task.refuse_leaks"])
def test_a_task_is_checked_when_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    def leaks(*args: Any, **keys: Any) -> None:
        raise CorpusError("it leaks")

    monkeypatch.setattr(f"scaling.data.{check}", leaks)
    with pytest.raises(CorpusError, match="it leaks"):
        prepare(write_corpus(tmp_path, random_rows(0, 60, 14), True, "latest"), tmp_path)
    assert not list((tmp_path / "corpora").glob("c-*"))


def test_all_users_of_a_service_of_pretraining(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, random_rows(0, 60, 14), True, "latest")
    path.write_text(path.read_text().replace('encoders = "foreign"\n', ""))
    with pytest.raises(ConfigError, match=r"tasks\.foreign\.users = 'all' would test on logs of"):
        prepare(path, tmp_path)
