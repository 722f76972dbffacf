"""Parameters, FLOPs and PF-days, from numbers alone.

Two countings stand side by side. The *paper's* (Shin et al. 2023, "Scaling Laws and
Generalization") is 6 x parameters x batch size x steps x sequence length, where the sequence length
counts items of one service. The *exact* one counts the multiply-adds that the stacks really do on
logs of their real lengths. The two differ by a factor that depends on the model (about 2 at 4M
parameters, 8 at 160M), so an exponent fitted on one axis is not the exponent on the other
(docs/decisions/0002-counting.md).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaling.config import MAX_ITEMS, MAX_TOKENS, MAX_TOKENS_SINGLE, CorpusCard, ModelConfig

PF_DAY = 8.64e19
"""FLOPs of one PF-day: 10^15 FLOP/s for 86,400 s."""


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable parameters of an encoder, by part. [parameters]"""

    token_embedding: int
    """Token table, vocabulary x d."""
    positions: int
    """Position tables of all stacks; their size does not depend on a run's lengths."""
    item: int
    """Item Transformer with its final layer norm; of system ``single``, its one stack."""
    service: int
    """Service Transformer with its final layer norm; 0 for system ``single``."""
    reduction: int
    """Layer from d to the feature width, without bias; 0 where there is none."""
    projection: int
    """W1 and W2 of f(z) = W2 sigma(W1 z), without bias."""
    logit_scale: int

    @property
    def n_item(self) -> int:
        """Item stack without its tables."""
        return self.item

    @property
    def n_service(self) -> int:
        """Service stack without its tables."""
        return self.service

    @property
    def n_non_embedding(self) -> int:
        """All but the token and position tables."""
        return self.item + self.service + self.reduction + self.projection + self.logit_scale

    @property
    def n_total(self) -> int:
        """Every trainable parameter."""
        return self.token_embedding + self.positions + self.n_non_embedding


@dataclass(frozen=True)
class ExactFlops:
    """FLOPs of training (forward and backward), by part. [FLOPs]"""

    item: float
    """Item stack; of system ``single``, its one stack."""
    service: float
    head: float
    """Reduction of the user embeddings, where there is one, and projection f(z)."""
    loss: float
    """Similarities between users' views."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.item + self.service + self.head + self.loss


@dataclass(frozen=True)
class Lengths:
    """Sums of lengths over the views of one user: what ``exact_flops`` multiplies."""

    tokens: float
    """Of items' lengths; of system ``single``, of rows' lengths. [tokens]"""
    tokens_sq: float
    """Of their squares."""
    items: float
    """Of rows' lengths. [items]"""
    items_sq: float
    """Of their squares."""
    rows: int
    """Views."""


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Count the trainable parameters of an encoder.

    A pre-LN block of width d and feed-forward width 4d has 12 d^2 + 13 d: query, key, value and
    output 4 d^2 + 4 d, feed-forward 8 d^2 + 5 d, two layer norms 4 d.

    Args:
        vocab_size: entries of the token table, pad and service tokens included.

    >>> table8 = ModelConfig(layers=8, d_model=720, heads=6)
    >>> count_parameters(table8, vocab_size=50_257).n_total
    137298961
    """
    d = model.d_model
    width = model.feature_width
    stack = model.layers * (12 * d * d + 13 * d) + 2 * d
    single = model.system == "single"
    return ParameterCounts(
        token_embedding=vocab_size * d,
        positions=(MAX_TOKENS_SINGLE if single else MAX_TOKENS + MAX_ITEMS) * d,
        item=stack,
        service=0 if single else stack,
        reduction=_reduction(model),
        projection=2 * width * width,
        logit_scale=1,
    )


def paper_flops(n_total: int, batch_size: int, steps: int, sequence_length: int) -> float:
    """FLOPs of a run by the paper's formula (Shin et al. 2023, "Scaling Laws and Generalization").

    Args:
        sequence_length: items per user and service for CLUE, tokens for a single Transformer.
    """
    return 6.0 * n_total * batch_size * steps * sequence_length


def to_pf_days(flops: float) -> float:
    """FLOPs in PF-days."""
    return flops / PF_DAY


def exact_flops(
    model: ModelConfig,
    *,
    tokens: float,
    tokens_sq: float,
    items: float,
    items_sq: float,
    rows: float,
    users: float,
    n_views: int,
    negatives: int,
) -> ExactFlops:
    """FLOPs of forward and backward over logs of given lengths.

    A matrix product of m x k by k x n counts 2 m k n FLOPs; the backward pass costs twice the
    forward pass; look-ups, norms, activations and sums count nothing, as in PyTorch's
    ``FlopCounterMode``. Per layer and sequence of length l: 2 x 12 d^2 x l for the linear maps and
    4 d l^2 for scores and mixing. Slots that only fill up a tile are not counted.

    Args:
        tokens: sum of the lengths l of the encoded items (``single``: of the rows). [tokens]
        tokens_sq: sum of l^2 over the same.
        items: sum of the lengths n of the rows; unused for ``single``. [items]
        items_sq: sum of n^2 over the rows; unused for ``single``.
        rows: users times views.
        users: users, each contrasted over every pair of views.
        n_views: views per user.
        negatives: users in one chunk of the loss.
    """
    d, width = model.d_model, model.feature_width
    block = 12 * d * d

    def stack(elements: float, elements_sq: float) -> float:
        return 3 * model.layers * (2 * block * elements + 4 * d * elements_sq)

    pairs = n_views * (n_views - 1) // 2
    return ExactFlops(
        item=stack(tokens, tokens_sq),
        service=0 if model.system == "single" else stack(items, items_sq),
        head=6 * (_reduction(model) + 2 * width * width) * rows,
        loss=pairs * 6 * users * negatives * width,
    )


def _reduction(model: ModelConfig) -> int:
    """Weights of the layer that reduces user embeddings, as many as its multiply-adds for one."""
    return 0 if model.feature_dim is None else model.d_model * model.feature_dim


def mean_items(
    card: CorpusCard, items_per_user: int, services: tuple[str, ...] | None = None
) -> float:
    """Realised items per user and view: the mean of min(n, S) over users and views. [items]

    Args:
        items_per_user: the cap S.
        services: those of pretraining that are contrasted; None: all.
    """
    views = _views(card, items_per_user, services)
    return float(np.mean([share @ lengths for share, lengths in views]))


def mean_tokens(card: CorpusCard) -> float:
    """Mean tokens of a behaviour's item, the service token included. [tokens]"""
    return _moments(card.tokens_per_item, MAX_TOKENS)[0]


