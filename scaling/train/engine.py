"""The DeepSpeed engine of a run, and what it keeps out of plain sight: fp32 masters, moments, the
gradient norm, the loss scale.

ZeRO 1 and 2 keep flat partitions behind DeepSpeed's accessors (collective calls); stage 0 in fp32
is a plain optimiser, for which the accessors answer None. Stage 3 is not offered: it shards the
parameters themselves, of which the largest system here has 0.24 billion, and rank 0, which
evaluates alone, would wait for the others forever.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scaling.config import RunConfig, TrainSettings
from scaling.models.clue import ContrastiveEncoder
from scaling.train.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
FP16 = {
    "enabled": True,
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 2**31,  # never: see `update`
    "hysteresis": 1,
    "min_loss_scale": 1,
}
"""Dynamic loss scale: halved where gradients overflow, doubled after ``GOOD_STEPS``."""
GOOD_STEPS = 1000
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter")


def start_engine(
    model: ContrastiveEncoder, config: RunConfig, settings: TrainSettings, ranks: Ranks
) -> Any:
    """DeepSpeed's engine around the model, with the paper's AdamW; every rank calls it."""
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
            # DeepSpeed would allocate its default of 5e8 elements for the smallest model, too.
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": min(5 * 10**8, sum(p.numel() for p in model.parameters())),
            },
            "bf16": {"enabled": config.precision == "bf16"},
            "fp16": FP16 if config.precision == "fp16" else {"enabled": False},
            "steps_per_print": 2**31,
        },
    )
    return engine


def fp16_supported() -> bool:
    """Whether DeepSpeed trains in fp16 on this device."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def create_optimizer_state(engine: Any, step: int) -> None:
    """Give every parameter Adam's state as after ``step`` steps, with zero moments. Call it once.

    torch creates that state at the first step of each parameter group, and ZeRO links it to its
    parameters after the first group's step, when the other groups have none yet (DeepSpeed
    0.19.8): their moments could then be neither saved nor restored. Adam's step count, which
    corrects its bias, is not reachable through DeepSpeed's accessors either.
    """
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
    if inner is not zero:
        zero._lazy_init_hp_params_optimizer_state()


def master(engine: Any, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
    """A copy of a parameter's whole fp32 master, or of a moment, on the CPU; all ranks call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    full: Tensor
    if hasattr(parameter, "_hp_mapping"):
        full = (
            safe_get_full_fp32_param(parameter)
            if moment is None
            else safe_get_full_optimizer_state(parameter, moment)
        )
    else:
        full = parameter.data if moment is None else engine.optimizer.state[parameter][moment]
    return full.detach().float().cpu().contiguous().clone()


def set_state(
    engine: Any, parameter: nn.Parameter, value: Tensor, moments: Mapping[str, Tensor]
) -> None:
    """Put a parameter's fp32 master and moments into the engine; all ranks call it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(engine.device)
    with torch.no_grad():
        parameter.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, value)
        for name, moment in moments.items():
            safe_set_full_optimizer_state(parameter, moment.to(engine.device), name)
    else:
        for name, moment in moments.items():
            engine.optimizer.state[parameter][name].copy_(moment)


def fp32_logit_scale(engine: Any) -> Tensor:
    """The log of tau as the optimiser has it: in bf16 most of its updates would not show. [1]"""
    parameter: nn.Parameter = engine.module.logit_scale
    if parameter.dtype == torch.float32:
        return parameter.detach().clone()
    return master(engine, parameter).to(parameter.device)


def update(engine: Any, lr: float) -> tuple[float, bool]:
    """Clip the gradients and take AdamW's step.

    Returns:
        The gradient's norm before clipping, and whether the step was taken: in fp16 it is not where
        gradients overflow, which lowers the loss scale.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    plain = not engine.zero_optimization_stage()
    if plain:  # DeepSpeed keeps no norm in stage 0
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
    try:
        engine.step()
    except Exception as e:
        if "loss scale already at minimum" not in str(e):
            raise
        return math.inf, True  # nothing to try any more
    if plain:
        return float(total), True
    taken = not (engine.fp16_enabled() and engine.optimizer.overflow)
    if engine.fp16_enabled() and taken:
        # Ours, after the step: DeepSpeed doubles the scale before it unscales that step's
        # gradients, which halves them.
        scaler = engine.optimizer.loss_scaler
        if (scaler.cur_iter - 1 - scaler.last_overflow_iter) % GOOD_STEPS == 0:
            scaler.cur_scale *= scaler.scale_factor
    norm = float(engine.get_global_grad_norm())
    return (norm if norm >= 0 else math.inf), taken  # -1 is DeepSpeed's word for not finite


def loss_scale(engine: Any) -> dict[str, float] | None:
    """State of the dynamic loss scale; None but in fp16."""
    if not engine.fp16_enabled():
        return None
    return {name: getattr(engine.optimizer.loss_scaler, name) for name in SCALER_STATE}


def restore_loss_scale(engine: Any, state: Mapping[str, float]) -> None:
    """Continue with a saved state of the dynamic loss scale."""
    scaler = engine.optimizer.loss_scaler
    scaler.cur_scale = float(state["cur_scale"])
    scaler.cur_iter = int(state["cur_iter"])
    scaler.last_overflow_iter = int(state["last_overflow_iter"])


def damping(engine: Any, config: RunConfig, step: int) -> dict[str, float]:
    """How much eps shortens AdamW's update: quantiles of sqrt(v) / (sqrt(v) + eps).

    v is the second moment with its bias corrected. Over all parameters but the tables, whose rows
    are mostly not met in a step; where they are many, over every n-th. 1 is none, 0 all. All ranks
    call it.

    Args:
        step: optimiser steps done, at least 1.
    """
    dense = [p for n, p in engine.module.named_parameters() if not n.endswith("_emb.weight")]
    every = max(1, sum(p.numel() for p in dense) // DAMPING_SAMPLE)
    correction = 1 - config.optim.betas[1] ** step
    sampled, offset = [], 0
    for parameter in dense:
        sampled.append(master(engine, parameter, "exp_avg_sq").flatten()[offset::every])
        offset = (offset - parameter.numel()) % every
    root = (torch.cat(sampled) / correction).sqrt()
    low, median = torch.quantile(
        root / (root + config.optim.eps), torch.tensor([0.1, 0.5])
    ).tolist()
    return {"damping_p10": low, "damping": median}


DAMPING_SAMPLE = 2**18
"""Elements that ``damping`` looks at, about."""
