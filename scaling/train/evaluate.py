"""The loss of a run: contrastive loss over a fixed pool of unseen users, dropout off.

Losses over pools of different size or users are never compared. Beside the loss with the trained
logit scale stands the one with the scale refitted on validation users, because a scale learnt
against B negatives is off at another number of candidates.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from scaling.config import RunConfig
from scaling.data.batches import views
from scaling.data.corpus import Corpus
from scaling.models.clue import MAX_SCALE, ContrastiveEncoder
from scaling.models.losses import logits, scale, symmetric_cross_entropy
from scaling.packing import PackedBatch

CHUNK_ITEMS = 4096
"""Behaviours embedded at once: bounds the memory of an evaluation, not its result."""
PARTS = 64
"""Parts of the pool drawn for the standard error of the loss."""


class Evaluation:
    """Pool and validation users of a run, batched once, to be evaluated many times."""

    def __init__(self, corpus: Corpus, config: RunConfig) -> None:
        self.size = config.pool.size
        chunk = max(1, CHUNK_ITEMS // (config.data.items_per_user * config.data.n_views))
        self.pool = list(_chunks(corpus, "pool", config, chunk))
        self.validation = list(_chunks(corpus, "validation", config, chunk))
        self.smaller = [n for n in (16, 64, 256, 1024, 4096) if n < self.size]

    @torch.no_grad()
    def __call__(
        self,
        model: ContrastiveEncoder,
        logit_scale: Tensor,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict[str, Any] | None:
        """Evaluate an encoder; its training mode is restored.

        Args:
            logit_scale: log of tau, in fp32. [1]
            should_stop: polled between chunks of users.

        Returns:
            ``loss`` and ``loss_refit`` over the whole pool [nats], ``loss_se`` (standard error of
            ``loss`` over pools), ``accuracy`` (share of users whose match ranks first, both
            directions), ``logit_scale`` (tau), ``refit_scale``, and ``pools``: the loss at smaller
            pool sizes, as the mean over disjoint pools of that size. None if stopped on the way.
        """
        training = model.training
        model.eval()
        pool = _embed(model, self.pool, should_stop)
        validation = None if pool is None else _embed(model, self.validation, should_stop)
        model.train(training)
        if pool is None or validation is None:
            return None
        tau = logit_scale.to(pool.device)
        cosines = logits(pool, torch.zeros_like(tau), self.size)
        scores = logits(pool, tau, self.size)
        refit = _refit_scale(validation)
        best = scores.argmax(-1), scores.argmax(-2)
        target = torch.arange(self.size, device=scores.device)
        return {
            "loss": float(symmetric_cross_entropy(scores)),
            "loss_se": standard_error(scores),
            "loss_refit": float(symmetric_cross_entropy(cosines * refit)),
            "accuracy": float(torch.stack([(b == target).float().mean() for b in best]).mean()),
            "logit_scale": float(scale(tau)),
            "refit_scale": refit,
            "pools": {
                str(n): float(symmetric_cross_entropy(logits(_whole(pool, n), tau, n)))
                for n in self.smaller
            },
        }


def standard_error(scores: Tensor) -> float | None:
    """Standard error of a pool's loss, as over other pools of as many users. [nats]

    From the losses of 64 random nine tenths of the pool, drawn without replacement (with it a user
    would be its own negative). Means of m of n scatter with variance s^2 (1/m - 1/n), means of n
    over pools with s^2 / n: the jackknife that deletes d = n - m (Shao and Wu 1989). Smaller parts
    would have too few candidates where the loss is low.

    Args:
        scores: of one pool, users against users. [pairs, 1, n, n]

    Returns:
        None for a pool of fewer than 10 users.
    """
    n = scores.shape[-1]
    m = n - n // 10
    if m == n:
        return None
    rng = np.random.default_rng(0)
    drawn = np.zeros((n, PARTS))
    for k in range(PARTS):
        drawn[rng.permutation(n)[:m], k] = 1
    part = torch.from_numpy(drawn).to(scores.device)  # fp64: a part may lack a row's largest
    losses = []
    for s in (scores.double(), scores.double().transpose(-1, -2)):
        top = s.amax(dim=-1, keepdim=True)
        each = ((s - top).exp() @ part).log() + top - s.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        losses.append((each * part).sum(dim=-2).flatten(0, -2).mean(dim=0) / m)
    return float(torch.stack(losses).mean(dim=0).std()) * math.sqrt(m / (n - m))


def _chunks(corpus: Corpus, split: str, config: RunConfig, users: int) -> Iterator[PackedBatch]:
    rows = corpus.split(split)
    members = np.arange(rows.start, rows.stop)
    if split == "pool":
        members = members[: config.pool.size]
    for first in range(0, len(members), users):
        yield views(corpus, members[first : first + users], config.data, distinct=True)


def _embed(
    model: ContrastiveEncoder, batches: list[PackedBatch], should_stop: Callable[[], bool] | None
) -> Tensor | None:
    """f(z) of all users [views, users, d]; None if stopped on the way."""
    parts = []
    for batch in batches:
        if should_stop is not None and should_stop():
            return None
        projected = model.project(model(batch)).float()
        parts.append(projected.view(batch.n_views, batch.n_users, -1))
    return torch.cat(parts, dim=1)


def _whole(embedded: Tensor, n: int) -> Tensor:
    """The first users that fill whole pools of ``n``."""
    return embedded[:, : embedded.shape[1] // n * n]


def _refit_scale(validation: Tensor) -> float:
    """The scale in [1, 100] with the lowest loss over all validation users."""
    cosines = logits(validation, validation.new_zeros(1), validation.shape[1])
    found = minimize_scalar(
        lambda t: float(symmetric_cross_entropy(cosines * math.exp(t))),
        bounds=(0.0, math.log(MAX_SCALE)),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(math.exp(found.x))
