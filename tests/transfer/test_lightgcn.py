"""LightGCN against PyTorch Geometric's: the same numbers on the same graph and weights, the same
gradients, and the same quality when both are trained on MovieLens."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import popular
from torch import Tensor
from torch.nn.functional import softplus
from torch_geometric.nn import LGConv
from torch_geometric.nn.models import LightGCN as Geometric

from scaling.transfer.baselines.lightgcn import LAYERS, LightGCN, normalised_graph, propagate
from scaling.transfer.scoring import fitted_vectors
from scaling.transfer.towers import TowerSettings, fit


def edges_of(n_users: int, n_items: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs; every user and item has one."""
    rng = np.random.default_rng(seed)
    users = np.concatenate([np.arange(n_users), rng.integers(0, n_users, n_items + n)])
    items = np.concatenate(
        [rng.integers(0, n_items, n_users), np.arange(n_items), rng.integers(0, n_items, n)]
    )
    return np.divmod(np.unique(users * n_items + items), n_items)


def both_ways(users: np.ndarray, items: np.ndarray, n_users: int) -> Tensor:
    there = torch.from_numpy(np.stack([users, items + n_users]))
    return torch.cat([there, there.flip(0)], 1)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_vectors_and_gradients_are_those_of_pytorch_geometric(layers: int) -> None:
    n_users, n_items = 60, 90
    users, items = edges_of(n_users, n_items, 700, layers)
    torch.manual_seed(layers)
    theirs = Geometric(n_users + n_items, 16, layers)
    weights = theirs.embedding.weight
    mine = weights.detach().clone().requires_grad_()
    found = propagate(normalised_graph(users, items, n_users, n_items), mine, layers)
    expected = theirs.get_embedding(both_ways(users, items, n_users))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    toward = torch.randn(expected.shape)
    (found * toward).sum().backward()
    (expected * toward).sum().backward()
    torch.testing.assert_close(mine.grad, weights.grad, rtol=0, atol=1e-6)


def test_a_graph_by_hand() -> None:
    # User 0 has items 0 and 1, user 1 has item 1 twice, item 2 has nobody.
    users, items = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    dense = normalised_graph(users, items, 2, 3).to_dense().numpy()
    expected = np.zeros((5, 5))
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(2 * 1)
    expected[0, 3] = expected[3, 0] = 1 / np.sqrt(2 * 2)
    expected[1, 3] = expected[3, 1] = 1 / np.sqrt(1 * 2)
    np.testing.assert_allclose(dense, expected, atol=1e-7)


@given(st.data(), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=50)
def test_any_graph_is_symmetric_and_normalised(data: st.DataObject, users: int, items: int) -> None:
    """Users or items without an edge have empty rows; repeated edges are one."""
    pairs = st.tuples(st.integers(0, users - 1), st.integers(0, items - 1))
    edges = data.draw(st.lists(pairs, min_size=1, max_size=40))
    u, i = np.array(edges).T
    found = normalised_graph(u, i, users, items).to_dense().double().numpy()
    joined = np.zeros((users + items, users + items))
    for a, b in edges:
        joined[a, users + b] = joined[users + b, a] = 1
    degree = np.maximum(joined.sum(0), 1)
    np.testing.assert_allclose(found, joined / np.sqrt(degree[:, None] * degree), atol=1e-7)


class Peer(LightGCN):
    """The same free vectors, propagated by PyTorch Geometric."""

    def refresh(self) -> None:
        rows, columns = self.matrix.to_sparse_coo().indices()
        layer, total = self.free, self.free
        for _ in range(LAYERS):
            layer = LGConv()(layer, torch.stack([columns, rows]))
            total = total + layer
        self.nodes = total / (LAYERS + 1)


