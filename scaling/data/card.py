"""The card of a corpus: its histograms, counted from a prepared one or drawn for a nominal one."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaling.config import MAX_ITEMS, MAX_TOKENS, CorpusCard, PoolConfig, short_digest
from scaling.data.corpus import SPLITS, CorpusError, blocks, load_array
from scaling.data.recipe import CorpusFile
from scaling.packing import spans


def corpus_card(
    file: CorpusFile | CorpusCard,
    folder: Path,
    digest: str,
    splits: dict[str, int],
    vocab_size: int,
) -> CorpusCard:
    """Card of a filled folder.

    Args:
        file: names the corpus and its services of pretraining.
        splits: users of pretraining, validation and pool, in the order of the store.
    """
    lengths = np.diff(load_array(folder / "items/offsets.npy").astype(np.int64))
    n_users = splits["pretraining"]
    items_per_user = {}
    token_counts = np.zeros(MAX_TOKENS + 1, np.int64)
    for service in file.services:
        offsets = load_array(folder / "users" / service / "offsets.npy")
        items = load_array(folder / "users" / service / "items.npy")
        counts = np.diff(offsets[: n_users + 1].astype(np.int64))
        items_per_user[service] = _shares(np.bincount(counts, minlength=MAX_ITEMS + 1))
        for block in blocks(int(offsets[n_users])):
            token_counts += np.bincount(lengths[items[block]], minlength=MAX_TOKENS + 1)
    pool = PoolConfig(size=splits["pool"], digest=_pool_digest(file, folder, splits))
    return CorpusCard(
        name=file.name,
        digest=digest,
        services=file.services,
        vocab_size=vocab_size,
        n_users=n_users,
        pool=pool,
        items_per_user=items_per_user,
        tokens_per_item=_shares(token_counts),
    )


def _pool_digest(file: CorpusFile | CorpusCard, folder: Path, splits: dict[str, int]) -> str:
    """Digest of the pool: its users' hashes and, per service, their logs as tokens."""
    last = sum(splits[s] for s in SPLITS)
    first = last - splits["pool"]
    offsets = load_array(folder / "items/offsets.npy")
    tokens = load_array(folder / "items/tokens.npy")
    parts = [load_array(folder / "users/keys.npy")[first:last].astype("<u8")]
    for service in file.services:
        rows = load_array(folder / "users" / service / "offsets.npy")
        items = load_array(folder / "users" / service / "items.npy")
        items = items[int(rows[first]) : int(rows[last])]
        starts = offsets[items].astype(np.int64)
        sizes = np.diff(offsets)[items].astype(np.int64)
        parts += [np.diff(rows[first : last + 1]), sizes, tokens[spans(starts, sizes)]]
    return short_digest(b"".join(p.astype("<u8").tobytes() for p in parts))


def _shares(counts: NDArray[np.int64]) -> tuple[float, ...]:
    return tuple((counts / counts.sum()).tolist())


def nominal_card(file: CorpusFile) -> CorpusCard:
    """Card of a nominal corpus: lognormal histograms with the means that its counts give.

    The behaviours are taken to be shared evenly by the services.

    Raises:
        CorpusError: the counts cannot be those of users with logs or items with tokens.
    """
    nominal = file.nominal
    if nominal is None:
        raise CorpusError(f"{file.name}: has no [nominal] statistics")
    items = nominal.n_behaviours / nominal.n_users / len(file.services)
    tokens = nominal.n_tokens / nominal.n_behaviours
    per_user = _lognormal(items, nominal.items_per_user_sigma, MAX_ITEMS, censored=False)
    per_item = _lognormal(tokens, nominal.tokens_per_item_sigma, MAX_TOKENS, censored=True)
    return CorpusCard(
        name=file.name,
        digest=None,
        services=file.services,
        vocab_size=file.tokenizer.vocab_size,
        n_users=nominal.n_users,
        pool=None,
        items_per_user=dict.fromkeys(file.services, per_user),
        tokens_per_item=per_item,
    )


def _lognormal(mean: float, sigma: float, last: int, censored: bool) -> tuple[float, ...]:
    """Shares of 0 .. ``last`` (or more) under a lognormal rounded to 1, 2, ..., of a given mean.

    Args:
        mean: of the rounded number.
        censored: ``mean`` is that after cutting at ``last``; False: before.
    """

    from scipy.optimize import brentq  # a second to import, and only nominal cards need it
    from scipy.stats import norm

    def survival(mu: float, n: NDArray[np.float64]) -> NDArray[np.float64]:
        """P(number > n)."""
        out: NDArray[np.float64] = norm.sf((np.log(n + 0.5) - mu) / sigma)
        return out

    # E[number] = 1 + sum over n >= 1 of P(number > n); far enough out for a tail below 1e-9.
    reach = last if censored else int(math.exp(math.log(mean) + 6.5 * sigma)) + last
    grid = np.arange(1, reach, dtype=np.float64)
    if not 1 < mean < reach:
        raise CorpusError(f"[nominal]: a mean of {mean:.3g} is not between 1 and {reach}")

    def excess(mu: float) -> float:
        return float(1 + survival(mu, grid).sum() - mean)

    mu = brentq(excess, -40 * sigma, math.log(reach) + 40 * sigma, xtol=1e-12)
    above = np.concatenate([[1.0], survival(mu, np.arange(1, last, dtype=np.float64)), [0.0]])
    return (0.0, *(above[:-1] - above[1:]).tolist())
