"""Batches: which users a step trains on, and their logs as a ``PackedBatch``.

The order of the data is a pure function of (seed, step), so nothing about it is ever saved, and a
run that resumes at a step sees what it would have seen.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.config import RunConfig
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.permutation import key_of, permute
from scaling.packing import PackedBatch, spans

Ints = NDArray[np.int64]
AHEAD = 2
"""Batches assembled ahead of the one in use."""


def step_users(n_users: int, batch_size: int, step: int, seed: int, shuffle: bool = True) -> Ints:
    """Users of one step, in O(batch_size) time and memory whatever ``n_users`` is. [batch_size]

    An epoch is ``n_users // batch_size`` steps: a permutation of the users, cut into whole batches.
    The remainder sits out; which users it is differs from epoch to epoch when ``shuffle``.

    Args:
        n_users: the first so many users of the corpus. [users]
        step: from 0.
        seed: of the order.
        shuffle: a new permutation every epoch; False: the same one, so that a batch is made of the
            same users whenever it comes (Shin et al. 2023, Fig. 3, right).

    Raises:
        CorpusError: a batch is larger than ``n_users``.
    """
    per_epoch = n_users // batch_size
    if not per_epoch:
        raise CorpusError(f"batch_size = {batch_size} is larger than the {n_users} users to draw")
    epoch, place = divmod(step, per_epoch)
    key = key_of("order", seed, epoch if shuffle else 0)
    return permute(place * batch_size + np.arange(batch_size), n_users, key)


def make_batch(
    corpus: Corpus,
    users: Any,
    items_per_user: int,
    services: Sequence[str] | None = None,
    distinct: bool = False,
) -> PackedBatch:
    """The most recent logs of some users, ragged at both levels.

    Args:
        users: rows of the corpus's users. [users]
        items_per_user: cap on a user's most recent items, per service. [items]
        services: of pretraining, in the order the rows shall have; None: all, in the corpus's.
        distinct: every item once, however many logs hold it: fewer tokens to encode, the same
            user embeddings where dropout is off.
    """
    users = np.asarray(users)
    services = corpus.card.services if services is None else tuple(services)
    ragged = [latest(*corpus.users(s), users, items_per_user) for s in services]
    return pack_items(corpus, ragged, distinct)


def latest(offsets: Any, items: Any, rows: Ints, cap: int) -> tuple[Ints, Ints]:
    """Lengths and items of some rows of a ragged store, each cut to its last ``cap``."""
    ends = offsets[rows + 1].astype(np.int64)
    starts = np.maximum(ends - cap, offsets[rows].astype(np.int64))
    return ends - starts, items[spans(starts, ends - starts)].astype(np.int64)


def pack_items(corpus: Corpus, ragged: Sequence[tuple[Ints, Ints]], distinct: bool) -> PackedBatch:
    """A batch out of (lengths, items) per service, with the items' tokens looked up."""
    lengths = np.concatenate([n for n, _ in ragged])
    items = np.concatenate([i for _, i in ragged])
    if distinct:
        encoded, places = np.unique(items, return_inverse=True)
    else:
        encoded, places = items, np.arange(len(items))
    starts = corpus.token_offsets[encoded].astype(np.int64)
    sizes = corpus.token_offsets[encoded + 1].astype(np.int64) - starts
    return PackedBatch(
        tokens=corpus.tokens[spans(starts, sizes)].astype(np.int64),
        token_offsets=_offsets(sizes),
        items=places.astype(np.int64),
        item_offsets=_offsets(lengths),
        n_services=len(ragged),
    )


def _offsets(lengths: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


class Batches:
    """The batches of a run as one rank sees them.

    A rank has a contiguous share of every step's users, so that the ranks' batches, side by side,
    are the batch of a single process.

    Args:
        rank: of ``world_size`` ranks.

    Raises:
        CorpusError: the corpus is not the run's, or the ranks cannot share a batch evenly.
    """

    def __init__(self, corpus: Corpus, config: RunConfig, rank: int = 0, world_size: int = 1):
        if corpus.card.digest != config.data.corpus_digest:
            raise CorpusError(
                f"{corpus.path}: its digest is {corpus.card.digest}, "
                f"the run was planned on {config.data.corpus_digest}"
            )
        if config.batch_size % world_size:
            raise CorpusError(
                f"batch_size = {config.batch_size} cannot be shared by {world_size} ranks"
            )
        self.corpus, self.config = corpus, config
        self.n_users = corpus.card.fraction_users(config.data.data_fraction)
        share = config.batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)

    def batch(self, step: int) -> PackedBatch:
        """This rank's users of a step (from 0), their logs of all services of pretraining."""
        config = self.config
        users = step_users(self.n_users, config.batch_size, step, config.seed, config.data.shuffle)
        return make_batch(self.corpus, users[self._share], config.data.items_per_user)

    def iterate(self, first_step: int, last_step: int) -> Iterator[PackedBatch]:
        """Batches of steps ``first_step`` .. ``last_step`` - 1, made ahead by another thread."""
        steps = iter(range(first_step, last_step))
        pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            pending = deque(pool.submit(self.batch, s) for s in islice(steps, AHEAD))
            while pending:
                batch = pending.popleft().result()
                if (step := next(steps, None)) is not None:
                    pending.append(pool.submit(self.batch, step))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
