"""Reductions: what is learnt is checked on planted features, what is stored by altering it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from test_embed import configure, publish

import scaling.transfer.reduce as reduce
from scaling.config import ModelConfig
from scaling.data.corpus import Corpus
from scaling.files import RecordError, sha256
from scaling.rundir import RunDir
from scaling.transfer.embed import Embedding, Wanted
from scaling.transfer.reduce import (
    Fitted,
    Reduction,
    ReductionError,
    canonical_directions,
    fit,
    learn,
    principal_components,
    refitted_loss,
    save,
    width,
)


def planted(n_users: int, d: int, shared: int, seed: int) -> dict[str, np.ndarray]:
    """Features of two services that agree in ``shared`` directions of little variance, and have
    much variance of their own in all others."""
    rng = np.random.default_rng(0)
    turns = ortho_group.rvs(d, size=2, random_state=rng)
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n_users, shared))
    found = {}
    for service, turn in zip(("b", "a"), turns, strict=True):
        own = 3.0 * rng.normal(size=(n_users, d - shared))
        found[service] = (np.hstack([common, own]) @ turn).astype(np.float32)
    return found


def test_the_objective_finds_what_services_share_where_variance_misleads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reduce, "STEPS", 200)
    monkeypatch.setattr(reduce, "BATCH", 128)
    monkeypatch.setattr(reduce, "LEARNING_RATE", 1e-2)
    train, validation = planted(2_000, 16, 4, seed=1), planted(300, 16, 4, seed=2)
    told: list[tuple[int, int, float]] = []
    found = fit(train, validation, 8, progress=lambda *a: told.append(a))
    assert found.method == "contrastive"
    assert {s: a.shape for s, a in found.matrices.items()} == {"b": (4, 16), "a": (4, 16)}
    chance = np.log(300)
    assert found.loss_pca is not None
    assert found.loss is not None
    assert found.loss_pca > chance - 0.05  # the shared part is not in there
    assert found.loss < chance / 4
    # What is left of a planted feature is what is shared: the services agree in it.
    reduced = [validation[s] @ found.matrices[s].T for s in ("a", "b")]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in reduced)
    assert ((a @ b.T).argmax(1) == np.arange(300)).mean() > 0.8
    assert all(share < 0.2 for share in found.kept_variance.values())
    assert [t[0] for t in told] == list(range(10, 201, 10))
    again = fit(train, validation, 8)
    assert all(np.array_equal(again.matrices[s], found.matrices[s]) for s in found.matrices)


@pytest.mark.parametrize(("noise", "start"), [(0.0, "pca"), (2.0, "canonical")])
def test_where_training_does_not_help_the_better_start_stays(
    monkeypatch: pytest.MonkeyPatch, noise: float, start: str
) -> None:
    monkeypatch.setattr(reduce, "STEPS", 40)
    monkeypatch.setattr(reduce, "LEARNING_RATE", 1e3)
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(300, 6)) * [9, 9, 1, 1, 1, 1]).astype(np.float32)
    b = (a + noise * rng.normal(size=a.shape)).astype(np.float32)
    found = fit({"a": a[:200], "b": b[:200]}, {"a": a[200:], "b": b[200:]}, 4)
    losses = {"pca": found.loss_pca, "canonical": found.loss_canonical}
    assert found.loss == losses[start] == min(v for v in losses.values() if v is not None)
    z = torch.from_numpy(np.stack([a[:200], b[:200]]))
    starts = {
        "pca": torch.stack([principal_components(of, 2) for of in z]),
        "canonical": canonical_directions(z, 2),
    }
    assert np.array_equal(found.matrices["b"], starts[start][1].numpy())


def test_canonical_directions_have_the_canonical_correlations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reduce, "RIDGE", 0.0)
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5))
    b = a @ rng.normal(size=(5, 5)) + 4 * rng.normal(size=(400, 5))
    centred = [x - x.mean(0) for x in (a, b)]
    bases = [np.linalg.qr(x)[0] for x in centred]  # Bjoerck and Golub 1973
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)[:3]
    layers = canonical_directions(torch.from_numpy(np.stack([a, b])), 3).numpy()
    x, y = (z @ layer.T for z, layer in zip(centred, layers, strict=True))
    np.testing.assert_allclose((x * y).mean(0), expected, atol=1e-4)
    for of in (x, y):
        np.testing.assert_allclose(of.T @ of / 400, np.eye(3), atol=1e-4)


def test_one_service_gets_its_principal_components() -> None:
    z = planted(500, 12, 4, seed=3)["a"]
    found = fit({"a": z}, {"a": z[:50]}, 5)
    oracle = PCA(5).fit(z)
    assert found.method == "pca"
    assert (found.loss, found.loss_canonical, found.loss_pca) == (None, None, None)
    layer = found.matrices["a"]
    np.testing.assert_allclose(np.abs((layer * oracle.components_).sum(1)), 1.0, atol=1e-5)
    assert (np.take_along_axis(layer, np.abs(layer).argmax(1)[:, None], 1) > 0).all()
    kept = oracle.explained_variance_ratio_.sum()
    assert found.kept_variance["a"] == pytest.approx(kept, abs=1e-5)


@given(
    seed=st.integers(0, 1000), users=st.integers(2, 30), d=st.integers(1, 8), scale=st.floats(-3, 3)
)
def test_the_refitted_loss_is_the_least_over_tau(
    seed: int, users: int, d: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(users, d, generator=generator)
    other = own + 10.0**scale * torch.randn(users, d, generator=generator)
    found = refitted_loss(torch.stack([own, other]))
    cosine = (F.normalize(own, dim=1) @ F.normalize(other, dim=1).T).double()
    losses = []
    for log_tau in torch.linspace(0, np.log(100.0), 200):
        logits = log_tau.exp() * cosine
        target = torch.arange(users)
        both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        losses.append(float(both) / 2)
    assert found <= min(losses) + 1e-4
    assert found >= min(losses) - 0.02  # the grid's own coarseness


@given(services=st.integers(1, 5), d=st.integers(1, 30), dim=st.integers(1, 200))
def test_dimensions_are_shared_evenly_or_refused(services: int, d: int, dim: int) -> None:
    if dim % services == 0 and dim <= services * d:
        assert width(dim, services, d) * services == dim
    else:
        with pytest.raises(ReductionError, match=f"{services * d} dimensions of {services} serv"):
            width(dim, services, d)


def test_the_papers_reduction() -> None:
    assert width(300, 3, 720) == 100


def test_components_of_equal_variance_are_orthonormal() -> None:
    z = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    rows = principal_components(z, 6)
    torch.testing.assert_close(rows @ rows.T, torch.eye(6), atol=1e-5, rtol=0)


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root = tiny_corpus(users=200)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def test_learnt_from_a_run_and_read_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "STEPS", 40)
    config = configure(corpus)
    run = RunDir.create(corpus.path.parent.parent, config, "tiny")
    with pytest.raises(RecordError, match="nothing is exported yet"):
        learn(run, corpus, 6, tmp_path / "reduction")
    publish(run, config, 6)
    record = learn(run, corpus, 6, tmp_path / "reduction")
    found = Reduction.read(tmp_path / "reduction")
    encoder = sha256(run.path / "export" / "step-000000006" / "model.safetensors")
    assert record["encoder_sha256"] == found.encoder_sha256 == encoder
    assert (record["services"], record["dims"]) == (["books", "garden"], 6)
    assert record["n_users"] == corpus.card.n_users
    assert record["loss"] <= min(record["loss_pca"], record["loss_canonical"])
    # The features it was learnt from are those that are embedded: it starts at their components.
    out = Embedding(run, corpus, tmp_path / "z", Wanted(dtype="float32"))
    out.shards.begin()
    out.write(out.shards.parts)
    z = np.load(tmp_path / "z" / "users-000000.npy")[corpus.split("pretraining")]
    oracle = PCA(3).fit(z[:, 8:])
    monkeypatch.setattr(reduce, "LEARNING_RATE", 0.0)
    monkeypatch.setattr(reduce, "canonical_directions", lambda z, count: 0 * z[:, :count])
    learn(run, corpus, 6, tmp_path / "start")
    layer = Reduction.read(tmp_path / "start").matrices["garden"]
    np.testing.assert_allclose(np.abs((layer * oracle.components_).sum(1)), 1.0, atol=1e-3)

    with pytest.raises(ReductionError, match="is there already; choose another folder"):
        learn(run, corpus, 6, tmp_path / "reduction")
    with pytest.raises(ReductionError, match="reduced to 7; valid: multiples of 2 up to 16"):
        learn(run, corpus, 7, tmp_path / "odd")


def test_narrow_features_are_reduced_further(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "STEPS", 20)
    config = configure(corpus, model=ModelConfig(layers=1, d_model=8, heads=2, feature_dim=3))
    run = RunDir.create(corpus.path.parent.parent, config, "tiny")
    publish(run, config, 6)
    with pytest.raises(ReductionError, match="reduced to 8; valid: multiples of 2 up to 6"):
        learn(run, corpus, 8, tmp_path / "wide")
    assert learn(run, corpus, 4, tmp_path / "reduction")["dims"] == 4
    shapes = {a.shape for a in Reduction.read(tmp_path / "reduction").matrices.values()}
    assert shapes == {(2, 3)}


def test_a_diverged_encoder_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = configure(corpus)
    run = RunDir.create(corpus.path.parent.parent, config, "tiny")
    publish(run, config, 6, service__ln__bias=float("nan"))
    with pytest.raises(ReductionError, match=f"run {run.run_key}, step 6: .* NaN or infinity"):
        learn(run, corpus, 6, tmp_path / "reduction")
    assert not (tmp_path / "reduction").exists()


def test_altered_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "reduction"
    layer = np.arange(6, dtype=np.float32).reshape(2, 3)
    fitted = Fitted({"a": layer, "b": 2 * layer}, "pca", None, None, None, {"a": 1.0, "b": 1.0})
    save(folder, fitted, {"encoder_sha256": "e"})
    found = Reduction.read(folder)
    assert list(found.matrices) == ["a", "b"]
    assert np.array_equal(found.matrices["b"], 2 * layer)
    file = folder / "reduction.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x7f")
    with pytest.raises(ReductionError, match=r"not the file that reduction\.json tells of"):
        Reduction.read(folder)
    file.write_bytes(whole)
    record = json.loads((folder / "reduction.json").read_text())
    (folder / "reduction.json").write_text(json.dumps({**record, "schema_version": 2}))
    with pytest.raises(ReductionError, match="schema_version = 2; this program reads 1"):
        Reduction.read(folder)
    (folder / "reduction.json").unlink()
    with pytest.raises(RecordError, match="no such file"):
        Reduction.read(folder)
