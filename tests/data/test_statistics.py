"""Statistics of corpora against plain Python over the same logs."""

import json
import math
import random
import tracemalloc
from collections import Counter
from itertools import chain, combinations, pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau
from typer.testing import CliRunner

from scaling.cli import app
from scaling.data import corpus as store
from scaling.data import statistics, tokenizer, verify
from scaling.data.corpus import Corpus
from scaling.data.domains import VARIANTS, compare, similarity, tau_b
from scaling.data.prepare import find_prepared, prepare
from scaling.data.statistics import describe, popularity, summary, survey
from scaling.data.tasks import Task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_blocks(monkeypatch):
    """Every loop over blocks takes many turns, and one that is not whole."""
    monkeypatch.setattr(store.blocks, "__defaults__", (7,))
    monkeypatch.setattr(statistics, "BLOCK", 32 * 7)


# ---- the same in plain Python -------------------------------------------------------------------


def texts(corpus: Corpus) -> list[tuple[int, ...]]:
    """Tokens of every item, without its service's."""
    bounds, tokens = corpus.token_offsets.tolist(), corpus.tokens.tolist()
    return [tuple(tokens[a + 1 : b]) for a, b in pairwise(bounds)]


def logs_of(corpus: Corpus, service: str) -> list[list[int]]:
    """Items of every user of pretraining."""
    offsets, items = (a.tolist() for a in corpus.users(service))
    return [items[offsets[u] : offsets[u + 1]] for u in range(corpus.card.n_users)]


def task_logs(corpus: Corpus, name: str) -> list[int]:
    task = Task.open(corpus, name)
    return task.history(task.service)[1].tolist() + task.targets.reshape(-1).tolist()


def quantile(ordered: list[int], percent: int) -> int:
    return next(
        n for i, n in enumerate(ordered, start=1) if 100 * i >= percent * len(ordered)
    )  # the first that leaves at most the rest above it


def check_lengths(found: dict[str, Any], numbers: list[int]) -> None:
    ordered = sorted(numbers)
    assert found["mean"] == pytest.approx(sum(numbers) / len(numbers), rel=1e-12)
    assert (found["min"], found["max"]) == (ordered[0], ordered[-1])
    for percent in (10, 25, 50, 75, 90, 99):
        assert found[f"p{percent}"] == quantile(ordered, percent)
    for first, last, count in found["histogram"]:
        assert count == sum(first <= n <= last for n in numbers)
    assert sum(count for *_, count in found["histogram"]) == len(numbers)


def gini(counts: list[int]) -> float:
    """Half the relative mean difference of all pairs: the definition."""
    n, mean = len(counts), sum(counts) / len(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * n * n * mean)


def plain_tau(a: list[int], b: list[int]) -> float | None:
    """Tau-b by its definition, over all pairs."""
    agree = tied_a = tied_b = 0
    pairs = list(combinations(range(len(a)), 2))
    for i, j in pairs:
        one, other = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
        agree += one * other
        tied_a += one == 0
        tied_b += other == 0
    untied = (len(pairs) - tied_a) * (len(pairs) - tied_b)
    return agree / math.sqrt(untied) if untied else None


def ranked(a: Counter[int], b: Counter[int], variant: str) -> list[int]:
    """Tokens that a variant ranks."""
    if variant == "union":
        return sorted(a.keys() | b.keys())
    if variant == "intersection":
        return sorted(a.keys() & b.keys())
    return sorted(a, key=lambda token: (-a[token], token))[:1000]


# ---- numbers ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 70), min_size=1, max_size=60))
def test_lengths(numbers):
    check_lengths(describe(np.bincount(numbers)), numbers)
    for percent in (10, 50, 99):
        same = np.quantile(numbers, percent / 100, method="inverted_cdf")
        assert quantile(sorted(numbers), percent) == same


def test_bins_double_and_end_at_the_most():
    assert describe(np.bincount([1, 2, 3, 5, 9]))["histogram"] == [
        [1, 1, 1],
        [2, 3, 2],
        [4, 7, 1],
        [8, 9, 1],
    ]
    assert describe(np.array([2, 0, 1]))["histogram"] == [[0, 0, 2], [1, 1, 0], [2, 2, 1]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=250).filter(any))
