"""The training loop: one run from its specification to its result.

    python -m scaling.cli train RUN_KEY            one process
    srun clue-scaling train RUN_KEY                one rank per task (through scaling.slurm)

A run is a pure function of its RunConfig: users of a step follow from (seed, step), dropout from
(seed, step, rank). Nothing but parameters, moments and counters survives a restart, and on CPU at
the same world size a killed and resumed run repeats the undisturbed one bit for bit.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaling.config import MAX_TOKENS_SINGLE, ConfigError, RunConfig, TrainSettings
from scaling.data.batches import Batches
from scaling.data.corpus import Corpus
from scaling.flops import count_parameters, exact_flops, paper_flops, to_pf_days
from scaling.models import build
from scaling.models.losses import contrastive_loss, scale
from scaling.packing import PackedBatch
from scaling.rundir import RunDir, append_line
from scaling.train import checkpoint
from scaling.train.evaluate import Evaluation
from scaling.train.ranks import Ranks

log = logging.getLogger(__name__)
CURVE_POINTS = 1000
"""Training rows a run leaves at most."""
COUNTED = ("tokens", "tokens_sq", "items", "items_sq", "users")
Progress = Callable[[int, int, float | None], None]


def train(
    run: RunDir,
    corpus: Corpus,
    settings: TrainSettings,
    *,
    attempt: int | None = None,
    job: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any] | None:
    """Train a run from its newest checkpoint to its end; every rank calls it.

    Args:
        attempt: number of the attempt this start belongs to, recorded with the generation.
        job: what the scheduler calls this job, recorded likewise.
        progress: called on rank 0 with (step, steps, training loss or None).
        should_stop: polled after every step; when it answers True on any rank, all ranks commit a
            checkpoint and return.

    Returns:
        The content of ``result.json``; None if stopped early.

    Raises:
        ConfigError: the corpus is another than the run's, or the batch does not split over ranks.
        Superseded: a newer generation of the run has started.
    """
    if (result := run.result()) is not None:
        return result
    config = run.spec()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    ranks = Ranks.join()
    _check(config, corpus, settings, ranks)

    # ---- model and engine -----------------------------------------------------------------------
    model = build(config.model, config.data.vocab_size, config.seed)
    engine = _engine(model, config, settings, ranks)

    # ---- resume ---------------------------------------------------------------------------------
    step, generation = 0, 0
    if ranks.rank == 0:
        found = checkpoint.newest(run, set_aside=True)
        step = found.step if found else 0
        generation = run.start_generation(
            {
                "resumed_from": step,
                "attempt": attempt,
                "job": dict(job) if job else None,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "world_size": ranks.world_size,
                "settings": settings.model_dump(mode="json"),
            }
        )
    step, generation = ranks.tell([step, generation])
    counters = _Counters(config, ranks)
    checkpoint.create_optimizer_state(engine, step)
    if step:
        found = checkpoint.read(run.path / "ckpt" / f"step-{step:09d}")
        checkpoint.restore(found, engine)
        counters.restore(found.manifest["counters"])

    # ---- what happens when ----------------------------------------------------------------------
    steps = config.steps
    log_every = max(1, steps // CURVE_POINTS)
    checkpoint_every = settings.checkpoint_every or max(1, steps // 20)
    evaluation_steps = set(config.evaluation_steps)
    evaluation = Evaluation(corpus, config) if ranks.rank == 0 else None
    batches = Batches(corpus, config, ranks.rank, ranks.world_size)
    metrics = run.metrics_path(generation).open("ab") if ranks.rank == 0 else None

    def record(kind: str, row: Mapping[str, Any]) -> None:
        totals = counters.totals()
        if metrics:
            append_line(metrics, {"kind": kind, "step": step, **totals, **row})

    def commit() -> None:
        if metrics:
            os.fsync(metrics.fileno())
        checkpoint.save(
            run,
            engine,
            ranks,
            step=step,
            generation=generation,
            counters=counters.totals(),
            keep=settings.keep_checkpoints,
        )

    tau = _fp32_logit_scale(engine)

    # ---- loop -----------------------------------------------------------------------------------
    try:
        for batch in batches.iterate(step, steps):
            lr = learning_rate(config, step)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            _seed_dropout(config.seed, step, ranks.rank)
            engine.train()

            # Every rank computes the whole loss on gathered embeddings and sends the gradient of
            # its own users back through its encoder: equal to one process with the whole batch.
            projected = model.project(engine(batch))
            own = projected.view(config.data.n_services, batch.n_users, -1)
            everyone = ranks.gather(own.detach(), dim=1).float().requires_grad_()
            logit_scale = tau.clone().requires_grad_()
            loss = contrastive_loss(everyone, logit_scale, config.negatives)
            loss.backward()  # type: ignore[no-untyped-call]
            engine.backward(_surrogate(own, everyone, model.logit_scale, logit_scale, ranks))
            logged = (step + 1) % log_every == 0 or step + 1 == steps
            unpartitioned = _unpartitioned_norm(engine) if logged else None
            engine.step()
            step += 1
            tau = _fp32_logit_scale(engine)
            counters.add(batch)

            value = float(loss.detach())
            stop, diverged = ranks.any(
                should_stop is not None and should_stop(), not math.isfinite(value)
            )
            if diverged:
                log.warning("loss is not finite after step %d: the run has diverged", step)
                return _finish(run, generation, config, ranks, counters, "diverged", step)
            if logged:
                norm = float(
                    engine.get_global_grad_norm() if unpartitioned is None else unpartitioned
                )
                record(
                    "train",
                    {
                        "loss": value,
                        "lr": lr,
                        "grad_norm": norm,
                        "clipped": norm > config.optim.clip_norm,
                        "logit_scale": float(scale(tau)),
                    },
                )
            if progress and ranks.rank == 0:
                progress(step, steps, value)
            if step in evaluation_steps:
                record("pool", evaluation(model, tau) if evaluation else {})
            if step == steps or stop or step % checkpoint_every == 0:
                commit()
            if stop and step < steps:
                return None
        return _finish(run, generation, config, ranks, counters, "done", step)
    finally:
        if metrics:
            metrics.close()
        engine.destroy()


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then a cosine to ``final_lr`` at the last step (Appendix B).

    Args:
        step: steps already done.
    """
    optim, steps = config.optim, config.steps
    warmup = max(1, round(optim.warmup * steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, steps - warmup)
    return optim.lr * (
        optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def _check(config: RunConfig, corpus: Corpus, settings: TrainSettings, ranks: Ranks) -> None:
    card = corpus.card
    if card.digest != config.data.corpus_digest:
        raise ConfigError(
            f"{corpus.path}: corpus {card.digest} is not the run's ({config.data.corpus_digest})"
        )
    if card.vocab_size != config.data.vocab_size:
        raise ConfigError(
            f"{corpus.path}: its tokenizer has {card.vocab_size} entries, "
            f"the run {config.data.vocab_size}"
        )
    if card.pool is None or card.pool.digest != config.pool.digest:
        raise ConfigError(f"{corpus.path}: its pool is not the run's")
    if config.batch_size % ranks.world_size:
        raise ConfigError(
            f"batch_size = {config.batch_size} does not split over {ranks.world_size} ranks"
        )
    if config.precision == "bf16":
        if settings.zero_stage == 0:
            raise ConfigError("precision = 'bf16' needs zero_stage 1 or 2 (fp32 masters)")
        if ranks.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise ConfigError(
                f"precision = 'bf16': {torch.cuda.get_device_name()} has no bf16; use 'fp32'"
            )


def _engine(
    model: torch.nn.Module, config: RunConfig, settings: TrainSettings, ranks: Ranks
) -> Any:
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    stage = settings.zero_stage
    if stage is None:
        stage = 0 if ranks.world_size == 1 and config.precision == "fp32" else 1
    optim = config.optim
    decayed = [p for n, p in model.named_parameters() if n != "logit_scale"]
    undecayed = [p for n, p in model.named_parameters() if n == "logit_scale"]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
    )
    engine, *_ = deepspeed.initialize(
        model=model.to(ranks.device),
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": config.batch_size // ranks.world_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip_norm,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": config.precision == "bf16"},
            "steps_per_print": 2**31,
        },
    )
    return engine


