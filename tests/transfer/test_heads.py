"""Heads and how they are trained: they learn what is planted, alone or in company, and nothing of
what they are tested on."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planted import linear, popular
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from scaling.transfer.baselines.popularity import count_items
from scaling.transfer.heads import FIXED_WIDTH, HEAD, Features, HeadTowers, Standardised
from scaling.transfer.metrics import rank, summarise
from scaling.transfer.problem import Problem, Split
from scaling.transfer.towers import (
    Fitted,
    Pairs,
    TowerSettings,
    fit,
    pair_loss,
    score,
    softmax_loss,
)

QUICK = TowerSettings(max_epochs=15)


def trained(
    problem: Problem,
    features: Features,
    splits: list[Split],
    seeds: list[int],
    settings: TowerSettings = QUICK,
    head: Any = "u-mlp",
) -> Fitted:
    return fit(HeadTowers(head, features, splits, seeds), problem, splits, seeds, settings)


def logits(fitted: Fitted, problem: Problem, splits: list[Split]) -> list[torch.Tensor]:
    return score(fitted.towers, [Pairs.of(problem, s.test) for s in splits])


@pytest.mark.parametrize(
    ("head", "settings", "bar"),
    [
        ("u-mlp", QUICK, 0.5),
        ("u-mlp-64", QUICK, 0.5),
        ("linear", TowerSettings(max_epochs=60, lr=1e-2), 0.5),
    ],
)
def test_a_planted_linear_relation_is_learnt_and_beats_popularity(
    head: str, settings: TowerSettings, bar: float
) -> None:
    problem, features = linear(800)
    split = problem.split(0, 5)
    fitted = trained(problem, features, [split], [0], settings, head)
    found = logits(fitted, problem, [split])[0]
    row = summarise(rank(found.numpy()))
    counts = count_items(len(problem.catalogue), problem.targets[split.train])
    floor = summarise(rank(counts[problem.candidates[split.test]]))
    assert row["hr_10"] > bar
    assert floor["hr_10"] < 0.2
    assert row["mrr"] > 3 * floor["mrr"]
    assert float(pair_loss(found).mean()) < 0.75 * math.log(2)


def test_without_a_signal_the_head_stays_at_chance() -> None:
    problem, features = linear(700, signal=0.0)
    split = problem.split(0, 5)
    found = logits(trained(problem, features, [split], [0]), problem, [split])[0]
    assert float(pair_loss(found).mean()) == pytest.approx(math.log(2), abs=0.015)
    assert summarise(rank(found.numpy()))["hr_10"] < 0.15


@pytest.mark.parametrize("head", ["u-mlp", "u-mlp-64", "linear"])
def test_replicas_learn_side_by_side_what_they_learn_alone(head: str) -> None:
    problem, features = linear(150)
    splits = [problem.split(fold, 5) for fold in (0, 0, 3)]
    seeds = [1, 2, 1]
    settings = TowerSettings(max_epochs=12, patience=2, lr=3e-3)
    together = trained(problem, features, splits, seeds, settings, head)
    # They stopped at other times, so that some were dropped before others.
    for i, found in enumerate(logits(together, problem, splits)):
        alone = trained(problem, features, splits[i : i + 1], seeds[i : i + 1], settings, head)
        assert alone.epochs == [together.epochs[i]]
        assert alone.validation_loss[0] == pytest.approx(together.validation_loss[i], rel=1e-4)
        torch.testing.assert_close(
            logits(alone, problem, splits[i : i + 1])[0], found, rtol=1e-3, atol=1e-3
        )


def test_the_same_seed_gives_the_same_head_and_another_seed_another() -> None:
    problem, features = linear(120)
    splits = [problem.split(0, 5), problem.split(1, 5)]
    short = TowerSettings(max_epochs=3)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = logits(trained(problem, features, splits, [5, 5], short), problem, splits)
    again = logits(trained(problem, features, splits, [5, 5], short), problem, splits)
    other = logits(trained(problem, features, splits, [5, 6], short), problem, splits)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    # Nobody else's random numbers are moved.
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_best_epoch_is_kept_and_patience_ends_the_training() -> None:
    problem, features = linear(150)
    splits = [problem.split(fold, 5) for fold in (0, 1)]
    settings = TowerSettings(max_epochs=200, patience=2, lr=1e-2)
    fitted = trained(problem, features, splits, [0, 0], settings)
    assert all(0 < e < 200 for e in fitted.epochs)
    found = score(fitted.towers, [Pairs.of(problem, s.validation) for s in splits])
    for logit, loss in zip(found, fitted.validation_loss, strict=True):
        assert float(pair_loss(logit).mean()) == pytest.approx(loss, rel=1e-5)
    # Stopping there by hand gives the same head: the later epochs left nothing behind.
    by_hand = replace(settings, max_epochs=fitted.epochs[0])
    alone = trained(problem, features, splits[:1], [0], by_hand)
    assert alone.epochs == fitted.epochs[:1]


def test_nothing_of_a_test_user_reaches_what_is_learnt() -> None:
    problem, features = popular()
    split = problem.split(0, 5)
    rng = np.random.default_rng(9)
    candidates, users = problem.candidates.copy(), features.users.copy()
    candidates[split.test] = rng.permuted(candidates[split.test], axis=2)
    users[split.test] *= 100
    altered = replace(problem, candidates=candidates)
    before = trained(problem, features, [split], [0])
    after = trained(altered, replace(features, users=users), [split], [0])
    assert (before.epochs, before.validation_loss) == (after.epochs, after.validation_loss)
    for p, q in zip(before.towers.parameters(), after.towers.parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(before.towers.buffers(), after.towers.buffers(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(logits(before, problem, [split])[0], logits(after, altered, [split])[0])


def test_losses_equal_those_of_torch() -> None:
    scores = torch.randn(7, 3, 101, generator=torch.Generator().manual_seed(0)) * 3
    pairs = torch.stack([scores[..., :1].expand(7, 3, 100), scores[..., 1:]])
    labels = torch.stack([torch.ones(7, 3, 100), torch.zeros(7, 3, 100)])
    torch.testing.assert_close(
        pair_loss(scores).mean(), binary_cross_entropy_with_logits(pairs, labels)
    )
    torch.testing.assert_close(
        softmax_loss(scores).flatten(),
        cross_entropy(scores.flatten(0, 1), torch.zeros(21, dtype=torch.long), reduction="none"),
    )
    flat = torch.zeros(2, 101)
    assert pair_loss(flat)[0] == pytest.approx(math.log(2))
    assert softmax_loss(flat)[0] == pytest.approx(math.log(101))


def towers_of(width: int, head: Any = "u-mlp") -> HeadTowers:
    problem, _ = linear(100)
    rng = np.random.default_rng(0)
    features = Features(
        rng.normal(size=(100, width)).astype(np.float32),
        rng.normal(size=(400, width)).astype(np.float32),
    )
    return HeadTowers(head, features, [problem.split(0, 5)], [0])


def test_the_towers_are_those_of_the_paper() -> None:
    towers = towers_of(192)
    assert [w.shape[2] for w in towers.user_layers.weights] == [512, 256, 128, 64, 64]
    # With the features of the 15M model the paper's cost table says 0.5M parameters.
    assert sum(p.numel() for p in towers.parameters()) == pytest.approx(0.5e6, rel=0.15)
    # LMRec's Table 6 says 1.2M for two square matrices of width 768.
    assert sum(p.numel() for p in towers_of(768, "linear").parameters()) == 2 * 768**2


def test_a_tower_is_that_of_torch() -> None:
    towers = towers_of(12)
    reference: list[torch.nn.Module] = []
    layers = towers.item_layers
    for weight, bias in zip(layers.weights, layers.biases, strict=True):
        one = torch.nn.Linear(weight.shape[1], weight.shape[2])
        one.weight.data, one.bias.data = weight.data[0].T, bias.data[0, 0]
        reference += [one, torch.nn.ReLU()]
    rows = torch.arange(50)[None]
    with torch.no_grad():
        expected = torch.nn.Sequential(*reference[:-1])(towers.item_input(rows)[0])
        torch.testing.assert_close(towers.item(rows)[0], expected, rtol=1e-5, atol=1e-6)


def test_weights_begin_within_the_bounds_of_torch() -> None:
    for weight, bias in zip(
        towers_of(100).user_layers.weights, towers_of(100).user_layers.biases, strict=True
    ):
        bound = weight.shape[1] ** -0.5
        for values in (weight, bias):
            assert values.abs().max() <= bound
        assert weight.abs().max() > 0.95 * bound
        assert abs(float(weight.detach().mean())) < 4 * bound / (3 * weight.numel()) ** 0.5


def test_standardised_training_columns_and_constant_ones() -> None:
    x = np.random.default_rng(0).normal(3, 7, (200, 4)).astype(np.float32)
    x[:, 2] = 1.0
    table = np.concatenate([x, np.zeros((1, 4), np.float32)])
    out = Standardised(table, [np.arange(200)], None)(torch.arange(201)[None])[0].numpy()
    np.testing.assert_allclose(out[:200].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(out[:200].std(0), [1, 1, 0, 1], atol=1e-5)
    # A mask that was 1 for every training user must not explode where it is 0.
    assert out[200, 2] == -1.0


@pytest.mark.parametrize("width", [3, 64, 150])
def test_features_of_a_fixed_width_are_the_leading_components(width: int) -> None:
    rng = np.random.default_rng(width)
    x = (rng.normal(size=(400, width)) @ rng.normal(size=(width, width))).astype(np.float32)
    out = Standardised(x, [np.arange(300)], FIXED_WIDTH)(torch.arange(400)[None])[0].double()
    assert out.shape == (400, FIXED_WIDTH)
    kept = min(width, FIXED_WIDTH)
    assert not out[:, kept:].any()
    seen = out[:300, :kept].numpy()
    # The first layer meets as much as of so many standardised columns.
    assert (seen.var(axis=0, ddof=1)).sum() == pytest.approx(FIXED_WIDTH, rel=1e-4)
    scaled = (x[:300] - x[:300].mean(0)) / x[:300].std(0)
    singular = np.linalg.svd(scaled.astype(np.float64) - scaled.mean(0), compute_uv=False)[:kept]
    ratios = seen.std(axis=0) / seen.std(axis=0)[0]
    np.testing.assert_allclose(ratios, singular / singular[0], rtol=1e-2, atol=1e-4)
    correlation = np.corrcoef(seen.T) - np.eye(kept)
    assert np.abs(correlation).max() < 1e-2


def test_vectors_beside_the_features_are_each_replicas_own() -> None:
    problem, features = linear(300)
    split = problem.split(0, 5)
    noise = replace(features, users=np.zeros_like(features.users))
    useful = features.users
    useless = np.random.default_rng(1).normal(size=useful.shape).astype(np.float32)
    beside = replace(noise, beside=np.stack([useful, useless]))
    settings = TowerSettings(max_epochs=25)
    fitted = trained(problem, beside, [split, split], [0, 0], settings)
    assert fitted.validation_loss[0] < fitted.validation_loss[1] - 0.03
    assert HEAD.max_epochs == 30  # what studies use is not what these tests use
