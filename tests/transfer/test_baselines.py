"""Systems without an encoder: what they may know, what they learn, and what is kept of them."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import N_ITEMS, linear, popular
from scipy.sparse import csr_array
from torch import Tensor
from typer.testing import CliRunner

from scaling.cli import app
from scaling.config import Evaluation
from scaling.data.corpus import Corpus
from scaling.data.tasks import Task
from scaling.transfer.baselines import Context, bst, deepfm, lightgcn
from scaling.transfer.baselines import evaluate as evaluation
from scaling.transfer.baselines.evaluate import HYBRID, SYSTEMS, evaluate_baselines, vectors_beside
from scaling.transfer.baselines.popularity import count_items, known
from scaling.transfer.heads import Features
from scaling.transfer.metrics import METRICS, Ranks, rank, summarise
from scaling.transfer.problem import Problem, TransferError, pose
from scaling.transfer.scoring import ByVectors
from scaling.transfer.towers import Fitted, Towers, TowerSettings

QUICK = [s for s in SYSTEMS if s != "bst-15m"]


class Planted(Context):
    """A context whose items' vectors are given, and theirs the words, too."""

    def __init__(self, problem: Problem, texts: np.ndarray) -> None:
        super().__init__(None, problem)  # type: ignore[arg-type]
        self.__dict__["texts"] = texts
        words = np.concatenate([texts, -texts], 1, dtype=float).clip(
            0
        )  # no word counts less than nothing
        self.__dict__["tfidf"] = csr_array(words / np.linalg.norm(words, axis=1, keepdims=True))


def one_out(planted: tuple[Problem, Features]) -> tuple[Problem, Features]:
    """The same users, whose three targets are of three parts, each with what comes before it."""
    problem, features = planted
    n, targets = len(problem.user), problem.targets
    logs = problem.history[1].reshape(n, 6)
    rows = [np.concatenate([logs, targets[:, :k]], 1) for k in range(3)]
    return replace(
        problem,
        user=np.tile(np.arange(n), 3),
        candidates=np.concatenate([problem.candidates[:, k : k + 1] for k in range(3)]),
        history=(
            np.concatenate([[0], np.cumsum(np.repeat([6, 7, 8], n))]),
            np.concatenate([r.ravel() for r in rows]),
        ),
        group=None,
        part=np.repeat(np.arange(3, dtype=np.uint8), n),
        pretraining=None,
    ), features


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bst, "SETTINGS", TowerSettings(lr=1e-3, max_epochs=4))


@pytest.fixture
def corpus(tiny_corpus: Any) -> Corpus:
    root: Path = tiny_corpus(users=300, negatives=20)
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


def scores(context: Context, system: str, seed: int = 0) -> np.ndarray:
    split = context.problem.split(0, 5)
    scorer = SYSTEMS[system](context, split, seed)
    return np.asarray(scorer.pairs(split.test, context.problem.candidates[split.test].astype(int)))


POSED = {"folds": linear(60), "leave one out": one_out(linear(60))}


@pytest.mark.parametrize("form", POSED)
@pytest.mark.parametrize("system", QUICK)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4)
def test_no_system_sees_what_it_is_validated_or_tested_on(
    system: str, form: str, seed: int
) -> None:
    """Training stops by validation, so that it has one epoch here."""
    problem, features = POSED[form]
    if problem.pretraining is None and system == "popularity/pretraining":
        return
    split, rng = problem.split(0, 5), np.random.default_rng(seed)
    other = problem.candidates.copy()
    for part in (split.validation, split.test):
        other[part] = rng.permuted(other[part], axis=2)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((bst, "SETTINGS"), (deepfm, "SETTINGS"), (lightgcn, "TEXT"),
                             (lightgcn, "ID")):  # fmt: skip
            patch.setattr(module, name, TowerSettings(max_epochs=1))
        before, after = (
            SYSTEMS[system](Planted(p, features.items), split, 3)
            for p in (problem, replace(problem, candidates=other))
        )
    for part in (split.validation, split.test):
        np.testing.assert_array_equal(before.every(part), after.every(part))


@pytest.mark.parametrize("system", QUICK)
def test_no_system_sees_what_it_is_tested_on(corpus: Corpus, system: str) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    split = problem.split(0, 5)
    rng = np.random.default_rng(0)
    other = problem.candidates.copy()
    other[split.test] = rng.permuted(other[split.test], axis=2)
    altered = replace(problem, candidates=other)
    before = SYSTEMS[system](Context(corpus, problem), split, 3)
    after = SYSTEMS[system](Context(corpus, altered), split, 3)
    np.testing.assert_array_equal(before.every(split.test), after.every(split.test))


