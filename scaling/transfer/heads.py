"""Heads on frozen features: what is trained of an encoder downstream (docs/decisions/0006).

U-MLP (Shin et al. 2023, Section 4.1): two towers, input-512-256-128-64-output with ReLU, one on the
user's features and one on the item's; the paper leaves the output open, 64 is ours. The linear
probe is LMRec's (Shin et al. 2022): one matrix a tower.

Heads of all folds and seeds are trained side by side (``towers``). Inputs are standardised: user
features over a fold's training examples, item features over the catalogue, which is known without
any behaviour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaling.config import Head
from scaling.transfer.features import device
from scaling.transfer.problem import Split
from scaling.transfer.reduce import principal_components
from scaling.transfer.towers import Towers, TowerSettings

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

HEAD = TowerSettings()
"""The same for every encoder; it is never tuned per run."""
HIDDEN = (512, 256, 128, 64)
OUTPUT = 64
FIXED_WIDTH = 64
"""Principal components that ``u-mlp-64`` sees of any features."""


@dataclass(frozen=True)
class Features:
    """Frozen features of a problem's examples and of its catalogue."""

    users: Floats
    """[examples, user_dim]"""
    items: Floats
    """[items, item_dim]"""
    beside: Floats | None = None
    """More user features, of each replica its own: another system's vectors, say.
    [replicas, examples, more]"""


class Standardised(nn.Module):
    """Features of rows, standardised for each replica and, if asked, reduced to a fixed width."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, table: Floats, fitted_on: Sequence[Ints | slice], width: int | None) -> None:
        super().__init__()
        self.table = torch.from_numpy(table).to(device())
        fits = [_fit(table[rows], width) for rows in fitted_on]
        self.register_buffer("mean", torch.stack([f[0] for f in fits])[:, None])
        self.register_buffer("matrix", torch.stack([f[1] for f in fits]))
        self.reduces = width is not None
        self.width = width or table.shape[1]

    def forward(self, rows: Tensor) -> Tensor:
        """[replicas, n] -> [replicas, n, width]"""
        x = self.table[rows] - self.mean
        return x @ self.matrix if self.reduces else x * self.matrix[:, None]


def _fit(x: Floats, width: int | None) -> tuple[Tensor, Tensor]:
    """Mean, and scales of the columns or the matrix that standardises and reduces them.

    Columns that are constant are only shifted. Components keep their relative sizes, are filled up
    with zeros where there are fewer, and are scaled together to the sum of squares of ``width``
    standardised columns, for which the layers are initialised.
    """
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    constant = std <= 1e-6 * std.max(initial=0)  # rounding, which scaling would blow up
    scale = 1 / np.where(constant, 1, std)
    if width is None:
        return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()
    standardised = (x - mean) * scale
    components = principal_components(torch.from_numpy(standardised), width).double().numpy().T
    squares = ((standardised @ components) ** 2).sum() / max(1, len(x) - 1)
    spread = np.sqrt(max(squares / width, np.finfo(np.float32).tiny))
    matrix = np.zeros((len(mean), width))
    matrix[:, : components.shape[1]] = scale[:, None] * components / spread
    return torch.from_numpy(mean).float(), torch.from_numpy(matrix).float()


def _standardise(x: Floats, rows: Ints) -> Tensor:
    mean, scale = _fit(x[rows], None)
    return (torch.from_numpy(x) - mean) * scale


class Layers(nn.Module):
    """A tower of linear layers with ReLU between, in replicas that begin as ``nn.Linear`` does."""

    def __init__(self, widths: Sequence[int], bias: bool, draws: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inner, outer in pairwise(widths):
            bound = inner**-0.5
            shape = (inner, outer)
            self.weights.append(_uniform(shape, bound, draws))
            if bias:
                self.biases.append(_uniform((1, outer), bound, draws))

    def forward(self, x: Tensor) -> Tensor:
        """[replicas, n, first width] -> [replicas, n, last width]"""
        for i, weight in enumerate(self.weights):
            x = torch.baddbmm(self.biases[i], x, weight) if len(self.biases) else x @ weight
            if i < len(self.weights) - 1:
                x = x.relu_()
        return x


def _uniform(
    shape: tuple[int, ...], bound: float, draws: Sequence[torch.Generator]
) -> nn.Parameter:
    return nn.Parameter(
        torch.stack([torch.rand(shape, generator=g) * 2 * bound - bound for g in draws])
    )


class HeadTowers(Towers):
    """A head on frozen features."""

    beside: Tensor

    def __init__(
        self, head: Head, features: Features, splits: Sequence[Split], seeds: Sequence[int]
    ) -> None:
        super().__init__()
        self.replicas = len(splits)
        width = FIXED_WIDTH if head == "u-mlp-64" else None
        self.user_input = Standardised(features.users, [s.train for s in splits], width)
        self.item_input = Standardised(features.items, [slice(None)] * len(splits), width)
        user_dim, item_dim = self.user_input.width, self.item_input.width
        if features.beside is not None:
            user_dim += features.beside.shape[2]
            parts = zip(features.beside, splits, strict=True)
            beside = torch.stack([_standardise(x, s.train) for x, s in parts])
            self.register_buffer("beside", beside)
        self.has_beside = features.beside is not None
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        if head == "linear":
            self.user_layers = Layers([user_dim, item_dim], False, draws)
            self.item_layers = Layers([item_dim, item_dim], False, draws)
        else:
            self.user_layers = Layers([user_dim, *HIDDEN, OUTPUT], True, draws)
            self.item_layers = Layers([item_dim, *HIDDEN, OUTPUT], True, draws)

    def user(self, examples: Tensor) -> Tensor:
        x = self.user_input(examples)
        if self.has_beside:
            own = torch.arange(self.replicas, device=examples.device)[:, None]
            x = torch.cat([x, self.beside[own, examples]], 2)
        found: Tensor = self.user_layers(x)
        return found

    def item(self, rows: Tensor) -> Tensor:
        x: Tensor = self.item_layers(self.item_input(rows))
        return x
