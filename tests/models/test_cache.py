"""The embedding cache: chunks whose activations are computed again, against the whole batch."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_encoders import VOCAB, make_batch
from torch.autograd.graph import saved_tensors_hooks

from scaling.config import ModelConfig
from scaling.models import build
from scaling.models.losses import contrastive_loss
from scaling.models.transformer import chunk_bounds


def loss_and_gradients(model, batch, micro_batch_tokens):
    projected = model.project(model(batch, micro_batch_tokens))
    views = projected.view(batch.n_views, batch.n_users, -1)
    loss = contrastive_loss(views.double(), model.logit_scale, batch.n_users)
    return loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@given(
    lengths=st.lists(st.integers(1, 30), max_size=40),
    most=st.one_of(st.none(), st.integers(1, 60)),
)
def test_chunks_cover_the_sequences_in_order_and_hold_as_many_as_they_may(lengths, most):
    bounds = chunk_bounds(np.array(lengths, dtype=np.int64), most)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(lengths)
    assert all(b == a for (_, b), (a, _) in pairwise(bounds))
    for first, last in bounds:
        held = sum(lengths[first:last])
        assert most is None or held <= most or last == first + 1
        if most is not None and last < len(lengths):
            assert held + lengths[last] > most


@pytest.mark.parametrize("system", ["clue", "single"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 23, 64, 10**6])
@pytest.mark.parametrize(("distinct", "feature_dim"), [(None, None), (7, None), (7, 5)])
def test_loss_and_gradients_with_the_cache_are_those_of_the_whole_batch(
    rng, monkeypatch, system, micro_batch_tokens, distinct, feature_dim
):
    # eq. 4 is computed in fp32; here in fp64, so that 1e-12 can be asked for
    monkeypatch.setattr("scaling.models.losses.logits", logits_fp64)
    config = ModelConfig(
        system=system, layers=2, d_model=12, heads=3, dropout=0.0, feature_dim=feature_dim
    )
    model = build(config, VOCAB, 3).double()
    batch = make_batch(rng, [5, 1, 9, 3, 2, 8], distinct=distinct)
    whole, expected = loss_and_gradients(model, batch, None)
    cached, gradients = loss_and_gradients(model, batch, micro_batch_tokens)
    assert cached.item() == pytest.approx(whole.item(), rel=1e-12)
    for name, a, b in zip(dict(model.named_parameters()), gradients, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name


def logits_fp64(projected, logit_scale, negatives):
    services, users, _ = projected.shape
    assert (services, users) == (2, negatives)
    unit = torch.nn.functional.normalize(projected, dim=-1)
    scores = logit_scale.exp().clamp(max=100.0) * (unit[0] @ unit[1].T)
    return scores.view(1, 1, users, users)


@pytest.mark.parametrize("distinct", [None, 40])
def test_the_forward_pass_holds_one_chunk(rng, distinct):
    """What a pass with n chunks leaves for its backward pass is little more than 1/n of it."""
    model = build(ModelConfig(layers=4, d_model=32, heads=2, dropout=0.0), VOCAB)
    batch = make_batch(rng, [20] * 16, distinct=distinct)

    def held(micro_batch_tokens):
        storages = {p.untyped_storage()._cdata for p in model.parameters()}
        kept, total = [], 0

        def note(tensor):
            nonlocal total
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                storages.add(storage._cdata)
                kept.append(tensor)  # or its address would be used again
                total += storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda t: t):
            model(batch, micro_batch_tokens)
        return total

    elements = int(batch.item_lengths.sum()) + len(batch.items)
    assert held(elements // 8) < 0.3 * held(None)


def test_an_evaluation_in_chunks_is_the_same(rng):
    model = build(ModelConfig(layers=2, d_model=16, heads=2), VOCAB).double().eval()
    batch = make_batch(rng, [5, 1, 9, 3, 2, 8])
    with torch.no_grad():
        assert torch.allclose(model(batch, 16), model(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("system", ["clue", "single"])
def test_random_states_are_kept_of_the_device_that_draws(rng, monkeypatch, system):
    """checkpoint keeps those of its tensor arguments' devices; of a GPU, without one, none."""
    config = ModelConfig(system=system, layers=1, d_model=8, heads=1, dropout=0.1)
    model = build(config, VOCAB).train()
    seen = []

    def spy(function, *args, preserve_rng_state, use_reentrant):
        seen.append(preserve_rng_state and {a.device for a in args if torch.is_tensor(a)})
        return function(*args)

    monkeypatch.setattr("scaling.models.transformer.checkpoint", spy)
    model(make_batch(rng, [5, 1, 9, 3]), 20)
    assert len(seen) > 1
    assert all(devices == {model.device} for devices in seen)
