"""The verb that checks a law's extrapolation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling import ClueError
from scaling.cli import laws
from scaling.cli.app import Json, app
from scaling.cli.tables import read_table
from scaling.cli.terminal import print_json, print_table


@app.command()
def rollout(
    table: Annotated[Path, typer.Argument(help="Table of runs: CSV, Parquet or JSONL.")],
    form: Annotated[str, typer.Option(help='Law, such as "E + n_total + batch_size".')],
    by: Annotated[str, typer.Option(help="Column to extrapolate along: a factor or compute.")],
    y: Annotated[str, typer.Option(help="Column that the law predicts.")] = "loss",
    cut: Annotated[
        list[float] | None,
        typer.Option(help="Fit the rows up to this value of --by; may be given several times."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help='Rule on rows, such as "status != diverged"; may be repeated.'),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Plain power law to beat; default: product of the columns.")
    ] = None,
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
    level: Annotated[float, typer.Option(min=0, max=1, help="Of the intervals.")] = 0.95,
    n_boot: laws.Draws = 200,
    seed: laws.Seed = 0,
    as_json: Json = False,
) -> None:
    """Fit small, predict large: how far a law can be extrapolated.

    Each window fits the rows up to a value of a column and predicts all rows beyond it.

    \b
    Example:
        clue-scaling rollout <TABLE>.csv --form "E + n_total + batch_size" --by pf_days
    """
    from scaling.analysis.fitting.rollout import rollout as roll
    from scaling.analysis.fitting.selection import select

    df = read_table(table)
    try:
        chosen = select(df, rule or [], cluster=None if cluster == "none" else cluster)
        found = roll(
            chosen.rows, form, y=y, by=by, cuts=cut, baseline=baseline, level=level,
            n_boot=n_boot, cluster=chosen.cluster, seed=seed,
            **laws.choices(loss, delta, scale, overestimate, weights, fix, bound, tie, bootstrap),
        )  # fmt: skip
    except ClueError as e:
        raise ClueError(f"{table}: {e}") from None
    report = {"selection": chosen.to_dict(), **found.to_dict()}
    if as_json:
        print_json(report)
        return
    _print(report)


def _print(report: Mapping[str, Any]) -> None:
    selection, rows = report["selection"], report["rows"]
    for applied in selection["rules"]:
        note = f"; {applied['note']}" if applied["note"] else ""
        typer.echo(f"rule {applied['rule']}: {applied['count']} rows dropped{note}")
    for reason, count in rows["dropped"].items():
        typer.echo(f"{count} rows dropped: {reason}")
    typer.echo(
        f"{rows['used']} of {selection['table']} rows used\n{report['y']} = {report['form']}; to "
        f"beat: {report['baseline']}, the last value, the lowest value\n"
    )
    scores = ("bias", "error", "coverage", "skill_power", "skill_last", "skill_lowest")
    columns = ("cut", "rows_fitted", "runs_fitted", "rows_held", "ratio", *scores, "status")
    print_table(report["windows"], columns, drop=("runs_fitted", "skill_lowest", "skill_last"))
    typer.echo()
    print_table(report["by_ratio"], ("from", "to", "rows", *scores))
    typer.echo(
        "\nratio: of the column, held out over largest fitted. bias, error: mean and mean absolute "
        f"ln(predicted / y).\ncoverage: share of rows inside the {report['level']:.0%} interval of "
        "a new run. skill: 1 - error / error of the other."
    )
