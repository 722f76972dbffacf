"""Vectors of texts against dense formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from scaling.data.corpus import Corpus
from scaling.transfer.problem import TransferError
from scaling.transfer.texts import reduced, sentence_vectors, tfidf


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root: Path = tiny_corpus(users=100)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def test_tfidf_by_hand(corpus: Corpus) -> None:
    items = corpus.service_items("books")
    counts = np.zeros((len(items), corpus.card.vocab_size))
    for row, item in enumerate(items):
        bounds = corpus.token_offsets[item : item + 2].astype(int)
        for token in corpus.tokens[bounds[0] + 1 : bounds[1]]:  # without the service's
            counts[row, token] += 1
    expected = counts * (np.log((1 + len(items)) / (1 + (counts > 0).sum(0))) + 1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(tfidf(corpus, items).toarray(), expected, atol=1e-12)


@pytest.mark.parametrize("width", [3, 10, 100])
def test_the_reduction_has_the_leading_singular_vectors(width: int) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(80, 40)) * 0.8 ** np.arange(40)
    found = reduced(csr_array(matrix), width)
    rank = min(width, 39)
    assert found.shape == (80, width)
    assert not found[:, rank:].any()
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    expected = np.abs(left * values)[:, : min(rank, 10)]
    np.testing.assert_allclose(np.abs(found[:, : min(rank, 10)]), expected, atol=1e-3)
    np.testing.assert_array_equal(reduced(csr_array(matrix), width), found)


def test_sentence_transformers_that_are_not_there(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(TransferError, match=r"pip install clue-scaling\[text\]"):
        sentence_vectors(corpus, np.arange(3), tmp_path)
