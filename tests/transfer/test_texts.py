"""Vectors of texts against dense formulas."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from scaling.data.corpus import Corpus
from scaling.data.tasks import Task
from scaling.transfer.baselines import Context
from scaling.transfer.problem import TransferError, pose
from scaling.transfer.texts import WIDTH, reduced, sentence_vectors, tfidf


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


def test_vectors_of_texts_are_as_alike_as_the_texts(corpus: Corpus) -> None:
    """Of rank 256 or less nothing is lost by the reduction."""
    matrix = tfidf(corpus, corpus.service_items("books"))
    assert np.linalg.matrix_rank(matrix.toarray()) < WIDTH
    vectors = reduced(matrix).astype(float)
    np.testing.assert_allclose(vectors @ vectors.T, (matrix @ matrix.T).toarray(), atol=1e-5)


def test_sentence_transformers_that_are_not_there(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(TransferError, match=r"pip install clue-scaling\[text\]"):
        sentence_vectors(corpus, np.arange(3), tmp_path)


class LengthsOfTexts:
    """In place of a model, which needs weights: a text's vector is its letters and its words."""

    def __init__(self, folder: str, *, local_files_only: bool) -> None:
        assert Path(folder).is_dir()
        assert local_files_only

    def encode(self, texts: Sequence[str], *, convert_to_numpy: bool) -> np.ndarray:
        assert convert_to_numpy
        return np.array([(len(text.replace(" ", "")), len(text.split())) for text in texts], float)


def test_sentence_transformers_are_given_the_texts_in_order(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = LengthsOfTexts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    task = pose(corpus, Task.open(corpus, "beauty"))
    with pytest.raises(TransferError, match=r"model: not a folder of a sentence-transformers"):
        _ = Context(corpus, task, tmp_path / "model").texts
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").write_text("[]")
    found = Context(corpus, task, tmp_path / "model").texts
    assert found.dtype == np.float32
    # Texts are made of three words, and items numbered by text within a service.
    logs = (corpus.path.parent.parent / "logs.csv").read_text().splitlines()[1:]
    texts = sorted({line.split(",")[2] for line in logs if line.split(",")[1] == "beauty"})
    assert found.tolist() == [[len(text.replace(" ", "")), 3] for text in texts]
