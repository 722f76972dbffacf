"""The engine: the same training at any number of ranks, ZeRO stage and micro-batch, and in fp16."""

import json
import math
import socket
from pathlib import Path

import fp16
import numpy as np
import pytest
import torch
from test_loop import StopAt, configure, curve, finish, parameters, spawn

from scaling.config import ConfigError, ModelConfig, TrainSettings
from scaling.data.corpus import Corpus
from scaling.rundir import RunDir
from scaling.train import checkpoint, engine, loop
from scaling.train.loop import learning_rate, train
from scaling.train.ranks import Ranks

EVERY_STEP = {"checkpoint_every": 1, "keep_checkpoints": 100}
# A step of Adam enlarges the rounding of a small gradient by up to lr / eps, and how far two runs
# part by that depends on the machine. With an eps of the size of the gradients (a norm of .01 over
# some 10^4 parameters) they stay as close as they began.
DAMPED = {"lr": 5e-3, "eps": 1e-4}
COUNTED = ("tokens", "tokens_sq", "items", "items_sq", "users", "flops_exact", "clipped_steps")


def first_step(run: RunDir) -> dict[str, torch.Tensor]:
    """Gradients of the first step, clipped, by name: Adam's first moment is a tenth of them."""
    first = checkpoint.read(run.path / "ckpt" / "step-000000001")
    return {name: moment / (1 - 0.9) for name, moment in first.load("exp_avg").items()}


def off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest distance of a parameter's values, relative to their norm."""
    assert found.keys() == expected.keys()
    return max(float((v - expected[n]).norm() / expected[n].norm()) for n, v in found.items())


def agree(run: RunDir, expected: RunDir) -> None:
    """Assert that two runs differ by no more than rounding."""
    for kind in ("train", "pool"):
        rows, wanted = run.curve(kind), expected.curve(kind)
        assert [r["step"] for r in rows] == [r["step"] for r in wanted]
        for name in COUNTED:  # exactly: they tell which users a step had
            assert [r[name] for r in rows] == [r[name] for r in wanted], name
        for name, tolerance in (("loss", 1e-5), ("logit_scale", 1e-6), ("grad_norm", 1e-4)):
            if name in rows[0]:
                found = [r[name] for r in rows]
                assert found == pytest.approx([r[name] for r in wanted], rel=tolerance), name
    assert rows[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-6)
    assert [r["lr"] for r in run.curve("train")] == [r["lr"] for r in expected.curve("train")]
    assert off(parameters(run), parameters(expected)) < 5e-5


