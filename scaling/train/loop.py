"""The training loop: one run from its specification to its result.

    python -m scaling.cli train RUN_KEY            one process
    srun clue-scaling train RUN_KEY                one rank per task (through scaling.slurm)

A run is a pure function of its RunConfig: users of a step follow from (seed, step), dropout from
(seed, step, rank). Nothing but parameters, moments, counters and, in fp16, the loss scale survives
a restart, and on CPU at the same world size and micro-batch a killed and resumed run repeats the
undisturbed one bit for bit.
"""

import functools
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

from scaling.config import ConfigError, RunConfig, TrainSettings
from scaling.data.batches import Batches
from scaling.data.corpus import Corpus
from scaling.models import build
from scaling.models.clue import ContrastiveEncoder
from scaling.models.losses import scale
from scaling.packing import PackedBatch
from scaling.rundir import RunDir, append_line
from scaling.train import checkpoint, memory
from scaling.train.accounting import Counters, result_record
from scaling.train.contrast import contrast
from scaling.train.engine import (
    create_optimizer_state,
    damping,
    fp16_supported,
    fp32_logit_scale,
    loss_scale,
    start_engine,
    update,
)
from scaling.train.evaluate import Evaluation
from scaling.train.export import export, exported
from scaling.train.mirrors import Mirrors
from scaling.train.ranks import Ranks
from scaling.train.throughput import Stopwatch, peak_flops, peak_memory

