"""A synthetic world of users, items and texts whose lowest possible loss is known.

**The world.** There are ``facets`` independent facets of taste. In each, a user has one of
``interests`` interests, drawn from a Zipf law: a few are common, most are rare. A behaviour picks a
facet at random, then, with probability 1 - ``noise``, the user's own interest in it, else an
interest drawn from the same Zipf law whoever the user is. An item of that interest is taken from
the service's shelf. The text of an item is one word that names its interest, among words that say
nothing, in an order that says nothing. Two services never share a naming word, so that which words
of one service mean the same as which words of another can be learnt only from users of both.

Each factor of a scaling law has its own bottleneck here. Rare interests are met only by many
unique users; more items of a user sharpen what can be inferred; a narrow model cannot keep
``facets * interests`` meanings apart; larger batches bring more users and more negatives.

**Users are unlimited**: everything about user ``i`` is a pure function of the seed and ``i``, so
the users of a smaller world are the first users of a larger one. Random numbers are SplitMix64
(Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195) at chosen counters.

**The floor** (``pool_floor``). The loss is eq. 4 of Shin et al. 2023: users 1..P, one of whose
services gave views ``a_i`` and another ``b_i``, a score ``g(a, b)`` of two views, and the mean of
the cross-entropies of ``softmax_k g(a_i, b_k)`` and of ``softmax_k g(a_k, b_i)`` at ``k = i``.
Fix an anchor ``a_i``. Its own ``b_i`` has density ``p(b | a_i)``, the P - 1 others ``p(b)``, and
the place of its own tells nothing, so given the anchor and all candidates

    p(own is k | a_i, b_1..b_P) = r(a_i, b_k) / sum_j r(a_i, b_j),
    r(a, b) = p(a, b) / (p(a) p(b)).

The expected cross-entropy of any prediction made from the anchor and the candidates is at least the
conditional entropy of this posterior, and reaches it where the prediction is the posterior: where
``g(a, b) = ln r(a, b) + c(a)`` for any ``c``. The other direction asks for ``ln r(a, b) + c(b)``.
The pointwise mutual information ``g = ln r`` is both, so it minimises both halves of eq. 4 at once,
and its expected loss is the lowest of any score of two views: the floor.

Here it is exact. Views are independent given the interests z, z factorises over facets, and the
length of a log, the facets and the choice on the shelf do not depend on z. A log tells of facet f
through the numbers ``n_m`` of its items of each interest m, whose likelihood is proportional to
``(1 + (1 - noise) / (noise p_z)) ** n_z``, and

    ln r(a, b) = sum_f ln sum_z p(z | a) p(z | b) / p(z).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import ibis
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.special import logsumexp, ndtri

from scaling.config import Count, Fraction, Frozen, Name
from scaling.data.engine import Engine
from scaling.packing import spans

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
Words = NDArray[np.uint64]

SYLLABLES = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]
START, SPAN = 1_609_459_200, 365 * 86_400
"""First moment of all logs (2021-01-01 UTC) and the time they cover. [s]"""
BLOCK = 8_192
"""Users whose logs are made at once. [users]"""

# What a random number is for; each purpose has its own stream.
INTEREST, LENGTH, FACET, NOISE, BACKGROUND, SHELF, TIME, NAMING, PLACE, DISTRACTOR, WORD = range(11)


class Config(Frozen):
    """The ``[source]`` table of a synthetic corpus."""

    kind: Literal["synthetic"]
    users: Count
    """Users 0, 1, ... of the world; each has logs in every service. [users]"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Another seed is another world: other words, other users."""
    services: Annotated[tuple[Name, ...], Field(min_length=2)] = ("books", "clothing")
    """Services that name interests with words of their own."""
    borrowing: tuple[Name, ...] = ("coupons",)
    """Services, meant for transfer, each of whose items is worded as one of ``services`` would."""
    facets: Count = 4
    interests: Annotated[int, Field(ge=2)] = 64
    """Interests of each facet."""
    zipf: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Exponent of rarity, of interests, of items on a shelf and of words that say nothing."""
    noise: Fraction = 0.2
    """Share of behaviours that do not depend on the user; at 1 nothing can be learnt."""
    items_per_user: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 20.0
    """Mean length of a log before rounding and clipping to 1..``items_per_interest``. [items]"""
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.6
    """Standard deviation of the logarithm of a log's length, which is lognormal."""
    items_per_interest: Count = 64
    """Items on the shelf of an interest in a service, and the longest log, so that no user meets
    an item twice."""
    synonyms: Count = 2
    """Words by which one service names one interest; an item bears one of them."""
    distractors: Annotated[int, Field(ge=0)] = 2
    """Words in an item's text that say nothing."""
    distractor_words: Count = 100
    """Distinct such words in each service."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.all_services)) < len(self.all_services):
            raise ValueError(f"a service is named twice: {', '.join(self.all_services)}")
        return self

    @property
    def all_services(self) -> tuple[str, ...]:
        """Services in the order of their numbers."""
        return (*self.services, *self.borrowing)

    @property
    def shelves(self) -> int:
        """Shelves of a service: one for each interest of each facet."""
        return self.facets * self.interests


# --- random numbers -------------------------------------------------------------------------------


def _bits(config: Config, purpose: int, *counters: Any) -> Words:
    """64 random bits for each (seed, purpose, counters); counters broadcast. [...]"""
    state: Any = np.uint64(config.seed)
    with np.errstate(over="ignore"):
        for counter in (purpose, *counters):
            state = state + (np.asarray(counter).astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
            state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
            state = (state ^ (state >> 27)) * 0x94D049BB133111EB
            state = state ^ (state >> 31)
    return np.asarray(state, dtype=np.uint64)


def _uniform(config: Config, purpose: int, *counters: Any) -> Floats:
    """Numbers in (0, 1), each with 53 random bits. [...]"""
    uniform: Floats = ((_bits(config, purpose, *counters) >> 11) + 0.5) * 2.0**-53
    return uniform


def _below(config: Config, n: int, purpose: int, *counters: Any) -> Ints:
    """Whole numbers in 0..n-1, all alike. [...]"""
    return (_uniform(config, purpose, *counters) * n).astype(np.int64)


def _zipf(config: Config, n: int, purpose: int, *counters: Any) -> Ints:
    """Whole numbers in 0..n-1 from the Zipf law. [...]"""
    edges = np.cumsum(zipf_law(n, config.zipf))
    return np.searchsorted(edges[:-1], _uniform(config, purpose, *counters), side="right")


def zipf_law(n: int, exponent: float) -> Floats:
    """Probabilities of ranks 1..n, proportional to ``rank ** -exponent``. [n]"""
    weights: Floats = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    law: Floats = weights / weights.sum()
    return law


# --- users and their logs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Logs:
    """Logs of some users in one service, oldest behaviour first."""

    offsets: Ints
    """User ``u`` has the behaviours ``offsets[u]`` up to ``offsets[u + 1]``. [users + 1]"""
    shelves: Ints
    """Facet and interest of each behaviour's item: facet * interests + interest. [behaviours]"""
    items: Ints
    """Place on the shelf. [behaviours]"""
    times: Ints
    """[Unix s]"""


