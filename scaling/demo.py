"""The whole way of the data on this machine, from nothing to fitted figures.

Every stage is one call of the function that the verb of its name calls. What is there already is
not made again: a corpus has a digest, a run a key, an evaluation the checkpoint it was made from.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from scaling import ClueError
from scaling.collect import collect
from scaling.config import Evaluation
from scaling.data.corpus import Corpus
from scaling.data.prepare import prepare
from scaling.files import read_json, sha256, write_json
from scaling.results import SCHEMAS, Tables, load
from scaling.rundir import RunDir
from scaling.slurm.profile import ClusterProfile
from scaling.slurm.sync import submit, sync
from scaling.sweeps import Grid, PlannedRun, write_sweep
from scaling.transfer.declared import declared

SWEEP = Path("sweeps/demo.toml")
PROFILE = Path("slurm/local.toml")
STAMP_VERSION = 1

Show = Callable[[int, int, str], None]
"""Told by a stage of what is done, of how much, and a word about it."""


class DemoError(ClueError):
    """The demo cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Summary:
    """What came out."""

    tables: Tables
    fits: Mapping[str, Any]
    """Content of ``fits.json``."""
    figures: tuple[Path, ...]
    trained: int
    """Runs that this call trained; the others were over before."""


def run(
    root: Path,
    *,
    sweep: Path = SWEEP,
    profile: Path = PROFILE,
    console: Console | None = None,
) -> Summary:
    """Prepare, plan, train, evaluate, collect, fit and draw one sweep on this machine.

    Args:
        root: root folder of all state. Tables, fits and figures go to ``<root>/results/<sweep>``,
            so that trying the demo changes nothing that is committed.
        sweep: sweep file; its corpus file is prepared first.
        profile: cluster profile with the local executor.

    Raises:
        DemoError: it is not called from a clone of the repository, or a run failed.
        ClueError: as the functions of the stages.
    """
    console = console or Console()
    for path in (sweep, profile):
        if not path.is_file():
            raise DemoError(f"{path}: no such file; run the demo from the root of a clone")
    grid = Grid.read(sweep)
    with _stage(console, "logs, corpus") as show:
        folder = prepare(grid.corpus, root, progress=show)
    corpus = Corpus.open(folder)
    planned = grid.runs(corpus.card)
    out = root / "results" / grid.name
    cluster = ClusterProfile.read(profile)
    wanted = declared(root, grid, corpus.card)
    trained = _train(console, root, grid, corpus, planned, cluster, wanted)
    _baselines(console, root, corpus, wanted)
    with _stage(console, "collect") as show:
        collect(root, [p.row for p in planned], grid.name, out)
        tables = load(out)
        show(len(tables.runs), len(tables.runs), "runs")
    fits, figures = _analyse(console, root, tables, out)
    summary = Summary(tables, fits, figures, trained)
    _print(console, summary)
    return summary


def _train(
    console: Console,
    root: Path,
    grid: Grid,
    corpus: Corpus,
    planned: Sequence[PlannedRun],
    profile: ClusterProfile,
    wanted: Sequence[Evaluation],
) -> int:
    """Train and evaluate all runs through the local executor; returns how many were not there."""
    identity = write_sweep(root, grid, corpus.card, planned).name
    runs = [RunDir.create(root, p.config, corpus.card.name) for p in planned if p.config]
    for one in runs:
        one.want(wanted)
    missing = sum(r.result() is None for r in runs)
    with _stage(console, "train") as show:

        def report(rows: list[dict[str, Any]]) -> None:
            steps = sum(r["steps"] if r["over"] else r["step"] for r in rows)
            over = sum(r["over"] for r in rows)
            show(steps, sum(r["steps"] for r in rows), f"steps, {over} of {len(rows)} runs")

        report(submit(root, runs, profile, sweep=identity, retry_failed=True, new_code=True))
        rows = sync(root, runs, profile, sweep=identity, watch=True, report=report)
    failed = [r for r in rows if r["state"] not in ("DONE", "DIVERGED")]
    if failed:
        key, why = failed[0]["run_key"], failed[0]["evidence"] or failed[0]["cause"]
        raise DemoError(
            f"{len(failed)} of {len(rows)} runs failed, {key} for one: {why}\n"
            f"its output: clue-scaling logs {key} --root {root}"
        )
    return missing


def _baselines(console: Console, root: Path, corpus: Corpus, wanted: Sequence[Evaluation]) -> None:
    """Evaluate popularity on the tasks that the sweep declares."""
    from scaling.transfer.baselines.evaluate import evaluate_baselines

    tasks = {e.task: e for e in wanted if e.corpus_digest == corpus.card.digest}
    with _stage(console, "baselines") as show:
        for done, (task, e) in enumerate(tasks.items()):
            evaluate_baselines(root, corpus, task, ["popularity"], folds=e.folds, seeds=e.seeds)
            show(done + 1, len(tasks), "tasks")


