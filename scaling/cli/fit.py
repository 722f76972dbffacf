"""The verb `fit`: the laws of a sweep, or any law on any table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling import ClueError
from scaling.cli.app import RESULTS, Json, Results, app
from scaling.cli.studies import load_tables, tables_folder
from scaling.cli.tables import TABLES, bounded, fixed_values, groups, read_table
from scaling.cli.terminal import cell, print_table
from scaling.cli.terminal import print_json as print_as_json

Table = Annotated[
    Path,
    typer.Argument(help="Sweep file, folder of its tables, or a Parquet, CSV or JSONL table."),
]


@app.command()
def fit(
    table: Table,
    results: Results = RESULTS,
    form: Annotated[
        str | None,
        typer.Option(
            help="Law, such as 'E + n_total + batch_size'; by default the power law in x."
        ),
    ] = None,
    x: Annotated[str, typer.Option(help="Column of a power law.")] = "pf_days",
    y: Annotated[str, typer.Option(help="Column that the law gives.")] = "loss",
    loss: Annotated[str, typer.Option(help="Objective: huber, lad or mse.")] = "huber",
    delta: Annotated[float, typer.Option(help="Knee of the Huber loss.")] = 1e-3,
    scale: Annotated[str, typer.Option(help="Residuals of log or raw y.")] = "log",
    overestimate: Annotated[
        float, typer.Option(help="Factor on the loss of rows that the fit lies above.")
    ] = 1.0,
    weights: Annotated[str | None, typer.Option(help="Column of the rows' weights.")] = None,
    fix: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: hold a parameter. Repeatable.")
    ] = None,
    bound: Annotated[
        list[str] | None, typer.Option(help="NAME=LOW:HIGH: bound a parameter. Repeatable.")
    ] = None,
    tie: Annotated[
        list[str] | None, typer.Option(help="NAME,NAME: parameters share a value. Repeatable.")
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(help="Column of independent units; none: rows; auto: run_key if there."),
    ] = "auto",
    bootstrap: Annotated[
        str, typer.Option(help="What is resampled: clusters, rows or residuals.")
    ] = "clusters",
    n_boot: Annotated[
        int, typer.Option(min=0, max=100_000, help="Bootstrap draws; 0: no interval.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of starts and bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit the laws of a sweep, or one law to a table.

    A sweep's fits go to fits.json beside its tables; of the options above it takes --n-boot and
    --seed. The language of --form is in docs/guide.md.

    \b
    Example:
        clue-scaling fit sweeps/demo.toml
        clue-scaling fit <TABLE>.csv --x pf_days --y loss
        clue-scaling fit <TABLE>.csv --form 'E + n + d' --y loss --fix exponent.n=0.35
    """
    if table.suffix in TABLES:
        from scaling.analysis import Objective, fit_law

        try:
            law = fit_law(
                read_table(table), form or f"`{x}`", y=y,
                objective=Objective(loss, delta, scale, overestimate),  # type: ignore[arg-type]
                weights=weights, fixed=fixed_values(fix or ()), bounds=bounded(bound or ()),
                tied=groups(tie or ()), cluster=None if cluster == "none" else cluster,
                bootstrap=bootstrap, n_boot=n_boot, seed=seed,  # type: ignore[arg-type]
            ).to_dict()  # fmt: skip
        except ClueError as e:
            raise ClueError(f"{table}: {e}") from None
        if as_json:
            print_as_json(law)
        else:
            _print_law(law)
        return
    from scaling.analysis.report import study, write_study

    folder = tables_folder(table, results)
    fits = study(load_tables(folder), n_boot=n_boot, seed=seed)
    path = write_study(fits, folder)
    if as_json:
        print_as_json(fits)
        return
    _print_study(fits)
    typer.echo(path)


def _print_law(law: Mapping[str, Any]) -> None:
    """A law, its rows and its status; intervals only where the fit converged."""
    rows, good = law["rows"], law["status"] == "CONVERGED"
    dropped = ", ".join(f"{n} where {rule}" for rule, n in rows["dropped"].items()) or "none"
    typer.echo(f"{rows['used']} rows fitted; dropped: {dropped}")
    typer.echo(f"{'' if good else 'not a fit to rely on: '}{law['status']}, {law['message']}")
    typer.echo(law["equation"])
    typer.echo(f"objective {law['objective']['value']:.10g}: {law['objective']['name']}")
    intervals = law["ci95"] if good else None
    parameters = []
    for name, estimate in law["params"].items():
        lower, upper = (intervals or {}).get(name, (None, None))
        verdict = law["identified"].get(name)
        parameters.append(
            {
                "parameter": name, "estimate": estimate, "lower": lower, "upper": upper,
                "identified": None if verdict is None else verdict["identified"],
            }
        )  # fmt: skip
    shown = ["parameter", "estimate", *(["lower", "upper"] if intervals else []), "identified"]
    for row in parameters:
        if row["parameter"] == "irreducible":
            row["identified"] = law["floor_identified"]
    print_table(parameters, shown)
    if intervals:
        boot = law["bootstrap"]
        failed = f", {boot['failed']} failed" if boot["failed"] else ""
        unit = boot["cluster"] or "row"
        typer.echo(
            f"lower, upper: 95 %, {boot['draws']} bootstrap draws of {boot['resampling']}{failed}, "
            f"{boot['n_clusters']} independent units ({unit})"
        )
    for reason in law["floor_reasons"]:
        typer.echo(f"  E not identified: {reason}")
    for name, verdict in law["identified"].items():
        if verdict["reasons"]:
            typer.echo(f"  {name} not identified: {verdict['reasons']}")
    if len(law["basins"]) > 1:
        typer.echo("\nmore than one basin:")
        print_table(law["basins"], list(law["basins"][0]))
    typer.echo("\nunder other objectives:")
    print_table(law["sensitivity"], list(law["sensitivity"][0]))


def _print_study(fits: Mapping[str, Any]) -> None:
    """The headline, its alternatives, what may be concluded, and the joint law."""
    rows = fits["rows"]
    dropped = ", ".join(f"{d['count']} {d['rule']}" for d in rows["dropped"]) or "none"
    typer.echo(f"{rows['used']} of {rows['table']} runs fitted; dropped: {dropped}\n")
    compute = fits["compute"]
    records: Sequence[Mapping[str, Any]] = [compute["headline"], *compute["alternatives"]]
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