def interests_of(config: Config, users: Ints) -> Ints:
    """The interest of each user in each facet. [users, facets]"""
    facets = np.arange(config.facets)
    return _zipf(config, config.interests, INTEREST, users[:, None], facets)


def logs_of(config: Config, service: int, users: Ints) -> Logs:
    """What users do in a service. [users]"""
    z = ndtri(_uniform(config, LENGTH, users, service))
    mean = config.items_per_user * np.exp(config.spread * z - config.spread**2 / 2)
    lengths = np.clip(np.rint(mean), 1, config.items_per_interest).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    row = np.repeat(np.arange(len(users)), lengths)
    user, nth = users[row], np.arange(len(row)) - offsets[row]

    facet = _below(config, config.facets, FACET, user, service, nth)
    own = interests_of(config, users)[row, facet]
    anyone = _zipf(config, config.interests, BACKGROUND, user, service, nth)
    is_noise = _uniform(config, NOISE, user, service, nth) < config.noise
    shelves = facet * config.interests + np.where(is_noise, anyone, own)

    # A user enters a shelf at an item that many know and goes on along it: never the same twice.
    first = _zipf(config, config.items_per_interest, SHELF, user, service, shelves)
    items = (first + _occurrence(row * config.shelves + shelves)) % config.items_per_interest
    within = (nth + _uniform(config, TIME, user, service, nth)) / lengths[row]
    return Logs(offsets, shelves, items, START + (SPAN * within).astype(np.int64))


