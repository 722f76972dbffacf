"""User features of a whole corpus by ``clue-scaling embed``, against padded batches and one by one.

    embed         scaling.transfer.embed: every distinct item of a batch once, packed; float16
                  shards with their digests, written and flushed
    padded        users 32 at a time, in the order of the corpus; their items padded to the longest
                  item, rows to the longest row, through plain blocks on torch's
                  F.scaled_dot_product_attention with the same weights
    padded, once  the same, every distinct item of the 32 users encoded once
    one by one    the packed encoder, a user and a service at a time

The sides take turns; ratios are medians over the turns, of users a second. Embed does all users of
the corpus; the others, slow, the first of them, and keep the result in memory. All must give the
same features to half precision. Weights are random: they cost what trained ones do.

    python benchmarks/embed.py --quick
    python benchmarks/embed.py --root work --corpus food_kitchen

Without a corpus it is that of sweeps/corpora/demo.toml, prepared for the purpose.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from train_step import HEADS, LAYERS, Slots, sdpa

from scaling.config import ModelConfig, RunConfig
from scaling.data.batches import make_batch
from scaling.data.corpus import Corpus, folders
from scaling.data.prepare import prepare
from scaling.files import sha256, write_json
from scaling.models import build
from scaling.packing import PackedBatch
from scaling.rundir import RunDir
from scaling.transfer.embed import Embedding, Wanted

DEMO = Path(__file__).parents[1] / "sweeps" / "corpora" / "demo.toml"
PAPER_USERS, PAPER_DIMS = 36_000_000, 2_160
TOGETHER = 32
CAP = 64

Side = Callable[[], np.ndarray[Any, Any]]


def export(root: Path, corpus: Corpus, width: int) -> RunDir:
    """A run with the export of an untrained encoder."""
    config = RunConfig.model_validate(
        {
            "model": ModelConfig(layers=LAYERS, d_model=width, heads=HEADS),
            "data": {
                "corpus_digest": corpus.card.digest,
                "vocab_size": corpus.card.vocab_size,
                "n_services": len(corpus.card.services),
                "items_per_user": CAP,
            },
            "batch_size": 16,
            "negatives": 16,
            "pool": corpus.card.pool,
        }
    )
    run = RunDir.create(root, config, corpus.card.name)
    folder = run.path / "export" / f"step-{config.steps:09d}"
    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    save_file(build(config.model, config.data.vocab_size).state_dict(), file)
    card = {"schema_version": 1, "run_key": run.run_key, "step": config.steps,
            "size": file.stat().st_size, "sha256": sha256(file),
            "config": config.model_dump(mode="json")}  # fmt: skip
    write_json(folder / "config.json", card)
    return run


def by_user(rows: np.ndarray[Any, Any], users: int) -> np.ndarray[Any, Any]:
    """Rows by service and then user -> services of a user side by side. [users, services * d]"""
    return rows.reshape(-1, users, rows.shape[1]).swapaxes(0, 1).reshape(users, -1)


def padded(model: Any, batch: PackedBatch) -> torch.Tensor:
    """User embeddings, items and rows padded to the longest of the batch. [rows, d]"""

    def run(stack: Any, x: torch.Tensor, slots: Slots) -> torch.Tensor:
        return slots.mean(sdpa(stack)(x + stack.position_emb.weight[: x.shape[1]], slots))

    items = Slots(batch.item_lengths, batch.item_lengths.max())
    rows = Slots(batch.row_lengths, batch.row_lengths.max())
    ids = torch.from_numpy(batch.tokens.astype(np.int64))[items.index].where(items.real, 0)
    item_emb = run(model.item, model.token_emb(ids), items)
    places = torch.from_numpy(batch.items)[rows.index]
    return run(model.service, item_emb[places], rows)


def slow_sides(model: Any, corpus: Corpus, users: int, alone: int) -> dict[str, tuple[int, Side]]:
    """Users and features of what embed is compared with."""
    services = sorted(corpus.card.services)

    def in_batches(distinct: bool) -> np.ndarray[Any, Any]:
        parts = []
        for start in range(0, users, TOGETHER):
            rows = np.arange(start, min(start + TOGETHER, users))
            batch = make_batch(corpus, rows, CAP, services, distinct)
            parts.append(by_user(padded(model, batch).numpy(), len(rows)))
        return np.concatenate(parts)

    def one_by_one() -> np.ndarray[Any, Any]:
        found = [
            [model(make_batch(corpus, [u], CAP, [s]))[0].numpy() for s in services]
            for u in range(alone)
        ]
        return np.stack([np.concatenate(z) for z in found])

    return {
        "padded": (users, lambda: in_batches(False)),
        "padded, once": (users, lambda: in_batches(True)),
        "one by one": (alone, one_by_one),
    }


def compare(
    folder: Path, corpus: Corpus, width: int, slow: int, alone: int, turns: int
) -> dict[str, Any]:
    """Measure all sides in turn."""
    run = export(corpus.path.parent.parent, corpus, width)
    n_users = len(corpus.keys)

    def embed(name: str) -> tuple[float, Path]:
        start = time.perf_counter()
        embedding = Embedding(run, corpus, folder / name, Wanted())
        embedding.shards.begin()
        embedding.write(embedding.shards.parts)
        embedding.shards.complete()
        return n_users / (time.perf_counter() - start), folder / name

    model = Embedding(run, corpus, folder / "none", Wanted()).model
    sides = slow_sides(model, corpus, slow, alone)
    rates: dict[str, list[float]] = {name: [] for name in ("embed", *sides)}
    largest: dict[str, float] = {}
    for turn in range(turns):
        rate, out = embed(f"turn-{turn}")
        rates["embed"].append(rate)
        features = np.concatenate([np.load(f) for f in sorted(out.glob("users-*.npy"))])
        for name, (users, side) in sides.items():
            with torch.no_grad():
                start = time.perf_counter()
                found = side()
                rates[name].append(users / (time.perf_counter() - start))
            largest[name] = float(np.abs(found - features[:users]).max())
            scale = float(np.abs(found).max())
            if not largest[name] < 2e-3 * scale:
                raise SystemExit(f"{name} gives other features: they differ by {largest[name]}")
        say(f"turn {turn + 1} of {turns}")
    stored = sum(f.stat().st_size for f in out.glob("users*.npy"))
    rate = statistics.median(rates["embed"])

    def over(name: str) -> float:
        return statistics.median(a / b for a, b in zip(rates["embed"], rates[name], strict=True))

    behaviours = sum(
        int(np.minimum(np.diff(corpus.users(s)[0].astype(np.int64)), CAP).sum())
        for s in corpus.card.services
    )
    return {
        "users_per_s": rate,
        "bytes_per_user": stored / n_users,
        "over_padded": over("padded"),
        "over_padded_once": over("padded, once"),
        "over_one_by_one": over("one by one"),
        "projected_hours_36m": PAPER_USERS / rate / 3600,
        "projected_gb_36m": PAPER_USERS * (PAPER_DIMS * 2 + 8) / 1e9,
        "behaviours_per_s": rate * behaviours / n_users,
        "behaviours_per_user": behaviours / n_users,
        "users": n_users,
        "items": corpus.n_items,
        "dims": features.shape[1],
        "rates": {name: statistics.median(of) for name, of in rates.items()},
        "users_of": {"embed": n_users, **{name: users for name, (users, _) in sides.items()}},
        "differences": largest,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "threads": torch.get_num_threads(),
        "width": width,
        "turns": turns,
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'':<16}{'users/s':>10}{'embed /':>10}{'users':>9}"]
    for name, rate in found["rates"].items():
        ratio = found["rates"]["embed"] / rate
        lines.append(f"{name:<16}{rate:>10.1f}{ratio:>10.2f}{found['users_of'][name]:>9,}")
    rest = {k: v for k, v in found.items() if k not in ("rates", "users_of", "differences")}
    lines += ["", *(f"{k:<24}{v:.5g}" for k, v in rest.items())]
    return "\n".join(lines)


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, help="root folder of a prepared corpus")
    parser.add_argument("--corpus", help="its name")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--users", type=int, help="of padded; default: 512, quick 128")
    parser.add_argument("--alone", type=int, help="of one by one; default: 128, quick 32")
    parser.add_argument("--turns", type=int, help="default: 3, quick 1")
    parser.add_argument("--quick", action="store_true", help="fewer users, within 50 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.root is None:
            path = prepare(DEMO, folder)
        else:
            path = next(p for p in folders(args.root) if p.name.startswith(f"{args.corpus}-"))
            (folder / "corpora").mkdir()
            (folder / "corpora" / path.name).symlink_to(path.absolute())
            path = folder / "corpora" / path.name
        found = compare(
            folder,
            Corpus.open(path),
            args.width,
            args.users or (128 if args.quick else 512),
            args.alone or (32 if args.quick else 128),
            args.turns or (1 if args.quick else 3),
        )
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
