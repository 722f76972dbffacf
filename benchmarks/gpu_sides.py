"""Sides of gpu.py: a training step, packed and padded, and how it is timed."""

import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from batches import CAP, SERVICES, VOCABULARY, make_corpus
from torch import Tensor, nn

from scaling.config import MAX_TOKENS, ModelConfig, PoolConfig
from scaling.data.batches import make_batch
from scaling.data.corpus import Corpus, content_digest
from scaling.files import write_json
from scaling.flops import exact_flops
from scaling.models import build, transformer
from scaling.models.losses import contrastive_loss
from scaling.models.transformer import Layout, Stack
from scaling.packing import PackedBatch
from scaling.train.throughput import peak_flops

POOL = 64
SHAPES = {"d720": (10, 720, 6), "d192": (6, 192, 3), "d64": (8, 64, 1)}  # layers, width, heads

Encode = Callable[[], Tensor]
Step = Callable[[int], Any]
Row = dict[str, Any]


class TimeUp(BaseException):
    """No time is left. Not an Exception: no row shall take it for its own failure."""


class Bench:
    """What every section needs, and ``found``: what all of them found."""

    def __init__(self, device: str, quick: bool, deadline: float, folder: Path) -> None:
        self.device, self.cuda = torch.device(device), device == "cuda"
        self.quick, self.deadline, self.folder = quick, deadline, folder
        self.precision = "bf16" if not self.cuda or torch.cuda.is_bf16_supported(False) else "fp16"
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        self.backend = "inductor" if self.cuda else "aot_eager"  # CPU: only whether it is traced
        self.peak, self.gemm = peak_flops(self.device, self.precision), 0.0
        self.sizes = {
            name: ModelConfig(layers=1, d_model=8 * heads, heads=heads)
            if quick
            else ModelConfig(layers=layers, d_model=width, heads=heads)
            for name, (layers, width, heads) in SHAPES.items()
        }
        self.cap, self.budgets = (4, (256, 512)) if quick else (CAP, (2**14, 2**15, 2**16))
        users, items = (512, 4_000) if quick else (20_000, 500_000)
        self.corpus = corpus_with_pool(folder / "corpus", users, items)
        self.tokens_per_user = len(self.users(256).tokens) / 256
        self.found: Row = {"quick": quick, "precision": self.precision}

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def users(self, n: int, part: int = 0) -> PackedBatch:
        """A batch of so many users."""
        users = (np.arange(n) + part * n) % self.corpus.card.n_users
        return make_batch(self.corpus, users, self.cap)

    def batches(self, tokens: int, n: int = 4) -> list[PackedBatch]:
        """Batches of whole users with about so many tokens."""
        return [self.users(max(2, round(tokens / self.tokens_per_user)), i) for i in range(n)]

    def best(self, size: str) -> Row:
        """The tokens in a batch with the highest utilisation."""
        of = [r for r in self.found.get("packed", ()) if (r["size"], r["side"]) == (size, "eager")]
        return max(of, key=lambda r: r.get("mfu", 0), default={"budget": self.budgets[-1]})

    def add(self, section: str, row: Row) -> None:
        """Keep a row, and tell it."""
        row = {k: str(v) if v in (math.inf, -math.inf) or v != v else v for k, v in row.items()}
        self.found.setdefault(section, []).append(row)
        say(f"{section:<10}{words(row)}")

    def seconds(self, call: Callable[[], Any]) -> float:
        """Time of one call, from an idle device to its end."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclasses.dataclass
class Took:
    """What was measured of a side."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    first_s: float = 0.0
    peak_gib: float | None = None
    failed: str | None = None

    @property
    def median(self) -> float:
        """Of the turns. [s]"""
        return statistics.median(self.seconds)


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call returns, or why it failed; its memory is then free again."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            return call(), None
        except Exception as e:
            traceback.clear_frames(e.__traceback__)
            lines = [f"{type(e).__name__}: {e}", *(str(w.message) for w in told)]
            lines = [" ".join(line.partition("(Triggered")[0].split())[:300] for line in lines]
            why = " | ".join(dict.fromkeys(lines))[:1200]
    free()
    return None, why