def _occurrence(values: Ints) -> Ints:
    """How many equal values precede each value. [values]"""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    new = np.diff(ordered, prepend=ordered[0] - 1) != 0
    starts = np.flatnonzero(new)
    result = np.empty_like(values)
    result[order] = np.arange(len(values)) - starts[np.cumsum(new) - 1]
    return result


# --- items and their texts ------------------------------------------------------------------------


def texts_of(config: Config, service: int) -> list[str]:
    """The texts of a service's items, shelf by shelf. [shelves * items_per_interest]"""
    n = config.shelves * config.items_per_interest
    item, lender = np.arange(n), np.full(n, service)
    if service >= len(config.services):
        lender = _below(config, len(config.services), NAMING, service, item)
    shelf = item // config.items_per_interest
    named = shelf * config.synonyms + _below(config, config.synonyms, WORD, service, item)
    place = _below(config, config.distractors + 1, PLACE, service, item)
    naming, idle = _vocabulary(config)
    columns = []
    for slot in range(config.distractors + 1):
        other = _zipf(config, config.distractor_words, DISTRACTOR, service, item, slot)
        columns.append(np.where(place == slot, naming[lender, named], idle[lender, other]))
    return [" ".join(words) for words in zip(*columns, strict=True)]


@cache
def _vocabulary(config: Config) -> tuple[Any, Any]:
    """Naming words [services, shelves * synonyms] and words that say nothing
    [services, distractor_words]: distinct words of two or more syllables."""
    services, naming = len(config.services), config.shelves * config.synonyms
    n = services * (naming + config.distractor_words)
    syllables = 2
    while len(SYLLABLES) ** syllables < 4 * n:
        syllables += 1
    numbers = _bits(config, WORD, np.arange(2 * n)) % np.uint64(len(SYLLABLES) ** syllables)
    _, first = np.unique(numbers, return_index=True)
    digits = numbers[np.sort(first)[:n], None] // np.uint64(len(SYLLABLES)) ** np.arange(
        syllables, dtype=np.uint64
    )
    sounds = np.array(SYLLABLES, dtype=object)[(digits % len(SYLLABLES)).astype(np.int64)]
    words = sounds.sum(axis=1)
    split = services * naming
    return words[:split].reshape(services, -1), words[split:].reshape(services, -1)


# --- the table of logs ----------------------------------------------------------------------------


def logs(engine: Engine, config: Config, base: Path) -> ibis.Table:
    """All behaviours of the world's users, in the schema of logs.

    Behaviours stream into the database as numbers, a block of users at a time, and are joined there
    with their items. ``base`` is not used: there is no file to read.
    """
    table = _items(config)
    items = engine.load("synthetic_items", table.to_batches(), table.schema)
    schema = pa.schema((c, pa.int64()) for c in ("user", "number", "time", "position"))
    behaviours = engine.load("synthetic_behaviours", _behaviours(config, schema), schema)
    return behaviours.join(items, "number").select(
        "service", "item", "text", "time", "position", user=behaviours.user.cast("string")
    )


def _items(config: Config) -> pa.Table:
    shelf, place = np.divmod(
        np.arange(config.shelves * config.items_per_interest), config.items_per_interest
    )
    facet, interest = np.divmod(shelf, config.interests)
    keys = [f"{f}-{m}-{k}" for f, m, k in zip(facet, interest, place, strict=True)]
    return pa.concat_tables(
        pa.table(
            {
                "number": np.arange(len(keys)) + s * len(keys),
                "service": pa.array([service] * len(keys)),
                "item": pa.array(keys),
                "text": pa.array(texts_of(config, s)),
            }
        )
        for s, service in enumerate(config.all_services)
    )


