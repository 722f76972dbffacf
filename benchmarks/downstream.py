"""What downstream models cost on one task: time to serve, parameters trained, memory to train.

The comparison of Shin et al. 2023, Table 1, measured in one run. Each model is trained on one fold
for one epoch in a process of its own, whose peak of resident memory above what it began with is
told; then batches of users are served: their vectors, and the scores of 1 + 100 candidates each.
Vectors of items are computed beforehand everywhere, as a service would. Two rows are of U-MLP on an
encoder's features: with the features at hand, as they are served, and with the encoder run on the
users' logs. LightGCN propagates anew for every batch: new logs change its graph.

Ratios are medians over batches that the models take in turn, of the time of ``bst-15m``. Weights
are random: they cost what trained ones do.

    python benchmarks/downstream.py --quick
    python benchmarks/downstream.py --root work --corpus food_kitchen --task food --model 6x192

Without a corpus it is that of sweeps/corpora/demo.toml, prepared for the purpose.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaling.config import ModelConfig
from scaling.data.corpus import Corpus, folders
from scaling.data.prepare import prepare
from scaling.data.tasks import Task
from scaling.models import build
from scaling.transfer.baselines import Context, bst, deepfm, lightgcn
from scaling.transfer.features import item_features, user_features
from scaling.transfer.heads import HEAD, Features, HeadTowers
from scaling.transfer.problem import Problem, example_histories, pose
from scaling.transfer.towers import Towers, fit

DEMO = Path(__file__).parents[1] / "sweeps" / "corpora" / "demo.toml"
SYSTEMS = ("bst-15m", "bst", "deepfm", "lightgcn", "u-mlp")
BATCH = 256
"""Users served together."""


def encoder_of(shape: str, corpus: Corpus) -> Any:
    layers, width = map(int, shape.split("x"))
    config = ModelConfig(layers=layers, d_model=width, heads=max(1, width // 64))
    return build(config, corpus.card.vocab_size).eval()


def towers_of(system: str, context: Context, encoder: Any, cap: int) -> Towers:
    problem, split = context.problem, context.problem.split(0, 5)
    torch.manual_seed(0)
    if system == "u-mlp":
        task = Task.open(context.corpus, problem.name)
        histories = {task.service: example_histories(task, task.service)}
        users, present = user_features(encoder, context.corpus, histories, cap)
        items = item_features(encoder, context.corpus, problem.catalogue)
        return HeadTowers("u-mlp", Features(np.column_stack([users, present]), items), [split], [0])
    if system == "lightgcn":
        return lightgcn.LightGCN(problem, problem.known(split), context.texts)
    if system == "deepfm":
        return deepfm.DeepFM(problem, split, context.texts)
    config = bst.LARGE if system == "bst-15m" else bst.SMALL
    return bst.BST(config, problem, context.texts)


def opened(args: argparse.Namespace) -> tuple[Context, Any]:
    corpus = Corpus.open(Path(args.corpus))
    context = Context(corpus, pose(corpus, Task.open(corpus, args.task)))
    return context, encoder_of(args.model, corpus)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trained(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters, and what an epoch of training takes; in a process of its own."""
    context, encoder = opened(args)
    towers = towers_of(args.train, context, encoder, args.items_per_user)
    _ = context.texts
    before, start = peak_mb(), time.perf_counter()
    split = context.problem.split(0, 5)
    fit(towers, context.problem, [split], [0], replace(HEAD, max_epochs=1))
    return {
        "parameters": sum(p.numel() for p in towers.parameters()),
        "epoch_s": time.perf_counter() - start,
        "peak_mb": peak_mb() - before,
    }


