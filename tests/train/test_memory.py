"""Micro-batches that fit: found, recorded, used again, and told where one did not."""

import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import StopAt, configure, curve, parameters

from scaling.config import ModelConfig, TrainSettings
from scaling.data.batches import Batches
from scaling.models import build
from scaling.models.transformer import Stack
from scaling.packing import PackedBatch
from scaling.rundir import RunDir
from scaling.slurm.failures import classify
from scaling.train import memory
from scaling.train.loop import train
from scaling.train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def rows_of(batch: PackedBatch) -> list[list[list[int]]]:
    """Tokens of every item of every row, as lists."""
    items = [
        batch.tokens[a:b].tolist()
        for a, b in zip(batch.token_offsets, batch.token_offsets[1:], strict=False)
    ]
    return [
        [items[i] for i in batch.items[a:b]]
        for a, b in zip(batch.item_offsets, batch.item_offsets[1:], strict=False)
    ]


@settings(max_examples=30)
@given(seed=st.integers(0, 999), users=st.integers(1, 6), tokens=st.integers(1, 120))
def test_the_heaviest_users_are_a_batch_of_their_own(seed, users, tokens):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, 2 * users)
    item_lengths = rng.integers(1, 6, 9)
    batch = PackedBatch(
        tokens=rng.integers(1, 50, item_lengths.sum()),
        token_offsets=np.append(0, item_lengths.cumsum()),
        items=rng.integers(0, 9, lengths.sum()),
        item_offsets=np.append(0, lengths.cumsum()),
        n_views=2,
    )
    part = memory.heaviest_users(batch, tokens)
    whole, n = rows_of(batch), part.n_users
    of_user = [whole[u] + whole[users + u] for u in range(users)]
    weights = [sum(map(len, items)) for items in of_user]
    heaviest = sorted(range(users), key=lambda u: -weights[u])[:n]
    assert rows_of(part) == [whole[s * users + u] for s in (0, 1) for u in heaviest]
    assert n == users or len(part.tokens) >= tokens
    assert n == 1 or len(part.tokens) - weights[heaviest[-1]] < tokens


@pytest.mark.parametrize("system", ["clue", "single"])
def test_bytes_are_per_element_and_grow_with_the_model(corpus, system, monkeypatch):
    monkeypatch.setattr(memory, "MAX_TOKENS_SINGLE", 12)
    monkeypatch.setattr("scaling.models.single.MAX_TOKENS_SINGLE", 12)
    batch = Batches(corpus, configure(corpus)).batch(0)

    def measured(layers, d):
        shape = {"system": system, "layers": layers, "d_model": d, "heads": 2}
        model = build(ModelConfig.model_validate(shape), corpus.card.vocab_size)
        token, item = memory.bytes_per_element(model, batch)
        assert (item == 0) == (system == "single")
        return [token] if system == "single" else [token, item]

    # Per element and layer, in fp32: norms, qkv, attention, feed-forward 4d twice: 16 d and more.
    for layers, d in [(1, 16), (2, 16), (2, 64)]:
        for each in measured(layers, d):
            assert 4 * 16 * d * layers < each < 4 * 60 * d * (layers + 2)


def test_what_is_found_fits_the_memory_there_is(corpus, monkeypatch):
    config = configure(corpus)
    model = build(config.model, config.data.vocab_size)
    batch = Batches(corpus, config).batch(0)
    token, item = memory.bytes_per_element(model, batch)
    found = {}
    for gib in (1, 2, 4):
        monkeypatch.setattr(memory, "free_memory", lambda _, g=gib: g * 2**30)
        found[gib] = memory.find_micro_batch(model, batch, config, ALONE)
        planned = found[gib] * max(1.5 * token, token + 1.5 * item)
        assert 0.3 * 2**30 * gib < planned < memory.SHARE["cpu"] * 2**30 * gib
    assert found[1] < found[2] < found[4]
    monkeypatch.setattr(memory, "free_memory", lambda _: 1)
    assert memory.find_micro_batch(model, batch, config, ALONE) == memory.ROUND


