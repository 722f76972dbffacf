"""Ragged batches and how sequences become tiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.packing import PackedBatch, pack, spans

TILE = st.sampled_from([1, 2, 7, 16, 32, 64, 128])


@st.composite
def lengths_and_tile(draw: st.DrawFn) -> tuple[list[int], int]:
    tile = draw(TILE)
    return draw(st.lists(st.integers(1, tile), max_size=200)), tile


def best_fit_decreasing(lengths: list[int], tile: int) -> int:
    """Tiles of the textbook heuristic: longest first, each into the fullest tile it fits."""
    room: list[int] = []
    for n in sorted(lengths, reverse=True):
        fits = [i for i, r in enumerate(room) if r >= n]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= n
        else:
            room.append(tile - n)
    return len(room)


# ---- tiles --------------------------------------------------------------------------------------


@given(lengths_and_tile())
def test_every_element_has_one_slot_of_its_own(case: tuple[list[int], int]) -> None:
    lengths, tile = case
    tiles = pack(np.array(lengths, dtype=np.int64), tile)
    assert tiles.sequence.shape == (tiles.n_tiles, tile)
    assert len(tiles.slots) == sum(lengths)
    assert len(set(tiles.slots.tolist())) == len(tiles.slots)
    assert all(0 <= s < tiles.n_tiles * tile for s in tiles.slots)
    flat = tiles.sequence.ravel()
    assert sorted(flat[tiles.slots].tolist()) == sorted(flat[flat >= 0].tolist())


@given(lengths_and_tile())
def test_sequences_are_contiguous_in_order_and_inside_one_tile(
    case: tuple[list[int], int],
) -> None:
    lengths, tile = case
    tiles = pack(np.array(lengths, dtype=np.int64), tile)
    end = 0
    for i, n in enumerate(lengths):
        slots = tiles.slots[end : end + n]
        end += n
        assert np.array_equal(slots, slots[0] + np.arange(n))
        assert slots[0] // tile == slots[-1] // tile
        assert (tiles.sequence.ravel()[slots] == i).all()


@given(lengths_and_tile())
def test_no_tile_is_empty_and_none_could_be_poured_into_another(
    case: tuple[list[int], int],
) -> None:
    lengths, tile = case
    filled = (pack(np.array(lengths, dtype=np.int64), tile).sequence >= 0).sum(axis=1)
    assert (filled > 0).all()
    if len(filled) > 1:
        assert np.sort(filled)[:2].sum() > tile


@given(lengths_and_tile())
def test_about_as_few_tiles_as_best_fit(case: tuple[list[int], int]) -> None:
    lengths, tile = case
    tiles = pack(np.array(lengths, dtype=np.int64), tile).n_tiles
    best = best_fit_decreasing(lengths, tile)
    assert -(-sum(lengths) // tile) <= tiles
    assert 9 * tiles <= 11 * best + 6  # first-fit decreasing (Dosa 2007); best is no optimum


@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("seed", range(3))
def test_items_of_realistic_lengths_fill_tiles(tile: int, seed: int) -> None:
    """Lengths as of the paper's items (9.5 tokens on average, 32 at most)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(8), 0.6, 20_000).astype(np.int64), 1, 32)
    tiles = pack(lengths, tile)
    assert lengths.sum() / (tiles.n_tiles * tile) > 0.99


def test_packing_is_deterministic() -> None:
    lengths = np.random.default_rng(0).integers(1, 33, 1000)
    one, two = pack(lengths, 64), pack(lengths.copy(), 64)
    assert np.array_equal(one.slots, two.slots)
    assert np.array_equal(one.sequence, two.sequence)


def test_nothing_needs_no_tile() -> None:
    tiles = pack(np.array([], dtype=np.int64), 8)
    assert tiles.n_tiles == 0
    assert tiles.sequence.shape == (0, 8)


@pytest.mark.parametrize("lengths", [[0], [3, 9], [4, -1]])
def test_sequences_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit tiles of 8"):
        pack(np.array(lengths), 8)


def test_the_caller_s_lengths_are_left_alone() -> None:
    lengths = np.array([3, 1, 2])
    pack(lengths, 4)
    assert lengths.tolist() == [3, 1, 2]


# ---- ragged slices ------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 50)), max_size=50))
def test_spans_are_the_indices_of_the_slices(slices: list[tuple[int, int]]) -> None:
    starts = np.array([s for s, _ in slices], dtype=np.int64)
    lengths = np.array([n for _, n in slices], dtype=np.int64)
    expected = [i for s, n in slices for i in range(s, s + n)]
    found = spans(starts, lengths)
    assert found.dtype == np.int64
    assert found.tolist() == expected


@given(st.lists(st.integers(0, 20), max_size=20))
def test_spans_take_offsets_of_any_integer_type(lengths: list[int]) -> None:
    """Offsets on disk have the smallest unsigned type, whose differences may not go below 0."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    rows = np.arange(len(lengths))[::-1]
    starts, n = offsets[:-1][rows], (offsets[1:] - offsets[:-1])[rows]
    expected = [i for r in rows for i in range(int(offsets[r]), int(offsets[r + 1]))]
    assert spans(starts.astype(np.int64), n.astype(np.int64)).tolist() == expected


# ---- batches ------------------------------------------------------------------------------------


def test_a_batch_counts_rows_users_and_lengths() -> None:
    batch = PackedBatch(
        tokens=np.arange(9),
        token_offsets=np.array([0, 2, 5, 9]),
        items=np.array([0, 1, 2, 1, 0, 2]),
        item_offsets=np.array([0, 2, 3, 5, 6]),
        n_views=2,
    )
    assert (batch.n_rows, batch.n_users) == (4, 2)
    assert batch.item_lengths.tolist() == [2, 3, 4]
    assert batch.row_lengths.tolist() == [2, 1, 2, 1]
