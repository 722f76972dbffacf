"""The training loop against a plain PyTorch one, across ranks, and through kills."""

import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scaling.config import ConfigError, ModelConfig, RunConfig, TrainSettings
from scaling.data.batches import Batches, make_batch, pack_items
from scaling.data.corpus import Corpus
from scaling.flops import exact_flops
from scaling.models import build
from scaling.models.losses import contrastive_loss
from scaling.rundir import RunDir, Superseded
from scaling.train import checkpoint
from scaling.train.export import load_encoder
from scaling.train.loop import learning_rate, train

RANK = Path(__file__).parent / "rank.py"


def configure(corpus: Corpus, **changes) -> RunConfig:
    """A small run on a corpus: 24 steps of 16 users, evaluated 4 times."""
    dropout = changes.pop("dropout", 0.0)
    return RunConfig.model_validate(
        {
            "model": ModelConfig(layers=1, d_model=16, heads=2, dropout=dropout),
            "data": {
                "corpus_digest": corpus.card.digest,
                "vocab_size": corpus.card.vocab_size,
                "n_services": len(corpus.card.services),
                "items_per_user": 4,
            },
            "batch_size": 16,
            "negatives": 16,
            "steps": 24,
            "evaluations": 4,
            "optim": {"lr": 5e-3},
            "pool": corpus.card.pool,
            "seed": 3,
            **changes,
        }
    )


def spawn(run: RunDir, corpus: Corpus, ranks: int = 1, **environment) -> list[subprocess.Popen]:
    """Start one process per rank of ``rank.py``."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, str(RANK), str(run.root), run.run_key, str(corpus.path)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **({**joined, "RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(ranks)
    ]


def finish(processes: list[subprocess.Popen]) -> str:
    """Wait for all ranks; their output, asserted to have ended well."""
    output = [p.communicate(timeout=300)[0].decode() for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(output)
    return "\n".join(output)


def curve(run: RunDir, kind: str = "train") -> list[dict]:
    """Metrics rows without what depends on the clock."""
    clock = ("seconds", "speed")
    return [{k: v for k, v in row.items() if k not in clock} for row in run.curve(kind)]


class StopAt:
    """``train(..., progress=stop.progress, should_stop=stop)`` stops after so many steps."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    def progress(self, step: int, *_: object) -> None:
        self.done = step

    def __call__(self) -> bool:
        return self.done >= self.step


def parameters(run: RunDir) -> dict[str, torch.Tensor]:
    """Final parameters of a run."""
    return checkpoint.newest(run).load("params")


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """A run with dropout, trained in one go: what every disturbed run must equal."""
    root = tmp_path_factory.mktemp("undisturbed")
    run = RunDir.create(root, configure(corpus, dropout=0.1), "tiny")
    result = train(run, corpus, TrainSettings(threads=1))
    return run, result


@pytest.mark.parametrize(("stage", "feature_dim"), [(0, None), (1, None), (2, None), (1, 5)])
def test_training_equals_a_plain_pytorch_loop(corpus, tmp_path, stage, feature_dim):
    model = ModelConfig(layers=1, d_model=16, heads=2, dropout=0.0, feature_dim=feature_dim)
    config = configure(corpus, negatives=8, model=model)
    run = RunDir.create(tmp_path, config, "tiny")
    result = train(run, corpus, TrainSettings(zero_stage=stage, threads=1))

    model = build(config.model, config.data.vocab_size, config.seed)
    weights = [p for n, p in model.named_parameters() if n != "logit_scale"]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1},
         {"params": [model.logit_scale], "weight_decay": 0.0}],
        betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    losses = []
    for step in range(config.steps):
        batch = Batches(corpus, config).batch(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        projected = model.project(model(batch)).view(config.data.n_views, 16, -1)
        loss = contrastive_loss(projected, model.logit_scale, 8)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        losses.append(loss.item())
    assert [row["loss"] for row in run.curve("train")] == pytest.approx(losses, rel=1e-4)
    rows = corpus.split("pool")
    model.eval()
    with torch.no_grad():
        pool = make_batch(corpus, range(rows.start, rows.stop), 4)
        projected = model.project(model(pool)).view(config.data.n_views, config.pool.size, -1)
        expected = contrastive_loss(projected, model.logit_scale, config.pool.size)
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert result["chance"] == pytest.approx(math.log(config.pool.size))
    for name, value in parameters(run).items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-4), name