def test_popularity(counts):
    found = popularity(np.array(counts))
    some = sorted(filter(None, counts), reverse=True)
    assert found["items"] == len(some)
    for percent in (1, 10):
        top = some[: (percent * len(some) + 99) // 100]
        assert found[f"top_{percent}pct"] == pytest.approx(sum(top) / sum(some), rel=1e-12)
    assert found["gini"] == pytest.approx(gini(some), abs=1e-12)


def test_popularity_of_all_alike_and_of_one():
    assert popularity(np.full(100, 7)) == {
        "items": 100,
        "top_1pct": pytest.approx(0.01),
        "top_10pct": pytest.approx(0.1),
        "gini": pytest.approx(0, abs=1e-12),
    }
    assert popularity(np.array([0, 5, 0]))["top_1pct"] == 1.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_tau_b(pairs):
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    for variant in VARIANTS:
        kept = ranked(
            *(Counter({i: int(n) for i, n in enumerate(s) if n}) for s in (a, b)), variant
        )
        found = tau_b(a, b, variant)
        assert found["vocabulary"] == len(kept)
        assert found["tau_b"] == pytest.approx(plain_tau(a[kept].tolist(), b[kept].tolist()))


def test_tau_b_of_known_orders():
    a = np.arange(1, 2001)
    assert tau_b(a, a * 3, "union") == {"tau_b": pytest.approx(1), "vocabulary": 2000}
    assert tau_b(a, a[::-1], "top_1000") == {"tau_b": pytest.approx(-1), "vocabulary": 1000}
    # in the half that is most frequent in a, b has no order; in the other it has a's
    b = np.concatenate([a[:1000], np.full(1000, 5000)])
    assert tau_b(a, b, "top_1000")["tau_b"] is None
    assert tau_b(a, b, "union")["tau_b"] > 0.8
    assert tau_b(a, np.zeros(2000, np.int64), "intersection") == {"tau_b": None, "vocabulary": 0}


# ---- a corpus -----------------------------------------------------------------------------------


def check_survey(corpus: Corpus, found: dict[str, Any], batch_size: int, cap: int) -> None:
    text, services = texts(corpus), corpus.card.services
    users = {s: logs_of(corpus, s) for s in services}
    flat = {s: [item for row in rows for item in row] for s, rows in users.items()}
    for service, logs in {**flat, "all": [*chain(*flat.values())]}.items():
        row = found["all"] if service == "all" else found["services"][service]
        assert row["users"] == corpus.card.n_users
        assert row["behaviours"] == len(logs)
        assert row["tokens"] == sum(1 + len(text[i]) for i in logs)
        assert row["vocabulary"] == len({token for i in logs for token in text[i]})
        check_lengths(row["tokens_per_item"], [1 + len(text[i]) for i in logs])
        counts = sorted(Counter(logs).values(), reverse=True)
        assert row["items"] == len(counts)
        for percent in (1, 10):
            top = counts[: (percent * len(counts) + 99) // 100]
            assert row[f"top_{percent}pct"] == pytest.approx(sum(top) / len(logs), rel=1e-12)
    # padding: the arrays that a padding collator would make
    size = min(batch_size, corpus.card.n_users)
    padding, slots = found["padding"], Counter()
    assert (padding["batch_size"], padding["items_per_user"]) == (size, cap)
    for service, rows in users.items():
        for start in range(0, len(rows) - size + 1, size):
            batch = [row[-cap:] for row in rows[start : start + size]]
            tokens = [[1 + len(text[i]) for i in row] for row in batch]
            shape = (size, max(map(len, tokens)), max(n for row in tokens for n in row))
            slots[service, "tokens"] += sum(map(sum, tokens))
            slots[service, "to_longest"] += np.empty(shape).size
            slots[service, "to_caps"] += size * cap * 32
    for key in ("tokens", "to_longest", "to_caps"):
        slots["all", key] = sum(slots[s, key] for s in services)
    for service in (*services, "all"):
        tokens = slots[service, "tokens"]
        assert padding[service] == {
            "tokens": tokens,
            "to_longest": slots[service, "to_longest"],
            "to_caps": slots[service, "to_caps"],
            "avoided_to_longest": pytest.approx(1 - tokens / slots[service, "to_longest"]),
            "avoided_to_caps": pytest.approx(1 - tokens / slots[service, "to_caps"]),
        }
    # overlap
    own = {s: {text[i] for i in corpus.service_items(s)} for s in corpus.services}
    assert [(r["service"], r["other"]) for r in found["overlap"]] == list(
        permutations(corpus.services, 2)
    )
    for row in found["overlap"]:
        one, other = row["service"], row["other"]
        shared = own[one] & own[other]
        assert row["texts"] == len(own[one])
        assert row["shared_texts"] == len(shared)
        assert row["users"] == (corpus.card.n_users if {one, other} <= {*services} else None)
        logs = flat.get(one)
        share = logs and sum(text[i] in shared for i in logs) / len(logs)
        assert row["logs_on_shared"] == (share if share is None else pytest.approx(share))
    # tasks
    trained = set(corpus.keys[corpus.split("pretraining")].tolist())
    for name, row in found["tasks"].items():
        task = Task.open(corpus, name)
        assert (row["service"], row["users"]) == (task.service, len(task.keys))
        assert row["pretrained_users"] == len(trained & set(task.keys.tolist()))
        assert row["targets"] == len(task.targets.reshape(-1).tolist())


@pytest.mark.parametrize(("batch_size", "cap"), [(8, 3), (5, 512), (10**6, 4), (1, 1)])
def test_survey(corpus, small_blocks, batch_size, cap):
    check_survey(corpus, survey(corpus, batch_size, cap), batch_size, cap)
    assert survey(corpus)["tasks"]["beauty"]["pretrained_users"] > 0
    assert survey(corpus)["tasks"]["books"]["pretrained_users"] == 0


def test_texts_shared_between_services(tiny_corpus, small_blocks):
    root = tiny_corpus()
    logs = root / "logs.csv"  # the shop's name is in every text: some now say another's
    logs.write_text(logs.read_text().replace("oak books", "oak garden").replace("pine beauty", "x"))
    corpus = Corpus.open(prepare(root / "tiny.toml", root))
    found = survey(corpus, 8, 3)
    check_survey(corpus, found, 8, 3)
    shared = {(r["service"], r["other"]): r["shared_texts"] for r in found["overlap"]}
    assert shared["books", "garden"] > 0
    assert shared["books", "garden"] == shared["garden", "books"]
    assert shared["books", "beauty"] == 0


def test_summary(corpus):
    found = summary(corpus)
    json.dumps(found)
    text = texts(corpus)
    users = {s: logs_of(corpus, s) for s in corpus.card.services}
    flat = [item for rows in users.values() for row in rows for item in row]
    assert found["behaviours"] == {s: sum(map(len, rows)) for s, rows in users.items()}
    assert found["tokens"] == sum(1 + len(text[i]) for i in flat)
    check_lengths(found["tokens_per_item"], [1 + len(text[i]) for i in flat])
    for service, rows in users.items():
        check_lengths(found["items_per_user"][service], [len(row) for row in rows])
    assert found["users"] == {"pretraining": corpus.card.n_users, "validation": 8, "pool": 16}
    assert list(found["users"]) == ["pretraining", "validation", "pool"]
    assert (found["items"], found["vocab_size"]) == (len(text), corpus.card.vocab_size)
    assert found["bytes"] == sum(
        p.stat().st_size
        for p in corpus.path.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    )


# ---- likeness of domains ------------------------------------------------------------------------


def plain_domains(corpus: Corpus, name: str, reference: Corpus) -> dict[str, Counter[int]]:
    """Tokens of every domain, in the tokens of a reference."""
    text: list[list[int]] = [list(t) for t in texts(corpus)]
    if corpus.path != reference.path:
        own, target = (tokenizer.load(c.path / "tokenizer.json") for c in (corpus, reference))
        text = [target.encode(own.decode(t)).ids[:31] for t in text]
    logs = {
        f"{name}/{s}": [i for row in logs_of(corpus, s) for i in row] for s in corpus.card.services
    }
    logs = {name: [*chain(*logs.values())], **logs}
    logs |= {f"{name}/tasks/{t}": task_logs(corpus, t) for t in corpus.manifest["tasks"]}
    return {n: Counter(token for i in items for token in text[i]) for n, items in logs.items()}


def check_compare(found: dict[str, Any], domains: dict[str, Counter[int]], oracle: Any) -> None:
    assert [(d["domain"], d["tokens"], d["vocabulary"]) for d in found["domains"]] == [
        (name, counts.total(), len(counts)) for name, counts in domains.items()
    ]
    expected = [(a, b, v) for a, b in combinations(domains, 2) for v in VARIANTS]
    assert [(r["a"], r["b"], r["variant"]) for r in found["pairs"]] == expected
    for row in found["pairs"]:
        a, b = domains[row["a"]], domains[row["b"]]
        kept = ranked(a, b, row["variant"])
        assert row["vocabulary"] == len(kept)
        tau = oracle([a[t] for t in kept], [b[t] for t in kept])
        assert row["tau_b"] == pytest.approx(tau, abs=1e-12)


def test_domains_of_one_corpus(corpus, small_blocks):
    domains = plain_domains(corpus, "tiny", corpus)
    assert list(domains) == [
        "tiny",
        "tiny/books",
        "tiny/garden",
        "tiny/tasks/beauty",
        "tiny/tasks/books",
    ]
    assert min(min(c) for c in domains.values()) > len(corpus.services)  # no service token
    check_compare(compare([corpus]), domains, plain_tau)


def test_domains_of_corpora_with_other_tokenizers(tiny_corpus, small_blocks):
    root = tiny_corpus()
    first = find_prepared(root, root / "tiny.toml")
    logs = root / "logs.csv"
    for word in ("steel", "oak", "round"):
        logs.write_text(logs.read_text().replace(word, word[::-1] + " é"))
    second = Corpus.open(prepare(root / "tiny.toml", root))
    assert second.card.digest != first.card.digest
    for reference, other in ((first, second), (second, first)):
        domains = plain_domains(reference, reference.path.name, reference)
        domains |= plain_domains(other, other.path.name, reference)
        found = compare([reference, other])
        assert found["tokenizer"] == reference.path.name
        check_compare(found, domains, plain_tau)
        for owner in (reference, other):
            for task in owner.manifest["tasks"]:
                b = domains[f"{owner.path.name}/tasks/{task}"]
                name = reference.path.name
                for services, a in ((None, domains[name]), (("books",), domains[f"{name}/books"])):
                    kept = {v: ranked(a, b, v) for v in VARIANTS}
                    expected = {
                        v: plain_tau([a[t] for t in k], [b[t] for t in k]) for v, k in kept.items()
                    }
                    assert similarity(reference, owner, task, services) == pytest.approx(expected)


def test_encoding_again_keeps_tokens_of_the_same_tokenizer(corpus, monkeypatch):
    plain = compare([corpus])
    monkeypatch.setattr("scaling.data.domains.same_tokenizer", lambda one, other: False)
    assert compare([corpus]) == plain


def test_a_character_that_the_cut_split_is_left_out(tiny_corpus):
    """Two bytes a letter: the cut at 31 tokens splits some. A larger vocabulary has the letters
    whole, so that it reaches the end of what the cut left."""
    root = tiny_corpus()
    logs, toml, draw = root / "logs.csv", root / "tiny.toml", random.Random(0)
    letters = [chr(c) for c in range(0x400, 0x500)]
    lines = logs.read_text().splitlines()
    for i, line in enumerate(lines[1:], start=1):
        who, where, what, when = line.split(",")
        lines[i] = f"{who},{where},{''.join(draw.choices(letters, k=40))} {what},{when}"
    logs.write_text("\n".join(lines), encoding="utf-8")
    corpus = Corpus.open(prepare(toml, root))
    toml.write_text(toml.read_text().replace("vocab_size = 320", "vocab_size = 900"))
    reference = Corpus.open(prepare(toml, root))
    own = tokenizer.load(corpus.path / "tokenizer.json")
    cut = [own.decode(list(t)) for t in texts(corpus)]
    assert any(t.endswith("\ufffd") for t in cut)
    target = tokenizer.load(reference.path / "tokenizer.json")
    text = [Counter(target.encode(t.rstrip("\ufffd")).ids) for t in cut]
    assert max(t.total() for t in text) < 31
    counts = sum((text[i] for row in logs_of(corpus, "books") for i in row), Counter())
    found = compare([reference, corpus])["domains"]
    [books] = [d for d in found if d["domain"] == f"{corpus.path.name}/books"]
    assert (books["tokens"], books["vocabulary"]) == (counts.total(), len(counts))


# ---- size ---------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_behaviours(corpus, enlarged, monkeypatch):
    big = enlarged(corpus, n_users=16_384, logs=256)
    n = sum(len(big.users(s)[1]) for s in big.card.services)
    assert n > 8_000_000
    for module in (statistics, verify):
        monkeypatch.setattr(module, "BLOCK", 1 << 14)
    monkeypatch.setattr(store.blocks, "__defaults__", (1 << 14,))
    for look in (lambda: survey(big, 16, 128), lambda: compare([big]), big.verify):
        look()  # imports and caches are not the behaviours'
        tracemalloc.start()
        look()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3_000_000, f"{peak} bytes at {n} behaviours"


# ---- verbs --------------------------------------------------------------------------------------


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


def test_info_and_compare_as_people_call_them(corpus):
    root = corpus.path.parent.parent
    plain = call("corpus", "info", "tiny", "--root", root)
    assert plain.exit_code == 0, plain.output
    behaviours = sum(summary(corpus)["behaviours"].values())
    assert f"behaviours  {behaviours:,} of pretraining users" in plain.stdout
    assert "services    books, garden; for transfer only: beauty" in plain.stdout
    assert "{" not in plain.stdout
    [record] = json.loads(call("corpus", "info", "tiny", "--root", root, "--json").stdout)
    assert record == summary(corpus)
    options = ("--batch-size", 8, "--items-per-user", 3)
    full = call("corpus", "info", "tiny", "--root", root, "--full", *options)
    assert full.exit_code == 0, full.output
    assert full.stdout.startswith(plain.stdout)
    for title in ("slots of padded batches of 8 users, at most 3 items", "gini", "logs_on_shared"):
        assert title in full.stdout
    [record] = json.loads(
        call("corpus", "info", "tiny", "--root", root, "--full", *options, "--json").stdout
    )
    assert record == {**summary(corpus), "logs": survey(corpus, 8, 3)}
    likeness = call("corpus", "compare", "tiny", corpus.card.digest, "--root", root)
    assert likeness.exit_code == 0, likeness.output
    assert likeness.stdout.startswith(f"tokens of {corpus.path.name}\n")
    found = json.loads(call("corpus", "compare", "tiny", "--root", root, "--json").stdout)
    assert found == compare([corpus])
    for row in found["pairs"]:
        [line] = [x for x in likeness.stdout.splitlines() if x.split()[:2] == [row["a"], row["b"]]]
        assert f"{row['tau_b']:.4g}" in line
    assert call("corpus", "compare", "tiny", "huge", "--root", root).exit_code == 2


# ---- real logs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def food_kitchen(tmp_path_factory, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUE_DATA", str(request.getfixturevalue("clue_test_data")))
        file = ROOT / "sweeps" / "corpora" / "food_kitchen.toml"
        return Corpus.open(prepare(file, tmp_path_factory.mktemp("food_kitchen")))


@pytest.mark.data
@pytest.mark.slow
def test_survey_of_food_and_kitchen(food_kitchen):
    found = survey(food_kitchen)
    check_survey(food_kitchen, found, 256, 128)
    for service in food_kitchen.card.services:
        counts = pd.Series(
            [i for row in logs_of(food_kitchen, service) for i in row]
        ).value_counts()
        places = np.arange(1, len(counts) + 1)
        area = (counts.sort_values().cumsum() / counts.sum()).sum() / len(places)
        # one minus twice the area below the Lorenz curve, by the trapezoids of its points
        lorenz = 1 - 2 * (area - 1 / (2 * len(places)))
        assert found["services"][service]["gini"] == pytest.approx(lorenz, abs=1e-9)


@pytest.mark.data
@pytest.mark.slow
def test_likeness_of_food_and_kitchen(food_kitchen):
    """A service is like its own task, and less like the other: the reading of Figure 5."""
    found = compare([food_kitchen])
    domains = plain_domains(food_kitchen, "food_kitchen", food_kitchen)
    check_compare(found, domains, lambda a, b: kendalltau(a, b).statistic)
    tau = {(r["a"], r["b"], r["variant"]): r["tau_b"] for r in found["pairs"]}
    for variant in VARIANTS:
        for one, other in (("food", "kitchen"), ("kitchen", "food")):
            own = tau[f"food_kitchen/{one}", f"food_kitchen/tasks/{one}", variant]
            assert own > 0.8
            assert own > tau[f"food_kitchen/{one}", f"food_kitchen/tasks/{other}", variant] + 0.5
