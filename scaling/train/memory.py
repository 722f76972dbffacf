"""How many tokens' activations fit into a rank's memory, found before training and after a failure.

What a forward pass saves for its backward pass is counted on a few users (bytes of distinct saved
tensors per element); what is left of the memory beside parameters, gradients, moments and the
embeddings of a batch then bounds ``micro_batch_tokens``.
"""

import gc
import os
import traceback
from pathlib import Path

import numpy as np
import torch

from scaling import ClueError
from scaling.config import RunConfig
from scaling.models.clue import ContrastiveEncoder
from scaling.packing import PackedBatch, spans
from scaling.train.ranks import Ranks

SHARE = {"cuda": 0.8, "cpu": 0.4}
"""Share of the free memory that is planned with: of a host, other jobs want some, too."""
GRADIENTS = 1.5
"""Peak of a backward pass over the bytes saved for it: the gradients in flight."""
HOST_IS_FULL = ("DefaultCPUAllocator", "could not create a primitive")
"""What PyTorch and, where its own buffer cannot be had, oneDNN say."""
PROBE_TOKENS = 4096
ROUND = 1024


class OutOfMemory(ClueError):
    """A step did not fit into memory; the message says what does."""


def find_micro_batch(
    model: ContrastiveEncoder, batch: PackedBatch, config: RunConfig, ranks: Ranks
) -> int:
    """The largest ``micro_batch_tokens`` that memory allows, the same on every rank. [elements]

    Args:
        batch: of the run; a small part of it is encoded.
    """
    size = next(model.parameters()).element_size()
    items = len(batch.token_offsets) - 1
    embeddings = 2 * 2 * items * config.model.d_model * size  # embedded, indexed; and gradients
    users = config.batch_size * config.data.n_services
    loss = 4 * (6 * users * config.model.d_model + 6 * config.batch_size * config.negatives)
    gradients = sum(p.numel() * size for p in model.parameters() if p.grad is None)
    left = SHARE[ranks.device.type] * free_memory(ranks) - embeddings - loss - gradients
    fits = int(max(left, 0) / (GRADIENTS * bytes_per_element(model, batch)))
    return ranks.least(max(ROUND, fits // ROUND * ROUND))


def bytes_per_element(model: ContrastiveEncoder, batch: PackedBatch) -> float:
    """Bytes that a forward pass in training mode saves per token or item encoded."""
    part = first_users(batch, PROBE_TOKENS)
    held: dict[int, int] = {p.untyped_storage()._cdata: 0 for p in model.parameters()}
    kept = []  # so that no storage is freed and its address used again while we count

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.setdefault(storage._cdata, storage.nbytes())
        kept.append(tensor)
        return tensor

    was = model.training
    model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model.project(model(part))
    model.train(was)
    elements = len(part.tokens)
    if model.config.system == "clue":
        elements += len(part.items)
    return sum(held.values()) / elements


def first_users(batch: PackedBatch, tokens: int) -> PackedBatch:
    """The first users of a batch, one at least, with so many tokens or a little more."""
    services, users = batch.n_services, batch.n_users
    ends = np.concatenate([[0], np.cumsum(batch.item_lengths[batch.items])])[batch.item_offsets]
    of_user = np.diff(ends).reshape(services, users).sum(axis=0)
    n = min(users, int(np.searchsorted(np.cumsum(of_user), tokens)) + 1)
    rows = (np.arange(services)[:, None] * users + np.arange(n)).ravel()
    row_lengths = batch.row_lengths[rows]
    items = batch.items[spans(batch.item_offsets[rows], row_lengths)]
    lengths = batch.item_lengths[items]
    return PackedBatch(
        tokens=batch.tokens[spans(batch.token_offsets[items], lengths)],
        token_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        items=np.arange(len(items)),
        item_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(row_lengths)]),
        n_services=services,
    )


def free_memory(ranks: Ranks) -> int:
    """Memory that this rank may still take. [bytes]"""
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(ranks.device)
        unused = torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(
            ranks.device
        )
        return int(free + unused)
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(known["MemAvailable"].removesuffix("kB")) * 1024
    free = min([available, *_cgroup_room()])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))


def _cgroup_room() -> list[int]:
    """Room under the memory limits of this process's control groups: Slurm sets them. [bytes]"""
    room = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, limit, usage = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = (
                "/sys/fs/cgroup/memory",
                *(f"memory.{name}_in_bytes" for name in ("limit", "usage")),
            )
        else:
            continue
        group = Path(base + path)
        for folder in (group, *group.parents):
            try:
                room.append(int((folder / limit).read_text()) - int((folder / usage).read_text()))
            except (OSError, ValueError):  # no such file, or no limit ("max")
                continue
    return room


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU's or the host's memory is full."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in HOST_IS_FULL)
    )


def explain(
    error: BaseException,
    model: ContrastiveEncoder,
    batch: PackedBatch,
    micro_batch_tokens: int,
    step: int,
) -> OutOfMemory:
    """What to do about a step that did not fit: the failed step's tensors are let go, and smaller
    micro-batches are tried on the same batch until one passes.

    Args:
        micro_batch_tokens: what did not fit.
        step: steps done.
    """
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    peak = (
        f"step {step + 1} does not fit into memory with micro_batch_tokens = {micro_batch_tokens}"
    )
    elements = int(batch.item_lengths.sum())
    least = int(max(batch.item_lengths.max(), batch.row_lengths.max()))
    smaller = min(micro_batch_tokens, elements) // 2
    while smaller >= least:
        if _fits(model, batch, smaller):
            return OutOfMemory(f"{peak}; {smaller} does (tried): set it in the profile's [train]")
        smaller //= 2
    return OutOfMemory(
        f"{peak}, nor does any down to its longest sequence of {least}: use more ranks, or a "
        "smaller batch_size or model"
    )


def _fits(model: ContrastiveEncoder, batch: PackedBatch, micro_batch_tokens: int) -> bool:
    parameters = [p for p in model.parameters() if p is not model.logit_scale]
    try:
        model.train()
        projected = model.project(model(batch, micro_batch_tokens))
        torch.autograd.grad(projected.float().square().sum(), parameters)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        traceback.clear_frames(e.__traceback__)
        return False
    return True
