"""Eq. 4 against plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.models.losses import contrastive_loss, logits, scale


def loop_loss(projected, tau, negatives):
    """Eq. 4, symmetric, over pairs of services and chunks of users, in pure Python."""
    services, users = len(projected), len(projected[0])

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))

    losses = []
    for a in range(services):
        for b in range(services):
            if a == b:
                continue
            for u in range(users):
                chunk = range(u // negatives * negatives, (u // negatives + 1) * negatives)
                terms = [math.exp(tau * cosine(projected[a][u], projected[b][v])) for v in chunk]
                own = math.exp(tau * cosine(projected[a][u], projected[b][u]))
                losses.append(-math.log(own / sum(terms)))
    return sum(losses) / len(losses)


@settings(max_examples=30, deadline=None)
@given(
    services=st.integers(2, 4),
    chunks=st.integers(1, 3),
    negatives=st.integers(2, 5),
    log_tau=st.floats(-2, 4),
    seed=st.integers(0, 2**16),
)
def test_loss_is_equation_4(services, chunks, negatives, log_tau, seed):
    rng = np.random.default_rng(seed)
    projected = rng.normal(size=(services, chunks * negatives, 3))
    ours = contrastive_loss(torch.from_numpy(projected), torch.tensor([log_tau]), negatives)
    tau = math.exp(log_tau)
    expected = loop_loss(projected.tolist(), tau, negatives)
    # The logit scale is of single precision; a loss near nothing is a difference of large logits.
    assert float(ours) == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_uninformative_embeddings_cost_the_logarithm_of_the_candidates():
    same = torch.ones(2, 64, 8)
    assert float(contrastive_loss(same, torch.tensor([2.0]), 64)) == pytest.approx(math.log(64))
    assert float(contrastive_loss(same, torch.tensor([2.0]), 16)) == pytest.approx(math.log(16))


def test_scale_is_clamped_at_100_in_the_forward_pass():
    assert float(scale(torch.tensor([math.log(14.27)]))) == pytest.approx(14.27)
    beyond = torch.tensor([9.0], requires_grad=True)
    scale(beyond).backward()  # less is better: the way back, as from the limit
    assert scale(beyond).item() == 100.0
    assert float(beyond.grad) == 100.0
    beyond.grad = None
    (-scale(beyond)).backward()  # more would be
    assert float(beyond.grad) == 0.0


def test_logits_are_computed_in_fp32_whatever_comes_in(rng):
    exact = torch.from_numpy(rng.normal(size=(2, 4, 8))).float()
    low = exact.bfloat16()
    tau = torch.tensor([math.log(100.0)]).bfloat16()
    assert logits(low, tau, 4).dtype == torch.float32
    assert torch.equal(logits(low, tau, 4), logits(low.float(), tau.float(), 4))