def _behaviours(config: Config, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for start in range(0, config.users, BLOCK):
        users = np.arange(start, min(start + BLOCK, config.users))
        for s in range(len(config.all_services)):
            log = logs_of(config, s, users)
            lengths = np.diff(log.offsets)
            number = (s * config.shelves + log.shelves) * config.items_per_interest + log.items
            position = np.arange(len(number)) - np.repeat(log.offsets[:-1], lengths)
            columns = (np.repeat(users, lengths), number, log.times, position)
            yield pa.record_batch([pa.array(c) for c in columns], schema=schema)


# --- the floor ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """The lowest expected pool loss of any encoder in a world."""

    loss: float
    """Mean loss of the pools drawn. [nats]"""
    standard_error: float
    """Monte-Carlo standard error of that mean; times sqrt(n_pools), how much one pool differs."""
    n_pools: int


def pool_floor(
    config: Config, *, items_per_user: int, pool_size: int, n_pools: int = 32, seed: int = 0
) -> Floor:
    """Expected pool loss under the true posterior: the floor of every run in this world.

    Each pool has fresh users of the world, of whom the most recent ``items_per_user`` items in each
    of two services are seen. All services have the same law, so the floor holds for every pair.

    Args:
        config: the world; its number of users does not matter.
        items_per_user: cap S on a user's items in each service. [items]
        pool_size: candidates P. [users]
        n_pools: pools to average over.
        seed: another seed draws other pools.

    Raises:
        ValueError: fewer than two pools, which have no standard error.
    """
    if n_pools < 2:
        raise ValueError(f"n_pools = {n_pools}: a standard error needs at least 2")
    losses: list[float] = []
    at_once = max(1, BLOCK // pool_size)  # pools
    while len(losses) < n_pools:
        pools = seed * n_pools + len(losses) + np.arange(min(at_once, n_pools - len(losses)))
        # Far beyond any corpus, so that no user of a corpus is among them.
        users = 2**62 + pools[:, None] * pool_size + np.arange(pool_size)
        losses += [pool_loss(ratio) for ratio in log_ratio(config, users, items_per_user)]
    mean, deviation = np.mean(losses), np.std(losses, ddof=1)
    return Floor(float(mean), float(deviation / np.sqrt(n_pools)), n_pools)


def log_ratio(config: Config, users: Ints, items_per_user: int) -> Floats:
    """``ln r(a_i, b_k)`` of users' views in the first two services.

    Args:
        users: of each pool. [pools, users]
        items_per_user: cap S. [items]

    Returns:
        Row user's view in the first service against column user's in the second.
        [pools, users, users]
    """
    prior = zipf_law(config.interests, config.zipf)
    first, second = (_posterior(config, s, users.ravel(), items_per_user) for s in (0, 1))
    shape = (*users.shape, config.facets, config.interests)
    r = np.einsum(
        "pufm,pvfm->fpuv", (first / prior).reshape(shape), second.reshape(shape), optimize=True
    )
    # Where two sure posteriors exclude each other, r underflows; any tiny number says the same.
    ratio: Floats = np.log(np.maximum(r, np.finfo(np.float64).tiny)).sum(axis=0)
    return ratio


def _posterior(config: Config, service: int, users: Ints, items_per_user: int) -> Floats:
    """p(z | most recent items of a service). [users, facets, interests]"""
    log = logs_of(config, service, users)
    seen = np.minimum(np.diff(log.offsets), items_per_user)
    row = np.repeat(np.arange(len(users)), seen)
    shelves = log.shelves[spans(log.offsets[1:] - seen, seen)]
    counts = np.bincount(row * config.shelves + shelves, minlength=len(users) * config.shelves)
    prior = zipf_law(config.interests, config.zipf)
    weight = np.log1p((1 - config.noise) / (config.noise * prior))
    evidence = counts.reshape(len(users), config.facets, config.interests) * weight
    joint = evidence + np.log(prior)
    posterior: Floats = np.exp(joint - logsumexp(joint, axis=-1, keepdims=True))
    return posterior


def pool_loss(scores: Floats) -> float:
    """Eq. 4 for scores of all pairs of views in a pool, own pairs on the diagonal. [nats]"""
    own = np.diag(scores)
    return float(np.mean([(logsumexp(scores, axis=axis) - own).mean() for axis in (0, 1)]))
