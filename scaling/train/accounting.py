"""What a run has consumed, and the record that it ends with."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from scaling.config import MAX_TOKENS_SINGLE, RunConfig
from scaling.flops import ExactFlops, count_parameters, exact_flops, paper_flops, to_pf_days
from scaling.packing import PackedBatch
from scaling.rundir import RunDir
from scaling.train.ranks import Ranks

COUNTED = ("tokens", "tokens_sq", "items", "items_sq", "users")


class Counters:
    """What a run has consumed over all ranks, carried across restarts.

    Tokens are those encoded: of every behaviour, or of every distinct item of a rank's batch
    (``distinct_items``). What the embedding cache computes twice counts once.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.base = np.zeros(len(COUNTED), dtype=np.int64)
        self.local = np.zeros(len(COUNTED), dtype=np.int64)
        self.clipped_steps = 0
        self.overflows = 0
        self.base_seconds = 0.0
        self.started = time.monotonic()

    def add(self, batch: PackedBatch, clipped: bool, overflows: int) -> None:
        """Count a step.

        Args:
            batch: this rank's.
            clipped: whether the gradient's norm exceeded ``clip_norm``.
            overflows: times it was computed in vain (fp16).
        """
        self.clipped_steps += clipped
        self.overflows += overflows
        lengths, rows = batch.item_lengths, batch.row_lengths
        if self.config.model.system == "single":
            lengths = np.add.reduceat(lengths[batch.items], batch.item_offsets[:-1])
            lengths = np.minimum(lengths, MAX_TOKENS_SINGLE)
        self.local += np.array(
            [lengths.sum(), (lengths**2).sum(), rows.sum(), (rows**2).sum(), batch.n_users]
        )

    def restore(self, totals: Mapping[str, float]) -> None:
        """Continue from the totals of a checkpoint."""
        self.base = np.array([int(totals[name]) for name in COUNTED], dtype=np.int64)
        self.clipped_steps = int(totals.get("clipped_steps", 0))
        self.overflows = int(totals.get("overflows", 0))
        self.base_seconds = float(totals["seconds"])

    def totals(self) -> dict[str, float]:
        """Sums over ranks and restarts; every rank calls it."""
        local = self.ranks.sum(torch.from_numpy(self.local).to(self.ranks.device))
        counts = dict(zip(COUNTED, (self.base + local.cpu().numpy()).tolist(), strict=True))
        seconds = self.base_seconds + time.monotonic() - self.started
        return {
            **counts,
            "flops_exact": flops_of(self.config, counts).total,
            "clipped_steps": self.clipped_steps,
            "overflows": self.overflows,
            "seconds": round(seconds, 3),
        }


def flops_of(config: RunConfig, counts: Mapping[str, float]) -> ExactFlops:
    """Exact FLOPs of what was consumed, stack by stack.

    Args:
        counts: by ``COUNTED``.
    """
    views = config.data.n_views
    return exact_flops(
        config.model,
        tokens=counts["tokens"],
        tokens_sq=counts["tokens_sq"],
        items=counts["items"],
        items_sq=counts["items_sq"],
        rows=counts["users"] * views,
        users=counts["users"],
        n_views=views,
        negatives=config.negatives,
    )


def result_record(
    run: RunDir,
    config: RunConfig,
    totals: Mapping[str, float],
    status: str,
    step: int,
    execution: Mapping[str, Any],
) -> dict[str, Any]:
    """Content of ``result.json``, from the run's metrics and counters.

    Args:
        totals: of ``Counters``.
        status: ``done`` or ``diverged``.
        step: steps done.
        execution: how the last generation ran: ``world_size``, ``micro_batch_tokens``; of a job
            also ``profile`` and ``cpus_per_task``.
    """
    pool, curve = run.curve("pool"), run.curve("train")
    last = pool[-1] if pool and status == "done" else {}
    best = min(pool, key=lambda row: row["loss"], default={})
    tail = [row["loss"] for row in curve[-max(1, len(curve) // 20) :]]
    counts = count_parameters(config.model, config.data.vocab_size)
    flops = paper_flops(
        counts.n_total, config.batch_size, step, sequence_length=config.sequence_length
    )
    evaluated = ("loss", "loss_se", "loss_refit", "accuracy", "logit_scale", "pools")
    return {
        "status": status,
        "step": step,
        **{k: last.get(k) for k in evaluated},
        "best_loss": best.get("loss"),
        "best_step": best.get("step"),
        "train_loss": sum(tail) / len(tail) if tail and status == "done" else None,
        "chance": math.log(config.pool.size),
        "pool_size": config.pool.size,
        "pool_digest": config.pool.digest,
        **{k: totals[k] for k in ("tokens", "items", "users", "seconds", "flops_exact")},
        **{k: totals[k] for k in ("clipped_steps", "overflows")},
        "flops_by_part": asdict(flops_of(config, totals)),
        "flops": flops,
        "pf_days": to_pf_days(flops),
        "pf_days_exact": to_pf_days(totals["flops_exact"]),
        "n_total": counts.n_total,
        "n_non_embedding": counts.n_non_embedding,
        "n_item": counts.n_item,
        "n_service": counts.n_service,
        "parameters": asdict(counts),
        "gpu_hours": run.gpu_hours(),
        **execution,
    }
