"""The synthetic world against enumeration in plain Python, and its promises about users."""

import itertools
import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.config import ConfigError
from scaling.data.engine import DuckDB
from scaling.data.sources import LOG, read_logs, synthetic
from scaling.data.sources.synthetic import (
    Config,
    interests_of,
    log_ratio,
    logs_of,
    pool_floor,
    pool_loss,
    texts_of,
)

SMALL = Config(
    kind="synthetic",
    users=50,
    facets=2,
    interests=5,
    items_per_user=4,
    items_per_interest=12,
    distractor_words=8,
)
TINY = Config(
    kind="synthetic", users=1, facets=1, interests=2, zipf=1, noise=0.4, items_per_user=1, spread=0
)

GOLDEN = {
    "interests": [[0, 4], [0, 1], [0, 0], [3, 2]],
    "shelves": [9, 0, 0],
    "items": [0, 9, 10],
    "texts": ["seho suho luti", "suho seho novu"],
}


# --- an oracle that knows only the prose of the docstring -----------------------------------------


def law(n: int, exponent: float) -> list[float]:
    weights = [1 / rank**exponent for rank in range(1, n + 1)]
    return [w / sum(weights) for w in weights]


def view_given_interests(c: Config, view: list[int], z: tuple[int, ...]) -> float:
    """Probability of the shelves of one log, given its user's interests."""
    p, result = law(c.interests, c.zipf), 1.0
    for shelf in view:
        facet, interest = divmod(shelf, c.interests)
        own = (1 - c.noise) * (interest == z[facet])
        result *= (own + c.noise * p[interest]) / c.facets
    return result


def enumerated_log_ratio(c: Config, a: list[int], b: list[int]) -> float:
    p, pa, pb, pab = law(c.interests, c.zipf), 0.0, 0.0, 0.0
    for z in itertools.product(range(c.interests), repeat=c.facets):
        pz = math.prod(p[m] for m in z)
        la, lb = view_given_interests(c, a, z), view_given_interests(c, b, z)
        pa, pb, pab = pa + pz * la, pb + pz * lb, pab + pz * la * lb
    return math.log(pab / (pa * pb))


def tiny_joint(c: Config) -> dict[tuple[int, int], float]:
    """p(a, b) of logs of one item each, in a world of one facet."""
    p = law(c.interests, c.zipf)
    return {
        (a, b): sum(
            p[z] * view_given_interests(c, [a], (z,)) * view_given_interests(c, [b], (z,))
            for z in range(c.interests)
        )
        for a, b in itertools.product(range(c.interests), repeat=2)
    }


def expected_loss(
    joint: dict[tuple[int, int], float], score: list[list[float]], size: int
) -> float:
    """Expectation of eq. 4 over all pools of ``size`` users, by enumerating them."""
    total = 0.0
    for pool in itertools.product(joint, repeat=size):
        weight = math.prod(joint[pair] for pair in pool)
        loss = 0.0
        for a, b in pool:
            loss += math.log(sum(math.exp(score[a][k]) for _, k in pool)) - score[a][b]
            loss += math.log(sum(math.exp(score[k][b]) for k, _ in pool)) - score[a][b]
        total += weight * loss / (2 * size)
    return total


# --- the floor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 3, 50])
@pytest.mark.parametrize("noise", [0.05, 0.5, 1.0])
def test_log_ratio_is_that_of_enumeration(cap: int, noise: float) -> None:
    c = SMALL.model_copy(update={"noise": noise})
    users = np.array([3, 14, 15, 92])
    ratio = log_ratio(c, users[None], cap)[0]
    views = []
    for service in (0, 1):
        log = logs_of(c, service, users)
        whole = [log.shelves[a:b].tolist() for a, b in itertools.pairwise(log.offsets)]
        views.append([shelves[-cap:] for shelves in whole])
    for i, k in itertools.product(range(len(users)), repeat=2):
        expected = enumerated_log_ratio(c, views[0][i], views[1][k])
        assert ratio[i, k] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pool_size", [2, 3, 4])
def test_floor_is_the_exact_expectation(pool_size: int) -> None:
    joint = tiny_joint(TINY)
    best = [[enumerated_log_ratio(TINY, [a], [b]) for b in range(2)] for a in range(2)]
    exact = expected_loss(joint, best, pool_size)
    floor = pool_floor(TINY, items_per_user=1, pool_size=pool_size, n_pools=1_000)
    assert abs(floor.loss - exact) < 4 * floor.standard_error
    assert floor.standard_error < 0.02
    assert exact < math.log(pool_size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.integers(2, 3))
