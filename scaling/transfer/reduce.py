"""Fewer dimensions for the features of a frozen encoder (Shin et al. 2023, Table 6: 2,160 -> 300).

One linear layer A_s a service, learnt after the pretraining: the contrastive objective of
pretraining (eq. 4) on the reduced features A_s z_s of pretraining users, the encoder frozen. The
reduced feature of a user is A_s z_s of the services side by side, so the layer on the whole feature
is block-diagonal; it has no bias, so a service without logs stays zeros. With one service there is
nothing to contrast: A holds the leading principal components then. With several, learning begins at
these or at the canonical directions, whichever have the lower loss on validation users: where the
services share little of their variance, gradients do not lead from the former to the latter.

The paper trains its layer with the encoder, between the pooled output and the projection head.
That is a setting of the encoder, ``ModelConfig.feature_dim``: one layer for all services, and
another pretraining. Features that are narrow by it can be reduced further here. d is the width of
z_s, ``ModelConfig.feature_width``.

    <folder>/reduction.safetensors     A_s by the service's name, fp32 [d_reduced, d]
             reduction.json            what it was learnt from, and how well
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar
from torch import Tensor

from scaling import ClueError
from scaling.config import RunConfig
from scaling.data.corpus import Corpus
from scaling.files import read_json, sha256, staging, write_json
from scaling.models.clue import INITIAL_SCALE, MAX_SCALE
from scaling.models.losses import contrastive_loss, logits, symmetric_cross_entropy
from scaling.rundir import RunDir
from scaling.train.export import exported, load_encoder
from scaling.transfer.features import device, user_features
from scaling.transfer.foreign import as_read_by

SCHEMA_VERSION = 1
BATCH = 1_024
"""Users contrasted with each other; ours."""
STEPS = 2_000
CHECKS = 20
"""Evenly spaced evaluations on validation users; the best one's A is kept."""
LEARNING_RATE = 1e-3
RIDGE = 1e-3
"""Added to a service's variances, as a share of their mean, before they are divided by; ours."""
MOST_USERS = 1 << 17
"""Pretraining users that it is learnt from at most: the first ones, whose order is a hash."""

MOST_HELD = 4_096
"""Validation users at most: all are contrasted with each other."""

Floats = NDArray[np.float32]
Progress = Callable[[int, int, float], None]


class ReductionError(ClueError):
    """Features cannot be reduced so; the message names what and what would do."""


@dataclass(frozen=True)
class Reduction:
    """A linear layer for every service."""

    matrices: Mapping[str, Floats]
    """A_s by service. [d_reduced, d]"""
    encoder_sha256: str
    """Digest of the parameters of the encoder whose features it is for."""
    sha256: str
    """Digest of its own."""

    @classmethod
    def read(cls, folder: Path) -> "Reduction":
        """Read a reduction that ``save`` wrote.

        Raises:
            RecordError: it is missing.
            ReductionError: it is of another version, or altered.
        """
        path = folder / "reduction.json"
        record = read_json(path)
        version = record.get("schema_version") if isinstance(record, dict) else None
        if version != SCHEMA_VERSION:
            raise ReductionError(
                f"{path}: schema_version = {version!r}; this program reads {SCHEMA_VERSION}"
            )
        file = folder / "reduction.safetensors"
        if not file.exists() or sha256(file) != record["sha256"]:
            raise ReductionError(f"{file}: missing, or not the file that reduction.json tells of")
        with safe_open(file, "numpy") as stored:
            matrices = {s: stored.get_tensor(s) for s in record["services"]}
        return cls(matrices, record["encoder_sha256"], record["sha256"])


@dataclass(frozen=True)
class Fitted:
    """What was learnt."""

    matrices: dict[str, Floats]
    """A_s by service. [d_reduced, d]"""
    method: str
    """``contrastive`` or ``pca``."""
    loss: float | None
    """Contrastive loss of validation users on the reduced features, tau refitted; None with one
    service. [nats]"""
    loss_pca: float | None
    """The same for the leading principal components of each service."""
    loss_canonical: float | None
    """The same for the canonical directions; the fit begins at the better of both."""
    kept_variance: dict[str, float]
    """Share of the variance of z_s that lies in the rows of A_s."""


