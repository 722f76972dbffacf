"""Propagation of LightGCN, forward and backward, against PyTorch Geometric's layers.

    ours      scaling.transfer.baselines.lightgcn: a normalised graph in CSR, built once; the
              backward pass is the same product, because the matrix is symmetric
    pyg       torch_geometric.nn.LGConv on an edge index, as its models.LightGCN is documented:
              normalised at every layer, messages gathered and scattered
    pyg_once  the same on weights that were normalised once
    pyg_csr   the same layer on our matrix, which it multiplies by torch's own sparse product

The sides take turns; ratios are medians over the turns. All must give the same vectors and
gradients before a ratio counts. Users and items are drawn with skew, and repeated edges are one.

    pip install 'torch-geometric>=2.6'
    python benchmarks/lightgcn.py --threads 1
    python benchmarks/lightgcn.py --quick
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch_geometric
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.nn import LGConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from scaling.transfer.baselines.lightgcn import LAYERS, WIDTH, normalised_graph, propagate

Side = Callable[[Tensor], Tensor]
PEERS = ("pyg", "pyg_once", "pyg_csr")


def draw(n_users: int, n_items: int, n_edges: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct pairs of which users and items are skewed, about ``n_edges``. [edges], [edges]"""
    rng = np.random.default_rng(0)
    users = (n_users * rng.random(2 * n_edges) ** 1.5).astype(np.int64)
    items = (n_items * rng.random(2 * n_edges) ** 2).astype(np.int64)
    pairs = rng.permutation(np.unique(users * n_items + items))[:n_edges]
    return np.divmod(pairs, n_items)


def sides_of(
    users: NDArray[np.int64], items: NDArray[np.int64], n_users: int, n_items: int
) -> dict[str, Side]:
    """What is compared: vectors of layer 0 to mean vectors. [nodes, k] -> [nodes, k]"""
    matrix = normalised_graph(users, items, n_users, n_items)
    there = torch.from_numpy(np.stack([users, items + n_users]))
    edges = torch.cat([there, there.flip(0)], 1)
    _, weights = gcn_norm(edges, num_nodes=n_users + n_items, add_self_loops=False)
    conv, plain = LGConv(), LGConv(normalize=False)

    def mean_of(layer: Side) -> Side:
        def run(x: Tensor) -> Tensor:
            total = x
            for _ in range(LAYERS):
                x = layer(x)
                total = total + x
            return total / (LAYERS + 1)

        return run

    return {
        "ours": lambda x: propagate(matrix, x),
        "pyg": mean_of(lambda x: conv(x, edges)),
        "pyg_once": mean_of(lambda x: plain(x, edges, weights)),
        "pyg_csr": mean_of(lambda x: plain(x, matrix)),
    }


def step(side: Side, x: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors, and the gradient of their product with ``toward`` by layer 0. [nodes, k] each"""
    x = x.detach().requires_grad_()
    found = side(x)
    found.backward(toward)
    assert x.grad is not None
    return found.detach(), x.grad


def same(sides: dict[str, Side], x: Tensor, toward: Tensor) -> dict[str, float]:
    """Largest differences of vectors and gradients from those of the first side.

    Raises:
        SystemExit: a side computes something else.
    """
    (_, first), *others = sides.items()
    expected = step(first, x, toward)
    found = {}
    for name, side in others:
        pairs = zip(step(side, x, toward), expected, strict=True)
        found[name] = max(float((a - b).abs().max()) for a, b in pairs)
        if not found[name] < 1e-4:
            raise SystemExit(f"{name} and ours do not compute the same: {found[name]:.1e} apart")
    return found


def measured(
    sides: dict[str, Side], x: Tensor, toward: Tensor, turns: int
) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass, by side and turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            start = time.perf_counter()
            step(side, x, toward)
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=40_000)
    parser.add_argument("--items", type=int, default=30_000)
    parser.add_argument("--edges", type=int, default=1_600_000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="a tenth of the graph")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.users, args.items, args.edges = args.users // 10, args.items // 10, args.edges // 10
    users, items = draw(args.users, args.items, args.edges)
    sides = sides_of(users, items, args.users, args.items)
    x, toward = torch.randn(2, args.users + args.items, WIDTH).unbind()
    differences = same(sides, x, toward)
    times = measured(sides, x, toward, args.turns)
    over = {
        f"over_{name}": statistics.median(
            peer / own for peer, own in zip(times[name], times["ours"], strict=True)
        )
        for name in PEERS
    }
    found = {
        "propagate_s": statistics.median(times["ours"]), **over,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "differences": differences, "users": args.users, "items": args.items,
        "edges": len(users), "width": WIDTH, "layers": LAYERS, "turns": args.turns,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "torch_geometric": torch_geometric.__version__,
    }  # fmt: skip
    if args.json:
        print(json.dumps(found))
        return
    print(f"{args.users + args.items:,} nodes, {len(users):,} edges, {LAYERS} layers of {WIDTH}")
    for name, own in times.items():
        ratio = f"{over[f'over_{name}']:>7.1f}x" if name in PEERS else ""
        print(f"{name:12}{statistics.median(own):>9.3f} s{ratio}")


if __name__ == "__main__":
    main()
