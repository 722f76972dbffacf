"""Downstream evaluation of a run's frozen encoder, with popularity beside it.

The users of a task fall into ten groups by the hash of their id. Of F folds, fold r tests on groups
10r/F ..., takes the next group for early stopping and trains on the rest: with five folds the
paper's style of split 70/10/20, every user tested once, and no user in two parts of a fold. What is
learnt or counted in a fold sees no test user (docs/decisions/0006-transfer-protocol.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scaling.data.batches import latest
from scaling.data.corpus import Corpus
from scaling.data.tasks import GROUPS, Task
from scaling.files import read_json, write_json
from scaling.rundir import RunDir
from scaling.train.export import load_encoder
from scaling.transfer.baselines.popularity import count_items
from scaling.transfer.features import TransferError, item_features, user_features
from scaling.transfer.heads import Examples, HeadSettings, fit, pair_loss, softmax_loss
from scaling.transfer.metrics import lint_metrics, rank, summarise

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Row = dict[str, Any]
Progress = Callable[[int, int], None]

SCHEMA_VERSION = 1
HISTORIES = ("target", "all")
FOLDS = (2, 5, 10)
"""Numbers of folds whose test groups are whole and leave groups to train on."""
HEAD = HeadSettings()
"""The head is the same for every encoder; it is never tuned per run."""


@dataclass(frozen=True)
class Problem:
    """A task as arrays: what the systems of one table learn from and are tested on.

    Items are rows of ``items``, the catalogue of the task's service.
    """

    items: Floats
    """Features of the catalogue. [items, d]"""
    examples: Examples
    """Features of all users, their targets and stored negatives."""
    group: NDArray[np.uint8]
    """Group 0..9 of each user. [users]"""
    history: tuple[Ints, Ints]
    """Offsets and items of the users' logs of the service, before their targets."""
    pretraining: Ints | None
    """Pretraining users' logs of the service, one after another; None if pretraining lacks it."""


@dataclass(frozen=True)
class Split:
    """Users of one fold; no user in two parts."""

    train: Ints
    validation: Ints
    test: Ints


def split(group: NDArray[np.uint8], fold: int, folds: int) -> Split:
    """The users of fold ``fold`` of ``folds``.

    Raises:
        TransferError: ``folds`` does not divide the groups, or a part has no users.
    """
    if folds not in FOLDS:
        raise TransferError(f"folds = {folds}; valid: {', '.join(map(str, FOLDS))}")
    width = GROUPS // folds
    tested = group // width == fold
    stopping = group == (fold + 1) * width % GROUPS
    parts = [np.flatnonzero(p) for p in (~tested & ~stopping, stopping, tested)]
    if not all(map(len, parts)):
        sizes = ", ".join(str(len(p)) for p in parts)
        raise TransferError(
            f"fold {fold} of {folds} has {sizes} users to train on, validate on and test on; "
            "each needs at least one"
        )
    return Split(*parts)


def evaluate_fold(problem: Problem, fold: int, *, folds: int, seed: int, system: str) -> list[Row]:
    """One row per system for one fold; ``system`` names the row of the head on the features.

    Raises:
        TransferError: as ``split``, or no ranking has the metrics of a row.
    """
    users = split(problem.group, fold, folds)
    test = problem.examples.take(users.test)
    head = fit(
        problem.items,
        problem.examples.take(users.train),
        problem.examples.take(users.validation),
        seed=int(np.random.SeedSequence([seed, fold]).generate_state(1)[0]),
        settings=HEAD,
    )
    logits = head.logits(test, problem.items)
    rows: list[Row] = [
        {
            "system": system,
            **summarise(rank(logits.numpy())),
            "loss": float(pair_loss(logits).mean()),
            "loss_softmax": float(softmax_loss(logits).mean()),
        }
    ]
    for name, counts in _popularity(problem, users.train):
        # Counts are no probabilities: popularity has ranks and no loss.
        scores = summarise(rank(counts[test.rows]))
        rows.append({"system": name, **scores, "loss": None, "loss_softmax": None})
    size = {"fold": fold, "n_users": len(users.test), "n_targets": test.rows[..., 0].size}
    for row in rows:
        if wrong := lint_metrics(row, candidates=test.rows.shape[-1]):
            raise TransferError(f"{row['system']}, fold {fold}: {'; '.join(wrong)}")
    return [row | size for row in rows]


def _popularity(problem: Problem, train: Ints) -> Iterator[tuple[str, Ints]]:
    n_items = len(problem.items)
    _, history = latest(*problem.history, train, np.iinfo(np.int64).max)
    yield "popularity", count_items(n_items, history, problem.examples.rows[train, :, 0])
    if problem.pretraining is not None:
        yield "popularity/pretraining", count_items(n_items, problem.pretraining)


