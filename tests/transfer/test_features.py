"""Features against the model run on one user at a time, and corpora read by other encoders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scaling.transfer.features as features
from scaling.config import MAX_TOKENS, ModelConfig
from scaling.data import tokenizer
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.prepare import prepare
from scaling.data.tasks import Task
from scaling.models import build
from scaling.packing import PackedBatch
from scaling.transfer.features import item_features, user_features
from scaling.transfer.foreign import as_seen_by

Logs = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root = tiny_corpus(users=400, negatives=20)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def encoder(corpus: Corpus, system: str = "clue", feature_dim: int | None = None) -> Any:
    config = ModelConfig(
        system=system, layers=1, d_model=8, heads=2, dropout=0.5, feature_dim=feature_dim
    )
    return build(config, corpus.card.vocab_size).eval()


def tokens_of(corpus: Corpus, item: int) -> np.ndarray:
    bounds = corpus.token_offsets[item : item + 2].astype(int)
    return np.array(corpus.tokens[bounds[0] : bounds[1]], np.int64)


def forget(logs: Logs, users: np.ndarray) -> Logs:
    """Leave these users without a log."""
    lengths = np.diff(logs[0].astype(np.int64))
    kept = ~np.isin(np.repeat(np.arange(len(lengths)), lengths), users)
    lengths[users] = 0
    return np.concatenate([[0], np.cumsum(lengths)]), logs[1][kept]


def alone(model: Any, corpus: Corpus, log: np.ndarray) -> np.ndarray:
    """z of one log, from a batch of nothing else."""
    texts = [tokens_of(corpus, i) for i in log]
    batch = PackedBatch(
        tokens=np.concatenate(texts),
        token_offsets=np.cumsum([0, *map(len, texts)]),
        items=np.arange(len(log)),
        item_offsets=np.array([0, len(log)]),
        n_views=1,
    )
    with torch.no_grad():
        return model(batch)[0].numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("system", "feature_dim"), [("clue", None), ("clue", 3), ("single", None), ("single", 3)]
)
def test_features_of_a_user_are_those_of_the_user_alone(
    corpus: Corpus, system: str, feature_dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, width = encoder(corpus, system, feature_dim), feature_dim or 8
    task = Task.open(corpus, "beauty")
    histories = {s: task.history(s) for s in sorted(task.services)}
    last = max(histories)
    histories[last] = forget(histories[last], np.arange(0, task.n_users, 3))
    cap = 3
    monkeypatch.setattr(features, "CHUNK_ITEMS", 20)  # several batches
    monkeypatch.setattr(features, "CHUNK_TOKENS", {"cpu": 50})  # and chunks of each
    found, present = user_features(model, corpus, histories, cap)
    assert found.shape == (task.n_users, len(histories) * width)
    for user in range(0, task.n_users, 7):
        for column, (offsets, items) in enumerate(histories.values()):
            log = items[int(offsets[user]) : int(offsets[user + 1])][-cap:]
            z = found[user, width * column : width * column + width]
            assert present[user, column] == (len(log) > 0)
            expected = alone(model, corpus, log) if len(log) else np.zeros(width)
            np.testing.assert_allclose(z, expected, atol=1e-5)
    assert present[::3, -1].sum() == 0 < present[1::3, -1].sum()


@given(first=st.integers(0, 60), count=st.integers(1, 60), size=st.sampled_from([1, 33, 10**6]))
def test_any_range_of_users_in_any_batches(
    corpus_of_all_examples: tuple[Corpus, Any, np.ndarray], first: int, count: int, size: int
) -> None:
    corpus, model, whole = corpus_of_all_examples
    histories = {
        s: (corpus.users(s)[0][first : first + count + 1], corpus.users(s)[1])
        for s in corpus.card.services
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "CHUNK_ITEMS", size)
        found, present = user_features(model, corpus, histories, 4)
    assert present.all()
    np.testing.assert_allclose(found, whole[first : first + count], atol=1e-5)


@pytest.fixture(scope="module")
def corpus_of_all_examples(_prepared: Any) -> tuple[Corpus, Any, np.ndarray]:
    root = _prepared(400, 8, 16, 0.3, 20, 0)
    corpus = Corpus.open(next((root / "corpora").glob("tiny-*")))
    model = encoder(corpus)
    logs = {s: corpus.users(s) for s in corpus.card.services}
    return corpus, model, user_features(model, corpus, logs, 4)[0]


def test_item_features_are_in_the_order_asked_for(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder(corpus)
    items = corpus.service_items("books")
    whole = item_features(model, corpus, items)
    monkeypatch.setattr(features, "CHUNK_TOKENS", {"cpu": 7 * MAX_TOKENS})
    backwards = item_features(model, corpus, items[::-1])
    np.testing.assert_allclose(backwards[::-1], whole, atol=1e-5)
    for row in (0, 5):
        tokens = tokens_of(corpus, int(items[row]))
        with torch.no_grad():
            one = model.encode_items(tokens, np.array([0, len(tokens)]))
        np.testing.assert_allclose(whole[row], one[0].numpy(), atol=1e-5)
    assert item_features(model, corpus, items[:0]).shape == (0, 8)


def test_item_features_keep_the_width_of_the_model(corpus: Corpus) -> None:
    for items in (np.arange(7), np.arange(0)):
        assert item_features(encoder(corpus, feature_dim=3), corpus, items).shape == (len(items), 8)


ELSEWHERE = """
name = "elsewhere"
services = ["garden", "music"]

