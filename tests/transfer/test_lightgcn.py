"""LightGCN against PyTorch Geometric's: the same numbers on the same graph and weights, the same
gradients, and the same quality when both are trained on MovieLens."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch_geometric.nn.models import LightGCN as Geometric

from scaling.transfer.baselines.lightgcn import LAYERS, normalised_graph, propagate
from scaling.transfer.metrics import rank_all


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
    """Free vectors, the same split, the same steps (BPR, 2,048 pairs), the same draws, full
    ranking of what a user was not trained on: recall and NDCG at 20 within 2 %."""
    users, items, n_users, n_items = movielens(clue_test_data / "movielens_latest_small_2016")
    rng = np.random.default_rng(0)
    tested = rng.random(len(users)) < 0.2
    train = users[~tested], items[~tested]
    matrix = normalised_graph(*train, n_users, n_items)
    both = both_ways(*train, n_users)
    seen = np.zeros((n_users, n_items), bool)
    seen[train] = True
    torch.manual_seed(0)
    theirs = Geometric(n_users + n_items, 64, LAYERS)
    mine = torch.nn.Parameter(theirs.embedding.weight.detach().clone())
    found = []
    for weights, vectors in (
        (mine, lambda: propagate(matrix, mine)),
        (theirs.embedding.weight, lambda: theirs.get_embedding(both)),
    ):
        optimiser = torch.optim.Adam([weights], lr=5e-3)
        draws = np.random.default_rng(1)
        for _ in range(200):
            at = draws.integers(0, len(train[0]), 2048)
            negative = draws.integers(0, n_items, 2048)
            z = vectors()
            u, i, j = (z[x] for x in (train[0][at], n_users + train[1][at], n_users + negative))
            loss = softplus((u * (j - i)).sum(1)).mean() + 1e-4 * (z[train[0][at]] ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            z = vectors()
        scores = (z[:n_users] @ z[n_users:].T).numpy()
        scores[seen] = -1e9
        recall, ndcg = [], []
        for user in np.unique(users[tested]):
            mine_of = items[tested & (users == user)]
            first = rank_all(scores[[user]], mine_of[None]).first[0]
            top = first <= 20
            recall.append(top.sum() / min(20, len(mine_of)))
            ideal = (1 / np.log2(np.arange(min(20, len(mine_of))) + 2)).sum()
            ndcg.append((top / np.log2(first + 1)).sum() / ideal)
        found.append((np.mean(recall), np.mean(ndcg)))
    ours, reference = found
    print(f"recall@20, NDCG@20: ours {ours}, PyTorch Geometric {reference}")
    assert reference[0] > 0.15
    np.testing.assert_allclose(ours, reference, rtol=0.02)
