"""The verb that writes features of whole corpora, here or as a job array."""

import os
import secrets
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaling import ClueError
from scaling.cli.app import WORK, Json, Root, app
from scaling.cli.runs import RunKey
from scaling.cli.terminal import print_json, progress

if TYPE_CHECKING:
    from scaling.data.corpus import Corpus
    from scaling.rundir import RunDir
    from scaling.transfer.embed import Embedding


class What(StrEnum):
    """Whose features."""

    users = "users"
    items = "items"
    both = "both"


class Dtype(StrEnum):
    """Of the numbers."""

    float16 = "float16"
    float32 = "float32"


class Format(StrEnum):
    """Of the files."""

    npy = "npy"
    parquet = "parquet"


@app.command()
def embed(
    run: RunKey,
    out: Annotated[Path, typer.Option(help="Folder that the features are written to.")],
    root: Root = WORK,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Name, digest, folder or file of a prepared corpus; default: the run's own."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Users of this task, as they were before its targets; default: all."),
    ] = None,
    what: Annotated[What, typer.Option(help="Whose features.")] = What.users,
    services: Annotated[
        str, typer.Option(help="concat: all services side by side; or the name of one.")
    ] = "concat",
    dtype: Annotated[Dtype, typer.Option(help="Of the numbers.")] = Dtype.float16,
    file_format: Annotated[Format, typer.Option("--format", help="Of the files.")] = Format.npy,
    shard_users: Annotated[
        int | None, typer.Option(min=1, help="Users of a file; default: 256 MiB of them.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Exported step of the run; default: the last.")
    ] = None,
    items_per_user: Annotated[
        int | None,
        typer.Option(min=1, help="Most recent items per service; default: as in pretraining."),
    ] = None,
    unknown_service: Annotated[
        str | None,
        typer.Option(
            help="Service of the run's whose token services get that it was not trained on; "
            "default: its first."
        ),
    ] = None,
    reduce: Annotated[
        Path | None, typer.Option(help="Folder of a reduction (--fit-reduction) to apply.")
    ] = None,
    fit_reduction: Annotated[
        int | None,
        typer.Option(min=1, help="Learn a reduction to so many dimensions; --out is its folder."),
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="i/n: part i, from 0, of n processes that share the work.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read what is there and compute nothing.")
    ] = False,
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster profile (TOML): submit it as a job array.")
    ] = None,
    array: Annotated[
        int | None, typer.Option(min=1, help="Elements of the array; default: max_parallel.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and print the job script.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write features of whole corpora from a run's encoder.

    Of users, items, or both.

    Interrupted, call it again: finished files stay. RANK and WORLD_SIZE, or srun, share the work
    among processes. Exit status 1 of --check says that files are missing or damaged.

    \b
    Example:
        clue-scaling embed <RUN> --out features
        clue-scaling embed <RUN> --out features --cluster slurm/mine.toml --array 64 --dry-run
        clue-scaling embed <RUN> --fit-reduction 300 --out reduction
    """
    from scaling.cli.corpora import corpora_of
    from scaling.data.corpus import Corpus
    from scaling.rundir import RunDir

    chosen = RunDir.find(root, run)
    if corpus is None:
        prepared = Corpus.find(root, chosen.spec().data.corpus_digest)
    else:
        paths = corpora_of(root, corpus)
        if len(paths) > 1:
            raise ClueError(f"--corpus {corpus}: {', '.join(p.name for p in paths)}; give one")
        prepared = Corpus.open(paths[0])
    if array is not None and cluster is None:
        raise ClueError("--array needs --cluster, which says where")
    if fit_reduction is not None:
        if task or reduce or cluster or shards or check or services != "concat":
            raise ClueError("--fit-reduction goes with --out, --corpus and --step alone")
        _fit(chosen, prepared, out, fit_reduction, step, as_json)
        return

    from scaling.transfer.embed import Embedding, Wanted
    from scaling.transfer.reduce import Reduction
    from scaling.transfer.shards import share_of

    wanted = Wanted(
        what=what.value,
        task=task,
        services=None if services == "concat" else (services,),
        items_per_user=items_per_user,
        dtype=dtype.value,
        format=file_format.value,
        shard_users=shard_users,
        unknown=unknown_service,
        reduction=None if reduce is None else Reduction.read(reduce),
    )
    embedding = Embedding(chosen, prepared, out, wanted, step)
    parts = embedding.shards.parts
    if check:
        with progress("check") as update:
            faults = embedding.shards.faults(update)
        for fault in faults:
            typer.echo(fault, err=True)
        if faults:
            raise typer.Exit(1)
        typer.echo(f"{out}: {len(parts)} files, whole")
        return
    for kind in ("users", "items"):
        if (table := embedding.shards.header[kind]) is not None:
            size = table["rows"] * table["dims"] * (2 if dtype is Dtype.float16 else 4)
            typer.echo(
                f"{table['rows']:,} {kind} x {table['dims']:,} {dtype.value}: "
                f"{size / 1e9:,.4g} GB, "
                f"{min(table['rows'], table['shard_rows']):,} {kind} a file",
                err=True,
            )
    if cluster is not None:
        words = _words(embedding, prepared, what, services, reduce)
        _submit(embedding, words, cluster, array, dry_run)
        return
    index, count = share_of(os.environ, shards)
    if not dry_run:
        embedding.shards.begin()
    mine = parts[index::count]
    with progress("verify") as update:
        todo = embedding.shards.missing(mine, update)
    plan = f"part {index} of {count}: {len(todo):,} of {len(mine):,} files to write"
    for kind in ("users", "items"):
        if of_kind := [p for p in todo if p.kind == kind and p.features]:
            rate, measured = embedding.pace(of_kind)
            rows = sum(p.size for p in of_kind)
            plan += f"; {rows:,} {kind} at {rate:,.4g}/s, as measured on {measured:,}: "
            plan += f"{rows / rate / 3600:,.2g} h"
    typer.echo(plan, err=True)
    if dry_run:
        return
    begun = time.monotonic()
    with progress("embed") as update:
        embedding.write(todo, update)
    complete = embedding.shards.complete()
    if as_json:
        print_json(
            {
                "path": str(out),
                "complete": complete,
                "files": len(parts),
                "files_written": len(todo),
                "rows_written": sum(p.size for p in todo if p.features),
                "seconds": time.monotonic() - begun,
            }
        )
        return
    rest = "whole" if complete else "the others are not there yet"
    typer.echo(f"{out}: {len(todo):,} of {len(parts):,} files written; {rest}")


def _words(
    embedding: "Embedding", prepared: "Corpus", what: What, services: str, reduce: Path | None
) -> list[str]:
    """The command that an element of an array runs, with nothing left to defaults."""
    wanted = embedding.wanted
    options = {
        "out": embedding.shards.folder.absolute(),
        "root": embedding.run.root.absolute(),
        "corpus": prepared.path.absolute(),
        "task": wanted.task,
        "what": what.value,
        "services": services,
        "dtype": wanted.dtype,
        "format": wanted.format,
        "shard-users": wanted.shard_users,
        "step": embedding.step,
        "items-per-user": wanted.items_per_user,
        "unknown-service": wanted.unknown,
        "reduce": None if reduce is None else reduce.absolute(),
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["embed", embedding.run.run_key, *given]


def _submit(
    embedding: "Embedding", words: list[str], cluster: Path, array: int | None, dry_run: bool
) -> None:
    from scaling.slurm.array import CommandArray
    from scaling.slurm.code import archive, digest_of_package
    from scaling.slurm.profile import ClusterProfile, safe_root

    profile, shards = ClusterProfile.read(cluster), embedding.shards
    made = CommandArray(
        name=f"embed-{secrets.token_hex(4)}",
        words=words,
        size=min(array or profile.max_parallel, len(shards.parts)),
        folder=shards.folder.absolute() / "array",
        root=safe_root(embedding.run.root),
        code=digest_of_package(),
        profile=profile,
    )
    if dry_run:
        typer.echo(made.script())
        return
    archive(made.root)
    shards.begin()
    typer.echo(f"job {made.submit()}: an array of {made.size}; its output is in {made.folder}")


def _fit(
    run: "RunDir", prepared: "Corpus", out: Path, dim: int, step: int | None, as_json: bool
) -> None:
    from scaling.transfer.reduce import learn

    with progress("reduction") as update:
        record = learn(run, prepared, dim, out, step=step, progress=update)
    if as_json:
        print_json(record)
        return
    kept = ", ".join(f"{s} {share:.3f}" for s, share in record["kept_variance"].items())
    loss = ""
    if record["loss"] is not None:
        loss = (
            f"; loss of validation users {record['loss']:.4f}, of principal components "
            f"{record['loss_pca']:.4f}"
        )
    typer.echo(f"{out}: {record['dims']} dimensions ({record['method']}){loss}; variance {kept}")
