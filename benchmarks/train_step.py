"""The training step of the encoder on CPU: packed, against padded ones with the same weights.

Forward, loss and backward of one batch, without the optimiser, in one process; the sides take
turns, and ratios are medians over the turns. Before anything is timed, all sides must give the same
user embeddings, loss and gradients.

    packed               scaling.models: ragged at both levels; tiles and masks are made in the step
    packed, items once   the same, every distinct item of the batch encoded once
    packed, cache        packed in chunks of 1,250 tokens (8; with --quick 2), of which all but the
                         last are computed again in the backward pass
    padded SDPA          every item 32 slots, every row 64: a plain pre-LN block on
                         F.scaled_dot_product_attention with a mask of keys
    TransformerEncoder   the same slots through torch's nn.TransformerEncoder
    text tower           items in one list, padded to the longest of the batch, rows likewise
    text tower, sorted   items sorted by length first, in batches of 32 padded to their longest

The text towers imitate sentence-transformers by torch's nn.TransformerEncoder; the package itself
is not run. It pads as the first in training, and as the second where it only embeds. open_clip pads
all texts to the context of its model, as ``TransformerEncoder`` here. Ids, masks and order of the
padded sides are made beforehand, as by a data loader.

Workload: lengths of items lognormal (sigma 0.6, mean 9.5, at most 32), items by Zipf's law
(exponent 1, 100,000 items), vocabulary 8,192; 4 + 4 layers of width 256, 4 heads, no dropout.
``one_level``: all rows have 64 items. ``ragged``: rows of 27 items on average, at most 64.

Padded activations are large, and glibc gives large blocks back to the system whenever they are
freed: padded sides then also wait for pages. So the process starts itself again with settings that
keep freed memory (``--malloc tuned``), which is fair to them.

    python benchmarks/train_step.py --quick
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batches import VOCABULARY, make_corpus
from batches import ours as batches_of
from scipy.special import ndtri
from torch import Tensor, nn

from scaling.config import MAX_TOKENS, ModelConfig
from scaling.flops import exact_flops
from scaling.models import build
from scaling.models.losses import contrastive_loss
from scaling.models.transformer import Stack, chunk_bounds
from scaling.packing import PackedBatch, spans

TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": str(2**28),
}
LAYERS, HEADS, VOCAB, CATALOGUE = 4, 4, 8_192, 100_000
ITEMS_PER_ROW = 64
CHUNK = 1_250  # tokens; in far smaller ones, products of small matrices cost more than the cache
SORTED = 32  # the default of sentence-transformers' encode
GEMM = 2_048
LEVELS = ("one_level", "ragged")
TOLERANCES = {"embeddings": 1e-4, "loss": 1e-5, "gradients": 5e-3}

Ints = np.ndarray[Any, np.dtype[np.int64]]
Encode = Callable[[], Tensor]


# --- the workload ---------------------------------------------------------------------------------


def make_batches(rows: Ints, rng: np.random.Generator) -> tuple[PackedBatch, PackedBatch]:
    """Rows of so many items: every behaviour encoded, and every distinct item once.

    Ranks and lengths are evenly spaced quantiles, so that batches of all sizes are alike: the first
    item alone is 8 % of all behaviours, and its length would decide how much padding there is.
    """
    spread = (np.arange(CATALOGUE) + 1) * 0.6180339887 % 1
    lengths = lognormal(spread, np.log(9.5) - 0.18, 0.6, MAX_TOKENS)
    starts = np.cumsum(lengths) - lengths
    tokens = rng.integers(1, VOCAB, lengths.sum())
    ranks = np.exp(quantiles(rows.sum()) * np.log(CATALOGUE + 1)).astype(np.int64) - 1
    once, places = np.unique(rng.permutation(ranks), return_inverse=True)

    def packed(encoded: Ints, items: Ints) -> PackedBatch:
        return PackedBatch(
            tokens=tokens[spans(starts[encoded], lengths[encoded])],
            token_offsets=np.append(0, np.cumsum(lengths[encoded])),
            items=items,
            item_offsets=np.append(0, np.cumsum(rows)),
            n_views=2,
        )

    return packed(once[places], np.arange(len(places))), packed(once, places)


def quantiles(n: int) -> Any:
    return (np.arange(n) + 0.5) / n


def lognormal(at: Any, mu: float, sigma: float, most: int) -> Ints:
    """The distribution's values at some quantiles, as whole numbers in 1..``most``."""
    values = np.exp(mu + sigma * ndtri(at))
    return np.rint(values).astype(np.int64).clip(1, most)


