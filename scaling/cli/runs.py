"""Verbs on runs: what a job does, here and now."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling import ClueError
from scaling.cli.app import WORK, Json, Root, app, known_runs, planned_runs
from scaling.cli.terminal import (
    TRANSFER_COLUMNS,
    print_json,
    print_table,
    progress,
    with_intervals,
)

RunKey = Annotated[str, typer.Argument(help="Run key, or its first letters.")]


@app.command()
def logs(
    run: RunKey,
    root: Root = WORK,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt; default: the newest.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Rank.")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="Last lines of each file.")] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what it prints, until it ends.")
    ] = False,
) -> None:
    """Print what a run's job printed.

    \b
    Example:
        clue-scaling logs <RUN> --lines 20
    """
    from scaling.rundir import RunDir
    from scaling.slurm.logs import follow as lines_of
    from scaling.slurm.logs import log_files, tail

    chosen = RunDir.find(root, run)
    if follow:
        from scaling.slurm.status import status

        def over() -> bool:
            return bool(status([chosen])[0]["over"])

        for line in lines_of(chosen, over, attempt=attempt, rank=rank):
            typer.echo(line)
        return
    for path in log_files(chosen, attempt=attempt, rank=rank):
        typer.echo(f"==> {path} <==")
        typer.echo(tail(path, lines))


@app.command()
def train(
    run: RunKey,
    root: Root = WORK,
    sweep: Annotated[
        Path | None, typer.Option(help="Sweep that holds the run, if it was never submitted.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Profile whose [train] settings hold.")
    ] = None,
) -> None:
    """Train one run here and now, from its newest checkpoint.

    One process is one rank; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT join several.
    Ctrl-C commits a checkpoint first.

    \b
    Example:
        clue-scaling train <RUN> --sweep sweeps/demo.toml
    """
    from scaling.config import TrainSettings
    from scaling.data.corpus import Corpus
    from scaling.rundir import RunDir, one_key
    from scaling.slurm.profile import ClusterProfile
    from scaling.train.loop import train as fit_encoder

    settings = ClusterProfile.read(cluster).train if cluster else TrainSettings()
    if sweep is not None:
        _, card, planned = planned_runs(sweep, root)
        configs = {p.config.run_key: p.config for p in planned if p.config}
        chosen = RunDir.create(root, configs[one_key(configs, run, str(sweep))], card.name)
    else:
        chosen = RunDir.find(root, run)
    corpus = Corpus.find(root, chosen.spec().data.corpus_digest)
    with progress(f"train {chosen.run_key}") as update, _stop_on_signal() as stop:
        result = fit_encoder(chosen, corpus, settings, progress=update, should_stop=stop)
    if result is None:
        typer.echo(f"{chosen.run_key}: stopped after a checkpoint; train again to go on", err=True)
        raise typer.Exit(130)
    shown = ("status", "step", "loss", "loss_refit", "chance", "accuracy", "pf_days", "seconds")
    print_table([{"run_key": chosen.run_key, **result}], ["run_key", *shown])


@app.command()
def transfer(
    run: Annotated[str, typer.Argument(help="Run key, its first letters, or a sweep file.")],
    root: Root = WORK,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task, or CORPUS:TASK of another corpus; default: the sweep's, or all "
            "that have this history."
        ),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="Head: u-mlp, u-mlp-64, linear, hybrid; default: u-mlp."),
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds of the users: 2, 5 or 10.")] = 5,
    seeds: Annotated[int, typer.Option(help="Seeds of the heads.")] = 1,
    history: Annotated[str, typer.Option(help="target: the task's own log; or all.")] = "target",
    feature_dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Reduce a user's features of a service to so many dimensions, by a layer learnt "
            "of the frozen encoder; default: as they are.",
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Exported step; default: the run's last one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's frozen encoder on downstream tasks.

    Of a sweep file, all runs that are done, on the tasks of its [transfer] table if it has one.
    What is recorded is not computed again.

    \b
    Example:
        clue-scaling transfer sweeps/demo.toml
        clue-scaling transfer <RUN> --task food --head linear --head u-mlp
    """
    from scaling.config import TransferSettings
    from scaling.data.corpus import Corpus
    from scaling.rundir import RunDir
    from scaling.transfer.declared import evaluations, fit_tasks
    from scaling.transfer.evaluate import evaluate

    settings = None
    if run.endswith(".toml"):
        grid, _, planned = planned_runs(Path(run), root)
        known = [(r, r.result()) for r in known_runs(planned, root)]
        chosen = [r for r, result in known if result and result["status"] == "done"]
        if not chosen:
            raise ClueError(f"{run}: none of its {len(planned)} runs is done yet")
        settings = grid.transfer
    else:
        chosen = [RunDir.find(root, run)]
    corpus = Corpus.find(root, chosen[0].spec().data.corpus_digest)  # a sweep has one
    if settings is None or task or head:
        settings = TransferSettings.parse(
            {
                "tasks": task or fit_tasks(corpus, history),
                "heads": head or ["u-mlp"],
                **{"folds": folds, "seeds": seeds, "history": history},
                "feature_dim": feature_dim,
            },
            "transfer",
        )
    elif feature_dim is not None:
        settings = settings.model_copy(update={"feature_dim": feature_dim})
    wanted = evaluations(root, corpus, settings)
    rows: list[dict[str, Any]] = []
    with progress("transfer") as update:
        for i, one in enumerate(chosen):

            def tell(share: float, what: str, i: int = i, key: str = one.run_key) -> None:
                update(round(100 * (i + share)), 100 * len(chosen), f"{key} {what}")

            rows += evaluate(one, corpus, wanted, step=step, progress=tell)
    if as_json:
        print_json(rows)
        return
    print_table(with_intervals(rows), ["run_key", *TRANSFER_COLUMNS])


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def note(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[number])

    before = {int(n): signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
