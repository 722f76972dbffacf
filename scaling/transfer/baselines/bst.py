"""Behavior Sequence Transformer (Chen et al. 2019) on the task's own logs, in two towers.

A token is a log: the frozen vector of its item's text, projected. The user's vector is the mean of
the last layer, projected; the item's comes from its text vector through the layers that an item has
on a frozen encoder (``heads``), so that the two differ in the user alone. Unlike the published
model the target is no part of the sequence: a two-tower system scores any item by one product (Shin
et al. 2023, Section 4.1). ``bst`` has the shape that their first version states (4 layers, width
128, 4 heads: 0.79M parameters in the layers), ``bst-15m`` the size of their Table 1 (4 layers of
width 512: 12.6M).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaling.config import ModelConfig
from scaling.data.batches import latest
from scaling.models.transformer import Layout, Stack, initialise
from scaling.transfer.baselines import Context, learn, perceptron, scaled
from scaling.transfer.heads import HIDDEN
from scaling.transfer.problem import Problem, Split
from scaling.transfer.scoring import ByVectors, fitted_vectors
from scaling.transfer.towers import Towers, TowerSettings

LATEST = 20
"""Most recent logs of a sequence. [logs]"""
WIDTH = 64
LARGE = ModelConfig(layers=4, d_model=512, heads=8)
SMALL = ModelConfig(layers=4, d_model=128, heads=4)
SETTINGS = TowerSettings(lr=3e-4)
"""The rate with the lower validation loss on one fold of Food, of 3e-4 and 1e-3."""


class BST(Towers):
    """A Transformer over logs, and a projection of texts."""

    texts: Tensor

    def __init__(self, config: ModelConfig, problem: Problem, texts: NDArray[np.float32]) -> None:
        super().__init__()
        self.config, self.problem = config, problem
        self.register_buffer("texts", torch.from_numpy(scaled(texts)), persistent=False)
        self.stack = Stack(config, LATEST)
        initialise(self.stack, config.layers)
        self.token = nn.Linear(texts.shape[1], config.d_model)
        self.of_user = nn.Linear(config.d_model, WIDTH)
        self.of_item = perceptron([texts.shape[1], *HIDDEN, WIDTH])
        self.nobody = nn.Parameter(torch.zeros(config.d_model))
        """Of a user without logs."""

    def user(self, examples: Tensor) -> Tensor:
        where = examples.device
        lengths, items = latest(*self.problem.history, examples[0].cpu().numpy(), LATEST)
        there = torch.from_numpy(np.flatnonzero(lengths)).to(where)
        pooled = self.nobody.expand(len(lengths), -1)
        if len(there):
            layout = Layout.of(lengths[lengths > 0], self.config.d_model, where)
            tokens = self.token(self.texts[torch.from_numpy(items).to(where)])
            pooled = pooled.index_copy(0, there, self.stack(layout.scatter(tokens), layout))
        found: Tensor = self.of_user(pooled)[None]
        return found

    def item(self, rows: Tensor) -> Tensor:
        found: Tensor = self.of_item(self.texts[rows])
        return found


def large(context: Context, split: Split, seed: int) -> ByVectors:
    """``bst-15m``."""
    return _fit(LARGE, context, split, seed)


def small(context: Context, split: Split, seed: int) -> ByVectors:
    """``bst``."""
    return _fit(SMALL, context, split, seed)


def _fit(config: ModelConfig, context: Context, split: Split, seed: int) -> ByVectors:
    problem, texts = context.problem, context.texts
    fitted = learn(problem, split, seed, lambda: BST(config, problem, texts), SETTINGS)
    return fitted_vectors(problem, fitted)
