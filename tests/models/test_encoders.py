"""The packed encoders against padded ones built from torch's own Transformer layers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scaling.config import MAX_TOKENS_SINGLE, ModelConfig
from scaling.flops import count_parameters, exact_flops
from scaling.models import build
from scaling.models.transformer import Layout, Stack
from scaling.packing import PackedBatch

VOCAB = 97


def make_batch(rng, row_lengths, longest=12, distinct=None):
    """A batch of rows with these many items; ``distinct`` items shared by all rows if given."""
    total = sum(row_lengths)
    n_items = distinct or total
    item_lengths = rng.integers(1, longest + 1, n_items)
    items = rng.integers(0, n_items, total) if distinct else np.arange(total)
    return PackedBatch(
        tokens=rng.integers(1, VOCAB, item_lengths.sum()),
        token_offsets=np.concatenate([[0], item_lengths.cumsum()]),
        items=items,
        item_offsets=np.concatenate([[0], np.cumsum(row_lengths)]),
        n_views=2,
    )


def torch_stack(stack: Stack, config: ModelConfig):
    """The same weights in ``nn.TransformerEncoderLayer``s, called on one padded batch."""
    d = config.d_model
    layers = []
    for block in stack.layers:
        layer = nn.TransformerEncoderLayer(
            d, config.heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True
        ).double()
        layer.self_attn.in_proj_weight = block.qkv.weight
        layer.self_attn.in_proj_bias = block.qkv.bias
        layer.self_attn.out_proj.weight = block.out.weight
        layer.self_attn.out_proj.bias = block.out.bias
        for ours, theirs in (("ln1", "norm1"), ("ln2", "norm2"), ("fc1", "linear1"),
                             ("fc2", "linear2")):  # fmt: skip
            getattr(layer, theirs).weight = getattr(block, ours).weight
            getattr(layer, theirs).bias = getattr(block, ours).bias
        layers.append(layer)

    def mean_hidden(sequences):
        longest = max(len(s) for s in sequences)
        x = torch.zeros(len(sequences), longest, d, dtype=torch.float64)
        empty = torch.ones(len(sequences), longest, dtype=torch.bool)
        for i, s in enumerate(sequences):
            x[i, : len(s)] = s + stack.position_emb.weight[: len(s)]
            empty[i, : len(s)] = False
        for layer in layers:
            layer.train()  # the fast inference path zeroes padding; train mode is the plain one
            x = layer(x, src_key_padding_mask=empty)
        x = stack.ln(x)
        return torch.stack([x[i, : len(s)].mean(0) for i, s in enumerate(sequences)])

    return mean_hidden


def padded_clue(model, batch):
    """Eq. 1-3 the slow way, and the matrix that reduces what they give."""
    item_emb = torch_stack(model.item, model.config)(
        [
            model.token_emb(torch.from_numpy(batch.tokens[a:b]))
            for a, b in zip(batch.token_offsets, batch.token_offsets[1:], strict=False)
        ]
    )
    pooled = torch_stack(model.service, model.config)(
        [
            item_emb[torch.from_numpy(batch.items[a:b])]
            for a, b in zip(batch.item_offsets, batch.item_offsets[1:], strict=False)
        ]
    )
    return reduced(model, pooled)


def reduced(model, pooled):
    return pooled if model.config.feature_dim is None else pooled @ model.reduce.weight.T


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.integers(1, 20), min_size=2, max_size=8),
    shape=st.sampled_from([(1, 8, 1), (2, 12, 3), (3, 16, 4)]),
    feature_dim=st.none() | st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_packed_equals_padded_in_fp64(rows, shape, feature_dim, seed):
    layers, d, heads = shape
    rng = np.random.default_rng(seed)
    config = ModelConfig(
        layers=layers, d_model=d, heads=heads, dropout=0.0, feature_dim=feature_dim
    )
    model = build(config, VOCAB, seed).double()
    batch = make_batch(rng, rows)
    ours, theirs = model(batch), padded_clue(model, batch)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.from_numpy(rng.normal(size=ours.shape))
    gradients = [
        torch.autograd.grad((z * weight).sum(), list(model.item.parameters()))
        for z in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_distinct_items_encoded_once_give_the_same_users(rng):
    model = build(ModelConfig(layers=2, d_model=16, heads=2), VOCAB).double().eval()
    batch = make_batch(rng, [5, 1, 7, 3], distinct=4)
    lengths = batch.item_lengths[batch.items]
    spread = PackedBatch(
        tokens=np.concatenate(
            [batch.tokens[batch.token_offsets[i] : batch.token_offsets[i + 1]] for i in batch.items]
        ),
        token_offsets=np.concatenate([[0], lengths.cumsum()]),
        items=np.arange(len(batch.items)),
        item_offsets=batch.item_offsets,
        n_views=2,
    )
    assert torch.allclose(model(batch), model(spread), rtol=0, atol=1e-12)


def test_a_user_does_not_depend_on_the_others_of_the_batch(rng):
    model = build(ModelConfig(layers=2, d_model=16, heads=2), VOCAB).double().eval()
    batch = make_batch(rng, [6, 2, 9, 4])
    alone = PackedBatch(
        tokens=batch.tokens[batch.token_offsets[6] : batch.token_offsets[8]],
        token_offsets=batch.token_offsets[6:9] - batch.token_offsets[6],
        items=np.arange(2),
        item_offsets=np.array([0, 2]),
        n_views=1,
    )
    assert torch.allclose(model(batch)[1], model(alone)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("feature_dim", [None, 3])
def test_single_reads_the_most_recent_tokens_of_all_items(rng, feature_dim):
    config = ModelConfig(
        system="single", layers=1, d_model=8, heads=1, dropout=0.0, feature_dim=feature_dim
    )
    model = build(config, VOCAB).double()
    batch = make_batch(rng, [300, 3], longest=32)
    rows = []
    for a, b in zip(batch.item_offsets, batch.item_offsets[1:], strict=False):
        tokens = batch.tokens[batch.token_offsets[a] : batch.token_offsets[b]]
        rows.append(model.token_emb(torch.from_numpy(tokens[-MAX_TOKENS_SINGLE:])))
    assert len(rows[0]) == MAX_TOKENS_SINGLE
    expected = reduced(model, torch_stack(model.item, config)(rows))
    assert torch.allclose(model(batch), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("system", ["clue", "single"])
@pytest.mark.parametrize("shape", [(1, 16, 1, None), (3, 24, 2, None), (3, 24, 2, 7)])
def test_parameter_counts_are_those_of_the_model(system, shape):
    layers, d, heads, feature_dim = shape
    config = ModelConfig(
        system=system, layers=layers, d_model=d, heads=heads, feature_dim=feature_dim
    )
    model = build(config, VOCAB)
    counts = count_parameters(config, VOCAB)
    assert counts.n_total == sum(p.numel() for p in model.parameters())
    tables = {n: p.numel() for n, p in model.named_parameters() if "_emb." in n}
    assert counts.n_non_embedding == counts.n_total - sum(tables.values())
    assert counts.n_item == sum(
        p.numel() for n, p in model.item.named_parameters() if "position" not in n
    )


def test_exact_flops_are_those_torch_counts():
    """Lengths that fill tiles exactly, so that no slot is wasted and counts must be equal."""
    rng = np.random.default_rng(0)
    rows, n, length = 4, 16, 16
    batch = PackedBatch(
        tokens=rng.integers(1, VOCAB, rows * n * length),
        token_offsets=np.arange(rows * n + 1) * length,
        items=np.arange(rows * n),
        item_offsets=np.arange(rows + 1) * n,
        n_views=2,
    )
    config = ModelConfig(layers=2, d_model=32, heads=2, dropout=0.0)
    model = build(config, VOCAB)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.project(model(batch)).sum().backward()
    expected = exact_flops(
        config,
        tokens=rows * n * length,
        tokens_sq=rows * n * length**2,
        items=rows * n,
        items_sq=rows * n**2,
        rows=rows,
        users=2,
        n_views=2,
        negatives=2,
    )
    assert counter.get_total_flops() == expected.total - expected.loss


def test_initialisation_is_a_function_of_the_seed_alone():
    config = ModelConfig(layers=1, d_model=8, heads=1)
    torch.manual_seed(1)
    first = build(config, VOCAB, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = build(config, VOCAB, seed=3).state_dict(), build(config, VOCAB, 4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_emb.weight"], other["token_emb.weight"])


@pytest.mark.parametrize("system", ["clue", "single"])
def test_a_reduction_is_between_the_pooled_output_and_the_projection(rng, system):
    config = ModelConfig(system=system, layers=2, d_model=12, heads=3, dropout=0.0)
    plain, narrow = (
        build(config.model_copy(update={"feature_dim": f}), VOCAB, 3).double() for f in (None, 5)
    )
    names = [n for n, _ in plain.named_parameters()]
    assert sorted([*names, "reduce.weight"]) == sorted(n for n, _ in narrow.named_parameters())
    widths = {n: tuple(narrow.get_parameter(n).shape) for n in ("reduce.weight", "w1.weight")}
    assert widths == {"reduce.weight": (5, 12), "w1.weight": (5, 5)}
    # All else has the same shape, and with the same values the same pooled output.
    apart = ("reduce.", "w1.", "w2.")
    same = {n: p for n, p in narrow.state_dict().items() if not n.startswith(apart)}
    plain.load_state_dict(same, strict=False)
    batch = make_batch(rng, [5, 1, 9, 3])
    z = narrow(batch)
    expected = plain(batch) @ narrow.reduce.weight.T
    assert torch.allclose(z, expected, rtol=0, atol=1e-12)
    hidden = torch.nn.functional.gelu(z @ narrow.w1.weight.T)
    projected = hidden @ narrow.w2.weight.T
    assert torch.allclose(narrow.project(z), projected, rtol=0, atol=1e-12)
    items = narrow.encode_items(batch.tokens, batch.token_offsets)
    assert torch.equal(items, plain.encode_items(batch.tokens, batch.token_offsets))
    assert items.shape[1] == 12


def test_a_reduction_begins_as_the_other_linear_layers_do():
    config = ModelConfig(layers=4, d_model=256, heads=4, feature_dim=200)
    weight = build(config, VOCAB).reduce.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean().item()) < 5e-4


def test_a_sequence_longer_than_any_tile_is_refused(rng):
    model = build(ModelConfig(layers=1, d_model=8, heads=1), VOCAB)
    batch = make_batch(rng, [2049, 1], longest=1)
    with pytest.raises(ValueError, match="2049"):
        model(batch)


def test_means_in_bf16_do_not_lose_what_fp32_keeps():
    """Adding 512 ones one after another ends at 256 in bf16."""
    layout = Layout.of(np.array([512, 3]), 8, torch.device("cpu"))
    ones = torch.ones(layout.shape[0] * layout.shape[1], 8, dtype=torch.bfloat16)
    assert layout.mean(ones).dtype == torch.bfloat16
    assert torch.equal(layout.mean(ones), torch.ones(2, 8, dtype=torch.bfloat16))
