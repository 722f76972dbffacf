"""A bidirectional pre-LN Transformer stack over packed sequences.

Sequences of any lengths are placed whole into tiles (``scaling.packing``); attention inside a tile
is masked to blocks of one sequence, so nothing is computed across sequences and almost nothing on
padding. The same code serves tokens of an item and items of a user.

Shapes: T tiles, t slots of a tile, d width, h heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaling.config import ModelConfig
from scaling.packing import Ints, pack

TILE_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Layout:
    """Tiles of a batch of sequences, as tensors on the device of the model."""

    slots: Tensor
    """Slot of every element, in the order of the sequences. [elements]"""
    places: Tensor
    """Position of every slot in its sequence; 0 for empty slots. [T * t]"""
    sequence: Tensor
    """Sequence of every slot; empty slots belong to one extra last sequence. [T * t]"""
    lengths: Tensor
    """Elements of each sequence. [sequences]"""
    shape: tuple[int, int]
    """(T, t)"""

    @classmethod
    def of(cls, lengths: Ints, d_model: int, device: torch.device) -> Self:
        """Tiles for sequences of these lengths, of the tile size that costs the fewest FLOPs.

        Per slot and layer, the dense layers cost ``24 d^2`` FLOPs and attention ``4 d t``
        (forward): short tiles waste slots, long ones attention.
        """
        longest = int(lengths.max())
        sizes = [t for t in TILE_SIZES if t >= longest][:4]
        if not sizes:
            raise ValueError(f"a sequence of {longest} elements exceeds {TILE_SIZES[-1]}")
        tiles, least = None, np.inf
        for t in sizes:
            cost = 6 * d_model + t
            if -(-int(lengths.sum()) // t) * t * cost >= least:
                continue  # not even full tiles of this size would cost less
            packed = pack(lengths, t)
            if packed.n_tiles * t * cost < least:
                tiles, least = packed, packed.n_tiles * t * cost
        assert tiles is not None
        sequence = tiles.sequence.ravel()
        places = np.zeros_like(sequence)
        starts = np.cumsum(lengths) - lengths
        places[tiles.slots] = np.arange(len(tiles.slots)) - np.repeat(starts, lengths)

        def to(a: Ints) -> Tensor:
            return torch.from_numpy(a).to(device)

        return cls(
            to(tiles.slots),
            to(places),
            to(np.where(sequence < 0, len(lengths), sequence)),
            to(np.asarray(lengths)),
            (tiles.n_tiles, tiles.tile),
        )

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """0 inside a sequence, -inf across sequences, to add to attention logits. [T, 1, t, t]"""
        rows = self.sequence.view(self.shape)
        same = rows[:, :, None] == rows[:, None, :]
        bias = torch.zeros(same.shape, dtype=dtype, device=same.device)
        return bias.masked_fill_(~same, float("-inf")).unsqueeze(1)

    def scatter(self, elements: Tensor) -> Tensor:
        """Elements [elements, d] to their slots, zeros elsewhere. [T * t, d]"""
        out = elements.new_zeros(self.shape[0] * self.shape[1], elements.shape[1])
        return out.index_copy(0, self.slots, elements)

    def mean(self, hidden: Tensor) -> Tensor:
        """Mean over the elements of each sequence (MEAN of eq. 1 and 3). [sequences, d]

        Sums are in fp32 at least: in bf16, adding one element after another loses more the longer
        a sequence is, and that is an axis of the study.
        """
        n = len(self.lengths)
        precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        sums = precise.new_zeros(n + 1, hidden.shape[1]).index_add(0, self.sequence, precise)
        return (sums[:n] / self.lengths[:, None]).to(hidden.dtype)


class Block(nn.Module):
    """One pre-LN layer: multi-head attention and a GELU feed-forward of width 4d."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.heads = config.heads
        self.dropout = config.dropout
        self.ln1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.ln2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[T * t, d] -> [T * t, d]; ``bias`` is [T, 1, t, t]."""
        n, d = x.shape
        tiles, _, t, _ = bias.shape
        rate = self.dropout if self.training else 0.0
        qkv = self.qkv(self.ln1(x)).view(tiles, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
        a = self.out(a.transpose(1, 2).reshape(n, d))
        x = x + F.dropout(a, rate)
        return x + F.dropout(self.fc2(F.gelu(self.fc1(self.ln2(x)))), rate)


class Stack(nn.Module):
    """Position table, layers and final norm, ending in the mean over each sequence."""

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.position_emb = nn.Embedding(positions, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Slots [T * t, d] -> mean of the last hidden vectors of each sequence [sequences, d]."""
        x = x + self.position_emb(layout.places)
        x = F.dropout(x, self.dropout, self.training)
        bias = layout.attention_bias(x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return layout.mean(self.ln(x))


def in_chunks(
    encode: Callable[[int, int], Tensor],
    lengths: Ints,
    most: int | None,
    dropout: bool,
    device: torch.device,
) -> Tensor:
    """Encode sequences a chunk at a time, holding the activations of one chunk only.

    The embedding cache of GradCache (Gao et al. 2021) as activation checkpointing: a chunk leaves
    its embeddings, and the backward pass, which comes to the chunks last first, computes each again
    with the same dropout just before it needs it. The last chunk is never computed twice. Loss and
    gradients are those of the same chunks without a cache, and where dropout is off, those of the
    whole batch at once.

    Args:
        encode: ``encode(a, b)`` embeds sequences a .. b - 1. [b - a, d]
        lengths: elements of each sequence. [sequences]
        most: elements of a chunk at most; a longer sequence is its own chunk. None: one chunk.
        dropout: whether ``encode`` draws random numbers, which must then be drawn again.
        device: where it draws them.

    Returns:
        All embeddings, in order. [sequences, d]
    """
    here = torch.empty(0, device=device)  # checkpoint keeps random states of its tensors' devices

    def embed(first: int, last: int, _: Tensor) -> Tensor:
        return encode(first, last)

    bounds = chunk_bounds(lengths, most)
    parts: list[Tensor] = [
        checkpoint(embed, a, b, here, use_reentrant=False, preserve_rng_state=dropout)
        for a, b in bounds[:-1]
    ]
    parts.append(encode(*bounds[-1]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def chunk_bounds(lengths: Ints, most: int | None) -> list[tuple[int, int]]:
    """Consecutive ranges of sequences with at most ``most`` elements each, as long as they can be.

    A sequence of more elements is a range of its own. At least one range, even if it is empty.
    """
    if most is None:
        return [(0, len(lengths))]
    ends = np.cumsum(lengths)
    bounds, first = [], 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        bounds.append((first, last))
        first = last
    return bounds or [(0, 0)]


def initialise(model: nn.Module, layers: int) -> None:
    """Normal(0, 0.02) weights, zero biases; residual outputs scaled by 1/sqrt(2 layers) (GPT-2)."""
    for name, parameter in model.named_parameters():
        if name.endswith(("ln.weight", "ln1.weight", "ln2.weight", "logit_scale")):
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
            continue
        residual = name.endswith(("out.weight", "fc2.weight"))
        nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