def free() -> None:
    """Give unused memory back."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # of a device that has failed for good
            torch.cuda.empty_cache()


def measure(
    bench: Bench, sides: dict[str, Step], s: float = 2, warm: int = 3, turns: int = 20
) -> dict[str, Took]:
    """Run all sides in turn, for about ``s`` seconds each; a side is called with the turn."""
    found = {name: Took() for name in sides}
    warm, turns = (min(1, warm), min(2, turns)) if bench.quick else (warm, turns)
    start = time.perf_counter()
    for turn in range(-warm, turns):
        if turn == 0:
            start = time.perf_counter()
        for name, side in sides.items():
            if (of := found[name]).failed is not None:
                continue
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            call = functools.partial(bench.seconds, functools.partial(side, turn))
            took, of.failed = attempt(call)
            if took is not None:
                of.first_s = of.first_s or took
                of.seconds += [took] if turn >= 0 else []
            if bench.cuda:
                of.peak_gib = max(of.peak_gib or 0, torch.cuda.max_memory_allocated() / 2**30)
        if turn >= 4 and time.perf_counter() - start > s * len(sides):
            break
    return found


def rates(bench: Bench, config: ModelConfig, batches: list[PackedBatch], took: Took) -> Row:
    """Rates of one side, medians over its turns, or why it failed."""
    if took.failed is not None:
        return {"failed": took.failed, "peak_gib": took.peak_gib}
    of = list(zip(batches * len(took.seconds), took.seconds, strict=False))
    flops_per_s = statistics.median(flops_of(config, batch) / s for batch, s in of)
    return {
        "mfu": flops_per_s / (bench.peak or bench.gemm),
        "gemm_share": flops_per_s / bench.gemm,
        "ms": took.median * 1e3,
        "tokens_per_s": statistics.median(len(batch.tokens) / s for batch, s in of),
        "users": batches[0].n_users,
        "users_per_s": batches[0].n_users / took.median,
        "peak_gib": took.peak_gib,
        "turns": len(took.seconds),
    }


def flops_of(config: ModelConfig, batch: PackedBatch) -> float:
    """Exact FLOPs of a training step."""
    items, rows = batch.item_lengths, batch.row_lengths
    return exact_flops(
        config, tokens=items.sum(), tokens_sq=(items**2).sum(), items=rows.sum(),
        items_sq=(rows**2).sum(), rows=batch.n_rows, users=batch.n_users,
        n_views=batch.n_views, negatives=batch.n_users,
    ).total  # fmt: skip


# --- a step, packed and padded --------------------------------------------------------------------


class Trainer:
    """A model with the optimiser that stands in for the engine's."""

    def __init__(self, bench: Bench, config: ModelConfig) -> None:
        self.model: Any = build(config, VOCABULARY).to(bench.device, bench.dtype).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 5e-4, (0.9, 0.98), 1e-6, weight_decay=0.1, fused=True
        )

    def step(self, encode: Encode) -> None:
        """Forward, loss, backward, update."""
        self.optimizer.zero_grad()  # before, not after: a step that failed may have left some
        loss_of(self.model, encode()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
        self.optimizer.step()

    def side(self, encodes: list[Encode]) -> Step:
        """A step on one batch after another."""
        return lambda turn: self.step(encodes[turn % len(encodes)])

    def eager(self, batches: list[PackedBatch]) -> Step:
        """What training does."""
        return self.side([functools.partial(self.model, b) for b in batches])


def trainers(bench: Bench) -> Iterator[tuple[str, ModelConfig, Trainer]]:
    """One of every size, after the other."""
    for name, config in bench.sizes.items():
        yield name, config, Trainer(bench, config)
        free()


def loss_of(model: Any, user_emb: Tensor) -> Tensor:
    """The contrastive loss between the services."""
    projected = model.project(user_emb).unflatten(0, (len(SERVICES), -1))
    return contrastive_loss(projected, model.logit_scale, projected.shape[1])


def layouts(bench: Bench, config: ModelConfig, lengths: Any, tile: int | None) -> list[Layout]:
    """Tiles of some batches, of the size that the model chooses or of a given one."""
    with mock.patch.object(transformer, "TILE_SIZES", (tile,) if tile else transformer.TILE_SIZES):
        return [Layout.of(n, config.d_model, bench.device) for n in lengths]


def same_tiles(of: list[Layout]) -> list[Layout]:
    """The same with empty tiles added, so that all have as many."""
    most, found = max(x.shape[0] for x in of), []
    for x in of:
        empty = (0, (most - x.shape[0]) * x.shape[1])
        sequence = F.pad(x.sequence, empty, value=len(x.lengths))
        places, shape = F.pad(x.places, empty), (most, x.shape[1])
        found.append(dataclasses.replace(x, places=places, sequence=sequence, shape=shape))
    return found


def ahead(
    bench: Bench,
    model: Any,
    batches: list[PackedBatch],
    tile: int | None = None,
    same: bool = False,
) -> list[Encode]:
    """Packed encoders whose tiles lie on the device beforehand.

    Args:
        tile: slots of a tile of items; None: as the model chooses.
        same: as many tiles in every batch.
    """
    items = layouts(bench, model.config, [b.item_lengths for b in batches], tile)
    rows = layouts(bench, model.config, [b.row_lengths for b in batches], None)
    if same:
        items, rows = same_tiles(items), same_tiles(rows)

    def encoder(batch: PackedBatch, item: Layout, user: Layout) -> Encode:
        ids = torch.zeros(item.shape[0] * item.shape[1], dtype=torch.long, device=bench.device)
        ids[item.slots] = torch.from_numpy(batch.tokens.astype(np.int64)).to(bench.device)
        index = torch.from_numpy(batch.items).to(bench.device)

        def encode() -> Tensor:
            item_emb = model.item(model.token_emb(ids), item)
            return model.service(user.scatter(item_emb[index]), user)

        return encode

    return [encoder(*of) for of in zip(batches, items, rows, strict=True)]


def padded(bench: Bench, model: Any, batch: PackedBatch, both: bool) -> Encode:
    """The same layers on padded items and rows.

    Args:
        both: compute an item for every slot of every row.
    """

    def slots(lengths: Any, n: int) -> tuple[Any, Any]:
        real = np.arange(n) < lengths[:, None]
        return np.where(real, (np.cumsum(lengths) - lengths)[:, None] + np.arange(n), 0), real

    def through(stack: Stack, real: Any) -> Callable[[Tensor], Tensor]:
        keys, dtype = torch.from_numpy(real).to(bench.device), model.token_emb.weight.dtype
        mean = (keys / keys.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1).to(dtype)
        other = (keys[:, :, None] != keys[:, None, :]).unsqueeze(1)  # of ours' form and back-end
        bias = torch.zeros(other.shape, dtype=dtype, device=bench.device)
        bias.masked_fill_(other, float("-inf"))

        def run(x: Tensor) -> Tensor:
            n, t, d = x.shape
            x = x + stack.position_emb.weight[:t]
            x = F.dropout(x, stack.dropout, stack.training).view(n * t, d)
            for layer in stack.layers:
                x = layer(x, bias)
            return (mean @ stack.ln(x).view(n, t, d)).squeeze(1)

        return run

    index, real = slots(batch.item_lengths, MAX_TOKENS)
    places, real_rows = slots(batch.row_lengths, bench.cap)
    places = batch.items[places]
    if both:
        index, real = index[places.ravel()], real[places.ravel()] & real_rows.reshape(-1, 1)
        places = np.arange(places.size).reshape(places.shape)
    ids = torch.from_numpy(np.where(real, batch.tokens[index].astype(np.int64), 0)).to(bench.device)
    where = torch.from_numpy(places).to(bench.device)
    item, user = through(model.item, real), through(model.service, real_rows)
    return lambda: user(item(model.token_emb(ids))[where])


def corpus_with_pool(folder: Path, users: int, items: int) -> Corpus:
    """The corpus of ``batches.py`` with users of validation and a pool, which the loop asks for."""
    manifest = make_corpus(folder, users, items, np.random.default_rng(0)).manifest
    manifest["splits"] = {"pretraining": users - 2 * POOL, "validation": POOL, "pool": POOL}
    digest = content_digest(manifest)
    pool = PoolConfig(size=POOL, digest=digest).model_dump()
    manifest["card"] |= {"digest": digest, "n_users": users - 2 * POOL, "pool": pool}
    write_json(folder / "manifest.json", manifest | {"digest": digest})
    return Corpus.open(folder)


def words(row: Row) -> str:
    """One line for people."""
    said = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v is not None}
    return " ".join(f"{k}={v}" for k, v in said.items())


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)