@pytest.mark.parametrize("system", QUICK)
def test_pairs_are_taken_from_the_scores_of_all_items(corpus: Corpus, system: str) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    split = problem.split(1, 5)
    drawn = torch.get_rng_state()
    scorer = SYSTEMS[system](Context(corpus, problem), split, 0)
    assert torch.equal(torch.get_rng_state(), drawn)
    examples = split.test[[4, 1, 7]]
    rows = problem.candidates[examples].astype(int)
    flat = np.take_along_axis(np.asarray(scorer.every(examples)), rows.reshape(3, -1), 1)
    np.testing.assert_allclose(scorer.pairs(examples, rows), flat.reshape(rows.shape), rtol=1e-4)
    again = SYSTEMS[system](Context(corpus, problem), split, 0)
    np.testing.assert_array_equal(scorer.every(examples), again.every(examples))
    if scorer.losses:
        other = SYSTEMS[system](Context(corpus, problem), split, 1)
        assert not np.array_equal(scorer.every(examples), other.every(examples))


@pytest.mark.parametrize("system", ["popularity", "lightgcn-id", "cooccurrence", "deepfm"])
def test_what_everybody_likes_is_found(system: str) -> None:
    problem, features = popular(400)
    found = summarise(rank(scores(Planted(problem, features.items), system)))
    assert found["hr_10"] > 0.35


@pytest.mark.parametrize("system", ["bst", "deepfm", "lightgcn"])
def test_a_taste_that_items_vectors_show_is_learnt(system: str) -> None:
    problem, features = linear(1_000)
    found = summarise(rank(scores(Planted(problem, features.items), system)))
    assert found["hr_10"] > 0.35
    assert summarise(rank(scores(Planted(problem, features.items), "popularity")))["hr_10"] < 0.25


@pytest.mark.parametrize("system", ["bst", "deepfm", "lightgcn", "lightgcn-id", "cooccurrence"])
def test_a_taste_is_learnt_by_leaving_one_out(system: str) -> None:
    problem, features = one_out(linear(1_000))
    context = Planted(problem, features.items)
    assert summarise(rank(scores(context, system)))["hr_10"] > 0.3
    assert summarise(rank(scores(context, "popularity")))["hr_10"] < 0.2


def test_texts_tell_of_tastes(corpus: Corpus) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    everybody = np.arange(len(problem.user))
    chance = 10 / problem.candidates.shape[2]
    for system in ("tfidf", "tfidf+popularity"):
        scorer = SYSTEMS[system](Context(corpus, problem), problem.split(0, 5), 0)
        found = summarise(rank(scorer.pairs(everybody, problem.candidates.astype(np.int64))))
        error = np.sqrt(chance * (1 - chance) / problem.targets.size)
        assert found["hr_10"] > chance + 4 * error


def test_texts_and_popularity_by_hand() -> None:
    problem, features = popular(60)
    context, split = Planted(problem, features.items), problem.split(0, 5)
    words = context.tfidf.toarray()
    user = int(split.test[0])
    own = words[problem.before(np.array([user]))[1]].sum(0)
    cosine = words @ own / np.linalg.norm(own)
    found = SYSTEMS["tfidf"](context, split, 0).every(np.array([user]))[0]
    np.testing.assert_allclose(found, cosine, atol=1e-12)
    for pretraining in (problem.pretraining, None):
        logs = problem.known(split)[1] if pretraining is None else pretraining[1]
        count = Counter(logs.tolist())
        expected = cosine + [0.3 * np.log(1 + count[item]) for item in range(N_ITEMS)]
        posed = Planted(replace(problem, pretraining=pretraining), features.items)
        found = SYSTEMS["tfidf+popularity"](posed, split, 0).every(np.array([user]))[0]
        np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.lists(st.lists(st.integers(0, 9)), max_size=3))
def test_items_are_counted(logs: list[list[int]]) -> None:
    count = Counter(item for log in logs for item in log)
    found = count_items(10, *(np.array(log, np.int64) for log in logs))
    assert found.tolist() == [count[item] for item in range(10)]