def servers(
    context: Context, encoder: Any, cap: int
) -> dict[str, Callable[[np.ndarray[Any, Any]], torch.Tensor]]:
    """Of every model: examples of the task to the scores of their candidates."""
    problem = context.problem
    every = torch.arange(len(problem.catalogue))[None]

    def of(towers: Towers) -> Callable[[np.ndarray[Any, Any]], torch.Tensor]:
        towers.eval()
        towers.refresh()
        items = towers.item(every)[0]

        def serve(examples: np.ndarray[Any, Any]) -> torch.Tensor:
            if isinstance(towers, lightgcn.LightGCN):
                towers.refresh()  # a user's new logs change the graph
            return scores(
                problem, towers.user(torch.from_numpy(examples)[None])[0], items, examples
            )

        return serve

    heads = towers_of("u-mlp", context, encoder, cap)
    found = {s: of(towers_of(s, context, encoder, cap)) for s in SYSTEMS if s != "u-mlp"}
    found["u-mlp"] = of(heads)
    assert isinstance(heads, HeadTowers)
    task = Task.open(context.corpus, problem.name)
    offsets, logs = example_histories(task, task.service)
    served = found["u-mlp"]

    def with_encoder(examples: np.ndarray[Any, Any]) -> torch.Tensor:
        lengths = (offsets[1:] - offsets[:-1])[examples]
        own = np.concatenate([logs[offsets[e] : offsets[e + 1]] for e in examples])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        z, present = user_features(encoder, context.corpus, {"own": (bounds, own)}, cap)
        table = torch.from_numpy(np.column_stack([z, present]).astype(np.float32))
        heads.user_input.table[torch.from_numpy(examples)] = table
        return served(examples)

    found["u-mlp, with the encoder"] = with_encoder
    return found


def scores(
    problem: Problem, users: torch.Tensor, items: torch.Tensor, examples: np.ndarray[Any, Any]
) -> torch.Tensor:
    rows = torch.from_numpy(problem.candidates[examples, 0].astype(np.int64))
    return torch.einsum("bk,bck->bc", users, items[rows])


@torch.no_grad()
def served(context: Context, encoder: Any, cap: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a batch of users, by model and turn."""
    sides = servers(context, encoder, cap)
    test = np.random.default_rng(0).permutation(context.problem.split(0, 5).test)
    batches = [test[i : i + BATCH] for i in range(0, len(test), BATCH)]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        examples = batches[turn % len(batches)]
        for name, serve in sides.items():
            start = time.perf_counter()
            serve(examples)
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - start) * BATCH / len(examples))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="root with the corpus")
    parser.add_argument("--corpus", default="demo")
    parser.add_argument("--task", default="books")
    parser.add_argument("--model", default="6x192", help="layers x width; 6x192 is the paper's 15M")
    parser.add_argument("--items-per-user", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a small encoder, few turns")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print(json.dumps(trained(args)))
        return
    if args.quick:
        args.model, args.turns = "1x64", 5
    with tempfile.TemporaryDirectory() as scratch:
        root = args.root or Path(scratch)
        if args.root is None:
            prepare(DEMO, root)
        (folder,) = [p for p in folders(root) if args.corpus in (p.name, p.name.rpartition("-")[0])]
        args.corpus = str(folder)
        words = ["--corpus", folder, "--task", args.task, "--model", args.model]
        words += ["--items-per-user", str(args.items_per_user)]
        table: dict[str, dict[str, Any]] = {}
        for system in SYSTEMS:
            call = [sys.executable, __file__, *words, "--train", system]
            done = subprocess.run(call, capture_output=True, text=True, check=True)
            table[system] = json.loads(done.stdout.splitlines()[-1])
        context, encoder = opened(args)
        times = served(context, encoder, args.items_per_user, args.turns)
    base = times["bst-15m"]
    for name, own in times.items():
        row = table.setdefault(name, {})
        row["batch_s"] = statistics.median(own)
        row["over_bst_15m"] = statistics.median(b / t for b, t in zip(base, own, strict=True))
    found = {
        "corpus": folder.name, "task": args.task, "model": args.model, "users": BATCH,
        "threads": torch.get_num_threads(), "models": table,
        "u_mlp_over_bst": table["u-mlp"]["over_bst_15m"],
        "u_mlp_with_encoder_over_bst": table["u-mlp, with the encoder"]["over_bst_15m"],
        "lightgcn_over_bst": table["lightgcn"]["over_bst_15m"],
    }  # fmt: skip
    if args.json:
        print(json.dumps(found))
        return
    print(f"{folder.name}, task {args.task}, encoder {args.model}, {BATCH} users a batch")
    print(f"{'':26}{'ms a batch':>12}{'speed':>8}{'trained':>12}{'peak MB':>10}{'epoch s':>10}")
    for name, row in table.items():
        rest = (
            f"{row['parameters']:>12,}{row['peak_mb']:>10.0f}{row['epoch_s']:>10.1f}"
            if "parameters" in row
            else ""
        )
        print(f"{name:26}{1e3 * row['batch_s']:>12.2f}{row['over_bst_15m']:>7.1f}x{rest}")


if __name__ == "__main__":
    main()