def test_no_score_of_two_views_is_below_the_floor(shift: list[float], pool_size: int) -> None:
    joint = tiny_joint(TINY)
    best = [[enumerated_log_ratio(TINY, [a], [b]) for b in range(2)] for a in range(2)]
    other = [[best[a][b] + shift[2 * a + b] for b in range(2)] for a in range(2)]
    lowest = expected_loss(joint, best, pool_size)
    assert expected_loss(joint, other, pool_size) >= lowest - 1e-12


def test_pool_loss_is_the_symmetric_cross_entropy() -> None:
    scores = [[0.5, -1.0, 2.0], [0.0, 0.0, 1.0], [3.0, -2.0, 0.1]]
    rows = [math.log(sum(map(math.exp, scores[i]))) - scores[i][i] for i in range(3)]
    columns = [math.log(sum(math.exp(r[i]) for r in scores)) - scores[i][i] for i in range(3)]
    assert pool_loss(np.array(scores)) == pytest.approx((sum(rows) + sum(columns)) / 6)


def test_without_information_the_floor_is_chance() -> None:
    silent = SMALL.model_copy(update={"noise": 1.0})
    floor = pool_floor(silent, items_per_user=8, pool_size=64, n_pools=2)
    assert floor.loss == pytest.approx(math.log(64))
    assert floor.standard_error == pytest.approx(0, abs=1e-12)


def test_floor_falls_with_items_and_rises_with_candidates() -> None:
    world = SMALL.model_copy(update={"interests": 20, "items_per_user": 10, "facets": 3})
    by_items = [pool_floor(world, items_per_user=s, pool_size=64).loss for s in (1, 2, 4, 8)]
    assert by_items == sorted(by_items, reverse=True)
    by_pool = [pool_floor(world, items_per_user=4, pool_size=p).loss for p in (16, 64, 256)]
    assert by_pool == sorted(by_pool)


def test_standard_error_is_the_spread_of_the_mean() -> None:
    floors = [pool_floor(SMALL, items_per_user=4, pool_size=32, seed=s) for s in range(40)]
    seen = np.std([f.loss for f in floors], ddof=1)
    assert 0.7 < np.mean([f.standard_error for f in floors]) / seen < 1.4
    longer = pool_floor(SMALL, items_per_user=4, pool_size=32, n_pools=32 * 25)
    assert longer.standard_error == pytest.approx(floors[0].standard_error / 5, rel=0.5)


def test_sure_posteriors_do_not_overflow() -> None:
    sure = Config(kind="synthetic", users=1, noise=1e-9, items_per_user=60, items_per_interest=512)
    floor = pool_floor(sure, items_per_user=512, pool_size=32, n_pools=4)
    assert 0 <= floor.loss < 0.01


def test_a_floor_needs_two_pools() -> None:
    with pytest.raises(ValueError, match="n_pools = 1"):
        pool_floor(SMALL, items_per_user=1, pool_size=2, n_pools=1)


# --- users and their logs -------------------------------------------------------------------------


def test_random_numbers_are_splitmix64() -> None:
    """First outputs for seed 1234567, as published with many implementations."""
    config = Config(kind="synthetic", users=1, seed=1_234_567)
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(synthetic._bits(config, n)) for n in range(3)] == known


def test_world_is_what_it_was() -> None:
    """A change here is another world under an old name: every result in it becomes another's."""
    users = np.arange(4)
    assert interests_of(SMALL, users).tolist() == GOLDEN["interests"]
    log = logs_of(SMALL, 0, users[:1])
    assert log.shelves.tolist() == GOLDEN["shelves"]
    assert log.items.tolist() == GOLDEN["items"]
    assert texts_of(SMALL, 1)[:2] == GOLDEN["texts"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.integers(0, 2))
def test_a_user_is_the_same_in_any_company(users: list[int], service: int) -> None:
    together = logs_of(SMALL, service, np.array(users))
    for n, user in enumerate(users):
        alone = logs_of(SMALL, service, np.array([user]))
        own = slice(together.offsets[n], together.offsets[n + 1])
        assert together.shelves[own].tolist() == alone.shelves.tolist()
        assert together.items[own].tolist() == alone.items.tolist()
        assert together.times[own].tolist() == alone.times.tolist()


