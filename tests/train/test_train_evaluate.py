"""Pool losses and their standard error."""

import math

import numpy as np
import pytest
import torch
from test_loop import StopAt, configure, curve

from scaling.config import TrainSettings
from scaling.models import build
from scaling.models.losses import logits, symmetric_cross_entropy
from scaling.rundir import RunDir
from scaling.train.evaluate import Evaluation, standard_error
from scaling.train.loop import train


@pytest.mark.parametrize(("noise", "tau"), [(1.0, 5.0), (0.5, 14.27), (2.0, 14.27)])
def test_the_standard_error_is_the_scatter_over_pools(noise, tau):
    """Against the truth: 300 independent pools of 96 users."""
    rng = np.random.default_rng(0)
    losses, errors = [], []
    for _ in range(300):
        taste = rng.normal(size=(96, 16))
        views = np.stack([taste + noise * rng.normal(size=taste.shape) for _ in range(2)])
        scores = logits(torch.from_numpy(views), torch.tensor([math.log(tau)]), 96)
        losses.append(float(symmetric_cross_entropy(scores)))
        errors.append(standard_error(scores))
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.12)


def test_the_standard_error_is_that_of_losses_of_parts():
    """Against a loop over the parts, with three services and tau at its cap."""
    n, m = 40, 36
    views = torch.from_numpy(np.random.default_rng(1).normal(size=(3, n, 8)))
    scores = logits(views, torch.tensor([math.log(100)]), n)
    draw = np.random.default_rng(0)
    losses = []
    for _ in range(64):
        part = torch.from_numpy(draw.permutation(n)[:m])
        losses.append(symmetric_cross_entropy(scores[..., part, :][..., part]).item())
    expected = np.std(losses, ddof=1) * math.sqrt(m / (n - m))
    assert standard_error(scores) == pytest.approx(expected, rel=1e-4)


def test_a_pool_of_nine_has_no_standard_error():
    assert standard_error(torch.zeros(1, 1, 9, 9)) is None


def test_an_evaluation_stops_when_told(corpus):
    config = configure(corpus)
    model = build(config.model, config.data.vocab_size)
    evaluation = Evaluation(corpus, config)
    model.train()
    assert evaluation(model, model.logit_scale.detach(), lambda: True) is None
    assert model.training
    whole = evaluation(model, model.logit_scale.detach(), lambda: False)
    assert whole == evaluation(model, model.logit_scale.detach())
    assert whole["loss_se"] > 0


def test_an_evaluation_that_was_stopped_is_made_up_for(corpus, tmp_path):
    """A signal during an evaluation waits for no evaluation, and loses none."""
    config = configure(corpus)
    whole = RunDir.create(tmp_path / "whole", config, "tiny")
    expected = train(whole, corpus, TrainSettings(threads=1))
    run = RunDir.create(tmp_path / "run", config, "tiny")
    for at in (6, 24):  # steps with an evaluation; 24 is the last
        stop = StopAt(at)
        polls = iter([False, *[True] * 99])  # the loop sees no signal yet, the evaluation does

        def should_stop(stop=stop, polls=polls):
            return stop() and next(polls)

        progress = stop.progress
        stopped = train(
            run, corpus, TrainSettings(threads=1), progress=progress, should_stop=should_stop
        )
        assert stopped is None
        assert at not in {row["step"] for row in run.curve("pool")}
    result = train(run, corpus, TrainSettings(threads=1))
    assert curve(run, "pool") == curve(whole, "pool")
    assert curve(run) == curve(whole)
    assert result["loss"] == expected["loss"]


def test_a_start_that_is_stopped_in_an_owed_evaluation_still_owes_it(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    stop = StopAt(6)
    train(run, corpus, TrainSettings(threads=1), progress=stop.progress, should_stop=stop)
    assert train(run, corpus, TrainSettings(threads=1), should_stop=lambda: True) is None
    assert not run.curve("pool")
    train(run, corpus, TrainSettings(threads=1))
    assert [row["step"] for row in run.curve("pool")] == [6, 12, 18, 24]


def test_a_pool_loss_that_is_not_finite_ends_the_run_as_diverged(corpus, tmp_path, monkeypatch):
    """In 16 bits the pool may overflow right after an update, before a training loss shows it."""
    whole = Evaluation.__call__

    def overflowed(self, *args):
        row = whole(self, *args)
        return row | {"loss": math.nan} if run.progress()["step"] == 12 else row

    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    monkeypatch.setattr(Evaluation, "__call__", overflowed)
    result = train(run, corpus, TrainSettings(threads=1))
    assert (result["status"], result["step"], result["loss"]) == ("diverged", 12, None)
    assert [row["step"] for row in run.curve("pool")] == [6]
