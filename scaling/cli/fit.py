"""The verb `fit`: the laws of a sweep, or any law on any table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling import ClueError
from scaling.cli import laws
from scaling.cli.app import RESULTS, Json, Results, app
from scaling.cli.studies import load_tables, tables_folder
from scaling.cli.tables import TABLES, read_table
from scaling.cli.terminal import cell, print_json, print_table, progress

Table = Annotated[
    Path,
    typer.Argument(help="Sweep file, folder of its tables, or a Parquet, CSV or JSONL table."),
]

OF_A_SWEEP = ("table", "results", "n_boot", "seed", "as_json")
"""Parameters of the verb that mean something where the laws of a sweep are fitted."""


@app.command()
def fit(
    context: typer.Context,
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
    loss: laws.Loss = "huber",
    delta: laws.Delta = 1e-3,
    scale: laws.Scale = "log",
    overestimate: laws.Overestimate = 1.0,
    weights: laws.Weights = None,
    fix: laws.Fix = None,
    bound: laws.Bound = None,
    tie: laws.Tie = None,
    cluster: laws.Cluster = "auto",
    bootstrap: laws.Resampled = "clusters",
    n_boot: laws.Draws = 1000,
    seed: laws.Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit the laws of a sweep, or one law to a table.

    A sweep's fits go to fits.json beside its tables; of the options above it takes --n-boot and
    --seed. The language of --form is in docs/fitting.md.

    \b
    Example:
        clue-scaling fit sweeps/demo.toml
        clue-scaling fit <TABLE>.csv --x pf_days --y loss
        clue-scaling fit <TABLE>.csv --form 'E + n + d' --y loss --fix exponent.n=0.35
    """
    if table.suffix in TABLES:
        from scaling.analysis import fit_law

        if form is not None and _given(context, "x"):
            raise ClueError("--x names the column of a power law; --form has its own columns")
        df = read_table(table)
        try:
            law = fit_law(
                df, f"`{x}`" if form is None else form, y=y,
                cluster=None if cluster == "none" else cluster, n_boot=n_boot, seed=seed,
                **laws.choices(
                    loss, delta, scale, overestimate, weights, fix, bound, tie, bootstrap
                ),
            ).to_dict()  # fmt: skip
        except ClueError as e:
            raise ClueError(f"{table}: {e}") from None
        if as_json:
            print_json(law)
        else:
            _print_law(law)
        return
    if unused := [p for p in context.params if p not in OF_A_SWEEP and _given(context, p)]:
        raise ClueError(
            f"{table} is no table ({', '.join(TABLES)}), so the laws of a sweep are fitted, and "
            f"{', '.join('--' + p.replace('_', '-') for p in unused)} would do nothing; to fit one "
            "law, name a table, such as runs.parquet of the sweep's results"
        )
    from scaling.analysis.studies.report import study, write_study

    folder = tables_folder(table, results)
    tables = load_tables(folder)
    with progress("fit") as update:
        fits = study(tables, n_boot=n_boot, seed=seed, progress=update)
    path = write_study(fits, folder)
    if as_json:
        print_json(fits)
        return
    _print_study(fits)
    typer.echo(path)


def _given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


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
        verdict = law["identified"].get(name, {"identified": None})["identified"]
        parameters.append(
            {
                "parameter": name, "estimate": estimate, "lower": lower, "upper": upper,
                "identified": law["floor_identified"] if name == "irreducible" else verdict,
            }
        )  # fmt: skip
    shown = ["parameter", "estimate", *(["lower", "upper"] if intervals else []), "identified"]
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
    """What survives every choice and what is open, then the laws, in short."""
    rows = fits["rows"]
    dropped = ", ".join(f"{d['count']} {d['rule']}" for d in rows["dropped"]) or "none"
    typer.echo(f"{rows['used']} of {rows['table']} runs fitted; dropped: {dropped}")
    compute = fits["compute"]
    records: Sequence[Mapping[str, Any]] = [compute["headline"], *compute["alternatives"]]
    if all(record["fit"] is None for record in records):
        typer.echo(f"\nno law could be fitted: {compute['headline']['failed']}")
        return
    outliers = rows["outliers"]
    if outliers["run_keys"]:
        typer.echo(f"outliers by {outliers['rule']}: {', '.join(map(str, outliers['run_keys']))}")
    _print_claims(fits["claims"]["claims"])
    _print_compute(records, compute["shapes"])
    _print_joint(fits["joint"])
    _print_limits(fits["limits"])
    for pair in fits["aliasing"]["pairs"]:
        if pair["verdict"] in ("aliased", "entangled"):
            typer.echo(f"{' and '.join(pair['pair'])} {pair['verdict']}: {pair['reason']}")


