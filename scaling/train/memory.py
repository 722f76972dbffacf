"""How many tokens' activations fit into a rank's memory, found before training and after a failure.

What a forward pass saves for its backward pass is counted on a few users (bytes of distinct saved
tensors per token and per item of a row); what is left of the memory beside parameters, gradients,
moments and the embeddings of a batch then bounds ``micro_batch_tokens``.
"""

import gc
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from scaling import ClueError
from scaling.config import MAX_TOKENS_SINGLE, RunConfig
from scaling.models.clue import ContrastiveEncoder
from scaling.models.losses import contrastive_loss
from scaling.packing import Ints, PackedBatch, spans
from scaling.train.ranks import Ranks

SHARE = {"cuda": 0.8, "cpu": 0.4}
"""Share of the free memory that is planned with: of a host, other jobs want some, too."""
IN_FLIGHT = 1.5
"""Peak of a backward pass over the bytes saved for it: the gradients in flight."""
HOST_IS_FULL = ("DefaultCPUAllocator", "could not create a primitive")
"""What PyTorch and, where its own buffer cannot be had, oneDNN say."""
GPU_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What CUDA's libraries say, besides PyTorch's own exception."""
GROUPS, GROUP_ROOT = Path("/proc/self/cgroup"), "/sys/fs/cgroup"
PROBE_TOKENS = 4096
ROUND = 1024


class OutOfMemory(ClueError):
    """A step did not fit into memory; the message says what does."""


def find_micro_batch(
    model: ContrastiveEncoder, batch: PackedBatch, config: RunConfig, ranks: Ranks
) -> int:
    """The largest ``micro_batch_tokens`` that memory allows, the same on every rank. [elements]

    Args:
        batch: of the run; the heaviest of its users are encoded.
    """
    size = next(model.parameters()).element_size()
    d, width, views = config.model.d_model, config.model.feature_width, config.data.n_views
    items = len(batch.token_offsets) - 1
    embeddings = 2 * (items + len(batch.items)) * d * size  # and their gradients
    users = config.batch_size * views
    pairs = views * (views - 1) // 2
    loss = 4 * (6 * users * width + 6 * pairs * config.batch_size * config.negatives)
    gradients = 2 * sum(p.numel() * size for p in model.parameters())  # DeepSpeed's bucket, too
    left = SHARE[ranks.device.type] * free_memory(ranks) - embeddings - loss - gradients
    # The last chunk of items is held while the rows are encoded and sent back.
    token, item = bytes_per_element(model, batch)
    fits = int(max(left, 0) / max(IN_FLIGHT * token, token + IN_FLIGHT * item))
    return ranks.least(max(ROUND, fits // ROUND * ROUND))


def bytes_per_element(model: ContrastiveEncoder, batch: PackedBatch) -> tuple[float, float]:
    """Bytes that a forward pass in training mode saves per token, and per item of a row.

    Of the batch's heaviest users: attention costs more per element in longer rows.
    """
    part = heaviest_users(batch, PROBE_TOKENS)
    everything = _saved(model, lambda: model.project(model(part)))
    if model.config.system == "single":
        return everything / np.minimum(_tokens_of_rows(part), MAX_TOKENS_SINGLE).sum(), 0.0
    items = _saved(model, lambda: model.encode_items(part.tokens, part.token_offsets))
    return items / len(part.tokens), (everything - items) / len(part.items)


def _saved(model: ContrastiveEncoder, encode: Callable[[], torch.Tensor]) -> int:
    """Bytes of distinct tensors, the parameters apart, that a pass saves."""
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
        encode()
    model.train(was)
    return sum(held.values())


def _tokens_of_rows(batch: PackedBatch) -> Ints:
    ends = np.append(0, np.cumsum(batch.item_lengths[batch.items]))[batch.item_offsets]
    return np.diff(ends)


def heaviest_users(batch: PackedBatch, tokens: int) -> PackedBatch:
    """The users with the most tokens, one at least, until there are so many tokens."""
    views, users = batch.n_views, batch.n_users
    of_user = _tokens_of_rows(batch).reshape(views, users).sum(axis=0)
    order = np.argsort(-of_user, kind="stable")
    n = min(users, int(np.searchsorted(np.cumsum(of_user[order]), tokens)) + 1)
    rows = (np.arange(views)[:, None] * users + order[:n]).ravel()
    row_lengths = batch.row_lengths[rows]
    items = batch.items[spans(batch.item_offsets[rows], row_lengths)]
    lengths = batch.item_lengths[items]
    return PackedBatch(
        tokens=batch.tokens[spans(batch.token_offsets[items], lengths)],
        token_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        items=np.arange(len(items)),
        item_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(row_lengths)]),
        n_views=views,
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
    for line in GROUPS.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, limit, usage = GROUP_ROOT, "memory.max", "memory.current"
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
                free = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
                total = "total_" if number != "0" else ""
                # The kernel gives the cache of files up where memory is asked for.
                room.append(
                    free + sum(int(stat[f"{total}{k}_file"]) for k in ("active", "inactive"))
                )
            except (OSError, ValueError, KeyError):  # no such file, or no limit ("max")
                continue
    return room


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU's or the host's memory is full."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in (*HOST_IS_FULL, *GPU_IS_FULL))
    )


def explain(
    error: BaseException,
    model: ContrastiveEncoder,
    batch: PackedBatch,
    config: RunConfig,
    micro_batch_tokens: int,
    step: int,
) -> OutOfMemory:
    """What to do about a step that did not fit: the failed step's tensors are let go, and smaller
    micro-batches are tried on the same users until one passes.

    Args:
        micro_batch_tokens: what did not fit.
        step: steps done.
    """
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    told = (
        f"step {step + 1} does not fit into memory with micro_batch_tokens = {micro_batch_tokens}"
    )
    rows = _tokens_of_rows(batch)
    if config.model.system == "single":
        sequences = [np.minimum(rows, MAX_TOKENS_SINGLE)]
    else:
        sequences = [batch.item_lengths, batch.row_lengths]
    least = max(int(lengths.max()) for lengths in sequences)
    smaller = min(micro_batch_tokens, max(int(lengths.sum()) for lengths in sequences)) // 2
    while smaller >= least:
        if _fits(model, batch, config, smaller):
            return OutOfMemory(f"{told}; {smaller} does (tried): set it in the profile's [train]")
        smaller //= 2
    return OutOfMemory(
        f"{told}, nor does any down to its longest sequence of {least}: use more ranks, or a "
        "smaller batch_size, negatives or model"
    )


def _fits(
    model: ContrastiveEncoder, batch: PackedBatch, config: RunConfig, micro_batch_tokens: int
) -> bool:
    parameters = [p for p in model.parameters() if p is not model.logit_scale]
    try:
        model.train()
        projected = model.project(model(batch, micro_batch_tokens))
        everyone = torch.randn(
            config.data.n_views,
            config.batch_size,
            config.model.feature_width,
            device=model.device,
            requires_grad=True,
        )
        tau = model.logit_scale.detach().float()
        torch.autograd.grad(contrastive_loss(everyone, tau, config.negatives), everyone)
        torch.autograd.grad(projected.float().square().sum(), parameters)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        traceback.clear_frames(e.__traceback__)
        return False
    return True
