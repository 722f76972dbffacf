"""Evaluation of the systems without an encoder, and what of theirs the Hybrid takes.

They depend on a task and on nothing of a run, so they are computed once:

    <root>/baselines/<corpus digest>/<task>-<8 letters>/<system>.json      rows and what they are of
                                                        <system>.parquet   ranks of every target
                                                        <system>.npy       users' vectors

With the texts of a sentence-transformers model a system is another one, in a folder of its own:
``lightgcn/sbert-<8 letters of the digest of the weights>``.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.config import Evaluation, canonical_json, short_digest
from scaling.data.corpus import Corpus
from scaling.data.tasks import Task
from scaling.files import read_json, sha256, write_bytes, write_json
from scaling.transfer.baselines import Context, bst, deepfm, lightgcn, neighbours, popularity
from scaling.transfer.problem import Problem, Split, TransferError, pose, replicas
from scaling.transfer.scoring import (
    ByVectors,
    Row,
    Scorer,
    gather,
    per_user_table,
    rows_of,
    scored,
    write_per_user,
)
from scaling.transfer.texts import weights_digest

SYSTEMS: dict[str, Callable[[Context, Split, int], Scorer]] = {
    "popularity": popularity.known,
    "popularity/pretraining": popularity.pretraining,
    "tfidf": neighbours.tfidf,
    "tfidf+popularity": neighbours.tfidf_popularity,
    "cooccurrence": neighbours.cooccurrence,
    "lightgcn": lightgcn.by_texts,
    "lightgcn-id": lightgcn.by_ids,
    "bst": bst.small,
    "bst-15m": bst.large,
    "deepfm": deepfm.deepfm,
}
"""What is learnt in one fold by one seed, by the systems' names."""
BY_TEXTS = ("lightgcn", "bst", "bst-15m", "deepfm")
"""Systems that know items by vectors of their texts (``Context.texts``)."""
HYBRID = ("bst", "lightgcn")
"""Systems of whose user vectors the Hybrid takes the better (Shin et al. 2023, Appendix E)."""
VERSION = 1