def _surrogate(
    own: Tensor, everyone: Tensor, parameter: Tensor, logit_scale: Tensor, ranks: Ranks
) -> Tensor:
    """A scalar whose gradient is the loss's, through this rank's encoder outputs.

    DeepSpeed averages gradients over ranks, so the encoder's part, of which each rank holds its own
    users' share, is multiplied by their number; the logit scale's is whole on every rank.
    """
    assert everyone.grad is not None
    assert logit_scale.grad is not None
    users = own.shape[1]
    first = ranks.rank * users
    gradient = everyone.grad[:, first : first + users]
    return (
        ranks.world_size * (own.float() * gradient).sum()
        + (parameter.float() * logit_scale.grad).sum()
    )


def _fp32_logit_scale(engine: Any) -> Tensor:
    """The log of tau as the optimiser has it: in bf16 most of its updates would not show. [1]"""
    parameter: torch.nn.Parameter = engine.module.logit_scale
    if parameter.dtype == torch.float32:
        return parameter.detach().clone()
    return checkpoint.master(engine, parameter).to(parameter.device)


def _unpartitioned_norm(engine: Any) -> Tensor | None:
    """Gradient norm before clipping in stage 0; None in others, where ZeRO keeps it itself."""
    if engine.zero_optimization_stage():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) & (2**63 - 1))


