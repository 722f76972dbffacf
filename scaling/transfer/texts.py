"""Vectors of items' texts, for systems that have no encoder of their own.

Both kinds are of the same shape and need nothing but the catalogue, which is known without any
behaviour: TF-IDF reduced by a singular value decomposition (latent semantic analysis: Deerwester et
al. 1990), and sentence-transformers where that package is installed and its weights are at hand.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer

from scaling.config import canonical_json, short_digest
from scaling.data import tokenizer
from scaling.data.corpus import Corpus
from scaling.files import sha256
from scaling.transfer.problem import TransferError

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
WIDTH = 256
"""Singular vectors kept."""


def tfidf(corpus: Corpus, items: Ints) -> csr_array:
    """TF-IDF of items' tokens, rows of unit length, with the smoothed logarithm
    idf = ln((1 + n) / (1 + df)) + 1. [items, vocabulary]

    Args:
        items: as the corpus numbers them; documents are counted among them. [items]
    """
    tokens, offsets = corpus.item_tokens(items)
    row = np.repeat(np.arange(len(items)), np.diff(offsets))
    text = np.ones(len(tokens), bool)
    text[offsets[:-1]] = False  # the service's token says nothing
    shape = (len(items), corpus.card.vocab_size)
    counts = csr_array((np.ones(text.sum()), (row[text], tokens[text])), shape=shape)
    counts.sum_duplicates()
    return csr_array(TfidfTransformer().fit_transform(counts))


def reduced(matrix: csr_array, width: int = WIDTH) -> Floats:
    """The leading left singular vectors times their values, the same at every call. [items, width]

    Where there are fewer, the rest is zero.
    """
    rank = min(width, min(matrix.shape) - 1)
    found = np.zeros((matrix.shape[0], width), np.float32)
    # randomised, and not ARPACK, which draws by itself where values are equal
    found[:, :rank] = TruncatedSVD(rank, n_iter=7, random_state=0).fit_transform(matrix)
    return found


def sentence_vectors(corpus: Corpus, items: Ints, weights: Path) -> Floats:
    """Sentence-BERT vectors of items' texts, of which the corpus keeps 31 tokens. [items, width]

    Args:
        weights: folder of a sentence-transformers model; nothing is downloaded.

    Raises:
        TransferError: the package or the weights are missing.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise TransferError(
            "sentence-transformers is not installed: pip install clue-scaling[text]"
        ) from None
    _check(weights)
    model = SentenceTransformer(str(weights), local_files_only=True)
    own = tokenizer.load(corpus.path / "tokenizer.json")
    tokens, offsets = corpus.item_tokens(items)
    ends = offsets.tolist()
    texts = [tokens[a + 1 : b].tolist() for a, b in pairwise(ends)]
    found: Floats = model.encode(own.decode_batch(texts), convert_to_numpy=True)
    return found.astype(np.float32)


def weights_digest(weights: Path) -> str:
    """Digest of a sentence-transformers model: of its files' names below the folder and their
    content, hidden ones left out.

    Raises:
        TransferError: there is no model.
    """
    _check(weights)
    files = {p.relative_to(weights): p for p in weights.rglob("*") if p.is_file()}
    digests = {
        str(name): sha256(p)
        for name, p in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    return short_digest(canonical_json(digests))


def _check(weights: Path) -> None:
    if not (weights / "modules.json").is_file():
        raise TransferError(f"{weights}: not a folder of a sentence-transformers model")