def flops_of(model: ModelConfig, batch: PackedBatch) -> float:
    """Exact FLOPs of a training step on what the batch encodes."""
    return exact_flops(
        model,
        tokens=batch.item_lengths.sum(),
        tokens_sq=(batch.item_lengths**2).sum(),
        items=batch.row_lengths.sum(),
        items_sq=(batch.row_lengths**2).sum(),
        rows=batch.n_rows,
        users=batch.n_users,
        n_views=batch.n_views,
        negatives=batch.n_users,
    ).total


# --- the padded sides -----------------------------------------------------------------------------


class Slots:
    """Padded sequences: the element of every slot, whether it has one, and the mean over them."""

    def __init__(self, lengths: Ints, slots: int) -> None:
        real = np.arange(slots) < lengths[:, None]
        index = (np.cumsum(lengths) - lengths)[:, None] + np.arange(slots)
        self.index, self.real = torch.from_numpy(np.where(real, index, 0)), torch.from_numpy(real)
        self.keys = self.real.clone()
        self.keys[:, 0] = True  # the softmax of a sequence without any would be NaN
        self.weights = (self.real / self.real.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1)

    def mean(self, hidden: Tensor) -> Tensor:
        """[sequences, slots, d] -> [sequences, d]"""
        return (self.weights @ hidden).squeeze(1)


def sdpa(stack: Stack) -> Callable[[Tensor, Slots], Tensor]:
    """Layers of a stack as plain blocks on padded sequences."""

    def run(x: Tensor, slots: Slots) -> Tensor:
        n, length, d = x.shape
        bias = x.new_zeros(n, 1, 1, length).masked_fill(~slots.keys[:, None, None], float("-inf"))
        for layer in stack.layers:
            qkv = layer.qkv(layer.ln1(x)).view(n, length, 3, HEADS, d // HEADS)
            a = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=bias)
            x = x + layer.out(a.transpose(1, 2).flatten(2))
            x = x + layer.fc2(F.gelu(layer.fc1(layer.ln2(x))))
        return stack.ln(x)

    return run


def encoder(stack: Stack) -> Callable[[Tensor, Slots], Tensor]:
    """Layers of a stack as torch's nn.TransformerEncoder, sharing the parameters."""
    d = stack.ln.normalized_shape[0]
    layer = nn.TransformerEncoderLayer(
        d, HEADS, 4 * d, 0.0, F.gelu, batch_first=True, norm_first=True
    )
    torchs = nn.TransformerEncoder(layer, LAYERS, norm=stack.ln, enable_nested_tensor=False)
    for theirs, own in zip(torchs.layers, stack.layers, strict=True):
        theirs.self_attn.in_proj_weight = own.qkv.weight
        theirs.self_attn.in_proj_bias = own.qkv.bias
        theirs.self_attn.out_proj = own.out
        theirs.norm1, theirs.norm2 = own.ln1, own.ln2
        theirs.linear1, theirs.linear2 = own.fc1, own.fc2
    torchs.train()
    return lambda x, slots: torchs(x, src_key_padding_mask=~slots.keys)


def padded(model: Any, batch: PackedBatch, layers: Any, full: bool, together: int = 0) -> Encode:
    """User embeddings through ``layers`` (``sdpa`` or ``encoder``).

    Args:
        full: rows have 64 slots and items 32, those of empty slots computed like all others;
            otherwise both are padded to the longest of the batch.
        together: sort items by length and pad so many to their longest; 0: all at once.
    """
    item, service = layers(model.item), layers(model.service)
    lengths, rows = batch.item_lengths, batch.row_lengths
    slots = Slots(rows, ITEMS_PER_ROW if full else rows.max())
    places, order = slots.index, np.arange(len(lengths))
    if full:  # one item for every slot of every row
        order = places.ravel().numpy()
        lengths = np.where(slots.real.ravel(), lengths[order], 0)
        places = torch.arange(places.numel()).view(places.shape)
    elif together:
        order = np.argsort(lengths, kind="stable")
        places = torch.from_numpy(np.argsort(order))[places]
        lengths = lengths[order]
    parts = []
    for a in range(0, len(lengths), together or len(lengths)):
        n = lengths[a : a + (together or len(lengths))]
        part = Slots(n, MAX_TOKENS if full else n.max())
        chosen = spans(batch.token_offsets[:-1][order[a : a + len(n)]], n)
        ids = torch.from_numpy(batch.tokens[chosen])[part.index]
        parts.append((ids.where(part.real, 0), part))

    def run(stack: Stack, apply: Any, x: Tensor, slots: Slots) -> Tensor:
        return slots.mean(apply(x + stack.position_emb.weight[: x.shape[1]], slots))

    def encode() -> Tensor:
        item_emb = [run(model.item, item, model.token_emb(ids), part) for ids, part in parts]
        return run(model.service, service, torch.cat(item_emb)[places], slots)

    return encode