class _Counters:
    """What a run has consumed over all ranks, carried across restarts."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.base = np.zeros(len(COUNTED), dtype=np.int64)
        self.local = np.zeros(len(COUNTED), dtype=np.int64)
        self.base_seconds = 0.0
        self.started = time.monotonic()

    def add(self, batch: PackedBatch) -> None:
        """Count a batch of this rank."""
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
        self.base_seconds = float(totals["seconds"])

    def totals(self) -> dict[str, float]:
        """Sums over ranks and restarts; every rank calls it."""
        local = self.ranks.sum(torch.from_numpy(self.local).to(self.ranks.device))
        counts = dict(zip(COUNTED, (self.base + local.cpu().numpy()).tolist(), strict=True))
        services = self.config.data.n_services
        flops = exact_flops(
            self.config.model,
            tokens=counts["tokens"],
            tokens_sq=counts["tokens_sq"],
            items=counts["items"],
            items_sq=counts["items_sq"],
            rows=counts["users"] * services,
            users=counts["users"],
            n_services=services,
            negatives=self.config.negatives,
        )
        seconds = self.base_seconds + time.monotonic() - self.started
        return {**counts, "flops_exact": flops.total, "seconds": round(seconds, 3)}


def _finish(
    run: RunDir,
    generation: int,
    config: RunConfig,
    ranks: Ranks,
    counters: _Counters,
    status: str,
    step: int,
) -> dict[str, Any]:
    """Rank 0 writes ``result.json``; every rank returns its content."""
    totals = counters.totals()
    if ranks.rank == 0:
        run.write_result(generation, _result(run, config, ranks, totals, status, step))
    ranks.barrier()
    result = run.result()
    assert result is not None
    return result


def _result(
    run: RunDir,
    config: RunConfig,
    ranks: Ranks,
    totals: Mapping[str, float],
    status: str,
    step: int,
) -> dict[str, Any]:
    pool, curve = run.curve("pool"), run.curve("train")
    last = pool[-1] if pool and status == "done" else {}
    best = min(pool, key=lambda row: row["loss"], default={})
    tail = [row["loss"] for row in curve[-max(1, len(curve) // 20) :]]
    counts = count_parameters(config.model, config.data.vocab_size)
    flops = paper_flops(
        counts.n_total, config.batch_size, step, sequence_length=config.sequence_length
    )
    return {
        "status": status,
        "step": step,
        **{k: last.get(k) for k in ("loss", "loss_refit", "accuracy", "logit_scale", "pools")},
        "best_loss": best.get("loss"),
        "best_step": best.get("step"),
        "train_loss": sum(tail) / len(tail) if tail and status == "done" else None,
        "chance": math.log(config.pool.size),
        "pool_size": config.pool.size,
        "pool_digest": config.pool.digest,
        **{k: totals[k] for k in ("tokens", "items", "users", "seconds", "flops_exact")},
        "flops": flops,
        "pf_days": to_pf_days(flops),
        "pf_days_exact": to_pf_days(totals["flops_exact"]),
        "n_total": counts.n_total,
        "n_non_embedding": counts.n_non_embedding,
        "n_item": counts.n_item,
        "n_service": counts.n_service,
        "world_size": ranks.world_size,
    }
