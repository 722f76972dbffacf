"""What a sweep trains and costs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaling import ClueError
from scaling.cli.app import WORK, Json, Root, SweepFile, app, planned_runs
from scaling.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from scaling.slurm.cost import Estimate
    from scaling.slurm.profile import ClusterProfile
    from scaling.sweeps import PlannedRun

PLAN_SHOWN = (
    "run_key", "model", "n_total", "n_non_embedding", "batch_size", "items_per_user",
    "items_per_user_mean", "data_fraction", "shuffle", "users_seen", "epochs", "steps", "seed",
    "flops", "flops_exact", "pf_days", "pf_days_exact",
)  # fmt: skip
PLAN_DROPPED = (
    "flops", "flops_exact", "n_non_embedding", "seed", "shuffle", "users_seen",
    "items_per_user_mean", "pf_days_exact", "data_fraction", "epochs", "steps", "n_total",
)  # fmt: skip
"""What a narrow terminal does without, the least important first; so too below."""
COST_SHOWN = ("gpu_hours", "wall_hours", "disk_gb", "basis")


@app.command()
def plan(
    sweep: SweepFile,
    root: Root = WORK,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", help="Cluster profile (TOML): what it costs there.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Runs at once; default: the profile's max_parallel.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a sweep would train and cost; write nothing.

    One row a run: parameters, users, epochs, FLOPs and PF-days by the paper's formula and counted
    exactly. items_per_user is the cap, items_per_user_mean what the logs realise under it. A corpus
    with logs must be prepared first; a nominal one is planned from its statistics.

    With --cluster also GPU-hours (on CPUs hours of ranks), hours of wall time and disk, from what
    finished runs took there, else from a stated model (basis); a minute for each evaluation.

    \b
    Example:
        clue-scaling plan sweeps/scale_factors.toml --cluster slurm/example_v100.toml
    """
    from dataclasses import asdict

    from scaling.slurm.profile import ClusterProfile
    from scaling.transfer.declared import declared

    if parallel and not cluster:
        raise ClueError("--parallel: of the wall time on a cluster; give --cluster, too")
    grid, card, runs = planned_runs(sweep, root, nominal=True)
    wanted = declared(root, grid, card)
    rows = [dict(run.row) for run in runs]
    profile = ClusterProfile.read(cluster) if cluster else None
    costs = costs_of(runs, profile, root, len(wanted)) if profile else []
    for row, cost in zip(rows, costs, strict=False):
        row.update(asdict(cost))
    if as_json:
        print_json(rows)
        return
    shown = [c for c in PLAN_SHOWN if c != "run_key" or card.digest]
    if costs:
        place = shown.index("model") + 1
        shown[place:place] = COST_SHOWN
    print_table(rows, shown, drop=PLAN_DROPPED)
    nominal = "" if card.digest else ", nominal: it cannot be submitted"
    typer.echo(f"\n{len(rows)} runs on corpus {card.name}{nominal}")
    for name, flops, days in (
        ("the paper's formula", "flops", "pf_days"),
        ("exact count", "flops_exact", "pf_days_exact"),
    ):
        total, in_days = (sum(r[k] for r in rows) for k in (flops, days))
        typer.echo(f"{name}: {in_days:.4g} PF-days, {total:.4g} FLOPs")
    if wanted:
        keys = ", ".join(evaluation.key for evaluation in wanted)
        typer.echo(f"each is then evaluated: {keys}")
    if profile:
        days = sum(row["pf_days_exact"] for row in rows)
        typer.echo(bill(costs, days, profile, parallel or profile.max_parallel))


def costs_of(
    planned: "Sequence[PlannedRun]", profile: "ClusterProfile", root: Path, evaluations: int
) -> "list[Estimate]":
    """What each of the runs costs on a profile, from its start, with so many evaluations."""
    from scaling.slurm.cost import estimate, measured_rates

    rates = measured_rates(root)
    return [
        estimate(
            run.settings,
            run.row["n_total"],
            run.row["flops_exact"],
            profile,
            rates,
            evaluations=evaluations,
        )
        for run in planned
    ]


def bill(
    costs: "Sequence[Estimate]", pf_days: float, profile: "ClusterProfile", parallel: int
) -> str:
    """One line of what runs cost in all.

    Args:
        pf_days: of the runs, counted exactly. [PF-days]
    """
    from scaling.slurm.cost import wall_hours

    gpu, disk = sum(c.gpu_hours for c in costs), sum(c.disk_gb for c in costs)
    wall = wall_hours([c.wall_hours for c in costs], parallel)
    told = ", ".join(f"{n} {basis}" for basis, n in Counter(c.basis for c in costs).items())
    return (
        f"{len(costs)} runs on {profile.name}: about {gpu:.3g} GPU-hours, {pf_days:.3g} PF-days "
        f"(exact count); {wall:.3g} hours with {parallel} at once; {disk:.3g} GB of disk ({told})"
    )
