"""Verbs on sweeps, from submission to the tables."""

import contextlib
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling import ClueError
from scaling.cli.app import (
    RESULTS,
    WORK,
    Cluster,
    Json,
    Results,
    Root,
    SweepFile,
    Yes,
    app,
    known_runs,
    other_versions,
    planned_runs,
    runs_of,
    submitted_runs,
)
from scaling.cli.plans import bill
from scaling.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from scaling.sweeps import PlannedRun

Rows = Sequence[Mapping[str, Any]]
STATUS_SHOWN = (
    "run_key", "state", "job_state", "job_id", "attempts", "step", "steps", "loss", "train_loss",
    "evaluated", "wanted", "eta_s", "gpu_hours", "estimate_gpu_hours", "progress_age_s", "cause",
)  # fmt: skip
STATUS_DROPPED = (
    "wanted", "evaluated", "estimate_gpu_hours", "job_state", "job_id", "train_loss",
    "progress_age_s", "attempts", "steps", "gpu_hours", "loss", "eta_s",
)  # fmt: skip
STATUS_NEW = {"state": "PLANNED", "attempts": 0, "step": 0, "held": False, "stalled": False,
              "over": False}  # fmt: skip
"""Of a planned run that has no folder yet; everything else is missing."""


@app.command()
def submit(
    sweep: SweepFile,
    cluster: Cluster,
    root: Root = WORK,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job scripts and change nothing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Failed, cancelled and lost runs too.")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(min=1e-6, help="GPU-hours it may take in all, retries included."),
    ] = None,
    no_budget: Annotated[
        bool, typer.Option("--no-budget", help="Let it take what it takes, from now on.")
    ] = False,
    new_code: Annotated[
        bool | None,
        typer.Option(
            "--new-code/--keep-code",
            help="Where the code has changed since runs began: go on with it, or with theirs.",
        ),
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Go on with other versions of packages.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Then sync until all is over.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Submit what is missing of a sweep, and nothing else.

    Says what it will cost, and asks on a terminal.

    \b
    Example:
        clue-scaling submit sweeps/demo.toml --cluster slurm/local.toml --dry-run
    """
    from scaling.rundir import RunDir
    from scaling.slurm import sync as driver
    from scaling.slurm.budget import read_budget, set_budget, unset_budget
    from scaling.slurm.profile import ClusterProfile
    from scaling.sweeps import sweep_id, write_sweep
    from scaling.transfer.declared import declared

    if budget and no_budget:
        raise ClueError("--budget and --no-budget contradict each other")
    grid, card, planned = planned_runs(sweep, root)
    profile = ClusterProfile.read(cluster)
    identity = sweep_id(grid.name, planned)
    configs = [p.config for p in planned if p.config]
    driver.check_runs(root, configs, profile)
    wanted = declared(root, grid, card)
    holding = None if no_budget else budget or read_budget(root, identity)
    seen = driver.preview(
        root, configs, profile, sweep=identity, plan=[p.row for p in planned],
        budget=holding, retry_failed=retry_failed, new_code=new_code,
        wanted=[evaluation.key for evaluation in wanted],
    )  # fmt: skip
    costs = list(seen.costs.values())
    for sentence in other_versions(root, identity, planned):
        typer.echo(sentence, err=True)
    if dry_run and as_json:
        print_json([row for row in seen.rows if row["action"]])
    elif dry_run:
        for size, script in seen.arrays:
            typer.echo(f"# ---- an array of {size} runs\n{script}\n")
        rows = [row for row in seen.rows if row["action"]]
        shown = ["run_key", "state", "attempts", "step", "steps", "evaluated", "wanted"]
        print_table(rows, shown if wanted else shown[:5])
        typer.echo(f"would submit {len(rows)} of {len(planned)} runs")
        if wanted:
            keys = ", ".join(evaluation.key for evaluation in wanted)
            typer.echo(f"and evaluate, where that is missing: {keys}")
    if costs:
        trained = {row["run_key"] for row in seen.rows if row["step"] == row["steps"]}
        train = seen.costs.keys() - trained
        days = sum(p.row["pf_days_exact"] for p in planned if p.row["run_key"] in train)
        price = bill(costs, days, profile, profile.max_parallel)
        typer.echo(price, err=as_json or not dry_run)
        if holding:
            typer.echo(f"budget: {holding:g} GPU-hours", err=True)
    if dry_run:
        _tell_held(seen.rows)
        return
    if costs and not yes:
        _confirm(f"submit {len(costs)} runs?")
    write_sweep(root, grid, card, planned)
    runs = [RunDir.create(root, config, card.name) for config in configs]
    for run in runs:
        run.want(wanted)
    if budget is not None:
        set_budget(root, identity, budget, runs)
    elif no_budget:
        unset_budget(root, identity)
    rows = driver.submit(
        root, runs, profile, sweep=identity,
        retry_failed=retry_failed, new_code=new_code, allow_drift=allow_drift,
    )  # fmt: skip
    if not as_json:
        typer.echo(_tally(rows))
    if watch:
        report = None if as_json else _tell_changes(_tally(rows))
        with _watching(sweep, cluster):
            rows = driver.sync(root, runs, profile, sweep=identity, watch=True, report=report)
    _tell_stale(rows)
    _tell_held(rows)
    _tell_left(rows)
    if as_json:
        print_json(rows)


@app.command()
def sync(
    sweep: SweepFile,
    cluster: Cluster,
    root: Root = WORK,
    watch: Annotated[bool, typer.Option("--watch", help="Until all runs are over.")] = False,
    as_json: Json = False,
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
    runs = submitted_runs(planned, root, sweep, identity)
    with _watching(sweep, cluster):
        rows = driver.sync(
            root,
            runs,
            ClusterProfile.read(cluster),
            sweep=identity,
            watch=watch,
            report=None if as_json else _tell_changes(),
        )
    if len(runs) < len(planned):
        left = f"{len(planned) - len(runs)} of {len(planned)} runs were never submitted"
        typer.echo(f"{left}: clue-scaling submit {sweep} --cluster {cluster}", err=True)
    if as_json:
        print_json(rows)
    _tell_held(rows)
    if _tell_stale(rows):
        raise typer.Exit(3)


@app.command()
def status(
    sweep: SweepFile,
    root: Root = WORK,
    state: Annotated[
        list[str] | None, typer.Option(help="Only runs in this state (RUNNING, FAILED, ...).")
    ] = None,
    cause: Annotated[
        list[str] | None, typer.Option(help="Only runs that failed so (gpu_oom, error, ...).")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again once a minute, until all runs are over.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the state of every run of a sweep.

    Exit status 3 says that the scheduler does not answer and states are the last known.

    \b
    Example:
        clue-scaling status sweeps/demo.toml --state FAILED
    """
    from scaling.slurm.state import FINAL, FRUITLESS_LIMIT, State
    from scaling.slurm.status import status as look
    from scaling.slurm.sync import WATCH_S

    states = {s.upper() for s in state or ()}
    if unknown := states - set(State):
        raise ClueError(f"--state {min(unknown)}: no such state; valid: {', '.join(State)}")
    causes = {*FINAL, *FRUITLESS_LIMIT}
    if odd := set(cause or ()) - causes:
        raise ClueError(f"--cause {min(odd)}: no such cause; valid: {', '.join(sorted(causes))}")
    identity, planned = runs_of(sweep, root)
    while True:
        rows = _with_new(look(known_runs(planned, root)), planned)
        shown = [
            row
            for row in rows
            if (not states or row["state"] in states) and (not cause or row["cause"] in cause)
        ]
        if as_json:
            print_json(shown)
        else:
            _print_status(shown, rows, clear=watch)
            for sentence in other_versions(root, identity, planned):
                typer.echo(sentence)
            _print_budget(root, identity, rows)
        if not watch or all(row["over"] for row in rows):
            break
        time.sleep(WATCH_S["slurm"])
    if _tell_stale(rows):
        raise typer.Exit(3)


@app.command()
def cancel(
    sweep: SweepFile,
    root: Root = WORK,
    run: Annotated[
        list[str] | None, typer.Option(help="Only this run: its key, or its first letters.")
    ] = None,
    yes: Yes = False,
) -> None:
    """End the runs of a sweep; each commits a checkpoint first.

    submit --retry-failed takes them up again where they stopped. Doing it again is a no-op.

    \b
    Example:
        clue-scaling cancel sweeps/demo.toml
    """
    from scaling.rundir import one_key
    from scaling.slurm.cancel import cancel as end
    from scaling.slurm.status import read_facts

    identity, planned = runs_of(sweep, root)
    runs = submitted_runs(planned, root, sweep, identity)
    if run:
        keys = {one_key([r.run_key for r in runs], prefix, str(sweep)) for prefix in run}
        runs = [r for r in runs if r.run_key in keys]
    if not yes and (count := sum(not read_facts(r).over for r in runs)):
        _confirm(f"cancel {count} runs that are not done?")
    cancelled = end(runs)
    typer.echo(f"cancelled {len(cancelled)} of {len(runs)} runs")
    for sentence in other_versions(root, identity, planned):
        typer.echo(sentence, err=True)


@app.command()
def collect(sweep: SweepFile, root: Root = WORK, results: Results = RESULTS) -> None:
    """Turn run directories into tidy tables.

    \b
    Example:
        clue-scaling collect sweeps/demo.toml
    """
    from scaling.collect import collect as tabulate

    grid, _, planned = planned_runs(sweep, root)
    out = results / grid.name
    report = tabulate(root, [p.row for p in planned], grid.name, out)
    states = ", ".join(f"{n} {state}" for state, n in report["states"].items())
    typer.echo(f"{out}: {report['planned']} runs ({states}), {report['with_loss']} with a loss")
    for reason in (
        "incomplete", "diverged", "unreadable", "without_transfer", "unpaired", "without_tau",
    ):  # fmt: skip
        if report[reason]:
            typer.echo(f"{reason}: {len(report[reason])} (named in {out / 'collect.json'})")


def _with_new(rows: Rows, planned: "Sequence[PlannedRun]") -> list[dict[str, Any]]:
    """Status rows of all planned runs: those found, and those that nobody has submitted yet."""
    found = {row["run_key"]: dict(row) for row in rows}
    missing = dict.fromkeys((*STATUS_SHOWN, "evidence", "stale"))
    named = [{name: p.row[name] for name in ("run_key", "steps")} for p in planned]
    return [{**found.get(row["run_key"], missing | STATUS_NEW), **row} for row in named]


def _tally(rows: Rows) -> str:
    counts = Counter(row["state"] for row in rows)
    return f"{len(rows)} runs: " + ", ".join(f"{n} {state}" for state, n in counts.items())


def _confirm(question: str) -> None:
    """Ask where somebody types; elsewhere (cron, a pipe) what was called for is done."""
    if not sys.stdin.isatty():
        return
    with contextlib.ExitStack() as stack:
        terminal = sys.stderr
        if not terminal.isatty():
            terminal = stack.enter_context(open("/dev/tty", "w"))
        print(f"{question} [y/N]: ", end="", file=terminal, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was done", file=terminal)
            raise typer.Exit(1)


@contextlib.contextmanager
def _watching(sweep: Path, cluster: Path) -> Iterator[None]:
    """Says on Ctrl-C that only the watching ends."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["clue-scaling", "sync", str(sweep), "--cluster", str(cluster)])
        typer.echo(f"jobs go on; {again} --watch follows them", err=True)
        raise


def _print_status(shown: Rows, rows: Rows, clear: bool) -> None:
    if clear and sys.stdout.isatty():
        typer.echo("\x1b[2J\x1b[H", nl=False)
    print_table(shown, STATUS_SHOWN, drop=STATUS_DROPPED)
    spent = sum(row["gpu_hours"] or 0.0 for row in rows)
    typer.echo(f"{_tally(rows)}; {spent:.3g} GPU-hours")
    reasons = Counter(r["evidence"] for r in shown if r["state"] == "QUEUED" and r["evidence"])
    for reason, count in reasons.items():
        typer.echo(f"{count} in the queue: {reason}")
    for row in shown:
        for what in ("held", "stalled"):
            if row[what]:
                typer.echo(f"{row['run_key']} is {what}")
        if row["state"] in ("FAILED", "LOST") and row["evidence"]:
            typer.echo(f"{row['run_key']} {row['cause']}: {row['evidence']}")


def _print_budget(root: Path, identity: str, rows: Rows) -> None:
    from scaling.slurm.budget import read_budget

    if (budget := read_budget(root, identity)) is not None:
        spent = sum(row["gpu_hours"] or 0.0 for row in rows)
        typer.echo(f"budget: {budget:g} GPU-hours, {spent:.3g} spent")


def _tell_left(rows: Rows) -> None:
    """Say what a submission left alone."""
    left = Counter(
        row["state"]
        for row in rows
        if row["state"] in ("FAILED", "LOST", "CANCELLED") and row["cause"] != "damaged"
    )
    for state, count in left.items():
        typer.echo(f"{count} {state}: submit --retry-failed takes them up again", err=True)
    for row in rows:
        if row["cause"] == "damaged":
            typer.echo(f"{row['run_key']} is damaged: {row['evidence']}", err=True)


def _tell_held(rows: Rows) -> None:
    """Say why runs that could start do not: a full disk, a budget."""
    for why in sorted({row["waiting"] for row in rows if row["waiting"]}):
        typer.echo(f"waiting: {why}", err=True)


def _tell_stale(rows: Rows) -> bool:
    """Say why states are only the last known, where some are; whether nobody answered."""
    from scaling.slurm.state import PASSING

    stale = sorted({r["stale"] for r in rows if r["stale"]})
    for why in stale:
        typer.echo(f"last known states: {why}", err=True)
    return not set(stale) <= set(PASSING)


def _tell_changes(told: str = "") -> Callable[[Rows], None]:
    """Prints the tally of states whenever it is another than was told."""

    def tell(rows: Rows) -> None:
        nonlocal told
        if (now := _tally(rows)) != told:
            told = now
            typer.echo(now)

    return tell
