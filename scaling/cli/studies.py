"""Verbs on whole studies: figures, the state of a cluster, the demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaling import ClueError
from scaling.cli.app import RESULTS, WORK, Json, Results, Root, SweepFile, app
from scaling.cli.tables import TABLES
from scaling.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from scaling.results import Tables

ClusterFile = Annotated[Path, typer.Argument(help="Cluster profile (TOML).")]


@app.command()
def figures(sweep: SweepFile, results: Results = RESULTS) -> None:
    """Draw the figures of a sweep from its tables and fits.

    \b
    Example:
        clue-scaling figures sweeps/demo.toml
    """
    from scaling.analysis.studies.draw import draw
    from scaling.files import RecordError, read_json

    folder = tables_folder(sweep, results)
    tables = load_tables(folder)
    try:
        fits = read_json(folder / "fits.json")
    except RecordError as e:
        where = "" if sweep.is_dir() else f" --results {results}"
        raise ClueError(f"{e}; `clue-scaling fit {sweep}{where}` writes it") from None
    for path in draw(tables, fits, folder / "figures"):
        typer.echo(path)


@app.command()
def doctor(cluster: ClusterFile, root: Root = WORK, as_json: Json = False) -> None:
    """Say what would go wrong on a cluster, before it does.

    Exit status 1 says that there is a problem.

    \b
    Example:
        clue-scaling doctor slurm/local.toml
    """
    from dataclasses import asdict

    from scaling.slurm.doctor import doctor as examine
    from scaling.slurm.profile import ClusterProfile

    findings = [asdict(f) for f in examine(root, ClusterProfile.read(cluster))]
    if as_json:
        print_json(findings)
    else:
        print_table(findings, ["check", "level", "found", "advice"])
    if any(f["level"] == "problem" for f in findings):
        raise typer.Exit(1)


@app.command()
def demo(root: Root = WORK) -> None:
    """Go the whole way on embedded data, in minutes.

    From the root of a clone; run again, it does nothing twice.

    \b
    Example:
        clue-scaling demo
    """
    import scaling.demo

    scaling.demo.run(root)


def tables_folder(table: Path, results: Path) -> Path:
    """Folder of the tables of a sweep file, or the folder itself."""
    if table.suffix == ".toml":
        from scaling.sweeps import Grid

        return results / Grid.read(table).name
    if not table.is_dir():
        if not table.exists():
            raise ClueError(f"{table}: no such file or folder")
        raise ClueError(
            f"{table}: neither a sweep file (.toml) nor a folder of tables (fit also reads a "
            f"{' or '.join(TABLES)} table)"
        )
    return table


def load_tables(folder: Path) -> "Tables":
    """Tables of a sweep with at least one loss."""
    from scaling.results import load

    tables = load(folder)
    if not tables.runs["loss"].notna().any():
        raise ClueError(
            f"{folder}: none of its {len(tables.runs)} runs is done yet; collect again when one is"
        )
    return tables