def test_cooccurrence_by_hand() -> None:
    problem, features = popular(60)
    split = problem.split(0, 5)
    scorer = SYSTEMS["cooccurrence"](Planted(problem, features.items), split, 0)
    baskets = [set(problem.before(np.array([e]))[1]) for e in range(60)]
    for e in split.train:
        baskets[e] |= set(problem.targets[e].tolist())
    bounds, logs = problem.pretraining  # type: ignore[misc]
    baskets += [set(logs[a:b]) for a, b in pairwise(bounds)]
    user = int(split.test[0])
    history = set(problem.before(np.array([user]))[1])
    every = np.asarray(scorer.every(np.array([user])))[0]
    for item in (0, 1, 5, 20):
        expected = sum(sum(h in b and item in b for b in baskets) for h in history if h != item)
        assert every[item] == expected


def test_popularity_counts_what_a_fold_may_know() -> None:
    problem, features = popular()
    split = problem.split(0, 5)
    context = Planted(problem, features.items)
    counts = SYSTEMS["popularity"](context, split, 0).every(np.array([0]))[0]
    by_hand = np.zeros(len(problem.catalogue), int)
    for user in range(200):
        for item in problem.before(np.array([user]))[1]:
            by_hand[item] += 1
        if user in split.train:
            for item in problem.targets[user]:
                by_hand[item] += 1
    assert counts.tolist() == by_hand.tolist()
    assert SYSTEMS["popularity/pretraining"](context, split, 0).every(np.array([0])).sum() == 450
    nowhere = Planted(replace(problem, pretraining=None), features.items)
    with pytest.raises(TransferError, match="'planted': popularity/pretraining needs a service"):
        SYSTEMS["popularity/pretraining"](nowhere, split, 0)


def test_the_factorisation_machine_is_the_sum_over_pairs() -> None:
    fields = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    expected = fields.sum(0)
    for i in range(5):
        for j in range(i):
            expected = expected + fields[i] * fields[j]
    torch.testing.assert_close(deepfm.machine(fields), expected)


def test_fields_of_users_by_hand() -> None:
    problem, features = popular(20)
    scaled = features.items / np.sqrt((features.items**2).mean())
    towers = deepfm.DeepFM(problem, problem.split(0, 5), features.items)
    for user in (0, 7, 19):
        own = problem.before(np.array([user]))[1]
        np.testing.assert_allclose(towers.mean[user], scaled[own].mean(0), atol=1e-6)
        np.testing.assert_array_equal(towers.last[user], scaled[own[-1]])
    assert set(towers.length.tolist()) == {2}  # six logs: 4 <= 1 + 6 < 8


@pytest.mark.parametrize("form", POSED)
def test_popularity_as_a_field_counts_no_targets(form: str) -> None:
    """A training target that was counted would be told from its negative by that."""
    problem, features = POSED[form]
    served = problem.split(0, 5).train if form == "leave one out" else np.arange(60)
    for posed in (problem, replace(problem, pretraining=None)):
        count = Counter(problem.before(served)[1].tolist())
        if posed.pretraining is not None:
            count.update(posed.pretraining[1].tolist())
        towers = deepfm.DeepFM(posed, problem.split(0, 5), features.items)
        expected = [(1 + count[item]).bit_length() - 1 for item in range(N_ITEMS)]
        assert towers.popularity.tolist() == expected


def linears(*widths: int) -> int:
    return sum(a * b + b for a, b in pairwise(widths))


def test_sizes_are_those_that_the_papers_state() -> None:
    problem, _ = popular(20)
    texts = np.ones((N_ITEMS, 256), np.float32)
    for config, published in ((bst.LARGE, 12.6e6), (bst.SMALL, 0.79e6)):
        towers, d = bst.BST(config, problem, texts), config.d_model
        layers = sum(p.numel() for p in towers.stack.layers.parameters())
        assert layers == pytest.approx(published, rel=0.01)
        rest = linears(256, d) + linears(d, 64) + linears(256, 512, 256, 128, 64, 64)
        places = bst.LATEST * d
        norm = 2 * d
        assert parameters(towers) == layers + rest + places + norm + d
    split = problem.split(0, 5)
    by_texts = lightgcn.LightGCN(problem, problem.known(split), texts)
    assert parameters(by_texts) == 2 * linears(256, 64) < 0.5e6
    assert parameters(lightgcn.LightGCN(problem, problem.known(split), None)) == 420 * 64
    fields = 3 * linears(256, 64) + 2 * 16 * 64
    network = linears(3 * 64, 400, 400, 400, 64)
    assert parameters(deepfm.DeepFM(problem, split, texts)) == fields + network


