"""The whole preparation against a second one: dictionaries, sorted lists and loops."""

import csv
import hashlib
import html
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from scaling.data import tokenizer
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.tasks import Task

DAY = 86_400
TITLES = [
    "Red &amp; Blue",
    " red   tea",
    "Green\ttea &quot;bio&quot;",
    "",
    "  ",
    "Tè ☃",
    "<pad>",
    "a",
]
log = st.tuples(
    st.integers(0, 7),  # user
    st.sampled_from("abc"),  # service; c is of tasks only
    st.integers(0, 9),  # item
    st.sampled_from(TITLES),
    st.integers(0, 4 * DAY),  # time
    st.sampled_from([1.0, 4.0, 5.0, None]),
)


def corpus_file(
    folder, *, min_rating, deduplicate, max_logs, downstream, items, k_core, min_per_month
):
    item = 'item = "item"' if items else ""
    further = (f"k_core = {k_core}\n" if k_core else "") + (
        f"min_per_month = {min_per_month}\n" if min_per_month else ""
    )
    rating = f"min_rating = {min_rating}" if min_rating else ""
    path = folder / "c.toml"
    path.write_text(
        f"""
name = "c"
services = ["a", "b"]
downstream_services = ["c"]
[source]
kind = "tables"
[[source.tables]]
files = ["logs.csv"]
[source.tables.columns]
user = "user"
service = "service"
text = "text"
time = "time"
rating = "rating"
{item}
[logs]
clean_text = true
drop_untitled = true
deduplicate = "{deduplicate}"
{rating}
{further}
[users]
salt = "s"
max_logs = {max_logs}
eligible_logs = 2
downstream = {downstream}
validation = 1
pool = 2
[tokenizer]
vocab_size = 300
[tasks.c]
service = "c"
users = "all"
targets = 1
negatives = 2
"""
        + ('[tasks.a]\nservice = "a"\ntargets = 1\nnegatives = 2\n' if downstream else "")
    )
    return path


def hashed(purpose, user):
    return int(hashlib.sha256(f"s/{purpose}/{user}".encode()).hexdigest()[:16], 16)


def oracle(rows, *, min_rating, deduplicate, max_logs, downstream, items, k_core, min_per_month):
    logs, titles = [], defaultdict(Counter)
    for position, (user, service, item, text, time, rating) in enumerate(rows):
        text = " ".join(html.unescape(html.unescape(text)).split())
        item = str(item) if items else text
        if text:
            titles[service, item][text] += 1
        logs.append((f"u{user}", service, item, time, position, rating))
    logs = [e for e in logs if e[1:3] in titles]  # of its item's text, if not of its own
    if min_rating is not None:
        logs = [e for e in logs if e[5] is not None and e[5] >= min_rating]
    if deduplicate == "latest":
        best = {}
        for entry in sorted(logs, key=lambda e: e[3:5]):
            best[entry[:3]] = entry
        logs = list(best.values())
    if min_per_month and logs:
        times = [e[3] for e in logs]
        months = (max(times) - min(times)) / (365.25 / 12 * DAY)
        counts = Counter(e[0] for e in logs)
        logs = [e for e in logs if counts[e[0]] >= min_per_month * months]
    while k_core:
        users, things = Counter(e[0] for e in logs), Counter(e[1:3] for e in logs)
        kept = [e for e in logs if users[e[0]] >= k_core and things[e[1:3]] >= k_core]
        if len(kept) == len(logs):
            break
        logs = kept
    left = {e[1:3] for e in logs}
    titles = {k: titles[k] for k in left}
    names = {s: [k for k in sorted(titles) if k[0] == s] for s in "abc"}
    if not all(names.values()):
        raise ValueError("a service is empty")
    numbered = sorted(titles)
    number = {k: i for i, k in enumerate(numbered)}
    text_of = [min(titles[k].items(), key=lambda t: (-t[1], t[0]))[0] for k in numbered]
    history = defaultdict(list)
    for user, service, item, time, position, _ in sorted(
        logs, key=lambda e: (e[3], e[4], number[e[1], e[2]])
    ):
        history[user, service].append((time, position, number[service, item]))
    users = sorted({e[0] for e in logs}, key=lambda u: hashed("split", u))
    fewest = {u: min(len(history[u, s]) for s in "ab") for u in users}
    eligible = [u for u in users if fewest[u] >= 2]
    n = round(downstream * len(eligible))
    down = eligible[len(eligible) - n :]
    candidates = [u for u in users if fewest[u] >= 1 and u not in down]
    candidates.sort(key=lambda u: hashed("order", u))
    if len(candidates) < 4:
        raise ValueError("too few users")
    splits = {
        "pretraining": candidates[:-3],
        "validation": candidates[-3:-2],
        "pool": candidates[-2:],
    }
    splits = {k: sorted(v, key=lambda u: hashed("order", u)) for k, v in splits.items()}
    return (
        numbered,
        text_of,
        history,
        splits,
        down,
        {s: [number[k] for k in names[s]] for s in "abc"},
    )


