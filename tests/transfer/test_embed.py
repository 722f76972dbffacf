"""Shards of features: the numbers, the order, and the same bytes whoever writes them and whatever
happens on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import configure
from safetensors.torch import save_file
from test_features import alone, elsewhere, forget
from typer.testing import CliRunner

import scaling.transfer.features as features
from scaling.cli import app
from scaling.config import ModelConfig, RunConfig
from scaling.data.corpus import Corpus, CorpusError
from scaling.data.tasks import Task
from scaling.files import RecordError, sha256, write_json
from scaling.models import build
from scaling.rundir import RunDir
from scaling.transfer.embed import Embedding, Wanted
from scaling.transfer.features import item_features
from scaling.transfer.foreign import as_seen_by
from scaling.transfer.reduce import Reduction
from scaling.transfer.shards import EmbedError, share_of

CAP = 4
SMALL = Wanted(what="both", dtype="float32", shard_users=41)


def publish(run: RunDir, config: RunConfig, step: int, **values: float) -> Any:
    """Export an untrained encoder, as docs/formats.md says exports are; returns it."""
    model = build(config.model, config.data.vocab_size, seed=step).eval()
    for name, value in values.items():
        torch.nn.init.constant_(model.get_parameter(name.replace("__", ".")), value)
    folder = run.path / "export" / f"step-{step:09d}"
    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    save_file(model.state_dict(), file)
    size, digest = file.stat().st_size, sha256(file)
    card = {"schema_version": 1, "run_key": run.run_key, "step": step, "size": size,
            "sha256": digest, "config": config.model_dump(mode="json")}  # fmt: skip
    write_json(folder / "config.json", card)
    return model


@pytest.fixture(scope="module")
def root(_prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with a corpus and a run that exported steps 3 and 6."""
    made = tmp_path_factory.mktemp("embed") / "root"
    shutil.copytree(_prepared(400, 8, 16, 0.3, 20, 0), made)
    corpus = Corpus.open(next((made / "corpora").glob("tiny-*")))
    config = configure(corpus)
    run = RunDir.create(made, config, "tiny")
    for step in (3, 6):
        publish(run, config, step)
    return made


@pytest.fixture(scope="module")
def corpus(root: Path) -> Corpus:
    return Corpus.open(next((root / "corpora").glob("tiny-*")))


@pytest.fixture(scope="module")
def run(root: Path, corpus: Corpus) -> RunDir:
    return RunDir(root, configure(corpus).run_key)


def written(embedding: Embedding) -> Path:
    shards = embedding.shards
    shards.begin()
    embedding.write(shards.missing(shards.parts))
    assert shards.complete()
    return shards.folder


def digests(folder: Path) -> dict[str, str]:
    """Of all files but those that a killed process was writing."""
    files = (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".tmp-"))
    return {str(f.relative_to(folder)): sha256(f) for f in files}