def parameters(towers: Towers) -> int:
    return sum(p.numel() for p in towers.parameters())


def test_everything_moves_with_towers_to_a_device() -> None:
    problem, features = popular(20)
    split = problem.split(0, 5)
    known = problem.known(split)
    for towers in (
        bst.BST(bst.SMALL, problem, features.items),
        deepfm.DeepFM(problem, split, features.items),
        lightgcn.LightGCN(problem, known, features.items),
        lightgcn.LightGCN(problem, known, None),
    ):
        moved = towers.to("meta")
        held = [v for part in moved.modules() for v in vars(part).values()]
        assert not any(isinstance(value, Tensor) for value in held)  # but as buffers
        assert {v.device.type for v in (*moved.buffers(), *moved.parameters())} == {"meta"}


def test_users_without_logs_are_scored(corpus: Corpus) -> None:
    problem = pose(corpus, Task.open(corpus, "books"))
    offsets, items = problem.history
    lengths = np.diff(offsets)
    kept = ~np.isin(np.repeat(np.arange(len(lengths)), lengths), [0, 5])
    lengths[[0, 5]] = 0
    history = np.concatenate([[0], np.cumsum(lengths)]), items[kept]
    context = Context(corpus, replace(problem, history=history))
    for system in QUICK:
        scorer = SYSTEMS[system](context, problem.split(0, 5), 0)
        assert np.isfinite(scorer.every(np.array([0, 5]))).all(), system


@pytest.mark.slow
def test_baselines_are_computed_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    root = corpus.path.parent.parent
    told: list[float] = []
    rows = evaluate_baselines(
        root, corpus, "books", ["popularity", "bst"], folds=2, seeds=2,
        progress=lambda share, what: told.append(share),
    )  # fmt: skip
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert [(r["run_key"], r["system"]) for r in rows] == [(None, "popularity"), (None, "bst")]
    n_users = Task.open(corpus, "books").n_users
    for row in rows:
        assert (row["n_users"], row["n_targets"]) == (n_users, 2 * n_users)
        assert all(row[f"{m}_low"] <= row[m] <= row[f"{m}_high"] for m in METRICS)
    assert rows[0]["loss"] is None
    assert 0.3 < rows[1]["loss"] < 1.5
    for system in SYSTEMS:
        monkeypatch.setitem(SYSTEMS, system, None)  # nothing is computed again
    assert (
        evaluate_baselines(root, corpus, "books", ["popularity", "bst"], folds=2, seeds=2) == rows
    )
    with pytest.raises(TransferError, match="'best': there is none; valid: popularity, "):
        evaluate_baselines(root, corpus, "books", ["best"])


def test_records_have_the_ranks_that_their_rows_are_of(corpus: Corpus) -> None:
    root = corpus.path.parent.parent
    for system in ("cooccurrence", "deepfm"):
        (row,) = evaluate_baselines(root, corpus, "beauty", [system], seeds=2)
        (file,) = (root / "baselines").rglob(f"{system}.parquet")
        table = pq.read_table(file).to_pandas()
        task = Task.open(corpus, "beauty")
        assert sorted(table["user"]) == sorted(np.repeat(task.keys, 2))
        ranks = Ranks(table["first"].to_numpy()[:, None], table["last"].to_numpy()[:, None])
        found = summarise(ranks)
        for metric in METRICS:
            assert row[metric] == pytest.approx(found[metric], abs=1e-12)
        assert table["loss"].notna().all() == (system == "deepfm")
        if system == "deepfm":
            assert row["loss"] == pytest.approx(table["loss"].mean(), rel=1e-6)


