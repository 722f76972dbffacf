"""Verbs on corpora."""

import json
from pathlib import Path
from typing import Annotated

import typer

from scaling import ClueError
from scaling.cli.app import WORK, Json, Root, Verbs, app
from scaling.cli.terminal import cell, print_json, progress

CorpusFile = Annotated[Path, typer.Argument(help="Corpus file (TOML).")]
CorpusName = Annotated[str, typer.Argument(help="Name of a prepared corpus, or its digest.")]

corpus_app = typer.Typer(
    cls=Verbs, help="Look into prepared corpora.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(corpus_app, name="corpus")


@app.command()
def prepare(corpus_file: CorpusFile, root: Root = WORK) -> None:
    """Make a corpus from behaviour logs.

    Again with nothing changed it is a quick no-op. Prints the folder of the corpus.

    \b
    Example:
        clue-scaling prepare sweeps/corpora/demo.toml
    """
    from scaling.data.prepare import prepare as publish

    with progress("prepare") as update:
        path = publish(
            corpus_file, root, progress=lambda stage, done, total: update(done, total, stage)
        )
    typer.echo(path)


@corpus_app.command()
def info(name: CorpusName, root: Root = WORK, as_json: Json = False) -> None:
    """Say what a prepared corpus holds.

    \b
    Example:
        clue-scaling corpus info demo
    """
    from scaling.data.corpus import Corpus

    found = [Corpus.open(path).info() for path in _corpora(root, name)]
    if as_json:
        print_json(found)
        return
    for corpus in found:
        for key, value in corpus.items():
            shown = json.dumps(value) if isinstance(value, dict | list) else cell(value)
            typer.echo(f"{key:<22}{shown}")


@corpus_app.command()
def verify(name: CorpusName, root: Root = WORK) -> None:
    """Read a corpus through and check every digest.

    \b
    Example:
        clue-scaling corpus verify demo
    """
    from scaling.data.corpus import Corpus

    for path in _corpora(root, name):
        Corpus.open(path).verify()
        typer.echo(f"{path}: whole")


@corpus_app.command()
def floor(
    corpus_file: CorpusFile,
    items_per_user: Annotated[int, typer.Option(min=1, help="Cap on a user's items, per service.")],
    pool_size: Annotated[
        int | None, typer.Option(min=2, help="Users of the pool; default: the corpus file's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how low the pool loss of any encoder can be, for a synthetic corpus.

    \b
    Example:
        clue-scaling corpus floor sweeps/corpora/demo.toml --items-per-user 8 --pool-size 512
    """
    from dataclasses import asdict

    from scaling.data.recipe import read_corpus_file
    from scaling.data.sources.synthetic import Config, pool_floor

    corpus = read_corpus_file(corpus_file)
    if not isinstance(corpus.source, Config):
        kind = corpus.source.kind if corpus.source else "none"
        raise ClueError(
            f"{corpus_file}: source.kind = {kind!r}; the floor is known for 'synthetic' only"
        )
    size = pool_size or corpus.users.pool
    found = pool_floor(corpus.source, items_per_user=items_per_user, pool_size=size)
    if as_json:
        asked = {"corpus": corpus.name, "items_per_user": items_per_user, "pool_size": size}
        print_json(asked | asdict(found))
        return
    typer.echo(
        f"{found.loss:.4f} nats, standard error {found.standard_error:.4f} "
        f"(mean of {found.n_pools} pools of {size} users, {items_per_user} items a service)"
    )


def _corpora(root: Path, name: str) -> list[Path]:
    """Folders of the prepared corpora with this name or digest."""
    from scaling.data.corpus import CorpusError, folders

    there = folders(root)
    if found := [p for p in there if name in (p.name, *p.name.rsplit("-", 1))]:
        return found
    names = ", ".join(p.name for p in there) or "none"
    raise CorpusError(f"{root / 'corpora'}: no corpus {name!r}; prepared: {names}")
