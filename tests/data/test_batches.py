import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import RunConfig
from scaling.data.batches import Batches, make_batch, step_users
from scaling.data.corpus import CorpusError
from scaling.data.prepare import find_prepared

sizes = st.tuples(st.integers(2, 60), st.integers(1, 60)).filter(lambda s: s[1] <= s[0])


@pytest.fixture
def corpus(tiny_corpus):
    root = tiny_corpus()
    return find_prepared(root, root / "tiny.toml")


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
    assert (batch.n_users, batch.n_services) == (3, len(names))
    if not distinct:
        assert batch.items.tolist() == list(range(len(batch.items)))


def test_ranks_side_by_side_are_one_process(corpus):
    run = config(corpus, items_per_user=4)
    for step in (0, 3, 17):
        whole = unpacked(Batches(corpus, run).batch(step))
        for world_size in (2, 4, 8):
            parts = [
                unpacked(Batches(corpus, run, r, world_size).batch(step)) for r in range(world_size)
            ]
            half = len(parts[0]) // 2
            assert whole == [
                row for s in (0, 1) for p in parts for row in p[s * half : (s + 1) * half]
            ]


def test_iterate_is_batch_by_batch_and_stops_its_thread(corpus):
    batches = Batches(corpus, config(corpus))
    ahead = list(batches.iterate(2, 9))
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
