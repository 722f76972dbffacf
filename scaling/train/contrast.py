"""The contrastive loss over ranks, and the gradient that each rank sends through its own encoder.

Every rank embeds its own users, all embeddings are gathered without a gradient, and the loss is
computed on those copies. What a rank then takes for the gradient of its own embeddings is the mode
``RunConfig.gather``. DeepSpeed averages gradients over the W ranks afterwards.

    exact      The whole loss on every rank; the gradient of a rank's own users, times W. Equal to
               one process with the whole batch.
    detached   The same without the factor W, as open_clip's default (``local_loss=False,
               gather_with_grad=False``): encoder gradients are 1/W of the exact ones, the logit
               scale's are whole, so that the mix the clip sees depends on W.
    local      A rank's own users against all candidates, which are constants (open_clip's
               ``local_loss=True, gather_with_grad=False``): no gradient as a candidate.
    none       A rank's own users among themselves; nothing is gathered.

The paper uses "only the subset of the pairwise similarities residing on an individual GPU" for that
GPU's gradient (Shin et al. 2023, Appendix B), which fits ``detached`` as well as ``local``.
"""

from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.config import RunConfig
from scaling.models.losses import contrastive_loss, scale
from scaling.train.ranks import Ranks


@dataclass(frozen=True)
class Contrast:
    """Loss of a step, and its gradients as this rank's encoder gets them."""

    loss: Tensor
    """Mean over all users of the batch, the same on every rank. [nats]"""
    projected: Tensor
    """With respect to f(z) of this rank's users. [views, users, d]"""
    logit_scale: Tensor
    """With respect to the log of tau. [1]"""

    def surrogate(self, own: Tensor, parameter: Tensor) -> Tensor:
        """A scalar whose gradient is the loss's, for an engine that starts from a scalar.

        Args:
            own: f(z) of this rank's users, with its graph. [views, users, d]
            parameter: the model's logit scale. [1]
        """
        through = (own.float() * self.projected).sum()
        return through + (parameter.float() * self.logit_scale).sum()


def contrast(own: Tensor, logit_scale: Tensor, config: RunConfig, ranks: Ranks) -> Contrast:
    """Loss and gradients of one step; every rank calls it.

    Args:
        own: f(z) of this rank's users. [views, users, d]
        logit_scale: log of tau, in fp32. [1]
    """
    users, first = own.shape[1], ranks.rank * own.shape[1]
    tau = logit_scale.detach().clone().requires_grad_()
    leaf = own.detach().float()
    if config.gather == "none":
        leaf.requires_grad_()
        loss = contrastive_loss(leaf, tau, config.negatives)
    elif config.gather == "local":
        everyone = ranks.gather(leaf, dim=1)
        leaf.requires_grad_()
        loss = _own_rows(leaf, everyone, tau, config.negatives, first)
    else:
        leaf = ranks.gather(leaf, dim=1).requires_grad_()
        loss = contrastive_loss(leaf, tau, config.negatives)
    projected, scale_gradient = torch.autograd.grad(loss, (leaf, tau))
    value = loss.detach()
    if config.gather in ("exact", "detached"):
        projected = projected[:, first : first + users]
    else:
        value = ranks.sum(value) / ranks.world_size
    if config.gather == "exact":
        projected = projected * ranks.world_size
    return Contrast(value, projected, scale_gradient)


def _own_rows(own: Tensor, everyone: Tensor, tau: Tensor, negatives: int, first: int) -> Tensor:
    """Cross-entropy of a rank's users against constant candidates, mean over both directions. []

    Args:
        own: [views, users, d]; of the chunks of K candidates they fill several or share one.
        everyone: [views, batch, d]
        first: place of the rank's first user in the batch.
    """
    views, users, d = own.shape
    k = min(negatives, users)
    place = torch.arange(first, first + users, device=own.device)
    rows = F.normalize(own, dim=-1).view(views, users // k, k, d)
    chunks = F.normalize(everyone, dim=-1).view(views, -1, negatives, d)
    candidates = chunks[:, place[::k] // negatives]
    target = place % negatives
    factor = scale(tau)
    losses = []
    for a, b in permutations(range(views), 2):
        scores = factor * rows[a] @ candidates[b].transpose(-1, -2)
        losses.append(F.cross_entropy(scores.flatten(0, 1), target))
    return torch.stack(losses).mean()