def test_the_loop_of_all_systems_trains_both_alike() -> None:
    problem, _ = popular(400)
    split = problem.split(0, 5)
    found = []
    for system in (LightGCN, Peer):
        torch.manual_seed(0)
        towers = system(problem, problem.known(split), None)
        fitted = fit(towers, problem, [split], [7], TowerSettings(lr=5e-3, max_epochs=12))
        found.append((fitted.validation_loss[0], fitted_vectors(problem, fitted)))
    (loss, ours), (expected, theirs) = found
    assert loss < 0.9 * np.log(2)  # of a guess
    assert loss == pytest.approx(expected, rel=1e-4)
    of_ours, of_theirs = (v.every(split.test) for v in (ours, theirs))
    np.testing.assert_allclose(of_ours, of_theirs, atol=1e-2 * np.std(of_theirs))


def movielens(folder: Path) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Users and items of the ratings of 4 and more, numbered from 0 in order of appearance."""
    pairs = []
    with gzip.open(folder / "ratings.csv.gz", "rt") as f:
        for row in csv.DictReader(f):
            if float(row["rating"]) >= 4:
                pairs.append((row["userId"], row["movieId"]))
    numbers = [
        {v: i for i, v in enumerate(dict.fromkeys(column))} for column in zip(*pairs, strict=True)
    ]
    users, items = (np.array([n[p[i]] for p in pairs]) for i, n in enumerate(numbers))
    return users, items, len(numbers[0]), len(numbers[1])


@pytest.mark.data
@pytest.mark.slow
def test_trained_beside_pytorch_geometric_on_movielens(clue_test_data: Path) -> None:
    """Free vectors, the same split, the same steps (100 of BPR, 4,096 pairs), the same draws, full
    ranking of what a user was not trained on: recall and NDCG at 10 and 20 within 2 %."""
    users, items, n_users, n_items = movielens(clue_test_data / "movielens_latest_small_2016")
    rng = np.random.default_rng(0)
    tested = rng.random(len(users)) < 0.2
    train = users[~tested], items[~tested]
    matrix = normalised_graph(*train, n_users, n_items)
    both = both_ways(*train, n_users)
    seen = np.zeros((n_users, n_items), bool)
    seen[train] = True

    def quality(scores: np.ndarray) -> np.ndarray:
        rows = []
        for user in np.unique(users[tested]):
            liked = items[tested & (users == user)]
            own = np.where(seen[user], -np.inf, scores[user])
            top = np.isin(np.argsort(-own)[:20], liked)
            row = []
            for k in (10, 20):
                gain = 1 / np.log2(np.arange(k) + 2)
                best = min(k, len(liked))
                row += [top[:k].sum() / best, (top[:k] * gain).sum() / gain[:best].sum()]
            rows.append(row)
        return np.mean(rows, axis=0)

    torch.manual_seed(0)
    theirs = Geometric(n_users + n_items, 64, LAYERS)
    mine = torch.nn.Parameter(theirs.embedding.weight.detach().clone())
    found = [quality(np.tile(np.bincount(train[1], minlength=n_items), (n_users, 1)).astype(float))]
    for weights, vectors in (
        (mine, lambda: propagate(matrix, mine)),
        (theirs.embedding.weight, lambda: theirs.get_embedding(both)),
    ):
        optimiser = torch.optim.Adam([weights], lr=0.05)
        draws = np.random.default_rng(1)
        for _ in range(100):
            at = draws.integers(0, len(train[0]), 4096)
            negative = draws.integers(0, n_items, 4096)
            z = vectors()
            u, i, j = (z[x] for x in (train[0][at], n_users + train[1][at], n_users + negative))
            loss = softplus((u * (j - i)).sum(1)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            z = vectors()
        found.append(quality((z[:n_users] @ z[n_users:].T).numpy()))
    popularity, ours, reference = found
    print(f"recall@10, NDCG@10, recall@20, NDCG@20: {ours}, PyTorch Geometric {reference}")
    assert (reference > 1.25 * popularity).all()
    np.testing.assert_allclose(ours, reference, rtol=0.02)