@pytest.fixture(scope="module")
def undisturbed(
    run: RunDir, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return digests(written(Embedding(run, corpus, tmp_path_factory.mktemp("whole"), SMALL)))


def stacked(folder: Path, kind: str) -> np.ndarray:
    return np.concatenate([np.load(f) for f in sorted(folder.glob(f"{kind}-*.npy"))])


# what is in them


def test_every_user_and_item_in_order(run: RunDir, corpus: Corpus, tmp_path: Path) -> None:
    embedding = Embedding(run, corpus, tmp_path, SMALL)
    folder, model = written(embedding), embedding.model
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["step"] == 6
    users = stacked(folder, "users")
    assert users.shape == (len(corpus.keys), 2 * 8) == (
        manifest["users"]["rows"], manifest["users"]["dims"]
    )  # fmt: skip
    assert manifest["users"]["services"] == ["books", "garden"]
    assert sum(manifest["users"]["splits"].values()) == len(users)
    assert np.array_equal(np.load(folder / "users.keys.npy"), corpus.keys)
    for user in range(0, len(users), 13):
        for column, service in enumerate(("books", "garden")):
            offsets, items = corpus.users(service)
            log = items[int(offsets[user]) : int(offsets[user + 1])][-CAP:]
            z = users[user, 8 * column : 8 * column + 8]
            np.testing.assert_allclose(z, alone(model, corpus, log), atol=1e-5)
    items = np.load(folder / "items.keys.npy").astype(np.int64)
    both = [corpus.service_items(s) for s in ("books", "garden")]
    assert items.tolist() == sorted(np.concatenate(both).tolist())
    expected = item_features(model, corpus, items)
    np.testing.assert_allclose(stacked(folder, "items"), expected, atol=1e-5)
    sizes = [f["rows"] for f in manifest["files"] if f["file"].startswith("users-")]
    assert sizes == [41] * (len(users) // 41) + [len(users) % 41]
    for file in manifest["files"]:
        assert sha256(folder / file["file"]) == file["sha256"]


def test_parquet_and_half_precision_hold_the_same(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    exact = stacked(written(Embedding(run, corpus, tmp_path / "a", SMALL)), "users")
    half = Wanted(format="parquet", shard_users=100)
    folder = written(Embedding(run, corpus, tmp_path / "b", half))
    table = pq.read_table(sorted(folder.glob("users-*.parquet")))
    assert table["key"].to_numpy().tolist() == corpus.keys.tolist()
    lists = table["z"].combine_chunks()
    assert (str(lists.type.value_type), lists.type.list_size) == ("halffloat", 16)
    found = lists.flatten().to_numpy().reshape(exact.shape)
    np.testing.assert_allclose(found, exact, rtol=2**-10, atol=1e-4)
    assert sorted(p.suffix for p in folder.glob("*.keys.*")) == []


def test_users_of_a_task_as_they_were_before_its_targets(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    task = Task.open(corpus, "beauty")
    wanted = Wanted(task="beauty", services=("garden",), items_per_user=2, dtype="float32")
    embedding = Embedding(run, corpus, tmp_path, wanted, step=3)
    empty = np.arange(0, task.n_users, 3)
    embedding._histories["garden"] = forget(embedding._histories["garden"], empty)
    found = stacked(written(embedding), "users")
    assert np.array_equal(np.load(tmp_path / "users.keys.npy"), task.keys)
    offsets, items = task.history("garden")
    for user in range(task.n_users):
        log = items[int(offsets[user]) : int(offsets[user + 1])][-2:]
        expected = np.zeros(8) if user in empty else alone(embedding.model, corpus, log)
        np.testing.assert_allclose(found[user], expected, atol=1e-5)
    last = Embedding(run, corpus, tmp_path / "last", Wanted()).model
    assert not torch.equal(last.token_emb.weight, embedding.model.token_emb.weight)


def test_users_of_a_corpus_that_the_encoder_never_saw(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    other = elsewhere(run.root)
    wanted = Wanted(what="both", dtype="float32", unknown="garden")
    embedding = Embedding(run, other, tmp_path, wanted)
    found = stacked(written(embedding), "users")
    seen = as_seen_by(other, corpus, unknown="garden")
    offsets, items = other.users("music")
    for user in range(0, len(found), 5):
        log = items[int(offsets[user]) : int(offsets[user + 1])][-CAP:]
        np.testing.assert_allclose(found[user, 8:], alone(embedding.model, seen, log), atol=1e-5)
    h = item_features(embedding.model, seen, np.arange(seen.n_items))
    np.testing.assert_allclose(stacked(tmp_path, "items"), h, atol=1e-5)


def test_a_reduction_is_applied_service_by_service(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    whole = Embedding(run, corpus, tmp_path / "whole", SMALL)
    z = stacked(written(whole), "users").reshape(-1, 2, 8)
    rng = np.random.default_rng(0)
    layers = {s: rng.normal(size=(3, 8)).astype(np.float32) for s in ("garden", "books")}
    encoder = whole.shards.header["encoder_sha256"]
    wanted = Wanted(dtype="float32", reduction=Reduction(layers, encoder, "0" * 64))
    found = stacked(written(Embedding(run, corpus, tmp_path / "reduced", wanted)), "users")
    expected = np.stack([z[:, 0] @ layers["books"].T, z[:, 1] @ layers["garden"].T], axis=1)
    np.testing.assert_allclose(found, expected.reshape(-1, 6), atol=1e-5)
    with pytest.raises(EmbedError, match=r"the reduction is of the encoder .*, and step 3 of run"):
        Embedding(run, corpus, tmp_path / "x", wanted, step=3)
    del layers["garden"]
    with pytest.raises(EmbedError, match="no layer for garden; valid: books"):
        Embedding(run, corpus, tmp_path / "x", wanted)


def test_features_of_an_encoder_with_a_reduction_of_its_own(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    """Users have its width, items the model's; a reduction learnt afterwards comes on top."""
    config = configure(corpus, model=ModelConfig(layers=1, d_model=8, heads=2, feature_dim=3))
    narrow = RunDir.create(run.root, config, "tiny")
    model = publish(narrow, config, 6)
    embedding = Embedding(narrow, corpus, tmp_path / "z", SMALL)
    folder = written(embedding)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["users"]["dims"], manifest["items"]["dims"]) == (2 * 3, 8)
    users, items = stacked(folder, "users"), stacked(folder, "items")
    assert (users.shape[1], items.shape[1]) == (2 * 3, 8)
    offsets, logs = corpus.users("garden")
    for user in range(0, len(users), 13):
        log = logs[int(offsets[user]) : int(offsets[user + 1])][-CAP:]
        np.testing.assert_allclose(users[user, 3:], alone(model, corpus, log), atol=1e-5)
    layers = {s: np.full((2, 3), i + 1, np.float32) for i, s in enumerate(("books", "garden"))}
    encoder = embedding.shards.header["encoder_sha256"]
    wanted = Wanted(dtype="float32", reduction=Reduction(layers, encoder, "0" * 64))
    found = stacked(written(Embedding(narrow, corpus, tmp_path / "less", wanted)), "users")
    sums = users.reshape(-1, 2, 3).sum(2)
    expected = sums[:, [0, 0, 1, 1]] * [1, 1, 2, 2]
    np.testing.assert_allclose(found, expected, atol=1e-5)


# who writes them, and what happens meanwhile


@given(
    arrays=st.integers(1, 5), minimum=st.integers(0, 3), ranks=st.integers(1, 5), srun=st.booleans()
)
def test_shares_cover_the_work_once(arrays: int, minimum: int, ranks: int, srun: bool) -> None:
    rank, world = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if srun else ("RANK", "WORLD_SIZE")
    shares = []
    for i in range(arrays):
        array = {"SLURM_ARRAY_TASK_ID": str(minimum + i), "SLURM_ARRAY_TASK_MIN": str(minimum),
                 "SLURM_ARRAY_TASK_COUNT": str(arrays)}  # fmt: skip
        for r in range(ranks):
            here = {**array, rank: str(r), world: str(ranks)}
            shares.append(share_of(here))
            assert share_of({**here, **array}, f"{i}/{arrays}") == shares[-1]
    assert {count for _, count in shares} == {arrays * ranks}
    assert sorted(index for index, _ in shares) == list(range(arrays * ranks))


def test_a_batch_script_alone_is_no_rank() -> None:
    assert share_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == (0, 1)
    assert share_of({}) == (0, 1)
    assert share_of({}, "2/3") == (2, 3)
    for wrong in ("3/3", "1", "a/2", "-1/2", "/", "1/0"):
        with pytest.raises(EmbedError, match=r"valid: i/n|count from 0"):
            share_of({}, wrong)
    with pytest.raises(EmbedError, match="RANK = 'x' is not a number"):
        share_of({"RANK": "x", "WORLD_SIZE": "2"})


def test_shares_in_any_order_make_the_same_files(
    run: RunDir, corpus: Corpus, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    for index in (2, 0, 1):
        shards = (embedding := Embedding(run, corpus, tmp_path, SMALL)).shards
        shards.begin()
        embedding.pace([p for p in shards.parts[index::3] if p.features])
        embedding.write(shards.missing(shards.parts[index::3])[::-1])
        assert shards.complete() == (index == 1)
    assert digests(tmp_path) == undisturbed


FAULTS = {
    "truncated": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "flipped": lambda f: f.write_bytes(f.read_bytes()[:-1] + b"\x01"),
    "gone": lambda f: f.unlink(),
    "empty record": lambda f: (f.parent / "parts" / f"{f.name}.json").write_text(""),
    "no record": lambda f: (f.parent / "parts" / f"{f.name}.json").unlink(),
    "another's record": lambda f: (f.parent / "parts" / f"{f.name}.json").write_text(
        json.dumps({"of": "x", "bytes": f.stat().st_size, "sha256": sha256(f)})
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_is_found_and_written_again(
    run: RunDir, corpus: Corpus, tmp_path: Path, undisturbed: dict[str, str], fault: str
) -> None:
    written(Embedding(run, corpus, tmp_path, SMALL))
    for name in ("users-000001.npy", "users.keys.npy"):
        FAULTS[fault](tmp_path / name)
    embedding = Embedding(run, corpus, tmp_path, SMALL)
    faults = embedding.shards.faults()
    assert [f.partition(": ")[0] for f in faults] == [
        str(tmp_path / n) for n in ("users.keys.npy", "users-000001.npy")
    ]
    before = (tmp_path / "users-000000.npy").stat().st_ino
    written(embedding)
    assert digests(tmp_path) == undisturbed
    assert (tmp_path / "users-000000.npy").stat().st_ino == before  # what was whole stays
    assert embedding.shards.faults() == []


def test_a_full_disk_leaves_what_is_finished(
    run: RunDir,
    corpus: Corpus,
    tmp_path: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedding = Embedding(run, corpus, tmp_path, SMALL)
    embedding.shards.begin()
    real, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr("scaling.files.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            embedding.write(embedding.shards.parts)
    assert not embedding.shards.complete()
    done = len(embedding.shards.parts) - len(embedding.shards.missing(embedding.shards.parts))
    assert 0 < done < len(embedding.shards.parts)
    assert not list(tmp_path.rglob(".tmp-*"))
    written(embedding)
    assert digests(tmp_path) == undisturbed


def test_what_killed_processes_left_goes_once_it_is_old(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    old, young = tmp_path / ".tmp-old", tmp_path / ".tmp-young"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    written(Embedding(run, corpus, tmp_path, Wanted()))
    assert (old.exists(), young.exists()) == (False, True)


def test_other_features_in_the_folder_are_refused(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(RecordError, match=r"manifest.json: no such file"):
        Embedding(run, corpus, tmp_path, SMALL).shards.faults()
    assert list(tmp_path.iterdir()) == []
    written(Embedding(run, corpus, tmp_path, SMALL))
    before = digests(tmp_path)
    for wanted, step, message in (
        (SMALL, 3, "step = 6, not 3"),
        (Wanted(what="both", dtype="float16", shard_users=41), None, "dtype = 'float32'"),
        (Wanted(what="both", dtype="float32", shard_users=40), None, "users.shard_rows = 41, not"),
        (Wanted(what="users", dtype="float32", shard_users=41), None, "items = {"),
    ):
        with pytest.raises(EmbedError, match=message):
            Embedding(run, corpus, tmp_path, wanted, step).shards.begin()
    assert digests(tmp_path) == before


def test_what_cannot_be_written_is_refused_by_name(
    run: RunDir, corpus: Corpus, tmp_path: Path
) -> None:
    for wanted, message in (
        (Wanted(services=("beauty",)), "no logs of service 'beauty'; valid: books, garden"),
        (Wanted(services=("x",), what="items"), "no items of service 'x'; valid: beauty, books, g"),
        (Wanted(services=("x",), task="books"), "'x' in task 'books'; valid: books, garden"),
    ):
        with pytest.raises(EmbedError, match=message):
            Embedding(run, corpus, tmp_path, wanted)
    with pytest.raises(CorpusError, match="no task 'x'; valid: beauty, books"):
        Embedding(run, corpus, tmp_path, Wanted(task="x"))
    with pytest.raises(RecordError, match="no step 5; exported: 3, 6"):
        Embedding(run, corpus, tmp_path, Wanted(), step=5)
    # Items of a service that nobody is pretrained on are items all the same.
    folder = written(Embedding(run, corpus, tmp_path, Wanted(services=("beauty",), what="items")))
    assert np.load(folder / "items.keys.npy").tolist() == corpus.service_items("beauty").tolist()


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "float32", "NaN or infinity"),
        (1e5, "float16", "too large for float16; use float32"),
    ],
)
def test_features_that_are_no_numbers_are_not_written(
    tmp_path: Path, corpus: Corpus, value: float, dtype: Any, message: str
) -> None:
    config = configure(corpus)
    other = RunDir.create(tmp_path, config, "tiny")
    publish(other, config, 6, service__ln__bias=value)
    embedding = Embedding(other, corpus, tmp_path / "out", Wanted(dtype=dtype))
    embedding.shards.begin()
    with pytest.raises(EmbedError, match=message):
        embedding.write(embedding.shards.parts)
    assert not list((tmp_path / "out").glob("users-*"))


def test_the_verb(root: Path, run: RunDir, tmp_path: Path) -> None:
    def call(*words: str) -> Any:
        out = str(tmp_path / "out")
        return CliRunner().invoke(
            app, ["embed", run.run_key[:6], "--root", str(root), "--out", out, *words]
        )

    said = call("--dry-run", "--shard-users", "50")
    assert said.exit_code == 0
    assert "users x 16 float16: " in said.stderr
    assert "50 users a file" in said.stderr
    assert "of 1" in said.stderr
    assert not (tmp_path / "out").exists()
    first = call("--shard-users", "50", "--shards", "0/2", "--json")
    assert json.loads(first.stdout)["complete"] is False
    assert call("--shard-users", "50", "--check").exit_code == 1
    second = call("--shard-users", "50", "--shards", "1/2", "--json")
    found = json.loads(second.stdout)
    assert found["complete"] is True
    assert found["files_written"] + json.loads(first.stdout)["files_written"] == found["files"]
    assert call("--shard-users", "50", "--check").exit_code == 0
    again = call("--shard-users", "50")
    assert again.exit_code == 0
    assert "0 of" in again.stdout
    refused = call("--shard-users", "51")
    assert refused.exit_code == 2
    assert "error: " in refused.stderr
    assert "users.shard_rows = 50, not 51" in refused.stderr
    for words, message in (
        (("--array", "2"), "--array needs --cluster"),
        (("--fit-reduction", "4", "--task", "books"), "with --out, --corpus and --step alone"),
        (("--corpus", "nowhere"), "no corpus 'nowhere'; prepared: "),
        (("--shards", "2/2"), "parts count from 0"),
    ):
        said = call(*words)
        assert (said.exit_code, message in said.stderr) == (2, True)


def test_the_verb_learns_a_reduction_and_applies_it(
    root: Path, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling.transfer.reduce.STEPS", 20)

    def call(*words: str) -> Any:
        said = CliRunner().invoke(app, ["embed", run.run_key, "--root", str(root), *words])
        assert said.exit_code == 0, said.output
        return said

    reduction, out = str(tmp_path / "reduction"), tmp_path / "out"
    said = call("--out", reduction, "--fit-reduction", "4")
    assert "4 dimensions (contrastive); loss of validation users" in said.stdout
    again = call("--out", f"{reduction}2", "--fit-reduction", "4", "--json")
    assert json.loads(again.stdout)["dims"] == 4
    call("--out", str(out), "--reduce", reduction, "--dtype", "float32", "--services", "garden")
    call("--out", str(tmp_path / "whole"), "--dtype", "float32", "--services", "garden")
    layer = Reduction.read(tmp_path / "reduction").matrices["garden"]
    expected = stacked(tmp_path / "whole", "users") @ layer.T
    np.testing.assert_allclose(stacked(out, "users"), expected, atol=1e-5)


@pytest.mark.slow
def test_killed_anywhere_and_resumed_the_files_are_the_same(
    root: Path, run: RunDir, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"
    call = [sys.executable, "-m", "scaling.cli", "embed", run.run_key, f"--root={root}",
            f"--out={out}", "--what=both", "--dtype=float32", "--shard-users=41"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng = random.Random(0)

    def start(share: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*call, f"--shards={share}"], env=env, stderr=subprocess.DEVNULL)

    def files() -> int:
        return sum(path.is_file() for path in out.rglob("*"))

    killed = 0
    for _ in range(4):
        processes = [start("0/2"), start("0/1")]  # both want the first half
        enough = files() + rng.randint(1, 4)
        while files() < enough and any(p.poll() is None for p in processes):
            time.sleep(0.001)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    last = [start("0/2"), start("1/2"), start("0/1")]
    assert [process.wait() for process in last] == [0, 0, 0]
    assert digests(out) == undisturbed
    assert killed > 0


@pytest.mark.slow
@pytest.mark.data
def test_food_and_kitchen_users_in_two_batches_or_one(
    clue_test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real logs: the batch a user is in changes z by rounding alone."""
    from scaling.data.prepare import prepare

    monkeypatch.setenv("CLUE_DATA", str(clue_test_data))
    path = Path(__file__).parents[2] / "sweeps" / "corpora" / "food_kitchen.toml"
    corpus = Corpus.open(prepare(path, tmp_path))
    config = configure(corpus)
    run = RunDir.create(tmp_path, config, corpus.card.name)
    publish(run, config, 6)
    whole = stacked(written(Embedding(run, corpus, tmp_path / "a", SMALL)), "users")
    monkeypatch.setattr(features, "CHUNK_ITEMS", 500)
    parts = stacked(written(Embedding(run, corpus, tmp_path / "b", SMALL)), "users")
    assert len(whole) == len(corpus.keys)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
