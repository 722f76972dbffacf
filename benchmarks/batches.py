"""Batches fed by one process: against the need of one H100, and against Hugging Face datasets.

All read the same users of the same synthetic corpus in the same order, in turn; medians are given.
Tokens are counted as the model sees them: those of every behaviour in a batch, without padding.

    items once           scaling.data.batches: every distinct item of a batch once, packed
    every behaviour      the same with items repeated, as training with dropout has them
    datasets, ids        rows of item ids, memory-mapped Arrow, read as numpy; the collator looks
                         the tokens up in an array of padded items that it holds, and pads the rows
    datasets, ids, 2 w.  the same with two worker processes
    datasets, inline     rows of items' tokens; the collator pads both levels

The collators make what the documents of datasets show and a padded encoder takes: ``input_ids``
(int64) and ``attention_mask`` (bool). Users' histories are cut to the cap when the peers' rows are
written, and at every read by ours. Peers deliver users x services x items x 32 slots.

    python benchmarks/batches.py --quick
    pip install 'datasets>=2.20'
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from scaling.config import MAX_ITEMS, MAX_TOKENS, CorpusCard, ModelConfig, PoolConfig, RunConfig
from scaling.data import store
from scaling.data.batches import Batches, latest, step_users
from scaling.data.corpus import MANIFEST, SCHEMA_VERSION, Corpus, content_digest
from scaling.files import sha256, write_json
from scaling.flops import exact_flops
from scaling.packing import PackedBatch, spans

SERVICES = ("search", "shop")
ITEMS_PER_USER = 235  # per service: 5,313,992,425 behaviours of 11,294,122 users (Shin et al. 2023)
TOKENS_PER_ITEM = 9.5  # 50,741,643,225 tokens of 5,313,992,425 behaviours
VOCABULARY = 50_257
CAP = 128  # Table 8
BATCH = 256  # Table 8
H100_FLOPS = 0.5 * 989e12
"""Half the dense bf16 peak of an H100 SXM (NVIDIA's data sheet): more than training reaches."""
MODELS = {
    "15m": ModelConfig(layers=6, d_model=192, heads=4),
    "136m": ModelConfig(layers=8, d_model=720, heads=12),
}
"""Layers and widths whose total is about 15 and 136 million parameters."""

Delivered = Iterator[Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]


# --- the corpus -----------------------------------------------------------------------------------


def make_corpus(path: Path, users: int, items: int, rng: np.random.Generator) -> Corpus:
    """A corpus with lognormal lengths at both levels and items of Zipf's law (exponent 1)."""
    each = items // len(SERVICES)
    service = np.repeat(np.arange(len(SERVICES)), each)
    sizes = _lognormal(rng, TOKENS_PER_ITEM, 0.6, len(service)).clip(2, MAX_TOKENS)
    starts = np.cumsum(sizes) - sizes
    tokens = rng.integers(len(SERVICES) + 1, VOCABULARY, sizes.sum())
    tokens[starts] = service + 1
    store.write_array(path / "items/tokens.npy", tokens)
    store.write_array(path / "items/offsets.npy", np.append(starts, sizes.sum()))
    store.write_array(path / "items/service.npy", service)
    store.write_array(path / "users/keys.npy", np.sort(rng.integers(0, 2**63, users)))
    for s, name in enumerate(SERVICES):
        n = _lognormal(rng, ITEMS_PER_USER, 1.0, users).clip(1)
        rank = np.exp(rng.random(n.sum()) * np.log(each + 1)).astype(np.int64) - 1
        numbered = s * each + rng.permutation(each)
        store.write_array(path / "users" / name / "offsets.npy", np.append(0, np.cumsum(n)))
        store.write_array(path / "users" / name / "items.npy", numbered[rank.clip(0, each - 1)])
    manifest: dict[str, Any] = {
        **{key: kind() for key, kind in MANIFEST.items()},
        "schema_version": SCHEMA_VERSION,
        "name": "bench",
        "services": list(SERVICES),
        "splits": {"pretraining": users, "validation": 0, "pool": 0},
        "files": {
            p.relative_to(path).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)}
            for p in sorted(path.rglob("*.npy"))
        },
    }
    card = CorpusCard(
        name="bench",
        digest=content_digest(manifest),
        services=SERVICES,
        vocab_size=VOCABULARY,
        n_users=users,
        pool=None,
        items_per_user=dict.fromkeys(SERVICES, (1.0,) + (0.0,) * MAX_ITEMS),  # nobody reads it
        tokens_per_item=(1.0,) + (0.0,) * MAX_TOKENS,
    )
    manifest |= {"digest": card.digest, "card": card.model_dump(mode="json")}
    write_json(path / "manifest.json", manifest)
    return Corpus.open(path)


