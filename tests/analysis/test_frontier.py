import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from scaling.analysis.fitting.frontier import compute_frontier, on_frontier

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=15)


@given(points)
def test_the_frontier_is_what_no_cheaper_run_beats(xy: list[tuple[int, int]]) -> None:
    x, y = (np.array(v, dtype=float) for v in zip(*xy, strict=True))
    kept = set(np.flatnonzero(on_frontier(x, y)))
    for i in range(len(xy)):
        beaten = any(x[j] <= x[i] and y[j] < y[i] for j in range(len(xy)))
        tied_lower = any(x[j] < x[i] and y[j] == y[i] for j in range(len(xy)))
        twin = any(x[j] == x[i] and y[j] == y[i] for j in kept - {i})
        assert (i in kept) == (not beaten and not tied_lower and not twin)


@given(points, st.integers(0, 2**31))
def test_subsets_at_once_are_subsets_one_by_one(xy: list[tuple[int, int]], seed: int) -> None:
    x, y = (np.array(v, dtype=float) for v in zip(*xy, strict=True))
    present = np.random.default_rng(seed).random((4, len(xy))) < 0.7
    together = on_frontier(x, y, present)
    for row, mask in zip(together, present, strict=True):
        expected = np.zeros(len(xy), dtype=bool)
        expected[np.flatnonzero(mask)] = on_frontier(x[mask], y[mask])
        np.testing.assert_array_equal(row, expected)


def test_rows_without_a_loss_are_left_out() -> None:
    runs = pd.DataFrame({"pf_days": [1.0, 2.0, None, 4.0], "loss": [3.0, None, 1.0, 2.5]})
    assert compute_frontier(runs)["loss"].tolist() == [3.0, 2.5]


def test_an_empty_table_has_an_empty_frontier() -> None:
    runs = pd.DataFrame({"pf_days": [None], "loss": [1.0]}, dtype=float)
    assert compute_frontier(runs).empty