def learn(
    run: RunDir,
    corpus: Corpus,
    dim: int,
    folder: Path,
    *,
    step: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Learn a reduction of an encoder's features from a corpus's pretraining users, and save it.

    Args:
        corpus: the run's own, or any other (as the encoder reads it).
        dim: of all services of its pretraining side by side.
        folder: new.
        step: of the export; None: the last one.

    Returns:
        What ``reduction.json`` holds.

    Raises:
        ReductionError: as ``width``; or the folder is there; or a feature is not finite.
        RecordError: there is no such export.
    """
    config = run.spec()
    services = sorted(pretrained_services(config, corpus))
    width(dim, len(services), config.model.feature_width)
    if folder.exists():
        raise ReductionError(f"{folder}: is there already; choose another folder")
    model, step = load_encoder(run, step)
    model.to(device())
    texts = as_read_by(run, corpus)

    def features(split: str, most: int) -> dict[str, Floats]:
        rows = corpus.split(split)
        stop = min(rows.stop, rows.start + most)
        logs = {
            s: (offsets[rows.start : stop + 1], items)
            for s, (offsets, items) in ((s, corpus.users(s)) for s in services)
        }
        z, _ = user_features(model, texts, logs, config.data.items_per_user)
        if not np.isfinite(z).all():
            raise ReductionError(
                f"run {run.run_key}, step {step}: its features hold NaN or infinity; did the run "
                "diverge?"
            )
        return dict(zip(services, np.split(z, len(services), axis=1), strict=True))

    train, validation = features("pretraining", MOST_USERS), features("validation", MOST_HELD)
    fitted = fit(train, validation, dim, progress=progress)
    about = {
        "run_key": run.run_key,
        "step": step,
        "encoder_sha256": read_json(exported(run)[step] / "config.json")["sha256"],
        "corpus_digest": corpus.card.digest,
        "n_users": len(train[services[0]]),
    }
    save(folder, fitted, about)
    record: dict[str, Any] = read_json(folder / "reduction.json")
    return record


def pretrained_services(config: RunConfig, corpus: Corpus) -> tuple[str, ...]:
    """Services that a reduction is learnt of: those of the run on its own corpus, else all."""
    own = corpus.card.digest == config.data.corpus_digest
    return (config.data.services if own else None) or corpus.card.services


def width(dim: int, services: int, d: int) -> int:
    """Dimensions that each service gets of ``dim``.

    Raises:
        ReductionError: ``dim`` is no multiple of the services, or not below ``services * d``.
    """
    share, left = divmod(dim, services)
    if left or not 0 < share <= d:
        raise ReductionError(
            f"{services * d} dimensions of {services} services cannot be reduced to {dim}; valid: "
            f"multiples of {services} up to {services * d}"
        )
    return share


def fit(
    train: Mapping[str, Floats],
    validation: Mapping[str, Floats],
    dim: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """Learn a reduction.

    Args:
        train: z of pretraining users by service, the same users in each. [users, d]
        validation: of validation users.
        dim: of all services side by side.
        seed: of the batches.
        progress: called with steps done, steps in all and the last loss on validation users.

    Raises:
        ReductionError: as ``width``.
    """
    names = list(train)
    share = width(dim, len(names), train[names[0]].shape[1])
    z, held = (
        torch.stack([torch.from_numpy(f[s]) for s in names]).to(device())
        for f in (train, validation)
    )
    pca = torch.stack([principal_components(of_service, share) for of_service in z])
    if len(names) == 1:
        return Fitted(_by_name(names, pca), "pca", None, None, None, _kept(names, pca, z))
    canonical = canonical_directions(z, share)
    losses = [refitted_loss(held @ start.mT) for start in (pca, canonical)]
    best, kept = min(losses), (pca, canonical)[int(np.argmin(losses))]
    layer = kept.clone().requires_grad_()
    logit_scale = torch.full((1,), math.log(INITIAL_SCALE), device=z.device, requires_grad=True)
    optimizer = torch.optim.AdamW([layer, logit_scale], lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH, z.shape[1])
    for step in range(1, STEPS + 1):
        users = torch.randperm(z.shape[1], generator=generator)[:size].to(z.device)
        loss = contrastive_loss(z[:, users] @ layer.mT, logit_scale, size)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % (STEPS // CHECKS) == 0:
            now = refitted_loss(held @ layer.detach().mT)
            if now < best:
                best, kept = now, layer.detach().clone()
            if progress:
                progress(step, STEPS, now)
    return Fitted(
        _by_name(names, kept),
        "contrastive",
        best,
        losses[0],
        losses[1],
        _kept(names, kept, z),
    )


def principal_components(z: Tensor, count: int) -> Tensor:
    """The leading ``count`` directions of variance, as orthonormal rows. [users, d] -> [count, d]

    Signs are fixed: the largest entry of each is positive.
    """
    centred = (z - z.mean(0)).double()
    vectors = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(1)[:, :count].mT
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    signed: Tensor = vectors * largest.sign()
    return signed.float()


def canonical_directions(z: Tensor, count: int) -> Tensor:
    """The leading ``count`` directions in which services agree, each at unit variance.

    Canonical correlations of any number of services (MAXVAR: Kettenring 1971, Biometrika 58,
    433-451), with ``RIDGE``. [services, users, d] -> [services, count, d]
    """
    services, users, d = z.shape
    centred = (z - z.mean(1, keepdim=True)).double()
    covariance = torch.einsum("sui,tuj->sitj", centred, centred) / users
    whitening = []
    for s in range(services):
        values, vectors = torch.linalg.eigh(covariance[s, :, s])
        whitening.append(vectors / (values + RIDGE * values.mean()).sqrt() @ vectors.mT)
    whiten = torch.block_diag(*whitening)  # type: ignore[no-untyped-call]
    together = whiten @ covariance.reshape(services * d, services * d) @ whiten
    leading = torch.linalg.eigh(together).eigenvectors.flip(1)[:, :count].mT
    layers: Tensor = (leading @ whiten * math.sqrt(services)).view(count, services, d)
    return layers.transpose(0, 1).float()


@torch.no_grad()
def refitted_loss(reduced: Tensor) -> float:
    """Contrastive loss over all the users given, at the tau in 1..100 that makes it least. [nats]

    It is convex in tau, so that the search ends at the only minimum.

    Args:
        reduced: [services, users, d_reduced]
    """
    cosines = logits(reduced, reduced.new_zeros(1), reduced.shape[1])
    found = minimize_scalar(
        lambda log_tau: float(symmetric_cross_entropy(cosines * math.exp(log_tau))),
        bounds=(0.0, math.log(MAX_SCALE)),
        method="bounded",
    )
    return float(found.fun)


def save(folder: Path, fitted: Fitted, about: Mapping[str, Any]) -> None:
    """Write a reduction as a new folder, by one rename.

    Args:
        about: of what it was learnt: ``run_key``, ``step``, ``encoder_sha256``, ``corpus_digest``,
            ``n_users``.
    """
    with staging(folder) as made:
        file = made / "reduction.safetensors"
        save_file({s: torch.from_numpy(a) for s, a in fitted.matrices.items()}, file)
        write_json(
            made / "reduction.json",
            {
                "schema_version": SCHEMA_VERSION,
                **about,
                "services": list(fitted.matrices),
                "dims": sum(len(a) for a in fitted.matrices.values()),
                "method": fitted.method,
                "loss": fitted.loss,
                "loss_canonical": fitted.loss_canonical,
                "loss_pca": fitted.loss_pca,
                "kept_variance": fitted.kept_variance,
                "sha256": sha256(file),
            },
        )


def _by_name(names: list[str], layer: Tensor) -> dict[str, Floats]:
    return {s: a.contiguous().cpu().numpy() for s, a in zip(names, layer, strict=True)}


def _kept(names: list[str], layer: Tensor, z: Tensor) -> dict[str, float]:
    """Share of each service's variance in the space that the layer's rows span."""
    centred = z - z.mean(1, keepdim=True)
    rows = torch.linalg.qr(layer.mT).Q
    within, whole = ((centred @ rows) ** 2).sum((1, 2)), (centred**2).sum((1, 2))
    return dict(zip(names, (within / whole).tolist(), strict=True))
