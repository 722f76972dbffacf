"""The command line: every verb names first what it works on.

A verb reads its arguments, calls one or two functions of the package and prints what they return.
Whatever is heavy is imported inside the verb, so that ``--help``, ``plan`` and ``status`` start at
once; none of them imports torch. An error meant for people (``ClueError``) is one paragraph on
stderr and exit status 2; Ctrl-C is exit status 130.
"""

import contextlib
import errno
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from scaling import ClueError, __version__

if TYPE_CHECKING:
    from scaling.config import CorpusCard
    from scaling.sweeps import Grid, PlannedRun

PEOPLES_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.EISDIR, errno.ENOTDIR, errno.ENOENT,
}  # fmt: skip
"""Errors of the operating system that say all there is to say without a traceback."""


class Verbs(TyperGroup):
    """Turns errors meant for people into one paragraph."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except ClueError as e:
            typer.echo(f"error: {e}", err=True)
            raise typer.Exit(2) from None
        except OSError as e:
            if e.errno not in PEOPLES_FAULTS:
                raise
            where = f"{e.filename}: " if e.filename else ""
            typer.echo(f"error: {where}{e.strerror}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Verbs,
    help="Scaling-law studies of CLUE, from behaviour logs to fitted figures.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
corpus_app = typer.Typer(
    cls=Verbs, help="Look into prepared corpora.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(corpus_app, name="corpus")

Root = Annotated[Path, typer.Option("--root", envvar="CLUE_ROOT", help="Root folder of all state.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SweepFile = Annotated[Path, typer.Argument(help="Sweep file (TOML).", show_default=False)]
RunKey = Annotated[
    str, typer.Argument(help="Run key, or enough of its first letters.", show_default=False)
]
WORK = Path("work")
RESULTS = Path("results")


def main() -> None:
    """Entry point of ``clue-scaling``."""
    app()


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"clue-scaling {__version__}")
        raise typer.Exit


# ---- data ---------------------------------------------------------------------------------------


@app.command()
def prepare(
    corpus_file: Annotated[Path, typer.Argument(help="Corpus file (TOML).", show_default=False)],
    root: Root = WORK,
) -> None:
    """Read behaviour logs and publish a corpus; again with nothing changed, a quick no-op.

    \b
    Example:
        clue-scaling prepare sweeps/corpora/demo.toml
    """
    from scaling.data.prepare import prepare as publish

    with _progress("prepare") as progress:
        path = publish(corpus_file, root, progress=progress)
    typer.echo(path)


@corpus_app.command()
def info(
    name: Annotated[str, typer.Argument(help="Name of a corpus, or its digest.")],
    root: Root = WORK,
    as_json: Json = False,
) -> None:
    """What a prepared corpus holds.

    \b
    Example:
        clue-scaling corpus info demo
    """
    found = [_open_corpus(path).info() for path in _corpora(root, name)]
    if as_json:
        _print_json(found)
    for corpus in [] if as_json else found:
        for key, value in corpus.items():
            shown = json.dumps(value) if isinstance(value, dict | list) else _cell(value)
            typer.echo(f"{key:>22}  {shown}")


@corpus_app.command()
def verify(
    name: Annotated[str, typer.Argument(help="Name of a corpus, or its digest.")],
    root: Root = WORK,
) -> None:
    """Read a prepared corpus through and check every digest and every offset.

    \b
    Example:
        clue-scaling corpus verify demo
    """
    for path in _corpora(root, name):
        _open_corpus(path).verify()
        typer.echo(f"{path}: whole")


# ---- sweeps -------------------------------------------------------------------------------------

SHOWN = (
    "run_key", "model", "n_total", "n_non_embedding", "batch_size", "items_per_user",
    "items_per_user_mean", "data_fraction", "users_seen", "epochs", "steps", "seed", "flops",
    "flops_exact", "pf_days", "pf_days_exact",
)  # fmt: skip


@app.command()
def plan(sweep: SweepFile, root: Root = WORK, as_json: Json = False) -> None:
    """What a sweep would train and what it would cost; nothing is written.

    One row a run: parameters, users, epochs, FLOPs and PF-days by the paper's formula and counted
    exactly. items_per_user is the cap, items_per_user_mean what the logs realise under it.

    \b
    Example:
        clue-scaling plan sweeps/scale_factors.toml
    """
    grid, card, runs = _planned(sweep, root)
    rows = [run.row for run in runs]
    if as_json:
        _print_json(rows)
        return
    _print_table(rows, [c for c in SHOWN if c != "run_key" or card.digest])
    sums = {
        k: sum(r[k] for r in rows) for k in ("flops", "flops_exact", "pf_days", "pf_days_exact")
    }
    typer.echo(
        f"{len(rows)} runs on corpus {card.name}{'' if card.digest else ' (nominal)'}: "
        f"{sums['pf_days']:.4g} PF-days by the paper's formula ({sums['flops']:.4g} FLOPs), "
        f"{sums['pf_days_exact']:.4g} counted exactly ({sums['flops_exact']:.4g} FLOPs)"
    )


def _planned(sweep: Path, root: Path) -> "tuple[Grid, CorpusCard, list[PlannedRun]]":
    from scaling.data.corpus import read_card
    from scaling.sweeps import Grid

    grid = Grid.read(sweep)
    card = read_card(grid.corpus, root)
    return grid, card, grid.runs(card)


# ---- output -------------------------------------------------------------------------------------


def _corpora(root: Path, name: str) -> list[Path]:
    """Folders of the prepared corpora with a name or a digest."""
    from scaling.data.corpus import CorpusError, folders

    found = [p for p in folders(root) if name in (p.name, *p.name.rsplit("-", 1))]
    if not found:
        there = ", ".join(p.name for p in folders(root)) or "none"
        raise CorpusError(f"{root / 'corpora'}: no corpus {name!r}; prepared: {there}")
    return found


def _open_corpus(path: Path) -> Any:
    from scaling.data.corpus import Corpus

    return Corpus.open(path)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows under their columns' names: a rich table on a terminal, aligned text elsewhere."""
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    right = [any(isinstance(row.get(c), int | float) for row in rows) for c in columns]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold")
        for name, is_number in zip(columns, right, strict=True):
            justify = "right" if is_number else "left"
            table.add_column(Text(name.replace("_", "_\n")), justify=justify, overflow="fold")
        for line in cells:
            table.add_row(*map(Text, line))
        Console().print(table)
        return
    width = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [list(columns), *cells]:
        padded = (
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, width, right, strict=True)
        )
        typer.echo("  ".join(padded).rstrip())


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[..., None]]:
    """A callback ``(done, total, note)``: a bar on a terminal, a line per tenth elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)

            def draw(done: int, total: int, note: object = None) -> None:
                text = title if note is None else f"{title} {_cell(note)}"
                bar.update(task, completed=done, total=total, description=text)

            yield draw
        return
    told = -1

    def tell(done: int, total: int, note: object = None) -> None:
        nonlocal told
        tenth = 10 * done // max(total, 1)
        if tenth > told:
            told = tenth
            end = "" if note is None else f" {_cell(note)}"
            typer.echo(f"{title}: {done}/{total}{end}", err=True)

    yield tell


if __name__ == "__main__":
    main()
