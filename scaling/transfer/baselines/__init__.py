"""Systems that a pretrained encoder is compared with: one small file each, on shared parts.

They score by inner products of a user's and an item's vector, as the heads on an encoder do, and
are trained in the same loop (``towers``), or they count. What they know of a fold is
``Problem.known``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import nn

from scaling.data.corpus import Corpus
from scaling.transfer.problem import Problem, Split
from scaling.transfer.texts import reduced, sentence_vectors, tfidf
from scaling.transfer.towers import Fitted, Towers, TowerSettings, fit

Ints = NDArray[np.int64]


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


def learn(
    problem: Problem, split: Split, seed: int, build: Callable[[], Towers], settings: TowerSettings
) -> Fitted:
    """Towers of one fold and seed, trained; nobody else's random numbers are moved.

    Args:
        build: makes them, by torch's own generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fit(build(), problem, [split], [seed], settings)


def scaled(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors as layers expect their inputs: together of a mean square of 1. [items, width]"""
    found: NDArray[np.float32] = vectors / np.sqrt((vectors**2).mean())
    return found


def mean_vectors(
    vectors: NDArray[np.float32], rows: Ints, items: Ints, n_rows: int
) -> NDArray[np.float32]:
    """Mean vector of each row's items, zeros where it has none. [n_rows, width]

    Args:
        rows, items: of each log. [logs], [logs]
    """
    mean = np.zeros((n_rows, vectors.shape[1]), np.float32)
    np.add.at(mean, rows, vectors[items])
    mean /= np.maximum(np.bincount(rows, minlength=n_rows), 1)[:, None]
    return mean


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between. [..., first width] -> [..., last width]"""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