log = logging.getLogger(__name__)
CURVE_POINTS = 1000
"""Training rows a run leaves at most."""
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
        should_stop: polled after every step and during evaluations; when it answers True on any
            rank, all ranks commit a checkpoint and return.

    Returns:
        The content of ``result.json``; None if stopped early.

    Raises:
        ConfigError: the corpus is another than the run's, or the batch does not split over ranks.
        OutOfMemory: a step does not fit into memory; the message says which micro-batch does.
        Superseded: a newer generation of the run has started.
    """
    config = run.spec()
    if (result := run.result()) is not None:
        _export_finished(run, config, result)
        return result
    if settings.threads:
        torch.set_num_threads(settings.threads)
    ranks = Ranks.join()
    _check(config, corpus, settings, ranks)

    # ---- model and engine -----------------------------------------------------------------------
    model = build(config.model, config.data.vocab_size, config.seed)
    engine = start_engine(model, config, settings, ranks)
    batches = Batches(corpus, config, ranks.rank, ranks.world_size, config.distinct_items)

    # ---- resume ---------------------------------------------------------------------------------
    found = checkpoint.newest(run, set_aside=True) if ranks.rank == 0 else None
    recorded = _recorded_micro_batch(run, ranks) if ranks.rank == 0 else 0
    step, micro_batch_tokens = ranks.tell([found.step if found else 0, recorded])
    create_optimizer_state(engine, step)
    given = settings.micro_batch_tokens
    if given and micro_batch_tokens and given != micro_batch_tokens and config.model.dropout:
        log.warning(
            "micro_batch_tokens = %d, and %d before: dropout is drawn by micro-batch, so the run "
            "goes on, but not with the numbers that it would have had undisturbed",
            given,
            micro_batch_tokens,
        )
    micro_batch_tokens = given or micro_batch_tokens
    if not micro_batch_tokens:
        micro_batch_tokens = memory.find_micro_batch(model, batches.batch(step), config, ranks)
    execution = {"world_size": ranks.world_size, "micro_batch_tokens": micro_batch_tokens}
    placed = {name: (job or {}).get(name) for name in ("profile", "cpus_per_task")}
    generation = 0
    if ranks.rank == 0:
        generation = run.start_generation(
            {
                "resumed_from": step,
                "attempt": attempt,
                "job": dict(job) if job else None,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": time.time(),
                "seconds": found.manifest["counters"]["seconds"] if found else 0.0,
                **execution,
                "settings": settings.model_dump(mode="json"),
            }
        )
        checkpoint.clear_leftovers(run)
    (generation,) = ranks.tell([generation])
    counters = Counters(config, ranks)
    if step:
        found = found or checkpoint.read(run.path / "ckpt" / f"step-{step:09d}")
        checkpoint.restore(found, engine)
        counters.restore(found.manifest["counters"])

    # ---- what happens when ----------------------------------------------------------------------
    steps = config.steps
    log_every = max(1, steps // CURVE_POINTS)
    checkpoint_every = settings.checkpoint_every or max(1, steps // 20)
    evaluation_steps = set(config.evaluation_steps)
    milestones = set(settings.milestone_steps(steps))
    evaluation = Evaluation(corpus, config) if ranks.rank == 0 else None
    metrics = run.metrics_path(generation).open("ab") if ranks.rank == 0 else None
    mirrors = Mirrors.open(settings.mirrors if metrics else (), run, config, step)
    watch = Stopwatch(ranks.device)
    peak = _peak(settings, config, ranks)
    tau = fp32_logit_scale(engine)
    flops = counters.totals()["flops_exact"]

    def record(kind: str, row: Mapping[str, Any], totals: Mapping[str, float]) -> None:
        if metrics:
            row = {"kind": kind, "step": step, **totals, **row}
            append_line(metrics, row)
            mirrors.write(row)

    def evaluate() -> tuple[bool, bool]:
        """The pool loss after ``step``: was it stopped on the way, and is it not finite?"""
        shortened, totals = damping(engine, config, step), counters.totals()
        row = evaluation(model, tau, should_stop) if evaluation else {}
        finite = not row or math.isfinite(row["loss"] + row["loss_refit"])
        stopped, diverged = ranks.any(row is None, not finite)
        if not (stopped or diverged):
            ranks.first(lambda: record("pool", {**(row or {}), **shortened}, totals))
        return stopped, diverged

    def commit() -> None:
        totals = counters.totals()
        if metrics:
            os.fsync(metrics.fileno())
        keep = settings.keep_checkpoints
        checkpoint.save(
            run, engine, ranks, step=step, generation=generation, counters=totals, keep=keep
        )

    def publish() -> None:
        folder = run.path / "ckpt" / f"step-{step:09d}"
        ranks.first(lambda: export(run, config, checkpoint.read(folder), generation))

    def finish(status: str) -> dict[str, Any]:
        totals = counters.totals()

        def write() -> None:
            if metrics:
                os.fsync(metrics.fileno())
            result = result_record(run, config, totals, status, step, {**execution, **placed})
            run.write_result(generation, result)

        ranks.first(write)
        written = run.result()
        assert written is not None
        return written

    # ---- loop -----------------------------------------------------------------------------------
    try:
        # What a start that was stopped or killed after its last commit still owed.
        owed = ranks.rank == 0 and step in evaluation_steps and step not in _evaluated(run)
        if ranks.any(owed)[0]:
            stopped, diverged = evaluate()
            if diverged:
                return finish("diverged")
            if stopped:
                return None
        if step in milestones:
            publish()

        for batch in watch.waiting(batches.iterate(step, steps)):
            lr = learning_rate(config, step)
            engine.train()
            taken, overflows = False, 0
            while not taken:  # in fp16, gradients that overflow are computed again, scaled less
                _seed_dropout(config.seed, step, ranks.rank)
                try:
                    batch_loss = _backward(
                        engine, batch, tau, config, micro_batch_tokens, ranks, watch
                    )
                except (RuntimeError, MemoryError) as e:
                    if not memory.is_out_of_memory(e):
                        raise
                    raise memory.explain(e, model, batch, config, micro_batch_tokens, step) from e
                with watch.phase("step"):
                    norm, taken = update(engine, lr)
                loss = float(batch_loss)
                overflows += not taken
                taken = taken or not math.isfinite(loss)
            step += 1
            tau = fp32_logit_scale(engine)
            counters.add(batch, norm > config.optim.clip_norm, overflows)
            watch.lap()
            if progress and ranks.rank == 0:
                progress(step, steps, loss)

            stop, diverged = ranks.any(
                should_stop is not None and should_stop(),
                not (math.isfinite(loss) and math.isfinite(norm)),
            )
            if diverged:
                log.warning("loss or gradient is not finite after step %d: diverged", step)
                return finish("diverged")
            if step % log_every == 0 or step == steps:
                totals = counters.totals()
                row = {
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": norm,
                    "logit_scale": float(scale(tau)),
                    "loss_scale": (loss_scale(engine) or {}).get("cur_scale"),
                    "speed": {
                        **watch.row(totals["flops_exact"] - flops, peak),
                        "peak_memory_bytes": peak_memory(ranks.device),
                    },
                }
                ranks.first(functools.partial(record, "train", row, totals))
                flops = totals["flops_exact"]
            owed = stop and step in evaluation_steps
            if step in evaluation_steps and not stop:
                owed, diverged = evaluate()
                if diverged:
                    log.warning("pool loss is not finite after step %d: diverged", step)
                    return finish("diverged")
            stop = stop or owed
            if stop or step == steps or step % checkpoint_every == 0 or step in milestones:
                commit()
            if step in milestones:
                publish()
            if stop and (owed or step < steps):
                return None
        return finish("done")
    finally:
        if metrics:
            metrics.close()
        mirrors.close()
        engine.destroy()


def _backward(
    engine: Any,
    batch: PackedBatch,
    tau: Tensor,
    config: RunConfig,
    micro_batch_tokens: int,
    ranks: Ranks,
    watch: Stopwatch,
) -> Tensor:
    """Loss of a step over all ranks' users, and its gradients in the engine.

    A function, so that what it holds is let go where memory ran out.
    """
    model: ContrastiveEncoder = engine.module
    with watch.phase("forward"):
        projected = model.project(engine(batch, micro_batch_tokens))
        own = projected.view(config.data.n_views, batch.n_users, -1)
        found = contrast(own, tau, config, ranks)
        surrogate = found.surrogate(own, model.logit_scale)
    with watch.phase("backward"):
        engine.backward(surrogate)
    return found.loss


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
    if card.pool_of(config.data.services) != config.pool:
        raise ConfigError(f"{corpus.path}: its pool is not the run's")
    if config.batch_size % ranks.world_size:
        raise ConfigError(
            f"batch_size = {config.batch_size} does not split over {ranks.world_size} ranks"
        )
    if config.gather_ranks not in (None, ranks.world_size):
        raise ConfigError(
            f"gather = {config.gather!r} was planned for gather_ranks = {config.gather_ranks}, and "
            f"{ranks.world_size} ranks have started: its numbers depend on them"
        )
    if config.precision != "fp32" and settings.zero_stage == 0:
        raise ConfigError(
            f"precision = {config.precision!r} needs zero_stage 1 or 2 (fp32 masters)"
        )
    cuda = ranks.device.type == "cuda"
    if config.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(
            f"precision = 'bf16': {torch.cuda.get_device_name()} has no bf16; use 'fp16'"
        )
    if config.precision == "fp16" and not fp16_supported():
        raise ConfigError(
            "precision = 'fp16': DeepSpeed does not train in it on this device; use 'fp32'"
        )


def _export_finished(run: RunDir, config: RunConfig, result: Mapping[str, Any]) -> None:
    """Export the encoder of a run that ended before runs exported theirs."""
    if result["status"] != "done" or exported(run):
        return
    found = checkpoint.newest(run)
    if found is not None and found.step == result["step"]:
        export(run, config, found, max(run.generations()))


def _recorded_micro_batch(run: RunDir, ranks: Ranks) -> int:
    """What the newest start with as many ranks used, so that dropout repeats; 0: none."""
    alike = [s for s in run.starts() if s["world_size"] == ranks.world_size]
    return int(alike[-1].get("micro_batch_tokens") or 0) if alike else 0


def _evaluated(run: RunDir) -> set[int]:
    return {row["step"] for row in run.curve("pool")}


def _peak(settings: TrainSettings, config: RunConfig, ranks: Ranks) -> float | None:
    """Peak of all ranks' devices together. [FLOP/s]"""
    one = settings.peak_tflops and settings.peak_tflops * 1e12
    one = one or peak_flops(ranks.device, config.precision)
    return one and one * ranks.world_size


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) & (2**63 - 1))
