"""What a corpus holds: the counts of the paper's Table 7, lengths, popularity, padding, overlap.

Everything is about the users of pretraining; logs of validation, pool and tasks are not counted.
``summary`` reads the manifest alone. ``survey`` reads the logs in blocks, in memory of a few
numbers per item and entry of the vocabulary, whatever the number of behaviours.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.config import MAX_ITEMS, MAX_TOKENS
from scaling.data.corpus import BLOCK, SPLITS, Corpus, Progress, blocks
from scaling.data.tasks import Task
from scaling.packing import spans

Ints = NDArray[np.int64]
Texts = Callable[[Corpus, slice], tuple[Ints, Ints]]
"""Lengths and tokens of some items' texts, without their service tokens."""
QUANTILES = (10, 25, 50, 75, 90, 99)
"""Of lengths [%]."""


# ---- at once, from the manifest -----------------------------------------------------------------


def summary(corpus: Corpus) -> dict[str, Any]:
    """What the manifest and the card say; no array is read through."""
    m, card = corpus.manifest, corpus.card
    behaviours = {s: int(corpus.users(s)[0][card.n_users]) for s in card.services}
    per_user = {
        s: describe(_counts(shares, card.n_users)) for s, shares in card.items_per_user.items()
    }
    per_item = _counts(card.tokens_per_item, sum(behaviours.values()))
    return {
        "name": card.name,
        "digest": card.digest,
        "path": str(corpus.path),
        "bytes": sum(r["bytes"] for r in m["files"].values()),
        "services": list(corpus.services),
        "pretraining_services": list(card.services),
        "users": {s: m["splits"][s] for s in SPLITS},
        "items": corpus.n_items,
        "vocab_size": card.vocab_size,
        "pool_digest": card.pool.digest if card.pool else None,
        "behaviours": behaviours,
        "tokens": int(per_item @ np.arange(len(per_item))),
        "items_per_user": per_user,
        "tokens_per_item": describe(per_item),
        "tasks": m["tasks"],
        "steps": m["steps"],
        "times": m.get("times", {}),  # the first corpora had none
    }


def _counts(shares: Sequence[float], total: int) -> Ints:
    """Counts whose shares of ``total`` the card holds: exact, as a double has 15 digits."""
    counts: Ints = np.rint(np.array(shares) * total).astype(np.int64)
    return counts


def describe(counts: Ints) -> dict[str, Any]:
    """Distribution of whole numbers, given how many are 0, 1, 2, ...

    Returns:
        ``mean``, ``min``, ``max``; ``p10`` ... ``p99``: the least number that such a share of all
        do not exceed; ``histogram``: ``[from, to, count]`` in bins that double (1, 2-3, 4-7, ...).
    """
    numbers = np.flatnonzero(counts)
    n, up_to = int(counts.sum()), np.cumsum(counts)
    found: dict[str, Any] = {
        "mean": float(counts @ np.arange(len(counts)) / n),
        "min": int(numbers[0]),
        **{f"p{q}": int(np.searchsorted(100 * up_to, q * n)) for q in QUANTILES},
        "max": int(numbers[-1]),
    }
    least, most = found["min"], found["max"]
    edges = [0, *(1 << i for i in range(most.bit_length() + 1))]
    bins = [[a, min(b - 1, most), int(counts[a:b].sum())] for a, b in pairwise(edges) if b > least]
    return {**found, "histogram": bins}


# ---- from the logs ------------------------------------------------------------------------------


