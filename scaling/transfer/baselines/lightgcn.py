"""LightGCN (He et al. 2020, SIGIR): vectors of users and items, averaged over their graph.

The layers are E(k+1) = D^-1/2 A D^-1/2 E(k), and a vector is the mean of layers 0 to K (their
equations 7 and 8, alpha = 1/(K+1)). The graph joins a user with the items that a fold may know of
it: one who is tested is in it by the logs before its targets, and in a leave-one-out task, where
all are trained on and tested, by what is trained on.

In ``lightgcn`` layer 0 is a projection of frozen text vectors, of an item's own and of the mean
over a user's known items, so that it has few parameters and knows users it has not met (the 0.5M of
Shin et al. 2023, Table 1, leave no room for ids). In ``lightgcn-id`` it is a free vector each, as
published. Both are trained by the loop and the loss of all systems here, where He et al. have BPR.
"""

import warnings
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scaling.transfer.baselines import Context, learn, mean_vectors, scaled
from scaling.transfer.problem import Problem, Split
from scaling.transfer.scoring import ByVectors, fitted_vectors
from scaling.transfer.towers import Towers, TowerSettings

Ints = NDArray[np.int64]
LAYERS = 3
WIDTH = 64
TEXT = TowerSettings(max_epochs=60)
ID = TowerSettings(lr=5e-3, max_epochs=100)
"""A free vector is met by few steps of an epoch. Both rates were chosen by the validation loss of
one fold of Food, among 1e-3, 3e-3 and 5e-3, 1e-2, 3e-2."""


class Propagate(torch.autograd.Function):
    """A symmetric sparse matrix times a dense one: its backward pass is the same product."""

    @staticmethod
    def forward(ctx: object, matrix: Tensor, x: Tensor) -> Tensor:
        """[n, n] x [n, k] -> [n, k]"""
        ctx.matrix = matrix  # type: ignore[attr-defined]
        return matrix @ x

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[None, Tensor]:
        """[n, k] -> [n, k]"""
        return None, ctx.matrix @ grads[0]  # type: ignore[attr-defined]


def normalised_graph(users: Ints, items: Ints, n_users: int, n_items: int) -> Tensor:
    """D^-1/2 A D^-1/2 of users and items, as a sparse CSR matrix; repeated edges count once.
    [users + items, users + items]"""
    edges = np.unique(users * np.int64(n_items) + items)
    u, i = np.divmod(edges, n_items)
    i = i + n_users
    rows, columns = np.concatenate([u, i]), np.concatenate([i, u])
    n = n_users + n_items
    degree = np.bincount(rows, minlength=n).astype(np.float64)
    values = (degree[rows] * degree[columns]) ** -0.5
    order = np.lexsort([columns, rows])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(
            torch.from_numpy(np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])),
            torch.from_numpy(columns[order]),
            torch.from_numpy(values[order]).float(),
            (n, n),
            check_invariants=True,
        )


def propagate(matrix: Tensor, x: Tensor, layers: int = LAYERS) -> Tensor:
    """Mean of layers 0 to ``layers``. [nodes, k]"""
    total = x
    for _ in range(layers):
        x = Propagate.apply(matrix, x)  # type: ignore[no-untyped-call]
        total = total + x
    mean: Tensor = total / (layers + 1)
    return mean


class LightGCN(Towers):
    """Vectors of all nodes, made anew at every step."""

    nodes: Tensor
    matrix: Tensor
    of_example: Tensor
    """Node of each example's user. [examples]"""
    item_texts: Tensor
    user_texts: Tensor

    def __init__(
        self, problem: Problem, logs: tuple[Ints, Ints], texts: NDArray[np.float32] | None
    ) -> None:
        """
        Args:
            logs: examples, whose users are joined, and items. [logs], [logs]
        """
        super().__init__()
        users, items = problem.user[logs[0]], logs[1]
        self.n_users, n_items = int(problem.user.max()) + 1, len(problem.catalogue)
        matrix = normalised_graph(users, items, self.n_users, n_items)
        self.register_buffer("matrix", matrix, persistent=False)
        self.register_buffer("of_example", torch.from_numpy(problem.user), persistent=False)
        self.by_ids = texts is None
        if texts is None:
            self.free = nn.Parameter(torch.randn(self.n_users + n_items, WIDTH) * 0.1)
        else:
            texts = scaled(texts)
            mean = mean_vectors(texts, users, items, self.n_users)
            for name, of in (("item_texts", texts), ("user_texts", mean)):
                self.register_buffer(name, torch.from_numpy(of), persistent=False)
            self.of_item = nn.Linear(texts.shape[1], WIDTH)
            self.of_user = nn.Linear(texts.shape[1], WIDTH)

    def refresh(self) -> None:
        first: Tensor
        if self.by_ids:
            first = self.free
        else:
            first = torch.cat([self.of_user(self.user_texts), self.of_item(self.item_texts)])
        self.nodes = propagate(self.matrix, first)

    def user(self, examples: Tensor) -> Tensor:
        return self.nodes[self.of_example[examples]]

    def item(self, rows: Tensor) -> Tensor:
        return self.nodes[self.n_users + rows]


def by_texts(context: Context, split: Split, seed: int) -> ByVectors:
    """LightGCN on frozen text vectors."""
    return _fit(context, split, seed, context.texts, TEXT)


def by_ids(context: Context, split: Split, seed: int) -> ByVectors:
    """LightGCN as published, but for its loss."""
    return _fit(context, split, seed, None, ID)


def _fit(
    context: Context,
    split: Split,
    seed: int,
    texts: NDArray[np.float32] | None,
    settings: TowerSettings,
) -> ByVectors:
    problem = context.problem
    known = problem.known(split)
    fitted = learn(problem, split, seed, lambda: LightGCN(problem, known, texts), settings)
    found = fitted_vectors(problem, fitted)
    if texts is None:
        return found
    # A training example is joined with its targets, which its vector then tells of. Whatever learns
    # from these vectors must meet all examples as those that are served: by their histories alone.
    # A user's histories of one part are of no other's targets, so each part has its own graph.
    users = torch.empty_like(found.users)
    for part in np.unique(problem.part):
        examples = np.flatnonzero(problem.part == part)
        lengths, items = problem.before(examples)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            before = LightGCN(problem, (np.repeat(examples, lengths), items), texts)
            before.load_state_dict(fitted.towers.state_dict())
            before.to(users.device)
            before.refresh()
            users[examples] = before.user(torch.from_numpy(examples).to(users.device))
    return replace(found, before=users)