def test_a_service_alone_is_contrasted_by_its_halves(corpus, tmp_path):
    service = corpus.card.services[1]
    config = configure(corpus)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"services": (service,), "n_services": 1}),
            "pool": corpus.card.pool_of((service,)),
        }
    )
    run = RunDir.create(tmp_path, config, "tiny")
    result = train(run, corpus, TrainSettings(threads=1))
    model = build(config.model, config.data.vocab_size, config.seed)
    model.load_state_dict(parameters(run))
    offsets, items = corpus.users(service)
    pool = range(corpus.split("pool").start, corpus.split("pool").stop)
    logs = [items[offsets[u] : offsets[u + 1]][-8:].astype(np.int64) for u in pool]
    halves = [log[: len(log) // 2] for log in logs], [log[len(log) // 2 :] for log in logs]
    ragged = [(np.array([len(x) for x in half]), np.concatenate(half)) for half in halves]
    with torch.no_grad():
        z = model.eval().project(model(pack_items(corpus, ragged, distinct=False)))
        loss = contrastive_loss(z.view(2, len(pool), -1), model.logit_scale, len(pool))
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert result["users"] == 24 * 16
    assert result["flops_by_part"]["loss"] == 6 * 24 * 16 * 16 * config.model.d_model
    other = config.model_copy(update={"pool": corpus.card.pool})
    with pytest.raises(ConfigError, match="its pool is not the run's"):
        train(RunDir.create(tmp_path, other, "tiny"), corpus, TrainSettings(threads=1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_give_the_losses_of_one(corpus, tmp_path, stage):
    config = configure(corpus)
    alone = RunDir.create(tmp_path / "alone", config, "tiny")
    train(alone, corpus, TrainSettings(threads=1))
    together = RunDir.create(tmp_path / "together", config, "tiny")
    finish(spawn(together, corpus, ranks=2, ZERO_STAGE=str(stage)))
    for kind in ("train", "pool"):
        one, two = alone.curve(kind), together.curve(kind)
        assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-4)
        for counter in ("tokens", "items", "users", "flops_exact"):
            assert [r[counter] for r in one] == [r[counter] for r in two]


def test_stopping_and_resuming_repeats_the_run_bit_for_bit(undisturbed, corpus, tmp_path):
    whole, result = undisturbed
    run = RunDir.create(tmp_path, whole.spec(), "tiny")
    for stop in (StopAt(5), StopAt(12)):  # 12 is a step whose evaluation the next start owes
        assert (
            train(
                run,
                corpus,
                TrainSettings(threads=1),
                progress=stop.progress,
                should_stop=stop,
            )
            is None
        )
    resumed = train(run, corpus, TrainSettings(threads=1))
    assert run.generations() == [1, 2, 3]
    assert curve(run) == curve(whole)
    assert curve(run, "pool") == curve(whole, "pool")
    assert all(torch.equal(v, parameters(whole)[n]) for n, v in parameters(run).items())
    clock = ("seconds", "gpu_hours", "generation", "micro_batch_tokens")  # free memory differs
    assert {k: v for k, v in resumed.items() if k not in clock} == {
        k: v for k, v in result.items() if k not in clock
    }


@pytest.mark.slow
def test_a_run_killed_anywhere_continues_bit_for_bit(undisturbed, corpus, tmp_path):
    whole, _ = undisturbed
    run = RunDir.create(tmp_path, whole.spec(), "tiny")
    for kills in range(3):
        (process,) = spawn(run, corpus, STEP_SECONDS="0.05")
        seen = (run.progress() or {"step": 0})["step"]
        while (run.progress() or {"step": 0})["step"] < min(seen + 5, 23) or not (
            len(run.generations()) > kills
        ):
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert run.result() is None
    finish(spawn(run, corpus))
    assert len(run.generations()) == 4
    assert curve(run) == curve(whole)
    assert curve(run, "pool") == curve(whole, "pool")
    assert all(torch.equal(v, parameters(whole)[n]) for n, v in parameters(run).items())


def test_a_finished_run_is_not_trained_again(undisturbed, corpus):
    run, result = undisturbed
    assert train(run, corpus, TrainSettings(threads=1)) == run.result()
    assert run.generations() == [1]
    assert result["step"] == 24


def test_a_fenced_off_writer_commits_nothing(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")

    def overtaken(step, steps, loss):
        if step == 10:
            run.start_generation({"resumed_from": 0})

    with pytest.raises(Superseded):
        train(run, corpus, TrainSettings(threads=1, checkpoint_every=8), progress=overtaken)
    assert [p.name for p in checkpoint.committed(run)] == ["step-000000008"]
    assert run.result() is None


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus, optim={"lr": 1e30}), "tiny")
    result = train(run, corpus, TrainSettings(threads=1))
    assert result["status"] == "diverged"
    assert 0 < result["step"] < 24
    assert result["loss"] is None
    assert run.result() == result


def test_counters_are_those_of_the_batches(undisturbed, corpus):
    run, result = undisturbed
    config = run.spec()
    tokens = tokens_sq = items = items_sq = 0
    for step in range(config.steps):
        batch = Batches(corpus, config).batch(step)
        tokens += sum(int(n) for n in batch.item_lengths)
        tokens_sq += sum(int(n) ** 2 for n in batch.item_lengths)
        items += sum(int(n) for n in batch.row_lengths)
        items_sq += sum(int(n) ** 2 for n in batch.row_lengths)
    assert (result["tokens"], result["items"], result["users"]) == (tokens, items, 24 * 16)
    n = config.data.n_views
    expected = exact_flops(
        config.model, tokens=tokens, tokens_sq=tokens_sq, items=items, items_sq=items_sq,
        rows=24 * 16 * n, users=24 * 16, n_views=n, negatives=16,
    )  # fmt: skip
    assert result["flops_exact"] == expected.total


def test_the_single_transformer_trains_and_counts_the_tokens_it_reads(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("scaling.train.accounting.MAX_TOKENS_SINGLE", 12)
    monkeypatch.setattr("scaling.models.single.MAX_TOKENS_SINGLE", 12)
    model = ModelConfig(system="single", layers=1, d_model=16, heads=1, dropout=0.0)
    config = configure(corpus, model=model)
    run = RunDir.create(tmp_path, config, "tiny")
    result = train(run, corpus, TrainSettings(threads=1))
    read = 0
    for step in range(config.steps):
        batch = Batches(corpus, config).batch(step)
        for first, last in itertools.pairwise(batch.item_offsets):
            read += min(12, int(batch.token_offsets[last] - batch.token_offsets[first]))
    assert result["tokens"] == read
    assert result["loss"] < result["chance"]


@pytest.mark.parametrize("system", ["clue", "single"])
def test_a_run_with_reduced_features_resumes_counts_and_is_exported(corpus, tmp_path, system):
    model = ModelConfig(system=system, layers=1, d_model=16, heads=2, dropout=0.1, feature_dim=5)
    config = configure(corpus, model=model)
    whole, resumed = (RunDir.create(tmp_path / name, config, "tiny") for name in ("one", "two"))
    settings = TrainSettings(threads=1, micro_batch_tokens=60)
    result = train(whole, corpus, settings)
    stop = StopAt(7)
    train(resumed, corpus, settings, progress=stop.progress, should_stop=stop)
    train(resumed, corpus, settings)
    assert curve(resumed) == curve(whole)
    losses = [row["loss"] for row in curve(whole)]
    assert np.mean(losses[-6:]) < np.mean(losses[:6])
    last = parameters(whole)
    assert last["reduce.weight"].shape == (5, 16)
    assert all(torch.equal(v, parameters(resumed)[n]) for n, v in last.items())
    assert result["n_total"] == sum(p.numel() for p in last.values())
    assert result["parameters"]["reduction"] == 5 * 16
    # Forward and backward: the reduction 16 x 5, W1 and W2 5 x 5; cosines of width 5.
    rows = 24 * 16 * config.data.n_services
    assert result["flops_by_part"]["head"] == 3 * 2 * (16 * 5 + 2 * 5 * 5) * rows
    assert result["flops_by_part"]["loss"] == 3 * 2 * 5 * 16 * 24 * 16
    encoder, _ = load_encoder(whole)
    assert all(torch.equal(v, last[n]) for n, v in encoder.state_dict().items())
    assert encoder(Batches(corpus, config).batch(0)).shape == (2 * 16, 5)


@pytest.mark.slow
def test_bf16_follows_fp32_and_resumes_bit_for_bit(corpus, tmp_path):
    config = configure(corpus, precision="bf16")
    exact = RunDir.create(tmp_path / "fp32", configure(corpus), "tiny")
    whole = RunDir.create(tmp_path / "whole", config, "tiny")
    resumed = RunDir.create(tmp_path / "resumed", config, "tiny")
    settings = TrainSettings(threads=1)
    for run in (exact, whole):
        train(run, corpus, settings)
    stop = StopAt(7)
    assert train(resumed, corpus, settings, progress=stop.progress, should_stop=stop) is None
    train(resumed, corpus, settings)
    assert curve(resumed) == curve(whole)
    losses, expected = (np.array([r["loss"] for r in curve(run)]) for run in (whole, exact))
    apart = np.abs(losses / expected - 1)
    assert apart.mean() < 0.05
    assert apart.max() < 0.25  # a batch of four users has steps of its own
    taus = [r["logit_scale"] for r in curve(whole)]
    assert len(set(taus)) == len(taus)  # in bf16 itself, 14.2 is followed by 14.4
    with pytest.raises(ConfigError, match="zero_stage 1 or 2"):
        train(
            RunDir.create(tmp_path / "refused", config, "tiny"),
            corpus,
            TrainSettings(zero_stage=0),
        )


def test_learning_rate_warms_up_linearly_and_ends_at_its_tenth(corpus):
    config = configure(corpus, steps=1000, optim={"lr": 5e-4, "warmup": 0.01})
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[:10] == pytest.approx([5e-4 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(5e-4)
    assert rates[-1] == pytest.approx(5e-5)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    middle = learning_rate(config, 10 + 495 - 1)
    assert middle == pytest.approx(5e-5 + 0.5 * 4.5e-4)


def test_another_corpus_or_an_odd_number_of_ranks_is_refused(corpus, tmp_path, monkeypatch):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    other = configure(corpus).model_copy(
        update={"data": configure(corpus).data.model_copy(update={"corpus_digest": "a" * 16})}
    )
    wrong = RunDir.create(tmp_path, other, "tiny")
    with pytest.raises(ConfigError, match=r"is not the run's \(aaaaaaaaaaaaaaaa\)"):
        train(wrong, corpus, TrainSettings())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        train(run, corpus, TrainSettings())
    assert run.generations() == []
