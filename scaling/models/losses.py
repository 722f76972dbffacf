"""The contrastive loss of CLUE (Shin et al. 2023, eq. 4), always in fp32.

Symbols: V views, U users of the batch, K users contrasted with each other, d width.
"""

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.models.clue import MAX_SCALE


class _Scale(torch.autograd.Function):
    """exp, clamped from above. Beyond the limit a gradient that leads back passes as if from the
    limit, or the scale would stay there for good; one that leads further does not."""

    @staticmethod
    def forward(ctx: Any, logit_scale: Tensor) -> Tensor:
        free = logit_scale.exp()
        tau = free.clamp(max=MAX_SCALE)
        ctx.save_for_backward(tau, free >= MAX_SCALE)
        return tau

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        tau, beyond = ctx.saved_tensors
        found: Tensor = (gradient * tau).masked_fill(beyond & (gradient < 0), 0.0)
        return found


def scale(logit_scale: Tensor) -> Tensor:
    """tau: the exponential of the stored log, at most 100 (Appendix B). [1]"""
    tau: Tensor = _Scale.apply(logit_scale.float())  # type: ignore[no-untyped-call]
    return tau


def logits(projected: Tensor, logit_scale: Tensor, negatives: int) -> Tensor:
    """Scaled cosines between views for every pair of views and chunk of users.

    Args:
        projected: f(z) of every view and user. [V, U, d]
        logit_scale: log of tau. [1]
        negatives: K; must divide U.

    Returns:
        Row user against column user. [V (V - 1) / 2, U / K, K, K]
    """
    views, users, d = projected.shape
    unit = F.normalize(projected.float(), dim=-1).view(views, users // negatives, negatives, d)
    pairs = [unit[a] @ unit[b].transpose(-1, -2) for a, b in combinations(range(views), 2)]
    return scale(logit_scale) * torch.stack(pairs)


def contrastive_loss(projected: Tensor, logit_scale: Tensor, negatives: int) -> Tensor:
    """Symmetric cross-entropy (l_AB + l_BA) / 2, mean over users and pairs of views. [nats]

    Args as in ``logits``. At chance it is ln K.
    """
    return symmetric_cross_entropy(logits(projected, logit_scale, negatives))


def symmetric_cross_entropy(scores: Tensor) -> Tensor:
    """Mean over both directions of the cross-entropy of the diagonal. [..., K, K] -> []"""
    diagonal = scores.diagonal(dim1=-2, dim2=-1)
    forward = scores.logsumexp(dim=-1) - diagonal
    backward = scores.logsumexp(dim=-2) - diagonal
    return (forward.mean() + backward.mean()) / 2
