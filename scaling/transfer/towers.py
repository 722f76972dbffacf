"""Two towers and how they are trained: what every learnt downstream system shares.

A score is the inner product of a user's and an item's vector (Shin et al. 2023, Section 4.1), so an
item costs one vector whoever asks. Towers come in R replicas side by side, one for each fold and
seed, which train in one loop: a replica sees the examples of its own fold, draws by its own seed,
and stops by its own validation loss; what it learns does not depend on the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from scaling.transfer.features import device
from scaling.transfer.problem import Problem, Split

Ints = NDArray[np.int64]
Progress = Callable[[float], None]

CHUNK = 1 << 15
"""Items whose vectors are made at once, over all replicas: bounds memory, not the result."""
SCORED = 1 << 18
"""Scores of pairs made at once, for which the items' vectors are copied: bounds memory."""


@dataclass(frozen=True)
class TowerSettings:
    """How towers are trained; the same for every system and encoder of a study."""

    lr: float = 1e-3
    """Learning rate of Adam."""
    batch_size: int = 512
    """Targets per step; an example's targets stay together, so that its tower runs once."""
    max_epochs: int = 30
    patience: int = 3
    """Epochs without a lower validation loss before training stops; the best epoch is kept."""


class Towers(nn.Module):
    """Two towers in ``replicas`` replicas. With several, every parameter's first axis is theirs."""

    replicas: int = 1

    def refresh(self) -> None:
        """Compute what all vectors share, of the parameters as they are now."""

    def user(self, examples: Tensor) -> Tensor:
        """Vectors of examples. [replicas, n] -> [replicas, n, k]"""
        raise NotImplementedError

    def item(self, rows: Tensor) -> Tensor:
        """Vectors of items of the catalogue. [replicas, n] -> [replicas, n, k]"""
        raise NotImplementedError


@dataclass(frozen=True)
class Fitted:
    """Trained towers, at the best epoch of each replica."""

    towers: Towers
    validation_loss: list[float]
    """``pair_loss`` of the validation examples. [nats]"""
    epochs: list[int]
    """Epochs trained up to the one kept."""


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