def _analyse(
    console: Console, root: Path, tables: Tables, out: Path
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Fit and draw, unless the very files that the last demo left were made from these tables."""
    from scaling.analysis.studies.draw import draw
    from scaling.analysis.studies.report import study, write_study

    stamp = root / "demo.json"
    sources = _digests(out / f"{name}.parquet" for name in SCHEMAS)
    kept = read_json(stamp) if stamp.exists() else {}
    if kept.get("tables") == sources and _digests(map(Path, kept["made"])) == kept["made"]:
        return read_json(out / "fits.json"), tuple(
            Path(p) for p in kept["made"] if Path(p).suffix in (".png", ".svg")
        )
    with _stage(console, "fit") as show:
        fits = study(tables, progress=show)
        path = write_study(fits, out)
    with _stage(console, "draw") as show:
        figures = sorted(draw(tables, fits, out / "figures"))
        show(len(figures), len(figures), "files")
    write_json(
        stamp,
        {
            "schema_version": STAMP_VERSION,
            "tables": sources,
            "made": _digests([path, *figures]),
        },
    )
    return fits, tuple(figures)


def _print(console: Console, summary: Summary) -> None:
    """One table of what came out, and where the figures are."""
    table = Table(box=box.SIMPLE, show_header=False)
    for name, text in _findings(summary):
        table.add_row(name, Text(text))
    console.print(table)
    for path in summary.figures:
        console.print(str(path), soft_wrap=True, highlight=False)


def _findings(summary: Summary) -> Iterator[tuple[str, str]]:
    runs, fits = summary.tables.runs, summary.fits
    done = int((runs["state"] == "DONE").sum())
    yield "runs", f"{done} of {len(runs)} done, {summary.trained} of them now"
    yield (
        "loss",
        f"{runs['loss'].max():.3f} to {runs['loss'].min():.3f} nats on {runs['pool_size'].max()} "
        f"unseen users (chance {runs['chance'].max():.3f})",
    )
    yield (
        "PF-days",
        f"{runs['pf_days'].sum():.3g} by the paper's formula, "
        f"{runs['pf_days_exact'].sum():.3g} counted",
    )
    headline = fits["compute"]["headline"]
    if headline["fit"] is None:
        yield "PF-day exponent", "not fitted"
    else:
        interval = (headline["fit"]["ci95"] or {}).get("exponent")
        yield "PF-day exponent", _interval(headline["fit"]["params"]["exponent"], interval)
    claims = {claim["name"]: claim for claim in fits["claims"]["claims"]}
    for reason in claims["compute_exponent"]["against"]:
        yield "  no conclusion", re.split(r" \[|, ", reason)[0]  # what is against it, in short
    for claim in claims.values():
        if claim["holds"]:
            yield "survives", claim["statement"]
    yield from _joint(fits["joint"])
    table = summary.tables.transfer.query("segment == 'all'").set_index(["task", "system"])
    for task, found in fits["transfer"].items():
        if found["failed"]:
            yield f"transfer to {task}", "runs were evaluated differently"
            continue
        encoder = table["hr_10"].loc[[(task, found["system"])]]
        popularity = table["hr_10"].loc[[(task, "popularity")]]
        yield (
            f"transfer to {task}",
            f"HR@10 {encoder.min():.3f} to {encoder.max():.3f}, popularity {popularity.max():.3f}",
        )
        if found["spearman"] is not None:
            yield "  losses", f"rank correlation with pretraining {found['spearman']:.2f}"


def _joint(laws: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The joint law's exponents, with the floor only where the data tell that there is one."""
    fit = laws["with_floor"]["fit"]
    if fit and fit["floor_identified"]:
        yield "joint law", f"with floor, {fit['params']['irreducible']:.2f} nats"
    elif fit := laws["without_floor"]["fit"]:
        yield "joint law", "without floor (none is identified)"
    else:
        yield "joint law", "not fitted"
        return
    for verdict in fit["identified"].values():
        ends = verdict["lower"], verdict["upper"]
        if verdict["identified"]:
            text = _interval(verdict["exponent"], ends)
        elif None in ends:
            text = "not identified (no interval)"
        else:
            text = f"not identified (interval {ends[0]:.2f} to {ends[1]:.2f})"
        yield f"  {verdict['factor']}", text


def _interval(value: float, ends: Sequence[float] | None) -> str:
    if ends is None:
        return f"{value:.4f} (no interval)"
    return f"{value:.4f} (95 % interval {ends[0]:.4f} to {ends[1]:.4f})"


def _digests(paths: Iterator[Path] | Sequence[Path]) -> dict[str, str | None]:
    return {str(p): sha256(p) if p.is_file() else None for p in paths}


@contextmanager
def _stage(console: Console, name: str) -> Iterator[Show]:
    """A progress bar that stays when its stage is over."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None, note="")

        def show(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield show
        known = bar.tasks[task].total
        if known is None:
            bar.update(task, completed=1, total=1, note="there already")
        else:
            bar.update(task, completed=known)