# --- the comparison -------------------------------------------------------------------------------


def sides_of(model: Any, batch: PackedBatch, once: PackedBatch) -> dict[str, Encode]:
    """User embeddings of one batch, packed and padded."""
    return {
        "packed": lambda: model(batch),
        "packed, items once": lambda: model(once),
        "padded SDPA": padded(model, batch, sdpa, full=True),
        "TransformerEncoder": padded(model, batch, encoder, full=True),
        "text tower": padded(model, batch, encoder, full=False),
        "text tower, sorted": padded(model, batch, encoder, full=False, together=SORTED),
    }


def loss_of(model: Any, user_emb: Tensor) -> Tensor:
    """The contrastive loss between two services."""
    projected = model.project(user_emb).unflatten(0, (2, -1))
    return contrastive_loss(projected, model.logit_scale, projected.shape[1])


def same(model: Any, sides: dict[str, Encode]) -> dict[str, float]:
    """Stop unless all sides give the first's embeddings, loss and gradients; returns how near."""
    found: list[tuple[Tensor, ...]] = []
    for encode in sides.values():
        user_emb = encode()
        loss = loss_of(model, user_emb)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((user_emb.detach(), loss.detach(), *gradients))
    embeddings, losses, *gradients = zip(*found, strict=True)
    entry = [float(of[0].abs().max()) for of in gradients]
    entry = [max(e, 1e-3 * max(entry)) for e in entry]  # one that is about 0 is rounding alone
    largest = {
        "embeddings": max(float((e - embeddings[0]).abs().max()) for e in embeddings),
        "loss": max(float((e - losses[0]).abs()) for e in losses),
        "gradients": max(  # of a parameter, over its largest entry
            float((g - of[0]).abs().max()) / e
            for of, e in zip(gradients, entry, strict=True)
            for g in of
        ),
    }
    if not all(largest[name] < most for name, most in TOLERANCES.items()):
        raise SystemExit(f"the sides do not compute the same: {largest}")
    return largest


