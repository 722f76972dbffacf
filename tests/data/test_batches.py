import threading
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import DataConfig, RunConfig
from scaling.data import batches as batches_module
from scaling.data import corpus as corpus_module
from scaling.data.batches import Batches, make_batch, pack_items, step_users, views
from scaling.data.corpus import Corpus, CorpusError

sizes = st.tuples(st.integers(2, 60), st.integers(1, 60)).filter(lambda s: s[1] <= s[0])


def config(corpus, **data):
    return RunConfig.parse(
        {
            "model": {"layers": 1, "d_model": 8, "heads": 1},
            "data": {
                "corpus_digest": corpus.card.digest,
                "vocab_size": corpus.card.vocab_size,
                **data,
            },
            "batch_size": 8,
            "negatives": 8,
            "steps": 20,
            "pool": corpus.card.pool.model_dump(),
        },
        "test",
    )


@given(sizes, st.integers(0, 5), st.integers(0, 2**31 - 1), st.booleans())
def test_an_epoch_has_every_user_at_most_once(size, epoch, seed, shuffle):
    n, batch = size
    per_epoch = n // batch
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    users = np.concatenate([step_users(n, batch, s, seed, shuffle) for s in steps])
    assert len(users) == per_epoch * batch
    assert len(set(users.tolist())) == len(users)
    assert 0 <= users.min() <= users.max() < n


