"""Ragged batches, and how ragged sequences become dense tiles.

No padding leaves this module for the model to compute on, but the little that fills a tile's end:
sequences are placed whole into tiles of ``tile`` slots, and attention inside a tile is masked to
blocks of one sequence. Everything here is numpy; the models move it to tensors.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PackedBatch:
    """Users' logs, ragged at both levels.

    A user has a row for each view that is contrasted: of each service, or of each half of a single
    one. Rows are view-major: row ``view * n_users + user``. Every row has at least one item and
    every item at least one token.
    """

    tokens: NDArray[Any]
    """Tokens of all items, one after another, in the integer type of the corpus. [tokens]"""
    token_offsets: Ints
    """Item ``i`` has ``tokens[token_offsets[i]:token_offsets[i + 1]]``. [items + 1]"""
    items: Ints
    """Items of all rows, as indices into the items above, oldest first. [behaviours]"""
    item_offsets: Ints
    """Row ``r`` has ``items[item_offsets[r]:item_offsets[r + 1]]``. [rows + 1]"""
    n_views: int
    """Views of each user; rows / n_views users."""

    @property
    def n_rows(self) -> int:
        """Rows: users times views."""
        return len(self.item_offsets) - 1

    @property
    def n_users(self) -> int:
        """Users of the batch."""
        return self.n_rows // self.n_views

    @property
    def item_lengths(self) -> Ints:
        """Tokens of each encoded item. [items]"""
        return np.diff(self.token_offsets)

    @property
    def row_lengths(self) -> Ints:
        """Items of each row. [rows]"""
        return np.diff(self.item_offsets)


@dataclass(frozen=True)
class Tiles:
    """Where each element of each sequence lies in dense tiles."""

    n_tiles: int
    tile: int
    """Slots of a tile."""
    slots: Ints
    """Slot (tile * ``tile`` + place) of every element, in the order of the sequences. [elements]"""
    sequence: Ints
    """Sequence that holds each slot, -1 where none does. [n_tiles, tile]"""


def spans(starts: Ints, lengths: Ints) -> Ints:
    """Indices of ragged slices: ``arange(s, s + n)`` for each start and length, concatenated."""
    ends = np.cumsum(lengths)
    indices = np.repeat(np.asarray(starts - (ends - lengths), np.int64), lengths)
    indices += np.arange(len(indices))
    return indices


def pack(lengths: Ints, tile: int) -> Tiles:
    """Place sequences whole into tiles, longest first, each tile filled greedily.

    Sequences of one length are interchangeable, so a tile's filling is found once and repeated as
    often as the counts allow: the cost depends on the number of distinct lengths, not of sequences.

    Args:
        lengths: elements of each sequence, all in 1..``tile``. [sequences]
        tile: slots of a tile.

    Raises:
        ValueError: a sequence is empty or longer than a tile.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > tile):
        raise ValueError(
            f"sequence lengths {lengths.min()}..{lengths.max()} do not fit tiles of {tile}"
        )
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=tile + 1)
    ends = np.cumsum(counts[::-1])[::-1]  # order[ends[n] - counts[n] : ends[n]] have length n
    next_of = ends - counts
    starts = np.empty(len(lengths), dtype=np.int64)
    distinct = [int(n) for n in np.flatnonzero(counts)[::-1]]
    n_tiles = 0
    while distinct:
        filling: list[tuple[int, int]] = []
        room = tile
        for n in distinct:
            if take := min(int(counts[n]), room // n):
                filling.append((n, take))
                room -= n * take
        repeat = min(int(counts[n]) // take for n, take in filling)
        first = tile * (n_tiles + np.arange(repeat))
        place = 0
        for n, take in filling:
            chosen = order[next_of[n] : next_of[n] + repeat * take].reshape(repeat, take)
            starts[chosen] = first[:, None] + place + n * np.arange(take)
            next_of[n] += repeat * take
            counts[n] -= repeat * take
            place += n * take
        n_tiles += repeat
        distinct = [n for n in distinct if counts[n]]
    slots = spans(starts, lengths)
    sequence = np.full(n_tiles * tile, -1, dtype=np.int64)
    sequence[slots] = np.repeat(np.arange(len(lengths)), lengths)
    return Tiles(n_tiles, tile, slots, sequence.reshape(n_tiles, tile))