def together(run: RunDir, corpus: Corpus, ranks: int, **environment: str) -> None:
    """Train on several ranks, to the end or to STOP_AFTER."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FORK": str(ranks)}
    finish(spawn(run, corpus, **joined, **environment))
    assert run.starts()[-1]["world_size"] == ranks


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """8 steps in fp32 in one process and one piece, each committed."""
    config = configure(corpus, steps=8, optim=DAMPED)
    run = RunDir.create(tmp_path_factory.mktemp("alone"), config, "tiny")
    train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=10**6, **EVERY_STEP))
    return run


@pytest.mark.parametrize("micro_batch_tokens", [64, 10**6])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_and_micro_batches_agree_in_losses_gradients_and_parameters(
    alone, corpus, tmp_path, stage, micro_batch_tokens
):
    run = RunDir.create(tmp_path, alone.spec(), "tiny")
    settings = TrainSettings(
        zero_stage=stage, threads=1, micro_batch_tokens=micro_batch_tokens, **EVERY_STEP
    )
    train(run, corpus, settings)
    agree(run, alone)
    assert off(first_step(run), first_step(alone)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage", "micro_batch_tokens"), [(2, 0, 10**6), (4, 2, 64)])
def test_ranks_agree_with_one_process_in_losses_gradients_and_parameters(
    alone, corpus, tmp_path, ranks, stage, micro_batch_tokens
):
    run = RunDir.create(tmp_path, alone.spec(), "tiny")
    settings = {**EVERY_STEP, "zero_stage": stage, "micro_batch_tokens": micro_batch_tokens}
    together(run, corpus, ranks, SETTINGS=json.dumps(settings))
    agree(run, alone)
    assert off(first_step(run), first_step(alone)) < 1e-5


@pytest.mark.slow
def test_ranks_agree_with_one_process_where_features_are_reduced(corpus, tmp_path):
    model = ModelConfig(layers=1, d_model=16, heads=2, dropout=0.0, feature_dim=5)
    config = configure(corpus, steps=8, model=model, optim=DAMPED)
    one, two = (RunDir.create(tmp_path / name, config, "tiny") for name in ("one", "two"))
    train(one, corpus, TrainSettings(threads=1, micro_batch_tokens=10**6, **EVERY_STEP))
    settings = {**EVERY_STEP, "zero_stage": 2, "micro_batch_tokens": 64}
    together(two, corpus, 2, SETTINGS=json.dumps(settings))
    assert off(first_step(two), first_step(one)) < 1e-5
    found, expected = ([r["loss"] for r in run.curve("train")] for run in (two, one))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_stage(alone, corpus, tmp_path):
    """1, 2, 4 ranks and 1 again: the same users at every step, the same losses."""
    run = RunDir.create(tmp_path, alone.spec(), "tiny")
    seldom = {"checkpoint_every": 100}
    stop = StopAt(2)
    settings = TrainSettings(threads=1, zero_stage=0)
    train(run, corpus, settings, progress=stop.progress, should_stop=stop)
    for ranks, stage, last in ((2, 1, "4"), (4, 2, "6")):
        settings = json.dumps({**seldom, "zero_stage": stage})
        together(run, corpus, ranks, SETTINGS=settings, STOP_AFTER=last)
    train(run, corpus, TrainSettings(threads=1, zero_stage=2))
    assert [s["world_size"] for s in run.starts()] == [1, 2, 4, 1]
    assert [s["resumed_from"] for s in run.starts()] == [0, 2, 4, 6]
    agree(run, alone)
    assert run.result()["status"] == "done"


@pytest.mark.slow
def test_detached_ranks_halve_the_encoder_s_gradient_but_not_the_logit_scale_s(
    alone, corpus, tmp_path
):
    """Through DeepSpeed's average over ranks; before the clip, which is of both together."""
    config = configure(corpus, steps=8, gather="detached", gather_ranks=2)
    run = RunDir.create(tmp_path, config, "tiny")
    together(run, corpus, 2, SETTINGS=json.dumps(EVERY_STEP), STOP_AFTER="1")
    norm, exact_norm = (r.curve("train")[0]["grad_norm"] for r in (run, alone))
    exact = first_step(alone)
    for name, clipped in first_step(run).items():
        share = 1.0 if name == "logit_scale" else 0.5
        expected = share * exact[name] * exact_norm
        assert float((clipped * norm - expected).norm() / expected.norm()) < 1e-4, name
    assert run.curve("train")[0]["loss"] == pytest.approx(alone.curve("train")[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("gather", ["detached", "local", "none"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_runs_whose_numbers_depend_on_the_ranks_refuse_another_number(
    corpus, tmp_path, monkeypatch, gather, ranks
):
    config = configure(corpus, gather=gather, gather_ranks=2, negatives=8)
    run = RunDir.create(tmp_path, config, "tiny")
    started = Ranks(0, ranks, torch.device("cpu"))
    monkeypatch.setattr(Ranks, "join", lambda: started)
    told = rf"gather = '{gather}' was planned for gather_ranks = 2, and {ranks} ranks have started"
    with pytest.raises(ConfigError, match=told):
        train(run, corpus, TrainSettings(threads=1))
    assert run.generations() == []


# ---- fp16 ---------------------------------------------------------------------------------------


class Witness:
    """Wraps what the loop calls at every backward pass and update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[bytes, int]] = []
        self.updates: list[tuple[float, bool]] = []
        backward, update = loop._backward, loop.update

        def _backward(engine_, batch, *args):
            self.seen.append((batch.tokens.tobytes(), torch.initial_seed()))
            return backward(engine_, batch, *args)

        def _update(engine_, lr):
            norm, taken = update(engine_, lr)
            self.updates.append((lr, taken))
            return norm, taken

        monkeypatch.setattr(loop, "_backward", _backward)
        monkeypatch.setattr(loop, "update", _update)


def in_fp16(corpus: Corpus, root: Path, **changes) -> RunDir:
    return RunDir.create(root, configure(corpus, precision="fp16", **changes), "tiny")


def losses(run: RunDir) -> np.ndarray:
    return np.array([r["loss"] for r in run.curve("train")])


def without(run: RunDir, *names: str, kind: str = "train") -> list[dict]:
    return [{k: v for k, v in row.items() if k not in names} for row in curve(run, kind)]


@pytest.mark.parametrize("stage", [1, 2])
def test_fp16_follows_fp32(corpus, tmp_path, monkeypatch, stage):
    fp16.accept(monkeypatch.setattr)
    exact = RunDir.create(tmp_path / "fp32", configure(corpus), "tiny")
    train(exact, corpus, TrainSettings(threads=1))
    run = in_fp16(corpus, tmp_path / "fp16")
    result = train(run, corpus, TrainSettings(zero_stage=stage, threads=1))
    assert result["status"] == "done"
    apart = np.abs(losses(run) / losses(exact) - 1)
    assert apart[:3].max() < 2e-3
    assert apart.mean() < 0.05
    assert apart.max() < 0.25
    assert result["loss"] == pytest.approx(exact.result()["loss"], rel=0.05)
    rows, wanted = run.curve("train"), exact.curve("train")
    # The norm is of the gradient unscaled, and so is what is clipped.
    norms, expected = ([r["grad_norm"] for r in c[:3]] for c in (rows, wanted))
    assert norms == pytest.approx(expected, rel=0.02)
    assert [r["lr"] for r in rows] == [r["lr"] for r in wanted]
    for name in ("tokens", "items", "users", "flops_exact"):
        assert [r[name] for r in rows] == [r[name] for r in wanted]
    taus = [r["logit_scale"] for r in rows]
    assert len(set(taus)) == len(taus)  # in fp16 itself, 14.27 is followed by 14.28
    assert all(r["loss_scale"] is None for r in wanted)


def test_gradients_are_unscaled_before_the_clip(corpus, tmp_path, monkeypatch):
    """Or the clip would take .01 of the scale for .01, and Adam's eps would damp what is left."""
    runs = []
    for power in (2, 6):
        fp16.accept(monkeypatch.setattr, initial_scale_power=power)
        run = in_fp16(corpus, tmp_path / str(power))
        train(run, corpus, TrainSettings(threads=1, **EVERY_STEP))
        assert {r["loss_scale"] for r in run.curve("train")} == {2.0**power}
        moments = torch.cat([m.flatten() for m in first_step(run).values()])
        assert float(moments.norm()) == pytest.approx(0.01, rel=1e-3)
        runs.append(run)
    low, high = runs
    apart = np.abs(losses(low) / losses(high) - 1)
    assert apart[:3].max() < 1e-3
    assert apart.mean() < 0.02
    for name in ("damping", "damping_p10"):
        found, expected = (r.curve("pool")[0][name] for r in runs)
        assert found == pytest.approx(expected, rel=0.05)


def test_moments_too_small_for_fp16_are_kept(corpus, tmp_path, monkeypatch):
    fp16.accept(monkeypatch.setattr)
    run = in_fp16(corpus, tmp_path)
    train(run, corpus, TrainSettings(threads=1))
    moments = checkpoint.newest(run).load("exp_avg_sq")
    v = moments["item.layers.0.fc1.weight"]
    assert v.dtype == torch.float32
    assert float(v.half().abs().max()) == 0  # this is what fp16 makes of them
    assert float(v.min()) > 0
    first = checkpoint.newest(run).load("params")["item.layers.0.fc1.weight"]
    assert not torch.equal(first, first.half().float())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_overflows_is_repeated_and_the_schedule_waits(
    corpus, tmp_path, monkeypatch, stage
):
    """A loss scale far too high costs backward passes and nothing else, to the bit."""
    settings = TrainSettings(zero_stage=stage, threads=1, micro_batch_tokens=100)
    runs, witnesses = [], []
    for power in (8, 40):
        with monkeypatch.context() as patch:
            fp16.accept(patch.setattr, initial_scale_power=power)
            witnesses.append(Witness(patch))
            run = in_fp16(corpus, tmp_path / str(power), dropout=0.1, steps=12)
            train(run, corpus, settings)
            runs.append(run)
    whole, retried = runs
    assert whole.result()["overflows"] == 0
    tries = retried.result()["overflows"]
    scales = [r["loss_scale"] for r in curve(retried)]
    assert scales[0] == 2.0 ** (40 - curve(retried)[0]["overflows"])
    assert scales[-1] == 2.0 ** (40 - tries)
    assert curve(retried)[0]["overflows"] >= 20

    # The same users with the same dropout, again and again; then the next.
    plain, again = witnesses
    assert len(plain.seen) == 12
    assert len(again.seen) == 12 + tries
    assert [lr for lr, taken in again.updates if taken] == [lr for lr, _ in plain.updates]
    assert [taken for _, taken in again.updates].count(True) == 12
    taken = iter(again.updates)
    for seen, expected in zip(again.seen, steps_of(again), strict=True):
        assert seen == plain.seen[expected]
        assert next(taken)[0] == learning_rate(whole.spec(), expected)

    lr = [r["lr"] for r in curve(retried)]
    assert lr == [learning_rate(whole.spec(), step) for step in range(12)]
    apart = np.abs(losses(retried) / losses(whole) - 1)
    assert apart.max() < 0.02


def steps_of(witness: Witness) -> list[int]:
    """The step of every backward pass: one more after each that was taken."""
    steps, step = [], 0
    for _, taken in witness.updates:
        steps.append(step)
        step += taken
    return steps


def test_a_repeated_step_is_the_one_that_a_fitting_scale_takes(corpus, tmp_path, monkeypatch):
    runs = []
    for power in (40, None):
        # the second starts with the scale that the first came down to
        power = power or int(math.log2(runs[0].curve("train")[-1]["loss_scale"]))
        fp16.accept(monkeypatch.setattr, initial_scale_power=power)
        run = in_fp16(corpus, tmp_path / str(power), dropout=0.1)
        train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=100))
        runs.append(run)
    retried, fitting = runs
    assert fitting.result()["overflows"] == 0 < retried.result()["overflows"]
    for kind in ("train", "pool"):
        names = ("overflows", "loss_scale")
        assert without(retried, *names, kind=kind) == without(fitting, *names, kind=kind)
    assert all(torch.equal(v, parameters(fitting)[n]) for n, v in parameters(retried).items())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_step_at_which_the_loss_scale_doubles_is_not_halved(
    corpus, tmp_path, monkeypatch, stage
):
    """Unscaled, a run whose scale doubles at every other step is one whose scale never does."""
    runs = []
    for good_steps in (1000, 2):
        fp16.accept(monkeypatch.setattr, initial_scale_power=2)
        monkeypatch.setattr(engine, "GOOD_STEPS", good_steps)
        run = in_fp16(corpus, tmp_path / str(good_steps), steps=8)
        train(run, corpus, TrainSettings(zero_stage=stage, threads=1))
        runs.append(run)
    steady, doubling = runs
    assert [r["loss_scale"] for r in curve(steady)] == [4.0] * 8
    assert [r["loss_scale"] for r in curve(doubling)] == [4, 8, 8, 16, 16, 32, 32, 64]
    assert losses(doubling) == pytest.approx(losses(steady), rel=0.02)
    norms, expected = ([r["grad_norm"] for r in curve(run)] for run in (doubling, steady))
    assert norms == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("stage", [1, 2])
def test_fp16_resumes_bit_for_bit_with_its_loss_scale(corpus, tmp_path, monkeypatch, stage):
    """The scale doubles after every fourth good step, so that it overflows again and again."""
    fp16.accept(monkeypatch.setattr, initial_scale_power=20)
    monkeypatch.setattr(engine, "GOOD_STEPS", 4)
    settings = TrainSettings(zero_stage=stage, threads=1, micro_batch_tokens=100)
    whole, run = (in_fp16(corpus, tmp_path / name, dropout=0.1) for name in ("whole", "run"))
    train(whole, corpus, settings)
    for last in (5, 6, 15):
        stop = StopAt(last)
        train(run, corpus, settings, progress=stop.progress, should_stop=stop)
        saved = checkpoint.newest(run).manifest["loss_scale"]
        assert saved["cur_scale"] == curve(whole)[last - 1]["loss_scale"]
    train(run, corpus, settings)
    overflows = [r["overflows"] for r in curve(whole)]
    assert len(set(overflows[4:])) > 2
    assert len({r["loss_scale"] for r in curve(whole)}) > 1
    assert curve(run) == curve(whole)
    assert curve(run, "pool") == curve(whole, "pool")
    assert all(torch.equal(v, parameters(whole)[n]) for n, v in parameters(run).items())
    assert (
        checkpoint.newest(run).manifest["loss_scale"]
        == checkpoint.newest(whole).manifest["loss_scale"]
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loss_scale_that_cannot_be_lowered_ends_the_run_as_diverged(
    corpus, tmp_path, monkeypatch, stage
):
    fp16.accept(monkeypatch.setattr, initial_scale_power=40, min_loss_scale=2.0**38)
    witness = Witness(monkeypatch)
    run = in_fp16(corpus, tmp_path)
    result = train(run, corpus, TrainSettings(zero_stage=stage, threads=1))
    assert result["status"] == "diverged"
    assert result["loss"] is None
    assert len(witness.updates) == 3  # at 2^40, 2^39, 2^38
    assert run.result() == result


def test_a_loss_that_is_not_finite_is_not_tried_again_in_fp16(corpus, tmp_path, monkeypatch):
    """No loss scale would mend it."""
    fp16.accept(monkeypatch.setattr, initial_scale_power=4)
    witness = Witness(monkeypatch)
    run = in_fp16(corpus, tmp_path, optim={"lr": 1e30})
    result = train(run, corpus, TrainSettings(threads=1))
    assert result["status"] == "diverged"
    assert len(witness.updates) == result["step"] < 5


@pytest.mark.slow
def test_ranks_repeat_an_overflowing_step_together(corpus, tmp_path, monkeypatch):
    fp16.accept(monkeypatch.setattr, initial_scale_power=24)
    whole, run = (in_fp16(corpus, tmp_path / name, steps=12) for name in ("whole", "run"))
    train(whole, corpus, TrainSettings(zero_stage=1, threads=1))
    scaling = json.dumps({"initial_scale_power": 24})
    settings = json.dumps({"zero_stage": 2, "checkpoint_every": 100})
    together(run, corpus, 2, FP16=scaling, SETTINGS=settings)
    assert run.result()["status"] == "done"
    assert run.result()["overflows"] > 5
    for name in ("lr", "tokens", "users"):
        assert [r[name] for r in curve(run)] == [r[name] for r in curve(whole)]
    apart = np.abs(losses(run) / losses(whole) - 1)
    assert apart[:2].max() < 2e-3
    assert apart.mean() < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have fp16")
def test_fp16_is_refused_where_the_device_has_none(corpus, tmp_path):
    with pytest.raises(ConfigError, match="precision = 'fp16': DeepSpeed does not train in it"):
        train(in_fp16(corpus, tmp_path), corpus, TrainSettings(threads=1))
