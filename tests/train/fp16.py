"""DeepSpeed's fp16 on a CPU, which it refuses where torch has no fast kernels for it: slow is
enough for tests."""

import os
from collections.abc import Callable
from typing import Any

import torch

from scaling.train import engine


def accept(setattr: Callable[[Any, str, Any], None] = setattr, **scaling: float) -> None:
    """Let runs of this process have fp16, with these changes to how the loss is scaled.

    Args:
        setattr: pytest's, so that it ends with the test.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.accelerator import get_accelerator

        cpu = get_accelerator()
        known = [*cpu.supported_dtypes(), torch.float16]
        setattr(cpu, "is_fp16_supported", lambda: True)
        setattr(cpu, "supported_dtypes", lambda: known)
    setattr(engine, "FP16", {**engine.FP16, **scaling})
