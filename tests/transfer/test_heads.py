"""The downstream head: learns what is planted, repeats itself, sees only what it is given."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from scaling.transfer.baselines.popularity import count_items
from scaling.transfer.heads import (
    UMLP,
    Examples,
    Head,
    HeadSettings,
    Standardiser,
    fit,
    pair_loss,
    softmax_loss,
)
from scaling.transfer.metrics import rank, summarise

N_ITEMS, N_TARGETS, N_NEGATIVES = 400, 3, 100


def planted(n_users: int, seed: int, *, signal: float = 3.0) -> tuple[np.ndarray, Examples]:
    """Users who choose items by a linear relation W between their features and the items'."""
    world = np.random.default_rng(12345)
    items = world.normal(size=(N_ITEMS, 6)).astype(np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)  # a long item would be a popular one
    relation = np.linalg.qr(world.normal(size=(6, 5)))[0].T
    rng = np.random.default_rng(seed)
    users = rng.normal(size=(n_users, 5)).astype(np.float32)
    utility = signal * users @ relation @ items.T + rng.gumbel(size=(n_users, N_ITEMS))
    order = np.argsort(-utility, axis=1)
    targets = order[:, :N_TARGETS]
    negatives = np.stack(
        [rng.permuted(order[:, N_TARGETS:], axis=1)[:, :N_NEGATIVES] for _ in range(N_TARGETS)], 1
    )
    return items, Examples(users, np.concatenate([targets[..., None], negatives], 2))


QUICK = HeadSettings(max_epochs=15)


@pytest.fixture(scope="module")
def learnt() -> tuple[np.ndarray, Examples, Head]:
    items, train = planted(500, 0)
    _, validation = planted(100, 1)
    return items, train, fit(items, train, validation, seed=0, settings=QUICK)


def test_a_planted_linear_relation_is_learnt_and_beats_popularity(
    learnt: tuple[np.ndarray, Examples, Head],
) -> None:
    items, train, head = learnt
    _, test = planted(200, 2)
    row = summarise(rank(head.logits(test, items).numpy()))
    counts = count_items(N_ITEMS, train.rows[..., 0])
    floor = summarise(rank(counts[test.rows]))
    assert row["hr_10"] > 0.5
    assert floor["hr_10"] < 0.2
    assert row["mrr"] > 3 * floor["mrr"]
    assert head.loss(test, items) < 0.75 * math.log(2)


def test_without_a_signal_the_head_stays_at_chance() -> None:
    items, train = planted(300, 0, signal=0.0)
    _, validation = planted(300, 1, signal=0.0)
    _, test = planted(300, 2, signal=0.0)
    head = fit(items, train, validation, seed=0, settings=QUICK)
    assert head.loss(test, items) == pytest.approx(math.log(2), abs=0.01)
    assert summarise(rank(head.logits(test, items).numpy()))["hr_10"] < 0.14


def parameters(head: Head) -> list[np.ndarray]:
    return [p.detach().numpy() for p in head.model.parameters()]


def same(a: Head, b: Head) -> bool:
    return all(np.array_equal(p, q) for p, q in zip(parameters(a), parameters(b), strict=True))


def test_the_same_seed_gives_the_same_head_and_another_seed_another() -> None:
    items, train = planted(120, 0)
    _, validation = planted(40, 1)
    short = HeadSettings(max_epochs=3)
    torch.manual_seed(1)
    first = fit(items, train, validation, seed=5, settings=short)
    state = torch.random.get_rng_state()
    again = fit(items, train, validation, seed=5, settings=short)
    other = fit(items, train, validation, seed=6, settings=short)
    assert same(first, again)
    assert not same(first, other)
    # Nobody else's random numbers are moved.
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_best_epoch_is_kept_and_patience_ends_the_training() -> None:
    items, train = planted(150, 0)
    _, validation = planted(50, 1)
    settings = HeadSettings(max_epochs=200, patience=2, lr=1e-2)
    head = fit(items, train, validation, seed=0, settings=settings)
    assert 0 < head.epochs < 200
    assert head.loss(validation, items) == head.validation_loss
    # Stopping there by hand gives the same parameters: the later epochs left nothing behind.
    by_hand = fit(
        items, train, validation, seed=0, settings=replace(settings, max_epochs=head.epochs)
    )
    assert same(head, by_hand)


def test_a_user_scores_the_same_in_any_company(learnt: tuple[np.ndarray, Examples, Head]) -> None:
    items, _, head = learnt
    _, test = planted(50, 3)
    whole = head.logits(test, items)
    torch.testing.assert_close(head.logits(test, items, chunk=7), whole, rtol=1e-4, atol=1e-4)
    order = np.arange(50)[::-1]
    torch.testing.assert_close(
        head.logits(test.take(order), items), whole[order.copy()], rtol=1e-4, atol=1e-4
    )


def test_losses_equal_those_of_torch() -> None:
    logits = torch.randn(7, 3, 101, generator=torch.Generator().manual_seed(0)) * 3
    pairs = torch.stack([logits[..., :1].expand(7, 3, 100), logits[..., 1:]])
    labels = torch.stack([torch.ones(7, 3, 100), torch.zeros(7, 3, 100)])
    torch.testing.assert_close(
        pair_loss(logits).mean(), binary_cross_entropy_with_logits(pairs, labels)
    )
    torch.testing.assert_close(
        softmax_loss(logits).flatten(),
        cross_entropy(logits.flatten(0, 1), torch.zeros(21, dtype=torch.long), reduction="none"),
    )
    flat = torch.zeros(2, 101)
    assert pair_loss(flat)[0] == pytest.approx(math.log(2))
    assert softmax_loss(flat)[0] == pytest.approx(math.log(101))


def test_the_towers_are_those_of_the_paper() -> None:
    model = UMLP(192, 192)
    widths = [m.out_features for m in model.user if isinstance(m, torch.nn.Linear)]
    assert widths == [512, 256, 128, 64, 64]
    # With the features of the 15M model the paper's cost table says 0.5M parameters.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.5e6, rel=0.15)


def test_standardised_training_columns_and_constant_ones() -> None:
    x = np.random.default_rng(0).normal(3, 7, (200, 4)).astype(np.float32)
    x[:, 2] = 1.0
    fitted = Standardiser.fit(x)
    out = fitted(x).numpy()
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(0), [1, 1, 0, 1], atol=1e-5)
    # A mask that was 1 for every training user must not explode where it is 0.
    assert fitted(np.zeros((1, 4), np.float32)).numpy()[0, 2] == -1.0