def _print_claims(claims: Sequence[Mapping[str, Any]]) -> None:
    """Every claim with the base's number and the range over choices; then why some are open."""
    table = []
    for claim in claims:
        values = [v["value"] for v in claim["values"] if v["value"] is not None]
        agree = sum(v["answer"] is not None for v in claim["values"])
        base = claim["values"][0] if claim["values"] else {}
        table.append(
            {
                "survives": claim["holds"], "claim": claim["statement"] or claim["question"],
                "base": base.get("value"), "lower": base.get("lower"), "upper": base.get("upper"),
                "lowest": min(values, default=None), "highest": max(values, default=None),
                "answered": f"{agree}/{len(claim['values'])}",
            }
        )  # fmt: skip
    typer.echo("\nSurviving claims")
    shown = ("survives", "claim", "base", "lower", "upper", "lowest", "highest", "answered")
    print_table(table, shown, drop=("answered", "highest", "lowest"))
    typer.echo("lower, upper: 95 % at the base choice; lowest, highest: over all choices")
    for claim in claims:
        if not claim["holds"]:
            first = claim["against"][0].partition(";")[0]
            more = len(claim["against"]) - 1
            typer.echo(
                f"  open, {claim['name']}: {first}" + (f" (and {more} more)" if more else "")
            )


def _print_compute(records: Sequence[Mapping[str, Any]], shapes: Mapping[str, Any]) -> None:
    lines = []
    for record in records:
        law = record["fit"]
        row = {k: record[k] for k in ("x", "y", "points", "floor", "objective", "rows")}
        if law is not None:
            intervals = law["ci95"] if law["status"] == "CONVERGED" else None
            lower, upper = (intervals or {}).get("exponent", (None, None))
            row |= {"exponent": law["params"]["exponent"], "lower": lower, "upper": upper}
        lines.append(row | {"status": law["status"] if law else record["failed"]})
    typer.echo("\nLaws in compute")
    shown = (
        "x",
        "y",
        "points",
        "floor",
        "objective",
        "rows",
        "exponent",
        "lower",
        "upper",
        "status",
    )
    print_table(lines, shown, drop=("rows", "objective", "points", "floor", "status"))
    for x, found in shapes.items():
        said = found["failed"] or found["comparison"]["verdict"]
        typer.echo(f"  {x}: {said}")


def _print_joint(joint: Mapping[str, Any]) -> None:
    typer.echo("\nJoint law")
    for factor, reason in joint["left_out"].items():
        typer.echo(f"  {factor} left out: {reason}")
    for name in ("with_floor", "without_floor", "best_checkpoint"):
        record = joint[name]
        law = record["fit"]
        if law is None:
            typer.echo(f"  {name.replace('_', ' ')}: {record['failed']}")
            continue
        typer.echo(f"  {name.replace('_', ' ')}, {law['status']}: {law['equation']}")
        for verdict in law["identified"].values():
            known = verdict["reasons"].partition(";")[0] or "identified"
            typer.echo(f"    {verdict['factor']} {cell(verdict['exponent'])}: {known}")
    for name in ("forms", "sizes"):
        compared = joint[name]["comparison"]
        typer.echo(f"  {name}: {compared['verdict'] if compared else joint[name]['failed']}")


def _print_limits(limits: Mapping[str, Any]) -> None:
    """How many cells each factor limits."""
    sure = [cell["limiting"] for cell in limits["cells"] if cell["said"]]
    counts = ", ".join(f"{name} {sure.count(name)}" for name in dict.fromkeys(sure))
    typer.echo(f"\nLimiting factor of {len(limits['cells'])} cells: {counts or 'none is sure'}")