def fit(
    towers: Towers,
    problem: Problem,
    splits: Sequence[Split],
    seeds: Sequence[int],
    settings: TowerSettings,
    progress: Progress | None = None,
) -> Fitted:
    """Train towers; the same arguments on the same machine give the same towers, bit for bit.

    The training negative of a target is one of its candidates, drawn anew each epoch: they are
    uniform over the items its user never touched, as the test negatives are. Where a fold has fewer
    training examples than another, some of its count twice in an epoch, so that all make as many
    steps.

    Args:
        splits: of each replica; nothing of the test examples is used.
        seeds: of the order and the negatives of each replica.
        progress: told the share of ``max_epochs`` that is over.
    """
    where = device()
    towers.to(where)
    candidates = torch.from_numpy(problem.candidates).to(where)
    draws = [np.random.default_rng(seed) for seed in seeds]
    n_targets, n_negatives = candidates.shape[1], candidates.shape[2] - 1
    per_step = max(1, settings.batch_size // n_targets)
    validation = [Pairs.of(problem, split.validation) for split in splits]
    optimiser = torch.optim.Adam(towers.parameters(), lr=settings.lr)
    constants = {name: buffer.data for name, buffer in towers.named_buffers()}
    best = Fitted(towers, [float("inf")] * len(splits), [0] * len(splits))
    kept: list[dict[str, Tensor]] = [{} for _ in splits]
    live, many = list(range(len(splits))), len(splits) > 1
    for epoch in range(1, settings.max_epochs + 1):
        towers.train()
        orders = [draws[r].permutation(splits[r].train) for r in live]
        width = max(map(len, orders))
        order = torch.from_numpy(np.stack([np.resize(o, width) for o in orders])).to(where)
        drawn = torch.from_numpy(
            np.stack([draws[r].integers(1, n_negatives + 1, (width, n_targets, 1)) for r in live])
        ).to(where)
        for start in range(0, width, per_step):
            batch = order[:, start : start + per_step]
            towers.refresh()
            rows = candidates[batch]
            negative = rows.gather(3, drawn[:, start : start + per_step])
            pairs = torch.cat([rows[..., :1], negative], 3).long()
            items = towers.item(pairs.flatten(1)).view(*pairs.shape, -1)
            logits = torch.einsum("rbk,rbtck->rbtc", towers.user(batch), items)
            optimiser.zero_grad()
            torch.autograd.backward(pair_loss(logits).mean((1, 2)).sum())
            optimiser.step()
        going = []
        towers.eval()
        losses = [float(pair_loss(x).mean()) for x in score(towers, [validation[r] for r in live])]
        for place, (r, loss) in enumerate(zip(live, losses, strict=True)):
            if loss < best.validation_loss[r]:
                best.validation_loss[r], best.epochs[r] = loss, epoch
                kept[r] = _snapshot(towers, place if many else slice(None))
            if epoch - best.epochs[r] < settings.patience:
                going.append(place)
        if progress:
            progress(epoch / settings.max_epochs)
        if not going:
            break
        if len(going) < len(live):
            live = [live[place] for place in going]
            optimiser = _drop(towers, optimiser, going)
    # Every replica's best parameters, those of dropped ones too.
    towers.replicas = len(splits)
    together = torch.stack if many else lambda parts: parts[0]
    _replace(towers, {name: together([one[name] for one in kept]) for name in kept[0]})
    for name, buffer in towers.named_buffers():
        buffer.data = constants[name]
    towers.eval()
    with torch.no_grad():
        towers.refresh()
    return best


def _snapshot(towers: Towers, one: int | slice) -> dict[str, Tensor]:
    """Parameters of one replica."""
    return {name: p.detach()[one].clone() for name, p in towers.named_parameters()}


def _drop(towers: Towers, optimiser: torch.optim.Adam, going: list[int]) -> torch.optim.Adam:
    """Leave replicas out of parameters, buffers and moments, so that they cost nothing more."""
    towers.replicas = len(going)
    for buffer in towers.buffers():
        buffer.data = buffer.data[going]
    moments = [optimiser.state[p] for p in towers.parameters()]
    _replace(towers, {name: p.detach()[going] for name, p in towers.named_parameters()})
    fresh = torch.optim.Adam(towers.parameters(), **optimiser.defaults)
    for parameter, state in zip(towers.parameters(), moments, strict=True):
        fresh.state[parameter] = {k: v if k == "step" else v[going] for k, v in state.items()}
    return fresh


def _replace(towers: Towers, values: Mapping[str, Tensor]) -> None:
    """New parameters, which may have fewer or more replicas than those before."""
    for name, value in values.items():
        owner, _, own = name.rpartition(".")
        towers.get_submodule(owner).register_parameter(own, nn.Parameter(value))


@dataclass(frozen=True)
class Pairs:
    """Examples with their candidates, and the distinct items of these."""

    examples: Ints
    used: Ints
    """Rows of the catalogue, ascending. [distinct]"""
    places: NDArray[np.int32]
    """Of every candidate in ``used``. [examples, targets, 1 + negatives]"""

    @classmethod
    def of(cls, problem: Problem, examples: Ints) -> Self:
        """The candidates of some examples."""
        used, places = np.unique(problem.candidates[examples], return_inverse=True)
        shape = (len(examples), *problem.candidates.shape[1:])
        return cls(examples, used.astype(np.int64), places.reshape(shape).astype(np.int32))


@torch.no_grad()
def score(towers: Towers, sets: Sequence[Pairs]) -> list[Tensor]:
    """Logits of every candidate, in fp32, of one set of examples for each replica.

    Returns:
        On the CPU, for each: [examples, targets, 1 + negatives]
    """
    towers.refresh()
    users = vectors(towers.user, [s.examples for s in sets], towers.replicas)
    items = vectors(towers.item, [s.used for s in sets], towers.replicas)
    found = zip(users, items, sets, strict=True)
    return [products(of_user, of_item, pairs.places) for of_user, of_item, pairs in found]


def products(users: Tensor, items: Tensor, places: NDArray[np.integer]) -> Tensor:
    """Inner products of users' vectors with those of their candidates, on the CPU.

    Args:
        users: [users, k]
        items: [items, k]
        places: rows of ``items``. [users, targets, candidates]

    Returns:
        [users, targets, candidates]
    """
    size = max(1, SCORED // places[0].size)
    parts = []
    for start in range(0, len(places), size):
        chosen = torch.from_numpy(places[start : start + size]).long().to(items.device)
        mine = users[start : start + size]
        parts.append(torch.einsum("bk,btck->btc", mine, items[chosen]).cpu())
    return torch.cat(parts)


@torch.no_grad()
def vectors(tower: Callable[[Tensor], Tensor], sets: Sequence[Ints], replicas: int) -> list[Tensor]:
    """Vectors of one set of examples or items for each replica. [entries, k] each"""
    width = max(map(len, sets))
    padded = torch.from_numpy(np.stack([np.resize(s, width) for s in sets])).to(device())
    size = max(1, CHUNK // replicas)
    parts = [tower(padded[:, start : start + size]) for start in range(0, width, size)]
    return [v[: len(s)] for v, s in zip(torch.cat(parts, 1), sets, strict=True)]
