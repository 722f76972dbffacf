"""The application, the options that verbs share, and the runs of a sweep as verbs see them."""

import errno
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from scaling import ClueError, __version__

if TYPE_CHECKING:
    from scaling.config import CorpusCard
    from scaling.rundir import RunDir
    from scaling.sweeps import Grid, PlannedRun

PLAIN_FAULTS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR,
    errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT,
)  # fmt: skip
"""Errors of the operating system that need no traceback: a full disk, a missing permission, a file
where a folder should be."""


VERBS = (
    "prepare", "plan", "audit", "submit", "sync", "status", "cancel", "logs", "train", "embed",
    "transfer", "baselines", "collect", "fit", "rollout", "allocate", "figures", "next",
    "doctor", "corpus", "demo",
)  # fmt: skip
"""In the order of the work."""


PRIVATE = ("submit", "sync", "cancel", "train")
"""Verbs whose files nobody else may read or write: jobs run what lies there."""


class Verbs(TyperGroup):
    """Turns errors meant for people into one paragraph on stderr."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs, in the order of the work."""
        return sorted(
            super().list_commands(ctx), key=(*VERBS, "info", "compare", "verify", "floor").index
        )

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the arguments; exit status 130 after Ctrl-C, as everywhere."""
        try:
            return super().make_context(*args, **options)
        except KeyboardInterrupt:
            raise _interrupted() from None

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; exit status 2 after an error, 130 after Ctrl-C."""
        try:
            return super().invoke(ctx)
        except ClueError as e:
            typer.echo(f"error: {e}", err=True)
            raise typer.Exit(2) from None
        except OSError as e:
            if e.errno not in PLAIN_FAULTS:
                raise
            typer.echo(f"error: {e.filename or 'writing'}: {e.strerror}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise _interrupted() from None


def _interrupted() -> typer.Exit:
    typer.echo("interrupted", err=True)
    return typer.Exit(130)


app = typer.Typer(
    cls=Verbs,
    help="Scaling-law studies of CLUE, from behaviour logs to fitted figures.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Root = Annotated[
    Path, typer.Option("--root", envvar="CLUE_ROOT", file_okay=False, help="Root of all state.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SweepFile = Annotated[Path, typer.Argument(help="Sweep file (TOML).")]
Cluster = Annotated[Path, typer.Option("--cluster", help="Cluster profile (TOML).")]
Results = Annotated[
    Path, typer.Option("--results", file_okay=False, help="Folder of all result tables.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
WORK = Path("work")
RESULTS = Path("results")


def main() -> None:
    """Entry point of ``clue-scaling``."""
    app()


@app.callback(invoke_without_command=True)
def _begin(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"clue-scaling {__version__}")
        raise typer.Exit
    if context.invoked_subcommand in PRIVATE:
        os.umask(0o077)


def planned_runs(
    sweep: Path, root: Path, nominal: bool = False
) -> "tuple[Grid, CorpusCard, list[PlannedRun]]":
    """A sweep on the corpus that its file names.

    Raises:
        ConfigError, CorpusError: the sweep or its corpus cannot be used.
        SweepError: the corpus is nominal, and ``nominal`` does not allow it.
    """
    from scaling.sweeps import Grid, sweep_id

    grid = Grid.read(sweep)  # before the import below, which takes a second
    from scaling.data.prepare import read_card

    card = read_card(grid.corpus, root)
    runs = grid.runs(card)
    if not nominal:
        sweep_id(grid.name, runs)
    return grid, card, runs


def submitted_plan(sweep: Path, root: Path) -> "tuple[str, list[PlannedRun]]":
    """The runs of a sweep as they were last submitted, whatever has become of its corpus or file.

    Args:
        sweep: sweep file, or name of a sweep's folder.

    Returns:
        The folder's name, and the runs that have a folder.
    """
    from scaling.files import read_json
    from scaling.rundir import RunDir
    from scaling.sweeps import Grid, PlannedRun

    folders = [root / "sweeps" / sweep.name]
    if sweep.suffix == ".toml":
        folders = sorted(
            (root / "sweeps").glob(f"{Grid.read(sweep).name}-????????"),
            key=lambda folder: folder.stat().st_mtime,
        )
    plans = [folder / "plan.json" for folder in folders if (folder / "plan.json").exists()]
    if not plans:
        raise ClueError(f"{sweep}: nothing of it was submitted below {root.absolute()}")
    rows = {row["run_key"]: row for row in read_json(plans[-1])["runs"]}
    there = {key: RunDir(root, key) for key in rows if RunDir(root, key).path.exists()}
    runs = [PlannedRun(run.spec(), rows[key]) for key, run in there.items()]
    return plans[-1].parent.name, runs


def runs_of(sweep: Path, root: Path) -> "tuple[str, list[PlannedRun]]":
    """The name of a sweep's folder, and its runs; as last submitted, with a warning, where its file
    or corpus cannot be read: what runs can be looked at and ended all the same."""
    from scaling.sweeps import sweep_id

    try:
        grid, _, planned = planned_runs(sweep, root)
        return sweep_id(grid.name, planned), planned
    except ClueError as e:
        try:
            found = submitted_plan(sweep, root)
        except ClueError:
            raise e from None
        if sweep.suffix == ".toml":
            typer.echo(f"{e}\ntaking the runs as they were submitted: {found[0]}", err=True)
        return found


def other_versions(root: Path, identity: str, planned: "Sequence[PlannedRun]") -> list[str]:
    """Sentences on runs of other versions of a sweep that are not over."""
    from scaling.files import read_json
    from scaling.rundir import RunDir

    keys = {p.row["run_key"] for p in planned}
    said = []
    for folder in sorted((root / "sweeps").glob(f"{identity[:-9]}-????????")):
        if folder.name == identity or not (folder / "plan.json").exists():
            continue
        rows = read_json(folder / "plan.json")["runs"]
        others = [RunDir(root, row["run_key"]) for row in rows if row["run_key"] not in keys]
        count = sum(
            bool(run.attempt_numbers()) and not (run.path / "result.json").exists()
            for run in others
        )
        if count:
            said.append(
                f"{count} runs of another version of this sweep, {folder.name}, were submitted and "
                f"are not done; see clue-scaling status {folder.name}"
            )
    return said


def known_runs(planned: "Sequence[PlannedRun]", root: Path) -> "list[RunDir]":
    """Folders of the planned runs that have one: of this sweep or of another."""
    from scaling.rundir import RunDir

    runs = [RunDir(root, p.config.run_key) for p in planned if p.config]
    return [run for run in runs if (run.path / "spec.json").exists()]


def submitted_runs(
    planned: "Sequence[PlannedRun]", root: Path, sweep: Path, identity: str
) -> "list[RunDir]":
    """The planned runs that somebody submitted: with a job, or waiting in a submitted sweep.

    Args:
        identity: name of the sweep's folder (``sweep_id``).

    Raises:
        ClueError: there is none; runs that were only trained by hand are none.
    """
    runs = known_runs(planned, root)
    if not (root / "sweeps" / identity / "plan.json").exists():
        runs = [run for run in runs if any(run.path.glob("attempts/*/intent.json"))]
    if not runs:
        raise ClueError(
            f"{sweep}: none of its {len(planned)} runs was submitted below {root.absolute()}; run: "
            + shlex.join(["clue-scaling", "submit", str(sweep), "--cluster", "CLUSTER.toml"])
            + f" --root {shlex.quote(str(root))}"
        )
    return runs
