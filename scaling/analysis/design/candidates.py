"""Runs that could be added to a sweep: the values it declares, crossed, and those between them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.analysis.design.belief import DesignError
from scaling.config import MAX_ITEMS, CorpusCard
from scaling.flops import count_parameters
from scaling.sweeps import SHAPE, Grid, PlannedRun, Point, Zip

CROSSED = ("model", "batch_size", "items_per_user", "data_fraction")
"""Settings that candidates vary; all others are those of ``[base]``."""
SETTING = {
    "n_total": "model",
    "n_non_embedding": "model",
    "batch_size": "batch_size",
    "items_per_user_mean": "items_per_user",
    "items_per_user": "items_per_user",
    "users_seen": "data_fraction",
}
"""What a sweep file sets to move a factor."""
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
WIDEN = 32
"""A wide setting reaches so many times below its smallest and above its largest declared value."""
MOST = 4_000
"""Of more candidates than this, every second value of the longest list is left out, its ends
kept."""
DEFAULTS = {"items_per_user": 128, "data_fraction": 1.0}


@dataclass(frozen=True)
class Candidate:
    """A run that could be added, and the settings that make it."""

    point: Point
    run: PlannedRun


def candidates(
    grid: Grid,
    card: CorpusCard,
    *,
    columns: Sequence[str] = tuple(SETTING),
    wide: str | None = None,
) -> list[Candidate]:
    """Every combination of models, batch sizes, items per user and data fractions.

    Values are those declared in the sweep and, between the smallest and the largest: powers of two
    (batch, items, widths of models given by shape), named sizes (models given by name), and 1-3-10
    steps (data fractions).

    Args:
        columns: of a law; what none of them stands for is not varied (``of_law``).
        wide: one of ``CROSSED`` that also goes beyond its declared values, up to ``WIDEN`` times.

    Raises:
        DesignError: there is none.
    """
    by_key = {
        "model": _models(grid, card, wide == "model"),
        "batch_size": _powers(_numbers(grid, "batch_size"), wide == "batch_size", card.n_users),
        "items_per_user": _powers(
            _numbers(grid, "items_per_user"), wide == "items_per_user", MAX_ITEMS
        ),
        "data_fraction": _fractions(_numbers(grid, "data_fraction"), wide == "data_fraction"),
    }
    by_key |= {key: [value] for key, value in _usual(grid, columns).items()}
    while int(np.prod([len(v) for v in by_key.values()])) > MOST:
        longest = max(by_key, key=lambda key: len(by_key[key]))
        by_key[longest] = [*by_key[longest][:-1:2], by_key[longest][-1]]
    named = {key for key in CROSSED if key in grid.grid or key in grid.base}
    named |= {key for row in grid.zip.rows for key in row}
    out, seen = [], set[tuple[Any, ...]]()
    for values in itertools.product(*by_key.values()):
        point = dict(zip(by_key, values, strict=True))
        if point["batch_size"] > card.fraction_users(point["data_fraction"]):
            continue
        point = {k: v for k, v in point.items() if k in named or v != DEFAULTS.get(k)}
        run = _run(grid, card, point)
        identity = tuple(run.row[k] for k in ("model", "heads", "batch_size", "items_per_user",
                                              "data_fraction"))  # fmt: skip
        if identity not in seen:
            seen.add(identity)
            out.append(Candidate(point, run))
    if not out:
        raise DesignError(f"{grid.name}: no candidate has a batch within its users")
    return out


def table_of(found: Sequence[Candidate]) -> pd.DataFrame:
    """Plan rows of candidates, in their order."""
    return pd.DataFrame([c.run.row for c in found])


def of_law(offered: Sequence[Candidate], columns: Sequence[str], grid: Grid) -> list[Candidate]:
    """Candidates that vary nothing but what the law's columns stand for: any other setting is that
    of ``[base]``, or its largest declared value, or the law would take its effect for another's."""
    usual = _usual(grid, columns)
    return [c for c in offered if all(c.point.get(k, v) == v for k, v in usual.items())]


def _usual(grid: Grid, columns: Sequence[str]) -> Point:
    """What a sweep is built around, of the settings that no column stands for."""
    keep = {SETTING[c] for c in columns if c in SETTING}
    return {
        key: grid.base[key] if key in grid.base else _largest(grid, key)
        for key in CROSSED
        if key not in keep
    }


def _largest(grid: Grid, key: str) -> Any:
    values = _declared(grid, key)
    return values[-1] if key == "model" else max(values)


def _run(grid: Grid, card: CorpusCard, point: Point) -> PlannedRun:
    base = {k: v for k, v in grid.base.items() if k not in CROSSED and k != "negatives"}
    one = Grid(
        name=grid.name, figure=grid.figure, source=grid.source, corpus=grid.corpus, base=base,
        zip=Zip(rows=(point,)), seeds=grid.seeds[:1], sizes=grid.sizes,
    )  # fmt: skip
    return one.runs(card)[0]


def _declared(grid: Grid, key: str) -> list[Any]:
    """Values of a setting in a sweep file, in order; its default where rows do without."""
    values: list[Any] = list(grid.grid.get(key, ()))
    rows = [row[key] for row in grid.zip.rows if key in row]
    if key not in grid.grid and (len(rows) < len(grid.zip.rows) or not grid.zip.rows):
        values += [v for v in [grid.base.get(key, DEFAULTS.get(key))] if v is not None]
    for value in rows:
        if value not in values:
            values.append(value)
    return values


def _numbers(grid: Grid, key: str) -> list[float]:
    return sorted(_declared(grid, key))


def _ends(values: Sequence[float], wide: bool) -> tuple[float, float]:
    reach = WIDEN if wide else 1
    return min(values) / reach, max(values) * reach


def _powers(values: Sequence[float], wide: bool, most: int) -> list[int]:
    low, high = _ends(values, wide)
    between = [p for k in range(1, int(most).bit_length()) if low <= (p := 2**k) <= high]
    return sorted({int(v) for v in (*values, *between)})


def _fractions(values: Sequence[float], wide: bool) -> list[float]:
    low, high = (0.0, 1.0) if wide else (min(values), max(values))
    return sorted({*values, *(f for f in FRACTIONS if low <= f <= high)})


def _models(grid: Grid, card: CorpusCard, wide: bool) -> list[Any]:
    """Declared models; named sizes between named ones, widths between shapes of equal depth."""
    declared = _declared(grid, "model")
    named = [m for m in declared if isinstance(m, str) and m in grid.sizes]
    models = list(declared)
    if named:
        counts = {
            name: count_parameters(m, card.vocab_size).n_total
            for name, m in grid.sizes.items()
            if m.system == grid.sizes[named[0]].system
        }
        low, high = _ends([counts[n] for n in named if n in counts], wide)
        models += [n for n, count in counts.items() if low <= count <= high and n not in models]
    shapes = [s for m in declared if isinstance(m, str) and (s := SHAPE.fullmatch(m))]
    for layers in sorted({s["layers"] for s in shapes}, key=int):
        own = [s for s in shapes if s["layers"] == layers]
        prefix = own[0]["single"] or ""
        widths = _powers([float(s["d_model"]) for s in own], wide, 4_096)
        models += [
            shape for w in widths if w >= 8 and (shape := f"{prefix}{layers}x{w}") not in models
        ]
    return models
