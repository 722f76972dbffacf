"""Training on one GPU: utilisation, packed against padded, attention back-ends, compile, batches.

Wheels are gathered where there is a network, on the same system and Python as the GPU machine's,
and installed on the GPU machine, which needs no network, from the root of a clone:

    pip wheel -w wheels -c constraints.txt .
    pip install --no-index --find-links wheels clue-scaling
    python benchmarks/gpu.py --out gpu.json

Sections come in the order of their importance and end within ``--minutes``. What no time is left
for is listed as skipped, what fails is a row that says why, and ``--out`` is written again after
every section. Compiled sides need a C compiler and Python's headers.

    device      versions, a large product, and what SDPA takes for our masked tiles by default
    exact       in fp32: packed against padded, and the embedding cache, with the same dropout
    packed      utilisation (MFU) of three sizes by tokens in a batch. ``ahead``: tiles and masks
                lie on the device beforehand; also with tiles of another size, and no dropout
    padded      the same weights on items padded to 32 tokens (``items``) and rows to 128 items, too
                (``both``: those of empty slots are computed like all others). Ids and masks are
                made beforehand; ratios are of the largest batch that fits
    loop        the real loop on DeepSpeed: 256 users a step, fp32 masters, embedding cache
    attention   alone, forward and backward: PyTorch's back-ends, varlen_attn, flex_attention
    profile     where a step's time goes, and where the host waits for the GPU
    compiled    layers through torch.compile: any number of tiles, and always the same
    largest     batch doubled until memory or time ends, without and with the embedding cache

MFU is FLOPs of real tokens (``scaling.flops.exact_flops``: without padding, and without what a
cache computes again) over time and the peak of NVIDIA's data sheet (``scaling.train.throughput``),
or where ``peak_source`` says so over the large product, which is repeated before every section.
But for ``loop``, a step is tiles and masks, forward, loss in fp32, backward, clipping and fused
AdamW, parameters and moments in ``precision``. Sides take turns; times are medians, of GPU events.
Lengths have the paper's means (batches.py).

    python benchmarks/gpu.py --device cpu --quick        # only whether all of it runs
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from batches import VOCABULARY
from gpu_sides import (
    Bench,
    Encode,
    Row,
    TimeUp,
    Trainer,
    ahead,
    attempt,
    free,
    layouts,
    loss_of,
    measure,
    padded,
    rates,
    say,
    trainers,
    words,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaling.config import ModelConfig, RunConfig, TrainSettings
from scaling.files import write_json
from scaling.models import build, transformer
from scaling.models.transformer import Layout
from scaling.rundir import RunDir

FORCED = ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "FLASH_ATTENTION", "MATH")


# --- sections -------------------------------------------------------------------------------------


def device(bench: Bench) -> None:
    """The machine, and what SDPA takes for our tiles unless told otherwise."""
    bench.found |= {
        "device": torch.cuda.get_device_name() if bench.cuda else "cpu",
        "capability": torch.cuda.get_device_capability() if bench.cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "peak_tflops": (bench.peak or bench.gemm) / 1e12,
        "peak_source": "data sheet" if bench.peak else "the product of this run",
    }
    for name, config in bench.sizes.items():
        for stack, layout in tiles_of(bench, config).items():
            qkv, bias = attention_inputs(bench, config, layout)
            for rate in (0.0, config.dropout):
                of = (*qkv.permute(2, 0, 3, 1, 4), bias, rate, False)
                chosen, why = attempt(functools.partial(torch._fused_sdp_choice, *of))
                row = {"size": name, "stack": stack, "tiles": layout.shape, "dropout": rate}
                bench.add("default", row | {"backend": why or SDPBackend(chosen).name})


def exact(bench: Bench) -> None:
    """Whether what is compared is the same: differences from the first, over the largest entry."""
    batch = bench.batches(bench.budgets[0], 1)[0]
    most = len(batch.tokens) // 3
    direct = mock.patch.object(transformer, "checkpoint", lambda encode, *of, **_: encode(*of))
    for rate in (0.0, 0.1):
        config = bench.sizes["d64"].model_copy(update={"dropout": rate})
        model: Any = build(config, VOCABULARY).to(bench.device)
        chunks, cache = functools.partial(model, batch, most), functools.partial(model, batch, most)
        sides: dict[str, Encode] = {"chunks, no cache": direct(chunks), "cache": cache}
        if not rate:
            sides |= {
                "packed": functools.partial(model, batch),
                "ahead": ahead(bench, model, [batch])[0],
                "padded, items": padded(bench, model, batch, both=False),
                "padded, both": padded(bench, model, batch, both=True),
            }
        first: list[Tensor] = []
        for name, encode in sides.items():
            torch.manual_seed(0)
            user_emb = encode()
            gradients = torch.autograd.grad(loss_of(model, user_emb), list(model.parameters()))
            now = [user_emb.detach(), *gradients]
            first = first or now
            row = {"side": name, "dropout": rate, "embeddings": far(now[:1], first[:1])}
            bench.add("exact", row | {"gradients": far(now[1:], first[1:])})


def far(of: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference, over the largest entry of its tensor."""
    pairs = zip(of, truth, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def packed(bench: Bench) -> None:
    """Utilisation of all sizes by tokens in a batch."""
    for name, config, trainer in trainers(bench):
        still = Trainer(bench, config.model_copy(update={"dropout": 0.0}))
        for budget in bench.budgets:
            batches = bench.batches(budget)
            sides = {
                "eager": trainer.eager(batches),
                "ahead": trainer.side(ahead(bench, trainer.model, batches)),
            }
            if budget == bench.budgets[-1]:
                for tile in (64, 128):
                    encodes = ahead(bench, trainer.model, batches, tile)
                    sides[f"ahead, tiles of {tile}"] = trainer.side(encodes)
                sides["ahead, no dropout"] = still.side(ahead(bench, still.model, batches))
            for side, took in measure(bench, sides).items():
                row = {"size": name, "budget": budget, "side": side}
                bench.add("packed", row | rates(bench, config, batches, took))


def padded_sides(bench: Bench) -> None:
    """Padded over packed at the largest batch that fits padded."""
    for name, config, trainer in trainers(bench):
        for budget in reversed(bench.budgets):
            batches = bench.batches(budget, 2)
            sides = {"packed": trainer.eager(batches)}
            for side in ("items", "both"):
                encodes = [padded(bench, trainer.model, b, side == "both") for b in batches]
                sides[side] = trainer.side(encodes)
            found = measure(bench, sides)
            for side, took in found.items():
                row = {"size": name, "budget": budget, "side": side}
                pairs = list(zip(took.seconds, found["packed"].seconds, strict=False))
                over = statistics.median(a / b for a, b in pairs) if pairs else None
                row |= rates(bench, config, batches, took)
                bench.add("padded", row | {"over_packed": over})
            if found["both"].failed is None:
                break


def tiles_of(bench: Bench, config: ModelConfig, tile: int | None = None) -> dict[str, Layout]:
    """Tiles of both stacks in the largest batch of ``packed``."""
    batch = bench.batches(bench.budgets[-1], 1)[0]
    found = layouts(bench, config, [batch.item_lengths, batch.row_lengths], tile)
    return dict(zip(("item", "service"), found, strict=True))


def attention_inputs(bench: Bench, config: ModelConfig, layout: Layout) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of a layer as it has them [T, t, 3, h, d / h], and the mask."""
    shape = (*layout.shape, 3, config.heads, config.d_model // config.heads)
    qkv = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    return qkv.requires_grad_(), layout.attention_bias(bench.dtype)


def attention(bench: Bench) -> None:
    """Every back-end on the tiles of both stacks, as chosen and of 128."""
    for name in ("d720",) if bench.quick else ("d720", "d64"):
        seen = set()
        for tile in (None, 128):
            for stack, layout in tiles_of(bench, bench.sizes[name], tile).items():
                if (stack, layout.shape) not in seen:
                    seen.add((stack, layout.shape))
                    row = {"size": name, "stack": stack, "tiles": layout.shape}
                    attention_rows(bench, bench.sizes[name], layout, row)


def attention_rows(bench: Bench, config: ModelConfig, layout: Layout, about: Row) -> None:
    """Forward and backward of attention alone; differences are from fp32."""
    qkv, bias = attention_inputs(bench, config, layout)
    upstream, slots = torch.randn_like(qkv[:, :, 0]), layout.slots
    ragged = qkv.detach().flatten(0, 1)[slots].requires_grad_()

    def sdpa(of: Tensor, mask: Tensor, rate: float, forced: str = "") -> Tensor:
        q, k, v = of.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(getattr(SDPBackend, forced)) if forced else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, mask, rate).transpose(1, 2)

    def varlen(of: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        starts = F.pad(layout.lengths.cumsum(0), (1, 0)).int()
        return varlen_attn(*of.unbind(1), starts, starts, longest, longest)

    @functools.cache
    def compiled_flex() -> Any:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()
        rows, t = layout.sequence.view(layout.shape), layout.shape[1]
        same = lambda b, h, i, j: rows[b, i] == rows[b, j]  # noqa: E731
        mask = create_block_mask(same, len(rows), None, t, t, device=str(bench.device))
        compiled = torch.compile(flex_attention, backend=bench.backend, dynamic=False)
        return functools.partial(compiled, block_mask=mask)

    def flex(of: Tensor) -> Tensor:
        return compiled_flex()(*of.permute(2, 0, 3, 1, 4)).transpose(1, 2)

    def both(attend: Callable[[Tensor], Tensor], of: Tensor, up: Tensor) -> list[Tensor]:
        out = attend(of)
        return [out.detach(), *torch.autograd.grad(out, of, up)]

    def elements(of: list[Tensor]) -> list[Tensor]:
        return [x.flatten(0, 1)[slots] if x.shape[:2] == layout.shape else x for x in of]

    longest = int(layout.lengths.max())
    sides: dict[tuple[str, float], tuple[Any, Tensor, Tensor]] = {
        (forced or "default", rate): (
            functools.partial(sdpa, mask=bias, rate=rate, forced=forced), qkv, upstream
        )
        for rate in (0.0, config.dropout)
        for forced in ("", *FORCED)
    }  # fmt: skip
    sides["varlen_attn", 0.0] = (varlen, ragged, upstream.flatten(0, 1)[slots])
    if layout.shape[1] == 128 and about["size"] == "d720":  # compiling takes its time
        sides["flex_attention", 0.0] = (flex, qkv, upstream)
    precise = functools.partial(sdpa, mask=bias.float(), rate=0.0, forced="MATH")
    truth = elements(both(precise, qkv.detach().float().requires_grad_(), upstream.float()))
    calls: Any = {key: lambda turn, side=side: both(*side) for key, side in sides.items()}
    for key, took in measure(bench, calls, 0.3).items():
        row = about | {"backend": key[0], "dropout": key[1], "failed": took.failed}
        if took.failed is None:
            row["ms"] = took.median * 1e3
            row["difference"] = None if key[1] else far(elements(both(*sides[key])), truth)
        bench.add("attention", row)


def loop(bench: Bench) -> None:
    """A short run of every size through the real loop; its own figures, medians over steps."""
    from scaling.train.loop import train

    card, users = bench.corpus.card, 8 if bench.quick else 256
    data: Any = {"corpus_digest": card.digest, "vocab_size": VOCABULARY}
    for name, model in bench.sizes.items():
        steps = 3 if bench.quick else 12 if name == "d720" else 24
        config = RunConfig(
            model=model, data=data | {"items_per_user": bench.cap}, batch_size=users,
            negatives=users, steps=steps, evaluations=1, pool=card.pool, precision=bench.precision,
        )  # fmt: skip
        run = RunDir.create(bench.folder, config, "bench")
        peak = (bench.peak or bench.gemm) / 1e12
        settings = TrainSettings(checkpoint_every=steps, peak_tflops=peak)
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        result, failed = attempt(functools.partial(train, run, bench.corpus, settings))
        row: Row = {"size": name, "users": users, "steps": steps, "failed": failed}
        if result is not None:
            rows = run.curve("train")
            speeds = [r["speed"] for r in rows[1 if bench.quick else 3 :]]  # the first are slow
            row |= {key: statistics.median(s[key] for s in speeds) for key in speeds[0]}
            flops = rows[-1]["flops_exact"] / rows[-1]["step"]
            row["users_per_s"] = users * row["flops_per_second"] / flops
            row |= {key: result[key] for key in ("micro_batch_tokens", "status", "train_loss")}
        bench.add("loop", row)
        free()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def profile(bench: Bench) -> None:
    """Kernels of a step, time of the host on tiles, and places where the host waits."""
    kind = getattr(torch.autograd.DeviceType, bench.device.type.upper())
    of_kind = f"self_{'device' if bench.cuda else 'cpu'}_time_total"
    for name in ("d720", "d64"):
        config, batch = bench.sizes[name], bench.batches(bench.best(name)["budget"], 1)[0]
        free()
        step = Trainer(bench, config).eager([batch])
        wall = measure(bench, {"": step}, 0.5)[""]
        with torch.profiler.profile() as told:
            bench.seconds(functools.partial(step, 0))
        top = [
            (round(getattr(e, of_kind) / 1e3, 3), e.count, e.key[:90])
            for e in told.key_averages()
            if e.device_type == kind and not e.is_user_annotation
        ]
        start = time.perf_counter()
        for lengths in (batch.item_lengths, batch.row_lengths):
            Layout.of(lengths, config.d_model, torch.device("cpu"))
        host_ms = (time.perf_counter() - start) * 1e3
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("warn")
                step(0)
                torch.cuda.set_sync_debug_mode("default")
        waits = dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen))
        row = {"size": name, "ms": wall.median * 1e3, "kernels_ms": sum(ms for ms, _, _ in top)}
        row |= {"kernels": sum(n for _, n, _ in top), "host_tiles_ms": host_ms, "waits": waits}
        bench.add("profile", row | {"top": sorted(top, reverse=True)[:15]})


def compiled(bench: Bench) -> None:
    """Every layer through torch.compile, beside the same step without."""
    from torch._dynamo.utils import counters

    for name, config, other in trainers(bench):
        plain, batches = Trainer(bench, config), bench.batches(bench.best(name)["budget"])
        for tiles in ("any number", "the same"):
            if bench.left() < 90 and not bench.quick:
                bench.add("compiled", {"size": name, "tiles": tiles, "failed": "left for largest"})
                continue
            torch._dynamo.reset()
            counters.clear()
            for layer in (*other.model.item.layers, *other.model.service.layers):
                layer.compile(backend=bench.backend, dynamic=tiles == "any number")
            sides = {
                side: of.eager(batches)
                if tiles == "any number"
                else of.side(ahead(bench, of.model, batches, same=True))
                for side, of in (("eager", plain), ("compiled", other))
            }
            for side, took in measure(bench, sides).items():
                row = {"size": name, "tiles": tiles, "side": side, "first_s": took.first_s}
                if side == "compiled":
                    row["graphs"] = counters["stats"]["unique_graphs"]
                    row["breaks"] = dict(counters["graph_break"])
                bench.add("compiled", row | rates(bench, config, batches, took))
        if bench.quick:
            break


def largest(bench: Bench) -> None:
    """Double the batch until a step does not fit, or too little time is left for the next."""
    for name, config, trainer in trainers(bench):
        for cache in (None, bench.best(name)["budget"]):
            end = time.monotonic() + min(45, bench.left() / 4)
            n, last = 2 if bench.quick else 32 if cache is None else 256, 0.0
            while n <= (4 if bench.quick else bench.corpus.card.n_users):
                row = {"size": name, "micro_batch_tokens": cache, "users": n}
                if (start := time.monotonic()) + 2.2 * last > end:
                    bench.add("largest", row | {"failed": "no time is left for it"})
                    break
                batch = bench.users(n)
                step = trainer.side([functools.partial(trainer.model, batch, cache)])
                took = measure(bench, {"": step}, warm=0, turns=1)[""]
                bench.add("largest", row | rates(bench, config, [batch], took))
                if took.failed:
                    break
                n, last = 2 * n, time.monotonic() - start


SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "device": (device, 5),
    "exact": (exact, 10),
    "packed": (packed, 40),
    "padded": (padded_sides, 20),
    "loop": (loop, 45),
    "attention": (attention, 20),
    "profile": (profile, 10),
    "compiled": (compiled, 45),
    "largest": (largest, 20),
}
"""In the order of importance, with the seconds below which one is not begun."""


# --- the run --------------------------------------------------------------------------------------


def product(bench: Bench, before: str) -> None:
    """Rate of a large matrix product, before every section: clocks change."""
    n = 512 if bench.quick else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    took = measure(bench, {"": lambda turn: a @ b}, 0.2, warm=20)[""]
    if took.failed:
        raise RuntimeError(f"the product of two matrices fails: {took.failed}")
    bench.gemm = 2 * n**3 / took.median
    row = {"before": before, "n": n, "tflops": bench.gemm / 1e12}
    if bench.cuda:
        query = "driver_version,clocks.sm,clocks.max.sm,power.draw,temperature.gpu"
        with contextlib.suppress(OSError, subprocess.SubprocessError, AttributeError):
            gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            call = ["nvidia-smi", "-i", gpu, f"--query-gpu={query}", "--format=csv,noheader"]
            told = subprocess.run(call, capture_output=True, text=True, timeout=10, check=True)
            row |= zip(query.split(","), told.stdout.strip().split(", "), strict=False)
    bench.add("product", row)


def run(bench: Bench, wanted: list[str], out: Path | None) -> Row:
    """All sections in turn, as far as time goes."""

    def time_up(*_: Any) -> None:
        raise TimeUp

    found, name = bench.found, ""
    found |= {"skipped": {}, "failed": {}, "cut_off": None, "section_s": {}}
    signal.signal(signal.SIGALRM, time_up)
    signal.setitimer(signal.ITIMER_REAL, max(1, bench.left()))
    try:
        for name in wanted:
            section, needed = SECTIONS[name]
            start, left = time.monotonic(), bench.left()
            if left < needed and not bench.quick:
                found["skipped"][name] = f"{left:.0f} s are left, {needed} needed"
                continue
            try:
                product(bench, name)
                section(bench)
            except Exception as e:
                found["failed"][name] = traceback.format_exc(limit=-3)
                say(f"{name}: {found['failed'][name]}")
                traceback.clear_frames(e.__traceback__)
            free()
            found["section_s"][name] = time.monotonic() - start
            keep(bench, out)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeUp:
        found["cut_off"] = name
        later = wanted[wanted.index(name) + 1 :]
        found["skipped"] |= dict.fromkeys(later, "no time is left")
    return keep(bench, out)


def keep(bench: Bench, out: Path | None) -> Row:
    """What is found, the keys that every run has first; also written to ``--out``."""
    best = {name: bench.best(name) for name in bench.sizes}
    both = [r for r in bench.found.get("padded", ()) if r["side"] == "both" and "mfu" in r]
    first = {f"mfu_{name}": row.get("mfu") for name, row in best.items()} | {
        "packed_over_padded": both[0]["over_packed"] if both else None,
        "packed_over_padded_size": both[0]["size"] if both else None,
        "users_per_s": best["d720"].get("users_per_s"),
    }
    if out:
        write_json(out, first | bench.found)
    return first | bench.found


def table(found: Row) -> str:
    """The figures for people."""
    lines = [words({k: v for k, v in found.items() if not isinstance(v, list)})]
    for name, rows in found.items():
        if isinstance(rows, list):
            lines += ["", name, *(f"  {words(row)}" for row in rows)]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8, help="after which it ends")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="JSON file, written again after every section")
    parser.add_argument("--quick", action="store_true", help="tiny models and batches: a trial")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="where to work (3 GB); default: a temporary one"
    )
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the loop takes any GPU that it sees
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --device cpu --quick tries the code without one")
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        contextlib.redirect_stdout(sys.stderr),
    ):
        bench = Bench(args.device, args.quick, began + 60 * args.minutes, Path(folder))
        found = run(bench, args.sections, args.out)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
