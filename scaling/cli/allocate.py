"""The verb `allocate`: the best use of a budget, as a sweep's results have it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaling import ClueError
from scaling.cli.app import RESULTS, WORK, Json, Results, Root, SweepFile, app
from scaling.cli.studies import load_tables
from scaling.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from scaling.analysis.allocation.sweep import SweepAllocation

FIGURES = (".png", ".svg", ".pdf")
"""Endings of the files that figures are drawn to."""
LISTED = 10
"""Configurations that are printed; --json has more."""


@app.command()
def allocate(
    sweep: SweepFile,
    budget: Annotated[float, typer.Option("--budget", help="What may be spent. [PF-days]")],
    results: Results = RESULTS,
    root: Root = WORK,
    form: Annotated[
        str | None,
        typer.Option(help="Joint law; by default E and a power of each factor that varies."),
    ] = None,
    counting: Annotated[
        str, typer.Option(help="PF-days by the exact count or by the paper's formula.")
    ] = "exact",
    max_batch: Annotated[
        int | None, typer.Option(min=2, help="Largest batch size; default: ten times the runs'.")
    ] = None,
    max_items: Annotated[
        int | None, typer.Option(min=1, help="Largest items per user; default likewise.")
    ] = None,
    max_repeats: Annotated[
        float | None, typer.Option(min=0, help="Most passes over the users beyond the first.")
    ] = None,
    user_price: Annotated[
        float | None,
        typer.Option(min=0, help="Cost of a distinct user, out of the budget. [PF-days]"),
    ] = None,
    batch_step: Annotated[int, typer.Option(min=1, help="Batch sizes are multiples of it.")] = 32,
    items_step: Annotated[int, typer.Option(min=1, help="Items are multiples of it.")] = 16,
    within: Annotated[
        float, typer.Option(min=0, max=1, help="Excess loss that still counts as optimal.")
    ] = 0.01,
    n_boot: Annotated[
        int, typer.Option(min=2, max=10_000, help="Bootstrap draws of the law.")
    ] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Seed of starts and bootstrap.")] = 0,
    figure: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Draw the region to this file (png, svg, pdf), where three quantities vary.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how a budget is best spent on model, batch and items.

    Fits the joint law to the results of a sweep and minimises it under the budget: the optimum with
    its interval, the region that is nearly as good, and configurations that can be run. Refuses
    where the runs do not identify the law. Steps stay those of the sweep; users seen cost nothing
    unless they have a price.

    \b
    Example:
        clue-scaling allocate sweeps/scale_factors.toml --budget 0.1 --figure allocation.png
    """
    from scaling.sweeps import Grid

    grid = Grid.read(sweep)
    tables = load_tables(results / grid.name)
    from scaling.analysis.allocation.sweep import allocate_sweep
    from scaling.data.prepare import read_card

    kinds: tuple[Literal["exact", "paper"], ...] = ("exact", "paper")
    if figure is not None and figure.suffix not in FIGURES:
        raise ClueError(f"--figure {figure}: a file that ends in {', '.join(FIGURES)}")
    if figure is not None and user_price is not None:
        raise ClueError(f"--figure {figure}: no map is drawn where users have a price")
    chosen = [kind for kind in kinds if kind == counting]
    if not chosen:
        raise ClueError(f"--counting {counting}: valid: {', '.join(kinds)}")
    try:
        found = allocate_sweep(
            tables, read_card(grid.corpus, root), grid.sizes, budget, form=form,
            counting=chosen[0], max_batch=max_batch, max_items=max_items, max_repeats=max_repeats,
            user_price=user_price, batch_step=batch_step, items_step=items_step, within=within,
            n_boot=n_boot, seed=seed,
        )  # fmt: skip
    except ClueError as e:
        raise ClueError(f"{sweep}: {e}") from None
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found, counting)
    if figure is not None:
        _draw(found, figure)
        if not as_json:
            typer.echo(f"\n{figure}")


def _draw(found: "SweepAllocation", path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    from scaling.analysis.allocation.figures import flat_regions
    from scaling.analysis.figures import rendered
    from scaling.files import write_bytes

    drawn = flat_regions(found.law, found.workload, found.chosen, found.snapped)[0].figure
    assert isinstance(drawn, Figure)
    try:
        write_bytes(path, rendered(drawn, path.suffix[1:]))
    finally:
        plt.close(drawn)


def _print(found: "SweepAllocation", counting: str) -> None:
    """The law, the optimum, the region around it, and what can be run."""
    rows, law, chosen = found.rows, found.law, found.chosen
    dropped = ", ".join(f"{n} {rule}" for rule, n in rows["dropped"].items()) or "none"
    typer.echo(f"{rows['used']} of {rows['table']} runs fitted; dropped: {dropped}")
    typer.echo(law.equation())
    typer.echo(
        f"\n{chosen.budget:g} PF-days ({counting}) at {found.workload.steps:,} steps; optimum, its "
        f"95 % interval over {len(chosen.draws)} draws, and the region within {chosen.within:.2g} "
        "of its loss:"
    )
    quantities = chosen.to_dict()["quantities"]
    table: list[dict[str, Any]] = [{"quantity": k, **row} for k, row in quantities.items()]
    shown = ["quantity", "optimum", "lower", "upper", "region_low", "region_high", "at_limit"]
    print_table(table, shown, drop=("at_limit",))
    typer.echo(f"a budget of {chosen.cheapest:.1%} of this, spent best, reaches the same region")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if found.snapped is None:
        return
    record = found.snapped.to_dict(LISTED)
    typer.echo(
        f"\n{record['in_region']} of {record['listed']} configurations that can be run lie in the "
        f"region; the best {len(record['configurations'])}:"
    )
    print_table(
        record["configurations"],
        ["model", "n_total", "batch_size", "items_per_user", "spent", "loss", "excess",
         "share_within"],
        drop=("spent", "n_total"),
    )  # fmt: skip
