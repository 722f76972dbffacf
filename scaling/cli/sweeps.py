"""Verbs on sweeps, from the plan to the tables."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.cli.app import (
    RESULTS,
    WORK,
    Cluster,
    Json,
    Results,
    Root,
    SweepFile,
    app,
    known_runs,
    planned_runs,
    submitted_runs,
)
from scaling.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from scaling.sweeps import PlannedRun

Rows = Sequence[Mapping[str, Any]]
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
STATUS_SHOWN = (
    "run_key", "state", "job_state", "job_id", "attempts", "step", "steps", "loss", "train_loss",
    "cause",
)  # fmt: skip
STATUS_DROPPED = ("job_state", "job_id", "train_loss", "attempts", "steps", "loss")


@app.command()
def plan(sweep: SweepFile, root: Root = WORK, as_json: Json = False) -> None:
    """Say what a sweep would train and cost; write nothing.

    One row a run: parameters, users, epochs, FLOPs and PF-days by the paper's formula and counted
    exactly. items_per_user is the cap, items_per_user_mean what the logs realise under it. A corpus
    with logs must be prepared first; a nominal one is planned from its statistics.

    \b
    Example:
        clue-scaling plan sweeps/scale_factors.toml
    """
    _, card, runs = planned_runs(sweep, root, nominal=True)
    rows = [run.row for run in runs]
    if as_json:
        print_json(rows)
        return
    shown = [c for c in PLAN_SHOWN if c != "run_key" or card.digest]
    print_table(rows, shown, drop=PLAN_DROPPED)
    nominal = "" if card.digest else ", nominal: it cannot be submitted"
    typer.echo(f"\n{len(rows)} runs on corpus {card.name}{nominal}")
    for name, flops, days in (
        ("the paper's formula", "flops", "pf_days"),
        ("exact count", "flops_exact", "pf_days_exact"),
    ):
        total, in_days = (sum(r[k] for r in rows) for k in (flops, days))
        typer.echo(f"{name}: {in_days:.4g} PF-days, {total:.4g} FLOPs")


@app.command()
def submit(
    sweep: SweepFile,
    cluster: Cluster,
    root: Root = WORK,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Failed, cancelled and lost runs too.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Then sync until all is over.")] = False,
) -> None:
    """Submit what is missing of a sweep, and nothing else.

    \b
    Example:
        clue-scaling submit sweeps/demo.toml --cluster slurm/local.toml --dry-run
    """
    from scaling.rundir import RunDir
    from scaling.slurm import sync as driver
    from scaling.slurm.profile import ClusterProfile
    from scaling.sweeps import sweep_id, write_sweep

    grid, card, planned = planned_runs(sweep, root)
    profile = ClusterProfile.read(cluster)
    identity = sweep_id(grid.name, planned)
    configs = [p.config for p in planned if p.config]
    for config in configs:
        profile.shape_of(config)
    if dry_run:
        known = known_runs(planned, root)
        rows = driver.submit(
            root, known, profile, sweep=identity, dry_run=True, retry_failed=retry_failed
        )
        rows = [row for row in _with_new(rows, planned) if row.get("action", "submit")]
        print_table(rows, ["run_key", "state", "attempts", "step", "steps"])
        typer.echo(f"would submit {len(rows)} of {len(planned)} runs")
        return
    write_sweep(root, grid, card, planned)
    runs = [RunDir.create(root, config, card.name) for config in configs]
    rows = driver.submit(root, runs, profile, sweep=identity, retry_failed=retry_failed)
    typer.echo(_tally(rows))
    _tell_stale(rows)
    if watch:
        driver.sync(root, runs, profile, sweep=identity, watch=True, report=_tell_changes())


@app.command()
def sync(
    sweep: SweepFile,
    cluster: Cluster,
    root: Root = WORK,
    watch: Annotated[bool, typer.Option("--watch", help="Until all runs are over.")] = False,
) -> None:
    """Go on with a sweep: retries, and the runs still waiting.

    Safe to run anywhere, any number of times, at the same time (cron, say).

    \b
    Example:
        clue-scaling sync sweeps/demo.toml --cluster slurm/local.toml --watch
    """
    from scaling.slurm import sync as driver
    from scaling.slurm.profile import ClusterProfile
    from scaling.sweeps import sweep_id

    grid, _, planned = planned_runs(sweep, root)
    identity = sweep_id(grid.name, planned)
    driver.sync(
        root,
        submitted_runs(planned, root, sweep, identity),
        ClusterProfile.read(cluster),
        sweep=identity,
        watch=watch,
        report=_tell_changes(),
    )


@app.command()
def status(sweep: SweepFile, root: Root = WORK, as_json: Json = False) -> None:
    """Show the state of every run of a sweep.

    Exit status 3 says that the scheduler does not answer and states are the last known.

    \b
    Example:
        clue-scaling status sweeps/demo.toml
    """
    from scaling.slurm.sync import status as look

    _, _, planned = planned_runs(sweep, root)
    rows = _with_new(look(known_runs(planned, root)), planned)
    if as_json:
        print_json(rows)
    else:
        print_table(rows, STATUS_SHOWN, drop=STATUS_DROPPED)
        typer.echo(_tally(rows))
    if _tell_stale(rows):
        raise typer.Exit(3)


@app.command()
def cancel(sweep: SweepFile, root: Root = WORK) -> None:
    """End the runs of a sweep; each commits a checkpoint first.

    submit --retry-failed takes them up again where they stopped.

    \b
    Example:
        clue-scaling cancel sweeps/demo.toml
    """
    from scaling.slurm.cancel import cancel as end
    from scaling.sweeps import sweep_id

    grid, _, planned = planned_runs(sweep, root)
    cancelled = end(submitted_runs(planned, root, sweep, sweep_id(grid.name, planned)))
    typer.echo(f"cancelled {len(cancelled)} of {len(planned)} runs")


@app.command()
def collect(sweep: SweepFile, root: Root = WORK, results: Results = RESULTS) -> None:
    """Turn run directories into tidy tables.

    \b
    Example:
        clue-scaling collect sweeps/demo.toml
    """
    from scaling.results import collect as tabulate

    grid, _, planned = planned_runs(sweep, root)
    out = results / grid.name
    report = tabulate(root, [p.row for p in planned], grid.name, out).collected
    states = ", ".join(f"{n} {state}" for state, n in report["states"].items())
    typer.echo(f"{out}: {report['planned']} runs ({states}), {report['with_loss']} with a loss")
    for reason in ("incomplete", "diverged", "unreadable", "without_transfer"):
        if report[reason]:
            typer.echo(f"{reason}: {len(report[reason])} (named in {out / 'collect.json'})")


def _with_new(rows: Rows, planned: "Sequence[PlannedRun]") -> list[dict[str, Any]]:
    """Status rows of all planned runs: those found, and those that nobody has submitted yet."""
    found = {row["run_key"]: dict(row) for row in rows}
    missing = dict.fromkeys((*STATUS_SHOWN, "progress_age_s", "evidence", "stale"))
    new = {"state": "PLANNED", "attempts": 0, "step": 0, "held": False, "over": False}
    named = [{name: p.row[name] for name in ("run_key", "steps")} for p in planned]
    return [{**found.get(row["run_key"], missing | new), **row} for row in named]


def _tally(rows: Rows) -> str:
    counts = Counter(row["state"] for row in rows)
    return f"{len(rows)} runs: " + ", ".join(f"{n} {state}" for state, n in counts.items())


def _tell_stale(rows: Rows) -> bool:
    """Say why states are only the last known, where some are."""
    stale = sorted({r["stale"] for r in rows if r["stale"]})
    for why in stale:
        typer.echo(f"last known states: {why}", err=True)
    return bool(stale)


def _tell_changes() -> Callable[[Rows], None]:
    """Prints the tally of states whenever it is another."""
    told = ""

    def tell(rows: Rows) -> None:
        nonlocal told
        if (now := _tally(rows)) != told:
            told = now
            typer.echo(now)

    return tell
