"""Downstream evaluation of a run's frozen encoder (docs/decisions/0006-transfer-protocol.md)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling import ClueError
from scaling.config import Evaluation
from scaling.data.corpus import Corpus
from scaling.data.tasks import Task
from scaling.files import read_json, write_json
from scaling.models.clue import ContrastiveEncoder
from scaling.rundir import RunDir
from scaling.train.export import load_encoder
from scaling.transfer.baselines.evaluate import vectors_beside
from scaling.transfer.declared import unfit_for
from scaling.transfer.features import device, item_features, user_features
from scaling.transfer.foreign import as_seen_by
from scaling.transfer.heads import HEAD, Features, HeadTowers
from scaling.transfer.problem import (
    Problem,
    TransferError,
    example_histories,
    pose,
    replicas,
)
from scaling.transfer.reduce import Reduction, learn, pretrained_services
from scaling.transfer.scoring import (
    ByVectors,
    Outcome,
    Row,
    gather,
    per_user_table,
    rows_of,
    scored,
    write_per_user,
)
from scaling.transfer.towers import Fitted, fit, vectors

Progress = Callable[[float, str], None]
Floats = NDArray[np.float32]


def evaluate(
    run: RunDir,
    corpus: Corpus,
    wanted: Sequence[Evaluation],
    *,
    step: int | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = bool,
) -> list[Row]:
    """Evaluate an exported encoder on downstream tasks.

    Each evaluation leaves ``<run>/transfer/<key>.json``, of another step than the last one below
    ``transfer/step-000000060/``, and beside it ``<key>.parquet`` with every target's ranks and
    losses. One that is there is read, not computed again.

    Args:
        corpus: the corpus the run was trained on; those of foreign tasks are found beside it.
        step: of the export; None: the run's last step.
        progress: told the share that is done, and what is at work.
        should_stop: polled; when it answers True, what is done by then stays.

    Returns:
        Rows of all evaluations done, one for each segment of users: ``run_key step head history
        folds seeds`` and those of ``scoring.rows_of``.

    Raises:
        TransferError: the corpus is not the run's, or a task is not fit to be evaluated so: then
            nothing is computed. Or the encoder's features are not finite (a diverged run). An
            evaluation that fails does not keep those behind it from being recorded.
        RecordError: the run has not exported that step, or a record is torn.
        CorpusError: there is no such corpus or task.
        ReductionError: the features are no wider than an evaluation's ``feature_dim``.
    """
    config = run.spec()
    if corpus.card.digest != config.data.corpus_digest:
        raise TransferError(
            f"{corpus.path}: its digest is {corpus.card.digest}, run {run.run_key} was trained on "
            f"{config.data.corpus_digest}"
        )
    opened: dict[tuple[str, ...], tuple[Corpus, Task]] = {}
    for e in wanted:
        if _posed(e) not in opened:
            opened[_posed(e)] = _open(run.root, corpus, e)
    encoder = _Encoder(run, corpus, config.steps if step is None else step)
    rows: list[Row] = []
    failed: list[ClueError] = []
    for done, evaluation in enumerate(wanted):

        def tell(share: float, done: int = done, name: str = evaluation.key) -> None:
            if should_stop():
                raise _Stopped
            if progress:
                progress((done + share) / len(wanted), name)

        try:
            tell(0.0)
            found = encoder.rows(evaluation, *opened[_posed(evaluation)], tell)
        except _Stopped:
            return rows
        except ClueError as e:  # of this one: those behind it may be sound
            failed.append(e)
            continue
        shared = evaluation.model_dump(include={"head", "history", "folds", "seeds", "task_digest"})
        identity = {"run_key": run.run_key, "step": encoder.step}
        rows += [{**identity, **shared, **row} for row in found]
    if failed:
        raise failed[0]
    return rows


def _posed(evaluation: Evaluation) -> tuple[str, ...]:
    """What is posed by an evaluation, whatever its head."""
    return (
        evaluation.corpus_digest,
        evaluation.task,
        evaluation.task_digest,
        evaluation.history,
    )


class _Stopped(Exception):
    """Somebody asked to stop."""


class _Encoder:
    """An exported encoder under evaluation; it and its features are made when they are needed."""

    def __init__(self, run: RunDir, corpus: Corpus, step: int) -> None:
        self.run, self.corpus, self.step = run, corpus, step
        self.config = run.spec()
        self._features: dict[Any, tuple[Problem, Features]] = {}

    @cached_property
    def model(self) -> ContrastiveEncoder:
        model, _ = load_encoder(self.run, self.step)
        return model.to(device())

    def rows(
        self, evaluation: Evaluation, corpus: Corpus, task: Task, tell: Callable[[float], None]
    ) -> list[Row]:
        """Rows of an evaluation, read from its record or computed and recorded."""
        path = _record_path(self.run, evaluation, self.step, self.config.steps)
        header = {
            "run_key": self.run.run_key,
            "step": self.step,
            "evaluation": evaluation.record,
            "towers": asdict(HEAD),
        }
        if (found := _recorded(path, header)) is not None:
            return found
        problem, features = self._with_features(evaluation, corpus, task)
        if evaluation.head == "hybrid":
            beside = vectors_beside(self.run.root, corpus, task, problem, evaluation, tell)
            features = Features(features.users, features.items, beside)
        outcome, fitted = _outcome(problem, features, evaluation, tell)
        reduced = f"/f{evaluation.feature_dim}" if evaluation.feature_dim else ""
        system = f"{self.config.model.system}/{evaluation.head}{reduced}"
        rows = rows_of(problem, outcome, system)
        write_per_user(path.with_suffix(".parquet"), per_user_table(problem, task.keys, outcome))
        trained = {
            "epochs": fitted.epochs,
            "validation_loss": float(np.mean(fitted.validation_loss)),
        }
        write_json(path, {**header, **trained, "rows": rows})
        return rows

    def _with_features(
        self, evaluation: Evaluation, corpus: Corpus, task: Task
    ) -> tuple[Problem, Features]:
        """A task as arrays, with features of its examples and items: the same for all heads."""
        key = _posed(evaluation), evaluation.feature_dim
        if key not in self._features:
            problem = pose(corpus, task)
            texts = as_seen_by(corpus, self.corpus, self.config.data.services)
            cap = self.config.data.items_per_user
            layers = self._layers(evaluation.feature_dim) if evaluation.feature_dim else None
            features = _features(self.model, texts, task, problem, evaluation.history, cap, layers)
            self._features[key] = problem, features
        return self._features[key]

    def _layers(self, feature_dim: int) -> Mapping[str, Floats]:
        """Layers that reduce features, by service; learnt once and kept with the run."""
        folder = self.run.path / "reductions" / f"step-{self.step:09d}-f{feature_dim}"
        if not folder.exists():
            dims = feature_dim * len(pretrained_services(self.config, self.corpus))
            learn(self.run, self.corpus, dims, folder, step=self.step)
        return Reduction.read(folder).matrices


def _record_path(run: RunDir, evaluation: Evaluation, step: int, last: int) -> Path:
    """Where the record of an evaluation lies: of the run's last step directly in ``transfer``."""
    folder = run.path / "transfer"
    if step != last:
        folder /= f"step-{step:09d}"
    return folder / f"{evaluation.key}.json"


