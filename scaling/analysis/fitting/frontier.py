"""The compute frontier: the runs that no run of equal or smaller compute beats."""

import numpy as np
import numpy.typing as npt
import pandas as pd


def on_frontier(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    present: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.bool_]:
    """Which rows lie on the lower envelope of y over x.

    A row is on it when its y is strictly below that of every other row with the same or a smaller
    x. Of rows that tie in both, the first counts.

    Args:
        x, y: ``[rows]``, finite.
        present: ``[S, rows]`` for S subsets at once (bootstrap draws); all rows by default.

    Returns:
        ``[rows]``, or ``[S, rows]`` where ``present`` is given.
    """
    order = np.lexsort((y, x))
    heights = np.broadcast_to(y[order], (1, y.size) if present is None else present.shape)
    if present is not None:
        heights = np.where(present[:, order], heights, np.inf)
    lowest_before = np.full(heights.shape, np.inf)
    lowest_before[:, 1:] = np.minimum.accumulate(heights, axis=1)[:, :-1]
    mask = np.empty(heights.shape, dtype=bool)
    mask[:, order] = heights < lowest_before
    return mask[0] if present is None else mask


def compute_frontier(df: pd.DataFrame, *, x: str = "pf_days", y: str = "loss") -> pd.DataFrame:
    """Rows of ``df`` on the compute frontier, by ascending ``x``; rows with a null are left out.

    Example:
        >>> runs = pd.DataFrame({"pf_days": [1.0, 2.0, 3.0], "loss": [3.0, 3.5, 2.0]})
        >>> compute_frontier(runs)["pf_days"].tolist()
        [1.0, 3.0]
    """
    whole = df[df[x].notna() & df[y].notna()]
    mask = on_frontier(whole[x].to_numpy(dtype=np.float64), whole[y].to_numpy(dtype=np.float64))
    return whole[mask].sort_values(x)
