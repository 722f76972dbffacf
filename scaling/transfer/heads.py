"""U-MLP: the downstream head on frozen features (Shin et al. 2023, Section 4).

Two towers, one for user features and one for item features, each input-512-256-128-64-output with
ReLU; the logit of a user and an item is the dot product of the towers' outputs, trained with binary
cross-entropy on targets and uniform random negatives. The paper gives no more; ours: output 64, one
fresh negative per target and epoch, Adam, early stopping on the validation users' loss.

The losses here are measured on fixed pairs, so they are comparable over encoders: each target with
each of its stored negatives, one negative weighing as much as one target. Chance is ln 2.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

HIDDEN = (512, 256, 128, 64)
OUTPUT = 64


@dataclass(frozen=True)
class HeadSettings:
    """How a head is trained; the same for every encoder of a study."""

    lr: float = 1e-3
    """Learning rate of Adam."""
    batch_size: int = 512
    """Targets per step; a user's targets stay together, so that its tower runs once. [targets]"""
    max_epochs: int = 30
    patience: int = 3
    """Epochs without a lower validation loss before training stops; the best epoch is kept."""


@dataclass(frozen=True)
class Examples:
    """Users with their targets and stored negatives, as rows of an item table."""

    users: Floats
    """User features, zero where a service is missing. [users, user_dim]"""
    rows: Ints
    """Per target its candidates: the target, then its negatives. [users, targets, 1 + negatives]"""

    def take(self, users: Ints) -> Self:
        """The examples of some users."""
        return type(self)(self.users[users], self.rows[users])


class UMLP(nn.Module):
    """The two towers, on standardised inputs."""

    def __init__(self, user_dim: int, item_dim: int) -> None:
        super().__init__()
        self.user = _tower(user_dim)
        self.item = _tower(item_dim)

    def forward(self, users: Tensor, items: Tensor, rows: Tensor) -> Tensor:
        """Logits of each user with the items in its rows.

        Args:
            users: [users, user_dim]
            items: features of the distinct items. [items, item_dim]
            rows: indices into ``items``. [users, targets, candidates]

        Returns:
            Logits. [users, targets, candidates]
        """
        queries, keys = self.user(users), self.item(items)
        logits: Tensor = torch.einsum("ud,utcd->utc", queries, keys[rows])
        return logits


def _tower(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out in HIDDEN:
        layers += [nn.Linear(width, out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, OUTPUT))


@dataclass(frozen=True)
class Standardiser:
    """Shift and scale fitted on training rows; columns constant there are only shifted."""

    mean: Floats
    scale: Floats

    @classmethod
    def fit(cls, x: Floats) -> Self:
        """Statistics of ``x`` [rows, columns]."""
        mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        constant = std <= 1e-6 * std.max(initial=0)  # rounding, which scaling would blow up
        return cls(mean.astype(np.float32), np.where(constant, 1, std).astype(np.float32))

    def __call__(self, x: Floats) -> Tensor:
        """``x`` shifted and scaled."""
        return torch.from_numpy((x - self.mean) / self.scale)


def pair_loss(logits: Tensor) -> Tensor:
    """Binary cross-entropy of every target over its pairs with each of its negatives, in nats.

    The mean over pairs of (-log sigmoid(target) - log sigmoid(-negative)) / 2; chance is ln 2.

    Args:
        logits: the target's in ``logits[..., 0]``. [..., 1 + negatives]

    Returns:
        [...]
    """
    return (softplus(-logits[..., 0]) + softplus(logits[..., 1:]).mean(-1)) / 2


def softmax_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of every target among its candidates, in nats; chance is their log count.

    Args:
        logits: the target's in ``logits[..., 0]``. [..., 1 + negatives]

    Returns:
        [...]
    """
    return logits.logsumexp(-1) - logits[..., 0]


@dataclass(frozen=True)
class Head:
    """A trained head with the statistics that standardise its inputs."""

    model: UMLP
    user_input: Standardiser
    item_input: Standardiser
    validation_loss: float
    """``pair_loss`` of the validation users at the epoch kept. [nats]"""
    epochs: int
    """Epochs trained up to the one kept."""

    @torch.no_grad()
    def logits(self, examples: Examples, items: Floats, chunk: int = 4096) -> Tensor:
        """Logits of every candidate, in fp32. [users, targets, 1 + negatives]

        Args:
            items: the item table that ``examples.rows`` points into. [items, item_dim]
            chunk: users scored at once, which bounds memory.
        """
        parts = []
        for start in range(0, len(examples.users), chunk):
            part = examples.take(np.arange(start, min(start + chunk, len(examples.users))))
            used, rows = np.unique(part.rows, return_inverse=True)
            parts.append(
                self.model(
                    self.user_input(part.users),
                    self.item_input(items[used]),
                    torch.from_numpy(rows.reshape(part.rows.shape)),
                )
            )
        return torch.cat(parts)

    def loss(self, examples: Examples, items: Floats) -> float:
        """Mean ``pair_loss`` over all targets. [nats]"""
        return float(pair_loss(self.logits(examples, items)).mean())


def fit(
    items: Floats,
    train: Examples,
    validation: Examples,
    *,
    seed: int,
    settings: HeadSettings,
) -> Head:
    """Train a head; the same arguments on the same machine give the same head, bit for bit.

    It sees nothing but its arguments: test users are not among them. User features are standardised
    over the training users, item features over the catalogue, which is known without any behaviour.
    The training negative of a target is one of its own stored negatives, drawn anew each epoch:
    they are uniform over the items that user never touched, as the test negatives are.

    Args:
        items: features of the task's catalogue. [items, item_dim]
        train: users trained on.
        validation: users whose loss stops the training.
        seed: of initialisation, order and negatives.
    """
    user_input, item_input = Standardiser.fit(train.users), Standardiser.fit(items)
    users, table = user_input(train.users), item_input(items)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMLP(users.shape[1], table.shape[1])
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr)
    n_users, n_targets, n_candidates = train.rows.shape
    per_step = max(1, settings.batch_size // n_targets)
    best = Head(model, user_input, item_input, float("inf"), 0)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    for epoch in range(1, settings.max_epochs + 1):
        order = rng.permutation(n_users)
        for start in range(0, n_users, per_step):
            batch = order[start : start + per_step]
            drawn = rng.integers(1, n_candidates, (len(batch), n_targets, 1))
            candidates = train.rows[batch]
            pairs = np.concatenate(
                [candidates[..., :1], np.take_along_axis(candidates, drawn, 2)], axis=2
            )
            used, rows = np.unique(pairs, return_inverse=True)
            logits = model(users[batch], table[used], torch.from_numpy(rows.reshape(pairs.shape)))
            optimiser.zero_grad()
            torch.autograd.backward(pair_loss(logits).mean())
            optimiser.step()
        loss = best.loss(validation, items)
        if loss < best.validation_loss:
            best = Head(model, user_input, item_input, loss, epoch)
            kept = {k: v.clone() for k, v in model.state_dict().items()}
        elif epoch - best.epochs >= settings.patience:
            break
    model.load_state_dict(kept)
    return best