def _recorded(path: Path, header: Row) -> list[Row] | None:
    """Rows of the record of this very evaluation, or None if it has to be computed."""
    if not path.exists():
        return None
    record = read_json(path)
    same = isinstance(record, dict) and {k: record.get(k) for k in header} == header
    return list(record["rows"]) if same else None


def _open(root: Path, own: Corpus, evaluation: Evaluation) -> tuple[Corpus, Task]:
    """The corpus and the task of an evaluation, fit for it.

    Raises:
        TransferError: it is not fit, or is another than was asked for.
        CorpusError: there is no such corpus or task, or it leaks.
    """
    foreign = evaluation.corpus_digest != own.card.digest
    corpus = Corpus.find(root, evaluation.corpus_digest) if foreign else own
    task = Task.open(corpus, evaluation.task)
    if corpus.manifest["tasks"][task.name] != evaluation.task_digest:
        raise TransferError(
            f"{corpus.path}: task {task.name!r} has the digest "
            f"{corpus.manifest['tasks'][task.name]}, not {evaluation.task_digest}"
        )
    if why := unfit_for(corpus, task, evaluation.history, foreign):
        raise TransferError(f"task {task.name!r}: {why}")
    return corpus, task


def _features(
    model: ContrastiveEncoder,
    texts: Corpus,
    task: Task,
    problem: Problem,
    history: str,
    items_per_user: int,
    layers: Mapping[str, Floats] | None,
) -> Features:
    """Frozen features of a task's examples and of its catalogue.

    Args:
        layers: that reduce user features, by service of pretraining. [feature_dim, width]

    Raises:
        TransferError: a feature is not finite, or a service has no such layer.
    """
    services = [task.service] if history == "target" else sorted(task.services)
    if layers is not None and (missing := sorted(set(services) - set(layers))):
        raise TransferError(
            f"task {task.name!r}: feature_dim reduces features of {', '.join(layers)}, which the "
            f"encoder was pretrained on; there is no layer for {', '.join(missing)}"
        )
    histories = {s: example_histories(task, s) for s in services}
    users, present = user_features(model, texts, histories, items_per_user)
    if layers is not None:
        parts = np.split(users, len(services), axis=1)
        users = np.hstack([z @ layers[s].T for s, z in zip(services, parts, strict=True)])
    items = item_features(model, texts, problem.catalogue)
    if not (np.isfinite(users).all() and np.isfinite(items).all()):
        raise TransferError(
            f"task {task.name!r}: the encoder's features hold NaN or infinity; did the run diverge?"
        )
    return Features(np.column_stack([users, present]).astype(np.float32), items)


def _outcome(
    problem: Problem, features: Features, evaluation: Evaluation, tell: Callable[[float], None]
) -> tuple[Outcome, Fitted]:
    """Train the heads of all folds and seeds, and score what each has not seen."""
    splits, of_replica, seeds = replicas(problem, evaluation.folds, evaluation.seeds)
    towers = HeadTowers(evaluation.head, features, of_replica, seeds)
    fitted = fit(towers, problem, of_replica, seeds, HEAD, tell)
    everything = np.arange(len(problem.catalogue))
    ranked = [everything if problem.full else np.unique(problem.candidates[s.test]) for s in splits]
    rows = [r.astype(np.int64) for r in ranked for _ in range(evaluation.seeds)]
    users = vectors(towers.user, [s.test for s in of_replica], towers.replicas)
    items = vectors(towers.item, rows, towers.replicas)
    found = [
        scored(problem, split, ByVectors(u, split.test, i, r, loss))
        for split, u, i, r, loss in zip(
            of_replica, users, items, rows, fitted.validation_loss, strict=True
        )
    ]
    return gather(splits, found), fitted