def rows_of(offsets, items):
    return [items[offsets[i] : offsets[i + 1]].tolist() for i in range(len(offsets) - 1)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    rows=st.lists(log, min_size=80, max_size=140),
    min_rating=st.sampled_from([None, 4.0]),
    deduplicate=st.sampled_from(["latest", "none"]),
    max_logs=st.sampled_from([2, 512]),
    downstream=st.sampled_from([0.0, 0.4]),
    items=st.booleans(),
    k_core=st.sampled_from([None, 2, 4]),
    min_per_month=st.sampled_from([None, 90.0]),
)
@pytest.mark.slow
def test_equals_the_plain_program(tmp_path_factory, rows, **choices):
    folder = tmp_path_factory.mktemp("oracle")
    with open(folder / "logs.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["user", "service", "item", "text", "time", "rating"])
        out.writerows([f"u{u}", s, i, t, w, "" if r is None else r] for u, s, i, t, w, r in rows)
    path = corpus_file(folder, **choices)
    try:
        numbered, text_of, history, splits, down, by_service = oracle(rows, **choices)
    except ValueError:
        with pytest.raises(CorpusError):
            prepare(path, folder)
        assert not list((folder / "corpora").iterdir())
        return
    tasks = {"c": None, "a": down} if choices["downstream"] else {"c": None}
    if any(impossible(s, users, history, by_service) for s, users in tasks.items()):
        event("an impossible task")
        with pytest.raises(CorpusError, match=r"task '[ac]'"):
            prepare(path, folder)
        assert not list((folder / "corpora").iterdir())
        return
    made = prepare(path, folder)
    event("a corpus")
    corpus = Corpus.open(made)
    corpus.verify()
    everyone = [*splits["pretraining"], *splits["validation"], *splits["pool"]]
    assert corpus.keys.tolist() == [hashed("order", u) for u in everyone]
    for name, users in splits.items():
        assert corpus.keys[corpus.split(name)].tolist() == [hashed("order", u) for u in users]
    assert [corpus.services[s] for s in corpus.item_service] == [k[0] for k in numbered]
    bpe = tokenizer.load(corpus.path / "tokenizer.json")
    for item, (first, *rest) in enumerate(rows_of(corpus.token_offsets, corpus.tokens)):
        assert first == 1 + "abc".index(numbered[item][0])
        assert len(rest) < 32
        text = bpe.decode(rest, skip_special_tokens=False).lstrip(" ")
        assert text == text_of[item] or (len(rest) == 31 and text_of[item].startswith(text[:-1]))
    for service in "ab":
        expected = [
            [i for _, _, i in history[u, service]][-choices["max_logs"] :] for u in everyone
        ]
        assert rows_of(*corpus.users(service)) == expected
        counts = Counter(min(len(r), 512) for r in expected[: len(splits["pretraining"])])
        share = [counts[i] / len(splits["pretraining"]) for i in range(513)]
        assert corpus.card.items_per_user[service] == pytest.approx(share)
    check_task(Task.open(corpus, "c"), "c", None, history, by_service, choices)
    if choices["downstream"]:
        check_task(Task.open(corpus, "a"), "a", down, history, by_service, choices)


def able(service, users, history):
    """Users with a target and a log before it."""
    found = {u for (u, s), logs in history.items() if s == service and len(logs) >= 2}
    return found if users is None else found & set(users)


def impossible(service, users, history, by_service):
    """Whether nobody can be in the task, somebody touched all but one of the items, or nobody has
    a log before the target."""
    there = able(service, users, history)
    touched = [{i for _, _, i in history[u, service]} for u in there]
    logs = {u: [t for s in {service, *"ab"} for t, _, _ in history[u, s]] for u in there}
    before = any(min(times) < history[u, service][-1][0] for u, times in logs.items())
    return not before or max(map(len, touched)) > len(by_service[service]) - 2


def check_task(task, service, users, history, by_service, choices):
    users = sorted(able(service, users, history), key=lambda u: hashed("order", u))
    assert task.keys.tolist() == [hashed("order", u) for u in users]
    assert task.candidates.tolist() == by_service[service]
    times = [t for u in users for s in task.services for t, _, _ in history[u, s]]
    days = all(t % DAY == 0 for t in times)
    assert task.cut == ("day" if days else "time")
    for row, user in enumerate(users):
        own = history[user, service]
        target = own[-1]
        assert task.targets[row].tolist() == [target[2]]
        assert int(task.group[row]) == hashed("order", user) % 10
        for s in task.services:
            before = [i for t, _, i in history[user, s] if t < target[0]]
            offsets, items = task.history(s)
            assert items[offsets[row] : offsets[row + 1]].tolist() == before[-choices["max_logs"] :]
        drawn = task.negatives[row, 0].tolist()
        assert len(set(drawn)) == 2
        assert set(drawn) <= set(by_service[service]) - {i for _, _, i in own}


def test_a_fair_prefix():
    """The order of users does not depend on which split they fall into."""
    order = np.array([hashed("order", f"u{i}") for i in range(2_000)], dtype=np.float64)
    split = np.array([hashed("split", f"u{i}") for i in range(2_000)], dtype=np.float64)
    assert abs(np.corrcoef(order, split)[0, 1]) < 0.08