def evaluate_baselines(
    root: Path,
    corpus: Corpus,
    task_name: str,
    systems: Sequence[str] | None = None,
    *,
    folds: int = 5,
    seeds: int = 1,
    weights: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> list[Row]:
    """Evaluate systems without an encoder on a task; what is recorded is read.

    Args:
        systems: of ``SYSTEMS``; None: all that the task can have.
        weights: folder of a sentence-transformers model, whose vectors of texts the systems
            ``BY_TEXTS`` are then given, and no other system is evaluated; None: TF-IDF, reduced.
        folds: 2, 5 or 10; means nothing for a ``leave_one_out`` task.
        seeds: of systems that are trained.
        progress: told the share that is done, and what is at work.

    Returns:
        Rows of ``scoring.rows_of`` with ``run_key`` None.

    Raises:
        TransferError: there is no such system, or the task cannot have it; or there is no model in
            ``weights``, the package that reads it is missing, or a system uses no vectors of texts.
        CorpusError: the corpus has no such task, or it leaks.
    """
    task = Task.open(corpus, task_name)
    problem = pose(corpus, task)
    if systems is None and weights is not None:
        systems = BY_TEXTS
    elif systems is None:
        lacking = {"popularity/pretraining"} if problem.pretraining is None else set()
        systems = [s for s in SYSTEMS if s not in lacking]
    if unknown := [s for s in systems if s not in SYSTEMS]:
        raise TransferError(f"system {unknown[0]!r}: there is none; valid: {', '.join(SYSTEMS)}")
    if weights is not None and (others := [s for s in systems if s not in BY_TEXTS]):
        raise TransferError(
            f"system {others[0]!r} uses no vectors of texts; those that do: {', '.join(BY_TEXTS)}"
        )
    study = _Study(root, corpus, task, problem, folds, seeds, weights)
    rows: list[Row] = []
    for done, system in enumerate(systems):

        def tell(share: float, done: int = done, system: str = system) -> None:
            if progress:
                progress((done + share) / len(systems), f"{task.name} {system}")

        tell(0.0)
        rows += study.record(system, tell)["rows"]
        tell(1.0)
    return [{"run_key": None, **row} for row in rows]


def vectors_beside(
    root: Path,
    corpus: Corpus,
    task: Task,
    problem: Problem,
    evaluation: Evaluation,
    tell: Callable[[float], None],
) -> NDArray[np.float32]:
    """User vectors of the better of ``HYBRID`` by validation loss, of each replica its own and
    none of them by its targets. [replicas, examples, k]"""
    study = _Study(root, corpus, task, problem, evaluation.folds, evaluation.seeds)
    losses = {s: float(study.record(s, tell)["validation_loss"]) for s in HYBRID}
    return study.vectors(min(losses, key=losses.__getitem__))


class _Study:
    """The folds and seeds of one task, and the records of systems on them."""

    def __init__(
        self,
        root: Path,
        corpus: Corpus,
        task: Task,
        problem: Problem,
        folds: int,
        seeds: int,
        weights: Path | None = None,
    ) -> None:
        self.task, self.problem = task, problem
        self.context = Context(corpus, problem, weights)
        self.splits, self.of_replica, self.seeds = replicas(problem, folds, seeds)
        self.header: dict[str, Any] = {
            "version": VERSION,
            "task": task.name,
            "task_digest": corpus.manifest["tasks"][task.name],
            "history": "target",
            "folds": folds,
            "seeds": seeds,
        }
        self.suffix = ""  # of the systems' names
        if weights is not None:
            digest = weights_digest(weights)
            self.header["texts"] = f"sbert-{digest}"
            self.suffix = f"/sbert-{digest[:8]}"
        key = short_digest(canonical_json(self.header))[:8]
        self.folder = root / "baselines" / str(corpus.card.digest) / f"{task.name}-{key}"

    def record(self, system: str, tell: Callable[[float], None]) -> dict[str, Any]:
        """The record of a system, read or computed."""
        path = self._path(system, "json")
        if path.exists():
            record: dict[str, Any] = read_json(path)
            return record
        scorers, found = [], []
        for done, (split, seed) in enumerate(zip(self.of_replica, self.seeds, strict=True)):
            tell(done / len(self.seeds))
            scorers.append(SYSTEMS[system](self.context, split, seed))
            found.append(scored(self.problem, split, scorers[-1]))
        outcome = gather(self.splits, found)
        learnt = [s for s in scorers if isinstance(s, ByVectors)]
        record = {
            **self.header,
            "system": system + self.suffix,
            "rows": rows_of(self.problem, outcome, system + self.suffix),
            "validation_loss": float(np.mean([s.validation_loss for s in learnt]))
            if learnt
            else None,
        }
        if self.context.weights is not None:
            record["weights"] = self.context.weights.resolve().name
        elif system in HYBRID:  # which is the paper's, whatever texts a comparison is given
            vectors = [s.users if s.before is None else s.before for s in learnt]
            self._write_vectors(system, np.stack([v.cpu().numpy() for v in vectors]))
            record["vectors"] = sha256(self._path(system, "npy"))
        table = per_user_table(self.problem, self.task.keys, outcome)
        write_per_user(self._path(system, "parquet"), table)
        write_json(path, record)
        return record

    def vectors(self, system: str) -> NDArray[np.float32]:
        """Recorded user vectors. [replicas, examples, k]

        Raises:
            TransferError: they are not those that the record tells of.
        """
        path = self._path(system, "npy")
        if not path.exists() or sha256(path) != read_json(self._path(system, "json"))["vectors"]:
            raise TransferError(f"{path}: missing or altered; remove the folder to compute it anew")
        found: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return found

    def _write_vectors(self, system: str, found: NDArray[np.float32]) -> None:
        buffer = BytesIO()
        np.save(buffer, found, allow_pickle=False)
        write_bytes(self._path(system, "npy"), buffer.getbuffer())

    def _path(self, system: str, ending: str) -> Path:
        return self.folder / f"{system.replace('/', '-')}.{ending}"
