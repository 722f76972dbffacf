"""From the tasks that a sweep declares to the evaluations of its runs; imports no torch."""

from pathlib import Path

from scaling.config import CorpusCard, Evaluation, TransferSettings
from scaling.data.corpus import Corpus, CorpusError, named
from scaling.data.tasks import Task
from scaling.sweeps import Grid
from scaling.transfer.problem import TransferError


def evaluations(root: Path, corpus: Corpus, settings: TransferSettings) -> list[Evaluation]:
    """The evaluations of a run that was trained on ``corpus``, in the order declared.

    Raises:
        CorpusError: there is no such task or corpus; the message names those there are.
        TransferError: a task cannot be evaluated so.
    """
    found = []
    for one in settings.tasks:
        name, _, task = one.rpartition(":")
        of = _prepared(root, name) if name else corpus
        foreign = of.card.digest != corpus.card.digest
        if why := unfit_for(of, Task.open(of, task), settings.history, foreign):
            raise TransferError(f"task {task!r}: {why}")
        for head in settings.heads:
            found.append(
                Evaluation(
                    corpus_digest=str(of.card.digest),
                    task=task,
                    task_digest=of.manifest["tasks"][task],
                    head=head,
                    history=settings.history,
                    folds=settings.folds,
                    seeds=settings.seeds,
                    feature_dim=settings.feature_dim,
                )
            )
    return found


def declared(root: Path, grid: Grid, card: CorpusCard) -> list[Evaluation]:
    """The evaluations that a sweep on a prepared corpus declares of each of its runs.

    Raises:
        CorpusError, TransferError: as ``evaluations``.
    """
    if grid.transfer is None or card.digest is None:
        return []
    return evaluations(root, Corpus.find(root, card.digest), grid.transfer)


def fit_tasks(corpus: Corpus, history: str) -> list[str]:
    """Tasks of a corpus that its own encoders can be evaluated on with that history, sorted.

    Raises:
        TransferError: there are none; the message says why of each.
    """
    tasks = [Task.open(corpus, name) for name in sorted(corpus.manifest["tasks"])]
    unfit = {t.name: why for t in tasks if (why := unfit_for(corpus, t, history, foreign=False))}
    if len(unfit) == len(tasks):
        reasons = "\n".join(f"task {name!r}: {why}" for name, why in unfit.items())
        raise TransferError(reasons or f"{corpus.path}: it has no tasks")
    return [t.name for t in tasks if t.name not in unfit]


def unfit_for(corpus: Corpus, task: Task, history: str, foreign: bool) -> str | None:
    """Why an encoder is not evaluated on a task with these histories, if so.

    Args:
        foreign: the encoder was trained on another corpus.
    """
    if task.foreign and not foreign:
        return (
            "it is for encoders of other corpora (encoders = 'foreign'): this one's pretraining "
            "may have its targets"
        )
    if task.form == "first" and history == "target":
        return (
            f"before a first log of {task.service!r} (form = 'first') there is no history of it; "
            "valid: all"
        )
    others = sorted(set(corpus.card.services) - {task.service})
    if history == "all" and task.cut == "order" and others:
        return (
            f"history = 'all' would need to know which logs of {', '.join(others)} came before the "
            "targets, but the task is cut by stored order (cut = 'order'), which says so within "
            f"{task.service!r} alone; valid: target"
        )
    if history == "all" and others and task.services == (task.service,):
        return f"it stores histories of {task.service!r} alone (history = 'service'); valid: target"
    return None


def _prepared(root: Path, name: str) -> Corpus:
    """The one prepared corpus of this name."""
    first, *others = named(root, name)
    if others:
        names = ", ".join(p.name for p in (first, *others))
        raise CorpusError(f"{root / 'corpora'}: several corpora {name!r}; prepared: {names}")
    return Corpus.open(first)
