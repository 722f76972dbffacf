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

from scaling.config import SINGLE_LOGS, DataConfig, RunConfig
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.permutation import key_of, permute
from scaling.packing import PackedBatch, spans

Ints = NDArray[np.int64]
AHEAD = 4
"""Batches assembled ahead of the one in use."""
DRAWN = 4096
"""Users drawn together: of fewer, most of the time would go to calls, not to the permutation."""
THREADS = 2
"""Threads that assemble them; numpy works and waits for the disk without Python's lock."""


def step_users(
    n_users: int, batch_size: int, steps: int | Ints, seed: int, shuffle: bool = True
) -> Ints:
    """Users of one or more steps, in O(batch_size) time and memory a step whatever ``n_users`` is.

    An epoch is ``n_users // batch_size`` steps: a permutation of the users, cut into whole batches.
    The remainder sits out; which users it is differs from epoch to epoch when ``shuffle``.

    Args:
        n_users: the first so many users of the corpus. [users]
        steps: from 0, in any order.
        seed: of the order.
        shuffle: a new permutation every epoch; False: the same one, so that a batch is made of the
            same users whenever it comes (Shin et al. 2023, Fig. 3, right).

    Returns:
        Rows of users. [..., batch_size], where ``steps`` is [...]

    Raises:
        CorpusError: a batch is larger than ``n_users``.
    """
    per_epoch = n_users // batch_size
    if not per_epoch:
        raise CorpusError(f"batch_size = {batch_size} is larger than the {n_users} users to draw")
    epochs, places = np.divmod(np.asarray(steps)[..., None], per_epoch)
    keys = [key_of("order", seed, e if shuffle else 0) for e in epochs.ravel().tolist()]
    index = places * batch_size + np.arange(batch_size)
    return permute(index, n_users, np.array(keys, np.uint64).reshape(epochs.shape))


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


def views(corpus: Corpus, users: Any, data: DataConfig, distinct: bool = False) -> PackedBatch:
    """Rows that a run contrasts of some users: one of each service. A single service is contrasted
    with itself: the earlier and the later half of a user's most recent 2 S items, as the halves of
    a log are matched in UserBERT's pretraining (Wu et al. 2022).

    Args:
        users: rows of the corpus's users. [users]
        distinct: as of ``make_batch``.

    Raises:
        CorpusError: a user has one log of the single service, which has no halves.
    """
    services = data.services or corpus.card.services
    if len(services) > 1:
        return make_batch(corpus, users, data.items_per_user, services, distinct)
    users = np.asarray(users)
    lengths, items = latest(*corpus.users(services[0]), users, 2 * data.items_per_user)
    if lengths.min(initial=2) < 2:
        raise CorpusError(f"{corpus.path}: {SINGLE_LOGS.format(services[0])}")
    starts, earlier = np.cumsum(lengths) - lengths, lengths // 2
    halves = [(starts, earlier), (starts + earlier, lengths - earlier)]
    return pack_items(corpus, [(n, items[spans(s, n)]) for s, n in halves], distinct)


def latest(offsets: Any, items: Any, rows: Ints, cap: int) -> tuple[Ints, Ints]:
    """Lengths and items of some rows of a ragged store, each cut to its last ``cap``."""
    ends = offsets[rows + 1].astype(np.int64)
    starts = np.maximum(ends - cap, offsets[rows].astype(np.int64))
    return ends - starts, items[spans(starts, ends - starts)].astype(np.int64)


def pack_items(corpus: Corpus, ragged: Sequence[tuple[Ints, Ints]], distinct: bool) -> PackedBatch:
    """A batch out of (lengths, items) per service, with the items' tokens looked up."""
    lengths = np.concatenate([n for n, _ in ragged])
    items = np.concatenate([i for _, i in ragged])
    encoded, places = _distinct(items) if distinct else (items, np.arange(len(items)))
    tokens, token_offsets = corpus.item_tokens(encoded)
    return PackedBatch(
        tokens=tokens,
        token_offsets=token_offsets,
        items=places,
        item_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        n_views=len(ragged),
    )


def _distinct(items: Ints) -> tuple[Ints, Ints]:
    """``np.unique(items, return_inverse=True)``, in half the time.

    Each item is sorted as one number with its place behind it: a plain sort, which numpy does with
    vector instructions, in place of an indirect one.
    """
    bits = np.uint64(len(items).bit_length())  # 24 for 16 million behaviours: 2^40 items fit
    keys = items.astype(np.uint64)
    keys <<= bits
    keys |= np.arange(len(items), dtype=np.uint64)
    keys.sort()
    places = (keys & ((np.uint64(1) << bits) - np.uint64(1))).view(np.int64)
    keys >>= bits
    new = np.zeros(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    numbers = np.cumsum(new)
    distinct = np.empty(numbers[-1] + 1 if len(keys) else 0, np.int64)
    distinct[numbers] = keys  # faster than to select, and repeats write the same
    inverse = np.empty(len(keys), np.int64)
    inverse[places] = numbers
    return distinct, inverse


class Batches:
    """The batches of a run as one rank sees them.

    A rank has a contiguous share of every step's users, so that the ranks' batches, side by side,
    are the batch of a single process.

    Args:
        rank: of ``world_size`` ranks.
        distinct: every item of a batch once (``make_batch``).

    Raises:
        CorpusError: the corpus is not the run's, or the ranks cannot share a batch evenly.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: RunConfig,
        rank: int = 0,
        world_size: int = 1,
        distinct: bool = False,
    ):
        if corpus.card.digest != config.data.corpus_digest:
            raise CorpusError(
                f"{corpus.path}: its digest is {corpus.card.digest}, "
                f"the run was planned on {config.data.corpus_digest}"
            )
        if config.batch_size % world_size:
            raise CorpusError(
                f"batch_size = {config.batch_size} cannot be shared by {world_size} ranks"
            )
        self.corpus, self.config, self.distinct = corpus, config, distinct
        self.n_users = corpus.card.fraction_users(config.data.data_fraction)
        share = config.batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self._drawn: tuple[int, Ints] = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> PackedBatch:
        """This rank's users of a step (from 0), with the views that are contrasted."""
        return views(self.corpus, self._users(step), self.config.data, self.distinct)

    def _users(self, step: int) -> Ints:
        """This rank's users of a step; those of a few steps are drawn together."""
        config = self.config
        together = max(1, DRAWN // config.batch_size)
        block, place = divmod(step, together)
        held, users = self._drawn  # read once: another thread may put other steps there
        if held != block:
            steps = block * together + np.arange(together)
            users = step_users(
                self.n_users, config.batch_size, steps, config.seed, config.data.shuffle
            )
            users = users[:, self._share]
            self._drawn = block, users
        row: Ints = users[place]
        return row

    def iterate(self, first_step: int, last_step: int) -> Iterator[PackedBatch]:
        """Batches of steps ``first_step`` .. ``last_step`` - 1, made ahead by other threads."""
        steps = iter(range(first_step, last_step))
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="batches")
        try:
            pending = deque(pool.submit(self.batch, s) for s in islice(steps, AHEAD))
            while pending:
                batch = pending.popleft().result()
                if (step := next(steps, None)) is not None:
                    pending.append(pool.submit(self.batch, step))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