def test_laws_of_interests_behaviours_and_lengths() -> None:
    world = Config(kind="synthetic", users=1, facets=2, interests=4, zipf=1.5, noise=0.3)
    users = np.arange(40_000)
    interests, p = interests_of(world, users), np.array(law(4, 1.5))
    for facet in range(2):
        assert np.bincount(interests[:, facet]) / 40_000 == pytest.approx(p, abs=0.01)
    assert abs(np.corrcoef(interests.T)[0, 1]) < 0.02

    log = logs_of(world, 1, users)
    lengths = np.diff(log.offsets)
    facet, interest = np.divmod(log.shelves, 4)
    own = interests[np.repeat(users, lengths), facet]
    assert np.bincount(facet) / len(facet) == pytest.approx([0.5, 0.5], abs=0.01)
    for z in range(4):
        expected = 0.7 * (np.arange(4) == z) + 0.3 * p
        seen = np.bincount(interest[own == z], minlength=4) / (own == z).sum()
        assert seen == pytest.approx(expected, abs=0.015)
    assert lengths.mean() == pytest.approx(20, rel=0.03)
    assert np.log(lengths).std() == pytest.approx(0.6, rel=0.05)
    assert abs(np.corrcoef(lengths, np.diff(logs_of(world, 0, users).offsets))[0, 1]) < 0.02


def test_no_user_meets_an_item_twice() -> None:
    world = SMALL.model_copy(update={"interests": 2, "facets": 1, "items_per_user": 40.0})
    users = np.arange(300)
    log = logs_of(world, 0, users)
    met = list(
        zip(
            np.repeat(users, np.diff(log.offsets)).tolist(),
            log.shelves.tolist(),
            log.items.tolist(),
            strict=True,
        )
    )
    assert len(set(met)) == len(met)
    assert np.diff(log.offsets).max() == world.items_per_interest


# --- texts ----------------------------------------------------------------------------------------


def test_services_share_no_word_and_each_text_names_its_shelf() -> None:
    words, shelf_of = [], []
    for service in (0, 1):
        texts = [t.split() for t in texts_of(SMALL, service)]
        assert {len(t) for t in texts} == {1 + SMALL.distractors}
        words.append({w for t in texts for w in t})
        met: dict[str, set[int]] = {}
        for item, text in enumerate(texts):
            for word in text:
                met.setdefault(word, set()).add(item // SMALL.items_per_interest)
        naming = {w: s.pop() for w, s in met.items() if len(s) == 1}
        shelf_of.append(naming)
        for item, text in enumerate(texts):
            assert item // SMALL.items_per_interest in [naming.get(w) for w in text]
    assert not words[0] & words[1]
    coupons = [t.split() for t in texts_of(SMALL, 2)]
    lenders = [int(t[0] in words[1]) for t in coupons]
    assert 0.3 < np.mean(lenders) < 0.7
    for item, (text, lender) in enumerate(zip(coupons, lenders, strict=True)):
        assert set(text) <= words[lender]
        named = [shelf_of[lender].get(w) for w in text]
        assert item // SMALL.items_per_interest in named


def test_large_worlds_have_enough_words() -> None:
    large = SMALL.model_copy(update={"interests": 4_000, "items_per_interest": 1, "distractors": 0})
    texts = texts_of(large, 0) + texts_of(large, 1)
    assert len(set(texts)) > 0.75 * 2 * large.shelves * large.synonyms / 2


# --- the table ------------------------------------------------------------------------------------


def test_logs_have_the_schema_and_are_those_of_a_larger_world(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def logs(name: str, config: Config) -> pd.DataFrame:
        (tmp_path / name).mkdir()
        with closing(DuckDB(tmp_path / name)) as engine:
            return read_logs(engine, config, Path()).execute()

    small = logs("small", SMALL)
    monkeypatch.setattr(synthetic, "BLOCK", 32)
    large = logs("large", SMALL.model_copy(update={"users": 80}))
    assert list(small.columns) == list(LOG)
    order = ["user", "service", "position"]
    small = small.sort_values(order, ignore_index=True)
    part = large[large.user.astype(int) < 50].sort_values(order, ignore_index=True)
    assert part[[*order, "item", "text", "time"]].equals(small[[*order, "item", "text", "time"]])
    assert set(small.service) == {"books", "clothing", "coupons"}
    assert large.user.nunique() == 80
    assert small.groupby(["user", "service"]).size().shape == (150,)
    for _, log in small.groupby(["user", "service"]):
        assert log.position.tolist() == list(range(len(log)))
        assert log.time.is_monotonic_increasing
    assert small.time.between(1_609_459_200, 1_609_459_200 + 365 * 86_400 - 1).all()
    assert small[["user", "item", "text"]].notna().all(axis=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": 0.0}, "noise = 0.0"),
        ({"services": ["books"]}, "services"),
        ({"services": ["books", "books"]}, "a service is named twice: books, books"),
        ({"borrowing": ["books"]}, "a service is named twice"),
        ({"interest": 3}, "unknown key 'interest'; valid keys: borrowing"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse({"kind": "synthetic", "users": 10, **change}, "demo.toml: [source]")
