"""Counts against the real model, PyTorch's counter and the published numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaling.config import MAX_ITEMS, MAX_TOKENS, PAPER_VOCABULARY, CorpusCard, ModelConfig
from scaling.flops import (
    PF_DAY,
    count_parameters,
    exact_flops,
    expected_flops,
    mean_items,
    mean_tokens,
    paper_flops,
    to_pf_days,
)
from scaling.models import build
from scaling.models.losses import contrastive_loss
from scaling.packing import PackedBatch

TABLE8 = ModelConfig(layers=8, d_model=720, heads=6)
SINGLE = ModelConfig(system="single", layers=32, d_model=720, heads=6)


def card(items: dict[str, dict[int, float]], tokens: dict[int, float]) -> CorpusCard:
    def histogram(shares: dict[int, float], longest: int) -> tuple[float, ...]:
        return tuple(shares.get(n, 0.0) for n in range(longest + 1))

    return CorpusCard(
        name="test",
        digest=None,
        services=tuple(items),
        vocab_size=100,
        n_users=1000,
        pool=None,
        items_per_user={s: histogram(h, MAX_ITEMS) for s, h in items.items()},
        tokens_per_item=histogram(tokens, MAX_TOKENS),
    )


# ---- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["clue", "single"])
@pytest.mark.parametrize(("layers", "d", "heads"), [(1, 8, 2), (3, 32, 1), (2, 192, 3)])
@pytest.mark.parametrize("vocabulary", [50, 1000])
@pytest.mark.parametrize("feature_dim", [None, 5])
def test_parameters_are_those_of_the_model(
    system: str, layers: int, d: int, heads: int, vocabulary: int, feature_dim: int | None
) -> None:
    shape = {"system": system, "layers": layers, "d_model": d, "heads": heads}
    config = ModelConfig.parse({**shape, "feature_dim": feature_dim}, "test")
    with torch.device("meta"):
        model = build(config, vocabulary)
    counts = count_parameters(config, vocabulary)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert counts.n_total == sum(sizes.values())

    def of(part: str) -> int:
        return sum(n for name, n in sizes.items() if part in name)

    assert counts.token_embedding == of("token_emb")
    assert counts.positions == of("position_emb")
    assert counts.n_item == sum(
        n for name, n in sizes.items() if name.startswith("item.") and "position" not in name
    )
    assert counts.n_service == sum(
        n for name, n in sizes.items() if name.startswith("service.") and "position" not in name
    )
    assert counts.reduction == of("reduce") == (5 * d if feature_dim else 0)
    assert counts.projection == of("w1") + of("w2")
    assert counts.logit_scale == 1
    assert counts.n_non_embedding == counts.n_total - of("_emb.weight")


def test_table_8_counts_137_million() -> None:
    counts = count_parameters(TABLE8, PAPER_VOCABULARY)
    blocks = 2 * 8 * 6_230_160  # a layer at width 720, feed-forward 2,880
    assert counts.n_total == blocks + 50_257 * 720 + (32 + 512) * 720 + 4 * 720 + 2 * 720**2 + 1
    assert counts.n_total == 137_298_961
    assert counts.n_non_embedding == 100_722_241


def test_a_reduction_by_hand() -> None:
    """Table 6, 2,160 to 300 in three services: 720 to 100 in each."""
    reduced = count_parameters(TABLE8.model_copy(update={"feature_dim": 100}), PAPER_VOCABULARY)
    whole = count_parameters(TABLE8, PAPER_VOCABULARY)
    assert reduced.n_total == whole.n_total - 2 * 720**2 + 720 * 100 + 2 * 100**2
    assert reduced.n_non_embedding == whole.n_non_embedding - 1_036_800 + 92_000
    assert (reduced.n_item, reduced.n_service) == (whole.n_item, whole.n_service)


def test_the_single_transformer_s_235_million_are_blocks_and_token_table() -> None:
    counts = count_parameters(SINGLE, PAPER_VOCABULARY)
    final_norm = 2 * 720
    assert round((counts.item - final_norm + counts.token_embedding) / 1e6) == 236
    assert 235e6 < counts.item - final_norm + counts.token_embedding < 236e6
    assert counts.n_total == 238_062_961
    assert counts.n_service == 0


# ---- FLOPs against PyTorch ----------------------------------------------------------------------


def uniform_batch(users: int, services: int, items: int, tokens: int) -> PackedBatch:
    """Every row and every item of one length, so that tiles are full and nothing is wasted."""
    rng = np.random.default_rng(0)
    n = users * services * items
    return PackedBatch(
        tokens=rng.integers(1, 50, n * tokens),
        token_offsets=np.arange(n + 1) * tokens,
        items=np.arange(n),
        item_offsets=np.arange(users * services + 1) * items,
        n_views=services,
    )


@pytest.mark.parametrize(
    ("system", "layers", "d", "heads", "users", "services", "items", "tokens", "negatives"),
    [
        ("clue", 2, 32, 2, 4, 2, 16, 16, 4),
        ("clue", 1, 16, 1, 6, 3, 32, 16, 3),
        ("clue", 3, 24, 3, 2, 2, 16, 32, 2),
        ("single", 2, 32, 2, 4, 2, 16, 16, 2),
    ],
)
@pytest.mark.parametrize("feature_dim", [None, 5])
def test_exact_flops_are_pytorch_s_count(
    system: str,
    layers: int,
    d: int,
    heads: int,
    users: int,
    services: int,
    items: int,
    tokens: int,
    negatives: int,
    feature_dim: int | None,
) -> None:
    shape = {"system": system, "layers": layers, "d_model": d, "heads": heads}
    config = ModelConfig.parse({**shape, "feature_dim": feature_dim}, "test")
    model = build(config, 50)
    model.train()
    batch = uniform_batch(users, services, items, tokens)
    # The math kernel: PyTorch's counter leaves out attention of the CPU's flash kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        projected = model.project(model(batch)).view(services, users, feature_dim or d)
        contrastive_loss(projected, model.logit_scale, negatives).backward()
    rows = users * services
    n_items = rows * items
    sequences, length = (rows, items * tokens) if system == "single" else (n_items, tokens)
    flops = exact_flops(
        config,
        tokens=sequences * length,
        tokens_sq=sequences * length**2,
        items=n_items,
        items_sq=rows * items**2,
        rows=rows,
        users=users,
        n_views=services,
        negatives=negatives,
    )
    assert flops.total == counter.get_total_flops()


def test_parts_by_hand() -> None:
    """One layer of width 2 on one item of 3 tokens in each of 2 rows, 1 user, 2 services."""
    config = ModelConfig(layers=1, d_model=2, heads=1)
    flops = exact_flops(
        config, tokens=6, tokens_sq=18, items=2, items_sq=2, rows=2, users=1, n_views=2,
        negatives=1,
    )  # fmt: skip
    # Forward, per token: q, k, v, out 4 x 2x2 and feed-forward 2 x 2x8 = 48 multiply-adds; per pair
    # of tokens: 2 for the score, 2 for the mix.
    assert flops.item == 3 * (2 * 48 * 6 + 2 * 4 * 18)
    assert flops.service == 3 * (2 * 48 * 2 + 2 * 4 * 2)
    assert flops.head == 3 * 2 * (2 * 2 * 2) * 2
    assert flops.loss == 3 * 2 * 2
    assert flops.total == flops.item + flops.service + flops.head + flops.loss
    # Features of width 1: 2 multiply-adds of the reduction, 1 of each of W1 and W2, 1 of a cosine.
    reduced = exact_flops(
        config.model_copy(update={"feature_dim": 1}), tokens=6, tokens_sq=18, items=2, items_sq=2,
        rows=2, users=1, n_views=2, negatives=1,
    )  # fmt: skip
    assert reduced.head == 3 * 2 * (2 + 1 + 1) * 2
    assert reduced.loss == 3 * 2 * 1
    assert (reduced.item, reduced.service) == (flops.item, flops.service)


# ---- FLOPs and PF-days of whole runs ------------------------------------------------------------


def test_the_paper_s_formula() -> None:
    """6 x parameters x batch x steps x sequence length over 8.64e19, for the run of Table 8."""
    flops = paper_flops(137_298_961, batch_size=256, steps=352_941, sequence_length=512)
    assert flops == pytest.approx(6 * 137_298_961 * 256 * 352_941 * 512, rel=1e-15)
    assert to_pf_days(flops) == pytest.approx(0.44108, abs=1e-5)
    assert PF_DAY == 1e15 * 24 * 60 * 60


@pytest.mark.parametrize("cap", [1, 3, 128, 512])
def test_means_cap_every_user_before_they_average(cap: int) -> None:
    c = card({"a": {2: 0.5, 200: 0.5}, "b": {512: 1.0}}, {4: 0.25, 8: 0.75})
    expected = ((min(2, cap) + min(200, cap)) / 2 + min(512, cap)) / 2
    assert mean_items(c, cap) == pytest.approx(expected)
    assert mean_tokens(c) == pytest.approx(7)


@pytest.mark.parametrize("system", ["clue", "single"])
def test_expected_flops_are_exact_where_all_lengths_are_equal(system: str) -> None:
    config = ModelConfig.parse({"system": system, "layers": 2, "d_model": 8, "heads": 1}, "test")
    c = card({"a": {20: 1.0}, "b": {20: 1.0}}, {5: 1.0})
    rows = 2 * 16 * 10
    items = rows * 12
    expected = expected_flops(config, c, 16, 10, items_per_user=12, negatives=8)
    length = 60 if system == "single" else 5
    exact = exact_flops(
        config,
        tokens=items * 5,
        tokens_sq=items * 5 // length * length**2,
        items=items,
        items_sq=rows * 12**2,
        rows=rows,
        users=160,
        n_views=2,
        negatives=8,
    )
    for part in ("item", "service", "head", "loss"):
        assert getattr(expected, part) == pytest.approx(getattr(exact, part))


def test_expected_flops_are_the_mean_over_drawn_logs() -> None:
    config = ModelConfig(layers=2, d_model=4, heads=1)
    c = card({"a": {1: 0.3, 40: 0.7}, "b": {3: 0.5, 9: 0.5}}, {2: 0.4, 30: 0.6})
    rng = np.random.default_rng(0)
    users, cap = 20_000, 16
    rows = {
        "a": np.minimum(rng.choice([1, 40], users, p=[0.3, 0.7]), cap),
        "b": np.minimum(rng.choice([3, 9], users), cap),
    }
    items = int(sum(r.sum() for r in rows.values()))
    lengths = rng.choice([2, 30], items, p=[0.4, 0.6])
    drawn = exact_flops(
        config,
        tokens=int(lengths.sum()),
        tokens_sq=int((lengths**2).sum()),
        items=items,
        items_sq=int(sum((r**2).sum() for r in rows.values())),
        rows=2 * users,
        users=users,
        n_views=2,
        negatives=4,
    )
    expected = expected_flops(config, c, 4, users // 4, cap, 4)
    assert expected.total == pytest.approx(drawn.total, rel=0.01)


@pytest.mark.parametrize("system", ["clue", "single"])
def test_a_service_alone_is_counted_by_the_halves_of_its_latest_logs(system: str) -> None:
    config = ModelConfig.parse({"system": system, "layers": 2, "d_model": 8, "heads": 1}, "test")
    c = card({"a": {3: 0.5, 40: 0.5}, "b": {9: 1.0}}, {5: 1.0})
    rows = [1, 2, 10, 10]  # of two users: 3 logs as 1 and 2, of 40 the latest 20
    lengths = [5 * n for n in rows] if system == "single" else [5] * sum(rows)
    exact = exact_flops(
        config, tokens=sum(lengths), tokens_sq=sum(n * n for n in lengths), items=sum(rows),
        items_sq=sum(n * n for n in rows), rows=4, users=2, n_views=2, negatives=2,
    )  # fmt: skip
    expected = expected_flops(config, c, 2, 1, 10, 2, ("a",))
    assert expected.total == pytest.approx(exact.total)
    assert mean_items(c, 10, ("a",)) == pytest.approx(sum(rows) / 4)
    assert mean_items(c, 10, ("b", "a")) == pytest.approx(((3 + 10) / 2 + 9) / 2)


def test_a_single_transformer_s_rows_end_at_2048_tokens() -> None:
    c = card({"a": {512: 1.0}, "b": {512: 1.0}}, {32: 1.0})
    flops = expected_flops(SINGLE, c, 1, 1, items_per_user=512, negatives=1)
    d = 720
    assert flops.item == pytest.approx(3 * 32 * 2 * (24 * d * d * 2048 + 4 * d * 2048**2))
    assert flops.service == 0


@given(
    layers=st.integers(1, 12),
    d=st.integers(1, 64),
    batch=st.integers(2, 64),
    steps=st.integers(1, 100),
    cap=st.integers(1, 511),
    data=st.data(),
)
def test_cost_grows_with_every_factor(
    layers: int, d: int, batch: int, steps: int, cap: int, data: st.DataObject
) -> None:
    c = card({"a": {1: 0.5, 512: 0.5}, "b": {512: 1.0}}, {4: 1.0})
    feature_dim = data.draw(st.none() | st.integers(1, d - 1) if d > 1 else st.none())
    here = np.array([layers, d, batch, steps, cap])

    def cost(point: np.ndarray) -> float:
        layers, d, batch, steps, cap = point.tolist()
        model = ModelConfig(layers=layers, d_model=d, heads=1, feature_dim=feature_dim)
        return expected_flops(model, c, batch, steps, cap, batch).total

    assert all(cost(here + one) > cost(here) for one in np.eye(5, dtype=int))
