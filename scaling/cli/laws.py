"""How a law is fitted, as options of the verbs that fit one."""

from collections.abc import Container, Sequence
from typing import Annotated, Any

import typer

from scaling import ClueError

Loss = Annotated[str, typer.Option(help="Objective: huber, lad or mse.")]
Delta = Annotated[float, typer.Option(help="Knee of the Huber loss.")]
Scale = Annotated[str, typer.Option(help="Residuals of log or raw y.")]
Overestimate = Annotated[
    float, typer.Option(help="Factor on the loss of rows that the fit lies above.")
]
Weights = Annotated[str | None, typer.Option(help="Column of the rows' weights.")]
Fix = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: hold a parameter. Repeatable.")]
Bound = Annotated[
    list[str] | None,
    typer.Option(help="NAME=LOW:HIGH: bound a parameter; an end may be left out. Repeatable."),
]
Tie = Annotated[
    list[str] | None, typer.Option(help="NAME,NAME: parameters share a value. Repeatable.")
]
Cluster = Annotated[
    str, typer.Option(help="Column of independent units; none: rows; auto: run_key if there.")
]
Resampled = Annotated[str, typer.Option(help="What is resampled: clusters, rows or residuals.")]
Draws = Annotated[int, typer.Option(min=0, max=100_000, help="Bootstrap draws; 0: no interval.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of starts and bootstrap.")]


def choices(
    loss: str,
    delta: float,
    scale: str,
    overestimate: float,
    weights: str | None,
    fix: Sequence[str] | None,
    bound: Sequence[str] | None,
    tie: Sequence[str] | None,
    bootstrap: str,
) -> dict[str, Any]:
    """The options above as arguments of ``fit_law``.

    Raises:
        ClueError: one cannot be read.
    """
    from scaling.analysis import Objective

    return {
        "objective": Objective(loss, delta, scale, overestimate),  # type: ignore[arg-type]
        "weights": weights,
        "fixed": fixed_values(fix or ()),
        "bounds": bounded(bound or ()),
        "tied": groups(tie or ()),
        "bootstrap": bootstrap,
    }


def fixed_values(words: Sequence[str], option: str = "--fix") -> dict[str, float]:
    """``NAME=VALUE`` of an option.

    Raises:
        ClueError: a word is not of this form, or names a parameter a second time.
    """
    out: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        _check_new(option, name, out)
        out[name.strip()] = _number(option, word, value, "NAME=VALUE")
    return out


def bounded(words: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """``NAME=LOW:HIGH`` of `--bound`; an end that is left out is None.

    Raises:
        ClueError: a word is not of this form, or names a parameter a second time.
    """
    out: dict[str, tuple[float | None, float | None]] = {}
    for word in words:
        name, _, ends = word.partition("=")
        _check_new("--bound", name, out)
        shape = "NAME=LOW:HIGH, NAME=LOW: or NAME=:HIGH"
        low, colon, high = ends.partition(":")
        if not colon or not (low or high):
            raise ClueError(f"--bound {word}: {shape} is expected")
        out[name.strip()] = (
            _number("--bound", word, low, shape) if low else None,
            _number("--bound", word, high, shape) if high else None,
        )
    return out


def groups(words: Sequence[str]) -> list[tuple[str, ...]]:
    """``NAME,NAME`` of `--tie`."""
    return [tuple(name.strip() for name in word.split(",")) for word in words]


def _check_new(option: str, name: str, known: Container[str]) -> None:
    if name.strip() in known:
        raise ClueError(f"{option} {name.strip()} is given twice")


def _number(option: str, word: str, text: str, shape: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ClueError(f"{option} {word}: {shape} is expected") from None
