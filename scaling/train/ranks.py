"""The ranks of one run: one process each, joined through DeepSpeed's communication layer."""

import atexit
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from scaling import ClueError
from scaling.config import ConfigError
from scaling.files import RecordError

T = TypeVar("T")
LAST_WORD_S = 0.1
"""Seconds without the GIL that gloo's threads are given before the interpreter ends."""


class PeerError(RecordError):
    """Another rank failed and says why; this one only follows."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one run together."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls) -> Self:
        """Join the ranks named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        Without RANK and WORLD_SIZE the process is alone. NCCL joins GPUs, gloo CPUs.

        Raises:
            ConfigError: only some of the variables are set.
        """
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if (rank is None) != (world is None):
            raise ConfigError("set both RANK and WORLD_SIZE, or neither for a single process")
        alone = rank is None or world is None
        here = cls(
            0 if rank is None else int(rank),
            1 if world is None else int(world),
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if torch.cuda.is_available()
            else torch.device("cpu"),
        )
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        if here.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            _refuse_compiled_ops()
        else:
            torch.cuda.set_device(here.device)
        if not torch.distributed.is_initialized():
            backend = "gloo" if here.device.type == "cpu" else "nccl"
            if alone:
                # A store inside the process: no port to agree on, none to collide with.
                torch.distributed.init_process_group(
                    backend, store=HashStore(), rank=0, world_size=1
                )
            else:
                missing = [v for v in ("MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
                if missing:
                    raise ConfigError(f"RANK is set but {' and '.join(missing)} is not")
                torch.distributed.init_process_group(backend)
            if backend == "gloo":
                # A thread of gloo frees the tensors of a collective after the ranks have gone on,
                # under the GIL; if the interpreter ends meanwhile, the process aborts (pytorch
                # issue 190489). Destroying the group does not wait for it: DeepSpeed holds it, too.
                atexit.register(time.sleep, LAST_WORD_S)
        return here

    def gather(self, local: Tensor, dim: int) -> Tensor:
        """Concatenate every rank's tensor (all of one shape) in the order of ranks; no gradient."""
        if self.world_size == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts, dim)

    def sum(self, local: Tensor) -> Tensor:
        """Sum over ranks."""
        total = local.clone()
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def least(self, value: int) -> int:
        """The smallest of all ranks' integers."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN)
        return int(shared.item())

    def any(self, *flags: bool) -> list[bool]:
        """For each flag: does any rank raise it? All ranks get the same answer."""
        if self.world_size == 1:
            return list(flags)
        raised = torch.tensor([float(f) for f in flags], device=self.device)
        torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
        return [bool(r) for r in raised.tolist()]

    def first(self, act: Callable[[], T]) -> T | None:
        """Let rank 0 do something that the others wait for; where it fails, all ranks do.

        Returns:
            What rank 0 got; None on the others.

        Raises:
            PeerError: on the others; rank 0 raises what it met.
        """
        failed, got = None, None
        if self.rank == 0:
            try:
                got = act()
            except (OSError, ValueError, ClueError) as e:
                failed = e
        if self.any(failed is not None)[0]:
            raise failed or PeerError("rank 0 has failed; its log says why")
        return got

    def tell(self, values: list[int]) -> list[int]:
        """Rank 0's integers, on every rank."""
        if self.world_size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(shared, src=0)
        return [int(v) for v in shared.tolist()]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()


def _refuse_compiled_ops() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce for CPUs at the first use.

    It would need a compiler on every node, and it assumes that all ranks share one host. An empty
    table of compatible operators also spares the probes (compiler runs) that would fill it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