def survey(
    corpus: Corpus,
    batch_size: int = 256,
    items_per_user: int = 128,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What only reading the logs tells.

    Args:
        batch_size: of the batches whose padding is counted [users]; all users if they are fewer.
        items_per_user: cap of theirs. [items]
        progress: told of each stage as it begins.

    Returns:
        ``services``: per service of pretraining, and ``all`` beside ``services`` for all of them,
        the counts of Table 7, tokens per item and popularity; ``overlap`` of the services' texts;
        ``padding`` (``padding``); ``tasks``: users, and how many of them are pretrained on.
    """
    stages = (*corpus.card.services, "texts", "padding", "tasks")

    def begin(stage: str) -> None:
        if progress:
            progress(stages.index(stage), len(stages), stage)

    lengths = item_lengths(corpus)
    logs = {}
    for service in corpus.card.services:
        begin(service)
        logs[service] = item_counts(corpus, service)
    begin("texts")
    tokens = dict(
        zip(logs, token_counts(corpus, [*logs.values()], corpus.card.vocab_size), strict=True)
    )
    overlap = _overlap(corpus, logs)
    begin("padding")
    padded = padding(corpus, lengths, batch_size, items_per_user)
    begin("tasks")
    return {
        "services": {s: _service(corpus, logs[s], lengths, tokens[s]) for s in logs},
        "all": _service(corpus, _sum(logs.values()), lengths, _sum(tokens.values())),
        "overlap": overlap,
        "padding": padded,
        "tasks": {name: _task(corpus, name) for name in corpus.manifest["tasks"]},
    }


def _sum(counts: Iterable[Ints]) -> Ints:
    total: Ints = functools.reduce(np.add, counts)
    return total


def item_lengths(corpus: Corpus) -> NDArray[np.uint8]:
    """Tokens of every item, its service token included. [items]"""
    lengths = np.empty(corpus.n_items, np.uint8)
    for block in blocks(corpus.n_items):
        lengths[block] = np.diff(corpus.token_offsets[block.start : block.stop + 1])
    return lengths


def item_counts(corpus: Corpus, service: str) -> Ints:
    """Logs of every item by the users of pretraining. [items]"""
    offsets, items = corpus.users(service)
    return count_items(corpus, items[: int(offsets[corpus.card.n_users])])


def count_items(corpus: Corpus, items: NDArray[Any]) -> Ints:
    """How often each item of the corpus is among ``items``, mapped or not. [items]"""
    counts = np.zeros(corpus.n_items, np.int64)
    # a block of as many logs as there are items keeps the sums from costing more than the counting
    for block in blocks(len(items), max(BLOCK, corpus.n_items)):
        counts += np.bincount(items[block], minlength=corpus.n_items)
    return counts


def text_tokens(corpus: Corpus, block: slice) -> tuple[Ints, Ints]:
    """The texts as they are stored: ``Texts``."""
    bounds = corpus.token_offsets[block.start : block.stop + 1].astype(np.int64)
    tokens = corpus.tokens[bounds[0] : bounds[-1]].astype(np.int64)
    return np.diff(bounds) - 1, np.delete(tokens, bounds[:-1] - bounds[0])


def token_counts(
    corpus: Corpus, logs: Sequence[Ints], vocab_size: int, texts: Texts = text_tokens
) -> list[Ints]:
    """Occurrences of every token in logs, service tokens left out.

    Args:
        logs: how often each item occurs; one such array a domain. [items]
        texts: tokens of items, in a vocabulary of ``vocab_size``.

    Returns:
        One array a domain. [vocabulary]
    """
    counts = [np.zeros(vocab_size, np.int64) for _ in logs]
    for block in blocks(corpus.n_items, BLOCK // MAX_TOKENS):
        lengths, tokens = texts(corpus, block)
        for total, domain in zip(counts, logs, strict=True):
            # the weights are doubles, exact up to 2^53 occurrences in a block
            weights = np.repeat(domain[block], lengths)
            total += np.bincount(tokens, weights, vocab_size).astype(np.int64)
    return counts


def _service(
    corpus: Corpus, logs: Ints, lengths: NDArray[np.uint8], tokens: Ints
) -> dict[str, Any]:
    """Counts of Table 7 of one service or of all, and how their logs spread over items."""
    per_item = np.bincount(lengths, logs, minlength=MAX_TOKENS + 1).astype(np.int64)
    return {
        "users": corpus.card.n_users,
        "behaviours": int(logs.sum()),
        "tokens": int(per_item @ np.arange(len(per_item))),
        "vocabulary": int((tokens > 0).sum()),
        "tokens_per_item": describe(per_item),
        **popularity(logs),
    }


def popularity(logs: Ints) -> dict[str, Any]:
    """How unevenly logs spread over the items that have any.

    Args:
        logs: of every item. [items]

    Returns:
        ``items``: those with a log; ``top_1pct``, ``top_10pct``: share of the logs on the most
        popular hundredth and tenth of them, rounded up; ``gini``: 0 where all items have as many,
        towards 1 where few have nearly all.
    """
    ascending = np.sort(logs[logs > 0])
    n, total = len(ascending), int(ascending.sum())
    places = np.arange(1, n + 1, dtype=np.float64)
    return {
        "items": n,
        "top_1pct": int(ascending[-math.ceil(n / 100) :].sum()) / total,
        "top_10pct": int(ascending[-math.ceil(n / 10) :].sum()) / total,
        "gini": float(2 * (places @ ascending) / (n * total) - (n + 1) / n),
    }


def padding(
    corpus: Corpus, lengths: NDArray[np.uint8], batch_size: int, items_per_user: int
) -> dict[str, Any]:
    """Slots that padded batches would compute on, against the tokens that packed ones hold.

    The batches are an epoch in the store's order, which is that of a hash: each ``batch_size``
    users that follow one another, the remainder left out. Of a user and service the latest
    ``items_per_user`` items count. A service's batch is padded

    - ``to_longest``: as a padding collator does, every row to the batch's longest row and every
      item to its longest item;
    - ``to_caps``: as the paper does (Shin et al. 2023, Section 3: zero padding), every row to
      ``items_per_user`` items and every item to 32 tokens.

    Packed slots are the tokens; the ends of tiles, 1 to 2 %, are left out.

    Args:
        lengths: tokens of every item. [items]

    Returns:
        Per service and for ``all``: ``tokens``, the slots either way, and the share of them that
        packing avoids, ``avoided_to_longest`` and ``avoided_to_caps``.
    """
    size = min(batch_size, corpus.card.n_users)
    n_users = corpus.card.n_users // size * size
    at_once = size * max(1, BLOCK // (MAX_ITEMS * size))
    found: dict[str, Sequence[int]] = {}
    for service in corpus.card.services:
        offsets, items = corpus.users(service)
        tokens = slots = 0
        for block in blocks(n_users, at_once):
            bounds = offsets[block.start : block.stop + 1].astype(np.int64)
            rows = np.minimum(np.diff(bounds), items_per_user)
            logs = items[bounds[0] : bounds[-1]]
            kept = lengths[logs[spans(bounds[1:] - rows - bounds[0], rows)]].astype(np.int64)
            first = np.arange(0, len(rows), size)
            longest_item = np.maximum.reduceat(kept, (np.cumsum(rows) - rows)[first])
            tokens += int(kept.sum())
            slots += size * int(np.maximum.reduceat(rows, first) @ longest_item)
        found[service] = (tokens, slots, n_users * items_per_user * MAX_TOKENS)
    found["all"] = np.sum([*found.values()], axis=0).tolist()
    return {
        "batch_size": size,
        "items_per_user": items_per_user,
        **{
            name: {
                "tokens": tokens,
                "to_longest": longest,
                "to_caps": caps,
                "avoided_to_longest": 1 - tokens / longest,
                "avoided_to_caps": 1 - tokens / caps,
            }
            for name, (tokens, longest, caps) in found.items()
        },
    }


def _overlap(corpus: Corpus, logs: dict[str, Ints]) -> list[dict[str, Any]]:
    """For each service and each other: what the one shares with the other.

    Two items have the same text if they have the same tokens, at most 31. Every user of pretraining
    has logs in each of its services; services of tasks alone have no logs but those of the tasks.
    """
    keys = _text_keys(corpus)
    items = {s: corpus.service_items(s) for s in corpus.services}
    texts = {s: np.unique(keys[i]) for s, i in items.items()}
    rows = []
    for one, other in permutations(corpus.services, 2):
        shared = np.intersect1d(texts[one], texts[other], assume_unique=True)
        own = logs[one][items[one]] if one in logs else None
        on_shared = np.isin(keys[items[one]], shared)
        rows.append(
            {
                "service": one,
                "other": other,
                "users": corpus.card.n_users if {one, other} <= logs.keys() else None,
                "texts": len(texts[one]),
                "shared_texts": len(shared),
                "logs_on_shared": None if own is None else float(own[on_shared].sum() / own.sum()),
            }
        )
    return rows


def _text_keys(corpus: Corpus) -> NDArray[np.uint64]:
    """A number for the text of each item: the same for the same tokens, else by a chance of about
    2^-64 a pair. [items]"""
    draw = np.random.default_rng(0)
    of_token = draw.integers(2**64, size=corpus.card.vocab_size, dtype=np.uint64)
    at_place = draw.integers(2**64, size=MAX_TOKENS, dtype=np.uint64) | np.uint64(1)
    keys = np.zeros(corpus.n_items, np.uint64)
    for block in blocks(corpus.n_items, BLOCK // MAX_TOKENS):
        lengths, tokens = text_tokens(corpus, block)
        place = spans(np.zeros_like(lengths), lengths)
        item = np.repeat(np.arange(block.start, block.stop), lengths)
        np.add.at(keys, item, of_token[tokens] * at_place[place])
    return keys


def _task(corpus: Corpus, name: str) -> dict[str, Any]:
    task = Task.open(corpus, name)
    trained = corpus.keys[corpus.split("pretraining")]  # ascending, and the task's too
    place = np.minimum(np.searchsorted(trained, task.keys), len(trained) - 1)
    return {
        "service": task.service,
        "users": task.n_users,
        "pretrained_users": int((trained[place] == task.keys).sum()),
        "targets": task.targets.size,
    }
