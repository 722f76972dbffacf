"""Verbs on whole studies: laws, figures, the state of a cluster, the demo."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling import ClueError
from scaling.cli.app import RESULTS, WORK, Json, Results, Root, SweepFile, app
from scaling.cli.terminal import cell, print_json, print_table

if TYPE_CHECKING:
    from scaling.results import Tables

Table = Annotated[
    Path, typer.Argument(help="Sweep file, folder of its tables, or any Parquet or CSV table.")
]
TABLES = (".parquet", ".csv")
"""Endings of the tables that `fit` reads itself."""
ClusterFile = Annotated[Path, typer.Argument(help="Cluster profile (TOML).")]


@app.command()
def fit(
    table: Table,
    results: Results = RESULTS,
    x: Annotated[str, typer.Option(help="Column of a Parquet or CSV table.")] = "pf_days",
    y: Annotated[str, typer.Option(help="Column of a Parquet or CSV table.")] = "loss",
    n_boot: Annotated[
        int, typer.Option(min=0, max=100_000, help="Bootstrap draws; 0: no interval.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of starts and bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit the laws of a sweep, or one power law to a table.

    A sweep's fits go to fits.json beside its tables: the power law in PF-days on the compute
    frontier, the same under other choices, and the joint law in the factors.

    \b
    Example:
        clue-scaling fit sweeps/demo.toml
        clue-scaling fit <TABLE>.csv --x pf_days --y loss
    """
    if table.suffix in TABLES:
        law = _fit_table(table, x, y, n_boot, seed)
        if as_json:
            print_json(law)
        else:
            _print_law(law)
        return
    from scaling.analysis.report import study, write_study

    folder = _tables(table, results)
    fits = study(_load(folder), n_boot=n_boot, seed=seed)
    path = write_study(fits, folder)
    if as_json:
        print_json(fits)
        return
    _print_study(fits)
    typer.echo(path)


@app.command()
def figures(sweep: SweepFile, results: Results = RESULTS) -> None:
    """Draw the figures of a sweep from its tables and fits.

    \b
    Example:
        clue-scaling figures sweeps/demo.toml
    """
    from scaling.analysis.figures import draw
    from scaling.files import RecordError, read_json

    folder = _tables(sweep, results)
    tables = _load(folder)
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


def _tables(table: Path, results: Path) -> Path:
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


def _load(folder: Path) -> "Tables":
    """Tables of a sweep with at least one loss."""
    from scaling.results import load

    tables = load(folder)
    if not tables.runs["loss"].notna().any():
        raise ClueError(
            f"{folder}: none of its {len(tables.runs)} runs is done yet; collect again when one is"
        )
    return tables


def _fit_table(path: Path, x: str, y: str, n_boot: int, seed: int) -> dict[str, Any]:
    import pandas as pd

    from scaling.analysis.additive import FitError
    from scaling.analysis.fit import fit_power_law

    if not path.is_file():
        raise ClueError(f"{path}: no such file")
    try:
        df = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except ValueError as e:  # pandas' and pyarrow's parser errors are ValueErrors
        raise ClueError(f"{path}: not a readable table: {str(e).strip()}") from None
    cluster = "run_key" if "run_key" in df else None
    try:
        return fit_power_law(df, x=x, y=y, n_boot=n_boot, seed=seed, cluster=cluster).to_dict()
    except FitError as e:
        raise ClueError(f"{path}: {e}") from None


def _print_law(law: Mapping[str, Any]) -> None:
    """A law, its rows and its status; intervals only where the fit converged."""
    rows, good = law["rows"], law["status"] == "CONVERGED"
    dropped = ", ".join(f"{n} where {rule}" for rule, n in rows["dropped"].items()) or "none"
    typer.echo(f"{rows['used']} rows fitted; dropped: {dropped}")
    typer.echo(f"{'' if good else 'not a fit to rely on: '}{law['status']}, {law['message']}")
    typer.echo(law["equation"])
    intervals = law["ci95"] if good else None
    parameters = []
    for name, estimate in law["params"].items():
        lower, upper = (intervals or {}).get(name, (None, None))
        parameters.append({"parameter": name, "estimate": estimate, "lower": lower, "upper": upper})
    shown = ["parameter", "estimate", *(["lower", "upper"] if intervals else [])]
    print_table(parameters, shown)
    if intervals:
        boot = law["bootstrap"]
        failed = f", {boot['failed']} failed" if boot["failed"] else ""
        typer.echo(f"lower, upper: 95 %, {boot['draws']} bootstrap draws{failed}")


def _print_study(fits: Mapping[str, Any]) -> None:
    """The headline, its alternatives, what may be concluded, and the joint law."""
    rows = fits["rows"]
    dropped = ", ".join(f"{d['count']} {d['rule']}" for d in rows["dropped"]) or "none"
    typer.echo(f"{rows['used']} of {rows['table']} runs fitted; dropped: {dropped}\n")
    compute = fits["compute"]
    records = [compute["headline"], *compute["alternatives"]]
    if all(record["fit"] is None for record in records):
        typer.echo(f"no law could be fitted: {compute['headline']['failed']}")
        return
    laws = []
    for record in records:
        law = record["fit"]
        row = {k: record[k] for k in ("x", "y", "points", "floor", "delta")}
        if law is not None:
            intervals = law["ci95"] if law["status"] == "CONVERGED" else None
            lower, upper = (intervals or {}).get("exponent", (None, None))
            row |= {"exponent": law["params"]["exponent"], "lower": lower, "upper": upper}
        laws.append(row | {"status": law["status"] if law else record["failed"]})
    shown = ("x", "y", "points", "floor", "delta", "exponent", "lower", "upper", "status")
    print_table(laws, shown, drop=("delta", "points", "floor", "status"))
    conclusion = compute["conclusion"]
    typer.echo(f"\nconclusion: {'holds' if conclusion['holds'] else 'none'}")
    for reason in conclusion["against"]:
        typer.echo(f"  against: {reason}")
    for name in ("with_floor", "without_floor"):
        joint = fits["joint"][name]
        typer.echo(f"\njoint law, {name.replace('_', ' ')}: {joint['failed'] or ''}")
        if joint["fit"]:
            typer.echo(f"  {joint['fit']['equation']}")
            for key, verdict in joint["fit"]["identified"].items():
                said = ", ".join(f"{k} {cell(v)}" for k, v in verdict.items())
                typer.echo(f"  {key}: {said}")