def saved_bytes(model: Any, encode: Encode) -> int:
    """Bytes held for the backward pass at the end of the forward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, encode())  # held until all is counted, or storages would be reused
    del loss
    return sum(held.values())


def level(model: Any, batch: PackedBatch, sides: dict[str, Encode], turns: int) -> dict[str, Any]:
    """What is measured on one batch; FLOPs and tokens are those of every behaviour, unpadded."""
    differences = same(model, sides)  # and every side has run once
    matrix = torch.randn(GEMM, GEMM, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in (*sides, "gemm")}
    for turn in range(turns):
        for name, encode in sides.items():
            model.zero_grad()
            start = time.perf_counter()
            loss_of(model, encode()).backward()
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(3):
            matrix @ matrix
        seconds["gemm"].append((time.perf_counter() - start) / 3)
        say(f"turn {turn + 1} of {turns}")

    def over(name: str) -> float:
        pairs = zip(seconds[name], seconds["packed"], strict=True)
        return statistics.median(a / b for a, b in pairs)

    flops, tokens, behaviours = flops_of(model.config, batch), len(batch.tokens), len(batch.items)
    slots = batch.n_rows * ITEMS_PER_ROW * (MAX_TOKENS + 1)
    return {
        "tokens": tokens,
        "items_per_row": behaviours / batch.n_rows,
        "slots_over_elements": slots / (tokens + behaviours),  # all that packing alone can gain
        "gemm_gflops_per_s": 2 * GEMM**3 / statistics.median(seconds["gemm"]) / 1e9,
        "gemm_share": flops / (2 * GEMM**3) * over("gemm"),
        "differences": differences,
        "sides": {
            name: {
                "s": (s := statistics.median(seconds[name])),
                "over_packed": over(name),
                "gflops_per_s": flops / s / 1e9,
                "tokens_per_s": tokens / s,
                "saved_mib": saved_bytes(model, encode) / 2**20,
            }
            for name, encode in sides.items()
        },
    }


def waiting(corpus: Any, config: ModelConfig, users: int, steps: int) -> float:
    """Share of training steps that is spent waiting for the next batch, after the first."""
    model = build(config, VOCABULARY)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
    )
    batches = batches_of(corpus, users, False, range(steps + 1))
    batch, waited, begin = next(batches), 0.0, time.perf_counter()
    for _ in range(steps):
        loss_of(model, model(batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
    return waited / (time.perf_counter() - begin)


def compare(folder: Path, items: int, rows: int, width: int, turns: int) -> dict[str, Any]:
    """Measure both levels, and the waiting for data."""
    rng = np.random.default_rng(0)
    config = ModelConfig(layers=LAYERS, d_model=width, heads=HEADS, dropout=0.0)
    model = build(config, VOCAB)
    full, full_once = make_batches(np.full(items // ITEMS_PER_ROW, ITEMS_PER_ROW), rng)
    histories = lognormal(quantiles(rows), np.log(21), 0.9, ITEMS_PER_ROW)
    part, part_once = make_batches(histories, rng)
    one_level, ragged = sides_of(model, full, full_once), sides_of(model, part, part_once)
    del one_level["text tower"]  # the longest item has 32 tokens: it is TransformerEncoder
    one_level["packed, cache"] = lambda: model(full, micro_batch_tokens=CHUNK)
    measured = [level(model, full, one_level, turns), level(model, part, ragged, turns)]
    one, both = (of["sides"] for of in measured)
    held = {name: side["saved_mib"] for name, side in one.items()}
    small = ModelConfig(layers=8, d_model=64, heads=1, dropout=0.0)
    corpus = make_corpus(folder, 300, 10_000, rng)
    users = max(2, items // 128)
    return {
        "packed_over_padded_sdpa": one["padded SDPA"]["over_packed"],
        "ragged_over_encoder": both["TransformerEncoder"]["over_packed"],
        "activation_share": held["packed"] / held["TransformerEncoder"],
        "cache_over_full": one["packed, cache"]["over_packed"],
        "cache_activation_share": held["packed, cache"] / held["packed"],
        "cache_chunks": len(chunk_bounds(full.item_lengths, CHUNK)),
        "data_share": waiting(corpus, config, users, turns + 2),
        "data_share_8x64": waiting(corpus, small, users, turns + 2),
        "gemm_share": measured[0]["gemm_share"],
        **dict(zip(LEVELS, measured, strict=True)),
        "malloc": {name: os.environ.get(name) for name in TUNED},
        "threads": torch.get_num_threads(),
        "width": width,
        "turns": turns,
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = []
    for name in LEVELS:
        lines.append(f"{name:<20}{'s':>8}{'/ packed':>10}{'GFLOP/s':>9}{'k tok/s':>9}{'MiB':>7}")
        lines += [
            f"{side:<20}{of['s']:>8.3f}{of['over_packed']:>10.2f}{of['gflops_per_s']:>9.0f}"
            f"{of['tokens_per_s'] / 1e3:>9.1f}{of['saved_mib']:>7.0f}"
            for side, of in found[name]["sides"].items()
        ]
        lines += [*numbers({k: v for k, v in found[name].items() if k != "sides"}), ""]
    return "\n".join(lines + numbers({k: v for k, v in found.items() if k not in LEVELS}))


def numbers(found: dict[str, Any]) -> list[str]:
    return [f"{k:<28}{f'{v:.4g}' if isinstance(v, float) else v}" for k, v in found.items()]


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def start_again(malloc: str) -> None:
    """Replace this process, unless its environment already is what ``--malloc`` asks for."""
    wanted = TUNED if malloc == "tuned" else {}
    if any(os.environ.get(name) != wanted.get(name) for name in TUNED):
        others = {name: value for name, value in os.environ.items() if name not in TUNED}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], others | wanted)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, help="of one_level; default: 1,024, quick 256")
    parser.add_argument("--rows", type=int, help="of ragged; default: 32, quick 4")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--turns", type=int)
    parser.add_argument("--malloc", choices=["tuned", "default"], default="tuned")
    parser.add_argument("--quick", action="store_true", help="smaller batches, within 50 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    start_again(args.malloc)
    items = args.items or (256 if args.quick else 1_024)
    rows = args.rows or (4 if args.quick else 32)
    turns = args.turns or (2 if args.quick else 5)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = compare(Path(folder), items, rows, args.width, turns)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