def _lognormal(rng: np.random.Generator, mean: float, sigma: float, n: int) -> Ints:
    return np.rint(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, n)).astype(np.int64)


# --- the sides ------------------------------------------------------------------------------------


def ours(corpus: Corpus, batch_size: int, distinct: bool, steps: range) -> Delivered:
    """What training reads."""
    config = RunConfig(
        model=MODELS["15m"],
        data={  # type: ignore[arg-type]
            "corpus_digest": corpus.card.digest,
            "vocab_size": VOCABULARY,
            "items_per_user": CAP,
        },
        batch_size=batch_size,
        negatives=batch_size,
        pool=PoolConfig(size=1, digest="a" * 16),
    )
    return Batches(corpus, config, distinct=distinct).iterate(steps.start, steps.stop)


def datasets_loader(
    rows: Any, collate: Callable[[list[Any]], Any], workers: int, schedule: Any, steps: range
) -> Delivered:
    """The usual DataLoader over a dataset; it reads whole batches by ``__getitems__``."""
    sampler = [schedule(step).tolist() for step in steps]
    return iter(DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


def collate_ids(padded_items: Any, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Pad rows of item ids, and look their tokens up."""
    histories = [row[service] for service in SERVICES for row in rows]
    longest = max(map(len, histories))
    input_ids = np.zeros((len(histories), longest, MAX_TOKENS), np.int64)
    for i, history in enumerate(histories):
        input_ids[i, : len(history)] = padded_items.take(history, axis=0)
    return _padded(input_ids)


def collate_inline(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Pad rows of items of tokens."""
    histories = [row[service] for service in SERVICES for row in rows]
    longest = max(map(len, histories))
    input_ids = np.zeros((len(histories), longest, MAX_TOKENS), np.int64)
    for i, history in enumerate(histories):
        for j, tokens in enumerate(history):
            input_ids[i, j, : len(tokens)] = tokens
    return _padded(input_ids)


def _padded(input_ids: Any) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(input_ids)
    return {"input_ids": ids, "attention_mask": ids != 0}


@dataclass
class Peers:
    """The corpus as a user of datasets would have it."""

    ids: Any
    inline: Any
    padded_items: Any

    @classmethod
    def of(cls, corpus: Corpus, folder: Path) -> "Peers":
        """Write both datasets, and open them memory-mapped."""
        import datasets

        datasets.disable_progress_bars()
        offsets, tokens = np.asarray(corpus.token_offsets), np.asarray(corpus.tokens)
        starts, sizes = offsets[:-1].astype(np.int64), np.diff(offsets.astype(np.int64))
        everyone = np.arange(corpus.card.n_users)
        ids, inline = {}, {}
        for service in SERVICES:
            lengths, items = latest(*corpus.users(service), everyone, CAP)
            flat = tokens[spans(starts[items], sizes[items])]
            ids[service] = _lists(lengths, pa.array(items.astype(np.uint32)))
            inline[service] = _lists(lengths, _lists(sizes[items], pa.array(flat)))
        for name, columns in (("ids", ids), ("inline", inline)):
            datasets.Dataset(pa.table(columns)).save_to_disk(folder / name)
        padded = np.zeros((corpus.n_items, MAX_TOKENS), tokens.dtype)
        padded[np.arange(MAX_TOKENS) < sizes[:, None]] = tokens
        return cls(
            datasets.load_from_disk(folder / "ids").with_format("numpy"),
            datasets.load_from_disk(folder / "inline").with_format("numpy"),
            padded,
        )


def _lists(lengths: Ints, values: Any) -> Any:
    offsets = np.append(0, np.cumsum(lengths))
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


# --- the comparison -------------------------------------------------------------------------------


@dataclass
class Side:
    """One way to read, and what was measured of it."""

    read: Callable[[range], Delivered]
    steps: int
    """Batches of one measurement."""

    def __post_init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def measure(self, turn: int, tokens: Callable[[range], int]) -> None:
        """Read the batches of one turn: tokens per second of wall time and of CPU time."""
        steps = range(turn * self.steps, (turn + 1) * self.steps)
        before, start = os.times(), time.perf_counter()
        for _ in self.read(steps):
            pass
        wall, after = time.perf_counter() - start, os.times()
        self.wall.append(tokens(steps) / wall)
        self.cpu.append(tokens(steps) / (sum(after[:4]) - sum(before[:4])))  # of workers, too


def compare(folder: Path, users: int, items: int, batch_size: int, turns: int) -> dict[str, Any]:
    """Measure all sides in turn."""
    say(f"making {users:,} users, {items:,} items")
    corpus = make_corpus(folder / "corpus", users, items, np.random.default_rng(0))
    peers = Peers.of(corpus, folder)
    schedule = partial(step_users, users, batch_size, seed=0)
    loader = partial(datasets_loader, schedule=schedule)
    ids = partial(collate_ids, peers.padded_items)
    sides = {
        "items once": Side(lambda s: ours(corpus, batch_size, True, s), 400),
        "every behaviour": Side(lambda s: ours(corpus, batch_size, False, s), 300),
        "datasets, ids": Side(lambda s: loader(peers.ids, ids, 0, steps=s), 50),
        "datasets, ids, 2 w.": Side(lambda s: loader(peers.ids, ids, 2, steps=s), 50),
        "datasets, inline": Side(lambda s: loader(peers.inline, collate_inline, 0, steps=s), 2),
    }
    compared = same(s.read(range(2)) for s in sides.values())
    lengths = np.diff(corpus.token_offsets.astype(np.int64))
    counts = np.zeros(users, np.int64)
    squares, behaviours, behaviours_sq = 0, 0, 0
    for service in SERVICES:
        n, behaved = latest(*corpus.users(service), np.arange(users), CAP)
        counts += np.add.reduceat(lengths[behaved], np.cumsum(n) - n)
        squares += int((lengths[behaved] ** 2).sum())
        behaviours, behaviours_sq = behaviours + int(n.sum()), behaviours_sq + int((n**2).sum())

    def tokens(steps: range) -> int:
        return sum(int(counts[schedule(step)].sum()) for step in steps)

    for turn in range(turns):
        for name, side in sides.items():
            side.measure(turn, tokens)
            say(f"{name:<20} {side.wall[-1] / 1e6:7.1f} M tokens/s")
    need = {
        name: H100_FLOPS
        * int(counts.sum())
        / exact_flops(
            model,
            tokens=int(counts.sum()),
            tokens_sq=squares,
            items=behaviours,
            items_sq=behaviours_sq,
            rows=users * len(SERVICES),
            users=users,
            n_views=len(SERVICES),
            negatives=batch_size,
        ).total
        for name, model in MODELS.items()
    }
    wall = {name: statistics.median(side.wall) for name, side in sides.items()}
    cpu = {name: statistics.median(side.cpu) for name, side in sides.items()}
    best = max((n for n in wall if n.startswith("datasets")), key=wall.__getitem__)
    frugal = max((n for n in cpu if n.startswith("datasets")), key=cpu.__getitem__)
    return {
        "tokens_per_s": wall["items once"],
        "over_datasets_collator": _ratio(sides["items once"].wall, sides[best].wall),
        "over_h100_need_15m": wall["items once"] / need["15m"],
        "over_h100_need_136m": wall["items once"] / need["136m"],
        "every_behaviour_over_datasets_collator": _ratio(
            sides["every behaviour"].wall, sides[best].wall
        ),
        "every_behaviour_over_h100_need_15m": wall["every behaviour"] / need["15m"],
        "over_datasets_inline": _ratio(sides["items once"].wall, sides["datasets, inline"].wall),
        "over_datasets_collator_cpu": _ratio(sides["items once"].cpu, sides[frugal].cpu),
        "datasets_collator": best,
        "h100_need_tokens_per_s": need,
        "wall_tokens_per_s": wall,
        "cpu_tokens_per_s": cpu,
        "tokens_compared": compared,
        "cores": len(os.sched_getaffinity(0)),
        "users": users,
        "items": items,
        "behaviours": sum(len(corpus.users(s)[1]) for s in SERVICES),
        "batch_size": batch_size,
        "tokens_per_behaviour": int(counts.sum()) / behaviours,
        "tokens_per_batch": int(counts.mean() * batch_size),
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def same(sides: Iterable[Delivered]) -> int:
    """Stop unless all sides deliver the same tokens in the same order; returns their number."""
    compared = 0
    for batches in zip(*sides, strict=True):
        first, *others = (flat_tokens(batch) for batch in batches)
        if not all(np.array_equal(first, other) for other in others):
            raise SystemExit("the sides do not deliver the same tokens")
        compared += len(first)
    return compared


def flat_tokens(batch: Any) -> Any:
    """Tokens of all behaviours of a batch, one after another."""
    if not isinstance(batch, PackedBatch):
        return batch["input_ids"][batch["attention_mask"]].numpy()
    starts = batch.token_offsets[:-1][batch.items]
    return batch.tokens[spans(starts, batch.item_lengths[batch.items])]


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'':<22}{'M tokens/s':>12}{'M tokens/CPU s':>16}{'/ need of 15M':>16}"]
    need = found["h100_need_tokens_per_s"]
    for name, rate in found["wall_tokens_per_s"].items():
        cpu = found["cpu_tokens_per_s"][name]
        lines.append(f"{name:<22}{rate / 1e6:>12.1f}{cpu / 1e6:>16.1f}{rate / need['15m']:>16.1f}")
    lines += [
        f"one H100, 15M model   {need['15m'] / 1e6:>12.1f}",
        f"one H100, 136M model  {need['136m'] / 1e6:>12.2f}",
        "",
        f"items once / {found['datasets_collator']}: {found['over_datasets_collator']:.1f}, "
        f"by CPU time {found['over_datasets_collator_cpu']:.1f}; "
        f"/ datasets, inline: {found['over_datasets_inline']:.0f}",
        f"{found['users']:,} users, {found['behaviours']:,} behaviours, {found['items']:,} items, "
        f"{found['tokens_per_behaviour']:.1f} tokens each; {found['batch_size']} users a batch, "
        f"{found['tokens_per_batch']:,} tokens; {found['cores']} cores",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int)
    parser.add_argument("--items", type=int)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--quick", action="store_true", help="a smaller corpus, within 50 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    users = args.users or (10_000 if args.quick else 40_000)
    items = args.items or (500_000 if args.quick else 1_000_000)
    turns = args.turns or (5 if args.quick else 15)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be looked for elsewhere
        with contextlib.redirect_stdout(sys.stderr):
            found = compare(Path(folder), users, items, args.batch_size, turns)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
