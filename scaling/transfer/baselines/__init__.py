"""Systems that a pretrained encoder is compared with: one small file each, on shared parts.

They score by inner products of a user's and an item's vector, as the heads on an encoder do, and
are trained in the same loop (``towers``), or they count. What they know of a fold is
``Problem.known``.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from scaling.data.corpus import Corpus
from scaling.transfer.problem import Problem
from scaling.transfer.texts import reduced, sentence_vectors, tfidf


@dataclass(frozen=True)
class Context:
    """What the systems of one task share."""

    corpus: Corpus
    problem: Problem
    weights: Path | None = None
    """Folder of a sentence-transformers model; None: texts are TF-IDF, reduced."""

    @cached_property
    def tfidf(self) -> csr_array:
        """TF-IDF of the catalogue, rows of unit length. [items, vocabulary]"""
        return tfidf(self.corpus, self.problem.catalogue)

    @cached_property
    def texts(self) -> NDArray[np.float32]:
        """Vectors of the catalogue's texts. [items, width]"""
        if self.weights is None:
            return reduced(self.tfidf)
        return sentence_vectors(self.corpus, self.problem.catalogue, self.weights)