def expected_flops(
    model: ModelConfig,
    card: CorpusCard,
    batch_size: int,
    steps: int,
    items_per_user: int,
    negatives: int,
    services: tuple[str, ...] | None = None,
) -> ExactFlops:
    """Expected exact FLOPs of a run, from the corpus's histograms of lengths.

    An item's length is taken as independent of its row's. For system ``single`` a row has the
    tokens of its items, at most ``MAX_TOKENS_SINGLE``; there the cap is applied to the row's mean.
    """
    users = float(batch_size) * steps
    lengths = expected_lengths(card, items_per_user, services, model.system)
    return exact_flops(
        model,
        tokens=users * lengths.tokens,
        tokens_sq=users * lengths.tokens_sq,
        items=users * lengths.items,
        items_sq=users * lengths.items_sq,
        rows=users * lengths.rows,
        users=users,
        n_views=lengths.rows,
        negatives=negatives,
    )


def expected_lengths(
    card: CorpusCard,
    items_per_user: int,
    services: tuple[str, ...] | None = None,
    system: str = "clue",
) -> Lengths:
    """Expected sums of lengths over the views of one user, from the corpus's histograms.

    Args:
        items_per_user: the cap S.
        services: those of pretraining that are contrasted; None: all.
        system: ``clue`` or ``single`` (``ModelConfig``).
    """
    token_mean, token_sq = _moments(card.tokens_per_item, MAX_TOKENS)
    variance = token_sq - token_mean**2
    tokens = tokens_sq = items = items_sq = 0.0
    views = _views(card, items_per_user, services)
    for share, n in views:
        items += float(share @ n)
        items_sq += float(share @ n**2)
        if system == "single":
            row = n * token_mean
            row_sq = n * variance + row**2
            tokens += float(share @ np.minimum(row, MAX_TOKENS_SINGLE))
            tokens_sq += float(share @ np.minimum(row_sq, MAX_TOKENS_SINGLE**2))
    if system == "clue":
        tokens, tokens_sq = items * token_mean, items * token_sq
    return Lengths(tokens, tokens_sq, items, items_sq, len(views))


def _views(
    card: CorpusCard, items_per_user: int, services: tuple[str, ...] | None
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Shares and lengths of the rows of each view (``data.batches.views``): of each service, or of
    the halves of one. [lengths], [lengths]"""
    shares = [np.asarray(card.items_per_user[s]) for s in services or card.services]
    counts = [np.arange(len(s), dtype=float) for s in shares]
    if len(shares) > 1:
        return [(s, np.minimum(n, items_per_user)) for s, n in zip(shares, counts, strict=True)]
    kept = np.minimum(counts[0], 2 * items_per_user)
    return [(shares[0], kept // 2), (shares[0], kept - kept // 2)]


def _moments(histogram: tuple[float, ...], cap: int) -> tuple[float, float]:
    """Mean and mean square of min(n, cap), where ``histogram[n]`` is the share with length n."""
    share = np.asarray(histogram)
    lengths = np.minimum(np.arange(len(share)), cap).astype(float)
    return float(share @ lengths), float(share @ lengths**2)