def test_all_systems_that_a_task_can_have(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    root = corpus.path.parent.parent
    for system in SYSTEMS:
        if system != "popularity/pretraining":
            monkeypatch.setitem(SYSTEMS, system, known)
    monkeypatch.setattr(evaluation, "HYBRID", ())  # counts have no vectors
    there = [row["system"] for row in evaluate_baselines(root, corpus, "books")]
    assert there == list(SYSTEMS)
    there = [row["system"] for row in evaluate_baselines(root, corpus, "beauty")]
    assert there == [s for s in SYSTEMS if s != "popularity/pretraining"]
    with pytest.raises(TransferError, match="'beauty': popularity/pretraining needs a service"):
        evaluate_baselines(root, corpus, "beauty", ["popularity/pretraining"])


def test_the_verb(corpus: Corpus) -> None:
    root = corpus.path.parent.parent
    words = ["baselines", str(root / "tiny.toml"), "--root", str(root), "--json"]
    said = CliRunner().invoke(app, [*words, "--system", "popularity", "--system", "tfidf"])
    assert said.exit_code == 0, said.output
    rows = json.loads(said.stdout)
    assert [(r["task"], r["system"]) for r in rows] == [
        (t, s) for t in ("beauty", "books") for s in ("popularity", "tfidf")
    ]
    expected = evaluate_baselines(root, corpus, "books", ["popularity", "tfidf"])
    assert rows[2:] == expected
    said = CliRunner().invoke(app, [*words, "--system", "best"])
    assert said.exit_code != 0
    assert "'best': there is none; valid: popularity" in " ".join(said.output.split())
    assert not said.stdout


def untrained(towers: Towers, *_: object) -> Fitted:
    towers.refresh()
    return Fitted(towers, [0.0], [0])


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_vectors_for_the_hybrid_do_not_tell_of_any_target(seed: int) -> None:
    """Not even of those that the system was trained on, which a head would rely on in vain."""
    problem, features = linear(60)
    split, rng = problem.split(0, 5), np.random.default_rng(seed)
    other = replace(problem, candidates=rng.permutation(problem.candidates))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaling.transfer.baselines.fit", untrained)  # weights are those of the seed
        found, again = (
            SYSTEMS["lightgcn"](Planted(p, features.items), split, 0) for p in (problem, other)
        )
    assert isinstance(found, ByVectors)
    assert isinstance(again, ByVectors)
    assert found.before is not None
    assert again.before is not None
    torch.testing.assert_close(found.before, again.before, rtol=0, atol=0)
    # Training examples are met with their targets in the graph elsewhere.
    assert ((found.users - again.users).abs().amax(1).numpy() > 1e-4)[split.train].mean() > 0.9


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nor_do_they_by_another_part_of_the_same_user(part: int) -> None:
    """A later history of a leave-one-out user has the earlier targets."""
    problem, features = one_out(linear(60))
    offsets, items = problem.history
    other, rng = items.copy(), np.random.default_rng(0)
    for later in range(part + 1, 3):  # the target of this part, and what came after it
        for k in range(part, later):
            places = offsets[:-1][problem.part == later] + 6 + k
            other[places] = rng.permutation(other[places])
    altered = replace(
        problem,
        candidates=rng.permutation(problem.candidates),
        history=(offsets, other),
    )
    split = problem.split(0, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaling.transfer.baselines.fit", untrained)
        found, again = (
            SYSTEMS["lightgcn"](Planted(p, features.items), split, 0) for p in (problem, altered)
        )
    assert isinstance(found, ByVectors)
    assert isinstance(again, ByVectors)
    assert found.before is not None
    assert again.before is not None
    own = torch.from_numpy(problem.part == part)
    torch.testing.assert_close(found.before[own], again.before[own], rtol=0, atol=0)


@pytest.mark.slow
def test_the_hybrid_takes_the_better_of_two(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, task = corpus.path.parent.parent, Task.open(corpus, "books")
    problem = pose(corpus, task)
    wanted = Evaluation(
        corpus_digest=str(corpus.card.digest), task="books",
        task_digest=corpus.manifest["tasks"]["books"], folds=2, seeds=1, head="hybrid",
    )  # fmt: skip
    found = vectors_beside(root, corpus, task, problem, wanted, lambda share: None)
    assert found.shape == (2, len(problem.user), 64)
    (folder,) = (root / "baselines" / str(corpus.card.digest)).iterdir()
    losses = {s: json.loads((folder / f"{s}.json").read_text())["validation_loss"] for s in HYBRID}
    better = min(losses, key=losses.__getitem__)
    np.testing.assert_array_equal(found, np.load(folder / f"{better}.npy"))
    # Fold by fold they are those of the system trained on that fold.
    np.save(folder / f"{better}.npy", found + 1)
    with pytest.raises(TransferError, match=rf"{better}\.npy: missing or altered"):
        vectors_beside(root, corpus, task, problem, wanted, lambda share: None)