[source]
kind = "tables"
[[source.tables]]
files = ["elsewhere.csv"]
columns = {{ user = "who", service = "where", text = "what", time = "when" }}

[users]
salt = "elsewhere"
eligible_logs = 2
downstream = 0.0
validation = 4
pool = 8

[tokenizer]
vocab_size = {vocab_size}
"""


def elsewhere(root: Path, vocab_size: int = 300) -> Corpus:
    """A corpus with one service of the tiny one's and one of its own; texts the other never saw,
    one longer than any cut."""
    rng = np.random.default_rng(0)
    words = ["violin", "röd", "steel", "日本", "oak", "green"]
    rows = ["who,where,what,when"]
    for user in range(40):
        for service in ("garden", "music"):
            for when in range(4):
                text = " ".join([*rng.choice(words, 3), str(when)]) + " flute" * 40 * (when == 3)
                rows.append(f"v{user},{service},{text},{when}")
    (root / "elsewhere.csv").write_text("\n".join(rows), encoding="utf-8")
    path = root / f"elsewhere-{vocab_size}.toml"
    path.write_text(ELSEWHERE.format(vocab_size=vocab_size), encoding="utf-8")
    return Corpus.open(prepare(path, root))


def test_a_foreign_corpus_is_read_in_the_encoders_tokens(corpus: Corpus) -> None:
    other = elsewhere(corpus.path.parent.parent)
    seen = as_seen_by(other, corpus)
    theirs = tokenizer.load(other.path / "tokenizer.json")
    ours = tokenizer.load(corpus.path / "tokenizer.json")
    kept = {"garden": "<service:garden>", "music": "<service:books>"}  # the first of pretraining
    cut = 0
    for item in range(other.n_items):
        service = other.services[other.item_service[item]]
        first, *rest = tokens_of(other, item).tolist()
        assert first == theirs.token_to_id(f"<service:{service}>")
        text = theirs.decode(rest).rstrip("\N{REPLACEMENT CHARACTER}")
        expected = [ours.token_to_id(kept[service]), *ours.encode(text).ids][:MAX_TOKENS]
        assert tokens_of(seen, item).tolist() == expected
        cut += len(expected) == MAX_TOKENS
        assert len(expected) == MAX_TOKENS or ours.decode(expected[1:]) == text
    assert cut > 0
    # Batches read the new tokens, users and logs are the same, and the corpus itself is untouched.
    tokens, offsets = seen.item_tokens(np.array([5]))
    assert tokens.tolist() == tokens_of(seen, 5).tolist() != tokens_of(other, 5).tolist()
    assert offsets.tolist() == [0, len(tokens)]
    assert seen.keys is other.keys
    assert seen.users("music") is other.users("music")
    found = item_features(encoder(corpus), seen, np.arange(seen.n_items))
    assert np.isfinite(found).all()


def test_the_token_of_an_unknown_service_may_be_named(corpus: Corpus) -> None:
    other = elsewhere(corpus.path.parent.parent)
    alone = as_seen_by(other, corpus, ("garden",))  # an encoder that was trained on it alone
    seen = as_seen_by(other, corpus, unknown="garden")
    garden = 1 + corpus.services.index("garden")
    assert {tokens_of(seen, i)[0] for i in range(other.n_items)} == {garden}
    # A service that the encoder has a token of, but was not pretrained on, is unknown to it.
    with pytest.raises(CorpusError, match="'beauty' is no service of pretraining; valid: books, g"):
        as_seen_by(other, corpus, unknown="beauty")
    np.testing.assert_array_equal(alone.tokens, seen.tokens)
    with pytest.raises(CorpusError, match="'books' is no service of pretraining"):
        as_seen_by(other, corpus, ("garden",), unknown="books")


def test_texts_of_the_same_tokenizer_stay_as_they_are(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_seen_by(corpus, corpus) is corpus
    other = elsewhere(corpus.path.parent.parent)
    monkeypatch.setattr("scaling.transfer.foreign.same_tokenizer", lambda one, other: True)
    seen = as_seen_by(other, corpus)
    assert seen.token_offsets.tolist() == other.token_offsets.tolist()
    firsts = other.token_offsets[:-1].astype(int)
    changed = np.flatnonzero(seen.tokens != other.tokens)
    assert set(changed.tolist()) <= set(firsts.tolist())
    books, garden = (1 + corpus.services.index(s) for s in ("books", "garden"))
    expected = np.where(other.item_service == other.services.index("garden"), garden, books)
    assert seen.tokens[firsts].tolist() == expected.tolist()
