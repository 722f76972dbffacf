"""From the tasks that a sweep declares to the evaluations of its runs; imports no torch."""

from pathlib import Path

from scaling.config import Evaluation, TransferSettings
from scaling.data.corpus import Corpus, CorpusError, folders


def evaluations(root: Path, corpus: Corpus, settings: TransferSettings) -> list[Evaluation]:
    """The evaluations of a run that was trained on ``corpus``, in the order declared.

    Raises:
        CorpusError: there is no such task or corpus; the message names those there are.
    """
    found = []
    for declared in settings.tasks:
        name, _, task = declared.rpartition(":")
        of = _prepared(root, name) if name else corpus
        tasks = of.manifest["tasks"]
        if task not in tasks:
            valid = ", ".join(tasks) or "none"
            raise CorpusError(f"{of.path}: no task {task!r}; valid: {valid}")
        for head in settings.heads:
            found.append(
                Evaluation(
                    corpus_digest=str(of.card.digest),
                    task=task,
                    task_digest=tasks[task],
                    head=head,
                    history=settings.history,
                    folds=settings.folds,
                    seeds=settings.seeds,
                )
            )
    return found


def _prepared(root: Path, name: str) -> Corpus:
    """The one prepared corpus of this name, or ``<name>-<digest>``."""
    there = folders(root)
    found = [p for p in there if name in (p.name, p.name.rpartition("-")[0])]
    if len(found) != 1:
        names = ", ".join(p.name for p in found or there) or "none"
        what = "several corpora" if found else "no corpus"
        raise CorpusError(f"{root / 'corpora'}: {what} {name!r}; prepared: {names}")
    return Corpus.open(found[0])
