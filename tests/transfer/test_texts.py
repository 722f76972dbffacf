"""Vectors of texts against dense formulas."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from typer.testing import CliRunner

from scaling.cli import app
from scaling.config import canonical_json, short_digest
from scaling.data.corpus import Corpus
from scaling.data.tasks import Task
from scaling.transfer.baselines import Context, bst, deepfm, lightgcn
from scaling.transfer.baselines.evaluate import BY_TEXTS, SYSTEMS, evaluate_baselines
from scaling.transfer.baselines.popularity import known
from scaling.transfer.problem import TransferError, pose
from scaling.transfer.texts import WIDTH, reduced, sentence_vectors, tfidf, weights_digest
from scaling.transfer.towers import TowerSettings


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root: Path = tiny_corpus(users=100)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def test_tfidf_by_hand(corpus: Corpus) -> None:
    items = corpus.service_items("books")
    counts = np.zeros((len(items), corpus.card.vocab_size))
    for row, item in enumerate(items):
        bounds = corpus.token_offsets[item : item + 2].astype(int)
        for token in corpus.tokens[bounds[0] + 1 : bounds[1]]:  # without the service's
            counts[row, token] += 1
    expected = counts * (np.log((1 + len(items)) / (1 + (counts > 0).sum(0))) + 1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(tfidf(corpus, items).toarray(), expected, atol=1e-12)


@pytest.mark.parametrize("width", [3, 10, 100])
def test_the_reduction_has_the_leading_singular_vectors(width: int) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(80, 40)) * 0.8 ** np.arange(40)
    found = reduced(csr_array(matrix), width)
    rank = min(width, 39)
    assert found.shape == (80, width)
    assert not found[:, rank:].any()
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    expected = np.abs(left * values)[:, : min(rank, 10)]
    np.testing.assert_allclose(np.abs(found[:, : min(rank, 10)]), expected, atol=1e-3)
    np.testing.assert_array_equal(reduced(csr_array(matrix), width), found)


def test_vectors_of_texts_are_as_alike_as_the_texts(corpus: Corpus) -> None:
    """Of rank 256 or less nothing is lost by the reduction."""
    matrix = tfidf(corpus, corpus.service_items("books"))
    assert np.linalg.matrix_rank(matrix.toarray()) < WIDTH
    vectors = reduced(matrix).astype(float)
    np.testing.assert_allclose(vectors @ vectors.T, (matrix @ matrix.T).toarray(), atol=1e-5)


def test_sentence_transformers_that_are_not_there(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(TransferError, match=r"pip install clue-scaling\[text\]"):
        sentence_vectors(corpus, np.arange(3), tmp_path)


class LengthsOfTexts:
    """In place of a model, which needs weights: a text's vector is its letters and its words."""

    def __init__(self, folder: str, *, local_files_only: bool) -> None:
        assert Path(folder).is_dir()
        assert local_files_only

    def encode(self, texts: Sequence[str], *, convert_to_numpy: bool) -> np.ndarray:
        assert convert_to_numpy
        return np.array([(len(text.replace(" ", "")), len(text.split())) for text in texts], float)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a model that ``LengthsOfTexts`` stands for."""
    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = LengthsOfTexts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    folder = tmp_path / "model"
    (folder / "0_Transformer").mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    (folder / "0_Transformer" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_sentence_transformers_are_given_the_texts_in_order(
    corpus: Corpus, tmp_path: Path, model: Path
) -> None:
    task = pose(corpus, Task.open(corpus, "beauty"))
    with pytest.raises(TransferError, match=r"none: not a folder of a sentence-transformers"):
        _ = Context(corpus, task, tmp_path / "none").texts
    found = Context(corpus, task, model).texts
    assert found.dtype == np.float32
    # Texts are made of three words, and items numbered by text within a service.
    logs = (corpus.path.parent.parent / "logs.csv").read_text().splitlines()[1:]
    texts = sorted({line.split(",")[2] for line in logs if line.split(",")[1] == "beauty"})
    assert found.tolist() == [[len(text.replace(" ", "")), 3] for text in texts]


# ---- systems that are given them -----------------------------------------------------------------


def test_the_digest_of_a_model_is_of_all_that_it_reads(model: Path, tmp_path: Path) -> None:
    first = weights_digest(model)
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").write_text("hidden")
    (model / ".gitattributes").write_text("hidden")
    moved = model.rename(tmp_path / ".elsewhere")
    assert weights_digest(moved) == first
    weights = moved / "0_Transformer" / "model.safetensors"
    weights.write_bytes(b"others!")
    second = weights_digest(moved)
    weights.rename(moved / "model.safetensors")
    assert len({first, second, weights_digest(moved)}) == 3


@pytest.fixture
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((bst, "SETTINGS"), (deepfm, "SETTINGS"), (lightgcn, "TEXT")):
        monkeypatch.setattr(module, name, TowerSettings(max_epochs=1))


def records(root: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in sorted((root / "baselines").glob("*/*/*.json"))]
    return {record["system"]: record for record in found}


@pytest.mark.usefixtures("few_epochs")
def test_both_kinds_of_texts_stand_beside_each_other(corpus: Corpus, model: Path) -> None:
    root, digest = corpus.path.parent.parent, weights_digest(model)
    plain = evaluate_baselines(root, corpus, "books", ["bst", "deepfm"], folds=2)
    before = records(root)
    names = ["bst", "deepfm", "lightgcn"]
    found = evaluate_baselines(root, corpus, "books", names, folds=2, weights=model)
    assert [row["system"] for row in found] == [f"{name}/sbert-{digest[:8]}" for name in names]
    after = records(root)
    assert {name: after[name] for name in before} == before
    assert "texts" not in before["bst"]
    for row in found:
        record = after[row["system"]]
        assert (record["texts"], record["weights"]) == (f"sbert-{digest}", "model")
        assert "vectors" not in record  # the Hybrid takes those of TF-IDF
    losses = {row["system"]: row["loss"] for row in (*plain, *found)}
    assert len(set(losses.values())) == 5
    # What is recorded is read, with the package or without; other weights are others.
    sys.modules["sentence_transformers"] = None  # type: ignore[assignment]
    assert evaluate_baselines(root, corpus, "books", names, folds=2, weights=model) == found
    (model / "0_Transformer" / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(TransferError, match=r"pip install clue-scaling\[text\]"):
        evaluate_baselines(root, corpus, "books", ["bst"], folds=2, weights=model)


def test_the_key_of_records_by_tfidf_stays(corpus: Corpus) -> None:
    """A record that is there would otherwise be computed again."""
    root = corpus.path.parent.parent
    evaluate_baselines(root, corpus, "books", ["popularity"], folds=2)
    header = {
        "version": 1, "task": "books", "task_digest": corpus.manifest["tasks"]["books"],
        "history": "target", "folds": 2, "seeds": 1,
    }  # fmt: skip
    (folder,) = (root / "baselines" / str(corpus.card.digest)).iterdir()
    assert folder.name == f"books-{short_digest(canonical_json(header))[:8]}"


def test_systems_without_texts_are_refused_and_left_out(
    corpus: Corpus, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = corpus.path.parent.parent
    with pytest.raises(TransferError, match="'tfidf' uses no vectors of texts; those that do: li"):
        evaluate_baselines(root, corpus, "books", ["bst", "tfidf"], weights=model)
    with pytest.raises(TransferError, match="folder: not a folder of a sentence-transformers"):
        evaluate_baselines(root, corpus, "books", weights=model / "folder")
    assert not (root / "baselines").exists()
    for system in SYSTEMS:
        monkeypatch.setitem(SYSTEMS, system, known)
    found = evaluate_baselines(root, corpus, "books", weights=model)
    assert [row["system"].split("/")[0] for row in found] == list(BY_TEXTS)


@pytest.mark.usefixtures("few_epochs")
def test_which_systems_use_vectors_of_texts(corpus: Corpus) -> None:
    """Those for which it matters that there are none."""
    problem = pose(corpus, Task.open(corpus, "books"))
    using = []
    for name, system in SYSTEMS.items():
        context = Context(corpus, problem, Path("no model"))
        try:
            system(context, problem.split(0, 5), 0)
        except TransferError:
            using.append(name)
    assert sorted(using) == sorted(BY_TEXTS)


@pytest.mark.usefixtures("few_epochs")
def test_the_verb_takes_weights(corpus: Corpus, model: Path) -> None:
    root = corpus.path.parent.parent
    words = ["baselines", str(root / "tiny.toml"), "--root", str(root), "--json", "--folds", "2"]
    words += ["--task", "books", "--system", "deepfm", "--texts"]
    said = CliRunner().invoke(app, [*words, str(model)])
    assert said.exit_code == 0, said.output
    (row,) = json.loads(said.stdout)
    assert row["system"] == f"deepfm/sbert-{weights_digest(model)[:8]}"
    said = CliRunner().invoke(app, [*words, str(root)])
    assert said.exit_code != 0
    assert "not a folder of a sentence-transformers model" in " ".join(said.output.split())
