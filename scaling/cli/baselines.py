"""The verb on systems without an encoder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from scaling.cli.app import WORK, Json, Root, app
from scaling.cli.terminal import (
    TRANSFER_COLUMNS,
    print_json,
    print_table,
    progress,
    with_intervals,
)


@app.command()
def baselines(
    corpus_file: Annotated[
        Path, typer.Argument(help="Corpus file (TOML) of a prepared corpus.", metavar="CORPUS")
    ],
    root: Root = WORK,
    task: Annotated[list[str] | None, typer.Option(help="Task; default: all.")] = None,
    system: Annotated[
        list[str] | None, typer.Option(help="System; default: all that the task can have.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds of the users: 2, 5 or 10.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of what is trained.")] = 1,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a sentence-transformers model: item texts by it, not by TF-IDF, for "
            "the systems that use vectors of texts.",
            metavar="WEIGHTS",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate what an encoder is compared with, on tasks.

    Popularity, texts, co-occurrence, LightGCN, BST and DeepFM, on the same users, targets and
    negatives. What is recorded is not computed again; collect puts it beside the runs of a sweep.

    \b
    Example:
        clue-scaling baselines sweeps/corpora/demo.toml --task coupons --system popularity
    """
    from scaling.data.corpus import Corpus
    from scaling.data.prepare import read_card
    from scaling.transfer.baselines.evaluate import evaluate_baselines

    corpus = Corpus.find(root, str(read_card(corpus_file, root).digest))
    chosen = task or sorted(corpus.manifest["tasks"])
    rows: list[dict[str, Any]] = []
    with progress("baselines") as update:
        for i, one in enumerate(chosen):

            def tell(share: float, what: str, i: int = i) -> None:
                update(round(100 * (i + share)), 100 * len(chosen), what)

            rows += evaluate_baselines(
                root, corpus, one, system or None, folds=folds, seeds=seeds, weights=texts,
                progress=tell,
            )  # fmt: skip
    if as_json:
        print_json(rows)
        return
    print_table(with_intervals(rows), TRANSFER_COLUMNS)
