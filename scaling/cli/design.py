"""Verbs before spending: what a planned sweep can tell, and which runs to do next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaling import ClueError
from scaling.cli.app import RESULTS, WORK, Json, Results, Root, SweepFile, app, planned_runs
from scaling.cli.laws import fixed_values
from scaling.cli.terminal import cell, print_json, print_table

if TYPE_CHECKING:
    import pandas as pd

    from scaling.analysis.design.belief import Assumption
    from scaling.config import CorpusCard
    from scaling.sweeps import Grid

Law = Annotated[
    Path | None,
    typer.Option(help="Fitted law to assume: JSON of `fit`, or fits.json of another sweep."),
]
Exponents = Annotated[
    list[str], typer.Option("--exponent", help="Assumed exponent of a factor: NAME=VALUE; repeat.")
]
Floor = Annotated[
    float | None,
    typer.Option(min=0, max=0.99, help="Assumed E over the loss at the centre of the design."),
]
Noise = Annotated[
    float | None,
    typer.Option(
        min=0, help="Deviation of ln loss from run to run; default: from seeds, else 0.01."
    ),
]
FormOption = Annotated[
    str | None, typer.Option("--form", help="Law to be fitted; default: E and what varies enough.")
]


@app.command()
def audit(
    sweep: SweepFile,
    root: Root = WORK,
    results: Results = RESULTS,
    law: Law = None,
    exponents: Exponents = [],  # noqa: B006  (typer copies it)
    floor: Floor = None,
    noise: Noise = None,
    form: FormOption = None,
    as_json: Json = False,
) -> None:
    """Say what a planned sweep can and cannot identify.

    Before anything is run, from the plan and an assumed law: rank and condition of the design, what
    goes together in it, the standard error to expect of every exponent, and the cheapest runs found
    that would mend what it cannot tell. Works for nominal corpora.

    \b
    Example:
        clue-scaling audit sweeps/compute.toml
        clue-scaling audit sweeps/scale_factors.toml --exponent batch_size=0.1 --noise 0.005
    """
    import pandas as pd

    from scaling.analysis.design.audit import audit as judge
    from scaling.analysis.design.mending import with_mends

    grid, card, runs = planned_runs(sweep, root, nominal=True)
    plan = pd.DataFrame([run.row for run in runs])
    assumption, form = _assumed(plan, law, exponents, floor, form)
    noise, source = _noise(noise, _finished(results, grid, card))
    found = judge(
        plan, sweep=grid.name, noise=noise, noise_from=source, assumption=assumption, form=form
    )
    found = with_mends(found, plan, grid, card, assumption)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(
        f"{found.runs} runs of {found.configurations} configurations, {found.pf_days:.4g} PF-days "
        f"(exact count)\nlaw: {found.form or 'none, for no factor varies enough'}\n"
        f"{found.assumption}\nnoise {found.noise:.3g} of ln loss ({found.noise_from})"
    )
    if found.form:
        typer.echo(
            f"rank {found.rank} of {found.parameters} parameters, condition number "
            f"{cell(found.condition)}"
        )
        if found.unidentified:
            typer.echo(f"open parameters: {', '.join(found.unidentified)}")
    typer.echo()
    rows = [vars(f) | {"moves_with": ", ".join(f.aliases) or None} for f in found.factors]
    shown = (
        "factor", "verdict", "low", "high", "values", "decades", "inflation", "exponent",
        "standard_error", "seeds", "moves_with",
    )  # fmt: skip
    print_table(rows, shown, drop=("seeds", "values", "inflation", "high", "low", "decades"))
    _print_reasons(found.factors)
    for title, lines in (("goes together", found.relations), ("missing", found.missing)):
        typer.echo(f"\n{title}:" if lines else "", nl=bool(lines))
        for line in lines:
            typer.echo(f"  {line}")


@app.command("next")
def next_runs(
    sweep: SweepFile,
    budget: Annotated[float, typer.Option(min=0, help="PF-days that the runs may cost in all.")],
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Sweep file to write them to.")
    ] = None,
    root: Root = WORK,
    results: Results = RESULTS,
    count: Annotated[
        Literal["exact", "formula"], typer.Option(help="PF-days by exact count or by the paper's.")
    ] = "exact",
    max_runs: Annotated[int, typer.Option(min=1, max=1000, help="Most runs.")] = 32,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of every configuration.")] = 1,
    ahead: Annotated[
        float, typer.Option(min=1, help="The law shall serve at so many times the largest run.")
    ] = 10.0,
    law: Law = None,
    exponents: Exponents = [],  # noqa: B006  (typer copies it)
    floor: Floor = None,
    noise: Noise = None,
    form: FormOption = None,
    as_json: Json = False,
) -> None:
    """Propose the next runs of a sweep for a budget.

    Candidates are the values that the sweep declares, crossed, and those between them. Chosen are
    the runs from which, with the finished ones, all exponents come out best, and the optimum at ten
    times the compute: the decision and the prediction. --out writes them as a sweep file.

    \b
    Example:
        clue-scaling next sweeps/scale_factors.toml --budget 0.5 --out sweeps/scale_next.toml
    """
    import pandas as pd

    from scaling.analysis.design.next import propose, sweep_file
    from scaling.files import write_bytes
    from scaling.sweeps import SIZES_FILE

    grid, card, runs = planned_runs(sweep, root, nominal=True)
    assumption, form = _assumed(pd.DataFrame([r.row for r in runs]), law, exponents, floor, form)
    finished = _finished(results, grid, card)
    noise, source = _noise(noise, finished)
    found = propose(
        grid, card, budget, noise=noise, finished=finished, assumption=assumption, form=form,
        price=count, max_runs=max_runs, seeds=seeds, ahead=ahead,
    )  # fmt: skip
    if out is not None:
        beside = (out.parent / SIZES_FILE).exists()
        write_bytes(out, sweep_file(grid, found, out.parent, beside).encode())
    if as_json:
        print_json(found.to_dict())
        return
    shown = (
        "model", "n_total", "batch_size", "items_per_user", "data_fraction", "seed", "pf_days",
        "pf_days_exact",
    )  # fmt: skip
    print_table(found.runs, shown, drop=("n_total", "seed", "data_fraction"))
    typer.echo(
        f"\n{len(found.runs)} runs, {found.spent:.6g} of {found.budget:g} PF-days ({found.price}); "
        f"{found.finished} finished runs\nlaw: {found.form}\n{found.assumption}\n"
        f"noise {found.noise:.3g} of ln loss ({source})"
    )
    if found.target:
        at = ", ".join(f"{k} {v:.3g}" for k, v in found.target.items())
        typer.echo(f"target, at {found.ahead:g} x the compute of the largest candidate: {at}")
    typer.echo("\nexpected standard errors (of the decision: its relative loss)")
    print_table(found.expected, ("quantity", "value", "before", "after"))
    if out is not None:
        typer.echo(out)


def _assumed(
    plan: "pd.DataFrame",
    law: Path | None,
    exponents: Sequence[str],
    floor: float | None,
    form: str | None,
) -> "tuple[Assumption, str | None]":
    """The assumption that options make, and the form: that of the law where one is given."""
    from dataclasses import replace

    from scaling.analysis.design.belief import Assumption, assumption_of

    given = Assumption()
    if law is not None:
        given, own = assumption_of(law, plan)
        form = form or own
    if floor is not None:
        given = replace(given, floor_share=floor, source=f"{given.source}; given: E {floor:.0%}")
    assumed = fixed_values(exponents, "--exponent")
    if unknown := [name for name in assumed if name not in plan]:
        raise ClueError(f"--exponent {unknown[0]}: the plan has no such column")
    return given.with_exponents(assumed), form


def _finished(results: Path, grid: "Grid", card: "CorpusCard") -> "pd.DataFrame":
    """Finished runs of a sweep on this corpus; none where nothing was collected."""
    import pandas as pd

    from scaling.results import load

    folder = results / grid.name
    if card.digest is None or not (folder / "runs.parquet").exists():
        return pd.DataFrame()
    runs = load(folder).runs
    return runs[runs["loss"].notna() & (runs["corpus_digest"] == card.digest)]


def _noise(given: float | None, finished: "pd.DataFrame") -> tuple[float, str]:
    """Noise of a run, and where it is from."""
    from scaling.analysis.design.audit import NOISE_FREEDOM, SETTINGS
    from scaling.analysis.design.belief import NOISE, noise_of

    if given is not None:
        if given == 0:
            raise ClueError("--noise: above 0")
        return given, "given"
    same = [c for c in SETTINGS if c in finished]
    measured = noise_of(finished, same) if len(finished) else None
    if measured is None or measured[1] < NOISE_FREEDOM:
        return NOISE, "assumed"
    return measured[0], f"seeds of finished runs, {measured[1]} degrees of freedom"


def _print_reasons(factors: Sequence[Any]) -> None:
    """Why a factor is not identified, and what would mend it."""
    for factor in factors:
        if not factor.reasons:
            continue
        typer.echo(f"\n{factor.factor}: {factor.verdict}")
        for reason in factor.reasons:
            typer.echo(f"  {reason}")
        if factor.mend is None:
            typer.echo("  no few runs that were tried would mend it")
            continue
        typer.echo(
            f"  {factor.mend.verdict} with {factor.mend.pf_days:.3g} PF-days more (standard error "
            f"{cell(factor.mend.standard_error)}):"
        )
        for run in factor.mend.runs:
            typer.echo(f"    {_words(run)}")


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} = {v}" for k, v in settings.items())