def evaluate(
    run: RunDir,
    corpus: Corpus,
    tasks: Sequence[str] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    history: str = "target",
    progress: Progress | None = None,
) -> list[Row]:
    """Evaluate the newest checkpoint of a run on downstream tasks; ``<run>/transfer/<task>.json``.

    A task whose record is of the same checkpoint, task and settings is read, not computed again.

    Args:
        corpus: the corpus the run was trained on.
        tasks: names of tasks of the corpus; None: all that this evaluates with that history.
        folds: 2, 5 or 10; every user is tested in one of them.
        seed: of the heads.
        history: user features from the task's own service (the paper's Table 2), or from all
            history services of the task side by side, in sorted order; a task that is cut by
            stored order has no others.
        progress: called with (folds done, folds in all).

    Returns:
        Rows of all tasks: ``run_key task system fold hr_1 hr_10 ndcg_10 mrr loss loss_softmax
        tie_gap n_users n_targets``. ``loss`` is ``heads.pair_loss`` and ``loss_softmax``
        ``heads.softmax_loss`` over the stored candidates of the test targets, both in nats, so they
        compare over runs; null for popularity.

    Raises:
        TransferError: the corpus is not the run's, a setting is not valid (for a task), a task is
            of a form that this does not evaluate, or all are: then nothing is computed. Or the
            encoder's features are not finite (a diverged run).
        RecordError: the run has exported nothing yet, or its record is torn.
        CorpusError: the corpus has no such task.
    """
    if history not in HISTORIES:
        raise TransferError(f"history = {history!r}; valid: {', '.join(HISTORIES)}")
    config = run.spec()
    if corpus.card.digest != config.data.corpus_digest:
        raise TransferError(
            f"{corpus.path}: its digest is {corpus.card.digest}, run {run.run_key} was trained on "
            f"{config.data.corpus_digest}"
        )
    if folds not in FOLDS:
        raise TransferError(f"folds = {folds}; valid: {', '.join(map(str, FOLDS))}")
    chosen = _chosen(corpus, tasks, history)
    model, step = load_encoder(run)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []
    for done, task in enumerate(chosen):
        name = task.name
        path = run.path / "transfer" / f"{name}.json"
        header = {
            "schema_version": SCHEMA_VERSION,
            "run_key": run.run_key,
            "step": step,
            "task": name,
            "task_digest": corpus.manifest["tasks"][name],
            "history": history,
            "folds": folds,
            "seed": seed,
            "head": asdict(HEAD),
        }
        found = _recorded(path, header)
        if found is None:
            services = [task.service] if history == "target" else sorted(task.services)
            users, present = user_features(
                model, corpus, task, services, config.data.items_per_user
            )
            items = item_features(model, corpus, np.asarray(task.candidates, np.int64))
            if not (np.isfinite(users).all() and np.isfinite(items).all()):
                raise TransferError(
                    f"run {run.run_key}, step {step}: its features for task {name!r} hold NaN or "
                    "infinity; did the run diverge?"
                )
            problem = pose(corpus, task, np.column_stack([users, present]), items)
            found = []
            for fold in range(folds):
                found += evaluate_fold(
                    problem, fold, folds=folds, seed=seed, system=f"{config.model.system}/u-mlp"
                )
                if progress:
                    progress(done * folds + fold + 1, len(chosen) * folds)
            found = [{"run_key": run.run_key, "task": name, **row} for row in found]
            write_json(path, {**header, "rows": found})
        elif progress:
            progress((done + 1) * folds, len(chosen) * folds)
        rows += found
    return rows


def _chosen(corpus: Corpus, names: Sequence[str] | None, history: str) -> list[Task]:
    """The tasks of these names; None: those that are fit to be evaluated, sorted.

    Raises:
        TransferError: one of the names is not fit, or none of all.
        CorpusError: the corpus has no such task.
    """
    tasks = [
        Task.open(corpus, t) for t in (sorted(corpus.manifest["tasks"]) if names is None else names)
    ]
    unfit = {t.name: why for t in tasks if (why := _unfit(corpus, t, history))}
    if unfit and (names is not None or len(unfit) == len(tasks)):
        raise TransferError("\n".join(f"task {name!r}: {why}" for name, why in unfit.items()))
    return [t for t in tasks if t.name not in unfit]


def _unfit(corpus: Corpus, task: Task, history: str) -> str | None:
    """Why no run of the task's own corpus is evaluated on it with these histories, if so."""
    if task.foreign:
        return (
            "it is for encoders of other corpora (encoders = 'foreign'): this one's pretraining "
            "may have its targets"
        )
    if task.form == "leave_one_out" or not task.negatives.shape[2]:
        return (
            "only tasks with stored negatives and with users in folds are evaluated, and it has "
            f"form = {task.form!r} and {task.negatives.shape[2]} negatives"
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


def _recorded(path: Path, header: Row) -> list[Row] | None:
    """Rows of the record of this very evaluation, or None if it has to be computed."""
    if not path.exists():
        return None
    record = read_json(path)
    same = isinstance(record, dict) and {k: record.get(k) for k in header} == header
    return list(record["rows"]) if same else None


def pose(corpus: Corpus, task: Task, users: Floats, items: Floats) -> Problem:
    """A task as arrays, its item numbers turned into rows of its catalogue.

    Args:
        users: features of the task's users, in its order. [users, user_dim]
        items: features of ``task.candidates``, in that order. [items, item_dim]
    """
    candidates = np.asarray(task.candidates, np.int64)
    row_of = np.full(corpus.n_items, -1)
    row_of[candidates] = np.arange(len(candidates))
    drawn = np.concatenate([np.asarray(task.targets)[..., None], task.negatives], axis=2)
    offsets, logs = task.history(task.service)
    pretraining = None
    if task.service in corpus.card.services:
        bounds, log = corpus.users(task.service)
        part = corpus.split("pretraining")
        pretraining = row_of[log[int(bounds[part.start]) : int(bounds[part.stop])]]
    return Problem(
        items,
        Examples(users.astype(np.float32), row_of[drawn]),
        np.asarray(task.group),
        (np.asarray(offsets, np.int64), row_of[logs]),
        pretraining,
    )