@pytest.mark.parametrize("feature_dim", [None, 5])
def test_room_is_left_for_embeddings_and_loss_at_their_widths(corpus, monkeypatch, feature_dim):
    model = ModelConfig(layers=1, d_model=16, heads=2, dropout=0.0, feature_dim=feature_dim)
    config = configure(corpus, model=model)
    encoder = build(model, config.data.vocab_size)
    batch = Batches(corpus, config).batch(0)
    monkeypatch.setattr(memory, "ROUND", 1)
    monkeypatch.setattr(memory, "bytes_per_element", lambda *_: (1 / memory.IN_FLIGHT, 0.0))
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**9)
    width = feature_dim or 16
    taken = 2 * (len(batch.item_lengths) + len(batch.items)) * 16 * 4  # embeddings, gradients
    taken += 4 * (6 * 2 * 16 * width + 6 * 16 * 16)  # f(z) of 2 x 16, scores of 16 x 16
    taken += 2 * 4 * sum(p.numel() for p in encoder.parameters())
    found = memory.find_micro_batch(encoder, batch, config, ALONE)
    assert found == pytest.approx(memory.SHARE["cpu"] * 10**9 - taken, abs=2)
    tried = []
    honest = memory.contrastive_loss
    monkeypatch.setattr(
        memory, "contrastive_loss", lambda p, *a: tried.append(p.shape) or honest(p, *a)
    )
    assert memory._fits(encoder, batch, config, 64)
    assert tried == [(2, 16, width)]


def test_room_in_a_control_group_counts_the_cache_of_files_as_free(tmp_path, monkeypatch):
    """A corpus that is mapped into memory fills a job's group, and is given up when asked."""
    (tmp_path / "self").write_text("0::/job\n7:blkio:/x\n")
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 100000\nactive_file 300000\ninactive_file 400000\n")
    (tmp_path / "cgroup" / "memory.max").write_text("max\n")  # no limit above
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "self")
    monkeypatch.setattr(memory, "GROUP_ROOT", str(tmp_path / "cgroup"))
    assert memory._cgroup_room() == [800_000]


def test_free_memory_is_that_of_the_machine_and_of_its_control_groups(monkeypatch):
    known = Path("/proc/meminfo").read_text()
    total = int(known.split("MemTotal:")[1].split()[0]) * 1024
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    free = memory.free_memory(ALONE)
    assert 0 < free < total
    monkeypatch.setattr(memory, "_cgroup_room", lambda: [12_345_678])
    assert memory.free_memory(ALONE) == 12_345_678
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(ALONE) == 12_345_678 // 4


def test_a_restart_takes_the_micro_batch_of_the_start_before(corpus, tmp_path, monkeypatch):
    """With dropout it is part of what is repeated; memory may be another by then."""
    config = configure(corpus, dropout=0.1)
    whole = RunDir.create(tmp_path / "whole", config, "tiny")
    train(whole, corpus, TrainSettings(threads=1, micro_batch_tokens=50))
    run = RunDir.create(tmp_path / "run", config, "tiny")
    monkeypatch.setattr(memory, "find_micro_batch", lambda *_: 50)
    stop = StopAt(7)
    train(run, corpus, TrainSettings(threads=1), progress=stop.progress, should_stop=stop)
    monkeypatch.setattr(memory, "find_micro_batch", lambda *_: pytest.fail("was looked for"))
    result = train(run, corpus, TrainSettings(threads=1))
    assert [s["micro_batch_tokens"] for s in run.starts()] == [50, 50]
    assert result["micro_batch_tokens"] == 50
    assert curve(run) == curve(whole)
    assert all(torch.equal(v, parameters(whole)[n]) for n, v in parameters(run).items())