@given(sizes, st.integers(0, 3), st.integers(0, 2**31 - 1))
def test_without_shuffling_every_epoch_is_the_same(size, step, seed):
    n, batch = size
    later = step + 4 * (n // batch)
    assert (
        step_users(n, batch, step, seed, False) == step_users(n, batch, later, seed, False)
    ).all()


def test_with_shuffling_epochs_differ_and_the_remainder_too():
    epochs = [
        np.concatenate([step_users(70, 16, 4 * e + i, 0) for i in range(4)]) for e in range(5)
    ]
    assert len({tuple(e) for e in epochs}) == 5
    assert len({frozenset(range(70)) - frozenset(e.tolist()) for e in epochs}) > 1


@given(sizes, st.lists(st.integers(0, 10**6), max_size=8), st.integers(0, 9), st.booleans())
def test_steps_asked_together_or_alone_are_the_same(size, steps, seed, shuffle):
    together = step_users(*size, np.array(steps, np.int64), seed, shuffle)
    assert together.shape == (len(steps), size[1])
    alone = [step_users(*size, step, seed, shuffle).tolist() for step in steps]
    assert together.tolist() == alone


def test_without_shuffling_the_same_remainder_sits_out_and_batches_keep_their_users():
    epochs = [
        [frozenset(step_users(70, 16, 4 * e + i, 3, False)) for i in range(4)] for e in (0, 9)
    ]
    assert epochs[0] == epochs[1]
    assert len(frozenset.union(*epochs[0])) == 64


def test_a_step_far_out_in_the_paper_s_corpus_takes_the_memory_of_one_batch():
    n, batch, step = 11_294_122, 256, 3 * 10**9
    step_users(n, batch, 0, 0)  # what numpy loads once
    tracemalloc.start()
    try:
        users = step_users(n, batch, step, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * 8 * batch  # forty numbers a user, where one bit for each of n is 1.4 MB
    assert len(set(users.tolist())) == batch
    assert 0 <= users.min() <= users.max() < n
    assert (users != step_users(n, batch, step - n // batch, 0)).any()  # an epoch before


def test_a_batch_larger_than_the_users():
    with pytest.raises(CorpusError, match="batch_size = 65 is larger than the 64 users"):
        step_users(64, 65, 0, 0)


def plain_rows(corpus, users, cap, services):
    """Rows of tokens per item, by slicing."""
    rows = []
    for service in services:
        offsets, items = corpus.users(service)
        for u in users:
            row = items[offsets[u] : offsets[u + 1]][-cap:]
            rows.append(
                [
                    corpus.tokens[corpus.token_offsets[i] : corpus.token_offsets[i + 1]].tolist()
                    for i in row.astype(int)
                ]
            )
    return rows


def unpacked(batch):
    items = [
        batch.tokens[a:b].tolist()
        for a, b in zip(batch.token_offsets[:-1], batch.token_offsets[1:], strict=True)
    ]
    return [
        [items[i] for i in batch.items[a:b]]
        for a, b in zip(batch.item_offsets[:-1], batch.item_offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("cap", [1, 3, 512])
@pytest.mark.parametrize("services", [None, ("garden",), ("garden", "books")])
def test_make_batch_equals_slicing(corpus, distinct, cap, services):
    users = np.array([5, 0, 3])
    batch = make_batch(corpus, users, cap, services, distinct)
    names = services or corpus.card.services
    assert unpacked(batch) == plain_rows(corpus, users, cap, names)
    assert (batch.n_users, batch.n_views) == (3, len(names))
    if not distinct:
        assert batch.items.tolist() == list(range(len(batch.items)))


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("cap", [1, 3, 256])
def test_a_service_alone_is_halved_in_time(corpus, distinct, cap):
    users = np.array([5, 0, 3])
    data = DataConfig(
        corpus_digest=corpus.card.digest, vocab_size=corpus.card.vocab_size,
        n_services=1, services=("garden",), items_per_user=cap,
    )  # fmt: skip
    logs = plain_rows(corpus, users, 2 * cap, ["garden"])
    earlier = [log[: len(log) // 2] for log in logs]
    later = [log[len(log) // 2 :] for log in logs]
    batch = views(corpus, users, data, distinct)
    assert unpacked(batch) == earlier + later
    assert (batch.n_users, batch.n_views) == (3, 2)
    assert max(map(len, later)) <= cap


@pytest.mark.parametrize("services", [None, ("garden", "books")])
def test_views_of_several_services_are_a_row_each(corpus, services):
    data = DataConfig(
        corpus_digest=corpus.card.digest, vocab_size=corpus.card.vocab_size,
        services=services, n_services=2, items_per_user=3,
    )  # fmt: skip
    users = np.array([5, 0, 3])
    names = services or corpus.card.services
    assert unpacked(views(corpus, users, data)) == plain_rows(corpus, users, 3, names)


def test_a_user_with_one_log_has_no_halves():
    corpus = InMemory([[1], [2]], {"s": [[0, 1], [1]]}, ("u2", "u4", "u1"))
    data = DataConfig(corpus_digest="a" * 16, vocab_size=3, n_services=1)
    assert views(corpus, [0], data).n_rows == 2
    with pytest.raises(CorpusError, match="a single log of 's'"):
        views(corpus, [0, 1], data)


class InMemory(Corpus):
    """Arrays as a corpus has them on disk, out of plain lists: tokens of items, items of rows."""

    def __init__(self, items, services, kinds):
        tokens, offsets, users = kinds
        self.path = Path("memory")
        self.tokens = np.array([t for item in items for t in item], tokens)
        self.token_offsets = np.cumsum([0, *map(len, items)]).astype(offsets)
        self.card = SimpleNamespace(services=tuple(services))
        self._users = {
            name: (
                np.cumsum([0, *map(len, rows)]).astype(offsets),
                np.array([i for row in rows for i in row], users),
            )
            for name, rows in services.items()
        }


kinds = st.tuples(*(st.sampled_from(["u1", "u2", "u4", "u8"]) for _ in range(3)))


@st.composite
def small_corpora(draw):
    """Items as lists of tokens, and the rows of items of a few users in one to three services."""
    items = draw(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=5), min_size=1))[:20]
    n_users = draw(st.integers(1, 6))
    row = st.lists(st.integers(0, len(items) - 1), min_size=1, max_size=7)
    rows = st.lists(row, min_size=n_users, max_size=n_users)
    services = draw(st.lists(rows, min_size=1, max_size=3))
    users = draw(st.lists(st.integers(0, n_users - 1), min_size=1, max_size=8))
    return items, {f"s{i}": rows for i, rows in enumerate(services)}, users


@given(small_corpora(), kinds, st.integers(1, 9), st.booleans(), st.booleans())
def test_batches_are_what_plain_lists_say(case, kinds, cap, distinct, large):
    items, services, users = case
    behaviours = [i for rows in services.values() for u in users for i in rows[u][-cap:]]
    encoded = sorted(set(behaviours)) if distinct else behaviours
    with pytest.MonkeyPatch.context() as patch:
        if large:  # as if the tokens had over 2 GiB
            patch.setattr(corpus_module, "INT32_MAX", 0)
        batch = make_batch(InMemory(items, services, kinds), users, cap, None, distinct)
    assert batch.tokens.tolist() == [t for i in encoded for t in items[i]]
    assert batch.tokens.dtype == kinds[0]
    assert batch.item_lengths.tolist() == [len(items[i]) for i in encoded]
    assert [encoded[i] for i in batch.items] == behaviours
    lengths = [len(rows[u][-cap:]) for rows in services.values() for u in users]
    assert batch.row_lengths.tolist() == lengths
    assert batch.token_offsets[0] == batch.item_offsets[0] == 0
    offsets = (batch.token_offsets, batch.items, batch.item_offsets)
    assert {a.dtype for a in offsets} == {np.dtype(np.int64)}


@given(st.lists(st.integers(0, 2**40 - 1), max_size=60), st.integers(1, 4))
def test_distinct_items_are_ascending_and_spread_back(items, repeats):
    distinct, places = batches_module._distinct(np.array(items * repeats, np.int64))
    assert distinct.tolist() == sorted(set(items))
    assert distinct[places].tolist() == items * repeats


@pytest.mark.parametrize("distinct", [False, True])
def test_no_items_are_an_empty_batch(corpus, distinct):
    none = np.zeros(0, np.int64)
    batch = pack_items(corpus, [(none, none)], distinct)
    assert (len(batch.tokens), len(batch.items), batch.n_rows) == (0, 0, 0)
    assert batch.token_offsets.tolist() == [0]


def test_torch_takes_the_arrays_without_a_warning(corpus):
    batch = make_batch(corpus, np.arange(4), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.from_numpy(batch.tokens).long().tolist() == batch.tokens.tolist()
        torch.from_numpy(batch.items)


@pytest.mark.parametrize("offsets", [[0, 3, 2, 4], [0, 2, 3, 9], [1, 2, 3, 2]])
def test_offsets_that_lead_outside_the_tokens_are_refused(offsets):
    corpus = InMemory([[1, 2], [3], [4]], {"s": [[0, 1, 2]]}, ("u2", "u4", "u1"))
    corpus.token_offsets = np.array(offsets, np.uint32)
    with pytest.raises(CorpusError, match=r"items/offsets\.npy"):
        make_batch(corpus, [0], 8)


@pytest.mark.parametrize("distinct", [False, True])
def test_an_item_that_is_not_there_is_refused(distinct):
    corpus = InMemory([[1, 2], [3]], {"s": [[0, 2]]}, ("u2", "u4", "u1"))
    with pytest.raises(IndexError, match="2"):
        make_batch(corpus, [0], 8, None, distinct)


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_side_by_side_are_one_process(corpus, distinct, shuffle):
    run = config(corpus, items_per_user=4, shuffle=shuffle)
    for step in (0, 3, 17, 10**9):
        whole = unpacked(Batches(corpus, run, distinct=distinct).batch(step))
        for world_size in (2, 4, 8):
            parts = [
                unpacked(Batches(corpus, run, r, world_size, distinct).batch(step))
                for r in range(world_size)
            ]
            half = len(parts[0]) // 2
            assert whole == [
                row for s in (0, 1) for p in parts for row in p[s * half : (s + 1) * half]
            ]


@pytest.mark.parametrize("drawn", [1, 8, 24, 4096])
@pytest.mark.parametrize("shuffle", [False, True])
def test_any_step_can_be_asked_for_directly(corpus, monkeypatch, drawn, shuffle):
    monkeypatch.setattr(batches_module, "DRAWN", drawn)  # in blocks of 1, 1, 3 and 512 steps
    run = config(corpus, shuffle=shuffle)
    n = Batches(corpus, run).n_users
    asked = [17, 0, 18, 3, 5 * 10**8, 2, 1, 0, 17]
    batches = Batches(corpus, run)
    for step in asked:
        users = step_users(n, run.batch_size, step, run.seed, shuffle)
        expected = plain_rows(corpus, users, run.data.items_per_user, corpus.card.services)
        assert unpacked(batches.batch(step)) == expected


def test_a_slow_batch_holds_up_neither_the_next_nor_the_order(corpus, monkeypatch):
    batches = Batches(corpus, config(corpus))
    later = threading.Event()

    def batch(step):
        if step == 0:
            assert later.wait(60), "nobody made the next batch"
        else:
            later.set()
        return step

    monkeypatch.setattr(batches, "batch", batch)
    assert list(batches.iterate(0, 9)) == list(range(9))


def test_iterate_is_batch_by_batch_and_stops_its_threads(corpus):
    batches = Batches(corpus, config(corpus))
    ahead = list(batches.iterate(2, 9))
    assert len(ahead) == 7
    assert [unpacked(b) for b in ahead] == [unpacked(batches.batch(s)) for s in range(2, 9)]
    iterator = batches.iterate(0, 20)
    next(iterator)
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
    assert list(batches.iterate(4, 4)) == []


def test_an_error_in_the_thread_arrives(corpus, monkeypatch):
    batches = Batches(corpus, config(corpus))

    def broken(step):
        raise CorpusError("torn")

    monkeypatch.setattr(batches, "batch", broken)
    with pytest.raises(CorpusError, match="torn"):
        next(batches.iterate(0, 2))


def test_fractions_are_nested_prefixes(corpus):
    n = corpus.card.n_users
    seen = {}
    for fraction in (0.5, 1.0):
        batches = Batches(corpus, config(corpus, data_fraction=fraction))
        assert batches.n_users == corpus.card.fraction_users(fraction)
        users = [step_users(batches.n_users, 8, s, 0) for s in range(40)]
        seen[fraction] = set(np.concatenate(users).tolist())
    assert seen[0.5] == set(range(n // 2))
    assert seen[0.5] < seen[1.0] <= set(range(n))


def test_another_corpus_or_an_uneven_share_is_refused(corpus):
    run = config(corpus)
    with pytest.raises(CorpusError, match="cannot be shared by 3 ranks"):
        Batches(corpus, run, 0, 3)
    other = run.model_copy(update={"data": run.data.model_copy(update={"corpus_digest": "a" * 16})})
    with pytest.raises(CorpusError, match="the run was planned on aaaaaaaaaaaaaaaa"):
        Batches(corpus, other)