def test_a_micro_batch_that_is_changed_by_hand_is_taken_with_a_warning(corpus, tmp_path, caplog):
    run = RunDir.create(tmp_path, configure(corpus, dropout=0.1), "tiny")
    stop = StopAt(7)
    first, second = (TrainSettings(threads=1, micro_batch_tokens=n) for n in (50, 80))
    train(run, corpus, first, progress=stop.progress, should_stop=stop)
    train(run, corpus, second)
    assert [s["micro_batch_tokens"] for s in run.starts()] == [50, 80]
    assert "micro_batch_tokens = 80, and 50 before" in caplog.text


def test_without_dropout_the_micro_batch_changes_nothing_beyond_rounding(corpus, tmp_path):
    config = configure(corpus)
    losses = []
    for i, tokens in enumerate((None, 40, 300)):
        run = RunDir.create(tmp_path / str(i), config, "tiny")
        train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=tokens))
        losses.append([r["loss"] for r in run.curve("train") + run.curve("pool")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.fixture
def small_device(monkeypatch):
    """A device that can hold the activations of so many slots at once, and says so as CUDA does."""

    def make(slots):
        forward = Stack.forward

        def limited(self, x, layout):
            if torch.is_grad_enabled() and x.shape[0] > slots:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return forward(self, x, layout)

        monkeypatch.setattr(Stack, "forward", limited)

    return make


def test_a_step_that_does_not_fit_names_the_micro_batch_that_does(corpus, tmp_path, small_device):
    config = configure(corpus)
    small_device(64)
    run = RunDir.create(tmp_path, config, "tiny")
    with pytest.raises(memory.OutOfMemory) as told:
        train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=100_000))
    assert classify(told.value) == "gpu_oom"
    found = re.fullmatch(
        r"step 1 does not fit into memory with micro_batch_tokens = 100000; (\d+) does \(tried\): "
        r"set it in the profile's \[train\]",
        str(told.value),
    )
    assert run.result() is None
    result = train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=int(found[1])))
    assert result["step"] == config.steps


def test_where_the_loss_does_not_fit_no_micro_batch_is_named(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("scaling.train.contrast.contrastive_loss", full)
    monkeypatch.setattr(memory, "contrastive_loss", full)
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    with pytest.raises(memory.OutOfMemory, match="smaller batch_size, negatives or model"):
        train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=100))


def test_where_nothing_fits_more_ranks_are_asked_for(corpus, tmp_path, small_device):
    small_device(2)
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    with pytest.raises(memory.OutOfMemory, match="nor does any down to its longest sequence of"):
        train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=100))


def test_a_failed_step_s_tensors_are_let_go(corpus, small_device):
    """Or no smaller micro-batch could fit where it would."""
    config = configure(corpus, model=ModelConfig(layers=2, d_model=64, heads=2, dropout=0.0))
    model = build(config.model, config.data.vocab_size)
    batch = Batches(corpus, config).batch(0)
    alive = []

    def step():
        held = model(batch)
        alive.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory")

    try:
        step()
    except torch.OutOfMemoryError as e:
        assert alive[0]() is not None
        told = memory.explain(e, model, batch, config, 512, 3)
    assert alive[0]() is None
    assert "step 4" in str(told)


def test_a_job_that_ran_out_of_memory_is_classed_so():
    told = memory.OutOfMemory("512 does (tried)")
    told.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert classify(told) == "gpu_oom"
    told.__cause__ = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    assert classify(told) == "host_oom"
    assert memory.is_out_of_memory(told.__cause__)
    cuda = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    assert memory.is_out_of_memory(cuda)
    assert classify(cuda) == "gpu_oom"
    # slurm does not import train, and has words of its own
    for cause, words in (("host_oom", memory.HOST_IS_FULL), ("gpu_oom", memory.GPU_IS_FULL)):
        for said in words:
            assert classify(RuntimeError(f"{said}: tried to allocate 3 GiB")) == cause
    assert not memory.is_out_of_memory(RuntimeError("gloo: connection reset"))
